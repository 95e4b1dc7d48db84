"""Replay that looks at gradients, losses to come or values: every rule against a slow twin, every step against its definition."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import references_gradient_replay as references
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from cl_sim import session, testing
from cl_sim.config import from_dict
from cl_sim.errors import BadConfig
from cl_sim.gradients import cosines
from cl_sim.memory.diverse import Diverse
from cl_sim.memory.reservoir import Reservoir
from cl_sim.rng import Rng
from cl_sim.runs import per_run
from cl_sim.testing import NoHostReads, Toy, toy
from cl_sim.types import Batch, Field
from strategies.agem import project
from strategies.aser import exchange, knn_shapley

F64 = torch.float64
seeds = st.integers(0, 10**6)


def vectors(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def small_resnet(name: str, seeds: Sequence[int] = (0,), **strategy: Any) -> Toy:
    """A strategy on made-up images with a net that has BatchNorm."""
    settings = {
        "strategy": {"name": name, **strategy},
        "stream": {"name": "synthetic", "size": 8, "classes": 4, "tasks": 2, "per_class": 60, "order": "fixed"},
        "encoder": {"name": "reduced_resnet18", "width": 2},
        "seeds": list(seeds),
        "stack": len(seeds),
    }
    config = from_dict(settings)
    stream = session.build_stream(config, config.seeds)
    return Toy(stream, session.build_strategy(config, stream, config.seeds))


def parts(loss: Tensor, net: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def inner(one: Sequence[Tensor], two: Sequence[Tensor]) -> Tensor:
    return sum((a * b).sum() for a, b in zip(one, two, strict=True))


def plain_loss(net: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(net(batch["x"][0]), batch["y"][0])


def step_by(net: nn.Module, gradient: Sequence[Tensor], lr: float = 0.1) -> None:
    with torch.no_grad():
        for parameter, part in zip(net.parameters(), gradient, strict=True):
            parameter -= lr * part


def assert_same_state(made: Toy, net: nn.Module) -> None:
    """Weights and BatchNorm statistics of the first run."""
    for mine, value in zip(made.strategy.net.net.state_dict().values(), net.state_dict().values(), strict=True):
        assert_close(mine, value, rtol=1e-3, atol=1e-5)


def weights_equal(one: Toy, two: Toy) -> bool:
    pairs = zip(one.strategy.net.state_dict().values(), two.strategy.net.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# A-GEM


@given(size=st.integers(1, 9), seed=seeds)
def test_project_equals_its_formula_in_loops(size: int, seed: int) -> None:
    g, r = vectors(size, seed=seed), vectors(size, seed=seed + 1)
    assert_close(project(g, r), torch.tensor(references.project(g.tolist(), r.tolist()), dtype=F64))


@given(size=st.integers(1, 9), seed=seeds)
def test_project_gives_the_nearest_gradient_that_does_not_oppose_the_reference(size: int, seed: int) -> None:
    g, r = vectors(size, seed=seed), vectors(size, seed=seed + 1)
    kept = project(g, r)
    assert float(kept @ r) >= -1e-9
    for other in vectors(20, size, seed=seed + 2):
        if float(other @ r) >= 0:
            assert float((other - g).norm()) >= float((kept - g).norm()) - 1e-9


@given(size=st.integers(1, 9), seed=seeds)
def test_project_leaves_an_agreeing_gradient_its_bits(size: int, seed: int) -> None:
    g, r = vectors(size, seed=seed), vectors(size, seed=seed + 1)
    r = r if float(g @ r) >= 0 else -r
    assert torch.equal(project(g, r), g)


@given(size=st.integers(1, 9), seed=seeds, scale=st.floats(1e-6, 1e6))
def test_project_does_not_depend_on_the_length_of_the_reference(size: int, seed: int, scale: float) -> None:
    g, r = vectors(size, seed=seed), vectors(size, seed=seed + 1)
    assert_close(project(g, scale * r), project(g, r))


@pytest.mark.parametrize(
    ("g", "r", "expected"),
    [
        ([1.0, -1.0], [0.0, 2.0], [1.0, 0.0]),  # what opposes is taken away
        ([3.0, 1.0], [-1.0, 1.0], [2.0, 2.0]),  # <g, r> = -2, <r, r> = 2
        ([-1.0, 0.0], [5.0, 0.0], [0.0, 0.0]),  # nothing else is left
        ([1.0, -1.0], [1.0, 1.0], [1.0, -1.0]),  # a right angle does not oppose
        ([1.0, -2.0], [0.0, 0.0], [1.0, -2.0]),  # no reference
        ([0.0, 0.0], [1.0, 1.0], [0.0, 0.0]),
    ],
)
def test_project_on_cases_worked_by_hand(g: list[float], r: list[float], expected: list[float]) -> None:
    for dtype in (torch.float32, F64):
        assert project(torch.tensor(g, dtype=dtype), torch.tensor(r, dtype=dtype)).tolist() == expected


def test_project_treats_every_run_by_itself_and_never_reads_the_host() -> None:
    g, r = vectors(6, 5, seed=1), vectors(6, 5, seed=2)
    r[3] = 0
    with NoHostReads():
        together = per_run(project)(g, r)
    for run in range(6):
        assert_close(together[run], project(g[run], r[run]))


def test_agem_learns_its_first_task_like_fine_tuning() -> None:
    agem, finetune = small_resnet("agem"), small_resnet("finetune")
    boundary = len(agem.stream) // 2
    for made in (agem, finetune):
        testing.train(made, 0, boundary)
    assert weights_equal(agem, finetune)  # and BatchNorm statistics, to the bit
    for made in (agem, finetune):
        testing.train(made, boundary, boundary + 5)
    assert not weights_equal(agem, finetune)


def test_agem_over_the_boundary_equals_the_method_written_out() -> None:
    made, twin = small_resnet("agem", (3,)), small_resnet("agem", (3,))
    memory, boundary = twin.strategy.memory, len(made.stream) // 2
    opposed = []
    for step in range(boundary + 8):
        new, net = made.stream.batch(step), copy.deepcopy(made.strategy.net.net)
        expected = plain_loss(net, new)
        gradient = parts(expected, net)
        old = memory.sample(10) if step else {}
        if step >= boundary:
            reference = parts(plain_loss(net, old), net)
            along = inner(gradient, reference)
            opposed.append(bool(along < 0))
            if along < 0:
                share = along / inner(reference, reference)
                gradient = [a - share * b for a, b in zip(gradient, reference, strict=True)]
        step_by(net, gradient)
        memory.add(new)
        loss = made.strategy.observe(new)["loss"]
        if made.stream.ends_task(step):
            made.strategy.boundary()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4), f"step {step}"
        assert_same_state(made, net)
    assert any(opposed)  # the trace has seen the case that matters


def test_agem_counts_its_memory_after_onset_steps_where_nothing_is_announced() -> None:
    settings = {"stream": {"announces": False}, "strategy": {"onset": 25}}
    made, finetune = toy("agem", (0,), settings), toy("finetune", (0,), {"stream": {"announces": False}})
    same = []
    for step in range(30):
        for one in (made, finetune):
            testing.train(one, step, step + 1)
        same.append(weights_equal(made, finetune))
    assert all(same[:25])
    assert not all(same[25:])


# MIR


def test_mir_recalls_and_learns_what_its_definition_says() -> None:
    made, twin = small_resnet("mir", (5,)), small_resnet("mir", (5,))
    memory = twin.strategy.memory
    for step in range(18):  # over the boundary after step 11
        new, net = made.stream.batch(step), copy.deepcopy(made.strategy.net.net)
        fresh = plain_loss(net, new)
        gradient = parts(fresh, net)
        recalled = torch.zeros(())
        if step:
            virtual = copy.deepcopy(net)
            step_by(virtual, gradient)
            drawn = memory.sample(50)
            with torch.no_grad():
                before, after = (one(drawn["x"][0]).log_softmax(1) for one in (net, virtual))
            harm = [float(before[i, c] - after[i, c]) for i, c in enumerate(drawn["y"][0].tolist())]
            worst = sorted(range(len(harm)), key=lambda i: -harm[i])[:10]
            recalled = plain_loss(net, {key: value[:, worst] for key, value in drawn.items()})
            gradient = [a + b for a, b in zip(gradient, parts(recalled, net), strict=True)]
        step_by(net, gradient)
        memory.add(new)
        loss = made.strategy.observe(new)["loss"]
        assert loss.item() == pytest.approx((fresh + recalled).item(), rel=1e-4), f"step {step}"
        assert_same_state(made, net)


def test_mir_with_no_choice_is_er() -> None:
    """As many candidates as are recalled: the draws are those of ER, in another order."""
    settings = {"strategy": {"candidates": 10}}
    mir, er = toy("mir", (0, 1), settings), toy("er", (0, 1))
    testing.train(er, 0, 1)
    mir.strategy.load_state_dict(er.strategy.state_dict())
    for made in (mir, er):
        testing.train(made, 1, 25)
    for one, two in zip(mir.strategy.net.parameters(), er.strategy.net.parameters(), strict=True):
        assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_mir_recalls_what_the_step_makes_worse_in_each_run() -> None:
    made = toy("mir", (0, 1, 2))
    testing.train(made, 0, len(made.stream) // 2 + 2)
    strategy = made.strategy
    size = sum(p[0].numel() for p in strategy.net.parameters())
    coming = torch.zeros(3, size)
    coming[1, -4] = 5.0  # the step of run 1 lowers the score of class 0, whose bias this is
    coming[2, -3] = 5.0  # that of run 2 the score of class 1
    recalled = strategy.retrieve(coming)["y"]
    assert set(recalled[1].tolist()) == {0}
    assert set(recalled[2].tolist()) == {1}


def test_mir_refuses_fewer_candidates_than_it_recalls() -> None:
    with pytest.raises(BadConfig, match="candidates is 9; it must be at least 10"):
        toy("mir", (0,), {"strategy": {"candidates": 9}})


# GSS

ALARM = 4.5  # standard errors: 6.8e-6 per comparison


@pytest.mark.parametrize("weights", [(1.0, 2.0, 3.0, 0.0), (0.2, 0.2, 0.2, 0.2), (1e-6, 1.0, 0.5, 0.5)])
def test_a_weighted_choice_follows_its_weights_draw_after_draw(weights: tuple[float, ...]) -> None:
    runs = 40_000
    drawn = Rng(range(runs), "test").choose_weighted(2, torch.tensor(weights).expand(runs, -1))
    codes = np.bincount((4 * drawn[:, 0] + drawn[:, 1]).numpy(), minlength=16)
    chances = references.weighted_draws(weights, 2)
    for code, count in enumerate(codes):
        p = chances.get((code // 4, code % 4), 0.0)
        assert (
            abs(count - runs * p) <= ALARM * math.sqrt(runs * p * (1 - p)) + 1
        )  # 12 pairs: false alarm in 1 of 12 000


def test_a_weighted_choice_draws_zeros_last_and_evenly() -> None:
    runs = 20_000
    weight = torch.tensor([0.0, 1e-9, 0.0, 0.0, 1.0]).expand(runs, -1)
    drawn = Rng(range(runs), "test").choose_weighted(4, weight)
    assert {tuple(sorted(line)) for line in drawn[:, :2].tolist()} == {(1, 4)}
    counts = np.bincount(drawn[:, 2].numpy(), minlength=5)[[0, 2, 3]]
    assert np.abs(counts - runs / 3).max() < ALARM * math.sqrt(runs * 2 / 9)  # 3 counts: false alarm in 1 of 49 000


@given(size=st.integers(1, 6), others=st.integers(1, 5), seed=seeds)
def test_cosines_equal_their_definition(size: int, others: int, seed: int) -> None:
    v, g = vectors(size, seed=seed), vectors(others, size, seed=seed + 1)
    g[-1] = 0
    slow = [references.cosine(row, v.tolist()) for row in g.tolist()]
    assert_close(cosines(v, g), torch.tensor(slow, dtype=F64))


DIVERSE = {"y": Field((), torch.int64), "index": Field((), torch.int64)}
scores = st.integers(-64, 64).map(lambda n: n / 64)


def offered(start: int, score: list[float], conflicts: bool, runs: int = 1) -> Batch:
    index = torch.arange(start, start + len(score)).expand(runs, -1)
    value = torch.tensor(score).expand(runs, -1)
    return {"index": index, "y": index % 3, "score": value, "conflicts": torch.full_like(index, conflicts).bool()}


@given(held=st.lists(scores, min_size=1, max_size=8), new=st.lists(scores, min_size=1, max_size=8), seed=seeds)
def test_a_diverse_memory_exchanges_rows_by_its_rule_in_loops(held: list[float], new: list[float], seed: int) -> None:
    memory = Diverse(len(held), DIVERSE, Rng([seed], "test"))
    memory.add(offered(0, held, False))
    twin = Rng([seed], "test")
    waiting = [-math.log(u + 2**-25) for u in twin.uniform(len(held))[0].tolist()]
    considered = new[: len(held)]
    places = references.meet(
        memory.row("score")[0, :-1].tolist(), considered, waiting, twin.uniform(len(considered))[0].tolist()
    )
    expected = list(range(len(held)))
    for item, place in enumerate(places):
        if place is not None:
            expected[place] = 100 + item
    with NoHostReads():
        memory.add(offered(100, new, True))
    rows = memory.rows()
    assert rows["index"][0].tolist() == expected
    known = {**dict(enumerate(held)), **{100 + item: score for item, score in enumerate(new)}}
    assert rows["score"][0].tolist() == [known[i] for i in expected]
    assert rows["y"][0].tolist() == [i % 3 for i in expected]


def test_a_diverse_memory_keeps_its_rows_unless_the_batch_conflicts() -> None:
    memory = Diverse(7, DIVERSE, Rng(range(3), "test"))
    memory.add(offered(0, [0.1] * 5, True, runs=3))
    memory.add(offered(5, [0.5] * 5, True, runs=3))  # fills the memory; what does not fit is dropped
    assert memory.rows()["index"].tolist() == [list(range(7))] * 3
    memory.add(offered(10, [-1.0] * 5, False, runs=3))
    assert memory.rows()["index"].tolist() == [list(range(7))] * 3
    assert memory.offered == 15


def test_a_diverse_memory_gives_up_rows_as_often_as_its_scores_say() -> None:
    """Rows of score 1 and 0 (chances of being met 1 and 0 first), a sample of score 0: the first leaves in 2 of 3 cases."""
    runs = 20_000
    memory = Diverse(2, DIVERSE, Rng(range(runs), "test"))
    memory.add(offered(0, [1.0, 0.0], False, runs))
    memory.add(offered(10, [0.0], True, runs))
    index = memory.rows()["index"]
    assert bool((index[:, 1] == 1).all())
    gone = int((index[:, 0] == 10).sum())
    assert abs(gone - runs * 2 / 3) < ALARM * math.sqrt(runs * 2 / 9)


def test_gss_remembers_what_its_definition_says() -> None:
    """Scores from one gradient at a time in evaluation mode, on the draws of a twin; 25 rows: the third batch fits in part."""
    settings = {"capacity": 25, "directions": 3, "direction_size": 4, "lr": 0.02}
    made, twin = small_resnet("gss", (1,), **settings), small_resnet("gss", (1,), **settings)
    memory, conflicts = twin.strategy.memory, []
    for step in range(18):
        new, net = made.stream.batch(step), copy.deepcopy(made.strategy.net.net)
        expected = plain_loss(net, new)
        old = memory.sample(10)
        if step:
            expected = expected + plain_loss(net, old)
        step_by(net, parts(expected, net), 0.02)
        loss = made.strategy.observe(new)["loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4), f"step {step}"
        assert_same_state(made, net)
        net.load_state_dict(made.strategy.net.net.state_dict())
        net.eval()
        score, conflict = [0.1] * 10, False
        if step:
            size = 4
            drawn = memory.sample(3 * size if len(memory) >= 12 else size * (len(memory) // size))
            each = [{k: v[:, i : i + size] for k, v in drawn.items()} for i in range(0, drawn["y"].shape[1], size)]
            directions = [parts(plain_loss(net, batch), net) for batch in each]
            score = [likeness(net, {k: v[:, i : i + 1] for k, v in new.items()}, directions) for i in range(10)]
            conflict = likeness(net, new, directions) < 0
            conflicts.append(conflict)
        memory.add({**new, "score": torch.tensor([score]), "conflicts": torch.full((1, 10), conflict)})
        for name, value in memory.rows().items():
            assert_close(made.strategy.memory.rows()[name], value, rtol=1e-3, atol=1e-4)
        memory.load_state_dict(made.strategy.memory.state_dict())
    assert {True, False} <= set(conflicts[3:])  # both cases have come with a full memory


def likeness(net: nn.Module, batch: Batch, directions: Sequence[Sequence[Tensor]]) -> float:
    gradient = parts(plain_loss(net, batch), net)
    return max(float(inner(gradient, d) / (inner(gradient, gradient) * inner(d, d)).sqrt()) for d in directions)


def test_gss_refuses_a_rule_for_a_reservoir_that_it_does_not_have() -> None:
    with pytest.raises(BadConfig, match="gss keeps no reservoir"):
        toy("gss", (0,), {"strategy": {"rule": "frozen"}})


# ASER


def valuation(n_eval: int, n: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluation and candidate samples on a coarse grid, so that equal distances abound."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(-1, 2, (n_eval + n, 3), generator=generator).to(F64) / 2
    labels = torch.randint(classes, (n_eval + n,), generator=generator)
    return points[:n_eval], labels[:n_eval], points[n_eval:], labels[n_eval:]


def slow_values(e: Tensor, y: Tensor, c: Tensor, labels: Tensor, k: int) -> Tensor:
    lines = [
        references.knn_shapley(p, t, c.tolist(), labels.tolist(), k)
        for p, t in zip(e.tolist(), y.tolist(), strict=True)
    ]
    return torch.tensor(lines, dtype=F64).reshape(len(y), len(labels))


sizes = {"n_eval": st.integers(1, 4), "n": st.integers(1, 9), "classes": st.integers(1, 3), "k": st.integers(1, 6)}


@given(**sizes, seed=seeds)
def test_knn_shapley_equals_the_recursion_in_loops(n_eval: int, n: int, classes: int, k: int, seed: int) -> None:
    case = valuation(n_eval, n, classes, seed)
    assert_close(knn_shapley(*case, k), slow_values(*case, k), rtol=0, atol=1e-12)


@given(n=st.integers(1, 6), k=st.integers(1, 6), seed=seeds)
def test_knn_shapley_is_the_shapley_value_of_the_neighbours_game(n: int, k: int, seed: int) -> None:
    k = min(n, k)
    e, y, c, labels = valuation(2, n, 2, seed)
    exact = [
        references.exact_shapley(p, t, c.tolist(), labels.tolist(), k)
        for p, t in zip(e.tolist(), y.tolist(), strict=True)
    ]
    assert_close(knn_shapley(e, y, c, labels, k), torch.tensor(exact, dtype=F64), rtol=0, atol=1e-12)


@given(**sizes, seed=seeds)
def test_values_add_up_to_the_worth_of_all_candidates(n_eval: int, n: int, classes: int, k: int, seed: int) -> None:
    k = min(n, k)
    e, y, c, labels = valuation(n_eval, n, classes, seed)
    for line, point, label in zip(knn_shapley(e, y, c, labels, k), e.tolist(), y.tolist(), strict=True):
        order = references.nearest_first(point, c.tolist())
        whole = references.worth_of_set(range(n), order, label, labels.tolist(), k)
        assert float(line.sum()) == pytest.approx(whole, abs=1e-12)


@given(**sizes, seed=seeds, absent=st.sets(st.integers(0, 8)))
def test_padding_changes_no_value_and_has_none(
    n_eval: int, n: int, classes: int, k: int, seed: int, absent: set[int]
) -> None:
    e, y, c, labels = valuation(n_eval, n, classes, seed)
    valid = torch.tensor([i not in absent for i in range(n)])
    found = knn_shapley(e, y, c, labels, k, valid)
    assert bool((found[:, ~valid] == 0).all())
    if bool(valid.any()):
        assert_close(found[:, valid], knn_shapley(e, y, c[valid], labels[valid], k), rtol=0, atol=1e-12)


@given(n=st.integers(1, 9), k=st.integers(1, 6), seed=seeds)
def test_values_move_with_their_candidates(n: int, k: int, seed: int) -> None:
    e, c = vectors(3, 4, seed=seed), vectors(n, 4, seed=seed + 1)  # no equal distances
    y, labels = torch.arange(3) % 2, torch.arange(n) % 2
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert_close(knn_shapley(e, y, c[order], labels[order], k), knn_shapley(e, y, c, labels, k)[:, order])


def test_knn_shapley_on_cases_worked_by_hand() -> None:
    origin, line = torch.zeros(1, 1), torch.tensor([[3.0], [1.0], [2.0]])  # nearest first: 1, 2, 0
    one = torch.ones(1, dtype=torch.int64)
    # K = 1, hits 1, 0, 1: v_3 = 1/3, v_2 = 1/3 - 1/2, v_1 = -1/6 + 1
    found = knn_shapley(origin, one, line, torch.tensor([1, 1, 0]), 1)
    assert found.tolist()[0] == pytest.approx([1 / 3, 5 / 6, -1 / 6])
    # K = 2: v_3 = 1/3, v_2 = 1/3 - 1/2, v_1 = -1/6 + 1/2
    found = knn_shapley(origin, one, line, torch.tensor([1, 1, 0]), 2)
    assert found.tolist()[0] == pytest.approx([1 / 3, 1 / 3, -1 / 6])
    # all of the class: everyone is worth the same; none: nothing
    assert knn_shapley(origin, one, line, torch.tensor([1, 1, 1]), 2).tolist()[0] == pytest.approx([1 / 3] * 3)
    assert knn_shapley(origin, one, line, torch.tensor([0, 0, 0]), 2).tolist() == [[0, 0, 0]]
    # equal distances: the first is nearer
    twins = torch.tensor([[1.0], [-1.0]])
    assert knn_shapley(origin, one, twins, torch.tensor([0, 1]), 1).tolist()[0] == pytest.approx([-0.5, 0.5])
    assert knn_shapley(origin, one, twins, torch.tensor([1, 0]), 1).tolist()[0] == pytest.approx([1.0, 0.0])


def test_knn_shapley_treats_every_run_by_itself_and_never_reads_the_host() -> None:
    cases = [valuation(3, 7, 2, seed) for seed in range(4)]
    stacked = [torch.stack(column) for column in zip(*cases, strict=True)]
    with NoHostReads():
        together = per_run(lambda e, y, c, labels: knn_shapley(e, y, c, labels, 3))(*stacked)
    assert_close(together, torch.stack([knn_shapley(*case, 3) for case in cases]))


@given(
    old=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=8),
    new=st.lists(st.integers(-3, 3), min_size=1, max_size=6),
    seed=seeds,
)
def test_exchange_equals_its_definition_on_lists(old: list[tuple[int, bool]], new: list[int], seed: int) -> None:
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[: len(old)]
    worth, valid = torch.tensor([w for w, _ in old] + new, dtype=F64), torch.tensor([v for _, v in old])
    with NoHostReads():
        found = exchange(worth, rows, valid, nowhere=20)
    held = [(row, float(w)) for row, (w, there) in zip(rows.tolist(), old, strict=True) if there]
    slow = references.exchange(held, [float(w) for w in new])
    assert [None if row == 20 else row for row in found.tolist()] == slow
    both = per_run(exchange)(worth.expand(2, -1), rows.expand(2, -1), valid.expand(2, -1), nowhere=20)
    assert both.tolist() == [found.tolist()] * 2


LABELLED = {"y": Field((), torch.int64), "index": Field((), torch.int64)}


def by_class(counts: Sequence[int], runs: int, spare: int = 0) -> Reservoir:
    """A memory with so many rows of each class, one class after the other, and room for some more."""
    memory = Reservoir(sum(counts) + spare, LABELLED, Rng(range(runs), "test"))
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).expand(runs, -1)
    memory.add({"y": y, "index": torch.arange(sum(counts)).expand(runs, -1)})
    return memory


@given(
    counts=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    n=st.integers(1, 7),
    spare=st.integers(0, 3),
    absent=st.sets(st.integers(0, 19)),
)
def test_a_sample_of_each_class_has_no_row_twice_and_all_it_can_have(
    counts: list[int], n: int, spare: int, absent: set[int]
) -> None:
    memory = by_class([*counts, 1], 2, spare)
    counts = [*counts, 1]
    without = torch.tensor([[row in absent for row in range(memory.capacity)]] * 2)
    with NoHostReads():
        drawn = memory.sample_each(n, len(counts), without)
        marked = memory.mark(drawn["slot"], drawn["valid"])
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).tolist()
    for run in range(2):
        taken = drawn["slot"][run, drawn["valid"][run]].tolist()
        assert marked[run].nonzero().flatten().tolist() == sorted(taken)
        assert len(set(taken)) == len(taken)
        assert not absent & set(taken)
        assert torch.equal(drawn["y"][run, drawn["valid"][run]], torch.tensor([labels[row] for row in taken]))
        for c, count in enumerate(counts):
            free = sum(label == c and row not in absent for row, label in enumerate(labels))
            assert sum(labels[row] == c for row in taken) == min(n, memory.capacity, free), count


def test_a_sample_of_each_class_draws_its_rows_equally_often() -> None:
    runs = 20_000
    drawn = by_class([4, 6, 1], runs).sample_each(2, 3)
    counts = np.bincount(drawn["slot"][drawn["valid"]].numpy(), minlength=11)
    for row, count in enumerate(counts):
        p = 1 / 2 if row < 4 else 1 / 3 if row < 10 else 1
        assert abs(count - runs * p) <= ALARM * math.sqrt(runs * p * (1 - p))  # 10 rows: false alarm in 1 of 15 000


def full_aser(steps: int, **settings: Any) -> tuple[Toy, Toy]:
    """Twins whose memory is full, in the second task."""
    base = {"capacity": 40, "per_class": 3.5, "lr": 0.02, **settings}
    made, twin = small_resnet("aser", (2,), **base), small_resnet("aser", (2,), **base)
    for one in (made, twin):
        testing.train(one, 0, steps)
    return made, twin


def without_padding(batch: Batch) -> Batch:
    return {key: value[0][batch["valid"][0]] for key, value in batch.items() if key != "valid"}


def encoded(made: Toy, x: Tensor) -> Tensor:
    """Features in evaluation mode, one sample at a time."""
    net = copy.deepcopy(made.strategy.net.net).eval()
    with torch.no_grad():
        return torch.cat([net.encoder(one[None]) for one in x])


@pytest.mark.parametrize("score", ["asvm", "asv"])
@pytest.mark.parametrize("steps", [6, 14])
def test_aser_recalls_the_candidates_of_highest_adversarial_value(score: str, steps: int) -> None:
    made, twin = full_aser(steps, score=score)
    new, memory = made.stream.batch(steps), twin.strategy.memory
    padded = memory.sample_each(3, 4)
    some = without_padding(padded)
    rest = without_padding(memory.sample_each(3, 4, memory.mark(padded["slot"], padded["valid"])))
    f, g, h = encoded(twin, some["x"]), encoded(twin, rest["x"]), encoded(twin, new["x"][0])
    friendly, hostile = slow_values(g, rest["y"], f, some["y"], 3), slow_values(h, new["y"][0], f, some["y"], 3)
    expected = friendly.mean(0) - hostile.mean(0) if score == "asvm" else friendly.amax(0) - hostile.amin(0)
    known = dict(zip(some["slot"].tolist(), expected.tolist(), strict=True))
    recalled = made.strategy.recall(new)["slot"][0].tolist()
    assert len(set(recalled)) == 10
    valued = [known[row] for row in recalled if row in known]
    assert_close(torch.tensor(valued), torch.tensor(sorted(known.values(), reverse=True)[:10]), rtol=0, atol=1e-5)
    assert len(valued) == min(10, len(known))  # the rest, if any, is spare


@pytest.mark.parametrize("steps", [5, 9, 14, 20])
def test_aser_remembers_new_samples_that_are_worth_more(steps: int) -> None:
    made, twin = full_aser(steps)
    new, memory = made.stream.batch(steps), twin.strategy.memory
    held = memory.rows()["y"][0].tolist()
    threshold = float(twin.strategy.rng.uniform(1)) / 4
    rare = [i for i, c in enumerate(new["y"][0].tolist()) if held.count(c) / 40 < threshold]
    padded = memory.sample_each(3, 4)
    judges = without_padding(padded)
    order = twin.strategy.rng.choose(14, ~memory.mark(padded["slot"], padded["valid"]))[0]
    pool = memory.take(order[: 40 - len(judges["y"])][None])
    e = torch.cat([encoded(twin, judges["x"]), encoded(twin, new["x"][0])[rare]])
    y = torch.cat([judges["y"], new["y"][0][rare]])
    c = torch.cat([encoded(twin, pool["x"][0]), encoded(twin, new["x"][0])])
    worth = slow_values(e, y, c, torch.cat([pool["y"][0], new["y"][0]]), 3).sum(0)
    places = made.strategy.places(new)[0].tolist()
    entered = [i for i, row in enumerate(places) if row < 40]
    left = [pool["slot"][0].tolist().index(places[i]) for i in entered]
    size = pool["slot"].shape[1]
    kept = [*(i for i in range(size) if i not in left), *(size + i for i in entered)]
    assert len(set(left)) == len(left)
    assert_close(worth[kept].sort().values, worth.sort().values[10:], rtol=0, atol=1e-5)


def test_an_aser_step_learns_recalled_and_new_samples_in_one_pass_and_then_updates() -> None:
    made, twin = full_aser(13)
    new, net = made.stream.batch(13), copy.deepcopy(made.strategy.net.net)
    old = twin.strategy.recall(new)
    expected = plain_loss(net, {key: torch.cat([old[key], new[key]], 1) for key in ("x", "y")})
    step_by(net, parts(expected, net), 0.02)
    assert made.strategy.observe(new)["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same_state(made, net)
    twin.strategy.net.load_state_dict(made.strategy.net.state_dict())
    twin.strategy.remember(new)
    assert torch.equal(made.strategy.memory.rows()["index"], twin.strategy.memory.rows()["index"])


def test_aser_keeps_what_comes_while_there_is_room_and_values_the_rest_of_that_batch() -> None:
    made = toy("aser", (0, 1), {"strategy": {"capacity": 25}})
    batches = [made.stream.batch(step) for step in range(3)]
    came = torch.cat([batch["index"] for batch in batches], 1)
    testing.train(made, 0, 2)
    assert torch.equal(made.strategy.memory.rows()["index"][:, :20], came[:, :20])
    assert not made.strategy.steady
    testing.train(made, 2, 3)
    index = made.strategy.memory.rows()["index"]
    assert made.strategy.steady
    assert made.strategy.memory.offered == 30
    for run in range(2):
        assert len(set(index[run].tolist())) == 25
        assert set(index[run].tolist()) <= set(came[run].tolist())


def test_aser_recalls_a_whole_batch_even_of_a_memory_with_few_candidates() -> None:
    made = toy("aser", (0, 1), {"strategy": {"capacity": 40, "per_class": 1.0}})
    testing.train(made, 0, 6)  # only two classes have come: two candidates
    slot = made.strategy.recall(made.stream.batch(6))["slot"]
    assert slot.shape == (2, 10)
    for run in range(2):
        assert len(set(slot[run].tolist())) == 10
        assert max(slot[run].tolist()) < 40


def test_aser_refuses_a_rule_for_a_reservoir_that_it_does_not_have() -> None:
    with pytest.raises(BadConfig, match="aser keeps no reservoir"):
        toy("aser", (0,), {"strategy": {"rule": "frozen"}})
