"""Brings run folders to MLflow. What is there afterwards depends on the journals alone, so doing it twice changes nothing.

One parent run per run folder (means and intervals over seeds), one child per seed; the x axis is samples seen. Runs are found
by their tags, and times come from the journals: what is sent a second time is what the store has already. (Only MLflow's
retired plain-file store would keep a second copy, where a kill came between sending and noting so.)
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from cl_sim import store
from cl_sim.errors import ClSimError
from cl_sim.report import interval
from cl_sim.tracking import journal, plots

EXPERIMENT = "cl-sim"
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED", "started": "RUNNING", "new": "SCHEDULED"}
RETRY_AFTER = 30.0  # seconds of silence after a store did not answer
METRICS_PER_CALL, PARAMS_PER_CALL, LONGEST_PARAM, LONGEST_TAG, LONGEST_DIGEST = (
    1000,
    100,
    6000,
    5000,
    36,
)  # MLflow's limits
PARENT = "mlflow.parentRunId"
QUICK = {  # unless the user has set them
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
CHATTY = {"alembic": logging.WARNING, "mlflow": logging.WARNING, "urllib3.connectionpool": logging.ERROR}

Line = dict[str, Any]
Point = tuple[str, int, int, float]  # key, samples, time in ms, value
Heard = tuple[int, bool, list[float | None]]  # of one group: time in ms, is it new, values


class MLflowSync:
    """Keeps one run folder's records in step with an MLflow store; a store that does not answer costs one warning.

    `mlflow.json` in the run folder remembers, per store, the ids and how many lines of each journal were sent.
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
        self.monitor: Any = None
        self.parent, self.children = "", list[str]()
        self.known: dict[str, tuple[str, str]] = {}  # run id -> its status on the store, and the reason noted there
        self.sent = [0] * len(self.groups)  # lines per journal
        self.silent_until, self.warned = 0.0, False
        self._rewind()

    def _rewind(self) -> None:
        """Read the journals from their first line again."""
        self.bytes = [0] * len(self.groups)
        self.lines = [0] * len(self.groups)
        self.last: list[Line] = [{} for _ in self.groups]
        self.waiting: dict[tuple[str, str, int], dict[int, Heard]] = {}  # kind, key, samples -> what which group said

    def start(self) -> None:
        """Make or find the runs on the store."""
        self._careful(self._connect)

    def push(self) -> None:
        """Send what the journals have gained."""
        if time.monotonic() >= self.silent_until:
            self._careful(self._push)

    def finish(self) -> None:
        """Send the rest, the pictures and files, and how the runs ended."""
        if self._careful(self._finish) and self.warned:
            self.warn(f"MLflow at {address(self.uri)} answered again and has everything of {self.run_dir.name} now")

    def _careful(self, step: Callable[[], None]) -> bool:
        """The one place where a store's failure is caught: the journal holds everything, so nothing is lost."""
        try:
            step()
        except Exception as error:  # each store and transport has its own kinds
            self.silent_until = time.monotonic() + RETRY_AFTER
            if not self.warned:
                self.warned = True
                reason = _reason(error).replace(self.uri, address(self.uri))
                self.warn(
                    f"MLflow at {address(self.uri)} does not take the run ({reason}); nothing is lost, bring it there later "
                    f"with: cl-sim sync {self.run_dir.name}"
                )
            return False
        return True

    # --- the steps, free to fail -------------------------------------------------------------------------------------

    def _connect(self) -> None:
        client = _client(self.uri)
        experiment = _experiment(client, self.uri)
        found = self._found(client, experiment)
        self.parent = self._ensure(client, experiment, found, "", "")
        self.children = [
            self._ensure(client, experiment, found, str(seed), self.parent) for seed in self.record["seeds"]
        ]
        before = _read_json(self.run_dir / "mlflow.json").get(address(self.uri), {})
        same = (before.get("parent"), before.get("children")) == (self.parent, self.children)
        self.sent = before["lines"] if same else [0] * len(self.groups)
        self._rewind()
        self._remember()
        self.client = client

    def _found(self, client: Any, experiment: str) -> dict[str, Any]:
        """The folder's runs on the store, by seed; the parent under ''."""
        query = f"tags.comparison = '{self.record['comparison']}'"
        runs = client.search_runs([experiment], query, max_results=50_000)
        mine = [run for run in runs if run.data.tags.get("cl_sim.run") == self.record["id"]]
        return {run.data.tags.get("seed", ""): run for run in sorted(mine, key=lambda run: str(run.info.run_id))}

    def _ensure(self, client: Any, experiment: str, found: Mapping[str, Any], seed: str, parent: str) -> str:
        """The run of a seed ('' for the parent) with its settings and data, made or completed where that is missing."""
        from mlflow.entities import Param

        run = found.get(seed)
        if run is None:
            name = self.record["strategy"] + (f" seed {seed}" if seed else "")
            began = int(datetime.fromisoformat(self.record["created"]).timestamp() * 1000)
            run = client.create_run(experiment, start_time=began, run_name=name, tags=self._tags(seed, parent))
        run_id = str(run.info.run_id)
        settings = flatten(self.record["config"])
        missing = [Param(key, value) for key, value in settings.items() if key not in run.data.params]
        for start in range(0, len(missing), PARAMS_PER_CALL):
            client.log_batch(run_id, params=missing[start : start + PARAMS_PER_CALL])
        if run.inputs is None or not run.inputs.dataset_inputs:
            client.log_inputs(run_id, [_dataset(self.record)])
        if parent and run.data.tags.get(PARENT) != parent:  # someone deleted the parent alone
            client.set_tag(run_id, PARENT, parent)
        self.known[run_id] = (run.info.status, run.data.tags.get("reason", ""))
        return run_id

    def _tags(self, seed: str, parent: str) -> dict[str, str]:
        keys = ("stream", "strategy", "encoder", "role", "commit", "comparison", "command")
        tags = {key: str(self.record[key])[:LONGEST_TAG] for key in keys} | {"cl_sim.run": self.record["id"]}
        return tags | ({"seed": seed, PARENT: parent} if seed else {"seeds": str(self.record["seeds"])[:LONGEST_TAG]})

    def _remember(self) -> None:
        path = self.run_dir / "mlflow.json"
        others = {key: value for key, value in _read_json(path).items() if key != address(self.uri)}
        mine = {"parent": self.parent, "children": self.children, "lines": self.sent}
        store.write_json(path, {**others, address(self.uri): mine})  # the store used last comes last

    def _push(self) -> None:
        if self.client is None:
            self._connect()
        try:
            for run_id, points in self._read().items():
                self._send(run_id, points)
        except BaseException:  # also Ctrl-C: what was read but perhaps not sent is read again
            self._rewind()
            raise
        if self.lines != self.sent:
            self.sent = list(self.lines)
            self._remember()
        self._tell_status()
        if self.system_metrics and self.monitor is None and self.known[self.parent][0] == "RUNNING":
            self._watch_system()

    def _read(self) -> dict[str, list[Point]]:
        """Take the journals' new lines: points by run id."""
        points: dict[str, list[Point]] = {}
        for group, folder in enumerate(self.groups):
            if not (folder / "journal.jsonl").exists():
                continue
            lines, self.bytes[group] = journal.read(folder / "journal.jsonl", self.bytes[group])
            for line in lines:
                self.lines[group] += 1
                self.last[group] = line
                self._take(line, group, points)
        return points

    def _take(self, line: Line, group: int, points: dict[str, list[Point]]) -> None:
        """Turn a line into points for the seeds, and into means where it is the last group to say so."""
        new = self.lines[group] > self.sent[group]
        first = sum(len(seeds) for seeds in self.record["groups"][:group])
        for key, values in values_of(line).items():
            for child, value in zip(self.children[first:], values, strict=False):
                if new and value is not None:
                    points.setdefault(child, []).append((key, line["samples"], line["time"], value))
            place = (line["kind"], key, line["samples"])
            heard = self.waiting.setdefault(place, {})
            heard[group] = (line["time"], new, values)
            if len(heard) == len(self.groups):
                del self.waiting[place]
                if any(is_new for _, is_new, _ in heard.values()):
                    points.setdefault(self.parent, []).extend(_means(key, line["samples"], heard))

    def _send(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(_allowed(key), value, at, samples) for key, samples, at, value in points]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def _tell_status(self) -> None:
        """Tell the store how each seed stands, as far as that has changed, and the parent: how all of them do."""
        children = iter(self.children)
        for last, seeds in zip(self.last, self.record["groups"], strict=True):
            for _ in seeds:
                self._set_status(next(children), _standing(last), last)
        latest = max(self.last, key=lambda line: line.get("time", 0))
        self._set_status(self.parent, _overall({_standing(last) for last in self.last}), latest)

    def _set_status(self, run_id: str, standing: str, last: Line) -> None:
        status, reason = STATUS[standing], last.get("reason", "")[:LONGEST_TAG] if run_id != self.parent else ""
        if self.known[run_id] == (status, reason):
            return
        if reason:
            self.client.set_tag(run_id, "reason", reason)
        elif self.known[run_id][1]:
            self.client.delete_tag(run_id, "reason")
        if standing in ("started", "new"):
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status, end_time=last["time"])
        self.known[run_id] = (status, reason)

    def _watch_system(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.monitor = SystemMetricsMonitor(self.parent, resume_logging=True, tracking_uri=self.uri)
        self.monitor.start()

    def _finish(self) -> None:
        self._push()
        if self.monitor is not None:
            self.monitor.finish()
        for name in ("run.json", "result.json"):
            if (self.run_dir / name).exists():
                self.client.log_artifact(self.parent, str(self.run_dir / name))
        if (self.run_dir / "artifacts").is_dir():
            self.client.log_artifacts(self.parent, str(self.run_dir / "artifacts"))


def sync(run_dir: Path, uri: str) -> None:
    """Bring one run folder to a store, with fresh pictures.    Raises: ClSimError if the store does not take it."""
    plots.draw_run(run_dir)
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
        means = {key: _seen_means(table, line["seen"]) for key, table in journal.tables(line).items()}
        return {f"{key}_seen": row for key, row in means.items() if any(mean is not None for mean in row)}
    return {}


def _seen_means(table: Sequence[Sequence[float | None]], seen: Sequence[Sequence[bool]]) -> list[float | None]:
    """Each run's mean over its seen splits, None where nothing was measured."""
    pairs = zip(table, seen, strict=True)
    return [_mean([a for a, s in zip(*pair, strict=True) if s and a is not None]) for pair in pairs]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _means(key: str, samples: int, heard: Mapping[int, Heard]) -> Iterator[Point]:
    """Mean and half-width of the interval over all seeds; nothing if one of them has no value there."""
    values = [value for group in sorted(heard) for value in heard[group][2]]
    if None in values:
        return
    at = max(moment for moment, _, _ in heard.values())
    estimate = interval(values)
    yield key, samples, at, estimate.mean
    if estimate.n > 1:
        yield f"{key}_ci95", samples, at, estimate.half


def _standing(last: Line) -> str:
    """How a group stands after its last line, in the words of `store.ending`."""
    return str(last["status"]) if last.get("kind") == "end" else "started" if last else "new"


def _overall(standings: set[str]) -> str:
    """How a run stands: it goes on as long as one of its groups does."""
    for word in ("started", "failed", "interrupted"):
        if word in standings:
            return word
    return standings.pop() if len(standings) == 1 else "started"


def flatten(nested: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings as text under dotted keys; values as in JSON, cut to what MLflow takes."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = (value if isinstance(value, str) else json.dumps(value))[:LONGEST_PARAM]
    return flat


def _allowed(key: str) -> str:
    """A metric's name with the characters that MLflow refuses (such as the @ of HR@10) replaced."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in key)


def _client(uri: str) -> Any:
    for name, value in QUICK.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name, level in CHATTY.items():
        if logging.getLogger(name).level in (logging.NOTSET, logging.INFO):  # not what a user asked for
            logging.getLogger(name).setLevel(level)
    database = database_file(uri)
    if database is not None:
        _prepare_database(database)
    return MlflowClient(tracking_uri=uri)


def _prepare_database(database: Path) -> None:
    """Make the database if there is none. Fail at once on a file that is none: MLflow would try again for minutes."""
    database.parent.mkdir(parents=True, exist_ok=True)
    if not database.exists():
        _make_database(database)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()


def _make_database(database: Path) -> None:
    """Make MLflow's tables under another name: it makes them in many steps, and cannot go on from the middle of them."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with TemporaryDirectory(prefix=f"{database.name}.", dir=database.parent) as folder:
        draft = Path(folder) / "new.db"
        SqlAlchemyStore(f"sqlite:///{draft}", (database.parent / "mlartifacts").as_uri()).engine.dispose()
        with suppress(FileExistsError):  # another process was faster
            database.hardlink_to(draft)


def _experiment(client: Any, uri: str) -> str:
    """The experiment's id; made if there is none, with its files beside the database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        database = database_file(uri)
        place = None if database is None else (database.parent / "mlartifacts").resolve().as_uri()
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:  # else another process was faster
                raise
    if found.lifecycle_stage == "deleted":
        raise ClSimError(
            f"its experiment '{EXPERIMENT}' was deleted; first type: mlflow experiments restore --experiment-id "
            f"{found.experiment_id}"
        )
    return str(found.experiment_id)


def database_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other."""
    return Path(uri.removeprefix("sqlite:///").split("?")[0]).absolute() if uri.startswith("sqlite:///") else None


def address(uri: str) -> str:
    """The URI without the user name and password that it may hold: the form that is printed and kept."""
    return uri.replace(f"{urlsplit(uri).netloc.rpartition('@')[0]}@", "", 1) if "@" in urlsplit(uri).netloc else uri


def _dataset(record: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = record["data"]
    stream = Dataset(
        name=record["stream"],
        digest=data["digest"][:LONGEST_DIGEST],
        source_type="local",
        source=json.dumps({"data": data["name"]}),
        profile=json.dumps({"num_samples": data["samples"], "num_classes": data["classes"]}),
    )
    return DatasetInput(stream, [InputTag("mlflow.data.context", "train")])


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def _reason(error: BaseException) -> str:
    """What went wrong, in one line: what the system said if it was the network or the disk, else the error's first line."""
    deepest = error
    while deepest.__cause__ or deepest.__context__:
        deepest = deepest.__cause__ or deepest.__context__ or deepest
    told = deepest if isinstance(deepest, OSError) else error
    return (str(told).splitlines() or [type(told).__name__])[0][:200]


def ui_command(uri: str, port: int) -> list[str]:
    """The words that start the MLflow UI on a store of this machine.    Raises: ClSimError for a server, which has its own."""
    if uri.startswith(("http://", "https://")):
        raise ClSimError(f"{address(uri)} is a server with a UI of its own; open that address in a browser")
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", uri]
    database = database_file(uri)
    if database is None:
        return words
    if not database.exists():
        raise ClSimError(f"there is no MLflow store at {database} yet; cl-sim run makes one")
    return [*words, "--default-artifact-root", (database.parent / "mlartifacts").as_uri()]
