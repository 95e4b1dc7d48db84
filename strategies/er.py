"""Experience replay: learn each new batch together with a few remembered samples.

Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", algorithm 1.
Symbols: B_n -> new, B_M -> old, M -> memory, theta -> net.
Departures: new and old take two forward passes by default, each with its own BatchNorm statistics, and their losses are
added, as the online class-incremental code line does whose numbers are compared; `joint_pass=true` is the algorithm's
single pass over both, with one mean loss. `saa` gives recalled samples sample-adaptive views (see `saa`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from cl_sim.encoders.classifier import Classifier
from cl_sim.errors import BadConfig
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks, replay_loss
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class ERConfig(ReplayConfig):
    """Settings of experience replay."""

    joint_pass: bool = False  # one forward pass over new and old together

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.joint_pass and self.saa != "off":
            raise BadConfig("joint_pass=true gives new and recalled samples the same views; leave strategy.saa out")


class ER(Strategy):
    """Replay from a reservoir."""

    Config, tasks = ERConfig, frozenset({"classify"})

    def __init__(self, cfg: ERConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.memory.holds(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the new batch and what the memory recalls; then remember the new batch."""
        for _ in range(self.cfg.replay_steps):
            old = self.memory.sample(self.cfg.replay)  # B_M ~ M
            loss = replay_loss(new, old, self.loss, self.recalled_loss, joint_pass=self.cfg.joint_pass)
            self.descend(loss, self.sgd)  # theta <- SGD(B_n u B_M)
        self.memory.add(new)  # M <- update(M, B_n)
        self.tricks.note(new)
        return {"loss": loss, **self.tricks.tick()}

    def recalled_loss(self, old: Batch) -> Tensor:
        """Mean cross-entropy of recalled samples, in views made for each.    Shapes: -> [R]."""
        view = self.env.augment(self.tricks.harder(old))
        logits = self.net(view["x"])
        self.tricks.judge(view, logits)
        return cross_entropy(logits, view["y"])

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of one forward pass.    Shapes: -> [R]."""
        view = self.env.augment(batch)
        return cross_entropy(self.net(view["x"]), view["y"])

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.tricks.review(self.memory):
            self.descend(REVIEW * self.loss(old), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
