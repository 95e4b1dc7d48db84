"""Queue: the newest samples, first in, first out."""

from __future__ import annotations

import torch

from cl_sim.memory.rows import Rows
from cl_sim.types import Batch


class Queue(Rows):
    """A ring of rows; the oldest is overwritten. The memory always holds the last M samples."""

    def add(self, batch: Batch) -> None:
        """Offer a batch [R, B, ...]; of one larger than the memory, only the end is kept."""
        size = batch[next(iter(self.fields))].shape[1]
        kept = min(size, self.capacity)
        place = self.seen[:, None] + torch.arange(size - kept, size, device=self.seen.device)
        self.write(place % self.capacity, {name: value[:, size - kept :] for name, value in batch.items()})
        self.count(size)
