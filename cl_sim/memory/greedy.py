"""Greedy balancing: take what a class still has room for, and make the room by a sample of the largest class.

Source: Prabhu et al. 2020, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", algorithm 1; where it
leaves a choice, the code of Mai et al. 2022, "Online Continual Learning in Image Classification: An Empirical Survey".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cl_sim.memory.rows import Rows
from cl_sim.rng import Rng
from cl_sim.types import Batch, Field


class Greedy(Rows):
    """Keeps a sample if its class is new, or has fewer rows than capacity / (classes so far). Needs a field `y`.

    Once full, the kept one takes a random row of the largest class; of several such, of the one that came first. A sample may
    be turned away before the memory is full, so runs can hold different numbers of rows.
    """

    held: Tensor  # [R, C] rows per class
    came: Tensor  # [R, C] how many classes came before it; C if it has not come
    filled: Tensor  # [R] rows

    def __init__(self, capacity: int, fields: Mapping[str, Field], rng: Rng, classes: int) -> None:
        super().__init__(capacity, fields, rng)
        zeros = torch.zeros(rng.runs, classes, dtype=torch.int64, device=rng.key.device)
        self.classes = classes
        self.register_buffer("held", zeros)
        self.register_buffer("came", torch.full_like(zeros, classes))
        self.register_buffer("filled", torch.zeros_like(self.seen))

    def __len__(self) -> int:
        """Rows that every run has. Reads the device."""
        return int(self.filled.min())

    def valid(self) -> Tensor:
        """Which rows are filled.    Shapes: -> [R, M] bool."""
        return torch.arange(self.capacity, device=self.run.device) < self.filled[:, None]

    def add(self, batch: Batch) -> None:
        """Offer a batch [R, B, ...], one sample after the other."""
        for item in range(batch["y"].shape[1]):
            one = {name: value[:, item : item + 1] for name, value in batch.items()}
            self.write(self._place(one["y"]), one)
            self.count(1)

    def _place(self, y: Tensor) -> Tensor:
        """The row that the sample takes, or M if it is not kept.    Shapes: y [R, 1] -> [R, 1]."""
        known = (self.came < self.classes).sum(1, keepdim=True)  # [R, 1] classes so far
        fresh = self.came.gather(1, y) == self.classes
        kept = fresh | (self.held.gather(1, y) < self.capacity // known.clamp(min=1))
        full = self.filled[:, None] >= self.capacity
        largest = (self.held * (self.classes + 1) - self.came).argmax(1, keepdim=True)  # the first to come among equals
        leaver = self.rng.choose(1, (self.row("y")[:, : self.capacity] == largest) & self.valid())
        slot = torch.where(full, leaver, self.filled[:, None])
        self.held.scatter_add_(1, largest, -(kept & full).long())
        self.held.scatter_add_(1, y, kept.long())
        self.came.scatter_(1, y, torch.where(fresh, known, self.came.gather(1, y)))
        self.filled += (kept & ~full)[:, 0]
        return torch.where(kept, slot, self.capacity)

    def cycle(self, n: int, count: int) -> Iterator[Batch]:
        """So many batches of n rows in one random order per run, from its beginning again when all rows have been there.

        Shapes: each field [R, n, *shape], the same for every run, however many rows it holds.
        """
        order = self.rng.choose(self.capacity, self.valid())  # filled rows first
        place = torch.arange(n * count, device=order.device) % self.filled.clamp(min=1)[:, None]
        for slot in torch.split(order.gather(1, place), n, 1):
            yield {name: self.row(name)[self.run, slot] for name in self.fields}
