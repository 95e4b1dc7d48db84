"""Random numbers: independent of company and device state, uniform within stated false-alarm rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from cl_sim.rng import GOLDEN, MIX_1, MIX_2, Rng, below_of, derive, uniform_of

MASK = (1 << 64) - 1


def slow_bits(key: int, counter: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    z = (counter * (GOLDEN & MASK) + key) & MASK
    z = ((z ^ (z >> 30)) * (MIX_1 & MASK)) & MASK
    z = ((z ^ (z >> 27)) * (MIX_2 & MASK)) & MASK
    return z ^ (z >> 31)


def test_words_made_at_once_are_the_words_made_one_by_one() -> None:
    one, two = Rng((3, 5), "check"), Rng((3, 5), "check")
    words, shares, whole = torch.split(one.bits(4 * 7 + 4 + 5), [28, 4, 5], 1)
    assert torch.equal(words.view(2, 4, 7), two.bits(4, 7))
    assert torch.equal(uniform_of(shares), two.uniform(4))
    assert torch.equal(below_of(whole, 10), two.below(10, 5))
    assert two.bits(0, 3).shape == (2, 0, 3)
    assert torch.equal(one.bits(3), two.bits(3))


def test_bits_equal_the_source_in_plain_integers() -> None:
    rng = Rng([0, 5], "test")
    drawn = torch.cat([rng.bits(3), rng.bits(2, 2).flatten(1)], 1)
    for run, seed in enumerate((0, 5)):
        expected = [slow_bits(derive(seed, "test"), counter) for counter in range(1, 8)]
        assert [value & MASK for value in drawn[run].tolist()] == expected


def test_the_published_splitmix_sequence_for_seed_zero() -> None:
    rng = Rng([0], "test")
    rng.key.zero_()
    assert [v & MASK for v in rng.bits(3)[0].tolist()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_run_draws_the_same_alone_and_stacked_and_after_a_reload() -> None:
    alone, stacked = Rng([3], "test"), Rng([1, 3, 2], "test")
    for rng in (alone, stacked):
        rng.normal(7)
    assert torch.equal(alone.uniform(5)[0], stacked.uniform(5)[1])
    again = Rng([9], "other")
    again.load_state_dict(alone.state_dict())
    assert torch.equal(alone.bits(4), again.bits(4))


def test_seeds_and_purposes_give_different_numbers() -> None:
    keys = {derive(seed, purpose) for seed in range(1000) for purpose in ("a", "b")}
    assert len(keys) == 2000


def test_uniform_numbers_are_uniform_and_below_one() -> None:
    drawn = Rng(range(10), "test").uniform(20_000)
    assert drawn.dtype == torch.float32
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    assert stats.kstest(drawn.flatten().double().numpy(), "uniform").pvalue > 1e-4  # false alarm: 1 in 10,000


@pytest.mark.parametrize("bound", [1, 2, 7, 1000])
def test_whole_numbers_are_equally_likely(bound: int) -> None:
    drawn = Rng([0], "test").below(bound, 100_000)[0].numpy()
    counts = np.bincount(drawn, minlength=bound)
    assert len(counts) == bound
    if bound > 1:
        assert stats.chisquare(counts).pvalue > 1e-4


def test_bounds_may_differ_per_element() -> None:
    bound = torch.tensor([[1, 2, 3], [10, 20, 30]])
    drawn = torch.stack([Rng([s, s + 1], "test").below(bound, 3) for s in range(300)])
    assert (drawn < bound).all()
    assert torch.equal(drawn.amax(0), bound - 1)


def test_normal_numbers_are_normal() -> None:
    drawn = Rng([0], "test").normal(100_000)[0].double().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-4


def test_every_permutation_is_equally_likely() -> None:
    orders = Rng(range(24_000), "test").permutation(4)
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(1).numpy()
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_chosen_columns_are_allowed_different_and_equally_likely() -> None:
    allowed = torch.tensor([True, False, True, True, True]).expand(20_000, -1)
    chosen = Rng(range(20_000), "test").choose(2, allowed)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    counts = np.bincount(chosen.flatten().numpy(), minlength=5)
    assert counts[1] == 0
    # each of 4 columns comes with probability 1/2; draws within a pair are negatively correlated
    z = np.abs(counts[[0, 2, 3, 4]] - 10_000) / math.sqrt(20_000 / 4)
    assert z.max() < 4.5  # false alarm: 4 * 6.8e-6


def test_neighbouring_runs_and_counters_are_uncorrelated() -> None:
    drawn = Rng(range(1000), "test").uniform(1000).double() - 0.5
    for one, two in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        correlation = float((one * two).mean() * 12)
        assert abs(correlation) < 4.5 / math.sqrt(one.numel())


def test_keyed_sequences_are_those_of_their_keys_from_the_beginning() -> None:
    plain = Rng((3, 9), "clips")
    first = plain.bits(4, 2)
    keyed = Rng.keyed(plain.key.flip(0))
    assert torch.equal(keyed.bits(4, 2), first.flip(0))
    assert not torch.equal(keyed.bits(4, 2), first.flip(0))
