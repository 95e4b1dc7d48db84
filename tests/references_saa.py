"""Slow twins for sample-adaptive augmentation: loops and `math` (exact fractions where ties matter), no code of cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

Vector = Sequence[float]
Matrix = Sequence[Vector]


def history(values: Vector, index: Sequence[int], loss: Vector, decay: float) -> list[float]:
    after = list(values)
    for i, c in zip(index, loss, strict=True):  # the last one written counts
        after[i] = decay * values[i] + (1 - decay) * c
    return after


def otsu(values: Vector, bins: int = 256, edge: bool = False) -> float:
    """The definition in exact fractions: V_k = W1 W2 (M1 - M2)^2, the first largest, the centre of its bin."""
    exact = [Fraction(value) for value in values]
    low, high = min(exact), max(exact)
    if low == high:
        return float(low)
    width = (high - low) / bins
    counts, sums = [0] * bins, [Fraction(0)] * bins
    for value in exact:
        number = min(bins - 1, (value - low) // width)
        counts[number] += 1
        sums[number] += low + (number + Fraction(1, 2)) * width
    best, found, w1, s1 = Fraction(-1), 0, 0, Fraction(0)
    for k in range(bins - 1):
        w1, s1 = w1 + counts[k], s1 + sums[k]
        if counts[k] or k == 0:  # behind an empty bin the cut ties with the one before
            w2, s2 = len(exact) - w1, sum(sums) - s1
            between = w1 * w2 * (s1 / w1 - s2 / w2) ** 2
            if between > best:
                best, found = between, k
    return float(low + (found + (1 if edge else Fraction(1, 2))) * width)


def flags(before: Sequence[bool], values: Vector, threshold: float) -> list[bool]:
    after = list(before)
    for i, value in enumerate(values):
        if value < threshold:
            after[i] = True
        if value > threshold:
            after[i] = False
    return after


def pool_step(
    h: Vector, e: Sequence[bool], step: int, index: Sequence[int], loss: Vector, *, decay: float, epoch: int, first: int
) -> tuple[list[float], list[bool]]:
    """History and flags of a whole pool after one step (from 0); `first` is the first epoch (from 0) that ends in a selection."""
    after, marks = history(h, index, loss, decay), list(e)
    if (step + 1) % epoch == 0 and (step + 1) // epoch - 1 >= first:
        marks = flags(marks, after, otsu(after))
    return after, marks


def nearest_mean(raw: Matrix, view: Matrix, y: Sequence[int], classes: int) -> list[bool | None]:
    """Is the mean of its class, without the image itself, the nearest by the cosine? None: its class has no other image."""
    answers: list[bool | None] = []
    for i, seen in enumerate(view):
        cosines = []
        for c in range(classes):
            others = [row for j, row in enumerate(raw) if j != i and y[j] == c]
            mean = [math.fsum(column) / len(others) for column in zip(*others, strict=True)]
            length = math.sqrt(math.fsum(value * value for value in mean))
            dot = math.fsum(a * b for a, b in zip(mean, seen, strict=False))
            cosines.append(dot / length if others else -math.inf)
        answers.append(None if cosines[y[i]] == -math.inf else cosines.index(max(cosines)) == y[i])
    return answers


def status(selected: Sequence[int], classes: int, before: Vector, warm_up: bool) -> list[float]:
    rows = [s for s in selected if s >= -1]
    if len(set(rows)) < 2:
        return list(before)
    counts = [rows.count(c) for c in range(classes)]
    most = max([*counts, rows.count(-1)]) if warm_up else max(counts)
    return [n / most for n in counts]


def log_softmax(row: Vector) -> list[float]:
    top = max(row)
    whole = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - whole for v in row]


def fixmatch(weak: Matrix, strong: Matrix, threshold: Vector) -> tuple[float, list[float]]:
    """Thresholds per class; the loss over all rows, and every row's cross-entropy."""
    total, each = 0.0, []
    for w, s in zip(weak, strong, strict=True):
        shares = [math.exp(v) for v in log_softmax(w)]
        guess = shares.index(max(shares))
        each.append(-log_softmax(s)[guess])
        if shares[guess] >= threshold[guess]:
            total += each[-1]
    return total / len(weak), each


def joined(a: list[list[float]], b: list[list[float]], left: bool) -> list[list[float]]:
    """One channel of one image."""
    height, width = len(a), len(a[0])
    out = [list(row) for row in a]
    for row in range(height):
        for column in range(width):
            if (left and column < width // 2) or (not left and row < height // 2):
                out[row][column] = b[row][column]
    return out


def labelled(logits: Matrix, labels: Sequence[int]) -> float:
    each = [-log_softmax(row)[y] for row, y in zip(logits, labels, strict=True) if y >= 0]
    return math.fsum(each) / len(each) if each else 0.0


def average(path: Vector, decay: float, ramp: bool) -> float:
    """Of one weight: its values before the first and after every step."""
    kept = path[0]
    for k, value in enumerate(path[1:]):
        a = min(1 - 1 / (k + 1), decay) if ramp else decay
        kept = a * kept + (1 - a) * value
    return kept
