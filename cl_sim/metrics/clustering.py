"""How well clusters agree with classes, from the table that counts rows by cluster and class, and how tight they are.

Of one run: P clusters, C classes, M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_sim.memory.clusters import cluster_means, nearest_in_cluster


def table(clusters: Tensor, labels: Tensor, groups: int, classes: int) -> Tensor:
    """Rows by cluster and class; numbers outside 0..P-1 and 0..C-1 are left out.    Shapes: [M], [M] -> [P, C] float64."""
    in_cluster = (clusters[:, None] == torch.arange(groups, device=clusters.device)).double()
    in_class = (labels[:, None] == torch.arange(classes, device=labels.device)).double()
    return in_cluster.T @ in_class


def purity(counts: Tensor) -> Tensor:
    """Share of the rows that have the commonest class of their cluster; 0 without rows.    Shapes: [P, C] -> []."""
    share: Tensor = counts.amax(1).sum() / counts.sum().clamp(min=1)
    return share


def entropy(masses: Tensor) -> Tensor:
    """Entropy of the shares of these masses, in nats; 0 without mass.    Shapes: [N] -> []."""
    shares = masses / masses.sum().clamp(min=torch.finfo(masses.dtype).tiny)
    found: Tensor = -torch.special.xlogy(shares, shares).sum()
    return found


def mutual_information(counts: Tensor) -> Tensor:
    """Mutual information of cluster and class over the mean of their entropies, 0 to 1; 0 if both are single.

    Shapes: [P, C] -> [].    Source: Strehl and Ghosh 2002, "Cluster Ensembles", with the arithmetic mean.
    """
    ends = entropy(counts.sum(0)) + entropy(counts.sum(1))
    shared = (ends - entropy(counts.flatten())).clamp(min=0)
    return 2 * shared / ends.clamp(min=torch.finfo(counts.dtype).tiny)


def neighbour_precision(
    rows: Tensor, clusters: Tensor, prototypes: Tensor, labels: Tensor, there: Tensor, k: int = 5
) -> Tensor:
    """Share of the k neighbours of the rows in their clusters, each itself left out, that have its class; 0 without rows.

    Shapes: rows [M, D], clusters, labels and there (bool: which rows there are) [M], prototypes [P, D] -> [] float64.
    """
    allowed = there & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    index, cosine = nearest_in_cluster(rows, rows, clusters, prototypes, min(k, len(rows)), allowed)
    counted = (cosine > -torch.inf) & there[:, None]
    share: Tensor = ((labels[index] == labels[:, None]) & counted).sum() / counted.sum().clamp(min=1).double()
    return share


def davies_bouldin(rows: Tensor, clusters: Tensor, groups: int) -> Tensor:
    """Mean over the clusters of the worst ratio of two clusters' widths to the distance of their means; less is tighter.

    A width is the mean distance of the rows from their mean. Clusters without rows are left out, as are numbers outside
    0..P-1; 0 with fewer than two clusters.

    Shapes: rows [M, D], clusters [M] -> [] float64.    Source: Davies and Bouldin 1979, "A Cluster Separation Measure".
    """
    rows, number = rows.double(), torch.arange(groups, device=rows.device)
    member = (clusters[:, None] == number).double()  # [M, P]
    count = member.sum(0)
    means = cluster_means(rows, clusters, rows.new_zeros(groups, rows.shape[1]), gamma=0.0)
    width = (member * torch.cdist(rows, means)).sum(0) / count.clamp(min=1)
    apart = torch.cdist(means, means)
    used = count > 0
    pairs = used[:, None] & used & (number[:, None] != number) & (apart > 0)
    worst = ((width[:, None] + width) / apart.masked_fill(~pairs, 1)).masked_fill(~pairs, 0).amax(1)
    mean: Tensor = worst.sum() / used.sum().clamp(min=1)
    return mean
