"""DVC: dual view consistency. Two views of an image, and both together, must agree; replayed is what the step would disturb.

Source: Gu et al. 2022, "Not Just Selection, but Exploration: Online Class-Incremental Continual Learning via Dual View
Consistency", and its code.
Symbols: z, z' -> the halves of logits, z'' -> joint, F -> encoder, theta -> net, theta^v -> ahead, MGI -> impact,
lambda -> agreement.
Departures: none from the code but in the reservoir, which is the textbook's (`rule=frozen`: the code's). As there, candidates
pass the net in training mode, both views at once, so that they move its BatchNorm statistics (those of the virtual net are
dropped), and the views they were judged by are the ones learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.gradients import ahead, gradient, put
from cl_sim.losses import dual_view
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks
from cl_sim.runs import join, per_run, pick
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

consistency = per_run(dual_view)


@dataclass(frozen=True, kw_only=True)
class DVCConfig(ReplayConfig):
    """Settings of DVC."""

    candidates: int = 50  # samples drawn, of which the `replay` with most impact are recalled
    agreement: float = 4.0  # weight of the views' agreement; 2 for CIFAR-10
    width: int = 128  # units of the net that answers from both views' scores

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, candidates=self.replay, agreement=0, width=1)


class DualClassifier(Classifier):
    """A classifier with a second net that answers from the scores of two views.    Shapes: joint [B, 2C] -> [B, C]."""

    def __init__(self, encoder: Any, classes: int, width: int) -> None:
        super().__init__(encoder, classes)
        self.joint = nn.Sequential(nn.Linear(2 * classes, width), nn.ReLU(), nn.Linear(width, classes))


class DVC(Strategy):
    """Replay with two consistent views."""

    Config, tasks = DVCConfig, frozenset({"classify"})
    views = ("resized_crop", "flip", "jitter:1", "grey")  # the replay papers' view, but every image changes its colours

    def __init__(self, cfg: DVCConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: DualClassifier(env.encoder(), env.classes, cfg.width))
        self.joint = self.net.part("joint")
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step draws the same number of candidates."""
        return self.memory.holds(self.cfg.candidates)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on both views of the new batch and of the samples it would disturb most; then remember it."""
        fresh = self.env.augment(new)
        for _ in range(self.cfg.replay_steps):
            loss = self.loss(new, fresh)
            whole = gradient(loss, self.net)  # [R, P]
            if len(self.memory):
                recalled = self.loss(*self.retrieve(whole))
                whole = whole + gradient(recalled, self.net)
                loss = loss + recalled
            put(whole, self.net)
            self.sgd.step()
        self.memory.add(new)  # M <- update(M, B_n)
        self.tricks.note(new)
        return {"loss": loss.detach(), **self.tricks.tick()}

    def loss(self, raw: Batch, changed: Batch) -> Tensor:
        """Cross-entropy, spread and agreement of two views, which take one forward pass.    Shapes: x [R, B, ...] -> [R]."""
        z, other = self.net(join(raw, changed)["x"]).chunk(2, 1)  # [R, B, C] each
        joint = self.joint(torch.cat([z, other], -1))
        self.tricks.judge(changed, other)
        return consistency(z, other, joint, raw["y"], weight=self.cfg.agreement)

    @torch.no_grad()
    def retrieve(self, coming: Tensor) -> tuple[Batch, Batch]:
        """Both views of the candidates whose impact a step along this gradient raises most.    Shapes: [R, P] -> [R, n, ...]."""
        encode, head = (ahead(self.net, coming, self.cfg.lr, part) for part in ("encoder", "head"))  # theta^v
        raw = self.memory.sample(self.cfg.candidates)
        changed = self.env.augment(self.tricks.harder(raw))
        both = join(raw, changed)
        risen = impact(encode, head, both) - impact(self.net.part("encoder"), self.net.part("head"), both)  # [R, N]
        best = risen.topk(min(self.cfg.replay, risen.shape[1]), dim=1).indices
        return pick(raw, best), pick(changed, best)

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.tricks.review(self.memory):
            self.descend(REVIEW * self.loss(old, self.env.augment(old)), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores of the image itself.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])


def impact(encode: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], both: Batch) -> Tensor:
    """How large a gradient each raw image gives the head: the 1-norm of softmax(z) less the label, times that of F.

    Shapes: both [R, 2N, ...], the raw images first -> [R, N].
    """
    features, y = encode(both["x"]).chunk(2, 1)[0], both["y"].chunk(2, 1)[0]
    shares = head(features).softmax(-1)  # [R, N, C]
    error = shares - (y[..., None] == torch.arange(shares.shape[-1], device=y.device)).to(shares.dtype)
    return error.abs().sum(-1) * features.abs().sum(-1)
