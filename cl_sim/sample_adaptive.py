"""Sample-adaptive augmentation as a part of any replay strategy: which views the recalled samples get.

Replay strategies have it through `Tricks` (`cl_sim/replay.py`): `harder` for recalled samples, `note` with their losses, and
`tick` once a step. What is kept per slot lies in the memory's table. The module draws from random numbers of its own, so that
a run whose flags are all 0 is the plain strategy's to the bit.

Source: Gui et al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation in Semi-Supervised Learning"; its
form for a stream, and for supervised replay, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_sim.adaptive import otsu_threshold, update_flags
from cl_sim.augment import join_halves
from cl_sim.config import at_least, within
from cl_sim.errors import BadConfig
from cl_sim.memory.rows import Rows
from cl_sim.memory.table import Table
from cl_sim.randaugment import Recipe, apply_strong, draw_strong, strong
from cl_sim.rng import Rng
from cl_sim.runs import per_run
from cl_sim.strategy import Env
from cl_sim.types import Batch, Logs

otsu, flags_after = per_run(otsu_threshold), per_run(update_flags)
Levels = Literal["replay", "replay-soft", "ssl"]
LEVELS: dict[str, tuple[int, int]] = {"replay": (0, 2), "replay-soft": (0, 1), "ssl": (1, 2)}  # not naive, naive
RETEST = 0.2  # probability that a naive slot gets the easy view, where only losses on easy views count
WARM_UP = 3  # virtual epochs
FEW = 20  # classes, or experiences, that get a curve of their own


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """Settings of a strategy whose recalled samples can get sample-adaptive views.

    Levels of views: 0 the strategy's own; 1 a strong one (RandAugment and Cutout) before it; 2 two strong ones joined by
    halves. `replay` gives level 0 to ordinary and 2 to naive samples, `replay-soft` 0 and 1, `ssl` 1 and 2 (the source's).
    The other values are control arms for the levels of `saa_levels`: `none` and `all` give every sample the lower or the
    higher level, `random` flags as many samples as the method would, `inverse` the others.
    """

    saa: Literal["off", "replay", "replay-soft", "ssl", "none", "all", "random", "inverse"] = "off"
    saa_levels: Levels = "replay"  # of a control arm
    history_decay: float = (
        0.001  # weight of the old value in a sample's loss history; the source's: the last loss, nearly
    )
    selection_period: int = 0  # steps between selections; 0: as many as recall every slot once on average
    warmup_steps: int = 0  # before the first selection; 0: three periods
    min_visits: int = 2  # recalls of a slot before it takes part in a selection
    max_naive_loss: float = 0.0  # a sample with a larger history is never naive; 0: no limit
    otsu_edge: bool = False  # split at the upper edge of the threshold's bin, for small memories
    normalise_by_log_classes: bool = False  # divide losses by the logarithm of the number of classes seen
    history_from: Literal["any", "low"] = (
        "any"  # views whose losses count; low: only easy ones, naive slots are re-tested
    )

    def __post_init__(self) -> None:
        at_least(self, selection_period=0, warmup_steps=0, min_visits=1, max_naive_loss=0)
        within(self, 0, 1, "history_decay")
        if self.saa in LEVELS and self.saa_levels not in ("replay", self.saa):
            raise BadConfig(f"saa_levels is '{self.saa_levels}', but saa='{self.saa}' brings its own; leave it out")


class SampleAdaptive(nn.Module):
    """Flags the slots of a memory that teach little, and makes harder images of what is recalled.

    `batch` is the number of slots recalled per step, which decides how many steps a period has.

    Shapes: step [] int64; threshold, flipped [R], of the last selection; right [R], share of the easy views asked last that
    were answered right.    Raises: BadConfig for samples that are no images.
    """

    step: Tensor
    threshold: Tensor
    flipped: Tensor
    right: Tensor

    def __init__(self, cfg: AdaptiveConfig, env: Env, memory: Rows, batch: int) -> None:
        super().__init__()
        self.cfg, self.env = cfg, env
        self.rows = [memory]  # in a list: the strategy saves its memory
        shape = env.fields["x"].shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise BadConfig(
                f"saa='{cfg.saa}' needs images of 1 or 3 channels, but the samples have shape {list(shape)}"
            )
        memory.keep_table()
        self.low, self.high = LEVELS[cfg.saa if cfg.saa in LEVELS else cfg.saa_levels]
        self.period = cfg.selection_period or -(-memory.capacity // batch)
        self.warm_up = cfg.warmup_steps or WARM_UP * self.period
        self.answers = False  # does the strategy tell what was answered right?
        self.own = Rng(env.seeds, "strong views", env.device)
        self.other = Rng(env.seeds, "second strong views", env.device)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=env.device))
        for name in ("threshold", "flipped", "right"):
            self.register_buffer(name, torch.zeros(env.runs, device=env.device))

    @property
    def memory(self) -> Rows:
        """The memory whose slots are flagged."""
        return self.rows[0]

    @property
    def table(self) -> Table:
        """What is known of its slots."""
        assert self.memory.table is not None
        return self.memory.table

    def harder(self, old: Batch) -> Batch:
        """Recalled samples at their levels, before the strategy's own views; `hard` tells which got the higher one.

        Shapes: each field [R, B, ...] -> same, and hard [R, B] bool.
        """
        if not len(self.memory):
            return old
        hard = self.hard(old["slot"])
        return {**old, "x": self.at(old["x"], hard), "hard": hard}

    def hard(self, slot: Tensor) -> Tensor:
        """Which rows get the higher level.    Shapes: slot [R, B] -> [R, B] bool."""
        if self.cfg.saa == "none":
            return torch.zeros_like(slot, dtype=torch.bool)
        if self.cfg.saa == "all":
            return torch.ones_like(slot, dtype=torch.bool)
        naive = self.table.is_naive(slot)
        if self.cfg.history_from == "low":
            naive = naive & ~self.other.chance(RETEST, slot.shape[1])
        return naive

    def at(self, x: Tensor, hard: Tensor) -> Tensor:
        """Each image at its level, before the strategy's own views.    Shapes: x [R, B, C, H, W], hard [R, B] -> x."""
        if self.high == 2:
            first, high = self.two(x)
        else:
            first = high = strong(x, self.own)
        return torch.where(hard[..., None, None, None], high, first if self.low else x)

    def two(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Levels 1 and 2: a strong view of each image, and the same with half of it from a second one.

        Both are made in one pass, in 0.7 of the time of two (10 images of 32x32 on a CPU).

        Shapes: [R, B, C, H, W] -> same, twice.
        """
        batch = x.shape[1]
        one, left = draw_strong(self.own, batch), self.other.chance(0.5, batch)
        pair = zip(one, draw_strong(self.other, batch), strict=True)
        first, second = apply_strong(torch.cat([x, x], 1), Recipe(*(torch.cat(part, 1) for part in pair))).chunk(2, 1)
        return first, join_halves(first, second, left)

    def joined(self, first: Tensor, x: Tensor) -> Tensor:
        """Level 2, where the first strong view of each image has been made.    Shapes: [R, B, C, H, W] -> same."""
        left = self.other.chance(0.5, x.shape[1])
        return join_halves(first, strong(x, self.other), left)

    @torch.no_grad()
    def note(self, view: Batch, loss: Tensor, seen: Tensor) -> None:
        """Remember the losses of recalled samples, before their slots can change.

        Shapes: view has slot and hard [R, B]; loss [R, B]; seen [R, C] bool: the classes that have come.
        """
        slot = view["slot"]
        if self.cfg.normalise_by_log_classes:
            loss = loss / seen.sum(1, keepdim=True).clamp(min=2).to(loss.dtype).log()
        if self.cfg.history_from == "low":
            slot = slot.masked_fill(view["hard"], self.memory.capacity)  # nowhere
        self.table.visit(slot, loss.detach(), self.cfg.history_decay)

    def answered(self, right: Tensor, asked: Tensor) -> None:
        """Remember which of the samples asked on easy views were answered right; if none is, what was last.

        Shapes: right, asked [R, B] bool.
        """
        self.answers = True
        self.right.copy_(torch.where(asked.any(1), _share(right & asked, asked), self.right))

    def boundary(self) -> None:
        """An experience has ended."""
        self.table.boundary()

    def tick(self) -> Logs:
        """A step has been made: select, if it is time.    Shapes: -> each [R]."""
        self.step += 1
        table, filled = self.table, self.memory.valid()
        known = table.known(self.cfg.min_visits) & filled  # [R, M]
        ready = (known.sum(1) * 2 >= filled.sum(1)) & known.any(1)
        due = (self.step >= self.warm_up) & (self.step % self.period == 0) & ready  # [R]
        history, before = table.history[:, : table.capacity], table.naive[:, : table.capacity].clone()
        threshold = otsu(history, known, edge=self.cfg.otsu_edge)
        chosen = self.arm(flags_after(before ^ self.inverse(known), history, threshold), known, history)
        after = torch.where(due[:, None] & known, chosen, before)
        table.mark(after)
        self.threshold.copy_(torch.where(due, threshold, self.threshold))
        self.flipped.copy_(torch.where(due, _share(after != before, filled), self.flipped))
        return self.logs(after, history, known, filled)

    def inverse(self, known: Tensor) -> Tensor:
        """Where a flag means the opposite of naive.    Shapes: [R, M] bool -> same."""
        return known if self.cfg.saa == "inverse" else torch.zeros_like(known)

    def arm(self, naive: Tensor, known: Tensor, history: Tensor) -> Tensor:
        """The flags of the control arm, given the method's.    Shapes: [R, M] -> [R, M] bool."""
        naive = naive & known
        if self.cfg.max_naive_loss:
            naive = naive & (history <= self.cfg.max_naive_loss)
        if self.cfg.saa == "random":
            place = self.other.permutation(known.shape[1]).masked_fill(~known, known.shape[1])
            rank = place.argsort(1).argsort(1)  # known slots first, in random order
            return rank < naive.sum(1, keepdim=True)
        return naive ^ self.inverse(known)

    def logs(self, naive: Tensor, history: Tensor, known: Tensor, filled: Tensor) -> Logs:
        """What shows whether the selection is healthy.    Shapes: [R, M] -> each [R]."""
        visits = self.table.visits[:, : self.memory.capacity]
        found = {
            "saa_threshold": self.threshold.clone(),
            "saa_naive": _share(naive, filled),
            "saa_flipped": self.flipped.clone(),
            "saa_visits": _mean(visits.to(history.dtype), filled),
            "saa_history_naive": _mean(history, known & naive),
            "saa_history_other": _mean(history, known & ~naive),
        }
        if self.answers:
            found["saa_recalled_acc"] = self.right.clone()
        return found | self.by_class(naive, filled) | self.by_experience(naive, filled)

    def by_class(self, naive: Tensor, filled: Tensor) -> Logs:
        """Share of naive slots among those of each class; hidden labels count for none.    Shapes: [R, M] -> each [R].

        Streams with more than 20 classes would have too many curves.
        """
        if self.env.classes > FEW:
            return {}
        share = _shares(naive, filled, self.memory.row("y")[:, : self.memory.capacity], self.env.classes)
        return {f"saa_naive_class_{c}": share[:, c] for c in range(self.env.classes)}

    def by_experience(self, naive: Tensor, filled: Tensor) -> Logs:
        """Share of naive slots among those that came in each experience, from the second on, the first 20 of them.

        An experience is what lies between two announced boundaries.    Shapes: [R, M] -> each [R].
        """
        begun = min(self.table.begun, FEW)
        if begun == 1:
            return {}
        share = _shares(naive, filled, self.table.since[:, : self.table.capacity], begun)
        return {f"saa_naive_task_{e + 1}": share[:, e] for e in range(begun)}


def _shares(naive: Tensor, filled: Tensor, group: Tensor, groups: int) -> Tensor:
    """Share of naive slots in each group, 0 where it has none.    Shapes: [R, M] each -> [R, G]."""
    member = (group[..., None] == torch.arange(groups, device=group.device)) & filled[..., None]  # [R, M, G]
    return _share(naive[..., None] & member, member)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over axis 1 of the chosen values, 0 if there are none.    Shapes: [R, M, ...] -> [R, ...]."""
    return values.masked_fill(~where, 0).sum(1) / where.sum(1).clamp(min=1)


def _share(chosen: Tensor, among: Tensor) -> Tensor:
    """Share of the rows that are chosen.    Shapes: [R, M, ...] bool -> [R, ...] float32."""
    return _mean(chosen.float(), among)
