"""What a clip is to a contrast: who is where, which rows are background, and the items that compare them.

G instances of one clip of T frames with Q rows (candidates) each; D features. An item is an anchor, its positives and its
negatives; items that do not exist have empty masks, so that every clip has items of one shape.

Source: Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", and its code (MIT licence).
Departures: see `strategies/ctvis.py`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cl_sim.errors import BadConfig
from cl_sim.memory.tracks import noise, running_average
from cl_sim.types import Batch

Negatives = Literal["frame", "bank", "bank+background"]
NEGATIVES = ("frame", "bank", "bank+background")
NOBODY = torch.iinfo(torch.int64).max


class Items(NamedTuple):
    """Anchors with what they are compared to, in the order that `cl_sim.losses.bank_contrast` takes.

    Shapes: anchors [A, D], positives [A, P, D], negatives [A, N, D], masks [A, P] and [A, N] bool.
    """

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    positive_mask: Tensor
    negative_mask: Tensor

    def joined(self, other: Items) -> Items:
        """The items of both, padded to the same numbers of positives and negatives."""
        p = max(self.positives.shape[1], other.positives.shape[1])
        n = max(self.negatives.shape[1], other.negatives.shape[1])
        pairs = zip(self.padded(p, n), other.padded(p, n), strict=True)
        return Items(*(torch.cat(pair) for pair in pairs))

    def padded(self, positives: int, negatives: int) -> Items:
        """The same items with room for so many positives and negatives."""
        pad = torch.nn.functional.pad
        p, n = positives - self.positives.shape[1], negatives - self.negatives.shape[1]
        return Items(
            self.anchors,
            pad(self.positives, (0, 0, 0, p)),
            pad(self.negatives, (0, 0, 0, n)),
            pad(self.positive_mask, (0, p)),
            pad(self.negative_mask, (0, n)),
        )


class Roll(NamedTuple):
    """Who is where in a clip.

    Shapes: present [G, T] bool, match [G, T] int64 (the row of each instance), rows and background [T, Q] bool (which rows
    are candidates at all, and which of these show no instance), lost [] (instances that found no place among the G).
    """

    present: Tensor
    match: Tensor
    rows: Tensor
    background: Tensor
    lost: Tensor


def visible(batch: Batch) -> Tensor:
    """Which rows show an instance.    Shapes: keys instance and present [..., T, Q] -> [..., T, Q] bool."""
    return batch["present"] & (batch["instance"] >= 0)


def backgrounds(batch: Batch) -> Tensor:
    """Which rows are boxes without an instance.    Shapes: keys boxes [..., T, Q, 4] and instance -> [..., T, Q] bool."""
    x0, y0, x1, y1 = batch["boxes"].unbind(-1)
    return (batch["instance"] < 0) & (x1 > x0) & (y1 > y0)


def roll(instance: Tensor, shown: Tensor, background: Tensor) -> Roll:
    """The roll of a clip, instances in the order of their numbers; there is room for as many as a frame has rows.

    Shapes: instance [T, Q] int64, shown and background [T, Q] bool.
    """
    rows = instance.shape[1]
    known = torch.where(shown, instance, NOBODY)
    ordered = known.flatten().sort().values
    first = torch.cat([torch.ones_like(ordered[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]])
    first = first & (ordered != NOBODY)
    place = torch.where(first, first.cumsum(0) - 1, rows).clamp(max=rows)  # of each number; `rows`: nowhere
    spread = (place[:, None] == torch.arange(rows, device=instance.device)) & first[:, None]  # [T * Q, G]
    numbers = torch.where(spread, ordered[:, None], -1).amax(0)  # [G]
    hit = (known == numbers[:, None, None]) & (numbers >= 0)[:, None, None]  # [G, T, Q]
    lost = (first.sum() - spread.sum()).clamp(min=0)
    return Roll(hit.any(2), hit.int().argmax(2), shown | background, background, lost)


def clip_items(
    emb: Tensor,
    present: Tensor,
    match: Tensor,
    negatives: str = "bank+background",
    p_average: float = 0.5,
    *,
    coins: Tensor | None = None,
    rows: Tensor | None = None,
    wrong: Tensor | None = None,
    max_background: int = 0,
    bidirectional: bool = False,
    detach_weights: bool = False,
    strict_reference: bool = False,
) -> Items:
    """The items of a clip against the bank that a tracker would have built from its earlier frames.

    Anchors are the instances of frames 1, 2, ... frame by frame; A = (T - 1) * G. The positive is the running average of the
    instance's earlier frames with probability `p_average`, else its newest earlier observation; without an earlier one its first
    later one. Negatives are by rule: `frame`, the other rows of the frame before; `bank`, the averages of the other stored
    instances; `bank+background`, these and the rows of the frame before that show no instance.

    `coins` are uniform numbers for p_average (none: drawn from torch's generator if p_average is between 0 and 1). `rows` says
    which rows exist (none: all). `wrong` are rows to be stored instead of an instance's own, -1 for none (see `wrong_rows`).
    `max_background` caps the background rows of an item (0: all). `bidirectional` adds items whose anchor is the average.
    `detach_weights` stops gradients through the weights of averages. `strict_reference` drops the items that the released code
    drops: those without an earlier observation whose frames of absence afterwards number t.

    Shapes: emb [T, Q, D], present and match [G, T], coins and wrong [G, T], rows [T, Q].
    Raises: BadConfig for an unknown rule.
    """
    rule = negatives.replace("_", "+")
    if rule not in NEGATIVES:
        raise BadConfig(f"negatives is '{negatives}'; allowed are {', '.join(NEGATIVES)}")
    frames, width, _ = emb.shape
    time, row = (torch.arange(n, device=emb.device) for n in (frames, width))
    match = torch.where(present, match, 0)
    own = emb[time, match]  # [G, T, D]
    exists = torch.ones(frames, width, dtype=torch.bool, device=emb.device) if rows is None else rows
    is_own = present[..., None] & (match[..., None] == row)  # [G, T, Q]
    averages, stored = _averages(emb, own, present, wrong, detach_weights)  # [G, T, D], [G, T]
    earlier, later = (_nearest(present, time, before) for before in (True, False))  # [G, T]; -1: none
    had, comes = earlier >= 0, later >= 0
    if strict_reference:
        comes = comes & (_absent_after(present) != time)
    if 0 < p_average < 1:
        heads = (torch.rand(present.shape, device=emb.device) if coins is None else coins) < p_average
    else:
        heads = torch.full_like(present, p_average >= 1)
    before = averages.roll(1, 1)  # entry t: the average after frame t - 1
    reference = torch.where(had, earlier, later).clamp(min=0)[..., None].expand_as(own)
    positive = torch.where((heads & had)[..., None], before, own.gather(1, reference))
    taken, held = [], []
    if rule == "frame":
        taken.append(emb.roll(1, 0).expand(len(present), -1, -1, -1))  # [G, T, Q, D]
        held.append(exists.roll(1, 0) & ~is_own.roll(1, 1))
    else:
        other = ~torch.eye(len(present), dtype=torch.bool, device=emb.device)  # [G, G]
        taken.append(before.transpose(0, 1).expand(len(present), -1, -1, -1))  # [G, T, G, D]
        held.append(other[:, None] & stored.roll(1, 1).T[None])
    if rule == "bank+background":
        empty_rows = exists & ~is_own.any(0)
        if max_background:
            empty_rows = empty_rows & (empty_rows.cumsum(1) <= max_background)
        taken.append(emb.roll(1, 0).expand(len(present), -1, -1, -1))
        held.append(empty_rows.roll(1, 0).expand(len(present), -1, -1))
    items = _flat(own, positive, torch.cat(taken, 2), present & (had | comes), torch.cat(held, 2))
    if not bidirectional:
        return items
    now = emb.expand(len(present), -1, -1, -1)
    return items.joined(_flat(before, own, now, present & had, exists & ~is_own))


def _flat(anchor: Tensor, positive: Tensor, negatives: Tensor, counted: Tensor, held: Tensor) -> Items:
    """Items of frames 1 to T - 1, frame by frame.

    Shapes: anchor and positive [G, T, D], negatives [G, T, N, D], counted [G, T], held [G, T, N].
    """
    held = held & counted[..., None]
    by_frame = [x.transpose(0, 1)[1:].flatten(0, 1) for x in (anchor, positive, negatives, counted, held)]
    return Items(by_frame[0], by_frame[1][:, None], by_frame[2], by_frame[3][:, None], by_frame[4])


def _averages(emb: Tensor, own: Tensor, present: Tensor, wrong: Tensor | None, detach: bool) -> tuple[Tensor, Tensor]:
    """The running average of each instance after each frame, and whether there is one.    Shapes: -> [G, T, D], [G, T]."""
    frames = emb.shape[0]
    time = torch.arange(frames, device=emb.device)
    enters, seen = own, present
    if wrong is not None:
        enters = torch.where((wrong >= 0)[..., None], emb[time, wrong.clamp(min=0)], own)
        seen = present | (wrong >= 0)
    average, after = torch.zeros_like(own[:, 0]), []
    for t in range(frames):
        moved = running_average(average, enters, seen & (time < t), enters[:, t], detach)
        average = torch.where(seen[:, t, None], moved, average)
        after.append(average)
    return torch.stack(after, 1), seen.cumsum(1) > 0


def _nearest(present: Tensor, time: Tensor, before: bool) -> Tensor:
    """The newest earlier frame of each instance, or its first later one; -1 if there is none.    Shapes: [G, T] -> [G, T]."""
    frames = len(time)
    side = time < time[:, None] if before else time > time[:, None]  # [T, T]
    found = present[:, None] & side  # [G, T, T]
    if before:
        return torch.where(found, time, -1).amax(2)
    nearest = torch.where(found, time, frames).amin(2)
    return torch.where(nearest < frames, nearest, -1)


def _absent_after(present: Tensor) -> Tensor:
    """In how many later frames each instance is absent.    Shapes: [G, T] -> [G, T]."""
    absent = (~present).int()
    return absent.sum(1, keepdim=True) - absent.cumsum(1)


def wrong_rows(roll_of_clip: Roll, hit: Tensor, pick: Tensor, source: str = "any", on: str = "absent") -> Tensor:
    """Which rows enter the bank in place of an instance's own, -1 for none; never before its first true observation.

    `source` is what may enter: any other row of the frame, rows of instances, or background. With `on` absent only hidden
    instances are disturbed, with any also visible ones. `hit` says where noise is due, `pick` are uniform numbers.

    Shapes: hit bool and pick [G, T] -> [G, T] int64.
    """
    present, match, rows, background, _ = roll_of_clip
    is_own = present[..., None] & (match[..., None] == torch.arange(rows.shape[1], device=rows.device))
    kinds = {"any": rows, "instances": rows & ~background, "background": background}
    known = (present.cumsum(1) - present.long()) > 0  # truly observed before
    due = hit & known & (~present if on == "absent" else torch.ones_like(present))
    return noise(due, pick, kinds[source] & ~is_own)


def pair_items(emb: Tensor, roll_of_clip: Roll, keys: Tensor, references: Tensor) -> Items:
    """Items without a bank: each key frame's instances against the pooled rows of its reference frames.

    Positives are the instance's own rows there, negatives all other rows; A = K * G.

    Shapes: emb [T, Q, D], keys [K], references [K, L] frame numbers.
    """
    present, match, rows, _, _ = roll_of_clip
    time, row = (torch.arange(n, device=emb.device) for n in emb.shape[:2])
    own = emb[time, torch.where(present, match, 0)].transpose(0, 1)  # [T, G, D]
    is_own = (present[..., None] & (match[..., None] == row)).transpose(0, 1)  # [T, G, Q]
    there = present.T  # [T, G]
    anchors, counted = own[keys], there[keys]  # [K, G, D], [K, G]
    positives = own[references].transpose(1, 2)  # [K, G, L, D]
    positive_mask = there[references].transpose(1, 2) & counted[..., None]
    others = emb[references].flatten(1, 2)[:, None].expand(-1, len(present), -1, -1)  # [K, G, L * Q, D]
    free = rows[references][:, :, None] & ~is_own[references]  # [K, L, G, Q]
    negative_mask = free.transpose(1, 2).flatten(2) & counted[..., None]
    whole = (anchors, positives, others, positive_mask, negative_mask)
    return Items(*(part.flatten(0, 1) for part in whole))


def pairing(items: str, frames: int, order: Tensor) -> tuple[Tensor, Tensor]:
    """Key frames and their reference frames: one random pair, disjoint random pairs, neighbours, or one against all others.

    Shapes: order [T], a permutation of the frames -> [K], [K, L].
    """
    time = torch.arange(frames, device=order.device)
    if items == "pair":
        return order[:1], order[1:2, None]
    if items == "pairs":
        half = frames // 2
        return order[:half], order[half : 2 * half, None]
    if items == "adjacent":
        return time[1:], time[:-1, None]
    return order[:1], order[None, 1:]
