"""Diverse: a row is likely to leave if its gradient resembles those of others, and a sample to come in if its own does not.

Source: Aljundi et al. 2019, "Gradient Based Sample Selection for Online Continual Learning", algorithm 2 (GSS-greedy).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_sim.memory.rows import Rows
from cl_sim.rng import Rng
from cl_sim.types import Batch, Field

SCORE = Field((), torch.float32)  # the largest cosine between a sample's gradient and others, when it came in


class Diverse(Rows):
    """Rows with a score in [-1, 1]. What arrives needs the columns `score` and `conflicts`, both [R, B].

    While there is room everything is kept, in order. Then, if the batch conflicts with the memory, each sample meets a row of its
    own, drawn in proportion to how high the row's score is among all, and takes its place with probability
    (row's score + 1) / (row's score + 1 + sample's score + 1). Of the batch that fills the memory, what does not fit is dropped.
    """

    def __init__(self, capacity: int, fields: Mapping[str, Field], rng: Rng) -> None:
        super().__init__(capacity, {**fields, "score": SCORE}, rng)

    def add(self, batch: Batch) -> None:
        """Offer a batch [R, B, ...]; of one larger than the memory, the first M samples are considered."""
        size = batch["score"].shape[1]
        if len(self) < self.capacity:
            rest = self.fill(batch)
            self.count(rest["score"].shape[1])
            return
        considered = {name: value[:, : self.capacity] for name, value in batch.items()}
        self.write(self._places(considered["score"], considered["conflicts"]), considered)
        self.count(size)

    def _places(self, score: Tensor, conflicts: Tensor) -> Tensor:
        """The row that each sample takes, or M if it takes none.    Shapes: [R, B] -> [R, B]."""
        held = self.row("score")[:, : self.capacity]  # [R, M]
        low, high = held.amin(1, keepdim=True), held.amax(1, keepdim=True)
        slot = self.rng.choose_weighted(score.shape[1], (held - low) / (high - low + 0.01))
        theirs, ours = held.gather(1, slot) + 1, score + 1
        wins = self.rng.uniform(score.shape[1]) * (ours + theirs) < theirs
        return torch.where(conflicts & wins, slot, self.capacity)
