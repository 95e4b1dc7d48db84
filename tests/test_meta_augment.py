"""Meta-optimised augmentation and next-item learning: optimiser, stages, schedules, look-ahead, cost of a mistake."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import references_meta_augment as references
import torch
from hypothesis import given
from hypothesis.strategies import booleans, floats, integers, sampled_from
from torch import Tensor, nn
from torch.testing import assert_close

from cl_sim import losses, preset, session, testing
from cl_sim.config import from_dict
from cl_sim.errors import BadConfig
from cl_sim.losses import next_item as item_loss
from cl_sim.metrics.ranking import scored
from cl_sim.optim import Adam
from cl_sim.runs import join, per_run
from cl_sim.testing import NoHostReads, Toy, toy
from cl_sim.types import Batch
from strategies.meta_augment import Augmenter, MetaAugmentConfig

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


@pytest.mark.parametrize("stack", [(0,), (0, 1)])
def test_item_0_takes_no_gradient_as_an_input(stack: tuple[int, ...]) -> None:
    task = after(items(stack)).strategy.task
    batch = {"items": torch.tensor([[0, 5, 0, 7]] * len(stack))[:, None], "length": torch.full((len(stack), 1), 4)}
    task.features(batch, task.env.rng).square().sum().backward()
    slope = task.net.net.encoder.table.weight.grad.view(len(stack), -1, task.dim)
    assert not slope[:, 0].any()
    assert slope[:, 7].any(-1).all()


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


# The contrasts with model views


def unit_rows(n: int, width: int, seed: int) -> Tensor:
    return nn.functional.normalize(rows(n, width, seed), dim=-1)


@given(
    n=integers(1, 6),
    seed=seeds,
    similarity=sampled_from(["dot", "cos"]),
    pairs=sampled_from(["all", "model"]),
    scope=sampled_from(["row", "batch"]),
    classes=integers(1, 5),
)
def test_model_contrasts_equal_their_loops(
    n: int, seed: int, similarity: losses.Similarity, pairs: losses.Pairs, scope: losses.Scope, classes: int
) -> None:
    h1, h2, w1, w2 = (rows(n, 4, seed), rows(n, 4, seed + 1), unit_rows(n, 4, seed + 2), unit_rows(n, 4, seed + 3))
    y = labels(n, classes, seed)
    fast = losses.model_contrast(
        h1, h2, w1, w2, y, tau=0.7, similarity=similarity, weight=0.3, pairs=pairs, scope=scope
    )
    views = [view.tolist() for view in (h1, h2, w1, w2)]
    slow = references.model_contrast(*views, y.tolist(), 0.7, similarity == "cos", 0.3, pairs, scope)
    assert_close(fast, torch.tensor(slow, dtype=F64), rtol=1e-9, atol=1e-9)


def test_gradients_of_the_model_contrasts_are_those_of_their_values() -> None:
    leaves = tuple(rows(4, 3, seed).requires_grad_() for seed in range(4))
    assert torch.autograd.gradcheck(lambda *views: losses.model_contrast(*views, tau=0.5, weight=0.3), leaves)


@given(n=integers(1, 6), seed=seeds, hidden=integers(0, 3))
def test_the_mean_cosine_equals_its_loops(n: int, seed: int, hidden: int) -> None:
    views = unit_rows(n + hidden, 4, seed), unit_rows(n + hidden, 4, seed + 1)
    valid = torch.arange(n + hidden) < n
    slow = references.mean_cosine([view[:n].tolist() for view in views])
    assert_close(losses.mean_cosine(*views, valid), torch.tensor(slow, dtype=F64), rtol=1e-9, atol=1e-9)


def test_the_mean_cosine_of_collapsed_views_is_1() -> None:
    same = unit_rows(1, 4, 0).expand(5, 4)
    assert losses.mean_cosine(same, same, torch.ones(5, dtype=torch.bool)).item() == pytest.approx(1)


def test_contrasts_with_model_views_are_the_same_alone_and_stacked_and_never_read_the_host() -> None:
    h = [rows(15, 4, seed).view(3, 5, 4) for seed in range(4)]
    y, valid = labels(15, 3, 0).view(3, 5), labels(15, 4, 1).view(3, 5) > 0
    with NoHostReads():
        stacked = per_run(losses.model_contrast)(*h, y, valid, tau=0.5, similarity="cos")
    for run in range(3):
        alone = losses.model_contrast(*(view[run] for view in h), y[run], valid[run], tau=0.5, similarity="cos")
        assert_close(stacked[run], alone, rtol=1e-12, atol=1e-12)


# The strategy

ARMS = ("off", "data-only", "frozen", "joint", "first_order", "second_order")


def classes(seeds: tuple[int, ...] = (0,), **settings: Any) -> Toy:
    return toy("meta_augment", seeds, {"strategy": {"replay": 10, "capacity": 60, **settings}, "augment": []})


def items(seeds: tuple[int, ...] = (0,), dropout: float = 0.1, **settings: Any) -> Toy:
    whole = {
        **testing.ITEMS,
        "encoder": {**testing.ITEMS["encoder"], "dropout": dropout},
        "strategy": {"replay": 16, "capacity": 100, "lr": 0.01, **settings},
    }
    return toy("meta_augment", seeds, whole)


MAKERS = [classes, items]


def weights(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in (*module.parameters(), *module.buffers())]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


def moved(one: list[Tensor], module: nn.Module) -> bool:
    return not equal(one, weights(module))


def after(made: Toy, steps: int = 12) -> Toy:
    testing.train(made, 0, steps)
    return made


def parts(made: Toy, step: int) -> tuple[Batch, Batch, Any]:
    """A new batch, a recalled one, and views of both."""
    new, old = made.stream.batch(step), made.strategy.task.recall()
    return new, old, made.strategy.see(join(new, old))


@pytest.mark.parametrize("make", MAKERS)
def test_each_step_moves_its_own_net_and_leaves_no_gradient(make: Callable[..., Toy]) -> None:
    strategy = (made := after(make())).strategy
    new, old, seen = parts(made, 12)
    augmenters, net = weights(strategy.augmenters), weights(strategy.task.net)
    strategy.encoder_step(new, old, seen)
    assert not moved(augmenters, strategy.augmenters)
    assert moved(net, strategy.task.net)
    net = weights(strategy.task.net)
    strategy.meta_step(new, old, seen)
    assert moved(augmenters, strategy.augmenters)
    assert not moved(net, strategy.task.net)
    assert all(parameter.grad is None for parameter in strategy.parameters())


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_move_the_augmenters_or_not(make: Callable[..., Toy], arm: str) -> None:
    made = make(arm=arm)
    augmenters = weights(made.strategy.augmenters)
    after(made, 8)
    assert moved(augmenters, made.strategy.augmenters) == (arm in ("joint", "first_order", "second_order"))


@pytest.mark.parametrize("make", MAKERS)
def test_all_arms_recall_and_keep_the_same_samples(make: Callable[..., Toy]) -> None:
    base = after(make(arm="off"))
    for arm in ARMS[1:]:
        other = after(make(arm=arm))
        for name, kept in base.strategy.task.memory.rows().items():
            assert torch.equal(kept, other.strategy.task.memory.rows()[name]), (arm, name)
        assert torch.equal(base.strategy.rng.counter, other.strategy.rng.counter), arm
        assert moved(weights(base.strategy.task.net), other.strategy.task.net)


@pytest.mark.parametrize("settings", [{"arm": "off"}, {"data_weight": 0.0, "model_weight": 0.0}])
@pytest.mark.parametrize("stack", [(0,), (0, 1)])
def test_without_contrasts_it_is_the_base_strategy_bit_by_bit(stack: tuple[int, ...], settings: dict[str, Any]) -> None:
    er = toy("er", stack, {"strategy": {"replay": 10, "capacity": 60}, "augment": ["flip"]})
    mine = toy("meta_augment", stack, {"strategy": {"replay": 10, "capacity": 60, **settings}, "augment": ["flip"]})
    for made in (er, mine):
        testing.train(made, 0, len(made.stream))
    assert equal(weights(er.strategy.net), weights(mine.strategy.task.net))
    base = after(toy("next_item", stack, {"strategy": {"replay": 16, "capacity": 100, "lr": 0.01}}))
    mine = after(items(stack, **settings))
    assert equal(weights(base.strategy.task), weights(mine.strategy.task))


def released(strategy: Any, new: Batch, seen: Any, weight: float, joint: bool) -> None:
    """The published schedule for one batch by torch's own optimiser and plain backward passes."""
    net, augmenters = strategy.task.net, strategy.augmenters
    both = [*net.parameters(), *augmenters.parameters()]
    encoder_adam = torch.optim.Adam(both if joint else net.parameters(), lr=0.01)
    augmenter_adam = torch.optim.Adam(augmenters.parameters(), lr=0.01)
    counts = seen.counted[0]
    for stage in (1, 2, 3):
        h1, h2 = (strategy.task.features(view, strategy.draws)[0][counts] for view in seen.views)
        w1, w2 = (lift.net(h) for lift, h in zip(augmenters, (h1, h2), strict=True))
        total = losses.model_contrast(h1, h2, w1, w2, tau=1.0, weight=0.1)
        if stage != 2:
            scores = net(new["items"], new["length"])[0][counts]
            target = new["target"][0][counts].long()
            total = nn.functional.cross_entropy(scores, target) + 0.05 * total
            total = total + weight * losses.info_nce(h1, h2, 1.0)
        encoder_adam.zero_grad()
        augmenter_adam.zero_grad()
        total.backward()
        (augmenter_adam if stage == 2 else encoder_adam).step()
        if joint:
            break


@pytest.mark.parametrize("weight", [0.0, 0.2])
@pytest.mark.parametrize("joint", [False, True])
def test_the_offline_settings_are_the_published_schedule(weight: float, joint: bool) -> None:
    settings = {"padding": True, "meta_on": "batch", "second_encoder_step": not joint, "meta_lr": 0.01, **PLAIN}
    settings |= {"arm": "joint" if joint else "first_order", "data_weight": weight, "model_weight": 0.05}
    made, slow = (items(dropout=0.0, **settings) for _ in range(2))
    for one in (made, slow):
        one.strategy.double()
        for optimiser in one.strategy.optimisers().values():
            for state in optimiser.state.values():
                state.update({name: state[name].double() for name in ("mean", "square")})
    batches = (made.stream.batch(step) for step in range(len(made.stream)))
    new = next(batch for batch in batches if 8 < scored(batch).sum() < 16)  # the others do not count
    made.strategy.update(new, {})
    released(slow.strategy, new, slow.strategy.see(new), weight, joint)
    for mine, other in zip(made.strategy.parameters(), slow.strategy.parameters(), strict=True):
        assert_close(mine, other, rtol=1e-6, atol=1e-9)
    assert (made.strategy.adam.state[next(made.strategy.augmenters.parameters())]["step"]) == 1


@pytest.mark.parametrize("make", MAKERS)
def test_the_look_ahead_gradient_is_that_of_finite_differences(make: Callable[..., Toy]) -> None:
    settings = {"dropout": 0.0} if make is items else {}
    strategy = (made := after(make(arm="second_order", lr=0.5, **settings), 6)).strategy
    new, old, seen = parts(made, 6)
    strategy.double()
    asked = strategy.task.draw(10, strategy.draws)
    if make is classes:
        new, old, asked = ({**batch, "x": as_double(batch["x"])} for batch in (new, old, asked))
        seen = seen._replace(views=tuple({**view, "x": as_double(view["x"])} for view in seen.views))
    parameters = list(strategy.augmenters.parameters())
    slopes = torch.autograd.grad(strategy.look_ahead(new, old, seen, asked).sum(), parameters)
    size, checked = 1e-4, 0
    for parameter, slope in zip(parameters, slopes, strict=True):
        place = int(slope.abs().argmax())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[place] += sign * size
            ends.append(strategy.look_ahead(new, old, seen, asked).item())
            with torch.no_grad():
                parameter.view(-1)[place] -= sign * size
        measured, stated = (ends[0] - ends[1]) / (2 * size), slope.view(-1)[place].item()
        assert measured == pytest.approx(stated, rel=1e-4, abs=1e-10)
        checked += abs(stated) > 1e-7
    assert checked == len(parameters)  # none of them is just 0


def as_double(x: Tensor) -> Tensor:
    return x.double() / 255 if x.dtype == torch.uint8 else x.double()


def test_the_look_ahead_leaves_the_net_as_it_is() -> None:
    strategy = (made := after(classes(arm="second_order"))).strategy
    new, old, seen = parts(made, 12)
    net, counter = weights(strategy.task.net), strategy.rng.counter.clone()
    strategy.meta_step(new, old, seen)
    assert not moved(net, strategy.task.net)
    assert torch.equal(counter, strategy.rng.counter)


def test_contrasts_leave_the_statistics_of_batch_norm_to_the_task() -> None:
    def made(arm: str) -> Toy:
        small = {"strategy": {"replay": 10, "capacity": 60, "arm": arm, "lr": 1e-30}}
        return toy("meta_augment", (0,), {**small, "encoder": {"name": "reduced_resnet18", "width": 4}, "augment": []})

    base, other = after(made("off"), 4), after(made("first_order"), 4)
    for one, two in zip(base.strategy.task.net.buffers(), other.strategy.task.net.buffers(), strict=True):
        assert_close(one, two)


@pytest.mark.parametrize(
    ("settings", "forward", "backward"),
    [({"arm": "off"}, 1, 1), ({"arm": "data-only"}, 3, 3), ({}, 5, 3), ({"second_encoder_step": True}, 8, 6)],
)
def test_an_update_encodes_as_often_as_stated(settings: dict[str, Any], forward: int, backward: int) -> None:
    made = after(classes(meta_replay=20, min_meta=30, **settings))
    rows = []
    made.strategy.task.net.net.encoder.register_forward_hook(lambda *call: rows.append(call[2]))
    batch = made.stream.batch(12)
    made.strategy.observe(batch)
    whole = batch["y"].shape[1] + 10  # new and recalled
    assert whole == 20
    assert sum(len(row) for row in rows) == forward * whole
    assert sum(len(row) for row in rows if row.requires_grad) == backward * whole


def test_a_meta_step_waits_for_the_memory_and_for_its_turn() -> None:
    made = classes(min_meta=30, meta_every=3)
    turns = []
    for step in range(12):
        before = weights(made.strategy.augmenters)
        testing.train(made, step, step + 1)
        turns.append(moved(before, made.strategy.augmenters))
    batch = made.stream.batch(0)["y"].shape[1]
    first = -(-30 // batch)  # the step that finds 30 samples
    assert turns == [step >= first and step % 3 == 0 for step in range(12)]
    assert not made.strategy.steady


def test_the_model_weight_grows_during_the_warm_up() -> None:
    made = after(classes(data_weight=0.0, warm_up=10, arm="frozen"), 3)
    strategy = made.strategy
    seen = parts(made, 3)[2]
    h = strategy.encode(seen)
    w = strategy.model_views(h, strategy.pair)
    terms = strategy.model_terms(seen, h, w)
    for updates, share in ((0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0)):
        strategy.updates.fill_(updates)
        assert_close(strategy.contrast(seen, h, w), 0.1 * share * terms)


def test_a_collapse_is_logged() -> None:
    made = after(classes(arm="frozen"), 3)
    for lift in made.strategy.pair:
        nn.init.zeros_(lift.net.layers[-1].weight)  # only the bias is left: one view for all
    assert made.strategy.observe(made.stream.batch(3))["view_cosine"].item() == pytest.approx(1, abs=1e-5)
    healthy = after(classes(), 3).strategy.observe(made.stream.batch(3))
    assert healthy["view_cosine"].item() < 0.999
    assert healthy["contrast_pull"].item() > 0


def test_views_of_features_lose_a_fifth_of_their_values_each_by_its_own_draw() -> None:
    task = classes().strategy.task
    one, two = (view["x"] for view in task.views({"x": torch.ones(1, 200, 100)}, task.env.rng))
    for kept in (one, two):
        share = kept.mean().item()
        assert abs(share - 0.8) < 4.5 * (0.2 * 0.8 / kept.numel()) ** 0.5  # false alarm: 1 in 150,000
    assert abs((one * two).mean().item() - 0.64) < 4.5 * (0.64 * 0.36 / one.numel()) ** 0.5


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_views_of_images_keep_their_form_and_differ(channels: int) -> None:
    task = classes().strategy.task
    bytes_in = torch.randint(
        256, (1, 50, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    one, two = (view["x"] for view in task.views({"x": bytes_in}, task.env.rng))
    for view in (one, two):
        assert (view.shape, view.dtype) == (bytes_in.shape, torch.uint8)
        assert (view != bytes_in).flatten(2).any(-1).float().mean() > 0.7
    assert (one != two).flatten(2).any(-1).float().mean() > 0.7


def test_samples_of_one_class_are_no_negatives_unless_told() -> None:
    for settings, wanted in (({}, "y"), ({"mask_same_class": "no"}, "own")):
        made = after(classes(**settings), 3)
        seen = parts(made, 3)[2]
        own = torch.arange(seen.labels.shape[1]).expand_as(seen.labels)
        assert torch.equal(seen.labels, own) == (wanted == "own")
    made = items()
    assert torch.equal(made.strategy.see(made.stream.batch(3)).labels[0], torch.arange(16))


CONFORMANCE = [
    testing.resumes_bit_for_bit,
    testing.runs_do_not_touch_each_other,
    testing.never_reads_the_host_once_steady,
    testing.keeps_its_shapes_once_steady,
    testing.draws_only_from_its_rng,
]


@pytest.mark.parametrize("check", CONFORMANCE, ids=lambda check: check.__name__)
def test_items_keep_to_the_checks(check: Callable[[testing.Make], None]) -> None:
    check(lambda seeds: items(tuple(seeds)))


@pytest.mark.parametrize("check", CONFORMANCE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("arm", ["joint", "second_order"])
def test_other_arms_keep_to_the_checks(check: Callable[[testing.Make], None], arm: str) -> None:
    check(lambda seeds: classes(tuple(seeds), arm=arm))


def test_it_learns_to_rank_far_above_chance() -> None:
    testing.learns_a_toy_stream(lambda seeds: items(tuple(seeds)))


def test_the_augmenter_is_found_with_the_strategy() -> None:
    assert sum(parameter.numel() for parameter in Augmenter(64).parameters()) == 3_696


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arm": "data-only", "data_weight": 0.0}, "that is arm=off"),
        ({"arm": "second_order", "meta_on": "batch"}, "leave strategy.meta_on out"),
        ({"replay": 0}, "meta_on=batch"),
        ({"min_meta": 5}, "use at least that"),
        ({"min_meta": 61}, "use a smaller strategy.min_meta"),
        ({"padding": True}, "leave it out"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        classes(**settings)


def test_a_look_ahead_through_a_large_net_is_refused() -> None:
    with pytest.raises(BadConfig, match="use a smaller encoder"):
        toy("meta_augment", (0,), {"strategy": {"arm": "second_order"}, "encoder": {"name": "reduced_resnet18"}})
    assert MetaAugmentConfig(arm="second_order").waits_for == 20


def test_the_preset_has_the_published_settings() -> None:
    made = from_dict(preset.read("mclrec-beauty"))
    assert made.strategy.name == "meta_augment"
    own, net, stream = made.strategy.config, made.encoder.config, made.stream.config
    assert (own.arm, own.meta_on, own.second_encoder_step, own.padding) == ("first_order", "batch", True, True)
    assert (own.data_weight, own.model_weight, own.reg_weight, own.reg_pairs, own.reg_scope) == (
        0,
        0.05,
        0.1,
        "all",
        "row",
    )
    assert (own.capacity, own.replay, own.meta_lr, own.similarity, own.tau) == (0, 0, 0.001, "task", 0)
    assert (net.dim, net.layers, net.heads, net.inner, net.dropout) == (64, 2, 2, 256, 0.5)
    assert (stream.protocol, stream.batch, stream.longest, stream.passes) == ("offline", 256, 50, 100)
    assert from_dict(preset.read("meta-augment-cifar10-m200")).strategy.config.capacity == 200


@pytest.mark.parametrize("setting", ["beauty-relative", "beauty-staggered", "cifar10-short-m200"])
def test_the_arms_of_a_comparison_differ_in_the_arm_alone(setting: str) -> None:
    arms = {
        "beauty": ("base", "data-views", "frozen", "joint", "meta-augment"),
        "cifar10": ("data-views-er", "frozen-views-er", "joint-views-er", "meta-augment-er"),
    }[setting.split("-")[0]]
    found = [preset.read(f"{arm}-{setting}") for arm in arms]
    told = [settings["strategy"].pop("arm", "first_order") for settings in found]
    assert told == list(ARMS[-1 - len(arms) : -1])
    assert all(settings == found[0] for settings in found)
