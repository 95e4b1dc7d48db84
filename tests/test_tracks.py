"""Tracks, items and the online tracker, against slow twins, by hand and at their edges."""

from __future__ import annotations

import math
from functools import partial

import pytest
import references_tracks as references
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, floats, integers, sampled_from
from torch import Tensor
from torch.func import vmap
from torch.testing import assert_close

from cl_sim.boxes import overlap as box_overlap
from cl_sim.clips import Items, Roll, clip_items, pair_items, pairing, roll, wrong_rows
from cl_sim.errors import BadConfig, ClSimError
from cl_sim.losses import bank_contrast
from cl_sim.memory.instances import InstanceBank
from cl_sim.memory.tracks import (
    Tracks,
    ageing,
    bi_softmax,
    clear,
    cosine,
    empty,
    last,
    noise,
    running_average,
    store,
    temporal,
)
from cl_sim.runs import per_run
from cl_sim.testing import NoHostReads
from cl_sim.tracker import (
    TrackerConfig,
    advance,
    follow,
    hashed,
    mask_overlap,
    order_of,
    suppress,
    without_short,
)

F64 = torch.float64
seeds = integers(0, 10**6)
sizes = integers(1, 4)


def maker(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=maker(seed))


def flags(*shape: int, seed: int = 0, share: float = 0.6) -> Tensor:
    return torch.rand(*shape, generator=maker(seed)) < share


def clip(frames: int, width: int, instances: int, seed: int, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, who is present, and in which row: each instance in a row of its own, another one in every frame."""
    emb = rows(frames, width, dim, seed=seed)
    order = torch.stack([torch.randperm(width, generator=maker(seed * 100 + t)) for t in range(frames)], 1)
    return emb, flags(instances, frames, seed=seed + 1), order[:instances]


def listed(items: Items) -> list[tuple[list[float], list[list[float]], list[list[float]]]]:
    """The items that exist, as lists."""
    found = []
    for anchor, positives, negatives, p, n in zip(*items, strict=True):
        if p.any() and n.any():
            found.append((anchor.tolist(), positives[p].tolist(), negatives[n].tolist()))
    return found


def same_items(fast: Items, slow: list[tuple[list[float], list[list[float]], list[list[float]]]]) -> None:
    mine = listed(fast)
    assert len(mine) == len(slow)
    for (a, p, n), (b, q, m) in zip(mine, slow, strict=True):
        assert a == b
        assert_close(torch.tensor(p, dtype=F64), torch.tensor(q, dtype=F64))
        assert_close(torch.tensor(n, dtype=F64), torch.tensor(m, dtype=F64))


# losses


@given(a=sizes, p=sizes, n=sizes, seed=seeds)
def test_bank_contrast_equals_the_loops(a: int, p: int, n: int, seed: int) -> None:
    anchors, positives, negatives = rows(a, 3, seed=seed), rows(a, p, 3, seed=seed + 1), rows(a, n, 3, seed=seed + 2)
    masks = flags(a, p, seed=seed + 3), flags(a, n, seed=seed + 4)
    slow = references.bank_contrast(
        [
            (anchors[i].tolist(), positives[i][masks[0][i]].tolist(), negatives[i][masks[1][i]].tolist())
            for i in range(a)
        ]
    )
    fast = bank_contrast(anchors, positives, negatives, *masks)
    assert_close(torch.stack(fast), torch.tensor(slow, dtype=F64))


@given(a=sizes, p=sizes, n=sizes, seed=seeds)
def test_bank_contrast_does_not_look_at_padding(a: int, p: int, n: int, seed: int) -> None:
    anchors, positives, negatives = rows(a, 3, seed=seed), rows(a, p, 3, seed=seed + 1), rows(a, n, 3, seed=seed + 2)
    masks = flags(a, p, seed=seed + 3), flags(a, n, seed=seed + 4)
    counted = masks[0].any(1) & masks[1].any(1)
    spoilt = (
        anchors.masked_fill(~counted[:, None], math.inf),
        positives.masked_fill(~masks[0][..., None], math.nan),
        negatives.masked_fill(~masks[1][..., None], math.inf),
    )
    leaves = [part.clone().requires_grad_() for part in spoilt]
    loss = bank_contrast(*leaves, *masks)
    assert_close(torch.stack(loss), torch.stack(bank_contrast(anchors, positives, negatives, *masks)))
    sum(loss).backward()
    assert all(leaf.grad is None or leaf.grad.isfinite().all() for leaf in leaves)


def test_the_gradients_of_bank_contrast_are_right() -> None:
    masks = flags(4, 2, seed=1), flags(4, 3, seed=2)
    leaves = [rows(4, 3).requires_grad_(), rows(4, 2, 3, seed=1).requires_grad_(), rows(4, 3, 3).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *parts: bank_contrast(*parts, *masks), leaves)


@given(seed=seeds)
def test_with_one_positive_bank_contrast_is_a_cross_entropy(seed: int) -> None:
    anchors, positives, negatives = rows(5, 3, seed=seed), rows(5, 1, 3, seed=seed + 1), rows(5, 4, 3, seed=seed + 2)
    every = torch.ones(5, 1, dtype=torch.bool), torch.ones(5, 4, dtype=torch.bool)
    scores = (torch.cat([positives, negatives], 1) @ anchors[..., None])[..., 0]
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(5, dtype=torch.int64))
    assert_close(bank_contrast(anchors, positives, negatives, *every)[0], expected)


def test_bank_contrast_stays_finite_where_exponentials_do_not() -> None:
    anchors = torch.full((1, 2), 300.0, requires_grad=True)
    every = torch.ones(1, 1, dtype=torch.bool)
    embed, _ = bank_contrast(anchors, -torch.ones(1, 1, 2), torch.ones(1, 1, 2), every, every)
    assert embed.item() == pytest.approx(1200.0)
    embed.backward()
    assert anchors.grad is not None
    assert anchors.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 1, 2), (0, 1, 2), (3, 0, 2), (3, 1, 0)])
def test_without_items_bank_contrast_is_zero_with_a_graph(shape: tuple[int, int, int]) -> None:
    a, p, n = shape
    anchors = rows(a, 3).requires_grad_()
    masks = torch.zeros(a, p, dtype=torch.bool), torch.zeros(a, n, dtype=torch.bool)
    loss = sum(bank_contrast(anchors, rows(a, p, 3), rows(a, n, 3), *masks))
    assert loss.item() == 0
    loss.backward()
    assert anchors.grad is not None
    assert not anchors.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bank_contrast_of_halves_is_computed_in_single_precision(dtype: torch.dtype) -> None:
    parts = [part.to(dtype) for part in (rows(4, 3), rows(4, 2, 3, seed=1), rows(4, 3, 3, seed=2))]
    masks = flags(4, 2, seed=1), flags(4, 3, seed=2)
    found, expected = bank_contrast(*parts, *masks), bank_contrast(*(p.float() for p in parts), *masks)
    assert found[0].dtype == torch.float32
    assert_close(torch.stack(found), torch.stack(expected))


def test_bank_contrast_lifts_to_runs() -> None:
    parts = rows(2, 4, 3), rows(2, 4, 2, 3, seed=1), rows(2, 4, 3, 3, seed=2)
    masks = flags(2, 4, 2, seed=1), flags(2, 4, 3, seed=2)
    both = per_run(bank_contrast)(*parts, *masks)
    for run in range(2):
        alone = bank_contrast(*(part[run] for part in (*parts, *masks)))
        assert_close(torch.stack([both[0][run], both[1][run]]), torch.stack(alone))


# averages and read-outs


@given(h=integers(1, 5), seed=seeds)
def test_running_average_equals_the_loops(h: int, seed: int) -> None:
    average, history, new = rows(4, 3, seed=seed), rows(4, h, 3, seed=seed + 1), rows(4, 3, seed=seed + 2)
    mask = flags(4, h, seed=seed + 3)
    slow = [
        references.running_average(average[i].tolist(), history[i][mask[i]].tolist(), new[i].tolist()) for i in range(4)
    ]
    assert_close(running_average(average, history, mask, new), torch.tensor(slow, dtype=F64))
    assert_close(vmap(running_average)(average, history, mask, new), torch.tensor(slow, dtype=F64))


def test_a_vector_that_disagrees_is_stored_and_counted_but_moves_no_average() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.1]])
    tracks = store(empty(1, 3, one), torch.tensor([True]), one, torch.ones(1))
    tracks = store(tracks, torch.tensor([True]), other, torch.ones(1))
    assert_close(tracks.average, one)
    assert tracks.seen.tolist() == [2]
    assert_close(tracks.read("last"), other)


def test_the_average_of_three_views_worked_by_hand() -> None:
    a, b, c = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]), torch.tensor([0.0, 1.0])
    nothing = torch.zeros(2, 2)
    first = running_average(torch.zeros(2), nothing, torch.tensor([False, False]), a)
    assert first.tolist() == [1, 0]
    second = running_average(first, torch.stack([a, b]), torch.tensor([True, False]), b)  # weight 0.6
    assert second.tolist() == pytest.approx([0.4 + 0.36, 0.48])
    third = running_average(second, torch.stack([a, b]), torch.tensor([True, True]), c)  # weight (0 + 0.8) / 2
    assert third.tolist() == pytest.approx([0.6 * 0.76, 0.6 * 0.48 + 0.4])


def test_gradients_reach_the_average_the_history_and_the_weight() -> None:
    parts = [rows(3, seed=1).requires_grad_(), rows(2, 3, seed=2).requires_grad_(), rows(3, seed=3).requires_grad_()]
    mask = torch.tensor([True, True])
    assert torch.autograd.gradcheck(lambda a, h, x: running_average(a, h, mask, x), parts)
    near = [torch.tensor(v, dtype=F64, requires_grad=True) for v in ([1.0, 0.2], [[1.0, 0.1], [0.9, 0.0]], [1.0, 0.3])]
    running_average(near[0], near[1], mask, near[2]).sum().backward()
    assert near[1].grad is not None
    assert near[1].grad.any()
    near[1].grad = None
    running_average(near[0], near[1], mask, near[2], detach=True).sum().backward()
    assert near[1].grad is None or not near[1].grad.any()


@given(n=sizes, k=sizes, seed=seeds)
def test_bi_softmax_equals_the_loops(n: int, k: int, seed: int) -> None:
    candidates, averages = rows(n, 3, seed=seed), rows(k, 3, seed=seed + 1)
    slow = torch.tensor(references.bi_softmax(candidates.tolist(), averages.tolist()), dtype=F64)
    assert_close(bi_softmax(candidates, averages), slow)
    padded = torch.cat([candidates, rows(2, 3)]), torch.cat([averages, rows(1, 3)])
    masks = torch.arange(n + 2) < n, torch.arange(k + 1) < k
    found = bi_softmax(*padded, *masks)
    assert_close(found[:n, :k], slow)
    assert not found[n:].any()
    assert not found[:, k:].any()


def test_a_lonely_track_likes_every_candidate_at_least_half() -> None:
    assert (bi_softmax(10 * rows(5, 3), rows(1, 3, seed=1)) >= 0.5).all()


@given(h=integers(1, 4), seed=seeds)
def test_the_temporal_readout_equals_the_loops(h: int, seed: int) -> None:
    history, scores = rows(4, 3, seed=seed), rows(4, seed=seed + 1).abs()
    mask = torch.arange(4) >= 4 - h  # the newest last
    slow = references.temporal(history[4 - h :].tolist(), scores[4 - h :].tolist())
    assert_close(temporal(history, mask, scores), torch.tensor(slow, dtype=F64))
    assert not temporal(history, torch.zeros(4, dtype=torch.bool), scores).any()
    assert_close(last(history, mask), history[-1])


def test_history_is_cut_from_the_front_and_the_average_is_left_alone() -> None:
    views = torch.nn.functional.normalize(rows(14, 3) + 3, dim=1)
    short, long = empty(1, 10, views), empty(1, 20, views)
    yes = torch.tensor([True])
    for view in views[:10]:
        short, long = (store(tracks, yes, view[None], torch.ones(1, dtype=F64)) for tracks in (short, long))
    assert_close(short.average, long.average)
    before = short.average
    short = store(short, yes, views[10][None], torch.ones(1, dtype=F64))
    assert_close(short.history[0], views[1:11])
    assert_close(
        short.average, running_average(before, views[None, :10], torch.ones(1, 10, dtype=torch.bool), views[10])
    )
    assert short.seen.item() == 11


def test_the_momentum_readout_weighs_the_newest_by_three_quarters() -> None:
    views, yes = rows(3, 1, 2), torch.tensor([True])
    tracks = empty(1, 2, views)
    for view in views:
        tracks = store(tracks, yes, view, torch.ones(1, dtype=F64))
    assert_close(tracks.read("momentum"), 0.75 * views[2] + 0.25 * (0.75 * views[1] + 0.25 * views[0]))


def test_a_track_lives_for_twenty_unseen_frames_and_dies_in_the_next() -> None:
    age = torch.tensor([0])
    for _ in range(20):
        age, lives = ageing(age, torch.tensor([False]), 20)
        assert lives.item()
    age, lives = ageing(age, torch.tensor([False]), 20)
    assert not lives.item()
    assert ageing(age, torch.tensor([True]), 20)[0].item() == 0


@given(q=integers(1, 6), seed=seeds)
def test_noise_draws_allowed_rows_only(q: int, seed: int) -> None:
    allowed, pick = flags(50, q, seed=seed), torch.rand(50, generator=maker(seed))
    row = noise(torch.ones(50, dtype=torch.bool), pick, allowed)
    assert ((row >= 0) == allowed.any(1)).all()
    assert allowed.gather(1, row.clamp(min=0)[:, None])[row >= 0].all()
    assert (noise(torch.zeros(50, dtype=torch.bool), pick, allowed) == -1).all()


def test_noise_draws_every_allowed_row_equally_often() -> None:
    """Binomial counts of 40,000 draws, z below 5 in 4 rows: a false alarm once in 400,000."""
    allowed = torch.tensor([True, False, True, True, True]).expand(40_000, -1)
    row = noise(torch.ones(40_000, dtype=torch.bool), torch.rand(40_000, generator=maker(0)), allowed)
    counts = torch.stack([(row == q).sum() for q in (0, 2, 3, 4)]).double()
    assert ((counts - 10_000).abs() / math.sqrt(7500) < 5).all()
    biased = noise(torch.ones(40_000, dtype=torch.bool), torch.rand(40_000, generator=maker(0)) ** 1.1, allowed)
    assert (torch.stack([(biased == q).sum() for q in (0, 2, 3, 4)]).sub(10_000).abs() / math.sqrt(7500)).max() > 5


# items


@settings(max_examples=60)
@given(
    frames=integers(2, 6),
    width=integers(2, 5),
    rule=sampled_from(["frame", "bank", "bank+background"]),
    noisy=booleans(),
    anywhere=booleans(),
    seed=seeds,
)
def test_clip_items_equal_the_loops(frames: int, width: int, rule: str, noisy: bool, anywhere: bool, seed: int) -> None:
    emb, present, match = clip(frames, width, width - 1, seed)
    coins = torch.rand(present.shape, generator=maker(seed + 5))
    wrong = torch.full_like(match, -1)
    if noisy:
        everywhere = Roll(present, match, *(torch.ones(frames, width, dtype=torch.bool),) * 2, torch.zeros(()))
        hit = flags(*present.shape, seed=seed + 6)
        pick = torch.rand(present.shape, generator=maker(seed + 7))
        wrong = wrong_rows(everywhere, hit, pick, on="any" if anywhere else "absent")
    slow = references.clip_items(
        emb.tolist(), present.tolist(), match.tolist(), rule, (coins < 0.5).tolist(), wrong.tolist()
    )
    same_items(clip_items(emb, present, match, rule, 0.5, coins=coins, wrong=wrong), slow)


@pytest.mark.parametrize("rule", ["frame", "bank", "bank+background"])
def test_clip_items_lift_to_clips_and_runs_and_read_no_host(rule: str) -> None:
    clips = [clip(5, 4, 3, seed) for seed in range(4)]
    emb, present, match = (torch.stack(parts).unflatten(0, (2, 2)) for parts in zip(*clips, strict=True))
    make = partial(clip_items, negatives=rule, p_average=1.0)
    with NoHostReads():
        both = vmap(vmap(make))(emb, present, match)
    for k in range(4):
        assert_close(Items(*(part.flatten(0, 1)[k] for part in both)), make(*clips[k]))


def test_a_coin_of_zero_or_one_draws_nothing() -> None:
    state = torch.get_rng_state()
    for p in (0.0, 1.0):
        clip_items(*clip(4, 3, 2, 0), "bank", p)
    assert torch.equal(state, torch.get_rng_state())


def test_an_underscore_names_the_same_rule_and_nonsense_none() -> None:
    made = clip(4, 3, 2, 0)
    assert_close(clip_items(*made, "bank_background", 1.0), clip_items(*made, "bank+background", 1.0))
    with pytest.raises(BadConfig, match="allowed are frame, bank, bank"):
        clip_items(*made, "banks", 1.0)


def test_five_frames_worked_by_hand() -> None:
    """Instance 0 is hidden in frame 2, instance 1 comes in frame 1 and is gone from frame 3 on; row 2 is background."""
    a, b, n = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]
    emb = torch.tensor([[a, n, n], [a, b, n], [n, b, n], [a, n, n], [a, n, n]], dtype=F64)
    present = torch.tensor([[True, True, False, True, True], [False, True, True, False, False]])
    match = torch.tensor([[0] * 5, [1] * 5])
    found = listed(clip_items(emb, present, match, "bank", 1.0))
    assert found == [  # instance 0 in frame 1 has no negative, the bank holds nobody else
        (b, [b], [a]),  # instance 1 in frame 1: never seen before, so its first later view is the positive
        (b, [b], [a]),  # frame 2
        (a, [a], [b]),  # instance 0 is back in frame 3, and instance 1 is still remembered
        (a, [a], [b]),
    ]
    background = listed(clip_items(emb, present, match, "bank+background", 1.0))
    assert background[0] == (a, [a], [n, n])
    assert background[-1] == (a, [a], [b, n, n])
    capped = listed(clip_items(emb, present, match, "bank+background", 1.0, max_background=1))
    assert capped[-1] == (a, [a], [b, n])


@given(frames=integers(2, 6), rule=sampled_from(["frame", "bank", "bank+background"]), seed=seeds)
def test_the_loss_depends_neither_on_the_order_of_rows_nor_on_that_of_instances(
    frames: int, rule: str, seed: int
) -> None:
    emb, present, match = clip(frames, 4, 3, seed)
    order = torch.stack(
        [torch.randperm(4, generator=maker(seed + t)) for t in range(frames)]
    )  # old row of each new one
    moved = torch.stack([emb[t, order[t]] for t in range(frames)])
    places = torch.stack([order[t].argsort()[match[:, t]] for t in range(frames)], 1)
    renumbered = torch.randperm(3, generator=maker(seed))
    before = bank_contrast(*clip_items(emb, present, match, rule, 1.0))
    after = bank_contrast(*clip_items(moved, present[renumbered], places[renumbered], rule, 1.0))
    assert_close(torch.stack(before), torch.stack(after))


def test_the_coin_falls_on_the_average_as_often_as_asked() -> None:
    """About 3000 independent coins of 0.3, z below 5: a false alarm once in 1.7 million; coins of 0.35 are caught."""
    emb, present, match = rows(301, 2, 2, seed=1), torch.ones(1, 301, dtype=torch.bool), torch.zeros(1, 301).long()
    newest = emb[:300, 0]

    def z(probability: float) -> float:
        heads = 0
        for part in range(10):
            coins = torch.rand(1, 301, generator=maker(part))
            items = clip_items(emb, present, match, "frame", probability, coins=coins)
            heads += int((items.positives[:, 0] != newest).any(1).sum())
        return abs(heads - 900) / math.sqrt(3000 * 0.3 * 0.7)

    assert z(0.3) < 5
    assert z(0.35) > 5


def test_the_strict_reference_loses_the_item_that_the_released_code_loses() -> None:
    emb = rows(4, 3, 2)
    present = torch.tensor([[False, True, True, False]])  # in frame 1 one absence follows, and t is 1
    match = torch.zeros(1, 4, dtype=torch.int64)
    assert len(listed(clip_items(emb, present, match, "frame", 1.0))) == 2
    assert len(listed(clip_items(emb, present, match, "frame", 1.0, strict_reference=True))) == 1


def test_an_instance_that_appears_once_has_no_item_but_is_a_negative() -> None:
    emb, match = rows(3, 3, 2), torch.tensor([[0, 0, 0], [1, 1, 1]])
    present = torch.tensor([[True, True, True], [True, False, False]])
    found = listed(clip_items(emb, present, match, "bank", 1.0))
    assert [item[0] for item in found] == [emb[1, 0].tolist(), emb[2, 0].tolist()]
    assert all(item[2] == [emb[0, 1].tolist()] for item in found)
    alone = torch.tensor([[False, True, False]])
    assert not listed(clip_items(emb, alone, match[:1], "frame", 1.0))


def test_a_single_instance_has_background_negatives_or_no_item() -> None:
    emb, match, present = rows(3, 2, 2), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
    assert not listed(clip_items(emb, present, match, "bank", 1.0))
    assert [item[2] for item in listed(clip_items(emb, present, match, "bank+background", 1.0))] == [
        [emb[0, 1].tolist()],
        [emb[1, 1].tolist()],
    ]


def test_frames_without_instances_give_no_items() -> None:
    items = clip_items(rows(4, 3, 2), torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.int64))
    assert not items.positive_mask.any()
    assert sum(bank_contrast(*items)).item() == 0


def test_both_directions_add_items_from_the_average() -> None:
    emb, present, match = clip(4, 3, 2, 0)
    one = listed(clip_items(emb, present, match, "frame", 1.0))
    both = listed(clip_items(emb, present, match, "frame", 1.0, bidirectional=True))
    assert both[: len(one)] == one
    later = [(i, t) for t in range(1, 4) for i in range(2) if present[i, t] and present[i, :t].any()]
    assert [item[1] for item in both[len(one) :]] == [[emb[t, match[i, t]].tolist()] for i, t in later]


def test_gradients_reach_earlier_frames_and_detached_weights_stop_some() -> None:
    emb, present, match = clip(4, 3, 2, 3)
    present = torch.ones_like(present)
    leaf = emb.clone().requires_grad_()
    for detach in (False, True):
        items = clip_items(leaf, present, match, "bank", 1.0, detach_weights=detach)
        (gradient,) = torch.autograd.grad(items.positives[-1].sum(), leaf)
        assert gradient[0].any() or detach


@given(frames=integers(2, 6), kind=sampled_from(["pair", "pairs", "adjacent", "multi"]), seed=seeds)
def test_pair_items_equal_the_loops(frames: int, kind: str, seed: int) -> None:
    emb, present, match = clip(frames, 4, 3, seed)
    keys, references_ = pairing(kind, frames, torch.randperm(frames, generator=maker(seed)))
    every = torch.ones(frames, 4, dtype=torch.bool)
    fast = pair_items(emb, Roll(present, match, every, ~every, torch.zeros(())), keys, references_)
    slow = []
    for key, others in zip(keys.tolist(), references_.tolist(), strict=True):
        slow += references.pair_items(emb.tolist(), present.tolist(), match.tolist(), key, others)
    same_items(fast, slow)
    used = torch.cat([keys, references_.flatten()])
    assert kind == "adjacent" or len(set(used.tolist())) == len(used)


@given(frames=integers(1, 5), width=integers(1, 5), seed=seeds)
def test_the_roll_finds_everyone(frames: int, width: int, seed: int) -> None:
    numbers = torch.stack([torch.randperm(9, generator=maker(seed + t))[:width] for t in range(frames)])
    shown = flags(frames, width, seed=seed)
    instance = torch.where(shown, numbers, -1)
    found = roll(instance, shown, ~shown)
    known = sorted(set(instance[shown].tolist()))
    assert found.lost.item() == max(0, len(known) - width)
    for g, number in enumerate(known[:width]):
        assert found.present[g].tolist() == (instance == number).any(1).tolist()
        for t in range(frames):
            assert not found.present[g, t] or instance[t, found.match[g, t]] == number
    assert not found.present[len(known) :].any()


def test_noise_waits_for_the_first_true_view_and_needs_somebody_else() -> None:
    present = torch.tensor([[False, True, False, True]])
    every, none = torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.bool)
    made = Roll(present, torch.zeros(1, 4, dtype=torch.int64), every, none, torch.zeros(()))
    hit, pick = torch.ones(1, 4, dtype=torch.bool), torch.full((1, 4), 0.9)
    assert wrong_rows(made, hit, pick).tolist() == [[-1, -1, 1, -1]]
    assert wrong_rows(made, hit, pick, on="any").tolist() == [[-1, -1, 1, 1]]
    only = made._replace(
        rows=torch.tensor([[True, False]] * 4)
    )  # one row in each frame, the instance's own if it is there
    assert wrong_rows(only, hit, pick, "instances", "any").tolist() == [[-1, -1, 0, -1]]
    assert wrong_rows(only, hit, pick, "background", "any").tolist() == [[-1, -1, -1, -1]]


# the bank as a buffer


def test_a_bank_equals_a_dictionary_of_lists() -> None:
    bank, slow = InstanceBank(1, 4, 3), references.Bank()
    keys, views = torch.randint(4, (20,), generator=maker(0)), rows(20, 3).float()
    bank.observe(keys[None, :7], views[None, :7])
    bank.observe(keys[None, 7:], views[None, 7:])
    for key, view in zip(keys.tolist(), views.tolist(), strict=True):
        slow.observe(key, view, True)
    for key, average in slow.average.items():
        assert bank.read()[0, key].tolist() == pytest.approx(average, abs=1e-5)
        assert bank.tracks.seen[0, key] == len(slow.stored[key])


def test_a_bank_forgets_resets_and_comes_back_from_its_state() -> None:
    bank = InstanceBank(2, 3, 2, max_age=2)
    bank.observe(
        torch.tensor([[0, 1], [2, 2]]), rows(2, 2, 2).float(), valid=torch.tensor([[True, False], [True, True]])
    )
    assert bank.tracks.alive.tolist() == [[True, False, False], [False, False, True]]
    again = InstanceBank(2, 3, 2, max_age=2)
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.read(), bank.read())
    for _ in range(2):
        bank.tick()
    assert bank.tracks.alive.any()
    bank.tick()
    assert not bank.tracks.alive.any()
    again.reset()
    assert not again.read().any()
    assert bank.nbytes == 3 * (10 + 2) * 2 * 4


def test_a_differentiable_bank_cannot_outlive_its_step() -> None:
    net = torch.nn.Linear(3, 2, bias=False)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    bank, key = InstanceBank(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64)
    with bank.differentiable() as live:
        live.observe(key, net(torch.ones(1, 1, 3)))
        live.observe(key, net(torch.ones(1, 1, 3)))
        live.read().sum().backward()
        assert net.weight.grad is not None
        assert net.weight.grad.any()
        sgd.step()
    for use in (live.read, lambda: live.observe(key, net(torch.ones(1, 1, 3))), lambda: live.tracks):
        with pytest.raises(ClSimError, match="that is over"):
            use()
    assert not bank.tracks.alive.any()
    bank.observe(key, net(torch.ones(1, 1, 3)))
    assert not bank.read().requires_grad


def test_a_bank_of_no_size_is_refused() -> None:
    with pytest.raises(BadConfig, match="at least 1"):
        InstanceBank(1, 0, 2)


# the tracker


@settings(max_examples=40)
@given(frames=integers(1, 8), width=integers(1, 4), max_age=integers(0, 3), scale=floats(0.5, 4), seed=seeds)
def test_the_tracker_equals_the_loops(frames: int, width: int, max_age: int, scale: float, seed: int) -> None:
    emb, scores = scale * rows(frames, width, 3, seed=seed), torch.rand(frames, width, generator=maker(seed)).double()
    scores = torch.where(scores < 0.2, scores / 30, scores)
    cfg = TrackerConfig(max_age=max_age, slots=32)
    every = torch.ones(frames, width, dtype=torch.bool)
    ids, _ = follow(emb, scores, every, hashed(torch.tensor(0), frames, width), cfg)
    assert ids.tolist() == references.follow(emb.tolist(), scores.tolist(), max_age=max_age)


def still(emb: list[list[list[float]]], present: list[list[bool]] | None = None, **settings: float) -> list[list[int]]:
    """Track a hand-made video whose rows are taken in their order."""
    vectors = torch.tensor(emb, dtype=F64)
    valid = torch.ones(vectors.shape[:2], dtype=torch.bool) if present is None else torch.tensor(present)
    tie = torch.arange(vectors.shape[1]).expand(vectors.shape[:2])
    ids, _ = follow(vectors, torch.ones(vectors.shape[:2]), valid, tie, TrackerConfig(**settings))
    found: list[list[int]] = ids.tolist()
    return found


A, B, C = [4.0, 0.0], [0.0, 4.0], [-4.0, 0.0]


def test_five_frames_of_association_worked_by_hand() -> None:
    """Two objects swap rows, one is hidden and comes back, a third one comes.

    A and B have dot products 16 with themselves and 0 with each other, so likeness is 1, 1/2 or nearly 0. C has -16 with A and 0
    with B: among tracks alone it looks like B with certainty, but B is taken when its turn comes.
    """
    video = [[A, B, C], [B, A, C], [A, A, C], [B, A, C], [A, B, C]]
    present = [[True, True, False], [True, True, False], [True, False, False], [True, True, False], [True, True, True]]
    assert still(video, present) == [[0, 1, -1], [1, 0, -1], [0, -1, -1], [1, 0, -1], [0, 1, 2]]


def test_a_new_object_is_absorbed_by_a_track_that_nothing_else_looks_like() -> None:
    assert still([[A, B], [A, C]]) == [[0, 1], [0, 1]]
    assert still([[A, B], [A, C]], min_cosine=0.5) == [[0, 1], [0, 2]]


def test_frames_without_candidates_are_survived() -> None:
    nobody = [False, False]
    assert still([[A, B]] * 3, [nobody, nobody, [True, True]]) == [[-1, -1], [-1, -1], [0, 1]]
    assert still([[A, B]] * 3, [[True, True], nobody, [True, True]]) == [[0, 1], [-1, -1], [0, 1]]


def test_when_every_track_has_died_new_ones_begin_and_ids_count_on() -> None:
    gone = [[False, False]] * 3
    found = still([[A, B]] * 5, [[True, True], *gone, [True, True]], max_age=2)
    assert found[-1] == [2, 3]
    assert still([[A, B]] * 5, [[True, True], *gone, [True, True]], max_age=3)[-1] == [0, 1]


def test_a_lonely_track_takes_one_candidate_whatever_it_looks_like() -> None:
    assert still([[A], [C]]) == [[0], [0]]
    assert still([[A], [C]], min_cosine=0.0) == [[0], [1]]


def test_two_equal_candidates_go_to_two_tracks() -> None:
    found = still([[A, B], [A, A]])
    assert found[1][0] == 0
    assert found[1][1] not in (0, -1)


def test_a_candidate_with_a_low_score_starts_no_track_but_may_continue_one() -> None:
    emb = torch.tensor([[A], [A], [A]], dtype=F64)
    every, tie = torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.int64)
    low = torch.tensor([[0.005], [0.9], [0.005]])
    assert follow(emb, low, every, tie, TrackerConfig())[0].tolist() == [[-1], [0], [0]]


def test_frame_weighting_prefers_the_older_track() -> None:
    """Both tracks are about equally like the candidate; one was observed three times, the other once."""
    near = [2.0, 2.02]
    video = [[[2.0, 2.0], [2.0, 2.0]]] * 3 + [[[2.0, 2.0], near], [near, near]]
    present = [[True, False]] * 3 + [[True, True], [True, False]]
    assert still(video, present, threshold=0.3)[-1][0] == 0
    assert still(video, present, threshold=0.3, frame_weighting=False)[-1][0] == 1


def test_equal_embeddings_do_not_give_identities_away_by_row() -> None:
    """Rows are always in the order of the instances; a tracker that took them so would be right by chance alone never."""
    emb, every = torch.ones(30, 3, 4), torch.ones(30, 3, dtype=torch.bool)
    ids, _ = follow(emb, torch.ones(30, 3), every, hashed(torch.tensor(5), 30, 3), TrackerConfig())
    kept = (ids[1:] == ids[:-1]).double().mean()
    assert kept < 0.6


def test_duplicates_are_suppressed_best_first() -> None:
    masks = torch.zeros(4, 6, 6, dtype=torch.bool)
    masks[0, :3], masks[1, :2], masks[2, 3:] = True, True, True  # 0 and 1 overlap by two thirds; 3 is empty
    overlap, every = mask_overlap(masks), torch.ones(4, dtype=torch.bool)
    assert overlap[0, 1].item() == pytest.approx(2 / 3, abs=1e-6)
    assert overlap[3].tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert suppress(overlap, torch.tensor([0, 1, 2, 3]), every, 0.6).tolist() == [True, False, True, True]
    assert suppress(overlap, torch.tensor([1, 0, 2, 3]), every, 0.6).tolist() == [False, True, True, True]
    assert suppress(overlap, torch.tensor([0, 1, 2, 3]), every, 0.7).all()


def test_boxes_overlap_by_their_shared_area() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4], [8, 8, 9, 9], [0, 0, 0, 0]])
    found = box_overlap(boxes, boxes)
    assert found[0].tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert found[3].tolist() == [0] * 4
    assert torch.equal(found, found.T)


def test_short_tracks_are_filtered_only_after_the_warm_up() -> None:
    ids = torch.full((14, 1), -1)
    ids[0], ids[1], ids[12] = 7, 7, 7  # two observations, then unseen: dropped in frame 9; the later one stays
    ids[3:6] = 8  # three observations stay
    found = without_short(ids)[:, 0].tolist()
    assert [found[t] for t in (0, 1, 12)] == [-1, -1, 7]
    assert found[3:6] == [8, 8, 8]
    assert torch.equal(without_short(ids[:9]), ids[:9])


def test_a_forced_swap_exchanges_two_ids_once() -> None:
    emb = torch.tensor([[A, B]] * 10, dtype=F64)
    every, tie = torch.ones(10, 2, dtype=torch.bool), torch.arange(2).expand(10, 2)
    ids, swapped = follow(emb, torch.ones(10, 2), every, tie, TrackerConfig(), swap=torch.tensor(True))
    assert ids[4].tolist() == [0, 1]
    assert ids[5].tolist() == [1, 0]
    assert swapped.sum().item() == 2
    plain, none = follow(emb, torch.ones(10, 2), every, tie, TrackerConfig(), swap=torch.tensor(False))
    assert not none.any()
    assert plain.tolist() == [[0, 1]] * 10


def test_more_tracks_than_slots_make_the_oldest_leave() -> None:
    eye = (6 * torch.eye(4)).tolist()
    found = still([[one] for one in eye[:3]] + [[eye[0]], [eye[2]]], threshold=0.9, slots=2, min_cosine=0.5)
    assert found == [[0], [1], [2], [3], [2]]


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(BadConfig, match="slots is 1, but a frame has 2"):
        still([[A, B]], slots=1)


def test_the_tracker_lifts_to_videos_and_reads_no_host() -> None:
    emb, scores = rows(3, 5, 4, 3), torch.ones(3, 5, 4)
    every, tie = torch.ones(3, 5, 4, dtype=torch.bool), torch.stack([hashed(torch.tensor(k), 5, 4) for k in range(3)])
    one = partial(follow, cfg=TrackerConfig(slots=8))
    with NoHostReads():
        ids, _ = vmap(one)(emb, scores, every, tie)
    for k in range(3):
        assert torch.equal(ids[k], one(emb[k], scores[k], every[k], tie[k])[0])


def test_equal_scores_are_ordered_by_tie_and_invalid_candidates_come_last() -> None:
    scores, valid = torch.tensor([0.5, 0.9, 0.5, 1.0]), torch.tensor([True, True, True, False])
    assert order_of(scores, valid, torch.tensor([3, 0, 1, 2])).tolist() == [1, 2, 0, 3]


def test_cosine_likeness_ignores_lengths() -> None:
    assert_close(cosine(3 * rows(2, 3), rows(2, 3)), cosine(rows(2, 3), 5 * rows(2, 3)))


def test_clearing_leaves_nothing_behind() -> None:
    tracks = store(empty(2, 2, rows(1, 2)), torch.tensor([True, True]), rows(2, 2), torch.ones(2, dtype=F64))
    cleared = clear(tracks._replace(id=torch.tensor([4, 5])), torch.tensor([True, False]))
    fresh = empty(2, 2, rows(1, 2))
    for field, start in zip(cleared[:-1], fresh[:-1], strict=True):
        assert torch.equal(field[0], start[0])
    assert cleared.id.tolist() == [-1, 5]
    assert isinstance(cleared, Tracks)


def test_a_frame_advances_one_video() -> None:
    tracks = empty(4, 2, rows(1, 2))
    every, tie = torch.ones(2, dtype=torch.bool), torch.arange(2)
    tracks, ids, swapped = advance(tracks, torch.tensor([A, B], dtype=F64), torch.ones(2), every, tie, TrackerConfig())
    assert ids.tolist() == [0, 1]
    assert not swapped.any()
    assert tracks.given.item() == 2
