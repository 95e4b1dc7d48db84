"""A row for every sample of a fixed pool, by its number: what is known of a sample rests here, the sample stays in the stream.

Source: the offline setting of semi-supervised learning, in which every sample is there from the start, e.g. Sohn et al. 2020,
"FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence".
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_sim.errors import BadConfig
from cl_sim.memory.rows import Rows
from cl_sim.memory.table import Table
from cl_sim.rng import Rng
from cl_sim.stream import Pool
from cl_sim.types import Batch, Field


class Numbered(Rows):
    """The labels of a pool, -1 where they are hidden; images come from the pool.

    Its table starts like the sources': every history at 0, and known.

    Raises: BadConfig if a run has no labelled sample.
    """

    def __init__(self, pool: Pool, rng: Rng) -> None:
        super().__init__(pool.present.shape[1], {"y": Field((), torch.int64)}, rng)
        self.pool = pool
        self.labelled = (pool.labelled >= 0).sum(1, keepdim=True)  # [R, 1], how many
        if not bool(self.labelled.all()):
            raise BadConfig("a run has no labelled sample; use a larger --set stream.fraction, or stream.per_class")
        number = torch.where(pool.labelled >= 0, pool.labelled, self.capacity)
        self.row("y").fill_(-1)
        self.row("y").scatter_(1, number, pool.take(pool.labelled.clamp(min=0))["y"])
        self.count(self.capacity)

    def keep_table(self) -> Table:
        """Keep a table from now on, a line per number."""
        self.table = Table(self.capacity, len(self.run), self.run.device, from_zero=True)
        return self.table

    def add(self, batch: Batch) -> None:
        """Note which samples have come."""
        if self.table is not None:
            self.table.came(batch["index"])

    def valid(self) -> Tensor:
        """Which numbers a sample has.    Shapes: -> [R, M] bool."""
        return self.pool.present

    def take(self, slot: Tensor) -> Batch:
        """The samples with these numbers.    Shapes: slot [R, n] -> each field of the stream [R, n, *shape], slot."""
        return {**self.pool.take(slot), "slot": slot}

    def known(self, n: int) -> Batch:
        """Draw n labelled samples with replacement, each equally likely.    Shapes: -> each field [R, n, *shape], slot."""
        return self.take(self.pool.labelled.gather(1, self.rng.below(self.labelled, n)))
