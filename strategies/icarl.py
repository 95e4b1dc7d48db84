"""iCaRL: one sigmoid per class, taught by labels for new classes and by the previous net for old ones; nearest class mean.

Source: Rebuffi et al. 2017, "iCaRL: Incremental Classifier and Representation Learning", in the online form of Mai et al. 2022,
"Online Continual Learning in Image Classification: An Empirical Survey", and its code.
Symbols: X -> new, P -> old, Theta -> net, g_y -> sigmoid of the scores, q -> taught, s - 1 -> learned, mu_y -> ClassMeans.
Departures: as in the online code, the exemplars are a reservoir, not herded, and only those of earlier tasks are recalled,
joined with the new batch in one pass. A class counts from its first sample on (the code knows a task's classes at its
start). While fewer rows of earlier tasks are stored than are recalled, rows of this task fill up the pass and weigh
nothing in the loss, so that every step has the same shapes. The previous net answers in evaluation mode (the code leaves it
in training mode). A review, if asked for, learns from the same targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.encoders.classifier import Classifier
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, Previous, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks
from cl_sim.runs import join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs


@dataclass(frozen=True, kw_only=True)
class ICaRLConfig(ReplayConfig):
    """Settings of iCaRL."""

    readout: Literal["head", "class_mean"] = "class_mean"  # the nearest class mean of the memory, or the sigmoids


class ICaRL(Strategy):
    """Binary cross-entropies over the classes so far, old ones against the previous net's answers.

    Raises: BadConfig on a stream that announces no tasks.
    """

    Config, tasks = ICaRLConfig, frozenset({"classify"})
    learned: Tensor  # [R, C] bool, the classes of earlier tasks

    def __init__(self, cfg: ICaRLConfig, env: Env) -> None:
        super().__init__(cfg, env)
        env.require_boundaries("icarl")
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.previous = Previous(self.net)
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)
        self.register_buffer("learned", torch.zeros_like(self.tricks.seen))

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.memory.holds(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the new batch and recalled samples of earlier tasks; then remember the new batch."""
        self.tricks.note(new)
        counts = {"valid": torch.ones_like(new["y"], dtype=torch.bool)}
        for _ in range(self.cfg.replay_steps):
            old = self.memory.sample(self.cfg.replay, only=self.learned)
            loss = self.loss(join({**new, **counts}, old))
            self.descend(loss, self.sgd)
        self.memory.add(new)
        return {"loss": loss}

    def loss(self, both: Batch) -> Tensor:
        """Cross-entropy of every row that counts with labels and the previous net's answers.    Shapes: -> [R]."""
        view = self.env.augment(both)
        taught = self.previous(view["x"]).sigmoid()  # q, [R, B, C]
        label = (view["y"][..., None] == self.tricks.classes).to(taught.dtype)
        target = torch.where(self.learned[:, None], taught, label)
        loss: Tensor = sigmoids(self.net(view["x"]), target, self.tricks.seen, view["valid"])
        return loss

    def boundary(self) -> None:
        """Review the memory, if that is asked for; then the net becomes the previous one."""
        for old in self.tricks.review(self.memory):
            everything = torch.ones_like(old["y"], dtype=torch.bool)
            self.descend(REVIEW * self.loss({**old, "valid": everything}), self.sgd)
        self.previous.update(self.net)
        self.learned.copy_(self.tricks.seen)

    def predict(self, batch: Batch) -> Tensor:
        """Cosines to the class means, or the scores of the sigmoids.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])


@per_run
def sigmoids(scores: Tensor, target: Tensor, classes: Tensor, counts: Tensor) -> Tensor:
    """Binary cross-entropies summed over the given classes, averaged over the rows that count.

    Shapes: scores and target [N, C], classes [C] bool, counts [N] bool, one of them true -> [].
    """
    each = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
    per_row = (each * classes).sum(1)
    return (per_row * counts).sum() / counts.sum()
