"""GSS-greedy: replay from a memory of samples whose gradients point in many directions.

Source: Aljundi et al. 2019, "Gradient Based Sample Selection for Online Continual Learning", algorithm 2.
Symbols: B_n -> new, B_M -> old, M -> memory, G -> directions, c -> score, C -> memory's row "score".
Departures: as in the online class-incremental code line, new samples come in only if the gradient of their whole batch opposes
all directions (the paper asks each sample's own), directions are gradients of means over small memory batches, and rows are met
in proportion to how far their score is above the lowest (the paper: to the score). That code fails where fewer rows stand out
than samples come; here the others are then met evenly. The gradients of the new samples are made at every step, needed or not, so
that every step is the same, and of the samples as they are stored, without training views (both ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.gradients import cosines, gradient
from cl_sim.memory.diverse import Diverse
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks, refuse_rule
from cl_sim.runs import evaluating, per_run, pick
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy, all_cosines = per_run(F.cross_entropy), per_run(cosines)
FIRST = 0.1  # score of the first batch, which has nothing to be compared with


@dataclass(frozen=True, kw_only=True)
class GSSConfig(ReplayConfig):
    """Settings of gradient-based sample selection."""

    directions: int = 10  # memory gradients that a new one is compared with, at most
    direction_size: int = 10  # samples behind each of them

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, directions=1, direction_size=1)
        refuse_rule(self, "gss")


class GSS(Strategy):
    """Replay from a memory of diverse gradients."""

    Config, tasks = GSSConfig, frozenset({"classify"})

    def __init__(self, cfg: GSSConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.memory = Diverse(cfg.capacity, env.fields, env.rng)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once the memory is full: only then is the rule for leaving in force."""
        return self.memory.holds(self.cfg.capacity)

    def observe(self, new: Batch) -> Logs:
        """One gradient step as in replay; then judge the new samples by their gradients and remember what is unlike the rest."""
        for _ in range(self.cfg.replay_steps):
            old = self.memory.sample(self.cfg.replay)  # B_M ~ M
            loss = self.loss(self.env.augment(new))
            if len(self.memory):
                view = self.env.augment(self.tricks.harder(old))
                logits = self.net(view["x"])
                loss = loss + cross_entropy(logits, view["y"])
                self.tricks.judge(view, logits)
            self.descend(loss, self.sgd)  # theta <- SGD(B_n u B_M)
        with evaluating(self.net):
            self.memory.add({**new, **self.judge(new)})
        self.tricks.note(new)
        return {"loss": loss, **self.tricks.tick()}

    def judge(self, new: Batch) -> Batch:
        """How much each new sample resembles the memory, and does the batch oppose it?    Shapes: -> score, conflicts [R, B]."""
        runs, size = new["y"].shape
        if not len(self.memory):
            score = torch.full((runs, size), FIRST, device=self.env.device)
            return {"score": score, "conflicts": torch.zeros_like(score, dtype=torch.bool)}
        directions = self.directions()  # G [R, G, P]
        items = [pick(new, torch.full((runs, 1), item, device=self.env.device)) for item in range(size)]
        score = torch.stack([self.likeness(item, directions) for item in items], 1)
        return {"score": score, "conflicts": (self.likeness(new, directions) < 0)[:, None].expand(-1, size)}

    def directions(self) -> Tensor:
        """Gradients on random memory batches that share no sample.    Shapes: -> [R, G, P]."""
        size = min(self.cfg.direction_size, len(self.memory))
        count = min(self.cfg.directions, len(self.memory) // size)
        drawn = self.memory.sample(count * size)
        batches = ({name: drawn[name][:, i * size : (i + 1) * size] for name in ("x", "y")} for i in range(count))
        return torch.stack([gradient(self.loss(batch), self.net) for batch in batches], 1)

    def likeness(self, batch: Batch, directions: Tensor) -> Tensor:
        """The largest cosine between the gradient on a batch and the directions.    Shapes: -> [R]."""
        return all_cosines(gradient(self.loss(batch), self.net), directions).amax(1)

    def loss(self, view: Batch) -> Tensor:
        """Mean cross-entropy of one forward pass.    Shapes: -> [R]."""
        return cross_entropy(self.net(view["x"]), view["y"])

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.tricks.review(self.memory):
            self.descend(REVIEW * self.loss(self.env.augment(old)), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
