"""A-GEM: learn the new batch, but never along a direction in which the loss on remembered samples would rise.

Source: Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", eq. 11, in its online class-incremental form.
Symbols: (x, y) -> new, B_ref -> old, g -> fresh, g_ref -> reference, M -> memory.
Departures: memory and draws are those of the online class-incremental code line (a reservoir over the whole stream, so that B_ref
may hold samples of the current task; the paper keeps a fixed share per finished task). B_ref is drawn and passed in the first
task too, without effect on weights or BatchNorm statistics, so that every step is the same (ours); where no task boundary is
announced, it counts after `onset` steps (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.gradients import gradient, put
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, Onset, ReplayConfig, Tricks
from cl_sim.runs import per_run, statistics_move_if
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


def project(gradient: Tensor, reference: Tensor) -> Tensor:
    """The gradient without its part against the reference, or as it is if it has none (or the reference is zero).

    Shapes: [P], [P] -> [P].    Source: Chaudhry et al. 2019, "Efficient Lifelong Learning with A-GEM", eq. 11.
    """
    along, square = gradient @ reference, reference @ reference
    share = along / square.clamp(min=torch.finfo(square.dtype).tiny)
    return torch.where(along < 0, gradient - share * reference, gradient)


projected = per_run(project)


@dataclass(frozen=True, kw_only=True)
class AGEMConfig(ReplayConfig):
    """Settings of A-GEM; `replay` is the size of the reference batch."""

    onset: int = 1000  # steps before the memory counts, on streams that announce no tasks

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, onset=0)


class AGEM(Strategy):
    """Gradients projected onto what does not hurt the memory."""

    Config, tasks = AGEMConfig, frozenset({"classify"})

    def __init__(self, cfg: AGEMConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks, self.onset = Tricks(cfg, env), Onset(env, cfg.onset)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.memory.holds(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One step along the projected gradient of the new batch; then remember the new batch."""
        for _ in range(self.cfg.replay_steps):
            loss = self.loss(new)
            fresh = gradient(loss, self.net)  # g [R, P]
            if len(self.memory):
                fresh = self.agreed(fresh)
            put(fresh, self.net)
            self.sgd.step()
        self.memory.add(new)
        self.tricks.note(new)
        self.onset.tick()
        return {"loss": loss.detach()}

    def agreed(self, fresh: Tensor) -> Tensor:
        """From the second task on: the gradient that does not raise the loss on recalled samples.    Shapes: [R, P] -> same."""
        old = self.memory.sample(self.cfg.replay)  # B_ref ~ M
        with statistics_move_if(self.onset.weight > 0, self.net):
            reference = gradient(self.loss(old), self.net)  # g_ref [R, P]
        return torch.where(self.onset.weight > 0, projected(fresh, reference), fresh)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of one forward pass.    Shapes: -> [R]."""
        view = self.env.augment(batch)
        return cross_entropy(self.net(view["x"]), view["y"])

    def boundary(self) -> None:
        """Let the memory count; review it, if that is asked for."""
        self.onset.boundary()
        for old in self.tricks.review(self.memory):
            self.descend(REVIEW * self.loss(old), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
