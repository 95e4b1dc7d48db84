"""Runs groups in worker processes, shows progress, and brings the journals to MLflow.

This process never trains: it watches the journals that the workers write.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cl_sim import store
from cl_sim.errors import ClSimError
from cl_sim.tracking import journal, plots

if TYPE_CHECKING:
    from cl_sim.tracking.mlflow import MLflowSync

LOOK_EVERY = 0.3  # seconds between looks at the journals
PUSH_EVERY = 3.0  # seconds between pushes to MLflow


@dataclass
class Job:
    """One group of one run: its process, and how far its journal has been read."""

    run_dir: Path
    group: int
    record: dict[str, Any]  # the run.json
    process: subprocess.Popen[bytes] | None = None
    byte: int = 0
    samples: int = 0
    shown: dict[str, float] = field(default_factory=dict)
    bar: TaskID | None = None
    said: int = -1
    finished: bool = False  # maybe before all samples were seen

    @property
    def folder(self) -> Path:
        """Where the group is kept."""
        return self.run_dir / f"group-{self.group}"

    def start(self) -> None:
        """Start the worker; what it prints goes to worker.log."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.record["config"]["threads"])}
        with (self.folder / "worker.log").open("ab") as log:
            words = [sys.executable, "-m", "cl_sim.worker", str(self.run_dir), str(self.group)]
            self.process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def look(self) -> None:
        """Read what the journal has gained."""
        path = self.folder / "journal.jsonl"
        if not path.exists():
            return
        lines, self.byte = journal.read(path, self.byte)
        for line in lines:
            self.finished = line.get("status") == "finished"
            self.samples = max(self.samples, line.get("samples", 0))
            if line["kind"] == "curve":
                self.shown |= {key: journal.known_mean(values) for key, values in line["values"].items()}
            if line["kind"] == "evaluation":
                self.shown[f"{line.get('measure', 'acc')}_seen"] = journal.known_mean(
                    [
                        a
                        for row, seen in zip(line["accuracy"], line["seen"], strict=True)
                        for a, s in zip(row, seen, strict=True)
                        if s
                    ]
                )


def launch(
    run_dirs: Sequence[Path], *, workers: int, uri: str, console: Console, system_metrics: bool = False
) -> list[str]:
    """Train every unfinished group of the runs, `workers` at a time; returns each run's status.

    A Ctrl-C lets every worker save a checkpoint and stop. `uri` is the MLflow store; empty: none.
    """
    jobs = [
        Job(run_dir, group, store.record_of(run_dir))
        for run_dir in run_dirs
        for group, folder in enumerate(store.group_folders(run_dir))
        if store.ending(folder)[0] != "finished"
    ]
    syncs = _syncs(run_dirs, uri, console, system_metrics) if uri else []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    ) as bars:
        interrupted = _work(jobs, workers, bars, syncs)
    for run_dir in run_dirs:
        _report_problems(run_dir, console)
        store.collect(run_dir)
        plots.draw_run(run_dir)
    for sync in syncs:
        sync.finish()
    if interrupted:
        names = " ".join(run_dir.name for run_dir in run_dirs if store.status(run_dir) != "finished")
        console.print(f"Stopped; everything is saved. Go on with: cl-sim resume {names}", soft_wrap=True)
    return [store.status(run_dir) for run_dir in run_dirs]


def _syncs(run_dirs: Sequence[Path], uri: str, console: Console, system_metrics: bool) -> list[MLflowSync]:
    from cl_sim.tracking.mlflow import MLflowSync

    return [MLflowSync(run_dir, uri, warn=console.print, system_metrics=system_metrics) for run_dir in run_dirs]


def _work(jobs: list[Job], workers: int, bars: Progress, syncs: Sequence[MLflowSync]) -> bool:
    """Keep `workers` jobs busy until all are done; True if the user stopped it."""
    waiting, busy, interrupted = list(jobs), list[Job](), False
    pushed = time.monotonic()
    started = False
    while waiting or busy:
        try:
            while waiting and len(busy) < workers and not interrupted:
                job = waiting.pop(0)
                job.start()
                busy.append(job)
            time.sleep(LOOK_EVERY)
            for job in list(busy):
                _show(job, bars)
                if job.process is not None and job.process.poll() is not None:
                    busy.remove(job)
                    _record_death(job)
            if not started:
                started = True
                for sync in syncs:
                    sync.start()
            if time.monotonic() - pushed > PUSH_EVERY:
                for sync in syncs:
                    sync.push()
                pushed = time.monotonic()
        except KeyboardInterrupt:
            interrupted, waiting = True, []
            bars.console.print("Stopping: every run saves a checkpoint first ...")
            _tell(busy, signal.SIGTERM)
    return interrupted


def seeds_in_words(seeds: Sequence[int]) -> str:
    """'seed 3', 'seeds 0-4' or 'seeds 0, 3, 7'."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    whole = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"seeds {seeds[0]}-{seeds[-1]}" if whole else "seeds " + ", ".join(str(seed) for seed in seeds)


def _tell(jobs: Sequence[Job], number: signal.Signals) -> None:
    for job in jobs:
        if job.process is not None and job.process.poll() is None:
            job.process.send_signal(number)


def _show(job: Job, bars: Progress) -> None:
    record = job.record
    job.look()
    if job.bar is None:
        name = f"{record['strategy']} {seeds_in_words(record['groups'][job.group])}"
        job.bar = bars.add_task(name, total=record["data"]["samples"], shown="")
    keys = {
        "acc_seen": "accuracy {:.1%}",
        "hr10_seen": "HR@10 {:.1%}",
        "assa_seen": "AssA {:.1%}",
        "loss": "loss {:.2f}",
        "samples_per_second": "{:.0f}/s",
    }
    shown = " ".join(form.format(job.shown[key]) for key, form in keys.items() if key in job.shown)
    total = record["data"]["samples"]
    bars.update(job.bar, completed=total if job.finished else job.samples, shown=shown)
    quarter = 4 * job.samples // max(total, 1)
    if not bars.console.is_terminal and quarter > job.said:
        job.said = quarter
        bars.console.print(f"{bars.tasks[job.bar].description}: {job.samples} samples  {shown}", soft_wrap=True)


def _record_death(job: Job) -> None:
    """A worker that died without a word (killed, out of memory) is written into its journal."""
    code = job.process.returncode if job.process is not None else 0
    job.look()
    if store.ending(job.folder)[0] in ("new", "started"):
        reason = f"its process died (exit status {code}); see {job.folder / 'worker.log'}"
        with journal.Journal(job.folder / "journal.jsonl") as record:
            record.end("interrupted" if code < 0 else "failed", reason)


def _report_problems(run_dir: Path, console: Console) -> None:
    record = store.record_of(run_dir)
    for seeds, folder in zip(record["groups"], store.group_folders(run_dir), strict=True):
        standing, reason = store.ending(folder)
        if standing == "failed":
            text = f"Error: {record['strategy']} {seeds_in_words(seeds)}: {reason}"
            console.print(text, style="red", soft_wrap=True, markup=False)
        if standing == "finished" and reason:
            console.print(f"Lost: {record['strategy']} {reason}", style="yellow", soft_wrap=True, markup=False)


def inline(run_dir: Path, note: Callable[[str], None] = print) -> dict[str, Any]:
    """Train every group of a run in this process, one after the other, and return its result.

    Raises: whatever the run raises.
    """
    from cl_sim.session import train

    for group in range(len(store.group_folders(run_dir))):
        train(run_dir, group, note=note)
    result = store.collect(run_dir)
    if result is None:
        raise ClSimError(f"{run_dir} did not finish: {store.status(run_dir)}")
    return result
