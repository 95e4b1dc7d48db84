"""Unlabelled: any classification stream without its labels, for strategies that learn embeddings.

Every sample comes in the same order; the batch carries no label. What the embeddings know of the classes is read out by a few
labelled samples of the evaluation set (`supports` of every class), which are then not asked.

Source: ours.    Departures: all classes of the evaluation set compete at every evaluation, so that a curve shows the embeddings
and not the number of classes seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim.config import at_least
from cl_sim.errors import BadConfig
from cl_sim.metrics.fewshot import SHOTS, Task, draw
from cl_sim.rng import host_rng
from cl_sim.stream import Holdout
from cl_sim.types import Batch
from cl_sim.wrapped import Wrapped, by_name, column, renumbered

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class UnlabelledConfig:
    """Settings of the stream without labels."""

    of: str = "split-digits"  # any classification stream, as it is typed
    settings: tuple[str, ...] = ()  # of that stream, e.g. tasks=2,batch=20
    supports: int = 20  # labelled samples of every class, of the evaluation set
    queries: int = 0  # at most so many others of every class are asked; 0: all
    few: int = 5  # of these, in the small evaluations
    episodes: int = 0  # 5-way episodes, with and without transport, in the large evaluations; usual: 200

    def __post_init__(self) -> None:
        at_least(self, supports=1, queries=0, few=1, episodes=0)


class Unlabelled(Wrapped):
    """The other stream without labels. The column `index`, if there is one, is renumbered at random."""

    Config = UnlabelledConfig

    def __init__(
        self, cfg: UnlabelledConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        super().__init__(by_name(cfg.of, cfg.settings, seeds, device, data, iid))
        inner = self.inner.holdout()
        if self.task != "classify" or "y" not in self.fields or "is_labelled" in self.fields:
            raise BadConfig(
                f"stream.of is '{cfg.of}'; it must be a classification stream with labels, such as split-digits"
            )
        if inner is None:
            raise BadConfig(f"stream.of is '{cfg.of}', which has no evaluation set to read embeddings out with")
        self.task = "embed"
        self.fields = {name: field for name, field in self.fields.items() if name != "y"}
        self.probes = Probes(inner, cfg)
        self.numbered = "index" in self.fields
        if self.numbered:
            ids, labels = column(self.inner, "index"), column(self.inner, "y")
            number = renumbered(ids, seeds, int(ids.max()) + 1)
            known = np.zeros_like(number)
            np.put_along_axis(known, np.take_along_axis(number, ids, 1), labels, 1)
            self.number = torch.as_tensor(number, device=device)  # [R, rows]
            self.known = torch.as_tensor(known, device=device)  # [R, rows] by the new number

    def batch(self, step: int) -> Batch:
        """The samples of one step, without y."""
        batch = {name: value for name, value in self.inner.batch(step).items() if name != "y"}
        return {**batch, "index": self.number.gather(1, batch["index"])} if self.numbered else batch

    def labels_of(self, rows: Batch) -> Tensor | None:
        """The labels of samples that carry their number, for measuring only.    Shapes: index [R, n] -> [R, n]."""
        return self.known.gather(1, rows["index"]) if self.numbered and "index" in rows else None

    def holdout(self) -> Holdout:
        """The evaluation set as supports and queries."""
        return self.probes

    def describe(self) -> Mapping[str, Any]:
        """What the other stream says, and how it is read out."""
        return {**self.inner.describe(), "labels": "none", "supports, queries": self.probes.sizes}


class Probes:
    """Supports and queries of every class, the same at every evaluation and for every strategy."""

    def __init__(self, inner: Holdout, cfg: UnlabelledConfig) -> None:
        self.inner = inner
        self.names: Sequence[str] = inner.names
        chunks = [(chunk["y"][0], chunk["split"][0]) for chunk in inner.chunks(0, full=True)]
        self.lengths = [len(y) for y, _ in chunks]
        y, split = (torch.cat(part).cpu().numpy() for part in zip(*chunks, strict=True))
        rank = ranks(y, split)
        if (np.bincount(y)[np.unique(y)] <= cfg.supports).any():
            least = np.bincount(y)[np.unique(y)].min()
            raise BadConfig(
                f"stream.supports is {cfg.supports}, but a class has only {least} samples in the evaluation set; ask for fewer"
            )
        last = cfg.supports + (cfg.queries or len(y))
        self.role = {True: rank < last, False: rank < min(cfg.supports + cfg.few, last)}
        self.support = rank < cfg.supports
        self.episodes = cfg.episodes
        if cfg.episodes:
            draw(y[self.role[True]], Task(shots=max(SHOTS)), 1, 0)  # are there enough classes and samples?
        self.sizes = f"{self.support.sum()}, {self.role[True].sum() - self.support.sum()}"

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """Evaluation batches with the inner keys and `support`; the small part has the same supports and fewer queries."""
        starts = np.cumsum([0, *self.lengths])
        for chunk, start, end in zip(self.inner.chunks(step, full=True), starts[:-1], starts[1:], strict=True):
            place = np.flatnonzero(self.role[full][start:end])
            if not len(place):
                continue
            device = chunk["y"].device
            picked = {name: value[:, torch.as_tensor(place, device=device)] for name, value in chunk.items()}
            support = torch.as_tensor(self.support[start:end][place], device=device)
            asked = {"episodes": torch.full_like(picked["y"], self.episodes)} if full and self.episodes else {}
            yield {**picked, **asked, "support": support.expand_as(picked["y"])}


def ranks(y: Ints, split: Ints) -> Ints:
    """Each sample's place in a fixed random order of its class within its split.    Shapes: [N], [N] -> [N]."""
    rng, found = host_rng(0, "probe"), np.empty(len(y), dtype=np.int64)
    for key in np.unique(y * (split.max() + 1) + split):
        members = np.flatnonzero(y * (split.max() + 1) + split == key)
        found[rng.permutation(members)] = np.arange(len(members))
    return found
