"""Class-incremental stream: tasks of disjoint classes one after the other, every sample once (or again and again).

Source: Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", as replayed by the online code line
(batches of 10, one epoch, shuffled class order per run, the incomplete last batch of a task dropped).
Departures: where classes differ in size, every task gets as many steps as the smallest possible task has, so that all
class orders give streams of one length (`length="all"` keeps every sample instead). Tasks follow the set's own labels also
where the labels learned from are wrong, made up (`noise`) or human (`labels=FILE:COLUMN`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cl_sim.arrays import DataSet, load
from cl_sim.config import at_least, within
from cl_sim.errors import BadConfig
from cl_sim.indexed import (
    IndexedStream,
    Schedule,
    class_incremental,
    class_orders,
    equal_tasks,
    last_steps,
    task_splits,
)
from cl_sim.noise import noisy_labels
from cl_sim.repeats import Repeats
from cl_sim.rng import host_rng

USUAL_TASKS = {"cifar10": 5, "cifar100": 10, "mini-imagenet": 10, "tiny-imagenet": 10, "mnist": 5, "fashion-mnist": 5}

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Settings of the class-incremental stream."""

    data: str = "digits"  # a named set, or folder:PATH, parquet:PATH, npz:PATH, csv:PATH
    tasks: int = 0  # 0: the field's usual number for the set, else 5 (or one task per class if 5 does not divide)
    batch: int = 10  # samples per step
    order: str = "shuffled"  # classes: shuffled per seed, fixed, or a list such as 3,1,0,2
    length: Literal["equal", "all"] = "equal"  # steps per task: the same in every class order, or every sample
    samples_per_task: int = 0  # at most so many; 0: no limit
    passes: int = 1  # over the samples of each task, each in a new order; 1: online
    draws: int = 0  # steps of each task, their samples drawn with replacement from the whole task; 0: by passes
    imbalance: float = 1.0  # long tail: how many times larger the largest class is than the smallest
    tail: Literal["ordered", "shuffled"] = "ordered"  # the first class to arrive is largest, or a fixed shuffle of that
    noise: float = 0.0  # probability that a training label is wrong
    noise_kind: Literal["symmetric", "asymmetric"] = "symmetric"  # to any other class, or to the next one
    announces: bool = True  # strategies may hear of task boundaries
    subset: int = 500  # test samples of the small evaluations, in all
    size: int = 0  # pixels; resize images to size x size (0: as they are)
    labels: str = ""  # FILE:COLUMN: labels to learn from (human ones, say); or a column of the set's own table

    def __post_init__(self) -> None:
        at_least(self, tasks=0, batch=1, samples_per_task=0, passes=1, draws=0, imbalance=1, subset=1, size=0)
        within(self, 0, 1, "noise")
        if self.passes > 1 and self.draws:
            raise BadConfig(
                f"stream.passes is {self.passes} and stream.draws {self.draws}; samples come in passes or are drawn with "
                "replacement, so leave one of them out"
            )
        if not self.tasks and self.data in USUAL_TASKS:  # settled here, so that it is recorded
            object.__setattr__(self, "tasks", USUAL_TASKS[self.data])


class Split(IndexedStream):
    """Tasks of equal class count; each task's samples shuffled; test sets per task."""

    Config = SplitConfig

    def __init__(
        self, cfg: SplitConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        loaded = load(cfg.data, data, size=cfg.size, labels=cfg.labels)
        classes = len(loaded.classes)
        y, given = own_labels(cfg, data, loaded), np.asarray(loaded.train.y)
        tasks = cfg.tasks or usual_tasks(cfg.data, classes)
        equal_tasks(classes, tasks)
        self.orders = class_orders(classes, cfg.order, seeds)
        rows = [np.flatnonzero(y == c) for c in range(classes)]
        pools = [long_tail(rows, order, seed, cfg) for order, seed in zip(self.orders, seeds, strict=True)]
        sizes = np.array([[len(of) for of in pool] for pool in pools])  # [R, C]
        shown = task_sizes(sizes, self.orders, tasks, cfg)
        steps = [cfg.draws or cfg.passes * (n // cfg.batch) for n in shown]
        sequence, ends = class_incremental(pools, self.orders, sizes=shown, seeds=seeds, iid=iid), last_steps(steps)
        repeats = None
        if cfg.passes > 1 or cfg.draws:
            parts = ([sum(shown)], [sum(steps)]) if iid else (shown, steps)
            repeats = Repeats(seeds, *parts, batch=cfg.batch, replacement=cfg.draws > 0, device=device)
        self.clean = y[sequence]  # [R, N], for measuring only
        noisy = [
            noisy_labels(given, classes, cfg.noise, cfg.noise_kind, host_rng(seed, "label noise")) for seed in seeds
        ]
        labels = np.stack([whole[row] for whole, row in zip(noisy, sequence, strict=True)])
        super().__init__(
            loaded,
            Schedule(rows=sequence, labels=labels, ends=ends, repeats=repeats),
            task_splits(self.orders, tasks, ends, iid),
            batch_size=cfg.batch,
            announces=cfg.announces and not iid,
            device=device,
            subset=cfg.subset,
        )
        self.tasks, self.cfg = tasks, cfg

    def describe(self) -> dict[str, Any]:
        """Counts, and the first run's classes per task, samples of each class in order of arrival, and wrong labels.

        Where samples come again, those of a single showing are counted.
        """
        order = [[int(c) for c in part] for part in np.split(self.orders[0], self.tasks)]
        counts = np.bincount(self.clean[0], minlength=self.classes)
        tail = [int(n) for n in counts[self.orders[0]]]
        wrong = float((self.clean[0] != self.schedule.labels[0]).mean())
        return super().describe() | {
            "tasks": order,
            "samples per class": tail if self.cfg.imbalance > 1 else f"{counts.min()} to {counts.max()}",
            **({"wrong labels": f"{wrong:.1%}"} if wrong else {}),
            **({"passes": self.cfg.passes} if self.cfg.passes > 1 else {}),
            **({"drawn": "with replacement"} if self.cfg.draws else {}),
        }


def own_labels(cfg: SplitConfig, data: str, loaded: DataSet) -> Ints:
    """The set's own training labels, where `labels` names a file with other ones.    Shapes: -> [N]."""
    if ":" not in cfg.labels:
        return np.asarray(loaded.train.y)
    return np.asarray(load(cfg.data, data, size=cfg.size).train.y)


def usual_tasks(data: str, classes: int) -> int:
    """The field's usual number of tasks for a set, else 5, else one per class."""
    return USUAL_TASKS.get(data, 5 if classes % 5 == 0 else classes)


def long_tail(rows: list[Ints], order: Ints, seed: int, cfg: SplitConfig) -> list[Ints]:
    """Fewer rows of some classes: n_k = n_max * imbalance^(-k / (C - 1)), k being the class's rank.

    The rank follows the order of arrival, or a shuffle of it that is the same for every seed, so that task lengths do
    not depend on the seed. No imbalance: all rows.

    Source: Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", for the exponential profile.
    Departures: n_max is the size of the smallest class, so that every class can take every rank.
    """
    if cfg.imbalance == 1:
        return rows
    classes, rng = len(rows), host_rng(seed, "long tail")
    rank_of_arrival = np.arange(classes)
    if cfg.tail == "shuffled":
        rank_of_arrival = host_rng(0, "tail ranks").permutation(classes)
    largest = min(len(of) for of in rows)
    kept = list(rows)
    for arrival, c in enumerate(order):
        size = round(largest * cfg.imbalance ** (-rank_of_arrival[arrival] / max(classes - 1, 1)))
        kept[c] = np.sort(rng.permutation(rows[c])[: max(1, size)])
    return kept


def task_sizes(sizes: Ints, orders: Ints, tasks: int, cfg: SplitConfig) -> list[int]:
    """Samples of each task: whole batches, or all where they are drawn.    Shapes: sizes [R, C], orders [R, C] -> T numbers.

    Raises: BadConfig if a task would be empty, or if the stacked runs would have tasks of different lengths.
    """
    classes = sizes.shape[1]
    by_arrival = np.take_along_axis(sizes, orders, 1)  # [R, C]
    per_task = by_arrival.reshape(len(orders), tasks, classes // tasks).sum(2)  # [R, T]
    if cfg.length == "equal" and cfg.imbalance == 1:
        per_task[:] = np.sort(sizes[0])[: classes // tasks].sum()
    if cfg.samples_per_task:
        per_task = np.minimum(per_task, cfg.samples_per_task)
    shown = per_task if cfg.draws else per_task // cfg.batch * cfg.batch
    if (shown != shown[0]).any():
        raise BadConfig(
            "stream.length 'all' gives these seeds tasks of different lengths, so they cannot run stacked; use --stack 1, or "
            "--set stream.length=equal"
        )
    if shown.min() < 1:
        raise BadConfig(
            f"stream.batch is {cfg.batch}, but a task has only {per_task.min()} samples; use a smaller batch"
        )
    return [int(n) for n in shown[0]]
