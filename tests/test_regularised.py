"""LwF: their functions against slow twins, and their steps against the methods written out."""

from __future__ import annotations

import copy

import pytest
import references_regularised as references
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers
from torch import Tensor, nn
from torch.testing import assert_close

from cl_sim import losses, testing
from cl_sim.errors import BadConfig
from cl_sim.testing import Toy, toy

F64 = torch.float64
seeds = integers(0, 10**6)


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


@pytest.mark.parametrize("name", ["lwf"])
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
