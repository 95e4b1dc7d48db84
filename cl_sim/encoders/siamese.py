"""An encoder with projection and prediction heads, for losses between two views of an image."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn


class Branch(nn.Module):
    """Encoder f and projection head g.    Shapes: [B, *shape] -> [B, width]."""

    def __init__(self, encoder: Any, hidden: int, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = perceptron(encoder.dim, hidden, hidden, width)
        self.head.append(nn.BatchNorm1d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Projections."""
        projected: Tensor = self.head(self.encoder(x))
        return projected


class Siamese(nn.Module):
    """A branch and a prediction head h a quarter as wide inside.

    Shapes: [B, *shape] -> predictions [B, width], projections [B, width], features [B, encoder.dim].
    Source: the heads of Lu et al. 2022, "Self-Supervision Can Be a Good Few-Shot Learner" (UniSiam), as BECLR uses them.
    """

    def __init__(self, encoder: Any, hidden: int, width: int) -> None:
        super().__init__()
        self.branch = Branch(encoder, hidden, width)
        self.predictor = perceptron(width, max(width // 4, 1), width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p, z and f of a batch."""
        features = self.branch.encoder(x)
        projected = self.branch.head(features)
        return self.predictor(projected), projected, features


def perceptron(*sizes: int) -> nn.Sequential:
    """Linear layers with BatchNorm and ReLU between them."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.BatchNorm1d(outer), nn.ReLU()]
    return nn.Sequential(*layers[:-2])
