"""BECLR on a stream: its memory, its teacher, which neighbours count, and what must not change what."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references_beclr_stream as references
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans, integers, lists
from references_beclr import row_pairing, uniformity
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from cl_sim import session
from cl_sim.config import from_dict, merge
from cl_sim.encoders.mlp import MLP
from cl_sim.encoders.siamese import Siamese
from cl_sim.engine import evaluate
from cl_sim.errors import BadConfig
from cl_sim.memory import clusters
from cl_sim.memory.clustered import Clustered, label_of
from cl_sim.optim import Teacher
from cl_sim.rng import Rng
from cl_sim.runs import Lift, per_run
from cl_sim.testing import NoHostReads, Toy, toy, train
from cl_sim.tracking import groups
from cl_sim.types import Batch, Field
from strategies.beclr import BECLR, BECLRConfig

F64 = torch.float64
seeds = integers(0, 10**6)
SMALL: dict[str, Any] = {
    "strategy": {"capacity": 80, "replay": 10, "clusters": 8, "hidden": 32, "width": 16, "lr": 0.05},
    "augment": ["jitter:1"],
}
NOTHING = {"memory": "none", "replay": 0, "neighbours": "none"}


def made(own: Mapping[str, Any] | None = None, which: tuple[int, ...] = (0,)) -> Toy:
    return toy("beclr", which, merge(SMALL, {"strategy": own or {}}))


def beclr(one: Toy) -> BECLR:
    assert isinstance(one.strategy, BECLR)
    return one.strategy


def memory_of(one: Toy) -> Clustered:
    memory = beclr(one).memory
    assert memory is not None
    return memory


def random_rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# --- first clusters and refills -----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(m=integers(4, 9), p=integers(1, 4), valid=lists(booleans(), min_size=9, max_size=9), seed=seeds)
def test_first_clusters_equal_the_loop(m: int, p: int, valid: list[bool], seed: int) -> None:
    rows, start, there = random_rows(m, 3, seed=seed), random_rows(p, 3, seed=seed + 1), valid[:m]
    fast = clusters.first_clusters(rows, torch.tensor(there), start, 4)
    slow = references.k_means(rows.tolist(), there, start.tolist(), 4)
    assert_close(fast, torch.tensor(slow, dtype=F64))


@given(m=integers(5, 9), labels=lists(integers(-1, 4), min_size=9, max_size=9), seed=seeds)
def test_refill_equals_the_loop(m: int, labels: list[int], seed: int) -> None:
    kept = [max(label, 0) for label in labels[:m]]  # all take part, so that there are always enough rows
    rows, prototypes = random_rows(m, 3, seed=seed), random_rows(5, 3, seed=seed + 1)
    fast = clusters.refill(prototypes, rows, torch.tensor(kept))
    assert_close(fast, torch.tensor(references.refill(prototypes.tolist(), rows.tolist(), kept), dtype=F64))


def test_refill_takes_the_worst_row_and_leaves_rows_without_cluster_alone() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    prototypes = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    moved = clusters.refill(prototypes, rows, torch.tensor([0, 0, -1]))
    assert torch.equal(moved, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # the opposite row has no cluster


def test_the_memory_s_functions_are_the_same_under_vmap() -> None:
    rows, start = random_rows(3, 8, 4, seed=1), random_rows(3, 2, 4, seed=2)
    valid = torch.ones(3, 8, dtype=torch.bool)
    together = per_run(clusters.first_clusters)(rows, valid, start, steps=3)
    alone = torch.stack([clusters.first_clusters(*one, 3) for one in zip(rows, valid, start, strict=True)])
    assert_close(together, alone)


# --- ring and reservoir -------------------------------------------------------------------------------------------------


def memory(recent: int, long: int, runs: int = 1, groups: int = 2, **rule: Any) -> Clustered:
    fields = {"x": Field((), torch.int64)}
    return Clustered(recent, long, groups, 3, fields, Rng(range(runs), "memory test"), **rule)


def offer(into: Clustered, numbers: range) -> None:
    runs = len(into.run)
    x = torch.tensor(list(numbers)).expand(runs, -1)
    z = normalize(random_rows(runs, len(numbers), 3, seed=numbers.start).float(), dim=-1)
    into.add({"x": x, "z": z, "cluster": torch.zeros_like(x)})


@given(recent=integers(0, 7), long=integers(0, 6), sizes=lists(integers(1, 9), min_size=1, max_size=6))
def test_the_ring_holds_the_newest_and_the_reservoir_older_ones_once(recent: int, long: int, sizes: list[int]) -> None:
    recent = recent if recent + long else 1
    into, total = memory(recent, long), 0
    for size in sizes:
        offer(into, range(total, total + size))
        total += size
    valid = into.valid()[0]
    x, born = into.row("x")[0, :-1], into.row("born")[0, :-1]
    assert torch.equal(x[valid], born[valid])
    ring, reservoir = x[:recent][valid[:recent]], x[recent:][valid[recent:]]
    assert sorted(ring.tolist()) == list(range(max(0, total - recent), total))
    old = reservoir.tolist()
    assert len(set(old)) == len(old) == min(long, max(0, total - recent))
    assert all(number < total - recent for number in old)
    assert len(into) == int(valid.sum())


def worst_share(wrong: bool, recent: int = 3, long: int = 5, items: int = 40, runs: int = 20_000) -> float:
    """How far the share of any older sample is from long / older, in standard deviations."""
    into = memory(recent, long, runs)
    if wrong:
        into._offer = lambda rows, number, right=into._offer: right(rows, number + 4)  # type: ignore[method-assign]
    for start in range(0, items, 8):
        offer(into, range(start, start + 8))
    kept = into.row("x")[:, recent:-1].flatten().bincount(minlength=items)[: items - recent]
    share = long / (items - recent)
    return float(((kept - runs * share) / math.sqrt(runs * share * (1 - share))).abs().max())


def test_every_sample_that_left_the_ring_is_equally_likely_in_the_reservoir() -> None:
    assert worst_share(wrong=False) < 4.5  # 37 places: false alarm 1 in 4000


def test_the_check_of_the_reservoir_has_teeth() -> None:
    assert worst_share(wrong=True) > 6


def test_replay_draws_from_the_reservoir_or_from_the_ring_where_there_is_none() -> None:
    both, ring = memory(4, 4), memory(8, 0)
    for into in (both, ring):
        offer(into, range(12))
    assert both.replay(9)["slot"].sort().values.tolist() == [[4, 5, 6, 7]]
    assert ring.replay(9)["slot"].sort().values.tolist() == [list(range(8))]
    assert memory(4, 4).replay(3)["slot"].shape == (1, 0)


def test_ages_sizes_and_bytes_are_those_of_the_rows() -> None:
    into = memory(4, 4)
    offer(into, range(6))
    assert into.age().tolist() == [sum(6 - n for n in range(6)) / 6]
    assert into.sizes().tolist() == [[6, 0]]
    assert into.bytes_per_row == 8 + 3 * 4 + 8 + 8
    assert into.nbytes == 8 * into.bytes_per_row + 2 * 3 * 4


@pytest.mark.parametrize("assign", ["memory_ot", "nearest", "batch_ot"])
def test_regrouping_keeps_unused_rows_out_and_finds_two_heaps(assign: str) -> None:
    into = memory(12, 0, groups=2, assign=assign, gamma=0.0)
    heap = torch.tensor([[[1.0, 0.0, 0.0]] * 4 + [[0.0, 1.0, 0.0]] * 4])
    into.add({"x": torch.arange(8)[None], "z": heap, "cluster": torch.tensor([[0] * 4 + [1] * 4])})
    into.prototypes.copy_(torch.tensor([[[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]]))
    into.regroup()
    assert into.row("cluster")[0, :8].tolist() == [0] * 4 + [1] * 4
    assert into.sizes().tolist() == [[4, 4]]
    assert_close(into.prototypes[0], torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


def test_balance_is_asked_of_the_whole_memory() -> None:
    """Six rows are nearest to one prototype and two to the other; balance moves the outermost of the six."""
    near = torch.tensor([0.0, 0.05, 0.1, 0.15, 0.5, 0.6])
    rows = torch.cat([torch.stack([near.cos(), near.sin(), near * 0], -1), torch.tensor([[0.0, 1.0, 0.0]] * 2)])[None]
    outermost = {}
    for assign in ("memory_ot", "nearest"):
        into = memory(8, 0, groups=2, assign=assign, gamma=1.0)
        into.add({"x": torch.arange(8)[None], "z": rows, "cluster": torch.zeros(1, 8, dtype=torch.int64)})
        into.prototypes.copy_(torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))
        into.regroup()
        outermost[assign] = int(into.row("cluster")[0, 5])
        assert into.row("cluster")[0, :4].tolist() + into.row("cluster")[0, 6:8].tolist() == [0] * 4 + [1] * 2
    assert outermost == {"memory_ot": 1, "nearest": 0}


# --- teacher ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 3])
def test_the_teacher_follows_parameters_and_keeps_statistics_of_its_own(runs: int) -> None:
    net = Lift([Siamese(MLP(4, (5,)), 6, 4) for _ in range(runs)])
    teacher = Teacher(net, "branch")
    before = [parameter.clone() for parameter in teacher.parameters()]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1)
    x = torch.randn(runs, 7, 4)
    statistics = [buffer.clone() for buffer in net.buffers()]
    assert teacher(x).shape == (runs, 7, 4)
    assert not teacher(x).requires_grad
    assert all(torch.equal(one, two) for one, two in zip(statistics, net.buffers(), strict=True))
    teacher.update(net, 0.75)
    for mine, old in zip(teacher.parameters(), before, strict=True):
        assert_close(mine.detach(), old + 0.25)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# --- which neighbours count ---------------------------------------------------------------------------------------------


def lookup(one: Toy) -> tuple[Tensor, Batch, Batch, Tensor, Tensor]:
    """Targets of a batch with replay, and the neighbours found for them, at the end of the toy stream."""
    train(one, 0, 30)
    strategy, memory = beclr(one), memory_of(one)
    new, old = one.stream.batch(30), memory.replay(10)
    both = {key: torch.cat([new[key], old[key]], 1) for key in ("x", "y")}
    target = normalize(strategy.net(both["x"].repeat(1, 2, 1, 1, 1))[1].detach(), dim=-1)
    near, weight = strategy.neighbours({"z": target}, both, old)
    assert weight is not None
    return target, both, old, near["z"], weight


@pytest.mark.parametrize("how", ["cluster", "global", "random"])
def test_neighbours_are_valid_rows_and_never_the_anchor_itself(how: str) -> None:
    one = made({"neighbours": how, "gate": False})
    target, _, old, near, weight = lookup(one)
    assert near.shape == (1, 40, 3, 16)
    assert weight.shape == (1, 40, 3)
    rows = memory_of(one).row("z")[0, :80]
    for anchor in range(40):
        distances = torch.cdist(near[0, anchor], rows)
        slots = distances.argmin(1)
        assert float(distances.amin(1).max()) < 1e-3
        if anchor % 20 >= 10:
            assert int(old["slot"][0, anchor % 20 - 10]) not in slots.tolist()
    assert target.shape == (1, 40, 16)


def test_the_gate_keeps_what_is_almost_as_near_as_the_other_view() -> None:
    one = made({"kappa": 0.8})
    target, both, _, near, weight = lookup(one)
    cosine = (near * target[:, :, None]).sum(-1)
    wanted = cosine >= 0.8 * beclr(one).likeness
    assert 0.05 < float(wanted.float().mean()) < 0.95
    theirs = neighbour_labels(one, near)
    same = theirs == both["y"].repeat(1, 2)[..., None]
    assert torch.equal(weight.bool(), same)  # every label is known here, so labels decide
    unlabelled = {**both, "y": torch.full_like(both["y"], -1)}
    strategy = beclr(one)
    again, counts = strategy.neighbours({"z": target}, unlabelled, {"slot": torch.full((1, 10), 80)})
    assert counts is not None
    free = (again["z"] * target[:, :, None]).sum(-1)
    assert torch.equal(counts.bool(), free >= 0.8 * strategy.likeness)


def neighbour_labels(one: Toy, near: Tensor) -> Tensor:
    memory = memory_of(one)
    slots = torch.cdist(near[0].flatten(0, 1), memory.row("z")[0, :80]).argmin(1)
    return memory.row("y")[0, slots].view(near.shape[:3])


def test_random_neighbours_are_as_many_as_the_nearest_ones_but_others() -> None:
    near, chance = made({"neighbours": "cluster"}), made({"neighbours": "random"})
    for one in (near, chance):
        train(one, 0, 30)
    chance.strategy.load_state_dict(copy.deepcopy(near.strategy.state_dict()))
    target = normalize(torch.randn(1, 20, 16), dim=-1)
    both = {"x": torch.zeros(1, 10, 3, 8, 8), "y": torch.full((1, 10), -1)}
    none = {"slot": torch.zeros(1, 0, dtype=torch.int64)}
    found = [beclr(one).neighbours({"z": target}, both, none) for one in (near, chance)]
    assert found[0][1] is not None
    assert found[1][1] is not None
    assert torch.equal(found[0][1], found[1][1])
    likeness = [float((rows["z"] * target[:, :, None]).sum(-1).mean()) for rows, _ in found]
    assert likeness[0] > likeness[1] + 0.1


# --- the released loss --------------------------------------------------------------------------------------------------

RELEASED = {"pairing": "row", "negatives": "enhanced", "gate": False, "assign": "batch_ot", "gamma": 0.0}


@pytest.mark.parametrize("own", [{"memory": "fifo"}, {"memory": "fifo", "replay": 0}, {"assign": "memory_ot"}])
def test_the_released_loss_is_that_of_three_memories_and_pairs_by_place(own: dict[str, Any]) -> None:
    one = made({**RELEASED, **own})
    train(one, 0, 30)
    strategy, memory = beclr(one), memory_of(one)
    p, z, target = (normalize(torch.randn(1, 20, 16, dtype=F64), dim=-1).float() for _ in range(3))
    both = {"x": torch.zeros(1, 10, 3, 8, 8), "y": torch.full((1, 10), -1)}
    none = {"slot": torch.zeros(1, 0, dtype=torch.int64)}
    near, weight = strategy.neighbours({"z": target, "p": p, "s": z}, both, none)
    assert set(near) == {"z", "p", "s"}
    rows = [{space: memory.row(space)[0, m].tolist() for space in near} for m in range(80)]
    for space, queries in (("z", target), ("p", p), ("s", z)):
        own_cluster = memory.row(label_of(space))[0, :80].tolist()
        centres = memory.centres(space)[0].tolist()
        for number, query in enumerate(queries[0].tolist()):
            group = references.nearest(query, centres)
            inside = [m for m in range(80) if own_cluster[m] == group]
            searched = inside if len(inside) >= 3 else range(80)
            best = sorted(searched, key=lambda m: -references.cosine(rows[m][space], query))[:3]
            assert_close(near[space][0, number], torch.tensor([rows[m][space] for m in best]))
    slow = row_pairing(p[0].tolist(), target[0].tolist(), near["p"][0].tolist(), near["z"][0].tolist())
    halves = zip(z[0].chunk(2), near["s"][0].chunk(2), strict=True)
    enlarged = [row for rows, extra in halves for row in (*rows.tolist(), *extra.flatten(0, 1).tolist())]
    found = strategy.loss(p, z, target, near, weight)
    assert float(found) == pytest.approx(slow + 0.1 * uniformity(enlarged, 2.0), abs=1e-5)


def test_the_student_s_memories_hold_its_own_rows_and_cost_bytes() -> None:
    one, plain = made({**RELEASED, "memory": "fifo", "replay": 0}), made({"memory": "fifo", "replay": 0})
    for toy_run in (one, plain):
        train(toy_run, 0, 12)
    memory = memory_of(one)
    for space in ("p", "s"):
        rows = memory.row(space)[0, :80]
        assert_close(rows.norm(dim=1), torch.ones(80))
        assert float((rows - memory.row("z")[0, :80]).abs().max()) > 0.1
    assert memory.bytes_per_row == memory_of(plain).bytes_per_row + 2 * (16 * 4 + 8)
    assert memory.nbytes == memory_of(plain).nbytes + 2 * (80 * (16 * 4 + 8) + 8 * 16 * 4)


def test_neighbours_of_the_released_loss_only_shrink_the_gradient() -> None:
    one = made({**RELEASED, "memory": "fifo"})
    p, z, target = (torch.randn(1, 20, 16) for _ in range(3))
    near = {space: torch.randn(1, 20, 3, 16) for space in ("z", "p", "s")}
    slopes = []
    for rows in (near, {}):
        leaf = p.clone().requires_grad_()
        beclr(one).loss(leaf, z, target, rows, None).backward()
        assert leaf.grad is not None
        slopes.append(leaf.grad)
    assert_close(slopes[0], slopes[1] / 4)


def test_before_neighbours_count_the_released_run_is_the_plain_one() -> None:
    one, plain = made({**RELEASED, "memory": "fifo"}), made({"memory": "fifo", "gate": False})
    for toy_run in (one, plain):
        train(toy_run, 0, 16)
    for name, value in beclr(plain).net.state_dict().items():
        assert torch.equal(value, beclr(one).net.state_dict()[name]), name


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"pairing": "row"}, "add --set strategy.gate=false"),
        ({**RELEASED, "neighbours": "none"}, "neighbours is 'none'"),
        ({**NOTHING, "negatives": "enhanced"}, "neighbours is 'none'"),
    ],
)
def test_switches_of_the_released_loss_say_what_they_need(own: dict[str, Any], said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        made(own)


# --- what must not change what ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("until", [3, 12, 25])
def test_a_resume_in_every_phase_is_exact(until: int) -> None:
    whole, again = made(), made()
    train(whole, 0, until)
    again.strategy.load_state_dict(copy.deepcopy(whole.strategy.state_dict()))
    for one in (whole, again):
        train(one, until, until + 6)
    for key, value in whole.strategy.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, again.strategy.state_dict()[key]), key


def test_phases_come_by_samples_seen() -> None:
    one = made()
    memory = memory_of(one)
    assert (beclr(one).fill, beclr(one).onset) == (80, 160)
    train(one, 0, 7)
    assert not memory.prototypes.any()
    train(one, 7, 8)
    assert memory.prototypes.any()
    assert int(memory.sizes().sum()) == 80
    kept = [float(one.strategy.observe(one.stream.batch(step))["neighbours_kept"]) for step in range(8, 20)]
    assert kept[:8] == [0.0] * 8
    assert max(kept[8:]) > 0


def test_clusters_are_found_anew_when_a_share_of_the_stream_has_passed() -> None:
    one, plain = made({"renew": 0.25}), made()
    assert (one.stream.samples, beclr(one).renew) == (400, 100)
    for toy_run in (one, plain):
        train(toy_run, 0, 9)
    assert torch.equal(memory_of(one).prototypes, memory_of(plain).prototypes)
    for toy_run in (one, plain):
        train(toy_run, 9, 10)
    memory = memory_of(one)
    assert not torch.equal(memory.prototypes, memory_of(plain).prototypes)
    now = memory.row("z")[0, :80]
    labels = [references.nearest(row, memory.prototypes[0].tolist()) for row in now.tolist()]
    for group in set(labels):  # k-means has come to rest: the prototypes are the means of their rows
        members = now[torch.tensor([label == group for label in labels])]
        assert_close(memory.prototypes[0, group], members.mean(0), atol=1e-4, rtol=0)
    train(plain, 10, 16)
    assert plain.strategy.steady
    train(one, 10, 16)
    assert not one.strategy.steady


@pytest.mark.parametrize("own", [{"objective": "simclr"}, {"objective": "simsiam"}, {"teacher": False}, {}])
def test_controls_without_memory_take_the_same_path(own: dict[str, Any]) -> None:
    one = made({**NOTHING, **own})
    assert one.strategy.steady
    assert beclr(one).memory is None
    train(one, 0, 2)
    with NoHostReads():  # type: ignore[no-untyped-call]
        logs = one.strategy.observe(one.stream.batch(2))
    assert set(logs) == {"loss", "view_cosine", "embedding_std"}
    assert (beclr(one).teacher is None) == bool(own)


def test_the_objectives_are_what_they_are_called() -> None:
    p, z, target = (torch.randn(1, 6, 4) for _ in range(3))
    target = normalize(target, dim=-1)
    first, second = normalize(z, dim=-1)[0].chunk(2)
    rows = torch.cat([first, second])
    logits = (rows @ rows.T / 0.5).fill_diagonal_(-torch.inf)
    partner = torch.tensor([3, 4, 5, 0, 1, 2])
    expected = torch.nn.functional.cross_entropy(logits, partner)
    found = {
        name: beclr(made({**NOTHING, "objective": name})).loss(p, z, target, {}, None)[0]
        for name in ("simclr", "simsiam", "beclr")
    }
    assert_close(found["simclr"], expected)
    aligned = -(normalize(p[0], dim=-1) * target[0, partner]).sum(-1).mean()
    assert_close(found["simsiam"], aligned)
    spread = torch.stack(
        [(rows[i] @ rows[j] / 2).exp() for i in range(6) for j in range(6) if j not in (i, partner[i])]
    )
    assert_close(found["beclr"], aligned + 0.1 * spread.mean().log())


def test_only_the_student_sees_masks_and_without_them_nothing_is_drawn() -> None:
    one = made({"mask_low": 0.2, "mask_high": 0.5, "mask_patch": 2})
    train(one, 0, 3)
    seen: dict[str, Tensor] = {}
    student, teacher = beclr(one).net.net, beclr(one).teacher
    assert teacher is not None
    encoder = student.branch.encoder  # type: ignore[union-attr]

    def note(name: str, x: Tensor) -> None:
        seen[name] = x

    handles = [
        encoder.register_forward_pre_hook(lambda module, x: note("student", x[0])),  # type: ignore[union-attr]
        teacher.register_forward_pre_hook(lambda module, x: note("teacher", x[0][0])),
    ]
    one.strategy.observe(one.stream.batch(3))
    for handle in handles:
        handle.remove()
    student_x, teacher_x = seen["student"].flatten(1, -1), seen["teacher"].flatten(1, -1)
    hidden = ((student_x == 0) & (teacher_x != 0)).double().mean(1)
    assert ((student_x == teacher_x) | (student_x == 0)).all()
    assert hidden.max() <= 0.5
    assert 0.1 < hidden.mean() < 0.5
    plain, twin = made(), made({"mask_low": 0.0})
    for toy_of in (plain, twin):
        train(toy_of, 0, 3)
    assert torch.equal(plain.strategy.rng.counter, twin.strategy.rng.counter)
    assert one.strategy.rng.counter > plain.strategy.rng.counter


def test_a_cosine_schedule_ends_at_its_ends() -> None:
    one = made({"schedule": "cosine", "decay": 0.9})
    steps = len(one.stream)
    train(one, 0, 1)
    assert one.strategy.sgd.param_groups[0]["lr"] < 0.05  # type: ignore[union-attr, index]
    train(one, 1, steps)
    assert one.strategy.sgd.param_groups[0]["lr"] == pytest.approx(1e-6)  # type: ignore[union-attr, index]
    assert not one.strategy.steady


def test_votes_are_the_known_labels_of_the_nearest_cluster() -> None:
    one = made({"readout": "vote"})
    train(one, 0, 30)
    one.strategy.eval()
    batch, memory, teacher = one.stream.batch(30), memory_of(one), beclr(one).teacher
    memory.row("y")[0, :40] = -1  # unknown labels do not vote
    assert teacher is not None
    with torch.inference_mode():
        shares, z = one.strategy.predict(batch), teacher(batch["x"])[0].tolist()
    prototypes, labels = memory.prototypes[0].tolist(), memory.row("cluster")[0, :80].tolist()
    known = memory.row("y")[0, :80].tolist()
    for row, share in zip(z, shares[0].tolist(), strict=True):
        own = references.nearest(row, prototypes)
        votes = [y for label, y in zip(labels, known, strict=True) if label == own and y >= 0]
        assert share == pytest.approx([votes.count(c) / max(len(votes), 1) for c in range(4)])


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"memory": "none"}, "replay=0 neighbours=none"),
        ({"objective": "simclr"}, "neighbours=none"),
        ({"capacity": 5, "clusters": 8}, "as many rows"),
        ({"recent": 5, "memory": "fifo"}, "memory=both"),
        ({"recent": 2000}, "below capacity"),
        ({"kappa": 2.0}, "between 0 and 1"),
        ({"mask_low": 0.3, "mask_high": 0.2}, "above mask_high"),
        ({"mask_patch": 4}, "set strategy.mask_low"),
    ],
)
def test_settings_without_effect_are_refused(own: dict[str, Any], word: str) -> None:
    with pytest.raises(BadConfig, match=word):
        BECLRConfig(**own)


# --- pictures -----------------------------------------------------------------------------------------------------------


def test_a_picture_row_shows_a_cluster_nearest_first_the_largest_on_top() -> None:
    z = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.5], [1.0, 0.1], [0.0, 1.0], [0.2, 1.0]]), dim=-1)
    rows, sizes = groups.nearest_rows(z, torch.eye(2), torch.tensor([0, 0, 0, 1, -1]), groups=3, each=4)
    assert rows.tolist() == [[0, 2, 1, -1], [3, -1, -1, -1]]
    assert sizes.tolist() == [3, 1]


def test_a_sheet_has_the_images_in_their_places() -> None:
    images = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3, 1, 1, 1).repeat(4, 3).repeat(4, 4)
    sheet = groups.contact_sheet(images, np.array([[True] * 3, [True, False, False]]))
    assert sheet.shape == (12, 18, 3)
    assert sheet[::6, ::6, 0].tolist() == [[0, 1, 2], [3, 255, 255]]
    assert (sheet[4:6] == 255).all()


def test_pictures_of_clusters_are_kept_and_drawn(tmp_path: Path) -> None:
    one = made()
    train(one, 0, 5)
    groups.keep(memory_of(one), tmp_path / groups.FILE)
    assert not (tmp_path / groups.FILE).exists()  # no clusters yet
    train(one, 5, 20)
    groups.keep(memory_of(one), tmp_path / groups.FILE)
    assert [path.name for path in groups.draw(tmp_path / groups.FILE, tmp_path)] == ["clusters.png"]
    with np.load(tmp_path / groups.FILE) as kept:
        assert int(kept["sizes"].sum()) == 80
        assert kept["there"].sum(1).tolist() == sorted(np.minimum(kept["sizes"], 12).tolist(), reverse=True)


def test_curves_are_those_of_the_first_run() -> None:
    line = {"samples": 10, "sizes": [[3, 1, 0, 0], [1, 1, 1, 1]], "cluster_purity": [0.5, 0.9]}
    samples, found = groups.curves([{**line, "cluster_nmi": [0.2, 0], "memory_entropy": [0.7, 0]}])
    assert samples.tolist() == [10]
    assert {name: value.tolist() for name, value in found.items()} == {
        "clusters in use": [0.5],
        "rows in the largest": [0.75],
        "purity": [0.5],
        "mutual information": [0.2],
        "class entropy": [0.7],
    }


# --- few labels ---------------------------------------------------------------------------------------------------------


def test_with_few_labels_a_head_learns_from_those_alone() -> None:
    few = {"name": "few_labels", "of": "synthetic", "settings": ["classes=4", "tasks=2", "order=fixed", "noise=0.1"]}
    config = from_dict(
        {
            "strategy": {"name": "beclr", **SMALL["strategy"]},
            "stream": {**few, "per_class": 20},
            "encoder": {"name": "mlp", "hidden": [32]},
            "augment": SMALL["augment"],
        }
    )
    stream = session.build_stream(config, (0,))
    one = Toy(stream, session.build_strategy(config, stream, (0,)))
    train(one, 0, len(one.stream))
    holdout = one.stream.holdout()
    assert holdout is not None
    assert float(evaluate(one.strategy, holdout, len(one.stream), full=True)[:, -1].min()) > 0.8
    y = memory_of(one).row("y")[0, :80]
    assert 0 < int((y >= 0).sum()) < 40


def test_hidden_labels_decide_nothing() -> None:
    """All labels hidden: the head gets no gradient, so only weight decay moves it."""
    one = made({"weight_decay": 0.0})
    before = [parameter.clone() for parameter in beclr(one).head.parameters()]
    for step in range(20):
        batch = one.stream.batch(step)
        one.strategy.observe({**batch, "y": torch.full_like(batch["y"], -1)})
    assert all(torch.equal(old, new) for old, new in zip(before, beclr(one).head.parameters(), strict=True))
