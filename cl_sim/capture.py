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

    def warm(self, step: Callable[[], Logs]) -> Logs:
        """Make a step as usual, where it will be recorded."""
        ...

    def first(self, step: Callable[[], Logs]) -> Logs:
        """Make the step and remember how, in place of any before; its logs are overwritten by every repetition."""
        ...

    def again(self) -> None:
        """Do what was recorded once more."""
        ...


class CudaGraph:
    """A step as one CUDA graph with memory of its own, recorded on a side stream. Source: the notes on CUDA graphs of torch."""

    def __init__(self, device: torch.device) -> None:
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.graph = torch.cuda.CUDAGraph()

    def warm(self, step: Callable[[], Logs]) -> Logs:
        """On the side stream, where libraries then have their handles and workspaces."""
        outside = torch.cuda.current_stream(self.side.device)
        self.side.wait_stream(outside)
        with torch.cuda.stream(self.side):
            logs = step()
        outside.wait_stream(self.side)
        return logs

    def first(self, step: Callable[[], Logs]) -> Logs:
        """Record, which computes nothing, then run. Another thread may prepare batches meanwhile."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
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
        graph: Graph | None = None,
        warm_up: int = WARM_UP,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.strategy, self.warm_up, self.note = strategy, warm_up, note
        self.graph = CudaGraph(strategy.env.device) if graph is None else graph
        self.recorded, self.given_up = False, ""
        self.replays = self.warm = self.unsteady = 0  # steps: replayed, run before the recording, not steady
        self.held: Batch = {}
        self.logs: Logs = {}
        self.counted: list[tuple[Rows, int]] = []  # memories, and how many samples a step offers them

    def observe(self, batch: Batch) -> Logs:
        """Learn from one batch as the strategy does. The logs hold until the next call."""
        if self.given_up:
            return self.strategy.observe(batch)
        if not self.strategy.steady:
            self.unsteady += 1
            if self.unsteady == UNSTEADY:
                self.note(f"{UNSTEADY} steps were not steady and ran as usual; only steady ones are replayed")
            return self.strategy.observe(batch)
        if self.recorded:
            return self._replay(batch)
        self.warm += 1
        if self.warm <= self.warm_up:
            return self.graph.warm(lambda: self.strategy.observe(batch))
        return self._record(batch)

    def boundary(self) -> None:
        """A task has ended."""
        self.recorded, self.warm = False, 0
        self.strategy.boundary()

    def _replay(self, batch: Batch) -> Logs:
        for name, held in self.held.items():
            held.copy_(batch[name])
        self.graph.again()
        for memory, offered in self.counted:
            memory.offered += offered
        self.replays += 1
        return self.logs

    def _record(self, batch: Batch) -> Logs:
        """Run the step, go back, record it, compare."""
        before = copy.deepcopy(self.strategy.state_dict())
        run = _kept(self.graph.warm(lambda: self.strategy.observe(batch)))
        after = copy.deepcopy(self.strategy.state_dict())
        self.strategy.load_state_dict(before)
        memories = [module for module in self.strategy.modules() if isinstance(module, Rows)]
        offered = [memory.offered for memory in memories]
        self.held = _kept(batch)
        try:
            made = self.graph.first(lambda: self.strategy.observe(self.held))
            self.logs = {name: value.detach() for name, value in made.items()}
            where = differs(self.strategy.state_dict(), after) or differs(self.logs, run)
            self.given_up = f"a replayed step differs from the same step run, in {where}" if where else ""
        except RuntimeError as error:
            self.given_up = f"recording failed: {str(error).splitlines()[0]}"
        if self.given_up:
            self.note(f"steps are not captured: {self.given_up}")
            self.strategy.load_state_dict(after)
            return run
        self.recorded = True
        self.counted = [(one, one.offered - count) for one, count in zip(memories, offered, strict=True)]
        return self.logs


def _kept(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


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
