"""Streams without clean boundaries: i-Blurry tasks that share classes, or classes that come and go as Gaussians.

Source: i-Blurry: Koh et al. 2022, "Online Continual Learning on Class Incremental Blurry Task Configuration with Anytime
Inference" (N % of the classes are disjoint: they come in one task only; M % of the samples of the other, blurry classes
come in another task than their own). Gaussian: Shanahan et al. 2021, "Encoders and Ensembles for Task-Free Continual
Learning" (a class's rate over time is a bell).
Departures: moved samples are spread evenly at random over the other tasks. A Gaussian stream draws a moment for every
sample from the bell of its class and plays the samples in the order of their moments, so that each comes exactly once.
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
from cl_sim.indexed import IndexedStream, Schedule, Splits, class_orders, host_rng

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
        sequences = []
        for order, seed in zip(orders, seeds, strict=True):
            rng = host_rng(seed, "blurry order")
            rows = play(y, order, cfg, rng)
            sequences.append(rng.permutation(rows) if iid else rows)
        rows = np.stack(sequences)
        steps = rows.shape[1] // cfg.batch
        if steps < cfg.tasks:
            raise BadConfig(f"stream.tasks is {cfg.tasks}, but the stream has only {steps} steps; use fewer tasks")
        rows = rows[:, : steps * cfg.batch]
        ends = tuple(int(end) - 1 for end in np.linspace(0, steps, cfg.tasks + 1).round()[1:])
        super().__init__(
            loaded,
            Schedule(rows=rows, labels=y[rows], ends=ends),
            class_splits(y[rows], loaded.classes, cfg.batch),
            batch_size=cfg.batch,
            announces=cfg.announces and not iid,
            device=device,
            subset=cfg.subset,
        )
        self.disjoint = orders[0][: disjoint_classes(classes, cfg)]
        self.cfg = cfg

    def describe(self) -> dict[str, Any]:
        """Counts, and which classes are disjoint in the first run."""
        bell = {"width": self.cfg.width}
        blur = {"disjoint classes": sorted(int(c) for c in self.disjoint), "blurry samples": f"{self.cfg.blurry:g} %"}
        return super().describe() | {
            "schedule": self.cfg.schedule,
            **(blur if self.cfg.schedule == "i-blurry" else bell),
        }


def disjoint_classes(classes: int, cfg: BlurryConfig) -> int:
    """How many classes come in one task only."""
    return round(classes * cfg.disjoint / 100)


def i_blurry(y: Ints, order: Ints, cfg: BlurryConfig, rng: np.random.Generator) -> Ints:
    """Every row once; tasks one after the other, shuffled within.    Shapes: y [N], order [C] -> [N].

    The disjoint classes, then the blurry ones, are dealt to the tasks in turn; of each blurry class the given share of
    samples moves to other tasks.
    """
    classes = len(order)
    first_blurry = disjoint_classes(classes, cfg)
    home = np.empty(classes, dtype=np.int64)
    for group in (order[:first_blurry], order[first_blurry:]):
        home[group] = np.arange(len(group)) % cfg.tasks
    task = home[y]
    if cfg.tasks > 1:
        for c in order[first_blurry:]:
            rows = rng.permutation(np.flatnonzero(y == c))
            moved = rows[: round(len(rows) * cfg.blurry / 100)]
            task[moved] = (task[moved] + rng.integers(1, cfg.tasks, len(moved))) % cfg.tasks
    return np.lexsort((rng.random(len(y)), task))


def gaussian(y: Ints, order: Ints, cfg: BlurryConfig, rng: np.random.Generator) -> Ints:
    """Every row once, ordered by a moment drawn from the bell of its class.    Shapes: y [N], order [C] -> [N].

    The centres of the bells are spread evenly over the stream, in the order of the classes.
    """
    centre = np.empty(len(order))
    centre[order] = (np.arange(len(order)) + 0.5) / len(order)
    return np.argsort(rng.normal(centre[y], cfg.width), kind="stable")


def class_splits(labels: Ints, names: tuple[str, ...], batch: int) -> Splits:
    """One split per class, seen from the step in which its first sample comes.    Shapes: labels [R, N]."""
    runs, length = labels.shape
    classes = len(names)
    since = np.full((runs, classes), length)  # a class that never comes is never seen
    for run, row in enumerate(labels):
        present, first = np.unique(row, return_index=True)
        since[run, present] = first // batch
    return Splits(names=names, of_class=np.tile(np.arange(classes), (runs, 1)), since=since)
