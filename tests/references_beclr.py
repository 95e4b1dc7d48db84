"""Slow twins of the clustered memory, its losses and the few-shot read-outs: loops and `math`, from the definitions."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def cosine(u: Vector, v: Vector) -> float:
    return dot(u, v) / math.sqrt(dot(u, u) * dot(v, v))


def sinkhorn(scores: Matrix, eps: float, iterations: int, share: Vector) -> list[list[float]]:
    """Masses that are divided by column sums, then by row sums, as often as told."""
    top = max(max(row) for row in scores)
    q = [[math.exp((s - top) / eps) for s in row] for row in scores]
    for _ in range(iterations):
        columns = [math.fsum(row[j] for row in q) for j in range(len(share))]
        q = [[v * share[j] / columns[j] for j, v in enumerate(row)] for row in q]
        q = [[v / (math.fsum(row) * len(q)) for v in row] for row in q]
    return [[v * len(q) for v in row] for row in q]


def cluster_means(rows: Matrix, labels: Sequence[int], old: Matrix, gamma: float) -> list[list[float]]:
    new = []
    for cluster, before in enumerate(old):
        mine = [row for row, label in zip(rows, labels, strict=True) if label == cluster]
        if not mine:
            new.append(list(before))
            continue
        means = [math.fsum(column) / len(mine) for column in zip(*mine, strict=True)]
        new.append([gamma * b + (1 - gamma) * m for b, m in zip(before, means, strict=True)])
    return new


def nearest_in_cluster(
    z: Matrix, rows: Matrix, labels: Sequence[int], prototypes: Matrix, k: int, allowed: Sequence[Sequence[bool]]
) -> list[list[int]]:
    """Row numbers, best first; only as many as are allowed."""
    found = []
    for one, may in zip(z, allowed, strict=True):
        own = max(range(len(prototypes)), key=lambda c: cosine(one, prototypes[c]))
        every = [m for m in range(len(rows)) if may[m]]
        inside = [m for m in every if labels[m] == own]
        pool = inside if len(inside) >= k else every
        found.append(sorted(pool, key=lambda m: -cosine(one, rows[m]))[:k])
    return found


def alignment(p: Matrix, z: Matrix, neighbours: Sequence[Matrix], weights: Matrix) -> float:
    half = len(p) // 2
    total = 0.0
    for r in range(len(p)):
        o = r + half if r < half else r - half
        top = cosine(p[r], z[o]) + math.fsum(
            w * cosine(p[r], m) for w, m in zip(weights[o], neighbours[o], strict=True)
        )
        total += top / (1 + math.fsum(weights[o]))
    return -total / len(p)


def uniformity(z: Matrix, tau: float) -> float:
    half = len(z) // 2
    means = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j % half != i % half]
        means.append(math.fsum(math.exp(cosine(z[i], z[j]) / tau) for j in others) / len(others))
    return math.log(math.fsum(means) / len(means))


def row_pairing(p: Matrix, z: Matrix, of_p: Sequence[Matrix], of_z: Sequence[Matrix]) -> float:
    """The released loss on enlarged batches: row j of one with row j of the other view, neighbours too, all rows alike."""
    half, k = len(p) // 2, len(of_p[0])
    total = 0.0
    for r in range(len(p)):
        o = r + half if r < half else r - half
        total += cosine(p[r], z[o]) + math.fsum(cosine(of_p[r][j], of_z[o][j]) for j in range(k))
    return -total / (len(p) * (1 + k))


def standardise(row: Vector) -> list[float]:
    mean = math.fsum(row) / len(row)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in row) / (len(row) - 1))
    return [(v - mean) / std for v in row]


def log_of_sum(terms: Vector) -> float:
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def opta(
    support: Matrix, query: Matrix, eps: float, passes: int, iterations: int, tolerance: float
) -> list[list[float]]:
    """Prototypes moved onto the queries by an entropic transport between uniform masses, written with its two potentials."""
    moved = [list(row) for row in support]
    n, m = len(support), len(query)
    for _ in range(passes):
        cost = [[math.fsum((a - b) ** 2 for a, b in zip(s, q, strict=True)) for q in query] for s in moved]
        top = max(max(row) for row in cost)
        cost = [[c / top for c in row] for row in cost]
        u, v = [0.0] * n, [0.0] * m
        for _ in range(iterations):
            last = list(u)
            u = [
                eps * (math.log(1 / n + 1e-8) - log_of_sum([(u[i] + v[j] - cost[i][j]) / eps for j in range(m)])) + u[i]
                for i in range(n)
            ]
            v = [
                eps * (math.log(1 / m + 1e-8) - log_of_sum([(u[i] + v[j] - cost[i][j]) / eps for i in range(n)])) + v[j]
                for j in range(m)
            ]
            if math.fsum(abs(a - b) for a, b in zip(u, last, strict=True)) < tolerance:
                break
        plan = [[math.exp((u[i] + v[j] - cost[i][j]) / eps) for j in range(m)] for i in range(n)]
        moved = [
            [math.fsum(plan[i][j] * query[j][d] for j in range(m)) / math.fsum(plan[i]) for d in range(len(query[0]))]
            for i in range(n)
        ]
    return moved


def logistic_gradient(weight: Matrix, bias: Vector, x: Matrix, y: Sequence[int], strength: float) -> list[list[float]]:
    """Gradient of half the squared weights plus strength times the sum of cross-entropies; the last column is the bias's."""
    gradient = [[*w, 0.0] for w in weight]
    for row, label in zip(x, y, strict=True):
        scores = [dot(w, row) + b for w, b in zip(weight, bias, strict=True)]
        whole = log_of_sum(scores)
        for c, score in enumerate(scores):
            error = strength * (math.exp(score - whole) - (c == label))
            for d, value in enumerate([*row, 1.0]):
                gradient[c][d] += error * value
    return gradient


def block_mask(height: int, width: int, share: float, draw: random.Random) -> list[list[bool]]:
    """Blocks are tried one after the other until the share is reached, or ten tries in a row add nothing."""
    wanted, covered = share * height * width, 0
    mask = [[False] * width for _ in range(height)]
    while covered < wanted:
        for _ in range(10):
            area = draw.uniform((min(height, width) // 3) ** 2, wanted - covered)
            ratio = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            tall, wide = round(math.sqrt(max(area, 0) * ratio)), round(math.sqrt(max(area, 0) / ratio))
            if tall >= height or wide >= width:
                continue
            top, left = draw.randint(0, height - tall), draw.randint(0, width - wide)
            block = [(i, j) for i in range(top, top + tall) for j in range(left, left + wide) if not mask[i][j]]
            if 1 <= len(block) <= wanted - covered:
                break
        else:
            return mask
        for i, j in block:
            mask[i][j] = True
        covered += len(block)
    return mask
