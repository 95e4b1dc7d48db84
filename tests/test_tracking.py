"""Journals, and what MLflow holds after reading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_sim import store
from cl_sim.errors import ClSimError
from cl_sim.tracking import mlflow as ours
from cl_sim.tracking import plots
from cl_sim.tracking.journal import Journal, read

# MLflow 3.17 uses a loader option that its SQLAlchemy deprecates
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")

SPLITS = 100


def test_a_line_comes_back_exactly(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        journal.write("curve", 10, values={"loss": np.array([0.1, np.nan]), "n": np.int64(3)})
    (line,), end = read(tmp_path / "j")
    assert line["values"] == {"loss": [0.1, None], "n": 3}
    assert end == (tmp_path / "j").stat().st_size


def test_a_resumed_run_does_not_write_a_line_twice(tmp_path: Path) -> None:
    with Journal(tmp_path / "j") as journal:
        for samples in (10, 20, 30):
            assert journal.write("curve", samples, values={})
        assert journal.write("evaluation", 20, accuracy=[])
    with Journal(tmp_path / "j") as journal:
        assert not journal.write("curve", 20, values={})
        assert journal.write("curve", 40, values={})
        assert journal.write("evaluation", 30, accuracy=[])
    assert [line["samples"] for line in read(tmp_path / "j")[0]] == [10, 20, 30, 20, 40, 30]


@pytest.mark.parametrize("torn", [b'{"kind": "curve", "sam', b'{"kind": "curve"\n', b"\x00\x00\x00\n"])
def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.write("curve", 10, values={})
    with path.open("ab") as file:
        file.write(torn)
    assert len(read(path)[0]) == 1
    with Journal(path) as journal:
        assert journal.write("curve", 20, values={})
    assert [line["samples"] for line in read(path)[0]] == [10, 20]


def test_damage_in_the_middle_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.write("curve", 10, values={})
        first = path.stat().st_size
        journal.write("curve", 20, values={})
        journal.write("curve", 30, values={})
    content = bytearray(path.read_bytes())
    content[first] = ord("?")
    path.write_bytes(bytes(content))
    with pytest.raises(ClSimError, match=f"damaged at byte {first}"):
        read(path)


def test_tailing_reads_each_line_once(tmp_path: Path) -> None:
    path, byte, seen = tmp_path / "j", 0, []
    with Journal(path) as journal:
        for samples in range(1, 6):
            journal.write("curve", samples, values={})
            lines, byte = read(path, byte)
            seen += [line["samples"] for line in lines]
    assert seen == [1, 2, 3, 4, 5]


def make_run(folder: Path, name: str, level: float) -> Path:
    """A run folder of two groups (seeds 0 and 1 stacked, seed 2 alone) with curves, evaluations and a summary."""
    run_dir = folder / name
    for group in (0, 1):
        (run_dir / f"group-{group}").mkdir(parents=True)
    record = {
        "id": name,
        "strategy": name,
        "stream": "split-digits",
        "encoder": "mlp",
        "role": "strategy",
        "comparison": "c0ffee",
        "seeds": [0, 1, 2],
        "groups": [[0, 1], [2]],
        "config": {"strategy": {"name": name, "lr": 0.1}, "seeds": [0, 1, 2]},
        "command": f"cl-sim run {name} split-digits",
        "commit": "abc",
        "versions": {},
        "machine": "m",
        "data": {"name": "digits", "digest": "d" * 32, "samples": 100, "classes": 10},
        "created": "2026-01-01T00:00:00.000+00:00",
        "splits": [f"task {i + 1}" for i in range(SPLITS)],
    }
    store.write_json(run_dir / "run.json", record)
    for group, seeds in enumerate(record["groups"]):
        with Journal(run_dir / f"group-{group}" / "journal.jsonl") as journal:
            write_lines(journal, np.array(seeds) * 0.01 + level, range(0, 101, 20))
    return run_dir


def write_lines(journal: Journal, levels: np.ndarray, points: range) -> None:
    seen = [[True] * SPLITS] * len(levels)
    for samples in points:
        accuracy = np.repeat(levels[:, None] + samples / 1000, SPLITS, 1)
        journal.write("evaluation", samples, task_end=samples == 100, accuracy=accuracy, seen=seen)
        journal.write("curve", samples, values={"loss": 1 - levels, "acc_prequential": levels})
    journal.write("memory", 100, counts=[[5] * 10] * len(levels))
    journal.write("summary", 100, values={"acc_end": levels + 0.1})
    journal.end("finished", "")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory, uri: str) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("runs"), "er", 0.5)
    plots.draw_run(run_dir)
    with pytest.MonkeyPatch.context():
        ours.sync(run_dir, uri)
    return run_dir


def ids(run_dir: Path, uri: str) -> dict[str, Any]:
    return dict(json.loads((run_dir / "mlflow.json").read_text())[uri])


def history(client: Any, run_id: str) -> dict[str, list[tuple[int, float]]]:
    keys = client.get_run(run_id).data.metrics
    return {key: sorted((m.step, m.value) for m in client.get_metric_history(run_id, key)) for key in keys}


def test_a_child_holds_its_seeds_curves_over_samples(client: Any, pushed: Path, uri: str) -> None:
    known = ids(pushed, uri)
    for seed, child in enumerate(known["children"]):
        curves = history(client, child)
        assert [step for step, _ in curves["loss"]] == [0, 20, 40, 60, 80, 100]
        assert curves["acc_seen"][-1] == (100, pytest.approx(0.5 + 0.01 * seed + 0.1))
        assert curves["acc_end"] == [(100, pytest.approx(0.6 + 0.01 * seed))]
        run = client.get_run(child)
        assert run.data.tags["mlflow.parentRunId"] == known["parent"]
        assert run.data.tags["seed"] == str(seed)
        assert run.info.status == "FINISHED"


def test_the_parent_holds_mean_and_interval_over_seeds(client: Any, pushed: Path, uri: str) -> None:
    parent = ids(pushed, uri)["parent"]
    curves = history(client, parent)
    assert curves["acc_seen"][-1] == (100, pytest.approx(0.61))
    # values 0.60, 0.61, 0.62: s = 0.01, t(0.975, 2) = 4.302653
    assert curves["acc_seen_ci95"][-1] == (100, pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5))
    run = client.get_run(parent)
    assert run.data.params["strategy.lr"] == "0.1"
    for tag in ("stream", "strategy", "encoder", "role", "commit", "comparison"):
        assert run.data.tags[tag]
    assert run.inputs.dataset_inputs[0].dataset.digest == "d" * 32
    names = {item.path for item in client.list_artifacts(parent)}
    assert {"run.json", "matrix.json", "matrix.png", "anytime.png", "memory.png"} <= names


def test_a_hundred_tasks_make_tens_of_keys(client: Any, pushed: Path, uri: str) -> None:
    assert len(history(client, ids(pushed, uri)["children"][0])) < 60


@pytest.mark.parametrize("forget", [False, True])
def test_pushing_again_changes_nothing_even_from_scratch(client: Any, pushed: Path, uri: str, forget: bool) -> None:
    known = ids(pushed, uri)
    everyone = [known["parent"], *known["children"]]
    before = [history(client, run_id) for run_id in everyone]
    if forget:
        blank = {**known, "lines": [0, 0], "means": {}}
        store.write_json(pushed / "mlflow.json", {uri: blank})
    ours.sync(pushed, uri)
    assert [history(client, run_id) for run_id in everyone] == before


def test_lines_arrive_while_the_run_goes_on(tmp_path: Path, client: Any, uri: str) -> None:
    run_dir = make_run(tmp_path, "slow", 0.3)
    path = run_dir / "group-1" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    sync = ours.MLflowSync(run_dir, uri)
    sync.start()
    sync.push()
    known = ids(run_dir, uri)
    assert [s for s, _ in history(client, known["children"][2])["loss"]] == [0, 20]
    assert [s for s, _ in history(client, known["parent"])["loss"]] == [0, 20]  # waits for the slowest seed
    assert client.get_run(known["parent"]).info.status == "RUNNING"
    with path.open("ab") as file:
        file.writelines(lines[4:])
    sync.finish()
    assert [s for s, _ in history(client, known["parent"])["loss"]] == [0, 20, 40, 60, 80, 100]
    assert client.get_run(known["parent"]).info.status == "FINISHED"


def test_a_dead_server_costs_one_warning_and_no_result(tmp_path: Path, client: Any, uri: str) -> None:
    run_dir = make_run(tmp_path, "offline", 0.2)
    warnings: list[str] = []
    sync = ours.MLflowSync(run_dir, "http://127.0.0.1:9", warn=warnings.append)
    sync.start()
    sync.push()
    sync.finish()
    assert len(warnings) == 1
    assert "cl-sim sync offline" in warnings[0]
    assert "\n" not in warnings[0]
    with pytest.raises(ClSimError, match="does not answer"):
        ours.sync(run_dir, "http://127.0.0.1:9")
    ours.sync(run_dir, uri)
    assert history(client, ids(run_dir, uri)["children"][0])["acc_end"] == [(100, pytest.approx(0.3))]


def test_a_failed_run_is_marked_with_its_reason_and_runs_again_after_a_resume(
    tmp_path: Path, client: Any, uri: str
) -> None:
    run_dir = make_run(tmp_path, "broken", 0.1)
    with Journal(run_dir / "group-1" / "journal.jsonl") as journal:
        journal.end("failed", "not finite at step 7")
    ours.sync(run_dir, uri)
    known = ids(run_dir, uri)
    assert client.get_run(known["children"][2]).info.status == "FAILED"
    assert client.get_run(known["children"][2]).data.tags["reason"] == "not finite at step 7"
    assert client.get_run(known["children"][0]).info.status == "FINISHED"
    assert client.get_run(known["parent"]).info.status == "FAILED"
    ours.MLflowSync(run_dir, uri).start()
    assert client.get_run(known["parent"]).info.status == "RUNNING"


def test_runs_deleted_on_the_server_are_made_again(tmp_path: Path, client: Any, uri: str) -> None:
    run_dir = make_run(tmp_path, "lost", 0.4)
    store.write_json(run_dir / "mlflow.json", {uri: {"parent": "0" * 32, "children": [], "lines": [9, 9], "means": {}}})
    ours.sync(run_dir, uri)
    assert history(client, ids(run_dir, uri)["children"][0])["acc_end"] == [(100, pytest.approx(0.5))]


def test_settings_become_dotted_params() -> None:
    assert ours.flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": "f"}) == {"a.b.c": 1, "a.d": [2], "e": "f"}


def test_the_ui_is_opened_on_the_right_store(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    words = ours.ui_command(f"sqlite:///{tmp_path}/mlflow.db", 5001)
    assert f"sqlite:///{tmp_path}/mlflow.db" in words
    assert "5001" in words
    with pytest.raises(ClSimError, match="no MLflow store"):
        ours.ui_command(f"sqlite:///{tmp_path}/none.db", 5000)
    with pytest.raises(ClSimError, match="open that address"):
        ours.ui_command("http://127.0.0.1:5000", 5000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ours.QUICK.items():
        monkeypatch.setenv(name, value)
