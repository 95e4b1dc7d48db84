"""Full ranking: where the one right item stands among all items, by hit rate, NDCG and MRR."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_sim.types import Batch


def ranks(scores: Tensor, target: Tensor) -> Tensor:
    """1 + the number of items with a strictly higher score than the target; item 0, the padding, is no candidate.

    Neither is an item whose score is minus infinity: as a target it has rank infinity. A score that is no number counts as
    higher than every other, so that a broken model ranks nothing well.

    Shapes: scores [..., I + 1], target [...] -> [...] float64.
    """
    own = scores.gather(-1, target.long()[..., None])
    higher = (~(scores <= own))[..., 1:].sum(-1)
    absent = (own == -torch.inf) | (target == 0)[..., None]
    return (1.0 + higher.double()).masked_fill(absent[..., 0], torch.inf)


def gains(rank: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """What a target at this rank adds to each metric: hr@k, ndcg@k and mrr@k, named hr10 and so on.    Shapes: any -> same."""
    found: dict[str, Tensor] = {}
    for k in ks:
        hit = (rank <= k).to(rank.dtype)
        found |= {f"hr{k}": hit, f"ndcg{k}": hit / (rank + 1).log2(), f"mrr{k}": hit / rank}
    return found


class Ranking:
    """Means of the gains in each split, summed on the device, over the samples with a history (`length` above 0).

    hr: share of targets at rank k or better; ndcg: mean of 1 / log2(rank + 1) over those, 0 for the others; mrr: of 1 / rank.
    """

    def __init__(
        self, ks: Sequence[int] = (5, 10, 20), runs: int = 1, splits: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        self.ks = tuple(ks)
        self.counts = torch.zeros(runs, splits, dtype=torch.float64, device=device)
        self.sums = {name: torch.zeros_like(self.counts) for name in gains(self.counts, self.ks)}

    def update(self, output: Tensor, batch: Batch) -> None:
        """Add a chunk.

        Shapes: output [R, B, I + 1]; batch: target [R, B], optionally split, length and valid [R, B].
        """
        target = batch["target"]
        split = batch["split"] if "split" in batch else torch.zeros_like(target, dtype=torch.int64)
        counted = scored(batch).double()
        self.counts.scatter_add_(1, split, counted)
        for name, gain in gains(ranks(output, target), self.ks).items():
            self.sums[name].scatter_add_(1, split, gain * counted)

    def result(self) -> dict[str, Tensor]:
        """Each metric [R, S], NaN for a split without samples; then starts afresh."""
        found = {name: total / self.counts for name, total in self.sums.items()}
        for kept in (self.counts, *self.sums.values()):
            kept.zero_()
        return found


def scored(batch: Batch) -> Tensor:
    """Which events count: those with a history, and a target.    Shapes: -> [R, B] bool."""
    counted = batch["target"] > 0
    for name in ("length", "valid"):
        if name in batch:
            counted = counted & (batch[name] > 0)
    return counted
