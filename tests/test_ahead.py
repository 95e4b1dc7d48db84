"""Sets that do not fit on the device come ahead of their steps, and are bit for bit what a gather on the device gives.

On a CPU a set is made not to fit by leaving no room; then all is as on a GPU but for the pinning, streams and events.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_sim import arrays
from cl_sim.ahead import Ahead
from cl_sim.arrays import Resident
from streams.avalanche import ExperienceHoldout
from streams.blurry import Blurry, BlurryConfig
from streams.drift import Drift, DriftConfig
from streams.few_labels import FewLabels, FewLabelsConfig
from streams.fewshot import Novel, Passes
from streams.split import Split, SplitConfig

CPU = torch.device("cpu")
SEEDS = (3, 4)
STEPS = 12
LONG = 60.0  # seconds to wait for what takes microseconds
KEPT: list[Any] = []  # streams that are there when their process ends
PASSES = FewLabelsConfig(of="split-digits", settings=("tasks=1", "passes=2"), per_class=3)
MAKERS: dict[str, Callable[[torch.device], Any]] = {
    "split": lambda device: Split(SplitConfig(tasks=2), SEEDS, device),
    "passes": lambda device: Split(SplitConfig(tasks=2, passes=3, batch=30), SEEDS, device),
    "draws": lambda device: Split(SplitConfig(tasks=2, draws=40), SEEDS, device),
    "blurry": lambda device: Blurry(BlurryConfig(), SEEDS, device),
    "drift": lambda device: Drift(DriftConfig(kind="permute"), SEEDS, device),
    "few labels": lambda device: FewLabels(PASSES, SEEDS, device),
}


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "room", lambda device: 0)


def table(rows: int = 50) -> torch.Tensor:
    return torch.arange(6 * rows, dtype=torch.int32).view(rows, 2, 3)


def numbers(step: int) -> torch.Tensor:
    """Rows of two runs; odd steps are shorter, as last chunks are."""
    return torch.tensor([[step, 2, 3 * step], [4 * step, step + 1, 0]])[:, : 3 - step % 2]


class Asked:
    """Row numbers that remember which steps they were asked for, and by which thread."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.threads: set[threading.Thread] = set()
        self.more = threading.Condition()

    def __call__(self, step: int) -> torch.Tensor:
        with self.more:
            self.steps.append(step)
            self.threads.add(threading.current_thread())
            self.more.notify_all()
        return numbers(step)

    def reach(self, count: int) -> None:
        """Wait until the rows of so many steps have been asked for."""
        with self.more:
            assert self.more.wait_for(lambda: len(self.steps) >= count, LONG), f"only {self.steps} were asked for"


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def end_of(threads: set[threading.Thread]) -> None:
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()


@given(order=st.lists(st.integers(0, STEPS - 1), max_size=25), depth=st.integers(1, 4))
def test_steps_in_any_order_have_the_rows_of_their_numbers(order: list[int], depth: int) -> None:
    ahead = Ahead(table(), CPU, numbers, STEPS, depth)
    found = [ahead.take(step) for step in order]  # all are kept, so that a buffer that is used too early shows
    for step, x in zip(order, found, strict=True):
        assert torch.equal(x, table()[numbers(step)])
    assert len({staged.buffer.data_ptr() for staged in ahead.staging} - {0}) <= depth + 1
    ahead.close()


def test_the_next_steps_are_made_before_they_are_asked_for_and_each_once() -> None:
    asked = Asked()
    ahead = Ahead(table(), CPU, asked, STEPS, depth=2)
    for step in range(STEPS):
        ahead.take(step)
        asked.reach(min(step + 3, STEPS))
        assert asked.steps == list(range(min(step + 3, STEPS)))
    assert threading.current_thread() not in asked.threads
    ahead.close()


def test_after_a_jump_the_steps_that_follow_it_come_next() -> None:
    asked = Asked()
    ahead = Ahead(table(), CPU, asked, STEPS, depth=2)
    for count, step in enumerate((2, 8, 0), start=1):
        assert torch.equal(ahead.take(step), table()[numbers(step)])
        asked.reach(3 * count)
    assert asked.steps == [2, 3, 4, 8, 9, 10, 0, 1, 2]
    ahead.close()


def test_steps_that_wait_are_dropped_when_another_is_asked_for() -> None:
    asked, begun = Asked(), threading.Event()

    def slow(step: int) -> torch.Tensor:
        limit = time.monotonic() + LONG
        if step == 1:
            begun.set()
        while step == 1 and 9 not in ahead.made:  # the caller has gone on to step 8
            assert time.monotonic() < limit
            time.sleep(0.001)
        return asked(step)

    ahead = Ahead(table(), CPU, slow, STEPS, depth=3)
    ahead.take(0)
    assert begun.wait(LONG)  # a step that has not begun is dropped, too
    assert torch.equal(ahead.take(8), table()[numbers(8)])
    assert asked.steps[:3] == [0, 1, 8]
    ahead.close()


def test_an_error_of_the_thread_is_raised_at_its_step_and_not_before() -> None:
    broken = {3}

    def fragile(step: int) -> torch.Tensor:
        if step in broken:
            raise OSError("read error")
        return numbers(step) if step != 5 else torch.tensor([[50]])

    ahead = Ahead(table(), CPU, fragile, STEPS, depth=2)
    for step in range(3):
        ahead.take(step)
    with pytest.raises(OSError, match="read error"):
        ahead.take(3)
    assert torch.equal(ahead.take(4), table()[numbers(4)])
    with pytest.raises(IndexError):
        ahead.take(5)
    broken.clear()
    assert torch.equal(ahead.take(3), table()[numbers(3)])
    ahead.close()


@pytest.mark.parametrize("close", [True, False])
def test_the_thread_ends_with_what_it_works_for(close: bool) -> None:
    asked = Asked()
    ahead = Ahead(table(), CPU, asked, STEPS)
    ahead.take(0)
    if close:
        ahead.close()
    else:
        del ahead
    end_of(asked.threads)


@pytest.mark.parametrize("name", MAKERS)
def test_a_stream_without_room_gives_the_same_batches_in_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = MAKERS[name](CPU)
    monkeypatch.setattr(arrays, "room", lambda device: 0)
    streamed, plain = MAKERS[name](CPU), resident.inner if name == "few labels" else resident
    assert plain.ahead is None
    last = len(resident) - 1
    for step in (*range(len(resident)), 5, 6, 7, 2, last, last, 0, 1):
        assert same(streamed.batch(step), resident.batch(step)), f"step {step}"
    for full in (True, False):
        pairs = zip(streamed.holdout().chunks(last, full), resident.holdout().chunks(last, full), strict=True)
        assert all(same(*pair) for pair in pairs)


def test_numbers_of_rows_are_never_read_from_the_device(no_room: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather of rows that rest on the host reads them; so a stream and its evaluations must do without."""

    def refuse(rows: Resident, index: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the numbers of these rows come from the device")

    monkeypatch.setattr(Resident, "gather", refuse)
    for make in MAKERS.values():
        stream = make(CPU)
        assert stream.batch(0)["x"].shape[:2] == (len(SEEDS), stream.batch_size)
        assert len(list(stream.holdout().chunks(len(stream), False)))


def test_a_gather_of_rows_on_the_host_is_indexing_too(no_room: None) -> None:
    rows, index = Resident(table().numpy(), CPU), numbers(2)
    assert not rows.on_device
    assert torch.equal(rows.gather(index), table()[index])


def test_chunks_are_the_rows_in_order_and_none_if_there_is_none(no_room: None) -> None:
    rows, index = Resident(table().numpy(), CPU), torch.arange(50).flip(0).expand(2, -1)
    for count, sizes in ((50, [20, 20, 10]), (40, [20, 20]), (3, [3]), (0, [0])):
        with torch.inference_mode():  # as evaluations are made
            found = list(rows.chunks(index[:, :count], 20))
        assert [part.shape[1] for part, _ in found] == sizes
        assert all(torch.equal(x, table()[part]) for part, x in found)
        assert torch.equal(torch.cat([part for part, _ in found], 1), index[:, :count])


def test_an_evaluation_that_is_given_up_leaves_no_thread(no_room: None) -> None:
    before = set(threading.enumerate())
    chunks = Resident(table().numpy(), CPU).chunks(torch.arange(50)[None], 10)
    next(chunks)
    started = set(threading.enumerate()) - before
    assert started
    del chunks
    gc.collect()
    end_of(started)


@pytest.mark.parametrize("full", [True, False])
def test_other_evaluation_sets_without_room_are_the_same(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = table(230).numpy().astype(np.uint8), np.arange(230) % 4
    cfg = type("Settings", (), {"novel": "test", "episodes": 7})()
    made: list[Callable[[], Any]] = [
        lambda: ExperienceHoldout(x, y, y // 2, 2, 150, CPU, np.array([0, 5])),
        lambda: Novel(x, y, cfg, 2, CPU),
    ]
    resident = [list(make().chunks(3, full)) for make in made]
    monkeypatch.setattr(arrays, "room", lambda device: 0)
    for make, chunks in zip(made, resident, strict=True):
        assert all(same(*pair) for pair in zip(make().chunks(3, full), chunks, strict=True))


def test_passes_of_a_pool_are_the_same_for_two_threads() -> None:
    here, there = (Passes(SEEDS, 25, 6, CPU) for _ in range(2))
    ahead = Ahead(table(), CPU, there.rows, 12, depth=3)  # the thread is in the next pass where this one is not yet
    for step in (*range(12), 3, 8, 1):
        assert torch.equal(ahead.take(step), table()[here.rows(step)])
    ahead.close()


def checksum(streamed: bool) -> int:
    if streamed:
        arrays.room = lambda device: 0
    stream = MAKERS["passes"](CPU)
    KEPT.append(stream)
    assert (stream.ahead is not None) == streamed
    return sum((step + 1) * int(stream.batch(step)["x"].sum()) for step in range(len(stream)))


def test_a_process_of_its_own_streams_too_and_ends() -> None:
    expected = checksum(False)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(checksum, (True,)) == expected
        pool.close()
        pool.join()


class Recorded:
    """What the thread and its caller ask of CUDA, each in order; nothing is done but the gathers and copies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.thread: list[tuple[str, int]] = []
        self.caller: list[tuple[str, int]] = []
        made, buffers, gather, empty, book = itertools.count(1), [], torch.index_select, torch.empty, self

        class Event:
            def __init__(self, blocking: bool) -> None:
                self.number = next(made)

            def record(self, stream: Any) -> None:
                assert stream == "side"
                book.thread.append(("copy", self.number))

            def synchronize(self) -> None:
                book.thread.append(("wait for copy", self.number))

        class Current:
            def wait_event(self, event: Event) -> None:
                book.caller.append(("wait for copy", event.number))

        def gathered(rows: torch.Tensor, dim: int, index: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            if out.data_ptr() not in buffers:
                buffers.append(out.data_ptr())
            book.thread.append(("gather into", buffers.index(out.data_ptr())))
            return gather(rows, dim, index, out=out)

        def pinned(shape: Any, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
            assert pin_memory
            return empty(shape, dtype=dtype)

        def side(stream: Any) -> Any:
            assert stream == "side"
            return contextlib.nullcontext()

        def keep(x: torch.Tensor, stream: Any) -> None:
            book.caller.append(("keep rows", int(x[0, 0, 0, 0]) // 6))

        monkeypatch.setattr(torch, "index_select", gathered)
        monkeypatch.setattr(torch, "empty", pinned)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Current())
        monkeypatch.setattr(torch.Tensor, "record_stream", keep)


def test_buffers_wait_for_their_copies_and_so_does_who_uses_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    book = Recorded(monkeypatch)
    ahead = Ahead(table(), CPU, lambda step: torch.full((2, 3), step), 5, depth=1)  # two buffers
    ahead.side = "side"  # type: ignore[assignment]
    for step in range(5):
        ahead.take(step)
    ahead.close()
    first = [("gather into", 0), ("copy", 1), ("gather into", 1), ("copy", 2)]
    third = [("wait for copy", 1), ("gather into", 0), ("copy", 3)]
    fourth = [("wait for copy", 2), ("gather into", 1), ("copy", 4)]
    fifth = [("wait for copy", 3), ("gather into", 0), ("copy", 5)]
    assert book.thread == first + third + fourth + fifth
    pairs = [[("wait for copy", step + 1), ("keep rows", step)] for step in range(5)]
    assert book.caller == list(itertools.chain(*pairs))


@pytest.fixture
def cuda(no_room: None) -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    yield torch.device("cuda")
    torch.cuda.set_sync_debug_mode("default")


def everything(chunks: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All chunks as one batch on the host; a GPU gets larger ones."""
    parts = list(chunks)
    return {key: torch.cat([part[key] for part in parts], 1).cpu() for key in parts[0]}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
def test_a_gpu_gets_the_batches_that_a_cpu_has(name: str, cuda: torch.device) -> None:
    there, here = MAKERS[name](cuda), MAKERS[name](CPU)
    work = torch.ones(4000, 4000, device=cuda)
    for step in (*range(60), 5, 6, 2, len(here) - 1, 0):
        work = (work @ work).clamp(0, 1)  # keeps the GPU behind, so that copies come while it works
        assert same(everything(iter([there.batch(step)])), here.batch(step)), f"step {step}"
    for full in (True, False):
        assert same(*(everything(stream.holdout().chunks(9, full)) for stream in (there, here)))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_steady_step_never_waits_for_the_gpu(cuda: torch.device) -> None:
    """The batches are right, too, where the GPU is far behind the host and nothing is read between the steps."""
    stream, work = MAKERS["split"](cuda), torch.ones(4000, 4000, device=cuda)
    expected = [stream.batch(step)["x"].float().sum((1, 2, 3, 4)) for step in range(100)]
    found = []
    torch.cuda.set_sync_debug_mode("error")
    for step in range(100):
        work = (work @ work).clamp(0, 1)
        found.append(stream.batch(step)["x"].float().sum((1, 2, 3, 4)))
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.stack(found), torch.stack(expected))
    known = [MAKERS["split"](CPU).batch(step)["x"].float().sum((1, 2, 3, 4)) for step in (0, 99)]
    assert torch.equal(torch.stack([found[0], found[99]]).cpu(), torch.stack(known))
