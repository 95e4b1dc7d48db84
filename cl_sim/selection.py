"""Which pass counts: the one after which a run was best on validation is tested, and a run stops when no other was for long.

Source: early stopping as RecBole 0.2.1 has it, which MCLRec builds on: a pass is better if its number is strictly higher, and
more than `patience` passes in a row that are not better end the run.
Departures: numbers are compared as they are; the released code rounds them to four decimals first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from cl_sim.memory.rows import Rows
from cl_sim.strategy import Strategy
from cl_sim.stream import Stream
from cl_sim.tracking import journal


@dataclass(frozen=True)
class Selection:
    """How a stream that comes in passes is tested. It has one as its attribute `selection`."""

    metric: str  # of the evaluations; the higher the better
    validation: int  # the number of the split that decides
    test: int  # the number of the split that is reported
    patience: int  # passes in a row that may be no better; one more ends the run. 0: it goes on to the end


class Standing(NamedTuple):
    """How a run stands after some passes, numbered from 0."""

    best: int
    last: int  # the last one that counts
    stopped: bool


def of(stream: Stream) -> Selection | None:
    """How the stream selects, if it does."""
    found: Selection | None = getattr(stream, "selection", None)
    return found


def standing(values: Sequence[float], patience: int) -> Standing:
    """The best pass (of equal ones the first) and where the run ends, by what validation said after each pass."""
    best = 0
    for number, value in enumerate(values):
        if value > values[best]:
            best = number
        if patience and number - best > patience:
            return Standing(best, number, True)
    return Standing(best, len(values) - 1, False)


def summary(lines: Sequence[Mapping[str, Any]], run: int, rule: Selection) -> dict[str, float]:
    """One run's numbers from the `evaluation` lines of its journal: every metric of the tested split after the best pass and
    after the last one, of the deciding split after the best pass, and how many passes that took.
    """

    def of(number: int, split: int, end: str) -> dict[str, float]:
        return {f"{name}_{end}": _known(table[run][split]) for name, table in passes[number].items()}

    passes = [journal.tables(line) for line in lines if line["task_end"]]
    watched = [_known(tables[rule.metric][run][rule.validation]) for tables in passes]
    best, last, _ = standing(watched, rule.patience)
    found = of(best, rule.test, "test") | of(last, rule.test, "test_last") | of(best, rule.validation, "validation")
    return {**found, "best_pass": best + 1, "passes": last + 1}


def _known(value: float | None) -> float:
    return math.nan if value is None else value


class Weights:
    """The parameters and buffers that each run had after its best pass, without the rows of memories.

    In a stack these are the tensors whose first axis is the run; what all runs share stays as it is.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.kept: dict[str, Tensor] = {}

    def keep(self, runs: Sequence[int]) -> None:
        """Keep what these runs have now; the first time, what all have."""
        if not self.kept or self.strategy.env.runs == 1:
            self.kept = {name: tensor.clone() for name, tensor in self._live().items()}
            return
        for name, tensor in self._live().items():
            self.kept[name][runs] = tensor[runs]

    def put_back(self) -> None:
        """Give every run what was kept of it, if anything was."""
        live = self._live()
        for name, tensor in self.kept.items():
            live[name].copy_(tensor)

    def _live(self) -> dict[str, Tensor]:
        runs = self.strategy.env.runs
        rows = {id(row) for part in self.strategy.modules() if isinstance(part, Rows) for row in part.buffers()}
        tensors: dict[str, Tensor] = {**dict(self.strategy.named_parameters()), **dict(self.strategy.named_buffers())}
        return {
            name: tensor.detach()
            for name, tensor in tensors.items()
            if id(tensor) not in rows and (runs == 1 or tensor.shape[:1] == (runs,))
        }
