"""ER-ACE: replay with an asymmetric cross-entropy, so that new classes do not push the old ones away.

Source: Caccia et al. 2022, "New Insights on Reducing Abrupt Representation Change in Online Continual Learning".
Symbols: B_n -> new, B_M -> old, M -> memory, theta -> net, C_old -> the classes masked in the loss of new.
Departures: classes are masked by membership, not by label number, so that any class order works: the loss of the new
batch competes among the classes of that batch and those not yet seen. As in ER, the very first batch, with an empty
memory, is learned from the new batch alone. `saa` gives recalled samples sample-adaptive views (see `saa`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import CosineClassifier
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class ERACEConfig(ReplayConfig):
    """Settings of ER-ACE."""

    scale: float = 10.0  # of the cosine scores

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, scale=0)


class ERACE(Strategy):
    """Replay with asymmetric cross-entropy."""

    Config, tasks = ERACEConfig, frozenset({"classify"})

    def __init__(self, cfg: ERACEConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: CosineClassifier(env.encoder(), env.classes, cfg.scale))
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.memory.holds(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the masked loss of the new batch plus the plain loss of the recalled one."""
        masked = self.tricks.seen & ~self.tricks.present(new)  # C_old
        for _ in range(self.cfg.replay_steps):
            old = self.memory.sample(self.cfg.replay)  # B_M ~ M
            loss = cross_entropy(self.scores(new).masked_fill(masked[:, None], -torch.inf), new["y"])
            if len(self.memory):
                view = self.env.augment(self.tricks.harder(old))
                logits = self.net(view["x"])
                loss = loss + cross_entropy(logits, view["y"])
                self.tricks.judge(view, logits)
            self.descend(loss, self.sgd)
        self.memory.add(new)  # M <- update(M, B_n)
        self.tricks.note(new)
        return {"loss": loss, **self.tricks.tick()}

    def scores(self, batch: Batch) -> Tensor:
        """Scaled cosines of the augmented batch.    Shapes: -> [R, B, C]."""
        logits: Tensor = self.net(self.env.augment(batch)["x"])
        return logits

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.tricks.review(self.memory):
            self.descend(REVIEW * cross_entropy(self.scores(old), old["y"]), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
