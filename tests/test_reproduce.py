"""A rerun against its stored result: the verdicts, what has changed since, and the command's words and exit status."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cl_sim import config, preset, reproduce
from cl_sim.cli import main
from cl_sim.errors import ClSimError
from cl_sim.reproduce import judge

SAME = {0: 0.5, 1: 0.6, 2: 0.7}  # mean 0.6, s = 0.1, half-width 4.302653 * 0.1 / sqrt(3) = 0.2484138


def moved(*gaps: float) -> dict[int, float]:
    """The stored numbers, each changed by its own gap."""
    return {seed: value + gap for (seed, value), gap in zip(SAME.items(), gaps, strict=False)}


VERDICTS = [
    ("the same numbers", SAME, SAME, "identical", 0.0, 0.0),
    # mean 0.01, s = 0.02: half-width 4.302653 * 0.02 / sqrt(3) = 0.0496828, which contains 0
    ("small gaps of both signs", SAME, moved(0.01, -0.01, 0.03), "agrees", 0.01, 0.0496828),
    # mean 0.06, s = 0.01: half-width 0.0248414; unpaired, 0.06 would be far within 0.2484 * sqrt(2)
    ("gaps of one sign", SAME, moved(0.05, 0.06, 0.07), "differs", 0.06, 0.0248414),
    # the first two only: mean 0.01, s = 0.0141421, half-width 12.7062 * 0.01 = 0.127062
    ("fewer of the same seeds", SAME, moved(0.0, 0.02), "agrees", 0.01, 0.127062),
    ("one of the same seeds, unchanged", SAME, {1: 0.6}, "identical", 0.0, math.nan),
    ("one of the same seeds, changed", SAME, {1: 0.61}, "cannot tell", 0.01, math.nan),
    # half-widths 0.2484138 each: together 0.2484138 * sqrt(2) = 0.3513102
    ("other seeds, near", SAME, {7: 0.8, 8: 0.9, 9: 1.0}, "agrees", 0.3, 0.3513102),
    ("other seeds, far", SAME, {7: 0.86, 8: 0.96, 9: 1.06}, "differs", 0.36, 0.3513102),
    ("one other seed", SAME, {7: 0.6}, "cannot tell", 0.0, math.nan),
    ("one stored seed, others new", {0: 0.6}, {1: 0.6, 2: 0.7}, "cannot tell", 0.05, math.nan),
    ("more seeds than stored", SAME, {**SAME, 3: 0.6}, "agrees", 0.0, math.hypot(0.2484138, 0.1299229)),
    ("a metric that is gone", SAME, {}, "cannot tell", math.nan, math.nan),
    ("a metric that was not there", {}, SAME, "cannot tell", math.nan, math.nan),
]


@pytest.mark.parametrize(
    ("stored", "new", "word", "mean", "half"), [v[1:] for v in VERDICTS], ids=[v[0] for v in VERDICTS]
)
def test_a_verdict_is_the_one_worked_by_hand(
    stored: dict[int, float], new: dict[int, float], word: str, mean: float, half: float
) -> None:
    verdict = judge(stored, new)
    assert verdict.word == word
    assert verdict.agrees == (word in ("identical", "agrees"))
    assert verdict.difference.mean == pytest.approx(mean, abs=1e-12, nan_ok=True)
    assert verdict.difference.half == pytest.approx(half, rel=1e-5, nan_ok=True)


def test_a_constant_gap_differs_however_small() -> None:
    assert (
        judge({0: 0.5, 1: 0.25}, {0: 0.50390625, 1: 0.25390625}).word == "differs"
    )  # exact in binary: no spread at all


@pytest.mark.parametrize(("other_seeds", "rate"), [(False, 0.05), (True, 0.0241)])
def test_equal_programs_are_called_different_as_often_as_stated(other_seeds: bool, rate: float) -> None:
    rng, tries, seeds = np.random.default_rng(0), 2000, 5
    alarms = 0
    for _ in range(tries):
        stored, new = (dict(enumerate(rng.normal(size=seeds).tolist(), start=start)) for start in (0, 5 * other_seeds))
        alarms += judge(stored, new).word == "differs"
    z = (alarms / tries - rate) / math.sqrt(rate * (1 - rate) / tries)  # 0.0241: a t with 8 degrees beyond t(0.975, 4)
    assert abs(z) < 4.5  # false alarm: 7 in a million


def result(**more: Any) -> dict[str, Any]:
    return {
        "seeds": [0, 1],
        "metrics": {"acc_end": [0.5, 0.6], "acc_aaa": [0.5, None]},
        "config": made().to_dict(),
        "versions": {"torch": "2.0"},
        "data_digest": "0123456789",
        "machine": "2 cores",
        **more,
    }


def made(**strategy: Any) -> config.RunConfig:
    parts = {"strategy": {"name": "er", **strategy}, "stream": {"name": "synthetic"}, "encoder": {"name": "mlp"}}
    return config.from_dict(parts)


def test_metrics_are_compared_where_either_side_has_them() -> None:
    new = result(metrics={"acc_end": [0.5, 0.6], "acc_aaa": [0.5, 0.6]})
    found = reproduce.verdicts(result(), new)
    assert {metric: verdict.word for metric, verdict in found.items()} == {
        "acc_end": "identical",
        "acc_aaa": "cannot tell",  # the stored one has a single seed
    }
    rows = reproduce.table(found)
    assert rows[1] == ["acc_end", "55.0 ± 63.5", "55.0 ± 63.5", "+0.00 ± 0.00", "identical"]
    assert rows[2][1:4] == ["50.0", "55.0 ± 63.5", "+5.00"]


def test_what_changed_since_is_named_with_both_values() -> None:
    facts = {"torch": "2.1", "machine": "2 cores", "data_digest": "abcdefghijk"}
    stored = result()
    stored["config"] = config.merge(stored["config"], {"augment": ["flip"], "strategy": {"gone": 3}, "seeds": [8]})
    assert reproduce.changed(stored, made(lr=0.3), facts) == [
        "strategy.lr 0.1 (now 0.3)",
        "augment flip (now none)",
        "strategy.gone 3 (now not there)",
        "torch 2.0 (now 2.1)",
        "data_digest 01234567 (now abcdefgh)",
    ]


def test_a_setting_that_came_later_counts_as_its_default() -> None:
    stored = result()
    del stored["config"]["strategy"]["capacity"], stored["config"]["threads"], stored["config"]["augment"]
    assert reproduce.changed(stored, made(), {}) == []
    assert reproduce.changed(stored, made(capacity=3), {}) == ["strategy.capacity 1000 (now 3)"]


def test_a_result_is_found_under_its_usual_name_or_by_the_command_that_made_it(tmp_path: Path) -> None:
    keys = {"er-tiny": ("tiny", "er"), "mir-tiny": ("tiny", "mir")}
    commands = {
        "mine": "cl-sim run --preset mir-tiny --seeds 0-2",
        "other": "cl-sim run --preset mir-tiny-m5 --seeds 0",
    }
    commands["changed"] = "cl-sim run --preset mir-tiny --set strategy.lr=1"
    (tmp_path / "tiny").mkdir()
    for name, command in commands.items():
        (tmp_path / "tiny" / f"{name}.json").write_text(json.dumps(result(command=command)))
    assert reproduce.filed(tmp_path, "mir-tiny", keys["mir-tiny"]).stem == "mine"
    assert reproduce.stored_result("mir-tiny", tmp_path, keys)["command"] == commands["mine"]
    with pytest.raises(ClSimError, match=r"er.json is missing\); these presets have one: mir-tiny"):
        reproduce.stored_result("er-tiny", tmp_path, keys)
    (tmp_path / "tiny" / "mir.json").write_text(json.dumps(result(command="cl-sim run mir synthetic")))
    assert reproduce.filed(tmp_path, "mir-tiny", keys["mir-tiny"]).stem == "mir"


TINY = """\
# Tiny, for tests
memories = [20]
strategies = ["finetune", "er"]

[stream]
name = "synthetic"
classes = 4
tasks = 2
per_class = 30

[encoder]
name = "mlp"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose only presets are er-tiny-m20 and finetune-tiny."""
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "tiny.toml").write_text(TINY)
    monkeypatch.setattr(preset, "FOLDER", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cl_sim(*words: str) -> Result:
    return CliRunner().invoke(main, [*words], catch_exceptions=False)


def words_of(result: Result) -> str:
    return " ".join(result.output.split())


def test_a_rerun_is_identical_and_a_tampered_number_is_found(here: Path) -> None:
    quiet = ("--tracking-uri", "none")
    assert cl_sim("run", "--preset", "er-tiny-m20", "--seeds", "3,5", *quiet).exit_code == 0
    assert cl_sim("report", "last", "--folder", "stored").exit_code == 0
    rerun = cl_sim("reproduce", "er-tiny-m20", "--folder", "stored", *quiet)
    assert rerun.exit_code == 0, rerun.output
    assert rerun.output.count("identical") == 3
    assert "stored seeds 3, 5, new seeds 3, 5" in words_of(rerun)
    assert "numbers may differ" not in rerun.output

    path = here / "stored" / "synthetic" / "er-m20.json"
    stored = json.loads(path.read_text())
    stored["metrics"]["acc_end"] = [value + 0.0625 for value in stored["metrics"]["acc_end"]]
    stored["config"]["strategy"]["lr"] = 0.2
    path.write_text(json.dumps(stored))
    rerun = cl_sim("reproduce", "er-tiny-m20", "--folder", "stored", *quiet)
    assert rerun.exit_code == 1, rerun.output
    assert "er-tiny-m20: numbers may differ, since stored: strategy.lr 0.2 (now 0.1)" in words_of(rerun)
    assert "-6.25 ± 0.00 differs" in words_of(rerun)
    assert rerun.output.count("identical") == 2


def test_seeds_are_added_to_a_stored_result_of_the_same_settings_only(here: Path) -> None:
    quiet, add = ("--tracking-uri", "none"), ("report", "last", "--folder", "stored", "--add")
    assert cl_sim("run", "--preset", "finetune-tiny", "--seeds", "3", *quiet).exit_code == 0
    assert "file it without --add" in words_of(cl_sim(*add))
    assert cl_sim("report", "last", "--folder", "stored").exit_code == 0
    assert "seeds 3 of finetune" in words_of(cl_sim(*add))
    assert cl_sim("run", "--preset", "finetune-tiny", "--seeds", "5", *quiet).exit_code == 0
    assert cl_sim(*add).exit_code == 0
    rerun = cl_sim("reproduce", "finetune-tiny", "--folder", "stored", *quiet)
    assert rerun.output.count("identical") == 3, rerun.output
    assert "stored seeds 3, 5" in words_of(rerun)
    words = ("--preset", "finetune-tiny", "--seeds", "7", "--set", "strategy.lr=0.05", *quiet)
    assert cl_sim("run", *words).exit_code == 0
    before = (here / "stored" / "synthetic" / "finetune.json").read_text()
    assert "strategy.lr 0.1 (now 0.05); file it under another name" in words_of(cl_sim(*add))
    assert (here / "stored" / "synthetic" / "finetune.json").read_text() == before


ERRORS = [
    (["er-tiny-m200"], ["'er-tiny-m200'", "did you mean 'er-tiny-m20'", "cl-sim list presets"]),
    (
        ["finetune-tiny"],
        [
            "'finetune-tiny' has no stored result",
            "stored/synthetic/finetune.json",
            "these presets have one: er-tiny-m20",
            "cl-sim run --preset finetune-tiny",
            "cl-sim report RUN --folder stored",
        ],
    ),
    (["er-tiny-m20", "--folder", "nowhere"], ["no preset has one in nowhere"]),
    (["er-tiny-m20", "--seeds", "x"], ["'x'", "0-4"]),
    (["er-tiny-m20", "--device", "gpu"], ["'gpu'", "cuda"]),
]


@pytest.mark.parametrize(("words", "expected"), ERRORS, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_is_one_line_with_status_2_and_runs_nothing(
    here: Path, words: list[str], expected: list[str]
) -> None:
    (here / "stored" / "synthetic").mkdir(parents=True)
    (here / "stored" / "synthetic" / "er-m20.json").write_text(json.dumps(result()))
    folder = [] if "--folder" in words else ["--folder", "stored"]
    outcome = cl_sim("reproduce", *words, *folder)
    assert outcome.exit_code == 2
    lines = outcome.output.strip().split("\n")
    assert len(lines) == 1, outcome.output
    assert lines[0].startswith("Error: ")
    for word in expected:
        assert word in lines[0]
    assert not (here / "runs").exists()


def test_a_result_without_the_compared_metrics_is_refused(here: Path) -> None:
    (here / "stored" / "synthetic").mkdir(parents=True)
    (here / "stored" / "synthetic" / "er-m20.json").write_text(
        json.dumps(result(metrics={"acc_prequential": [0.1, 0.2]}))
    )
    outcome = cl_sim("reproduce", "er-tiny-m20", "--folder", "stored")
    assert outcome.exit_code == 2
    assert "has none of acc_end, acc_aaa, forgetting_chaudhry" in outcome.output


def test_a_setting_that_stood_for_the_usual_number_has_not_changed() -> None:
    now = config.from_dict(preset.read("er-cifar10-m200"))
    for tasks, told in ((0, []), (5, []), (2, ["stream.tasks 2 (now 5)"])):
        before = config.merge(now.to_dict(), {"stream": {"tasks": tasks}})
        assert reproduce.changed({"config": before, "versions": {}}, now, {}) == told
