"""DER++: replay that also keeps the answers. Recalled samples must answer as they did when they came, others by their label.

Source: Buzzega et al. 2020, "Dark Experience for General Continual Learning: a Strong, Simple Baseline", eq. 6, and its code.
Symbols: x, y -> new, (x', z') -> first, (x'', y'') -> second, h -> net, alpha -> alpha, beta -> beta.
Departures: the paper tunes alpha, beta and lr per data set; the defaults are those found for one pass on the reduced ResNet-18
(lr 0.01 and not the 0.1 of the other methods, which was not tuned for this one; alpha 0.5, the middle of what was found best);
a review learns both memory terms from one view of each row (ours). As in the code, all three terms take a forward pass of their
own, and what is stored are the logits of the augmented training pass, before the step. `saa` changes the views of (x'', y'')
alone: z' was an answer to an ordinary view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Field, Logs

cross_entropy, squared_gap = per_run(F.cross_entropy), per_run(F.mse_loss)


@dataclass(frozen=True, kw_only=True)
class DERPPConfig(ReplayConfig):
    """Settings of DER++."""

    replay: int = 10  # samples recalled per draw, of which an update makes two
    lr: float = 0.01  # learning rate of SGD
    alpha: float = 0.5  # weight of the distance to the stored logits
    beta: float = 1.0  # weight of the recalled labels

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, alpha=0, beta=0)


class DERPP(Strategy):
    """Dark experience replay with labels."""

    Config, tasks = DERPPConfig, frozenset({"classify"})
    views = ("shift:4", "flip")

    def __init__(self, cfg: DERPPConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        fields = {**env.fields, "logits": Field((env.classes,), torch.float32)}
        self.memory = Reservoir(cfg.capacity, fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.memory.holds(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the new batch and two draws from the memory; then remember the new batch and its logits."""
        logs: Logs = {}
        for _ in range(self.cfg.replay_steps):
            logits = self.logits(new)
            loss = cross_entropy(logits, new["y"])
            logs = {"distill": torch.zeros_like(loss)}
            if len(self.memory):
                first, second = (self.memory.sample(self.cfg.replay) for _ in range(2))
                logs["distill"] = squared_gap(self.logits(first), first["logits"])
                labelled = self.labelled_loss(second)
                loss = loss + self.cfg.alpha * logs["distill"] + self.cfg.beta * labelled
            self.descend(loss, self.sgd)
            logs["loss"] = loss
        self.memory.add({**new, "logits": logits.detach()})
        self.tricks.note(new)
        return {name: value.detach() for name, value in logs.items()} | self.tricks.tick()

    def labelled_loss(self, old: Batch) -> Tensor:
        """Mean cross-entropy of recalled labels.    Shapes: -> [R]."""
        view = self.env.augment(self.tricks.harder(old))
        logits = self.net(view["x"])
        self.tricks.judge(view, logits)
        return cross_entropy(logits, view["y"])

    def logits(self, batch: Batch) -> Tensor:
        """Class scores of one augmented view.    Shapes: -> [R, B, C]."""
        scores: Tensor = self.net(self.env.augment(batch)["x"])
        return scores

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.tricks.review(self.memory):
            logits = self.logits(old)
            distill, labelled = squared_gap(logits, old["logits"]), cross_entropy(logits, old["y"])
            self.descend(REVIEW * (self.cfg.alpha * distill + self.cfg.beta * labelled), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
