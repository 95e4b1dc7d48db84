"""Table rows in the order of their file: a stream whose drift is real. Measured test-then-train only.

Source: the data-stream literature (Gama et al. 2014, "A Survey on Concept Drift Adaptation": prequential evaluation).
Departures: several rows per step by default; `scale=running` standardises each column by the mean and standard deviation
of the rows before the step (ours), so that no row is scaled by what comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cl_sim.arrays import Arrays, DataSet, load
from cl_sim.config import at_least
from cl_sim.errors import BadConfig
from cl_sim.indexed import IndexedStream, Schedule
from cl_sim.rng import host_rng

FARTHEST = 5.0  # standard deviations; a column that only ever grows leaves every scale of its past


@dataclass(frozen=True, kw_only=True)
class TabularConfig:
    """Settings of the table stream."""

    data: str = ""  # csv:PATH (label last), csv:PATH#label=NAME, or npz:PATH with x [N, F]
    batch: int = 10  # rows per step, as for images; 1 is the strict form, and nearly ten times slower
    scale: Literal["running", "none"] = "running"  # columns standardised by what came before, or as they are

    def __post_init__(self) -> None:
        at_least(self, batch=1)


class Tabular(IndexedStream):
    """Rows in file order, the same for every run; there is no evaluation set."""

    Config = TabularConfig

    def __init__(
        self, cfg: TabularConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        if not cfg.data:
            raise BadConfig("tabular needs a file, e.g. cl-sim run er tabular-csv:PATH (label in the last column)")
        loaded = load(cfg.data, data)
        if loaded.train.x.ndim != 2:
            raise BadConfig(f"tabular needs table rows, but {cfg.data} holds images; use split, blurry or drift")
        y = np.asarray(loaded.train.y)
        steps = len(y) // cfg.batch
        if steps < 1:
            raise BadConfig(f"stream.batch is {cfg.batch}, but the table has {len(y)} rows; use a smaller batch")
        x = running_scale(np.asarray(loaded.train.x), cfg.batch) if cfg.scale == "running" else loaded.train.x
        rows = np.tile(np.arange(steps * cfg.batch), (len(seeds), 1))
        if iid:
            rows = np.stack(
                [host_rng(seed, "table order").permutation(row) for seed, row in zip(seeds, rows, strict=True)]
            )
        super().__init__(
            DataSet(loaded.name, Arrays(x, y), None, loaded.classes, loaded.digest),
            Schedule(rows=rows, labels=y[rows], ends=(steps - 1,)),
            None,
            batch_size=cfg.batch,
            announces=False,
            device=device,
        )

    def describe(self) -> dict[str, Any]:
        """Counts, and how well the commonest class and the label before would do."""
        y = self.schedule.labels[0]
        return super().describe() | {
            "columns": self.fields["x"].shape[0],
            "commonest class": f"{np.bincount(y).max() / len(y):.1%}",
            "previous label": f"{(y[1:] == y[:-1]).mean():.1%}",
        }


def running_scale(x: NDArray[Any], batch: int) -> NDArray[np.float32]:
    """Each batch standardised by the rows before it, and cut at -5 and 5.

    The first batch, with nothing before it, is only cut; a column that was constant so far is only centred and cut.

    Shapes: [N, F] -> same.
    """
    wide = x.astype(np.float64) - x[0]  # sums of squares lose digits where the mean is large
    count = np.arange(1, len(x) + 1)[:, None]
    mean = np.cumsum(wide, 0) / count
    spread = np.sqrt(np.maximum(np.cumsum(wide**2, 0) / count - mean**2, 0))
    before = np.arange(len(x)) // batch * batch - 1  # the last row before each batch
    scale = np.where(spread[before] > 1e-8, spread[before], 1.0)
    scaled = np.where((before >= 0)[:, None], (wide - mean[before]) / scale, x)
    made: NDArray[np.float32] = scaled.clip(-FARTHEST, FARTHEST).astype(np.float32)
    return made
