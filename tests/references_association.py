"""Slow twins of the association metrics: loops, `math`, and every assignment tried in turn."""

from __future__ import annotations

import math
from itertools import permutations

Frames = list[list[int]]
Tables = list[list[list[float]]]


def best_pairs(gain: list[list[float]]) -> list[tuple[int, int]]:
    """The one-to-one assignment of all rows or all columns with the largest sum, whichever are fewer."""
    rows, columns = len(gain), len(gain[0]) if gain else 0
    if not rows or not columns:
        return []
    if rows > columns:
        turned = [[gain[r][c] for r in range(rows)] for c in range(columns)]
        return [(r, c) for c, r in best_pairs(turned)]
    best = max(permutations(range(columns), rows), key=lambda p: sum(gain[r][c] for r, c in enumerate(p)))
    return list(enumerate(best))


def hota(truth: Frames, track: Frames, similarity: Tables) -> tuple[float, float, float]:
    n_truth: dict[int, int] = {}
    n_track: dict[int, int] = {}
    overlap: dict[tuple[int, int], float] = {}
    for own, other, s in zip(truth, track, similarity, strict=True):
        for g in own:
            n_truth[g] = n_truth.get(g, 0) + 1
        for p in other:
            n_track[p] = n_track.get(p, 0) + 1
        for i, g in enumerate(own):
            for j, p in enumerate(other):
                whole = sum(s[i]) + sum(line[j] for line in s) - s[i][j]
                if whole > 0:
                    overlap[g, p] = overlap.get((g, p), 0) + s[i][j] / whole
    results = []
    for step in range(1, 20):
        alpha = step / 20
        pairs: dict[tuple[int, int], int] = {}
        for own, other, s in zip(truth, track, similarity, strict=True):
            gain = [
                [
                    overlap.get((g, p), 0) / (n_truth[g] + n_track[p] - overlap.get((g, p), 0)) * s[i][j]
                    for j, p in enumerate(other)
                ]
                for i, g in enumerate(own)
            ]
            for i, j in best_pairs(gain):
                if s[i][j] >= alpha - 1e-12:
                    pairs[own[i], other[j]] = pairs.get((own[i], other[j]), 0) + 1
        tp = sum(pairs.values())
        there, claimed = sum(n_truth.values()), sum(n_track.values())
        deta = tp / max(there + claimed - tp, 1)
        assa = sum(n * n / (n_truth[g] + n_track[p] - n) for (g, p), n in pairs.items()) / max(tp, 1)
        results.append((math.sqrt(deta * assa), deta, assa))
    hotas, detas, assas = zip(*results, strict=True)
    return sum(hotas) / 19, sum(detas) / 19, sum(assas) / 19


def idf1(truth: Frames, track: Frames, similarity: Tables) -> float:
    who = sorted({g for own in truth for g in own})
    what = sorted({p for other in track for p in other})
    together = [[0.0] * len(what) for _ in who]
    for own, other, s in zip(truth, track, similarity, strict=True):
        for i, g in enumerate(own):
            for j, p in enumerate(other):
                together[who.index(g)][what.index(p)] += s[i][j] >= 0.5
    idtp = sum(together[r][c] for r, c in best_pairs(together))
    return 2 * idtp / max(sum(map(len, truth)) + sum(map(len, track)), 1)


def switches_and_accuracy(truth: Frames, track: Frames, similarity: Tables) -> tuple[int, int, float, float]:
    """Switches, matches, association accuracy and ReID (NaN where there is nothing to be right about)."""
    before: dict[int, int] = {}
    latest: dict[int, tuple[int, int]] = {}
    switches = matches = 0
    right, gapped = [], []
    for t, (own, other, s) in enumerate(zip(truth, track, similarity, strict=True)):
        gain = [
            [(1000 * (before.get(g) == p) + s[i][j]) if s[i][j] >= 0.5 else 0.0 for j, p in enumerate(other)]
            for i, g in enumerate(own)
        ]
        now = {own[i]: other[j] for i, j in best_pairs(gain) if gain[i][j] > 0}
        for g, p in now.items():
            matches += 1
            if g in latest:
                then, seen = latest[g]
                switches += p != seen
                right.append(p == seen)
                if t - then > 1:
                    gapped.append(p == seen)
        for g, p in now.items():
            latest[g] = (t, p)
        if own and other:  # other frames are passed over
            before = now
    return switches, matches, _share(right), _share(gapped)


def _share(values: list[bool]) -> float:
    return sum(values) / len(values) if values else math.nan
