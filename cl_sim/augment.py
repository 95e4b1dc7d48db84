"""Training views: batch to batch, on the device, every image with a draw of its own from the counter RNG.

Each augmentation is a `draw_...` (random numbers only) and an `apply_...` (no random numbers), so that what was drawn can be
compared, repeated or learned. The dtype stays: bytes in, bytes out, rounded once at the end of an augmentation; floats are
taken to lie in [0, 1] and stay floats. All images are [R, B, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.errors import BadConfig, UnknownName
from cl_sim.randaugment import strong
from cl_sim.rng import Rng
from cl_sim.types import Batch, Field

TRIES = 10  # boxes drawn before the centre is taken
BOX_WORDS = 2 * TRIES + 2  # random words per image that a box takes
JITTER_WORDS = 5 + 4  # and a colour jitter
MOVES = ("shift", "shift_mirrored", "crop")  # without a number, they follow the size of the image
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def to_float(x: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]; floats as they are.    Shapes: any -> same."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats in [0, 1] as the nearest byte, if bytes are wanted; else as that float type.    Shapes: any -> same."""
    return (x * 255).round().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def draw_shift(rng: Rng, batch: int, pixels: int) -> Tensor:
    """Top left corner of each image in the padded image, from 0 to twice `pixels`.    Shapes: -> [R, B, 2], row first."""
    return rng.below(2 * pixels + 1, batch, 2)


def apply_shift(x: Tensor, corner: Tensor, pixels: int, mirrored: bool = False) -> Tensor:
    """Pad each image with zeros, or with its mirror image, and cut it out again at its corner.

    Shapes: x [R, B, C, H, W], corner [R, B, 2] -> x.
    """
    runs, batch, _, height, width = x.shape
    rows = corner[..., :1] + torch.arange(height, device=x.device)  # [R, B, H]
    columns = corner[..., 1:] + torch.arange(width, device=x.device)  # [R, B, W]
    run = torch.arange(runs, device=x.device)[:, None, None, None]
    item = torch.arange(batch, device=x.device)[:, None, None]
    padded = pad_mirrored(x, pixels) if mirrored else F.pad(x, (pixels,) * 4)
    return padded[run, item, :, rows[..., None], columns[..., None, :]].movedim(-1, 2)


def shift(x: Tensor, rng: Rng, pixels: int = 4) -> Tensor:
    """Move each image by its own whole number of pixels; zeros come in.    Shapes: [R, B, C, H, W] -> same."""
    return apply_shift(x, draw_shift(rng, x.shape[1], pixels), pixels)


def pad_mirrored(x: Tensor, pixels: int) -> Tensor:
    """Pad with the mirror image, the edge itself not repeated.    Shapes: [..., H, W] -> [..., H + 2 pixels, W + 2 pixels]."""
    height, width = x.shape[-2:]
    rows, columns = (torch.arange(-pixels, size + pixels, device=x.device) for size in (height, width))
    rows, columns = (last - (last - at.abs()).abs() for at, last in ((rows, height - 1), (columns, width - 1)))
    return x[..., rows[:, None], columns]


def shift_mirrored(x: Tensor, rng: Rng, pixels: int = 4) -> Tensor:
    """Move each image by its own whole number of pixels; its mirror image comes in.    Shapes: [R, B, C, H, W] -> same."""
    return apply_shift(x, draw_shift(rng, x.shape[1], pixels), pixels, mirrored=True)


def crop(x: Tensor, rng: Rng, pixels: int = 4) -> Tensor:
    """Pad with zeros and cut out at random: another name of `shift`.    Shapes: [R, B, C, H, W] -> same."""
    return shift(x, rng, pixels)


def apply_flip(x: Tensor, mirrored: Tensor, axis: int = -1) -> Tensor:
    """Mirror the chosen images left to right, or along another axis.    Shapes: x [R, B, C, H, W], mirrored [R, B] bool -> x."""
    return torch.where(_per_image(mirrored), x.flip(axis), x)


def flip(x: Tensor, rng: Rng, probability: float = 0.5) -> Tensor:
    """Mirror each image left to right with the given probability.    Shapes: [R, B, C, H, W] -> same."""
    return apply_flip(x, rng.chance(probability, x.shape[1]))


def vflip(x: Tensor, rng: Rng, probability: float = 0.5) -> Tensor:
    """Mirror each image top to bottom with the given probability.    Shapes: [R, B, C, H, W] -> same."""
    return apply_flip(x, rng.chance(probability, x.shape[1]), axis=-2)


def draw_erase(rng: Rng, batch: int, height: int, width: int, pixels: int) -> Tensor:
    """Top left corner of each square, its centre anywhere in the image.    Shapes: -> [R, B, 2], row first."""
    centre = torch.stack([rng.below(height, batch), rng.below(width, batch)], -1)
    return centre - pixels // 2


def apply_erase(x: Tensor, corner: Tensor, pixels: int) -> Tensor:
    """Blacken a square; what lies outside the image is lost.    Shapes: x [R, B, C, H, W], corner [R, B, 2] -> x."""
    top, left = corner[..., :1], corner[..., 1:]
    row, column = (torch.arange(size, device=x.device) for size in x.shape[-2:])
    inside_rows = (row >= top) & (row < top + pixels)  # [R, B, H]
    inside_columns = (column >= left) & (column < left + pixels)  # [R, B, W]
    inside = inside_rows[..., :, None] & inside_columns[..., None, :]
    return x.masked_fill(inside[:, :, None], 0)


def erase(x: Tensor, rng: Rng, pixels: int = 8) -> Tensor:
    """Blacken one square of that side per image (cutout).    Shapes: [R, B, C, H, W] -> same.

    Source: DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout".
    """
    return apply_erase(x, draw_erase(rng, x.shape[1], x.shape[3], x.shape[4], pixels), pixels)


def join_halves(a: Tensor, b: Tensor, left: Tensor) -> Tensor:
    """The first image with the left half of the second where `left`, else with its upper half, in the same place.

    A half has floor(W / 2) columns, or floor(H / 2) rows; nothing is resized.

    Shapes: a and b [..., C, H, W], left [...] bool, e.g. [B] or [R, B] -> like a.
    Source: Gui et al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation in Semi-Supervised Learning".
    """
    height, width = a.shape[-2:]
    columns = torch.arange(width, device=a.device) < width // 2
    rows = torch.arange(height, device=a.device)[:, None] < height // 2
    return torch.where(torch.where(_per_image(left.bool()), columns, rows), b, a)


def draw_boxes(
    rng: Rng,
    batch: int,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Random boxes: area uniform in `scale` (shares of the image), width over height log-uniform in `ratio`.

    The first of ten candidates that fits into the image is taken, with a uniform place; if none fits, the largest centred
    box of an allowed shape. That is the rule of torchvision's RandomResizedCrop.

    Shapes: -> [R, B, 4], whole pixels: top, left, height, width.
    """
    share, slope = rng.uniform(batch, TRIES, 2).unbind(-1)  # [R, B, 10]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * slope)
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1).round().long()  # [R, B, 10, 2]
    tall, wide = sides.unbind(-1)
    fits = (tall > 0) & (tall <= height) & (wide > 0) & (wide <= width)
    first = fits.byte().argmax(-1)[..., None, None].expand(-1, -1, -1, 2)
    tall, wide = sides.gather(2, first)[:, :, 0].unbind(-1)  # [R, B]
    none = ~fits.any(-1)
    most_tall, most_wide = _largest(height, width, ratio)
    tall, wide = tall.masked_fill(none, most_tall), wide.masked_fill(none, most_wide)
    top, left = rng.below(torch.stack([height + 1 - tall, width + 1 - wide], 1), 2, batch).unbind(1)
    top, left = top.masked_fill(none, (height - most_tall) // 2), left.masked_fill(none, (width - most_wide) // 2)
    return torch.stack([top, left, tall, wide], -1)


def _largest(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    if width < height * ratio[0]:
        return round(width / ratio[0]), width
    if width > height * ratio[1]:
        return height, round(height * ratio[1])
    return height, width


def apply_boxes(x: Tensor, boxes: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """Stretch the box of each image to the whole image, bilinearly, and mirror it if asked (in the same pass, at no cost).

    A box is never larger than the image, so nothing shrinks and antialiasing makes no difference. Equal to torchvision's
    resized_crop on float tensors within 1e-4 per pixel.

    Shapes: x [R, B, C, H, W] float, boxes [R, B, 4], mirrored [R, B] bool -> x.
    """
    height, width = x.shape[-2:]
    top, left, tall, wide = boxes.to(x.dtype)[..., None].unbind(2)  # [R, B, 1] each
    rows = _sources(top, tall, height, x)
    columns = _sources(left, wide, width, x)
    if mirrored is not None:
        columns = torch.where(mirrored[..., None], columns.flip(-1), columns)
    rows, columns = rows[..., :, None].expand(*x.shape[:2], -1, width), columns[..., None, :].expand_as(x[:, :, 0])
    grid = torch.stack([columns, rows], -1).flatten(0, 1)
    taken = F.grid_sample(x.flatten(0, 1), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return taken.view_as(x)


def _sources(start: Tensor, length: Tensor, size: int, x: Tensor) -> Tensor:
    """Where each output row lies in the image, kept inside the box, in grid_sample's units.    Shapes: -> [R, B, size]."""
    centre = torch.arange(size, device=x.device, dtype=x.dtype) + 0.5
    inside = (centre * (length / size) - 0.5).clamp(min=0).minimum(length - 1)
    return (2 * (start + inside) + 1) / size - 1


def resized_crop(
    x: Tensor, rng: Rng, scale: tuple[float, float] = (0.2, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """Cut out a random box and stretch it to the whole image, bilinearly.    Shapes: [R, B, C, H, W] -> same."""
    boxes = draw_boxes(rng, x.shape[1], x.shape[3], x.shape[4], scale, ratio)
    return to_dtype(apply_boxes(to_float(x), boxes), x.dtype)


class Jitter(NamedTuple):
    """What was drawn for a colour jitter.

    Shapes: chosen [R, B] bool; factors [R, B, 4]: brightness, contrast, saturation (1: unchanged), hue in turns of the
    colour circle (0: unchanged); order [R, B, 4]: which of the four comes first, second, third, last.
    """

    chosen: Tensor
    factors: Tensor
    order: Tensor


def draw_jitter(
    rng: Rng,
    batch: int,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 0.8,
) -> Jitter:
    """Factors uniform in [max(0, 1 - s), 1 + s], hue in [-hue, hue], the order uniform among the 24, all per image."""
    lowest = [max(0.0, 1 - strength) for strength in (brightness, contrast, saturation)] + [-hue]
    highest = [1 + brightness, 1 + contrast, 1 + saturation, hue]
    drawn = rng.uniform(batch, 5)  # [R, B, 5]
    spread = [low + (high - low) * drawn[..., i] for i, (low, high) in enumerate(zip(lowest, highest, strict=True))]
    order = rng.bits(batch, 4).argsort(-1)
    return Jitter(drawn[..., 4] < probability, torch.stack(spread, -1), order)


def apply_jitter(x: Tensor, drawn: Jitter) -> Tensor:
    """Change brightness, contrast, saturation and hue of the chosen images, each in its own order.

    Every order is exact in one pass of fixed shape: three blends, the hue, three blends. A change that comes before the
    hue is made in the first three places, one that comes after it in the last three, and a place that is not used blends
    with factor 1, which changes no bit. Equal to torchvision's four functions in that order within 1e-4 per pixel.

    Shapes: x [R, B, C, H, W] float, C = 1 or 3 -> x. With one channel, saturation and hue do nothing.
    """
    blends = _blends(drawn)
    out = x
    for blend in blends[:3]:
        out = _mixed(out, blend)
    if x.shape[2] == 3:
        out = turn_hue(out, drawn.factors[..., HUE])
    for blend in blends[3:]:
        out = _mixed(out, blend)
    return torch.where(_per_image(drawn.chosen), out, x)


class Blend(NamedTuple):
    """How much of each image stays, and how much of its mean grey and of its greys comes in.    Shapes: [R, B, 1, 1, 1]."""

    stays: Tensor
    mean: Tensor
    greys: Tensor


def _blends(drawn: Jitter) -> list[Blend]:
    """The three blends before the hue and the three after it."""
    place = torch.arange(4, device=drawn.order.device)
    at = (drawn.order == HUE).byte().argmax(-1, keepdim=True)  # [R, B, 1], the hue's place in the order
    kind = torch.cat([drawn.order[..., :3], drawn.order[..., 1:]], -1)  # [R, B, 6]
    used = torch.cat([place[:3] < at, place[1:] > at], -1)
    stays = torch.where(used, drawn.factors.gather(-1, kind), 1.0)
    parts = torch.stack([stays, (1 - stays) * (kind == CONTRAST), (1 - stays) * (kind == SATURATION)])  # [3, R, B, 6]
    return [Blend(*one.unbind(0)) for one in _per_image(parts).unbind(3)]


def _mixed(x: Tensor, blend: Blend) -> Tensor:
    shades = greys(x)  # [R, B, 1, H, W]
    rest = torch.addcmul(blend.mean * shades.mean((-2, -1), keepdim=True), shades, blend.greys)
    return torch.addcmul(rest, x, blend.stays).clamp_(0, 1)


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the colours by a part of the colour circle; the largest and smallest channel keep their values.

    Shapes: x [R, B, 3, H, W] float, turns [R, B] -> x.
    """
    red, green, blue = x.unbind(2)
    low, high = (
        extreme(extreme(red, green), blue) for extreme in (torch.minimum, torch.maximum)
    )  # aminmax: 8 times the time
    spread = high - low  # [R, B, H, W]
    width = spread.clamp(min=1e-12)  # a grey pixel has no hue: its numerators are 0 too
    blueish = torch.where(high == green, ((blue - red) / width).add_(2), ((red - green) / width).add_(4))
    hue = torch.where(high == red, (green - blue) / width, blueish)
    hue += 6 * turns[..., None, None]  # in sixths of the circle
    hue -= (hue / 6).floor_().mul_(6)
    full = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 2).clamp_(0, 1)
    return torch.addcmul(low[:, :, None], full, spread[:, :, None])


def jitter(
    x: Tensor,
    rng: Rng,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 0.8,
) -> Tensor:
    """Change brightness, contrast, saturation and hue in a random order per image.    Shapes: [R, B, C, H, W] -> same."""
    drawn = draw_jitter(rng, x.shape[1], brightness, contrast, saturation, hue, probability)
    return to_dtype(apply_jitter(to_float(x), drawn), x.dtype)


def greys(x: Tensor) -> Tensor:
    """Brightness as the eye weighs it, 0.2989 red + 0.587 green + 0.114 blue.    Shapes: [R, B, C, H, W] -> [R, B, 1, H, W]."""
    if x.shape[2] == 1:
        return x
    red, green, blue = torch.split(x, 1, 2)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def apply_grey(x: Tensor, chosen: Tensor) -> Tensor:
    """Take the colour out of the chosen images.    Shapes: x [R, B, C, H, W] float, chosen [R, B] bool -> x."""
    return torch.where(_per_image(chosen), greys(x), x)


def grey(x: Tensor, rng: Rng, probability: float = 0.2) -> Tensor:
    """Take the colour out of each image with the given probability.    Shapes: [R, B, C, H, W] -> same."""
    return to_dtype(apply_grey(to_float(x), rng.chance(probability, x.shape[1])), x.dtype)


def apply_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Each pixel the mean of its row and column, weighted by a Gaussian of that width; the border keeps its brightness.

    Shapes: x [R, B, C, H, W] float, sigma [R, B], pixels, > 0 -> x.
    """

    def weights(size: int) -> Tensor:
        place = torch.arange(size, device=x.device, dtype=x.dtype)
        away = (place[:, None] - place) / sigma[..., None, None].to(x.dtype)  # [R, B, size, size]
        return (-0.5 * away * away).softmax(-1)  # pixels outside the image have no say

    down, right = (weights(size)[:, :, None] for size in x.shape[-2:])
    return down @ x @ right.mT


def blur(x: Tensor, rng: Rng, probability: float = 0.5, sigma: tuple[float, float] = (0.1, 2.0)) -> Tensor:
    """Blur each image with the given probability, by a width uniform in `sigma`.    Shapes: [R, B, C, H, W] -> same."""
    chosen, share = rng.chance(probability, x.shape[1]), rng.uniform(x.shape[1])
    blurred = apply_blur(to_float(x), sigma[0] + (sigma[1] - sigma[0]) * share)
    return torch.where(_per_image(chosen), to_dtype(blurred, x.dtype), x)


def replay_views(x: Tensor, rng: Rng) -> Tensor:
    """The replay papers' view: resized crop, flip, colour jitter (p 0.8), grey (p 0.2).    Shapes: [R, B, C, H, W] -> same.

    Source: the released code of PCR (Lin et al. 2023, "PCR: Proxy-based Contrastive Replay for Online Class-Incremental
    Continual Learning"). Departures: rounded to bytes once at the end, where the code rounds after each part and turns the
    hue in 256 steps; on the same draws the two differ by 1.2 of 255 on average, and by more than 6 in one byte of a hundred.
    """
    batch, (height, width) = x.shape[1], x.shape[-2:]
    with rng.at_once(batch * (BOX_WORDS + 1 + JITTER_WORDS + 1)):
        boxes, mirrored = draw_boxes(rng, batch, height, width), rng.chance(0.5, batch)
        colours, greyed = draw_jitter(rng, batch), rng.chance(0.2, batch)
    out = apply_boxes(to_float(x), boxes, mirrored)
    out = apply_jitter(out.clamp_(0, 1), colours)  # bilinear weights may sum to 1 + 1e-7
    return to_dtype(apply_grey(out, greyed), x.dtype)


def _per_image(values: Tensor) -> Tensor:
    """One value per image, ready to meet its pixels.    Shapes: [R, B] -> [R, B, 1, 1, 1]."""
    return values[..., None, None, None]


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "shift": shift,
    "shift_mirrored": shift_mirrored,
    "crop": crop,
    "flip": flip,
    "vflip": vflip,
    "erase": erase,
    "resized_crop": resized_crop,
    "jitter": jitter,
    "grey": grey,
    "blur": blur,
    "replay": replay_views,
    "strong": strong,
}
COLOURS = ("jitter", "grey", "replay", "strong")  # these need one or three channels


NUMBERS = {  # what the number behind a name means
    "shift": "pixels",
    "shift_mirrored": "pixels",
    "crop": "pixels",
    "erase": "pixels",
    "flip": "probability",
    "vflip": "probability",
    "jitter": "probability",
    "grey": "probability",
    "blur": "probability",
    "resized_crop": "smallest area",
}


def pipeline(names: Sequence[str], rng: Rng, fields: Mapping[str, Field]) -> Callable[[Batch], Batch]:
    """The augmentations of these names, one after the other, as a function from batch to batch; none: the batch itself.

    A name may carry a number: pixels (`shift:2`, `erase:4`), a probability (`flip:0.3`, `jitter:1`, `blur:0.1`), or
    the smallest area as a share of the image (`resized_crop:0.3`). Without one, the shifts move by up to an eighth of
    the shorter side: 4 pixels of 32, 1 of 8.

    Raises: UnknownName; BadConfig for a number that is not allowed, or for samples that cannot be augmented so.
    """
    if not names:
        return lambda batch: batch
    shape = fields["x"].shape if "x" in fields else ()
    steps = [_step(name, rng, shape) for name in names]

    def augment(batch: Batch) -> Batch:
        x = batch["x"]
        for step in steps:
            x = step(x)
        return {**batch, "x": x}

    return augment


def _step(full: str, rng: Rng, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    name, colon, text = full.partition(":")
    if name not in AUGMENTATIONS:
        raise UnknownName("augmentation", name, AUGMENTATIONS, "cl-sim list augmentations")
    if len(shape) != 3:
        raise BadConfig(
            f"augment has '{full}', which needs images, but the samples have shape {list(shape)}; leave it out"
        )
    if name in COLOURS and shape[0] not in (1, 3):
        raise BadConfig(
            f"augment has '{full}', which needs 1 or 3 channels, but the images have {shape[0]}; leave it out"
        )
    side = min(shape[1:])
    settings = _settings(name, text, side) if colon else {"pixels": max(1, round(side / 8))} if name in MOVES else {}
    return partial(AUGMENTATIONS[name], rng=rng, **settings)


def _settings(name: str, text: str, side: int) -> dict[str, Any]:
    """The settings that the number behind a name stands for."""
    if name not in NUMBERS:
        raise BadConfig(f"augment has '{name}:{text}', but '{name}' takes no number; type just {name}")
    pixels = NUMBERS[name] == "pixels"
    most = (side - 1 if name == "shift_mirrored" else side) if pixels else 1
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most or (pixels and value != int(value)):
        kind = "a whole number" if pixels else "a number"
        raise BadConfig(
            f"augment has '{name}:{text}'; behind the colon comes the {NUMBERS[name]}, {kind} from 0 to {most}"
        )
    if pixels:
        return {"pixels": int(value)}
    return {"scale": (value, 1.0)} if name == "resized_crop" else {"probability": value}
