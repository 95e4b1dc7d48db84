"""LwF and online EWC: their functions against slow twins, and their steps against the methods written out."""

from __future__ import annotations

import copy

import pytest
import references_regularised as references
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, lists
from torch import Tensor, nn
from torch.testing import assert_close

from cl_sim import losses, testing
from cl_sim.errors import BadConfig
from cl_sim.testing import Toy, toy
from strategies.ewc import EWCConfig, normalise

F64 = torch.float64
seeds = integers(0, 10**6)
EWC = {"strategy": {"lr": 0.05, "strength": 2.0, "every": 5}}
EWC_TOY = toy("ewc", (0, 1)).strategy


def rows(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


def labels(n: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def weights(made: Toy) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in made.strategy.net.parameters()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def descend(net: nn.Module, loss: Tensor, lr: float) -> None:
    net.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= lr * parameter.grad


@pytest.mark.parametrize("name", ["lwf", "ewc"])
def test_a_stream_without_boundaries_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(BadConfig, match=f"strategy '{name}' needs task boundaries.*announces=true") as refused:
        toy(name, (0,), {"stream": {"announces": False}})
    assert "\n" not in str(refused.value)


# LwF


@given(n=integers(1, 6), classes=integers(1, 6), tau=floats(0.5, 5), seed=seeds)
def test_distill_equals_its_definition(n: int, classes: int, tau: float, seed: int) -> None:
    scores, taught = 3 * rows(n, classes, seed), 3 * rows(n, classes, seed + 1)
    slow = references.distill(scores.tolist(), taught.tolist(), tau)
    assert_close(losses.distill(scores, taught, tau), torch.tensor(slow, dtype=F64), rtol=1e-10, atol=1e-10)


def test_the_gradient_of_distill_is_right_and_flows_into_the_scores_alone() -> None:
    scores, taught = rows(4, 3, 0).requires_grad_(), rows(4, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.distill(s, taught, 2.0), scores)
    losses.distill(scores, taught, 2.0).backward()
    assert taught.grad is None


@given(n=integers(1, 6), classes=integers(2, 6), tau=floats(0.5, 5), seed=seeds)
def test_distill_is_least_where_both_answers_agree(n: int, classes: int, tau: float, seed: int) -> None:
    taught = rows(n, classes, seed)
    scores = taught.clone().requires_grad_()
    least = losses.distill(scores, taught, tau)
    least.backward()
    assert scores.grad is not None
    assert_close(scores.grad, torch.zeros_like(taught), rtol=0, atol=1e-12)
    assert losses.distill(rows(n, classes, seed + 1), taught, tau) >= least - 1e-12


def test_a_trace_of_lwf_over_the_boundary_equals_the_method_written_out() -> None:
    made = toy("lwf", (3,))
    net, boundary = copy.deepcopy(made.strategy.net.net), len(made.stream) // 2
    teacher = None
    for step in range(boundary + 4):
        new = made.stream.batch(step)
        x, y = new["x"][0], new["y"][0]
        scores = net(x)
        expected = -scores.log_softmax(1)[torch.arange(10), y].mean()
        if teacher is not None:
            soft, target = scores / 2, teacher(x).detach() / 2
            knowledge = -4 * (target.softmax(1) * soft.log_softmax(1)).sum(1).mean()
            expected = expected / 2 + knowledge / 2
        descend(net, expected, 0.1)
        loss = made.strategy.observe(new)["loss"]
        if made.stream.ends_task(step):
            made.strategy.boundary()
            teacher = copy.deepcopy(net)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"step {step}"
    for fast, slow in zip(made.strategy.net.parameters(), net.parameters(), strict=True):
        assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_during_the_first_task_lwf_is_fine_tuning_to_the_bit() -> None:
    lwf, plain = toy("lwf", (0, 1)), toy("finetune", (0, 1))
    for made in (lwf, plain):
        testing.train(made, 0, len(made.stream) // 2)
    assert same(weights(lwf), weights(plain))


# online EWC


def test_a_trace_of_ewc_over_the_boundary_equals_the_method_written_out() -> None:
    made = toy("ewc", (3,), EWC)
    net, boundary = copy.deepcopy(made.strategy.net.net), len(made.stream) // 2
    slopes: list[list[float]] = []
    anchor, importance = None, None
    for step in range(boundary + 8):
        new = made.stream.batch(step)
        scores = net(new["x"][0])
        expected = -scores.log_softmax(1)[torch.arange(10), new["y"][0]].mean()
        parts = torch.autograd.grad(expected, list(net.parameters()), retain_graph=True)
        slopes.append(torch.cat([part.flatten() for part in parts]).tolist())
        if anchor is not None:
            penalty = torch.zeros(())
            for parameter, kept, matters in zip(net.parameters(), anchor, importance, strict=True):
                penalty = penalty + (matters * (parameter - kept) ** 2).sum()
            expected = expected + 2.0 * penalty
        descend(net, expected, 0.05)
        loss = made.strategy.observe(new)["loss"]
        if made.stream.ends_task(step):
            made.strategy.boundary()
            fisher = torch.tensor(references.running_fisher(slopes, 0.9, 5))
            scaled = (fisher - fisher.min()) / (fisher.max() - fisher.min())
            sizes = [parameter.numel() for parameter in net.parameters()]
            anchor = [parameter.detach().clone() for parameter in net.parameters()]
            importance = [part.view(kept.shape) for part, kept in zip(scaled.split(sizes), anchor, strict=True)]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"step {step}"
    for fast, slow in zip(made.strategy.net.parameters(), net.parameters(), strict=True):
        assert_close(fast, slow, rtol=1e-3, atol=1e-5)


@given(steps=integers(1, 12), every=integers(1, 5), alpha=floats(0, 1), seed=seeds)
def test_the_running_fisher_equals_its_recursion_in_every_run(steps: int, every: int, alpha: float, seed: int) -> None:
    made = copy.deepcopy(EWC_TOY)
    made.cfg, width = EWCConfig(alpha=alpha, every=every), made.fisher.shape[1]
    slopes = torch.stack([rows(2, width, seed + step) for step in range(steps)]).float()  # [steps, R, P]
    for slope in slopes:
        made.estimate(slope)
    for run in range(2):
        slow = references.running_fisher(slopes[:, run, :3].tolist(), alpha, every)
        assert_close(made.fisher[run, :3], torch.tensor(slow), rtol=1e-5, atol=1e-6)


@given(values=lists(integers(0, 1000), min_size=2, max_size=9))
def test_importances_fill_the_range_from_zero_to_one_in_each_run(values: list[int]) -> None:
    fisher = torch.tensor([values, [7] * len(values)]) / 1000
    scaled = normalise(fisher)
    assert bool(((scaled >= 0) & (scaled <= 1)).all())
    assert bool((scaled[1] == 0).all()), "equal values matter equally little"
    if max(values) > min(values):
        assert scaled[0].min() == 0
        assert scaled[0].max() == pytest.approx(1)
        assert bool((scaled[0].diff() * fisher[0].diff() >= 0).all()), "the order stays"


def test_a_weight_held_by_ewc_moves_less_than_in_fine_tuning() -> None:
    held, free = toy("ewc", (0,), EWC), toy("ewc", (0,), {"strategy": {**EWC["strategy"], "strength": 0.0}})
    moved = []
    for made in (held, free):
        testing.train(made, 0, len(made.stream) // 2)
        most = int(made.strategy.importance[0].argmax())
        before = made.strategy.weights()[0, most].clone()
        testing.train(made, len(made.stream) // 2, len(made.stream))
        moved.append(float((made.strategy.weights()[0, most] - before).abs()))
    assert moved[0] < 0.5 * moved[1]


def test_ewc_without_strength_is_fine_tuning_to_the_bit() -> None:
    free = toy("ewc", (0, 1), {"strategy": {"lr": 0.1, "strength": 0.0}})
    plain = toy("finetune", (0, 1))
    for made in (free, plain):
        testing.train(made, 0, len(made.stream))
    assert same(weights(free), weights(plain))


def test_an_unstable_pair_of_learning_rate_and_strength_is_refused() -> None:
    with pytest.raises(BadConfig, match=r"lr \* strength is 10; .* below 0.01 or a strategy.strength below 10"):
        EWCConfig(lr=0.1, strength=100.0)
    EWCConfig(lr=0.0099, strength=100.0)
