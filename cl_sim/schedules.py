"""Values that change along the stream."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

Step = TypeVar("Step", int, Tensor)


def cosine_value(step: Step, steps: int, base: float, end: float) -> float | Tensor:
    """From `base` at step 0 to `end` at the last step, along half a cosine.

    Units: steps, from 0 to `steps`; a tensor of steps gives a tensor of values, in float64.
    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", without restarts.
    """
    turn = math.pi * (step.double() if isinstance(step, Tensor) else step) / steps
    cosine = torch.cos(turn) if isinstance(turn, Tensor) else math.cos(turn)
    return end + (base - end) / 2 * (1 + cosine)
