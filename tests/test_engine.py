"""The loop: when it measures, what it writes, how it stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from journals import untimed

from cl_sim import checkpoint, engine, session, testing
from cl_sim.engine import Place, Plan
from cl_sim.errors import BadCheckpoint, Diverged
from cl_sim.tracking.journal import Journal, read
from cl_sim.types import Batch, Logs
from strategies.er import ER, ERConfig


def start(folder: Path, made: testing.Toy, **when: int) -> tuple[Plan, Journal, Place]:
    folder.mkdir(exist_ok=True)
    plan = Plan.of(made.stream, **{"per_task": 4, "prequential": 5, "flush_every": 7, "save_every": 9} | when)
    return plan, Journal(folder / "journal.jsonl"), Place(folder, "test")


@pytest.fixture(autouse=True)
def closed_journals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what a test opened."""
    opened: list[Journal] = []
    make = Journal.__init__

    def remember(self: Journal, path: Path) -> None:
        make(self, path)
        opened.append(self)

    monkeypatch.setattr(Journal, "__init__", remember)
    yield
    for journal in opened:
        journal.close()


def lines_of(folder: Path, kind: str) -> list[dict]:
    return [line for line in read(folder / "journal.jsonl")[0] if line["kind"] == kind]


def test_the_plan_evaluates_as_often_as_asked_and_in_full_at_task_ends() -> None:
    made = testing.toy("finetune", (0,))  # 2 tasks of 20 steps
    plan = Plan.of(made.stream, per_task=4, prequential=5, flush_every=7, save_every=9)
    assert sorted(plan.full) == [19, 39]
    assert sorted(plan.small) == [4, 9, 14, 24, 29, 34]
    assert [step for step in range(40) if plan.flushes(step)] == [6, 13, 20, 27, 34, 39]
    assert [step for step in range(40) if plan.saves(step)] == [8, 17, 26, 35, 39]


def test_evaluation_equals_counting_one_by_one() -> None:
    made = testing.toy("er", (0, 1))
    testing.train(made, 0, 10)
    holdout = made.stream.holdout()
    fast = engine.evaluate(made.strategy, holdout, 10, full=True)
    hits, counts = np.zeros((2, 2)), np.zeros((2, 2))
    made.strategy.eval()
    for chunk in holdout.chunks(10, True):
        answers = made.strategy.predict(chunk).argmax(-1)
        for run in range(2):
            for item in range(answers.shape[1]):
                split = int(chunk["split"][run, item])
                hits[run, split] += int(answers[run, item] == chunk["y"][run, item])
                counts[run, split] += 1
    np.testing.assert_allclose(fast, hits / counts)
    assert counts.sum() == 2 * 80


def test_the_small_evaluation_asks_only_what_was_seen_and_is_balanced() -> None:
    made = testing.toy("er", (0,), {"stream": {"order": "shuffled"}})
    holdout = made.stream.holdout()
    first = torch.cat([chunk["split"] for chunk in holdout.chunks(0, False)], 1)
    later = torch.cat([chunk["y"] for chunk in holdout.chunks(39, False)], 1)
    assert first.max() == 0
    assert torch.bincount(later[0]).tolist() == [20] * 4


def test_test_then_train_accuracy_is_measured_before_learning(tmp_path: Path) -> None:
    made, twin = testing.toy("er", (0,)), testing.toy("er", (0,))
    progress = engine.drain(engine.steps(made.stream, made.strategy, *start(tmp_path / "a", made, prequential=1)))
    hits = []
    for step in range(len(twin.stream)):
        batch = twin.stream.batch(step)
        twin.strategy.eval()
        with torch.no_grad():
            hits.append(float((twin.strategy.predict(batch).argmax(-1) == batch["y"]).float().mean()))
        testing.train(twin, step, step + 1)
    assert progress is not None
    assert progress.sums["acc"][0] == pytest.approx(10 * sum(hits), abs=1e-3)
    assert progress.sums["tested"] == [10.0 * len(hits)]
    assert lines_of(tmp_path / "a", "curve")[-1]["values"]["acc_prequential"][0] == pytest.approx(
        np.mean(hits), abs=1e-6
    )


@pytest.mark.parametrize("stop_at", [3, 9, 13, 39])
def test_a_run_stopped_at_any_step_and_resumed_writes_the_same_journal_and_state(tmp_path: Path, stop_at: int) -> None:
    whole = testing.toy("er", (0, 1))
    engine.drain(engine.steps(whole.stream, whole.strategy, *start(tmp_path / "whole", whole)))
    asked = iter([False] * stop_at + [True] + [False] * 100)
    for _ in range(2):
        part = testing.toy("er", (0, 1))
        engine.drain(
            engine.steps(part.stream, part.strategy, *start(tmp_path / "part", part), stop=lambda: next(asked))
        )
    for kind in ("evaluation", "memory", "curve"):
        one, two = lines_of(tmp_path / "whole", kind), lines_of(tmp_path / "part", kind)
        assert [untimed(line) for line in one] == [untimed(line) for line in two]
    for key, value in whole.strategy.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, part.strategy.state_dict()[key]), key


class Diverges(ER):
    def observe(self, new: Batch) -> Logs:
        logs = super().observe(new)
        self.count = getattr(self, "count", 0) + 1
        return {"loss": logs["loss"] / (self.count != 12), "other": logs["loss"]}


def test_a_loss_that_is_not_finite_stops_the_run_with_step_parts_and_checkpoint(tmp_path: Path) -> None:
    made = testing.toy("er", (0,))
    bad = Diverges(ERConfig(), made.strategy.env)
    with pytest.raises(Diverged) as caught:
        engine.drain(engine.steps(made.stream, bad, *start(tmp_path / "run", made)))
    for word in ("step 11", "loss = inf", "other = ", "checkpoint-000000009.pt", "--set strategy.lr"):
        assert word in str(caught.value)
    assert [path.name for path in checkpoint.listed(tmp_path / "run")] == ["checkpoint-000000009.pt"]


class OneDiverges(ER):
    """The second run's weights become infinite at its 13th step."""

    def observe(self, new: Batch) -> Logs:
        if self.memory.seen[0] == 120:
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter[1] = torch.inf
        return super().observe(new)


def test_a_run_that_diverges_does_not_take_the_others_down(tmp_path: Path) -> None:
    whole, made = testing.toy("er", (0, 1, 2)), testing.toy("er", (0, 1, 2))
    engine.drain(engine.steps(whole.stream, whole.strategy, *start(tmp_path / "whole", whole)))
    made.strategy.env.lifted, made.strategy.rng.counter[:] = 0, 0
    bad, notes = OneDiverges(ERConfig(), made.strategy.env), list[str]()
    stops = iter([False] * 25 + [True])
    engine.drain(
        engine.steps(made.stream, bad, *start(tmp_path / "run", made), stop=lambda: next(stops), note=notes.append)
    )
    progress = engine.drain(engine.steps(made.stream, bad, *start(tmp_path / "run", made), note=notes.append))
    assert len(notes) == 1
    assert notes[0].startswith("run 2 of 3 is lost, the others go on: not finite at step 12: loss = ")
    for one, two in zip(whole.strategy.net.parameters(), bad.net.parameters(), strict=True):
        assert torch.equal(one[[0, 2]], two[[0, 2]])
    summaries = session.summarise(tmp_path / "run", bad, made.stream, progress)
    expected = session.summarise(tmp_path / "whole", whole.strategy, whole.stream, progress)
    for key in ("acc_end", "acc_aaa", "acc_prequential"):
        assert np.isnan(summaries[key][1])
        assert not np.isnan([summaries[key][0], summaries[key][2]]).any()
    assert [summaries["acc_end"][run] for run in (0, 2)] == [expected["acc_end"][run] for run in (0, 2)]
    last = lines_of(tmp_path / "run", "evaluation")[-1]["accuracy"]
    assert last[1] == [None, None]
    assert None not in last[0] + last[2]


def test_only_two_checkpoints_are_kept_and_no_draft_remains(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"owner": "me", "value": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000000002.pt", "checkpoint-000000003.pt"]


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign bytes", "foreign run"])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, 1, {"owner": "me", "value": torch.arange(1000)})
    path = checkpoint.save(
        tmp_path, 2, {"owner": "other" if damage == "foreign run" else "me", "value": torch.arange(9)}
    )
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage == "cut":
        content = content[:-10]
    if damage == "foreign bytes":
        content = bytearray(b"PK\x03\x04 something else")
    path.write_bytes(bytes(content))
    state, refused = checkpoint.latest(tmp_path, torch.device("cpu"), "me")
    assert state is not None
    assert torch.equal(state["value"], torch.arange(1000))
    assert len(refused) == 1
    assert path.name in refused[0]


def test_when_no_checkpoint_is_usable_the_run_does_not_silently_start_again(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"owner": "me"})
    path.write_bytes(b"gone")
    with pytest.raises(BadCheckpoint, match="no usable checkpoint"):
        checkpoint.latest(tmp_path, torch.device("cpu"), "me")


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, 1, {"owner": "me"})

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, {"owner": "me"})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000001.pt"]


def test_training_flushes_denormals_and_leaves_the_processor_as_it_was() -> None:
    tiny = torch.tensor(1e-310, dtype=torch.float64)

    def lost() -> bool:
        return float(tiny * 1) == 0

    assert not lost()
    with suppress(KeyError), session.flushed_denormals():
        assert lost()
        with session.flushed_denormals():
            assert lost()
        assert lost()
        raise KeyError
    assert not lost()
