"""Time spent training, without what is not training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds since the last read, less the pauses; waits for the device wherever it looks at the time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.away = device, 0.0
        self.start = self.now()

    def now(self) -> float:
        """Wall seconds, once the device has finished what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        began = self.now()
        yield
        self.away += self.now() - began

    def read(self) -> float:
        """Seconds since the last read, without the pauses."""
        now = self.now()
        seconds = now - self.start - self.away
        self.start, self.away = now, 0.0
        return seconds
