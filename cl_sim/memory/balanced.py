"""Class-balanced reservoir: as equal room per class as the stream allows, and a fair sample of each class.

Source: Chrysakis and Moens 2020, "Online Continual Learning from Imbalanced Data", algorithm 1 (CBRS).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_sim.memory.rows import Rows
from cl_sim.rng import Rng
from cl_sim.types import Batch, Field


class Balanced(Rows):
    """Room per class as equal as the stream allows. Needs a field `y`.

    Once full: a sample of a class that was never the largest replaces a random row of the largest class; a sample of a class
    that was takes a row of its own class with probability (rows of the class) / (samples of the class so far).
    """

    held: Tensor  # [R, C] rows per class
    came: Tensor  # [R, C] samples seen per class
    was_largest: Tensor  # [R, C] bool

    def __init__(self, capacity: int, fields: Mapping[str, Field], rng: Rng, classes: int) -> None:
        super().__init__(capacity, fields, rng)
        zeros = torch.zeros(rng.runs, classes, dtype=torch.int64, device=rng.key.device)
        self.classes = classes
        self.register_buffer("held", zeros.clone())
        self.register_buffer("came", zeros.clone())
        self.register_buffer("was_largest", zeros.bool())

    def add(self, batch: Batch) -> None:
        """Offer a batch [R, B, ...], one sample after the other."""
        for item in range(batch["y"].shape[1]):
            one = {name: value[:, item : item + 1] for name, value in batch.items()}
            self._add_one(one, one["y"])

    def _add_one(self, one: Batch, y: Tensor) -> None:
        self.came.scatter_add_(1, y, torch.ones_like(y))
        if len(self) < self.capacity:
            slot = torch.full_like(y, len(self))
            self.held.scatter_add_(1, y, torch.ones_like(y))
        else:
            slot = self._make_room(y)
        self.write(slot, one)
        self.count(1)

    def _make_room(self, y: Tensor) -> Tensor:
        """The row that the sample takes, or M if it is not kept.    Shapes: y [R, 1] -> [R, 1]."""
        self.was_largest |= self.held == self.held.amax(1, keepdim=True)
        own = self.was_largest.gather(1, y)
        largest = (self.held + self.rng.uniform(self.classes)).argmax(1, keepdim=True)  # ties at random
        leaver = torch.where(own, y, largest)
        share = self.held.gather(1, y) / self.came.gather(1, y)
        kept = ~own | (self.rng.uniform(1) < share)
        of_leaver = self.row("y")[:, : self.capacity] == leaver
        slot = self.rng.choose(1, of_leaver)
        moved = kept.long()
        self.held.scatter_add_(1, leaver, -moved)
        self.held.scatter_add_(1, y, moved)
        return torch.where(kept, slot, self.capacity)
