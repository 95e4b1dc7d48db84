"""HPCR: PCR with a temperature that moves outside the softmax, and two distillations from what the memory stored.

Source: Lin et al. 2025, "HPCR: Holistic Proxy-based Contrastive Replay for Online Continual Learning", and its code.
Symbols: (x, y) -> new, (x_m, y_m) -> old, f -> fresh["f"], f_m -> recalled["f"], W -> proxies, s* -> logits, H -> feature,
g(i) -> temperature_factor.
Departures: g counts steps over the whole stream, which gives the code's values when tasks are multiples of the period; the
code misplaces the stored features of the batch that fills the memory, we do not; where no task boundary is announced,
distillation starts after `onset` steps (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from cl_sim.config import at_least
from cl_sim.encoders.classifier import CosineClassifier
from cl_sim.losses import Contrast, cosine_scores, proxy_contrast, proxy_distill, sample_distill
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, Onset, ReplayConfig, Tricks
from cl_sim.runs import join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Field, Logs

scores, contrast = per_run(cosine_scores), per_run(proxy_contrast)
distill_proxies, distill_samples = per_run(proxy_distill), per_run(sample_distill)
Number = TypeVar("Number", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class HPCRConfig(ReplayConfig):
    """Settings of HPCR."""

    tau: float = 0.09  # temperature inside the softmax
    low: float = 0.5625  # factor outside at the start of a period: tau / 0.16
    high: float = 1.8  # factor in its middle: tau / 0.05
    period: int = 500  # steps
    alpha: float = 0.1  # weight of the distillation through proxies; 0.01 for CIFAR-10
    beta: float = 0.5  # weight of the distillation through samples
    contrast: Contrast = "proxy"  # what an anchor is compared with; one: also with samples, for large batches
    onset: int = 1000  # steps before distillation starts, on streams that announce no tasks
    mask_unseen: bool = True  # never answer a class that has not come yet
    rule: Literal["vitter", "frozen"] = "frozen"  # the reservoir's rule

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, tau=1e-6, low=0, high=0, period=1, alpha=0, beta=0, onset=0)


class HPCR(Strategy):
    """Proxy-based contrastive replay in its holistic form."""

    Config, tasks = HPCRConfig, frozenset({"classify"})
    views = ("replay",)
    step: Tensor  # [] int64, over the whole stream

    def __init__(self, cfg: HPCRConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: CosineClassifier(env.encoder(), env.classes, 1 / cfg.tau))
        self.encode = self.net.part("encoder")
        width = self.net.weight("head.weight").shape[-1]
        stored = {"logits": Field((env.classes,), torch.float32), "feature": Field((width,), torch.float32)}
        self.memory = Reservoir(cfg.capacity, {**env.fields, **stored}, env.rng, cfg.rule)
        self.tricks, self.onset = Tricks(cfg, env, self.memory), Onset(env, cfg.onset)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=env.device))

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.memory.holds(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One gradient step as in PCR, with distillation from the second task on; then remember what the model answered."""
        drawn, size = self.env.augment.draw(new), new["y"].shape[1]  # drawn before the memory draws
        logs = {name: torch.zeros(self.env.runs, device=self.env.device) for name in ("loss", "distill")}
        for _ in range(self.cfg.replay_steps):
            old = self.memory.sample(self.cfg.replay)
            changed, view = self.env.augment.both(new, drawn, self.tricks.harder(old))
            fresh = self.features(new, changed)  # [R, 2B], a pass of its own: the new samples' BatchNorm statistics
            raw = fresh["f"][:, :size].detach()
            answered = {"feature": raw, "logits": self.scores(raw).detach()}  # before the step
            if len(self.memory):
                logs = self.learn(old, view, fresh)
        self.memory.add({**new, **answered})
        self.tricks.note(new)
        self.step += 1
        self.onset.tick()
        return {**logs, **self.tricks.tick()}

    def learn(self, old: Batch, view: Batch, fresh: Batch) -> Logs:
        """One gradient step on recalled and fresh samples.    Shapes: -> each [R]."""
        recalled = self.features(old, view)  # [R, 2M']
        if self.tricks.adaptive is not None:
            self.tricks.judge(view, self.scores(recalled["f"].detach().chunk(2, 1)[1]))
        both = join(recalled, fresh)
        stored = {name: old[name].repeat(1, 2, 1) for name in ("logits", "feature")}  # the target of both views
        distill = self.distill(recalled, stored, both["y"])
        loss = temperature_factor(self.step, self.cfg.low, self.cfg.high, self.cfg.period) * self.contrast(both)
        loss = loss + self.onset.weight * distill
        self.descend(loss, self.sgd)
        return {"loss": loss, "distill": distill.detach()}

    def features(self, raw: Batch, view: Batch) -> Batch:
        """Labels and encoder features f of raw images, then of their views.    Shapes: [R, N, ...] -> y [R, 2N], f [R, 2N, D]."""
        return {"y": raw["y"].repeat(1, 2), "f": self.encode(torch.cat([raw["x"], view["x"]], 1))}

    def scores(self, features: Tensor) -> Tensor:
        """Scaled cosines to the proxies.    Shapes: [R, N, D] -> [R, N, C]."""
        return scores(features, self.net.weight("head.weight"), tau=self.cfg.tau)

    def contrast(self, both: Batch) -> Tensor:
        """The contrast of every row with the proxies of the batch.    Shapes: -> [R]."""
        proxies = self.net.weight("head.weight")
        loss: Tensor = contrast(both["f"], both["y"], proxies, tau=self.cfg.tau, mode=self.cfg.contrast)
        return loss

    def distill(self, recalled: Batch, stored: Batch, columns: Tensor) -> Tensor:
        """Both distillations with their weights.    Shapes: columns [R, N] -> [R]."""
        by_proxy = distill_proxies(self.scores(recalled["f"]), stored["logits"], columns)
        by_sample = distill_samples(recalled["f"], stored["feature"], tau=self.cfg.tau)
        total: Tensor = self.cfg.alpha * by_proxy + self.cfg.beta * by_sample
        return total

    def boundary(self) -> None:
        """Start to distill; review the memory, if that is asked for."""
        self.onset.boundary()
        for old in self.tricks.review(self.memory):
            self.descend(REVIEW * self.contrast(self.features(old, self.env.augment(old))), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Scaled cosines to the proxies.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])


def temperature_factor(step: Number, low: float = 0.5625, high: float = 1.8, period: int = 500) -> float | Tensor:
    """What the contrast is multiplied by: from `low` at step 0 up to `high` half a period later, and back, on a cosine.

    Units: steps, from 0.    Source: the released code; the factor is tau over a temperature between 0.16 and 0.05.
    """
    turn = 2 * math.pi * (step % period) / period
    cosine = torch.cos(turn) if isinstance(turn, Tensor) else math.cos(turn)
    return low + (high - low) * (1 - cosine) / 2
