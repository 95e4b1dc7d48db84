"""LwF: learning without forgetting. The net of the previous task is the teacher of the next one; nothing is stored.

Source: Li and Hoiem 2016, "Learning without Forgetting"; the weighting by tasks is that of the online class-incremental code
line (Mai et al. 2022, "Online Continual Learning in Image Classification: An Empirical Survey").
Symbols: B_n -> new, theta -> net, theta* -> teacher, t -> task (1 during the first task), T -> tau.
Departures: as in the code line, teacher and net are compared over all classes of one head, not head by head, from the first
sample of a task on (no warm-up of a new head). The teacher answers in evaluation mode (the code line leaves it in training
mode, with the BatchNorm statistics of the new batch). It is asked from the first step on, its loss weighing 0 in the first
task, so that every step has the same shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.losses import distill
from cl_sim.optim import SGD, Previous, trainable
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy, knowledge = per_run(F.cross_entropy), per_run(distill)


@dataclass(frozen=True, kw_only=True)
class LwFConfig:
    """Settings of learning without forgetting."""

    lr: float = 0.1  # learning rate of SGD
    tau: float = 2.0  # temperature of both softmaxes in the distillation

    def __post_init__(self) -> None:
        at_least(self, lr=0, tau=1e-6)


class LwF(Strategy):
    """Cross-entropy on the new batch, distilled answers of the net as the previous task left it.

    Raises: BadConfig on a stream that announces no tasks.
    """

    Config, tasks = LwFConfig, frozenset({"classify"})
    task: Tensor  # [] int64, from 1

    def __init__(self, cfg: LwFConfig, env: Env) -> None:
        super().__init__(cfg, env)
        env.require_boundaries("lwf")
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.teacher = Previous(self.net)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)
        self.register_buffer("task", torch.ones((), dtype=torch.int64, device=env.device))

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the labels and on what the teacher says."""
        view = self.env.augment(new)
        logits = self.net(view["x"])
        fresh = cross_entropy(logits, view["y"])  # [R]
        old = knowledge(logits, self.teacher(view["x"]), tau=self.cfg.tau)  # [R]
        loss = fresh / self.task + (1 - 1 / self.task) * old
        self.descend(loss, self.sgd)
        return {"loss": loss, "distill": old.detach()}

    def boundary(self) -> None:
        """The net becomes the teacher."""
        self.teacher.update(self.net)  # theta* <- theta
        self.task += 1

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        logits: Tensor = self.net(batch["x"])
        return logits
