"""Interactions of users with items, one event after the other: from a user's history, rank what comes next.

An event is a user's item number k (from 0), with the items before it as its history. An event without a history is not scored,
but is part of the stream: it counts, and it fills the catalogue. Batches are consecutive events; the last one is filled up with
events of user 0 and item 0, which count nowhere.

Source: ours for the stream; `protocol="offline"` is the leave-one-out protocol of Kang and McAuley 2018, "Self-Attentive
Sequential Recommendation", with a sample for every place of a history, as the code of MCLRec uses it: the pass with the best
MRR@10 on the items before the last is tested on the last ones.
Departures: lists without times have no order across users, so the order is one of three rules; every user's own order is kept.
Segments hold equally many scored events, not equally many events: `round` begins with a tenth of events without a history.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cl_sim.config import at_least
from cl_sim.errors import BadConfig
from cl_sim.interactions import Interactions, Ints, load
from cl_sim.rng import host_rng
from cl_sim.selection import Selection
from cl_sim.types import Batch, Field

CHUNK = 500  # events ranked at once in evaluations
INT = torch.int64
Order = Literal["relative", "round", "staggered", "time"]


@dataclass(frozen=True, kw_only=True)
class SequencesConfig:
    """Settings of the interaction stream."""

    data: str = "beauty"  # beauty, sports, toys, made-up, lists:PATH or csv:PATH
    order: Order = "relative"  # all users at once, by turns, one after the other, or by the file's times
    batch: int = 256  # events per step
    longest: int = 50  # items of a history; older ones are cut off
    segments: int = 10  # parts of the stream, each with a probe on which forgetting is measured
    probe: int = 1000  # scored events of each part that are asked again later
    subset: int = 100  # of them in the small evaluations
    protocol: Literal["stream", "offline"] = "stream"  # each event once, or passes over training samples
    passes: int = 1  # of the offline protocol
    patience: int = 0  # passes in a row that validate no better and are borne; one more ends the run; 0: all are made

    def __post_init__(self) -> None:
        at_least(self, batch=1, longest=1, segments=1, probe=1, subset=1, passes=1, patience=0)
        if self.protocol == "stream" and self.passes > 1:
            raise BadConfig("stream.passes needs --set stream.protocol=offline; a stream shows each event once")
        if self.protocol == "stream" and self.patience:
            raise BadConfig(
                f"stream.patience is {self.patience}, but a stream has no passes and no validation; add --set "
                "stream.protocol=offline --set stream.passes=100, or leave it out"
            )


class Events:
    """Events of the interactions as batches, gathered on the device."""

    def __init__(self, data: Interactions, longest: int, device: torch.device) -> None:
        self.longest = longest
        self.flat = torch.as_tensor(np.append(data.items, 0), device=device).to(torch.int32)  # [N + 1]
        self.starts = torch.as_tensor(
            np.insert(data.starts, 0, len(data.items)), device=device
        )  # [U + 1], user 0: the 0
        self.span = torch.arange(longest, device=device)

    def gather(self, user: torch.Tensor, position: torch.Tensor) -> Batch:
        """The batch of these events.    Shapes: user and position [R, B]."""
        start = self.starts[user]
        first = (position - self.longest).clamp(min=0)
        length = position - first
        place = (start + first)[..., None] + self.span  # [R, B, longest]
        items = self.flat[place.clamp(max=len(self.flat) - 1)].masked_fill(self.span >= length[..., None], 0)
        target = self.flat[start + position]
        return {"user": user, "position": position, "items": items, "length": length.short(), "target": target}


class Probes:
    """Fixed events that are asked again and again, in named splits.    Shapes: user and position [R, S, P]."""

    def __init__(
        self, events: Events, names: Sequence[str], since: Sequence[int], user: Ints, position: Ints, few: int
    ):
        self.names, self.since, self.events, self.few = names, np.asarray(since), events, few
        self.user, self.position = (torch.as_tensor(part, device=events.span.device) for part in (user, position))

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """All events, later splits included (for forward transfer), or a few of each split that counts by then."""
        splits = torch.as_tensor(np.flatnonzero((self.since <= step) | full), device=self.user.device)
        if not len(splits):
            return
        user, position = (part[:, splits, : None if full else self.few] for part in (self.user, self.position))
        split = splits[None, :, None].expand_as(user)
        for part in zip(*(torch.split(x.flatten(1), CHUNK, 1) for x in (user, position, split)), strict=True):
            yield {**self.events.gather(part[0], part[1]), "split": part[2]}


class Sequences:
    """Events in a fixed order, the same for every run; no strategy hears of the segments.

    Shapes: batches have user, position, length, target [R, B] and items [R, B, longest], zeros on the right.
    """

    Config = SequencesConfig
    task = "rank"
    announces = False

    def __init__(
        self, cfg: SequencesConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        self.data, self.cfg, self.seeds, self.device = load(cfg.data, data), cfg, seeds, device
        self.classes, self.digest, self.batch_size = self.data.catalogue + 1, self.data.digest, cfg.batch
        self.events = Events(self.data, cfg.longest, device)
        self.fields: Mapping[str, Field] = {
            "user": Field((), INT),
            "position": Field((), INT),
            "items": Field((cfg.longest,), torch.int32),
            "length": Field((), torch.int16),
            "target": Field((), torch.int32),
        }
        offline = cfg.protocol == "offline"
        user, position = training_events(self.data) if offline else in_order(self.data, cfg.order)
        if not len(user):
            raise BadConfig("stream.protocol is 'offline', but no user has the three items that it needs")
        self.user, self.position, self.shuffled = user, position, offline or iid
        self.per_pass = -(-len(user) // cfg.batch)  # steps
        self.steps = self.per_pass * (cfg.passes if offline else 1)
        self.samples = self.steps * cfg.batch  # the filling of the last batch included
        self.kept, self.of_pass = self._pass_on_device(0), 0  # the pass in use
        self._holdout = self._left_out() if offline else self._probes()
        self.selection = Selection("mrr10", 0, 1, cfg.patience) if offline else None

    def __len__(self) -> int:
        return self.steps

    def batch(self, step: int) -> Batch:
        """The events of one step."""
        number, within = divmod(step, self.per_pass)
        if self.of_pass != number:
            self.kept, self.of_pass = self._pass_on_device(number), number
        part = slice(within * self.batch_size, (within + 1) * self.batch_size)
        user, position = (events[:, part] for events in self.kept)
        return self.events.gather(user, position)

    def _pass_on_device(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        user, position = (torch.as_tensor(part, device=self.device) for part in self._pass(number))
        return user, position

    def _pass(self, number: int) -> tuple[Ints, Ints]:
        """Users and positions of all steps of a pass, filled up with zeros.    Shapes: -> [R, steps * B] both."""
        filling = self.per_pass * self.batch_size - len(self.user)
        whole = np.pad(np.stack([self.user, self.position]), ((0, 0), (0, filling)))
        if not self.shuffled:
            user, position = np.broadcast_to(whole[:, None], (2, len(self.seeds), whole.shape[1]))
            return user.copy(), position.copy()
        for_each = [host_rng(seed, f"events of pass {number}").permutation(len(self.user)) for seed in self.seeds]
        whole = np.stack([np.concatenate([whole[:, row], whole[:, len(row) :]], 1) for row in for_each], 1)
        return whole[0], whole[1]

    def _probes(self) -> Probes:
        """For every segment some of its scored events, chosen once."""
        user, position = self._pass(0)
        ends = segment_ends((position[0] > 0).reshape(self.steps, -1).sum(1), self.cfg.segments)
        bounds = [0, *((end + 1) * self.batch_size for end in ends)]
        pools = [[start + np.flatnonzero(row[start:end]) for start, end in pairwise(bounds)] for row in position]
        size = min(self.cfg.probe, *(len(pool) for of_run in pools for pool in of_run))
        rng = [host_rng(0, "probes") for _ in self.seeds]  # the same events for every run whose order is the same
        chosen = np.stack(
            [[one.permutation(pool)[:size] for pool in of_run] for one, of_run in zip(rng, pools, strict=True)]
        )  # [R, S, P]
        run = np.arange(len(self.seeds))[:, None, None]
        names = [f"segment {number + 1}" for number in range(len(ends))]
        return Probes(self.events, names, ends, user[run, chosen], position[run, chosen], self.cfg.subset)

    def _left_out(self) -> Probes:
        """The last item of every user for the test, which never counts as seen, and the one before it for validation."""
        fit = np.flatnonzero(self.data.lengths >= 3)
        user = np.stack([fit + 1, fit + 1])
        position = np.stack([self.data.lengths[fit] - 2, self.data.lengths[fit] - 1])
        shape = (len(self.seeds), *user.shape)
        return Probes(
            self.events,
            ("validation", "test"),
            (0, self.steps),
            np.broadcast_to(user, shape).copy(),
            np.broadcast_to(position, shape).copy(),
            self.cfg.subset,
        )

    def ends_task(self, step: int) -> bool:
        """Is this the last step of a segment, or of a pass?"""
        if self.cfg.protocol == "offline":
            return (step + 1) % self.per_pass == 0
        return step in self._holdout.since

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which probes count after this step.    Shapes: -> [R, S]."""
        return np.tile(self._holdout.since <= step, (len(self.seeds), 1))

    def holdout(self) -> Probes:
        """The probes; offline, the validation and test items."""
        return self._holdout

    def describe(self) -> dict[str, Any]:
        """Counts and choices worth printing."""
        return {
            "data": self.data.name,
            "digest": self.digest,
            "users": self.data.users,
            "items": self.data.catalogue,
            "interactions": len(self.data.items),
            "events": len(self.user),
            "scored": int((self.position > 0).sum()),
            "new targets": f"{self.new_targets():.1%} of the scored",
            "steps": self.steps,
            "batch": self.batch_size,
            "segment ends": [step for step in self._holdout.since.tolist() if self.cfg.protocol == "stream"],
        }

    def new_targets(self) -> float:
        """Share of scored events whose target has not come in an earlier batch, in the order as it is."""
        target = self.data.items[self.data.starts[self.user - 1] + self.position]
        batch = np.arange(len(target)) // self.batch_size
        _, first, which = np.unique(target, return_index=True, return_inverse=True)
        return float((batch[first][which] == batch)[self.position > 0].mean())


def segment_ends(scored: Ints, segments: int) -> list[int]:
    """The last step of each segment; segments hold equally many scored events, to a step.    Shapes: scored [steps] counts.

    Raises: BadConfig if that leaves a segment without one.
    """
    so_far = np.cumsum(scored)
    wanted = so_far[-1] * np.arange(1, segments + 1) / segments
    ends = np.searchsorted(so_far, wanted)
    ends[-1] = len(scored) - 1
    if (np.diff(so_far[ends], prepend=0) < 1).any():
        raise BadConfig(
            f"stream.segments is {segments}, but the stream's {len(scored)} steps with {so_far[-1]} scored events do not "
            "fall into so many; use fewer segments, or a smaller stream.batch"
        )
    return [int(end) for end in ends]


def in_order(data: Interactions, order: Order) -> tuple[Ints, Ints]:
    """User (from 1) and position (from 0) of every event; equal keys by user, then position.    Shapes: -> [N] both.

    `relative`: by (k + 1) / (n + 1), everyone is active all the time. `round`: by k, all first items, then all second ones.
    `staggered`: users arrive one after the other, each active for a tenth of the stream. `time`: by the file's times.

    Raises: BadConfig for `time` without times.
    """
    user = np.repeat(np.arange(data.users), data.lengths)
    position = np.arange(len(user)) - data.starts[user]
    length = data.lengths[user]
    if order == "time":
        if data.moments is None:
            raise BadConfig(f"stream.order is 'time', but {data.name} has no times; use relative, round or staggered")
        key = data.moments
    elif order == "relative":
        key = (position + 1) / (length + 1)
    elif order == "staggered":
        key = user / data.users + 0.1 * position / length
    else:
        key = position.astype(np.float64)
    by_key = np.lexsort((position, user, key))
    return user[by_key] + 1, position[by_key]


def training_events(data: Interactions) -> tuple[Ints, Ints]:
    """User and position of every training sample of leave-one-out: all targets but each user's first and last two."""
    user = np.repeat(np.arange(data.users), data.lengths)
    position = np.arange(len(user)) - data.starts[user]
    kept = (position > 0) & (position < data.lengths[user] - 2)
    return user[kept] + 1, position[kept]
