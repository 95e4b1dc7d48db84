"""Rows that do not fit on the device, gathered and copied there for the next steps while the present one trains.

Source: ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

DEPTH = 2  # steps made ahead: one to copy while another is read


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which everybody's rows are copied: a device copies one after the other, and streams are few."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@dataclass
class _Staging:
    """A buffer on the host, pinned where a GPU copies from it, and the last copy that was made of it."""

    buffer: Tensor
    copied: torch.cuda.Event | None = None


class Ahead:
    """The rows of any step; those of the steps that follow it are made in one thread, to lie on the device when asked for.

    `numbers` says on the host which rows a step has, from the step alone; it is called in the thread. Steps may be asked for
    in any order: one that was not made ahead is made at once, and what follows it comes next. An error of the thread is
    raised where its step is asked for. The thread starts with the first step and ends with this object.

    Shapes: rows [N, *shape], numbers [R, B] -> [R, B, *shape].
    """

    def __init__(
        self, rows: Tensor, device: torch.device, numbers: Callable[[int], Tensor], steps: int, depth: int = DEPTH
    ) -> None:
        self.rows, self.device, self.numbers, self.steps, self.depth = rows, device, numbers, steps, depth
        self.side = _copies(device) if device.type == "cuda" else None
        with torch.inference_mode(False):  # evaluations are made in it, and the thread writes outside of it
            empty = rows.new_empty(0, *rows.shape[1:])
        self.staging = deque(_Staging(empty) for _ in range(depth + 1))  # the longest unused first
        self.made: dict[int, Future[tuple[Tensor, torch.cuda.Event | None]]] = {}  # by step
        self.thread = ThreadPoolExecutor(1, "ahead")

    def take(self, step: int) -> Tensor:
        """The rows of a step, ready for the current stream of the device; the host waits for the thread only."""
        wanted = range(step, min(step + self.depth + 1, self.steps))
        for other in self.made.keys() - set(wanted):
            self.made.pop(other).cancel()
        for one in wanted:
            if one not in self.made:
                self.made[one] = self.thread.submit(self._make, one)
        x, copied = self.made.pop(step).result()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            x.record_stream(current)  # the side stream, which owns its memory, must not reuse it before that
        return x

    def close(self) -> None:
        """Let the thread end, after the step that it is at."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """Gather into a staging buffer and start its copy; on a CPU the copy is made at once."""
        index = self.numbers(step)
        staged = self._free()
        if len(staged.buffer) < index.numel():
            shape = index.numel(), *self.rows.shape[1:]
            staged.buffer = torch.empty(shape, dtype=self.rows.dtype, pin_memory=self.side is not None)
        picked = staged.buffer[: index.numel()]
        torch.index_select(self.rows, 0, index.reshape(-1), out=picked)
        with torch.cuda.stream(self.side) if self.side is not None else nullcontext():
            x = picked.to(self.device, non_blocking=True, copy=True)
        if self.side is not None:
            staged.copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            staged.copied.record(self.side)
        return x.view(*index.shape, *self.rows.shape[1:]), staged.copied

    def _free(self) -> _Staging:
        """The buffer that was used longest ago, once the copy of it has ended; the wait is the thread's."""
        self.staging.rotate(-1)
        staged = self.staging[-1]
        if staged.copied is not None:
            staged.copied.synchronize()
        return staged
