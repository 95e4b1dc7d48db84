"""What every memory is: rows of named fields on the device, one set per run, drawn from uniformly and without replacement.

A memory differs from another only in its rule for who leaves: subclasses write `add`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_sim.constants import places
from cl_sim.errors import BadConfig
from cl_sim.memory.table import Table
from cl_sim.rng import Rng
from cl_sim.types import Batch, Field


class Rows(nn.Module):
    """A fixed number of rows per run, filled in order of arrival.

    Each field is a buffer [R, M + 1, *shape] in its own dtype (images stay bytes); the last row takes what is not to be kept, so
    that a write has the same shape at every step. `seen` counts what was offered, per run.

    Raises: BadConfig if the capacity is below 1.
    """

    seen: Tensor  # [R] int64

    def __init__(self, capacity: int, fields: Mapping[str, Field], rng: Rng) -> None:
        super().__init__()
        if capacity < 1:
            raise BadConfig(f"capacity is {capacity}; a memory needs room for at least 1 sample")
        self.capacity, self.fields = capacity, dict(fields)
        self.draw = _Unregistered(rng)
        self.table: Table | None = None
        device = rng.key.device
        for name, f in fields.items():
            empty = torch.zeros(rng.runs, capacity + 1, *f.shape, dtype=f.dtype, device=device)
            self.register_buffer(f"row_{name}", empty)
        self.register_buffer("seen", torch.zeros(rng.runs, dtype=torch.int64, device=device))
        self.run = torch.arange(rng.runs, device=device)[:, None]  # [R, 1]
        self.offered = 0  # the host's copy of `seen`, the same for every run
        self.register_load_state_dict_post_hook(_recount)  # type: ignore[no-untyped-call]

    @property
    def rng(self) -> Rng:
        """The random numbers it draws from; their state is saved by whoever owns them."""
        return self.draw.rng

    def row(self, name: str) -> Tensor:
        """A field of all rows, the spare one included.    Shapes: -> [R, M + 1, *shape]."""
        return cast(Tensor, getattr(self, f"row_{name}"))

    def __len__(self) -> int:
        """Rows filled, the same for every run."""
        return min(self.offered, self.capacity)

    def holds(self, n: int) -> bool:
        """Has a draw of n the size that it will have for ever?"""
        return len(self) >= min(n, self.capacity)

    @property
    def bytes_per_row(self) -> int:
        """What one row costs, with its line in the table if there is one."""
        own = sum(math.prod(f.shape) * torch.empty((), dtype=f.dtype).element_size() for f in self.fields.values())
        return own + (self.table.bytes_per_row if self.table is not None else 0)

    def keep_table(self) -> Table:
        """Keep a table beside the rows from now on: a line per slot, reset whenever the slot is filled anew."""
        self.table = Table(self.capacity, len(self.run), self.run.device)
        return self.table

    @property
    def nbytes(self) -> int:
        """What the rows of one run cost."""
        return self.capacity * self.bytes_per_row

    def add(self, batch: Batch) -> None:
        """Offer a batch [R, B, ...]; fields that the memory does not have are left out."""
        raise NotImplementedError

    def fill(self, batch: Batch) -> Batch:
        """Keep what there is room for, in order of arrival; the rest comes back.    Shapes: [R, B, ...] -> [R, rest, ...]."""
        start, size = len(self), batch[next(iter(self.fields))].shape[1]
        room = min(self.capacity - start, size)
        if room:
            slot = torch.arange(start, start + room, device=self.run.device).expand(len(self.run), -1)
            self.write(slot, {name: value[:, :room] for name, value in batch.items()})
            self.count(room)
        return {name: value[:, room:] for name, value in batch.items()}

    def write(self, slot: Tensor, values: Batch) -> None:
        """Overwrite the given fields of rows; slot M means nowhere. No slot but M may come twice.    Shapes: slot [R, n]."""
        for name, value in values.items():
            if name in self.fields:
                self.row(name).index_put_((self.run, slot), value)
        if self.table is not None and self.fields.keys() <= values.keys():  # a whole row: another sample
            self.table.reset(slot)

    def valid(self) -> Tensor:
        """Which rows are filled.    Shapes: -> [R, M] bool."""
        return places(self.capacity, self.run.device) < self.seen[:, None]

    def sample(self, n: int, only: Tensor | None = None, exclude: Tensor | None = None) -> Batch:
        """Draw min(n, len) rows per run, none twice, each equally likely.

        `only` and `exclude` are class masks. With one, the batch has a column `valid`: rows of the wanted classes come
        first, the rest is padding, so that the shape does not depend on what is stored.

        Shapes: masks [R, C] or [C] bool -> each field [R, n, *shape], slot [R, n] int64 (the row), valid [R, n] bool.
        """
        n = min(n, len(self))
        allowed = self.valid()
        if only is not None:
            allowed = allowed & self._in_classes(only)
        if exclude is not None:
            allowed = allowed & ~self._in_classes(exclude)
        slot = self.rng.choose(n, allowed)
        drawn = self.take(slot)
        if only is not None or exclude is not None:
            drawn["valid"] = allowed.gather(1, slot)
        return drawn

    def epoch(self, n: int) -> Iterator[Batch]:
        """Every filled row once, in random order, n at a time.    Shapes: each field [R, n or fewer, *shape]."""
        order = self.rng.choose(len(self), self.valid())
        for slot in torch.split(order, n, 1):
            yield {name: self.row(name)[self.run, slot] for name in self.fields}

    def take(self, slot: Tensor) -> Batch:
        """The rows with these numbers.    Shapes: slot [R, n] -> each field [R, n, *shape], slot."""
        return {name: self.row(name)[self.run, slot] for name in self.fields} | {"slot": slot}

    def sample_each(self, n: int, classes: int, without: Tensor | None = None) -> Batch:
        """Draw n rows of each class, none twice, each of a class equally likely; some rows can be left out.

        As in `sample` with a mask, the column `valid` tells rows from padding, here where a class has fewer than n.

        Shapes: without [R, M] bool -> each field [R, C * n, *shape], class by class, slot and valid [R, C * n].
        """
        allowed = self.valid() if without is None else self.valid() & ~without
        label = torch.arange(classes, device=allowed.device)[:, None]
        members = allowed[:, None] & (self.row("y")[:, None, : self.capacity] == label)  # [R, C, M]
        slot = self.rng.choose(min(n, self.capacity), members)
        return self.take(slot.flatten(1)) | {"valid": members.gather(2, slot).flatten(1)}

    def mark(self, slot: Tensor, valid: Tensor) -> Tensor:
        """Which rows are among these?    Shapes: slot and valid [R, n] -> [R, M] bool."""
        nothing = torch.zeros(len(self.run), self.capacity + 1, dtype=torch.bool, device=slot.device)
        return nothing.scatter(1, torch.where(valid, slot, self.capacity), True)[:, : self.capacity]

    def _in_classes(self, mask: Tensor) -> Tensor:
        labels = self.row("y")[:, : self.capacity]
        return mask.expand(len(labels), -1).gather(1, labels)

    def rows(self) -> Batch:
        """Every row, with `valid` [R, M] telling which are filled."""
        return {name: self.row(name)[:, : self.capacity] for name in self.fields} | {"valid": self.valid()}

    def count(self, offered: int) -> None:
        """Note that so many samples were offered."""
        self.seen += offered
        self.offered += offered

    def recount(self) -> None:
        """Rebuild the host's count after loading."""
        self.offered = int(self.seen[0])


class _Unregistered:
    """Keeps a module out of state_dict: the strategy that made it saves it."""

    def __init__(self, rng: Rng) -> None:
        self.rng = rng


def _recount(memory: Any, keys: Any) -> None:
    memory.recount()


def last_wins(slot: Tensor, nowhere: int) -> Tensor:
    """Send all but the last of equal slots nowhere, so that a write does not depend on the device's order.

    Shapes: slot [R, n] -> same.
    """
    beaten_by = (slot[:, :, None] == slot[:, None, :]).triu(1)  # [R, n, n], by later ones only
    return slot.masked_fill(beaten_by.any(2), nowhere)
