"""Journals, and what MLflow holds after reading them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers

from cl_sim import store
from cl_sim.errors import ClSimError
from cl_sim.tracking import mlflow as ours
from cl_sim.tracking.journal import Journal, read

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


@given(cut=integers(0, 3000))
def test_a_journal_cut_at_any_byte_is_filled_up_to_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    for name in ("whole", "cut"):
        with Journal(folder / name) as journal:
            write_lines(journal, np.array([0.1, 0.2]), range(0, 101, 20), splits=3)
    content = (folder / "cut").read_bytes()
    (folder / "cut").write_bytes(content[:cut])
    with Journal(folder / "cut") as journal:
        write_lines(journal, np.array([0.1, 0.2]), range(20 * min(1, cut // 500), 101, 20), splits=3)

    def told(name: str) -> list[dict[str, Any]]:
        lines = [{key: value for key, value in line.items() if key != "time"} for line in read(folder / name)[0]]
        return [line for line in lines if line["kind"] != "end"]

    assert told("cut") == told("whole")


@pytest.mark.parametrize("alien", [b"7\n", b"[]\n", b"{}\n", b"a\rb\n"])
def test_a_line_that_is_not_a_journal_line_is_damage(tmp_path: Path, alien: bytes) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.write("curve", 10, values={})
    with path.open("ab") as file:
        file.write(alien)
    assert len(read(path)[0]) == 1
    with path.open("ab") as file:
        file.write(b'{"kind": "curve"}\n')
    with pytest.raises(ClSimError, match="damaged at byte"):
        read(path)


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


def write_lines(journal: Journal, levels: np.ndarray, points: range, splits: int = SPLITS) -> None:
    seen = [[True] * splits] * len(levels)
    for samples in points:
        accuracy = np.repeat(levels[:, None] + samples / 1000, splits, 1)
        journal.write("evaluation", samples, task_end=samples == 100, accuracy=accuracy, seen=seen)
        curve = {"loss": 1 - levels, "samples_per_second": levels + samples, "HR@10": levels}
        journal.write("curve", samples, values=curve)
    journal.write("memory", 100, counts=[[5] * 10] * len(levels))
    journal.write("summary", 100, values={"acc_end": levels + 0.1, "samples_per_second": levels * 7})
    journal.end("finished", "")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for the whole file: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory, uri: str) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("runs"), "er", 0.5)
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
        assert curves["HR_10"][0] == (0, pytest.approx(0.5 + 0.01 * seed))
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


def everything(client: Any, run_dir: Path, uri: str) -> list[Any]:
    """What the store holds of a run folder: status, params, tags and every point, of the parent and each seed."""
    known = ids(run_dir, uri)
    runs = [client.get_run(run_id) for run_id in (known["parent"], *known["children"])]
    return [
        (run.info.status, run.info.end_time, run.data.params, run.data.tags, history(client, run.info.run_id))
        for run in runs
    ]


@pytest.mark.parametrize("forgotten", ["nothing", "how much was sent", "all"])
def test_pushing_again_changes_nothing_even_from_scratch(client: Any, pushed: Path, uri: str, forgotten: str) -> None:
    known, before = ids(pushed, uri), everything(client, pushed, uri)
    if forgotten == "how much was sent":
        store.write_json(pushed / "mlflow.json", {uri: {**known, "lines": [0, 0]}})
    if forgotten == "all":
        (pushed / "mlflow.json").unlink()
    ours.sync(pushed, uri)
    assert ids(pushed, uri) == known
    assert everything(client, pushed, uri) == before


def test_what_arrives_in_pieces_is_what_arrives_at_once(tmp_path: Path, client: Any, uri: str) -> None:
    """Also where one group has its summary and another only the curve of the same step, under the same key."""
    at_once = make_run(tmp_path, "at-once", 0.3)
    ours.sync(at_once, uri)
    pieces = make_run(tmp_path, "in-pieces", 0.3)
    paths = [pieces / f"group-{group}" / "journal.jsonl" for group in (0, 1)]
    lines = [path.read_bytes().splitlines(keepends=True) for path in paths]
    sync = ours.MLflowSync(pieces, uri)
    for slow in (0, 1, len(lines[1]) - 3, len(lines[1])):
        paths[1].write_bytes(b"".join(lines[1][:slow]))
        sync.push()
    sync.finish()
    one, two = everything(client, at_once, uri), everything(client, pieces, uri)
    assert [curves for *_, curves in one] == [curves for *_, curves in two]


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_store_that_fails_midway_gets_the_rest_later(
    tmp_path: Path, client: Any, pushed: Path, uri: str, call: int, error: type[BaseException]
) -> None:
    run_dir = make_run(tmp_path, f"midway-{call}-{error.__name__}", 0.5)
    sync = ours.MLflowSync(run_dir, uri, warn=lambda line: None)
    sync.start()
    log_batch, calls = sync.client.log_batch, 0

    def fails_once(*words: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise error("gone")
        log_batch(*words, **named)

    sync.client.log_batch = fails_once
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            sync.push()
    else:
        sync.push()
    sync.finish()
    assert [curves for *_, curves in everything(client, run_dir, uri)] == [
        curves for *_, curves in everything(client, pushed, uri)
    ]


def test_a_push_is_one_call_per_run_however_many_lines_there_are(tmp_path: Path, uri: str) -> None:
    sync = ours.MLflowSync(make_run(tmp_path, "batched", 0.5), uri)
    sync.start()
    log_batch, sizes = sync.client.log_batch, []
    sync.client.log_batch = lambda run_id, metrics: (sizes.append(len(metrics)), log_batch(run_id, metrics=metrics))
    sync.push()
    assert len(sizes) == 1 + 3
    assert sum(sizes) > 100


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


def test_a_dead_server_costs_one_warning_and_no_result(
    tmp_path: Path, client: Any, uri: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path, "offline", 0.2)
    warnings: list[str] = []
    sync = ours.MLflowSync(run_dir, "http://someone:secret@127.0.0.1:9", warn=warnings.append)
    began = time.monotonic()
    sync.start()
    for _ in range(100):
        sync.push()
    sync.finish()
    assert time.monotonic() - began < 15
    assert len(warnings) == 1
    assert "http://127.0.0.1:9 does not take the run ([Errno 111] Connection refused)" in warnings[0]
    assert "cl-sim sync offline" in warnings[0]
    assert "secret" not in warnings[0]
    assert caplog.messages == []
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ClSimError, match="does not take"):
        ours.sync(run_dir, "http://127.0.0.1:9")
    ours.sync(run_dir, uri)
    assert history(client, ids(run_dir, uri)["children"][0])["acc_end"] == [(100, pytest.approx(0.3))]


def test_a_file_that_is_no_database_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database " * 100)
    began = time.monotonic()
    with pytest.raises(ClSimError, match="file is not a database"):
        ours.sync(make_run(tmp_path, "er", 0.5), f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert time.monotonic() - began < 15


def test_a_stop_while_mlflow_makes_its_tables_leaves_no_half_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic.runtime.migration import HeadMaintainer

    def stopped(self: HeadMaintainer, step: object) -> None:
        raise KeyboardInterrupt  # the step's table is made, but not yet noted as made

    run_dir, uri = make_run(tmp_path, "er", 0.5), f"sqlite:///{tmp_path / 'mlflow.db'}"
    with monkeypatch.context() as patch:
        patch.setattr(HeadMaintainer, "update_to_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            ours.sync(run_dir, uri)
    ours.sync(run_dir, uri)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["er", "mlartifacts", "mlflow.db"]


def test_a_store_that_answers_again_is_told_everything_and_the_user_so(
    tmp_path: Path, client: Any, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    run_dir = make_run(tmp_path, "patient", 0.2)
    sync = ours.MLflowSync(run_dir, uri, warn=warnings.append)
    with monkeypatch.context() as patch:
        patch.setattr(ours, "_client", lambda uri: 1 / 0)
        sync.start()
    sync.push()
    assert sync.client is None  # not asked again so soon
    sync.finish()
    assert [line.split("; ")[0].split(" (")[0] for line in warnings] == [
        f"MLflow at {uri} does not take the run",
        f"MLflow at {uri} answered again and has everything of patient now",
    ]
    assert "acc_end" in history(client, ids(run_dir, uri)["children"][0])


def test_each_seed_has_its_own_status_and_a_resumed_one_runs_again(tmp_path: Path, client: Any, uri: str) -> None:
    run_dir = make_run(tmp_path, "broken", 0.1)

    def standing() -> list[tuple[str, str]]:
        ours.sync(run_dir, uri)
        known = ids(run_dir, uri)
        runs = [client.get_run(run_id) for run_id in (known["parent"], known["children"][0], known["children"][2])]
        return [(run.info.status, run.data.tags.get("reason", "")) for run in runs]

    first, second = (run_dir / f"group-{group}" / "journal.jsonl" for group in (0, 1))
    content = first.read_bytes(), second.read_bytes()
    first.unlink()
    second.unlink()
    assert standing() == [("SCHEDULED", "")] * 3
    first.write_bytes(content[0])
    assert standing() == [("RUNNING", ""), ("FINISHED", ""), ("SCHEDULED", "")]
    second.write_bytes(content[1])
    with Journal(second) as journal:
        journal.end("failed", "not finite at step 7")
    assert standing() == [("FAILED", ""), ("FINISHED", ""), ("FAILED", "not finite at step 7")]
    with Journal(second) as journal:
        journal.end("interrupted", "stopped on request")
    assert standing() == [("KILLED", ""), ("FINISHED", ""), ("KILLED", "stopped on request")]
    with Journal(second) as journal:
        journal.write("curve", 120, values={"loss": [0.1]})
    assert standing() == [("RUNNING", ""), ("FINISHED", ""), ("RUNNING", "")]
    with Journal(second) as journal:
        journal.end("finished", "")
    assert standing() == [("FINISHED", "")] * 3


@pytest.mark.parametrize("deleted", ["all", "parent", "child"])
def test_runs_deleted_on_the_store_are_made_again(
    tmp_path: Path, client: Any, pushed: Path, uri: str, deleted: str
) -> None:
    run_dir = make_run(tmp_path, f"lost-{deleted}", 0.5)
    ours.sync(run_dir, uri)
    before = ids(run_dir, uri)
    gone = {"all": [before["parent"], *before["children"]], "parent": [before["parent"]]}
    for run_id in gone.get(deleted, before["children"][1:2]):
        client.delete_run(run_id)
    ours.sync(run_dir, uri)
    after = ids(run_dir, uri)
    assert (after["parent"] != before["parent"]) == (deleted != "child")
    assert [curves for *_, curves in everything(client, run_dir, uri)] == [
        curves for *_, curves in everything(client, pushed, uri)
    ]
    for child in after["children"]:
        assert client.get_run(child).data.tags["mlflow.parentRunId"] == after["parent"]


def test_system_metrics_are_recorded_on_the_parent_alone(
    tmp_path: Path, client: Any, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psutil")
    import mlflow

    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run_dir = make_run(tmp_path, "watched", 0.5)
    path = run_dir / "group-1" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    sync = ours.MLflowSync(run_dir, uri, system_metrics=True)
    sync.start()
    sync.push()
    known, end = ids(run_dir, uri), time.monotonic() + 10
    while "system/cpu_utilization_percentage" not in client.get_run(known["parent"]).data.metrics:
        assert time.monotonic() < end
        time.sleep(0.1)
    path.write_bytes(b"".join(lines))
    sync.finish()
    assert client.get_run(known["parent"]).info.status == "FINISHED"
    assert not any(key.startswith("system/") for key in client.get_run(known["children"][0]).data.metrics)
    assert mlflow.get_tracking_uri() == before


def test_settings_become_dotted_params() -> None:
    nested = {"a": {"b": {"c": 1}, "d": [2]}, "e": "f", "g": True, "h": "x" * 9000}
    assert ours.flatten(nested) == {"a.b.c": "1", "a.d": "[2]", "e": "f", "g": "true", "h": "x" * 6000}


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://ann:pass@host:5000/a", "http://host:5000/a"),
        ("postgresql://u:p@db/mlflow", "postgresql://db/mlflow"),
        ("sqlite:///a@b/mlflow.db", "sqlite:///a@b/mlflow.db"),
        ("http://host:5000", "http://host:5000"),
    ],
)
def test_an_address_is_shown_without_its_password(uri: str, shown: str) -> None:
    assert ours.address(uri) == shown


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
