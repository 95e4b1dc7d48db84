"""What a stream is: batches by step, and sets to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cl_sim.types import Batch, Field


class Holdout(Protocol):
    """Samples that are only ever evaluated on, in named splits (the test set of each task, say).

    Every chunk is a Batch that also carries `split` [R, B]: the number of the split each sample belongs to. Splits may
    differ between runs (another class order makes other tasks) while the samples stay in place.
    """

    names: Sequence[str]  # of the splits, S of them

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """All samples, or with full=False a small fixed class-balanced part (of what was seen by then), in chunks."""
        ...


class Stream(Protocol):
    """Samples in order, each once unless passes are asked for. Everything depends on (seeds, step): there is no cursor to save.

    One that shows a fixed set of samples again and again may have an attribute `pool`, which strategies get as `env.pool`.

    One that comes in passes may have an attribute `selection` (cl_sim.selection): which pass is tested, and when a run stops.
    """

    Config: ClassVar[type]
    task: str  # what predict returns: "classify" logits, "embed" vectors, "rank" item scores, "associate" embeddings
    fields: Mapping[str, Field]
    classes: int
    samples: int  # per run
    batch_size: int
    announces: bool  # may strategies hear of task boundaries?
    digest: str  # content hash of the data, for the record

    def __len__(self) -> int:
        """Number of steps."""
        ...

    def batch(self, step: int) -> Batch:
        """The samples of one step.    Shapes: each [R, B, ...]."""
        ...

    def ends_task(self, step: int) -> bool:
        """Is this the last step of a task? For the engine and metrics; observe never sees it."""
        ...

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which splits count as seen after this step (-1: before the first).    Shapes: -> [R, S]."""
        ...

    def holdout(self) -> Holdout | None:
        """The evaluation sets; None for a stream that is only measured test-then-train."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Counts and choices worth printing: tasks, class order of the first run, samples left out."""
        ...


@runtime_checkable
class Clips(Stream, Protocol):
    """A stream of clips: batches of frames with their instances.

    One that can make its clips again has a method `rebuild(numbers [R, B])`, which strategies get as `env.rebuild`.
    """

    def clip_labels(self) -> NDArray[np.int64]:
        """The classes of the instances of the first run's clips, in order; -1 is none.    Shapes: -> [N, G]."""
        ...


class Pool(NamedTuple):
    """A fixed set of samples that comes again and again. A sample's number is its `index`.

    Shapes: present [R, N] bool: numbers that samples have; labelled [R, L]: those whose label is known, then -1; take [R, n] ->
    the samples of these numbers as the stream shows them, each field [R, n, ...].
    """

    present: Tensor
    labelled: Tensor
    take: Callable[[Tensor], Batch]


def truth(stream: Stream, step: int, batch: Batch) -> Batch:
    """The batch as it is measured: with the labels that the stream hides from strategies, if it hides any.

    A stream that does has a method `truth(step)`, its labels [R, B]; so may others, whose labels are known without the samples.
    """
    hidden = getattr(stream, "truth", None)
    return batch if hidden is None else {**batch, "y": hidden(step)}


def labels_at(stream: Stream, step: int, name: str = "y") -> Tensor:
    """The labels of one step as they are measured, without making its samples where they are known.    Shapes: -> [R, B]."""
    known = getattr(stream, "truth", None)
    labels: Tensor = stream.batch(step)[name] if known is None else known(step)
    return labels
