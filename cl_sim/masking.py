"""Masks over patches of an image, drawn as blocks of random shapes, and images without the masked patches.

Source: Poulakakis-Daktylidis and Jamali-Rad 2024, "BECLR: Batch Enhanced Contrastive Few-Shot Learning", as released, after
Bao et al. 2022, "BEiT: BERT Pre-Training of Image Transformers", algorithm 1. Departures: at most a hundred tries per image in
all, so that the shape of the work is fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_sim.errors import BadConfig
from cl_sim.rng import Rng

TRIES = 10  # to find a next block
MOST_TRIES = 100  # for all blocks of an image
SLIMMEST = 0.3  # least ratio of a block's sides


def block_mask(grid: tuple[int, int], low: float, high: float, rng: Rng, batch: int = 0) -> Tensor:
    """Patches to hide: a share of the grid uniform in [low, high], put together from blocks; never more than that share.

    A block's area is uniform between (shorter side // 3) squared and what is still wanted, the ratio of its sides
    log-uniform in [0.3, 1 / 0.3]; it is taken if it adds something, and not too much. After ten tries in vain the mask
    stays as it is, so a small share may give an empty mask.

    Shapes: grid (H, W) in patches -> [R, H, W] bool, or [R, B, H, W] for a batch; True = masked.    Raises: BadConfig.
    """
    if not 0 <= low <= high <= 1:
        raise BadConfig(
            f"a mask of {low} to {high} of an image cannot be drawn; both are shares, the smaller one first"
        )
    height, width = grid
    images = max(batch, 1)
    row, column = (torch.arange(size, device=rng.key.device) for size in grid)
    wanted = (low + (high - low) * rng.uniform(images)) * (height * width)  # [R, B]
    mask = torch.zeros(*wanted.shape, height, width, dtype=torch.bool, device=wanted.device)
    covered, failed = torch.zeros_like(wanted), torch.zeros_like(wanted)
    draws = rng.uniform(MOST_TRIES, 4, images)  # [R, tries, 4, B]
    for area, slope, down, right in (one.unbind(1) for one in draws.unbind(1)):
        left_over = wanted - covered
        least = float((min(grid) // 3) ** 2)
        size = least + (left_over - least) * area
        ratio = torch.exp(math.log(SLIMMEST) * (1 - 2 * slope))
        tall, wide = (size * ratio).clamp(min=0).sqrt().round(), (size / ratio).clamp(min=0).sqrt().round()
        top, side = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
        rows = (row >= top[..., None]) & (row < (top + tall)[..., None])  # [R, B, H]
        columns = (column >= side[..., None]) & (column < (side + wide)[..., None])
        block = rows[..., :, None] & columns[..., None, :]
        added = (block & ~mask).sum((-2, -1)).to(wanted.dtype)
        searching = (covered < wanted) & (failed < TRIES)
        taken = searching & (tall < height) & (wide < width) & (added >= 1) & (added <= left_over)
        mask = mask | (block & taken[..., None, None])
        covered = covered + added * taken
        failed = torch.where(taken, 0.0, failed + 1)
    return mask if batch else mask[:, 0]


def erase_patches(x: Tensor, mask: Tensor, patch: int) -> Tensor:
    """The images with their masked patches at 0; all else is untouched.

    Shapes: x [..., C, H * patch, W * patch], mask [..., H, W] bool -> x.    Raises: BadConfig if they do not fit.
    """
    sides = tuple(patch * size for size in mask.shape[-2:])
    if x.shape[-2:] != sides:
        raise BadConfig(
            f"a mask of {mask.shape[-2]} x {mask.shape[-1]} patches of {patch} pixels does not fit images of "
            f"{x.shape[-2]} x {x.shape[-1]}; the patch must divide the side"
        )
    pixels = mask.repeat_interleave(patch, -2).repeat_interleave(patch, -1)
    return x.masked_fill(pixels[..., None, :, :], 0)
