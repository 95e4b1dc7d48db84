"""PCR: proxy-based contrastive replay. Samples are contrasted with the proxies of the classes in the joint batch.

Source: Lin et al. 2023, "PCR: Proxy-based Contrastive Replay for Online Class-Incremental Continual Learning", and its code.
Symbols: (x, y) -> new, (x_m, y_m) -> old, f -> fresh["f"], f_m -> recalled["f"], W -> proxies.
Departures: none from the released code, whose later form masks unseen classes when answering (`mask_unseen=false`: the
first form); its own reservoir rule is the default (`rule=vitter`: the textbook's). `saa` changes the augmented view, the raw
image stays beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_sim.config import at_least
from cl_sim.encoders.classifier import CosineClassifier
from cl_sim.losses import cosine_scores, proxy_contrast
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks
from cl_sim.runs import join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

contrast, scores = per_run(proxy_contrast), per_run(cosine_scores)


@dataclass(frozen=True, kw_only=True)
class PCRConfig(ReplayConfig):
    """Settings of PCR."""

    tau: float = 0.09  # temperature of the cosines
    mask_unseen: bool = True  # never answer a class that has not come yet
    rule: Literal["vitter", "frozen"] = "frozen"  # the reservoir's rule

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, tau=1e-6)


class PCR(Strategy):
    """Replay with a contrast between samples and proxies."""

    Config, tasks = PCRConfig, frozenset({"classify"})
    views = ("replay",)

    def __init__(self, cfg: PCRConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: CosineClassifier(env.encoder(), env.classes, 1 / cfg.tau))
        self.encode = self.net.part("encoder")
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.memory.holds(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on both views of the new and the recalled samples; then remember the new ones.

        The very first batch meets an empty memory: it moves the BatchNorm statistics and no weight, as in the authors' code.
        """
        drawn = self.env.augment.draw(new)  # before the memory draws
        loss = torch.zeros(self.env.runs, device=self.env.device)
        for _ in range(self.cfg.replay_steps):
            old = self.memory.sample(self.cfg.replay)
            changed, view = self.env.augment.both(new, drawn, self.tricks.harder(old))
            fresh = self.features(new, changed)  # [R, 2B], a pass of its own: the new samples' BatchNorm statistics
            if len(self.memory):
                recalled = self.features(old, view)  # [R, 2M']
                if self.tricks.adaptive is not None:
                    self.judge(view, recalled)
                loss = self.loss(join(recalled, fresh))
                self.descend(loss, self.sgd)
        self.memory.add(new)
        self.tricks.note(new)
        return {"loss": loss, **self.tricks.tick()}

    def judge(self, view: Batch, recalled: Batch) -> None:
        """Note how well the proxies answer the views, the second half of what was recalled.    Shapes: f [R, 2M', D]."""
        answers = scores(
            recalled["f"].detach().chunk(2, 1)[1], self.net.weight("head.weight").detach(), tau=self.cfg.tau
        )
        self.tricks.judge(view, answers)

    def features(self, raw: Batch, view: Batch) -> Batch:
        """Labels and encoder features f of raw images, then of their views.    Shapes: [R, N, ...] -> y [R, 2N], f [R, 2N, D]."""
        return {"y": raw["y"].repeat(1, 2), "f": self.encode(torch.cat([raw["x"], view["x"]], 1))}

    def loss(self, both: Batch) -> Tensor:
        """The contrast of every row with the proxies of the batch.    Shapes: -> [R]."""
        return contrast(both["f"], both["y"], self.net.weight("head.weight"), tau=self.cfg.tau)

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.tricks.review(self.memory):
            self.descend(REVIEW * self.loss(self.features(old, self.env.augment(old))), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Scaled cosines to the proxies.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
