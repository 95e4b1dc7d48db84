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


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def sigmoids(scores: Matrix, target: Matrix, classes: Sequence[bool], counts: Sequence[bool]) -> float:
    losses = []
    for own, wanted, counted in zip(scores, target, counts, strict=True):
        if counted:
            terms = []
            for score, t, known in zip(own, wanted, classes, strict=True):
                if known:
                    terms.append(-t * math.log(sigmoid(score)) - (1 - t) * math.log(sigmoid(-score)))
            losses.append(math.fsum(terms))
    return math.fsum(losses) / len(losses)


def running_fisher(slopes: Matrix, alpha: float, every: int) -> list[float]:
    """One run's gradients, step after step: the estimate that stands after the last."""
    fisher, gathered = [0.0] * len(slopes[0]), [0.0] * len(slopes[0])
    for step, slope in enumerate(slopes, start=1):
        gathered = [a + b * b for a, b in zip(gathered, slope, strict=True)]
        if step % every == 0:
            fisher = [alpha * a / every + (1 - alpha) * f for a, f in zip(gathered, fisher, strict=True)]
            gathered = [0.0] * len(slope)
    return fisher


class OneByOne:
    """Streaming discriminant analysis as the paper states it: a sample, then the next."""

    def __init__(self, classes: int, width: int) -> None:
        self.mu = [[0.0] * width for _ in range(classes)]
        self.c = [0] * classes
        self.sigma = [[0.0] * width for _ in range(width)]
        self.t = 0

    def learn(self, z: Vector, y: int) -> None:
        t, width = self.t, len(z)
        off = [a - b for a, b in zip(z, self.mu[y], strict=True)]
        for i in range(width):
            for j in range(width):
                delta = t * off[i] * off[j] / (t + 1)
                self.sigma[i][j] = (t * self.sigma[i][j] + delta) / (t + 1)
        self.mu[y] = [(self.c[y] * m + a) / (self.c[y] + 1) for m, a in zip(self.mu[y], z, strict=True)]
        self.c[y] += 1
        self.t += 1

    def scores(self, z: Vector, shrinkage: float, target: str) -> list[float]:
        """Log-densities of equal-covariance normals up to what all classes share; minus infinity without samples."""
        width = len(z)
        unit = math.fsum(self.sigma[i][i] for i in range(width)) / width if target == "variance" else 1
        shrunk = [
            [(1 - shrinkage) * self.sigma[i][j] + shrinkage * unit * (i == j) for j in range(width)]
            for i in range(width)
        ]
        answers = []
        for mu, c in zip(self.mu, self.c, strict=True):
            w = solve(shrunk, mu)
            answers.append(dot(w, z) - dot(w, mu) / 2 if c else -math.inf)
        return answers


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def solve(matrix: Matrix, right: Vector) -> list[float]:
    """Gaussian elimination with the largest pivot."""
    n = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for k in range(n):
        best = max(range(k, n), key=lambda i: abs(rows[i][k]))
        rows[k], rows[best] = rows[best], rows[k]
        for i in range(k + 1, n):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    x = [0.0] * n
    for k in reversed(range(n)):
        x[k] = (rows[k][n] - math.fsum(rows[k][j] * x[j] for j in range(k + 1, n))) / rows[k][k]
    return x
