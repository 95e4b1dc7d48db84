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
from cl_sim.rng import Rng
from cl_sim.runs import per_run
from cl_sim.testing import NoHostReads, Toy, toy
from cl_sim.types import Batch, Field
from strategies.agem import project

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
