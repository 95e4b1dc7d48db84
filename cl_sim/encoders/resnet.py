"""Residual networks for small images: the reduced ResNet-18 of the replay papers, its full-width relative, wide ResNets.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition"; reduced to 20 channels by Lopez-Paz and Ranzato
2017, "Gradient Episodic Memory for Continual Learning"; wide: Zagoruyko and Komodakis 2016, "Wide Residual Networks", in the
form that the semi-supervised code line uses (LeakyReLU, and normal initial weights).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from cl_sim.config import at_least, within
from cl_sim.encoders.base import EncoderConfig
from cl_sim.errors import BadConfig
from cl_sim.types import Field

LEAK = 0.1  # slope of a wide ResNet's rectifier below 0
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


@dataclass(frozen=True, kw_only=True)
class WideResNetConfig(EncoderConfig):
    """Settings of a wide ResNet: global average pool, 64 times the width features."""

    depth: int = 28  # convolutions and the linear layer; 6 n + 4
    width: int = 2  # times 16, 32 and 64 channels
    momentum: float = 0.1  # weight of the newest batch in BatchNorm's statistics; 0.001 for a million steps

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, width=1)
        within(self, 0, 1, "momentum")
        if self.depth < 10 or self.depth % 6 != 4:
            raise BadConfig(f"encoder.depth is {self.depth}; a wide ResNet has 6 n + 4 layers: 10, 16, 22, 28, 34, 40")


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


class WideBlock(nn.Module):
    """Norm and rectifier before each of two 3x3 convolutions.    Shapes: [B, inner, H, W] -> [B, outer, H/stride, W/stride].

    Where the number of channels changes, the shortcut is a 1x1 convolution of what goes into the first one, normed and
    rectified; else it is the block's input as it came.
    """

    def __init__(self, inner: int, outer: int, stride: int, momentum: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inner, momentum=momentum)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer, momentum=momentum)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        """Residual step."""
        ready = F.leaky_relu(self.norm1(x), LEAK)
        inside: Tensor = self.conv2(F.leaky_relu(self.norm2(self.conv1(ready)), LEAK))
        through: Tensor = x if self.shortcut is None else self.shortcut(ready)
        return through + inside


class WideResNet(nn.Module):
    """A 3x3 stem, three groups of pre-activation blocks with 16, 32 and 64 times `width` channels, the mean over the map.

    With 28 layers and width 2, and a linear layer for 10 classes behind it: 1,467,610 parameters.

    Shapes: [B, channels, H, W] -> [B, 64 * width].    Units: depth in layers, 6 n + 4 for n blocks per group.
    """

    def __init__(self, depth: int, width: int, channels: int = 3, momentum: float = 0.1) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inner = 16
        for outer, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for place in range((depth - 4) // 6):
                blocks.append(WideBlock(inner, outer, stride if place == 0 else 1, momentum))
                inner = outer
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inner, momentum=momentum)
        self.dim = inner
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, 0, math.sqrt(2 / (part.kernel_size[0] ** 2 * part.out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        features: Tensor = F.leaky_relu(self.norm(self.blocks(self.stem(x))), LEAK).mean((-2, -1))
        return features


def build(cfg: ReducedResNet18Config | ResNet18Config | WideResNetConfig, field: Field) -> ResNet18 | WideResNet:
    """A residual network for images of this field.    Raises: BadConfig for samples that are no images."""
    if len(field.shape) != 3:
        raise BadConfig(
            f"a ResNet needs images, but the samples have shape {list(field.shape)}; use --set encoder.name=mlp"
        )
    channels, height, side = field.shape
    if isinstance(cfg, WideResNetConfig):
        return WideResNet(cfg.depth, cfg.width, channels, cfg.momentum)
    pool = REDUCED_POOL if isinstance(cfg, ReducedResNet18Config) else None
    return ResNet18((channels, height, side), cfg.width, pool)
