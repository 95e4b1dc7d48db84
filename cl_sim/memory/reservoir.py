"""Reservoir: every sample of the stream is equally likely to be in the memory.

Source: Vitter 1985, "Random Sampling with a Reservoir", algorithm R, a batch at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cl_sim.constants import places
from cl_sim.memory.rows import Rows, last_wins
from cl_sim.rng import Rng
from cl_sim.types import Batch, Field

Rule = Literal["vitter", "frozen"]


class Reservoir(Rows):
    """Sample number n (from 1) takes a slot drawn below n, and is dropped if the memory has no such slot.

    `rule="frozen"` is what the online-continual-learning code line does: all samples of a batch that find the memory full draw
    below the number seen before them, not counting the batch itself, so the newest are kept a little too often.

    With `skips`, samples can be offered that are no candidates and leave no trace. As only the device knows how many those
    are, `len` then counts them too, and a draw may hold rows that are still empty: zeros in every field.
    """

    skipped: Tensor  # [R] int64, only with `skips`

    def __init__(
        self, capacity: int, fields: Mapping[str, Field], rng: Rng, rule: Rule = "vitter", skips: bool = False
    ) -> None:
        super().__init__(capacity, fields, rng)
        self.rule, self.skips = rule, skips
        if skips:
            self.register_buffer("skipped", torch.zeros_like(self.seen))

    @torch.inference_mode()
    def add(self, batch: Batch, candidate: Tensor | None = None) -> None:
        """Offer a batch [R, B, ...]; if two of its samples draw one slot, the later one stays.    Shapes: candidate [R, B]."""
        size = batch[next(iter(self.fields))].shape[1]
        place = self.seen[:, None] + places(size, self.seen.device)  # [R, B], from 0
        if candidate is not None:
            place = self.seen[:, None] + candidate.cumsum(1) - 1
        bound = place + 1 if self.rule == "vitter" else self.seen[:, None].clamp(min=self.capacity)
        drawn = self.rng.below(bound.clamp(min=1), size)
        slot = torch.where(place < self.capacity, place, drawn).clamp(max=self.capacity)
        if candidate is not None:
            slot = slot.masked_fill(~candidate, self.capacity)  # nowhere
        self.write(last_wins(slot, self.capacity), batch)
        self.count(size)
        if candidate is not None:
            left_out = (~candidate).sum(1)
            self.seen -= left_out
            self.skipped += left_out

    def recount(self) -> None:
        """Rebuild the host's count after loading."""
        super().recount()
        if self.skips:
            self.offered += int(self.skipped[0])
