"""Wrong labels on purpose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def noisy_labels(
    y: NDArray[np.int64], classes: int, share: float, kind: str, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Labels of which each is wrong with probability `share`.

    `symmetric`: any of the other classes, equally likely. `asymmetric`: the next class, c + 1 mod C (ours: the literature
    uses pairs of look-alikes that differ per data set).

    Shapes: y [N] -> [N].
    """
    wrong = rng.random(len(y)) < share
    step = rng.integers(1, classes, len(y)) if kind == "symmetric" else np.ones(len(y), dtype=np.int64)
    return np.where(wrong, (y + step) % classes, y)
