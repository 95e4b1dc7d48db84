"""LwF, online EWC, SLDA and iCaRL: their functions against slow twins, and their steps against the methods written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import references_regularised as references
import torch
from hypothesis import given
from hypothesis.strategies import floats, integers, lists
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from cl_sim import losses, session, testing
from cl_sim.config import from_dict
from cl_sim.errors import BadConfig
from cl_sim.testing import Toy, toy
from strategies.ewc import EWCConfig, normalise
from strategies.icarl import sigmoids
from strategies.slda import away

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


def small_resnet(name: str) -> Toy:
    settings: dict[str, Any] = {
        "strategy": {"name": name},
        "stream": {"name": "synthetic", "size": 8, "channels": 1, "classes": 4, "tasks": 2},
        "encoder": {"name": "reduced_resnet18", "width": 2},
    }
    config = from_dict(settings)
    stream = session.build_stream(config, (0,))
    return Toy(stream, session.build_strategy(config, stream, (0,)))


@pytest.mark.parametrize("name", ["lwf", "ewc", "icarl"])
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


@pytest.mark.parametrize("implicit", [True, False])
def test_a_trace_of_ewc_over_the_boundary_equals_the_method_written_out(implicit: bool) -> None:
    made = toy("ewc", (3,), {"strategy": {**EWC["strategy"], "implicit": implicit}})
    net, boundary = copy.deepcopy(made.strategy.net.net), len(made.stream) // 2
    slopes: list[list[float]] = []
    anchor, importance = None, None
    for step in range(boundary + 8):
        new = made.stream.batch(step)
        scores = net(new["x"][0])
        expected = -scores.log_softmax(1)[torch.arange(10), new["y"][0]].mean()
        parts = torch.autograd.grad(expected, list(net.parameters()), retain_graph=True)
        slopes.append(torch.cat([part.flatten() for part in parts]).tolist())
        if anchor is None:
            descend(net, expected, 0.05)
        else:
            penalty = torch.zeros(())
            for parameter, kept, matters in zip(net.parameters(), anchor, importance, strict=True):
                penalty = penalty + (matters * (parameter - kept) ** 2).sum()
            expected = expected + 2.0 * penalty
            if implicit:  # where lr * gradient + (theta' - theta) + 2 lr lambda F (theta' - theta*) is zero
                with torch.no_grad():
                    for parameter, part, kept, matters in zip(net.parameters(), parts, anchor, importance, strict=True):
                        k = 2 * 0.05 * 2.0 * matters
                        parameter.copy_((parameter - 0.05 * part + k * kept) / (1 + k))
            else:
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
    with pytest.raises(
        BadConfig, match=r"lr \* strength is 10; .* below 0.01, a strategy.strength below 10, .*implicit=true"
    ):
        EWCConfig(lr=0.1, strength=100.0, implicit=False)
    EWCConfig(lr=0.0099, strength=100.0, implicit=False)


def test_an_implicit_penalty_holds_however_strong_it_is() -> None:
    made, half = toy("ewc", (0,), {"strategy": {"strength": 1e6, "every": 5}}), 20
    testing.train(made, 0, half)
    held = made.strategy.importance > 0.01
    before = made.strategy.weights()
    testing.train(made, half, len(made.stream))
    moved = (made.strategy.weights() - before).abs()
    assert bool(held.any())
    assert float(moved[held].max()) < 1e-3 < float(moved[~held].max())


# SLDA


@given(sizes=lists(integers(1, 6), min_size=1, max_size=4), classes=integers(1, 4), seed=seeds)
def test_batches_give_the_sums_of_one_sample_after_the_other(sizes: list[int], classes: int, seed: int) -> None:
    z, y = rows(sum(sizes), 3, seed), labels(sum(sizes), classes, seed)
    slow = references.OneByOne(classes, 3)
    total, count, scatter = torch.zeros(1, classes, 3, dtype=F64), torch.zeros(1, classes, dtype=F64), torch.zeros(3, 3)
    for part, own in zip(z.split(sizes), y.split(sizes), strict=True):
        off = away(part[None], own[None], total, count)[0]
        scatter = scatter + off.T @ off
        member = F.one_hot(own, classes).double()
        total, count = total + member.T @ part, count + member.sum(0)
        for sample, label in zip(part.tolist(), own.tolist(), strict=True):
            slow.learn(sample, label)
    assert_close(scatter / len(z), torch.tensor(slow.sigma, dtype=F64), rtol=1e-10, atol=1e-12)
    assert_close(total[0] / count[0].clamp(min=1)[:, None], torch.tensor(slow.mu, dtype=F64), rtol=1e-10, atol=1e-12)
    assert count[0].tolist() == slow.c


@pytest.mark.parametrize("target", ["identity", "variance"])
def test_slda_answers_like_the_paper_sample_by_sample_in_every_run(target: str) -> None:
    made = toy("slda", (3, 4), {"encoder": {"hidden": [6]}, "strategy": {"target": target}})
    testing.train(made, 0, 25)
    made.strategy.eval()
    batch = made.stream.batch(30)
    answers = made.strategy.predict(batch)
    for run in range(2):
        slow = references.OneByOne(4, 6)
        for step in range(25):
            old = made.stream.batch(step)
            for z, y in zip(made.strategy.encode(old["x"])[run].tolist(), old["y"][run].tolist(), strict=True):
                slow.learn(z, y)
        expected = [slow.scores(z, 1e-4, target) for z in made.strategy.encode(batch["x"])[run].tolist()]
        assert_close(answers[run], torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_classes_that_have_not_come_are_never_answered_by_slda() -> None:
    made = toy("slda", (0, 1))
    made.strategy.eval()
    batch = made.stream.batch(0)
    assert bool((made.strategy.predict(batch) == 0).all()), "nothing has come yet"
    testing.train(made, 0, len(made.stream) // 2)
    made.strategy.eval()
    answers = made.strategy.predict(batch)
    assert bool((answers[..., 2:] == -torch.inf).all())
    assert bool(answers[..., :2].isfinite().all())


def test_the_encoder_of_slda_keeps_its_bits_statistics_included() -> None:
    made = small_resnet("slda")
    before = copy.deepcopy(made.strategy.encode.state_dict())
    testing.train(made, 0, 5)
    after = made.strategy.encode.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert made.strategy.training
    assert not any(module.training for module in made.strategy.encode.modules())


def test_a_variance_target_makes_slda_forget_the_unit_of_the_features() -> None:
    answers = []
    for scale in (1.0, 1e-3):
        made = toy("slda", (0,), {"strategy": {"target": "variance"}})
        with torch.no_grad():
            for parameter in made.strategy.encode.parameters():
                parameter *= scale
        testing.train(made, 0, len(made.stream))
        made.strategy.eval()
        answers.append(made.strategy.predict(made.stream.batch(0)))
    assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-3)


def test_the_read_out_of_slda_follows_a_loaded_state() -> None:
    one, two = toy("slda", (0,)), toy("slda", (0,))
    testing.train(one, 0, 5)
    testing.train(two, 0, 9)
    batch = one.stream.batch(0)
    for made in (one, two):
        made.strategy.eval()
        made.strategy.predict(batch)
    one.strategy.load_state_dict(two.strategy.state_dict())
    assert torch.equal(one.strategy.predict(batch), two.strategy.predict(batch))


def test_the_read_out_of_slda_follows_every_step() -> None:
    made = toy("slda", (0,))
    batch = made.stream.batch(0)
    answers = []
    for step in range(3):
        testing.train(made, step, step + 1)
        made.strategy.eval()
        answers.append(made.strategy.predict(batch))
    assert not torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[1], answers[2])


# iCaRL


@given(n=integers(1, 6), classes=integers(1, 5), seed=seeds)
def test_the_sigmoids_loss_equals_its_definition(n: int, classes: int, seed: int) -> None:
    scores, target = rows(n, classes, seed), rows(n, classes, seed + 1).sigmoid()
    known, counted = rows(1, classes, seed + 2)[0] > 0, rows(1, n, seed + 3)[0] > 0
    counted[0] = True
    slow = references.sigmoids(scores.tolist(), target.tolist(), known.tolist(), counted.tolist())
    fast = sigmoids(scores[None], target[None], known[None], counted[None])[0]
    assert_close(fast, torch.tensor(slow, dtype=F64), rtol=1e-10, atol=1e-12)


def test_the_gradient_of_the_sigmoids_loss_is_right() -> None:
    scores, target = rows(4, 3, 0).requires_grad_(), rows(4, 3, 1).sigmoid()
    known, counted = torch.tensor([[True, False, True]]), torch.tensor([[True, True, False, True]])
    assert torch.autograd.gradcheck(lambda s: sigmoids(s[None], target[None], known, counted), scores)
    (slope,) = torch.autograd.grad(sigmoids(scores[None], target[None], known, counted).sum(), scores)
    assert bool((slope[:, 1] == 0).all())
    assert bool((slope[2] == 0).all())


@pytest.mark.parametrize("capacity", [1000, 12])  # of 12 rows, fewer than 10 are soon of the first task
def test_a_trace_of_icarl_over_the_boundary_equals_the_method_written_out(capacity: int) -> None:
    made, twin = (toy("icarl", (3,), {"strategy": {"capacity": capacity}}) for _ in range(2))
    net, strategy = copy.deepcopy(twin.strategy.net.net), twin.strategy
    boundary, teacher, seen, old_classes, fewest = len(made.stream) // 2, None, set(), set(), 10
    for step in range(boundary + 8):
        new = made.stream.batch(step)
        mask = torch.tensor([c in old_classes for c in range(4)])
        old = strategy.memory.sample(10, only=mask)
        seen |= set(new["y"][0].tolist())
        x, y = new["x"][0], new["y"][0].tolist()
        if old_classes:
            stored = [row for row in range(10) if int(old["y"][0, row]) in old_classes]
            x, y = torch.cat([x, old["x"][0, stored]]), y + old["y"][0, stored].tolist()
            fewest = min(fewest, len(stored))
        scores, terms = net(x), []
        for row, label in enumerate(y):
            for c in sorted(seen):
                target = teacher(x[row : row + 1])[0, c].sigmoid().detach() if c in old_classes else float(c == label)
                p = scores[row, c].sigmoid()
                terms.append(-target * p.log() - (1 - target) * (1 - p).log())
        expected = torch.stack(terms).sum() / len(y)
        descend(net, expected, 0.1)
        strategy.memory.add(new)
        loss = made.strategy.observe(new)["loss"]
        if made.stream.ends_task(step):
            made.strategy.boundary()
            teacher, old_classes = copy.deepcopy(net), set(seen)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"step {step}"
    assert (fewest < 10) == (capacity == 12)
    for fast, slow in zip(made.strategy.net.parameters(), net.parameters(), strict=True):
        assert_close(fast, slow, rtol=1e-3, atol=1e-5)


def test_icarl_answers_by_class_means_unless_the_head_is_asked_for() -> None:
    by_means, by_head = toy("icarl", (0,)), toy("icarl", (0,), {"strategy": {"readout": "head"}})
    for made in (by_means, by_head):
        testing.train(made, 0, 25)
        made.strategy.eval()
    batch = by_means.stream.batch(0)
    assert same(weights(by_means), weights(by_head))
    strategy = by_means.strategy
    means = strategy.tricks.means.scores(strategy.net.part("encoder"), strategy.memory, batch["x"])
    assert torch.equal(strategy.predict(batch), means)
    assert torch.equal(by_head.strategy.predict(batch), by_head.strategy.net(batch["x"]))


def test_a_review_of_icarl_learns_the_whole_memory_before_the_teacher_is_replaced() -> None:
    made = toy("icarl", (0,), {"strategy": {"review": "each", "capacity": 30}})
    testing.train(made, 0, len(made.stream) // 2 - 1)
    made.strategy.observe(made.stream.batch(len(made.stream) // 2 - 1))
    before = weights(made)
    made.strategy.boundary()
    assert not same(before, weights(made))
    assert same(weights(made), list(made.strategy.previous.net.parameters()))
    assert made.strategy.learned.tolist() == made.strategy.tricks.seen.tolist()
