"""BECLR's memory on a stream, written slowly: lists, loops and math, nothing of cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def cosine(a: Row, b: Row) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def nearest(row: Row, prototypes: Sequence[Row]) -> int:
    found = [cosine(row, p) for p in prototypes]
    return found.index(max(found))


def k_means(rows: Sequence[Row], valid: Sequence[bool], start: Sequence[Row], steps: int) -> list[Row]:
    prototypes = list(start)
    for _ in range(steps):
        members: list[list[Row]] = [[] for _ in prototypes]
        for row, counts in zip(rows, valid, strict=True):
            if counts:
                members[nearest(row, prototypes)].append(row)
        prototypes = [
            [sum(column) / len(own) for column in zip(*own, strict=True)] if own else old
            for own, old in zip(members, prototypes, strict=True)
        ]
    return prototypes


def refill(prototypes: Sequence[Row], rows: Sequence[Row], labels: Sequence[int]) -> list[Row]:
    likeness = [
        (cosine(row, prototypes[label]), number)
        for number, (row, label) in enumerate(zip(rows, labels, strict=True))
        if 0 <= label < len(prototypes)
    ]
    waiting = [number for _, number in sorted(likeness)]
    made = []
    for number, old in enumerate(prototypes):
        made.append(old if number in labels else rows[waiting.pop(0)])
    return made


def votes(support: Sequence[Row], labels: Sequence[int], query: Row, classes: int, k: int, tau: float) -> list[float]:
    found = sorted(((cosine(row, query), y) for row, y in zip(support, labels, strict=True)), reverse=True)[:k]
    weights = [math.exp(c / tau) for c, _ in found]
    return [sum(w for w, (_, y) in zip(weights, found, strict=True) if y == c) / sum(weights) for c in range(classes)]


def purity(clusters: Sequence[int], labels: Sequence[int]) -> float:
    commonest = 0
    for group in set(clusters):
        own = [y for c, y in zip(clusters, labels, strict=True) if c == group]
        commonest += max(own.count(y) for y in set(own))
    return commonest / len(labels)


def entropy(values: Sequence[object]) -> float:
    shares = [values.count(v) / len(values) for v in set(values)]
    return -sum(share * math.log(share) for share in shares)


def mutual_information(clusters: Sequence[int], labels: Sequence[int]) -> float:
    ends = entropy(clusters) + entropy(labels)
    shared = ends - entropy(list(zip(clusters, labels, strict=True)))
    return 2 * max(shared, 0) / ends if ends else 0.0
