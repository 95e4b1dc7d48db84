"""Samples and their classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from cl_sim import augment
from cl_sim.encoders.classifier import Classifier
from cl_sim.errors import BadConfig
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import Tricks
from cl_sim.rng import Rng
from cl_sim.runs import per_run
from cl_sim.strategy import Env
from cl_sim.tasks.base import Net, Task, TaskConfig
from cl_sim.types import Batch

FEATURE_DROPOUT = 0.2  # probability, for samples that are no images

cross_entropy = per_run(F.cross_entropy)


class Classes(Task):
    """Samples x of classes y: a classifier, cross-entropy, and views by the usual random changes.

    Images: crop (an eighth of the side), flip, colour jitter and grey; other samples: a fifth of their values is set to 0.
    """

    def __init__(self, cfg: TaskConfig, env: Env) -> None:
        if cfg.padding:
            raise BadConfig("strategy.padding is for streams of items; leave it out")
        net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule) if cfg.capacity else None
        super().__init__(cfg, env, net, memory)
        self.lr = cfg.lr or 0.1
        self.tricks = Tricks(cfg, env)

    def optimiser(self) -> Optimizer:
        """Stochastic gradient descent, as in replay."""
        return SGD(trainable(self.net), lr=self.lr)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of a training view."""
        return self.plain_loss(self.env.augment(batch), self.env.rng, self.net)

    def plain_loss(self, batch: Batch, rng: Rng, net: Net) -> Tensor:
        """Mean cross-entropy."""
        return cross_entropy(net(batch["x"]), batch["y"])

    def features(self, batch: Batch, rng: Rng) -> Tensor:
        """Of samples as they are."""
        found: Tensor = self.net.with_parameters({}, "encoder")(batch["x"])
        return found

    def views(self, batch: Batch, rng: Rng) -> tuple[Batch, Batch]:
        """Two independent draws."""
        return self._view(batch, rng), self._view(batch, rng)

    def _view(self, batch: Batch, rng: Rng) -> Batch:
        x = batch["x"]
        if x.dim() != 5:
            return {**batch, "x": x.masked_fill(rng.chance(FEATURE_DROPOUT, *x.shape[1:]), 0)}
        x = augment.flip(augment.crop(x, rng, max(x.shape[-1] // 8, 1)), rng)
        if x.shape[2] in (1, 3):
            x = augment.grey(augment.jitter(x, rng), rng)
        return {**batch, "x": x}

    def labels(self, batch: Batch) -> Tensor:
        """The classes."""
        return batch["y"]

    def counted(self, batch: Batch) -> Tensor:
        """Every sample."""
        return torch.ones_like(batch["y"], dtype=torch.bool)

    def remember(self, new: Batch) -> None:
        """Offer the whole batch."""
        if self.memory is not None:
            self.memory.add(new)
        self.tricks.note(new)

    def review(self) -> Iterator[Batch]:
        """As `strategy.review` says."""
        return self.tricks.review(self.memory) if self.memory is not None else iter(())

    def answer(self, batch: Batch) -> Tensor:
        """By the head, or by the class means of the memory."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
