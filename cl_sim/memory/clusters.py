"""Clustered memory: rows that are grouped around prototypes, by a balanced assignment.

The functions are written for one run. n samples, M rows of the memory, P prototypes, D features.

Source: Poulakakis-Daktylidis and Jamali-Rad 2024, "BECLR: Batch Enhanced Contrastive Few-Shot Learning" (DyCE).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def balanced_assignment(scores: Tensor, eps: float, iterations: int, share: Tensor | None = None) -> Tensor:
    """Soft assignment of samples to prototypes in which every prototype takes its share of all samples.

    Approaches the Q that maximises sum(Q * scores) + eps * entropy(Q) under both constraints. The last step of an iteration
    is that of the samples, so each row sums to 1 while column j sums to n * share[j] more and more closely. A sample whose
    scores are all minus infinity takes no part: its row is 0.

    Shapes: scores [n, P] (larger: nearer), share [P] summing to 1 (none: 1 / P each) -> Q [n, P].    Units: iterations >= 1.
    Source: Cuturi 2013, "Sinkhorn Distances", as used by BECLR. Departures: in logarithms, so that no eps overflows.
    """
    logits = scores / eps
    mass = torch.ones_like(logits[0]) if share is None else share.to(logits.dtype)  # a common factor cancels
    row, column, lowest = torch.zeros_like(logits[:, 0]), torch.zeros_like(logits[0]), torch.finfo(logits.dtype).min
    for _ in range(iterations):
        column = mass.log() - (logits - row[:, None]).logsumexp(0).clamp(min=lowest)
        row = (logits + column).logsumexp(1).clamp(min=lowest)
    return (logits + column - row[:, None]).exp()


def cluster_means(rows: Tensor, labels: Tensor, old: Tensor, gamma: float) -> Tensor:
    """Prototypes moved towards the mean of their rows: gamma * old + (1 - gamma) * mean; a cluster without rows keeps its own.

    Labels outside 0..P-1 belong to no cluster.

    Shapes: rows [M, D], labels [M], old [P, D] -> [P, D].    Source: BECLR. Departures: the released code divides the sums
    above an empty cluster by the counts of other clusters, we do not.
    """
    member = (labels[:, None] == torch.arange(len(old), device=labels.device)).to(rows.dtype)  # [M, P]
    counts = member.sum(0)[:, None]
    means = member.T @ rows / counts.clamp(min=1)
    return torch.where(counts > 0, gamma * old + (1 - gamma) * means, old)


def nearest_in_cluster(
    z: Tensor, rows: Tensor, labels: Tensor, prototypes: Tensor, k: int, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows most similar to each sample among those of its cluster, best first; similarity is the cosine.

    A sample's cluster is that of the nearest prototype. Where it has fewer than k allowed rows, the whole memory is
    searched. If that has fewer than k, the rest is padding with similarity minus infinity.

    Shapes: z [n, D], rows [M, D], labels [M], prototypes [P, D], allowed [M] or [n, M] bool -> row numbers and similarities
    [n, k], k <= M.
    Source: BECLR. Departures: the released code uses places inside the cluster as row numbers, we return row numbers.
    """
    z, rows = F.normalize(z, dim=-1), F.normalize(rows, dim=-1)
    own = (z @ F.normalize(prototypes, dim=-1).T).argmax(1)  # [n]
    inside = labels == own[:, None]  # [n, M]
    searched = torch.ones_like(inside) if allowed is None else allowed.expand_as(inside)
    inside = inside & searched
    searched = torch.where(inside.sum(1, keepdim=True) >= k, inside, searched)
    similarity, index = (z @ rows.T).masked_fill(~searched, -torch.inf).topk(k, dim=1)
    return index, similarity


def nearest_prototype(rows: Tensor, prototypes: Tensor) -> Tensor:
    """The prototype with the highest cosine to each row.    Shapes: rows [M, D], prototypes [P, D] -> [M]."""
    return (rows @ F.normalize(prototypes, dim=-1).T).argmax(1)


def first_clusters(rows: Tensor, valid: Tensor, start: Tensor, steps: int) -> Tensor:
    """K-means on cosines from given prototypes: so many rounds of assignment and means, whatever happens in them.

    Shapes: rows [M, D], valid [M] bool, start [P, D] -> [P, D].    Source: Lloyd 1982, "Least Squares Quantization in PCM".
    Departures: BECLR's code restarts k-means++ ten times; a fixed number of rounds reads no result on the host (ours).
    """
    for _ in range(steps):
        labels = nearest_prototype(rows, start).masked_fill(~valid, -1)
        start = cluster_means(rows, labels, start, 0.0)
    return start


def refill(prototypes: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Each empty cluster's prototype becomes one of the rows that are least like their own prototype, the worst first.

    Rows with a label outside 0..P-1 take no part.    Shapes: prototypes [P, D], rows [M, D], labels [M], M >= P -> [P, D].
    """
    clusters = len(prototypes)
    member = labels[:, None] == torch.arange(clusters, device=labels.device)  # [M, P]
    own = F.normalize(prototypes, dim=-1)[labels.clamp(0, clusters - 1)]
    likeness = (F.normalize(rows, dim=-1) * own).sum(-1).masked_fill(~member.any(1), torch.inf)
    worst = likeness.topk(clusters, largest=False).indices  # [P]
    empty = ~member.any(0)
    number = (empty.long().cumsum(0) - 1).clamp(min=0)  # of each empty cluster among them
    return torch.where(empty[:, None], rows[worst[number]], prototypes)


def memory_rows(scale: int, clusters: int, batch: int) -> int:
    """Rows of the published memory: `scale` per cluster, rounded up to whole steps of two views, and one.

    Units: batch counts the images of one view.    Source: the released code of BECLR (scale 40: 8193 rows for 200 clusters
    and 256 images).
    """
    step = 2 * batch
    return (scale * clusters // step + 1) * step + 1
