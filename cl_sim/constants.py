"""Numbers of the host as tensors of a device, made once per process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, cast

import torch
from torch import Tensor

Words = ParamSpec("Words")


def lasting(make: Callable[Words, Tensor]) -> Callable[Words, Tensor]:
    """Keep what a function makes: the same words get the same tensor, and nobody writes into it.

    A copy in every step would make the host wait for the device, and a CUDA graph refuses it. Whoever asks first may be
    predicting, which the tensor outlives, or be on one of several CUDA streams, and the others will read it as well.
    """

    @wraps(make)
    def made(*args: Words.args, **words: Words.kwargs) -> Tensor:
        with torch.inference_mode(False):
            tensor = make(*args, **words)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()
        return tensor

    return cast(Callable[Words, Tensor], cache(made))


@lasting
def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of these numbers."""
    return torch.tensor(values, dtype=dtype, device=device)


@lasting
def places(count: int, device: torch.device) -> Tensor:
    """The numbers from 0 to count - 1.    Shapes: -> [count] int64."""
    return torch.arange(count, device=device)
