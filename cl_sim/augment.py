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

from cl_sim.constants import constant, lasting
from cl_sim.errors import BadConfig, UnknownName
from cl_sim.randaugment import apply_strong, draw_strong, strong
from cl_sim.rng import Rng, below_of, uniform_of
from cl_sim.types import Batch, Field

TRIES = 10  # boxes drawn before the centre is taken
REPLAY_WORDS = [2 * TRIES, 2, 1, 5, 4, 1]  # of a replay view: for sizes, a place, a mirror, colours, their order, grey
MOVES = ("shift", "shift_mirrored", "crop")  # without a number, they follow the size of the image
HUES = (1 / 2, 1 / 3, 2 / 3), (6.0, -6.0, -6.0), (-1.0, 2.0, 2.0)  # each channel's centre, slope, base: see turn_hue
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def to_float(x: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]; floats as they are.    Shapes: any -> same."""
    return x / 255 if x.dtype == torch.uint8 else x


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats in [0, 1] as the nearest byte, if bytes are wanted; else as that float type.    Shapes: any -> same."""
    if dtype == torch.uint8:
        return (x * 255).round_().int().to(dtype)  # straight to bytes takes a CPU three times as long
    return x.to(dtype)


def on_floats(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same on bytes too, which are rounded at the end."""
    return lambda x, drawn: to_dtype(apply(to_float(x), drawn), x.dtype)


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


def draw_erase(rng: Rng, batch: int, height: int, width: int, pixels: int = 8) -> Tensor:
    """Top left corner of each square, its centre anywhere in the image.    Shapes: -> [R, B, 2], row first."""
    centre = torch.stack([rng.below(height, batch), rng.below(width, batch)], -1)
    return centre - pixels // 2


def apply_erase(x: Tensor, corner: Tensor, pixels: int = 8) -> Tensor:
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
    return boxes_of(rng.uniform(batch, TRIES, 2), rng.bits(2, batch).mT, height, width, scale, ratio)


def boxes_of(
    shares: Tensor,
    words: Tensor,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """The boxes that these random numbers stand for.    Shapes: shares [R, B, 10, 2], words [R, B, 2] int64 -> [R, B, 4]."""
    device, most = words.device, _largest(height, width, ratio)
    lowest = constant((scale[0], math.log(ratio[0])), device)
    spread = constant((scale[1] - scale[0], math.log(ratio[1] / ratio[0])), device)
    whole = constant((height, width), device, torch.int64)
    share, slope = (lowest + spread * shares).unbind(-1)  # [R, B, 10]
    area, aspect = height * width * share, slope.exp()
    sides = torch.stack([area / aspect, area * aspect], -1).sqrt().round().long()  # [R, B, 10, 2]
    fits = ((sides > 0) & (sides <= whole)).all(-1)
    first = fits.byte().argmax(-1)[..., None, None].expand(-1, -1, -1, 2)
    none = ~fits.any(-1, keepdim=True)  # [R, B, 1]
    size = torch.where(none, constant(most, device, torch.int64), sides.gather(2, first).squeeze(2))  # [R, B, 2]
    centred = constant(((height - most[0]) // 2, (width - most[1]) // 2), device, torch.int64)
    corner = torch.where(none, centred, below_of(words, whole + 1 - size))
    return torch.cat([corner, size], -1)


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
    corner, sides = torch.split(boxes.to(x.dtype)[..., None], 2, 2)  # [R, B, 2, 1] each
    rows, columns = _sources(corner, sides, (height, width), x).unbind(2)
    rows, columns = rows[..., :height, None], columns[..., None, :width]
    if mirrored is not None:
        columns = torch.where(mirrored[..., None, None], columns.flip(-1), columns)
    grid = torch.stack([columns.expand(-1, -1, height, -1), rows.expand(-1, -1, -1, width)], -1).flatten(0, 1)
    taken = F.grid_sample(x.flatten(0, 1), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return taken.view_as(x)


def _sources(start: Tensor, length: Tensor, whole: tuple[int, int], x: Tensor) -> Tensor:
    """Where each output row and column lies in the image, kept inside the box, in grid_sample's units.

    Shapes: start, length [R, B, 2, 1] -> [R, B, 2, larger of both sizes].
    """
    size = constant(whole, x.device, x.dtype)[:, None]
    centre = torch.arange(0.5, max(whole), device=x.device, dtype=x.dtype)
    inside = (centre * (length / size) - 0.5).clamp_(min=0).minimum(length - 1)
    return (2 * (start + inside) + 1).div_(size).sub_(1)


def resized_crop(
    x: Tensor, rng: Rng, scale: tuple[float, float] = (0.2, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """Cut out a random box and stretch it to the whole image, bilinearly.    Shapes: [R, B, C, H, W] -> same."""
    boxes = draw_boxes(rng, x.shape[1], x.shape[3], x.shape[4], scale, ratio)
    return on_floats(apply_boxes)(x, boxes)


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
    strengths = brightness, contrast, saturation, hue
    return jitter_of(rng.uniform(batch, 5), rng.bits(batch, 4), strengths, probability)


def jitter_of(
    shares: Tensor, words: Tensor, strengths: tuple[float, ...] = (0.4, 0.4, 0.4, 0.1), probability: float = 0.8
) -> Jitter:
    """The jitter that these random numbers stand for.    Shapes: shares [R, B, 5], words [R, B, 4] int64."""
    *factors, hue = strengths
    lowest = [max(0.0, 1 - strength) for strength in factors] + [-hue]
    highest = [1 + strength for strength in factors] + [hue]
    low = constant(tuple(lowest), shares.device)
    spread = constant(tuple(b - a for a, b in zip(lowest, highest, strict=True)), shares.device)
    strength, chance = torch.split(shares, [4, 1], -1)
    return Jitter(chance.squeeze(-1) < probability, low + spread * strength, words.argsort(-1))


def apply_jitter(x: Tensor, drawn: Jitter) -> Tensor:
    """Change brightness, contrast, saturation and hue of the chosen images, each in its own order.

    Every order is exact in one pass of fixed shape: three blends, the hue, three blends. A change that comes before the
    hue is made in the first three places, one that comes after it in the last three, and a place that is not used blends
    with factor 1, which changes no bit. Equal to torchvision's four functions in that order within 1e-4 per pixel.

    Shapes: x [R, B, C, H, W] float, C = 1 or 3 -> x. With one channel, saturation and hue do nothing.
    """
    blends, out = _blends(drawn), x.clone()
    _mix(out, blends[:3])
    if x.shape[2] == 3:
        out = turn_hue(out, drawn.factors[..., HUE])
    _mix(out, blends[3:])
    return _where(drawn.chosen, out, x)


class Blend(NamedTuple):
    """How much of each image stays, and how much of its mean grey and of its greys comes in.    Shapes: [R, B, 1, 1, 1]."""

    stays: Tensor
    mean: Tensor
    greys: Tensor


def _blends(drawn: Jitter) -> list[Blend]:
    """The three blends before the hue and the three after it."""
    device = drawn.order.device
    at = (drawn.order == HUE).byte().argmax(-1, keepdim=True)  # [R, B, 1], the hue's place in the order
    kind = drawn.order.index_select(-1, constant((0, 1, 2, 1, 2, 3), device, torch.int64))  # [R, B, 6]
    early = constant((0, 1, 2, 0, 1, 2), device, torch.int64) < at
    idle = early == constant((False, False, False, True, True, True), device, torch.bool)
    stays = drawn.factors.gather(-1, kind).masked_fill_(idle, 1)
    rest = 1 - stays
    parts = stays, rest * (kind == CONTRAST), rest * (kind == SATURATION)
    return [Blend(*one) for one in zip(*(_per_image(part).unbind(2) for part in parts), strict=True)]


def _mix(x: Tensor, blends: Sequence[Blend]) -> None:
    """Blend one after the other, in place."""
    channels = torch.split(x, 1, 2)
    for blend in blends:
        shades = _greys(*channels)  # [R, B, 1, H, W]
        mean = blend.mean * shades.mean((-2, -1), keepdim=True)
        torch.addcmul((shades * blend.greys).add_(mean), x, blend.stays, out=x).clamp_(0, 1)


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the colours by a part of the colour circle; the largest and smallest channel keep their values.

    With channels stretched to the range from 0 to 1, green + blue - red rises from -1 at red to 2 at cyan, a sixth of the
    circle for each 1, on either side of the circle; whether green or blue is larger tells the side. So there is nothing to
    choose, which takes a CPU longer than to compute (ours).

    Shapes: x [R, B, 3, H, W] float, turns [R, B], from -1 up -> x.
    """
    red, green, blue = x.unbind(2)
    low, high = x.amin(2), x.amax(2)
    spread = high - low  # [R, B, H, W]
    whole = (6 * spread).clamp_(min=1e-12)  # a grey pixel has no hue, and any will do
    away = (red - blue).add_(low - green).div_(whole).add_(1 / 3)  # from cyan, 0 to half a circle
    hue = (_per_pixel(turns) + 1.5).sub(away.copysign_(green - blue)).frac_()
    centre, slope, base = _per_pixel(constant(HUES, x.device, x.dtype)).unbind(0)  # [3, 1, 1] each
    full = (hue[:, :, None] - centre).abs_().mul_(slope).add_(base).clamp_(0, 1)
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
    return on_floats(apply_jitter)(x, drawn)


def greys(x: Tensor) -> Tensor:
    """Brightness as the eye weighs it, 0.2989 red + 0.587 green + 0.114 blue.    Shapes: [R, B, C, H, W] -> [R, B, 1, H, W]."""
    return _greys(*torch.split(x, 1, 2))


def _greys(first: Tensor, *others: Tensor) -> Tensor:
    """The same from the channels one by one; a single one is grey.    Shapes: each [R, B, 1, H, W] -> same."""
    if not others:
        return first
    green, blue = others
    return (0.2989 * first).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def apply_grey(x: Tensor, chosen: Tensor) -> Tensor:
    """Take the colour out of the chosen images.    Shapes: x [R, B, C, H, W] float, chosen [R, B] bool -> x."""
    return _where(chosen, greys(x), x)


def grey(x: Tensor, rng: Rng, probability: float = 0.2) -> Tensor:
    """Take the colour out of each image with the given probability.    Shapes: [R, B, C, H, W] -> same."""
    return on_floats(apply_grey)(x, rng.chance(probability, x.shape[1]))


class Blur(NamedTuple):
    """What was drawn for a blur.    Shapes: chosen [R, B] bool; sigma [R, B], the width in pixels."""

    chosen: Tensor
    sigma: Tensor


def draw_blur(rng: Rng, batch: int, probability: float = 0.5, sigma: tuple[float, float] = (0.1, 2.0)) -> Blur:
    """Which images, and widths uniform in `sigma`."""
    return Blur(rng.chance(probability, batch), sigma[0] + (sigma[1] - sigma[0]) * rng.uniform(batch))


def apply_blur(x: Tensor, drawn: Blur) -> Tensor:
    """Make each pixel of the chosen images the mean of its row and column, weighted by a Gaussian; the border stays as bright.

    Shapes: x [R, B, C, H, W] float -> x.
    """

    def weights(size: int) -> Tensor:
        place = torch.arange(size, device=x.device, dtype=x.dtype)
        away = (place[:, None] - place) / drawn.sigma[..., None, None].to(x.dtype)  # [R, B, size, size]
        return (-0.5 * away * away).softmax(-1)  # pixels outside the image have no say

    down, right = (weights(size)[:, :, None] for size in x.shape[-2:])
    return _where(drawn.chosen, down @ x @ right.mT, x)


def blur(x: Tensor, rng: Rng, probability: float = 0.5, sigma: tuple[float, float] = (0.1, 2.0)) -> Tensor:
    """Blur each image with the given probability, by a width uniform in `sigma`.    Shapes: [R, B, C, H, W] -> same."""
    return on_floats(apply_blur)(x, draw_blur(rng, x.shape[1], probability, sigma))


def replay_views(x: Tensor, rng: Rng) -> Tensor:
    """The replay papers' view: resized crop, flip, colour jitter (p 0.8), grey (p 0.2).    Shapes: [R, B, C, H, W] -> same.

    Source: the released code of PCR (Lin et al. 2023, "PCR: Proxy-based Contrastive Replay for Online Class-Incremental
    Continual Learning"). Departures: rounded to bytes once at the end, where the code rounds after each part and turns the
    hue in 256 steps; on the same draws the two differ by 1.2 of 255 on average, and by more than 6 in one byte of a hundred.
    """
    return apply_replay(x, draw_replay(rng, x.shape[1]))


def draw_replay(rng: Rng, batch: int) -> Tensor:
    """The random words of a view: what boxes, mirrors, jitters and greys would draw one after the other, in one go.

    Shapes: -> [R, B, 33] int64.
    """
    drawn = rng.bits(batch * sum(REPLAY_WORDS))
    return drawn.index_select(1, _replay_order(batch, drawn.device)).view(rng.runs, batch, sum(REPLAY_WORDS))


@lasting
def _replay_order(batch: int, device: torch.device) -> Tensor:
    """Where the words of each image lie among all that were drawn.    Shapes: -> [33 B] int64."""
    numbers = torch.arange(batch * sum(REPLAY_WORDS), device=device)
    drawn = torch.split(numbers, [batch * words for words in REPLAY_WORDS])
    each = [part.view(batch, words) for part, words in zip(drawn, REPLAY_WORDS, strict=True)]
    each[1] = drawn[1].view(2, batch).mT  # of places, all rows come before all columns
    return torch.cat(each, 1).flatten()


def apply_replay(x: Tensor, words: Tensor) -> Tensor:
    """The view that was drawn.    Shapes: x [R, B, C, H, W], words [R, B, 33] -> x."""
    sizes, _, mirror, colours, _, grey = torch.split(uniform_of(words), REPLAY_WORDS, -1)
    _, place, _, _, order, _ = torch.split(words, REPLAY_WORDS, -1)
    boxes = boxes_of(sizes.view(*sizes.shape[:2], TRIES, 2), place, *x.shape[-2:])
    out = apply_boxes(to_float(x), boxes, mirror.squeeze(-1) < 0.5).clamp_(0, 1)  # bilinear weights may sum to 1 + 1e-7
    out = apply_jitter(out, jitter_of(colours, order))
    return to_dtype(apply_grey(out, grey.squeeze(-1) < 0.2), x.dtype)


def _per_pixel(values: Tensor) -> Tensor:
    """One value per image, or channel, ready to meet the pixels of a channel.    Shapes: [...] -> [..., 1, 1]."""
    return values.view(*values.shape, 1, 1)


def _per_image(values: Tensor) -> Tensor:
    """One value per image, ready to meet its pixels.    Shapes: [R, B, ...] -> [R, B, ..., 1, 1, 1]."""
    return values.reshape(*values.shape, 1, 1, 1)


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """One image where chosen, else the other. To go all or none of the way is exact, and takes a seventh of `where` on a CPU.

    Shapes: chosen [R, B] bool, one and other [R, B, C or 1, H, W] floats -> [R, B, C, H, W].
    """
    return torch.lerp(other, one, _per_image(chosen.to(other.dtype)))


class Augmentation(NamedTuple):
    """A kind of view: as a whole, as the draw alone, and as what is done to images with what was drawn.

    `draw` takes random numbers, images (for their shape) and the settings; `apply` takes images, what was drawn, and pixels
    if they are among the settings. All that is drawn has the axes [R, B] in front.
    """

    views: Callable[..., Tensor]
    draw: Callable[..., Any]
    apply: Callable[..., Tensor]


def _per_batch(draw: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rng, x, **settings: draw(rng, x.shape[1], **settings)


def _per_size(draw: Callable[..., Any]) -> Callable[..., Any]:
    return lambda rng, x, **settings: draw(rng, x.shape[1], *x.shape[-2:], **settings)


def _chance(probability: float) -> Callable[..., Tensor]:
    return lambda rng, x, probability=probability: rng.chance(probability, x.shape[1])


AUGMENTATIONS: dict[str, Augmentation] = {
    "shift": Augmentation(shift, _per_batch(draw_shift), apply_shift),
    "shift_mirrored": Augmentation(shift_mirrored, _per_batch(draw_shift), partial(apply_shift, mirrored=True)),
    "crop": Augmentation(crop, _per_batch(draw_shift), apply_shift),
    "flip": Augmentation(flip, _chance(0.5), apply_flip),
    "vflip": Augmentation(vflip, _chance(0.5), partial(apply_flip, axis=-2)),
    "erase": Augmentation(erase, _per_size(draw_erase), apply_erase),
    "resized_crop": Augmentation(resized_crop, _per_size(draw_boxes), on_floats(apply_boxes)),
    "jitter": Augmentation(jitter, _per_batch(draw_jitter), on_floats(apply_jitter)),
    "grey": Augmentation(grey, _chance(0.2), on_floats(apply_grey)),
    "blur": Augmentation(blur, _per_batch(draw_blur), on_floats(apply_blur)),
    "replay": Augmentation(replay_views, _per_batch(draw_replay), apply_replay),
    "strong": Augmentation(strong, _per_batch(draw_strong), apply_strong),
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


Drawn = Sequence[Any]  # by each augmentation of a pipeline, for one batch


class Views:
    """Augmentations one after the other, as a function from batch to batch; none: the batch itself."""

    def __init__(self, steps: Sequence[tuple[Callable[[Tensor], Any], Callable[[Tensor, Any], Tensor]]]) -> None:
        self.steps = steps  # what draws, and what applies

    def __call__(self, batch: Batch) -> Batch:
        """A view of each sample."""
        return {**batch, "x": self.apply(batch["x"], self.draw(batch))} if self.steps else batch

    @torch.inference_mode()
    def draw(self, batch: Batch) -> Drawn:
        """Only the random numbers, for `both`."""
        return [draw(batch["x"]) for draw, _ in self.steps]

    def apply(self, x: Tensor, drawn: Drawn) -> Tensor:
        """Only the images, with what was drawn for them. No gradient flows back: that alone takes a tenth of the time."""
        with torch.inference_mode():
            for (_, apply), one in zip(self.steps, drawn, strict=True):
                x = apply(x, one)
        return x.clone()  # which a backward pass may keep

    def both(self, first: Batch, drawn: Drawn, second: Batch) -> tuple[Batch, Batch]:
        """Views of two batches in one go, of the first with what was drawn before; two calls take half as long again.

        What the first draws before the memory, and the second after it, stays as if each were made in its turn.
        """
        if not self.steps:
            return first, second
        sizes = [batch["x"].shape[1] for batch in (first, second)]
        with torch.inference_mode():
            together = [_beside(*parts) for parts in zip(drawn, self.draw(second), strict=True)]
        one, other = torch.split(self.apply(torch.cat([first["x"], second["x"]], 1), together), sizes, 1)
        return {**first, "x": one}, {**second, "x": other}


def _beside(one: Any, other: Any) -> Any:
    """What was drawn for two batches, as if for one."""
    if isinstance(one, Tensor):
        return torch.cat([one, other], 1)
    return type(one)(*(_beside(*parts) for parts in zip(one, other, strict=True)))


def pipeline(names: Sequence[str], rng: Rng, fields: Mapping[str, Field]) -> Views:
    """The augmentations of these names, one after the other.

    A name may carry a number: pixels (`shift:2`, `erase:4`), a probability (`flip:0.3`, `jitter:1`, `blur:0.1`), or
    the smallest area as a share of the image (`resized_crop:0.3`). Without one, the shifts move by up to an eighth of
    the shorter side: 4 pixels of 32, 1 of 8.

    Raises: UnknownName; BadConfig for a number that is not allowed, or for samples that cannot be augmented so.
    """
    shape = fields["x"].shape if "x" in fields else ()
    return Views([_step(name, rng, shape) for name in names])


def _step(
    full: str, rng: Rng, shape: tuple[int, ...]
) -> tuple[Callable[[Tensor], Any], Callable[[Tensor, Any], Tensor]]:
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
    pixels = {key: value for key, value in settings.items() if key == "pixels"}
    return partial(AUGMENTATIONS[name].draw, rng, **settings), partial(AUGMENTATIONS[name].apply, **pixels)


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
