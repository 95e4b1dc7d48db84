"""A run killed with SIGKILL at any step and resumed ends as one that was never killed; in real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from cl_sim import checkpoint, store
from cl_sim.tracking.journal import read

SETTINGS = """
seeds = [0]
save_every = 20
flush_every = 10
[strategy]
name = "er"
capacity = 50
[stream]
name = "synthetic"
per_class = 300
[encoder]
name = "mlp"
hidden = [64]
"""


def cl_sim(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cl_sim.cli", *words, "--store", str(folder / "runs")]
    command += ["--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored, and hands that on
    with (folder / "output.txt").open("ab") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)


def finish(folder: Path, process: subprocess.Popen[bytes]) -> Path:
    assert process.wait(timeout=180) == 0, (folder / "output.txt").read_text()
    return store.all_runs(folder / "runs")[-1]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every MLflow curve of the seed's run, in order of step."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    run = next(r for r in client.search_runs(experiments) if r.data.tags.get("seed") == "0")
    timing = ("samples_per_second", "step_ms", "peak_bytes")
    return {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
        if key not in timing
    }


def test_a_killed_run_resumes_to_identical_weights_memory_metrics_and_curves(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "settings.toml").write_text(SETTINGS)
    one = finish(whole, cl_sim(whole, "run", "--config", "settings.toml"))

    process = cl_sim(killed, "run", "--config", "settings.toml")
    wait_for = random.Random(os.getpid()).randrange(1, 12)  # flushed lines; 300 steps make 30
    journal_lines_or_end(killed, process, wait_for)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    two = finish(killed, cl_sim(killed, "resume", "last"))

    assert same(final_state(one), final_state(two))
    results = [json.loads((run / "result.json").read_text())["metrics"] for run in (one, two)]
    for key in ("samples_per_second", "step_ms", "peak_bytes"):
        for result in results:
            del result[key]
    assert results[0] == results[1]
    assert curves(whole) == curves(killed)
    assert "acc_seen" in curves(killed)


def journal_lines_or_end(folder: Path, process: subprocess.Popen[bytes], wanted: int) -> None:
    """Wait until the journal has that many curve lines."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        for path in (folder / "runs").glob("*/group-0/journal.jsonl"):
            if sum(line["kind"] == "curve" for line in read(path)[0]) >= wanted:
                return
        time.sleep(0.005)
    raise AssertionError("the run ended before it could be killed: " + (folder / "output.txt").read_text())


def final_state(run: Path) -> dict[str, object]:
    state, refused = checkpoint.latest(run / "group-0", torch.device("cpu"), f"{run.name}/group-0")
    assert state is not None
    assert not refused
    progress = {key: value for key, value in state["progress"].items() if key not in ("train_seconds", "timed_steps")}
    return {"strategy": state["strategy"], "progress": progress}


def same(one: object, two: object) -> bool:
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    return one == two


def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS)
    process = cl_sim(tmp_path, "run", "--config", "settings.toml")
    journal_lines_or_end(tmp_path, process, 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    run = store.all_runs(tmp_path / "runs")[-1]
    text = (tmp_path / "output.txt").read_text()
    assert f"cl-sim resume {run.name}" in text
    assert store.status(run) == "interrupted"
    assert "Traceback" not in text
    finish(tmp_path, cl_sim(tmp_path, "resume", "last"))
    assert store.status(run) == "finished"
