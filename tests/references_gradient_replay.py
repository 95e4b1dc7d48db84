"""Slow twins for A-GEM and GSS: one run, loops and `math`, written from the definitions. They share no code with cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def project(g: Vector, r: Vector) -> list[float]:
    """A-GEM, eq. 11."""
    if dot(g, r) >= 0:
        return list(g)
    share = dot(g, r) / dot(r, r)
    return [a - share * b for a, b in zip(g, r, strict=True)]


def cosine(u: Vector, v: Vector) -> float:
    length = math.sqrt(dot(u, u)) * math.sqrt(dot(v, v))
    return dot(u, v) / length if length else 0.0


def weighted_draws(weights: Vector, k: int) -> dict[tuple[int, ...], float]:
    """Probability of every ordered choice of k, each in proportion to its weight among those left."""
    if k == 0:
        return {(): 1.0}
    total = math.fsum(weights)
    found = {}
    for first, weight in enumerate(weights):
        if weight > 0:
            others = [0.0 if i == first else w for i, w in enumerate(weights)]
            for rest, share in weighted_draws(others, k - 1).items():
                found[first, *rest] = weight / total * share
    return found


def meet(held: Vector, scores: Vector, waiting: Vector, chances: Vector) -> list[int | None]:
    """GSS-greedy, exchange: the row each sample replaces. `waiting`: an exponential number per row, `chances`: one per sample."""
    low, high = min(held), max(held)
    weights = [(c - low) / (high - low + 0.01) for c in held]
    order = sorted(
        range(len(held)), key=lambda row: waiting[row] / weights[row] if weights[row] else 1e30 * waiting[row]
    )
    places: list[int | None] = []
    for item, score in enumerate(scores):
        row = order[item]
        both = score + 1 + held[row] + 1
        share = (held[row] + 1) / both if both else 0.0
        places.append(row if chances[item] < share else None)
    return places
