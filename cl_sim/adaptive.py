"""Sample-adaptive augmentation and the curriculum of FlexMatch: what is kept per sample, as pure functions of one run.

A sample has a running value of its loss; Otsu's threshold splits the samples into low ("naive", they teach little) and
high. Shapes are static and nothing reads the host. M samples or memory slots, N rows of a batch, C classes.

Source: Gui et al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation in Semi-Supervised Learning";
Zhang et al. 2021, "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling"; Otsu 1979, "A Threshold
Selection Method from Gray-Level Histograms"; the first two as released.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = -1  # a sample that was never sure of its class


def update_history(history: Tensor, index: Tensor, loss: Tensor, decay: float | Tensor) -> Tensor:
    """The running loss after a batch: `decay` of the old value, the rest from the batch; other samples keep theirs.

    A sample that is twice in the batch takes its last loss, and the old value counts once.

    Shapes: history [M], index [N] in 0..M-1, loss [N], decay [] or [M] -> [M].
    """
    if not len(index):
        return history
    place = torch.arange(len(index), device=index.device)
    last = torch.full_like(history, -1, dtype=place.dtype).scatter_reduce(0, index, place, "amax")  # [M]
    moved = decay * history + (1 - decay) * loss.detach()[last.clamp(min=0)]
    return torch.where(last >= 0, moved, history).to(history.dtype)


def otsu_threshold(history: Tensor, known: Tensor, bins: int = 256, edge: bool = False) -> Tensor:
    """The value that parts the known histories best into two groups: the centre of the last bin of the low side.

    Equal bins from the smallest to the largest known value; of all cuts between two bins the first with the largest
    variance between the sides. It is computed on bin numbers in whole numbers, so that cuts which tie tie exactly. If all
    known values are equal it is that value; if none is known it is NaN: either way `update_flags` changes nothing.

    `edge` takes the upper edge of the bin instead of its centre (ours), so that no value of the low side is left out.

    Shapes: history [M], known [M] bool -> [].
    """
    value = history.detach().double()
    some = known.any()
    low = value.masked_fill(~known, torch.inf).amin().masked_fill(~some, 0)
    high = value.masked_fill(~known, -torch.inf).amax().masked_fill(~some, 0)
    width = (high - low) / bins
    number = torch.arange(bins, device=value.device)
    inner = number[1:] * width + low  # [bins - 1], edges between bins
    bin_of = torch.searchsorted(inner, value.masked_fill(~known, 0), right=True)
    count = torch.zeros_like(number).scatter_add(0, bin_of, known.to(number.dtype))
    rows, sums = count.cumsum(0), (count * number).cumsum(0)  # of the low side, for a cut behind each bin
    rows, sums, all_rows, all_sums = rows[:-1], sums[:-1], rows[-1], sums[-1]
    gap = (sums * (all_rows - rows) - (all_sums - sums) * rows).double()
    between = gap * gap / (rows * (all_rows - rows)).clamp(min=1)  # W1 W2 (M1 - M2)^2, in bins
    best = between.argmax()
    threshold = torch.where(high > low, low + (best + (1.0 if edge else 0.5)) * width, low)
    return threshold.masked_fill(~some, torch.nan).to(history.dtype)


def update_flags(flags: Tensor, history: Tensor, threshold: Tensor | float) -> Tensor:
    """Naive below the threshold, not naive above it, as before on it.    Shapes: flags [M] bool, history [M] -> [M] bool."""
    return (flags | (history < threshold)) & ~(history > threshold)


def class_status(selected: Tensor, classes: int, before: Tensor, warm_up: bool = True) -> Tensor:
    """How far each class has been learned: samples that chose it, as a share of the class chosen most.

    With `warm_up` the undecided count as a class of their own in that comparison. As long as all samples are the same, all
    undecided or all of one class, the status stays as it was. Entries below -1 are empty rows and do not count (ours).

    Shapes: selected [M], class numbers or -1 (undecided), before [C] -> [C].
    """
    count = (selected[:, None] == torch.arange(classes, device=selected.device)).sum(0)
    undecided = (selected == NONE).sum()
    most = count.amax()
    uniform = torch.maximum(most, undecided) == (selected >= NONE).sum()
    divisor = torch.maximum(most, undecided) if warm_up else most
    return torch.where(uniform, before, count.to(before.dtype) / divisor.clamp(min=1))


def class_thresholds(status: Tensor, confidence: float) -> Tensor:
    """How sure a pseudo-label of each class must be, by the convex mapping of its status.    Shapes: [C] -> [C]."""
    return confidence * status / (2 - status)
