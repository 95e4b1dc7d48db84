"""SCR: supervised contrastive replay. No classifier is trained; samples of one class attract each other, others repel.

Source: Mai et al. 2021, "Supervised Contrastive Replay: Revisiting the Nearest Class Mean Classifier in Online
Class-Incremental Continual Learning", and its code.
Symbols: B_n -> new, B_M -> old, M -> memory, B_I -> both and its augmented view, tau -> tau.
Departures: paper and code differ in the temperature, 0.1 in the paper's settings and 0.07 in the code's own, which is the
default here; the review that the paper's settings add is off by default (`review=each`); a class without a sample in the
memory is never answered, where the code answers a random direction; the reservoir is the textbook's (`rule=frozen`: the code's);
with `saa`, a sample's loss is its own contrast, and its answer the nearest class mean of the step's other raw images (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_sim.config import at_least
from cl_sim.encoders.classifier import unit
from cl_sim.encoders.projector import Projector
from cl_sim.errors import BadConfig
from cl_sim.losses import supcon, supcon_each
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks
from cl_sim.runs import join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

contrast, contrast_each = per_run(supcon), per_run(supcon_each)


@dataclass(frozen=True, kw_only=True)
class SCRConfig(ReplayConfig):
    """Settings of SCR."""

    replay: int = 100  # samples recalled per update
    tau: float = 0.07  # temperature of the cosines; 0.1 in the paper's settings
    width: int = 128  # of the projection
    readout: Literal["head", "class_mean"] = "class_mean"  # SCR's head gives no scores: only class_mean is possible

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, tau=1e-6, width=1)
        if self.readout == "head":
            raise BadConfig("strategy.readout is 'head', but SCR trains no classifier; only class_mean is possible")
        if self.mask_unseen:
            raise BadConfig("strategy.mask_unseen has no effect: the nearest class mean never answers an unseen class")


class SCR(Strategy):
    """Replay with a supervised contrast between samples."""

    Config, tasks = SCRConfig, frozenset({"classify"})
    views = ("replay",)

    def __init__(self, cfg: SCRConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: projector(env, cfg.width))
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.memory.holds(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on both views of new and recalled samples, none while the memory is empty; then remember."""
        loss = torch.zeros(self.env.runs, device=self.env.device)
        for _ in range(self.cfg.replay_steps):
            old = self.memory.sample(self.cfg.replay)  # B_M ~ M
            if len(self.memory):
                harder = self.tricks.harder(old)
                z, y = self.two_views(join(old, new), join(harder, new))
                loss = contrast(z, y, tau=self.cfg.tau)
                if self.tricks.adaptive is not None:
                    recalled = old["y"].shape[1]
                    each = contrast_each(z.detach(), y, tau=self.cfg.tau).chunk(2, 1)[1]  # of the augmented images
                    right, asked = per_run(nearest_mean)(z.detach(), y, classes=self.env.classes)
                    self.tricks.judge_by(harder, *(part[:, :recalled] for part in (each, right, asked)))
                self.descend(loss, self.sgd)
        self.memory.add(new)  # M <- update(M, B_n)
        self.tricks.note(new)
        return {"loss": loss, **self.tricks.tick()}

    def two_views(self, raw: Batch, harder: Batch) -> tuple[Tensor, Tensor]:
        """Projections of raw samples, then of augmented ones (a forward pass each), and labels.

        Shapes: [R, N, ...] -> [R, 2N, width], [R, 2N].
        """
        z = torch.cat([self.net(raw["x"]), self.net(self.env.augment(harder)["x"])], 1)
        return z, raw["y"].repeat(1, 2)

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.tricks.review(self.memory):
            z, y = self.two_views(old, old)
            self.descend(REVIEW * contrast(z, y, tau=self.cfg.tau), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Cosines to the class means of the encoder's features.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])


def nearest_mean(z: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Which augmented images lie nearest to the mean of their class, by the cosine to the raw images but their own.

    Only those can be asked whose class has another raw image.

    Shapes: z [2N, D], raw images and then their augmented views, y [2N] -> right, asked [N] bool.
    """
    (raw, view), y = z.chunk(2), y[: len(z) // 2]
    member = y[:, None] == torch.arange(classes, device=y.device)  # [N, C]
    whole, others = member.to(z.dtype).T @ raw, member.sum(0) - member.long()  # [C, D], [N, C]
    own = (unit(whole[y] - raw) * view).sum(1, keepdim=True)
    cosine = torch.where(member, own, view @ unit(whole).T).masked_fill(others == 0, -torch.inf)
    return cosine.argmax(1) == y, others.gather(1, y[:, None])[:, 0] > 0


def projector(env: Env, width: int) -> Projector:
    """A fresh encoder with a head of two layers, the first as wide as the features."""
    encoder = env.encoder()
    return Projector(encoder, width, (encoder.dim,))
