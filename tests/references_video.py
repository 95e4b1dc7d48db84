"""Slow twins of clips, boxes and run lengths: loops and `math`, nothing shared with the package."""

from __future__ import annotations

import math
from typing import Any


def compose(
    pixels: Any, masks: Any, which: Any, pose: dict[str, Any], tint: Any, scene: Any, wave: float
) -> tuple[Any, Any]:
    """One frame, painted from the farthest instance to the nearest.

    pixels [K][C][S][S], masks [K][S][S], which [G], pose values [G], tint [G][C], scene [C][H][W] -> picture [C][H][W] in
    bytes, owner [H][W] (-1: nobody).
    """
    side, height, width = len(masks[0]), len(scene[0]), len(scene[0][0])
    owner = [[-1] * width for _ in range(height)]
    picture = [[[byte(value) for value in row] for row in plane] for plane in scene]
    for g in sorted(range(len(which)), key=lambda g: -pose["depth"][g]):
        if pose["hidden"][g]:
            continue
        angle, scale, shear = pose["angle"][g], pose["scale"][g], pose["shear"][g]
        # the matrix scale * turn * lean, then its inverse by Cramer's rule
        a, c = scale * math.cos(angle), scale * math.sin(angle)
        b = scale * (math.cos(angle) * shear - math.sin(angle))
        d = scale * (math.sin(angle) * shear + math.cos(angle))
        det = a * d - b * c
        for y in range(height):
            for x in range(width):
                dx, dy = x + 0.5 - pose["x"][g], y + 0.5 - pose["y"][g]
                qx, qy = (d * dx - b * dy) / det, (a * dy - c * dx) / det
                if wave:
                    qx += wave * math.sin(2 * math.pi * qy / side + pose["phase"][g])
                    qy += wave * math.sin(2 * math.pi * qx / side + 2 * pose["phase"][g])
                u, v = math.floor(qx + side / 2), math.floor(qy + side / 2)
                if 0 <= u < side and 0 <= v < side and masks[which[g]][v][u]:
                    owner[y][x] = g
                    for channel in range(len(scene)):
                        picture[channel][y][x] = byte(pixels[which[g]][channel][v][u] / 255 * tint[g][channel])
    return picture, owner


def byte(value: float) -> int:
    """A brightness as a byte, rounded half up."""
    return math.floor(min(max(value, 0.0), 1.0) * 255 + 0.5)


def box(mask: Any) -> tuple[int, int, int, int]:
    """The smallest box around the true cells of a mask."""
    rows = [y for y, row in enumerate(mask) if any(row)]
    columns = [x for x in range(len(mask[0])) if any(row[x] for row in mask)]
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else (0, 0, 0, 0)


def overlap(one: Any, two: Any) -> float:
    """Intersection over union of two boxes of whole pixels, by counting pixels."""
    cells = [{(x, y) for x in range(int(b[0]), int(b[2])) for y in range(int(b[1]), int(b[3]))} for b in (one, two)]
    union = cells[0] | cells[1]
    return len(cells[0] & cells[1]) / len(union) if union else 0.0


def runs(mask: Any) -> list[int]:
    """Run lengths of a mask, walking down its columns."""
    found, value = [0], False
    for x in range(len(mask[0])):
        for y in range(len(mask)):
            if bool(mask[y][x]) == value:
                found[-1] += 1
            else:
                value = not value
                found.append(1)
    return found


def compressed(counts: list[int]) -> str:
    """Run lengths as text, through strings of binary digits in two's complement."""
    text = ""
    for place, count in enumerate(counts):
        value = count - (counts[place - 2] if place > 2 else 0)
        groups = 1
        while not -(2 ** (5 * groups - 1)) <= value < 2 ** (5 * groups - 1):
            groups += 1
        digits = format(value % 2 ** (5 * groups), f"0{5 * groups}b")
        low_first = [digits[end - 5 : end] for end in range(len(digits), 0, -5)]
        for number, group in enumerate(low_first):
            more = "0" if number == groups - 1 else "1"
            text += chr(48 + int(more + group, 2))
    return text


def winds(corners: list[tuple[float, float]], x: float, y: float) -> bool:
    """Is a point inside a polygon? By the sum of the angles under which it sees the sides (odd number of turns)."""
    turned = 0.0
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        a, b = math.atan2(y0 - y, x0 - x), math.atan2(y1 - y, x1 - x)
        turned += (b - a + math.pi) % (2 * math.pi) - math.pi
    return round(turned / (2 * math.pi)) % 2 != 0


def look(picture: Any, mask: Any, corner: Any, side: float, angle: float, centre: Any, flip: bool) -> tuple[Any, Any]:
    """One plane of a frame and a mask as a camera sees them; corner and centre in shares, angle in radians.

    picture [H][W] in bytes, mask [H][W] -> the same.
    """
    height, width = len(mask), len(mask[0])
    seen = [[0] * width for _ in range(height)]
    shown = [[False] * width for _ in range(height)]

    def at(x: int, y: int) -> float:
        return float(picture[min(max(y, 0), height - 1)][min(max(x, 0), width - 1)])

    for row in range(height):
        for column in range(width):
            px, py = column + 0.5 - centre[0] * width, row + 0.5 - centre[1] * height
            radius, direction = math.hypot(px, py), math.atan2(py, px) - angle
            x = centre[0] * width + radius * math.cos(direction)
            y = centre[1] * height + radius * math.sin(direction)
            if not (0 <= x < width and 0 <= y < height):
                continue
            x = width - x if flip else x
            x, y = corner[0] * width + side * x, corner[1] * height + side * y
            shown[row][column] = mask[min(math.floor(y), height - 1)][min(math.floor(x), width - 1)]
            left, top = math.floor(x - 0.5), math.floor(y - 0.5)
            right, low = x - 0.5 - left, y - 0.5 - top
            upper = at(left, top) * (1 - right) + at(left + 1, top) * right
            under = at(left, top + 1) * (1 - right) + at(left + 1, top + 1) * right
            seen[row][column] = math.floor(upper * (1 - low) + under * low + 0.5)
    return seen, shown
