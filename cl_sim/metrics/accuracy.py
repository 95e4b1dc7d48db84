"""Accuracy per split: the matrix that every summary is made from."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_sim.types import Batch


class Accuracy:
    """Share of right answers in each split of the evaluation set, counted on the device."""

    def __init__(self, runs: int, splits: int, device: torch.device) -> None:
        self.hits = torch.zeros(runs, splits, dtype=torch.float64, device=device)
        self.counts = torch.zeros_like(self.hits)

    def update(self, output: Tensor, batch: Batch) -> None:
        """Add a chunk.    Shapes: output [R, B, C]; batch: y and split [R, B], optionally valid [R, B]."""
        counted = batch["valid"].double() if "valid" in batch else torch.ones_like(batch["y"], dtype=torch.float64)
        hit = (output.argmax(-1) == batch["y"]).double() * counted
        self.hits.scatter_add_(1, batch["split"], hit)
        self.counts.scatter_add_(1, batch["split"], counted)

    def result(self) -> dict[str, Tensor]:
        """Accuracy [R, S], NaN for a split without samples; then starts afresh."""
        accuracy = self.hits / self.counts
        self.hits.zero_()
        self.counts.zero_()
        return {"accuracy": accuracy}
