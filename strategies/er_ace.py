"""ER-ACE: replay with an asymmetric cross-entropy, so that new classes do not push the old ones away.

Source: Caccia et al. 2022, "New Insights on Reducing Abrupt Representation Change in Online Continual Learning".
Symbols: B_n -> new, B_M -> old, M -> memory, theta -> net, C_old -> the classes masked in the loss of new.
Departures: classes are masked by membership, not by label number, so that any class order works: the loss of the new
batch competes among the classes of that batch and those not yet seen. As in ER, the very first batch, with an empty
memory, is learned from the new batch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from cl_sim.config import at_least
from cl_sim.encoders.classifier import CosineClassifier
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import trainable
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class ERACEConfig:
    """Settings of ER-ACE."""

    capacity: int = 1000  # samples kept per run
    replay: int = 10  # samples recalled per step
    lr: float = 0.1  # learning rate of SGD
    scale: float = 10.0  # of the cosine scores
    rule: Literal["vitter", "frozen"] = "vitter"  # the reservoir's rule

    def __post_init__(self) -> None:
        at_least(self, capacity=1, replay=1, lr=0, scale=0)


class ERACE(Strategy):
    """Replay with asymmetric cross-entropy."""

    Config, tasks = ERACEConfig, frozenset({"classify"})
    seen: Tensor  # [R, C] bool

    def __init__(self, cfg: ERACEConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: CosineClassifier(env.encoder(), env.classes, cfg.scale))
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)
        self.every_class = torch.arange(env.classes, device=env.device)
        self.register_buffer("seen", torch.zeros(env.runs, env.classes, dtype=torch.bool, device=env.device))

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return len(self.memory) >= min(int(self.cfg.replay), self.memory.capacity)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the masked loss of the new batch plus the plain loss of the recalled one."""
        old = self.memory.sample(self.cfg.replay)  # B_M ~ M
        present = (new["y"][..., None] == self.every_class).any(1)  # [R, C]
        masked = self.seen & ~present  # C_old
        loss = cross_entropy(self.scores(new).masked_fill(masked[:, None], -torch.inf), new["y"])
        if len(self.memory):
            loss = loss + cross_entropy(self.scores(old), old["y"])
        self.descend(loss, self.sgd)
        self.memory.add(new)  # M <- update(M, B_n)
        self.seen |= present
        return {"loss": loss}

    def scores(self, batch: Batch) -> Tensor:
        """Scaled cosines of the augmented batch.    Shapes: -> [R, B, C]."""
        logits: Tensor = self.net(self.env.augment(batch)["x"])
        return logits

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        logits: Tensor = self.net(batch["x"])
        return logits
