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
UNSTEADY = 1000  # steps from the start of which none was steady, after which that is told
TOLERANCE = 1e-2  # share of a step's change by which its replay may be off: other kernels sum in another order
ROUNDING = 1e-6  # of a value itself


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

    def drop(self) -> None:
        """Forget what was recorded, and free its memory."""
        ...


class CudaGraph:
    """A step as one CUDA graph with memory of its own. Source: the notes on CUDA graphs of torch.

    It is recorded on a side stream, as nothing can be on the default one; a run with a stream of its own needs no other.
    """

    def __init__(self, device: torch.device) -> None:
        own, usual = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
        self.side = own if own != usual else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
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
        self.drop()
        with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):
            logs = step()
        self.graph.replay()
        return logs

    def again(self) -> None:
        """One launch."""
        self.graph.replay()

    def drop(self) -> None:
        """A fresh one holds nothing."""
        self.graph = torch.cuda.CUDAGraph()


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
        self.recorded, self.warned, self.given_up = False, False, ""
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
            if self.unsteady == UNSTEADY and not self.warm + self.replays:
                self.warned = True
                self.note(f"none of the first {UNSTEADY} steps was steady; only steady ones are replayed")
            return self.strategy.observe(batch)
        self.warm += 1
        if self.warm <= self.warm_up or (self.recorded and _shapes(batch) != _shapes(self.held)):
            return self.graph.warm(lambda: self.strategy.observe(batch))
        return self._replay(batch) if self.recorded else self._record(batch)

    def boundary(self) -> None:
        """A task has ended."""
        self._forget()
        self.strategy.boundary()

    def _forget(self) -> None:
        self.recorded, self.warm, self.held, self.logs = False, 0, {}, {}
        self.graph.drop()

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
        self.strategy.load_state_dict(copy.deepcopy(before))  # of which an optimiser keeps tensors
        memories = [module for module in self.strategy.modules() if isinstance(module, Rows)]
        offered = [memory.offered for memory in memories]
        self.held = _kept(batch)
        try:
            made = self.graph.first(lambda: self.strategy.observe(self.held))
            self.logs = {name: value.detach() for name, value in made.items()}
            where = differs(self.strategy.state_dict(), after, before) or differs(self.logs, run)
            self.given_up = f"a replayed step differs from the same step run, in {where}" if where else ""
        except RuntimeError as error:
            self.given_up = f"recording failed: {_reason(error)}"
        if self.given_up:
            self.note(f"steps are not captured: {self.given_up}")
            self._forget()
            self.strategy.load_state_dict(after)
            return run
        self.recorded = True
        self.counted = [(one, one.offered - count) for one, count in zip(memories, offered, strict=True)]
        return self.logs


def _kept(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in values.items()}


def _shapes(batch: Batch) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in batch.items()}


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: leaving a failed recording raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def differs(replayed: Any, run: Any, before: Any = None, where: str = "") -> str:
    """The name of the first value in which two states after a step differ by more than rounding; empty if none does.

    Whole numbers must be equal. Of other tensors, a hundredth of the largest change since `before` is allowed (of the largest
    value, where there is none before).
    """
    if isinstance(run, Mapping | list | tuple):
        keys: Any = run.keys() if isinstance(run, Mapping) else range(len(run))
        names = {key: f"{where}.{key}".lstrip(".") if isinstance(run, Mapping) else f"{where}[{key}]" for key in keys}
        found = (differs(replayed[key], run[key], _part(before, key), names[key]) for key in keys)
        return next(filter(None, found), "")
    if not isinstance(run, Tensor):
        return where if isinstance(run, bool | int | float | str) and run != replayed else ""
    if not run.is_floating_point():
        return "" if torch.equal(replayed, run) else where
    change = (run if before is None else run - before).nan_to_num().abs().amax() if run.numel() else 0.0
    close = torch.isclose(replayed, run, rtol=ROUNDING, atol=TOLERANCE * float(change), equal_nan=True)
    return "" if bool(close.all()) else where


def _part(whole: Any, key: Any) -> Any:
    """What stands under a key, if anything does."""
    try:
        return whole[key]
    except (KeyError, IndexError, TypeError):
        return None
