"""Encoders of instances: a vector for every box of every frame.

Written for one run: frames come as a batch of N images, clips laid end to end. Boxes without area give vectors that nobody uses.
`crop` looks at each box by itself, `roi` passes each frame once and looks at the boxes on its features, `given` hands on features
that a stream brings.

Source: ours; boxes are sampled as RoIAlign does, He et al. 2017, "Mask R-CNN".
Departures: one sample per cell, at its centre; a box that leaves the frame by more than a pixel sees zeros there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.base import EncoderConfig
from cl_sim.errors import BadConfig
from cl_sim.types import Fields

GROUPS = 8  # of GroupNorm
STRIDE = 4  # of the features of `roi`


@dataclass(frozen=True, kw_only=True)
class InstanceConfig(EncoderConfig):
    """Settings of every encoder of instances that learns."""

    width: int = 64  # of the embedding
    hidden: tuple[int, ...] = (128, 128)  # units of the head before it
    channels: tuple[int, ...] = (24, 48, 64)  # of the convolutions; multiples of 8
    margin: float = 0.1  # by how much of its size a box is enlarged

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, width=1, margin=0)
        if not self.channels or any(c < GROUPS or c % GROUPS for c in self.channels):
            raise BadConfig(f"encoder.channels is {list(self.channels)}; each must be a multiple of {GROUPS}")


@dataclass(frozen=True, kw_only=True)
class CropConfig(InstanceConfig):
    """Settings of `crop` and `crop+mask`."""

    size: int = 24  # pixels of a resampled box

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, size=8)


@dataclass(frozen=True, kw_only=True)
class RoiConfig(InstanceConfig):
    """Settings of `roi`."""

    size: int = 6  # cells of a resampled box on the features

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, size=1)


@dataclass(frozen=True, kw_only=True)
class GivenConfig:
    """Settings of `given`: none."""


def crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The boxes of each image, resampled to squares: cells take the bilinear value at their centre.

    Shapes: images [N, C, H, W], boxes [N, Q, 4] x0, y0, x1, y1 -> [N, Q, C, size, size].    Units: boxes in pixels of the images.
    """
    n, q = boxes.shape[:2]
    height, width = images.shape[-2:]
    cells = (torch.arange(size, device=images.device) + 0.5) / size
    x0, y0, x1, y1 = boxes.to(images.dtype)[..., None].unbind(2)  # [N, Q, 1] each
    x, y = x0 + cells * (x1 - x0), y0 + cells * (y1 - y0)  # [N, Q, size], edges of pixel 0 at 0 and 1
    across = (2 * x[:, :, None] / width - 1).expand(-1, -1, size, -1)
    grid = torch.stack([across, (2 * y[..., None] / height - 1).expand_as(across)], -1)
    taken = F.grid_sample(
        images, grid.reshape(n, q * size, size, 2), mode="bilinear", padding_mode="border", align_corners=False
    )
    inside = (_near(y, height)[..., None] & _near(x, width)[:, :, None])[:, :, None]  # [N, Q, 1, size, size]
    return taken.reshape(n, -1, q, size, size).transpose(1, 2) * inside


def _near(place: Tensor, size: int) -> Tensor:
    """Is it inside, or outside by at most a pixel?"""
    return (place >= -0.5) & (place <= size + 0.5)


def enlarged(boxes: Tensor, margin: float) -> Tensor:
    """Boxes that keep their centre and grow by this share of their size.    Shapes: [..., 4] -> same."""
    corner, other = boxes[..., :2], boxes[..., 2:]
    more = (other - corner) * margin / 2
    return torch.cat([corner - more, other + more], -1)


def crop_masks(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The mask of each box, resampled like the image.    Shapes: [N, Q, H, W] bool, [N, Q, 4] -> [N, Q, 1, size, size]."""
    n, q = boxes.shape[:2]
    each = masks.reshape(n * q, 1, *masks.shape[2:]).to(boxes.dtype)
    return crop(each, boxes.reshape(n * q, 1, 4), size).reshape(n, q, 1, size, size)


def convolutions(inner: int, channels: tuple[int, ...], strides: tuple[int, ...]) -> nn.Sequential:
    """3x3 convolutions, each with GroupNorm and ReLU: instances of a clip are too much alike for BatchNorm."""
    layers: list[nn.Module] = []
    for (before, after), stride in zip(pairwise((inner, *channels)), strides, strict=True):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(GROUPS, after), nn.ReLU()]
    return nn.Sequential(*layers)


def head(sizes: tuple[int, ...]) -> nn.Sequential:
    """A perceptron without an activation at its end; weights uniform within sqrt(3 / fan-in), biases 0."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        linear = nn.Linear(inner, outer)
        bound = math.sqrt(3 / inner)
        nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Instances(nn.Module):
    """What the encoders of instances have in common: pixel scaling, a trunk for features, a head for embeddings.

    `takes` names the fields that `forward` wants, in order; `inner` is the width of the features, `dim` of the embeddings.
    """

    mean: Tensor
    std: Tensor
    takes: tuple[str, ...] = ("frames", "boxes")
    inner: int
    dim: int

    def __init__(self, cfg: InstanceConfig, channels: int, inner: int) -> None:
        super().__init__()
        if cfg.mean and len(cfg.mean) != channels:
            raise BadConfig(
                f"encoder.mean has {len(cfg.mean)} values, but the frames have {channels} channels; give one for each"
            )
        self.cfg, self.inner, self.dim = cfg, inner, cfg.width
        self.register_buffer("mean", torch.tensor(cfg.mean or (0.0,) * channels).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(cfg.std or (1.0,) * channels).view(-1, 1, 1))
        self.head = head((inner, *cfg.hidden, cfg.width))

    def scaled(self, frames: Tensor) -> Tensor:
        """Bytes as numbers in [0, 1], then mean and deviation."""
        numbers = frames.float() / 255 if frames.dtype == torch.uint8 else frames
        return (numbers - self.mean) / self.std

    def features(self, *inputs: Tensor) -> Tensor:
        """What the head sees of each box.    Shapes: -> [N, Q, inner]."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """Embeddings, not normalised.    Shapes: -> [N, Q, dim]."""
        embedded: Tensor = self.head(self.features(*inputs))
        return embedded


class Crop(Instances):
    """Each box by itself, with its mask as one more channel if that is wanted.

    Shapes: frames [N, C, H, W], boxes [N, Q, 4], masks [N, Q, H, W] -> [N, Q, dim].
    """

    def __init__(self, cfg: CropConfig, channels: int, masked: bool) -> None:
        strides = (2,) * len(cfg.channels)
        left = cfg.size
        for _ in strides:
            left = (left + 1) // 2
        super().__init__(cfg, channels, cfg.channels[-1] * left**2)
        self.size, self.margin = cfg.size, cfg.margin
        self.trunk = convolutions(channels + masked, cfg.channels, strides)
        if masked:
            self.takes = ("frames", "boxes", "masks")

    def features(self, *inputs: Tensor) -> Tensor:
        """The convolved crops, flattened."""
        boxes = enlarged(inputs[1], self.margin)
        views = crop(self.scaled(inputs[0]), boxes, self.size)
        if len(inputs) > 2:
            views = torch.cat([views, crop_masks(inputs[2], boxes, self.size)], 2)
        n, q = boxes.shape[:2]
        seen: Tensor = self.trunk(views.flatten(0, 1))
        return seen.reshape(n, q, -1)


class Roi(Instances):
    """One pass per frame; boxes are cut from its features.    Shapes: frames [N, C, H, W], boxes [N, Q, 4] -> [N, Q, dim]."""

    def __init__(self, cfg: RoiConfig, channels: int) -> None:
        super().__init__(cfg, channels, cfg.channels[-1] * cfg.size**2)
        self.size, self.margin = cfg.size, cfg.margin
        strides = (2, 2) if len(cfg.channels) > 1 else (STRIDE,)
        self.trunk = convolutions(channels, cfg.channels, (*strides, *(1,) * (len(cfg.channels) - len(strides))))

    def features(self, *inputs: Tensor) -> Tensor:
        """The features inside each box, flattened."""
        whole = self.trunk(self.scaled(inputs[0]))
        boxes = enlarged(inputs[1], self.margin)
        taken = crop(whole, boxes / STRIDE, self.size)
        return taken.flatten(2)


class Given(nn.Module):
    """Features that the stream brings are the embeddings.    Shapes: features [N, Q, F] -> same."""

    takes = ("features",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = self.dim = width

    def features(self, *inputs: Tensor) -> Tensor:
        """As they came."""
        return inputs[0].float()

    def head(self, features: Tensor) -> Tensor:
        """As they are."""
        return features

    def forward(self, *inputs: Tensor) -> Tensor:
        """As they came."""
        return self.features(*inputs)


class Embedder(nn.Module):
    """An encoder of instances, with class scores behind its embeddings if there are classes to tell apart.

    Shapes: the encoder's inputs -> [N, Q, dim], or [N, Q, dim + classes].
    """

    def __init__(self, encoder: Any, classes: int = 0) -> None:
        super().__init__()
        self.encoder, self.dim, self.takes = encoder, encoder.dim, encoder.takes
        self.proposes = getattr(encoder, "proposes", False)  # its own instances and their classes
        self.classify = nn.Linear(encoder.inner, classes) if classes and not self.proposes else None

    def forward(self, *inputs: Tensor) -> Tensor:
        """Embeddings, then class scores."""
        if self.proposes:
            whole: Tensor = self.encoder(*inputs)
            return whole
        features = self.encoder.features(*inputs)
        embedded: Tensor = self.encoder.head(features)
        return embedded if self.classify is None else torch.cat([embedded, self.classify(features)], -1)


def build(name: str, cfg: Any, fields: Fields, classes: int) -> nn.Module:
    """A fresh encoder for the clips of a stream.    Raises: BadConfig if the stream lacks what it needs."""
    if name == "given":
        if "features" not in fields:
            raise BadConfig(
                "encoder is 'given', but this stream brings no features; use --set encoder.name=crop, roi or crop+mask"
            )
        return Given(fields["features"].shape[-1])
    channels = fields["frames"].shape[1]
    made = Roi(cfg, channels) if name == "roi" else Crop(cfg, channels, masked=name == "crop+mask")
    if cfg.frozen:
        made.requires_grad_(False)
    return made
