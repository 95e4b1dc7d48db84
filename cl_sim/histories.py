"""Edits of item histories: crop, mask and reorder, each history with a draw of its own from the counter RNG.

A history is a row of N item numbers, padded with zeros on the right, and its length L. Each edit is a `draw_...` (random
numbers only) and an `apply_...` (no random numbers); the shapes do not depend on what is drawn.

Source: Qin et al. 2023, "Meta-optimized Contrastive Learning for Sequential Recommendation", as released.
Departures: an edit by itself leaves a history of one item as it is, which the published code does when it pairs edits; a
crop keeps at least one item.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cl_sim.rng import Rng

CROP, MASK, REORDER = range(3)
PADDING = 0  # item number of an empty or hidden place


class History(NamedTuple):
    """Item numbers, oldest first, and how many there are.    Shapes: items [R, B, N], length [R, B]."""

    items: Tensor
    length: Tensor


def share(length: Tensor, ratio: float) -> Tensor:
    """Items that an edit concerns: floor(ratio * L), 0 for a history of one item.    Shapes: any -> same, int64."""
    part = (length.double() * ratio).floor().long()
    return part.masked_fill(length < 2, 0)


def kept(length: Tensor, ratio: float) -> Tensor:
    """Items that a crop leaves: floor(ratio * L), but at least one of those there are.    Shapes: any -> same, int64."""
    return share(length, ratio).clamp(min=1).minimum(length.long())


def draw_crop(rng: Rng, length: Tensor, ratio: float = 0.5) -> Tensor:
    """First item that is kept, uniform in 0..L - floor(ratio * L).    Shapes: length [R, B] -> [R, B]."""
    return rng.below(length - kept(length, ratio) + 1, length.shape[1])


def apply_crop(history: History, start: Tensor, ratio: float = 0.5) -> History:
    """Keep the items from `start` on, at the left end.    Shapes: start [R, B]."""
    items, length = history
    left = kept(length, ratio)
    place = _places(items)
    source = (place + start[..., None]).clamp(max=items.shape[-1] - 1)
    moved = items.gather(-1, source).masked_fill(place >= left[..., None], PADDING)
    return History(moved, left.to(length.dtype))


def crop(history: History, rng: Rng, ratio: float = 0.5) -> History:
    """Keep a random stretch of floor(ratio * L) items."""
    return apply_crop(history, draw_crop(rng, history.length, ratio), ratio)


def draw_mask(rng: Rng, length: Tensor, size: int, ratio: float = 0.5) -> Tensor:
    """Which places are hidden: floor(ratio * L) different ones.    Shapes: length [R, B] -> [R, B, N] bool."""
    order = _shuffled(rng, torch.arange(size, device=length.device) < length[..., None])
    return order.argsort(-1) < share(length, ratio)[..., None]


def apply_mask(history: History, hidden: Tensor) -> History:
    """Put item 0 at the hidden places; the length stays.    Shapes: hidden [R, B, N] bool."""
    return History(history.items.masked_fill(hidden, PADDING), history.length)


def mask(history: History, rng: Rng, ratio: float = 0.5) -> History:
    """Hide floor(ratio * L) random items."""
    return apply_mask(history, draw_mask(rng, history.length, history.items.shape[-1], ratio))


def draw_reorder(rng: Rng, length: Tensor, size: int, ratio: float = 0.8) -> Tensor:
    """Where each place takes its item from: a random stretch of floor(ratio * L) items is permuted.

    Shapes: length [R, B] -> [R, B, N].
    """
    moved = share(length, ratio)
    start = rng.below(length - moved + 1, length.shape[1])[..., None]  # [R, B, 1]
    place = torch.arange(size, device=length.device)
    inside = (place >= start) & (place < start + moved[..., None])
    order = _shuffled(rng, inside)  # the places of the stretch first, in random order
    return torch.where(inside, order.gather(-1, (place - start).clamp(min=0)), place)


def apply_reorder(history: History, source: Tensor) -> History:
    """Take each item from its source.    Shapes: source [R, B, N]."""
    return History(history.items.gather(-1, source), history.length)


def reorder(history: History, rng: Rng, ratio: float = 0.8) -> History:
    """Permute a random stretch of floor(ratio * L) items."""
    return apply_reorder(history, draw_reorder(rng, history.length, history.items.shape[-1], ratio))


def draw_edits(rng: Rng, batch: int) -> Tensor:
    """The edit of each of two views, never the same one: the six ordered pairs are equally likely.    Shapes: -> [R, B, 2]."""
    first = rng.below(3, batch)
    return torch.stack([first, (first + 1 + rng.below(2, batch)) % 3], -1)


def two_views(
    history: History, rng: Rng, crop_ratio: float = 0.5, mask_ratio: float = 0.5, reorder_ratio: float = 0.8
) -> tuple[History, History]:
    """Two views of each history by two different edits; a history of one item is both views.

    One draw of each edit serves both views, since no edit comes twice.
    """
    edits = draw_edits(rng, history.length.shape[1])
    made = (crop(history, rng, crop_ratio), mask(history, rng, mask_ratio), reorder(history, rng, reorder_ratio))
    return _chosen(made, edits[..., 0]), _chosen(made, edits[..., 1])


def _chosen(made: tuple[History, History, History], edit: Tensor) -> History:
    """Of three edited histories, the one asked for in each row.    Shapes: edit [R, B]."""
    items, length = made[CROP]
    for number in (MASK, REORDER):
        taken = edit == number
        items = torch.where(taken[..., None], made[number].items, items)
        length = torch.where(taken, made[number].length, length)
    return History(items, length)


def _places(items: Tensor) -> Tensor:
    return torch.arange(items.shape[-1], device=items.device).expand(items.shape)


def _shuffled(rng: Rng, allowed: Tensor) -> Tensor:
    """The allowed places in random order, then the others.    Shapes: [R, B, N] bool -> [R, B, N]."""
    priority = (rng.bits(*allowed.shape[1:]) >> 1) & ((1 << 62) - 1)
    return torch.where(allowed, priority, 1 << 62).argsort(-1)
