"""MIR: replay the samples that the coming step would hurt most.

Source: Aljundi et al. 2019, "Online Continual Learning with Maximally Interfered Retrieval", algorithm 1 (ER-MIR).
Symbols: B_n -> new, B_C -> candidates, B_MC -> old, theta -> net, theta^v -> look_ahead, s_MI -> harm, M -> memory.
Departures: as the online class-incremental code line does, new and old take a pass each and their gradients are added, and the
candidates pass the net in training mode, so that they move its BatchNorm statistics (those of the virtual net are dropped); the
paper's other score, against the best loss so far, is left out with it. Candidates are judged as they are stored; where training
views are asked for, only the recalled ones are changed (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.gradients import ahead, gradient, put
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks
from cl_sim.runs import per_run, pick
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class MIRConfig(ReplayConfig):
    """Settings of maximally interfered retrieval."""

    candidates: int = 50  # samples drawn, of which the `replay` most hurt are recalled

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, candidates=self.replay)


class MIR(Strategy):
    """Replay from a reservoir of what interferes most."""

    Config, tasks = MIRConfig, frozenset({"classify"})

    def __init__(self, cfg: MIRConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step draws the same number of candidates."""
        return self.memory.holds(self.cfg.candidates)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the new batch and the recalled samples that it would hurt most; then remember the new batch."""
        for _ in range(self.cfg.replay_steps):
            loss = self.loss(new)
            whole = gradient(loss, self.net)  # [R, P]
            if len(self.memory):
                recalled = self.recalled_loss(self.retrieve(whole))
                whole = whole + gradient(recalled, self.net)
                loss = loss + recalled
            put(whole, self.net)
            self.sgd.step()  # theta <- SGD(B_n u B_MC)
        self.memory.add(new)  # M <- update(M, B_n)
        self.tricks.note(new)
        return {"loss": loss.detach(), **self.tricks.tick()}

    @torch.no_grad()
    def retrieve(self, coming: Tensor) -> Batch:
        """The candidates whose loss a step along this gradient raises most.    Shapes: [R, P] -> each field [R, n, ...]."""
        look_ahead = ahead(self.net, coming, self.cfg.lr)  # theta^v = theta - lr * gradient of the loss on B_n
        candidates = self.memory.sample(self.cfg.candidates)  # B_C ~ M
        x, y = candidates["x"], candidates["y"]
        before = cross_entropy(self.net(x), y, reduction="none")  # [R, N]
        harm = cross_entropy(look_ahead(x), y, reduction="none") - before
        return pick(candidates, harm.topk(min(self.cfg.replay, harm.shape[1]), dim=1).indices)

    def recalled_loss(self, old: Batch) -> Tensor:
        """Mean cross-entropy of recalled samples.    Shapes: -> [R]."""
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
