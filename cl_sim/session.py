"""From settings to a trained group of runs: build the parts, run the engine, write the summary."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from cl_sim import augment, encoders, measure, registry, selection, store
from cl_sim.capture import Captured
from cl_sim.clock import Clock
from cl_sim.config import RunConfig, from_dict
from cl_sim.engine import Place, Plan, Progress, steps
from cl_sim.errors import BadConfig, ClSimError, RunBusy
from cl_sim.memory.clustered import Clustered
from cl_sim.memory.rows import Rows
from cl_sim.metrics import transfer
from cl_sim.rng import Rng
from cl_sim.strategy import Env, Strategy
from cl_sim.stream import Stream
from cl_sim.tracking import film, groups, views
from cl_sim.tracking.journal import Journal, known_mean, read


def build_stream(config: RunConfig, seeds: Sequence[int]) -> Stream:
    """The stream of these seeds; in shuffled order if the strategy wants that."""
    strategy = registry.load("strategy", config.strategy.name)
    cls = registry.load("stream", config.stream.name)
    stream: Stream = cls(config.stream.config, tuple(seeds), torch.device(config.device), config.data, iid=strategy.iid)
    if stream.task not in strategy.tasks:
        raise BadConfig(
            f"strategy '{config.strategy.name}' can {' or '.join(sorted(strategy.tasks))}, but stream "
            f"'{config.stream.name}' asks to {stream.task}; see cl-sim list strategies"
        )
    if "is_labelled" in stream.fields and not strategy.takes_unlabelled:
        able = [name for name in registry.names("strategy") if registry.load("strategy", name).takes_unlabelled]
        raise BadConfig(
            f"strategy '{config.strategy.name}' needs every label, but stream '{config.stream.name}' hides some; these "
            f"learn from both: {', '.join(able)}"
        )
    return stream


def build_strategy(config: RunConfig, stream: Stream, seeds: Sequence[int]) -> Strategy:
    """The strategy for these seeds, on this stream."""
    cls = registry.load("strategy", config.strategy.name)
    device = torch.device(config.device)
    rng = Rng(seeds, "strategy", device)
    env = Env(
        task=stream.task,
        fields=stream.fields,
        classes=stream.classes,
        samples=stream.samples,
        announces=stream.announces,
        seeds=tuple(seeds),
        rng=rng,
        device=device,
        augment=augment.pipeline(config.augment, rng, stream.fields),
        encoder=lambda: encoders.make(
            config.encoder.name, config.encoder.config, stream.fields, stream.classes, config.precision
        ),
        rebuild=getattr(stream, "rebuild", None),
        pool=getattr(stream, "pool", None),
    )
    strategy: Strategy = cls(config.strategy.config, env)
    return strategy


TINY = 1e-310  # a denormal float64
CLUSTERS = (
    "cluster_purity",
    "cluster_nmi",
    "memory_entropy",
    "davies_bouldin",
    "neighbour_precision",
)  # of a clustered memory, at the end


class StopSignal:
    """Turns Ctrl-C, a polite kill, and the death of the parent process into a request to stop after the step."""

    def __init__(self) -> None:
        self.asked, self.parent = False, os.getppid()

    def install(self) -> None:
        """Listen for SIGINT and SIGTERM."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Stop after the step in progress."""
        self.asked = True

    def __call__(self) -> bool:
        """Has a stop been asked for?"""
        return self.asked or os.getppid() != self.parent


def train(
    run_dir: Path, group: int, stop: Callable[[], bool] = lambda: False, note: Callable[[str], None] = print
) -> str:
    """Train one group of a run to its end, or from where it stopped; returns its status.

    Raises: RunBusy if another process is at it; any ClSimError of the run, after writing it to the journal.
    """
    ended = train_abreast(run_dir, [group], stop, note)[group]
    if isinstance(ended, Exception):
        raise ended
    return ended


def train_abreast(
    run_dir: Path,
    numbers: Sequence[int],
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = print,
) -> dict[int, str | Exception]:
    """Train groups of a run in turns, a step of each; returns their status, or what they raised, which stops no other.

    On a GPU each has a CUDA stream of its own, on which the device is at work while the host sees to the others.
    """
    config = from_dict(store.record_of(run_dir)["config"])
    torch.set_num_threads(config.threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    going = {group: _training(run_dir, group, stop, note) for group in numbers}
    lanes = {group: _lane(torch.device(config.device), len(numbers)) for group in numbers}
    ended: dict[int, str | Exception] = {}
    try:
        with flushed_denormals():
            while len(ended) < len(numbers):
                for group in (number for number in numbers if number not in ended):
                    try:
                        with lanes[group]():
                            next(going[group])
                    except StopIteration as end:
                        ended[group] = end.value
                    except Exception as error:
                        _let_go(error)
                        ended[group] = error
    finally:
        for one in going.values():  # a Ctrl-C in a notebook comes between steps
            one.close()
    return {group: ended[group] for group in numbers}


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold: strategies, on a GPU that may be full."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _lane(device: torch.device, groups: int) -> Callable[[], AbstractContextManager[Any]]:
    """Where one of so many groups asks for its work: alone where everything goes, else on a CUDA stream of its own.

    Without a GPU each group says so itself when it begins.
    """
    if device.type != "cuda" or groups == 1 or not torch.cuda.is_available():
        return nullcontext
    return partial(torch.cuda.stream, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def _training(
    run_dir: Path, group: int, stop: Callable[[], bool], note: Callable[[str], None]
) -> Generator[None, None, str]:
    """Train one group, a step at a time.    Raises: as `train`."""
    record = store.record_of(run_dir)
    config, seeds = from_dict(record["config"]), tuple(record["groups"][group])
    folder = run_dir / f"group-{group}"
    place = Place(folder, f"{record['id']}/group-{group}")
    try:
        with FileLock(folder / "lock", timeout=0), Journal(folder / "journal.jsonl") as journal:
            return (yield from _journaled(config, seeds, place, journal, stop, note))
    except Timeout:
        raise RunBusy(f"{folder} is being written by another process; wait for it, or stop it") from None


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Numbers below 1e-38 are 0: they are slow and mean nothing here. Afterwards the processor is as it was."""
    already = float(torch.tensor(TINY, dtype=torch.float64) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)


def _journaled(
    config: RunConfig,
    seeds: tuple[int, ...],
    place: Place,
    journal: Journal,
    stop: Callable[[], bool],
    note: Callable[[str], None],
) -> Generator[None, None, str]:
    """Train, and write into the journal how it ended."""
    if stop():
        journal.end("interrupted", "stopped on request")
        return "interrupted"
    try:
        stream = build_stream(config, seeds)
        strategy = build_strategy(config, stream, seeds)
        learner = Captured(strategy, note=note) if config.capture else None
        plan = plan_of(config, stream)
        progress = yield from steps(stream, strategy, plan, journal, place, stop=stop, note=note, learner=learner)
        if learner is not None and not (learner.replays or learner.given_up or learner.warned):
            note("no step was replayed: the strategy was not steady for long enough")
    except Exception as error:
        reason = str(error) if isinstance(error, ClSimError) else f"{type(error).__name__}: {error}"
        journal.end("failed", reason)
        raise
    if progress is None:
        journal.end("interrupted", "stopped on request")
        return "interrupted"
    with Clock(strategy.env.device).paused():
        if stream.task == "associate":
            film.keep(strategy, stream, place.folder / film.FILE)
        for memory in (one for one in memories(strategy) if isinstance(one, Clustered)):
            groups.keep(memory, place.folder / groups.FILE)
        views.keep(strategy, place.folder / views.FILE)
        samples = progress.next_step * stream.batch_size if progress.stopped else stream.samples
        journal.write("summary", samples, values=summarise(place.folder, strategy, stream, progress))
    journal.end("finished", "; ".join(f"seed {seeds[run]}: {reason}" for run, reason in progress.lost.items()))
    return "finished"


def plan_of(config: RunConfig, stream: Stream) -> Plan:
    """When to measure, read and save, from the settings."""
    return Plan.of(
        stream,
        per_task=config.evaluate.per_task,
        prequential=config.evaluate.prequential,
        flush_every=config.flush_every,
        save_every=config.save_every,
    )


def summarise(folder: Path, strategy: Strategy, stream: Stream, progress: Progress) -> dict[str, Any]:
    """One value per run of every summary metric, from the journal and the strategy."""
    runs = strategy.env.runs
    journal = read(folder / "journal.jsonl")[0]
    lines = [line for line in journal if line["kind"] == "evaluation"]
    whole = [run for run in range(runs) if lines and run not in progress.lost]
    rule = selection.of(stream)
    summaries = {
        run: selection.summary(lines, run, rule) if rule else transfer.summary(transfer.record(lines, run))
        for run in whole
    }
    keys = next(iter(summaries.values()), {})
    values = {key: [summaries.get(run, {}).get(key, float("nan")) for run in range(runs)] for key in keys}
    measured = measure.of(stream.task)
    values = {key.replace("acc_", f"{measured.name}_", 1): value for key, value in values.items()}
    values |= {f"{name}_prequential": list(value) for name, value in progress.means().items()}
    if measured.every_batch:
        values |= {f"{name}_second_half": list(value) for name, value in progress.means(late=True).items()}
    for name in measured.finals:
        if lines and name in lines[-1]:
            values[f"{name}_end"] = [known_mean(row) for row in lines[-1][name]]
    clusters = [line for line in journal if line["kind"] == "clusters"]
    for name in CLUSTERS if clusters else ():
        values[f"{name}_end"] = clusters[-1][name]
    # per step of all runs of the group, and of the groups that take turns with it: the process has one clock and one peak
    seconds = max(progress.train_seconds, 1e-9) / max(progress.timed_steps, 1)
    costs = {
        "samples_per_second": stream.batch_size / seconds,
        "step_ms": 1000 * seconds,
        "memory_bytes": sum(rows.nbytes for rows in memories(strategy)),
        "bytes_per_row": sum(rows.bytes_per_row for rows in memories(strategy)),
        "parameters": sum(p.numel() for p in strategy.parameters()) // runs,
        "peak_bytes": peak_bytes(strategy.env.device),
    }
    return values | {key: np.full(runs, float(value)) for key, value in costs.items()}


def memories(strategy: nn.Module) -> list[Rows]:
    """The memories whose rows a strategy pays for."""
    return [module for module in strategy.modules() if isinstance(module, Rows)]


def state_bytes(strategy: nn.Module) -> int:
    """What one run keeps: buffers, and parameters three times (themselves, gradients, an optimiser's average)."""
    parameters = sum(p.numel() * p.element_size() for p in strategy.parameters())
    return 3 * parameters + sum(b.numel() * b.element_size() for b in strategy.buffers())


def free_bytes(device: torch.device) -> int:
    """Memory that is free for training: on the GPU if it trains there, else in main memory (unlimited where that is not told)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return sys.maxsize
    told = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(told[0]) if told else sys.maxsize


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: on the GPU if it trains there, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
