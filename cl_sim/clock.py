"""Time spent training, without what is not training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch


class Clock:
    """Seconds since the last read, less the pauses; waits for the device wherever it looks at the time.

    While one run of a process pauses, those that take turns with it do not train either.
    """

    away: ClassVar[float] = 0.0  # seconds that any clock of this process was paused

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start, self.before = self.now(), Clock.away

    def now(self) -> float:
        """Wall seconds, once the device has finished what this run asked of it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        began = self.now()
        try:
            yield
        finally:
            Clock.away += self.now() - began

    def read(self) -> float:
        """Seconds since the last read, without the pauses."""
        now = self.now()
        seconds = now - self.start - (Clock.away - self.before)
        self.start, self.before = now, Clock.away
        return seconds
