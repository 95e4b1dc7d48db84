"""Sample-adaptive augmentation: every public function against a slow twin, the worked cases of the method, its promises."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references_saa as slow
import torch
from hypothesis import given
from hypothesis.strategies import booleans, floats, integers, lists, sampled_from
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.testing import assert_close

import strategies.flexmatch
import strategies.saa
from cl_sim import encoders, engine, losses, randaugment, registry, session, timeline
from cl_sim.adaptive import class_status, class_thresholds, otsu_threshold, update_flags, update_history
from cl_sim.augment import flip, join_halves, pipeline
from cl_sim.config import from_dict, has_setting
from cl_sim.consistency import labelled_loss
from cl_sim.encoders.classifier import Classifier
from cl_sim.encoders.resnet import WideResNet
from cl_sim.engine import evaluate
from cl_sim.errors import BadConfig
from cl_sim.memory.queue import Queue
from cl_sim.memory.reservoir import Reservoir
from cl_sim.memory.rows import Rows
from cl_sim.memory.table import Table
from cl_sim.optim import Average, without_decay_of_norms
from cl_sim.rng import Rng
from cl_sim.runs import Lift, per_run
from cl_sim.schedules import cosine_decay
from cl_sim.strategy import Strategy
from cl_sim.stream import Stream, truth
from cl_sim.testing import (
    NoHostReads,
    Toy,
    never_reads_the_host_once_steady,
    resumes_bit_for_bit,
    runs_do_not_touch_each_other,
    toy,
    train,
)
from cl_sim.tracking import views
from cl_sim.types import Field
from cl_sim.wrapped import by_name, column
from strategies.scr import nearest_mean
from streams.few_labels import FewLabels, FewLabelsConfig

F64 = torch.float64
seeds = integers(0, 10**6)


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=source(seed))


def whole(high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(high, shape, generator=source(seed))


def known(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


# --- the history of losses


@given(m=integers(1, 9), n=integers(0, 12), decay=sampled_from([0.0, 0.001, 0.5, 0.999, 1.0]), seed=seeds)
def test_history_equals_the_loop_with_the_last_of_twins_winning(m: int, n: int, decay: float, seed: int) -> None:
    h, index, loss = normal(m, seed=seed), whole(m, n, seed=seed), normal(n, seed=seed + 1).abs()
    expected = slow.history(h.tolist(), index.tolist(), loss.tolist(), decay)
    assert_close(update_history(h, index, loss, decay), torch.tensor(expected, dtype=F64), rtol=1e-14, atol=1e-14)


def test_one_visit_from_zero_gives_all_but_a_thousandth_and_leaves_the_others_their_bits() -> None:
    h = torch.tensor([0.0, 0.3, 0.1], dtype=F64)
    after = update_history(h, torch.tensor([0]), torch.tensor([2.0], dtype=F64), 0.001)
    assert after[0].item() == pytest.approx(0.999 * 2.0, abs=1e-15)
    assert torch.equal(after[1:], h[1:])
    assert torch.equal(h, torch.tensor([0.0, 0.3, 0.1], dtype=F64))  # its input stays


def test_history_keeps_its_dtype_and_takes_no_gradient() -> None:
    loss = torch.ones(2, dtype=F64, requires_grad=True)
    after = update_history(torch.zeros(3), torch.tensor([0, 2]), loss, 0.5)
    assert after.dtype == torch.float32
    assert not after.requires_grad
    assert after.tolist() == [0.5, 0.0, 0.5]


# --- Otsu's threshold and the flags


@given(m=integers(1, 40), bins=sampled_from([2, 7, 256]), seed=seeds, edge=booleans())
def test_otsu_equals_the_definition_in_exact_fractions(m: int, bins: int, seed: int, edge: bool) -> None:
    h = normal(m, seed=seed).exp()
    expected = slow.otsu(h.tolist(), bins, edge)
    assert otsu_threshold(h, known(h), bins, edge).item() == pytest.approx(expected, rel=1e-13)


@given(values=lists(integers(0, 256), min_size=1, max_size=30))
def test_otsu_puts_a_value_on_an_edge_into_the_upper_bin_and_breaks_ties_by_the_first_cut(values: list[int]) -> None:
    h = torch.tensor([0.0, 256.0, *map(float, values)], dtype=F64)  # every whole number is an edge
    assert otsu_threshold(h, known(h)).item() == slow.otsu(h.tolist())


def test_otsu_takes_its_reference_values() -> None:
    few = torch.tensor([0.01, 0.02, 0.03, 1.2, 1.5, 2.0], dtype=F64)
    threshold = otsu_threshold(few, known(few))
    assert threshold.item() == pytest.approx(0.029434, abs=5e-7)
    assert update_flags(torch.zeros(6, dtype=torch.bool), few, threshold).tolist() == [True, True] + [False] * 4
    tail = 6 * torch.exp(-torch.arange(500, dtype=F64) / 40)
    threshold = otsu_threshold(tail, known(tail))
    assert threshold.item() == pytest.approx(1.816422, abs=5e-7)
    assert int(update_flags(torch.zeros(500, dtype=torch.bool), tail, threshold).sum()) == 452


def test_the_upper_edge_leaves_out_no_value_of_the_low_side() -> None:
    few = torch.tensor([0.01, 0.02, 0.03, 1.2, 1.5, 2.0], dtype=F64)
    flags = update_flags(torch.zeros(6, dtype=torch.bool), few, otsu_threshold(few, known(few), edge=True))
    assert flags.tolist() == [True] * 3 + [False] * 3


@given(low=integers(1, 20), high=integers(1, 20), seed=seeds)
def test_two_far_clusters_part_and_the_threshold_sits_just_above_the_low_one(low: int, high: int, seed: int) -> None:
    small, large = normal(low, seed=seed).sigmoid() / 100, 10 + normal(high, seed=seed + 1).sigmoid() / 100
    h = torch.cat([small, large])
    threshold = otsu_threshold(h, known(h))
    assert float(small.min()) < threshold.item() < float(small.min()) + 10.02 / 256
    flags = update_flags(torch.zeros(low + high, dtype=torch.bool), h, threshold)
    assert not bool(flags[low:].any())


@given(value=floats(0, 10), m=integers(1, 9), bits=integers(0, 511))
def test_equal_values_leave_every_flag_as_it_was(value: float, m: int, bits: int) -> None:
    for dtype in (F64, torch.float32):
        h, before = torch.full((m,), value, dtype=dtype), torch.tensor([bool(bits >> i & 1) for i in range(m)])
        assert torch.equal(update_flags(before, h, otsu_threshold(h, known(h))), before)


def test_nothing_known_leaves_every_flag_as_it_was() -> None:
    h, before = normal(6, seed=0), torch.tensor([True, False] * 3)
    threshold = otsu_threshold(h, torch.zeros(6, dtype=torch.bool))
    assert bool(threshold.isnan())
    assert torch.equal(update_flags(before, h, threshold), before)


@given(m=integers(1, 20), more=integers(1, 9), seed=seeds)
def test_the_unknown_have_no_say_in_the_threshold(m: int, more: int, seed: int) -> None:
    h, strangers = normal(m, seed=seed).exp(), normal(more, seed=seed + 1) * 100
    mask = torch.cat([known(h), torch.zeros(more, dtype=torch.bool)])
    assert torch.equal(otsu_threshold(torch.cat([h, strangers]), mask), otsu_threshold(h, known(h)))


@given(m=integers(2, 20), seed=seeds, power=integers(-8, 8))
def test_the_threshold_follows_order_and_unit_of_the_losses(m: int, seed: int, power: int) -> None:
    h = normal(m, seed=seed).exp()
    shuffled = h[torch.randperm(m, generator=source(seed))]
    assert torch.equal(otsu_threshold(shuffled, known(h)), otsu_threshold(h, known(h)))
    assert torch.equal(otsu_threshold(h * 2.0**power, known(h)), otsu_threshold(h, known(h)) * 2.0**power)


@given(m=integers(1, 12), seed=seeds)
def test_flags_equal_the_loop_and_a_value_on_the_threshold_keeps_its_flag(m: int, seed: int) -> None:
    h, before = whole(4, m, seed=seed).double(), whole(2, m, seed=seed + 1).bool()
    expected = slow.flags(before.tolist(), h.tolist(), 2.0)
    assert update_flags(before, h, torch.tensor(2.0)).tolist() == expected
    assert update_flags(before, h, 2.0).tolist() == expected


# --- FlexMatch's curriculum


@given(m=integers(1, 12), classes=integers(1, 5), warm_up=booleans(), seed=seeds)
def test_class_status_equals_the_loop(m: int, classes: int, warm_up: bool, seed: int) -> None:
    selected, before = whole(classes + 2, m, seed=seed) - 2, normal(classes, seed=seed).sigmoid()
    expected = slow.status(selected.tolist(), classes, before.tolist(), warm_up)
    assert_close(class_status(selected, classes, before, warm_up), torch.tensor(expected, dtype=F64), rtol=0, atol=0)


def test_class_status_takes_its_hand_worked_values() -> None:
    selected, before = torch.tensor([0, 0, 1, -1, -1, -1, -1]), torch.zeros(3)
    assert class_status(selected, 3, before).tolist() == [0.5, 0.25, 0]
    assert class_status(selected, 3, before, warm_up=False).tolist() == [1, 0.5, 0]
    for alike in (-1, 2):
        assert class_status(torch.full((7,), alike), 3, before + 0.25).tolist() == [0.25] * 3


def test_thresholds_rise_from_zero_to_the_confidence_and_bend_below_the_line() -> None:
    s = torch.tensor([0, 0.5, 1], dtype=F64)
    expected = torch.tensor([0, 0.95 / 3, 0.95], dtype=F64)
    assert_close(class_thresholds(s, 0.95), expected, rtol=1e-15, atol=0)
    inside = torch.linspace(0.01, 0.99, 50, dtype=F64)
    assert bool((class_thresholds(inside, 0.95) < 0.95 * inside).all())
    assert bool((class_thresholds(inside, 0.95).diff() > 0).all())


# --- the loss of FixMatch


@given(n=integers(1, 9), classes=integers(1, 5), seed=seeds)
def test_fixmatch_equals_the_loop_for_one_threshold_and_for_one_per_class(n: int, classes: int, seed: int) -> None:
    weak, strong = 3 * normal(n, classes, seed=seed), 3 * normal(n, classes, seed=seed + 1)
    each = normal(classes, seed=seed + 2).sigmoid()
    for threshold, listed in ((0.7, [0.7] * classes), (torch.tensor(0.7), [0.7] * classes), (each, each.tolist())):
        loss, per_sample = losses.fixmatch(weak, strong, threshold)
        total, rows = slow.fixmatch(weak.tolist(), strong.tolist(), listed)
        assert_close(loss, torch.tensor(total, dtype=F64), rtol=1e-12, atol=1e-12)
        assert_close(per_sample, torch.tensor(rows, dtype=F64), rtol=1e-12, atol=1e-12)


def test_reaching_the_threshold_suffices_and_the_divisor_is_the_whole_batch() -> None:
    weak = torch.tensor([[0.0, 0.0], [9.0, 0.0]], dtype=F64)  # 0.5 and nearly 1
    strong = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=F64)
    assert losses.fixmatch(weak, strong, 0.5)[0].item() == pytest.approx(math.log(2))
    assert losses.fixmatch(weak, strong, 0.6)[0].item() == pytest.approx(math.log(2) / 2)
    assert losses.fixmatch(weak, strong, 1.0)[0].item() == 0
    assert losses.fixmatch(weak, strong, 1.0)[1].tolist() == pytest.approx([math.log(2)] * 2)


@given(n=integers(1, 6), classes=integers(2, 4), seed=seeds)
def test_gradients_reach_the_strong_view_alone(n: int, classes: int, seed: int) -> None:
    weak, strong = 3 * normal(n, classes, seed=seed), normal(n, classes, seed=seed + 1)
    weak.requires_grad_()
    strong.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.fixmatch(weak.detach(), s, 0.7), (strong,))
    losses.fixmatch(weak, strong, 0.0)[0].backward()
    assert weak.grad is None
    assert float(strong.grad.abs().max()) > 0


# --- joining two halves


@given(height=integers(1, 6), width=integers(1, 6), bits=integers(0, 7))
def test_a_joined_image_has_each_half_where_it_was(height: int, width: int, bits: int) -> None:
    a, b = (whole(256, 3, 2, height, width, seed=s).to(torch.uint8) for s in (0, 1))
    left = torch.tensor([bool(bits >> i & 1) for i in range(3)])
    out = join_halves(a, b, left)
    assert out.dtype == torch.uint8
    for item in range(3):
        for channel in range(2):
            one, two = a[item, channel].tolist(), b[item, channel].tolist()
            assert out[item, channel].tolist() == slow.joined(one, two, bool(left[item]))
    stacked = join_halves(a[None], b[None], left[None])  # with a run axis
    assert torch.equal(stacked[0], out)


# --- every function, lifted


def test_lifted_functions_equal_the_runs_alone_and_never_read_the_host() -> None:
    h, index = normal(3, 20, seed=0).abs(), whole(20, 3, 8, seed=1)
    z, w = 3 * normal(3, 8, 4, seed=2), 3 * normal(3, 8, 4, seed=3)
    mask, flags, selected = whole(4, 3, 20, seed=4) > 0, whole(2, 3, 20, seed=5).bool(), whole(5, 3, 20, seed=6) - 1
    mask[2] = False
    status = normal(3, 4, seed=7).sigmoid()
    images, left = whole(256, 3, 8, 3, 5, 5, seed=8).to(torch.uint8), whole(2, 3, 8, seed=9).bool()
    calls = {
        "history": (lambda h, i, c: update_history(h, i, c, 0.1), (h, index, h[:, :8])),
        "otsu": (otsu_threshold, (h, mask)),
        "flags": (lambda f, h, m: update_flags(f, h, otsu_threshold(h, m)), (flags, h, mask)),
        "status": (lambda s, b: class_status(s, 4, b), (selected, status)),
        "thresholds": (lambda s: class_thresholds(s, 0.95), (status,)),
        "fixmatch": (lambda z, w, s: losses.fixmatch(z, w, s)[0], (z, w, status)),
        "per sample": (lambda z, w: losses.fixmatch(z, w, 0.9)[1], (z, w)),
        "halves": (join_halves, (images, images.flip(1), left)),
    }
    for name, (call, inputs) in calls.items():
        with NoHostReads():
            together = per_run(call)(*inputs)
        for run in range(3):
            alone = call(*(value[run] for value in inputs))
            assert_close(together[run], alone, equal_nan=True, msg=name)


def test_a_lifted_function_may_return_several_results() -> None:
    z, w = normal(2, 5, 3, seed=0), normal(2, 5, 3, seed=1)
    for runs in (1, 2):
        loss, per_sample = per_run(losses.fixmatch)(z[:runs], w[:runs], threshold=0.5)
        assert loss.shape == (runs,)
        assert per_sample.shape == (runs, 5)


# --- the table beside a memory

FIELDS = {"x": Field((2,), torch.uint8), "y": Field((), torch.int64), "index": Field((), torch.int64)}


def rows_of(*index: int, runs: int = 1) -> dict[str, Tensor]:
    number = torch.tensor(index).expand(runs, -1)
    return {"x": torch.stack([number, number], -1).to(torch.uint8), "y": number % 3, "index": number}


def kept(capacity: int, runs: int = 1, make: type[Rows] = Queue) -> tuple[Rows, Table]:
    memory = make(capacity, FIELDS, Rng(range(runs), "test"))
    return memory, memory.keep_table()


def lines(table: Table) -> dict[str, list[list[float]]]:
    return {name: column[:, : table.capacity].tolist() for name, column in table.named_buffers() if column.dim()}


def test_the_first_visit_sets_the_history_and_later_ones_move_it() -> None:
    table = Table(3, 1)
    table.visit(torch.tensor([[1]]), torch.tensor([[2.0]]), 0.75)
    assert table.history[0, :3].tolist() == [0, 2, 0]
    assert table.known()[0].tolist() == [False, True, False]
    table.visit(torch.tensor([[1, 2]]), torch.tensor([[4.0, 1.0]]), 0.75)
    assert table.history[0, :3].tolist() == [0, 0.75 * 2 + 0.25 * 4, 1]
    assert table.known(2)[0].tolist() == [False, True, False]


def test_of_a_slot_drawn_twice_the_last_loss_counts_and_both_visits() -> None:
    table = Table(2, 1)
    table.visit(torch.tensor([[0]]), torch.tensor([[1.0]]), 0.5)
    table.visit(torch.tensor([[0, 0]]), torch.tensor([[9.0, 3.0]]), 0.5)
    assert table.history[0, 0].item() == 2
    assert table.visits[0, :2].tolist() == [3, 0]


def test_a_class_is_noted_only_when_sure_and_never_forgotten() -> None:
    table = Table(3, 1)
    slot, label = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[2, 0, 1, 1]])
    table.choose(slot, label, torch.tensor([[True, True, False, False]]))
    assert table.selected[0, :3].tolist() == [2, 0, -1]
    table.choose(slot, label, torch.tensor([[False, True, True, False]]))
    assert table.selected[0, :3].tolist() == [2, 1, -1]


@given(visited=integers(1, 8), seed=seeds)
def test_slot_m_is_nowhere(visited: int, seed: int) -> None:
    table = Table(4, 1)
    before = lines(table)
    slot, loss = torch.full((1, visited), 4), normal(1, visited, seed=seed).float()
    table.visit(slot, loss, 0.5)
    table.choose(slot, torch.zeros_like(slot), known(loss))
    assert lines(table) == before


@pytest.mark.parametrize("make", [Queue, Reservoir])
@given(seed=seeds, steps=integers(1, 12))
def test_a_line_is_always_about_the_sample_that_rests_there(make: type[Rows], seed: int, steps: int) -> None:
    """A dictionary by sample, emptied when the sample leaves, says the same as the table by slot."""
    memory, table = kept(5, make=make)
    truth: dict[int, tuple[int, float]] = {}
    for step in range(steps):
        memory.add(rows_of(*range(3 * step, 3 * step + 3)))
        resting = memory.row("index")[0, : len(memory)].tolist()
        truth = {sample: truth.get(sample, (0, 0.0)) for sample in resting}
        slot = whole(len(memory), 1, 2, seed=seed + step)
        loss = (slot + step).float()
        table.visit(slot, loss, 0.0)
        table.mark(table.known() & (table.history[:, :5] > 3))
        for one, value in zip(slot[0].tolist(), loss[0].tolist(), strict=True):
            truth[resting[one]] = (truth[resting[one]][0] + 1, value)
        for number, sample in enumerate(resting):
            visits, value = truth[sample]
            assert (int(table.visits[0, number]), float(table.history[0, number])) == (visits, value)
            assert bool(table.naive[0, number]) == (visits > 0 and value > 3)


def test_writing_one_field_of_a_row_leaves_its_line_and_a_whole_row_resets_it() -> None:
    memory, table = kept(3)
    memory.add(rows_of(0, 1, 2))
    slot = torch.tensor([[0, 1, 2]])
    table.visit(slot, torch.ones(1, 3), 0.5)
    table.choose(slot, slot, known(slot))
    table.mark(torch.ones(1, 3, dtype=torch.bool))
    memory.write(torch.tensor([[1]]), {"y": torch.tensor([[2]])})
    assert bool(table.naive[:, :3].all())
    memory.add(rows_of(7))
    assert lines(table) == {
        "history": [[0, 1, 1]],
        "visits": [[0, 1, 1]],
        "naive": [[0, 1, 1]],
        "selected": [[-1, 1, 2]],
        "since": [[0, 0, 0]],
    }


def test_a_table_stays_in_its_memorys_checkpoint_and_in_its_price() -> None:
    memory, table = kept(4, runs=2)
    bare = Queue(4, FIELDS, Rng(range(2), "test"))
    assert memory.bytes_per_row == bare.bytes_per_row + 4 + 4 + 1 + 8 + 2
    memory.add(rows_of(0, 1, 2, runs=2))
    table.visit(torch.tensor([[0, 1], [2, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0.5)
    table.mark(torch.tensor([[True, False, True, False]] * 2))
    again, other = kept(4, runs=2)
    again.load_state_dict(memory.state_dict())
    assert lines(other) == lines(table)


def test_a_table_never_reads_the_host_and_keeps_runs_apart() -> None:
    table, alone = Table(6, 3), Table(6, 1)
    slot, loss = whole(7, 3, 5, seed=0), normal(3, 5, seed=1).float().abs()
    sure = whole(2, 3, 5, seed=2).bool()
    with NoHostReads():
        for t, part in ((table, slice(None)), (alone, slice(1, 2))):
            t.visit(slot[part], loss[part], 0.5)
            t.choose(slot[part], slot[part], sure[part])
            t.mark(t.known() & t.is_naive(slot[part, :1]))
            t.reset(slot[part, :2])
    assert lines(alone) == {name: [column[1]] for name, column in lines(table).items()}


# --- strong views

NAMES = list(randaugment.POOL)


def photos(batch: int, height: int, width: int, seed: int, channels: int = 3) -> Tensor:
    """Smooth pictures with noise, some dark, some of few brightnesses: [1, B, C, H, W]."""
    rough = torch.rand(batch, channels, 4, 4, generator=source(seed))
    x = torch.nn.functional.interpolate(rough, (height, width), mode="bilinear")
    x = x + 0.1 * torch.randn(x.shape, generator=source(seed + 1))
    x = (x * torch.linspace(0.05, 1.2, batch)[:, None, None, None] * 255).clamp(0, 255).to(torch.uint8)
    x[0] = 77  # one colour only
    x[1] = x[1] // 100 * 100
    return x[None]


def to_pil(x: Tensor) -> Image.Image:
    return Image.fromarray(x.permute(1, 2, 0).numpy() if len(x) == 3 else x[0].numpy())


def from_pil(image: Image.Image) -> Tensor:
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.dim() == 3 else array[None]


def by_pillow(image: Image.Image, name: str, v: float) -> Image.Image:
    width, height = image.size
    made = {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(v),
        "color": lambda: ImageEnhance.Color(image).enhance(v),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(v),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(v),
        "posterize": lambda: ImageOps.posterize(image, int(v)),
        "solarize": lambda: ImageOps.solarize(image, v),
        "rotate": lambda: image.rotate(v),
        "shear_x": lambda: image.transform(image.size, Image.Transform.AFFINE, (1, v, 0, 0, 1, 0)),
        "shear_y": lambda: image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, v, 1, 0)),
        "translate_x": lambda: image.transform(image.size, Image.Transform.AFFINE, (1, 0, v * width, 0, 1, 0)),
        "translate_y": lambda: image.transform(image.size, Image.Transform.AFFINE, (1, 0, 0, 0, 1, v * height)),
    }
    return made[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_equals_pillows_to_the_bit(name: str, channels: int) -> None:
    low, high = randaugment.POOL[name]
    for height, width in ((32, 32), (17, 24)):
        x = photos(12, height, width, seed=height, channels=channels)
        v = torch.cat([torch.tensor([low, high]), low + (high - low) * torch.rand(10, generator=source(3))]).double()
        kind = torch.full((1, 12), randaugment.NUMBER[name])
        out = randaugment.apply_operation(x, kind, v[None])
        for item in range(12):
            expected = from_pil(by_pillow(to_pil(x[0, item]), name, float(v[item])))
            assert torch.equal(out[0, item], expected), f"{name} by {float(v[item])} at {height}x{width}"


def test_the_square_equals_the_drawn_rectangle() -> None:
    height, width, count = 20, 32, 60
    x = photos(count, height, width, seed=1)
    side = 0.5 * torch.rand(1, count, generator=source(1)).double()
    centre = torch.rand(1, count, 2, generator=source(2)).double()
    out = randaugment.apply_cutout(x, side, centre)
    for item in range(count):
        image, reach = to_pil(x[0, item]), float(side[0, item]) * width
        y0, x0 = float(centre[0, item, 0]) * height, float(centre[0, item, 1]) * width
        x0, y0 = int(max(0, x0 - reach / 2)), int(max(0, y0 - reach / 2))
        corners = (x0, y0, min(width, x0 + reach), min(height, y0 + reach))
        ImageDraw.Draw(image).rectangle(corners, (125, 123, 114))
        assert torch.equal(out[0, item], from_pil(image))


def test_a_strong_view_is_its_operations_in_order_and_then_the_square() -> None:
    x, recipe = photos(30, 32, 32, seed=5), randaugment.draw_strong(Rng([3], "t"), 30)
    out = randaugment.apply_strong(x, recipe)
    for item in range(30):
        image = to_pil(x[0, item])
        for place in range(3):
            name = NAMES[int(recipe.kind[0, item, place])]
            image = by_pillow(image, name, float(recipe.magnitude[0, item, place]))
        last = randaugment.apply_cutout(
            from_pil(image)[None, None], recipe.side[:, item, None], recipe.centre[:, item, None]
        )
        assert torch.equal(out[0, item], last[0, 0])


def share_z(count: int, trials: int, probability: float) -> float:
    return abs(count / trials - probability) / math.sqrt(probability * (1 - probability) / trials)


def test_operations_are_drawn_equally_often_and_magnitudes_evenly_over_their_range() -> None:
    """42 counts and 42 halves of ranges; one beyond 4.5 standard errors by chance in 1 of 1700 tests."""
    recipe = randaugment.draw_strong(Rng(range(4), "t"), 5000)
    for number, (low, high) in enumerate(randaugment.POOL.values()):
        for place in range(3):
            drawn = recipe.kind[..., place] == number
            assert share_z(int(drawn.sum()), 20_000, 1 / 14) < 4.5
            v = recipe.magnitude[..., place][drawn]
            assert low <= float(v.min()) <= float(v.max()) <= high
            if high > low:
                assert share_z(int((v < (low + high) / 2).sum()), len(v), 0.5) < 4.5
    assert share_z(int((recipe.side < 0.25).sum()), 20_000, 0.5) < 4.5
    assert float(recipe.side.max()) < 0.5
    assert share_z(int((recipe.centre < 0.5).sum()), 40_000, 0.5) < 4.5


def test_strong_views_are_the_same_alone_and_stacked_without_host_reads_and_in_both_dtypes() -> None:
    x = photos(8, 16, 16, seed=2).expand(3, -1, -1, -1, -1)
    with NoHostReads():
        stacked = randaugment.strong(x, Rng([4, 5, 6], "t"))
    assert torch.equal(stacked[1], randaugment.strong(x[1:2], Rng([5], "t"))[0])
    assert stacked.dtype == torch.uint8
    assert not torch.equal(stacked[0], stacked[1])
    floats_ = randaugment.strong(x.float() / 255, Rng([4, 5, 6], "t"))
    assert torch.equal((floats_ * 255).round().to(torch.uint8), stacked)


def test_strong_views_can_be_asked_for_by_name() -> None:
    fields = {"x": Field((3, 16, 16), torch.uint8)}
    x = photos(4, 16, 16, seed=2)
    made = pipeline(["strong", "flip"], Rng([5], "t"), fields)({"x": x})["x"]
    rng = Rng([5], "t")
    assert torch.equal(made, flip(randaugment.strong(x, rng), rng))
    with pytest.raises(BadConfig, match="takes no number"):
        pipeline(["strong:3"], Rng([5], "t"), fields)
    with pytest.raises(BadConfig, match="1 or 3 channels"):
        pipeline(["strong"], Rng([5], "t"), {"x": Field((2, 16, 16), torch.uint8)})


# --- the wide residual network


def test_wide_resnets_have_the_published_sizes() -> None:
    for width, classes, size in ((2, 10, 1_467_610), (8, 100, 23_401_012)):
        net = WideResNet(28, width)
        assert net.dim == 64 * width
        assert sum(p.numel() for p in net.parameters()) + (net.dim + 1) * classes == size


def norm_by_hand(x: Tensor, norm: torch.nn.BatchNorm2d) -> Tensor:
    mean, spread = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    flat = (x - mean) / (spread + 1e-5).sqrt()
    flat = flat * norm.weight[:, None, None] + norm.bias[:, None, None]
    return torch.where(flat > 0, flat, 0.1 * flat)


@pytest.mark.parametrize("width", [1, 2])  # width 1: the first group keeps its channels
def test_a_wide_resnet_equals_its_layers_written_out(width: int) -> None:
    net = WideResNet(16, width, momentum=0.001).double()
    for norm in (part for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    x = normal(3, 3, 12, 12, seed=0)
    conv = torch.nn.functional.conv2d
    out, inner, number = conv(x, net.stem.weight, padding=1), 16, 0
    for outer, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        for place in range(2):
            block, step = net.blocks[number], stride if place == 0 else 1
            ready = norm_by_hand(out, block.norm1)
            inside = norm_by_hand(conv(ready, block.conv1.weight, stride=step, padding=1), block.norm2)
            through = out if inner == outer else conv(ready, block.shortcut.weight, stride=step)
            out, inner, number = through + conv(inside, block.conv2.weight, padding=1), outer, number + 1
    mean = out.mean((0, 2, 3))
    assert_close(net(x), norm_by_hand(out, net.norm).mean((2, 3)), rtol=1e-9, atol=1e-9)
    assert_close(net.norm.running_mean, 0.001 * mean)


def test_wide_resnets_start_with_the_stated_variances() -> None:
    """The mean square of n weights has a standard error of sqrt(2 / n): one of 28 beyond 5 of them in 1 of 60,000 tests."""
    torch.manual_seed(0)
    convolutions = [part for part in WideResNet(28, 2).modules() if isinstance(part, torch.nn.Conv2d)]
    assert len(convolutions) == 28
    for conv in convolutions:
        weight, expected = conv.weight.detach(), 2 / (conv.kernel_size[0] ** 2 * conv.out_channels)
        assert abs(float(weight.square().mean()) / expected - 1) < 5 * math.sqrt(2 / weight.numel())


def test_wide_resnets_are_found_by_name_and_refuse_other_depths() -> None:
    cfg = encoders.config_class("wide_resnet")(depth=10, width=1)
    net = encoders.build("wide_resnet", cfg, Field((1, 10, 14), torch.uint8))
    assert net(whole(256, 2, 1, 10, 14, seed=0).to(torch.uint8)).shape == (2, 64)
    with pytest.raises(BadConfig, match="6 n \\+ 4"):
        encoders.config_class("wide_resnet")(depth=18)


# --- a stream with few labels

CPU = torch.device("cpu")
BASES = {
    "split": ("split-digits", ()),
    "drift": ("drift-digits", ("kind=rotate", "repeat=true", "cycles=1", "domains=2")),
}


def few(
    seeds_: tuple[int, ...] = (0,), of: str = "split-digits", inner: tuple[str, ...] = (), **settings: Any
) -> FewLabels:
    return FewLabels(FewLabelsConfig(of=of, settings=inner, **settings), seeds_, CPU)


def stretch(stream: Stream, key: str) -> Tensor:
    return torch.cat([stream.batch(step)[key] for step in range(len(stream))], 1)


@pytest.mark.parametrize("base", BASES)
def test_a_strategy_cannot_tell_streams_apart_that_differ_in_hidden_labels_alone(base: str) -> None:
    """Whatever it computes from batches and fields is then a function of the labels it was given."""
    one, two = (few((3, 4), *BASES[base], fraction=0.1) for _ in range(2))
    true = two.inner.labels.clone()
    hidden = ~stretch(two, "is_labelled")
    two.inner.labels = torch.where(hidden, (true[:, : two.samples] + 1) % two.classes, true[:, : two.samples])
    assert one.fields == two.fields
    for step in range(0, len(one), 5):
        here, there = one.batch(step), two.batch(step)
        assert here.keys() == there.keys() == one.fields.keys()
        for key, value in here.items():
            assert torch.equal(value, there[key]), key
        part = hidden[:, step * one.batch_size : (step + 1) * one.batch_size]
        assert torch.equal(one.truth(step) != two.truth(step), part)
    assert 0 < int(hidden.sum()) < hidden.numel()


@pytest.mark.parametrize("base", BASES)
def test_labels_are_the_others_where_known_and_minus_one_elsewhere(base: str) -> None:
    stream = few((3, 4), *BASES[base], fraction=0.3)
    plain = by_name(BASES[base][0], BASES[base][1], (3, 4), CPU, "", False)
    known, y, true = stretch(stream, "is_labelled"), stretch(stream, "y"), stretch(plain, "y")
    assert torch.equal(y, torch.where(known, true, -1))
    assert torch.equal(stretch(stream, "x"), stretch(plain, "x"))
    assert torch.equal(torch.cat([stream.truth(step) for step in range(len(stream))], 1), true)
    for run in range(2):  # the same sample has the same number and is labelled alike whenever it comes
        seen: dict[int, tuple[int, bool]] = {}
        new, old = stretch(stream, "index")[run].tolist(), stretch(plain, "index")[run].tolist()
        for number, row, label in zip(new, old, known[run].tolist(), strict=True):
            assert seen.setdefault(row, (number, label)) == (number, label)
        assert len({number for number, _ in seen.values()}) == len(seen)
    assert not torch.equal(stretch(stream, "index"), stretch(plain, "index"))


def test_numbers_say_nothing_about_the_class() -> None:
    """Among rows sorted by class, numbers and labels have no rank correlation: 5 standard errors, 1 / sqrt(n), else 1 in 10^6."""
    stream = few(of="synthetic", inner=("per_class=300", "noise=0"), fraction=0.5)
    number, y = stretch(stream, "index")[0].double(), column(stream.inner, "y")[0].astype(float)
    for values, least, most in ((number, 0, 5), (torch.tensor(column(stream.inner, "index")[0]), 50, 60)):
        assert least <= abs(np.corrcoef(values.numpy(), y)[0, 1]) * math.sqrt(len(y)) < most


def test_each_sample_is_labelled_with_the_given_probability() -> None:
    known = stretch(few(tuple(range(20)), fraction=0.05), "is_labelled")
    assert share_z(int(known.sum()), known.numel(), 0.05) < 4.5  # false alarm: 7 in a million
    assert not stretch(few(fraction=0.0), "is_labelled").any()
    assert stretch(few(fraction=1.0), "is_labelled").all()


@pytest.mark.parametrize("first", [False, True])
def test_every_class_gets_its_number_of_labels(first: bool) -> None:
    stream = few((0, 1, 2), per_class=7, guarantee_first_label=first)
    labelled = stretch(stream, "is_labelled")
    for run, (known, y) in enumerate(zip(labelled.numpy(), column(stream.inner, "y"), strict=True)):
        assert np.bincount(y[known], minlength=10).tolist() == [7] * 10
        assert not first or all(known[np.flatnonzero(y == c)[0]] for c in range(10)), run
    assert not torch.equal(labelled[0], labelled[1])


def test_the_first_sample_of_every_class_is_labelled_if_asked_for_and_no_other() -> None:
    stream = few((0, 1), fraction=0.0, guarantee_first_label=True)
    labelled = stretch(stream, "is_labelled")
    assert labelled.sum(1).tolist() == [10, 10]
    for known, y in zip(labelled.numpy(), column(stream.inner, "y"), strict=True):
        assert all(known[np.flatnonzero(y == c)[0]] for c in range(10))


def test_a_run_has_the_same_labels_alone_and_stacked() -> None:
    alone, stacked = few((5,), fraction=0.2), few((4, 5), fraction=0.2)
    for step in (0, 9, 3):
        for key, value in alone.batch(step).items():
            assert torch.equal(value[0], stacked.batch(step)[key][1])


@pytest.mark.parametrize("settings", ["passes=2", "draws=400"])
def test_a_pool_tells_what_is_labelled_and_shows_any_sample_as_the_stream_does(settings: str) -> None:
    stream = few((3, 4), inner=("tasks=1", "samples_per_task=95", settings), fraction=0.2)
    pool = stream.pool
    for step in range(0, len(stream), 3):
        batch = stream.batch(step)
        taken = pool.take(batch["index"])
        assert taken.keys() == batch.keys() == stream.fields.keys()
        assert all(torch.equal(taken[key], value) for key, value in batch.items())
    number, known = stretch(stream, "index"), stretch(stream, "is_labelled")
    for run in range(2):
        told = pool.labelled[run][pool.labelled[run] >= 0].tolist()
        assert sorted(told) == sorted(set(number[run][known[run]].tolist()))
        assert pool.present[run].nonzero()[:, 0].tolist() == sorted(set(number[run].tolist()))
    assert len(set((pool.labelled >= 0).sum(1).tolist())) == 2  # runs differ, so that the shorter list is padded
    assert few(inner=("tasks=1",)).pool is None


def test_hidden_labels_are_measured_by() -> None:
    stream = few(fraction=0.1)
    asked: list[set[int]] = []

    class Zero(Strategy):
        def predict(self, batch: dict[str, Tensor]) -> Tensor:
            asked.append(set(batch["y"].unique().tolist()))
            return torch.eye(10)[torch.zeros_like(batch["y"])]

    strategy = Zero(None, toy("finetune", (0,)).strategy.env)
    for step in range(len(stream)):
        batch = stream.batch(step)
        expected = (stream.inner.batch(step)["y"] == 0).float().sum(1)
        assert torch.equal(engine.test(strategy, batch, truth(stream, step, batch))["test acc"], expected)
    assert set.union(*asked) >= {-1}


def test_few_labels_are_asked_for_by_name_and_mistakes_are_explained() -> None:
    assert registry.resolve("stream", "few_labels-split-cifar10") == ("few_labels", {"of": "split-cifar10"})
    assert "per class" in few().describe()["labelled"]
    assert timeline.of(few(inner=("tasks=2",))).counts.sum() == few(inner=("tasks=2",)).samples
    with pytest.raises(BadConfig, match="class 0 has only"):
        few(per_class=143)
    with pytest.raises(BadConfig, match="no setting is called 'split"):
        few(inner=("task=2",))
    with pytest.raises(BadConfig, match="that has them"):
        few(of="few_labels-split-digits")
    with pytest.raises(BadConfig, match="have no order"):
        few(inner=("draws=9",), guarantee_first_label=True)
    settings = {"stream": {"name": "few_labels"}, "strategy": {"name": "er"}, "encoder": {"name": "mlp"}}
    with pytest.raises(BadConfig, match="needs every label"):
        session.build_stream(from_dict(settings), (0,))


# --- sample-adaptive views in replay

SMALL = {"capacity": 40, "saa": "replay"}


def replaying(name: str = "saa", seeds_: tuple[int, ...] = (0,), **settings: Any) -> Toy:
    return toy(name, seeds_, {"strategy": {**SMALL, **settings}, "augment": ["flip"]})


def weights(made: Toy) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in made.strategy.net.parameters()]


def alike(one: Toy, two: Toy) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


@pytest.mark.parametrize("name", ["saa", "er", "er_ace"])
def test_with_no_flag_the_run_is_the_plain_strategy_to_the_bit(name: str) -> None:
    plain, none, method = (replaying(name, (0, 1), saa=arm) for arm in ("off", "none", "replay"))
    for step in range(len(plain.stream)):
        for made in (plain, none, method):
            train(made, step, step + 1)
        assert alike(plain, none)
        if step < 12:  # before the first selection: 3 periods of 40 / 10 steps
            assert alike(plain, method)
    assert not alike(plain, method)


def test_er_with_the_plugin_is_saa_to_the_bit() -> None:
    er, saa = replaying("er"), replaying("saa")
    for made in (er, saa):
        train(made, 0, len(made.stream))
    assert alike(er, saa)


@pytest.mark.parametrize("arm", ["replay", "ssl", "inverse"])
def test_flags_follow_the_losses_step_by_step_as_the_rules_written_out_say(arm: str) -> None:
    """A dictionary by sample and Otsu in fractions, fed with the losses noted, say the same as table and selection."""
    made = replaying(saa=arm, history_decay=0.25)
    strategy, memory, table = made.strategy, made.strategy.memory, made.strategy.memory.table
    noted: list[tuple[list[int], list[float]]] = []
    visit = table.visit
    table.visit = lambda slot, loss, decay: (
        noted.append((slot[0].tolist(), loss[0].tolist())),
        visit(slot, loss, decay),
    )
    lines_: dict[int, dict[str, Any]] = {}
    resting: list[int] = []
    for step in range(len(made.stream)):
        noted.clear()
        strategy.observe(made.stream.batch(step))
        for slot, loss in zip(*noted[0], strict=True) if noted else ():
            line = lines_[resting[slot]]
            line["h"] = 0.25 * line["h"] + 0.75 * loss if line["visits"] else loss
            line["visits"] += 1
        resting = memory.row("index")[0, : len(memory)].tolist()
        lines_ = {sample: lines_.get(sample, {"h": 0.0, "visits": 0, "naive": False}) for sample in resting}
        known_ = [lines_[sample] for sample in resting if lines_[sample]["visits"] >= 2]
        if (step + 1) >= 12 and (step + 1) % 4 == 0 and 2 * len(known_) >= len(resting):
            threshold = slow.otsu([line["h"] for line in known_])
            for line in known_:
                low = line["h"] < threshold
                line["naive"] = not low if arm == "inverse" else low
        for slot, sample in enumerate(resting):
            line = lines_[sample]
            assert bool(table.naive[0, slot]) == line["naive"], f"step {step}"
            assert int(table.visits[0, slot]) == line["visits"]
            assert float(table.history[0, slot]) == pytest.approx(line["h"], rel=1e-5, abs=1e-7)
    assert 0 < sum(line["naive"] for line in lines_.values()) < 40


@pytest.mark.parametrize("arm", ["replay", "ssl", "random", "inverse"])
def test_a_slot_that_was_not_recalled_often_enough_is_never_naive(arm: str) -> None:
    made = replaying(seeds_=(0, 1), saa=arm, min_visits=3)
    flagged = 0
    for step in range(len(made.stream)):
        train(made, step, step + 1)
        table = made.strategy.memory.table
        assert not bool((table.naive & (table.visits < 3))[:, :40].any())
        flagged += int(table.naive[:, :40].sum())
    assert flagged


@pytest.mark.parametrize(("levels", "low", "high"), [("replay", 0, 2), ("replay-soft", 0, 1), ("ssl", 1, 2)])
def test_each_row_gets_the_views_of_its_level(levels: str, low: int, high: int) -> None:
    made, twin, other = replaying(saa=levels), Rng([0], "strong views"), Rng([0], "second strong views")
    x, hard = photos(20, 8, 8, seed=4), whole(2, 1, 20, seed=5).bool()
    out = made.strategy.tricks.adaptive.at(x, hard)
    a = randaugment.strong(x, twin)
    views = [x, a]
    if high == 2:
        left = other.chance(0.5, 20)
        views.append(join_halves(a, randaugment.strong(x, other), left))
    for item in range(20):
        assert torch.equal(out[0, item], views[high if hard[0, item] else low][0, item])


def test_the_new_batch_keeps_its_plain_views_whatever_is_flagged() -> None:
    made = toy("saa", (0,), {"strategy": {**SMALL, "saa": "all"}, "augment": []})
    train(made, 0, 5)
    seen: list[Tensor] = []
    made.strategy.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    new = made.stream.batch(5)
    made.strategy.observe(new)
    assert len(seen) == 2
    assert torch.equal(seen[0], new["x"])


def test_the_control_arms_flag_none_all_as_many_or_the_others() -> None:
    made = {arm: replaying(saa=arm).strategy.tricks.adaptive for arm in ("none", "all", "random", "inverse", "replay")}
    slot, known_ = torch.arange(40)[None], whole(3, 1, 40, seed=1) > 0
    naive, history = whole(2, 1, 40, seed=2).bool(), torch.zeros(1, 40)
    assert not made["none"].hard(slot).any()
    assert made["all"].hard(slot).all()
    assert torch.equal(made["replay"].arm(naive, known_, history), naive & known_)
    assert torch.equal(made["inverse"].arm(naive, known_, history), ~naive & known_)
    chosen = [made["random"].arm(naive, known_, history) for _ in range(200)]
    assert all(int(one.sum()) == int((naive & known_).sum()) for one in chosen)
    assert not any(bool((one & ~known_).any()) for one in chosen)
    often = torch.stack(chosen).sum(0)[
        known_
    ]  # each known slot equally often; 4.5 standard errors, false alarm 1 in 5000
    rate = float((naive & known_).sum() / known_.sum())
    assert max(share_z(int(n), 200, rate) for n in often) < 4.5


def test_the_guard_keeps_what_is_not_learned_from_being_naive() -> None:
    made = replaying(max_naive_loss=1e-9)
    train(made, 0, len(made.stream))
    assert not made.strategy.memory.table.naive.any()


def test_losses_are_divided_by_the_log_of_the_classes_seen_if_asked_for() -> None:
    plain, divided = replaying(saa="none"), replaying(saa="none", normalise_by_log_classes=True)
    for made in (plain, divided):
        train(made, 0, 6)  # the classes 0 and 1
    one, two = (made.strategy.memory.table.history for made in (plain, divided))
    assert_close(two, one / math.log(2))


def test_only_easy_views_count_where_that_is_asked_for() -> None:
    made = replaying(saa="all", history_from="low")
    train(made, 0, 10)
    assert not made.strategy.memory.table.visits[:, :40].any()
    some = replaying(history_from="low")
    some.strategy.memory.table.naive.fill_(True)
    hard = some.strategy.tricks.adaptive.hard(torch.zeros(1, 20_000, dtype=torch.int64))
    assert share_z(int(hard.sum()), 20_000, 0.8) < 4.5  # false alarm: 7 in a million


def test_logs_tell_the_share_of_naive_slots_and_of_those_that_changed() -> None:
    made, before = replaying(), torch.zeros(40, dtype=torch.bool)
    for step in range(len(made.stream)):
        held = made.strategy.memory.table.naive[0, :40].clone()
        logs = made.strategy.observe(made.stream.batch(step))
        after = made.strategy.memory.table.naive[0, :40]
        assert all(bool(value.isfinite().all()) for value in logs.values())
        assert logs["saa_naive"].item() == pytest.approx(float(after.sum()) / len(made.strategy.memory))
        before, y = held, made.strategy.memory.row("y")[0, : len(made.strategy.memory)]
        for c in range(4):
            own = after[: len(y)][y == c]
            share = float(own.sum()) / max(len(own), 1)
            assert logs[f"saa_naive_class_{c}"].item() == pytest.approx(share)
    assert before.any()
    assert 0.5 < logs["saa_recalled_acc"].item() <= 1  # learned by then


def test_recalled_answers_are_counted_on_easy_views_alone_and_kept_where_there_are_none() -> None:
    tricks = replaying(seeds_=(0, 1)).strategy.tricks
    adaptive = tricks.adaptive
    hard = torch.tensor([[False, False, True, True], [True, True, True, True]])
    right = torch.tensor([[True, False, False, False], [True, True, True, True]])
    adaptive.right.copy_(torch.tensor([0.9, 0.7]))
    view = {"slot": torch.arange(4).repeat(2, 1), "hard": hard}
    tricks.judge_by(view, torch.ones(2, 4), right)
    assert adaptive.right.tolist() == [pytest.approx(0.5), pytest.approx(0.7)]


@given(n=integers(1, 9), classes=integers(1, 4), seed=seeds)
def test_scr_is_asked_by_the_mean_of_each_class_without_the_image_itself(n: int, classes: int, seed: int) -> None:
    z = torch.nn.functional.normalize(normal(2 * n, 5, seed=seed), dim=1)
    y = whole(classes, n, seed=seed + 1)
    expected = slow.nearest_mean(z[:n].tolist(), z[n:].tolist(), y.tolist(), classes)
    right, asked = nearest_mean(z, y.repeat(2), classes)
    assert asked.tolist() == [answer is not None for answer in expected]
    assert [bool(r) for r, a in zip(right, asked, strict=True) if a] == [a for a in expected if a is not None]


PLUGGED = ("er", "er_ace", "saa", "mir", "gss", "aser", "derpp", "dvc", "ocm", "pcr", "hpcr", "scr")
RECALL = {"scr": {"replay": 20, "width": 16, "lr": 0.03}, "ocm": {"replay": 10, "width": 16}, "dvc": {"candidates": 12}}
RECALL |= {"mir": {"candidates": 12}, "hpcr": {"lr": 0.01}, "pcr": {"lr": 0.01}}


def plugged(name: str, seeds_: tuple[int, ...] = (0,), **settings: Any) -> Toy:
    own = {**SMALL, "selection_period": 4, "warmup_steps": 12, **RECALL.get(name, {}), **settings}
    return toy(name, seeds_, {"strategy": own, "augment": ["flip"]})


@pytest.mark.parametrize("name", PLUGGED)
def test_any_replay_strategy_takes_the_plugin_and_is_itself_as_long_as_no_flag_is_set(name: str) -> None:
    """Bit by bit as without it until the first flag, and different afterwards."""
    plain, none, method = (plugged(name, saa=arm) for arm in ("off", "none", "replay"))
    flagged = False
    for step in range(len(plain.stream)):  # `ocm` recalls from the second task on only
        for made in (plain, none, method):
            train(made, step, step + 1)
        flagged |= bool(method.strategy.memory.table.naive[:, :40].any())
        assert alike(plain, none)
        assert flagged or alike(plain, method), f"step {step}"
        if flagged and not alike(plain, method):
            break
    assert flagged
    assert not alike(plain, method)
    history, visits = none.strategy.memory.table.history, none.strategy.memory.table.visits
    assert bool(((history > 0) == (visits > 0))[:, :40].all())


@pytest.mark.parametrize("check", [resumes_bit_for_bit, never_reads_the_host_once_steady, runs_do_not_touch_each_other])
@pytest.mark.parametrize("name", [name for name in PLUGGED if name not in ("saa", "er_ace")])
def test_a_strategy_with_the_plugin_keeps_its_promises(name: str, check: Callable[[Any], None]) -> None:
    check(lambda seeds_: plugged(name, tuple(seeds_)))


@pytest.mark.parametrize("name", [*PLUGGED, "fixmatch", "flexmatch"])
def test_from_the_second_experience_on_the_naive_share_of_each_is_told_and_so_it_is_after_a_resume(name: str) -> None:
    """By a dictionary from sample to the experience in which it came."""
    quick = {"warmup_steps": 4, "selection_period": 2, "min_visits": 1}
    make = partial(semi, name, saa=True, **quick) if name.endswith("match") else partial(plugged, name, **quick)
    made, first, experience, shares = make(), {}, 0, []
    for step in range(len(made.stream)):
        batch, memory = made.stream.batch(step), made.strategy.memory
        for number in batch["index"][0].tolist():
            first.setdefault(number, experience)
        if step == 30:
            again = make()
            again.strategy.load_state_dict(copy.deepcopy(made.strategy.state_dict()))
            made = again
        logs, memory = made.strategy.observe(batch), made.strategy.memory
        came = [first[number] for number in memory.row("index")[0, : len(memory)].tolist()]
        naive = memory.table.naive[0, : len(memory)].tolist()
        told = {key: value.item() for key, value in logs.items() if key.startswith("saa_naive_task_")}
        assert len(told) == (experience + 1 if experience else 0)
        for e in range(len(told)):
            own = [flag for flag, one in zip(naive, came, strict=True) if one == e]
            shares.append(sum(own) / max(1, len(own)))
            assert told[f"saa_naive_task_{e + 1}"] == pytest.approx(shares[-1])
        if made.stream.ends_task(step):
            made.strategy.boundary()
            experience += 1
    assert experience == 2
    assert len(set(shares)) > 2
    assert 0 <= logs["saa_recalled_acc"].item() <= 1


def test_strategies_that_do_not_learn_recalled_samples_by_views_refuse_the_plugin() -> None:
    takers = {name for name in registry.names("strategy") if has_setting("strategy", name, "saa_levels")}
    refusing = takers - set(PLUGGED)
    assert {"agem", "icarl", "next_item"} <= refusing
    for name in refusing:
        with pytest.raises(BadConfig, match=r"leave strategy\.saa out"):
            toy(name, (0,), {"strategy": {"saa": "replay"}})


def test_samples_without_pixels_and_settings_without_effect_are_refused() -> None:
    table_rows = {"stream": {"name": "synthetic", "channels": 2}, "strategy": SMALL}
    with pytest.raises(BadConfig, match="needs images of 1 or 3 channels"):
        toy("saa", (0,), table_rows)
    with pytest.raises(BadConfig, match="leave it out"):
        toy("saa", (0,), {"strategy": {"saa": "replay", "saa_levels": "ssl"}})
    with pytest.raises(BadConfig, match=r"leave strategy\.saa out"):
        toy("er", (0,), {"strategy": {"saa": "replay", "joint_pass": True}})


def test_the_public_functions_are_found_in_the_strategys_file() -> None:
    assert strategies.saa.otsu_threshold is otsu_threshold
    assert strategies.saa.update_flags is update_flags
    assert strategies.saa.update_history is update_history
    for file in (strategies.saa, strategies.flexmatch):
        assert (file.class_status, file.class_thresholds) == (class_status, class_thresholds)


# --- FixMatch and FlexMatch on a stream

SEMI = {"capacity": 40, "labelled": 10, "unlabelled": 20}
FEW = {"name": "few_labels", "of": "synthetic", "fraction": 0.2}
PICTURES = ("classes=4", "tasks=2", "per_class=100", "noise=0.1", "order=fixed")


def semi(name: str, seeds_: tuple[int, ...] = (0,), augment_: tuple[str, ...] = ("flip",), **settings: Any) -> Toy:
    parts = {"strategy": {"name": name, **SEMI, **settings}, "encoder": {"name": "mlp", "hidden": [32]}}
    stream = {**FEW, "settings": list(PICTURES)}
    config = from_dict(
        {**parts, "stream": stream, "augment": list(augment_), "seeds": list(seeds_), "stack": len(seeds_)}
    )
    made = session.build_stream(config, seeds_)
    return Toy(made, session.build_strategy(config, made, seeds_))


@given(n=integers(1, 9), classes=integers(1, 4), seed=seeds)
def test_the_labelled_loss_is_the_mean_over_known_labels(n: int, classes: int, seed: int) -> None:
    logits, y = normal(n, classes, seed=seed), whole(classes + 1, n, seed=seed) - 1
    loss = labelled_loss(logits, y, y >= 0)
    assert_close(loss, torch.tensor(slow.labelled(logits.tolist(), y.tolist()), dtype=F64))


def test_unknown_labels_get_no_gradient() -> None:
    logits = normal(5, 3, seed=0).requires_grad_()
    labelled_loss(logits, torch.tensor([-1, 2, -1, -1, 0]), torch.tensor([False, True, False, False, True])).backward()
    assert torch.equal(logits.grad.abs().sum(1) > 0, torch.tensor([False, True, False, False, True]))


@pytest.mark.parametrize("ramp", [True, False])
@given(decay=sampled_from([0.0, 0.5, 0.9, 1.0]), steps=integers(0, 8), seed=seeds)
def test_averaged_weights_equal_the_loop_and_buffers_are_the_newest(
    ramp: bool, decay: float, steps: int, seed: int
) -> None:
    net = Lift([torch.nn.BatchNorm1d(1).double()])
    values = normal(steps + 1, seed=seed).tolist()
    with torch.no_grad():
        net.net.weight.fill_(values[0])
        kept_ = Average(net, decay, ramp)
        for value in values[1:]:
            net.net.weight.fill_(value)
            net.net.running_mean.fill_(value)
            kept_.update(net)
    assert kept_.net.net.weight.item() == pytest.approx(slow.average(values, decay, ramp), abs=1e-12)
    assert kept_.net.net.running_mean.item() == (values[-1] if steps else 0)
    assert not any(parameter.requires_grad for parameter in kept_.parameters())


def test_weights_of_batch_norm_do_not_decay_and_all_others_do() -> None:
    net = Lift([Classifier(WideResNet(10, 1), 3)])
    decays, rest = without_decay_of_norms(net, 0.1)
    norms = [p for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d) for p in part.parameters()]
    assert {id(p) for p in rest["params"]} == {id(p) for p in norms}
    assert len(decays["params"]) + len(norms) == len(list(net.parameters()))
    assert (decays["weight_decay"], rest["weight_decay"]) == (0.1, 0)


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch"])
def test_a_semi_supervised_run_without_flags_is_the_base_learner_to_the_bit(name: str) -> None:
    plain, method = semi(name, (0, 1)), semi(name, (0, 1), saa=True, warmup_steps=20, selection_period=2, min_visits=1)
    for step in range(30):
        for made in (plain, method):
            train(made, step, step + 1)
        if step < 20:
            assert alike(plain, method), f"step {step}"
    assert method.strategy.memory.table.naive.any()
    assert not alike(plain, method)


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch"])
def test_a_trace_equals_the_method_written_out(name: str) -> None:
    """Loss of every step and the flags' inputs, by a twin's draws: lists for logits, loops for losses."""
    made, twin = semi(name, momentum=0.0, saa=True), semi(name, momentum=0.0, saa=True)
    strategy, pools, table = twin.strategy, twin.strategy.pools, twin.strategy.memory.table
    status, answered = [0.0] * 4, 0.0
    for step in range(12):
        new = made.stream.batch(step)
        filled = len(strategy.memory)
        known_, both, slot = pools.samples(pools.labels(new))
        weak, strong_ = pools.weak(both), pools.strong(both, slot)
        views = torch.cat([pools.weak(known_), weak, strong_], 1)[0]
        logits = made.strategy.net.net(views).tolist()
        n, u = known_["y"].shape[1], both["y"].shape[1]
        needed = [0.95] * 4
        if name == "flexmatch":
            status = slow.status(table.selected[0, :filled].tolist(), 4, status, True)
            needed = [0.95 * s / (2 - s) for s in status]
        unlabelled, each = slow.fixmatch(logits[n : n + u], logits[n + u :], needed)
        y = torch.where(known_["is_labelled"], known_["y"], -1)[0].tolist()  # an empty slot pads with class 0
        expected = slow.labelled(logits[:n], y) + unlabelled
        logs = made.strategy.observe(new)
        assert logs["loss"].item() == pytest.approx(expected, rel=1e-4, abs=1e-5), f"step {step}"
        labelled = [i for i in range(10, n) if y[i] >= 0]  # recalled
        if labelled:
            answered = sum(logits[i].index(max(logits[i])) == y[i] for i in labelled) / len(labelled)
        assert logs["saa_recalled_acc"].item() == pytest.approx(answered)
        before = (column[0].gather(0, slot[0]).tolist() for column in (table.history, table.visits))
        losses_ = [0.001 * h + 0.999 * c if v else c for h, v, c in zip(*before, each[10:], strict=True)]
        if filled < 30:  # no slot is filled anew in this step
            after = made.strategy.memory.table.history[0].gather(0, slot[0]).tolist()
            assert after == pytest.approx(losses_, rel=1e-3, abs=1e-4)
        strategy.load_state_dict(made.strategy.state_dict())
    assert 0 < answered <= 1


def test_recalled_labelled_rows_are_labelled_and_none_comes_twice() -> None:
    made = semi("fixmatch", (0, 1))
    train(made, 0, 20)
    known_, both, slot = made.strategy.pools.samples(made.stream.batch(20))
    held = made.strategy.memory.row("is_labelled")[:, :40].sum(1)
    assert known_["is_labelled"][:, 10:].sum(1).tolist() == held.clamp(max=10).tolist()
    assert bool((known_["y"][known_["is_labelled"]] >= 0).all())
    assert both["x"].shape[1] == 30
    assert all(len(set(row)) == 20 for row in slot.tolist())


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch"])
def test_few_labels_suffice_on_a_toy_stream(name: str) -> None:
    made = semi(name, (0, 1), augment_=(), answer="net")
    train(made, 0, len(made.stream))
    assert (evaluate(made.strategy, made.stream.holdout(), len(made.stream), True)[:, -1] >= 0.8).all()


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch"])
def test_one_label_in_twenty_suffices_for_digits_far_above_chance(name: str) -> None:
    """143 steps with the strategy's own views, which must leave 8 pixels legible: a shift by four of them gave 8 %."""
    views = registry.load("strategy", name).views
    config = from_dict(
        {
            "strategy": {"name": name, "unlabelled": 16},
            "stream": {"name": "few_labels", "of": "split-digits", "settings": ["tasks=1"]},
            "encoder": {"name": "mlp"},
            "augment": list(views[1:]),  # mirrored digits are others
        }
    )
    stream = session.build_stream(config, (0,))
    made = Toy(stream, session.build_strategy(config, stream, (0,)))
    train(made, 0, len(stream))
    assert evaluate(made.strategy, stream.holdout(), len(stream), True).mean() >= 0.4


def test_control_arms_of_a_semi_supervised_run_flag_others_and_need_the_method() -> None:
    quick = {"saa": True, "warmup_steps": 8, "selection_period": 4, "min_visits": 1}
    method, random, inverse = (semi("fixmatch", saa_arm=arm, **quick) for arm in ("method", "random", "inverse"))
    for made in (method, random, inverse):
        train(made, 0, 8)
    flags = [made.strategy.memory.table.naive[0, :40] for made in (method, random, inverse)]
    seen = method.strategy.memory.table.known()[0]
    assert torch.equal(flags[2][seen], ~flags[0][seen])
    assert int(flags[1].sum()) == int(flags[0].sum()) > 0
    assert not torch.equal(flags[1], flags[0])
    with pytest.raises(BadConfig, match=r"add --set strategy\.saa=true"):
        semi("fixmatch", saa_arm="random")


def test_average_and_newest_weights_both_answer() -> None:
    made = semi("fixmatch", answer="average")
    train(made, 0, 10)
    made.strategy.eval()
    x = made.stream.batch(10)
    averaged = made.strategy.predict(x)
    assert torch.equal(averaged, made.strategy.average(x["x"]))
    newest = semi("fixmatch", answer="net")
    newest.strategy.load_state_dict(made.strategy.state_dict())
    newest.strategy.eval()
    assert torch.equal(newest.strategy.predict(x), made.strategy.net(x["x"]))
    assert not torch.equal(newest.strategy.predict(x), averaged)


def test_a_floor_holds_every_class_threshold() -> None:
    made = semi("flexmatch", min_threshold=0.3)
    assert made.strategy.thresholds().tolist() == [[pytest.approx(0.3)] * 4]


# --- the schedule of the rate


def test_the_rate_follows_the_published_cosine() -> None:
    whole_ = 2**20
    expected = {0: 0.03, whole_ // 2: 0.0231903, whole_: 0.0058527}
    for step, rate in expected.items():
        assert cosine_decay(step, whole_, 0.03) == pytest.approx(rate, abs=1e-7)
        assert cosine_decay(torch.tensor(step), whole_, 0.03).item() == pytest.approx(rate, abs=1e-7)
    assert cosine_decay(3 * whole_, whole_, 0.03) == 0.0


@pytest.mark.parametrize("name", ["fixmatch", "flexmatch"])
def test_the_rate_of_a_run_falls_over_its_stream_and_goes_on_after_a_resume(name: str) -> None:
    made, again = semi(name, schedule="cosine"), semi(name, schedule="cosine")
    assert not made.strategy.steady
    train(made, 0, 20)
    again.strategy.load_state_dict(copy.deepcopy(made.strategy.state_dict()))
    for one in (made, again):
        train(one, 20, 22)
        for group in one.strategy.sgd.param_groups:
            assert group["lr"] == pytest.approx(0.03 * math.cos(7 * math.pi * 21 / (16 * 40)), rel=1e-12)
    assert not made.strategy.steady
    assert alike(made, again)
    assert semi(name).strategy.sgd.param_groups[0]["lr"] == 0.03


# --- the picture of naive samples and their views


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gallery_shows_naive_samples_and_others_and_changes_nothing(channels: int, tmp_path: Path) -> None:
    made = toy("saa", (0, 1), {"strategy": SMALL, "stream": {"channels": channels}, "augment": []})
    train(made, 0, len(made.stream))
    before = {key: value.clone() for key, value in made.strategy.state_dict().items() if isinstance(value, Tensor)}
    assert views.keep(made.strategy, tmp_path / views.FILE)
    assert all(torch.equal(value, made.strategy.state_dict()[key]) for key, value in before.items())
    kept = dict(np.load(tmp_path / views.FILE))
    flags, x = made.strategy.memory.table.naive[0, :40], made.strategy.memory.row("x")[0, :40]
    for name, which in (("naive", flags), ("other", ~flags)):
        assert kept[name].shape == (min(6, int(which.sum())), 3, channels, 8, 8)
        assert np.array_equal(kept[name][:, 0], x[which][:6].numpy())
        first, joined = kept[name][:, 1], kept[name][:, 2]
        left = (joined[..., 4:] == first[..., 4:]).all((1, 2, 3))
        upper = (joined[:, :, 4:] == first[:, :, 4:]).all((1, 2, 3))
        assert bool((left | upper).all())
    (picture,) = views.draw(tmp_path / views.FILE, tmp_path)
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height / 2


def test_a_strategy_without_adaptive_views_keeps_no_gallery(tmp_path: Path) -> None:
    assert not views.keep(toy("er", (0,)).strategy, tmp_path / views.FILE)
    assert not (tmp_path / views.FILE).exists()


def test_a_memory_without_naive_samples_is_drawn_too(tmp_path: Path) -> None:
    made = replaying(saa="none")
    train(made, 0, 3)
    views.keep(made.strategy, tmp_path / views.FILE)
    assert len(np.load(tmp_path / views.FILE)["naive"]) == 0
    assert views.draw(tmp_path / views.FILE, tmp_path)[0].exists()
