"""Strong views of images: three random operations out of fourteen, then a grey square; a whole batch at once on the device.

All operations work on bytes and equal Pillow's to the bit, so that the pool is the published one. They fall into four
families, and a pass over the batch does one of each: a table of 256 values per channel (seven operations), a blend with the
greys, a blend with the smoothed image, a linear map of the coordinates. An image that drew another family's operation goes
through with a table, blend or map that changes nothing.

Source: Cubuk et al. 2020, "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space", in the pool and
with the ranges of the released code of Gui et al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation
in Semi-Supervised Learning": every operation has a magnitude of its own, drawn anew each time. Cutout: DeVries and Taylor
2017, "Improved Regularization of Convolutional Neural Networks with Cutout".
Departures: of an image with one channel the square has the brightness of the source's colour.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cl_sim.constants import constant
from cl_sim.rng import Rng


class Range(NamedTuple):
    """Where a magnitude is drawn, uniformly."""

    low: float
    high: float


POOL = {  # magnitudes: factors; bits kept; a byte; degrees; slopes; shares of the side
    "identity": Range(0, 0),
    "autocontrast": Range(0, 0),
    "equalize": Range(0, 0),
    "brightness": Range(0.05, 0.95),
    "color": Range(0.05, 0.95),
    "contrast": Range(0.05, 0.95),
    "sharpness": Range(0.05, 0.95),
    "posterize": Range(4, 8),
    "solarize": Range(0, 256),
    "rotate": Range(-30, 30),
    "shear_x": Range(-0.3, 0.3),
    "shear_y": Range(-0.3, 0.3),
    "translate_x": Range(-0.3, 0.3),
    "translate_y": Range(-0.3, 0.3),
}
NUMBER = {name: number for number, name in enumerate(POOL)}
DRAWN = 3  # operations per view
LARGEST_SQUARE = 0.5  # of the width
SQUARE = (125, 123, 114)  # red, green, blue
RED, GREEN, BLUE, ONE = 19595, 38470, 7471, 1 << 16  # Pillow's weights of the eye, in 1 / 65536


class Recipe(NamedTuple):
    """What was drawn for a batch.

    Shapes: kind [R, B, 3] int64, numbers in `POOL`; magnitude [R, B, 3] float64; side [R, B], a share of the width; centre
    [R, B, 2] float64, row first, shares of height and width.
    """

    kind: Tensor
    magnitude: Tensor
    side: Tensor
    centre: Tensor


def draw_strong(rng: Rng, batch: int) -> Recipe:
    """Operations with replacement, all equally likely; magnitudes uniform in the operation's range; a square anywhere."""
    kind = rng.below(len(POOL), batch, DRAWN)
    low, high = constant(tuple(POOL.values()), kind.device, torch.float64).T[:, kind]  # [R, B, 3] each
    share = rng.uniform(batch, DRAWN + 3).double()
    magnitude = low + (high - low) * share[..., :DRAWN]
    return Recipe(kind, magnitude, LARGEST_SQUARE * share[..., DRAWN], share[..., DRAWN + 1 :])


def apply_strong(x: Tensor, recipe: Recipe) -> Tensor:
    """The operations one after the other, then the square.    Shapes: x [R, B, C, H, W], C = 1 or 3 -> x."""
    out = x if x.dtype == torch.uint8 else (x * 255).round().to(torch.uint8)
    for place in range(recipe.kind.shape[-1]):
        out = apply_operation(out, recipe.kind[..., place], recipe.magnitude[..., place])
    out = apply_cutout(out, recipe.side, recipe.centre)
    return out if x.dtype == torch.uint8 else out.to(x.dtype) / 255


def strong(x: Tensor, rng: Rng) -> Tensor:
    """RandAugment and Cutout, drawn for each image.    Shapes: [R, B, C, H, W], C = 1 or 3 -> same."""
    return apply_strong(x, draw_strong(rng, x.shape[1]))


def apply_operation(x: Tensor, kind: Tensor, magnitude: Tensor) -> Tensor:
    """One operation per image.    Shapes: x [R, B, C, H, W] uint8, kind (a number in `POOL`) and magnitude [R, B] -> x."""
    out = tables(x, kind, magnitude).gather(-1, x.flatten(3).long()).view_as(x)
    factor = magnitude.float()
    out = _blend(greys(out), out, torch.where(kind == NUMBER["color"], factor, 1.0))
    out = _blend(smoothed(out), out, torch.where(kind == NUMBER["sharpness"], factor, 1.0))
    return move(out, maps(kind, magnitude, x.shape[-2], x.shape[-1]))


def tables(x: Tensor, kind: Tensor, magnitude: Tensor) -> Tensor:
    """What each byte becomes, where that depends on the byte alone.    Shapes: x [R, B, C, H, W] -> [R, B, C, 256] uint8."""
    byte = torch.arange(256, device=x.device)
    count = torch.zeros(*x.shape[:3], 256, dtype=torch.int64, device=x.device)
    count.scatter_add_(-1, x.flatten(3).long(), torch.ones_like(x.flatten(3), dtype=torch.int64))
    v = magnitude[..., None, None]  # [R, B, 1, 1]
    shift = (8 - v.floor().long()).clamp(0, 8)
    mean = (2 * greys(x).long().sum((-2, -1)) + x[0, 0, 0].numel()).div(2 * x[0, 0, 0].numel(), rounding_mode="floor")
    made = {
        "autocontrast": _stretched(count, byte),
        "equalize": _equalized(count, byte),
        "brightness": _between(torch.zeros_like(byte), byte, v),
        "contrast": _between(mean[..., None], byte, v),
        "posterize": byte >> shift << shift,
        "solarize": torch.where(byte < v, byte, 255 - byte),
    }
    out = byte.expand_as(count)
    for name, table in made.items():
        out = torch.where((kind == NUMBER[name])[..., None, None], table, out)
    return out.to(torch.uint8)


def _stretched(count: Tensor, byte: Tensor) -> Tensor:
    """From the darkest to the brightest byte of the channel, over the whole range.    Shapes: count [..., 256] -> same."""
    there = count > 0
    low = there.byte().argmax(-1, keepdim=True)
    high = 255 - there.flip(-1).byte().argmax(-1, keepdim=True)
    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255) / span  # a number over a tensor would be its reciprocal, rounded twice
    table = (byte * scale + -low * scale).trunc().clamp(0, 255).long()
    return torch.where(high > low, table, byte)


def _equalized(count: Tensor, byte: Tensor) -> Tensor:
    """Every brightness about equally often.    Shapes: count [..., 256] -> same."""
    brightest = 255 - (count > 0).flip(-1).byte().argmax(-1, keepdim=True)
    step = (count.sum(-1, keepdim=True) - count.gather(-1, brightest)) // 255
    table = (step // 2 + count.cumsum(-1) - count) // step.clamp(min=1)
    return torch.where(step > 0, table.clamp(max=255), byte)


def _between(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """A share of the way from start to end, in single precision, cut off as Pillow does.    Shapes: broadcast."""
    return (start.float() + factor.float() * (end - start).float()).trunc().long()


def greys(x: Tensor) -> Tensor:
    """Brightness as Pillow rounds it.    Shapes: [R, B, C, H, W] uint8 -> [R, B, 1, H, W] uint8."""
    if x.shape[2] == 1:
        return x
    red, green, blue = x.int().unbind(2)
    return ((red * RED + green * GREEN + blue * BLUE + ONE // 2) >> 16).to(torch.uint8)[:, :, None]


def smoothed(x: Tensor) -> Tensor:
    """Each pixel the mean of its 3 x 3 neighbours, itself 5 times; the border stays.    Shapes: [R, B, C, H, W] uint8 -> same."""
    if min(x.shape[-2:]) < 3:
        return x
    wide = x.short()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]  # of 13
    out = x.clone()
    out[..., 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return out


def _blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """Pillow's blend of two images; factor 1 is `end` to the bit.    Shapes: images [R, B, C, H, W] uint8, factor [R, B]."""
    start, end = start.float(), end.float()
    return (start + factor[..., None, None, None] * (end - start)).to(torch.uint8)


def maps(kind: Tensor, magnitude: Tensor, height: int, width: int) -> Tensor:
    """Where the pixels come from: row and column are linear in row and column, in 1 / 65536 pixels, as Pillow counts.

    Shapes: kind, magnitude [R, B] -> [R, B, 6] int64: for the column a step right, a step down and the start, then for the row.
    """
    zero, one = torch.zeros_like(magnitude), torch.ones_like(magnitude)

    def only(name: str, other: Tensor = zero) -> Tensor:
        return torch.where(kind == NUMBER[name], magnitude, other)

    turn = -only("rotate") * math.pi / 180
    cosine, sine = turn.cos(), turn.sin()
    right, down = cosine, sine + only("shear_x")  # of the column
    right_, down_ = -sine + only("shear_y"), cosine  # of the row
    turned = kind == NUMBER["rotate"]
    start = torch.where(turned, width / 2 - cosine * (width / 2) - sine * (height / 2), width * only("translate_x"))
    start_ = torch.where(turned, height / 2 + sine * (width / 2) - cosine * (height / 2), height * only("translate_y"))
    start, start_ = start + (right + down) / 2, start_ + (right_ + down_) / 2  # the middle of the first pixel
    straight = (down == 0) & (right_ == 0)  # then only whole pixels count
    start, start_ = (torch.where(straight, at.floor(), at) for at in (start, start_))
    values = torch.stack([right, down, start, right_, down_, start_], -1)
    return (values * ONE + 0.5 * one[..., None]).floor().long()


def move(x: Tensor, linear: Tensor) -> Tensor:
    """Take each pixel from where the map says; black from outside.    Shapes: x [R, B, C, H, W], linear [R, B, 6] -> x."""
    height, width = x.shape[-2:]
    row, column = (torch.arange(size, device=x.device) for size in (height, width))
    right, down, start, right_, down_, start_ = linear[..., None, None].unbind(2)  # [R, B, 1, 1] each
    from_column = (start + right * column + down * row[:, None]) >> 16  # [R, B, H, W]
    from_row = (start_ + right_ * column + down_ * row[:, None]) >> 16
    inside = (from_column >= 0) & (from_column < width) & (from_row >= 0) & (from_row < height)
    place = (from_row * width + from_column).masked_fill(~inside, 0).flatten(2)[:, :, None]
    taken = x.flatten(3).gather(-1, place.expand(-1, -1, x.shape[2], -1)).view_as(x)
    return taken.masked_fill(~inside[:, :, None], 0)


def apply_cutout(x: Tensor, side: Tensor, centre: Tensor) -> Tensor:
    """Cover a square; one that would reach over the left or upper edge begins there and keeps its side.

    Shapes: x [R, B, C, H, W] uint8, side [R, B] (share of the width), centre [R, B, 2] (row first, shares) -> x.
    """
    height, width = x.shape[-2:]
    reach = side * width
    top, bottom = _ends(centre[..., 0] * height, reach, height)
    left, right = _ends(centre[..., 1] * width, reach, width)
    row, column = (torch.arange(size, device=x.device) for size in (height, width))
    rows = (row >= top) & (row <= bottom)  # [R, B, H]
    columns = (column >= left) & (column <= right)  # [R, B, W]
    colour = constant(SQUARE, x.device, torch.uint8)[:, None, None]
    colour = colour if x.shape[2] == 3 else greys(colour[None, None])[0, 0]
    return torch.where((rows[..., :, None] & columns[..., None, :])[:, :, None], colour, x)


def _ends(centre: Tensor, reach: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and last pixel covered.    Shapes: [R, B] -> [R, B, 1] each."""
    first = (centre - reach / 2).clamp(min=0).floor()
    last = (first + reach).clamp(max=size).floor()
    return first[..., None], last[..., None]
