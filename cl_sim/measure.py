"""What is measured on a stream, by its task: right answers for classes, the right item's place for rankings, tracks for clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cl_sim.errors import BadConfig
from cl_sim.metrics.accuracy import Accuracy
from cl_sim.metrics.association import association_accuracy
from cl_sim.metrics.clips import EXTRAS, Association, Candidates, Tracked
from cl_sim.metrics.fewshot import NAMES, Episodic
from cl_sim.metrics.probe import Probe
from cl_sim.metrics.ranking import Ranking, gains, ranks, scored
from cl_sim.tracker import TrackerConfig
from cl_sim.types import Batch, Logs

TESTED = "tested"  # how many samples of a batch were measured before it was learned


class Metric(Protocol):
    """Sums over chunks of evaluation samples, on the device."""

    def update(self, output: Tensor, batch: Batch) -> None:
        """Add a chunk."""
        ...

    def result(self) -> dict[str, Tensor]:
        """Each metric [R, S]; then starts afresh."""
        ...


@dataclass(frozen=True)
class Measure:
    """The metric of the evaluation sets, and what is summed when a batch is predicted before it is learned."""

    name: str  # what its summaries begin with
    matrix: str  # which of the metric's results they are made from
    metric: Callable[[int, int, torch.device], Metric]  # for R runs and S splits
    test: Callable[[Tensor, Batch], Logs] | None  # sums [R] over a batch by name, and `tested`; None: nothing to test
    every_batch: bool = False  # test on all batches if on any, and report the stream's second half too
    window: int = 0  # of the newest samples tested, which the curves show a mean of; 0: those since the last read
    candidates: Candidates | None = None  # for nets that propose instances: turns answers into rows to be tracked
    finals: tuple[str, ...] = ()  # other results whose last values, averaged over splits, are summarised too


def accuracy_sums(output: Tensor, batch: Batch) -> Logs:
    """Right answers of a batch.    Shapes: output [R, B, C], y [R, B] -> each [R]."""
    hits = (output.argmax(-1) == batch["y"]).float()
    return {"acc": hits.sum(1), TESTED: torch.ones_like(hits).sum(1)}


def ranking_sums(output: Tensor, batch: Batch) -> Logs:
    """HR@10 and NDCG@10 of the scored events, summed.    Shapes: output [R, B, I + 1], target [R, B] -> each [R]."""
    counted = scored(batch).double()
    found = gains(ranks(output, batch["target"]), (10,))
    return {name: (found[name] * counted).sum(1) for name in ("hr10", "ndcg10")} | {TESTED: counted.sum(1)}


def association(cfg: TrackerConfig, dim: int = 0, candidates: Candidates | None = None) -> Measure:
    """Tracks made by this tracker of embeddings of this width; class scores may follow these in the output."""

    def test(output: Tensor, batch: Batch) -> Logs:
        """Observations that stay on the track of their match before, and all that could."""
        if candidates is not None:
            output, batch = candidates(output, batch)
        made = Tracked(output, batch, cfg, dim or output.shape[-1])
        runs, clips = output.shape[:2]
        counts = [
            [association_accuracy(*made.lists(batch, r, b))["counts"]["accuracy"] for b in range(clips)]
            for r in range(runs)
        ]
        right, every = torch.tensor(counts, dtype=torch.float64, device=output.device).sum(1).unbind(-1)
        return {"association": right, TESTED: every}

    return Measure(
        "assa",
        "assa",
        lambda runs, splits, device: Association(runs, splits, device, cfg, dim, candidates),
        test,
        candidates=candidates,
        finals=EXTRAS,
    )


MEASURES = {
    "associate": association(TrackerConfig()),
    "classify": Measure("acc", "accuracy", Accuracy, accuracy_sums),
    "embed": Measure("linear", "linear", Probe, None, finals=("knn", "ncm", *NAMES)),
    "fewshot": Measure("shot5", "shot5", Episodic, None, finals=tuple(name for name in NAMES if name != "shot5")),
    "rank": Measure(
        "hr10",
        "hr10",
        lambda runs, splits, device: Ranking((5, 10, 20), runs, splits, device),
        ranking_sums,
        every_batch=True,
        window=10_000,
    ),
}


def of(task: str) -> Measure:
    """The measure of a task.    Raises: BadConfig if there is none."""
    if task not in MEASURES:
        raise BadConfig(
            f"streams that ask to {task} cannot be measured yet; there are measures for {', '.join(MEASURES)}"
        )
    return MEASURES[task]
