"""An encoder with a linear head, plain or on cosines."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

TINY = 1e-6  # added to norms, as the replay code line does


class Classifier(nn.Module):
    """Encoder, then a linear layer.    Shapes: [B, *shape] -> logits [B, C]."""

    def __init__(self, encoder: Any, classes: int, bias: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.dim, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        logits: Tensor = self.head(self.encoder(x))
        return logits


class CosineClassifier(nn.Module):
    """Encoder, then `scale` times the cosine between features and one weight row per class, without bias.

    Shapes: [B, *shape] -> logits [B, C].
    """

    def __init__(self, encoder: Any, classes: int, scale: float) -> None:
        super().__init__()
        self.encoder, self.scale = encoder, scale
        self.head = nn.Linear(encoder.dim, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled cosines."""
        logits: Tensor = self.scale * unit(self.encoder(x)) @ unit(self.head.weight).T
        return logits


def unit(rows: Tensor) -> Tensor:
    """Rows divided by their norm plus 1e-6.    Shapes: [..., D] -> same."""
    scaled: Tensor = rows / (rows.norm(dim=-1, keepdim=True) + TINY)
    return scaled
