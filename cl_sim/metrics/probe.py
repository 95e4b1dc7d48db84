"""What embeddings know of the classes: read-outs fitted on a few labelled samples, none of which trains the net.

Of one run: S supports with labels, Q queries, C classes, D features. Features are standardised first, sample by sample.

Source: ours, after the usual probes of self-supervised learning; nearest neighbours: Wu et al. 2018, "Unsupervised Feature
Learning via Non-Parametric Instance Discrimination".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.metrics.fewshot import NAMES, SHOTS, Task, draw, episode_means, square_distances, standardise
from cl_sim.types import Batch

CHUNK = 1000  # queries compared at a time: with 2,000 supports 8 MB of similarities


def nearest_neighbours(
    support: Tensor, labels: Tensor, query: Tensor, classes: int, k: int = 20, tau: float = 0.07
) -> Tensor:
    """Votes of the k supports with the highest cosine, each of weight exp(cosine / tau); fewer supports: all vote.

    Shapes: support [S, D], labels [S], query [Q, D] -> [Q, C], rows summing to 1.    Source: Wu et al. 2018, eq. 14.
    """
    cosine, index = (F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).T).topk(min(k, len(support)), dim=1)
    weight = (cosine / tau).softmax(1)  # shares: the same order, and no overflow
    votes: Tensor = (weight[..., None] * F.one_hot(labels[index], classes)).sum(1)
    return votes


def ridge(support: Tensor, labels: Tensor, query: Tensor, classes: int, strength: float = 0.1) -> Tensor:
    """Least squares on one-hot labels with a free bias; `strength` times the mean eigenvalue of X'X is its penalty.

    Shapes: support [S, D], labels [S], query [Q, D] -> [Q, C].    Source: ours; Hoerl and Kennard 1970, "Ridge Regression".
    """
    target = F.one_hot(labels, classes).to(support.dtype)
    mean, bias = support.mean(0), target.mean(0)
    x = support - mean
    gram = x.T @ x
    penalty = strength * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    regular = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(regular, x.T @ (target - bias))
    scores: Tensor = (query - mean) @ weight + bias
    return scores


def nearest_mean(support: Tensor, labels: Tensor, query: Tensor, classes: int) -> Tensor:
    """Minus the squared distance to the mean of each class's supports; minus infinity for a class without any.

    Shapes: support [S, D], labels [S], query [Q, D] -> [Q, C].
    """
    member = F.one_hot(labels, classes).to(support.dtype)
    counts = member.sum(0)
    means = member.T @ support / counts.clamp(min=1)[:, None]
    return (-square_distances(query, means)).masked_fill(counts == 0, -torch.inf)


READOUTS: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {
    "linear": ridge,
    "knn": nearest_neighbours,
    "ncm": nearest_mean,
}


class Probe:
    """Accuracy of each read-out on the queries of each split, all classes of the supports competing at every evaluation.

    Chunks say by `support` [R, B] which of their samples are labelled; those are the same samples for every run. With
    `episodes` they also ask for so many few-shot episodes of the classes of all splits (`metrics.fewshot.NAMES`).
    """

    def __init__(self, runs: int, splits: int, device: torch.device | str = "cpu", seed: int = 42) -> None:
        self.runs, self.splits, self.device, self.seed = runs, splits, device, seed
        self.chunks: list[tuple[Tensor, Batch]] = []

    def update(self, output: Tensor, batch: Batch) -> None:
        """Add a chunk.    Shapes: output [R, B, D]; batch: y, split and support [R, B], perhaps episodes."""
        kept: Batch = {name: batch[name] for name in ("y", "split", "support", "episodes") if name in batch}
        self.chunks.append((output, kept))

    def result(self) -> dict[str, Tensor]:
        """Each accuracy [R, S], NaN for a split without queries; that of episodes for all splits alike; then starts afresh."""
        nothing = torch.full((self.runs, self.splits), torch.nan, dtype=torch.float64, device=self.device)
        count = int(self.chunks[0][1]["episodes"][0, 0]) if self.chunks and "episodes" in self.chunks[0][1] else 0
        found = {name: nothing.clone() for name in (*READOUTS, *NAMES * (count > 0))}
        if count:  # the same for every run, as the samples are
            y = torch.cat([b["y"][0] for _, b in self.chunks])
            episodes = draw(y.cpu().numpy(), Task(shots=max(SHOTS)), count, self.seed)
        for run in range(self.runs if self.chunks else 0):
            rows = standardise(torch.cat([output[run] for output, _ in self.chunks]).double())
            y, split, known = (torch.cat([b[name][run] for _, b in self.chunks]) for name in ("y", "split", "support"))
            for name, hits in accuracies(rows, y, known).items():
                each = [hits[split[~known] == s].double().mean() for s in range(self.splits)]
                found[name][run] = torch.stack(each)
            if count:
                for name, value in episode_means(rows, episodes).items():
                    found[name][run] = value
        self.chunks = []
        return found


def accuracies(rows: Tensor, y: Tensor, known: Tensor) -> dict[str, Tensor]:
    """Which queries each read-out answers rightly.    Shapes: rows [N, D], y and known [N] -> each [number not known] bool."""
    classes = int(y.max()) + 1
    parts = torch.split(rows[~known], CHUNK)
    return {
        name: torch.cat([read(rows[known], y[known], part, classes).argmax(1) for part in parts]) == y[~known]
        for name, read in READOUTS.items()
    }
