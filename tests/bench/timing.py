"""Side-by-side timing: cases take turns within each round, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cl_sim.testing import Trace

ROUNDS = 5
SHARE = 0.4  # seconds that one case gets in one round, at least

Case = Callable[[], None]  # makes one step


def seconds(work: Case, device: torch.device) -> float:
    """Processor time of this process on a CPU (the others on the machine do not count), wall time on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(cases: Mapping[str, Case], device: torch.device, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds per step of every case in every round, after a warm-up."""
    steps = {name: max(1, round(SHARE / max(seconds(case, device), 1e-6))) for name, case in cases.items()}

    def repeated(name: str) -> float:
        def work() -> None:
            for _ in range(steps[name]):
                cases[name]()

        return seconds(work, device) / steps[name]

    for name in cases:
        repeated(name)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name in cases:
            times[name].append(repeated(name))
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(one / other for one, other in zip(times, base, strict=True))


def milliseconds(times: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return 1000 * statistics.median(times)


def operators(step: Case) -> int:
    """How many tensor operators one step calls: a count that no load of the machine changes."""
    with Trace() as trace:  # type: ignore[no-untyped-call]
        step()
    return len(trace.calls)


def python_calls(step: Case) -> int:
    """How many Python functions one step calls."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count
