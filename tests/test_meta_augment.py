"""Meta-optimised augmentation and next-item learning: optimiser, stages, schedules, look-ahead, cost of a mistake."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import references_meta_augment as references
import torch
from hypothesis import given
from hypothesis.strategies import booleans, floats, integers
from torch import Tensor, nn
from torch.testing import assert_close

from cl_sim import session, testing
from cl_sim.errors import BadConfig
from cl_sim.losses import next_item as item_loss
from cl_sim.metrics.ranking import scored
from cl_sim.optim import Adam
from cl_sim.testing import NoHostReads, Toy, toy

F64 = torch.float64
seeds = integers(0, 10**6)


def rows(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


def labels(n: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


# The optimiser


@given(seed=seeds, steps=integers(1, 6), lr=floats(1e-4, 0.5))
def test_adam_equals_the_one_of_torch(seed: int, steps: int, lr: float) -> None:
    ours, theirs = ([nn.Parameter(rows(3, 2, seed)), nn.Parameter(rows(1, 4, seed + 1))] for _ in range(2))
    mine, other = Adam(ours, lr=lr), torch.optim.Adam(theirs, lr=lr)
    for step in range(steps):
        for which, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            gradient = rows(*one.shape, seed + 7 * step + which) * 10 ** (step - 3)
            absent = which == 1 and step % 2 == 1  # no gradient: it stays
            one.grad, two.grad = (None, None) if absent else (gradient.clone(), gradient.clone())
        mine.step()
        other.step()
    for one, two in zip(ours, theirs, strict=True):
        assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_adam_never_reads_the_host_and_goes_on_after_a_resume() -> None:
    whole, half = (nn.Parameter(rows(2, 2, 0).float()) for _ in range(2))
    mine = Adam([whole])
    again = Adam([half])
    for step in range(4):
        if step == 2:
            half.data.copy_(whole.data)
            again.load_state_dict(copy.deepcopy(mine.state_dict()))
        for parameter, optimiser in ((whole, mine), (half, again)):
            parameter.grad = rows(2, 2, step).float()
            with NoHostReads():
                optimiser.step()
    assert torch.equal(whole, half)
    assert mine.state[whole]["step"] == 4


# Next-item learning

PLAIN = {"capacity": 0, "replay": 0}  # fine-tuning


def next_item(seeds: tuple[int, ...] = (0,), **settings: Any) -> Toy:
    return toy("next_item", seeds, {"strategy": {"replay": 16, "lr": 0.01, **settings}})


@given(n=integers(1, 6), items=integers(1, 7), seed=seeds, padding=booleans())
def test_the_item_loss_equals_its_loops(n: int, items: int, seed: int, padding: bool) -> None:
    scores, target = 3 * rows(n, items + 1, seed), 1 + labels(n, items, seed)
    counted, candidate = labels(n, 3, seed + 1) > 0, labels(items + 1, 2, seed + 2) > 0
    candidate[target], candidate[0] = True, padding
    slow = references.item_loss(scores.tolist(), target.tolist(), counted.tolist(), candidate.tolist())
    assert_close(item_loss(scores, target, counted, candidate), torch.tensor(slow, dtype=F64), rtol=1e-10, atol=1e-10)
    leaf = scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: item_loss(scores, target, counted, candidate), (leaf,))


@pytest.mark.parametrize("settings", [{}, {"padding": True}, {"mask_unseen": True}])
def test_next_item_learns_the_loss_of_its_scores(settings: dict[str, bool]) -> None:
    made = toy("next_item", (0,), {"strategy": {**PLAIN, **settings}, "encoder": {"dropout": 0.0}})
    testing.train(made, 0, 12)
    new, task = made.stream.batch(12), made.strategy.task
    scores = task.net(new["items"], new["length"])[0]
    candidate = torch.ones(61, dtype=torch.bool)
    if settings.get("mask_unseen"):
        candidate = torch.zeros(61, dtype=torch.bool)
        for step in range(13):
            candidate[made.stream.batch(step)["target"].long()] = True
        assert 10 < candidate.sum() < 60
    candidate[0] = settings.get("padding", False)
    slow = references.item_loss(
        scores.double().tolist(), new["target"][0].tolist(), scored(new)[0].tolist(), candidate.tolist()
    )
    assert made.strategy.observe(new)["loss"].item() == pytest.approx(slow, abs=1e-5)


def test_item_0_stays_a_zero_vector_unless_it_is_scored() -> None:
    for padding in (False, True):
        made = next_item(padding=padding)
        before = made.strategy.task.net.weight("encoder.table.weight")[0, 0].clone()
        testing.train(made, 0, 5)
        after = made.strategy.task.net.weight("encoder.table.weight")[0, 0]
        assert bool(before.any()) == padding
        assert torch.equal(before, after) != padding


def test_events_without_a_history_count_but_are_not_remembered() -> None:
    made = next_item()
    total = 0
    for step in range(10):
        batch = made.stream.batch(step)
        made.strategy.observe(batch)
        total += int(scored(batch).sum())
    memory = made.strategy.task.memory
    assert total < 160
    assert memory.seen.tolist() == [total]
    assert (memory.rows()["length"][0, :total] > 0).all()
    assert not memory.rows()["length"][0, total:].any()
    assert memory.bytes_per_row == 8 + 4 * 8 + 2 + 4  # histories of 8 here; 214 bytes for 50


def test_a_growing_catalogue_ranks_nothing_that_has_not_come() -> None:
    made = next_item(mask_unseen=True)
    made.strategy.eval()
    assert (made.strategy.predict(made.stream.batch(0)) == -torch.inf).all()
    testing.train(made, 0, 3)
    come = torch.zeros(61, dtype=torch.bool)
    for step in range(3):
        come[made.stream.batch(step)["target"].long()] = True
    come[0] = False
    made.strategy.eval()
    finite = made.strategy.predict(made.stream.batch(4)).isfinite()
    assert torch.equal(finite, come.expand_as(finite))


def test_fine_tuning_keeps_no_memory() -> None:
    made = next_item(**PLAIN)
    testing.train(made, 0, 3)
    assert session.memories(made.strategy) == []
    assert made.strategy.steady


@pytest.mark.parametrize("check", [testing.resumes_bit_for_bit, testing.runs_do_not_touch_each_other])
def test_next_item_without_a_memory_keeps_to_the_checks(check: Callable[[testing.Make], None]) -> None:
    check(lambda seeds: next_item(tuple(seeds), **PLAIN))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"capacity": 0}, "set replay=0 too"),
        ({"replay": 0}, "nothing reads the memory"),
        ({"readout": "class_mean"}, "leave them out"),
        ({"replay": -1}, "at least 0"),
    ],
)
def test_a_memory_without_a_use_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        next_item(**settings)
