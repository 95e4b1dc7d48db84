"""Sprites: cut-out images that move, turn, swell, hide and return before a background, with exact masks.

All that happens in a clip is drawn from the clip's own key, so any clip can be made again.

N clips of T frames with G instances; K sprites of S x S pixels; a canvas of H x W pixels, H = W.

Source: ours, in place of the pseudo-videos of Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance
Segmentation", which need images with masks.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cl_sim.errors import BadConfig
from cl_sim.rng import Rng, host_rng, shift_right

INK = 0.25  # brightness, as a share of full, above which a pixel belongs to a figure on a plain ground
SLOW, FAST, JITTER = 0.8, 3.2, 0.3  # pixels per frame; the last is a standard deviation
TURN, SWELL, SHEAR = 0.35, 0.15, 0.25  # amplitudes: radians, share of the size, slope
RATE = (0.15, 0.6)  # radians of phase per frame
HIDDEN = (3, 12)  # frames an instance stays away, at least and at most
DIMMEST = 0.55  # the darkest tint
FEWEST_PIXELS, FEWEST_SHARE = 25, 0.2  # of an instance that counts as present

Silhouette = Literal["auto", "ink", "ellipse"]
Path = Literal["bounce", "exit"]


class Sheet(NamedTuple):
    """Sprites sorted by class.

    Shapes: pixels [K, C, S, S] uint8, masks [K, S, S] bool, labels [K], first and sizes (of each class) [classes] int64.
    """

    pixels: Tensor
    masks: Tensor
    labels: Tensor
    first: Tensor
    sizes: Tensor


class Pose(NamedTuple):
    """Where and how each instance is in each frame.

    Units: x and y are the centre in pixels, angle radians, scale 1 for as it is, shear a slope, phase (of the bending) radians.
    Shapes: depth [N, G] (0 is nearest), all others [N, T, G]; hidden is bool.
    """

    x: Tensor
    y: Tensor
    angle: Tensor
    scale: Tensor
    shear: Tensor
    phase: Tensor
    hidden: Tensor
    depth: Tensor


class Drawn(NamedTuple):
    """A composed clip.    Shapes: frames [N, T, C, H, W] uint8, masks [N, T, G, H, W] bool, visible [N, T, G] (a share)."""

    frames: Tensor
    masks: Tensor
    visible: Tensor


def sheet(x: NDArray[np.uint8], y: NDArray[np.int64], kind: Silhouette, device: torch.device) -> Sheet:
    """Cut the images out.    Shapes: x [K, C, S, S], y [K].

    `ink`: figures on a plain ground, what differs from the ground by a quarter of full brightness, and one pixel around it;
    a bright ground is turned dark. `ellipse`: |x / a|^4 + |y / b|^4 <= 1 with a and b of 0.7 to 1, another for every image.
    `auto`: ink for grey images.
    """
    kind = ("ink" if x.shape[1] == 1 else "ellipse") if kind == "auto" else kind
    order = host_rng(0, "sprites").permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    pixels, labels = torch.from_numpy(np.ascontiguousarray(x[order])), torch.from_numpy(y[order])
    if kind == "ink":
        border = torch.cat([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], -1)
        pixels = 255 - pixels if border.float().median() > 127 else pixels
        bright = pixels.amax(1, keepdim=True).float() > 255 * INK
        masks = F.max_pool2d(bright.float(), 3, 1, 1)[:, 0] > 0
    else:
        masks = _ellipses(len(y), x.shape[-1])
    count = torch.bincount(labels)
    first = count.cumsum(0) - count
    return Sheet(*(part.to(device) for part in (pixels, masks, labels, first, count)))


def _ellipses(count: int, size: int) -> Tensor:
    half = torch.from_numpy(host_rng(0, "ellipses").uniform(0.7, 1.0, (2, count, 1)))
    place = ((torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1).abs()
    x, y = (place / half) ** 4
    inside: Tensor = x[:, None] + y[:, :, None] <= 1
    return inside


def cast(rng: Rng, sprites: Sheet, allowed: Tensor, instances: int, same_class: float) -> Tensor:
    """Which sprites appear, no two the same: a share of them of one class, the others of any.

    Shapes: allowed [N, k] (class numbers) -> [N, G] rows of the sheet.    Raises: BadConfig if a class has fewer than G sprites.
    """
    alike = math.ceil(same_class * instances)
    among = rng.below(allowed.shape[1], instances)
    among = torch.where(torch.arange(instances, device=among.device) < alike, among[:, :1], among)
    label = allowed.gather(1, among)  # [N, G]
    count = sprites.sizes[label]
    word = shift_right(rng.bits(2), 32)  # one start and one stride per clip, in units of each class's size
    start = (word[:, :1] * count) >> 32
    longest = ((count - 1) // max(instances - 1, 1)).clamp(min=1)
    stride = 1 + ((word[:, 1:] * longest) >> 32)
    place = (start + stride * torch.arange(instances, device=start.device)) % count
    return sprites.first[label] + place


def shown(sprites: Sheet, instances: int, name: str) -> Tensor:
    """The classes that have a sprite.    Shapes: -> [k].    Raises: BadConfig if one has fewer than there are instances."""
    known = sprites.sizes.nonzero()[:, 0]
    fewest = int(sprites.sizes[known].min())
    if fewest < instances:
        raise BadConfig(
            f"stream.instances is {instances}, but a class of '{name}' has only {fewest} images; use fewer instances"
        )
    return known


def poses(
    rng: Rng,
    frames: int,
    instances: int,
    size: int,
    sprite: int,
    speed: Tensor,
    deform: Tensor,
    leaves: float,
    path: Path,
) -> Pose:
    """Draw what the instances do.

    Each moves in a random direction with some jitter, reflected at the border or leaving on one side and entering on
    the other; turns, swells and leans as sines of its own; and with probability `leaves` is away for some frames.

    Shapes: speed and deform [N] (factors).    Units: size and sprite are sides in pixels.
    """
    u = rng.uniform(instances, 14).unbind(-1)  # [N, G] each
    heading, pace = 2 * math.pi * u[2], speed[:, None] * (SLOW + (FAST - SLOW) * u[3])
    shake = JITTER * speed[:, None, None, None] * rng.normal(2, frames, instances)  # [N, 2, T, G]
    time = torch.arange(frames, device=u[0].device)[:, None]
    along: list[Tensor] = []
    for axis, velocity in enumerate((pace * heading.cos(), pace * heading.sin())):
        low, high = (sprite / 2, size - sprite / 2) if path == "bounce" else (-sprite, size + sprite)
        begin = low + (high - low) * u[axis] if path == "bounce" else size * u[axis]
        gone = velocity[:, None] * time + (shake[:, axis].cumsum(1) - shake[:, axis, :1])
        along.append(_folded(begin[:, None] + gone, low, high, path))

    def swing(number: int, amplitude: float) -> Tensor:
        rate = RATE[0] + (RATE[1] - RATE[0]) * u[number]
        return amplitude * deform[:, None, None] * (rate[:, None] * time + 2 * math.pi * u[number + 1][:, None]).sin()

    first = (frames * u[10]).long()[:, None]
    away = HIDDEN[0] + ((HIDDEN[1] - HIDDEN[0] + 1) * u[11]).long()[:, None]
    hidden = (u[12][:, None] < leaves) & (time >= first) & (time < first + away)
    phase = 2 * math.pi * u[13][:, None] + RATE[1] * time
    swell = 1 + swing(6, SWELL)
    return Pose(along[0], along[1], swing(4, TURN), swell, swing(8, SHEAR), phase, hidden, rng.permutation(instances))


def _folded(place: Tensor, low: float, high: float, path: Path) -> Tensor:
    """Reflect at both ends, or go round."""
    span = high - low
    if path == "exit":
        return low + (place - low).remainder(span)
    return low + span - ((place - low).remainder(2 * span) - span).abs()


def tints(rng: Rng, instances: int, channels: int, spread: float) -> Tensor:
    """A factor on each channel of each instance, from 1 down to 0.55 for a spread of 1.    Shapes: -> [N, G, C]."""
    return 1 - (1 - DIMMEST) * spread * rng.uniform(instances, channels)


def smooth(rng: Rng, channels: int) -> Tensor:
    """Backdrops of clouds: 4x4 grey levels, to be interpolated.    Shapes: -> [N, C, 4, 4]."""
    return 0.1 + 0.3 * rng.uniform(channels, 4, 4)


def photographs(rng: Rng, sprites: Sheet) -> Tensor:
    """Backdrops out of other images, uncut and darkened to half, so that sprites stand out.    Shapes: -> [N, C, S, S]."""
    return sprites.pixels[rng.below(len(sprites.pixels), 1)[:, 0]].float() / 510


def scenery(rng: Rng, frames: int, backdrop: Tensor, size: int, noise: float, light: Tensor) -> Tensor:
    """A background that stands still, with noise of its own in every frame.

    Shapes: backdrop [N, C, h, w], light [N] (added brightness) -> [N, T, C, H, W] in units of full brightness.
    """
    coarse = backdrop + light[:, None, None, None]
    still = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)[:, None]
    if noise == 0:
        return still.expand(-1, frames, -1, -1, -1)
    return still + noise * rng.normal(frames, backdrop.shape[1], size, size)


def compose(sprites: Sheet, which: Tensor, pose: Pose, tint: Tensor, scene: Tensor, wave: float = 0.0) -> Drawn:
    """Paint the instances on the scene, far ones first; a pixel takes the sprite's pixel in which its centre falls.

    A sprite's pixel q is seen at centre + scale * turn(angle) * lean(shear) * q. `wave` bends the sprites, by so many pixels
    at most. The share of an instance that is visible is in terms of its size, of which parts may lie outside the canvas.

    Shapes: which [N, G], tint [N, G, C], scene [N, T, C, H, W].    Units: scene and tint 1 for full brightness.
    """
    n, _, _, height, width = scene.shape
    instances, side = which.shape[1], sprites.masks.shape[-1]
    cell = (side + 2) ** 2  # a sprite with an empty border, on which everything falls that is outside
    outlines = F.pad(sprites.masks[which], (1, 1, 1, 1)).flatten()  # [N * G * cell]
    pixels = F.pad(sprites.pixels[which], (1, 1, 1, 1)).movedim(2, 0).flatten(1)  # [C, N * G * cell]
    u, v = (place.clamp_(-1, side).floor_() for place in _seen_from(pose, height, width, side, wave))
    at = v.mul_(side + 2).add_(u).add_(side + 3).long()  # [N, T, G, H, W], in [0, cell)
    at += torch.arange(n * instances, device=which.device).view(n, 1, instances, 1, 1) * cell
    outline = outlines[at] & ~pose.hidden[..., None, None]
    number = torch.arange(instances, dtype=torch.int32, device=which.device)
    code = (pose.depth.int() * instances + number)[:, None, :, None, None]  # orders by depth, and tells who
    code = torch.where(outline, code, instances**2)
    nearest = reduce(torch.minimum, code.unbind(2))  # [N, T, H, W]; 5 times faster than a minimum along the axis
    masks = outline & (code == nearest[:, :, None])
    owner = (nearest % instances).long()  # anyone where nobody is
    run = torch.arange(n, device=which.device)[:, None, None, None]
    place = at.gather(2, owner[:, :, None])[:, :, 0]  # [N, T, H, W]
    colour = pixels[:, place].movedim(0, 2).to(scene.dtype) / 255 * tint[run, owner].movedim(-1, 2)  # [N, T, C, H, W]
    painted = torch.where((nearest < instances**2)[:, :, None], colour, scene)
    full = sprites.masks.flatten(1).sum(1)[which][:, None] * pose.scale**2
    visible = masks.sum((-2, -1)) / full.clamp(min=1)
    return Drawn((painted.clamp(0, 1) * 255 + 0.5).to(torch.uint8), masks, visible)


def _seen_from(pose: Pose, height: int, width: int, side: int, wave: float) -> tuple[Tensor, Tensor]:
    """The place on the sprite, from its upper left corner, of every pixel of the canvas.    Shapes: -> [N, T, G, H, W], both."""
    cosine, sine = pose.angle.cos() / pose.scale, pose.angle.sin() / pose.scale
    x = torch.arange(width, device=pose.x.device) + 0.5 - pose.x[..., None]  # [N, T, G, W]
    y = torch.arange(height, device=pose.x.device) + 0.5 - pose.y[..., None]  # [N, T, G, H]
    turned_y = (cosine[..., None] * y)[..., None] - (sine[..., None] * x)[..., None, :]
    turned_x = (sine[..., None] * y)[..., None] + (cosine[..., None] * x)[..., None, :]
    turned_x.sub_(pose.shear[..., None, None] * turned_y)
    if wave:
        phase = pose.phase[..., None, None]
        turned_x = turned_x + wave * (2 * math.pi / side * turned_y + phase).sin()
        turned_y = turned_y + wave * (2 * math.pi / side * turned_x + 2 * phase).sin()
    return turned_x.add_(side / 2), turned_y.add_(side / 2)


def is_present(drawn: Drawn) -> Tensor:
    """Which instances show enough of themselves to count: 25 pixels and a fifth.    Shapes: -> [N, T, G] bool."""
    return (drawn.masks.sum((-2, -1)) >= FEWEST_PIXELS) & (drawn.visible >= FEWEST_SHARE)
