"""Streams: what comes when, once, from the seed alone."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cl_sim import corrupt, timeline
from cl_sim.config import build
from cl_sim.engine import Plan
from cl_sim.errors import BadConfig
from cl_sim.indexed import class_orders
from cl_sim.noise import noisy_labels
from cl_sim.rng import Rng, host_rng
from cl_sim.stream import Stream
from streams.blurry import Blurry, BlurryConfig, gaussian, i_blurry
from streams.drift import Drift, DriftConfig
from streams.few_labels import FewLabels, FewLabelsConfig
from streams.split import Split, SplitConfig
from streams.synthetic import Synthetic, SyntheticConfig
from streams.tabular import Tabular, TabularConfig, running_scale

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[..., Any]] = {
    "split": lambda seeds, **s: Split(SplitConfig(**s), seeds, CPU),
    "long tail": lambda seeds, **s: Split(SplitConfig(imbalance=20, noise=0.3, **s), seeds, CPU),
    "i-blurry": lambda seeds, **s: Blurry(BlurryConfig(**s), seeds, CPU),
    "gaussian": lambda seeds, **s: Blurry(BlurryConfig(schedule="gaussian", **s), seeds, CPU),
    "rotate": lambda seeds, **s: Drift(DriftConfig(kind="rotate", **s), seeds, CPU),
    "permute": lambda seeds, **s: Drift(DriftConfig(kind="permute", **s), seeds, CPU),
    "corrupt": lambda seeds, **s: Drift(DriftConfig(kind="corrupt", **s), seeds, CPU),
    "synthetic": lambda seeds, **s: Synthetic(SyntheticConfig(**s), seeds, CPU),
}


def whole(stream: Stream, key: str) -> torch.Tensor:
    return torch.cat([stream.batch(step)[key] for step in range(len(stream))], 1)


@pytest.mark.parametrize("name", MAKERS)
def test_every_sample_comes_at_most_once_and_batches_depend_on_seed_and_step_alone(name: str) -> None:
    alone, stacked = MAKERS[name]((4,)), MAKERS[name]((3, 4, 5))
    for row in whole(stacked, "index").tolist():
        assert len(set(row)) == len(row) == stacked.samples
    for step in (len(alone) - 1, 0, 7, 0):
        one, three = alone.batch(step), stacked.batch(step)
        assert one.keys() == three.keys() == stacked.fields.keys()
        for key, field in stacked.fields.items():
            assert torch.equal(one[key][0], three[key][1])
            assert one[key].shape[2:] == field.shape
            assert one[key].dtype == field.dtype
    assert not torch.equal(whole(stacked, "index")[0], whole(stacked, "index")[2])


@pytest.mark.parametrize("name", MAKERS)
def test_the_last_step_ends_the_last_task_and_everything_is_seen_then(name: str) -> None:
    stream = MAKERS[name]((0, 1))
    assert stream.ends_task(len(stream) - 1)
    assert stream.seen(len(stream) - 1).all()
    assert stream.seen(-1).shape == (2, len(stream.holdout().names))
    full = list(stream.holdout().chunks(len(stream), True))
    assert set(torch.cat([chunk["split"] for chunk in full], 1).unique().tolist()) == set(
        range(len(stream.holdout().names))
    )
    assert all(chunk["x"].shape[0] == 2 for chunk in full)


@given(seed=st.integers(0, 10_000), tasks=st.sampled_from([1, 2, 5, 10]))
def test_tasks_have_disjoint_classes_in_the_drawn_order_and_equal_length(seed: int, tasks: int) -> None:
    stream = Split(SplitConfig(tasks=tasks), (seed,), CPU)
    ends = [step for step in range(len(stream)) if stream.ends_task(step)]
    assert len(ends) == tasks
    assert len(set(np.diff([-1, *ends]))) == 1
    order = class_orders(10, "shuffled", [seed])[0].reshape(tasks, -1)
    start = 0
    for task, end in enumerate(ends):
        labels = torch.cat([stream.batch(step)["y"] for step in range(start, end + 1)], 1)
        assert set(labels[0].tolist()) == set(order[task].tolist())
        assert stream.seen(start)[0].sum() == task + 1
        start = end + 1


def test_class_orders_are_the_published_ones() -> None:
    assert class_orders(10, "shuffled", [0, 2026]).tolist() == [
        [2, 8, 4, 9, 1, 6, 7, 3, 0, 5],
        [7, 3, 9, 8, 4, 5, 0, 2, 6, 1],
    ]
    assert class_orders(4, "fixed", [7])[0].tolist() == [0, 1, 2, 3]
    assert class_orders(4, "3,1,0,2", [7])[0].tolist() == [3, 1, 0, 2]


def test_shuffled_order_shows_all_classes_from_the_start_and_the_same_samples() -> None:
    plain, iid = Split(SplitConfig(), (0,), CPU), Split(SplitConfig(), (0,), CPU, iid=True)
    assert len(whole(iid, "y")[0, :100].unique()) == 10
    assert sorted(whole(plain, "index")[0].tolist()) == sorted(whole(iid, "index")[0].tolist())
    assert iid.seen(0).all()
    assert not iid.announces


def test_length_all_keeps_every_full_batch_and_refuses_stacked_runs_that_differ() -> None:
    everything = Split(SplitConfig(length="all"), (0,), CPU)
    assert everything.samples > Split(SplitConfig(), (0,), CPU).samples
    with pytest.raises(BadConfig, match="--stack 1"):
        Split(SplitConfig(length="all"), tuple(range(6)), CPU)


@pytest.mark.parametrize("tail", ["ordered", "shuffled"])
def test_a_long_tail_has_the_exponential_profile_and_the_same_length_for_every_seed(tail: Any) -> None:
    stream = Split(SplitConfig(imbalance=8, tail=tail, batch=1, tasks=10), (0, 1, 2), CPU)
    counts = [np.bincount(row, minlength=10) for row in whole(stream, "y").numpy()]
    largest = max(counts[0])
    expected = sorted(round(largest * 8 ** (-k / 9)) for k in range(10))
    for row, order in zip(counts, stream.orders, strict=True):
        assert sorted(row.tolist()) == expected
        if tail == "ordered":
            assert row[order].tolist() == expected[::-1]


def test_noise_changes_the_stated_share_of_labels_and_nothing_else() -> None:
    y = np.random.default_rng(0).integers(0, 10, 40_000)
    for kind in ("symmetric", "asymmetric"):
        noisy = noisy_labels(y, 10, 0.3, kind, np.random.default_rng(1))
        wrong = noisy != y
        assert abs(wrong.mean() - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / 40_000)  # false alarm: 7 in a million
        shift = (noisy - y)[wrong] % 10
        assert set(shift) == ({1} if kind == "asymmetric" else set(range(1, 10)))
    clean = Split(SplitConfig(), (0,), CPU)
    noisy_stream = Split(SplitConfig(noise=0.3), (0,), CPU)
    assert torch.equal(whole(clean, "index"), whole(noisy_stream, "index"))
    assert torch.equal(whole(clean, "y")[0], torch.tensor(noisy_stream.clean[0]))
    assert set(noisy_stream.batch(0)) == {"x", "y", "index"}


@given(seed=st.integers(0, 1000), disjoint=st.sampled_from([0, 30, 50, 100]), blurry=st.sampled_from([0, 10, 40]))
def test_i_blurry_moves_exactly_the_stated_share_of_blurry_samples(seed: int, disjoint: int, blurry: int) -> None:
    y = np.repeat(np.arange(10), 50)
    order = class_orders(10, "shuffled", [seed])[0]
    cfg = BlurryConfig(tasks=5, disjoint=disjoint, blurry=blurry)
    rows, sizes = i_blurry(y, order, cfg, np.random.default_rng(seed))
    assert sorted(rows) == list(range(500))
    assert sizes.sum() == 500
    task_of_place = np.repeat(np.arange(5), sizes)
    for arrival, c in enumerate(order):
        per_task = np.bincount(task_of_place[y[rows] == c], minlength=5)
        moved = 50 * blurry // 100 if arrival >= disjoint // 10 else 0
        assert per_task[arrival % 5] == 50 - moved
        assert per_task.sum() == 50
        others = np.delete(per_task, arrival % 5)
        assert others.max() - others.min() <= 1  # dealt evenly


def test_gaussian_classes_peak_in_order_with_the_stated_width() -> None:
    y = np.repeat(np.arange(10), 2000)
    order = np.arange(10)[::-1]
    cfg = BlurryConfig(schedule="gaussian", width=0.05)
    rows, stretches = gaussian(y, order, cfg, np.random.default_rng(0))
    assert sorted(rows) == list(range(len(y)))
    assert stretches.tolist() == [4000] * 5
    centres = [np.flatnonzero(y[rows] == c).mean() / len(y) for c in order]
    assert centres == sorted(centres)
    np.testing.assert_allclose(centres[3:7], (np.arange(3, 7) + 0.5) / 10, atol=0.01)


def test_a_blurry_class_counts_as_seen_from_its_first_sample_on() -> None:
    stream = Blurry(BlurryConfig(), (0, 1), CPU)
    for step in (0, 3, 40, len(stream) - 1):
        labels = torch.cat([stream.batch(s)["y"] for s in range(step + 1)], 1)
        for run in range(2):
            assert set(np.flatnonzero(stream.seen(step)[run])) == set(labels[run].tolist())
    assert not stream.announces


def plain_picture(size: int = 9) -> torch.Tensor:
    return torch.randint(0, 256, (1, 2, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("degrees", [0.0, 90.0, 180.0, -90.0])
def test_right_angles_turn_exactly(degrees: float) -> None:
    x = plain_picture()
    turned = corrupt.rotate(x, torch.full((1, 2), degrees))
    assert torch.equal(turned, torch.rot90(x, round(degrees / 90), (-2, -1)))


def test_rotation_agrees_with_pillow_inside_the_picture() -> None:
    rows, columns = np.mgrid[0:33, 0:33]
    smooth = (127 + 60 * np.sin(rows / 5) + 60 * np.cos(columns / 7)).astype(np.uint8)
    ours = corrupt.rotate(torch.tensor(smooth)[None, None, None], torch.tensor([[30.0]]))[0, 0, 0].numpy()
    theirs = np.asarray(Image.fromarray(smooth).rotate(30, Image.Resampling.BILINEAR))
    inside = (rows - 16) ** 2 + (columns - 16) ** 2 < 13**2
    assert np.abs(ours.astype(int) - theirs.astype(int))[inside].max() <= 3  # grey levels of 255


@pytest.mark.parametrize("name", corrupt.CORRUPTIONS)
def test_a_corruption_grows_with_its_severity_and_keeps_bytes(name: str) -> None:
    x = torch.randint(60, 190, (1, 4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    far = []
    for severity in range(1, 6):
        changed = corrupt.corrupt(x, name, severity, Rng([0], "test"))
        assert changed.dtype == torch.uint8
        assert changed.shape == x.shape
        far.append(float((changed.float() - x.float()).square().mean()))
    if name == "pixelate":  # its cells fall differently for each severity
        assert far[4] > far[0]
    else:
        assert far == sorted(far)
    assert far[0] > 0
    assert torch.equal(corrupt.corrupt(x, name, 3, Rng([0], "test")), corrupt.corrupt(x, name, 3, Rng([0], "test")))


def test_noise_has_the_published_standard_deviation() -> None:
    x = torch.full((1, 10, 3, 32, 32), 128, dtype=torch.uint8)
    changed = corrupt.corrupt(x, "gaussian_noise", 5, Rng([0], "test")).double() / 255
    assert float(changed.std()) == pytest.approx(0.10, rel=0.02)


def test_permuted_domains_hold_the_same_pixels_in_another_order() -> None:
    stream = Drift(DriftConfig(kind="permute", domains=3), (0, 1), CPU)
    each = len(stream) // 3
    for step in (0, each, 2 * each):
        batch = stream.batch(step)
        raw = stream.train.gather(batch["index"])
        assert torch.equal(batch["x"].flatten(2).sort(-1).values, raw.flatten(2).sort(-1).values)
        assert torch.equal(batch["x"], raw) == (step == 0)
        for run in range(2):
            domain = step // each
            order = stream.domains.pixels[run, domain]
            assert torch.equal(batch["x"][run, 0, 0].flatten(), raw[run, 0, 0].flatten()[order])


def test_turned_domains_lie_in_their_share_of_the_span_and_noise_belongs_to_the_sample() -> None:
    turned = Drift(DriftConfig(kind="rotate", domains=4, span=120), (0, 1), CPU)
    for degrees in turned.domains.degrees.tolist():
        assert degrees[0] == 0
        assert all(30 * d <= degrees[d] <= 30 * (d + 1) for d in range(1, 4))
    noisy = Drift(DriftConfig(kind="corrupt", domains=7, severity=(1, 5)), (0,), CPU)
    for step in (0, len(noisy) // 2, len(noisy) - 1):
        batch = noisy.batch(step)
        raw = noisy.train.gather(batch["index"])
        code = int(noisy.domains.codes[0, noisy.domain_of[0, step * 10]])
        name, severity = list(corrupt.CORRUPTIONS)[code // 5], code % 5 + 1
        assert severity in (1, 5)
        for item in range(10):
            keys = noisy.domains.keys[0, 0, noisy.domain_of[0, step * 10]][None]
            rng = corrupt.sample_rng(keys, batch["index"][0, item][None])
            expected = corrupt.corrupt(raw[:, item : item + 1], name, severity, rng)
            assert torch.equal(batch["x"][0, item], expected[0, 0])


def test_domains_recur_with_fresh_samples_and_the_test_set_is_seen_in_each() -> None:
    stream = Drift(DriftConfig(kind="rotate", domains=2, cycles=3), (0,), CPU)
    ends = [step for step in range(len(stream)) if stream.ends_task(step)]
    assert len(ends) == 6
    assert stream.domain_of[0, [0, 10 * (ends[0] + 1), 10 * (ends[1] + 1)]].tolist() == [0, 1, 0]
    full = list(stream.holdout().chunks(len(stream), True))
    assert sum(chunk["x"].shape[1] for chunk in full) == 2 * 359
    assert stream.seen(0).tolist() == [[True, False]]
    repeated = Drift(DriftConfig(kind="permute", domains=3, repeat=True), (0,), CPU)
    index = whole(repeated, "index")[0]
    assert all(len(set(part.tolist())) == len(part) for part in index.chunk(3))
    assert len(index) > 1438


def test_a_table_is_scaled_by_what_came_before_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (60, 4))
    scaled = running_scale(x, 10)
    for start in range(0, 60, 10):
        for row in range(start, start + 10):
            for column in range(4):
                before = x[:start, column]
                value = x[row, column]
                if start:
                    value = (value - before.mean()) / (before.std() if before.std() > 1e-8 else 1)
                assert scaled[row, column] == pytest.approx(np.clip(value, -5, 5), rel=1e-4, abs=1e-5)
    changed = x.copy()
    changed[40:] += 100
    np.testing.assert_array_equal(running_scale(changed, 10)[:40], scaled[:40])


def test_a_table_stream_keeps_file_order_and_has_no_holdout(tmp_path: Path) -> None:
    lines = [f"{i},{i % 7},{'ab'[i % 3 == 0]}" for i in range(45)]
    (tmp_path / "t.csv").write_text("one,two,class\n" + "\n".join(lines) + "\n")
    stream = Tabular(TabularConfig(data=f"csv:{tmp_path / 't.csv'}", scale="none"), (0, 1), CPU)
    assert whole(stream, "x")[1, :, 0].tolist() == list(range(40))
    assert stream.holdout() is None
    assert stream.seen(3).shape == (2, 0)
    assert stream.describe()["left out"] == 5


BAD: list[tuple[type, type, dict[str, Any], str]] = [
    (Split, SplitConfig, {"tasks": 3}, "1, 2, 5, 10"),
    (Split, SplitConfig, {"order": "0,1,1"}, "every class 0 to 9 once"),
    (Split, SplitConfig, {"batch": 100_000}, "use a smaller batch"),
    (Split, SplitConfig, {"passes": 2, "draws": 9}, "leave one of them out"),
    (Split, SplitConfig, {"noise": 1.5}, "between 0 and 1"),
    (Split, SplitConfig, {"noise_kind": "pink"}, "symmetric, asymmetric"),
    (Blurry, BlurryConfig, {"disjoint": 120}, "between 0 and 100"),
    (Blurry, BlurryConfig, {"tasks": 10_000}, "fewer tasks"),
    (Drift, DriftConfig, {"kind": "melt"}, "permute, rotate, corrupt"),
    (Drift, DriftConfig, {"kind": "corrupt", "domains": 99}, "7 kinds"),
    (Drift, DriftConfig, {"kind": "corrupt", "severity": 6}, "allowed are 1 to 5"),
    (Tabular, TabularConfig, {}, "needs a file"),
    (Tabular, TabularConfig, {"data": "digits"}, "holds images"),
]


@pytest.mark.parametrize(("stream", "settings", "values", "words"), BAD)
def test_impossible_settings_are_refused_in_one_line(stream: Any, settings: Any, values: Any, words: str) -> None:
    with pytest.raises(BadConfig) as caught:
        stream(build(settings, values, "stream"), (0,), CPU)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_timeline_counts_every_sample_and_draws_a_line_per_class() -> None:
    stream = Split(SplitConfig(), (0,), CPU)
    line = timeline.of(stream, bins=20)
    assert line.counts.sum() == stream.samples
    assert line.counts.sum(0).tolist() == np.bincount(whole(stream, "y")[0].numpy(), minlength=10).tolist()
    drawn = timeline.draw(line).split("\n")
    assert len(drawn) == 11
    assert drawn[0].startswith("       class 0 │")
    assert drawn[-1].count("╵") == 5


def in_order(stream: Any, sizes: list[int], seed: int, iid: bool) -> list[int]:
    """Rows of a class-incremental stream as they were made when every order was held whole."""
    y, rng, parts = np.asarray(stream.data.train.y), host_rng(seed, "stream order"), []
    order = class_orders(stream.classes, "shuffled", [seed])[0].reshape(len(sizes), -1)
    for size, members in zip(sizes, order, strict=True):
        parts.append(rng.permutation(np.concatenate([np.flatnonzero(y == c) for c in members]))[:size])
    one = np.concatenate(parts)
    return (rng.permutation(one) if iid else one).tolist()


@pytest.mark.parametrize("iid", [False, True])
@pytest.mark.parametrize(
    ("make", "settings", "sizes"),
    [
        (Split, SplitConfig(), [280] * 5),
        (Split, SplitConfig(tasks=2, batch=7, samples_per_task=100), [98] * 2),
        (Synthetic, SyntheticConfig(), [200] * 5),
    ],
)
def test_a_stream_in_one_pass_has_the_order_that_it_always_had(
    make: Any, settings: Any, sizes: list[int], iid: bool
) -> None:
    stream = make(settings, (3, 4), CPU, iid=iid)
    for run, seed in enumerate((3, 4)):
        assert whole(stream, "index")[run].tolist() == in_order(stream, sizes, seed, iid)


@pytest.mark.parametrize("iid", [False, True])
def test_passes_show_each_task_so_many_times_in_new_orders_and_begin_with_the_single_pass(iid: bool) -> None:
    once, thrice = (Split(SplitConfig(tasks=5, passes=passes), (3, 4), CPU, iid=iid) for passes in (1, 3))
    assert len(thrice) == 3 * len(once)
    assert thrice.samples == 3 * once.samples
    starts = [0, *(end + 1 for end in once.schedule.ends)] if not iid else [0, len(once)]
    if not iid:
        assert thrice.schedule.ends == tuple(3 * end + 2 for end in once.schedule.ends)
    assert torch.equal(whole(thrice, "y"), torch.as_tensor(thrice.data.train.y)[whole(thrice, "index")])
    for run in range(2):
        for first, last in itertools.pairwise(10 * start for start in starts):
            own = whole(once, "index")[run, first:last].numpy()
            parts = np.split(whole(thrice, "index")[run, 3 * first : 3 * last].numpy(), 3)
            assert np.array_equal(parts[0], own)
            assert all(np.array_equal(np.sort(part), np.sort(own)) for part in parts)
            assert not np.array_equal(parts[1], own)
            assert not np.array_equal(parts[1], parts[2])


@pytest.mark.parametrize("settings", [{"passes": 3}, {"draws": 50}])
def test_what_comes_again_depends_on_seed_and_step_alone(settings: dict[str, int]) -> None:
    alone, stacked = (Split(SplitConfig(tasks=2, **settings), seeds, CPU) for seeds in ((4,), (3, 4)))
    inorder = [alone.batch(step)["index"][0] for step in range(len(alone))]
    for step in (len(alone) - 1, 0, 60, 99, 61):
        assert torch.equal(stacked.batch(step)["index"][1], inorder[step])
        assert torch.equal(alone.truth(step), alone.batch(step)["y"])


@pytest.mark.parametrize("iid", [False, True])
def test_draws_are_uniform_with_replacement_over_the_whole_of_a_task(iid: bool) -> None:
    """The chi square of n counts has mean n - 1 and variance 2 (n - 1); 4.5 deviations, false alarm in 1 of 10^5."""
    stream = Split(SplitConfig(tasks=2, batch=100, draws=200), (0,), CPU, iid=iid)
    assert (len(stream), stream.samples, stream.schedule.ends) == (400, 40_000, (199, 399))
    rows, y = whole(stream, "index")[0], np.asarray(stream.data.train.y)
    halves = [stream.once("index")[0]] if iid else np.split(stream.once("index")[0], 2)
    assert sum(len(own) for own in halves) > 1400  # more than whole batches of 100
    for own, drawn in zip(halves, torch.split(rows, 40_000 // len(halves)), strict=True):
        count = np.bincount(drawn.numpy(), minlength=len(y))
        assert count.sum() == count[own].sum()
        expected = len(drawn) / len(own)
        square = float(((count[own] - expected) ** 2).sum() / expected)
        assert abs(square - (len(own) - 1)) < 4.5 * math.sqrt(2 * (len(own) - 1))
    twins = sum(100 - len(set(batch.tolist())) for batch in torch.split(rows, 100))
    assert twins > 400  # a batch of 100 from 720 has 6.7 on average; without replacement it has none


@pytest.mark.parametrize("settings", ["passes=300000", "draws=1048576"])
def test_a_million_steps_take_no_more_memory_than_one_pass(settings: str) -> None:
    """On the host; in whole, the order alone would be 3.7 GB. A step at the end costs what one at the start costs."""
    tracemalloc.start()
    config = FewLabelsConfig(of="split-digits", settings=("tasks=1", "batch=448", settings), per_class=4)
    stream = FewLabels(config, (0,), CPU)
    plan = Plan.of(stream, per_task=1000, prequential=10, flush_every=1000, save_every=1000)
    counts = timeline.of(stream).counts
    first, last = stream.batch(0), stream.batch(len(stream) - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(stream) >= 900_000
    assert peak < 100e6
    assert plan.evaluates(len(stream) - 1)
    assert counts.sum() == pytest.approx(stream.samples, rel=0.01)
    assert counts.std(0).max() < 0.2 * counts.mean()
    assert not torch.equal(first["index"], last["index"])
    assert torch.equal(stream.truth(len(stream) - 1)[last["is_labelled"]], last["y"][last["is_labelled"]])


@pytest.mark.parametrize("name", MAKERS)
def test_labels_are_known_without_the_samples(name: str) -> None:
    stream = MAKERS[name]((3, 4))
    for step in (0, 7, len(stream) - 1):
        assert torch.equal(stream.truth(step), stream.batch(step)["y"])


def test_a_sample_is_labelled_in_every_pass_or_in_none() -> None:
    settings = ("tasks=1", "passes=2")
    stream = FewLabels(FewLabelsConfig(of="split-digits", settings=settings, per_class=3), (0,), CPU)
    known: dict[int, list[bool]] = {}
    for step in range(len(stream)):
        batch = stream.batch(step)
        for number, labelled in zip(batch["index"][0].tolist(), batch["is_labelled"][0].tolist(), strict=True):
            known.setdefault(number, []).append(labelled)
    assert all(len(seen) == 2 and len(set(seen)) == 1 for seen in known.values())
    assert sum(seen[0] for seen in known.values()) == 30
