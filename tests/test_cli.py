"""The words of the command line: help, examples, errors, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from cl_sim import session, store
from cl_sim.cli import main
from cl_sim.commands import parse_seeds
from cl_sim.errors import BadConfig

SMALL = ["--set", "stream.per_class=30", "--set", "stream.classes=4", "--set", "stream.tasks=2"]
QUIET = ["--tracking-uri", "none"]


def cl_sim(*words: str) -> Result:
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[str]:
    return sorted(main.commands)


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help_with_an_example_of_itself(name: str) -> None:
    text = cl_sim(name, "--help").output
    assert "Examples:" in text
    assert f"cl-sim {name}" in text
    assert len((main.commands[name].help or "").split("\n")[0]) > 30


def test_every_example_parses() -> None:
    for name in commands():
        epilog = main.commands[name].epilog or ""
        for line in re.findall(r"cl-sim (.+)", epilog):
            words = line.split(" > ")[0].split()
            try:
                main.commands[words[0]].make_context(words[0], words[1:], parent=click.Context(main))
            except click.UsageError as error:
                pytest.fail(f"the example 'cl-sim {line}' does not parse: {error.message}")


def test_the_first_example_of_run_trains_to_the_end(here: Path) -> None:
    result = cl_sim("run", "er", "split-digits", *QUIET)
    assert result.exit_code == 0, result.output
    assert "acc_end" in result.output


def test_a_run_of_two_strategies_leaves_results_that_compare(here: Path) -> None:
    result = cl_sim("run", "finetune", "er", "synthetic", "--seeds", "0-2", *SMALL, *QUIET)
    assert result.exit_code == 0, result.output
    runs = store.all_runs(here / "runs")
    assert [store.record_of(run)["strategy"] for run in runs] == ["finetune", "er"]
    assert len({store.record_of(run)["comparison"] for run in runs}) == 1
    outcome = json.loads((runs[1] / "result.json").read_text())
    assert outcome["seeds"] == [0, 1, 2]
    for key in ("acc_end", "acc_aaa", "forgetting_chaudhry", "acc_prequential", "samples_per_second", "memory_bytes"):
        assert len(outcome["metrics"][key]) == 3
    assert outcome["metrics"]["memory_bytes"][0] == 1000 * (3 * 8 * 8 + 8 + 8)
    assert outcome["metrics"]["bytes_per_row"][0] == 3 * 8 * 8 + 8 + 8
    for form in ("text", "markdown", "csv", "latex"):
        text = cl_sim("compare", runs[0].name, runs[1].name, "--format", form).output
        assert "acc" in text
        assert "er" in text
    assert "finished" in cl_sim("list", "runs").output
    assert '"strategy": "er"' in cl_sim("describe", runs[1].name).output
    page = here / "page.md"
    page.write_text("mine\n<!-- results: begin -->\n<!-- results: end -->\n")
    assert cl_sim("report", runs[0].name).exit_code == 0
    words = ("report", runs[1].name, "--as", "replay")
    assert "finetune" in cl_sim(*words, "--against", "nobody").output
    assert [file.stem for file in (here / "results").glob("*/*.json")] == ["finetune"]
    assert cl_sim(*words, "--against", "finetune", "--page", "page.md").exit_code == 0
    assert "| replay - finetune | 3 | " in (here / "results" / "README.md").read_text()
    assert page.read_text().startswith("mine\n")


@pytest.mark.parametrize(
    ("words", "stack"),
    [
        (["finetune", "split-digits"], 3),
        (["finetune", "synthetic", "--set", "encoder.name=mlp"], 3),
        (["finetune", "synthetic", "--set", "encoder.name=mlp", "--set", "stream.size=32"], 1),
        (["finetune", "synthetic", "--set", "encoder.name=reduced_resnet18"], 1),
        (["finetune", "synthetic", "--set", "encoder.name=reduced_resnet18", "--stack", "2"], 2),
    ],
)
def test_by_default_seeds_are_stacked_where_that_is_faster(here: Path, words: list[str], stack: int) -> None:
    result = cl_sim("run", *words, "--seeds", "0-2", "--device", "cpu", *QUIET, "--dry-run")
    assert f'"stack": {stack},' in result.output


@pytest.mark.parametrize(("runs", "stack"), [(1000, 3), (2.2, 2), (1.2, 1), (0.5, None)])
def test_seeds_are_stacked_as_far_as_memory_goes(
    here: Path, monkeypatch: pytest.MonkeyPatch, runs: float, stack: int | None
) -> None:
    need = 400_000 * 208 + 3_000_000  # rows of 3x8x8 bytes, a label and a number; and a small net
    monkeypatch.setattr(session, "free_bytes", lambda device: int(runs * need * 3 / 2))  # a third is spared
    words = ["run", "er", "synthetic", "--seeds", "0-2", "--stack", "3", *SMALL, *QUIET]
    result = cl_sim(*words, "--set", "strategy.capacity=400000", "--dry-run")
    if stack is None:
        assert result.exit_code == 1
        assert re.search(r"Error: one run of er keeps 0.08 GB, but cpu has room for 0.04 GB; use", result.output)
        return
    assert f'"stack": {stack},' in result.output
    assert (f"er: {stack} instead of 3 seeds side by side" in result.output) == (stack < 3)


def test_the_same_command_gives_identical_numbers_alone_and_in_company(here: Path) -> None:
    for words in (["er", "synthetic", "--seeds", "1"], ["finetune", "er", "synthetic", "--seeds", "1"]):
        assert cl_sim("run", *words, *SMALL, *QUIET).exit_code == 0
    results = [json.loads((run / "result.json").read_text()) for run in store.all_runs(here / "runs")]
    one, two = (r["metrics"] for r in results if r["strategy"] == "er")
    for key in ("acc_end", "acc_aaa", "acc_prequential"):
        assert one[key] == two[key]


ERRORS = [
    (["run", "prc", "synthetic"], ["'prc'", "cl-sim list strategies"]),
    (["run", "er", "spilt-digits"], ["'spilt-digits'", "cl-sim list streams"]),
    (["run", "er"], ["at least a strategy and a stream", "cl-sim run er split-digits"]),
    (["run", "er", "synthetic", "--seeds", "4-1"], ["'4-1'", "0-4"]),
    (["run", "er", "synthetic", "--set", "strategy.capcity=3"], ["capcity", "capacity"]),
    (["run", "finetune", "er", "synthetic", "--set", "strategy.capcity=3"], ["capcity", "none of finetune, er"]),
    (["run", "er", "synthetic", "--set", "stream.tasks=3"], ["3", "1, 2, 5, 10"]),
    (["run", "er", "synthetic", "--set", "strategy.capacity=0"], ["capacity is 0", "at least 1"]),
    (["run", "er", "synthetic", "--device", "gpu"], ["'gpu'", "cuda"]),
    (["run", "er", "synthetic", "--set", "encoder.name=resnet81"], ["resnet81", "cl-sim list encoders"]),
    (["run", "er", "synthetic", "--set", "augment=flop"], ["flop", "flip"]),
    (["run", "er", "split-tiny-imagenet", "--data", "nowhere"], ["tiny-imagenet", "--data"]),
    (["run", "--preset", "er-cifar11-m200"], ["er-cifar11-m200", "er-cifar10-m200"]),
    (["run", "--config", "none.toml"], ["none.toml"]),
    (["resume", "nothing"], ["'nothing'", "cl-sim list runs"]),
    (["compare", "nothing"], ["'nothing'", "cl-sim list runs"]),
    (["describe", "nothing"], ["'nothing'"]),
    (["rnu"], ["'rnu'", "did you mean 'run'"]),
]


@pytest.mark.parametrize(("words", "expected"), ERRORS, ids=lambda value: " ".join(value)[:40])
def test_a_mistake_is_one_line_that_helps_and_leaves_nothing(here: Path, words: list[str], expected: list[str]) -> None:
    result = cl_sim(*words)
    assert result.exit_code == 1
    lines = result.output.strip().split("\n")
    assert len(lines) == 1, result.output
    assert lines[0].startswith("Error: ")
    for word in expected:
        assert word in lines[0]
    assert not (here / "runs").exists()


def test_seeds_are_ranges_and_numbers() -> None:
    assert parse_seeds("0-2,7") == [0, 1, 2, 7]
    with pytest.raises(BadConfig, match="0-4"):
        parse_seeds("a")


def test_a_diverging_run_is_reported_in_one_line_and_marked(here: Path) -> None:
    result = cl_sim("run", "finetune", "synthetic", "--set", "strategy.lr=1e30", *SMALL, *QUIET)
    assert result.exit_code == 1
    assert re.search(r"Error: finetune seed 0: not finite at step \d+: loss = ", result.output)
    assert "Traceback" not in result.output
    assert store.status(store.all_runs(here / "runs")[-1]) == "failed"


def test_own_images_from_npz_run_without_code(here: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2, 3], 40)
    x = (y[:, None, None, None] * 60 + rng.integers(0, 40, (160, 8, 8, 3))).astype(np.uint8)
    np.savez("mine.npz", x=x, y=y)
    result = cl_sim("run", "er", "split-npz:mine.npz", "--set", "stream.tasks=2", *QUIET)
    assert result.exit_code == 0, result.output
    record = store.record_of(store.all_runs(here / "runs")[-1])
    assert record["stream"] == "split-npz-mine"
    assert record["data"]["classes"] == 4


def test_describe_draws_the_timeline(here: Path) -> None:
    result = cl_sim("describe", "split-digits", "--png", "line.png")
    assert result.exit_code == 0, result.output
    assert "task ends" in result.output
    assert Path("line.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["strategies", "streams", "encoders", "memories", "data", "augmentations", "presets"])
def test_every_kind_lists_its_names(here: Path, kind: str) -> None:
    known = {"strategies": "er_ace", "streams": "split", "encoders": "reduced_resnet18", "memories": "reservoir"}
    known |= {"data": "cifar10", "augmentations": "flip", "presets": "er-cifar10-m200"}
    assert known[kind] in cl_sim("list", kind).output


def test_settings_come_from_preset_file_options_and_set_in_that_order(here: Path) -> None:
    Path("mine.toml").write_text(
        'seeds = [5]\n[strategy]\nname = "er"\ncapacity = 11\nlr = 0.2\n[stream]\nname = "synthetic"\n'
    )
    result = cl_sim("run", "--config", "mine.toml", "--set", "strategy.lr=0.3", "--seeds", "6", "--dry-run")
    made = json.loads(result.output)
    assert (made["strategy"]["capacity"], made["strategy"]["lr"], made["seeds"]) == (11, 0.3, [6])
    assert not (here / "runs").exists()
    assert "MLFLOW_TRACKING_URI" not in os.environ
