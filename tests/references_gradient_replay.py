"""Slow twins for A-GEM, GSS and ASER: one run, loops and `math`, written from the definitions. They share no code with cl_sim."""

from __future__ import annotations

import itertools
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


def nearest_first(e: Vector, candidates: Sequence[Vector]) -> list[int]:
    """Of equally near candidates the first is nearer."""
    return sorted(
        range(len(candidates)), key=lambda i: math.fsum((a - b) ** 2 for a, b in zip(e, candidates[i], strict=True))
    )


def knn_shapley(e: Vector, y_e: int, candidates: Sequence[Vector], labels: Sequence[int], k: int) -> list[float]:
    """The published recursion for one evaluation sample, from the farthest candidate to the nearest."""
    order = nearest_first(e, candidates)
    n = len(order)
    hit = [float(labels[i] == y_e) for i in order]
    values = [0.0] * n
    value = hit[n - 1] / n
    values[order[n - 1]] = value
    for j in range(n - 1, 0, -1):  # j counts from 1
        value += (hit[j - 1] - hit[j]) * min(k, j) / (k * j)
        values[order[j - 1]] = value
    return values


def worth_of_set(chosen: Sequence[int], order: Sequence[int], y_e: int, labels: Sequence[int], k: int) -> float:
    """Hits among the k nearest of a set, over k."""
    near = [i for i in order if i in chosen][:k]
    return sum(labels[i] == y_e for i in near) / k


def exact_shapley(e: Vector, y_e: int, candidates: Sequence[Vector], labels: Sequence[int], k: int) -> list[float]:
    """The Shapley value by its definition: mean gain over all sets of the others, each size counting the same."""
    order, n = nearest_first(e, candidates), len(candidates)
    values = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        gains = []
        for size in range(n):
            sets = list(itertools.combinations(others, size))
            with_i = (worth_of_set((*chosen, i), order, y_e, labels, k) for chosen in sets)
            without = (worth_of_set(chosen, order, y_e, labels, k) for chosen in sets)
            gains.append(math.fsum(a - b for a, b in zip(with_i, without, strict=True)) / len(sets))
        values.append(math.fsum(gains) / n)
    return values


def exchange(old: Sequence[tuple[int, float]], new: Vector) -> list[int | None]:
    """ASER, update: old candidates are (row, worth). The row that each new sample takes, if it takes one."""
    items = [(-worth, 0, place) for place, (_, worth) in enumerate(old)] + [(-w, 1, i) for i, w in enumerate(new)]
    ranked = sorted(items)
    entering = [i for _, fresh, i in ranked[: len(old)] if fresh]
    leaving = [old[place][0] for _, fresh, place in ranked[len(old) :] if not fresh]
    places: list[int | None] = [None] * len(new)
    for i, row in zip(entering, leaving, strict=True):
        places[i] = row
    return places
