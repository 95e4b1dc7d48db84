"""A clip as a picture: its frames, and beneath each the same with every instance in its own colour and with its number."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_sim.types import Batch

Bytes = NDArray[np.uint8]
WIDEST = 1600  # pixels of a film strip, about
SMALLEST = 96  # pixels that the side of a frame should have
SHARE = 0.45  # of the colour within a mask; its border is all colour
GOLDEN_TURN = 0.618034  # of the hue, from one number to the next
GAP = 2  # pixels between frames
PAUSE = 200  # milliseconds a frame of an animation is shown


def colour(number: int) -> tuple[int, int, int]:
    """The colour of an instance or track, the same wherever its number comes; near numbers differ clearly."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + number * GOLDEN_TURN) % 1, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def painted(frame: Bytes, masks: NDArray[np.bool_], numbers: Sequence[int]) -> Bytes:
    """A frame with its masks coloured by number; those of a negative number are left out.

    Shapes: frame [C, H, W] (grey or RGB), masks [Q, H, W], numbers [Q] -> [H, W, 3].
    """
    picture = np.broadcast_to(frame, (3, *frame.shape[1:])).transpose(1, 2, 0).astype(np.float64)
    for mask, number in zip(masks, numbers, strict=True):
        if number >= 0:
            hue = np.array(colour(number))
            picture[mask] += SHARE * (hue - picture[mask])
            picture[mask & ~_inner(mask)] = hue
    return (picture + 0.5).astype(np.uint8)


def _inner(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of a mask whose four neighbours are in it too."""
    padded = np.pad(mask, 1)
    inner: NDArray[np.bool_] = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner


def draw(batch: Batch, path: Path, *, run: int = 0, clip: int = 0, tracks: NDArray[np.int64] | None = None) -> Path:
    """Draw one clip of a batch: a film strip, or an animation if the file's name ends in .gif.

    Colours are those of the true instances, or of `tracks` if these are given.

    Shapes: frames [R, B, T, C, H, W], masks [R, B, T, Q, H, W], instance [R, B, T, Q]; tracks [T, Q] (-1: none).
    """
    from PIL import Image

    frames, masks, instance = (batch[key][run, clip].cpu().numpy() for key in ("frames", "masks", "instance"))
    numbers = instance if tracks is None else tracks
    height, width = frames.shape[-2:]
    scale = max(1, round(SMALLEST / max(1, min(height, width))))
    shown = [_pair(*one, scale) for one in zip(frames, masks, numbers, strict=True)]
    if path.suffix.lower() == ".gif":
        shown[0].save(path, save_all=True, append_images=shown[1:], duration=PAUSE, loop=0)
        return path
    across, down = shown[0].width + GAP, shown[0].height + GAP
    columns = max(1, min(len(shown), WIDEST // across))
    rows = -(-len(shown) // columns)
    strip = Image.new("RGB", (columns * across - GAP, rows * down - GAP), "white")
    for place, picture in enumerate(shown):
        strip.paste(picture, (place % columns * across, place // columns * down))
    strip.save(path, format="PNG")
    return path


def _pair(frame: Bytes, masks: NDArray[np.bool_], numbers: NDArray[np.int64], scale: int) -> Any:
    """A frame above its coloured twin, as an image, with the numbers written where the masks begin."""
    from PIL import Image, ImageDraw

    plain = np.broadcast_to(frame, (3, *frame.shape[1:])).transpose(1, 2, 0)
    both = np.concatenate([plain, painted(frame, masks, numbers.tolist())])
    picture = Image.fromarray(both.repeat(scale, 0).repeat(scale, 1))
    pen = ImageDraw.Draw(picture)
    for mask, number in zip(masks, numbers.tolist(), strict=True):
        if number >= 0 and mask.any():
            y, x = np.argwhere(mask)[0]
            corner = (max(0, int(x) * scale - 4), max(frame.shape[1] * scale, (frame.shape[1] + int(y)) * scale - 11))
            pen.text(corner, str(number), fill="white", stroke_width=1, stroke_fill="black")
    return picture
