"""Lines of a journal without the times in them, by which two runs of the same thing differ."""

from __future__ import annotations

from typing import Any

TIMED = ("time", "samples_per_second", "step_ms", "peak_bytes")


def untimed(line: Any) -> Any:
    """A line, or a part of one."""
    if isinstance(line, dict):
        return {key: untimed(value) for key, value in line.items() if key not in TIMED}
    return line
