"""Streams without clean boundaries: i-Blurry tasks that share classes, or classes that come and go as Gaussians.

Source: i-Blurry: Koh et al. 2022, "Online Continual Learning on Class Incremental Blurry Task Configuration with Anytime
Inference": N % of the classes are disjoint, they come in one task only; of the others, the blurry ones, M % of the samples
come in another task than their class's own. Gaussian: Shanahan et al. 2021, "Encoders and Ensembles for Task-Free Continual
Learning": at time t a sample is of class c with a probability that goes as exp(-(t - centre_c)^2 / (2 width^2)).
Departures: how the M % are dealt to the other tasks is ours: evenly. Classes are cut to the size of the smallest one in
i-Blurry, so that tasks end at the same step in every run (`length="all"` keeps every sample). A Gaussian stream draws a
moment from the bell of its class for every sample and plays the samples in the order of their moments (ours), so that
each comes exactly once; centres are spread evenly, and the stream has no tasks, only evaluations in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cl_sim.arrays import load
from cl_sim.config import at_least, within
from cl_sim.errors import BadConfig
from cl_sim.indexed import IndexedStream, Schedule, Splits, class_orders
from cl_sim.rng import host_rng

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BlurryConfig:
    """Settings of the blurry stream."""

    data: str = "digits"  # a named set, or folder:PATH, parquet:PATH, npz:PATH
    schedule: Literal["i-blurry", "gaussian"] = "i-blurry"
    tasks: int = 5  # i-blurry: number of tasks; gaussian: full evaluations
    disjoint: float = 50.0  # percent of the classes that come in one task only (i-blurry)
    blurry: float = 10.0  # percent of the other classes' samples that come in another task (i-blurry)
    width: float = 0.1  # standard deviation of a class's bell, as a share of the stream (gaussian)
    length: Literal["equal", "all"] = "equal"  # samples per class: as many as the smallest has, or all (i-blurry)
    batch: int = 10  # samples per step
    order: str = "shuffled"  # classes: shuffled per seed, fixed, or a list such as 3,1,0,2
    announces: bool = False  # strategies may hear of task boundaries
    subset: int = 500  # test samples of the small evaluations, in all
    size: int = 0  # pixels; resize images to size x size (0: as they are)
    labels: str = ""  # other labels: FILE:COLUMN, or a column of the set's own table

    def __post_init__(self) -> None:
        at_least(self, tasks=1, batch=1, subset=1, size=0)
        within(self, 0, 100, "disjoint", "blurry")
        within(self, 1e-6, 1e3, "width")
        if self.announces and self.schedule == "gaussian":
            raise BadConfig("a gaussian schedule has no task boundaries to announce; use --set stream.announces=false")


class Blurry(IndexedStream):
    """Classes overlap in time. Evaluation splits are the classes, each counting from its first sample on."""

    Config = BlurryConfig

    def __init__(
        self, cfg: BlurryConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        loaded = load(cfg.data, data, size=cfg.size, labels=cfg.labels)
        y, classes = np.asarray(loaded.train.y), len(loaded.classes)
        orders = class_orders(classes, cfg.order, seeds)
        play = i_blurry if cfg.schedule == "i-blurry" else gaussian
        sequences, sizes = [], []
        for order, seed in zip(orders, seeds, strict=True):
            rng = host_rng(seed, "blurry order")
            rows, per_task = play(y, order, cfg, rng)
            sequences.append(rng.permutation(rows) if iid else rows)
            sizes.append(per_task)
        ends = task_ends(np.stack(sizes), cfg)
        rows = np.stack(sequences)[:, : (ends[-1] + 1) * cfg.batch]
        super().__init__(
            loaded,
            Schedule(rows=rows, labels=y[rows], ends=ends),
            class_splits(y[rows], loaded.classes, cfg.batch),
            batch_size=cfg.batch,
            announces=cfg.announces and not iid,
            device=device,
            subset=cfg.subset,
        )
        self.cfg, self.orders = cfg, orders

    def describe(self) -> dict[str, Any]:
        """Counts; i-Blurry: disjoint and blurry classes of each task of the first run; Gaussian: centres in order."""
        about = super().describe() | {"schedule": self.cfg.schedule}
        order = self.orders[0]
        if self.cfg.schedule == "gaussian":
            return about | {"centres in order": [int(c) for c in order], "width": f"{self.cfg.width:g} of the stream"}
        first_blurry, task = disjoint_classes(self.classes, self.cfg), np.arange(self.classes) % self.cfg.tasks
        alone, shared = np.split(order, [first_blurry])
        return about | {
            "disjoint classes": [
                sorted(int(c) for c in alone[task[:first_blurry] == t]) for t in range(self.cfg.tasks)
            ],
            "blurry classes": [sorted(int(c) for c in shared[task[first_blurry:] == t]) for t in range(self.cfg.tasks)],
            "blurry samples": f"{self.cfg.blurry:g} % come in another task",
        }


def disjoint_classes(classes: int, cfg: BlurryConfig) -> int:
    """How many classes come in one task only."""
    return round(classes * cfg.disjoint / 100)


def i_blurry(y: Ints, order: Ints, cfg: BlurryConfig, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Rows, task after task and shuffled within, and how many each task has.    Shapes: y [N], order [C] -> [n], [T].

    Classes are dealt to the tasks in turn, the disjoint ones first. Of each blurry class the given share of samples
    is dealt to the other tasks in turn.
    """
    counts = np.bincount(y, minlength=len(order))
    shortest = int(counts[counts > 0].min())
    rows, tasks = [], []
    for arrival, c in enumerate(order):
        mine = rng.permutation(np.flatnonzero(y == c))
        mine = mine[:shortest] if cfg.length == "equal" else mine
        task = np.full(len(mine), arrival % cfg.tasks)
        if arrival >= disjoint_classes(len(order), cfg) and cfg.tasks > 1:
            moved = np.arange(round(len(mine) * cfg.blurry / 100))
            task[moved] = (task[moved] + 1 + (moved + arrival) % (cfg.tasks - 1)) % cfg.tasks
        rows.append(mine)
        tasks.append(task)
    every, task = np.concatenate(rows), np.concatenate(tasks)
    return every[np.lexsort((rng.random(len(every)), task))], np.bincount(task, minlength=cfg.tasks)


def gaussian(y: Ints, order: Ints, cfg: BlurryConfig, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Every row once, ordered by a moment drawn from the bell of its class; and equal stretches.    Shapes: as i_blurry."""
    centre = np.empty(len(order))
    centre[order] = (np.arange(len(order)) + 0.5) / len(order)
    cuts = np.linspace(0, len(y), cfg.tasks + 1).round().astype(np.int64)
    stretches = cuts[1:] - cuts[:-1]
    return np.argsort(rng.normal(centre[y], cfg.width), kind="stable"), stretches


def task_ends(sizes: Ints, cfg: BlurryConfig) -> tuple[int, ...]:
    """The step in which the last sample of each task comes; the last incomplete batch is dropped.    Shapes: sizes [R, T].

    Raises: BadConfig if stacked runs have tasks of different lengths, or if a task ends within its first step.
    """
    if (sizes != sizes[0]).any():
        raise BadConfig(
            "stream.length 'all' gives these seeds tasks of different lengths, so they cannot run stacked; use --stack 1, or "
            "--set stream.length=equal"
        )
    until = np.cumsum(sizes[0])
    ends = np.minimum(-(-until // cfg.batch), until[-1] // cfg.batch) - 1
    if (np.diff(ends, prepend=-1) < 1).any():
        raise BadConfig(
            f"stream.tasks is {cfg.tasks}, but with batches of {cfg.batch} a task has no step of its own; use fewer tasks "
            "or a smaller --set stream.batch=N"
        )
    return tuple(int(end) for end in ends)


def class_splits(labels: Ints, names: tuple[str, ...], batch: int) -> Splits:
    """One split per class, seen from the step in which its first sample comes.    Shapes: labels [R, N]."""
    runs, length = labels.shape
    classes = len(names)
    since = np.full((runs, classes), length)  # a class that never comes is never seen
    for run, row in enumerate(labels):
        present, first = np.unique(row, return_index=True)
        since[run, present] = first // batch
    return Splits(names=names, of_class=np.tile(np.arange(classes), (runs, 1)), since=since)
