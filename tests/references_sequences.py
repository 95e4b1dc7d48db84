"""Slow twins for sequence learning: one run, loops and `math`, written from the definitions. They share no code with cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def log_of_sum(terms: Vector) -> float:
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def mean(values: Vector) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def anchors(
    x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int] | None
) -> list[tuple[float, list[float]]]:
    """Of every row that has negatives: its positive, and its negatives."""
    rows = [list(row) for row in (*x, *y)]
    if cosine:
        rows = [[value / math.sqrt(dot(row, row)) for value in row] for row in rows]
    size = len(x)
    found = []
    for r in range(2 * size):
        partner = (r + size) % (2 * size)
        others = [j for j in range(2 * size) if j not in (r, partner)]
        if labels is not None:
            others = [j for j in others if labels[j % size] != labels[r % size]]
        if others:
            found.append((dot(rows[r], rows[partner]) / tau, [dot(rows[r], rows[j]) / tau for j in others]))
    return found


def info_nce(x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int] | None) -> float:
    return mean([log_of_sum([p, *negatives]) - p for p, negatives in anchors(x, y, tau, cosine, labels)])


def margin_regulariser(
    x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int] | None, whole_batch: bool
) -> float:
    found = anchors(x, y, tau, cosine, labels)
    above, below = [], []
    for p, negatives in found:
        least, most = p, max(negatives)
        if whole_batch:
            least = min(one for one, _ in found)
            most = max(max(others) for _, others in found)
        low, high = min(least, most), max(least, most)
        above.append(max(p - low, 0))
        below += [max(high - n, 0) for n in negatives]
    return mean(above) + mean(below)


def crop(items: Sequence[int], start: int, left: int) -> list[int]:
    stretch = list(items[start : start + left])
    return stretch + [0] * (len(items) - left)
