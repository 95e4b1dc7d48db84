"""Image corruptions in five severities, batched on the device; bytes in, bytes out.

Source: Hendrycks and Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"; the
constants are those of its CIFAR-10 version. Departures: shot noise is drawn from the normal approximation of the photon
counts; fog is flat instead of a fractal, with constants of our own; pixelation averages whole cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.errors import BadConfig, UnknownName
from cl_sim.rng import Rng

SEVERITIES = 5
NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation
SHOTS = (500, 250, 100, 75, 50)  # photons at full brightness
BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # standard deviation, pixels
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)  # factor
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)  # added
FOG = (0.15, 0.3, 0.45, 0.6, 0.75)  # share of white (ours)
CELLS = (0.95, 0.9, 0.85, 0.75, 0.65)  # side of the coarse image, as a share


def gaussian_noise(x: Tensor, level: int, rng: Rng) -> Tensor:
    """Add normal noise."""
    return x + NOISE[level] * rng.normal(*x.shape[1:])


def shot_noise(x: Tensor, level: int, rng: Rng) -> Tensor:
    """Photon counts, by their normal approximation (a Poisson draw takes a number of steps that depends on its value)."""
    return x + (x / SHOTS[level]).sqrt() * rng.normal(*x.shape[1:])


def blur(x: Tensor, level: int, rng: Rng) -> Tensor:
    """Convolve with a Gaussian, edges repeated."""
    sigma = BLUR[level]
    reach = math.ceil(3 * sigma)
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-(at**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    planes = F.pad(x.flatten(0, 2)[:, None], (reach,) * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return planes.view_as(x)


def contrast(x: Tensor, level: int, rng: Rng) -> Tensor:
    """Pull every pixel towards its channel's mean."""
    mean = x.mean((-2, -1), keepdim=True)
    return mean + CONTRAST[level] * (x - mean)


def brightness(x: Tensor, level: int, rng: Rng) -> Tensor:
    """Add to the value of hue, saturation and value; hue and saturation stay."""
    value = x.amax(-3, keepdim=True)
    brighter = (value + BRIGHTNESS[level]).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-6), brighter)


def fog(x: Tensor, level: int, rng: Rng) -> Tensor:
    """Mix with white."""
    return (1 - FOG[level]) * x + FOG[level]


def pixelate(x: Tensor, level: int, rng: Rng) -> Tensor:
    """Average into a coarser image and enlarge it again."""
    height, width = x.shape[-2:]
    coarse = max(1, int(CELLS[level] * height)), max(1, int(CELLS[level] * width))
    planes = F.interpolate(x.flatten(0, 1), coarse, mode="area")
    return F.interpolate(planes, (height, width), mode="nearest").view_as(x)


CORRUPTIONS: dict[str, Callable[[Tensor, int, Rng], Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
    "fog": fog,
    "pixelate": pixelate,
}


def sample_rng(keys: Tensor, index: Tensor) -> Rng:
    """Random numbers that belong to samples, not to calls: one sequence per sample, from its key and its number.

    Shapes: keys, index [N] int64 -> an Rng of N runs. A sample may draw 2^24 numbers before it meets the next one's.
    """
    rng = Rng((), "samples", keys.device)
    rng.key, rng.counter = keys.clone(), index << 24
    return rng


def corrupt(x: Tensor, name: str, severity: int, rng: Rng) -> Tensor:
    """Corrupt a batch.    Shapes: [R, B, C, H, W] uint8 -> same.    Raises: UnknownName; BadConfig for a bad severity."""
    if name not in CORRUPTIONS:
        raise UnknownName("corruption", name, CORRUPTIONS, "cl-sim describe drift-digits")
    if not 1 <= severity <= SEVERITIES:
        raise BadConfig(f"severity is {severity}; allowed are 1 to {SEVERITIES}")
    return (CORRUPTIONS[name](x.float() / 255, severity - 1, rng) * 255).round().clamp(0, 255).to(torch.uint8)


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Turn images anticlockwise about their centre, bilinear, zeros coming in.

    Shapes: x [R, B, C, H, W] uint8, degrees [R, B] -> same as x.
    """
    angle = torch.deg2rad(degrees.flatten())
    cosine, sine = angle.cos(), angle.sin()
    height, width = x.shape[-2:]
    zero = torch.zeros_like(cosine)
    turn = torch.stack([cosine, -sine * height / width, zero, sine * width / height, cosine, zero], -1).view(-1, 2, 3)
    images = x.flatten(0, 1).float()
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    turned = F.grid_sample(images, grid, align_corners=False)
    return turned.round().clamp(0, 255).to(torch.uint8).view_as(x)
