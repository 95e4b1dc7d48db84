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


def cosine_decay(step: Step, steps: int, base: float) -> float | Tensor:
    """From `base` at step 0 down to 0.195 of it at the last step, along 7 / 32 of a cosine's turn.

    Units: steps, from 0 to `steps`; a tensor of steps gives a tensor of values, in float64.
    Source: Sohn et al. 2020, "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", as released.
    """
    turn = 7 * math.pi * (step.double() if isinstance(step, Tensor) else step) / (16 * steps)
    if isinstance(turn, Tensor):
        return base * torch.cos(turn).clamp(min=0)
    return base * max(0.0, math.cos(turn))
