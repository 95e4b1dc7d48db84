"""Slow twins of the tracking functions: loops and `math` alone."""

from __future__ import annotations

import math

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cos(a: Vector, b: Vector) -> float:
    return dot(a, b) / (max(math.sqrt(dot(a, a)), 1e-8) * max(math.sqrt(dot(b, b)), 1e-8))


def bank_contrast(items: list[tuple[Vector, list[Vector], list[Vector]]]) -> tuple[float, float]:
    """Means over the items that have a positive and a negative."""
    embed, cosine = [], []
    for anchor, positives, negatives in items:
        if not positives or not negatives:
            continue
        total = 0.0
        for p in positives:
            for n in negatives:
                total += math.exp(dot(anchor, n) - dot(anchor, p))
        embed.append(math.log(1 + total))
        gaps = [(cos(anchor, p) - 1) ** 2 for p in positives] + [cos(anchor, n) ** 2 for n in negatives]
        cosine.append(sum(gaps) / len(gaps))
    if not embed:
        return 0.0, 0.0
    return sum(embed) / len(embed), sum(cosine) / len(cosine)


def running_average(average: Vector, history: list[Vector], new: Vector) -> Vector:
    if not history:
        return list(new)
    beta = max(0.0, sum(cos(h, new) for h in history) / len(history))
    return [(1 - beta) * a + beta * x for a, x in zip(average, new, strict=True)]


def bi_softmax(candidates: list[Vector], averages: list[Vector]) -> list[list[float]]:
    s = [[dot(c, a) for a in averages] for c in candidates]
    result = []
    for i, row in enumerate(s):
        line = []
        for j, value in enumerate(row):
            over_tracks = math.exp(value) / sum(math.exp(v) for v in row)
            over_candidates = math.exp(value) / sum(math.exp(s[k][j]) for k in range(len(s)))
            line.append((over_tracks + over_candidates) / 2)
        result.append(line)
        assert i < len(s)
    return result


def temporal(history: list[Vector], scores: list[float]) -> Vector:
    size = len(history)
    weights = [score + (j + 1) / size for j, score in enumerate(scores)]
    return [sum(w * h[d] for w, h in zip(weights, history, strict=True)) / sum(weights) for d in range(len(history[0]))]


class Bank:
    """As it would be written first: a dictionary of lists."""

    def __init__(self) -> None:
        self.average: dict[int, Vector] = {}
        self.stored: dict[int, list[Vector]] = {}
        self.true: dict[int, list[Vector]] = {}

    def observe(self, key: int, vector: Vector, true: bool) -> None:
        self.average[key] = running_average(self.average.get(key, []), self.stored.get(key, []), vector)
        self.stored.setdefault(key, []).append(vector)
        if true:
            self.true.setdefault(key, []).append(vector)


def clip_items(
    emb: list[list[Vector]],
    present: list[list[bool]],
    match: list[list[int]],
    negatives: str,
    average: list[list[bool]],
    wrong: list[list[int]],
) -> list[tuple[Vector, list[Vector], list[Vector]]]:
    """The items of one clip, frame by frame; `average[i][t]` tells whether the coin fell on the running average."""
    bank, items = Bank(), []
    for t, rows in enumerate(emb):
        if t > 0:
            for i, here in enumerate(present):
                if not here[t]:
                    continue
                if bank.true.get(i):
                    positive = bank.average[i] if average[i][t] else bank.true[i][-1]
                else:
                    later = [s for s in range(t + 1, len(emb)) if here[s]]
                    if not later:
                        continue
                    positive = emb[later[0]][match[i][later[0]]]
                before = emb[t - 1]
                if negatives == "frame":
                    left_out = match[i][t - 1] if here[t - 1] else -1
                    others = [row for q, row in enumerate(before) if q != left_out]
                else:
                    others = [vector for key, vector in sorted(bank.average.items()) if key != i]
                    if negatives == "bank+background":
                        owned = {match[j][t - 1] for j in range(len(present)) if present[j][t - 1]}
                        others += [row for q, row in enumerate(before) if q not in owned]
                if others:
                    items.append((rows[match[i][t]], [positive], others))
        for i, here in enumerate(present):
            if wrong[i][t] >= 0:
                bank.observe(i, rows[wrong[i][t]], here[t])
                if here[t]:  # the bank is disturbed, what was truly seen is not
                    bank.true[i][-1] = rows[match[i][t]]
            elif here[t]:
                bank.observe(i, rows[match[i][t]], True)
    return items


def pair_items(
    emb: list[list[Vector]], present: list[list[bool]], match: list[list[int]], key: int, references: list[int]
) -> list[tuple[Vector, list[Vector], list[Vector]]]:
    items = []
    for i, here in enumerate(present):
        if not here[key]:
            continue
        positives = [emb[s][match[i][s]] for s in references if here[s]]
        negatives = [row for s in references for q, row in enumerate(emb[s]) if not (here[s] and match[i][s] == q)]
        if positives and negatives:
            items.append((emb[key][match[i][key]], positives, negatives))
    return items


class Track:
    def __init__(self, number: int) -> None:
        self.id, self.average, self.history, self.seen, self.last = number, [], [], 0, 0


def follow(
    emb: list[list[Vector]], scores: list[list[float]], threshold: float = 0.3, max_age: int = 20, keep: int = 10
) -> list[list[int]]:
    """Section by section: likeness, greedy links with frame weighting, births, update, deaths. Scores must differ."""
    tracks: list[Track] = []
    given, result = 0, []
    for t, candidates in enumerate(emb):
        ids = [-1] * len(candidates)
        order = sorted(range(len(candidates)), key=lambda r: -scores[t][r])
        order = [r for r in order if scores[t][r] > 0.01] or order[:1]
        likeness = {}
        if tracks and order:
            table = bi_softmax([candidates[r] for r in order], [track.average for track in tracks])
            likeness = {r: list(line) for r, line in zip(order, table, strict=True)}
        for r in order:
            if not tracks:
                break
            row = likeness[r]
            near = [k for k, value in enumerate(row) if value > threshold]
            if len(near) > 1:
                mean = sum(tracks[k].seen for k in near) / len(near)
                best = max(range(len(row)), key=lambda k: row[k] * (tracks[k].seen if k in near else mean))
            else:
                best = max(range(len(row)), key=lambda k: row[k])
            if row[best] > threshold:
                ids[r] = tracks[best].id
                for line in likeness.values():
                    line[best] = 0.0
        for r in order:
            if ids[r] < 0 and scores[t][r] > 0.01:
                tracks.append(Track(given))
                ids[r] = given
                given += 1
        for r in order:
            for track in tracks:
                if track.id == ids[r]:
                    track.average = running_average(track.average, track.history, candidates[r])
                    track.history = [*track.history, candidates[r]][-keep:]
                    track.seen += 1
                    track.last = t
        tracks = [track for track in tracks if t - track.last <= max_age]
        result.append(ids)
    return result


def assignment_cost(
    scores: list[Vector], masks: list[Vector], labels: list[int], true: list[Vector]
) -> list[list[float]]:
    """Two times the class cost, five times each mask cost; masks as flat lists of cells."""
    table = []
    for own, mask in zip(scores, masks, strict=True):
        line = []
        for label, target in zip(labels, true, strict=True):
            total = sum(math.exp(s) for s in own)
            named = -math.exp(own[label]) / total if label >= 0 else 0.0
            entropy, overlap, drawn = 0.0, 0.0, 0.0
            for logit, wanted in zip(mask, target, strict=True):
                p = 1 / (1 + math.exp(-logit))
                entropy -= (wanted * math.log(p) + (1 - wanted) * math.log(1 - p)) / len(mask)
                overlap += p * wanted
                drawn += p
            dice = 1 - (2 * overlap + 1) / (drawn + sum(target) + 1)
            line.append(2 * named + 5 * entropy + 5 * dice)
        table.append(line)
    return table
