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


def _likeness(x: Vector, y: Vector, tau: float, cosine: bool) -> float:
    product = math.fsum(a * b for a, b in zip(x, y, strict=True))
    if cosine:
        product /= math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(b * b for b in y))
    return product / tau


def _rows(x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int]) -> list[tuple[float, list[float]]]:
    """Of every row that has negatives: its positive, its negatives."""
    both, size = [*x, *y], len(x)
    found = []
    for r, row in enumerate(both):
        positive = _likeness(row, both[(r + size) % (2 * size)], tau, cosine)
        negatives = [
            _likeness(row, other, tau, cosine)
            for j, other in enumerate(both)
            if j % size != r % size and labels[j % size] != labels[r % size]
        ]
        if negatives:
            found.append((positive, negatives))
    return found


def contrast(x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int]) -> float:
    """con of the specification: the mean over the rows that have negatives."""
    each = []
    for positive, negatives in _rows(x, y, tau, cosine, labels):
        top = max(positive, *negatives)
        total = math.fsum(math.exp(value - top) for value in (positive, *negatives))
        each.append(-positive + top + math.log(total))
    return math.fsum(each) / len(each) if each else 0.0


def margin(x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int], scope: str) -> float:
    """R of the specification."""
    rows = _rows(x, y, tau, cosine, labels)
    if not rows:
        return 0.0
    above, below = [], []
    for positive, negatives in rows:
        least, most = positive, max(negatives)
        if scope == "batch":
            least, most = min(p for p, _ in rows), max(max(n) for _, n in rows)
        above.append(max(positive - min(least, most), 0.0))
        below.extend(max(max(least, most) - value, 0.0) for value in negatives)
    return math.fsum(above) / len(above) + math.fsum(below) / len(below)


def model_contrast(
    h1: Matrix,
    h2: Matrix,
    w1: Matrix,
    w2: Matrix,
    labels: Sequence[int],
    tau: float,
    cosine: bool,
    weight: float,
    pairs: str,
    scope: str,
) -> float:
    """L_cl2 + L_reg."""
    total = 0.0
    for x, y, model in ((h1, w2, False), (h2, w1, False), (w1, w2, True)):
        total += contrast(x, y, tau, cosine, labels)
        if model or pairs == "all":
            total += weight * margin(x, y, tau, cosine, labels, scope)
    return total


def mean_cosine(views: Sequence[Matrix]) -> float:
    """Mean inner product of different rows, within each view, averaged over the views."""
    found = []
    for view in views:
        products = [_likeness(view[i], view[j], 1, False) for i in range(len(view)) for j in range(len(view)) if i != j]
        found.append(math.fsum(products) / len(products) if products else 0.0)
    return math.fsum(found) / len(found)
