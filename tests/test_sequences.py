"""Sequence learning: contrasts of two views, edits of histories, the encoder, rankings, and streams of interactions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import references_sequences as references
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, sampled_from
from torch import Tensor
from torch.testing import assert_close

from cl_sim import encoders, engine, histories, losses, measure
from cl_sim.encoders.augmenter import Augmenter
from cl_sim.encoders.transformer import Dropout, SASRec, SASRecConfig, draw_noise
from cl_sim.errors import BadConfig
from cl_sim.histories import History
from cl_sim.metrics.ranking import Ranking, gains, ranks
from cl_sim.rng import Rng
from cl_sim.runs import Lift, per_run
from cl_sim.testing import NoHostReads
from cl_sim.types import Field

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
    with pytest.raises(BadConfig, match="ask to embed"):
        measure.of("embed")


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
