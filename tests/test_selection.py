"""Passes that are selected by validation: which is the best, when a run stops, what it ends with, and what is reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import references_sequences as references
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis.strategies import integers, lists, sampled_from
from torch import Tensor, nn
from torch.testing import assert_close

from cl_sim import engine, launch, preset, report, selection, session, store
from cl_sim.cli import main
from cl_sim.config import from_dict
from cl_sim.engine import Place, Plan, Progress
from cl_sim.errors import BadConfig, Diverged
from cl_sim.selection import Weights, standing
from cl_sim.strategy import Env, Strategy
from cl_sim.testing import Toy, toy, train
from cl_sim.tracking.journal import Journal, read
from cl_sim.types import Batch, Logs
from streams.sequences import SequencesConfig

OFFLINE = {"protocol": "offline", "passes": 30, "patience": 2}
COSTS = ("samples_per_second", "step_ms", "peak_bytes")


# The rule


@given(values=lists(sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=20), patience=integers(0, 4))
def test_a_standing_is_what_a_counter_says(values: list[float], patience: int) -> None:
    found = standing(values, patience)
    assert (found.best, found.last) == references.early_stop(values, patience)
    assert found.stopped == (0 < patience < found.last - found.best)
    for earlier in range(1, found.last + 1):
        assert not standing(values[:earlier], patience).stopped


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        (
            [0.1, 0.3, 0.2, 0.3, 0.4],
            2,
            (4, 4, False),
        ),  # two that are no better are borne, and an equal one is no better
        ([0.1, 0.3, 0.2, 0.3, 0.2, 0.9], 2, (1, 4, True)),  # the third is not
        ([0.3, 0.2, 0.9], 1, (2, 2, False)),
        ([0.3, 0.2, 0.1, 0.9], 1, (0, 2, True)),
        ([0.3, 0.2, 0.1, 0.9], 0, (3, 3, False)),
        ([0.5] + 10 * [0.4], 10, (0, 10, False)),
        ([0.5] + 11 * [0.4], 10, (0, 11, True)),
    ],
)
def test_a_standing_worked_by_hand(values: list[float], patience: int, expected: tuple[int, int, bool]) -> None:
    assert standing(values, patience) == expected


def test_a_summary_reads_the_best_pass_and_the_last_one() -> None:
    def line(end: bool, hr: list[list[Any]], mrr: list[list[Any]]) -> dict[str, Any]:
        return {
            "kind": "evaluation",
            "task_end": end,
            "measure": "hr10",
            "accuracy": hr,
            "mrr10": mrr,
            "seen": [],
            "time": 0,
        }

    lines = [
        line(False, [[0.9, 0.9]] * 2, [[0.9, 0.9]] * 2),  # not after a pass
        line(True, [[0.1, 0.2], [0.3, 0.4]], [[0.01, 0.02], [0.09, 0.04]]),
        line(True, [[0.5, 0.6], [0.7, 0.8]], [[0.05, 0.06], [0.07, 0.08]]),
        line(True, [[0.9, 0.3], [0.6, 0.5]], [[0.04, 0.09], [0.08, 0.01]]),
        line(True, [[0.8, 0.1], [None, None]], [[0.03, 0.07], [None, None]]),  # the second run has stopped
    ]
    rule = selection.Selection("mrr10", 0, 1, 1)
    assert selection.summary(lines, 0, rule) == {
        **{"hr10_test": 0.6, "hr10_test_last": 0.1, "hr10_validation": 0.5},
        **{"mrr10_test": 0.06, "mrr10_test_last": 0.07, "mrr10_validation": 0.05, "best_pass": 2, "passes": 4},
    }
    assert selection.summary(lines, 1, rule) == {
        **{"hr10_test": 0.4, "hr10_test_last": 0.5, "hr10_validation": 0.3},
        **{"mrr10_test": 0.04, "mrr10_test_last": 0.01, "mrr10_validation": 0.09, "best_pass": 1, "passes": 3},
    }


# A run in the engine


class Ended(NamedTuple):
    """What a run left behind."""

    progress: Progress
    lines: list[dict[str, Any]]
    summary: dict[str, list[float | None]]  # None where nothing was measured

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Its lines of a kind, without what clocks say."""
        lines = [json.loads(json.dumps(line)) for line in self.lines if line["kind"] == kind]
        for line in lines:
            del line["time"]
            line.get("values", {}).pop("samples_per_second", None)
        return lines


def run(folder: Path, made: Toy, stop: Callable[[], bool] = lambda: False) -> Ended | None:
    folder.mkdir(exist_ok=True)
    plan = Plan.of(made.stream, per_task=0, prequential=1, flush_every=7, save_every=9)
    with Journal(folder / "journal.jsonl") as journal:
        progress = engine.drain(
            engine.steps(made.stream, made.strategy, plan, journal, Place(folder, "test"), stop=stop)
        )
    if progress is None:
        return None
    found = session.summarise(folder, made.strategy, made.stream, progress)
    known = {key: [None if math.isnan(value) else float(value) for value in row] for key, row in found.items()}
    summary = {key: row for key, row in known.items() if key not in COSTS}
    return Ended(progress, read(folder / "journal.jsonl")[0], summary)


def learner(seeds: Sequence[int] = (0,), **stream: Any) -> Toy:
    """SASRec, fast enough to be past its best after a few passes."""
    settings = {"strategy": {"capacity": 0, "replay": 0, "lr": 0.05}, "stream": {**OFFLINE, "batch": 100, **stream}}
    return toy("next_item", seeds, settings)


class Wanders(Strategy):
    """Scores that walk at random, the same to the bit alone and in a stack."""

    def __init__(self, cfg: Any, env: Env) -> None:
        super().__init__(cfg, env)
        self.score = nn.Parameter(torch.zeros(env.runs, env.classes))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # one number for all runs

    def observe(self, new: Batch) -> Logs:
        with torch.no_grad():
            self.score += self.rng.uniform(self.env.classes) - 0.5
        self.steps += 1
        return {"loss": self.score[:, 1]}

    def predict(self, batch: Batch) -> Tensor:
        return self.score[:, None].expand(-1, batch["target"].shape[1], -1)


def wanderer(seeds: Sequence[int], kind: type[Wanders] = Wanders, **stream: Any) -> Toy:
    made = toy("next_item", seeds, {"stream": {**OFFLINE, "batch": 200, **stream}})
    made.strategy.rng.counter.zero_()
    return Toy(made.stream, kind(None, made.strategy.env))


def ranked(made: Toy, back: int) -> tuple[float, float, float]:
    """HR@10, NDCG@10 and MRR@10 on items that were left out, of the only run."""
    data, longest = made.stream.data, made.stream.cfg.longest
    users = [part.tolist() for part in np.split(data.items, data.starts[1:])]
    events = references.left_out(users, back, longest)
    batch = {
        "items": torch.tensor([[history + [0] * (longest - len(history)) for history, _ in events]], dtype=torch.int32),
        "length": torch.tensor([[len(history) for history, _ in events]], dtype=torch.int16),
        "target": torch.tensor([[target for _, target in events]], dtype=torch.int32),
    }
    made.strategy.eval()
    with torch.no_grad():
        scores = made.strategy.predict(batch)[0]
    made.strategy.train()
    return references.ranking(scores.tolist(), [target for _, target in events], 10)


def weights(made: Toy) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in made.strategy.parameters()]


def same(one: Sequence[Tensor], two: Sequence[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, two, strict=True))


@pytest.mark.parametrize("make", [learner, lambda **stream: wanderer((3,), **stream)], ids=["learner", "wanderer"])
def test_a_run_stops_and_ends_with_its_best_weights_as_a_plain_loop_does(
    tmp_path: Path, make: Callable[..., Toy]
) -> None:
    slow, per_pass = make(), len(make(passes=1).stream)
    validation, test, copies = list[tuple[float, ...]](), list[tuple[float, ...]](), list[list[Tensor]]()
    for number in range(30):
        train(slow, number * per_pass, (number + 1) * per_pass)
        validation.append(ranked(slow, back=2))
        test.append(ranked(slow, back=1))
        copies.append(weights(slow))
    best, last = references.early_stop([mrr for _, _, mrr in validation], 2)
    assert 0 < best < last < 29
    assert last == best + 3

    made = make()
    ended = run(tmp_path, made)
    assert ended is not None
    assert [row[0] for row in ended.progress.watched] == pytest.approx([mrr for _, _, mrr in validation[: last + 1]])
    assert ended.progress.stopped == {0: (last + 1) * per_pass - 1}
    assert ended.progress.next_step == (last + 1) * per_pass
    assert ended.lines[-1]["samples"] == (last + 1) * per_pass * made.stream.batch_size
    assert same(weights(made), copies[best])
    assert not same(copies[best], copies[last])
    for name, place in (("hr10", 0), ("ndcg10", 1), ("mrr10", 2)):
        assert ended.summary[f"{name}_test"] == [pytest.approx(test[best][place])]
        assert ended.summary[f"{name}_test_last"] == [pytest.approx(test[last][place])]
        assert ended.summary[f"{name}_validation"] == [pytest.approx(validation[best][place])]
    assert (ended.summary["best_pass"], ended.summary["passes"]) == ([best + 1], [last + 1])
    assert ranked(made, back=1) == test[best]
    assert not any(key.endswith(("_end", "_aaa")) for key in ended.summary)


def test_a_run_that_never_stops_ends_with_its_best_weights_too(tmp_path: Path) -> None:
    made = wanderer((3,), passes=4, patience=9)
    ended = run(tmp_path, made)
    assert ended is not None
    assert not ended.progress.stopped
    slow = wanderer((3,), passes=4)
    train(slow, 0, int(ended.summary["best_pass"][0]) * len(slow.stream) // 4)
    assert ended.summary["best_pass"][0] < 4
    assert same(weights(made), weights(slow))


def test_without_patience_all_passes_are_made_and_the_last_weights_stay(tmp_path: Path) -> None:
    made, patient, slow = (learner(patience=patience, passes=12) for patience in (0, 12, 0))
    ended, other = run(tmp_path / "a", made), run(tmp_path / "b", patient)
    train(slow, 0, len(slow.stream))
    assert ended is not None
    assert other is not None
    assert same(weights(made), weights(slow))
    assert ended.progress.watched == []
    assert ended.of("evaluation") == other.of("evaluation")
    for key in ("hr10_test", "ndcg20_test_last", "best_pass", "passes"):
        assert ended.summary[key] == other.summary[key]
    assert 1 < ended.summary["best_pass"][0] < 12 == ended.summary["passes"][0]
    assert not same(weights(made), weights(patient))


STACK = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Ended]:
    """Four wanderers side by side."""
    made = wanderer(STACK)
    ended = run(tmp_path_factory.mktemp("whole"), made)
    assert ended is not None
    return made, ended


def test_stacked_runs_stop_one_by_one_and_end_as_each_does_alone(tmp_path: Path, whole: tuple[Toy, Ended]) -> None:
    made, together = whole
    assert len(set(together.progress.stopped.values())) > 2
    assert max(together.progress.stopped.values()) + 1 == together.progress.next_step < len(made.stream)
    for run_, seed in enumerate(STACK):
        alone = wanderer((seed,))
        ended = run(tmp_path / str(seed), alone)
        assert ended is not None
        assert ended.progress.stopped == {0: together.progress.stopped[run_]}
        assert torch.equal(alone.strategy.score[0], made.strategy.score[run_])
        assert {key: values[0] for key, values in ended.summary.items()} == {
            key: values[run_] for key, values in together.summary.items()
        }
        mine, others = ended.of("evaluation"), together.of("evaluation")
        for one, many in zip(mine, others, strict=False):
            for key in ("accuracy", "mrr10", "ndcg20"):
                assert one[key][0] == many[key][run_]
        assert all(line["accuracy"][run_] == [None, None] for line in others[len(mine) :])
        mine, others = ended.of("curve"), together.of("curve")
        assert mine[-1]["samples"] == (ended.progress.stopped[0] + 1) * alone.stream.batch_size
        assert None not in mine[-1]["values"]["loss"]
        for one, many in zip(mine, others, strict=False):
            assert one["samples"] == many["samples"]
            assert {key: value[0] for key, value in one["values"].items()} == {
                key: value[run_] for key, value in many["values"].items()
            }
        assert all(value[run_] is None for line in others[len(mine) :] for value in line["values"].values())


def in_float64(made: Toy) -> Toy:
    """The same learner with sums so exact that a stack ranks as a single run does."""
    made.strategy.double()
    for optimiser in made.strategy.optimisers().values():
        for state in optimiser.state.values():
            state.update({name: state[name].double() for name in ("mean", "square")})
    return made


def test_stacked_nets_stop_and_rank_as_each_does_alone(tmp_path: Path) -> None:
    made = in_float64(learner((0, 1, 2)))
    together = run(tmp_path / "all", made)
    assert together is not None
    assert len(set(together.progress.stopped.values())) > 1
    for run_ in range(3):
        alone = in_float64(learner((run_,)))
        ended = run(tmp_path / str(run_), alone)
        assert ended is not None
        assert ended.progress.stopped == {0: together.progress.stopped[run_]}
        for key in ("hr10_test", "ndcg20_test_last", "mrr10_validation", "best_pass", "passes"):
            assert ended.summary[key][0] == pytest.approx(together.summary[key][run_], abs=1e-12)
        for one, many in zip(weights(alone), weights(made), strict=True):
            assert_close(one, many[run_], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("before", [0, 1, 4])  # steps before the first run stops, before the second, ...
@pytest.mark.parametrize("which", [0, 1, 3])
def test_a_stopped_and_resumed_run_ends_to_the_bit_as_one_that_was_not(
    tmp_path: Path, whole: tuple[Toy, Ended], which: int, before: int
) -> None:
    reference, expected = whole
    stop_at = sorted(expected.progress.stopped.values())[which] - before
    asked = iter([False] * stop_at + [True] + [False] * 100)
    made = wanderer(STACK)
    ended = run(tmp_path, made, lambda: next(asked))
    assert (ended is None) == ((which, before) != (3, 0))  # a stop that is asked for at the very end is none
    if ended is None:
        made = wanderer(STACK)
        ended = run(tmp_path, made)
    assert ended is not None
    for kind in ("evaluation", "curve"):
        assert ended.of(kind) == expected.of(kind)
    assert ended.summary == expected.summary
    assert ended.progress.stopped == expected.progress.stopped
    np.testing.assert_array_equal(ended.progress.watched, expected.progress.watched)
    assert torch.equal(made.strategy.score, reference.strategy.score)


def test_a_run_that_was_killed_after_its_last_step_still_ends_with_its_best_weights(tmp_path: Path) -> None:
    made = learner()
    ended = run(tmp_path, made)
    again = learner()
    resumed = run(tmp_path, again)  # the last checkpoint is there, the summary may not be
    assert ended is not None
    assert resumed is not None
    assert same(weights(made), weights(again))
    assert ended.summary == resumed.summary
    assert ended.lines == resumed.lines


# Runs that are lost beside others that stop


class Breaks(Wanders):
    """From a step on one run's loss is infinite, and its scores are no numbers."""

    run, step = 0, 0

    def observe(self, new: Batch) -> Logs:
        logs = super().observe(new)
        if int(self.steps) <= self.step:
            return logs
        with torch.no_grad():
            self.score[self.run] = torch.nan
        broken = torch.arange(self.env.runs) == self.run
        return {"loss": logs["loss"].masked_fill(broken, torch.inf)}


def breaking(run: int, step: int) -> type[Breaks]:
    return type("Breaks", (Breaks,), {"run": run, "step": step})


def in_order_of_stopping(ended: Ended) -> list[int]:
    return sorted(STACK, key=lambda run: ended.progress.stopped[run])


def test_what_happens_to_a_run_after_it_has_stopped_does_not_count(tmp_path: Path, whole: tuple[Toy, Ended]) -> None:
    first = in_order_of_stopping(whole[1])[0]
    made = wanderer(STACK, breaking(first, whole[1].progress.stopped[first] + 1))
    ended = run(tmp_path, made)
    assert ended is not None
    assert not ended.progress.lost
    assert made.strategy.score.isfinite().all()
    assert torch.equal(made.strategy.score, whole[0].strategy.score)
    assert ended.summary == whole[1].summary
    assert ended.of("evaluation") == whole[1].of("evaluation")


def test_a_run_that_is_lost_keeps_no_other_from_ending(tmp_path: Path, whole: tuple[Toy, Ended]) -> None:
    *others, last = in_order_of_stopping(whole[1])
    step = whole[1].progress.stopped[others[0]] + 2  # one has stopped by then
    made = wanderer(STACK, breaking(last, step))
    ended = run(tmp_path, made)
    assert ended is not None
    assert list(ended.progress.lost) == [last]
    assert ended.progress.next_step == max(whole[1].progress.stopped[run] for run in others) + 1
    for key, values in ended.summary.items():
        assert [values[run] for run in others] == [whole[1].summary[key][run] for run in others]
    assert ended.summary["hr10_test"][last] is None


def test_when_the_rest_is_lost_the_stopped_runs_keep_their_results(tmp_path: Path, whole: tuple[Toy, Ended]) -> None:
    one, two = (in_order_of_stopping(whole[1])[place] for place in (0, -1))
    step = whole[1].progress.stopped[one] + 2
    pair = wanderer((STACK[one], STACK[two]), breaking(1, step))
    ended = run(tmp_path / "pair", pair)
    assert ended is not None
    assert ended.progress.next_step < whole[1].progress.stopped[two] + 1
    assert ended.summary["hr10_test"][0] == whole[1].summary["hr10_test"][one]
    with pytest.raises(Diverged):
        run(tmp_path / "alone", wanderer((STACK[two],), breaking(0, step)))


# The weights


def test_weights_are_kept_by_run_and_those_of_memories_are_not() -> None:
    made = toy("next_item", (0, 1, 2), {"strategy": {"replay": 16, "capacity": 100}})
    kept = Weights(made.strategy)
    train(made, 0, 4)
    first, rows = weights(made), made.strategy.task.memory.row("target").clone()
    kept.keep([0, 1, 2])
    train(made, 4, 8)
    second = weights(made)
    kept.keep([1])
    train(made, 8, 12)
    full = made.strategy.task.memory.row("target").clone()
    kept.put_back()
    for now, one, two in zip(weights(made), first, second, strict=True):
        assert torch.equal(now, torch.stack([one[0], two[1], one[2]]))
    assert torch.equal(made.strategy.task.memory.row("target"), full)
    assert not torch.equal(full, rows)


# Words


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cl_sim(*words: str) -> str:
    done = CliRunner().invoke(main, [*words], catch_exceptions=False)
    return f"{done.exit_code} {done.output}"


SETTINGS = """
evaluate.prequential=0 evaluate.per_task=0 encoder.dim=8 encoder.layers=1 encoder.inner=8
strategy.capacity=0 strategy.replay=0 strategy.lr=0.05
stream.protocol=offline stream.passes=20 stream.patience=1 stream.batch=200
"""


def test_the_command_line_stops_early_and_reports_the_best_pass(here: Path) -> None:
    words = [word for setting in SETTINGS.split() for word in ("--set", setting)] + ["--seeds", "0-1", "--stack", "2"]
    told = cl_sim("run", "next_item", "sequences-made-up", *words, "--tracking-uri", "none")
    assert told.startswith("0 "), told
    assert "…" not in told
    for word in ("hr10", "ndcg10", "best"):
        assert word in told
    (run_dir,) = store.all_runs(here / "runs")
    metrics = json.loads((run_dir / "result.json").read_text())["metrics"]
    for best, made in zip(metrics["best_pass"], metrics["passes"], strict=True):
        assert made == best + 2 < 20
    assert (run_dir / "artifacts" / "anytime.png").exists()
    assert "results" in cl_sim("report", "last")
    table = (here / "results" / "README.md").read_text()
    head = next(line for line in table.splitlines() if line.startswith("| strategy"))
    for name in ("hr5_test %", "hr10_test %", "hr20_test %", "ndcg10_test %", "hr10_test_last %", "mrr10_validation %"):
        assert f" {name} " in head
    assert " best_pass | passes |" in head
    assert "hr10_end" not in head
    job = launch.Job(run_dir, 0, store.record_of(run_dir))
    job.look()
    assert job.finished
    assert job.samples < job.record["data"]["samples"]


def test_rankings_are_shown_with_two_decimals() -> None:
    assert report.shown("hr10_test", report.interval([0.0871, 0.0873])) == "8.72 ± 0.13"
    assert report.shown("acc_end", report.interval([0.0871, 0.0871])) == "8.7 ± 0.0"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"patience": 3}, "--set stream.protocol=offline"),
        ({"patience": -1, "protocol": "offline"}, "at least 0"),
    ],
)
def test_patience_that_cannot_work_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        SequencesConfig(**settings)


def test_a_mistake_is_one_line(here: Path) -> None:
    told = cl_sim("run", "popularity", "sequences-made-up", "--set", "stream.patience=3")
    assert told.startswith("1 Error: stream.patience is 3, but a stream has no passes")
    assert len(told.strip().split("\n")) == 1


PUBLISHED = {  # of the offline protocol on Beauty
    "stream": {"data": "beauty", "protocol": "offline", "batch": 256, "longest": 50, "passes": 100, "patience": 10},
    "encoder": {"dim": 64, "layers": 2, "heads": 2, "inner": 256, "dropout": 0.5},
    "strategy": {"capacity": 0, "replay": 0, "padding": True, "replay_steps": 1, "mask_unseen": False},
}
OF_MCLREC = {
    **{"arm": "first_order", "meta_on": "batch", "second_encoder_step": True, "meta_every": 1, "warm_up": 0},
    **{"data_weight": 0.0, "model_weight": 0.05, "reg_weight": 0.1, "reg_pairs": "all", "reg_scope": "row"},
    "meta_lr": 0.001,
}


@pytest.mark.parametrize(
    ("name", "strategy", "own"), [("sasrec-beauty", "next_item", {}), ("mclrec-beauty", "meta_augment", OF_MCLREC)]
)
def test_the_offline_presets_hold_the_published_constants(name: str, strategy: str, own: dict[str, Any]) -> None:
    made = from_dict(preset.read(name)).to_dict()
    assert (made["strategy"]["name"], made["encoder"]["name"]) == (strategy, "sasrec")
    for part, constants in {**PUBLISHED, "strategy": {**PUBLISHED["strategy"], **own}}.items():
        assert {key: made[part][key] for key in constants} == constants
    assert (made["augment"], made["precision"]) == ([], "float32")
    small = {"stream": {**made["stream"], "data": "made-up"}, "encoder": made["encoder"], "strategy": made["strategy"]}
    learner = toy(strategy, (0,), small).strategy
    groups = [group for optimiser in learner.optimisers().values() for group in optimiser.param_groups]
    assert len(groups) == (1 if name == "sasrec-beauty" else 2)
    for group in groups:
        constants = {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        assert {key: group[key] for key in constants} == constants
    if name == "mclrec-beauty":
        assert (learner.similarity, learner.tau, learner.masks) == ("dot", 1.0, False)
