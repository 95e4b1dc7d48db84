"""Summaries of one run's evaluations: final, average and anytime accuracy, forgetting, transfer.

Notation: T tasks; a[i, j] is the accuracy on split j at the end of task i (both from 0), b[j] that of the untrained net;
E evaluation points, the first one before training; S splits. Everything is numpy, for one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """All evaluations of one run, in order. The first one, at 0 samples, may be missing.

    Shapes: samples [E], accuracy [E, S] (NaN: not evaluated), seen [E, S], task_end [E].
    """

    samples: NDArray[np.int64]
    accuracy: Floats
    seen: NDArray[np.bool_]
    task_end: NDArray[np.bool_]


def record(lines: Sequence[Mapping[str, Any]], run: int) -> Record:
    """The record of one run from the `evaluation` lines of its journal."""
    return Record(
        samples=np.array([line["samples"] for line in lines], dtype=np.int64),
        accuracy=np.array([line["accuracy"][run] for line in lines], dtype=np.float64),
        seen=np.array([line["seen"][run] for line in lines], dtype=np.bool_),
        task_end=np.array([line["task_end"] for line in lines], dtype=np.bool_),
    )


def matrix(r: Record) -> Floats:
    """Accuracy on every split at every task end.    Shapes: -> [T, S]."""
    return r.accuracy[r.task_end]


def seen_mean(r: Record) -> Floats:
    """Mean accuracy over the splits seen by then, at each evaluation point; NaN before anything was seen.    Shapes: -> [E]."""
    known = r.seen & ~np.isnan(r.accuracy)
    hits = np.where(known, r.accuracy, 0).sum(1)
    means: Floats = np.divide(hits, known.sum(1), out=np.full(len(hits), np.nan), where=known.any(1))
    return means


def anytime(r: Record) -> tuple[NDArray[np.int64], Floats]:
    """The anytime accuracy curve: samples and mean over seen splits, at every evaluation point after the start."""
    after = r.samples > 0
    return r.samples[after], seen_mean(r)[after]


def acc_end(r: Record) -> float:
    """mean_j a[T-1, j]: accuracy at the end of the stream, unweighted over splits."""
    return float(matrix(r)[-1].mean())


def acc_incremental(r: Record) -> float:
    """mean_i mean_{j seen} a[i, j]: mean over task ends of the mean over the splits seen by then.

    Source: Rebuffi et al. 2017, "iCaRL" (average incremental accuracy).
    """
    return float(seen_mean(r)[r.task_end].mean())


def acc_aaa(r: Record) -> float:
    """Mean of the anytime accuracy over all evaluation points after the start.

    Source: Caccia et al. 2022 (average anytime accuracy). Departures: theirs averages task ends in some code bases, which is
    `acc_incremental` here.
    """
    return float(anytime(r)[1].mean())


def acc_auc(r: Record) -> float:
    """Area under the anytime accuracy curve over samples, divided by the samples of the stream.

    Source: Koh et al. 2022, "Online Continual Learning on Class Incremental Blurry Task Configuration with Anytime
    Inference": sum of accuracy times samples between evaluations. Departures: each accuracy holds for the samples since
    the evaluation before (rectangles); uneven evaluation points are what makes it differ from `acc_aaa`.
    """
    samples, curve = anytime(r)
    widths = np.diff(samples, prepend=0)
    return float((curve * widths).sum() / widths.sum())


def min_acc(r: Record) -> float:
    """Mean over the tasks before the last of the lowest accuracy at any evaluation after the task's end.

    Source: De Lange et al. 2023, "Continual evaluation for lifelong learning", eq. 3. Departures: the minimum is taken over our
    evaluation points, not over every step.
    """
    ends = np.flatnonzero(r.task_end)
    return float(np.mean([np.nanmin(r.accuracy[end + 1 :, j]) for j, end in enumerate(ends[:-1])]))


def acc_worst_case(r: Record) -> float:
    """a[T-1, T-1] / T + (1 - 1/T) * min_acc: what the worst moment after learning would have shown.

    Source: De Lange et al. 2023, "Continual evaluation for lifelong learning", eq. 4, at the end of the stream.
    """
    tasks = int(r.task_end.sum())
    last = float(matrix(r)[-1, tasks - 1])
    return last / tasks + (1 - 1 / tasks) * min_acc(r)


def forgetting_chaudhry(r: Record) -> float:
    """mean_{j<T-1} ( max_{i<T-1} a[i, j] - a[T-1, j] ), over the tasks before the last.

    Source: Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", eq. 3: the maximum runs over the task ends before
    the last one, so a task that kept improving counts as negative.
    """
    a = matrix(r)
    return float((a[:-1, : len(a) - 1].max(0) - a[-1, : len(a) - 1]).mean())


def forgetting_framework(r: Record) -> float:
    """mean_{j<T} ( max_i a[i, j] - a[T-1, j] ): all tasks, the last one (which adds 0) included.

    Source: the online-continual-learning code line; smaller than `forgetting_chaudhry` by about the factor (T-1)/T.
    """
    a = matrix(r)
    return float((a.max(0) - a[-1]).mean())


def bwt_gem(r: Record) -> float:
    """mean_{j<T-1} ( a[T-1, j] - a[j, j] ): backward transfer.

    Source: Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", eq. 3.
    """
    a = matrix(r)
    before = np.arange(len(a) - 1)
    return float((a[-1, before] - a[before, before]).mean())


def fwt_gem(r: Record) -> float:
    """mean_{0<j} ( a[j-1, j] - b[j] ): forward transfer, b being the accuracy before training.

    Source: Lopez-Paz and Ranzato 2017, eq. 4. Departures: b is measured on the small evaluation part.
    """
    a, b = matrix(r), r.accuracy[0]
    later = np.arange(1, len(a))
    return float((a[later - 1, later] - b[later]).mean())


def acc_learning(r: Record) -> float:
    """mean_j a[j, j]: accuracy on each task right after learning it.

    Source: Riemer et al. 2019, "Learning to Learn without Forgetting by Maximizing Transfer" (learning accuracy).
    """
    return float(np.diagonal(matrix(r)).mean())


def acc_first_task(r: Record) -> float:
    """a[T-1, 0]: accuracy on the oldest task at the end of the stream."""
    return float(matrix(r)[-1, 0])


def acc_last_task(r: Record) -> float:
    """a[T-1, T-1]: accuracy on the newest task at the end; far above `acc_first_task`, it shows recency bias."""
    return float(matrix(r)[-1, -1])


ANY_STREAM = {"acc_end": acc_end, "acc_incremental": acc_incremental, "acc_aaa": acc_aaa, "acc_auc": acc_auc}
TASK_BY_TASK = {
    "acc_worst_case": acc_worst_case,
    "acc_learning": acc_learning,
    "acc_first_task": acc_first_task,
    "acc_last_task": acc_last_task,
    "forgetting_chaudhry": forgetting_chaudhry,
    "forgetting_framework": forgetting_framework,
    "bwt_gem": bwt_gem,
}


def summary(r: Record) -> dict[str, float]:
    """Every metric that the record defines.

    Forgetting and transfer need at least two tasks that come one after the other, each with a split of its own; forward
    transfer also the evaluation before training.
    """
    if not r.task_end.any():
        return {}
    found = {name: metric(r) for name, metric in ANY_STREAM.items()}
    if one_split_per_task(r):
        found |= {name: metric(r) for name, metric in TASK_BY_TASK.items()}
        if r.samples[0] == 0 and not np.isnan(r.accuracy[0]).any():
            found["fwt_gem"] = fwt_gem(r)
    return found


def one_split_per_task(r: Record) -> bool:
    """Is split j first seen in task j, for two tasks or more?"""
    seen = r.seen[r.task_end]
    tasks, splits = seen.shape
    return tasks > 1 and tasks == splits and bool((seen == np.tri(tasks, dtype=np.bool_)).all())
