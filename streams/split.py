"""Class-incremental stream: tasks of disjoint classes one after the other, every sample once.

Source: Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", as replayed by the online code line
(batches of 10, one epoch, shuffled class order per run, the incomplete last batch of a task dropped).
Departures: where classes differ in size, every task gets as many steps as the smallest possible task has, so that all
class orders give streams of one length (`length="all"` keeps every sample instead).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cl_sim.arrays import load
from cl_sim.errors import BadConfig
from cl_sim.indexed import IndexedStream, Schedule, class_incremental, class_orders, equal_tasks, task_splits

USUAL_TASKS = {"cifar10": 5, "cifar100": 10, "mini-imagenet": 10, "tiny-imagenet": 10, "mnist": 5, "fashion-mnist": 5}


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Settings of the class-incremental stream."""

    data: str = "digits"  # a named set, or folder:PATH, parquet:PATH, npz:PATH, csv:PATH
    tasks: int = 0  # 0: the field's usual number for the set, else 5 (or one task per class if 5 does not divide)
    batch: int = 10  # samples per step
    order: str = "shuffled"  # classes: shuffled per seed, fixed, or a list such as 3,1,0,2
    length: Literal["equal", "all"] = "equal"  # steps per task: the same in every class order, or every sample
    announces: bool = True  # strategies may hear of task boundaries
    subset: int = 500  # test samples of the small evaluations, in all
    size: int = 0  # pixels; resize images to size x size (0: as they are)
    labels: str = ""  # other labels: FILE:COLUMN, or a column of the set's own table


class Split(IndexedStream):
    """Tasks of equal class count; each task's samples shuffled; test sets per task."""

    Config = SplitConfig

    def __init__(
        self, cfg: SplitConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        loaded = load(cfg.data, data, size=cfg.size, labels=cfg.labels)
        y, classes = np.asarray(loaded.train.y), len(loaded.classes)
        tasks = cfg.tasks or usual_tasks(cfg.data, classes)
        equal_tasks(classes, tasks)
        self.orders = class_orders(classes, cfg.order, seeds)
        rows = [np.flatnonzero(y == c) for c in range(classes)]
        steps = task_steps(np.array([len(of) for of in rows]), self.orders, tasks, cfg)
        pools = [rows] * len(seeds)
        sequence, ends = class_incremental(pools, self.orders, batch=cfg.batch, seeds=seeds, steps=steps, iid=iid)
        super().__init__(
            loaded,
            Schedule(rows=sequence, labels=y[sequence], ends=ends),
            task_splits(self.orders, tasks, ends, iid),
            batch_size=cfg.batch,
            announces=cfg.announces and not iid,
            device=device,
            subset=cfg.subset,
        )


def usual_tasks(data: str, classes: int) -> int:
    """The field's usual number of tasks for a set, else 5, else one per class."""
    return USUAL_TASKS.get(data, 5 if classes % 5 == 0 else classes)


def task_steps(counts: np.ndarray, orders: np.ndarray, tasks: int, cfg: SplitConfig) -> list[int]:
    """Length of each task in batches.    Shapes: counts [C], orders [R, C] -> T numbers.

    Raises: BadConfig if a task would be empty, or if `length="all"` gives the stacked runs different lengths.
    """
    each = len(counts) // tasks
    if cfg.length == "equal":
        steps = [int(np.sort(counts)[:each].sum()) // cfg.batch] * tasks
    else:
        per_run = counts[orders].reshape(len(orders), tasks, each).sum(2) // cfg.batch  # [R, T]
        if (per_run != per_run[0]).any():
            raise BadConfig(
                "stream.length 'all' gives these seeds tasks of different lengths, so they cannot run stacked; "
                "use --stack 1, or --set stream.length=equal"
            )
        steps = [int(n) for n in per_run[0]]
    if min(steps) < 1:
        raise BadConfig(
            f"stream.batch is {cfg.batch}, more than a task has samples; use a smaller --set stream.batch=N"
        )
    return steps
