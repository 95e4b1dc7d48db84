"""Residual networks for small images: the reduced ResNet-18 of the replay papers, and its full-width relative.

Source: He et al. 2016; reduced to 20 channels and a 3x3 stem by Lopez-Paz and Ranzato 2017 (GEM).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from cl_sim.encoders.base import EncoderConfig
from cl_sim.errors import BadConfig
from cl_sim.types import Field

POOL = 4  # average pool: kernel and stride, no padding


@dataclass(frozen=True, kw_only=True)
class ReducedResNet18Config(EncoderConfig):
    """Settings of the reduced ResNet-18."""

    width: int = 20  # channels of the first stage; the others have 2, 4 and 8 times as many


@dataclass(frozen=True, kw_only=True)
class ResNet18Config(EncoderConfig):
    """Settings of the ResNet-18 with a 3x3 stem."""

    width: int = 64  # channels of the first stage


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut.    Shapes: [B, inner, H, W] -> [B, outer, H/stride, W/stride]."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """Residual step."""
        inside = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inside)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Four stages of two blocks, then a 4x4 average pool, flattened channel by channel.

    Shapes: [B, C, H, W] -> [B, dim]. With width 20: dim 160 for 32x32 images, 640 for 64x64 and 84x84 (2x2 cells are left).
    Images whose last feature map is smaller than 4x4 (below 25 pixels) cannot be pooled.

    Raises: BadConfig for too small images.
    """

    def __init__(self, channels: int, height: int, side: int, width: int) -> None:
        super().__init__()
        cells = (-(-height // 8) // POOL) * (-(-side // 8) // POOL)
        if cells < 1:
            raise BadConfig(
                f"a ResNet-18 needs images of at least 25 pixels, these have {height}x{side}; use encoder mlp"
            )
        widths = (width, 2 * width, 4 * width, 8 * width)
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages: list[nn.Module] = []
        inner = width
        for outer, stride in zip(widths, (1, 2, 2, 2), strict=True):
            stages += [Block(inner, outer, stride), Block(outer, outer, 1)]
            inner = outer
        self.stages = nn.Sequential(*stages)
        self.dim = inner * cells

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        return F.avg_pool2d(self.stages(self.stem(x)), POOL).flatten(1)


def build(cfg: ReducedResNet18Config | ResNet18Config, field: Field) -> ResNet18:
    """A ResNet-18 for images of this field."""
    if len(field.shape) != 3:
        raise BadConfig("a ResNet-18 needs images, but the stream's samples are table rows; use --set encoder.name=mlp")
    return ResNet18(*field.shape, width=cfg.width)
