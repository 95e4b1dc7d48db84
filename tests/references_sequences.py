"""Slow twins for sequence learning: one run, loops and `math`, written from the definitions. They share no code with cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]
Matrix = Sequence[Vector]


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def log_of_sum(terms: Vector) -> float:
    top = max(terms)
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def mean(values: Vector) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def anchors(
    x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int] | None
) -> list[tuple[float, list[float]]]:
    """Of every row that has negatives: its positive, and its negatives."""
    rows = [list(row) for row in (*x, *y)]
    if cosine:
        rows = [[value / math.sqrt(dot(row, row)) for value in row] for row in rows]
    size = len(x)
    found = []
    for r in range(2 * size):
        partner = (r + size) % (2 * size)
        others = [j for j in range(2 * size) if j not in (r, partner)]
        if labels is not None:
            others = [j for j in others if labels[j % size] != labels[r % size]]
        if others:
            found.append((dot(rows[r], rows[partner]) / tau, [dot(rows[r], rows[j]) / tau for j in others]))
    return found


def info_nce(x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int] | None) -> float:
    return mean([log_of_sum([p, *negatives]) - p for p, negatives in anchors(x, y, tau, cosine, labels)])


def margin_regulariser(
    x: Matrix, y: Matrix, tau: float, cosine: bool, labels: Sequence[int] | None, whole_batch: bool
) -> float:
    found = anchors(x, y, tau, cosine, labels)
    above, below = [], []
    for p, negatives in found:
        least, most = p, max(negatives)
        if whole_batch:
            least = min(one for one, _ in found)
            most = max(max(others) for _, others in found)
        low, high = min(least, most), max(least, most)
        above.append(max(p - low, 0))
        below += [max(high - n, 0) for n in negatives]
    return mean(above) + mean(below)


def crop(items: Sequence[int], start: int, left: int) -> list[int]:
    stretch = list(items[start : start + left])
    return stretch + [0] * (len(items) - left)


def affine(weights: Matrix, bias: Vector, x: Vector) -> list[float]:
    return [dot(row, x) + b for row, b in zip(weights, bias, strict=True)]


def normed(x: Vector, scale: Vector, shift: Vector) -> list[float]:
    middle = mean(x)
    spread = math.sqrt(mean([(value - middle) ** 2 for value in x]) + 1e-12)
    return [s * (value - middle) / spread + b for value, s, b in zip(x, scale, shift, strict=True)]


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def attend(queries: Matrix, keys: Matrix, values: Matrix, items: Sequence[int]) -> list[list[float]]:
    """One head over one history."""
    out = []
    for t, query in enumerate(queries):
        scores = [
            dot(query, key) / math.sqrt(len(query)) + (0 if j <= t and items[j] != 0 else -10_000)
            for j, key in enumerate(keys)
        ]
        whole = log_of_sum(scores)
        shares = [math.exp(score - whole) for score in scores]
        out.append([dot(shares, [value[w] for value in values]) for w in range(len(query))])
    return out


def sasrec(state: dict, layers: int, heads: int, items: Sequence[int]) -> list[list[float]]:
    """The output at every place of one history, from the weights as lists."""

    def linear(name: str, rows: Matrix) -> list[list[float]]:
        return [affine(state[f"{name}.weight"], state[f"{name}.bias"], row) for row in rows]

    def norm(name: str, rows: Matrix) -> list[list[float]]:
        return [normed(row, state[f"{name}.weight"], state[f"{name}.bias"]) for row in rows]

    def plus(one: Matrix, two: Matrix) -> list[list[float]]:
        return [[a + b for a, b in zip(u, v, strict=True)] for u, v in zip(one, two, strict=True)]

    x = norm("norm", plus([state["table.weight"][i] for i in items], state["position.weight"][: len(items)]))
    width = len(x[0]) // heads
    for number in range(layers):
        at = f"layers.{number}."
        parts = [linear(at + part, x) for part in ("query", "key", "value")]
        found = []
        for head in range(heads):
            cut = slice(head * width, (head + 1) * width)
            found.append(attend(*([row[cut] for row in part] for part in parts), items))
        joined = [[value for head in found for value in head[t]] for t in range(len(items))]
        x = norm(at + "attended", plus(x, linear(at + "merge", joined)))
        wide = [[gelu(value) for value in row] for row in linear(at + "widen", x)]
        x = norm(at + "fed", plus(x, linear(at + "narrow", wide)))
    return x


def rank(scores: Vector, target: int) -> float:
    if target == 0 or scores[target] == -math.inf:
        return math.inf
    place = 1
    for item, score in enumerate(scores):
        if item != 0 and score > scores[target]:
            place += 1
    return place


def ranking(scores: Matrix, targets: Sequence[int], k: int) -> tuple[float, float, float]:
    """HR@k, NDCG@k, MRR@k of one run and split."""
    places = [rank(row, target) for row, target in zip(scores, targets, strict=True)]
    within = [place for place in places if place <= k]
    total = len(places)
    return (
        len(within) / total,
        math.fsum(1 / math.log2(place + 1) for place in within) / total,
        math.fsum(1 / place for place in within) / total,
    )


def in_order(users: Sequence[Sequence[int]], order: str) -> list[tuple[int, int, int]]:
    """Events (user, position, item) of users given as lists, sorted by their keys."""
    events = []
    for u, items in enumerate(users, 1):
        for k, item in enumerate(items):
            key = {
                "relative": (k + 1) / (len(items) + 1),
                "round": float(k),
                "staggered": (u - 1) / len(users) + 0.1 * k / len(items),
            }[order]
            events.append((key, u, k, item))
    return [event[1:] for event in sorted(events)]


def prequential(events: Sequence[tuple[int, int, int]], items: int, batch: int, chain: bool, growing: bool) -> list:
    """Rank of every event with a history, before its batch is counted, by popularity or by followers of the last item."""
    count = dict.fromkeys(range(1, items + 1), 0)
    pairs: dict[tuple[int, int], int] = {}
    newest: dict[int, int] = {}
    found = []
    for start in range(0, len(events), batch):
        part = events[start : start + batch]
        before = []  # the item before each event of the batch, which may be in the same batch
        for user, position, item in part:
            before.append(newest.get(user, 0) if position else 0)
            newest[user] = item
        for (_, position, target), last in zip(part, before, strict=True):
            if position:
                known = [item for item in count if count[item] or not growing]
                order = sorted(known, key=lambda i: (-pairs.get((last, i), 0) if chain else 0, -count[i], i))
                found.append(order.index(target) + 1 if target in order else math.inf)
        for (_, position, target), last in zip(part, before, strict=True):
            count[target] += 1
            if position:
                pairs[last, target] = pairs.get((last, target), 0) + 1
    return found


def early_stop(values: Vector, patience: int) -> tuple[int, int]:
    """The best pass and the last one, from 0: the run ends with the pass that makes the counter exceed the patience."""
    best, place, waited = -math.inf, 0, 0
    for number, value in enumerate(values):
        if value > best:
            best, place, waited = value, number, 0
        else:
            waited += 1
        if 0 < patience < waited:
            return place, number
    return place, len(values) - 1


def left_out(users: Sequence[Sequence[int]], back: int, longest: int) -> list[tuple[list[int], int]]:
    """History and target of every user with three items or more: the last item (back=1) or the one before it (back=2)."""
    return [(list(items[:-back][-longest:]), items[-back]) for items in users if len(items) > 2]
