"""The online tracker: link the candidates of each frame to the tracks of the frames before, without looking ahead.

Source: Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", as released (its tracker follows
IDOL, Wu et al. 2022).
Departures: candidates of equal score are taken in a hashed order, because the order of rows may give identities away; the filter
of short tracks is off unless asked for, because with given boxes it would delete true ones; slots are limited, and the
track unseen for longest makes room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_sim.config import at_least, within
from cl_sim.errors import BadConfig
from cl_sim.memory.tracks import Readout, Tracks, ageing, bi_softmax, clear, cosine, empty, store
from cl_sim.rng import GOLDEN, MIX_1, mixed, shift_right

ESTABLISHED = 3  # observations after which a track may be swapped by force
TRAILING = 2  # frames unseen at the end that make a short track a false one
WARMUP = 8  # frame index above which short tracks are filtered
TINY = 1e-6  # added to intersection and union of masks


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Settings of the online tracker."""

    readout: Readout = "similarity"  # what a track offers for matching
    likeness: Literal["bi_softmax", "cosine"] = "bi_softmax"  # how candidates and tracks are compared
    threshold: float = 0.3  # likeness above which a candidate is linked
    min_cosine: float = -1.0  # cosine below which a candidate is never linked; -1: no such gate (ours)
    frame_weighting: bool = True  # prefer tracks with more observations among those above the threshold
    min_score: float = 0.01  # candidates with a lower score start no track
    suppress: float = 0.6  # overlap above which the worse of two candidates is dropped; 1: never
    history: int = 10  # vectors stored per track
    max_age: int = 20  # frames a track lives on unseen
    slots: int = 64  # tracks held at once
    drop_short: bool = False  # drop tracks of fewer than 3 observations that have gone, after 8 frames

    def __post_init__(self) -> None:
        at_least(self, history=1, max_age=0, slots=1)
        within(self, 0, 1, "threshold", "min_score", "suppress")
        within(self, -1, 1, "min_cosine")


def order_of(scores: Tensor, valid: Tensor, tie: Tensor) -> Tensor:
    """Candidates by falling score, equal ones by rising `tie`, invalid ones last.    Shapes: each [N] -> [N] int64."""
    first = tie.argsort(stable=True)
    return first[scores.masked_fill(~valid, -torch.inf)[first].argsort(descending=True, stable=True)]


def hashed(clip: Tensor, frames: int, rows: int) -> Tensor:
    """Numbers in [0, 2^63) that depend on clip, frame and row alone.    Shapes: clip [] int64 -> [T, Q] int64."""
    index = torch.arange(1, frames * rows + 1, device=clip.device).view(frames, rows)
    return shift_right(mixed(index * GOLDEN + clip * MIX_1), 1)


def suppress(overlap: Tensor, order: Tensor, valid: Tensor, limit: float) -> Tensor:
    """Which candidates remain when each, best first, removes the worse ones that overlap it by more than the limit.

    Shapes: overlap [N, N], order [N], valid [N] bool -> [N] bool.
    """
    kept = valid
    place = order.argsort()  # of each candidate in the order
    for k in range(len(order)):
        one = order[k]
        beaten = (overlap[one] > limit) & (place > k) & kept[one]
        kept = kept & ~beaten
    return kept


def mask_overlap(masks: Tensor) -> Tensor:
    """How much every two masks of one frame overlap.    Shapes: [N, H, W] -> [N, N]."""
    return overlap_of(masks, masks)


def overlap_of(masks: Tensor, others: Tensor) -> Tensor:
    """Intersection over union, 1e-6 added to both; 0 if both masks are empty.    Shapes: [N, H, W], [K, H, W] -> [N, K]."""
    one, other = masks.flatten(1).float(), others.flatten(1).float()
    both = one @ other.T
    union = one.sum(1)[:, None] + other.sum(1) - both
    return torch.where(union > 0, (both + TINY) / (union + TINY), 0)


def select(tracks: Tracks, candidates: Tensor, order: Tensor, valid: Tensor, cfg: TrackerConfig) -> Tensor:
    """The slot of the track that each candidate continues, -1 for none, greedily in the given order.

    Shapes: candidates [N, D], order [N], valid [N] -> [N] int64.
    """
    offered, alive = tracks.read(cfg.readout), tracks.alive
    compare = bi_softmax if cfg.likeness == "bi_softmax" else cosine
    likeness = compare(candidates, offered, valid, alive).masked_fill(~alive, -1)
    if cfg.min_cosine > -1:
        likeness = likeness.masked_fill(cosine(candidates, offered) < cfg.min_cosine, -1)
    ranked, counted = likeness[order], valid[order]
    count, slot = tracks.seen.to(likeness.dtype), torch.arange(len(alive), device=order.device)
    taken, chosen = torch.zeros_like(alive), []
    for k in range(len(order)):
        row = ranked[k].masked_fill(taken, 0)
        near = row > cfg.threshold
        if cfg.frame_weighting:
            many = near.sum()
            mean = (count * near).sum() / many.clamp(min=1)
            weighted = row * torch.where(near, count, mean)
            best = torch.where(many > 1, weighted, row).argmax()
        else:
            best = row.argmax()
        linked = counted[k] & (near & (slot == best)).any()
        taken = taken | ((slot == best) & linked)
        chosen.append(torch.where(linked, best, -1))
    return torch.stack(chosen)[order.argsort()]


def advance(
    tracks: Tracks,
    candidates: Tensor,
    scores: Tensor,
    valid: Tensor,
    tie: Tensor,
    cfg: TrackerConfig,
    swap: Tensor | None = None,
) -> tuple[Tracks, Tensor, Tensor]:
    """One frame: link, start tracks, store, age. With `swap`, the ids of two established tracks are exchanged for this frame.

    Shapes: candidates [N, D], scores, valid, tie [N], swap [] bool -> tracks, ids [N] (-1: none), swapped [N] bool.
    """
    order = order_of(scores, valid, tie)
    able = valid & (scores > cfg.min_score)
    lone = valid & ~able.any() & (order.argsort() == 0)  # nothing is good enough: keep the best
    slot = select(tracks, candidates, order, able | lone, cfg)  # [N]
    if swap is None:
        swapped = torch.zeros_like(valid)
    else:
        slot, swapped = _exchange(tracks, slot, swap)
    born = able & (slot < 0)
    place = order.argsort()
    number = (born[order].cumsum(0) - 1)[place]  # from 0, best first
    used = (slot[:, None] == torch.arange(len(tracks.id), device=slot.device)).any(0)  # [M]
    room = torch.where(tracks.alive, tracks.age, torch.iinfo(torch.int64).max).masked_fill(used, -1)
    places = room.argsort(descending=True, stable=True)
    slot = torch.where(born, places[number.clamp(min=0, max=len(places) - 1)], slot)
    hit = slot[:, None] == torch.arange(len(tracks.id), device=slot.device)  # [N, M]
    fresh, observed = (hit & born[:, None]).any(0), hit.any(0)
    tracks = clear(tracks, fresh)
    whose = hit.int().argmax(0)  # [M]
    new_ids = tracks.given + number[whose]
    tracks = tracks._replace(id=torch.where(fresh, new_ids, tracks.id), given=tracks.given + born.sum())
    tracks = store(tracks, observed, candidates[whose], scores[whose].to(tracks.scores.dtype))
    ids = torch.where(slot >= 0, tracks.id[slot.clamp(min=0)], -1)
    older, lives = ageing(tracks.age, observed, cfg.max_age)
    tracks = tracks._replace(age=older)
    return clear(tracks, ~lives), ids, swapped


def _exchange(tracks: Tracks, slot: Tensor, swap: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange the slots of the two linked candidates with most observations.    Shapes: slot [N] -> [N], [N] bool."""
    if len(slot) < 2:
        return slot, torch.zeros_like(slot, dtype=torch.bool)
    count = torch.where(slot >= 0, tracks.seen[slot.clamp(min=0)], -1)
    best = count.topk(2)
    done = swap & (best.values[1] >= ESTABLISHED)
    one, two = (torch.arange(len(slot), device=slot.device) == best.indices[k] for k in (0, 1))
    exchanged = torch.where(one, slot[best.indices[1]], torch.where(two, slot[best.indices[0]], slot))
    return torch.where(done, exchanged, slot), (one | two) & done


def follow(
    emb: Tensor, scores: Tensor, valid: Tensor, tie: Tensor, cfg: TrackerConfig, swap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Track one video from its first frame: the id of every candidate, -1 for none.

    With `swap`, two established tracks are exchanged once, in the first frame of the second half that has two.

    Shapes: emb [T, N, D], scores, valid, tie [T, N], swap [] bool -> ids [T, N] int64, swapped [T, N] bool.
    Raises: BadConfig if a frame has more candidates than there are slots.
    """
    if valid.shape[1] > cfg.slots:
        raise BadConfig(
            f"slots is {cfg.slots}, but a frame has {valid.shape[1]} candidates; "
            f"use --set strategy.slots={valid.shape[1]} or more"
        )
    tracks = empty(cfg.slots, cfg.history, emb)
    ids, swaps = [], []
    due = swap
    for t in range(len(emb)):
        now = None if due is None or t < len(emb) // 2 else due
        tracks, named, swapped = advance(tracks, emb[t], scores[t], valid[t], tie[t], cfg, now)
        due = None if due is None else due & ~swapped.any()
        ids.append(named)
        swaps.append(swapped)
    whole = torch.stack(ids)
    return (without_short(whole) if cfg.drop_short else whole), torch.stack(swaps)


def without_short(ids: Tensor) -> Tensor:
    """Ids less those of short tracks: from frame 9 on, fewer than 3 observations so far and unseen for 2 frames or more.

    A track that comes back later is kept from there on.    Shapes: [T, N] int64 -> same.
    """
    frames = len(ids)
    time = torch.arange(frames, device=ids.device)[:, None].expand_as(ids).flatten()
    flat = ids.flatten()
    same = (flat[:, None] == flat) & (flat >= 0)  # [T * N, T * N]
    kept = flat >= 0
    for t in range(WARMUP + 1, frames):
        so_far = kept & (time <= t)
        together = same & so_far
        many = together.sum(1)
        newest = torch.where(together, time, -1).amax(1)
        kept = kept & ~(so_far & (many < 3) & (t - newest >= TRAILING))
    return torch.where(kept, flat, -1).view_as(ids)
