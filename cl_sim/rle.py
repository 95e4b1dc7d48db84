"""Masks as run lengths, in both written forms, and as polygons.

Runs go down the columns, column after column, background first. They are written as a list of numbers, or as text (the
compressed form): every number, from the fourth on less the number two before it, in groups of five bits with a sign, lowest
group first, a sixth bit saying that more follow; each group is a character from '0' on.

Source: the annotation format of COCO (Lin et al. 2014, "Microsoft COCO: Common Objects in Context"), as YouTube-VIS and OVIS
use it. Departures: a polygon covers the pixels whose centre is inside one of its parts; COCO's own code also draws a part of the
border, so masks differ by up to a pixel along it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_sim.errors import BadData

Mask = NDArray[np.bool_]
ZERO = ord("0")
FEWEST = 6  # numbers of a polygon: three corners


def encode(mask: Mask) -> dict[str, Any]:
    """A mask in the compressed form.    Shapes: mask [H, W]."""
    return {"size": [int(side) for side in mask.shape], "counts": compress(runs(mask))}


def decode(written: Any, height: int, width: int) -> Mask:
    """A mask from either form of run lengths, or a list of polygons.    Shapes: -> [H, W].

    Raises: BadData with what is wrong, but without saying where.
    """
    if isinstance(written, list):
        return polygons(written, height, width)
    if not isinstance(written, dict) or "counts" not in written:
        raise BadData(f"a segmentation is run lengths (with 'counts'), polygons or null, not {short(written)}")
    size = written.get("size", [height, width])
    if size != [height, width]:
        raise BadData(f"the mask's size is {short(size)}, but the video's is {[height, width]} (height, width)")
    counts = written["counts"]
    return fill(expand(counts) if isinstance(counts, str) else counts, height, width)


def runs(mask: Mask) -> list[int]:
    """Run lengths of a mask, the first of background and perhaps 0.    Shapes: mask [H, W]."""
    flat = np.asarray(mask, dtype=bool).flatten(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    lengths: list[int] = np.diff(edges).tolist()
    return [0, *lengths] if flat.size and flat[0] else lengths


def fill(counts: Any, height: int, width: int) -> Mask:
    """The mask of some run lengths.    Shapes: -> [H, W].    Raises: BadData if they do not fill it exactly."""
    whole = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
    if not whole:
        raise BadData(f"run lengths are text or whole numbers from 0, not {short(counts)}")
    if sum(counts) != height * width:
        raise BadData(f"the run lengths add up to {sum(counts)}, but {height}x{width} pixels are {height * width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def compress(counts: Sequence[int]) -> str:
    """Run lengths as text."""
    letters = []
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            group, value = value & 31, value >> 5  # shifts keep the sign
            done = value == (-1 if group & 16 else 0)
            letters.append(chr(ZERO + group + (0 if done else 32)))
            if done:
                break
    return "".join(letters)


def expand(text: str) -> list[int]:
    """Text as run lengths.    Raises: BadData if it is cut off or has other characters."""
    counts: list[int] = []
    value = places = 0
    for letter in text:
        code = ord(letter) - ZERO
        if not 0 <= code < 64:
            raise BadData(f"the compressed run lengths contain {letter!r}")
        value |= (code & 31) << places
        places += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << places
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = places = 0
    if places:
        raise BadData("the compressed run lengths end in the middle of a number")
    return counts


def polygons(parts: Any, height: int, width: int) -> Mask:
    """The pixels whose centre lies in one of the polygons; those of fewer than three corners are left out.

    Shapes: each part x0, y0, x1, y1, ... in pixels -> [H, W].    Raises: BadData for other than lists of numbers.
    """
    mask = np.zeros((height, width), dtype=bool)
    for part in parts:
        if not isinstance(part, list) or len(part) % 2 or not all(isinstance(n, int | float) for n in part):
            raise BadData(f"a polygon is a list of x and y in turn, not {short(part)}")
        if len(part) >= FEWEST:
            mask |= _polygon(np.array(part, dtype=np.float64).reshape(-1, 2), height, width)
    return mask


def _polygon(corners: NDArray[np.float64], height: int, width: int) -> Mask:
    """Even-odd rule: a centre is inside if a ray to the left crosses the border an odd number of times."""
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    inside = np.zeros((height, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, 0), strict=True):
        if y0 == y1:
            continue
        crosses = (y >= min(y0, y1)) & (y < max(y0, y1))  # [H, 1]
        inside ^= crosses & (x > x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
    return inside


def short(value: Any) -> str:
    """A value as it is shown in an error."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
