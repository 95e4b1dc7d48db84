"""Streams over a resident array: an order of its rows per run, gathered on the device batch by batch.

A scenario (class-incremental, blurry, drifting, ...) decides the order on the host, once, from the seeds; what happens
at each step is one gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim.arrays import DataSet, Resident
from cl_sim.errors import BadConfig
from cl_sim.repeats import Repeats
from cl_sim.rng import host_rng
from cl_sim.types import Batch, Field

CHUNK = {"cpu": 100, "cuda": 1000}  # samples evaluated at once; on 2 cores 100 takes 1.9 ms an image, 500 takes 2.5
INT = torch.int64
HOST = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which training rows every run sees, in order, and where its tasks end.

    Where tasks show their samples more than once, rows and labels are a single showing, and `repeats` says what comes when.
    """

    rows: NDArray[np.int64]  # [R, N]
    labels: NDArray[np.int64]  # [R, N]; may differ from the set's own (noise)
    ends: tuple[int, ...]  # the last step of each task
    repeats: Repeats | None = None

    def part(self, step: int, batch: int, *columns: Tensor) -> list[Tensor]:
        """What one step of so many samples has of columns.    Shapes: [R, N] each -> [R, B] each."""
        if self.repeats is None:
            return [column[:, step * batch : (step + 1) * batch] for column in columns]
        place = self.repeats.places(step)
        return [column.gather(1, place) for column in columns]

    def row_numbers(self, batch: int) -> Callable[[int], Tensor]:
        """The rows of a step of so many samples, found on the host, in any thread.    Shapes: -> [R, B]."""
        own = self if self.repeats is None else replace(self, repeats=self.repeats.on(HOST))
        rows = torch.as_tensor(self.rows)
        return lambda step: own.part(step, batch, rows)[0]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """How the classes of the evaluation set fall into named splits, and when each of them counts as seen."""

    names: tuple[str, ...]  # S of them
    of_class: NDArray[np.int64]  # [R, C], the split of each class
    since: NDArray[np.int64]  # [R, S], the first step after which it counts


class IndexedHoldout:
    """The test rows, each in one split per run; the small part holds equally many rows of every class.

    Source: ours. The small part is evaluated only as far as its splits have been seen.
    """

    def __init__(self, test: Resident, y: NDArray[np.int64], splits: Splits, subset: int, device: torch.device) -> None:
        self.names: Sequence[str] = splits.names
        self.test, self.splits, self.device = test, splits, device
        runs, classes = splits.of_class.shape
        self.labels = torch.as_tensor(y, device=device)
        self.of_class = torch.as_tensor(splits.of_class, device=device)  # [R, C]
        self.all_rows = torch.arange(len(y)).expand(runs, -1)  # [R, N], on the host, as are the few
        few = _balanced_rows(y, classes, subset)
        by_time = splits.since[np.arange(runs)[:, None], splits.of_class[:, y[few]]]  # [R, Q]
        order = np.argsort(by_time, axis=1, kind="stable")
        self.few_rows = torch.as_tensor(few[order])
        self.few_since = np.take_along_axis(by_time, order, 1)

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """Evaluation batches with keys x, y, index, split."""
        rows = self.all_rows if full else self.few_rows[:, : int((self.few_since <= step).sum(1).max())]
        for part, x in self.test.chunks(rows, CHUNK[self.device.type]):
            y = self.labels[part]
            yield {"x": x, "y": y, "index": part, "split": self.of_class.gather(1, y)}


def _balanced_rows(y: NDArray[np.int64], classes: int, subset: int) -> NDArray[np.int64]:
    rng = host_rng(0, "evaluation subset")
    each = max(1, subset // classes)
    rows = [rng.permutation(np.flatnonzero(y == c))[:each] for c in range(classes)]
    return np.sort(np.concatenate(rows))


class IndexedStream:
    """A stream of labelled samples from one data set. Scenarios inherit from it and hand it their schedule.

    Shapes: batches have x [R, B, *shape], y [R, B], index [R, B] (the row in the training set).
    """

    Config: ClassVar[type]
    task = "classify"

    def __init__(
        self,
        data: DataSet,
        schedule: Schedule,
        splits: Splits | None,
        *,
        batch_size: int,
        announces: bool,
        device: torch.device,
        subset: int = 500,
    ) -> None:
        self.data, self.schedule, self.splits = data, schedule, splits
        self.batch_size, self.announces, self.device = batch_size, announces, device
        self.classes, self.digest = len(data.classes), data.digest
        repeats = schedule.repeats
        self.steps = schedule.rows.shape[1] // batch_size if repeats is None else len(repeats)
        self.samples = self.steps * batch_size
        self.train = Resident(data.train.x, device)
        self.ahead = self.train.ahead(schedule.row_numbers(batch_size), self.steps)
        dtype = torch.uint8 if data.train.x.dtype == np.uint8 else torch.float32
        shape = data.train.x.shape[1:]
        self.fields: Mapping[str, Field] = {"x": Field(shape, dtype), "y": Field((), INT), "index": Field((), INT)}
        self.rows = torch.as_tensor(schedule.rows, device=device)  # [R, N]
        self.labels = torch.as_tensor(schedule.labels, device=device)
        self._ends = frozenset(schedule.ends)
        self._holdout: IndexedHoldout | None = None
        if splits is not None and data.test is not None:
            test = Resident(data.test.x, device)
            self._holdout = IndexedHoldout(test, np.asarray(data.test.y), splits, subset, device)

    def __len__(self) -> int:
        return self.steps

    def batch(self, step: int) -> Batch:
        """The samples of one step."""
        rows, y = self.part(step, self.rows, self.labels)
        x = self.train.gather(rows) if self.ahead is None else self.ahead.take(step)
        return {"x": x, "y": y, "index": rows}

    def part(self, step: int, *columns: Tensor) -> list[Tensor]:
        """What one step has of columns of the schedule.    Shapes: [R, N] each -> [R, B] each."""
        return self.schedule.part(step, self.batch_size, *columns)

    def truth(self, step: int) -> Tensor:
        """The labels of one step, without its samples.    Shapes: -> [R, B]."""
        return self.part(step, self.labels)[0]

    def once(self, name: str) -> NDArray[np.int64]:
        """Labels (y) or rows (index) of the whole stream; of a single showing where samples come again.    Shapes: -> [R, N]."""
        known = self.schedule.labels if name == "y" else self.schedule.rows
        return known if self.schedule.repeats is not None else known[:, : self.samples]

    def ends_task(self, step: int) -> bool:
        """Is this the last step of a task?"""
        return step in self._ends

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which splits count as seen after this step.    Shapes: -> [R, S]."""
        if self.splits is None:
            return np.zeros((len(self.schedule.rows), 0), dtype=np.bool_)
        return self.splits.since <= step

    def holdout(self) -> IndexedHoldout | None:
        """The test set in its splits."""
        return self._holdout

    def describe(self) -> dict[str, Any]:
        """Counts and choices worth printing."""
        return {
            "data": self.data.name,
            "digest": self.digest,
            "classes": self.classes,
            "samples": self.samples,
            "left out": len(self.data.train.y) - len(np.unique(self.once("index")[0])),
            "steps": self.steps,
            "batch": self.batch_size,
            "task ends": list(self.schedule.ends),
            "test samples": 0 if self.data.test is None else len(self.data.test.y),
        }


def class_orders(classes: int, order: str, seeds: Sequence[int]) -> NDArray[np.int64]:
    """The order in which classes arrive, per run.    Shapes: -> [R, C].

    `shuffled` draws with numpy's legacy generator, in place and right after seeding, as the published replay code does:
    seed 0 and 10 classes give 2 8 4 9 1 6 7 3 0 5. `fixed` is 0, 1, 2, ...; else a list such as '3,1,0,2'.

    Raises: BadConfig for a list that is not a permutation of the classes.
    """
    if order == "fixed":
        return np.tile(np.arange(classes), (len(seeds), 1))
    if order == "shuffled":
        orders = []
        for seed in seeds:
            one = np.arange(classes)
            np.random.RandomState(seed % 2**32).shuffle(one)
            orders.append(one)
        return np.stack(orders)
    given = [int(word) if word.strip().isdecimal() else -1 for word in order.split(",")]
    if sorted(given) != list(range(classes)):
        raise BadConfig(
            f"stream.order is '{order}'; allowed are 'shuffled', 'fixed' or every class 0 to {classes - 1} once, "
            "separated by commas"
        )
    return np.tile(np.array(given), (len(seeds), 1))


def equal_tasks(classes: int, tasks: int) -> None:
    """Raise BadConfig unless the classes fall into that many tasks of equal class count."""
    if tasks < 1 or classes % tasks:
        fit = ", ".join(str(n) for n in range(1, classes + 1) if classes % n == 0)
        raise BadConfig(f"stream.tasks is {tasks}, but {classes} classes need one of {fit}: --set stream.tasks=N")


def class_incremental(
    rows_of_class: Sequence[Sequence[NDArray[np.int64]]],
    orders: NDArray[np.int64],
    *,
    sizes: Sequence[int],
    seeds: Sequence[int],
    iid: bool,
) -> NDArray[np.int64]:
    """Concatenate tasks of consecutive classes, each shuffled; with iid, the same samples in one shuffled order.

    `rows_of_class[r][c]` are the training rows of class c for run r; `sizes[t]` the samples of task t.

    Shapes: orders [R, C] -> rows [R, N].
    """
    whole = []
    for seed, order, rows in zip(seeds, orders, rows_of_class, strict=True):
        rng = host_rng(seed, "stream order")
        parts = []
        for task, members in enumerate(np.split(order, len(sizes))):
            pool = rng.permutation(np.concatenate([rows[c] for c in members]))
            parts.append(pool[: sizes[task]])
        one = np.concatenate(parts)
        whole.append(rng.permutation(one) if iid else one)
    return np.stack(whole)


def last_steps(steps: Sequence[int]) -> tuple[int, ...]:
    """The last step of each task, given how many each has."""
    return tuple(int(end) - 1 for end in np.cumsum(steps))


def task_splits(orders: NDArray[np.int64], tasks: int, ends: Sequence[int], iid: bool) -> Splits:
    """One evaluation split per task; it counts from the task's first step on (all from the start if iid)."""
    runs, classes = orders.shape
    of_class = np.empty((runs, classes), dtype=np.int64)
    for run, order in enumerate(orders):
        of_class[run, order] = np.repeat(np.arange(tasks), classes // tasks)
    starts = np.array([0, *(end + 1 for end in ends[:-1])])
    since = np.zeros((runs, tasks), dtype=np.int64) if iid else np.tile(starts, (runs, 1))
    return Splits(names=tuple(f"task {t + 1}" for t in range(tasks)), of_class=of_class, since=since)
