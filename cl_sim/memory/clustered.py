"""Recent samples and a reservoir of older ones, with an embedding each, grouped around prototypes.

Source: Poulakakis-Daktylidis and Jamali-Rad 2024, "BECLR: Batch Enhanced Contrastive Few-Shot Learning" (DyCE: a queue of
embeddings in clusters); the reservoir behind the queue, the stored inputs and the assignment of all rows are ours, for streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cl_sim.memory import clusters
from cl_sim.memory.rows import Rows, last_wins
from cl_sim.rng import Rng
from cl_sim.runs import join, per_run
from cl_sim.types import Batch, Field

Assign = Literal["memory_ot", "batch_ot", "nearest"]
ROUNDS = 20  # of the first k-means
ITERATIONS = 10  # of a balanced assignment

nearest_prototype = per_run(clusters.nearest_prototype)
first_clusters = per_run(clusters.first_clusters)
cluster_means = per_run(clusters.cluster_means)
balanced = per_run(clusters.balanced_assignment)
refill = per_run(clusters.refill)


def label_of(space: str) -> str:
    """The field that holds the clusters of an embedding."""
    return "cluster" + _suffix(space)


def _suffix(space: str) -> str:
    return "" if space == "z" else f"_{space}"


class Clustered(Rows):
    """A ring of the newest samples, and a reservoir of everything that has left it; either may have no room.

    Beside the given fields a row has its embedding `z` (of length 1), its `cluster` (-1: none yet) and when it was `born`
    (its number in the stream). Rows 0..recent-1 are the ring. All rows are assigned anew whenever `regroup` is called, so
    that each prototype has an equal share of the memory (`memory_ot`) or by the nearest prototype (`nearest`); `batch_ot`
    keeps the labels that rows came with. Further `spaces` hold other embeddings of the same rows, grouped on their own:
    `p` has its clusters in `cluster_p` and its prototypes in `prototypes_p`.

    Shapes: prototypes [R, P, D].
    """

    prototypes: Tensor

    def __init__(
        self,
        recent: int,
        long: int,
        groups: int,
        width: int,
        fields: Mapping[str, Field],
        rng: Rng,
        *,
        assign: Assign = "memory_ot",
        eps: float = 0.05,
        gamma: float = 0.9,
        spaces: tuple[str, ...] = (),
    ) -> None:
        self.spaces = ("z", *spaces)
        vector, number = Field((width,), torch.float32), Field((), torch.int64)
        own = {name: field for space in self.spaces for name, field in ((space, vector), (label_of(space), number))}
        super().__init__(recent + long, {**fields, **own, "born": number}, rng)
        self.recent, self.long, self.groups = recent, long, groups
        self.assign, self.eps, self.gamma = assign, eps, gamma
        for space in self.spaces:
            centres = torch.zeros(rng.runs, groups, width, device=rng.key.device)
            self.register_buffer("prototypes" + _suffix(space), centres)

    @property
    def nbytes(self) -> int:
        """What the rows and prototypes of one run cost."""
        return super().nbytes + sum(self.centres(space)[0].nbytes for space in self.spaces)

    def centres(self, space: str) -> Tensor:
        """The prototypes of one space.    Shapes: -> [R, P, D]."""
        found: Tensor = getattr(self, "prototypes" + _suffix(space))
        return found

    def valid(self) -> Tensor:
        """Which rows are filled, told on the device.    Shapes: -> [R, M] bool."""
        return torch.arange(self.capacity, device=self.run.device) < self.seen[:, None]

    def add(self, batch: Batch) -> None:
        """Put a batch into the ring; what it pushes out is offered to the reservoir.

        Shapes: fields [R, B, ...], z [R, B, D], cluster [R, B].
        """
        size = batch["z"].shape[1]
        place = self.seen[:, None] + torch.arange(size, device=self.seen.device)  # [R, B], from 0
        batch = {**batch, "born": place}
        ring = place % max(self.recent, 1)
        pushed = self.take(ring[:, : self.recent])  # by the first samples; later ones push out earlier ones
        through = {name: value[:, : max(size - self.recent, 0)] for name, value in batch.items()}
        self._offer(join(pushed, through), place - self.recent)
        start = max(size - self.recent, 0)
        self.write(ring[:, start:], {name: value[:, start:] for name, value in batch.items()})
        self.count(size)

    def _offer(self, rows: Batch, number: Tensor) -> None:
        """Vitter's rule for the samples with these numbers, from 0; below 0 there is no sample.    Shapes: number [R, B]."""
        if not self.long:
            return
        drawn = self.rng.below((number + 1).clamp(min=1), number.shape[1])
        slot = torch.where(number < self.long, number, drawn)
        kept = (number >= 0) & (slot < self.long)
        self.write(last_wins(torch.where(kept, slot + self.recent, self.capacity), self.capacity), rows)

    def can_replay(self, n: int) -> bool:
        """Has a draw of n the size that it will have for ever?"""
        return self._drawable() >= min(n, self.long or self.recent)

    def _drawable(self) -> int:
        return max(len(self) - self.recent, 0) if self.long else len(self)

    def replay(self, n: int) -> Batch:
        """Draw rows of the reservoir, or of the ring where there is none: at most n per run, none twice, equally likely."""
        allowed = self.valid()
        if self.long:
            allowed = allowed & (torch.arange(self.capacity, device=allowed.device) >= self.recent)
        return self.take(self.rng.choose(min(n, self._drawable()), allowed))

    def start(self) -> None:
        """Find the first prototypes: as many different rows, moved by k-means."""
        valid = self.valid()
        seeds = self.rng.choose(self.groups, valid)
        for space in self.spaces:
            rows, centres = self.row(space)[:, : self.capacity], self.centres(space)
            centres.copy_(first_clusters(rows, valid, rows[self.run, seeds], steps=ROUNDS))
            self._label(space, nearest_prototype(rows, centres))

    def assigned(self, rows: Tensor, space: str = "z") -> Tensor:
        """Clusters of some rows among which every prototype gets an equal share.    Shapes: rows [R, n, D] -> [R, n]."""
        return self._balanced(rows, torch.ones_like(rows[..., 0], dtype=torch.bool), self.centres(space))

    def _balanced(self, rows: Tensor, valid: Tensor, centres: Tensor) -> Tensor:
        scores = rows @ torch.nn.functional.normalize(centres, dim=-1).mT
        scores = scores.masked_fill(~valid[..., None], -torch.inf)
        return balanced(scores, eps=self.eps, iterations=ITERATIONS).argmax(-1)

    def regroup(self) -> None:
        """Assign all rows, unless they keep their labels; move the prototypes; give empty ones a new place."""
        for space in self.spaces:
            rows, centres = self.row(space)[:, : self.capacity], self.centres(space)
            if self.assign == "memory_ot":
                self._label(space, self._balanced(rows, self.valid(), centres))
            if self.assign == "nearest":
                self._label(space, nearest_prototype(rows, centres))
            labels = self.row(label_of(space))[:, : self.capacity].masked_fill(~self.valid(), -1)
            moved = cluster_means(rows, labels, centres, gamma=self.gamma)
            centres.copy_(refill(moved, rows, labels))

    def _label(self, space: str, labels: Tensor) -> None:
        self.row(label_of(space))[:, : self.capacity] = labels.masked_fill(~self.valid(), -1)

    def sizes(self) -> Tensor:
        """Rows in each cluster.    Shapes: -> [R, P] int64."""
        labels = self.row("cluster")[:, : self.capacity].masked_fill(~self.valid(), -1)
        return (labels[..., None] == torch.arange(self.prototypes.shape[1], device=labels.device)).sum(1)

    def age(self) -> Tensor:
        """Mean age of the rows, in samples of the stream; 0 while empty.    Shapes: -> [R]."""
        valid = self.valid()
        ages = (self.seen[:, None] - self.row("born")[:, : self.capacity]).masked_fill(~valid, 0)
        return ages.sum(1) / valid.sum(1).clamp(min=1)
