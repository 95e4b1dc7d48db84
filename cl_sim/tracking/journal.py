"""The local record of a group of runs: one JSON line per event, appended as it happens.

Lines have `kind`, `samples` (samples seen, the x axis of every curve) and `time` (ms since the epoch), and by kind:

    curve        values: {key: [R]}                          means over the steps since the last one
    evaluation   accuracy: [R][S], seen: [R][S], task_end    null where a split was not evaluated; HR@10 if measure is hr10,
                                                             with ndcg10 and others beside it
    memory       counts: [R][C]                              rows of each class in the memory
    summary      values: {key: [R]}                          one number per metric, at the end
    end          status, reason                              finished, failed or interrupted; the last one counts
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cl_sim.errors import ClSimError

HEADING = frozenset(
    {"kind", "samples", "time", "task_end", "seen", "accuracy", "measure"}
)  # of an evaluation; the rest: metrics


class Journal:
    """Appends to a journal. A resumed run computes the same values again; what is there already is not written twice.

    Raises: ClSimError if a line that is not the last one is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: dict[str, int] = {}
        if path.exists():
            lines, end = read(path)
            os.truncate(path, end)  # a line that a kill cut short
            for line in lines:
                if "samples" in line:
                    self._last[line["kind"]] = max(self.last(line["kind"]), line["samples"])
        self._file = path.open("ab")

    def last(self, kind: str) -> int:
        """Samples seen at the newest line of a kind; -1 if there is none."""
        return self._last.get(kind, -1)

    def write(self, kind: str, samples: int, **content: Any) -> bool:
        """Append a line, unless one of this kind was written for so many samples already; True if it was appended."""
        if samples <= self.last(kind):
            return False
        self._append({"kind": kind, "samples": samples, **content})
        self._last[kind] = samples
        return True

    def end(self, status: str, reason: str) -> None:
        """Write how the group ended: 'finished', 'failed' or 'interrupted', and why."""
        self._append({"kind": "end", "status": status, "reason": reason})
        self.sync()

    def sync(self) -> None:
        """Wait until every line is on the disk: a checkpoint must never know more than the journal after a power cut."""
        os.fsync(self._file.fileno())

    def _append(self, line: dict[str, Any]) -> None:
        stamped = {**line, "time": time.time_ns() // 1_000_000}
        self._file.write(json.dumps(_plain(stamped), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete lines from byte `start` on, and the byte where the next read begins.

    Raises: ClSimError naming file and byte if a complete line is not JSON.
    """
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    end = content.rfind(b"\n") + 1
    lines, byte = [], start
    for raw in content[:end].split(b"\n")[:-1]:
        try:
            lines.append(_line(raw))
        except ValueError:
            if byte + len(raw) + 1 == start + end:  # the last line: a full disk or a kill may have torn it
                return lines, byte
            raise ClSimError(
                f"{path} is damaged at byte {byte}: not a JSON line; restore the file or run again"
            ) from None
        byte += len(raw) + 1
    return lines, byte


def tables(line: Mapping[str, Any]) -> dict[str, list[list[float | None]]]:
    """Every metric of an evaluation line, by name.    Shapes: each [R][S]."""
    others = {key: value for key, value in line.items() if key not in HEADING}
    return {line.get("measure", "acc"): line["accuracy"], **others}


def known_mean(row: Sequence[float | None]) -> float:
    """The mean of the values of a line that were measured; NaN if none was."""
    known = [value for value in row if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _line(raw: bytes) -> dict[str, Any]:
    line = json.loads(raw)
    if not isinstance(line, dict) or "kind" not in line:
        raise ValueError("not a journal line")
    return line


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: arrays as lists, anything not finite as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
