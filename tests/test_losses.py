"""Every loss equals its definition written with loops, has right gradients, and keeps the promises of its formula."""

from __future__ import annotations

import math

import pytest
import references
import torch
from hypothesis import given
from hypothesis.strategies import integers, sampled_from
from torch import Tensor
from torch.testing import assert_close

from cl_sim import losses
from cl_sim.runs import per_run
from cl_sim.testing import NoHostReads

F64 = torch.float64
seeds = integers(0, 10**6)
modes = sampled_from(["proxy", "one", "all"])


def rows(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


def labels(n: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


@given(n=integers(1, 9), classes=integers(1, 5), seed=seeds, mode=modes)
def test_proxy_contrast_equals_the_sets_written_out(n: int, classes: int, seed: int, mode: losses.Contrast) -> None:
    f, y, w = rows(n, 4, seed), labels(n, classes, seed), rows(classes, 4, seed + 1)
    slow = references.proxy_contrast(f.tolist(), y.tolist(), w.tolist(), 0.09, mode)
    assert_close(losses.proxy_contrast(f, y, w, 0.09, mode), number(slow), rtol=1e-10, atol=1e-10)


@given(n=integers(2, 9), classes=integers(1, 4), seed=seeds)
def test_supcon_equals_the_double_loop(n: int, classes: int, seed: int) -> None:
    z, y = torch.nn.functional.normalize(rows(n, 5, seed)), labels(n, classes, seed)
    assert_close(losses.supcon(z, y, 0.1), number(references.supcon(z.tolist(), y.tolist(), 0.1)))


def test_supcon_without_a_positive_is_zero_with_zero_gradient() -> None:
    for n in (1, 4):
        z = rows(n, 3, 0).requires_grad_()
        loss = losses.supcon(torch.nn.functional.normalize(z), torch.arange(n), 0.1)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(z.grad, torch.zeros_like(z))


@given(n=integers(1, 6), classes=integers(1, 5), seed=seeds)
def test_cosine_scores_equal_the_definition(n: int, classes: int, seed: int) -> None:
    f, w = rows(n, 4, seed), rows(classes, 4, seed + 1)
    slow = references.cosine_scores(f.tolist(), w.tolist(), 0.09)
    assert_close(losses.cosine_scores(f, w, 0.09), torch.tensor(slow, dtype=F64))


@given(a=integers(1, 6), n=integers(1, 8), classes=integers(1, 5), seed=seeds)
def test_proxy_distill_equals_the_double_sum(a: int, n: int, classes: int, seed: int) -> None:
    now, then, columns = rows(a, classes, seed), rows(a, classes, seed + 1), labels(n, classes, seed)
    slow = references.proxy_distill(now.tolist(), then.tolist(), columns.tolist())
    assert_close(losses.proxy_distill(now, then, columns), number(slow))


@given(n=integers(2, 8), seed=seeds)
def test_sample_distill_equals_the_cross_entropy_of_two_distributions(n: int, seed: int) -> None:
    now, then = rows(n, 4, seed), rows(n, 4, seed + 1)
    slow = references.sample_distill(now.tolist(), then.tolist(), 0.09)
    assert_close(losses.sample_distill(now, then, 0.09), number(slow), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["proxy", "one", "all"])
def test_gradients_of_the_contrast_are_those_of_its_values(mode: losses.Contrast) -> None:
    f, y, w = rows(5, 3, 1).requires_grad_(), labels(5, 3, 1), rows(4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, w: losses.proxy_contrast(f, y, w, 0.5, mode), (f, w))


def test_gradients_of_the_other_losses_are_those_of_their_values() -> None:
    f, g, y, w = rows(5, 3, 1).requires_grad_(), rows(5, 3, 3), labels(5, 3, 1), rows(4, 3, 2).requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda f: losses.supcon(torch.nn.functional.normalize(f), y, 0.5), (f,))
    assert check(lambda f, w: losses.cosine_scores(f, w, 0.5), (f, w))
    assert check(lambda f: losses.sample_distill(f, g, 0.5), (f,))
    assert check(lambda f, w: losses.proxy_distill(losses.cosine_scores(f, w, 0.5), rows(5, 4, 5), y), (f, w))


@given(n=integers(1, 8), classes=integers(2, 5), seed=seeds)
def test_gradient_of_the_contrast_is_the_weighted_softmax_less_the_label(n: int, classes: int, seed: int) -> None:
    """dL/ds_ic = (n_c exp(s_ic) / sum - 1[c = Y_i]) / N for scores s."""
    f, y, w = rows(n, 4, seed), labels(n, classes, seed), rows(classes, 4, seed + 1)
    scores = losses.cosine_scores(f, w, 0.09)
    counts = torch.tensor([int((y == c).sum()) for c in range(classes)], dtype=F64)
    weighted = counts * (scores - scores.max()).exp()
    expected = (weighted / weighted.sum(1, keepdim=True) - torch.nn.functional.one_hot(y, classes)) / n
    # unit features and proxies, so that the only path is through the cosines
    f1, w1 = torch.nn.functional.normalize(f).requires_grad_(), w.clone().requires_grad_()
    losses.proxy_contrast(f1, y, w1, 0.09).backward()
    reached = losses.cosine_scores(f1, w1, 0.09)
    (by_chain,) = torch.autograd.grad(reached, f1, grad_outputs=expected)
    assert_close(f1.grad, by_chain, rtol=1e-5, atol=1e-5)


@given(n=integers(1, 9), seed=seeds)
def test_a_batch_of_one_class_costs_log_n_and_moves_nothing(n: int, seed: int) -> None:
    f, w = rows(n, 4, seed).requires_grad_(), rows(3, 4, seed + 1).requires_grad_()
    loss = losses.proxy_contrast(f, torch.ones(n, dtype=torch.int64), w, 0.09)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(n), abs=1e-12)
    assert float(f.grad.abs().max()) < 1e-12
    assert float(w.grad.abs().max()) < 1e-12


@given(n=integers(1, 9), classes=integers(1, 5), seed=seeds)
def test_the_contrast_of_a_row_is_at_least_log_of_its_class_count(n: int, classes: int, seed: int) -> None:
    f, y, w = rows(n, 4, seed), labels(n, classes, seed), rows(classes, 4, seed + 1)
    floor = sum(math.log(int((y == c).sum())) for c in y.tolist()) / n
    assert losses.proxy_contrast(f, y, w, 0.09).item() >= floor - 1e-12


def test_a_perfectly_separated_batch_sits_at_log_of_the_copies() -> None:
    f, y = torch.eye(3, dtype=F64).repeat(4, 1), torch.arange(3).repeat(4)
    loss = losses.proxy_contrast(f, y, torch.eye(3, dtype=F64), 0.01)
    assert loss.item() == pytest.approx(math.log(4), abs=1e-9)


@given(n=integers(1, 8), classes=integers(1, 5), seed=seeds)
def test_doubling_the_batch_adds_log_2_and_leaves_the_proxies_gradient(n: int, classes: int, seed: int) -> None:
    f, y = rows(n, 4, seed), labels(n, classes, seed)
    once, twice = (rows(classes, 4, seed + 1).requires_grad_() for _ in range(2))
    single = losses.proxy_contrast(f, y, once, 0.09)
    double = losses.proxy_contrast(f.repeat(2, 1), y.repeat(2), twice, 0.09)
    (single + double).backward()
    assert double.item() - single.item() == pytest.approx(math.log(2), abs=1e-10)
    assert_close(once.grad, twice.grad, rtol=1e-9, atol=1e-9)


@given(n=integers(2, 8), seed=seeds)
def test_proxies_of_absent_classes_get_no_gradient_at_all(n: int, seed: int) -> None:
    w = rows(6, 4, seed).requires_grad_()
    losses.proxy_contrast(rows(n, 4, seed + 1), labels(n, 3, seed), w, 0.09).backward()
    assert torch.equal(w.grad[3:], torch.zeros(3, 4, dtype=F64))


@given(n=integers(2, 8), seed=seeds)
def test_sample_distill_of_equal_features_is_the_entropy_and_rests_there(n: int, seed: int) -> None:
    f = rows(n, 4, seed).requires_grad_()
    loss = losses.sample_distill(f, f.detach(), 0.09)
    loss.backward()
    shares = [references.shares(f.tolist(), a, 0.09) for a in range(n)]
    entropy = -math.fsum(math.exp(v) * v for one in shares for v in one.values()) / n
    assert loss.item() == pytest.approx(entropy, abs=1e-9)
    assert float(f.grad.abs().max()) < 1e-10


@given(a=integers(1, 6), n=integers(1, 8), seed=seeds)
def test_proxy_distill_of_equal_scores_is_zero_whatever_the_labels(a: int, n: int, seed: int) -> None:
    scores = rows(a, 5, seed)
    assert losses.proxy_distill(scores, scores.clone(), labels(n, 5, seed)).item() == 0


@given(n=integers(2, 8), classes=integers(1, 4), seed=seeds, mode=modes)
def test_the_order_of_the_rows_does_not_matter(n: int, classes: int, seed: int, mode: losses.Contrast) -> None:
    f, y, w = rows(n, 4, seed), labels(n, classes, seed), rows(classes, 4, seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert_close(losses.proxy_contrast(f[order], y[order], w, 0.09, mode), losses.proxy_contrast(f, y, w, 0.09, mode))


def test_lifted_losses_equal_the_runs_alone_and_never_read_the_host() -> None:
    f = torch.stack([rows(6, 4, s) for s in range(3)])
    g = torch.stack([rows(6, 4, s + 9) for s in range(3)])
    y = torch.stack([labels(6, 3, s) for s in range(3)])
    w = torch.stack([rows(3, 4, s + 5) for s in range(3)])
    calls = {
        "contrast": lambda f, g, y, w: losses.proxy_contrast(f, y, w, 0.09),
        "one": lambda f, g, y, w: losses.proxy_contrast(f, y, w, 0.09, "one"),
        "all": lambda f, g, y, w: losses.proxy_contrast(f, y, w, 0.09, "all"),
        "supcon": lambda f, g, y, w: losses.supcon(f, y, 0.5),
        "scores": lambda f, g, y, w: losses.cosine_scores(f, w, 0.09),
        "samples": lambda f, g, y, w: losses.sample_distill(f, g, 0.09),
        "proxies": lambda f, g, y, w: losses.proxy_distill(f, g, y),
    }
    for name, call in calls.items():
        with NoHostReads():
            together = per_run(call)(f, g, y, w)
        for run in range(3):
            assert_close(together[run], call(f[run], g[run], y[run], w[run]), msg=name)
