"""Moving windows: clips out of one annotated picture, and crops of real clips.

Source: the pseudo-videos of Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", as released:
a window that drifts along a line, a steady turn, a flip, all drawn once per clip.
Departures: windows are measured in shares of the picture (0.6 to 1) and have its shape, so that no second resize distorts
them; what leaves the picture by turning is black, as there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

NARROWEST = 0.6  # side of a window, as a share of the picture
TURN = 15.0  # degrees, at most
MIDDLE = (0.4, 0.6)  # centre of the turn, as a share of the picture


class Camera(NamedTuple):
    """What part of a picture is seen in each frame.

    Units: corner (x, y of the window) and centre in shares of the picture, side a share, angle radians (clockwise on screen).
    Shapes: corner [T, 2], side [], angle [T], centre [2], flip [] bool.
    """

    corner: NDArray[np.float64]
    side: float
    angle: NDArray[np.float64]
    centre: NDArray[np.float64]
    flip: bool


def panning(rng: np.random.Generator, frames: int, pan: float = 0.5, flip: float = 0.5, turn: float = TURN) -> Camera:
    """A camera over a still: with probability `pan` a window that drifts, always a steady turn of at most so many degrees."""
    still = rng.random() >= pan
    side = 1.0 if still else rng.uniform(NARROWEST, 1)
    begin = rng.uniform(0, 1 - side, 2)
    end = rng.uniform(begin, 1 - side)
    along = np.sort(rng.random(frames))[:, None]
    corner = begin * along + end * (1 - along)
    angle = np.sort(rng.uniform(-turn, turn, frames)) * math.pi / 180
    corner, angle = (part[::-1] if rng.random() < 0.5 else part for part in (corner, angle))
    return Camera(corner, side, angle, rng.uniform(*MIDDLE, 2), bool(rng.random() < flip))


def fixed(rng: np.random.Generator, frames: int, crop: float = 0.5, flip: float = 0.5) -> Camera:
    """A camera for real clips: with probability `crop` a window, the same in every frame."""
    side = 1.0 if rng.random() >= crop else rng.uniform(NARROWEST, 1)
    corner = np.tile(rng.uniform(0, 1 - side, 2), (frames, 1))
    return Camera(corner, side, np.zeros(frames), np.full(2, 0.5), bool(rng.random() < flip))


def look(pictures: Tensor, masks: Tensor, camera: Camera) -> tuple[Tensor, Tensor]:
    """What the camera sees: pictures interpolated, masks by the pixel in which a centre falls.

    Shapes: pictures [T, C, H, W] uint8, masks [T, G, H, W] bool -> same.
    """
    frames, _, height, width = pictures.shape
    size = torch.tensor([width, height], dtype=torch.float64)
    centre = torch.from_numpy(camera.centre) * size
    corner = torch.from_numpy(np.ascontiguousarray(camera.corner)) * size
    angle = torch.from_numpy(np.ascontiguousarray(camera.angle))[:, None, None]
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, width)), indexing="ij")
    dx, dy = x - centre[0], y - centre[1]
    across = centre[0] + angle.cos() * dx + angle.sin() * dy  # [T, H, W]: before the turn
    down = centre[1] - angle.sin() * dx + angle.cos() * dy
    across = width - across if camera.flip else across
    u, v = (corner[:, k, None, None] + camera.side * place for k, place in enumerate((across, down)))
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    grid = torch.stack([2 * u / width - 1, 2 * v / height - 1], -1)
    seen = F.grid_sample(pictures.float(), grid.float(), mode="bilinear", padding_mode="border", align_corners=False)
    column, row = u.floor().long().clamp(0, width - 1), v.floor().long().clamp(0, height - 1)
    run = torch.arange(frames)[:, None, None]
    picked = masks[run, :, row, column].movedim(-1, 1) & inside[:, None]  # [T, G, H, W]
    return ((seen * inside[:, None]) + 0.5).to(torch.uint8), picked


def around(rng: np.random.Generator, length: int, frames: int, reach: int) -> NDArray[np.int64]:
    """Frame numbers of a training clip: one, and others up to `reach` away drawn with replacement, in order.

    A video of one frame is repeated.    Shapes: -> [frames].
    """
    centre = int(rng.integers(length))
    near = [t for t in range(max(0, centre - reach), min(length, centre + reach + 1)) if t != centre] or [centre]
    return np.sort(np.append(rng.choice(near, frames - 1), centre))
