"""SASRec: a causal transformer from a history of items to one vector, which is compared with the items' own vectors.

Source: Kang and McAuley 2018, "Self-Attentive Sequential Recommendation", in the form of RecBole 0.2.1 (layer norm after each
part, gelu, no scaling of embeddings), which MCLRec builds on.
Departures: dropout may be driven by random numbers that are handed over; its probability is then a multiple of 2^-16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_sim.config import at_least, within
from cl_sim.errors import BadConfig
from cl_sim.rng import Rng

HIDDEN = -10_000.0  # added to the score of a key that must not be seen
SPREAD = 0.02  # standard deviation of fresh weights
LEVELS = 1 << 16  # values of one number of noise


@dataclass(frozen=True, kw_only=True)
class SASRecConfig:
    """Settings of the sequence encoder; number of items and longest history are the stream's."""

    dim: int = 64  # features
    layers: int = 2
    heads: int = 2
    inner: int = 256  # units of the feed-forward part
    dropout: float = 0.5  # probability

    def __post_init__(self) -> None:
        at_least(self, dim=1, layers=1, heads=1, inner=1)
        within(self, 0, 0.99, "dropout")
        if self.dim % self.heads:
            raise BadConfig(f"encoder.dim is {self.dim}, which {self.heads} heads do not divide; use a multiple of it")


class SASRec(nn.Module):
    """Item and position embeddings, then layers of causal self-attention; h is the output at the last item.

    `table` holds the items' vectors: row 0 is padding, then one row per item, the last one unused. The score of an item is the
    inner product of its row with h. A place that holds item 0 is hidden from all queries; a query that sees nothing (a
    history that begins with hidden items) attends to every place, later ones too, as published. Row 0 learns
    as a candidate, if it is scored, never as an input.

    Shapes: items [B, N] with zeros on the right, length [B] -> [B, dim].
    """

    def __init__(
        self,
        items: int,
        dim: int = 64,
        layers: int = 2,
        heads: int = 2,
        inner: int = 256,
        length: int = 50,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.items, self.dim, self.heads, self.length, self.dropout = items, dim, heads, length, dropout
        self.table = nn.Embedding(items + 2, dim, padding_idx=0)
        self.position = nn.Embedding(length, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.layers = nn.ModuleList(Layer(dim, heads, inner) for _ in range(layers))
        self.apply(_initialise)

    def forward(self, items: Tensor, length: Tensor, noise: Tensor | None = None) -> Tensor:
        """The vector h of each history.

        In training mode dropout follows `noise` (see `draw_noise`), or torch's global generator without it.

        Shapes: noise [noise_size(B)] int16.
        """
        states = self.states(items, noise)
        last = (length.long() - 1).clamp(min=0)[:, None, None].expand(-1, 1, self.dim)
        return states.gather(1, last)[:, 0]

    def states(self, items: Tensor, noise: Tensor | None = None) -> Tensor:
        """The output at every place.    Shapes: items [B, N] -> [B, N, dim]."""
        size = items.shape[1]
        drop = Dropout(self.dropout if self.training else 0.0, noise)
        place = torch.arange(size, device=items.device)
        own = self.table(items)
        own = torch.where((items == 0)[..., None], own.detach(), own)  # under vmap, padding_idx alone does not stop it
        x = drop(self.norm(own + self.position(place)))
        seen = (place <= place[:, None]) & (items != 0)[:, None, :]  # [B, N query, N key]
        added = torch.where(seen, 0.0, HIDDEN).to(x.dtype)
        for layer in self.layers:
            x = layer(x, added, drop)
        return x

    def noise_size(self, batch: int) -> int:
        """How many numbers of noise one pass over histories of full length takes."""
        states, weights = self.length * self.dim, self.heads * self.length**2
        return batch * (states + len(self.layers) * (weights + 2 * states))


class Dropout:
    """Dropout whose every call takes the next part of a row of 16-bit random numbers."""

    def __init__(self, probability: float, noise: Tensor | None) -> None:
        self.probability, self.noise, self.used = probability, noise, 0
        self.threshold = round(probability * LEVELS) - LEVELS // 2

    def __call__(self, x: Tensor) -> Tensor:
        """Zero a part of the values and enlarge the others.    Shapes: any -> same."""
        if self.probability == 0:
            return x
        if self.noise is None:
            return F.dropout(x, self.probability)
        part = self.noise[self.used : self.used + x.numel()].view(x.shape)
        self.used += x.numel()
        return x.masked_fill(part < self.threshold, 0) / (1 - self.probability)


def draw_noise(rng: Rng, size: int) -> Tensor:
    """16-bit random numbers, four from each word.    Shapes: -> [R, size rounded up to a multiple of 4] int16."""
    return rng.bits(-(-size // 4)).view(torch.int16)


class Layer(nn.Module):
    """Self-attention, then a feed-forward part, each added to its input and normalised.    Shapes: [B, N, dim] -> same."""

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.merge = nn.Linear(dim, dim)
        self.attended = nn.LayerNorm(dim, eps=1e-12)
        self.widen, self.narrow = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.fed = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor, added: Tensor, drop: Dropout) -> Tensor:
        """The next states; `added` [B, N, N] is put on the attention scores."""
        query, key, value = (self._by_head(part(x)) for part in (self.query, self.key, self.value))
        scores = query @ key.mT / self.width**0.5 + added[:, None]  # [B, H, N, N]
        seen = drop(scores.softmax(-1)) @ value  # [B, H, N, W]
        x = self.attended(x + drop(self.merge(seen.transpose(1, 2).flatten(2))))
        after: Tensor = self.fed(x + drop(self.narrow(F.gelu(self.widen(x)))))
        return after

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, self.width).transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=SPREAD)  # row 0 of the table too
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def build(cfg: SASRecConfig, items: int, length: int) -> SASRec:
    """An encoder for histories of at most `length` of these items."""
    return SASRec(items, cfg.dim, cfg.layers, cfg.heads, cfg.inner, length, cfg.dropout)
