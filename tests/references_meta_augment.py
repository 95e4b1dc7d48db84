"""Slow twins for next-item learning and meta-optimised augmentation: one run, loops and `math`, no code of cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]


def item_loss(scores: Matrix, targets: Sequence[int], counted: Sequence[bool], candidate: Sequence[bool]) -> float:
    """Mean cross-entropy of the counted rows among the candidates."""
    each = []
    for row, target, counts in zip(scores, targets, counted, strict=True):
        if counts:
            allowed = [value for value, one in zip(row, candidate, strict=True) if one]
            top = max(allowed)
            each.append(top + math.log(math.fsum(math.exp(value - top) for value in allowed)) - row[target])
    return math.fsum(each) / len(each) if each else 0.0
