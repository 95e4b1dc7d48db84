"""Collects logs on the device and hands them to the host in one read."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim.types import Logs


class Column(NamedTuple):
    """What was logged under one key since the last read.    Shapes: steps [K], values [K, R]."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Meter:
    """Logs of the steps since the last drain, kept on the device, one row per step so that a NaN can be traced."""

    def __init__(self) -> None:
        self.pending: list[tuple[int, list[str], Tensor]] = []  # step, keys, [keys, R]

    def add(self, step: int, logs: Logs) -> None:
        """Remember one step's logs, each [R]."""
        if logs:
            rows = torch.stack([value.detach().float() for value in logs.values()])
            self.pending.append((step, list(logs), rows))

    def read(self) -> dict[str, Column]:
        """Everything pending, by key, in one read of the device."""
        if not self.pending:
            return {}
        flat = torch.cat([rows for _, _, rows in self.pending]).cpu().numpy().astype(np.float64)  # [sum of keys, R]
        origin = [(key, step) for step, keys, _ in self.pending for key in keys]
        columns = {}
        for key in dict.fromkeys(key for key, _ in origin):
            lines = [line for line, (other, _) in enumerate(origin) if other == key]
            columns[key] = Column(np.array([origin[line][1] for line in lines]), flat[lines])
        return columns

    def drain(self) -> dict[str, Column]:
        """Read, then start afresh."""
        columns = self.read()
        self.pending = []
        return columns

    def state_dict(self) -> dict[str, Any]:
        """Everything pending, for a checkpoint."""
        return {"pending": list(self.pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what state_dict returned."""
        self.pending = list(state["pending"])
