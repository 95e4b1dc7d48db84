"""Training views: each image its own draw, from the counter RNG, checked pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cl_sim import augment
from cl_sim.errors import BadConfig, UnknownName
from cl_sim.rng import Rng
from cl_sim.testing import NoHostReads
from cl_sim.types import Field

FIELDS = {"x": Field((3, 6, 5), torch.uint8), "y": Field((), torch.int64)}


def pictures(runs: int, batch: int) -> Tensor:
    return torch.randint(1, 256, (runs, batch, 3, 6, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_shift_equals_cropping_each_padded_image() -> None:
    x = pictures(2, 7)
    shifted, corner = augment.shift(x, Rng([0, 1], "t"), 2), Rng([0, 1], "t").below(5, 7, 2)
    for run in range(2):
        for item in range(7):
            padded = torch.zeros(3, 10, 9, dtype=torch.uint8)
            padded[:, 2:8, 2:7] = x[run, item]
            top, left = corner[run, item].tolist()
            assert torch.equal(shifted[run, item], padded[:, top : top + 6, left : left + 5])


def test_flip_mirrors_the_drawn_images_and_half_of_all() -> None:
    x = pictures(4, 1000)
    flipped = augment.flip(x, Rng(range(4), "t"))
    mirrored = (flipped == x.flip(-1)).flatten(2).all(-1)
    same = (flipped == x).flatten(2).all(-1)
    assert (mirrored ^ same).all()
    assert abs(float(mirrored.double().mean()) - 0.5) < 4.5 * math.sqrt(0.25 / 4000)  # false alarm: 7 in a million


def test_erase_blackens_one_square_and_nothing_else() -> None:
    x = pictures(2, 9)
    erased, rng = augment.erase(x, Rng([0, 1], "t"), 4), Rng([0, 1], "t")
    top, left = rng.below(6, 9, 1)[..., 0] - 2, rng.below(5, 9, 1)[..., 0] - 2
    for run in range(2):
        for item in range(9):
            for row in range(6):
                for column in range(5):
                    inside = 0 <= row - int(top[run, item]) < 4 and 0 <= column - int(left[run, item]) < 4
                    expected = torch.zeros(3, dtype=torch.uint8) if inside else x[run, item, :, row, column]
                    assert torch.equal(erased[run, item, :, row, column], expected)


@pytest.mark.parametrize("names", [("shift", "flip"), ("erase:3", "flip:0.2"), ()])
def test_a_run_sees_the_same_views_alone_and_stacked_without_host_reads(names: tuple[str, ...]) -> None:
    x = pictures(3, 8)
    stacked = augment.pipeline(names, Rng([4, 5, 6], "t"), FIELDS)
    alone = augment.pipeline(names, Rng([5], "t"), FIELDS)
    with NoHostReads():
        together = stacked({"x": x, "y": torch.zeros(3, 8)})
    assert torch.equal(together["x"][1], alone({"x": x[1:2]})["x"][0])
    assert together["x"].dtype == torch.uint8
    assert set(together) == {"x", "y"}


def test_no_augmentation_hands_the_batch_through() -> None:
    batch = {"x": pictures(1, 2)}
    assert augment.pipeline((), Rng([0], "t"), FIELDS)(batch) is batch


def test_wrong_words_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(UnknownName, match="did you mean 'flip'"):
        augment.pipeline(("flop",), Rng([0], "t"), FIELDS)
    with pytest.raises(BadConfig, match="a number from 0 to 1"):
        augment.pipeline(("flip:often",), Rng([0], "t"), FIELDS)
    with pytest.raises(BadConfig, match="needs images"):
        augment.pipeline(("flip",), Rng([0], "t"), {"x": Field((9,), torch.float32)})


def test_floats_stay_floats_between_0_and_1() -> None:
    for side in (7, 32):  # at 7 pixels the bilinear weights may sum to more than 1
        x = (torch.rand(4, 400, 3, side, side, generator=torch.Generator().manual_seed(0)) * 3 - 1).clamp(0, 1)
        x[:, :100] = x[:, :100].round()
        x[:, :300] = 1
        views = augment.replay_views(x, Rng(range(4), "t"))
        assert views.dtype == torch.float32
        assert float(views.min()) >= 0
        assert float(views.max()) <= 1
