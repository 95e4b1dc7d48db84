"""First-order Markov chain: rank items by how often they have followed the user's last item so far.

Source: the plain baseline of the sequential recommendation literature.
Symbols: (previous, target) -> a pair, kept as it came; count -> how often an item was a target.
Departures: ties go to the item that came more often, then to the smaller item number, so that ranks have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs


@dataclass(frozen=True, kw_only=True)
class Markov1Config:
    """Settings of the Markov baseline."""

    mask_unseen: bool = False  # only items that have come are candidates (a growing catalogue)


class Markov1(Strategy):
    """Every pair of neighbours so far; their counts are summed for the items that are asked about.

    A table of all pairs would take 586 MB per run for 12,101 items; the pairs of 198,502 events take 1.6 MB, and summing them
    for a batch costs one pass over them.
    """

    Config, tasks = Markov1Config, frozenset({"rank"})
    count: Tensor  # [R, I + 1] int64
    pairs: Tensor  # [R, 2, N] int32: previous item and target, zeros where there is none yet
    seen: Tensor  # [] int64, events so far

    def __init__(self, cfg: Markov1Config, env: Env) -> None:
        super().__init__(cfg, env)
        self.register_buffer("count", torch.zeros(env.runs, env.classes, dtype=torch.int64, device=env.device))
        self.register_buffer("pairs", torch.zeros(env.runs, 2, env.samples, dtype=torch.int32, device=env.device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=env.device))
        self.item = torch.arange(env.classes, device=env.device)

    def observe(self, new: Batch) -> Logs:
        """Count the targets, and keep each with the item before it."""
        target = new["target"]
        self.count.scatter_add_(1, target.long(), torch.ones_like(target, dtype=torch.int64))
        previous = last_items(new)
        known = torch.stack([previous, target.masked_fill(previous == 0, 0)], 1)  # [R, 2, B]
        place = self.seen + torch.arange(target.shape[1], device=target.device)
        self.pairs.index_copy_(2, place, known.int())
        self.seen += target.shape[1]
        return {}

    def predict(self, batch: Batch) -> Tensor:
        """Followers of the last item, then popularity, then smaller numbers.    Shapes: -> [R, B, I + 1] float64.

        Ties are broken exactly while (count of a pair) * items * events is below 2^53.
        """
        followed = self.followers(last_items(batch).long())
        size = len(self.item)
        popular = self.count * size - self.item  # whole numbers
        score = followed.double() * (size * (self.env.samples + 1)) + popular[:, None]
        if self.cfg.mask_unseen:
            score = score.masked_fill((self.count == 0)[:, None], -torch.inf)
        return score

    def followers(self, previous: Tensor) -> Tensor:
        """How often each item has followed these.    Shapes: previous [R, B] -> [R, B, I + 1] int32."""
        runs, batch = previous.shape
        size = len(self.item)
        row = torch.full((runs, size), batch, device=previous.device)  # of each item in the batch; B: not asked about
        number = torch.arange(batch, device=previous.device).expand(runs, -1)
        row.scatter_reduce_(1, previous, number, "amin")
        row[:, 0] = batch  # there was no item before
        before, after = self.pairs.long().unbind(1)  # [R, N]
        cell = row.gather(1, before) * size + after
        counts = torch.zeros(runs, (batch + 1) * size, dtype=torch.int32, device=previous.device)
        counts.scatter_add_(1, cell, torch.ones_like(cell, dtype=torch.int32))
        counts = counts.view(runs, batch + 1, size)
        counts[:, batch] = 0
        return counts.gather(1, row.gather(1, previous)[..., None].expand(-1, -1, size))


def last_items(batch: Batch) -> Tensor:
    """The newest item of each history; 0 without one.    Shapes: -> [R, B]."""
    place = (batch["length"].long() - 1).clamp(min=0)[..., None]
    return batch["items"].gather(-1, place)[..., 0]
