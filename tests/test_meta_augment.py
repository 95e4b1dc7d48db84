"""Meta-optimised augmentation and next-item learning: optimiser, stages, schedules, look-ahead, cost of a mistake."""

from __future__ import annotations

import copy

import torch
from hypothesis import given
from hypothesis.strategies import floats, integers
from torch import Tensor, nn
from torch.testing import assert_close

from cl_sim.optim import Adam
from cl_sim.testing import NoHostReads

F64 = torch.float64
seeds = integers(0, 10**6)


def rows(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, dtype=F64, generator=torch.Generator().manual_seed(seed))


# The optimiser


@given(seed=seeds, steps=integers(1, 6), lr=floats(1e-4, 0.5))
def test_adam_equals_the_one_of_torch(seed: int, steps: int, lr: float) -> None:
    ours, theirs = ([nn.Parameter(rows(3, 2, seed)), nn.Parameter(rows(1, 4, seed + 1))] for _ in range(2))
    mine, other = Adam(ours, lr=lr), torch.optim.Adam(theirs, lr=lr)
    for step in range(steps):
        for which, (one, two) in enumerate(zip(ours, theirs, strict=True)):
            gradient = rows(*one.shape, seed + 7 * step + which) * 10 ** (step - 3)
            absent = which == 1 and step % 2 == 1  # no gradient: it stays
            one.grad, two.grad = (None, None) if absent else (gradient.clone(), gradient.clone())
        mine.step()
        other.step()
    for one, two in zip(ours, theirs, strict=True):
        assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_adam_never_reads_the_host_and_goes_on_after_a_resume() -> None:
    whole, half = (nn.Parameter(rows(2, 2, 0).float()) for _ in range(2))
    mine = Adam([whole])
    again = Adam([half])
    for step in range(4):
        if step == 2:
            half.data.copy_(whole.data)
            again.load_state_dict(copy.deepcopy(mine.state_dict()))
        for parameter, optimiser in ((whole, mine), (half, again)):
            parameter.grad = rows(2, 2, step).float()
            with NoHostReads():
                optimiser.step()
    assert torch.equal(whole, half)
    assert mine.state[whole]["step"] == 4
