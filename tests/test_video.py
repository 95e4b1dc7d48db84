"""Annotated videos: masks in every written form, files with gaps and mistakes, real frames, results out and in again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import references_video as slow
from hypothesis import given
from hypothesis import strategies as st

from cl_sim import rle
from cl_sim.errors import BadData


@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_run_lengths_of_both_forms_equal_the_slow_ones_and_come_back(
    seed: int, height: int, width: int, share: float
) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    counts = slow.runs(mask.tolist())
    assert rle.runs(mask) == counts
    text = rle.compress(counts)
    assert text == slow.compressed(counts)
    assert rle.expand(text) == counts
    for written in ({"size": [height, width], "counts": counts}, rle.encode(mask), {"counts": text}):
        assert np.array_equal(rle.decode(written, height, width), mask)


@given(counts=st.lists(st.integers(0, 10**7), min_size=1, max_size=12))
def test_any_numbers_survive_compression(counts: list[int]) -> None:
    assert rle.compress(counts) == slow.compressed(counts)
    assert rle.expand(rle.compress(counts)) == counts


@given(seed=st.integers(0, 10_000), corners=st.integers(3, 7))
def test_a_polygon_covers_the_centres_inside_it(seed: int, corners: int) -> None:
    points = np.random.default_rng(seed).uniform(-3, 15, (corners, 2))
    mask = rle.decode([points.flatten().tolist()], 12, 11)
    for y in range(12):
        for x in range(11):
            assert mask[y, x] == slow.winds([(float(a), float(b)) for a, b in points], x + 0.5, y + 0.5)


def test_polygons_are_joined_and_short_ones_left_out() -> None:
    square, other, line = [0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 4, 1, 4, 3, 1, 3], [5, 5, 6, 6]
    mask = rle.decode([square, other, line], 6, 6)
    assert mask.sum() == 4 + 6 - 1
    assert not rle.decode([line], 6, 6).any()
    assert not rle.decode([], 6, 6).any()


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_masks_agree_with_the_reference_library() -> None:
    library = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = rng.random((23, 17)) < rng.random()
        theirs = library.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle.encode(mask) == {"size": list(theirs["size"]), "counts": theirs["counts"].decode()}
        assert np.array_equal(library.decode(rle.encode(mask)).astype(bool), mask)
    for _ in range(10):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
        corners = np.stack([50 + 40 * np.cos(angle), 45 + 35 * np.sin(angle)], 1).flatten().tolist()
        theirs = library.decode(library.merge(library.frPyObjects([corners], 90, 100))).astype(bool)
        differ = rle.decode([corners], 90, 100) != theirs
        assert differ.sum() < 0.05 * theirs.sum()  # along the border only


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"size": [2, 3], "counts": [1, 2]}, "add up to 3, but 2x3 pixels are 6"),
        ({"size": [3, 2], "counts": [6]}, r"size is \[3, 2\], but the video's is \[2, 3\]"),
        ({"size": [2, 3], "counts": [7, -1]}, "whole numbers from 0"),
        ({"size": [2, 3], "counts": "P"}, "end in the middle of a number"),
        ({"size": [2, 3], "counts": "é"}, "contain 'é'"),
        ({"size": [2, 3]}, "with 'counts'"),
        ("06", "with 'counts'"),
        ([[1, 2, 3]], "x and y in turn"),
        ([["a"] * 6], "x and y in turn"),
    ],
)
def test_a_broken_mask_says_what_is_wrong(written: Any, words: str) -> None:
    with pytest.raises(BadData, match=words):
        rle.decode(written, 2, 3)
