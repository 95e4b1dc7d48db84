"""Memories: who is kept and who is drawn, as statistics with a stated false-alarm rate, and invariants."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cl_sim.errors import BadConfig
from cl_sim.memory.balanced import Balanced
from cl_sim.memory.queue import Queue
from cl_sim.memory.reservoir import Reservoir
from cl_sim.memory.rows import Rows, last_wins
from cl_sim.rng import Rng
from cl_sim.testing import NoHostReads
from cl_sim.types import Batch, Field

LONG = torch.int64
FIELDS = {"x": Field((2,), torch.uint8), "y": Field((), LONG), "index": Field((), LONG)}
BARE = {"index": Field((), LONG)}
ALARM = 4.5  # standard errors; of 60 items one exceeds it by chance in 1 of 2400 tests (60 * 6.8e-6)


def offer(memory: Rows, items: int, batch: int, runs: int) -> None:
    for start in range(0, items, batch):
        index = torch.arange(start, min(start + batch, items)).expand(runs, -1)
        memory.add({"index": index})


def worst_z(make: type[Rows], capacity: int, items: int, batch: int, runs: int, **more: str) -> float:
    """The largest deviation, in standard errors, of how often an item is kept from capacity / items."""
    memory = make(capacity, BARE, Rng(range(runs), "test"), **more)
    offer(memory, items, batch, runs)
    kept = np.bincount(memory.rows()["index"].flatten().numpy(), minlength=items) / runs
    expected = capacity / items
    return float(np.abs(kept - expected).max() / math.sqrt(expected * (1 - expected) / runs))


def test_reservoir_keeps_every_item_equally_often() -> None:
    assert worst_z(Reservoir, capacity=10, items=60, batch=10, runs=40_000) < ALARM


class CountOneTooLow(Reservoir):
    def add(self, batch: Batch) -> None:
        self.seen -= 1
        super().add(batch)
        self.seen += 1


class CountFrozenInBatch(Reservoir):
    def __init__(self, capacity: int, fields: dict[str, Field], rng: Rng) -> None:
        super().__init__(capacity, fields, rng, "frozen")


@pytest.mark.parametrize("wrong", [CountOneTooLow, CountFrozenInBatch])
def test_the_reservoir_check_has_teeth(wrong: type[Rows]) -> None:
    assert worst_z(wrong, capacity=10, items=60, batch=10, runs=40_000) > 6


class CountsWhatItSkips(Reservoir):
    def add(self, batch: Batch, candidate: Tensor | None = None) -> None:
        before = self.seen.clone()
        super().add(batch, candidate)
        self.seen.copy_(before + batch["index"].shape[1])


def skipping_worst_z(make: type[Reservoir], runs: int) -> float:
    """As above, where every third of 90 items is no candidate; those must never be kept."""
    memory = make(10, BARE, Rng(range(runs), "test"), skips=True)
    for start in range(0, 90, 9):
        index = torch.arange(start, start + 9).expand(runs, -1)
        memory.add({"index": index}, index % 3 != 1)
    kept = np.bincount(memory.rows()["index"].flatten().numpy(), minlength=90) / runs
    assert not kept[1::3].any()
    share = 10 / 60
    return float(np.abs(np.delete(kept, np.s_[1::3]) - share).max() / math.sqrt(share * (1 - share) / runs))


def test_a_reservoir_that_skips_keeps_every_candidate_equally_often() -> None:
    assert skipping_worst_z(Reservoir, runs=20_000) < ALARM
    assert skipping_worst_z(CountsWhatItSkips, runs=20_000) > 6


def test_a_reservoir_that_skips_fills_up_with_candidates_and_goes_on_after_a_resume() -> None:
    memory, again = (Reservoir(5, BARE, Rng([0, 1], "test"), skips=True) for _ in range(2))
    for start in (0, 4, 8):
        index = torch.arange(start, start + 4).expand(2, -1)
        with NoHostReads():
            memory.add({"index": index}, index % 2 == torch.arange(2)[:, None])
    assert memory.seen.tolist() == [6, 6]
    assert memory.offered == 12
    assert memory.valid().all()
    again.load_state_dict(memory.state_dict())
    assert again.offered == 12
    few = Reservoir(5, BARE, Rng([0], "test"), skips=True)
    few.add({"index": torch.tensor([[7, 8, 9]])}, torch.tensor([[False, True, False]]))
    assert few.valid().tolist() == [[True, False, False, False, False]]
    assert few.sample(3)["index"].tolist() == [[8, 0, 0]]  # what there is, then empty rows
    few.add({"index": torch.tensor([[5]])})
    assert few.rows()["index"][0, :2].tolist() == [8, 5]


def slow_frozen(capacity: int, items: int, batch: int, draws: list[list[int]]) -> list[int]:
    """The published rule in plain loops; draws[b][i] is the slot drawn for item i of batch b."""
    rows: list[int] = []
    for number, start in enumerate(range(0, items, batch)):
        members = list(range(start, min(start + batch, items)))
        overflow = members[max(0, capacity - len(rows)) :]
        rows += members[: max(0, capacity - len(rows))]
        for item in overflow:
            slot = draws[number][item - start]
            if slot < capacity:
                rows[slot] = item
    return rows


class Scripted(Rng):
    """Draws that a test has written down, and the bounds that were asked for."""

    script: list[list[int]]
    bounds: list[Tensor]

    def below(self, bound: int | Tensor, *shape: int) -> Tensor:
        self.bounds.append(torch.as_tensor(bound).expand(1, shape[0]).clone())
        return torch.tensor([self.script.pop(0)])


@given(capacity=st.integers(1, 13), batch=st.integers(1, 7), batches=st.integers(1, 9), data=st.data())
def test_the_frozen_rule_equals_the_published_one_in_loops(
    capacity: int, batch: int, batches: int, data: st.DataObject
) -> None:
    script = [[data.draw(st.integers(0, max(capacity, b * batch) - 1)) for _ in range(batch)] for b in range(batches)]
    rng = Scripted([0], "test")
    rng.script, rng.bounds = [list(line) for line in script], []
    memory = Reservoir(capacity, BARE, rng, "frozen")
    offer(memory, batch * batches, batch, 1)
    expected = slow_frozen(capacity, batch * batches, batch, script)
    assert memory.rows()["index"][0, : len(memory)].tolist() == expected
    for number, bound in enumerate(rng.bounds):
        assert bound.unique().tolist() == [max(capacity, number * batch)]


@given(capacity=st.integers(1, 13), batch=st.integers(1, 7), batches=st.integers(1, 9))
def test_the_vitter_rule_draws_each_item_below_its_own_number(capacity: int, batch: int, batches: int) -> None:
    rng = Scripted([0], "test")
    rng.script, rng.bounds = [[0] * batch for _ in range(batches)], []
    offer(Reservoir(capacity, BARE, rng, "vitter"), batch * batches, batch, 1)
    assert torch.cat(rng.bounds, 1)[0].tolist() == list(range(1, batch * batches + 1))


def full(kind: str, capacity: int, runs: int = 1, classes: int = 5, seed: int = 0) -> Rows:
    rng = Rng(range(seed, seed + runs), "test")
    if kind == "balanced":
        return Balanced(capacity, FIELDS, rng, classes)
    return {"vitter": Reservoir, "frozen": Reservoir, "queue": Queue}[kind](
        capacity, FIELDS, rng, **({"rule": kind} if kind in ("vitter", "frozen") else {})
    )


def batch_of(index: Tensor, classes: int = 5) -> Batch:
    """Rows whose every field follows from their index."""
    x = torch.stack([index % 251, index % 241], -1).to(torch.uint8)
    return {"x": x, "y": index * 7 % classes, "index": index, "unused": index}


KINDS = ("vitter", "frozen", "queue", "balanced")


@pytest.mark.parametrize("kind", KINDS)
@given(capacity=st.integers(1, 17), batch=st.integers(1, 23), batches=st.integers(1, 8), runs=st.integers(1, 3))
def test_rows_are_what_came_in_with_all_fields_aligned(
    kind: str, capacity: int, batch: int, batches: int, runs: int
) -> None:
    memory = full(kind, capacity, runs)
    for number in range(batches):
        memory.add(batch_of(torch.arange(number * batch, (number + 1) * batch).expand(runs, -1)))
    rows = memory.rows()
    assert len(memory) == min(capacity, batch * batches)
    assert rows["valid"].sum(1).tolist() == [len(memory)] * runs
    index = rows["index"][:, : len(memory)]
    expected = batch_of(index)
    for name in FIELDS:
        assert torch.equal(rows[name][:, : len(memory)], expected[name])
    for line in index.tolist():
        assert len(set(line)) == len(line)
        assert max(line) < batch * batches


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(0, 30), filled=st.integers(0, 40))
def test_a_sample_holds_no_row_twice_and_as_many_as_there_are(kind: str, n: int, filled: int) -> None:
    memory = full(kind, 20, runs=2)
    if filled:
        memory.add(batch_of(torch.arange(filled).expand(2, -1)))
    drawn = memory.sample(n)
    assert drawn["slot"].shape == (2, min(n, filled, 20))
    for run in range(2):
        slots = drawn["slot"][run].tolist()
        assert len(set(slots)) == len(slots)
        assert torch.equal(drawn["index"][run], memory.rows()["index"][run, drawn["slot"][run]])


@given(only=st.sets(st.integers(0, 4)), exclude=st.sets(st.integers(0, 4)), n=st.integers(1, 20))
def test_class_masks_put_wanted_rows_first_and_mark_the_padding(only: set[int], exclude: set[int], n: int) -> None:
    memory = full("vitter", 20)
    memory.add(batch_of(torch.arange(20)[None]))
    wanted, unwanted = (torch.tensor([c in chosen for c in range(5)]) for chosen in (only, exclude))
    drawn = memory.sample(n, only=wanted, exclude=unwanted)
    fit = [c in only - exclude for c in drawn["y"][0].tolist()]
    assert drawn["valid"][0].tolist() == fit
    assert sum(fit) == min(n, 4 * len(only - exclude))
    assert fit == sorted(fit, reverse=True)


def drawn_worst_z(memory: Rows, draws: int) -> float:
    counts = sum(np.bincount(memory.sample(5)["slot"].flatten().numpy(), minlength=20) for _ in range(draws))
    total = draws * len(memory.run)
    return float(np.abs(counts / total - 0.25).max() / math.sqrt(0.25 * 0.75 / total))


def test_sampling_draws_every_row_equally_often() -> None:
    memory = full("vitter", 20, runs=4000)
    memory.add(batch_of(torch.arange(20).expand(4000, -1)))
    assert drawn_worst_z(memory, draws=5) < ALARM  # 20 rows: a false alarm in 1 of 7400


class DrawsTheFirstTooOften(Reservoir):
    def sample(self, n: int, only: Tensor | None = None, exclude: Tensor | None = None) -> Batch:
        drawn = super().sample(n)
        lucky = (self.rng.uniform(1) < 0.03) & (drawn["slot"] != 0).all(1, keepdim=True)
        drawn["slot"][:, :1] = torch.where(lucky, 0, drawn["slot"][:, :1])
        return drawn


def test_the_sampling_check_has_teeth() -> None:
    memory = DrawsTheFirstTooOften(20, FIELDS, Rng(range(4000), "test"))
    memory.add(batch_of(torch.arange(20).expand(4000, -1)))
    assert drawn_worst_z(memory, draws=5) > 5


@given(capacity=st.integers(1, 9), sizes=st.lists(st.integers(1, 25), min_size=1, max_size=6))
def test_a_queue_holds_the_newest(capacity: int, sizes: list[int]) -> None:
    memory = Queue(capacity, BARE, Rng([0], "test"))
    start = 0
    for size in sizes:
        memory.add({"index": torch.arange(start, start + size)[None]})
        start += size
    held = sorted(memory.rows()["index"][0, : len(memory)].tolist())
    assert held == list(range(max(0, start - capacity), start))


def imbalanced(runs: int, counts: tuple[int, ...], capacity: int) -> Balanced:
    """A memory after a stream of classes of these sizes, one class after the other."""
    memory = Balanced(capacity, {"y": FIELDS["y"], "index": FIELDS["index"]}, Rng(range(runs), "test"), len(counts))
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for start in range(0, len(y), 10):
        part = y[start : start + 10].expand(runs, -1)
        memory.add({"y": part, "index": torch.arange(start, start + part.shape[1]).expand(runs, -1)})
    return memory


def test_a_balanced_memory_keeps_small_classes_whole_and_the_rest_equal() -> None:
    memory = imbalanced(20, (100, 60, 40, 4), capacity=40)
    counts = torch.stack([(memory.rows()["y"] == c).sum(1) for c in range(4)], 1)
    assert torch.equal(counts, memory.held)
    assert counts[:, 3].tolist() == [4] * 20  # all four of the rare class
    assert (counts[:, :3].max(1).values - counts[:, :3].min(1).values <= 1).all()
    assert torch.equal(memory.came[0], torch.tensor([100, 60, 40, 4]))


def test_a_balanced_memory_is_uniform_within_a_class() -> None:
    runs = 6000
    memory = imbalanced(runs, (60, 40), capacity=10)
    rows = memory.rows()
    for c, (first, size) in enumerate([(0, 60), (60, 40)]):
        mine = rows["index"][rows["y"] == c].numpy() - first
        share = np.bincount(mine, minlength=size) / runs
        expected = len(mine) / runs / size
        z = np.abs(share - expected).max() / math.sqrt(expected * (1 - expected) / runs)
        assert z < ALARM, f"class {c}: {z:.1f}"  # 100 items in both: a false alarm in 1 of 1500


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same_alone_and_stacked(kind: str) -> None:
    alone, stacked = full(kind, 7, seed=2), full(kind, 7, runs=4)
    for start in range(0, 60, 6):
        index = torch.arange(start, start + 6)
        alone.add(batch_of(index[None]))
        stacked.add(batch_of(index.expand(4, -1)))
        one, four = alone.sample(3), stacked.sample(3)
        assert torch.equal(one["index"][0], four["index"][2])
    assert torch.equal(alone.rows()["index"][0], stacked.rows()["index"][2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offered", [0, 4, 33])
def test_a_saved_memory_comes_back_whole(kind: str, offered: int) -> None:
    memory, again = full(kind, 11, runs=2), full(kind, 11, runs=2)
    if offered:
        memory.add(batch_of(torch.arange(offered).expand(2, -1)))
    buffer = io.BytesIO()
    torch.save(memory.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    again.rng.load_state_dict(memory.rng.state_dict())
    assert len(again) == len(memory)
    for one in (memory, again):
        one.add(batch_of(torch.arange(100, 108).expand(2, -1)))
    for name, value in memory.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert torch.equal(memory.sample(5)["index"], again.sample(5)["index"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_memory_never_reads_the_host(kind: str) -> None:
    memory = full(kind, 8, runs=2)
    memory.add(batch_of(torch.arange(10).expand(2, -1)))
    batch, mask = batch_of(torch.arange(10, 20).expand(2, -1)), torch.ones(5, dtype=torch.bool)
    with NoHostReads():
        memory.add(batch)
        memory.sample(4)
        memory.sample(4, exclude=mask)


@given(slots=st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_of_equal_slots_only_the_last_stays(slots: list[int]) -> None:
    kept = last_wins(torch.tensor([slots]), nowhere=6)[0].tolist()
    expected = [slot if slot not in slots[place + 1 :] else 6 for place, slot in enumerate(slots)]
    assert kept == expected


def test_the_cost_in_bytes_is_that_of_the_rows() -> None:
    memory = full("vitter", 10)
    assert memory.bytes_per_row == 2 + 8 + 8
    assert memory.nbytes == sum(memory.rows()[name][0].nbytes for name in FIELDS)


def test_values_can_be_refreshed_in_place() -> None:
    memory = full("vitter", 10)
    memory.add(batch_of(torch.arange(10)[None]))
    memory.write(torch.tensor([[3, 10]]), {"y": torch.tensor([[99, 77]])})
    assert memory.rows()["y"][0, 3] == 99
    assert 77 not in memory.rows()["y"]


def test_a_memory_without_room_is_refused() -> None:
    with pytest.raises(BadConfig, match="capacity is 0"):
        full("vitter", 0)
