"""Slow twins for the contrastive and other replay strategies: one run, loops and `math`. They share no code with cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]


def normalised(v: Vector) -> list[float]:
    length = math.sqrt(math.fsum(a * a for a in v))
    return [a / length for a in v]


def affine(weight: Matrix, bias: Vector, v: Vector) -> list[float]:
    return [math.fsum(w * a for w, a in zip(row, v, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def projection(layers: Sequence[tuple[Matrix, Vector]], features: Vector) -> list[float]:
    """Affine maps with a rectifier between any two, the result made as long as 1."""
    v = list(features)
    for number, (weight, bias) in enumerate(layers):
        v = affine(weight, bias, [max(0.0, a) for a in v] if number else v)
    return normalised(v)


def nearest_class(memory: Matrix, labels: Sequence[int], query: Vector) -> int:
    """The class whose mean of normalised features, normalised again, is nearest."""
    best, nearest = math.inf, -1
    for c in sorted(set(labels)):
        members = [normalised(row) for row, y in zip(memory, labels, strict=True) if y == c]
        mean = normalised([math.fsum(column) / len(members) for column in zip(*members, strict=True)])
        distance = math.dist(mean, normalised(query))
        if distance < best:
            best, nearest = distance, c
    return nearest


class GreedySampler:
    """GDumb's sampler with a list per class, in order of arrival."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows: dict[int, list[int]] = {}

    def offer(self, item: int, label: int, survivors: set[int]) -> None:
        """Of the largest class leaves who is not among the survivors: the choice is random, so it is taken as it was made."""
        room = self.capacity // max(1, len(self.rows))
        if label in self.rows and len(self.rows[label]) >= room:
            return
        if sum(len(rows) for rows in self.rows.values()) >= self.capacity:
            largest = max(self.rows.values(), key=len)
            (leaver,) = [row for row in largest if row not in survivors]
            largest.remove(leaver)
        self.rows.setdefault(label, []).append(item)


def clipped(gradient: Vector, most: float) -> list[float]:
    length = math.sqrt(math.fsum(g * g for g in gradient))
    return [g * min(1.0, most / (length + 1e-6)) for g in gradient]


def softmax(scores: Vector) -> list[float]:
    top = max(scores)
    whole = math.fsum(math.exp(s - top) for s in scores)
    return [math.exp(s - top) / whole for s in scores]


def dual_view(first: Matrix, second: Matrix, joint: Matrix, labels: Sequence[int], weight: float) -> float:
    parts = [[softmax(row) for row in scores] for scores in (first, second, joint)]
    n, classes = len(labels), len(first[0])
    cross = [-math.log(part[i][labels[i]]) for part in parts[:2] for i in range(n)]
    entropies = []
    for part in parts:
        mean = [math.fsum(row[c] for row in part) / n for c in range(classes)]
        entropies.append(-math.fsum(p * math.log(p) for p in mean))
    gaps = [abs(parts[2][i][c] - part[i][c]) for part in parts[:2] for i in range(n) for c in range(classes)]
    return math.fsum(cross) / len(cross) - math.fsum(entropies) / 3 + weight * math.fsum(gaps) / len(gaps)


def impact(features: Matrix, scores: Matrix, labels: Sequence[int]) -> list[float]:
    """Gradient of the cross-entropy with respect to the head's weights, all absolute values added up."""
    sums = []
    for f, z, y in zip(features, scores, labels, strict=True):
        error = [p - (c == y) for c, p in enumerate(softmax(z))]
        sums.append(math.fsum(abs(e * a) for e in error for a in f))
    return sums


def log_share(similarity: Matrix, row: int, column: int, columns: Sequence[int], tau: float) -> float:
    scores = [similarity[row][c] / tau for c in columns]
    top = max(scores)
    return similarity[row][column] / tau - top - math.log(math.fsum(math.exp(s - top) for s in scores))


def label_contrast(similarity: Matrix, labels: Sequence[int], tau: float, itself: bool) -> float:
    """As released: without the row itself, it still counts in the number averaged over."""
    total = 0.0
    for a in range(len(labels)):
        columns = [c for c in range(len(labels)) if itself or c != a]
        same = [c for c in columns if labels[c] == labels[a]]
        total -= math.fsum(log_share(similarity, a, c, columns, tau) for c in same) / labels.count(labels[a])
    return total / len(labels)


def pair_contrast(similarity: Matrix, labels: Sequence[int], tau: float) -> float:
    n = len(labels) // 2
    total = 0.0
    for a in range(2 * n):
        columns = [c for c in range(2 * n) if c != a]
        total -= log_share(similarity, a, (a + n) % (2 * n), columns, tau)
    return total / (2 * n) + 2 * label_contrast(similarity, labels, tau, itself=False)


def turned_pixel(size: int, row: int, column: int, left: bool, right: bool, quarters: int) -> tuple[int, int]:
    """Where the pixel at a place comes from in the original: undo the quarter turns, then the turned half it lies in."""
    for _ in range(quarters):
        row, column = column, size - 1 - row
    middle = size // 2
    if column < middle and left:
        return size - 1 - row, middle - 1 - column
    if column >= middle and right:
        return size - 1 - row, middle + size - 1 - column
    return row, column
