"""Sequence learning: contrasts of two views, edits of histories, the encoder, rankings, and streams of interactions."""

from __future__ import annotations

import math

import pytest
import references_sequences as references
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, sampled_from
from torch import Tensor
from torch.testing import assert_close

from cl_sim import losses
from cl_sim.encoders.augmenter import Augmenter
from cl_sim.runs import per_run
from cl_sim.testing import NoHostReads

F64 = torch.float64
seeds = integers(0, 10**6)


def rows(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


def labels(n: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def orthonormal(n: int, width: int) -> Tensor:
    return torch.linalg.qr(rows(width, width, 0)).Q[:n]


# Contrasts


@given(n=integers(1, 7), seed=seeds, similarity=sampled_from(["dot", "cos"]), classes=integers(0, 4))
def test_info_nce_equals_the_sum_over_rows(n: int, seed: int, similarity: losses.Similarity, classes: int) -> None:
    x, y = rows(n, 4, seed), rows(n, 4, seed + 1)
    own = labels(n, classes, seed) if classes else None
    slow = references.info_nce(x.tolist(), y.tolist(), 0.3, similarity == "cos", own.tolist() if classes else None)
    fast = losses.info_nce(x, y, 0.3, similarity, own)
    assert fast.dtype == F64
    assert_close(fast, number(slow), rtol=1e-10, atol=1e-10)


@given(n=integers(1, 7), seed=seeds, similarity=sampled_from(["dot", "cos"]), classes=integers(0, 4), whole=booleans())
def test_the_margin_regulariser_equals_its_loops(
    n: int, seed: int, similarity: losses.Similarity, classes: int, whole: bool
) -> None:
    x, y = rows(n, 4, seed), rows(n, 4, seed + 1)
    own = labels(n, classes, seed) if classes else None
    listed = own.tolist() if own is not None else None
    slow = references.margin_regulariser(x.tolist(), y.tolist(), 0.3, similarity == "cos", listed, whole)
    fast = losses.margin_regulariser(x, y, 0.3, similarity, own, scope="batch" if whole else "row")
    assert_close(fast, number(slow), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_orthonormal_pairs_give_the_values_worked_out_by_hand(size: int) -> None:
    z = orthonormal(size, 8)
    assert_close(losses.info_nce(z, z, 1.0), number(math.log(1 + (2 * size - 2) / math.e)))
    for scope in ("row", "batch"):
        assert_close(losses.margin_regulariser(z, z, scope=scope), number(2.0))  # type: ignore[arg-type]


def test_collapsed_views_have_no_margin() -> None:
    z = rows(1, 4, 0).expand(5, -1)
    assert_close(losses.margin_regulariser(z, z), number(0.0))


def test_a_contrast_of_two_samples_worked_out_by_hand() -> None:
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64), torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=F64)
    # row: positive; negatives   x1: 2; 0, 1   x2: 1; 0, 0   y1: 2; 0, 2   y2: 1; 1, 2
    per_row = [
        math.log(math.e**2 + 1 + math.e) - 2,
        math.log(math.e + 2) - 1,
        math.log(2 * math.e**2 + 1) - 2,
        math.log(2 * math.e + math.e**2) - 1,
    ]
    assert_close(losses.info_nce(x, y, 1.0), number(sum(per_row) / 4))
    above = (1 + 1 + 0 + 0) / 4  # lo: 1, 0, 2, 1
    below = (2 + 1 + 1 + 1 + 2 + 0 + 1 + 0) / 8  # hi: 2, 1, 2, 2
    assert_close(losses.margin_regulariser(x, y), number(above + below))


@given(n=integers(2, 7), seed=seeds)
def test_contrasts_do_not_care_for_the_order_of_samples_or_views(n: int, seed: int) -> None:
    x, y = rows(n, 4, seed), rows(n, 4, seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for loss in (lambda a, b: losses.info_nce(a, b, 0.7), losses.margin_regulariser):
        assert_close(loss(x, y), loss(y, x))
        assert_close(loss(x, y), loss(x[order], y[order]))


def test_without_negatives_contrasts_are_zero_with_zero_gradient() -> None:
    for n, own in ((1, None), (3, torch.zeros(3, dtype=torch.long))):
        x, y = rows(n, 4, 0).requires_grad_(), rows(n, 4, 1).requires_grad_()
        for loss in (
            losses.info_nce(x, y, 1.0, labels=own),
            losses.margin_regulariser(x, y, labels=own),
            losses.margin_regulariser(x, y, labels=own, scope="batch"),
        ):
            found = torch.autograd.grad(loss, (x, y))
            assert loss.item() == 0
            assert all(torch.equal(part, torch.zeros_like(part)) for part in found)


@pytest.mark.parametrize("similarity", ["dot", "cos"])
@pytest.mark.parametrize("own", [None, torch.tensor([0, 1, 0, 2])])
def test_gradients_of_the_contrasts_are_those_of_their_values(
    similarity: losses.Similarity, own: Tensor | None
) -> None:
    x, y = rows(4, 3, 1).requires_grad_(), rows(4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: losses.info_nce(x, y, 0.5, similarity, own), (x, y))
    for scope in ("row", "batch"):
        assert torch.autograd.gradcheck(
            lambda x, y, scope=scope: losses.margin_regulariser(x, y, 0.5, similarity, own, scope), (x, y)
        )


def test_contrasts_are_the_same_alone_and_stacked_and_never_read_the_host() -> None:
    x, y = rows(12, 4, 0).view(3, 4, 4), rows(12, 4, 1).view(3, 4, 4)
    own = labels(12, 2, 0).view(3, 4)
    with NoHostReads():
        three = per_run(lambda x, y, own: losses.info_nce(x, y, 0.5, "cos", own))(x, y, own)
        margins = per_run(losses.margin_regulariser)(x, y)
    for run in range(3):
        assert_close(three[run], losses.info_nce(x[run], y[run], 0.5, "cos", own[run]))
        assert_close(margins[run], losses.margin_regulariser(x[run], y[run]))


@pytest.mark.parametrize(("dim", "parameters"), [(64, 3_696), (160, 22_680), (512, 230_272)])
def test_an_augmenter_has_the_stated_size_and_answers_unit_rows(dim: int, parameters: int) -> None:
    net = Augmenter(dim)
    assert sum(p.numel() for p in net.parameters()) == parameters
    out = net(rows(9, dim, 0).float())
    assert_close(out.norm(dim=1), torch.ones(9), atol=1e-6, rtol=0)
