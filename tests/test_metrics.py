"""Summaries of accuracy matrices, worked by hand, and against slow twins."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_sim.metrics import transfer
from cl_sim.metrics.accuracy import Accuracy
from cl_sim.metrics.transfer import Record


def by_tasks(matrix: list[list[float]], before: list[float] | None = None) -> Record:
    """A record with one evaluation per task end, and one before training."""
    tasks = len(matrix)
    start = [before] if before is not None else []
    offset = len(start)
    return Record(
        samples=np.array(([0] if start else []) + [100 * (t + 1) for t in range(tasks)]),
        accuracy=np.array(start + matrix, dtype=float),
        seen=np.array([[False] * tasks] * offset + [[j <= t for j in range(tasks)] for t in range(tasks)]),
        task_end=np.array([False] * offset + [True] * tasks),
    )


# three tasks; rows are task ends
HAND = by_tasks([[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.4, 0.7]], before=[0.1, 0.1, 0.1])
WORKED = {
    "acc_end": (0.5 + 0.4 + 0.7) / 3,
    "acc_incremental": (0.9 + (0.6 + 0.8) / 2 + (0.5 + 0.4 + 0.7) / 3) / 3,
    "acc_aaa": (0.9 + 0.7 + 1.6 / 3) / 3,  # no evaluation between task ends: equal to acc_incremental
    "acc_auc": (100 * 0.9 + 100 * 0.7 + 100 * 1.6 / 3) / 300,
    "acc_learning": (0.9 + 0.8 + 0.7) / 3,
    "acc_first_task": 0.5,
    "acc_last_task": 0.7,
    "acc_worst_case": 0.7 / 3 + 2 / 3 * ((0.5 + 0.4) / 2),  # min(0.6, 0.5) and 0.4
    "forgetting_chaudhry": ((0.9 - 0.5) + (0.8 - 0.4)) / 2,
    "forgetting_framework": ((0.9 - 0.5) + (0.8 - 0.4) + 0) / 3,
    "bwt_gem": ((0.5 - 0.9) + (0.4 - 0.8)) / 2,
    "fwt_gem": ((0.2 - 0.1) + (0.3 - 0.1)) / 2,
}


@pytest.mark.parametrize("name", WORKED)
def test_a_metric_equals_its_formula_on_a_matrix_worked_by_hand(name: str) -> None:
    assert transfer.summary(HAND)[name] == pytest.approx(WORKED[name])


def test_the_summary_has_exactly_the_metrics_worked_by_hand() -> None:
    assert set(transfer.summary(HAND)) == set(WORKED)


def test_evaluations_between_task_ends_count_for_anytime_metrics_only() -> None:
    # task 1: 0.5 after 50 samples, 0.9 at its end (100); task 2: 0.3 and 0.7 after 180, 0.4 and 0.8 at its end (200)
    r = Record(
        samples=np.array([0, 50, 100, 180, 200]),
        accuracy=np.array([[0.1, 0.1], [0.5, np.nan], [0.9, 0.2], [0.3, 0.7], [0.4, 0.8]]),
        seen=np.array([[False, False], [True, False], [True, False], [True, True], [True, True]]),
        task_end=np.array([False, False, True, False, True]),
    )
    found = transfer.summary(r)
    assert found["acc_aaa"] == pytest.approx((0.5 + 0.9 + 0.5 + 0.6) / 4)
    assert found["acc_auc"] == pytest.approx((50 * 0.5 + 50 * 0.9 + 80 * 0.5 + 20 * 0.6) / 200)
    assert found["acc_incremental"] == pytest.approx((0.9 + 0.6) / 2)
    assert found["acc_worst_case"] == pytest.approx(0.8 / 2 + 0.3 / 2)
    assert found["forgetting_chaudhry"] == pytest.approx(0.5)
    assert found["fwt_gem"] == pytest.approx(0.1)


def test_a_stream_whose_splits_are_not_tasks_has_no_forgetting_or_transfer() -> None:
    everything_seen = Record(
        samples=np.array([0, 100, 200]),
        accuracy=np.array([[0.1, 0.1], [0.5, 0.6], [0.7, 0.8]]),
        seen=np.array([[False, False], [True, True], [True, True]]),
        task_end=np.array([False, True, True]),
    )
    assert set(transfer.summary(everything_seen)) == {"acc_end", "acc_incremental", "acc_aaa", "acc_auc"}


def test_one_task_has_no_forgetting() -> None:
    assert set(transfer.summary(by_tasks([[0.6]]))) == {"acc_end", "acc_incremental", "acc_aaa", "acc_auc"}


def test_without_an_evaluation_before_training_there_is_no_forward_transfer() -> None:
    found = transfer.summary(by_tasks([[0.9, 0.2], [0.5, 0.8]]))
    assert "fwt_gem" not in found
    assert found["bwt_gem"] == pytest.approx(-0.4)


def test_a_class_that_never_came_does_not_count_as_seen() -> None:
    r = Record(
        samples=np.array([10]),
        accuracy=np.array([[0.4, 0.9]]),
        seen=np.array([[True, False]]),
        task_end=np.array([True]),
    )
    assert transfer.summary(r)["acc_aaa"] == pytest.approx(0.4)


@given(data=st.data(), tasks=st.integers(2, 6))
def test_metrics_equal_their_definitions_in_loops(data: st.DataObject, tasks: int) -> None:
    a = [[data.draw(st.floats(0, 1)) for _ in range(tasks)] for _ in range(tasks)]
    b = [data.draw(st.floats(0, 1)) for _ in range(tasks)]
    found = transfer.summary(by_tasks(a, b))
    forgetting = [max(a[i][j] for i in range(tasks - 1)) - a[tasks - 1][j] for j in range(tasks - 1)]
    backward = [a[tasks - 1][j] - a[j][j] for j in range(tasks - 1)]
    forward = [a[j - 1][j] - b[j] for j in range(1, tasks)]
    worst = [min(a[i][j] for i in range(j + 1, tasks)) for j in range(tasks - 1)]
    assert found["forgetting_chaudhry"] == pytest.approx(sum(forgetting) / (tasks - 1))
    assert found["bwt_gem"] == pytest.approx(sum(backward) / (tasks - 1))
    assert found["fwt_gem"] == pytest.approx(sum(forward) / (tasks - 1))
    expected = a[-1][-1] / tasks + (1 - 1 / tasks) * sum(worst) / (tasks - 1)
    assert found["acc_worst_case"] == pytest.approx(expected)


@given(shift=st.floats(-0.1, 0.1))
def test_adding_a_constant_shifts_accuracies_and_leaves_differences(shift: float) -> None:
    base = [[0.8, 0.3], [0.5, 0.7]]
    moved = [[value + shift for value in row] for row in base]
    one, two = (transfer.summary(by_tasks(m, [0.2, 0.2])) for m in (base, moved))
    assert two["acc_end"] - one["acc_end"] == pytest.approx(shift)
    assert two["forgetting_chaudhry"] == pytest.approx(one["forgetting_chaudhry"])


@given(data=st.data(), runs=st.integers(1, 3), splits=st.integers(1, 4), size=st.integers(1, 12))
def test_accuracy_counts_hits_per_split_as_a_loop_does(data: st.DataObject, runs: int, splits: int, size: int) -> None:
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    metric = Accuracy(runs, splits, torch.device("cpu"))
    hits, counts = np.zeros((runs, splits)), np.zeros((runs, splits))
    for _ in range(2):
        logits = torch.rand(runs, size, 5, generator=draw)
        batch = {
            "y": torch.randint(5, (runs, size), generator=draw),
            "split": torch.randint(splits, (runs, size), generator=draw),
            "valid": torch.rand(runs, size, generator=draw) < 0.8,
        }
        metric.update(logits, batch)
        for r in range(runs):
            for i in range(size):
                if batch["valid"][r, i]:
                    split = int(batch["split"][r, i])
                    counts[r, split] += 1
                    hits[r, split] += int(logits[r, i].argmax() == batch["y"][r, i])
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(metric.result()["accuracy"].numpy(), hits / counts)
    assert metric.result()["accuracy"].isnan().all()


def test_every_metric_function_states_its_source_or_formula() -> None:
    for name, metric in {**transfer.ANY_STREAM, **transfer.TASK_BY_TASK, "fwt_gem": transfer.fwt_gem}.items():
        assert re.search(r"a\[|anytime", metric.__doc__ or ""), name
