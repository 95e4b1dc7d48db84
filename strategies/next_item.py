"""Next-item learning: a sequence encoder learns each new batch of events together with a few remembered ones.

Source: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation", for encoder and loss (cross-entropy over all items, as
MCLRec's code has it); replay as in Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", algorithm 1.
Symbols: B_n -> new, B_M -> old, M -> task.memory, theta -> task.net.
Departures: a stream is passed once; `replay=0` with `capacity=0` is plain fine-tuning, and on the offline protocol the
published training. Item 0 is no candidate, unless `padding` is set for parity with published code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cl_sim import tasks
from cl_sim.replay import replay_loss
from cl_sim.strategy import Env, Strategy
from cl_sim.tasks.base import TaskConfig
from cl_sim.types import Batch, Logs


@dataclass(frozen=True, kw_only=True)
class NextItemConfig(TaskConfig):
    """Settings of next-item learning."""

    capacity: int = 10_000  # events kept per run; 0: no memory
    replay: int = 256  # events recalled per update; 0: none


class NextItem(Strategy):
    """Cross-entropy of the next item, with replay from a reservoir."""

    Config, tasks = NextItemConfig, frozenset({"rank"})

    def __init__(self, cfg: NextItemConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.task = tasks.of(cfg, env)
        self.optimiser = self.task.optimiser()

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of events."""
        return self.task.recalls_evenly

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the new batch and what the memory recalls; then remember the new batch."""
        for _ in range(self.cfg.replay_steps):
            old = self.task.recall()  # B_M ~ M
            loss = replay_loss(new, old, self.task.loss, joint_pass=self.cfg.joint_pass)
            self.descend(loss, self.optimiser)  # theta <- Adam(B_n u B_M)
        self.task.remember(new)  # M <- update(M, B_n)
        return {"loss": loss.detach()}

    def predict(self, batch: Batch) -> Tensor:
        """Scores of all items.    Shapes: -> [R, B, I + 1]."""
        return self.task.answer(batch)
