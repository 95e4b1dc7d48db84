"""Few-shot: the training classes of a task list without labels, in passes; episodes of its other classes measure.

With one pass it is a stream in random order; with more, the offline setting of self-supervised few-shot learning.

Source: the protocol of Poulakakis-Daktylidis and Jamali-Rad 2024, "BECLR", as released: 5 classes, 1 and 5 labelled samples of
each, 15 queries of each.    Departures: incomplete batches at the end of a pass are dropped, as there; images keep their size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim.arrays import Resident
from cl_sim.config import at_least
from cl_sim.errors import BadConfig
from cl_sim.fewshot_lists import NOVEL, pool
from cl_sim.indexed import CHUNK, INT
from cl_sim.rng import host_rng
from cl_sim.types import Batch, Field

SMALL = 100  # episodes of a small evaluation


@dataclass(frozen=True, kw_only=True)
class FewshotConfig:
    """Settings of a few-shot task list."""

    data: str = "cifar-fs"  # or fc100, omniglot, mini-imagenet
    batch: int = 64  # images per step
    passes: int = 1  # over the training classes
    per_class: int = 0  # images of each training class; 0: all
    measure_every: int = 0  # passes between evaluations; 0: only after the last
    novel: Literal["test", "val"] = "test"  # which classes the episodes are made of
    novel_per_class: int = 0  # images of each of these; 0: all
    episodes: int = 2000
    size: int = 0  # pixels; resize images to size x size (0: as they are)

    def __post_init__(self) -> None:
        at_least(self, batch=1, passes=1, per_class=0, measure_every=0, novel_per_class=0, episodes=1, size=0)
        if self.data == "omniglot" and self.novel == "val":
            raise BadConfig("stream.novel is 'val', but omniglot's list has no validation classes; use novel=test")


class Fewshot:
    """A fixed pool of unlabelled images in passes, each in a new order; the number of an image stays."""

    Config = FewshotConfig
    task = "fewshot"
    announces = False

    def __init__(
        self, cfg: FewshotConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        found = pool(cfg.data, data, cfg.size)
        self.cfg, self.seeds, self.device, self.digest = cfg, seeds, device, found.digest
        rows = few_of_each(found.train, found.y, cfg.per_class)
        names, labels = np.unique(found.y[rows], return_inverse=True)
        self.classes, self.batch_size = len(names), cfg.batch
        self.per_pass = len(rows) // cfg.batch  # steps
        if not self.per_pass:
            raise BadConfig(f"stream.batch is {cfg.batch}, but there are only {len(rows)} images; use a smaller batch")
        self.samples = self.per_pass * cfg.batch * cfg.passes
        shape = found.x.shape[1:]
        self.fields: Mapping[str, Field] = {"x": Field(shape, torch.uint8), "index": Field((), INT)}
        self.images = Resident(found.x[rows], device)
        number = np.stack([host_rng(seed, "sample numbers").permutation(len(rows)) for seed in seeds])
        known = np.zeros_like(number)
        np.put_along_axis(known, number, np.tile(labels, (len(seeds), 1)), 1)
        self.number, self.known = (torch.as_tensor(one, device=device) for one in (number, known))  # [R, rows]
        novel = few_of_each(getattr(found, cfg.novel), found.y, cfg.novel_per_class)
        self.novel = Novel(found.x[novel], found.y[novel], cfg, len(seeds), device)
        self.passes = Passes(seeds, len(rows), cfg.batch, device)
        self.ahead = self.images.ahead(Passes(seeds, len(rows), cfg.batch, torch.device("cpu")).rows, len(self))

    def __len__(self) -> int:
        return self.per_pass * self.cfg.passes

    def batch(self, step: int) -> Batch:
        """The images of one step."""
        rows = self.passes.rows(step)
        x = self.images.gather(rows) if self.ahead is None else self.ahead.take(step)
        return {"x": x, "index": self.number.gather(1, rows)}

    def labels_of(self, rows: Batch) -> Tensor | None:
        """The classes of samples that carry their number, for measuring only.    Shapes: index [R, n] -> [R, n]."""
        return self.known.gather(1, rows["index"]) if "index" in rows else None

    def ends_task(self, step: int) -> bool:
        """Is this the last step before an evaluation?"""
        done, rest = divmod(step + 1, self.per_pass)
        every = self.cfg.measure_every or self.cfg.passes
        return not rest and (done % every == 0 or done == self.cfg.passes)

    def seen(self, step: int) -> NDArray[np.bool_]:
        """The episodes can be asked at any time.    Shapes: -> [R, 1]."""
        return np.ones((len(self.seeds), 1), dtype=np.bool_)

    def holdout(self) -> Novel:
        """The images that episodes are made of."""
        return self.novel

    def describe(self) -> Mapping[str, Any]:
        """Counts and choices worth printing."""
        return {
            "data": f"{self.cfg.data} ({NOVEL[self.cfg.data][0]})",
            "digest": self.digest,
            "classes": self.classes,
            "images": self.number.shape[1],
            "samples": self.samples,
            "passes": self.cfg.passes,
            "batch": self.batch_size,
            "novel classes, images": f"{len(np.unique(self.novel.y))}, {len(self.novel.y)}",
        }


class Passes:
    """Which images come at a step: every pass has a new order of them, made when it begins; one is kept."""

    def __init__(self, seeds: Sequence[int], images: int, batch: int, device: torch.device) -> None:
        self.seeds, self.images, self.batch, self.device = seeds, images, batch, device
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

    def rows(self, step: int) -> Tensor:
        """The images of one step.    Shapes: -> [R, B]."""
        turn, place = divmod(step, self.images // self.batch)
        if self.order[0] != turn:
            orders = [host_rng(seed, f"pass {turn}").permutation(self.images) for seed in self.seeds]
            self.order = turn, torch.as_tensor(np.stack(orders), device=self.device)
        return self.order[1][:, place * self.batch : (place + 1) * self.batch]


class Novel:
    """Images of classes that never come in the stream, in one split; `episodes` says how many to draw of them."""

    def __init__(
        self, x: NDArray[Any], y: NDArray[np.int64], cfg: FewshotConfig, runs: int, device: torch.device
    ) -> None:
        self.names: Sequence[str] = (cfg.novel,)
        self.images, self.y, self.cfg, self.device = Resident(x, device), y, cfg, device
        self.rows = torch.arange(len(y)).expand(runs, -1)  # [R, N], on the host
        self.labels = torch.as_tensor(y, device=device)

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """Evaluation batches with keys x, y, split, episodes."""
        count = self.cfg.episodes if full else min(SMALL, self.cfg.episodes)
        for part, x in self.images.chunks(self.rows, CHUNK[self.device.type]):
            nothing = torch.zeros_like(part)
            yield {"x": x, "y": self.labels[part], "split": nothing, "episodes": nothing + count}


def few_of_each(rows: NDArray[np.int64], y: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most so many rows of each class, a fixed random choice; 0: all."""
    if not count:
        return rows
    rng = host_rng(0, "few of each class")
    kept = [rng.permutation(rows[y[rows] == c])[:count] for c in np.unique(y[rows])]
    return np.sort(np.concatenate(kept))
