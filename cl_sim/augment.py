"""Training views: batch to batch, on the device, every image with a draw of its own from the counter RNG.

Bytes stay bytes: the encoder turns them into numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.errors import BadConfig, UnknownName
from cl_sim.rng import Rng
from cl_sim.types import Batch, Field


def shift(x: Tensor, rng: Rng, pixels: float = 4) -> Tensor:
    """Move each image by its own whole number of pixels, up to `pixels` each way; zeros come in (a padded random crop).

    Shapes: [R, B, C, H, W] -> same.
    """
    reach = int(pixels)
    runs, batch, _, height, width = x.shape
    corner = rng.below(2 * reach + 1, batch, 2)  # [R, B, 2], the crop's place in the padded image
    rows = corner[..., :1] + torch.arange(height, device=x.device)  # [R, B, H]
    columns = corner[..., 1:] + torch.arange(width, device=x.device)  # [R, B, W]
    run = torch.arange(runs, device=x.device)[:, None, None, None]
    item = torch.arange(batch, device=x.device)[:, None, None]
    padded = F.pad(x, (reach,) * 4)
    return padded[run, item, :, rows[..., None], columns[..., None, :]].movedim(-1, 2)


def flip(x: Tensor, rng: Rng, probability: float = 0.5) -> Tensor:
    """Mirror each image left to right with the given probability.    Shapes: [R, B, C, H, W] -> same."""
    mirrored = rng.chance(probability, x.shape[1])[..., None, None, None]
    return torch.where(mirrored, x.flip(-1), x)


def erase(x: Tensor, rng: Rng, pixels: float = 8) -> Tensor:
    """Blacken one square of that side per image, its centre anywhere in the image.    Shapes: [R, B, C, H, W] -> same.

    Source: DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout".
    """
    height, width = x.shape[-2:]
    top = rng.below(height, x.shape[1], 1) - int(pixels) // 2  # [R, B, 1]
    left = rng.below(width, x.shape[1], 1) - int(pixels) // 2
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    inside_rows = (row >= top) & (row < top + int(pixels))  # [R, B, H]
    inside_columns = (column >= left) & (column < left + int(pixels))
    inside = inside_rows[..., :, None] & inside_columns[..., None, :]
    return x.masked_fill(inside[:, :, None], 0)


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {"shift": shift, "flip": flip, "erase": erase}


def pipeline(names: Sequence[str], rng: Rng, fields: Mapping[str, Field]) -> Callable[[Batch], Batch]:
    """The augmentations of these names, one after the other, as a function from batch to batch; none: the batch itself.

    A name may carry its parameter: `shift:2`, `flip:0.3`.

    Raises: UnknownName; BadConfig for a parameter that is no number, or for samples that are no images.
    """
    steps = [_step(name, rng) for name in names]
    if steps and len(fields["x"].shape) != 3:
        raise BadConfig(f"augment is {list(names)}, but the stream's samples are no images; leave it out")

    def augment(batch: Batch) -> Batch:
        x = batch["x"]
        for step in steps:
            x = step(x)
        return {**batch, "x": x}

    return augment if steps else lambda batch: batch


def _step(full: str, rng: Rng) -> Callable[[Tensor], Tensor]:
    name, colon, text = full.partition(":")
    if name not in AUGMENTATIONS:
        raise UnknownName("augmentation", name, AUGMENTATIONS, "cl-sim list augmentations")
    if not colon:
        return partial(AUGMENTATIONS[name], rng=rng)
    try:
        value = float(text)
    except ValueError:
        raise BadConfig(f"augment has '{full}'; behind the colon comes a number, e.g. shift:4 or flip:0.5") from None
    return partial(_with_value, AUGMENTATIONS[name], rng, value)


def _with_value(function: Callable[..., Tensor], rng: Rng, value: float, x: Tensor) -> Tensor:
    return function(x, rng, value)
