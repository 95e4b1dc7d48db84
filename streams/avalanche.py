"""Any Avalanche benchmark as a stream: classic ones by name (`avalanche-SplitMNIST`), others from Python.

Source: Carta et al. 2023, "Avalanche: A PyTorch Library for Deep Continual Learning" (version 0.6).
Departures: all runs share one benchmark, hence one class order (`options="seed=3"` makes another); the samples of an experience
are shuffled per run, those of an online stream (`split_online_stream`) stay in its order. The incomplete last batch of an
experience is dropped. Images that a transform turned from bytes into [0, 1] are kept as bytes.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cl_sim.arrays import Arrays, DataSet, Resident
from cl_sim.config import at_least
from cl_sim.errors import BadConfig, BadData, UnknownName
from cl_sim.indexed import CHUNK, IndexedStream, Schedule
from cl_sim.rng import host_rng
from cl_sim.types import Batch

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class AvalancheConfig:
    """Settings of an Avalanche benchmark."""

    benchmark: str = "SplitMNIST"  # the function's name in avalanche.benchmarks.classic
    options: tuple[str, ...] = ()  # its arguments, e.g. n_experiences=5
    batch: int = 10  # samples per step
    subset: int = 500  # test samples of the small evaluations, in all

    def __post_init__(self) -> None:
        at_least(self, batch=1, subset=1)


class Avalanche(IndexedStream):
    """The experiences of a benchmark one after the other; test sets per experience."""

    Config = AvalancheConfig

    def __init__(
        self,
        cfg: AvalancheConfig,
        seeds: tuple[int, ...],
        device: torch.device,
        data: str = "",
        iid: bool = False,
        benchmark: Any = None,
    ) -> None:
        made = benchmark if benchmark is not None else classic(cfg, data)
        x, y, tasks, ordered = read_train(made.train_stream)
        test_x, test_y, split = read_stream(made.test_stream)
        x, test_x = as_bytes(x, test_x)
        classes = int(max(y.max(), test_y.max())) + 1
        rows, ends = play(tasks, ordered, cfg.batch, seeds, iid)
        digest = hashlib.sha256(x.tobytes() + y.tobytes() + test_x.tobytes() + test_y.tobytes()).hexdigest()[:32]
        loaded = DataSet(cfg.benchmark, Arrays(x, y), None, tuple(str(c) for c in range(classes)), digest)
        super().__init__(
            loaded,
            Schedule(rows=rows, labels=y[rows], ends=ends),
            None,
            batch_size=cfg.batch,
            announces=not iid,
            device=device,
        )
        experiences = int(split.max()) + 1
        starts = np.array([0, *(end + 1 for end in ends[:-1])][:experiences])
        if len(starts) < experiences or iid:  # one test set for all, or everything at once: seen from the start
            starts = np.zeros(experiences, dtype=np.int64)
        self.since = np.tile(starts, (len(seeds), 1))
        self._test = ExperienceHoldout(test_x, test_y, split, len(seeds), cfg.subset, device, starts)

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which test experiences have begun.    Shapes: -> [R, S]."""
        return self.since <= step

    def holdout(self) -> ExperienceHoldout:  # type: ignore[override]
        """The test set, in its experiences."""
        return self._test


class ExperienceHoldout:
    """The test samples of a benchmark; split e is experience e."""

    def __init__(
        self, x: NDArray[Any], y: Ints, split: Ints, runs: int, subset: int, device: torch.device, since: Ints
    ) -> None:
        self.names: Sequence[str] = [f"experience {e + 1}" for e in range(int(split.max()) + 1)]
        self.test, self.device, self.runs = Resident(x, device), device, runs
        self.y, self.split = torch.as_tensor(y, device=device), torch.as_tensor(split, device=device)
        few = host_rng(0, "evaluation subset").permutation(len(y))[:subset]
        self.all_rows = torch.arange(len(y))  # on the host, as are the few
        self.few_rows = torch.as_tensor(few[np.argsort(since[split[few]], kind="stable")])
        self.few_since = np.sort(since[split[few]])

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """Evaluation batches with keys x, y, index, split."""
        rows = self.all_rows if full else self.few_rows[: int((self.few_since <= step).sum())]
        for index, x in self.test.chunks(rows.expand(self.runs, -1), CHUNK[self.device.type]):
            yield {"x": x, "y": self.y[index], "index": index, "split": self.split[index]}


def classic(cfg: AvalancheConfig, data: str) -> Any:
    """A benchmark of avalanche.benchmarks.classic.    Raises: UnknownName; BadConfig; BadData if its data cannot be had."""
    from avalanche.benchmarks import classic as benchmarks

    known = [name for name, made in vars(benchmarks).items() if inspect.isfunction(made) and name[0].isupper()]
    if cfg.benchmark not in known:
        raise UnknownName("Avalanche benchmark", cfg.benchmark, known, "cl-sim describe avalanche-SplitMNIST --help")
    function = getattr(benchmarks, cfg.benchmark)
    own = inspect.signature(function).parameters
    arguments: dict[str, Any] = {"n_experiences": 5, "dataset_root": data or None}
    for option in cfg.options:
        key, equals, text = option.partition("=")
        if not equals or key not in own:
            near = difflib.get_close_matches(key, list(own), n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise BadConfig(f"{cfg.benchmark} has no argument '{key}'; {hint}It has {', '.join(own)}")
        arguments[key] = ast.literal_eval(text)
    try:
        return function(**{key: value for key, value in arguments.items() if key in own})
    except (OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise BadData(
            f"Avalanche could not make {cfg.benchmark} ({reason}); give the folder that holds its data with --data DIR"
        ) from error


def read_stream(stream: Any) -> tuple[NDArray[Any], Ints, Ints]:
    """All samples of a stream and the number of the experience that each belongs to.    Shapes: x [N, ...], y [N], split [N]."""
    pictures, y, split = [], [], []
    for number, experience in enumerate(stream):
        for sample, label, *_ in experience.dataset:
            pictures.append(np.asarray(sample, dtype=np.float32))
            y.append(int(label))
            split.append(number)
    return np.stack(pictures), np.array(y, dtype=np.int64), np.array(split, dtype=np.int64)


def read_train(stream: Any) -> tuple[NDArray[Any], Ints, Ints, bool]:
    """The training samples, the task of each, and whether their order is given (an online stream)."""
    experiences = list(stream)
    x, y, number = read_stream(experiences)
    if not hasattr(experiences[0], "is_last_subexp"):
        return x, y, number, False
    ends = np.array([bool(experience.is_last_subexp) for experience in experiences])
    task_of_experience = np.concatenate([[0], np.cumsum(ends)[:-1]])
    return x, y, task_of_experience[number], True


def as_bytes(*parts: NDArray[Any]) -> list[NDArray[Any]]:
    """Images in [0, 1] that are multiples of 1/255 as uint8; anything else as it is."""
    whole = all(
        part.ndim == 4
        and part.min() >= 0
        and part.max() <= 1
        and np.allclose(part * 255, np.round(part * 255), atol=1e-3)
        for part in parts
    )
    return [np.round(part * 255).astype(np.uint8) for part in parts] if whole else list(parts)


def play(tasks: Ints, ordered: bool, batch: int, seeds: Sequence[int], iid: bool) -> tuple[Ints, tuple[int, ...]]:
    """The rows of each run, and the last step of each task.    Shapes: tasks [N] -> rows [R, n], ends [T].

    Raises: BadConfig if a task has less than one batch.
    """
    members = [np.flatnonzero(tasks == task) for task in range(int(tasks.max()) + 1)]
    steps = [len(rows) // batch for rows in members]
    if min(steps) < 1:
        raise BadConfig(
            f"stream.batch is {batch}, but an experience has {min(map(len, members))} samples; use a smaller batch"
        )
    runs = []
    for seed in seeds:
        rng = host_rng(seed, "avalanche order")
        parts = [
            (rows if ordered else rng.permutation(rows))[: count * batch]
            for rows, count in zip(members, steps, strict=True)
        ]
        sequence = np.concatenate(parts)
        runs.append(rng.permutation(sequence) if iid else sequence)
    return np.stack(runs), tuple(int(end) - 1 for end in np.cumsum(steps))


def from_benchmark(benchmark: Any, seeds: Sequence[int], batch: int = 10, device: str = "cpu") -> Avalanche:
    """A stream from a benchmark object (`train_stream` and `test_stream`), online ones included."""
    cfg = AvalancheConfig(benchmark=type(benchmark).__name__, batch=batch)
    return Avalanche(cfg, tuple(seeds), torch.device(device), benchmark=benchmark)
