"""A learned augmentation: a small perceptron from an embedding to another view of it, on the unit sphere."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cl_sim.losses import SHORTEST


class Augmenter(nn.Module):
    """Linear layers D -> D/2 -> D/4 -> D with gelu between them, then division by the norm; torch's own initialisation.

    Shapes: [B, D] -> [B, D] unit rows. 3,696 parameters for D = 64.
    Source: Qin et al. 2023, "Meta-optimized Contrastive Learning for Sequential Recommendation", as released.
    Departures: a row shorter than 1e-8 is divided by 1e-8, where the code would divide by its norm.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        half, quarter = max(dim // 2, 1), max(dim // 4, 1)
        self.layers = nn.Sequential(
            nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, dim)
        )

    def forward(self, h: Tensor) -> Tensor:
        """The view of each embedding."""
        return F.normalize(self.layers(h), dim=-1, eps=SHORTEST)
