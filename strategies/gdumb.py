"""GDumb: collect a balanced memory, and learn from it alone, from scratch, whenever an answer is wanted.

Source: Prabhu et al. 2020, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", in the form of the
code of Mai et al. 2022, "Online Continual Learning in Image Classification: An Empirical Survey".
Symbols: D -> memory, the dumb learner -> fit.
Departures: as that code does, 30 epochs at a constant rate in place of 256 with warm restarts and CutMix, an incomplete last
batch is dropped, and the answer is not confined to classes seen. Asking must not change anything here, so a network is not
fitted before each evaluation but at each task boundary, or every `refit` samples and at the end where none is announced
(ours); in between, the last one answers. A memory smaller than a batch is repeated to fill it (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.memory.greedy import Greedy
from cl_sim.optim import SGD, clip, trainable
from cl_sim.runs import Lift, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class GDumbConfig:
    """Settings of GDumb."""

    capacity: int = 1000  # samples kept per run
    lr: float = 0.1  # learning rate of SGD
    epochs: int = 30  # passes over the memory per fit
    batch: int = 10  # samples per update
    clip: float = 10.0  # largest norm of a run's gradient
    refit: int = 1000  # samples between two fits, on streams that announce no tasks

    def __post_init__(self) -> None:
        at_least(self, capacity=1, lr=0, epochs=1, batch=1, clip=1e-6, refit=1)


class GDumb(Strategy):
    """A greedy sampler and a dumb learner."""

    Config, tasks = GDumbConfig, frozenset({"classify"})
    fits: Tensor  # [] int64, networks fitted so far
    last: Tensor  # [R] loss of the last fit's last update

    def __init__(self, cfg: GDumbConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = self.fresh(0)
        self.memory = Greedy(cfg.capacity, env.fields, env.rng, env.classes)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)
        self.register_buffer("fits", torch.zeros((), dtype=torch.int64, device=env.device))
        self.register_buffer("last", torch.zeros(env.runs, device=env.device))

    @property
    def steady(self) -> bool:
        """True where fits wait for boundaries: then a step is a change of the memory and nothing else."""
        return self.env.announces

    def observe(self, new: Batch) -> Logs:
        """Offer the batch to the memory; fit a network if no boundary will ask for it."""
        before = self.memory.offered
        self.memory.add(new)  # D <- greedy sampler
        after = self.memory.offered
        due = before // self.cfg.refit < after // self.cfg.refit or after >= self.env.samples
        if due and not self.env.announces:
            self.fit()
        return {"loss": self.last.clone()}

    def boundary(self) -> None:
        """Fit a network to the memory as it is now."""
        self.fit()

    def fit(self) -> None:
        """Replace the network by a fresh one, trained on the memory alone."""
        self.fits += 1
        self.net.load_state_dict(self.fresh(int(self.fits)).state_dict())
        updates = max(1, min(self.memory.offered, self.cfg.capacity) // self.cfg.batch)
        for _ in range(self.cfg.epochs):
            for batch in self.memory.cycle(self.cfg.batch, updates):
                self.update(self.env.augment(batch))

    def update(self, view: Batch) -> None:
        """One gradient step, no longer than the clipped gradient allows."""
        loss = cross_entropy(self.net(view["x"]), view["y"])
        self.sgd.zero_grad()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        clip(self.net, self.cfg.clip)
        self.sgd.step()
        self.last.copy_(loss.detach())

    def fresh(self, number: int) -> Lift:
        """Untrained networks, which depend on the runs' seeds and on how many were fitted before."""
        return self.env.lift(lambda: Classifier(self.env.encoder(), self.env.classes), f"fit {number}")

    def predict(self, batch: Batch) -> Tensor:
        """Class scores of the last network fitted.    Shapes: -> [R, B, C]."""
        logits: Tensor = self.net(batch["x"])
        return logits
