"""Domain-incremental stream: the classes stay, the images change: permuted, turned or corrupted, domain after domain.

Source: permuted images: Goodfellow et al. 2013, "An Empirical Investigation of Catastrophic Forgetting in Gradient-Based Neural
Networks"; turned images: Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning" (one angle per
domain, drawn from that domain's share of the span); corruptions: Hendrycks and Dietterich 2019.
Departures: by default the training samples are divided among the domains, so that each comes once in all; `repeat=true`
shows all of them in every domain, as permuted MNIST does. The first domain of `permute` and `rotate` is the data as it
is. Recurring domains come round again with fresh samples, not with the old ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim.arrays import load
from cl_sim.config import at_least, within
from cl_sim.corrupt import CORRUPTIONS, SEVERITIES, corrupt, rotate, sample_rng
from cl_sim.errors import BadConfig
from cl_sim.indexed import IndexedHoldout, IndexedStream, Schedule, Splits
from cl_sim.rng import derive, host_rng
from cl_sim.types import Batch

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Settings of the domain-incremental stream."""

    data: str = "digits"  # a named set, or folder:PATH, parquet:PATH, npz:PATH
    kind: Literal["permute", "rotate", "corrupt"] = "rotate"
    domains: int = 5  # different ones
    cycles: int = 1  # how often the domains come round (recurring domains)
    repeat: bool = False  # every training sample in every domain, instead of once in all
    span: float = 180.0  # degrees; domain d of `rotate` is turned by an angle between d and d + 1 shares of it
    severity: tuple[int, ...] = (3,)  # of `corrupt`, 1 to 5; of several, each domain takes the next one
    batch: int = 10  # samples per step
    announces: bool = True  # strategies may hear of domain boundaries
    subset: int = 500  # test samples of the small evaluations, over all domains
    size: int = 0  # pixels; resize images to size x size (0: as they are)
    labels: str = ""  # other labels: FILE:COLUMN, or a column of the set's own table

    def __post_init__(self) -> None:
        at_least(self, domains=1, cycles=1, batch=1, subset=1, size=0)
        within(self, -360, 360, "span")
        if not self.severity or not all(1 <= level <= SEVERITIES for level in self.severity):
            raise BadConfig(f"stream.severity is {list(self.severity)}; allowed are 1 to {SEVERITIES}, one or several")
        if self.kind == "corrupt" and self.domains > len(CORRUPTIONS):
            raise BadConfig(f"stream.domains is {self.domains}, but there are {len(CORRUPTIONS)} kinds of corruption")


class Domains:
    """What each domain does to images, per run; a function of (seed, domain, sample), never of what came before.

    Source: ours. A corruption of a domain is one number: 5 times its kind, plus its severity less one.
    """

    def __init__(self, cfg: DriftConfig, seeds: tuple[int, ...], shape: tuple[int, ...], device: torch.device) -> None:
        self.cfg = cfg
        hosts = [host_rng(seed, "domains") for seed in seeds]
        self.run = torch.arange(len(seeds), device=device)[:, None]  # [R, 1]
        if cfg.kind == "permute":
            pixels = np.arange(shape[-2] * shape[-1])
            orders = [[pixels, *(rng.permutation(pixels) for _ in range(cfg.domains - 1))] for rng in hosts]
            self.pixels = torch.as_tensor(np.array(orders), device=device)  # [R, D, H * W]
        elif cfg.kind == "rotate":
            shares = np.arange(cfg.domains) + np.stack([rng.random(cfg.domains) for rng in hosts])
            shares[:, 0] = 0
            self.degrees = torch.as_tensor(
                cfg.span / cfg.domains * shares, dtype=torch.float32, device=device
            )  # [R, D]
        else:
            kinds = np.stack([rng.permutation(len(CORRUPTIONS))[: cfg.domains] for rng in hosts])
            self.codes: Ints = SEVERITIES * kinds + np.resize(cfg.severity, cfg.domains) - 1  # [R, D]
            self.code = torch.as_tensor(self.codes, device=device)
            keys = [
                [[derive(s, f"{part} {d}") for d in range(cfg.domains)] for s in seeds] for part in ("train", "test")
            ]
            self.keys = torch.tensor(keys, device=device)  # [2, R, D]

    def about(self) -> list[str]:
        """One line per domain, of the first run."""
        if self.cfg.kind == "corrupt":
            return [f"{_kind(code)}, severity {code % SEVERITIES + 1}" for code in self.codes[0]]
        if self.cfg.kind == "rotate":
            return [f"{float(angle):.1f} degrees" for angle in self.degrees[0]]
        return ["as it is", *(f"permutation {d}" for d in range(1, self.cfg.domains))]

    def apply(self, x: Tensor, domain: Tensor, index: Tensor, present: Ints, test: bool = False) -> Tensor:
        """Images as they look in their domains; `present` are the domains of each run, known to the host.

        Shapes: x [R, B, C, H, W], domain and index (the row in the set) [R, B], present [R, any] -> as x.
        """
        if self.cfg.kind == "permute":
            order = self.pixels[self.run, domain][:, :, None].expand(-1, -1, x.shape[2], -1)
            return x.flatten(-2).gather(-1, order).view_as(x)
        if self.cfg.kind == "rotate":
            return rotate(x, self.degrees.gather(1, domain))
        wanted = self.code.gather(1, domain).flatten()
        keys = self.keys[int(test)].gather(1, domain).flatten()
        images = x.flatten(0, 1)[:, None]  # [R * B, 1, C, H, W]
        made = images
        for code in np.unique(np.take_along_axis(self.codes, present, 1)):
            rng = sample_rng(keys, index.flatten())
            worse = corrupt(images, _kind(code), int(code) % SEVERITIES + 1, rng)
            made = torch.where((wanted == int(code)).view(-1, 1, 1, 1, 1), worse, made)
        return made.view_as(x)


def _kind(code: int) -> str:
    return list(CORRUPTIONS)[code // SEVERITIES]


class DomainHoldout:
    """The test set in every domain: split d is domain d. The small part is divided among the domains."""

    def __init__(self, plain: IndexedHoldout, domains: Domains, begins: Ints) -> None:
        self.names = [f"domain {d + 1}" for d in range(len(begins))]
        self.plain, self.domains, self.begins = plain, domains, begins

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """The test set, once per domain (the small part: only domains that have begun)."""
        for d, begin in enumerate(self.begins):
            if not full and begin > step:
                continue
            for chunk in self.plain.chunks(step, full):
                domain = torch.full_like(chunk["split"], d)
                present = np.full((len(domain), 1), d)
                seen_as = self.domains.apply(chunk["x"], domain, chunk["index"], present, test=True)
                yield {**chunk, "x": seen_as, "split": domain}


class Drift(IndexedStream):
    """The same classes in changing domains."""

    Config = DriftConfig

    def __init__(
        self, cfg: DriftConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        loaded = load(cfg.data, data, size=cfg.size, labels=cfg.labels)
        if loaded.train.x.ndim != 4:
            raise BadConfig(f"drift changes images, but {cfg.data} holds table rows; for their own drift use tabular")
        y, runs = np.asarray(loaded.train.y), len(seeds)
        stretches = [stretch_rows(len(y), cfg, seed) for seed in seeds]
        each = stretches[0].shape[1] // cfg.batch  # steps
        if each < 1:
            raise BadConfig(f"stream.batch is {cfg.batch}, more than the samples of one domain; use fewer domains")
        rows = np.stack(stretches)[:, :, : each * cfg.batch].reshape(runs, -1)
        domain = np.tile(np.repeat(np.arange(cfg.domains), each * cfg.batch), (runs, cfg.cycles))
        if iid:
            order = np.stack([host_rng(seed, "iid order").permutation(rows.shape[1]) for seed in seeds])
            rows, domain = np.take_along_axis(rows, order, 1), np.take_along_axis(domain, order, 1)
        super().__init__(
            loaded,
            Schedule(rows=rows, labels=y[rows], ends=tuple(range(each - 1, cfg.domains * cfg.cycles * each, each))),
            _one_split(runs, len(loaded.classes)),
            batch_size=cfg.batch,
            announces=cfg.announces and not iid,
            device=device,
            subset=max(1, cfg.subset // cfg.domains),
        )
        self.domains, self.domain_of = Domains(cfg, seeds, loaded.train.x.shape[1:], device), domain
        self.domain = torch.as_tensor(domain, device=device)  # [R, N]
        begins = np.zeros(cfg.domains, dtype=np.int64) if iid else np.arange(cfg.domains) * each
        self.since = np.tile(begins, (runs, 1))
        plain = super().holdout()
        self._domain_holdout = None if plain is None else DomainHoldout(plain, self.domains, begins)

    def batch(self, step: int) -> Batch:
        """The samples of one step, as they look in their domains."""
        plain, part = super().batch(step), slice(step * self.batch_size, (step + 1) * self.batch_size)
        x = self.domains.apply(plain["x"], self.domain[:, part], plain["index"], self.domain_of[:, part])
        return {**plain, "x": x}

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which domains have begun.    Shapes: -> [R, D]."""
        return self.since <= step

    def holdout(self) -> DomainHoldout | None:  # type: ignore[override]
        """The test set in every domain."""
        return self._domain_holdout

    def describe(self) -> dict[str, Any]:
        """Counts, and the domains of the first run."""
        return super().describe() | {"domains": self.domains.about(), "cycles": self.domains.cfg.cycles}


def _one_split(runs: int, classes: int) -> Splits:
    """Everything in one split, seen from the start."""
    return Splits(
        names=("all",),
        of_class=np.zeros((runs, classes), dtype=np.int64),
        since=np.zeros((runs, 1), dtype=np.int64),
    )


def stretch_rows(n: int, cfg: DriftConfig, seed: int) -> Ints:
    """Training rows of each stretch: domain after domain, cycle after cycle.

    With `repeat` every domain deals a shuffle of its own of all rows to its cycles.

    Shapes: -> [cycles * domains, n / (cycles * domains)], or [cycles * domains, n / cycles] with `repeat`.
    """
    rng = host_rng(seed, "drift order")
    if not cfg.repeat:
        each = n // (cfg.domains * cfg.cycles)
        return rng.permutation(n)[: each * cfg.domains * cfg.cycles].reshape(-1, each)
    each = n // cfg.cycles
    dealt = [rng.permutation(n)[: each * cfg.cycles].reshape(cfg.cycles, each) for _ in range(cfg.domains)]
    return np.stack(dealt, 1).reshape(-1, each)
