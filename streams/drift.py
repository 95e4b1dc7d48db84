"""Domain-incremental stream: the classes stay, the images change: permuted, turned or corrupted, domain after domain.

Source: permuted and rotated images: Goodfellow et al. 2013 and Lopez-Paz and Ranzato 2017; corruptions: Hendrycks and
Dietterich 2019.
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

from cl_sim.arrays import DataSet, load
from cl_sim.config import at_least, within
from cl_sim.corrupt import CORRUPTIONS, corrupt, rotate
from cl_sim.errors import BadConfig
from cl_sim.indexed import IndexedHoldout, IndexedStream, Schedule, Splits, host_rng
from cl_sim.rng import Rng
from cl_sim.types import Batch

FAR = 1 << 32  # where the random numbers of the evaluation sets begin; those of a training step lie below


@dataclass(frozen=True, kw_only=True)
class DriftConfig:
    """Settings of the domain-incremental stream."""

    data: str = "digits"  # a named set, or folder:PATH, parquet:PATH, npz:PATH
    kind: Literal["permute", "rotate", "corrupt"] = "rotate"
    domains: int = 5  # different ones
    cycles: int = 1  # how often the domains come round (recurring domains)
    repeat: bool = False  # every training sample in every domain, instead of once in all
    span: float = 180.0  # degrees; domain d of `rotate` is turned by up to d/domains of this
    severity: int = 3  # of `corrupt`, 1 to 5
    batch: int = 10  # samples per step
    announces: bool = True  # strategies may hear of domain boundaries
    subset: int = 500  # test samples of the small evaluations, over all domains
    size: int = 0  # pixels; resize images to size x size (0: as they are)
    labels: str = ""  # other labels: FILE:COLUMN, or a column of the set's own table

    def __post_init__(self) -> None:
        at_least(self, domains=1, cycles=1, batch=1, subset=1, size=0)
        within(self, 1, 5, "severity")
        within(self, -360, 360, "span")
        if self.kind == "corrupt" and self.domains > len(CORRUPTIONS):
            raise BadConfig(f"stream.domains is {self.domains}, but there are {len(CORRUPTIONS)} kinds of corruption")


class Domains:
    """What each domain does to images, per run; a function of (run, domain, place), never of what came before."""

    def __init__(self, cfg: DriftConfig, seeds: tuple[int, ...], shape: tuple[int, ...], device: torch.device) -> None:
        self.cfg, self.shape = cfg, shape
        self.rng = Rng(seeds, "corruption", device)
        hosts = [host_rng(seed, "domains") for seed in seeds]
        pixels = shape[1] * shape[2]
        self.order = np.stack([rng.permutation(len(CORRUPTIONS))[: cfg.domains] for rng in hosts])
        orders = [[np.arange(pixels), *(rng.permutation(pixels) for _ in range(cfg.domains - 1))] for rng in hosts]
        self.pixels = torch.as_tensor(np.array(orders), device=device)  # [R, D, H * W]
        share = torch.arange(cfg.domains, device=device) / cfg.domains
        self.degrees = cfg.span * share.expand(len(seeds), -1)  # [R, D]

    def names(self) -> list[str]:
        """One name per domain; the corruptions' of the first run."""
        if self.cfg.kind == "corrupt":
            return [list(CORRUPTIONS)[i] for i in self.order[0]]
        if self.cfg.kind == "rotate":
            return [f"{float(d):g} degrees" for d in self.degrees[0]]
        return ["as it is", *(f"permutation {d}" for d in range(1, self.cfg.domains))]

    def apply(self, x: Tensor, domain: int, place: int) -> Tensor:
        """Images as they look in a domain; `place` numbers the batch, for its noise.    Shapes: [R, B, C, H, W] -> same."""
        if self.cfg.kind == "permute":
            index = self.pixels[:, domain, None, None].expand(-1, x.shape[1], x.shape[2], -1)
            return x.flatten(-2).gather(-1, index).view_as(x)
        if self.cfg.kind == "rotate":
            return rotate(x, self.degrees[:, domain, None].expand(-1, x.shape[1]))
        self.rng.counter.fill_(place << 24)
        kinds = [list(CORRUPTIONS)[i] for i in self.order[:, domain]]
        made = {kind: corrupt(x, kind, self.cfg.severity, self.rng) for kind in sorted(set(kinds))}
        return torch.stack([made[kind][run] for run, kind in enumerate(kinds)])


class DomainHoldout:
    """The test set in every domain: split d is domain d. The small part is divided among the domains."""

    def __init__(self, plain: IndexedHoldout, domains: Domains, begins: NDArray[np.int64]) -> None:
        self.names = domains.names()
        self.plain, self.domains, self.begins = plain, domains, begins

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """The test set, once per domain (the small part: only domains that have begun)."""
        for domain in range(len(self.names)):
            if not full and self.begins[domain] > step:
                continue
            for number, chunk in enumerate(self.plain.chunks(step, full)):
                seen_as = self.domains.apply(chunk["x"], domain, FAR + domain * 4096 + number)
                yield {**chunk, "x": seen_as, "split": torch.full_like(chunk["split"], domain)}


class Drift(IndexedStream):
    """The same classes in changing domains."""

    Config = DriftConfig

    def __init__(
        self, cfg: DriftConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        loaded = load(cfg.data, data, size=cfg.size, labels=cfg.labels)
        _check(cfg, loaded)
        y, stretches = np.asarray(loaded.train.y), cfg.domains * cfg.cycles
        rows = np.stack([_rows(len(y), cfg, seed) for seed in seeds])  # [R, stretches, n]
        each = rows.shape[2] // cfg.batch
        if each < 1:
            raise BadConfig(f"stream.batch is {cfg.batch}, more than the samples of one domain; use fewer domains")
        rows = rows[:, :, : each * cfg.batch]
        self.domain_of = np.repeat(np.tile(np.arange(cfg.domains), cfg.cycles), each)  # [steps]
        if iid:
            self.domain_of = host_rng(0, "domain order").permutation(self.domain_of)
        flat = rows.reshape(len(seeds), -1)
        begins = np.zeros(cfg.domains, dtype=np.int64) if iid else np.arange(cfg.domains) * each
        self.domains = Domains(cfg, seeds, loaded.train.x.shape[1:], device)
        everywhere = Splits(
            names=("all",),
            of_class=np.zeros((len(seeds), len(loaded.classes)), dtype=np.int64),
            since=np.zeros((len(seeds), 1), dtype=np.int64),
        )
        super().__init__(
            loaded,
            Schedule(rows=flat, labels=y[flat], ends=tuple(each * (t + 1) - 1 for t in range(stretches))),
            everywhere,
            batch_size=cfg.batch,
            announces=cfg.announces and not iid,
            device=device,
            subset=max(len(loaded.classes), cfg.subset // cfg.domains),
        )
        self.since = np.tile(begins, (len(seeds), 1))
        plain = super().holdout()
        self._domain_holdout = None if plain is None else DomainHoldout(plain, self.domains, begins)

    def batch(self, step: int) -> Batch:
        """The samples of one step, as they look in its domain."""
        plain = super().batch(step)
        return {**plain, "x": self.domains.apply(plain["x"], int(self.domain_of[step]), step)}

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which domains have begun.    Shapes: -> [R, D]."""
        return self.since <= step

    def holdout(self) -> DomainHoldout | None:  # type: ignore[override]
        """The test set in every domain."""
        return self._domain_holdout

    def describe(self) -> dict[str, Any]:
        """Counts, and the domains of the first run."""
        return super().describe() | {"domains": self.domains.names()}


def _check(cfg: DriftConfig, loaded: DataSet) -> None:
    if loaded.train.x.ndim != 4:
        raise BadConfig(
            f"drift changes images, but {cfg.data} holds table rows; tables have drift of their own: tabular"
        )


def _rows(n: int, cfg: DriftConfig, seed: int) -> NDArray[np.int64]:
    """Training rows per stretch.    Shapes: -> [stretches, n / stretches], or [stretches, n / cycles] with repeat."""
    rng = host_rng(seed, "drift order")
    if cfg.repeat:
        rounds = []
        halves = [np.array_split(rng.permutation(n), cfg.cycles) for _ in range(cfg.domains)]
        size = n // cfg.cycles
        for cycle in range(cfg.cycles):
            rounds += [halves[domain][cycle][:size] for domain in range(cfg.domains)]
        return np.stack(rounds)
    size = n // (cfg.domains * cfg.cycles)
    return rng.permutation(n)[: size * cfg.domains * cfg.cycles].reshape(-1, size)
