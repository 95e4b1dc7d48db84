"""Fine-tuning: learn from the newest batch alone, remember nothing. The lower reference of every comparison.

Source: the plain baseline of the online class-incremental literature (stochastic gradient descent, one step per batch).
Symbols: B_n -> new, theta -> net.    Departures: none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.optim import SGD, trainable
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of fine-tuning."""

    lr: float = 0.1  # learning rate of SGD

    def __post_init__(self) -> None:
        at_least(self, lr=0)


class Finetune(Strategy):
    """Stochastic gradient descent on each new batch."""

    Config, tasks = FinetuneConfig, frozenset({"classify"})
    role = "lower bound"

    def __init__(self, cfg: FinetuneConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the new batch."""
        view = self.env.augment(new)
        loss = cross_entropy(self.net(view["x"]), view["y"])  # [R]
        self.descend(loss, self.sgd)  # theta <- SGD(B_n)
        return {"loss": loss}

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        logits: Tensor = self.net(batch["x"])
        return logits
