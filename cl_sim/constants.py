"""Numbers of the host as tensors of a device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these numbers, copied to the device once per process. Nobody writes into it.

    A copy in every step would make the host wait for the device, and a CUDA graph refuses it.
    """
    with torch.inference_mode(False):  # whoever asks first: the tensor outlives the prediction
        return torch.tensor(values, dtype=dtype, device=device)


@cache
def places(count: int, device: torch.device) -> Tensor:
    """The numbers from 0 to count - 1, made once per process. Nobody writes into it.    Shapes: -> [count] int64."""
    with torch.inference_mode(False):
        return torch.arange(count, device=device)
