"""Counter-based random numbers on the device, one independent sequence per run.

Number i of run r is a hash of (key of r, i), so a run draws the same numbers alone or stacked with others, on a CPU or a
GPU, before or after a resume: the whole state is two integers per run, both buffers. All arithmetic up to `uniform` is on
integers (or exact in float32), hence bit-equal on every device.

Source: Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators" (SplitMix64), with the counter in
place of the running state. Departures: runs start at hashed offsets of one sequence of length 2^64 (ours).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cl_sim.constants import lasting

GOLDEN, MIX_1, MIX_2 = (
    value - (1 << 64) if value >= 1 << 63 else value
    for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def derive(seed: int, purpose: str) -> int:
    """A 63-bit seed for one purpose of one run, the same on every machine."""
    digest = hashlib.blake2b(f"{purpose}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def host_rng(seed: int, purpose: str) -> np.random.Generator:
    """A host generator, for choices that are made before the first step or when a pass begins."""
    return np.random.default_rng(derive(seed, purpose))


def shift_right(bits: Tensor, places: int) -> Tensor:
    """Logical shift of int64 words, filling with zeros."""
    return (bits >> places).bitwise_and_((1 << (64 - places)) - 1)


def mixed(word: Tensor) -> Tensor:
    """SplitMix64's finaliser: words that look random, whatever regularity the given ones have.    Shapes: int64 -> same."""
    word = shift_right(word, 30).bitwise_xor_(word).mul_(MIX_1)
    word = shift_right(word, 27).bitwise_xor_(word).mul_(MIX_2)
    return shift_right(word, 31).bitwise_xor_(word)


def uniform_of(words: Tensor) -> Tensor:
    """A multiple of 2^-24 in [0, 1) from each random word, as float32.    Shapes: int64 -> same."""
    return shift_right(words, 40) * 2.0**-24


def below_of(words: Tensor, bound: int | Tensor) -> Tensor:
    """A whole number in [0, bound) from each random word, bound < 2^31.    Shapes: int64 -> same, with bound broadcast."""
    return (shift_right(words, 32) * bound) >> 32


@lasting
def strides(count: int, device: torch.device) -> Tensor:
    """How far the next `count` counters lie from the present one, as SplitMix64 spaces them.    Shapes: -> [count] int64."""
    return torch.arange(1, count + 1, device=device) * GOLDEN


class Rng(nn.Module):
    """Random numbers for R runs. Every method returns a tensor whose first axis is the run.

    Shapes: key [R], counter [R], both int64 buffers.
    """

    key: Tensor
    counter: Tensor

    def __init__(self, seeds: Sequence[int], purpose: str, device: torch.device | str = "cpu") -> None:
        super().__init__()
        keys = torch.tensor([derive(seed, purpose) for seed in seeds], dtype=torch.int64, device=device)
        self.register_buffer("key", keys)
        self.register_buffer("counter", torch.zeros_like(keys))

    @classmethod
    def keyed(cls, keys: Tensor) -> Rng:
        """One sequence per key, from its beginning; the same key draws the same numbers.    Shapes: keys [N] int64."""
        made = cls((), "", keys.device)
        made.key, made.counter = keys, torch.zeros_like(keys)
        return made

    @property
    def runs(self) -> int:
        """How many runs draw from here."""
        return len(self.key)

    def bits(self, *shape: int) -> Tensor:
        """64 random bits per element, as int64.    Shapes: -> [R, *shape]."""
        count = math.prod(shape)
        start = torch.add(self.key, self.counter, alpha=GOLDEN)  # [R]
        self.counter += count
        return mixed(start[:, None] + strides(count, self.key.device)).view(self.runs, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Multiples of 2^-24 in [0, 1), as float32.    Shapes: -> [R, *shape]."""
        return uniform_of(self.bits(*shape))

    def below(self, bound: int | Tensor, *shape: int) -> Tensor:
        """Whole numbers in [0, bound), bound < 2^31 (a tensor broadcasts to [R, *shape]); bias at most bound / 2^32."""
        return below_of(self.bits(*shape), bound)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 numbers, by Box and Muller.    Shapes: -> [R, *shape]."""
        radius, angle = self.uniform(2, *shape).unbind(1)
        return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """True with the given probability, independently.    Shapes: -> [R, *shape] bool."""
        return self.uniform(*shape) < probability

    def permutation(self, n: int) -> Tensor:
        """One random order of 0..n-1 per run.    Shapes: -> [R, n]."""
        return shift_right(self.bits(n), 1).argsort(-1)

    def choose(self, k: int, allowed: Tensor) -> Tensor:
        """K different columns per run, uniform over the allowed ones; forbidden ones come last, if they must.

        With groups, K columns of each, all from one shuffle: draws of groups that share columns are not independent.

        Shapes: allowed [R, N] bool -> [R, k], or [R, G, N] -> [R, G, k].
        The priorities have 63 bits, so a tie is not to be expected.
        """
        priority = shift_right(self.bits(allowed.shape[-1]), 1)
        priority = priority.view(-1, *(1,) * (allowed.dim() - 2), allowed.shape[-1])
        return priority.masked_fill(~allowed, -1).topk(k, dim=-1).indices

    def choose_weighted(self, k: int, weight: Tensor) -> Tensor:
        """K different columns per run, drawn one after the other in proportion to their weights; zeros come last, at random.

        Shapes: weight [R, N], not negative -> [R, k].
        Source: Efraimidis and Spirakis 2006, "Weighted Random Sampling with a Reservoir", algorithm A.
        """
        waiting = -(self.uniform(weight.shape[-1]).double() + 2.0**-25).log()  # exponential, above 0
        return (waiting / weight.double().clamp(min=1e-30)).topk(k, dim=-1, largest=False).indices
