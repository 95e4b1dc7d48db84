"""A multilayer perceptron, for tables, small images and tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from cl_sim.encoders.base import EncoderConfig
from cl_sim.errors import BadConfig
from cl_sim.types import Field


@dataclass(frozen=True, kw_only=True)
class MLPConfig(EncoderConfig):
    """Settings of the perceptron."""

    hidden: tuple[int, ...] = (256, 256)  # units per layer

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden or min(self.hidden) < 1:
            raise BadConfig(f"encoder.hidden is {list(self.hidden)}; it needs at least one layer of at least one unit")


class MLP(nn.Module):
    """Linear layers, each followed by a ReLU.    Shapes: [B, *shape] -> [B, dim], dim = the last layer's units."""

    def __init__(self, inputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((inputs, *hidden), hidden, strict=False):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.dim = hidden[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        features: Tensor = self.layers(x.flatten(1))
        return features


def build(cfg: MLPConfig, field: Field) -> MLP:
    """A perceptron for samples of this field."""
    return MLP(math.prod(field.shape), cfg.hidden)
