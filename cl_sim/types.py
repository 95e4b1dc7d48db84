"""The words the rest speaks: Batch, Field, Logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Batch = dict[str, Tensor]
"""Named tensors, each [R, B, ...]: runs first, then the samples of the batch."""

Logs = dict[str, Tensor]
"""Named scalars of one step, each [R]."""


class Field(NamedTuple):
    """One column of a batch or of a memory, without the axes [R, B]."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Fields = Mapping[str, Field]
