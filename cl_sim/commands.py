"""What the commands do, once their words have been read."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from rich.console import Console
from rich.table import Table

from cl_sim import config, encoders, preset, registry, session, store
from cl_sim.cli import usual_uri
from cl_sim.config import RunConfig
from cl_sim.errors import BadConfig, ClSimError
from cl_sim.stream import Clips, Stream

EXIT = {"finished": 0, "interrupted": 130, "failed": 1, "started": 1, "new": 1}
SPARE = 1 / 3  # share of the free memory that is left for what a step makes
STACKED = 1024  # numbers in a sample, up to which seeds of a perceptron are trained side by side on a CPU
MANY_CORES = 64  # processes started by default, at most


def console() -> Console:
    """Where a person reads."""
    return Console(highlight=False)


def run(names: Sequence[str], **options: Any) -> int:
    """Check everything, then train and compare; returns the exit status."""
    out = console()
    configs, streams = [], []
    for made in configurations(names, options):
        stream, need = _checked(made)
        stack = fitting(made, need, session.free_bytes(torch.device(made.device)))
        if stack < made.stack:
            told = f"{made.strategy.name}: {stack} instead of {made.stack} seeds side by side, to fit into memory"
            print(told, file=sys.stderr)  # a dry run's settings go elsewhere
        configs.append(replace(made, stack=stack))
        streams.append(stream)
    if options["dry_run"]:
        for made in configs:
            out.print_json(data=made.to_dict())
        return 0
    comparison = uuid4().hex[:8]
    run_dirs = [
        store.create(options["store"], made, _facts(made, stream, comparison))
        for made, stream in zip(configs, streams, strict=True)
    ]
    _say_where(out, run_dirs)
    return _train(run_dirs, options["workers"], options["tracking_uri"], out, options["system_metrics"])


def configurations(names: Sequence[str], options: Mapping[str, Any]) -> list[RunConfig]:
    """One complete configuration per strategy, from the preset, the file, the options and --set."""
    base: dict[str, Any] = {}
    if options["preset"]:
        base = preset.read(options["preset"])
    if options["file"]:
        base = config.merge(base, config.read_toml(options["file"]))
    strategies, stream = _names(names, base)
    if stream:
        found = registry.resolve("stream", stream)
        base = config.merge({"stream": {"name": found.name, **found.settings}}, _without_name(base, "stream"))
        base["stream"] |= {"name": found.name, **found.settings}
    sets: dict[str, Any] = {}
    for assignment in options["sets"]:
        config.assign(sets, assignment)
    common = {key: value for key, value in sets.items() if key != "strategy"}
    wanted = dict(sets.get("strategy", {}))
    made, used = [], set[str]()
    for name in strategies:
        own = config.merge(base, common)
        if name:
            part = registry.resolve("strategy", name)
            own["strategy"] = {
                **_without_name(base, "strategy").get("strategy", {}),
                **part.settings,
                "name": part.name,
            }
        known = {f.name for f in fields(registry.config_class("strategy", own["strategy"]["name"]))}
        used |= known & set(wanted)
        mine = wanted if len(strategies) == 1 else {key: value for key, value in wanted.items() if key in known}
        own["strategy"] = {**own["strategy"], **mine}
        made.append(_complete(own, options))
    for key in set(wanted) - used:
        raise BadConfig(
            f"--set strategy.{key}: none of {', '.join(strategies)} has this setting; see cl-sim describe NAME"
        )
    return made


def _names(names: Sequence[str], base: Mapping[str, Any]) -> tuple[list[str], str]:
    """Strategies and stream as typed; an empty name stands for what the settings name."""
    if not names and {"strategy", "stream"} <= set(base):
        return [""], ""
    if len(names) == 1 and "strategy" in base:
        return [""], names[0]
    if len(names) < 2:
        raise BadConfig(
            "run needs at least a strategy and a stream, e.g. cl-sim run er split-digits; see cl-sim list strategies"
        )
    return list(names[:-1]), names[-1]


def _without_name(base: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {**base, key: {k: v for k, v in base.get(key, {}).items() if k != "name"}}


def _complete(settings: dict[str, Any], options: Mapping[str, Any]) -> RunConfig:
    """Fill in what the command line decides: seeds, device, data folder, encoder, stacking."""
    settings = dict(settings)
    if options["seeds"]:
        settings["seeds"] = parse_seeds(options["seeds"])
    settings["data"] = options["data"] or settings.get("data", "")
    if settings["data"]:
        settings["data"] = str(Path(settings["data"]).expanduser().resolve())
    settings["device"] = pick_device(options["device"] or settings.get("device", "auto"))
    if options["precision"]:
        settings["precision"] = options["precision"]
    if options["capture"]:
        settings["capture"] = True
    encoder = dict(settings.get("encoder", {}))
    if options["encoder_frozen"]:
        encoder["frozen"] = True
    views = registry.load("strategy", settings["strategy"]["name"]).views if "strategy" in settings else ()
    small = False
    if (encoder.get("name") or "mlp") == "mlp" or (views and "augment" not in settings):
        probe = config.from_dict({**settings, "encoder": {"name": "mlp"}, "stack": 1})
        samples = session.build_stream(probe, probe.seeds[:1]).fields
        encoder["name"] = encoder.get("name") or encoders.usual(samples)
        image = "x" in samples and len(samples["x"].shape) == 3
        settings.setdefault("augment", list(views) if image else [])
        numbers = sum(math.prod(field.shape) for field in samples.values())
        small = encoder["name"] == "mlp" and numbers <= STACKED
    settings["encoder"] = encoder
    if options["abreast"]:
        settings["abreast"] = options["abreast"]
    count = len(settings.get("seeds", (0,)))
    together = small or settings["device"].startswith("cuda")
    default_stack = math.ceil(count / settings.get("abreast", 1)) if together else 1
    settings["stack"] = options["stack"] or settings.get("stack") or default_stack
    return config.from_dict(settings)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_seeds(text: str) -> list[int]:
    """'0-4' or '0,3,7' or both as numbers.    Raises: BadConfig."""
    seeds: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise BadConfig(f"--seeds is '{text}'; write ranges and numbers such as 0-4 or 0,3,7")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return seeds


def pick_device(name: str) -> str:
    """The device to use; 'auto' is the GPU if there is one.    Raises: BadConfig if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise BadConfig(f"--device is '{name}'; allowed are auto, cpu, cuda and cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise BadConfig(f"--device is '{name}'; allowed are auto, cpu, cuda and cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadConfig(f"--device is '{name}', but torch finds no GPU here; use --device cpu")
    return name


def _checked(made: RunConfig) -> tuple[Stream, int]:
    """Build the first group's stream and strategy, so that a mistake shows before anything is written.

    With the stream comes the number of bytes that the state of one run takes.
    """
    seeds = made.seeds[: made.stack]
    stream = session.build_stream(made, seeds)
    return stream, session.state_bytes(session.build_strategy(made, stream, seeds[:1]))


def fitting(made: RunConfig, need: int, free: int) -> int:
    """How many seeds a stack may have, a third of the free memory left for what a step makes; at most as many as asked for.

    Raises: BadConfig if not even one fits, in each of the stacks of a process.
    """
    room = int(free * (1 - SPARE)) // min(made.abreast, math.ceil(len(made.seeds) / made.stack))
    if need > room:
        raise BadConfig(
            f"one run of {made.strategy.name} keeps {need / 1e9:.2f} GB, but {made.device} has room for {room / 1e9:.2f} GB"
            f"{' for each abreast' if made.abreast > 1 else ''}; use a smaller --set strategy.capacity=..., encoder, "
            f"{'--abreast, ' if made.abreast > 1 else ''}or another --device"
        )
    return min(made.stack, room // max(need, 1))


def _facts(made: RunConfig, stream: Stream, comparison: str) -> dict[str, Any]:
    holdout = stream.holdout()
    about = stream.describe()
    return {
        "stream": stream_name(made),
        "role": registry.load("strategy", made.strategy.name).role,
        "comparison": comparison,
        "data": {
            "name": about.get("data", made.stream.name),
            "digest": stream.digest,
            "samples": stream.samples,
            "classes": stream.classes,
        },
        "splits": [] if holdout is None else list(holdout.names),
        "classes": stream.classes,
    }


def stream_name(made: RunConfig) -> str:
    """The stream as it is typed, e.g. split-cifar10; of a path only the last part."""
    source = next((value for key in ("data", "benchmark", "of") if (value := getattr(made.stream.config, key, ""))), "")
    kind, colon, path = source.partition(":")
    short = f"{kind}-{Path(path.split('#')[0]).name.split('.')[0]}" if colon else source
    return f"{made.stream.name}-{short}" if short else made.stream.name


def _say_where(out: Console, run_dirs: Sequence[Path]) -> None:
    for run_dir in run_dirs:
        out.print(f"run {run_dir}", soft_wrap=True)


def _train(run_dirs: Sequence[Path], workers: int | None, uri: str, out: Console, system_metrics: bool = False) -> int:
    from cl_sim.launch import launch

    on_gpu = any(store.record_of(run_dir)["config"]["device"] != "cpu" for run_dir in run_dirs)
    uri = "" if uri == "none" else uri
    processes = workers or (1 if on_gpu else min(_cores(), MANY_CORES))
    statuses = launch(run_dirs, workers=processes, uri=uri, console=out, system_metrics=system_metrics)
    done = [run_dir for run_dir, status in zip(run_dirs, statuses, strict=True) if status == "finished"]
    if done:
        _print_comparison(done, out)
    if uri and done:
        out.print("See the curves: cl-sim ui" + ("" if uri == usual_uri() else f" --tracking-uri {uri}"))
    return max(EXIT[status] for status in statuses)


def _print_comparison(run_dirs: Sequence[Path], out: Console) -> None:
    from cl_sim import report as tables

    tables.show([tables.read(run_dir) for run_dir in run_dirs], out)


def resume(runs: Sequence[str], workers: int | None, folder: Path, uri: str) -> int:
    """Continue runs that have not finished."""
    out = console()
    run_dirs = store.find_all(folder, runs)
    for run_dir in run_dirs:
        if store.status(run_dir) == "finished":
            out.print(f"{run_dir.name} is finished already")
    return _train(run_dirs, workers, uri or store.tracking_uri(run_dirs[0]), out)


def list_names(kind: str, folder: Path) -> None:
    """Print the names of a kind, one per line, each with its first docstring line where there is one."""
    out = console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, about in _listed(kind, folder):
        table.add_row(name, about)
    out.print(table)


def _listed(kind: str, folder: Path) -> list[tuple[str, str]]:
    if kind == "runs":
        return [
            (run.name, f"{store.status(run)}, seeds {store.record_of(run)['seeds']}") for run in store.all_runs(folder)
        ]
    if kind == "presets":
        return list(preset.about().items())
    if kind in ("strategies", "streams"):
        one = "strategy" if kind == "strategies" else "stream"
        return [(name, _first_line(sys.modules[registry.load(one, name).__module__])) for name in registry.names(one)]
    if kind == "encoders":
        return [(name, "") for name in encoders.names()]
    if kind == "augmentations":
        from cl_sim import augment

        return [(name, _first_line(made.views)) for name, made in augment.AUGMENTATIONS.items()]
    if kind == "data":
        from cl_sim import sources

        own = [(f"{form}:PATH", "your own data") for form in ("folder", "parquet", "npz", "csv")]
        return [(name, "") for name in sources.NAMES] + own
    return [(name, "") for name in ("reservoir", "balanced", "queue")]


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


def describe(name: str, sets: Sequence[str], seed: int, png: Path | None, data: str, folder: Path) -> None:
    """Show whatever carries the name: a preset, a run, a strategy or a stream."""
    out = console()
    if name in preset.names():
        out.print_json(data=preset.read(name))
    elif (Path(name) / "run.json").is_file() or (folder / name / "run.json").is_file():
        out.print_json(data=store.record_of(store.find(folder, name)))
    elif name.partition(":")[0] in registry.names("strategy"):
        _describe_strategy(name, out)
    else:
        _describe_stream(name, sets, seed, png, data, out)


def _describe_strategy(name: str, out: Console) -> None:
    cls = registry.load("strategy", registry.resolve("strategy", name).name)
    out.print((sys.modules[cls.__module__].__doc__ or "").strip(), markup=False)
    table = Table("setting", "default", title=f"--set strategy.KEY=VALUE for {name}", title_justify="left")
    for f in fields(cls.Config):
        table.add_row(f.name, str(f.default))
    out.print(table)


def _describe_stream(name: str, sets: Sequence[str], seed: int, png: Path | None, data: str, out: Console) -> None:
    settings: dict[str, Any] = {}
    for assignment in sets:
        config.assign(settings, assignment)
    found = registry.resolve("stream", name)
    cls = registry.load("stream", found.name)
    made = config.build(cls.Config, {**found.settings, **settings.get("stream", {})}, "stream")
    stream = cls(made, (seed,), torch.device("cpu"), str(Path(data).expanduser().resolve()) if data else "")
    table = Table(box=None, show_header=False)
    for key, value in {"stream": name, **stream.describe(), "fields": _fields(stream)}.items():
        table.add_row(key, str(value))
    out.print(table)
    from cl_sim import timeline

    counts = timeline.of(stream)
    out.print(timeline.draw(counts), markup=False, soft_wrap=True)
    if png is not None:
        if isinstance(stream, Clips):
            from cl_sim.tracking import strips

            strips.draw(stream.batch(0), png)
        else:
            from cl_sim.tracking import plots

            plots.timeline_figure(counts.edges, counts.counts, counts.ends, png)
        out.print(f"wrote {png}")


def _fields(stream: Stream) -> str:
    return ", ".join(
        f"{name} {list(f.shape)} {str(f.dtype).removeprefix('torch.')}" for name, f in stream.fields.items()
    )


def compare(runs: Sequence[str], form: str, metrics: Sequence[str], baseline: str, folder: Path) -> None:
    """Print the table of finished runs and the paired differences."""
    from cl_sim import report as tables

    results = [tables.read(run_dir) for run_dir in store.find_all(folder, runs)]
    base = tables.read(store.find(folder, baseline)) if baseline else results[0]
    if form == "text":
        tables.show(results, console(), metrics=metrics, baseline=base)
    else:
        print(tables.render(results, form, metrics=metrics, baseline=base))


MARKS = ("<!-- results: begin -->", "<!-- results: end -->")


def report(
    folder: Path,
    runs: Sequence[str],
    note: str,
    run_folder: Path,
    title: str = "",
    against: str = "",
    page: str = "",
    add: bool = False,
) -> None:
    """Copy results into the folder if asked to, then write its README.md and the tables of another page."""
    from cl_sim import report as tables

    run_dirs = store.find_all(run_folder, runs) if runs else []
    if title and len(run_dirs) != 1:
        raise ClSimError(f"--as names one run, not {len(run_dirs)}; file them one after the other")
    if against and not runs:
        raise ClSimError("--against tells what a run is compared with; name the run: cl-sim report RUN --against er")
    if add and not runs:
        raise ClSimError("--add files more seeds; name the run that has them: cl-sim report RUN --add")
    place, _, shown = title.rpartition("/")
    extra = {key: value for key, value in {"data_note": note, "title": shown, "against": against}.items() if value}
    before: dict[Path, str] = {}
    for run_dir in run_dirs:
        result = without_paths(tables.read(run_dir))
        name = tables.entry({**result, "strategy": shown.replace(" ", "-") or result["strategy"]})
        path = folder / (place or result["stream"]) / f"{name}.json"
        if add:
            result = _with_more_seeds(path, result)
        path.parent.mkdir(parents=True, exist_ok=True)
        before[path] = path.read_text(encoding="utf-8") if path.exists() else ""
        store.write_json(path, {**result, **extra})
    try:
        text = tables.tables_from_results(folder)
    except ClSimError:
        _put_back(before)
        raise
    for path in before:
        console().print(f"wrote {path}")
    (folder / "README.md").write_text(text, encoding="utf-8")
    console().print(f"wrote {folder / 'README.md'}")
    if page:
        known = Path(page).read_text(encoding="utf-8")
        Path(page).write_text(tables.put_between(known, *MARKS, tables.brief(folder)), encoding="utf-8")
        console().print(f"wrote {page}")


def _with_more_seeds(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """The filed result with the seeds of a later run of the same settings on the same data."""
    from cl_sim import report as tables
    from cl_sim import reproduce

    if not path.is_file():
        raise ClSimError(f"there is no {path} that {result['name']} could add seeds to; file it without --add")
    stored = tables.read(path)
    now = config.from_dict(result["config"])
    other = reproduce.changed(stored, now, {"data_digest": result["data_digest"]})
    if other:
        raise ClSimError(
            f"{result['name']} is no rerun of {path} with other seeds: {'; '.join(other)}; file it under another name with --as"
        )
    return tables.joined(stored, result)


def _put_back(before: Mapping[Path, str]) -> None:
    for path, text in before.items():
        if text:
            path.write_text(text, encoding="utf-8")
        else:
            path.unlink()


def without_paths(result: dict[str, Any]) -> dict[str, Any]:
    """A result to be published: the folders of this machine become DIR."""
    folder = result["config"].get("data", "")
    words = shlex.split(result["command"])
    folders = ("--data", "--store")
    hidden = ["DIR" if before in folders else word for before, word in zip(["", *words], words, strict=False)]
    return {**result, "config": {**result["config"], "data": "DIR" if folder else ""}, "command": shlex.join(hidden)}


def ui(port: int, uri: str) -> int:
    """Run the MLflow UI until Ctrl-C."""
    from cl_sim.tracking.mlflow import ui_command

    words = ui_command(uri, port)
    console().print(f"MLflow UI on http://127.0.0.1:{port} for {uri}; stop it with Ctrl-C")
    try:
        return subprocess.call(words)
    except KeyboardInterrupt:
        return 0


def export(name: str, path: Path, seed: int | None, folder: Path) -> None:
    """Write results for an evaluation server, and say how good they are here."""
    from cl_sim import export as exports

    run_dirs = store.find_all(folder, [name])
    if len(run_dirs) != 1:
        raise ClSimError(
            f"export takes one run, '{name}' fits {len(run_dirs)}: {', '.join(run.name for run in run_dirs)}"
        )
    (run_dir,) = run_dirs
    own = store.record_of(run_dir)["seeds"]
    count, found = exports.export(run_dir, own[0] if seed is None else seed, path)
    shown = ", ".join(f"{key} {100 * found[key]:.1f} %" for key in ("ap", "ap50", "ap75", "ar1", "ar10"))
    console().print(f"wrote {count} tracks to {path}; read back: {shown}", soft_wrap=True, markup=False)


def sync(runs: Sequence[str], folder: Path, uri: str) -> None:
    """Bring runs to MLflow."""
    from cl_sim.tracking import mlflow

    for run_dir in store.find_all(folder, runs):
        mlflow.sync(run_dir, uri)
        console().print(f"{run_dir.name} is in {mlflow.address(uri)}")


def reproduce(names: Sequence[str], folder: Path, options: Mapping[str, Any]) -> int:
    """Rerun presets as their stored results were run, and say whether the numbers agree; returns the exit status."""
    from cl_sim import reproduce as repeats

    out = console()
    keys = {name: _filed_as(name) for name in dict.fromkeys([*names, *preset.names()])}
    stored = {name: repeats.stored_result(name, folder, keys) for name in dict.fromkeys(names)}
    made = {name: _as_stored(name, result, options) for name, result in stored.items()}
    streams = {name: _checked(config)[0] for name, config in made.items()}
    for name, result in stored.items():
        facts = {"data_digest": streams[name].digest, "torch": store.versions()["torch"], "machine": store.machine()}
        changes = repeats.changed(result, made[name], facts)
        if changes:
            out.print(f"{name}: numbers may differ, since stored: {'; '.join(changes)}", soft_wrap=True, markup=False)
    comparison = uuid4().hex[:8]
    run_dirs = {
        name: store.create(options["store"], config, _facts(config, streams[name], comparison))
        for name, config in made.items()
    }
    _say_where(out, list(run_dirs.values()))
    status = _train(list(run_dirs.values()), options["workers"], options["tracking_uri"], out)
    agree = True
    for name, run_dir in run_dirs.items():
        if store.status(run_dir) == "finished":
            agree &= _show_verdicts(name, stored[name], run_dir, out)
    return status or (0 if agree else 1)


def _filed_as(name: str) -> tuple[str, str]:
    """The stream and the entry under which a preset's result is filed."""
    from cl_sim import report as tables

    if (arm := preset.filed(name)) is not None:
        return arm
    made = config.from_dict(config.merge({"encoder": {"name": "mlp"}}, preset.read(name)))
    return stream_name(made), tables.entry({"strategy": made.strategy.name, "config": made.to_dict()})


def _as_stored(name: str, result: Mapping[str, Any], options: Mapping[str, Any]) -> RunConfig:
    """The preset as it is now, with what a command decides as it was then: seeds, device, stacking, threads."""
    before = result["config"]
    words = {
        "preset": name,
        "file": None,
        "sets": [f"threads={before['threads']}"],  # more threads may change the last bit of a sum
        "seeds": options["seeds"] or ",".join(str(seed) for seed in result["seeds"]),
        "device": options["device"] or before["device"],
        "data": options["data"],
        "stack": before["stack"],
        "abreast": 0,  # in turns or not, the numbers are the same
        "encoder_frozen": False,
        "precision": "",
        "capture": before.get("capture", False) and (options["device"] or before["device"]).startswith("cuda"),
    }
    return configurations((), words)[0]


def _show_verdicts(name: str, stored: Mapping[str, Any], run_dir: Path, out: Console) -> bool:
    """Print the comparison of one preset; True if every number agrees."""
    from rich.box import SIMPLE_HEAD

    from cl_sim import report as tables
    from cl_sim import reproduce as repeats
    from cl_sim.launch import seeds_in_words

    new = tables.read(run_dir)
    found = repeats.verdicts(dict(stored), new)
    head, *body = repeats.table(found)
    seeds = f"stored {seeds_in_words(stored['seeds'])}, new {seeds_in_words(new['seeds'])}"
    title = f"{name}, in percent: mean ± 95 % interval; {seeds}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for number, title in enumerate(head):
        table.add_column(title, justify="right" if 0 < number < len(head) - 1 else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    out.print(table)
    return all(verdict.agrees for verdict in found.values())
