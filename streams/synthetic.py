"""Made-up images for tests and timing: one random picture per class, seen through noise, class after class.

Source: ours. Nothing is read from disk; the same settings make the same pictures on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from cl_sim.arrays import Arrays, DataSet
from cl_sim.config import at_least
from cl_sim.indexed import (
    IndexedStream,
    Schedule,
    class_incremental,
    class_orders,
    equal_tasks,
    last_steps,
    task_splits,
)
from cl_sim.rng import host_rng


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Settings of the made-up stream."""

    classes: int = 10
    tasks: int = 5
    per_class: int = 100  # training samples
    test_per_class: int = 20
    channels: int = 3
    size: int = 8  # pixels
    noise: float = 0.25  # standard deviation, in units of the full brightness range
    batch: int = 10  # samples per step
    order: str = "shuffled"  # classes: shuffled per seed, fixed, or a list such as 3,1,0,2
    announces: bool = True  # strategies may hear of task boundaries

    def __post_init__(self) -> None:
        at_least(self, classes=2, per_class=1, test_per_class=1, channels=1, size=1, noise=0, batch=1)


class Synthetic(IndexedStream):
    """Class-incremental made-up images."""

    Config = SyntheticConfig

    def __init__(
        self, cfg: SyntheticConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        equal_tasks(cfg.classes, cfg.tasks)
        pictures = make_set(cfg)
        y = np.asarray(pictures.train.y)
        orders = class_orders(cfg.classes, cfg.order, seeds)
        steps = [cfg.classes // cfg.tasks * cfg.per_class // cfg.batch] * cfg.tasks
        pools = [[np.flatnonzero(y == c) for c in range(cfg.classes)]] * len(seeds)
        sizes, ends = [cfg.batch * n for n in steps], last_steps(steps)
        rows = class_incremental(pools, orders, sizes=sizes, seeds=seeds, iid=iid)
        super().__init__(
            pictures,
            Schedule(rows=rows, labels=y[rows], ends=ends),
            task_splits(orders, cfg.tasks, ends, iid),
            batch_size=cfg.batch,
            announces=cfg.announces and not iid,
            device=device,
        )


def make_set(cfg: SyntheticConfig) -> DataSet:
    """The pictures: uint8 [N, C, H, W], train and test drawn alike."""
    rng = host_rng(0, "synthetic pictures")
    shape = (cfg.channels, cfg.size, cfg.size)
    prototypes = rng.uniform(0, 255, (cfg.classes, *shape))

    def draw(each: int) -> Arrays:
        y = np.repeat(np.arange(cfg.classes), each)
        x = prototypes[y] + rng.normal(0, 255 * cfg.noise, (len(y), *shape))
        return Arrays(x=x.clip(0, 255).astype(np.uint8), y=y)

    train, test = draw(cfg.per_class), draw(cfg.test_per_class)
    digest = hashlib.sha256(train.x.tobytes() + test.x.tobytes()).hexdigest()
    names = tuple(str(c) for c in range(cfg.classes))
    return DataSet(name="synthetic", train=train, test=test, classes=names, digest=digest)
