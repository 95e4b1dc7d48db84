"""Sequence learning: contrasts of two views, edits of histories, the encoder, rankings, and streams of interactions."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references_sequences as references
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, lists, sampled_from
from torch import Tensor
from torch.testing import assert_close

from cl_sim import encoders, engine, histories, interactions, losses, measure, timeline
from cl_sim.encoders.augmenter import Augmenter
from cl_sim.encoders.transformer import Dropout, SASRec, SASRecConfig, draw_noise
from cl_sim.errors import BadConfig, BadData, UnknownName
from cl_sim.histories import History
from cl_sim.metrics.ranking import Ranking, gains, ranks
from cl_sim.rng import Rng
from cl_sim.runs import Lift, per_run
from cl_sim.testing import NoHostReads, Toy, toy
from cl_sim.tracking.journal import Journal, read
from cl_sim.types import Batch, Field
from streams.sequences import Sequences, SequencesConfig, in_order, segment_ends

F64 = torch.float64
ALARM = 4.5  # standard deviations
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


@given(n=integers(1, 7), seed=seeds, classes=integers(0, 3))
def test_contrasts_of_valid_samples_are_those_of_the_valid_samples_alone(n: int, seed: int, classes: int) -> None:
    x, y, valid = rows(n, 4, seed), rows(n, 4, seed + 1), labels(n, 3, seed) > 0
    own = labels(n, classes, seed + 2) if classes else None
    few = None if own is None else own[valid]
    assert not losses.info_nce(x, y, 0.5, labels=own, valid=torch.zeros_like(valid))
    if valid.any():
        part = losses.info_nce(x[valid], y[valid], 0.5, "cos", few)
        assert_close(losses.info_nce(x, y, 0.5, "cos", own, valid), part)
        for scope in ("row", "batch"):
            part = losses.margin_regulariser(x[valid], y[valid], 0.5, labels=few, scope=scope)  # type: ignore[arg-type]
            whole = losses.margin_regulariser(x, y, 0.5, labels=own, scope=scope, valid=valid)  # type: ignore[arg-type]
            assert_close(whole, part)


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


# Edits of histories


def numbered(length: Tensor, size: int = 50) -> History:
    """Histories 1, 2, ..., L.    Shapes: length [R, B]."""
    place = torch.arange(size)
    return History((place + 1).expand(*length.shape, -1).masked_fill(place >= length[..., None], 0), length)


@pytest.mark.parametrize(("length", "counts"), [(2, (1, 1, 1)), (5, (2, 2, 4)), (7, (3, 3, 5)), (50, (25, 25, 40))])
def test_edits_concern_the_published_number_of_items(length: int, counts: tuple[int, int, int]) -> None:
    whole = numbered(torch.full((2, 200), length))
    rng = Rng([0, 1], "test")
    cropped, hidden, moved = (edit(whole, rng) for edit in (histories.crop, histories.mask, histories.reorder))
    assert (cropped.length == counts[0]).all()
    assert ((cropped.items > 0).sum(-1) == counts[0]).all()
    inside = cropped.items[..., : counts[0]]
    assert (inside == inside[..., :1] + torch.arange(counts[0])).all()  # consecutive, at the left end
    assert ((hidden.items == 0).sum(-1) == 50 - length + counts[1]).all()
    assert ((hidden.items == whole.items) | (hidden.items == 0)).all()
    assert torch.equal(moved.items.sort(-1).values, whole.items.sort(-1).values)
    place = torch.arange(50)
    touched = moved.items != whole.items
    first, last = (torch.where(touched, place, filler) for filler in (99, -1))
    assert (last.amax(-1) - first.amin(-1) < counts[2]).all()
    assert torch.equal(hidden.length, whole.length)
    assert torch.equal(moved.length, whole.length)


@given(seed=seeds, size=integers(2, 9), length=integers(0, 9), ratio=sampled_from([0.1, 0.5, 0.8, 1.0]))
def test_edits_equal_list_operations(seed: int, size: int, length: int, ratio: float) -> None:
    length = min(length, size)
    history, rng = numbered(torch.tensor([[length]]), size), Rng([seed], "test")
    listed = history.items[0, 0].tolist()
    concerned = math.floor(length * ratio) if length > 1 else 0
    left = min(max(concerned, 1), length)
    start = histories.draw_crop(rng, history.length, ratio)
    assert 0 <= int(start) <= length - left
    cut = histories.apply_crop(history, start, ratio)
    assert cut.items[0, 0].tolist() == references.crop(listed, int(start), left)
    assert cut.length.item() == left
    hidden = histories.draw_mask(rng, history.length, size, ratio)[0, 0].tolist()
    assert sum(hidden) == sum(hidden[:length]) == concerned
    source = histories.draw_reorder(rng, history.length, size, ratio)[0, 0].tolist()
    assert sorted(source) == list(range(size))
    moved = [place for place in range(size) if source[place] != place]
    assert not moved or max(moved) - min(moved) < concerned
    assert not moved or max(moved) < length


def worst_z(counts: np.ndarray, expected: float, total: int) -> float:
    """The largest deviation of counts that should all be `expected` of `total`."""
    share = expected / total
    return float(np.abs(counts - expected).max() / math.sqrt(expected * (1 - share)))


def edit_counts(rng: Rng, batch: int) -> dict[str, np.ndarray]:
    """How often each outcome came, for histories of length 5."""
    length = torch.full((rng.runs, batch), 5)
    edits = histories.draw_edits(rng, batch)
    order = histories.draw_reorder(rng, torch.full_like(length, 4), 4, 1.0)
    return {
        "pair": np.bincount((edits[..., 0] * 3 + edits[..., 1]).flatten(), minlength=9)[[1, 2, 3, 5, 6, 7]],
        "start of a crop": np.bincount(histories.draw_crop(rng, length).flatten(), minlength=4),
        "hidden place": histories.draw_mask(rng, length, 5).sum((0, 1)).numpy(),
        "order": np.unique((order * torch.tensor([64, 16, 4, 1])).sum(-1).flatten().numpy(), return_counts=True)[1],
    }


EXPECTED = {"pair": 1 / 6, "start of a crop": 1 / 4, "hidden place": 2 / 5, "order": 1 / 24}


def test_all_outcomes_of_an_edit_are_equally_likely() -> None:
    rng, batch = Rng(range(40), "test"), 1000
    counts = edit_counts(rng, batch)
    assert [len(found) for found in counts.values()] == [6, 4, 5, 24]
    for name, found in counts.items():  # 39 counts beyond 4.5: a false alarm in 1 of 3700
        assert worst_z(found, EXPECTED[name] * 40_000, 40_000) < ALARM, name


class Coarse(Rng):
    """Random numbers whose upper half favours small values slightly."""

    def bits(self, *shape: int) -> Tensor:
        word = super().bits(*shape)
        lower = super().bits(*shape)
        return torch.where(lower % 20 == 0, word & ((1 << 62) - 1), word)


def test_the_check_of_edits_has_teeth() -> None:
    counts = edit_counts(Coarse(range(40), "test"), 1000)
    assert worst_z(counts["pair"], 40_000 / 6, 40_000) > 6
    assert worst_z(counts["start of a crop"], 10_000, 40_000) > 6


def test_two_views_come_from_two_different_edits_and_a_single_item_stays() -> None:
    length = torch.tensor([[1, 0, 6, 6, 6, 6, 6, 6]]).expand(2, -1)
    whole, rng = numbered(length, 6), Rng([0, 1], "test")
    edits = histories.draw_edits(rng, 500)
    assert (edits[..., 0] != edits[..., 1]).all()
    for _ in range(20):
        one, two = histories.two_views(whole, rng)
        for view in (one, two):
            assert torch.equal(view.items[:, :2], whole.items[:, :2])
            assert torch.equal(view.length[:, :2], whole.length[:, :2])
        cut = [view.length[:, 2:] < 6 for view in (one, two)]
        hidden = [(view.items[:, 2:] == 0).any(-1) & ~short for view, short in zip((one, two), cut, strict=True)]
        assert not (cut[0] & cut[1]).any()
        assert not (hidden[0] & hidden[1]).any()
        assert (cut[0] | cut[1] | hidden[0] | hidden[1]).all()


def test_edits_keep_small_dtypes_are_the_same_alone_and_stacked_and_never_read_the_host() -> None:
    length = labels(12, 9, 3).view(1, 12).to(torch.int16)
    whole = numbered(length, 9)
    whole = History(whole.items.to(torch.int32), whole.length)
    three = History(whole.items.expand(3, -1, -1), whole.length.expand(3, -1))
    with NoHostReads():
        alone = histories.two_views(whole, Rng([5], "test"))
        stacked = histories.two_views(three, Rng([4, 5, 6], "test"))
    for one, many in zip(alone, stacked, strict=True):
        assert one.items.dtype == torch.int32
        assert one.length.dtype == torch.int16
        assert torch.equal(one.items[0], many.items[1])
        assert torch.equal(one.length[0], many.length[1])


# The encoder

SMALL = {"items": 9, "dim": 6, "layers": 2, "heads": 2, "inner": 8, "length": 5, "dropout": 0.4}


def small_net(seed: int = 0, spread: float = 0.5) -> SASRec:
    """A net whose weights are far from 0, so that every part matters."""
    torch.manual_seed(seed)
    net = SASRec(**SMALL).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=spread)
    return net


def test_the_encoder_has_the_published_size_and_start() -> None:
    torch.manual_seed(0)
    net = SASRec(12_101, 64, 2, 2, 256, 50, 0.5)
    assert sum(p.numel() for p in net.parameters()) == 877_888
    for name, parameter in net.state_dict().items():
        if "bias" in name:
            assert not parameter.any(), name
        elif "norm" in name or "attended" in name or "fed" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 * 6 / math.sqrt(2 * parameter.numel())  # six standard errors
            assert abs(float(parameter.std()) - 0.02) < expected, name
            assert abs(float(parameter.mean())) < 2 * expected, name
    assert net.table.weight[0].detach().abs().max() > 0.01  # the padding row is drawn like the others


@given(seed=seeds, holes=booleans())
def test_the_encoder_equals_its_definition_in_loops(seed: int, holes: bool) -> None:
    net = small_net(seed).eval()
    length = 1 + labels(3, 5, seed)
    items = (1 + labels(15, 9, seed)).view(3, 5).masked_fill(torch.arange(5) >= length[:, None], 0)
    if holes:  # masked views: a history may begin or end with item 0
        items = items * labels(15, 2, seed + 1).view(3, 5)
    state = {name: value.tolist() for name, value in net.state_dict().items()}
    for row in range(3):
        slow = torch.tensor(references.sasrec(state, 2, 2, items[row].tolist()), dtype=F64)
        assert_close(net.states(items)[row], slow, rtol=1e-9, atol=1e-9)
        assert_close(net(items, length)[row], slow[length[row] - 1], rtol=1e-9, atol=1e-9)


@given(seed=seeds, changed=integers(0, 4))
def test_a_state_depends_on_no_later_item(seed: int, changed: int) -> None:
    net = small_net(seed).eval()
    items = (1 + labels(5, 9, seed)).view(1, 5)
    other = items.clone()
    other[0, changed] = 1 + other[0, changed] % 9
    one, two = net.states(items)[0], net.states(other)[0]
    assert torch.equal(one[:changed], two[:changed])
    assert not torch.allclose(one[changed], two[changed])


def test_the_encoder_has_right_gradients_and_none_for_the_padding_row() -> None:
    net = small_net().eval()
    items, length = torch.tensor([[0, 3, 0, 0, 0], [4, 0, 1, 4, 0]]), torch.tensor([2, 4])
    names = [name for name, _ in net.named_parameters()]

    def out(*values: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (items, length))

    net(items, length).square().sum().backward()
    assert not net.table.weight.grad[0].any()
    assert net.table.weight.grad[4].any()
    values = [parameter.detach() for parameter in net.parameters()]
    others = [i for i, name in enumerate(names) if name != "table.weight"]  # its row 0 is held
    held = [value.requires_grad_(i in others) for i, value in enumerate(values)]
    assert torch.autograd.gradcheck(out, held, fast_mode=True)


def test_dropout_follows_its_noise_the_same_alone_and_stacked() -> None:
    nets = [small_net(seed).train() for seed in range(3)]
    items = (1 + labels(30, 9, 0)).view(3, 2, 5)
    length = torch.tensor([[5, 2]] * 3)
    size = nets[0].noise_size(2)
    noise = draw_noise(Rng([4, 5, 6], "test"), size)
    assert noise.shape == (3, 4 * -(-size // 4))
    assert torch.equal(noise[1], draw_noise(Rng([5], "test"), size)[0])
    with NoHostReads():
        stacked = Lift(nets)(items, length, noise)
    for run in range(3):
        alone = Lift([nets[run]])(items[run : run + 1], length[:1], noise[run : run + 1])[0]
        assert_close(stacked[run], alone)
    again, other = (Lift([nets[0]])(items[:1], length[:1], part) for part in (noise[:1], noise[1:2]))
    assert torch.equal(again[0], Lift([nets[0]])(items[:1], length[:1], noise[:1])[0])
    assert not torch.allclose(again, other)
    nets[0].eval()
    assert torch.equal(nets[0](items[0], length[0], noise[0]), nets[0](items[0], length[0]))


def test_a_lifted_encoder_holds_the_gradient_of_the_padding_row_too() -> None:
    lifted = Lift([small_net(seed).eval() for seed in range(2)])
    items, length = torch.tensor([[[0, 3, 0, 0, 0]]]).expand(2, -1, -1), torch.tensor([[2]]).expand(2, -1)
    lifted(items, length).square().sum().backward()
    gradient = lifted.weight("table.weight").grad
    assert not gradient[:, 0].any()
    assert gradient[:, 3].any(-1).all()


def test_dropout_keeps_the_stated_share_and_the_mean() -> None:
    noise = draw_noise(Rng([0], "test"), 400_000)[0]
    out = Dropout(0.3, noise)(torch.ones(400_000))
    z = (float((out == 0).float().mean()) - 0.3) / math.sqrt(0.3 * 0.7 / 400_000)
    assert abs(z) < ALARM  # false alarm in 1 of 150 000
    assert_close(out.max(), torch.tensor(1 / 0.7))


def test_heads_must_divide_the_features() -> None:
    with pytest.raises(BadConfig, match="3 heads do not divide"):
        SASRecConfig(heads=3)


# Rankings


@given(n=integers(1, 9), items=integers(1, 12), seed=seeds, k=integers(1, 6))
def test_rankings_equal_sorting_by_hand(n: int, items: int, seed: int, k: int) -> None:
    scores = labels(n * (items + 1), 4, seed).view(n, -1).double()  # many ties
    scores[labels(n * (items + 1), 5, seed + 1).view(n, -1) == 0] = -torch.inf
    target = 1 + labels(n, items, seed)
    metric = Ranking((k,))
    for part in torch.split(torch.arange(n), 4):
        metric.update(scores[None, part], {"target": target[None, part]})
    found = metric.result()
    slow = references.ranking(scores.tolist(), target.tolist(), k)
    for name, value in zip((f"hr{k}", f"ndcg{k}", f"mrr{k}"), slow, strict=True):
        assert_close(found[name], torch.tensor([[value]], dtype=F64))
    assert metric.result()[f"hr{k}"].isnan().all()  # it starts afresh


def test_a_ranking_by_hand() -> None:
    scores = torch.tensor([9.0, 3.0, 5.0, 5.0, 1.0])  # item 0 is padding, 2 and 3 are tied
    rank = ranks(scores.expand(5, -1), torch.arange(5))
    assert rank.tolist() == [math.inf, 3, 1, 1, 4]
    found = gains(rank, (3,))
    assert found["hr3"].tolist() == [0, 1, 1, 1, 0]
    assert found["ndcg3"].tolist() == [0, 0.5, 1, 1, 0]
    assert found["mrr3"].tolist() == [0, 1 / 3, 1, 1, 0]


def test_a_broken_model_ranks_nothing_well() -> None:
    scores = torch.zeros(2, 30)
    scores[0] = torch.nan
    scores[1, 4:] = torch.nan
    assert (ranks(scores, torch.tensor([3, 3])) > 20).all()


def test_rankings_count_scored_events_by_split_and_never_read_the_host() -> None:
    scores = torch.eye(6).expand(2, -1, -1)
    batch = {
        "target": torch.tensor([[0, 1, 2, 4, 3, 5], [1, 1, 2, 2, 3, 3]]),
        "length": torch.tensor([[1, 1, 0, 1, 1, 1]] * 2),
        "split": torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]]),
    }
    metric = Ranking((1,), runs=2, splits=3)
    with NoHostReads():
        metric.update(scores, batch)
        found = metric.result()["hr1"]
    assert_close(found, torch.tensor([[1 / 2, 1 / 2, torch.nan], [0, 1, torch.nan]], dtype=F64), equal_nan=True)


# What is measured


def test_means_are_sums_over_counts_and_nothing_over_nothing() -> None:
    found = engine.means({"hr10": [3.0, 0.0], "ndcg10": [1.5, 0.0], "tested": [4.0, 0.0]})
    np.testing.assert_array_equal(found["hr10"], [0.75, np.nan])
    np.testing.assert_array_equal(found["ndcg10"], [0.375, np.nan])
    assert engine.means({}) == {}


def test_test_then_train_sums_agree_with_the_metric() -> None:
    scores = rows(40, 31, 0).view(2, 20, 31)
    batch = {"target": labels(40, 31, 1).view(2, 20), "length": labels(40, 3, 2).view(2, 20)}
    sums, metric = measure.of("rank").test(scores, batch), Ranking((10,), runs=2)
    metric.update(scores, batch)
    whole = metric.result()
    for name in ("hr10", "ndcg10"):
        assert_close(sums[name] / sums["tested"], whole[name][:, 0])
    assert sums["tested"].tolist() == [
        sum(t > 0 and n > 0 for t, n in zip(*run, strict=True))
        for run in zip(batch["target"].tolist(), batch["length"].tolist(), strict=True)
    ]


def test_a_task_without_a_measure_is_refused() -> None:
    with pytest.raises(BadConfig, match=r"ask to segment.*classify"):
        measure.of("segment")


def test_encoders_and_samples_must_fit() -> None:
    pictures, lists = {"x": Field((3, 8, 8), torch.uint8)}, {"items": Field((20,), torch.int32)}
    assert encoders.usual(pictures) == "mlp"
    assert encoders.usual(lists) == "sasrec"
    made = encoders.make("sasrec", SASRecConfig(dim=8), lists, 31)
    assert isinstance(made, SASRec)
    assert (made.items, made.length, made.dim) == (30, 20, 8)
    with pytest.raises(BadConfig, match=r"encoder.name=sasrec"):
        encoders.make("mlp", None, lists, 31)
    with pytest.raises(BadConfig, match=r"encoder.name=mlp"):
        encoders.make("sasrec", SASRecConfig(), pictures, 10)


# The stream

CPU = torch.device("cpu")
FOLDERS = [os.environ.get("CL_SIM_DATA", ""), str(Path(__file__).resolve().parent.parent.parent / "shared" / "data")]
REAL = next((folder for folder in FOLDERS if folder and (Path(folder) / "recsys").is_dir()), "")
needs_files = pytest.mark.skipif(not REAL, reason="no interaction lists under CL_SIM_DATA or ../shared/data")


def stream_of(seeds: tuple[int, ...] = (0,), iid: bool = False, **settings: Any) -> Sequences:
    return Sequences(
        SequencesConfig(**{"data": "made-up", "batch": 16, "segments": 2, **settings}), seeds, CPU, REAL, iid=iid
    )


def users_of(data: interactions.Interactions) -> list[list[int]]:
    return [part.tolist() for part in np.split(data.items, data.starts[1:])]


def events_of(stream: Sequences, run: int = 0) -> list[tuple[int, int, int]]:
    """(user, position, item) of every event of the stream, without the filling."""
    found = []
    for step in range(len(stream)):
        batch = stream.batch(step)
        keys = (batch[key][run].tolist() for key in ("user", "position", "target"))
        found += [event for event in zip(*keys, strict=True) if event[0]]
    return found


@given(sizes=lists(integers(1, 6), min_size=1, max_size=9), order=sampled_from(["relative", "round", "staggered"]))
def test_orders_equal_sorting_by_their_keys(sizes: list[int], order: Any) -> None:
    users = [[10 * u + k for k in range(size)] for u, size in enumerate(sizes)]
    flat = np.array([item for items in users for item in items])
    user, position = in_order(interactions.Interactions("test", flat, np.array(sizes)), order)
    found = [(int(u), int(k), users[u - 1][k]) for u, k in zip(user, position, strict=True)]
    assert found == references.in_order(users, order)


@pytest.mark.parametrize("order", ["relative", "round", "staggered"])
def test_every_event_comes_once_with_its_history(order: str) -> None:
    stream = stream_of((3, 4), order=order, longest=4)
    users = users_of(stream.data)
    assert events_of(stream) == events_of(stream, run=1) == references.in_order(users, order)
    for step in (len(stream) - 1, 0, len(stream) // 2):
        batch = stream.batch(step)
        assert batch.keys() == stream.fields.keys()
        for key, field in stream.fields.items():
            assert batch[key].shape == (2, 16, *field.shape)
            assert batch[key].dtype == field.dtype
        for b in range(16):
            u, k = int(batch["user"][1, b]), int(batch["position"][1, b])
            history = users[u - 1][max(k - 4, 0) : k] if u else []
            assert batch["items"][1, b].tolist() == history + [0] * (4 - len(history))
            assert batch["length"][1, b] == len(history)
            assert batch["target"][1, b] == (users[u - 1][k] if u else 0)


def test_a_shuffled_order_holds_the_same_events_and_depends_on_the_seed() -> None:
    plain, mixed = stream_of(), stream_of((0, 1), iid=True)
    assert events_of(mixed) != events_of(mixed, run=1)
    assert sorted(events_of(mixed)) == sorted(events_of(mixed, run=1)) == sorted(events_of(plain))


def test_segments_hold_equally_many_scored_events() -> None:
    assert segment_ends(np.array([0, 4, 4, 4, 4, 1]), 2) == [3, 5]
    assert segment_ends(np.array([4, 4, 4, 4, 4, 4, 4, 4]), 4) == [1, 3, 5, 7]
    with pytest.raises(BadConfig, match="use fewer segments"):
        segment_ends(np.array([0, 9, 0]), 2)
    with pytest.raises(BadConfig, match="use fewer segments"):
        segment_ends(np.array([0, 0]), 1)


def test_probes_are_scored_events_of_their_segment_and_stay_the_same() -> None:
    stream = stream_of((0, 1), segments=3, probe=20, subset=6)
    ends = [step for step in range(len(stream)) if stream.ends_task(step)]
    assert len(ends) == 3
    assert ends[-1] == len(stream) - 1
    order = {event[:2]: step // 16 for step, event in enumerate(events_of(stream))}
    chunks = list(stream.holdout().chunks(ends[0], True))
    whole = {key: torch.cat([chunk[key] for chunk in chunks], 1) for key in chunks[0]}
    assert torch.bincount(whole["split"][1]).tolist() == [20, 20, 20]
    assert torch.equal(whole["user"][0], whole["user"][1])
    assert (whole["length"] > 0).all()
    for u, k, split in zip(*(whole[key][0].tolist() for key in ("user", "position", "split")), strict=True):
        assert (ends[split - 1] if split else -1) < order[u, k] <= ends[split]
    few = list(stream.holdout().chunks(ends[1], False))
    assert torch.bincount(torch.cat([chunk["split"] for chunk in few], 1)[0]).tolist() == [6, 6]
    assert stream.seen(ends[0]).tolist() == [[True, False, False]] * 2
    assert not stream.seen(ends[0] - 1).any()
    assert list(stream.holdout().chunks(0, False)) == []


def test_leave_one_out_cuts_windows_as_published(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("1 1 2 3 4 5\n2 7 8\n")
    stream = stream_of((0, 1), data=f"lists:{tmp_path / 'l.txt'}", protocol="offline", longest=4, batch=2, passes=3)

    def windows(batch: Batch) -> list[tuple[list[int], int]]:
        rows = zip(batch["items"][0].tolist(), batch["length"][0].tolist(), batch["target"][0].tolist(), strict=True)
        return [(items[:length], target) for items, length, target in rows]

    assert len(stream) == 3
    for step in range(3):  # one step is one pass
        assert sorted(windows(stream.batch(step))) == [([1], 2), ([1, 2], 3)]
        assert stream.ends_task(step)
    (left_out,) = stream.holdout().chunks(0, True)
    assert stream.holdout().names == ("validation", "test")
    assert windows(left_out) == [([1, 2, 3], 4), ([1, 2, 3, 4], 5)]
    assert left_out["split"].tolist() == [[0, 1]] * 2


def test_passes_are_shuffled_anew_and_depend_on_seed_and_step_alone() -> None:
    stream, again = (stream_of((0, 1), protocol="offline", passes=2) for _ in range(2))
    half = len(stream) // 2
    assert not torch.equal(stream.batch(0)["user"], stream.batch(half)["user"])
    assert not torch.equal(stream.batch(0)["user"][0], stream.batch(0)["user"][1])
    for step in (half + 1, 0, half, 1):
        assert torch.equal(stream.batch(step)["user"], again.batch(step)["user"])
    first = sorted(events_of(stream)[: sum(max(n - 3, 0) for n in stream.data.lengths)])
    assert first == sorted((u, k, i) for u, k, i in events_of(stream_of()) if 0 < k < stream.data.lengths[u - 1] - 2)


def test_tables_with_times_are_sorted_by_them(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("user,item,time\nann,tea,30\nbob,tea,10\nann,jam,20\nbob,bun,25\n\n")
    stream = stream_of(data=f"csv:{path}", order="time", segments=1)
    assert events_of(stream) == [(2, 0, 1), (1, 0, 2), (2, 1, 3), (1, 1, 1)]
    path.write_text("ann,tea\nbob,tea\nann,jam\n")
    assert events_of(stream_of(data=f"csv:{path}", order="time", segments=1)) == [(1, 0, 1), (2, 0, 1), (1, 1, 2)]


@pytest.mark.parametrize(
    ("form", "text", "words"),
    [
        ("lists", "1 2 3\n3 4\n", "line 2: user 3 comes where user 2 is due"),
        ("lists", "1 2 x\n", "line 1: a line is a user"),
        ("lists", "1 2 0\n", "line 1: a line is a user"),
        ("lists", "1\n", "line 1: a line is a user"),
        ("lists", "\n", "holds no interactions"),
        ("csv", "ann\n", "line 1: a row is user,item"),
        ("csv", "user,item,time\nann,tea,late\n", "line 2: the time is 'late'"),
        ("csv", "user,item\n", "holds no interactions"),
    ],
)
def test_damaged_files_are_refused_naming_the_line(form: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(BadData, match=words):
        interactions.load(f"{form}:{tmp_path / 'f'}")


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    for settings, words in (
        ({"passes": 2}, "protocol=offline"),
        ({"order": "time"}, "has no times"),
        ({"segments": 1000}, "use fewer segments"),
    ):
        with pytest.raises(BadConfig, match=words):
            stream_of(**settings)
    (tmp_path / "short.txt").write_text("1 1 2\n")
    with pytest.raises(BadConfig, match="three items"):
        stream_of(data=f"lists:{tmp_path / 'short.txt'}", protocol="offline")
    with pytest.raises(UnknownName, match="beauty"):
        interactions.load("beuty")
    with pytest.raises(BadData, match="put the file there"):
        interactions.load("beauty", str(tmp_path))
    with pytest.raises(BadData, match="no file"):
        interactions.load("csv:/nowhere.csv")


def test_the_timeline_of_a_stream_counts_its_targets() -> None:
    stream = stream_of()
    counts = timeline.of(stream, bins=4).counts
    assert counts[:, 1:].sum() == len(stream.data.items)


@needs_files
def test_beauty_has_the_published_counts_and_the_stated_order() -> None:
    streams = {order: stream_of(data="beauty", order=order, batch=256) for order in ("relative", "staggered")}
    about = streams["relative"].describe()
    assert [about[key] for key in ("users", "items", "interactions", "scored")] == [22_363, 12_101, 198_502, 176_139]
    assert about["new targets"].startswith("3.3%")
    assert streams["staggered"].describe()["new targets"].startswith("6.1%")
    relative, staggered = streams["relative"], streams["staggered"]
    first = relative.batch(0)
    start = zip(*(first[key][0, :4].tolist() for key in ("user", "position", "target")), strict=True)
    assert list(start) == [(996, 0, 3708), (2670, 0, 3966), (179, 0, 528), (1049, 0, 6102)]
    last = staggered.batch(len(staggered) - 1)
    end = zip(*(last[key][0].tolist() for key in ("user", "position", "target")), strict=True)
    assert [event for event in end if event[0]][-3:] == [(22243, 44, 12056), (22308, 20, 5571), (22337, 17, 11791)]
    offline = stream_of(data="beauty", protocol="offline", batch=256)
    assert len(offline.user) == 198_502 - 3 * 22_363
    assert offline.holdout().user.shape == (1, 2, 22_363)


# Baselines


def prequential(made: Toy) -> list[tuple[float, float]]:
    """HR@10 and NDCG@10 over all scored events of the stream, per run."""
    total: dict[str, Tensor] = {}
    with torch.inference_mode():
        for step in range(len(made.stream)):
            batch = made.stream.batch(step)
            for name, value in engine.test(made.strategy, batch, batch).items():
                total[name] = total.get(name, torch.zeros(())) + value
            made.strategy.observe(batch)
    names = ("test hr10", "test ndcg10")
    return list(zip(*((total[name] / total["test tested"]).tolist() for name in names), strict=True))


@pytest.mark.parametrize("growing", [False, True])
@pytest.mark.parametrize("name", ["popularity", "markov1"])
def test_baselines_rank_as_sorting_by_counts_does(name: str, growing: bool) -> None:
    settings = {"strategy": {"mask_unseen": growing}, "stream": {"longest": 3}}
    made = toy(name, (0, 1), settings)
    users = users_of(made.stream.data)
    places = references.prequential(references.in_order(users, "relative"), 60, 16, name == "markov1", growing)
    hits = sum(place <= 10 for place in places) / len(places)
    gain = math.fsum(1 / math.log2(place + 1) for place in places if place <= 10) / len(places)
    for run in prequential(made):
        assert run == pytest.approx((hits, gain), abs=1e-9)


def on_real(name: str, data: str, order: str) -> tuple[float, float]:
    settings = {
        "stream": {"data": data, "order": order, "batch": 256, "segments": 10, "longest": 50},
        "data": REAL,
    }
    (found,) = prequential(toy(name, (0,), settings))
    return found


STATED = [  # HR@10 and NDCG@10 over all scored events
    ("popularity", "beauty", "relative", 0.01641, 0.00771),
    ("popularity", "beauty", "staggered", 0.01640, 0.00792),
    ("popularity", "toys", "relative", 0.01073, 0.00533),
]
STATED_SLOW = [
    ("popularity", "sports", "relative", 0.01696, 0.00919),
    ("markov1", "beauty", "relative", 0.10038, 0.06531),
    ("markov1", "beauty", "staggered", 0.10083, 0.06495),
    ("markov1", "sports", "relative", 0.04373, 0.02747),
    ("markov1", "toys", "relative", 0.06751, 0.04461),
]
every_figure = pytest.mark.parametrize(
    ("name", "data", "order", "hits", "gain"),
    [*STATED, *(pytest.param(*row, marks=pytest.mark.slow) for row in STATED_SLOW)],
)


@needs_files
@every_figure
def test_baselines_reach_the_stated_figures(name: str, data: str, order: str, hits: float, gain: float) -> None:
    assert on_real(name, data, order) == pytest.approx((hits, gain), abs=1e-5)


def test_a_ranking_is_recorded_as_such(tmp_path: Path) -> None:
    made = toy("markov1", (0, 1), {"stream": {"segments": 3}})
    plan = engine.Plan.of(made.stream, per_task=3, prequential=10, flush_every=5, save_every=100)
    with Journal(tmp_path / "journal.jsonl") as journal:
        progress = engine.drain(engine.steps(made.stream, made.strategy, plan, journal, engine.Place(tmp_path, "test")))
    assert progress is not None
    lines = read(tmp_path / "journal.jsonl")[0]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["task_end"] for line in evaluations].count(True) == 3
    assert all(any(line["seen"][0]) for line in evaluations[1:])  # nothing is asked before there is a probe
    assert {line["measure"] for line in evaluations} == {"hr10"}
    assert all(line["ndcg10"][0][0] <= line["accuracy"][0][0] for line in evaluations)
    twin = toy("markov1", (0, 1), {"stream": {"segments": 3}})
    last = [line for line in lines if line["kind"] == "curve"][-1]["values"]
    for run, (hits, gain) in enumerate(prequential(twin)):
        assert last["hr10_prequential"][run] == pytest.approx(hits, abs=1e-6)
        assert last["ndcg10_prequential"][run] == pytest.approx(gain, abs=1e-6)
    assert progress.late["tested"][0] < progress.sums["tested"][0]
    assert engine.Plan.of(made.stream, per_task=3, prequential=0, flush_every=5, save_every=100).test_every == 0


@pytest.mark.parametrize("stop_at", [200, 13])
def test_the_window_holds_the_newest_batches_with_so_many_scored_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    assert measure.of("rank").window == 10_000
    monkeypatch.setitem(measure.MEASURES, "rank", replace(measure.of("rank"), window=60))
    asked = iter([False] * stop_at + [True] + [False] * 100)
    for _ in range(2):
        made = toy("markov1", (0, 1))
        plan = engine.Plan.of(made.stream, per_task=1, prequential=1, flush_every=3, save_every=100)
        with Journal(tmp_path / "journal.jsonl") as journal:
            place = engine.Place(tmp_path, "test")
            if (
                engine.drain(engine.steps(made.stream, made.strategy, plan, journal, place, stop=lambda: next(asked)))
                is not None
            ):
                break
    by_step, twin = list[tuple[float, float]](), toy("markov1", (0,))  # hits and scored events of each batch
    for step in range(len(twin.stream)):
        batch = twin.stream.batch(step)
        sums = engine.test(twin.strategy, batch, batch)
        by_step.append((sums["test hr10"].item(), sums["test tested"].item()))
        twin.strategy.observe(batch)
    curves = [line for line in read(tmp_path / "journal.jsonl")[0] if line["kind"] == "curve"]
    longer = 0
    for line in curves:
        done = line["samples"] // 16
        newest = next((n for n in range(1, done) if sum(count for _, count in by_step[done - n : done]) >= 60), done)
        longer += newest > 3
        hits, count = (sum(column) for column in zip(*by_step[done - newest : done], strict=True))
        for value in line["values"]["hr10_window"]:
            assert value == (None if count == 0 else pytest.approx(hits / count, abs=1e-6))
    assert longer > len(curves) / 2
