"""Slow twins for A-GEM: one run, loops and `math`, written from the definitions. They share no code with cl_sim."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(a * b for a, b in zip(u, v, strict=True))


def project(g: Vector, r: Vector) -> list[float]:
    """A-GEM, eq. 11."""
    if dot(g, r) >= 0:
        return list(g)
    share = dot(g, r) / dot(r, r)
    return [a - share * b for a, b in zip(g, r, strict=True)]
