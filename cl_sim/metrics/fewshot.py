"""Few-shot evaluation of features: episodes of N classes with K labelled samples each, several read-outs, one interval.

Everything is for one run's features and batched over episodes: E episodes, N classes, K supports and Q queries per class,
D features. Features are standardised first, sample by sample.

Source: Poulakakis-Daktylidis and Jamali-Rad 2024, "BECLR: Batch Enhanced Contrastive Few-Shot Learning", and its code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.errors import BadConfig
from cl_sim.rng import host_rng

Readout = Literal["nearest_mean", "logistic"]
TINY = 1e-8  # added to the masses of a transport before their logarithm
CHUNK = 100  # episodes evaluated at once: 75 queries of 512 features each take 15 MB
LENGTHS = 8  # step lengths tried by the Newton method: 1, 1/2, 1/4, ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What an episode asks."""

    ways: int = 5  # classes
    shots: int = 1  # labelled samples of each
    queries: int = 15  # samples of each to be told apart

    def __post_init__(self) -> None:
        at_least(self, ways=2, shots=1, queries=1)


class Episodes(NamedTuple):
    """Row numbers of the drawn samples.    Shapes: support [E, N, K], query [E, N, Q]."""

    support: Tensor
    query: Tensor

    def with_shots(self, shots: int) -> Episodes:
        """The same episodes with only the first supports of each class; the queries stay."""
        return Episodes(self.support[:, :, :shots], self.query)

    def split(self, size: int) -> Iterator[Episodes]:
        """The same episodes, so many at a time."""
        for support, query in zip(torch.split(self.support, size), torch.split(self.query, size), strict=True):
            yield Episodes(support, query)


def draw(labels: NDArray[np.int64], task: Task, count: int, seed: int) -> Episodes:
    """Episodes from labelled rows: classes, then rows of each, uniform and none twice within an episode.

    The same for every strategy, as they depend on labels, task, count and seed alone. Draw for the most shots and cut with
    `with_shots`: then all share their queries, as published.

    Shapes: labels [N rows].    Raises: BadConfig if there are too few classes with enough rows.
    """
    need = task.shots + task.queries
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    members = [rows for rows in members if len(rows) >= need]
    if len(members) < task.ways:
        raise BadConfig(
            f"{task.ways} classes of {need} samples are needed, but only {len(members)} classes have as many; "
            "ask for fewer ways, shots or queries"
        )
    rng = host_rng(seed, "episodes")
    drawn = np.empty((count, task.ways, need), dtype=np.int64)
    for episode in drawn:
        for place, c in enumerate(rng.choice(len(members), task.ways, replace=False)):
            episode[place] = rng.choice(members[c], need, replace=False)
    whole = torch.from_numpy(drawn)
    return Episodes(whole[..., : task.shots], whole[..., task.shots :])


def standardise(x: Tensor) -> Tensor:
    """Each row less its mean, over its standard deviation (ddof 1); a constant row becomes 0.    Shapes: [..., D] -> same."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)
    return centred / variance.clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def square_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances, never below 0.    Shapes: [..., N, D], [..., M, D] -> [..., N, M]."""
    lengths = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return (lengths - 2 * x @ y.mT).clamp(min=0)


def opta(
    support: Tensor,
    query: Tensor,
    eps: float = 0.05,
    passes: int = 1,
    iterations: int = 1000,
    tolerance: float = 1e-4,
    look_every: int = 0,
) -> Tensor:
    """Prototypes moved onto unlabelled queries by optimal transport between uniform masses, `passes` times.

    Costs are squared distances over the largest one. The two potentials of the transport with entropy weight eps are found
    by turns; a problem rests once the first has moved by less than `tolerance` in all. It is transductive: it uses all
    queries at once and expects equally many of each class.

    With `look_every` the host looks whenever so many iterations have passed whether all problems rest, and stops; with 0,
    as under vmap, all iterations run. The values do not depend on it.

    Shapes: support [..., N, D], query [..., Q, D] -> [..., N, D].
    Source: BECLR (OpTA), as released; Cuturi 2013, "Sinkhorn Distances".
    """
    for _ in range(passes):
        cost = square_distances(support, query)
        cost = cost / cost.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(cost.dtype).tiny)
        plan = _transport(cost, eps, iterations, tolerance, look_every)
        support = plan @ query / plan.sum(-1, keepdim=True)
    return support


def _transport(cost: Tensor, eps: float, iterations: int, tolerance: float, look_every: int) -> Tensor:
    """Entropic transport plan between uniform masses.    Shapes: [..., N, Q] -> same."""
    scaled = cost / eps
    own, other = (math.log(1 / size + TINY) for size in cost.shape[-2:])
    u, v = torch.zeros_like(scaled[..., 0]), torch.zeros_like(scaled[..., 0, :])  # potentials over eps
    moving = torch.ones_like(u[..., :1], dtype=torch.bool)  # [..., 1]
    for step in range(1, iterations + 1):
        new_u = own - (v[..., None, :] - scaled).logsumexp(-1)
        new_v = other - (new_u[..., None] - scaled).logsumexp(-2)
        moved = (new_u - u).abs().sum(-1, keepdim=True) * eps
        u, v = torch.where(moving, new_u, u), torch.where(moving, new_v, v)
        moving = moving & (moved >= tolerance)
        if look_every and step % look_every == 0 and not bool(moving.any()):
            break
    return (u[..., None] + v[..., None, :] - scaled).exp()


def adapted(support: Tensor, query: Tensor, shots: int, **settings: Any) -> Tensor:
    """Class means moved as published: five passes for one shot; for more, one pass, of which 0.7 are taken.

    Shapes: class means [..., N, D], queries [..., Q, D] -> [..., N, D].
    """
    if shots == 1:
        return opta(support, query, passes=5, **settings)
    return 0.7 * opta(support, query, passes=1, **settings) + 0.3 * support


def logistic(x: Tensor, y: Tensor, classes: int, strength: float = 1.0, iterations: int = 25) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: minimises |W|^2 / 2 + strength * sum of cross-entropies; biases are free.

    Newton's method in the span of the samples, each step the best of eight lengths; the cost per problem is that of solving
    (C * (n + 1)) linear equations, so it is meant for few samples. The biases sum to 0.

    Shapes: x [..., n, D], y [..., n] -> W [..., C, D], b [..., C].
    """
    n, lead = x.shape[-2], x.shape[:-2]
    gram = torch.cat([x @ x.mT, torch.ones_like(x[..., :1])], -1)  # [..., n, n + 1]; W = A x, scores = [A b] gram'
    labels = F.one_hot(y, classes).to(x.dtype)  # [..., n, C]
    # unknowns [A b] [..., C, n + 1]; equations: A + strength * (P - Y)' = 0, and sum of (P - Y) = 0 over samples
    unknown = x.new_zeros(*lead, classes, n + 1)
    fixed = torch.zeros(classes, n + 1, classes, n + 1, dtype=x.dtype, device=x.device)
    each, own = torch.arange(classes, device=x.device), torch.arange(n, device=x.device)
    fixed[each[:, None], own, each[:, None], own] = 1
    fixed[:, n, :, n] = 1 / classes  # the biases' own equation: their sum is 0
    lengths = 0.5 ** torch.arange(LENGTHS, dtype=x.dtype, device=x.device)
    sums = strength * torch.cat([torch.eye(n, dtype=x.dtype, device=x.device), x.new_ones(1, n)])  # [n + 1, n]

    def objective(a: Tensor) -> Tensor:
        scores = gram @ a.mT  # [..., n, C]
        inner = (a[..., :n] @ gram[..., :n] * a[..., :n]).sum((-2, -1))
        return inner / 2 - strength * (scores.log_softmax(-1) * labels).sum((-2, -1))

    for _ in range(iterations):
        p = (gram @ unknown.mT).softmax(-1)  # [..., n, C]
        rest = torch.cat([unknown[..., :n], unknown[..., n:].mean(-2, keepdim=True).expand_as(unknown[..., n:])], -1)
        rest = rest + (p - labels).mT @ sums.mT  # [..., C, n + 1]
        spread = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]  # [..., n, C, C]
        slope = fixed + torch.einsum("jm,...mcd,...mi->...cjdi", sums, spread, gram)
        size = classes * (n + 1)
        step = torch.linalg.solve(slope.reshape(*lead, size, size), rest.reshape(*lead, size)).view_as(unknown)
        tried = torch.stack([unknown - length * step for length in lengths])  # [8, ..., C, n + 1]
        best = torch.stack([objective(one) for one in tried]).argmin(0)
        index = best[None, ..., None, None].expand_as(tried[:1])
        unknown = tried.gather(0, index)[0]
    return unknown[..., :n] @ x, unknown[..., n]


def answers(support: Tensor, query: Tensor, readout: Readout = "nearest_mean", transport: bool = False) -> Tensor:
    """Class scores of the queries of episodes, from the class means of their supports.

    `logistic` is fitted on the means alone, one per class, as published. With `transport` the means are first adapted to
    the queries.

    Shapes: support [E, N, K, D], query [E, M, D], both standardised -> [E, M, N].
    """
    means, shots = support.mean(2), support.shape[2]
    if transport:
        means = adapted(means, query, shots, look_every=10)
    if readout == "nearest_mean":
        return -square_distances(query, means)
    ways = means.shape[1]
    weight, bias = logistic(means, torch.arange(ways, device=means.device).expand(len(means), -1), ways)
    return query @ weight.mT + bias[:, None]


def episode_accuracy(
    features: Tensor, episodes: Episodes, readout: Readout = "nearest_mean", transport: bool = False
) -> Tensor:
    """Share of right answers in each episode.    Shapes: features [rows, D] -> [E] float64."""
    features, found = standardise(features), []
    for part in episodes.split(CHUNK):
        support, query = features[part.support.to(features.device)], features[part.query.to(features.device)]
        scores = answers(support, query.flatten(1, 2), readout, transport)  # [E, N * Q, N]
        ways, queries = query.shape[1:3]
        truth = torch.arange(ways, device=scores.device).repeat_interleave(queries)
        found.append((scores.argmax(-1) == truth).double().mean(1))
    return torch.cat(found)


def interval(accuracies: Tensor) -> tuple[float, float]:
    """Mean over episodes and half the width of its 95 % interval, 1.96 * std / sqrt(E) with ddof 0, as published."""
    values = accuracies.double()
    return float(values.mean()), float(1.96 * values.std(correction=0) / math.sqrt(len(values)))


VARIANTS: dict[str, tuple[Readout, bool]] = {
    "": ("nearest_mean", False),
    "_opta": ("nearest_mean", True),
    "_logistic": ("logistic", False),
    "_logistic_opta": ("logistic", True),
}
SHOTS = (1, 5)
NAMES = tuple(f"shot{shots}{variant}" for shots in SHOTS for variant in (*VARIANTS, "_half"))


class Episodic:
    """Mean accuracy over episodes of 5 classes, 1 and 5 labelled samples of each and 15 queries of each, per split.

    All shots, read-outs and runs have the same episodes. `shot1_half` and `shot5_half` are the half-widths of the intervals
    of the plain ones over episodes. Chunks say by `episodes` how many to draw.
    """

    def __init__(self, runs: int, splits: int, device: torch.device | str = "cpu", seed: int = 42) -> None:
        self.runs, self.splits, self.device, self.seed = runs, splits, device, seed
        self.chunks: list[tuple[Tensor, dict[str, Tensor]]] = []

    def update(self, output: Tensor, batch: dict[str, Tensor]) -> None:
        """Add a chunk.    Shapes: output [R, B, D]; batch: y, split and episodes [R, B], the same for every run."""
        self.chunks.append((output, {name: batch[name][0] for name in ("y", "split", "episodes")}))

    def result(self) -> dict[str, Tensor]:
        """Each mean [R, S], NaN for a split without samples; then starts afresh."""
        found = {name: torch.full((self.runs, self.splits), torch.nan, dtype=torch.float64) for name in NAMES}
        if self.chunks:
            features = torch.cat([output for output, _ in self.chunks], 1)
            y, split, count = (torch.cat([b[name] for _, b in self.chunks]) for name in ("y", "split", "episodes"))
            for s in range(self.splits):
                own = split == s
                if not bool(own.any()):
                    continue
                task = Task(shots=max(SHOTS))
                episodes = draw(y[own].cpu().numpy(), task, int(count[0]), self.seed)
                for run in range(self.runs):
                    for name, value in episode_means(features[run][own], episodes).items():
                        found[name][run, s] = value
        self.chunks = []
        return {name: value.to(self.device) for name, value in found.items()}


def episode_means(features: Tensor, episodes: Episodes) -> dict[str, float]:
    """What `Episodic` reports of one run.    Shapes: features [rows, D]."""
    found = {}
    for shots in SHOTS:
        for variant, (readout, transport) in VARIANTS.items():
            mean, half = interval(episode_accuracy(features, episodes.with_shots(shots), readout, transport))
            found[f"shot{shots}{variant}"] = mean
            if not variant:
                found[f"shot{shots}_half"] = half
    return found
