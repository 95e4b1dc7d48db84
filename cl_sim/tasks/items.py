"""Histories of items and the item that comes next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cl_sim.encoders.ranker import Ranker
from cl_sim.encoders.transformer import draw_noise
from cl_sim.errors import BadConfig
from cl_sim.histories import History, two_views
from cl_sim.losses import next_item
from cl_sim.memory.reservoir import Reservoir
from cl_sim.metrics.ranking import scored
from cl_sim.optim import Adam, trainable
from cl_sim.rng import Rng
from cl_sim.runs import per_run
from cl_sim.strategy import Env
from cl_sim.tasks.base import Net, Task, TaskConfig
from cl_sim.types import Batch

KEPT = ("user", "items", "length", "target")  # of an event, in a memory


class Items(Task):
    """Histories of items, and the one that comes next: cross-entropy over all items, views by crop, mask and reorder.

    `padding` makes item 0 a candidate of the loss, as in published code. With `mask_unseen` only items that have come are
    candidates (a growing catalogue). Events without a history count nowhere and are not remembered.
    """

    seen: Tensor  # [R, I + 1] bool

    def __init__(self, cfg: TaskConfig, env: Env) -> None:
        if cfg.readout != "head" or cfg.review != "never":
            raise BadConfig("strategy.readout and strategy.review are for streams of classes; leave them out")
        net = env.lift(lambda: Ranker(env.encoder(), cfg.padding))
        columns = {name: env.fields[name] for name in KEPT}
        memory = Reservoir(cfg.capacity, columns, env.rng, cfg.rule, skips=True) if cfg.capacity else None
        super().__init__(cfg, env, net, memory)
        self.lr = cfg.lr or 1e-3
        nothing = torch.zeros(env.runs, env.classes, dtype=torch.bool, device=env.device)
        self.register_buffer("seen", nothing)
        self.item = torch.arange(env.classes, device=env.device)

    def optimiser(self) -> Optimizer:
        """Adam, as published."""
        return Adam(trainable(self.net), lr=self.lr)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the next item."""
        return self.plain_loss(batch, self.env.rng, self.net)

    def plain_loss(self, batch: Batch, rng: Rng, net: Net) -> Tensor:
        """Mean cross-entropy among the candidates."""
        scores = net(*self._inputs(batch, rng))
        candidate = self._candidates(self._with_targets(batch))
        return per_run(next_item)(scores, batch["target"], scored(batch), candidate)

    def features(self, batch: Batch, rng: Rng) -> Tensor:
        """The vector h of each history."""
        found: Tensor = self.net.with_parameters({}, "encoder")(*self._inputs(batch, rng))
        return found

    def _inputs(self, batch: Batch, rng: Rng) -> tuple[Tensor, ...]:
        items, length = batch["items"], batch["length"]
        if not self.net.training:
            return items, length
        encoder: Any = self.net.net.encoder
        return items, length, draw_noise(rng, encoder.noise_size(items.shape[1]))

    def views(self, batch: Batch, rng: Rng) -> tuple[Batch, Batch]:
        """By two different edits."""
        one, two = two_views(History(batch["items"], batch["length"]), rng)
        return {**batch, **one._asdict()}, {**batch, **two._asdict()}

    def labels(self, batch: Batch) -> Tensor:
        """The next items."""
        return batch["target"]

    def counted(self, batch: Batch) -> Tensor:
        """Events with a history."""
        return scored(batch)

    def remember(self, new: Batch) -> None:
        """Offer the events that have a history."""
        if self.memory is not None:
            self.memory.add(new, scored(new))
        self.seen.copy_(self._with_targets(new))

    def _with_targets(self, batch: Batch) -> Tensor:
        """Which items have come, these included.    Shapes: -> [R, I + 1] bool."""
        return self.seen.scatter(1, batch["target"].long(), True)

    def _candidates(self, seen: Tensor) -> Tensor:
        """Shapes: seen [R, I + 1] bool -> same."""
        known = seen if self.cfg.mask_unseen else torch.ones_like(seen)
        return torch.where(self.item > 0, known, self.cfg.padding)

    def review(self) -> Iterator[Batch]:
        """Streams of items announce no boundaries, so there is nothing to review."""
        return iter(())

    def answer(self, batch: Batch) -> Tensor:
        """Minus infinity for what is no candidate."""
        scores: Tensor = self.net(*self._inputs(batch, self.env.rng))
        return scores.masked_fill(~self._candidates(self.seen)[:, None], -torch.inf)
