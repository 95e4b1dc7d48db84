"""SAA: sample-adaptive augmentation in supervised replay. Recalled samples that teach little get harder views.

Source: Gui et al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation in Semi-Supervised Learning", and
its code; experience replay: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning".
Symbols: h_i -> history, e_i -> naive, d -> history_decay, T -> threshold, w -> env.augment, B_n -> new, B_M -> old, M -> memory.
Departures: the source is semi-supervised and passes often over a fixed pool; here (ours) the pool is the memory, a sample's loss
is the cross-entropy of its label on the view used, an epoch is as many steps as recall every slot once on average, the
warm-up is three of these, and a slot takes part once it has been recalled twice. The default levels keep ordinary samples at
the strategy's own views (`saa=ssl` is the source's pair). New and recalled samples take a pass each, as in `er`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from cl_sim.adaptive import class_status as class_status
from cl_sim.adaptive import class_thresholds as class_thresholds
from cl_sim.adaptive import otsu_threshold as otsu_threshold
from cl_sim.adaptive import update_flags as update_flags
from cl_sim.adaptive import update_history as update_history
from cl_sim.encoders.classifier import Classifier
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class SAAConfig(ReplayConfig):
    """Settings of replay with sample-adaptive augmentation."""

    saa: Literal["off", "replay", "replay-soft", "ssl", "none", "all", "random", "inverse"] = "replay"


class SAA(Strategy):
    """Experience replay whose memory knows which of its samples are naive."""

    Config, tasks = SAAConfig, frozenset({"classify"})
    views = ("flip", "shift")

    def __init__(self, cfg: SAAConfig, env: Env) -> None:
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
        """One gradient step on the new batch and on adaptive views of the recalled one; then remember, and select."""
        for _ in range(self.cfg.replay_steps):
            old = self.memory.sample(self.cfg.replay)  # B_M ~ M
            fresh = self.env.augment(new)  # w(x)
            loss = cross_entropy(self.net(fresh["x"]), fresh["y"])
            if len(self.memory):
                view = self.env.augment(self.tricks.harder(old))  # s(x), joined where e_i = 1
                logits = self.net(view["x"])
                loss = loss + cross_entropy(logits, view["y"])
                self.tricks.judge(view, logits)  # h_i <- d h_i + (1 - d) c_i
            self.descend(loss, self.sgd)
        self.memory.add(new)
        self.tricks.note(new)
        return {"loss": loss.detach(), **self.tricks.tick()}  # T = Otsu(h); e_i = 1 where h_i < T

    def boundary(self) -> None:
        """Review the memory on the strategy's own views, if that is asked for."""
        for old in self.tricks.review(self.memory):
            view = self.env.augment(old)
            self.descend(REVIEW * cross_entropy(self.net(view["x"]), view["y"]), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
