"""Stacks that one process trains in turns: the numbers of each alone, and no one goes down with another."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from journals import untimed

from cl_sim import checkpoint, commands, engine, launch, session, store, worker
from cl_sim.capture import Captured, differs
from cl_sim.cli import main
from cl_sim.clock import Clock
from cl_sim.config import RunConfig, from_dict
from cl_sim.errors import BadConfig, RunBusy
from cl_sim.session import TINY
from cl_sim.testing import Tape, Toy, toy
from cl_sim.tracking import journal
from cl_sim.types import Batch, Logs
from strategies.er import ER

SETTINGS = {
    "strategy": {"name": "er", "capacity": 30},
    "stream": {"name": "synthetic", "per_class": 60},
    "encoder": {"name": "mlp", "hidden": [16]},
    "seeds": [0, 1, 2],
    "save_every": 10,
    "flush_every": 5,
}


def run_of(folder: Path, **settings: Any) -> Path:
    config = from_dict(SETTINGS | settings)
    facts = {"stream": "synthetic", "role": "", "data": {"samples": 600, "digest": ""}, "splits": [], "classes": 10}
    return store.create(folder, config, facts)


def lines_of(folder: Path, timed: bool = False) -> list[Any]:
    lines = [line for line in journal.read(folder / "journal.jsonl")[0] if line["kind"] != "end"]
    return lines if timed else [untimed(line) for line in lines]


def state_of(run_dir: Path, group: int) -> dict[str, Any]:
    folder = run_dir / f"group-{group}"
    state, refused = checkpoint.latest(folder, torch.device("cpu"), f"{run_dir.name}/group-{group}")
    assert state is not None
    assert not refused
    return state


def weights(run_dir: Path, group: int) -> dict[str, torch.Tensor]:
    state = state_of(run_dir, group)["strategy"]
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same(one: Path, other: Path, group: int) -> None:
    np.testing.assert_equal(lines_of(one / f"group-{group}"), lines_of(other / f"group-{group}"))
    mine, theirs = weights(one, group), weights(other, group)
    assert len(mine) > 5
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_groups_in_turns_have_the_numbers_of_each_alone_and_go_on_after_a_stop(tmp_path: Path) -> None:
    alone, abreast = run_of(tmp_path / "alone"), run_of(tmp_path / "abreast", abreast=3)
    for group in range(3):
        assert session.train(alone, group) == "finished"
    asked = iter(range(10**6))
    stopped = session.train_abreast(abreast, [0, 1, 2], stop=lambda: next(asked) >= 50)
    assert stopped == dict.fromkeys(range(3), "interrupted")
    assert [state_of(abreast, group)["progress"]["next_step"] for group in range(3)] == [17, 17, 16]  # of 60
    assert session.train_abreast(abreast, [0, 1, 2]) == dict.fromkeys(range(3), "finished")
    for group in range(3):
        assert_same(alone, abreast, group)


def test_a_stop_before_the_start_costs_nothing(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, abreast=2)
    assert session.train_abreast(run_dir, [0, 1], stop=lambda: True) == dict.fromkeys(range(2), "interrupted")
    assert store.ending(run_dir / "group-1") == ("interrupted", "stopped on request")
    assert not lines_of(run_dir / "group-1")


def test_an_interrupt_in_this_process_leaves_no_lock(tmp_path: Path) -> None:
    run_dir, asked = run_of(tmp_path, abreast=2), iter(range(10))

    def interrupts() -> bool:
        if next(asked) == 9:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt) as kept:
        session.train_abreast(run_dir, [0, 1], stop=interrupts)
    assert kept.value.__traceback__ is not None  # as in a notebook, where it stays
    assert session.train_abreast(run_dir, [0, 1]) == dict.fromkeys(range(2), "finished")


def test_what_has_failed_frees_its_memory_while_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[weakref.ref[ER]] = []
    alive = []
    observe = ER.observe

    def fails(self: ER, new: Batch) -> Logs:
        alive.extend(one() is not None for one in failed)
        if self.env.seeds == (1,):
            failed.append(weakref.ref(self))
            raise ValueError("no more")
        return observe(self, new)

    monkeypatch.setattr(ER, "observe", fails)
    ended = session.train_abreast(run_of(tmp_path, abreast=3), [0, 1, 2])
    assert [str(one) for one in ended.values()] == ["finished", "no more", "finished"]
    assert len(alive) > 100
    assert not alive[-1]


def test_what_comes_before_the_first_step_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    build, summarise, observe = session.build_stream, session.summarise, ER.observe

    def slowly(seconds: float, work: Any) -> Any:
        def slow(*words: Any) -> Any:
            now[0] += seconds
            return work(*words)

        return slow

    monkeypatch.setattr(session, "build_stream", slowly(1000, build))
    monkeypatch.setattr(session, "summarise", slowly(1000, summarise))
    monkeypatch.setattr(ER, "observe", slowly(1, observe))
    run_dir = run_of(tmp_path, abreast=3)
    session.train_abreast(run_dir, [0, 1, 2])
    for group in range(3):
        (summary,) = (line for line in lines_of(run_dir / f"group-{group}", timed=True) if line["kind"] == "summary")
        assert 2900 < summary["values"]["step_ms"][0] <= 3000  # three groups, a second each


def test_one_that_fails_or_is_busy_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = run_of(tmp_path / "alone")
    session.train(alone, 2)
    observe = ER.observe

    def fails(self: ER, new: Batch) -> Logs:
        if self.env.seeds == (1,) and int(self.memory.seen[0]) >= 100:
            raise ValueError("no more")
        return observe(self, new)

    monkeypatch.setattr(ER, "observe", fails)
    run_dir = run_of(tmp_path / "abreast", abreast=3)
    with session.FileLock(run_dir / "group-0" / "lock"):
        assert worker.main(str(run_dir), "0", "1", "2") == 1
    told = capfd.readouterr().err
    assert "group-0 is being written by another process" in told
    assert "ValueError: no more" in told
    assert store.ending(run_dir / "group-1") == ("failed", "ValueError: no more")
    assert_same(alone, run_dir, 2)
    with session.FileLock(run_dir / "group-0" / "lock"), pytest.raises(RunBusy):
        session.train(run_dir, 0)
    with pytest.raises(ValueError, match="no more"):
        session.train(run_dir, 1)


def denormals_flushed() -> bool:
    return float(torch.tensor(TINY, dtype=torch.float64) * 1) == 0


def test_denormals_are_flushed_until_the_last_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, flushed = denormals_flushed(), []
    observe = ER.observe

    def noting(self: ER, new: Batch) -> Logs:
        flushed.append(denormals_flushed())
        return observe(self, new)

    monkeypatch.setattr(ER, "observe", noting)
    run_dir = run_of(tmp_path, abreast=3)
    session.train(run_dir, 0)
    session.train_abreast(run_dir, [0, 1])  # the first has nothing left to do and ends at once
    assert len(flushed) == 120
    assert all(flushed)
    assert denormals_flushed() == before


def test_while_one_evaluates_no_other_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    one, other = Clock(torch.device("cpu")), Clock(torch.device("cpu"))
    now[0] += 2
    with one.paused():
        now[0] += 30
    now[0] += 1
    assert one.read() == other.read() == 3
    now[0] += 4
    late = Clock(torch.device("cpu"))
    assert (one.read(), late.read()) == (4, 0)


@pytest.mark.parametrize("replayed", [False, True], ids=["run", "replayed"])
def test_streams_in_turns_end_as_each_alone_also_where_steps_are_replayed(tmp_path: Path, replayed: bool) -> None:
    def steps(name: str, made: Toy, learner: Captured | None) -> Generator[None, None, Any]:
        plan = engine.Plan.of(made.stream, per_task=2, prequential=0, flush_every=7, save_every=1000)
        place = engine.Place(tmp_path / name, name)
        place.folder.mkdir()
        with journal.Journal(place.folder / "journal.jsonl") as record:
            return (yield from engine.steps(made.stream, made.strategy, plan, record, place, learner=learner))

    alone, first, second = (toy("hpcr", (seed,), {"strategy": {"capacity": 40}}) for seed in (0, 0, 1))
    learners = [Captured(made.strategy, Tape(), warm_up=1) if replayed else None for made in (first, second)]
    engine.drain(steps("alone", alone, None))
    for _ in zip(steps("first", first, learners[0]), steps("second", second, learners[1]), strict=True):
        pass
    if replayed:
        assert all(learner is not None and learner.replays > 10 for learner in learners)
    states = [made.strategy.state_dict() for made in (alone, first)]
    tensors = [key for key, value in states[0].items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 5
    assert all(torch.equal(states[0][key], states[1][key]) for key in tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["run", "captured"])
def test_groups_on_streams_of_their_own_agree_with_each_alone(tmp_path: Path, captured: bool) -> None:
    settings: dict[str, Any] = {
        "device": "cuda",
        "capture": captured,
        "encoder": {"name": "reduced_resnet18", "width": 8},
    }
    alone, abreast = run_of(tmp_path / "alone", **settings), run_of(tmp_path / "abreast", abreast=3, **settings)
    assert session.train_abreast(abreast, [0, 1, 2]) == dict.fromkeys(
        range(3), "finished"
    )  # first: nothing is made yet
    for group in range(3):
        assert session.train(alone, group) == "finished"
        assert not differs(weights(abreast, group), weights(alone, group))


@pytest.mark.parametrize(("abreast", "processes"), [(1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (3, [[0, 1, 2]])])
def test_a_process_gets_as_many_groups_as_asked_for(tmp_path: Path, abreast: int, processes: list[list[int]]) -> None:
    run_dir = run_of(tmp_path, abreast=abreast)
    assert [[job.group for job in one.jobs] for one in launch._workers(run_dir)] == processes


def test_the_command_line_trains_abreast(tmp_path: Path) -> None:
    words = ["run", "er", "synthetic", "--seeds", "0-2", "--stack", "1", "--workers", "1", "--device", "cpu"]
    words += ["--set", "stream.per_class=20", "--set", "encoder.name=mlp", "--tracking-uri", "none"]
    found: dict[str, list[float]] = {}
    for name, more in {"alone": [], "abreast": ["--abreast", "3"]}.items():
        done = CliRunner().invoke(main, [*words, *more, "--store", str(tmp_path / name)])
        assert done.exit_code == 0, done.output
        run_dir = store.all_runs(tmp_path / name)[-1]
        assert store.record_of(run_dir)["config"]["abreast"] == (3 if more else 1)
        found[name] = json.loads((run_dir / "result.json").read_text())["metrics"]["acc_end"]
    assert found["alone"] == found["abreast"]
    assert len(set(found["alone"])) > 1


def test_stacks_abreast_must_fit_into_memory_together() -> None:
    def plan(abreast: int, seeds: int = 27) -> RunConfig:
        return from_dict(SETTINGS | {"stack": 3, "seeds": list(range(seeds)), "abreast": abreast})

    assert commands.fitting(plan(1), 100, 900) == 3
    assert commands.fitting(plan(3), 100, 900) == 2
    assert commands.fitting(plan(9, seeds=9), 100, 900) == 2  # three groups
    with pytest.raises(BadConfig, match=r"for each abreast; use a smaller .*--abreast"):
        commands.fitting(plan(9), 100, 900)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"abreast": 0}, "abreast is 0; it must be at least 1"),
        ({"abreast": 2, "stack": 3}, "abreast is 2, but 3 seeds with a stack of 3 are one group"),
        ({"abreast": 31, "device": "cuda"}, "abreast is 31, but a process has CUDA streams for 30"),
    ],
)
def test_what_cannot_be_abreast_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(BadConfig, match=told):
        from_dict(SETTINGS | settings)


def test_who_dies_without_a_word_is_written_down_in_every_group(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path, abreast=3)
    session.train(run_dir, 1)
    (one,) = launch._workers(run_dir)
    assert [job.group for job in one.jobs] == [0, 2]
    one.process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    one.process.wait()
    launch._record_death(one)
    died = ("failed", f"its process died (exit status 7); see {run_dir / 'group-0' / 'worker.log'}")
    assert [store.ending(run_dir / f"group-{group}") for group in range(3)] == [died, ("finished", ""), died]
