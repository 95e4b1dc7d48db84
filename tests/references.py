"""Slow twins of the fast functions: one run, loops and `math`, written from the definitions. They share no code with cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]
TINY = 1e-6


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def unit(v: Vector) -> list[float]:
    length = math.sqrt(dot(v, v)) + TINY
    return [a / length for a in v]


def log_of_sum(terms: Vector) -> float:
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def cosine_scores(features: Matrix, proxies: Matrix, tau: float) -> list[list[float]]:
    return [[dot(unit(f), unit(w)) / tau for w in proxies] for f in features]


def proxy_contrast(features: Matrix, labels: Sequence[int], proxies: Matrix, tau: float, mode: str) -> float:
    """The definition with one proxy per row of the batch, sets written out."""
    rows = [unit(f) for f in features]
    chosen = [unit(proxies[y]) for y in labels]
    n = len(rows)
    elements = rows + chosen
    owners = [*labels, *labels]
    losses = []
    for anchor in range(2 * n if mode == "all" else n):
        others = range(n, 2 * n) if mode == "proxy" else [q for q in range(2 * n) if q != anchor]
        scores = {q: dot(elements[anchor], elements[q]) / tau for q in others}
        whole = log_of_sum(list(scores.values()))
        positives = [q for q in others if owners[q] == owners[anchor]]
        losses.append(-math.fsum(scores[p] - whole for p in positives) / len(positives))
    return math.fsum(losses) / len(losses)


def supcon(z: Matrix, y: Sequence[int], tau: float) -> float:
    losses = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        positives = [k for k in others if y[k] == y[i]]
        if positives:
            whole = log_of_sum([dot(z[i], z[k]) / tau for k in others])
            losses.append(-math.fsum(dot(z[i], z[p]) / tau - whole for p in positives) / len(positives))
    return math.fsum(losses) / len(losses) if losses else 0.0


def proxy_distill(scores: Matrix, stored: Matrix, columns: Sequence[int]) -> float:
    gaps = [(now[c] - then[c]) ** 2 for now, then in zip(scores, stored, strict=True) for c in columns]
    return math.fsum(gaps) / len(gaps)


def shares(rows: Matrix, anchor: int, tau: float) -> dict[int, float]:
    """Log-softmax of the similarities of one row to all others."""
    scores = {c: dot(unit(rows[anchor]), unit(rows[c])) / tau for c in range(len(rows)) if c != anchor}
    whole = log_of_sum(list(scores.values()))
    return {c: score - whole for c, score in scores.items()}


def sample_distill(features: Matrix, stored: Matrix, tau: float) -> float:
    total = 0.0
    for a in range(len(features)):
        now, then = shares(features, a, tau), shares(stored, a, tau)
        total -= math.fsum(math.exp(then[c]) * now[c] for c in now)
    return total / len(features)


def temperature_factor(step: int, low: float, high: float, period: int) -> float:
    """The static temperature over the moving one, whose inverse goes along a cosine between 0.16 and 0.05."""
    return low + (high - low) * math.sin(math.pi * step / period) ** 2
