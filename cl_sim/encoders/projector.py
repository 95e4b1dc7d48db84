"""An encoder with a projection onto the unit sphere, for contrastive losses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Projector(nn.Module):
    """Encoder, then a perceptron as deep as `hidden` is long, its output scaled to length 1.

    Shapes: [B, *shape] -> unit rows [B, width].
    Source: the projection head of Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations".
    """

    def __init__(self, encoder: Any, width: int, hidden: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.encoder = encoder
        sizes = (encoder.dim, *hidden, width)
        layers: list[nn.Module] = []
        for inner, outer in pairwise(sizes):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        self.head = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Projections of length 1."""
        return F.normalize(self.head(self.encoder(x)), dim=-1)
