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
