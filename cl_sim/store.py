"""Run folders: one per strategy of a command, with its settings, journals, checkpoints and result.

runs/<id>/run.json              what was asked for, with which versions, commit and data
runs/<id>/group-<k>/            journal.jsonl and checkpoints of the seeds that train together
runs/<id>/result.json           one number per metric and seed, once every seed is done
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cl_sim.config import RunConfig
from cl_sim.errors import ClSimError, UnknownName
from cl_sim.tracking import journal

PACKAGES = ("cl-sim", "torch", "torchvision", "numpy", "avalanche-lib", "mlflow-skinny")


def create(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> Path:
    """Make a new run folder with its run.json; `facts` are entries that only the caller knows."""
    seeds = list(config.seeds)
    groups = [seeds[i : i + config.stack] for i in range(0, len(seeds), config.stack)]
    stem = f"{config.strategy.name}-{facts['stream']}-{datetime.now():%m%d-%H%M%S}".replace("/", "_").replace(":", "_")
    run_dir = new_folder(folder, stem)
    record = {
        "id": run_dir.name,
        "strategy": config.strategy.name,
        "encoder": config.encoder.name,
        "seeds": seeds,
        "groups": groups,
        "config": config.to_dict(),
        "command": _command(),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "created": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        **facts,
    }
    for number in range(len(groups)):
        (run_dir / f"group-{number}").mkdir()
    write_json(run_dir / "run.json", record)
    return run_dir


def new_folder(folder: Path, stem: str) -> Path:
    """Make `<folder>/<stem>`, with a number behind it if that is taken.    Raises: ClSimError."""
    folder.mkdir(parents=True, exist_ok=True)
    for count in range(1, 10_000):
        path = folder / (stem if count == 1 else f"{stem}-{count}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise ClSimError(f"{folder} holds 10,000 runs called {stem}; remove some, or use another --store")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def record_of(run_dir: Path) -> dict[str, Any]:
    """The run.json of a run folder.    Raises: ClSimError if it is not one."""
    path = run_dir / "run.json"
    if not path.is_file():
        raise ClSimError(f"{run_dir} is not a run folder (it has no run.json); see cl-sim list runs")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def find(folder: Path, name: str) -> Path:
    """A run folder by path, by id or by an unambiguous beginning of its id.    Raises: UnknownName."""
    direct = Path(name)
    if (direct / "run.json").is_file():
        return direct
    known = all_runs(folder)
    fits = [run for run in known if run.name == name] or [run for run in known if run.name.startswith(name)]
    if len(fits) == 1:
        return fits[0]
    if len(fits) > 1:
        raise ClSimError(f"'{name}' fits {len(fits)} runs: {', '.join(run.name for run in fits)}; type more of it")
    raise UnknownName("run", name, [run.name for run in known], "cl-sim list runs")


def find_all(folder: Path, names: Sequence[str]) -> list[Path]:
    """Run folders by name; 'last' stands for every run of the newest command.    Raises: UnknownName."""
    found: list[Path] = []
    for name in names:
        known = all_runs(folder)
        if name != "last" or not known:
            found.append(find(folder, name))
            continue
        command = record_of(known[-1])["comparison"]
        found += [run for run in known if record_of(run)["comparison"] == command]
    return list(dict.fromkeys(found))


def all_runs(folder: Path) -> list[Path]:
    """Every run folder, oldest first."""
    runs = [path.parent for path in folder.glob("*/run.json")]
    return sorted(runs, key=lambda run: (record_of(run)["created"], run.name))


def group_folders(run_dir: Path) -> list[Path]:
    """The folders of a run's groups, in order."""
    return [run_dir / f"group-{number}" for number in range(len(record_of(run_dir)["groups"]))]


def ending(group: Path) -> tuple[str, str]:
    """How a group stands: its status ('new', 'started', 'finished', 'failed', 'interrupted') and the reason."""
    lines = journal.read(group / "journal.jsonl")[0] if (group / "journal.jsonl").exists() else []
    if not lines:
        return "new", ""
    last = lines[-1]
    return (last["status"], last["reason"]) if last["kind"] == "end" else ("started", "")


def status(run_dir: Path) -> str:
    """The worst status of a run's groups."""
    standing = {ending(group)[0] for group in group_folders(run_dir)}
    order = ("failed", "interrupted", "started", "new", "finished")
    return next(word for word in order if word in standing)


def collect(run_dir: Path) -> dict[str, Any] | None:
    """Gather every seed's summary into result.json; None while a group is not finished."""
    record = record_of(run_dir)
    if status(run_dir) != "finished":
        return None
    metrics: dict[str, list[float | None]] = {}
    done = 0
    for group, seeds in zip(group_folders(run_dir), record["groups"], strict=True):
        lines = journal.read(group / "journal.jsonl")[0]
        values = [line for line in lines if line["kind"] == "summary"][-1]["values"]
        for key in {*metrics, *values}:
            metrics.setdefault(key, [None] * done).extend(values.get(key, [None] * len(seeds)))
        done += len(seeds)
    kept = ("strategy", "stream", "encoder", "role", "comparison", "seeds", "config", "commit", "command", "versions")
    result = {
        "name": record["id"],
        **{key: record[key] for key in kept},
        "data_digest": record["data"]["digest"],
        "machine": record["machine"],
        "status": "finished",
        "metrics": dict(sorted(metrics.items())),
    }
    write_json(run_dir / "result.json", result)
    return result


def tracking_uri(run_dir: Path) -> str:
    """The MLflow store that the run was last sent to; 'none' if it never was."""
    path = run_dir / "mlflow.json"
    known = list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
    return known[-1] if known else "none"


def versions() -> dict[str, str]:
    """Python and package versions that a number may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The git commit of the code, with '+changes' if the tree differs from it; 'unknown' outside a checkout."""
    here = Path(__file__).resolve().parent.parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def machine() -> str:
    """Processor count and kind, for the record."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


def _command() -> str:
    return shlex.join(["cl-sim", *sys.argv[1:]])
