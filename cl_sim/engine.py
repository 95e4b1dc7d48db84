"""The loop: every batch once, in order; measure, log, save. Nothing else happens per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim import checkpoint, measure, selection
from cl_sim.capture import Captured
from cl_sim.clock import Clock
from cl_sim.errors import Diverged
from cl_sim.measure import TESTED
from cl_sim.meter import Column, Meter
from cl_sim.metrics import clustering
from cl_sim.strategy import Strategy
from cl_sim.stream import Holdout, Stream, truth
from cl_sim.tracking.journal import Journal
from cl_sim.types import Batch, Logs

Floats = NDArray[np.float64]
Result = TypeVar("Result")
TEST = "test "  # before the names of test-then-train sums in the logs


@dataclass(frozen=True)
class Plan:
    """At which steps the engine measures, reads the logs and saves. Depends on the step alone."""

    steps: int
    small: frozenset[int]  # after these steps: evaluate on the small part
    full: frozenset[int]  # after these: on everything
    test_every: int  # steps between test-then-train measurements; 0: never
    flush_every: int
    save_every: int
    pass_ends: frozenset[int] = frozenset()  # where a run may end early: after these steps the logs are read too

    @classmethod
    def of(cls, stream: Stream, *, per_task: int, prequential: int, flush_every: int, save_every: int) -> Plan:
        """Spread `per_task` evaluations evenly over each task, the last one at its end and in full.

        A stream without evaluation sets is measured test-then-train on every batch, and so is a ranking
        unless that is switched off.
        """
        ends = [step for step in range(len(stream)) if stream.ends_task(step)]
        small: set[int] = set()
        for start, end in zip([-1, *ends[:-1]], ends, strict=True):
            small.update(start + round((end - start) * k / per_task) for k in range(1, per_task))
        holdout = stream.holdout() is not None
        rule = selection.of(stream)
        return cls(
            steps=len(stream),
            small=frozenset(small - {-1}) if holdout else frozenset(),
            full=frozenset(ends) if holdout else frozenset(),
            test_every=_test_every(stream, prequential),
            flush_every=flush_every,
            save_every=save_every,
            pass_ends=frozenset(ends) if rule is not None and rule.patience else frozenset(),
        )

    def tests(self, step: int) -> bool:
        """Is this batch predicted before it is learned?"""
        return self.test_every > 0 and step % self.test_every == 0

    def evaluates(self, step: int) -> bool:
        """Is there an evaluation after this step?"""
        return step in self.small or step in self.full

    def flushes(self, step: int) -> bool:
        """Are the logs read after this step?"""
        return (step + 1) % self.flush_every == 0 or step + 1 == self.steps or step in self.pass_ends

    def saves(self, step: int) -> bool:
        """Is a checkpoint written after this step?"""
        return (step + 1) % self.save_every == 0 or step + 1 == self.steps


@dataclass
class Progress:
    """What the loop knows beside the strategy's state; all of it is in every checkpoint."""

    next_step: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)  # test-then-train sums by name, per run
    late: dict[str, list[float]] = field(default_factory=dict)  # the same over the second half of the stream
    recent: dict[str, list[list[float]]] = field(default_factory=dict)  # test-then-train sums of the newest steps
    lost: dict[int, str] = field(default_factory=dict)  # runs that diverged -> what their logs said first
    watched: list[list[float]] = field(default_factory=list)  # what decides on stopping, after each pass, per run
    stopped: dict[int, int] = field(default_factory=dict)  # runs that stopped early -> after which step
    train_seconds: float = 0.0  # time of stream, observe and logs, without evaluation
    timed_steps: int = 0

    def means(self, late: bool = False) -> dict[str, Floats]:
        """Test-then-train means by name, NaN where nothing was measured.    Shapes: -> each [R]."""
        return means(self.late if late else self.sums)

    def slide(self, tested: Mapping[str, Column], samples: int) -> dict[str, Floats]:
        """Sums of the newest steps that hold so many tested samples, or of all there are.    Shapes: -> each [K, R]."""
        older = {name: self.recent.get(name, []) for name in tested}
        rows = {name: np.array([*older[name], *column.values.tolist()]) for name, column in tested.items()}
        held = np.nanmax(rows[TESTED], 1)[::-1].cumsum()  # newest first; of any run, as those that are lost hold none
        count = int(np.searchsorted(held, samples)) + 1
        window = {name: values[-count:] for name, values in rows.items()}
        self.recent = {name: values.tolist() for name, values in window.items()}
        return window

    def idle(self, step: int) -> list[int]:
        """Runs that had stopped before this step; they train on beside the others, but nothing of it counts."""
        return [run for run, last in self.stopped.items() if last < step]

    def over(self, runs: int) -> bool:
        """Has every run stopped, or been lost on the way?"""
        return len(self.stopped) > 0 and len(self.stopped.keys() | self.lost.keys()) == runs


@dataclass(frozen=True)
class Place:
    """Where one group of runs is kept: its folder, and the name that its checkpoints bear."""

    folder: Path
    owner: str


def drain(going: Generator[None, None, Result]) -> Result:
    """Let it go on to its end; what it returns."""
    while True:
        try:
            next(going)
        except StopIteration as end:
            result: Result = end.value
            return result


def steps(
    stream: Stream,
    strategy: Strategy,
    plan: Plan,
    journal: Journal,
    place: Place,
    *,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda line: None,
    learner: Captured | None = None,
) -> Generator[None, None, Progress | None]:
    """Replay the stream from the newest usable checkpoint, or from the start; pauses before the first step and after each.

    `stop` is asked after every step; when it says yes, a checkpoint is written and None returned. `note` takes warnings.
    `learner` makes the strategy's steps in its place, say by replaying them.
    A run whose logs are not finite is lost: its numbers are NaN from then on, the runs beside it go on. Where the stream
    lets runs stop early, each ends with the weights of its best pass.

    Raises: Diverged when every run is lost; BadCheckpoint when there are checkpoints and none can be used.
    """
    meter, progress, best = Meter(), Progress(), selection.Weights(strategy)
    state, refused = checkpoint.latest(place.folder, strategy.env.device, place.owner)
    for reason in refused:
        note(f"{reason}; using the one before")
    if state is not None:
        strategy.load_state_dict(state["strategy"])
        meter.load_state_dict(state["meter"])
        progress = Progress(**state["progress"])
        best.kept = state.get("best", {})
    strategy.train()
    if progress.next_step == 0:
        _evaluate(stream, strategy, journal, progress, best, step=-1, full=False)
    yield  # others may begin now, too, which is not to be timed
    learns, clock = learner or strategy, Clock(strategy.env.device)
    for step in range(progress.next_step, plan.steps):
        if progress.over(strategy.env.runs):
            break
        batch = stream.batch(step)
        if plan.tests(step):
            with clock.paused():
                meter.add(step, test(strategy, batch, truth(stream, step, batch)))
        meter.add(step, learns.observe(batch))
        if stream.announces and stream.ends_task(step):
            learns.boundary()
        if plan.evaluates(step):
            with clock.paused():
                _evaluate(stream, strategy, journal, progress, best, step=step, full=step in plan.full)
        if plan.flushes(step):
            _flush(meter, stream, step, progress, journal, clock, place, note)
        stopping, over = stop(), progress.over(strategy.env.runs)
        if plan.saves(step) or stopping or over:
            with clock.paused():
                journal.sync()  # a checkpoint must never know more than the journal
                _find_lost(meter.read(), progress, step, place, note)
                _save(strategy, meter, progress, best, step, place)
        if stopping and not over and step + 1 < plan.steps:
            return None
        yield
    best.put_back()
    return progress


def _test_every(stream: Stream, prequential: int) -> int:
    if measure.of(stream.task).test is None:
        return 0
    if stream.holdout() is None:
        return 1
    return min(prequential, 1) if measure.of(stream.task).every_batch else prequential


def _save(
    strategy: Strategy, meter: Meter, progress: Progress, best: selection.Weights, step: int, place: Place
) -> None:
    progress.next_step = step + 1
    state = {"strategy": strategy.state_dict(), "meter": meter.state_dict(), "progress": vars(progress)}
    state |= {"best": best.kept} if best.kept else {}
    checkpoint.save(place.folder, step + 1, {"owner": place.owner, **state})


def test(strategy: Strategy, batch: Batch, known: Batch) -> Logs:
    """Test-then-train sums of one batch, before it is learned; `known` is the batch with its true labels.

    Shapes: -> each [R].
    """
    sums_of = strategy.measure().test
    assert sums_of is not None, "the plan tests only where there is something to test"
    strategy.eval()
    with torch.inference_mode():
        answer = strategy.predict(batch)
    strategy.train()
    sums = sums_of(answer, known)
    return {TEST + name: value for name, value in sums.items()}


def evaluate(strategy: Strategy, holdout: Holdout, step: int, full: bool) -> Floats:
    """The task's main metric (accuracy, or HR@10) of every run on every split; NaN where it was not evaluated.

    Shapes: -> [R, S].
    """
    return evaluate_all(strategy, holdout, step, full)[measure.of(strategy.env.task).matrix]


def evaluate_all(strategy: Strategy, holdout: Holdout, step: int, full: bool) -> dict[str, Floats]:
    """Every metric of the task, the main one among them, as `evaluate`.    Shapes: -> each [R, S]."""
    measured = strategy.measure()
    metric = measured.metric(strategy.env.runs, len(holdout.names), strategy.env.device)
    strategy.eval()
    with torch.inference_mode():
        for chunk in holdout.chunks(step, full):
            metric.update(strategy.predict(chunk), chunk)
    strategy.train()
    return {name: value.cpu().numpy() for name, value in metric.result().items()}


def _evaluate(
    stream: Stream,
    strategy: Strategy,
    journal: Journal,
    progress: Progress,
    best: selection.Weights,
    *,
    step: int,
    full: bool,
) -> None:
    """Evaluate and write it down, once anything has been seen; after a pass, see which runs stop.

    Before the first step every split is asked: forward transfer needs that.
    """
    holdout = stream.holdout()
    if holdout is None or (step >= 0 and not full and not stream.seen(step).any()):
        return
    samples = (step + 1) * stream.batch_size
    found = evaluate_all(strategy, holdout, step if step >= 0 else len(stream), full)
    for values in found.values():
        values[[*progress.lost, *progress.idle(step)]] = np.nan
    rule = selection.of(stream)
    if rule is not None and rule.patience and full:
        _watch(rule, found, progress, best, step)
    measured = measure.of(stream.task)
    rest = {"measure": measured.name, "accuracy": found.pop(measured.matrix), **found}
    journal.write("evaluation", samples, task_end=full, seen=stream.seen(step), **rest)
    memory = getattr(strategy, "memory", None)
    rows = known_rows(stream, memory.rows()) if full and memory is not None else {}
    if "y" in rows:
        journal.write("memory", samples, counts=class_counts(rows, stream.classes))
    if memory is not None and "y" in rows and "cluster" in rows:
        journal.write("clusters", samples, **cluster_health(rows, memory.prototypes, stream.classes))


def _watch(
    rule: selection.Selection, found: Mapping[str, Floats], progress: Progress, best: selection.Weights, step: int
) -> None:
    """Keep the weights of the runs that are better than after any pass before; stop those that have not been for long."""
    progress.watched.append(found[rule.metric][:, rule.validation].tolist())
    done = progress.stopped.keys() | progress.lost.keys()
    going = [run for run in range(len(progress.watched[0])) if run not in done]
    standings = {run: selection.standing([row[run] for row in progress.watched], rule.patience) for run in going}
    better = [run for run, where in standings.items() if where.best == where.last]
    if better:
        best.keep(better)
    progress.stopped |= {run: step for run, where in standings.items() if where.stopped}


def known_rows(stream: Stream, rows: Batch) -> Batch:
    """Rows of a memory with their labels, where the stream knows those that it hides."""
    labels_of = getattr(stream, "labels_of", None)
    found = labels_of(rows) if labels_of is not None else None
    return rows if found is None else {**rows, "y": found}


def cluster_health(rows: Batch, prototypes: Tensor, classes: int) -> dict[str, NDArray[Any]]:
    """Sizes of a memory's clusters, how they agree with the classes, how tight they are.

    Shapes: prototypes [R, P, D] -> sizes [R, P], others [R].
    """
    groups = prototypes.shape[1]
    labels = rows["y"].masked_fill(~rows["valid"], -1)
    counts = [clustering.table(c, y, groups, classes) for c, y in zip(rows["cluster"], labels, strict=True)]
    kept = rows["cluster"].masked_fill(~rows["valid"], -1)
    sizes = torch.stack([(kept == group).sum(1) for group in range(groups)], 1)
    columns = (rows["z"], kept, prototypes, labels, rows["valid"])
    each = {
        "neighbour_precision": [clustering.neighbour_precision(*one) for one in zip(*columns, strict=True)],
        "davies_bouldin": [clustering.davies_bouldin(z, c, groups) for z, c in zip(rows["z"], kept, strict=True)],
        "cluster_purity": [clustering.purity(one) for one in counts],
        "cluster_nmi": [clustering.mutual_information(one) for one in counts],
        "memory_entropy": [clustering.entropy(one.sum(0)) / math.log(max(classes, 2)) for one in counts],
    }
    return {"sizes": sizes.cpu().numpy(), **{name: torch.stack(one).cpu().numpy() for name, one in each.items()}}


def class_counts(rows: Mapping[str, Tensor], classes: int) -> NDArray[np.int64]:
    """How many valid rows each class has.    Shapes: y, valid [R, M] -> [R, C]."""
    each = (rows["y"][..., None] == torch.arange(classes, device=rows["y"].device)) & rows["valid"][..., None]
    counts: NDArray[np.int64] = each.sum(1).cpu().numpy()
    return counts


def _flush(
    meter: Meter,
    stream: Stream,
    step: int,
    progress: Progress,
    journal: Journal,
    clock: Clock,
    place: Place,
    note: Callable[[str], None],
) -> None:
    """Read the logs, check them, add to the running totals, write one line."""
    steps = len({number for number, _, _ in meter.pending})
    columns = meter.drain()
    _find_lost(columns, progress, step, place, note)
    idle = progress.idle(step)
    for column in columns.values():
        column.values[:, list(progress.lost)] = np.nan
        column.values[:, idle] = 0
    seconds = clock.read()
    progress.train_seconds += seconds
    progress.timed_steps += steps
    curve = {key: column.values.mean(0) for key, column in columns.items() if not key.startswith(TEST)}
    tested = {key.removeprefix(TEST): column for key, column in columns.items() if key.startswith(TEST)}
    rows = {name: column.values for name, column in tested.items()}
    if tested and (samples := measure.of(stream.task).window):
        rows = progress.slide(tested, samples)
    window = {name: [float(total) for total in values.sum(0)] for name, values in rows.items()}
    curve |= {f"{name}_window": value for name, value in means(window).items()}
    for name, column in tested.items():
        _add_to(progress.sums, name, column.values)
        _add_to(progress.late, name, column.values[column.steps >= len(stream) // 2])
    curve |= {f"{name}_prequential": value for name, value in progress.means().items()}
    speed = steps * stream.batch_size / max(seconds, 1e-9)
    runs = len(next(iter(curve.values()), ()))
    curve["samples_per_second"] = np.full(runs, speed)
    for values in curve.values():
        values[idle] = np.nan
    journal.write("curve", (step + 1) * stream.batch_size, values=curve)


def means(sums: Mapping[str, list[float]]) -> dict[str, Floats]:
    """Sums over the number of samples they were taken over; NaN over none.    Shapes: -> each [R]."""
    counts = np.array(sums.get(TESTED, []))
    return {
        name: np.divide(total, counts, out=np.full(len(counts), np.nan), where=counts > 0)
        for name, total in sums.items()
        if name != TESTED
    }


def _add_to(sums: dict[str, list[float]], name: str, values: Floats) -> None:
    """Add the rows of a column to a running total.    Shapes: values [K, R]."""
    before = sums.get(name, [0.0] * values.shape[1])
    sums[name] = [float(total) for total in np.add(before, values.sum(0))]


def _find_lost(
    columns: Mapping[str, Column], progress: Progress, step: int, place: Place, note: Callable[[str], None]
) -> None:
    """Note which runs have a log that is not finite.    Raises: Diverged when no run is left."""
    logs = {key: column for key, column in columns.items() if not key.startswith(TEST)}
    runs = max((column.values.shape[1] for column in columns.values()), default=0)
    idle = progress.idle(step)
    for run in range(runs):
        bad = [int(c.steps[~np.isfinite(c.values[:, run])][0]) for c in columns.values() if _breaks(c, run)]
        if run in progress.lost or run in idle or not bad:
            continue
        first = min(bad)
        parts = {key: c.values[c.steps == first, run] for key, c in logs.items()}
        shown = ", ".join(f"{key} = {values[0]:.4g}" for key, values in parts.items() if len(values))
        kept = checkpoint.listed(place.folder)
        last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        progress.lost[run] = f"not finite at step {first}: {shown}; {last}. Try a smaller --set strategy.lr=..."
        if len(progress.lost) == runs:
            raise Diverged(progress.lost[run])
        note(f"run {run + 1} of {runs} is lost, the others go on: {progress.lost[run]}")


def _breaks(column: Column, run: int) -> bool:
    return not np.isfinite(column.values[:, run]).all()
