"""Online EWC (EWC++): weights that mattered for earlier tasks are held near where the last task left them; nothing is stored.

Source: Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning: Understanding Forgetting and Intransigence" (EWC++),
after Kirkpatrick et al. 2017, "Overcoming Catastrophic Forgetting in Neural Networks".
Symbols: B_n -> new, theta -> flat(net), theta* -> anchor, F -> fisher, F min-max normalised -> importance, alpha -> alpha,
lambda -> strength.
Departures: as in the released code, F is estimated from squared gradients of whole batches (the Fisher information has one
gradient per sample), summed over `every` steps, and alpha = 0.9 is the weight of the newest estimate, although its option is
called a decay. Only the cross-entropy enters F, as in the original; the online code line (Mai et al. 2022) adds the penalty's
gradient. Steps are counted over the whole stream, which gives the code's schedule when a task is a multiple of `every`.
A plain gradient step on the penalty throws weights ever further out once lr * lambda is 1 or more, so the learning rate of the
other strategies cannot go with lambda = 100. By default the penalty is therefore taken implicitly (ours): theta' minimises
lr <gradient, theta'> + |theta' - theta|^2 / 2 + lr lambda sum_i F_i (theta'_i - theta*_i)^2, which is stable for any pair and the
same to first order. `implicit=false` is the plain step of the codes, and refuses an unstable pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least, within
from cl_sim.encoders.classifier import Classifier
from cl_sim.errors import BadConfig
from cl_sim.gradients import flat, gradient, put, trained
from cl_sim.optim import SGD, trainable
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)
TINY = 1e-32  # added to the range of the Fisher information, which is 0 before its first estimate


@dataclass(frozen=True, kw_only=True)
class EWCConfig:
    """Settings of online EWC."""

    lr: float = 0.1  # learning rate of SGD
    strength: float = 100.0  # of the penalty
    alpha: float = 0.9  # weight of the newest Fisher estimate in the running one
    every: int = 50  # steps per estimate
    implicit: bool = True  # take the penalty where the step leads, not where it starts

    def __post_init__(self) -> None:
        at_least(self, lr=0, strength=0, every=1)
        within(self, 0, 1, "alpha")
        if not self.implicit and self.lr * self.strength >= 1:
            raise BadConfig(
                f"lr * strength is {self.lr * self.strength:g}; from 1 on a plain step is unstable; use a strategy.lr below "
                f"{1 / self.strength:g}, a strategy.strength below {1 / self.lr:g}, or strategy.implicit=true"
            )


class EWC(Strategy):
    """Cross-entropy on the new batch, and a spring on each weight as strong as the weight is important.

    Raises: BadConfig on a stream that announces no tasks.
    """

    Config, tasks = EWCConfig, frozenset({"classify"})
    recent: Tensor  # [R, P] squared gradients since the last estimate, summed
    fisher: Tensor  # [R, P] running estimate
    importance: Tensor  # [R, P] in [0, 1]; 0 during the first task
    anchor: Tensor  # [R, P]
    step: Tensor  # [] int64

    def __init__(self, cfg: EWCConfig, env: Env) -> None:
        super().__init__(cfg, env)
        env.require_boundaries("ewc")
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)
        for name in ("recent", "fisher", "importance", "anchor"):
            self.register_buffer(name, torch.zeros_like(self.weights()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=env.device))

    def weights(self) -> Tensor:
        """All that is trained, as a vector per run.    Shapes: -> [R, P]."""
        return flat([parameter.detach() for parameter in trained(self.net).values()], self.env.runs)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the cross-entropy and the penalty, lambda sum_i F_i (theta_i - theta*_i)^2."""
        view = self.env.augment(new)
        loss = cross_entropy(self.net(view["x"]), view["y"])  # [R]
        slope = gradient(loss, self.net)  # [R, P]
        away = self.weights() - self.anchor
        pull = 2 * self.cfg.strength * self.importance
        shorter = 1 + self.cfg.lr * pull if self.cfg.implicit else 1.0
        put((slope + pull * away) / shorter, self.net)
        self.sgd.step()
        self.estimate(slope)
        penalty = self.cfg.strength * (self.importance * away.square()).sum(1)
        return {"loss": loss.detach() + penalty, "penalty": penalty}

    def estimate(self, slope: Tensor) -> None:
        """Add a squared gradient; after every so many, move the running Fisher information towards their mean.

        Which step it is, the device decides, so that all steps are alike.    Shapes: [R, P].
        """
        self.step += 1
        self.recent += slope.square()
        due = self.step % self.cfg.every == 0
        newest = self.cfg.alpha * self.recent / self.cfg.every + (1 - self.cfg.alpha) * self.fisher
        self.fisher.copy_(torch.where(due, newest, self.fisher))
        self.recent.masked_fill_(due, 0)

    def boundary(self) -> None:
        """Hold the weights where they are now, each as strongly as it is important now."""
        self.importance.copy_(normalise(self.fisher))
        self.anchor.copy_(self.weights())  # theta* <- theta

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        logits: Tensor = self.net(batch["x"])
        return logits


def normalise(fisher: Tensor) -> Tensor:
    """Each run's values moved and scaled to lie between 0 and 1; zeros if all are equal.    Shapes: [R, P] -> same."""
    low, high = fisher.amin(1, keepdim=True), fisher.amax(1, keepdim=True)
    return (fisher - low) / (high - low + TINY)
