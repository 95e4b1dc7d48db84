"""Experience replay: learn each new batch together with a few remembered samples.

Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", algorithm 1.
Symbols: B_n -> new, B_M -> old, M -> memory, theta -> net.
Departures: new and old take two forward passes by default, each with its own BatchNorm statistics, and their losses are
added, as the online class-incremental code line does whose numbers are compared; `joint_pass=true` is the algorithm's
single pass over both, with one mean loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import trainable
from cl_sim.runs import join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class ERConfig:
    """Settings of experience replay."""

    capacity: int = 1000  # samples kept per run
    replay: int = 10  # samples recalled per step
    lr: float = 0.1  # learning rate of SGD
    joint_pass: bool = False  # one forward pass over new and old together
    rule: Literal["vitter", "frozen"] = "vitter"  # the reservoir's rule

    def __post_init__(self) -> None:
        at_least(self, capacity=1, replay=1, lr=0)


class ER(Strategy):
    """Replay from a reservoir."""

    Config, tasks = ERConfig, frozenset({"classify"})

    def __init__(self, cfg: ERConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return len(self.memory) >= min(int(self.cfg.replay), self.memory.capacity)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the new batch and what the memory recalls; then remember the new batch."""
        old = self.memory.sample(self.cfg.replay)  # B_M ~ M
        if self.cfg.joint_pass:
            loss = self.loss(join(new, old))
        else:
            loss = self.loss(new)
            if len(self.memory):
                loss = loss + self.loss(old)
        self.descend(loss, self.sgd)  # theta <- SGD(B_n u B_M)
        self.memory.add(new)  # M <- update(M, B_n)
        return {"loss": loss}

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of one forward pass.    Shapes: -> [R]."""
        view = self.env.augment(batch)
        return cross_entropy(self.net(view["x"]), view["y"])

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        logits: Tensor = self.net(batch["x"])
        return logits
