"""A stream made from another one, handed over by name: the base of stream operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim import config, registry
from cl_sim.indexed import IndexedStream
from cl_sim.rng import host_rng
from cl_sim.stream import Holdout, Stream, truth
from cl_sim.types import Batch, Field


def by_name(
    name: str, settings: Sequence[str], seeds: tuple[int, ...], device: torch.device, data: str, iid: bool
) -> Stream:
    """The stream of that name, as typed on the command line, with settings such as `tasks=5`.

    Raises: UnknownName; BadConfig for a setting that the stream does not have.
    """
    found = registry.resolve("stream", name)
    own: dict[str, Any] = {}
    for assignment in settings:
        config.assign(own, assignment)
    cls = registry.load("stream", found.name)
    made: Stream = cls(config.build(cls.Config, {**found.settings, **own}, found.name), seeds, device, data, iid=iid)
    return made


class Wrapped:
    """All that another stream is; operators change what they are about."""

    Config: ClassVar[type]
    task: str
    fields: Mapping[str, Field]

    def __init__(self, inner: Stream) -> None:
        self.inner = inner
        self.task, self.fields = inner.task, inner.fields
        self.classes, self.samples, self.batch_size = inner.classes, inner.samples, inner.batch_size
        self.announces, self.digest = inner.announces, inner.digest

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, step: int) -> Batch:
        """The samples of one step."""
        return self.inner.batch(step)

    def ends_task(self, step: int) -> bool:
        """Is this the last step of a task?"""
        return self.inner.ends_task(step)

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which splits count as seen after this step.    Shapes: -> [R, S]."""
        return self.inner.seen(step)

    def holdout(self) -> Holdout | None:
        """The evaluation sets."""
        return self.inner.holdout()

    def describe(self) -> Mapping[str, Any]:
        """Counts and choices worth printing."""
        return self.inner.describe()


def column(stream: Stream, name: str) -> NDArray[np.int64]:
    """A column of whole numbers over the whole stream, without gathering a sample where the order is known.

    Of samples that come again and again, a single showing.

    Shapes: -> [R, N].
    """
    if isinstance(stream, IndexedStream) and name in ("y", "index"):
        return stream.once(name)
    parts: list[Tensor] = []
    for step in range(len(stream)):
        parts.append(truth(stream, step, stream.batch(step))[name])
    values: NDArray[np.int64] = torch.cat(parts, 1).cpu().numpy()
    return values


def renumbered(ids: NDArray[np.int64], seeds: Sequence[int], rows: int) -> NDArray[np.int64]:
    """A random new number for every row: data sets are often sorted by class, and a number must not tell one.

    Each run's depend on its own rows and seed alone; those above its largest row stay.    Shapes: ids [R, N] -> [R, rows].
    """
    number = np.tile(np.arange(rows), (len(seeds), 1))
    for run, seed in enumerate(seeds):
        last = int(ids[run].max()) + 1
        number[run, :last] = host_rng(seed, "sample numbers").permutation(last)
    return number
