"""Brings run folders to MLflow. What is there afterwards depends on the journals alone, so doing it twice changes nothing.

One parent run per run folder (means and intervals over seeds), one child per seed; the x axis is samples seen. Times come from
the journals, so a metric that is sent again is one that the store has already.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_sim import store
from cl_sim.errors import ClSimError
from cl_sim.report import interval
from cl_sim.tracking import journal

EXPERIMENT = "cl-sim"
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "started": "RUNNING", "new": "RUNNING"}
RETRY_AFTER = 30.0  # seconds of silence after a store did not answer
METRICS_PER_CALL, PARAMS_PER_CALL, LONGEST_PARAM = 1000, 100, 6000  # MLflow's own limits
QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}

Line = dict[str, Any]
Point = tuple[str, int, int, float]  # key, samples, time in ms, value


class MLflowSync:
    """Keeps one run folder's records in step with an MLflow store; a store that does not answer costs one warning.

    `mlflow.json` in the run folder remembers, per store, the ids and how much was sent.
    """

    def __init__(
        self,
        run_dir: Path,
        uri: str,
        warn: Callable[[str], None] = print,
        system_metrics: bool = False,
    ) -> None:
        self.run_dir, self.uri, self.warn, self.system_metrics = run_dir, uri, warn, system_metrics
        self.record = store.record_of(run_dir)
        self.groups = store.group_folders(run_dir)
        self.client: Any = None
        self.sent: dict[str, Any] = {}
        self.monitor: Any = None
        self.silent_until = 0.0
        self.warned = False
        self._from_the_start()

    def _from_the_start(self) -> None:
        self.bytes = [0] * len(self.groups)
        self.lines = [0] * len(self.groups)
        self.waiting: dict[tuple[str, int], dict[int, tuple[int, list[float | None]]]] = {}

    def start(self) -> None:
        """Make or find the runs on the store."""
        self._careful(self._connect)

    def push(self) -> None:
        """Send what the journals have gained."""
        if time.monotonic() >= self.silent_until:
            self._careful(self._push)

    def finish(self) -> None:
        """Send the rest, the pictures and files, and how the runs ended."""
        self._careful(self._finish)

    def _careful(self, step: Callable[[], None]) -> None:
        """The one place where a store's failure is caught: the journal holds everything, so nothing is lost."""
        try:
            step()
        except Exception as error:  # each store and transport has its own kinds
            self.silent_until = time.monotonic() + RETRY_AFTER
            if not self.warned:
                self.warned = True
                self.warn(
                    f"MLflow at {self.uri} does not answer ({_first_line(error)}); nothing is lost, bring it there later "
                    f"with: cl-sim sync {self.run_dir.name}"
                )

    # --- the steps, free to fail -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        for name, value in QUICK.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for chatty in ("alembic", "mlflow"):  # importing mlflow sets them to INFO
            logging.getLogger(chatty).setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=self.uri)
        experiment = _experiment(client, self.uri)
        known = _read_json(self.run_dir / "mlflow.json").get(self.uri, {})
        if not known or not _exists(client, known["parent"]):
            known = self._create(client, experiment)
        self.sent, self.client = known, client
        for run_id in (known["parent"], *known["children"]):
            client.update_run(run_id, status="RUNNING")
        if self.system_metrics:
            self._watch_system()

    def _create(self, client: Any, experiment: str) -> dict[str, Any]:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in flatten(self.record["config"]).items()]
        tags = {key: str(self.record[key]) for key in ("stream", "strategy", "encoder", "role", "commit", "comparison")}
        tags |= {"cl_sim.run": self.record["id"], "command": self.record["command"]}
        began = int(self.run_dir.joinpath("run.json").stat().st_mtime * 1000)

        def make(name: str, more: Mapping[str, str]) -> str:
            run = client.create_run(experiment, start_time=began, run_name=name, tags={**tags, **more})
            for start in range(0, len(params), PARAMS_PER_CALL):
                client.log_batch(run.info.run_id, params=params[start : start + PARAMS_PER_CALL])
            return str(run.info.run_id)

        name = self.record["strategy"]
        parent = make(name, {"seeds": str(self.record["seeds"])})
        _log_dataset(client, parent, self.record)
        children = [
            make(f"{name} seed {seed}", {"mlflow.parentRunId": parent, "seed": str(seed)})
            for seed in self.record["seeds"]
        ]
        made = {"parent": parent, "children": children, "lines": [0] * len(self.groups), "means": {}}
        self._remember(made)
        return made

    def _remember(self, state: Mapping[str, Any]) -> None:
        path = self.run_dir / "mlflow.json"
        store.write_json(path, {**_read_json(path), self.uri: state})

    def _watch_system(self) -> None:
        import mlflow
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        mlflow.set_tracking_uri(self.uri)
        self.monitor = SystemMetricsMonitor(self.sent["parent"])
        self.monitor.start()

    def _push(self) -> None:
        if self.client is None:
            self._connect()
        children: dict[int, list[Point]] = {}
        try:
            for group in range(len(self.groups)):
                self._read_group(group, children)
            for child, points in children.items():
                self._send(self.sent["children"][child], points)
            self._send(self.sent["parent"], self._means())
        except Exception:
            self._from_the_start()  # what was read but not sent is read again
            raise
        self.sent["lines"] = list(self.lines)
        self._remember(self.sent)

    def _read_group(self, group: int, children: dict[int, list[Point]]) -> None:
        """Take a journal's new lines: points for the children, and values that wait for the other seeds."""
        path = self.groups[group] / "journal.jsonl"
        if not path.exists():
            return
        lines, self.bytes[group] = journal.read(path, self.bytes[group])
        first = sum(len(seeds) for seeds in self.record["groups"][:group])
        for line in lines:
            self.lines[group] += 1
            for key, values in values_of(line).items():
                self.waiting.setdefault((key, line["samples"]), {})[group] = (line["time"], values)
                if self.lines[group] <= self.sent["lines"][group]:
                    continue
                for run, value in enumerate(values):
                    if value is not None:
                        children.setdefault(first + run, []).append((key, line["samples"], line["time"], value))

    def _means(self) -> Iterator[Point]:
        """Mean and half-width of the interval, for every point that all seeds have reached."""
        for key, samples in sorted(place for place, groups in self.waiting.items() if len(groups) == len(self.groups)):
            parts = self.waiting.pop((key, samples))
            if samples <= self.sent["means"].get(key, -1):
                continue
            self.sent["means"][key] = samples
            at = max(moment for moment, _ in parts.values())
            estimate = interval([value for _, values in parts.values() for value in values])
            if estimate.n:
                yield key, samples, at, estimate.mean
            if estimate.n > 1:
                yield f"{key}_ci95", samples, at, estimate.half

    def _send(self, run_id: str, points: Iterator[Point] | Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(key, value, at, samples) for key, samples, at, value in points]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def _finish(self) -> None:
        self._push()
        parent = self.sent["parent"]
        for name in ("run.json", "result.json"):
            if (self.run_dir / name).exists():
                self.client.log_artifact(parent, str(self.run_dir / name))
        if (self.run_dir / "artifacts").is_dir():
            self.client.log_artifacts(parent, str(self.run_dir / "artifacts"))
        if self.monitor is not None:
            self.monitor.finish()
        children = iter(self.sent["children"])
        for folder, seeds in zip(self.groups, self.record["groups"], strict=True):
            standing, reason = store.ending(folder)
            for _ in seeds:
                child = next(children)
                if reason:
                    self.client.set_tag(child, "reason", reason)
                self._terminate(child, standing)
        self._terminate(parent, store.status(self.run_dir))

    def _terminate(self, run_id: str, standing: str) -> None:
        if standing in ("new", "started"):
            return
        self.client.set_terminated(run_id, status=STATUS[standing])


def sync(run_dir: Path, uri: str) -> None:
    """Bring one run folder to a store.    Raises: ClSimError if the store does not answer."""
    problems: list[str] = []
    one = MLflowSync(run_dir, uri, warn=problems.append)
    for step in (one.start, one.push, one.finish):
        step()
        if problems:
            raise ClSimError(problems[0])


def values_of(line: Line) -> dict[str, list[float | None]]:
    """The metrics that a journal line holds, one value per run of the group."""
    if line["kind"] in ("curve", "summary"):
        values: dict[str, list[float | None]] = line["values"]
        return values
    if line["kind"] == "evaluation":
        pairs = zip(line["accuracy"], line["seen"], strict=True)
        means = [_mean([a for a, s in zip(*pair, strict=True) if s and a is not None]) for pair in pairs]
        return {"acc_seen": means} if any(mean is not None for mean in means) else {}
    return {}


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def flatten(nested: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def _experiment(client: Any, uri: str) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    database = database_file(uri)
    place = None if database is None else (database.parent / "mlartifacts").resolve().as_uri()
    return str(client.create_experiment(EXPERIMENT, artifact_location=place))


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _exists(client: Any, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _log_dataset(client: Any, run_id: str, record: Mapping[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = record["data"]
    about = {"num_samples": data["samples"], "num_classes": data["classes"]}
    stream = Dataset(
        name=record["stream"],
        digest=data["digest"][:36],
        source_type="local",
        source=json.dumps({"data": data["name"]}),
        profile=json.dumps(about),
    )
    client.log_inputs(run_id, [DatasetInput(stream, [InputTag("mlflow.data.context", "train")])])


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def ui_command(uri: str, port: int) -> list[str]:
    """The words that start the MLflow UI on a store of this machine.    Raises: ClSimError for a server, which has its own."""
    if uri.startswith(("http://", "https://")):
        raise ClSimError(f"{uri} is a server with a UI of its own; open that address in a browser")
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--backend-store-uri", uri]
    database = database_file(uri)
    if database is None:
        return words
    if not database.exists():
        raise ClSimError(f"there is no MLflow store at {database} yet; cl-sim run makes one")
    return [*words, "--default-artifact-root", (database.parent / "mlartifacts").as_uri()]
