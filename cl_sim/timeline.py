"""Which classes a stream shows when: counted from its labels, drawn with characters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cl_sim.indexed import IndexedStream
from cl_sim.stream import Clips, Stream, truth

SHADES = " ·░▒▓█"
LINES = 20  # drawn at most; more classes are grouped


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
    labels = _labels(stream)
    edges = np.linspace(0, steps, min(bins, steps) + 1).round().astype(np.int64) * stream.batch_size
    parts = [labels[a:b] for a, b in pairwise(edges)]
    counts = [np.bincount(part[part >= 0], minlength=stream.classes) for part in parts]
    ends = tuple((step + 1) * stream.batch_size for step in range(steps) if stream.ends_task(step))
    return Timeline(edges, np.stack(counts).astype(np.float64), ends)


def _labels(stream: Stream) -> NDArray[np.int64]:
    """The first run's labels, without making a sample where the order is known; -1 is none.

    Shapes: -> [N], or of clips [N, G].
    """
    if isinstance(stream, Clips):
        return stream.clip_labels()
    if isinstance(stream, IndexedStream):
        known: NDArray[np.int64] = stream.schedule.labels[0]
        return known
    labels: NDArray[np.int64] = np.concatenate(
        [truth(stream, step, stream.batch(step))[_label(stream)][0].cpu().numpy() for step in range(len(stream))]
    )
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
