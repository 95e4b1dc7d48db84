"""What a strategy is, and what it is given to work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_sim.augment import Views
from cl_sim.errors import BadConfig
from cl_sim.rng import Rng, derive
from cl_sim.runs import Lift
from cl_sim.stream import Pool
from cl_sim.types import Batch, Fields, Logs

if TYPE_CHECKING:
    from cl_sim.measure import Measure


@dataclass(kw_only=True)
class Env:
    """What the simulator hands a strategy: the stream's shape, nets, random numbers, augmentation.

    `encoder()` makes a fresh encoder written for one run; `augment(batch)` turns stored samples into training views.
    """

    task: str  # what predict must return: classify, embed, rank or associate
    fields: Fields  # columns of every batch
    classes: int
    samples: int  # of the whole stream, per run
    announces: bool  # will boundary() be called?
    seeds: tuple[int, ...]  # one per run
    rng: Rng
    device: torch.device
    augment: Views
    encoder: Callable[[], Any]
    rebuild: Callable[[Tensor], Batch] | None = None  # samples by their numbers, if the stream can make them again
    pool: Pool | None = None  # all there is, if the stream shows a fixed set of samples again and again
    lifted: int = field(default=0, init=False)

    @property
    def runs(self) -> int:
        """How many runs train side by side."""
        return len(self.seeds)

    def lift(self, make: Callable[[], nn.Module], name: str = "") -> Lift:
        """Make one net per run, each initialised from its own run's seed, and lift them.

        A run's initial weights depend on its seed and on how many nets the strategy made before, never on other runs. With a
        name they depend on the name instead: a net made while learning is then the same before and after a resume.
        """
        nets = []
        for seed in self.seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(seed, name or f"net {self.lifted}"))
                nets.append(make().to(self.device))
        self.lifted += not name
        return Lift(nets)

    def require_boundaries(self, strategy: str) -> None:
        """Refuse a stream that announces no tasks, for a strategy that is defined by them.    Raises: BadConfig."""
        if not self.announces:
            raise BadConfig(
                f"strategy '{strategy}' needs task boundaries, but this stream announces none; "
                "use --set stream.announces=true or another strategy (cl-sim list strategies)"
            )


class Strategy(nn.Module):
    """A method that learns from a stream. Its state_dict holds everything: nets, memories, optimisers, random numbers."""

    Config: ClassVar[type]
    tasks: ClassVar[frozenset[str]]
    iid: ClassVar[bool] = False  # True: wants the stream's samples in one shuffled order (an upper reference)
    takes_unlabelled: ClassVar[bool] = False  # can it learn from batches in which labels are hidden (y is -1)?
    views: ClassVar[tuple[str, ...]] = ()  # augmentations of images unless the user names others: part of the method
    role: ClassVar[str] = "strategy"  # or "lower bound", "upper bound": how tables and the MLflow tag call it

    def __init__(self, cfg: Any, env: Env) -> None:
        super().__init__()
        self.cfg, self.env, self.rng = cfg, env, env.rng

    @property
    def steady(self) -> bool:
        """False while shapes may still change, and always for code that reads the host: such a step is never captured."""
        return True

    def observe(self, new: Batch) -> Logs:
        """Learn from one batch, in place.    Shapes: [R, B, ...] -> each log [R]."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> Tensor:
        """Answer for the batch; callable at any step, changes nothing.    Shapes: [R, B, ...] -> [R, B, ...]."""
        raise NotImplementedError

    def boundary(self) -> None:
        """A task has ended. Called only if the stream announces it."""

    def measure(self) -> Measure:
        """How its predictions are measured: as usual for the task, unless they need settings of the strategy."""
        from cl_sim import (
            measure,
        )  # which knows the settings of trackers, as the registry knows strategies: not at import

        return measure.of(self.env.task)

    def descend(self, loss: Tensor, optimiser: Optimizer) -> None:
        """One gradient step. The sum over runs keeps their gradients apart.    Shapes: loss [R]."""
        optimiser.zero_grad()
        loss.sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    def optimisers(self) -> dict[str, Optimizer]:
        """The optimisers this strategy holds, by attribute name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Optimizer)}

    def get_extra_state(self) -> dict[str, Any]:
        """What state_dict saves beside parameters and buffers: the optimisers."""
        return {name: optimiser.state_dict() for name, optimiser in self.optimisers().items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what get_extra_state returned."""
        for name, optimiser in self.optimisers().items():
            optimiser.load_state_dict(state[name])
