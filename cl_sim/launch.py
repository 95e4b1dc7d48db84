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
    """One group of one run, and how far its journal has been read."""

    run_dir: Path
    group: int
    record: dict[str, Any]  # the run.json
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


@dataclass
class Worker:
    """A process, and the groups of one run that it trains in turns."""

    jobs: list[Job]
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.jobs[0].folder / "worker.log"

    def start(self) -> None:
        """Start the process."""
        first = self.jobs[0]
        environment = {**os.environ, "OMP_NUM_THREADS": str(first.record["config"]["threads"])}
        words = [sys.executable, "-m", "cl_sim.worker", str(first.run_dir), *(str(job.group) for job in self.jobs)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is at work."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


def launch(
    run_dirs: Sequence[Path], *, workers: int, uri: str, console: Console, system_metrics: bool = False
) -> list[str]:
    """Train every unfinished group of the runs, in so many processes at a time; returns each run's status.

    A Ctrl-C lets every worker save a checkpoint and stop. `uri` is the MLflow store; empty: none.
    """
    waiting = [worker for run_dir in run_dirs for worker in _workers(run_dir)]
    syncs = _syncs(run_dirs, uri, console, system_metrics) if uri else []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(compact=True),
        console=console,
    ) as bars:
        interrupted = _work(waiting, workers, bars, syncs)
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


def _workers(run_dir: Path) -> list[Worker]:
    """Who trains the unfinished groups of a run."""
    record = store.record_of(run_dir)
    folders = enumerate(store.group_folders(run_dir))
    jobs = [Job(run_dir, group, record) for group, folder in folders if store.ending(folder)[0] != "finished"]
    abreast = record["config"].get("abreast", 1)
    return [Worker(jobs[i : i + abreast]) for i in range(0, len(jobs), abreast)]


def _work(waiting: list[Worker], workers: int, bars: Progress, syncs: Sequence[MLflowSync]) -> bool:
    """Keep so many at work until all are done; True if the user stopped it."""
    waiting, busy, interrupted = list(waiting), list[Worker](), False
    pushed = time.monotonic()
    started = False
    while waiting or busy:
        try:
            while waiting and len(busy) < workers and not interrupted:
                worker = waiting.pop(0)
                worker.start()
                busy.append(worker)
            time.sleep(LOOK_EVERY)
            for worker in list(busy):
                for job in worker.jobs:
                    _show(job, bars)
                if worker.process is not None and worker.process.poll() is not None:
                    busy.remove(worker)
                    _record_death(worker)
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
            for worker in busy:
                worker.signal(signal.SIGTERM)
    return interrupted


def seeds_in_words(seeds: Sequence[int]) -> str:
    """'seed 3', 'seeds 0-4' or 'seeds 0, 3, 7'."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    whole = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"seeds {seeds[0]}-{seeds[-1]}" if whole else "seeds " + ", ".join(str(seed) for seed in seeds)


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


def _record_death(worker: Worker) -> None:
    """Write into the journals that their worker died without a word (killed, out of memory)."""
    code = worker.process.returncode if worker.process is not None else 0
    for job in worker.jobs:
        job.look()
        if store.ending(job.folder)[0] in ("new", "started"):
            reason = f"its process died (exit status {code}); see {worker.log}"
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
