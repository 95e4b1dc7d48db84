"""Slow twins of the regularising strategies: one run, loops and `math`, written from the definitions. No code of cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]


def softmax(row: Vector) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / math.fsum(powers) for power in powers]


def distill(scores: Matrix, taught: Matrix, tau: float) -> float:
    """Hinton's soft targets: the mean cross-entropy between the softened answers, times tau squared."""
    losses = []
    for own, other in zip(scores, taught, strict=True):
        p, q = softmax([value / tau for value in own]), softmax([value / tau for value in other])
        losses.append(-math.fsum(b * math.log(a) for a, b in zip(p, q, strict=True)))
    return tau**2 * math.fsum(losses) / len(losses)


def running_fisher(slopes: Matrix, alpha: float, every: int) -> list[float]:
    """One run's gradients, step after step: the estimate that stands after the last."""
    fisher, gathered = [0.0] * len(slopes[0]), [0.0] * len(slopes[0])
    for step, slope in enumerate(slopes, start=1):
        gathered = [a + b * b for a, b in zip(gathered, slope, strict=True)]
        if step % every == 0:
            fisher = [alpha * a / every + (1 - alpha) * f for a, f in zip(gathered, fisher, strict=True)]
            gathered = [0.0] * len(slope)
    return fisher
