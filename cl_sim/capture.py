"""A steady step as a graph: recorded once, from then on replayed without any Python.

On a GPU a step of a small network is a thousand launches of a few microseconds each, and the host cannot issue them as
fast as they run. A CUDA graph issues them all at once. What makes a step fit for it is what `steady` promises: the same
shapes, no host read, all state on the device and changed in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from cl_sim.memory.rows import Rows
from cl_sim.strategy import Strategy
from cl_sim.types import Batch, Logs

WARM_UP = 3  # steady steps before the recording, in which libraries set themselves up
UNSTEADY = 1000  # steps without a steady one, after which that is told
TOLERANCE = 1e-3  # of a replayed step against the same step run: kernels may be other ones, and sum in another order


class Graph(Protocol):
    """Records one call and repeats it on the same memory."""

    def first(self, step: Callable[[], Logs]) -> Logs:
        """Make the step and remember how; its logs are overwritten by every repetition."""
        ...

    def again(self) -> None:
        """Do what was recorded once more."""
        ...


class CudaGraph:
    """A step as one CUDA graph with memory of its own."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def first(self, step: Callable[[], Logs]) -> Logs:
        """Record, which computes nothing, then run."""
        with torch.cuda.graph(self.graph):
            logs = step()
        self.graph.replay()
        return logs

    def again(self) -> None:
        """One launch."""
        self.graph.replay()


class Captured:
    """A strategy as the engine sees it, its steady steps replayed.

    The first replay is held against the same step run as usual; if they differ, or recording fails, all steps run as usual,
    and `given_up` tells why. A boundary may change what a step is, so the next one records anew. `note` hears once of steps that
    are not replayed.
    """

    def __init__(
        self,
        strategy: Strategy,
        graph: Callable[[], Graph] = CudaGraph,
        warm_up: int = WARM_UP,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.strategy, self.make, self.warm_up, self.note = strategy, graph, warm_up, note
        self.graph: Graph | None = None
        self.replays = self.warm = 0
        self.held: Batch = {}
        self.logs: Logs = {}
        self.counted: list[tuple[Rows, int]] = []  # memories, and how many samples a step offers them
        self.given_up = ""
        self.steps = 0  # run as usual

    def observe(self, batch: Batch) -> Logs:
        """Learn from one batch as the strategy does. The logs hold until the next call."""
        if self.given_up or not self.strategy.steady:
            return self._run(batch)
        if self.graph is not None:
            return self._replay(batch)
        self.warm += 1
        return self._record(batch) if self.warm > self.warm_up else self._run(batch)

    def boundary(self) -> None:
        """A task has ended."""
        self.graph, self.warm = None, 0
        self.strategy.boundary()

    def _run(self, batch: Batch) -> Logs:
        self.steps += 1
        if self.steps == UNSTEADY and not self.replays and not self.given_up:
            self.note(f"none of the first {UNSTEADY} steps was steady; steps are replayed once they are")
        return self.strategy.observe(batch)

    def _replay(self, batch: Batch) -> Logs:
        assert self.graph is not None
        for name, held in self.held.items():
            held.copy_(batch[name])
        self.graph.again()
        for memory, offered in self.counted:
            memory.offered += offered
        self.replays += 1
        return self.logs

    def _record(self, batch: Batch) -> Logs:
        before = copy.deepcopy(self.strategy.state_dict())
        run = {name: value.detach().clone() for name, value in self.strategy.observe(batch).items()}
        after = copy.deepcopy(self.strategy.state_dict())
        self.strategy.load_state_dict(before)
        memories = [module for module in self.strategy.modules() if isinstance(module, Rows)]
        offered = [memory.offered for memory in memories]
        self.held = {name: value.clone() for name, value in batch.items()}
        graph = self.make()
        try:
            made = graph.first(lambda: self.strategy.observe(self.held))
            self.logs = {name: value.detach() for name, value in made.items()}
            where = differs(self.strategy.state_dict(), after) or differs(self.logs, run)
            self.given_up = f"a replayed step differs from the same step run, in {where}" if where else ""
        except RuntimeError as error:
            self.given_up = f"recording failed: {str(error).splitlines()[0]}"
        if self.given_up:
            self.note(f"steps are not captured: {self.given_up}")
            self.strategy.load_state_dict(after)
            return run
        self.graph = graph
        self.counted = [(one, one.offered - count) for one, count in zip(memories, offered, strict=True)]
        return self.logs


def differs(one: Any, other: Any, where: str = "") -> str:
    """The name of the first tensor in which two states differ by more than rounding; empty if none does."""
    if isinstance(one, Mapping):
        names = [differs(one[key], other[key], f"{where}.{key}".lstrip(".")) for key in one]
        return next(filter(None, names), "")
    if isinstance(one, list | tuple):
        names = [differs(left, right, f"{where}[{i}]") for i, (left, right) in enumerate(zip(one, other, strict=True))]
        return next(filter(None, names), "")
    if not isinstance(one, Tensor):
        return ""
    close = torch.isclose(one.double(), other.double(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    return "" if bool(close.all()) else where
