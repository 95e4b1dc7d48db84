"""Residual networks for small images: the reduced ResNet-18 of the replay papers, and its full-width relative.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition"; reduced to 20 channels by Lopez-Paz and Ranzato
2017, "Gradient Episodic Memory for Continual Learning".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from cl_sim.encoders.base import EncoderConfig
from cl_sim.errors import BadConfig
from cl_sim.types import Field

REDUCED_POOL = 4  # pixels; kernel and stride of the reduced network's last pool


@dataclass(frozen=True, kw_only=True)
class _WidthConfig(EncoderConfig):
    width: int  # channels of the first stage; the others have 2, 4 and 8 times as many

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise BadConfig(f"encoder.width is {self.width}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ReducedResNet18Config(_WidthConfig):
    """Settings of the reduced ResNet-18: 4x4 average pool, 1,093,140 parameters for three channels."""

    width: int = 20  # channels of the first stage; the others have 2, 4 and 8 times as many


@dataclass(frozen=True, kw_only=True)
class ResNet18Config(_WidthConfig):
    """Settings of the ResNet-18 with a 3x3 stem: global average pool, 512 features."""

    width: int = 64  # channels of the first stage; the others have 2, 4 and 8 times as many


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
    """A 3x3 stem without max-pool, four stages of two blocks, an average pool, flattened channel by channel.

    The stages halve the image three times, rounding up, which leaves a map of ceil(H / 8) x ceil(W / 8) cells. `pool` is
    kernel and stride of the average pool, in cells and without padding: cells that fill no whole window are left out, and
    a window never exceeds the map, so images of any size work. `pool=None` averages the whole map.

    With width 20 and pool 4, dim is 160 for images of 8 to 56 pixels a side and 640 from 57 to 88 (hence for 64 and 84);
    with pool=None it is 8 times the width, always.

    Shapes: [B, C, H, W] -> [B, dim].
    """

    def __init__(self, image: tuple[int, int, int], width: int, pool: int | None) -> None:
        super().__init__()
        channels, height, side = image
        rows, columns = -(-height // 8), -(-side // 8)
        self.window = (min(pool or rows, rows), min(pool or columns, columns))
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        stages: list[nn.Module] = []
        inner = width
        for outer, stride in zip((width, 2 * width, 4 * width, 8 * width), (1, 2, 2, 2), strict=True):
            stages += [Block(inner, outer, stride), Block(outer, outer, 1)]
            inner = outer
        self.stages = nn.Sequential(*stages)
        self.dim = inner * (rows // self.window[0]) * (columns // self.window[1])

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        return F.avg_pool2d(self.stages(self.stem(x)), self.window).flatten(1)


def build(cfg: ReducedResNet18Config | ResNet18Config, field: Field) -> ResNet18:
    """A ResNet-18 for images of this field.    Raises: BadConfig for samples that are no images."""
    if len(field.shape) != 3:
        raise BadConfig(
            f"a ResNet-18 needs images, but the samples have shape {list(field.shape)}; use --set encoder.name=mlp"
        )
    channels, height, side = field.shape
    pool = REDUCED_POOL if isinstance(cfg, ReducedResNet18Config) else None
    return ResNet18((channels, height, side), cfg.width, pool)
