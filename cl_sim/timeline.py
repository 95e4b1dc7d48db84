"""Which classes a stream shows when: counted from its labels, drawn with characters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cl_sim.stream import Clips, Stream, labels_at

SHADES = " ·░▒▓█"
LINES = 20  # drawn at most; more classes are grouped
STEPS = 20_000  # looked at, at most; of a longer stream every second step counts twice, or every third three times, ...


@dataclass(frozen=True)
class Timeline:
    """Samples per class and stretch of the stream, for the first run.

    Shapes: edges [bins + 1] in samples, counts [bins, C], ends: task ends in samples.
    """

    edges: NDArray[np.int64]
    counts: NDArray[np.float64]
    ends: tuple[int, ...]


def of(stream: Stream, bins: int = 60) -> Timeline:
    """Count the labels of the stream's first run."""
    steps = len(stream)
    every = -(-steps // STEPS)
    edges = np.linspace(0, steps, min(bins, steps) + 1).round().astype(np.int64)
    labels = _labels(stream, every)
    parts = [labels[-(-a // every) : -(-b // every)] for a, b in pairwise(edges)]  # of the steps a, ..., b - 1
    counts = [np.bincount(part[part >= 0], minlength=stream.classes) for part in parts]
    ends = tuple((step + 1) * stream.batch_size for step in range(steps) if stream.ends_task(step))
    return Timeline(edges * stream.batch_size, every * np.stack(counts).astype(np.float64), ends)


def _labels(stream: Stream, every: int) -> NDArray[np.int64]:
    """The first run's labels at each so-manieth step, without making a sample where they are known; -1 is none.

    Shapes: -> [steps looked at, B], or of clips [steps, B, G].
    """
    if isinstance(stream, Clips):
        known = stream.clip_labels()
        return known.reshape(len(stream), -1, *known.shape[1:])[::every]
    each = [labels_at(stream, step, _label(stream))[0] for step in range(0, len(stream), every)]
    labels: NDArray[np.int64] = np.stack([one.cpu().numpy() for one in each])
    return labels


def _label(stream: Stream) -> str:
    return "target" if stream.task == "rank" else "y"


def draw(line: Timeline) -> str:
    """One line of characters per class (or group of classes), darker where more samples arrive; task ends below."""
    classes = line.counts.shape[1]
    each = -(-classes // LINES)
    rows = []
    for first in range(0, classes, each):
        last = min(first + each, classes) - 1
        name = f"class {first}" if last == first else f"class {first}-{last}"
        counts = line.counts[:, first : last + 1].sum(1)
        level = np.ceil(counts / max(line.counts.max() * each, 1) * (len(SHADES) - 1)).astype(int)
        rows.append(f"{name:>14} │" + "".join(SHADES[i] for i in level) + "│")
    marks = np.searchsorted(line.edges[1:], line.ends)
    feet = "".join("╵" if bin_ in marks else " " for bin_ in range(len(line.counts)))
    return "\n".join([*rows, f"{'task ends':>14} │{feet}│ {line.edges[-1]} samples"])
