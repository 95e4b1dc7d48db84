"""A sequence encoder that scores items by the inner products of their vectors with its answer."""

from __future__ import annotations

from torch import Tensor, nn

from cl_sim.encoders.transformer import SASRec


class Ranker(nn.Module):
    """Scores of padding and all items; the items' vectors are those that the encoder reads them by.

    Without `padding`, item 0 is a zero vector, and a user of the scores leaves its column out, so that it stays one; with it,
    item 0 is a vector like the others, as in published code.

    Shapes: items [B, N] with zeros on the right, length [B] -> [B, I + 1].
    """

    def __init__(self, encoder: SASRec, padding: bool) -> None:
        super().__init__()
        self.encoder, self.dim = encoder, encoder.dim
        if not padding:
            nn.init.zeros_(encoder.table.weight[0])

    def forward(self, items: Tensor, length: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scores; `noise` drives the dropout in training mode (see `draw_noise`)."""
        h = self.encoder(items, length, noise)
        scores: Tensor = h @ self.encoder.table.weight[: self.encoder.items + 1].T
        return scores
