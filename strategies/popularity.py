"""Popularity: rank items by how often they have come so far. Learns nothing, and is hard to beat.

Source: the plain baseline of the recommendation literature.
Symbols: count -> how often an item was a target.    Departures: ties go to the smaller item number, so that ranks have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs


@dataclass(frozen=True, kw_only=True)
class PopularityConfig:
    """Settings of the popularity baseline."""

    mask_unseen: bool = False  # only items that have come are candidates (a growing catalogue)


class Popularity(Strategy):
    """Counts of targets."""

    Config, tasks = PopularityConfig, frozenset({"rank"})
    count: Tensor  # [R, I + 1] int64; what came as item 0 was filling

    def __init__(self, cfg: PopularityConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.register_buffer("count", torch.zeros(env.runs, env.classes, dtype=torch.int64, device=env.device))
        self.item = torch.arange(env.classes, device=env.device)

    def observe(self, new: Batch) -> Logs:
        """Count the targets, those of events without a history too."""
        target = new["target"].long()
        self.count.scatter_add_(1, target, torch.ones_like(target))
        return {}

    def predict(self, batch: Batch) -> Tensor:
        """The counts, and less for larger item numbers.    Shapes: -> [R, B, I + 1] float64."""
        score = (self.count * len(self.item) - self.item).double()  # whole numbers, exact
        if self.cfg.mask_unseen:
            score = score.masked_fill(self.count == 0, -torch.inf)
        return score[:, None].expand(-1, batch["target"].shape[1], -1)
