"""What a method that works on features needs of a stream's task: net, memory, loss, views of a sample, features, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from cl_sim.config import at_least
from cl_sim.errors import BadConfig
from cl_sim.memory.reservoir import Reservoir
from cl_sim.replay import ReplayConfig
from cl_sim.rng import Rng
from cl_sim.runs import Lift
from cl_sim.strategy import Env
from cl_sim.types import Batch

Net = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class TaskConfig(ReplayConfig):
    """Settings of every strategy that learns either task, with a memory or without."""

    capacity: int = 1000  # samples kept per run; 0: no memory
    replay: int = 10  # samples recalled per update; 0: none
    lr: float = 0.0  # learning rate; 0: 0.1 by SGD for classes, 0.001 by Adam for items
    joint_pass: bool = False  # one forward pass over new and old together
    padding: bool = False  # items: score item 0 too, whose row then learns, as in published code

    def __post_init__(self) -> None:
        at_least(self, capacity=0, replay=0, lr=0, replay_steps=1)
        if self.replay and not self.capacity:
            raise BadConfig(
                f"capacity is 0, so there is nothing to recall {self.replay} samples from; set replay=0 too"
            )
        if self.capacity and not self.reads_memory:
            raise BadConfig(f"nothing reads the memory of {self.capacity} samples; set strategy.capacity=0 too")
        if self.saa != "off":
            raise BadConfig(f"saa is '{self.saa}', but this strategy makes no views of images; leave strategy.saa out")

    @property
    def reads_memory(self) -> bool:
        """Is there a use for a memory?"""
        return self.replay > 0 or self.readout == "class_mean" or self.review != "never"


class Task(nn.Module):
    """A task's net and memory, and what both tasks do alike."""

    def __init__(self, cfg: TaskConfig, env: Env, net: Lift, memory: Reservoir | None) -> None:
        super().__init__()
        self.cfg, self.env, self.net, self.memory = cfg, env, net, memory
        self.lr = cfg.lr
        self.dim: int = net.net.encoder.dim  # type: ignore[union-attr, assignment]

    def optimiser(self) -> Optimizer:
        """What moves the net."""
        raise NotImplementedError

    def recall(self) -> Batch:
        """Samples for an update; nothing without a memory."""
        return self.memory.sample(self.cfg.replay) if self.memory is not None and self.cfg.replay else {}

    def draw(self, n: int, rng: Rng) -> Batch:
        """Samples for another purpose, by random numbers of its own, so that `recall` is not disturbed."""
        assert self.memory is not None
        return self.memory.take(rng.choose(n, self.memory.valid()))

    @property
    def recalls_evenly(self) -> bool:
        """Will every update from now on recall the same number of samples?"""
        return self.memory is None or self.memory.holds(self.cfg.replay)

    def holds(self, n: int) -> bool:
        """Does the memory hold so many samples, or as many as it ever will?"""
        return self.memory is not None and self.memory.holds(n)

    def loss(self, batch: Batch) -> Tensor:
        """The task's mean loss on training views.    Shapes: -> [R]."""
        raise NotImplementedError

    def plain_loss(self, batch: Batch, rng: Rng, net: Net) -> Tensor:
        """The loss on the samples as they are, as another net answers, with dropout from `rng`.    Shapes: -> [R]."""
        raise NotImplementedError

    def features(self, batch: Batch, rng: Rng) -> Tensor:
        """What the encoder answers, in training mode with dropout from `rng`; its BatchNorm statistics stay.

        Shapes: -> [R, B, D].
        """
        raise NotImplementedError

    def views(self, batch: Batch, rng: Rng) -> tuple[Batch, Batch]:
        """Two views of each sample."""
        raise NotImplementedError

    def labels(self, batch: Batch) -> Tensor:
        """The right answers.    Shapes: -> [R, B]."""
        raise NotImplementedError

    def counted(self, batch: Batch) -> Tensor:
        """Which samples count.    Shapes: -> [R, B] bool."""
        raise NotImplementedError

    def remember(self, new: Batch) -> None:
        """Offer a batch to the memory, and take note of which answers have come."""
        raise NotImplementedError

    def review(self) -> Iterator[Batch]:
        """At a boundary: the whole memory in random order, if a review is due."""
        raise NotImplementedError

    def answer(self, batch: Batch) -> Tensor:
        """Scores of every possible answer.    Shapes: -> [R, B, C]."""
        raise NotImplementedError
