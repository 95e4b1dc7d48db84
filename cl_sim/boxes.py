"""Boxes and masks of instances: the box of a mask, overlaps, boxes beside the instances, a detector's errors.

Boxes are x0, y0, x1, y1 in pixels; the pixels inside are x0 <= x < x1, y0 <= y < y1. A box of no area is no box.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cl_sim.constants import constant
from cl_sim.rng import Rng

TRIES = 4  # boxes drawn for each one wanted beside the instances
BESIDE = 0.1  # overlap below which a box counts as background
JITTER, MISSED, FALSE, DOUBLE = 1.0, 0.05, 0.05, 0.05  # a usual detector: pixels, then probabilities


class Candidates(NamedTuple):
    """The rows of frames: what a detector offers, and boxes of background.

    `present` rows are offered: an instance, or with instance -1 an error. Rows that are not present but have a box are
    background; all others are filling.

    Shapes: boxes [N, T, Q, 4] float32, masks [N, T, Q, H, W] bool, instance and label [N, T, Q] int64 (-1: none), present
    [N, T, Q] bool, score [N, T, Q] float32.
    """

    boxes: Tensor
    masks: Tensor
    instance: Tensor
    label: Tensor
    present: Tensor
    score: Tensor


def of_masks(masks: Tensor) -> Tensor:
    """The smallest box around each mask; zeros around an empty one.    Shapes: masks [..., H, W] bool -> [..., 4] float32."""
    ends = []
    for side in (-2, -1):  # columns, then rows
        line = masks.any(side)
        size = line.shape[-1]
        place = torch.arange(size, device=masks.device)
        first = torch.where(line, place, size).amin(-1)
        last = torch.where(line, place + 1, 0).amax(-1)
        ends.append((torch.minimum(first, last), last))
    (x0, x1), (y0, y1) = ends
    return torch.stack([x0, y0, x1, y1], -1).float()


def fill(boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks of the pixels whose centre is inside each box.    Shapes: boxes [..., 4] -> [..., H, W] bool."""
    x0, y0, x1, y1 = boxes[..., None, None].unbind(-3)
    x, y = (torch.arange(size, device=boxes.device) + 0.5 for size in (width, height))
    return (x >= x0) & (x < x1) & (y[:, None] >= y0) & (y[:, None] < y1)


def overlap(one: Tensor, two: Tensor) -> Tensor:
    """Intersection over union of every box with every other.    Shapes: [..., M, 4], [..., N, 4] -> [..., M, N]."""
    one, two = one[..., :, None, :], two[..., None, :, :]
    sides = torch.minimum(one[..., 2:], two[..., 2:]) - torch.maximum(one[..., :2], two[..., :2])
    inside = sides.clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (one, two)]
    union = areas[0] + areas[1] - inside
    return torch.where(union > 0, inside / union.clamp(min=1e-9), 0.0)


def beside(rng: Rng, boxes: Tensor, count: int, size: Tensor, height: int, width: int) -> Tensor:
    """Random boxes that hardly overlap the given ones; zeros where too few were found.

    `size` is their usual side in pixels; sides vary from 0.7 to 1.3 times that.

    Shapes: boxes [N, T, G, 4], size [N] -> [N, T, count, 4].
    """
    if count == 0:
        return boxes[:, :, :0]
    frames, tries = boxes.shape[1], TRIES * count
    u = rng.uniform(frames, tries, 4)
    sides = size[:, None, None, None] * (0.7 + 0.6 * u[..., :2])
    room = constant((width, height), boxes.device, torch.int64) - sides
    corner = u[..., 2:] * room.clamp(min=0)
    drawn = torch.cat([corner, corner + sides], -1)
    free = (overlap(drawn, boxes) < BESIDE).all(-1) & (room >= 0).all(-1)  # [N, T, tries]
    first = (~free).byte().argsort(dim=-1, stable=True)[..., :count]
    taken = drawn.gather(2, first[..., None].expand(-1, -1, -1, 4))
    return taken * free.gather(2, first)[..., None]


def rows(boxes: Tensor, masks: Tensor, label: Tensor, present: Tensor, background: Tensor) -> Candidates:
    """Instances as rows 0 to G - 1, each always in its own row, then the boxes of background.

    Shapes: boxes [N, T, G, 4], masks [N, T, G, H, W], label [N, G], present [N, T, G], background [N, T, B, 4].
    """
    g, number = boxes.shape[2], background.shape[2]
    instance = torch.where(present, torch.arange(g, device=boxes.device), -1)
    none = torch.full_like(background[..., 0], -1, dtype=torch.int64)
    return Candidates(
        torch.cat([boxes * present[..., None], background], 2),
        torch.cat([masks & present[..., None, None], fill(background, *masks.shape[-2:])], 2),
        torch.cat([instance, none], 2),
        torch.cat([torch.where(present, label[:, None], -1), none], 2),
        torch.cat([present, torch.zeros_like(none, dtype=torch.bool)], 2),
        torch.cat([present.float(), background.new_zeros((*present.shape[:2], number))], 2),
    )


def detected(rng: Rng, true: Candidates, instances: int, scale: float) -> Candidates:
    """The rows as a detector with errors would offer them; 2 G rows are added.

    At scale 1, corners of boxes are off by 1 pixel (standard deviation), and 5 % each of the instances are missed, are
    offered twice (the double scores less and has no identity), or are joined by a false box elsewhere.

    Shapes: rows [N, T, Q, ...] -> [N, T, Q + 2 G, ...].    Source: ours.
    """
    n, t = true.present.shape[:2]
    height, width = true.masks.shape[-2:]
    own = slice(0, instances)
    u = rng.uniform(t, instances, 4)
    off = JITTER * scale * rng.normal(2, t, instances, 4)  # of the boxes, and of the doubles
    seen = true.present[:, :, own] & (u[..., 0] >= MISSED * scale)
    found = _moved(true.boxes[:, :, own], off[:, 0], height, width)
    twice = seen & (u[..., 1] < DOUBLE * scale)
    doubles = _moved(true.boxes[:, :, own], 2 * off[:, 1], height, width) * twice[..., None]
    side = torch.full((n,), max(height, width) / 4, device=true.boxes.device)
    elsewhere = beside(rng, true.boxes[:, :, own], instances, side, height, width)
    false = (u[..., 2] < FALSE * scale) & (elsewhere[..., 2] > 0)
    added = torch.cat([doubles, elsewhere * false[..., None]], 2)
    keep = torch.cat([seen, true.present[:, :, instances:]], 2)  # rows that stay what they were
    offered = torch.cat([twice, false], 2)
    masks = torch.cat([true.masks[:, :, own] & twice[..., None, None], fill(added[:, :, instances:], height, width)], 2)
    none = torch.full_like(offered, -1, dtype=torch.int64)
    hidden = torch.cat([seen, torch.ones_like(true.present[:, :, instances:])], 2)
    boxes = torch.cat([found * seen[..., None], true.boxes[:, :, instances:]], 2)
    score = torch.cat([0.7 + 0.3 * u[..., 3], torch.zeros_like(true.score[:, :, instances:])], 2) * keep
    second = torch.cat([0.3 + 0.3 * u[..., 3], 0.2 + 0.5 * u[..., 3]], 2) * offered
    return Candidates(
        torch.cat([boxes, added], 2),
        torch.cat([true.masks & hidden[..., None, None], masks], 2),
        torch.cat([torch.where(keep, true.instance, -1), none], 2),
        torch.cat([torch.where(keep, true.label, -1), none], 2),
        torch.cat([keep, offered], 2),
        torch.cat([score, second], 2),
    )


def _moved(boxes: Tensor, off: Tensor, height: int, width: int) -> Tensor:
    """Boxes with their corners moved, inside the picture, at least a pixel wide; no box stays none."""
    size = constant((width, height), boxes.device, torch.int64)
    low = torch.minimum((boxes[..., :2] + off[..., :2]).clamp(min=0), size - 1)
    high = torch.minimum(torch.maximum(boxes[..., 2:] + off[..., 2:], low + 1), size)
    return torch.cat([low, high], -1) * (boxes[..., 2:3] > boxes[..., :1])
