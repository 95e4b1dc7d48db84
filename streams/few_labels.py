"""Few labels: any classification stream, of whose samples only some are labelled.

Every sample still comes, in the same order. The batch says which are labelled (`is_labelled`); the label of the others is -1,
and their own label reaches nothing but the metrics.

Source: ours, for semi-supervised methods on a single-pass stream.    Departures: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim.config import at_least, within
from cl_sim.errors import BadConfig
from cl_sim.indexed import IndexedStream
from cl_sim.rng import host_rng
from cl_sim.stream import Pool, labels_at
from cl_sim.types import Batch, Field
from cl_sim.wrapped import Wrapped, by_name, column, renumbered

HIDDEN = -1  # the label of a sample that has none
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class FewLabelsConfig:
    """Settings of the stream with few labels."""

    of: str = "split-digits"  # any classification stream, as it is typed
    settings: tuple[str, ...] = ()  # of that stream, e.g. tasks=2,batch=20
    fraction: float = 0.05  # probability that a sample is labelled
    per_class: int = 0  # labelled samples of every class, exactly; 0: by `fraction`
    guarantee_first_label: bool = False  # the first sample of every class is labelled

    def __post_init__(self) -> None:
        at_least(self, per_class=0)
        within(self, 0, 1, "fraction")


class FewLabels(Wrapped):
    """The other stream with most labels hidden.

    A sample that comes again is labelled again. The column `index`, if there is one, is renumbered at random: rows of a data
    set are often sorted by class. Where the other stream shows its samples again and again, `pool` tells which are labelled.
    """

    Config = FewLabelsConfig

    def __init__(
        self, cfg: FewLabelsConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        super().__init__(by_name(cfg.of, cfg.settings, seeds, device, data, iid))
        if self.task != "classify" or "y" not in self.fields or "is_labelled" in self.fields:
            raise BadConfig(
                f"stream.of is '{cfg.of}'; labels can only be hidden in a classification stream that has them"
            )
        repeats = self.inner.schedule.repeats if isinstance(self.inner, IndexedStream) else None
        if cfg.guarantee_first_label and repeats is not None and repeats.replacement:
            raise BadConfig(
                "stream.guarantee_first_label is true, but samples that are drawn have no order; leave it out"
            )
        labels = column(self.inner, "y")
        self.numbered = "index" in self.fields
        ids = column(self.inner, "index") if self.numbered else np.tile(np.arange(self.samples), (len(seeds), 1))
        rows = len(self.inner.train.rows) if isinstance(self.inner, IndexedStream) else 0
        shape = len(seeds), max(rows, int(ids.max()) + 1)
        chosen, known = np.zeros(shape, dtype=np.bool_), np.full(shape, HIDDEN)
        for run, seed in enumerate(seeds):
            chosen[run, ids[run]] = choose(ids[run], labels[run], cfg, seed)
            known[run, ids[run]] = labels[run]
        self.labelled, self.known = (torch.as_tensor(one, device=device) for one in (chosen, known))  # [R, rows]
        self.fields = {**self.fields, "is_labelled": Field((), torch.bool)}
        if self.numbered:
            self.number = torch.as_tensor(renumbered(ids, seeds, shape[1]), device=device)  # [R, rows]
            self.row = self.number.argsort(1)  # [R, numbers]
        self.pool = None if repeats is None else self.fixed_pool()
        self.counts = np.bincount(known[0][chosen[0]], minlength=self.classes)

    def batch(self, step: int) -> Batch:
        """The samples of one step; y is -1 where the label is hidden."""
        plain = self.inner.batch(step)
        if self.numbered:
            return self.with_hidden(plain, plain["index"])
        start = step * self.batch_size
        place = torch.arange(start, start + self.batch_size, device=self.labelled.device)
        return self.with_hidden(plain, place.expand(len(self.labelled), -1))

    def with_hidden(self, plain: Batch, rows: Tensor) -> Batch:
        """Samples of these rows, as strategies see them.    Shapes: rows [R, n] -> each field [R, n, ...]."""
        known = self.labelled.gather(1, rows)
        own = {"index": self.number.gather(1, rows)} if self.numbered else {}
        return {**plain, "y": plain["y"].masked_fill(~known, HIDDEN), **own, "is_labelled": known}

    def fixed_pool(self) -> Pool:
        """The samples that come again, by their numbers."""
        assert isinstance(self.inner, IndexedStream)
        images = self.inner.train

        def take(number: Tensor) -> Batch:
            rows = self.row.gather(1, number)
            return self.with_hidden({"x": images.gather(rows), "y": self.known.gather(1, rows)}, rows)

        by_number = self.labelled.gather(1, self.row)
        most = int(by_number.sum(1).max())
        first = by_number.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        return Pool(
            present=(self.known >= 0).gather(1, self.row),
            labelled=torch.where(by_number.gather(1, first), first, -1),
            take=take,
        )

    def truth(self, step: int) -> Tensor:
        """Every label of one step, for the metrics.    Shapes: -> [R, B]."""
        return labels_at(self.inner, step)

    def describe(self) -> Mapping[str, Any]:
        """What the other stream says, and the labelled samples of the first run."""
        spread = f"{self.counts.sum()} ({self.counts.min()} to {self.counts.max()} per class)"
        return {**self.inner.describe(), "labelled": spread}


def choose(ids: Ints, labels: Ints, cfg: FewLabelsConfig, seed: int) -> Mask:
    """Which places of one run's stream are labelled.    Shapes: ids and labels [N] -> [N].

    Raises: BadConfig if a class has fewer samples than `per_class`.
    """
    rng = host_rng(seed, "few labels")
    _, first, sample = np.unique(ids, return_index=True, return_inverse=True)  # of each sample; of each place
    chosen = rng.random(len(first)) < cfg.fraction
    if cfg.per_class:
        chosen[:] = False
    for c in np.unique(labels):
        members = np.flatnonzero(labels[first] == c)
        leader = members[first[members].argmin()]  # who comes first
        if cfg.per_class > len(members):
            raise BadConfig(f"stream.per_class is {cfg.per_class}, but class {c} has only {len(members)} samples")
        if cfg.per_class:
            forced = [leader] if cfg.guarantee_first_label else []
            others = rng.permutation(np.setdiff1d(members, forced))
            chosen[np.concatenate([forced, others])[: cfg.per_class].astype(np.int64)] = True
        elif cfg.guarantee_first_label:
            chosen[leader] = True
    whole: Mask = chosen[sample]
    return whole
