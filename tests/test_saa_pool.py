"""The offline setting: a fixed pool that comes again and again, against the pseudo-code of the method; its presets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references_saa as slow
import torch
from torch import Tensor

from cl_sim import checkpoint, preset, randaugment, report, session, store
from cl_sim.adaptive import class_thresholds
from cl_sim.augment import pipeline
from cl_sim.config import from_dict, merge
from cl_sim.consistency import fixed
from cl_sim.errors import BadConfig
from cl_sim.memory.numbered import Numbered
from cl_sim.optim import Average
from cl_sim.rng import Rng
from cl_sim.sources import data_folders
from cl_sim.testing import (
    CHECKS,
    Toy,
    learns_a_toy_stream,
    never_reads_the_host_once_steady,
    resumes_bit_for_bit,
    train,
)
from cl_sim.tracking import journal, views

SETTINGS = ("tasks=1", "samples_per_task=203", "batch=14")
QUICK = {"saa": True, "selection_period": 3, "warmup_steps": 6}


def pooled(
    name: str = "fixmatch",
    seeds: tuple[int, ...] = (0,),
    again: str = "draws=40",
    augment: tuple[str, ...] = (),
    **own: Any,
) -> Toy:
    parts = {
        "strategy": {"name": name, "pool": True, "labelled": 6, **own},
        "stream": {"name": "few_labels", "of": "split-digits", "settings": [*SETTINGS, again], "per_class": 3},
        "encoder": {"name": "mlp", "hidden": [16]},
    }
    config = from_dict({**parts, "augment": list(augment), "seeds": list(seeds), "stack": len(seeds)})
    stream = session.build_stream(config, seeds)
    return Toy(stream, session.build_strategy(config, stream, seeds))


@pytest.mark.parametrize("again", ["draws=40", "passes=3"])
@pytest.mark.parametrize("name", ["fixmatch", "flexmatch"])
def test_a_trace_of_a_pool_equals_the_pseudo_code(name: str, again: str) -> None:
    """Losses, histories, flags and curriculum of 40 steps, by a twin's draws: loops over lists, Otsu in exact fractions."""
    settings = {**QUICK, "momentum": 0.0, "history_decay": 0.25, "confidence": 0.3}
    made, twin = pooled(name, again=again, **settings), pooled(name, again=again, **settings)
    strategy, pools = twin.strategy, twin.strategy.pools
    table, size = made.strategy.memory.table, 1438
    h, e, selected, status = [0.0] * size, [False] * size, [-1] * size, [0.0] * 10
    moved = 0
    for step in range(40):
        new = made.stream.batch(step)
        index = new["index"][0].tolist()
        known, both, slot = pools.samples(new)
        assert both["index"][0].tolist() == slot[0].tolist() == index  # the stream's samples alone
        assert known["y"].shape == (1, 6)
        logits = made.strategy.net.net(
            torch.cat([pools.weak(known), pools.weak(both), pools.strong(both, slot)], 1)[0]
        ).tolist()
        needed = [0.3] * 10
        if name == "flexmatch":
            there = [s for s, present in zip(selected, made.stream.pool.present[0].tolist(), strict=True) if present]
            status = slow.status(there, 10, status, True)
            needed = class_thresholds(torch.tensor(status), 0.3).tolist()
        unlabelled, each = slow.fixmatch(logits[6:20], logits[20:], needed)
        for number, row in zip(index, logits[6:20], strict=True):
            shares = [math.exp(v) for v in slow.log_softmax(row)]
            selected[number] = shares.index(max(shares)) if max(shares) >= 0.3 else selected[number]
        logs = made.strategy.observe(new)
        expected = slow.labelled(logits[:6], known["y"][0].tolist()) + unlabelled
        assert logs["loss"].item() == pytest.approx(expected, rel=1e-4, abs=1e-5), f"step {step}"
        before = list(e)
        h, e = slow_step(made, h, e, step, index, each)
        moved += before != e
        assert table.history[0, :size].tolist() == pytest.approx(h, rel=1e-3, abs=1e-4)
        assert table.naive[0, :size].tolist() == e, f"step {step}"
        if name == "flexmatch":
            assert table.selected[0, :size].tolist() == selected
        strategy.load_state_dict(made.strategy.state_dict())
    assert moved >= 5
    visited = made.strategy.memory.table.visits[0, :size] > 0
    assert bool(table.naive[0, :size][~visited & made.stream.pool.present[0]].all())  # never seen: 0, the least of all
    assert not table.naive[0, :size][~made.stream.pool.present[0]].any()
    assert not table.naive[0, :size][visited].all()


def slow_step(
    made: Toy, h: list[float], e: list[bool], step: int, index: list[int], each: list[float]
) -> tuple[list[float], list[bool]]:
    """One step of the pseudo-code over the numbers that samples have."""
    there = made.stream.pool.present[0].nonzero()[:, 0].tolist()
    place = {number: at for at, number in enumerate(there)}
    own, marks = slow.pool_step(
        [h[i] for i in there],
        [e[i] for i in there],
        step,
        [place[i] for i in index],
        each,
        decay=0.25,
        epoch=3,
        first=1,
    )
    for number, value, mark in zip(there, own, marks, strict=True):
        h[number], e[number] = value, mark
    return h, e


def test_naive_samples_get_two_strong_views_joined_before_the_weak_ones_and_all_else_stays() -> None:
    made = pooled(augment=("flip", "shift:1"), **QUICK)
    pools, new = made.strategy.pools, made.stream.batch(0)
    slot = new["index"]
    pools.saa.table.naive.scatter_(1, slot[:, ::2], True)
    draw, other, rng = Rng([0], "strong views"), Rng([0], "second strong views"), Rng([0], "strategy")
    a = randaugment.strong(new["x"], draw)
    left = other.chance(0.5, 14)[0].tolist()
    b = randaugment.strong(new["x"], other)
    expected = a.clone()
    flags = pools.saa.table.naive.gather(1, slot)[0].tolist()
    for item in range(14):
        if flags[item]:
            expected[0, item, 0] = torch.tensor(slow.joined(a[0, item, 0].tolist(), b[0, item, 0].tolist(), left[item]))
    assert 7 <= sum(flags) < 14
    again = pipeline(("flip", "shift:1"), rng, made.stream.fields)
    assert torch.equal(pools.strong(new, slot), again({"x": expected})["x"])
    assert torch.equal(pools.weak(new), again(new)["x"])


def test_labelled_samples_are_drawn_evenly_with_replacement_from_the_first_step_on() -> None:
    """30 counts of 24,000 draws; one beyond 4.5 standard errors by chance in 1 of 5,000 tests."""
    made = pooled(seeds=(0, 1), labelled=12_000)
    memory, pool = made.strategy.memory, made.stream.pool
    known = [made.strategy.pools.samples(made.stream.batch(0))[0] for _ in range(2)]
    assert all(bool(one["is_labelled"].all()) for one in known)
    assert all(torch.equal(made.stream.pool.take(one["slot"])["y"], one["y"]) for one in known)
    for run in range(2):
        drawn = torch.cat([one["slot"][run] for one in known])
        assert sorted(set(drawn.tolist())) == sorted(pool.labelled[run].tolist())
        for number in pool.labelled[run].tolist():
            z = (int((drawn == number).sum()) - 800) / math.sqrt(24_000 / 30 * 29 / 30)
            assert abs(z) < 4.5
    assert not torch.equal(known[0]["slot"], known[1]["slot"])
    assert isinstance(memory, Numbered)
    assert np.bincount(memory.row("y")[0, :-1][memory.row("y")[0, :-1] >= 0]).tolist() == [3] * 10


def test_runs_may_have_unequally_many_labels() -> None:
    stream = {"name": "few_labels", "of": "split-digits", "settings": ["draws=9"], "fraction": 0.02}
    plan = {
        "strategy": {"name": "fixmatch", "pool": True, "labelled": 4000},
        "stream": stream,
        "encoder": {"name": "mlp"},
    }
    config = from_dict({**plan, "seeds": [0, 1], "stack": 2})
    made = session.build_stream(config, (0, 1))
    strategy = session.build_strategy(config, made, (0, 1))
    counts = (made.pool.labelled >= 0).sum(1).tolist()
    known = strategy.pools.samples(made.batch(0))[0]
    assert counts[0] != counts[1]
    assert [len(set(row)) for row in known["slot"].tolist()] == counts
    assert bool(known["is_labelled"].all())


def test_a_pool_selects_like_the_source_and_starts_with_a_head_without_bias() -> None:
    made = pooled(saa=True)
    saa = made.strategy.pools.saa
    assert (saa.period, saa.warm_up) == (256, 102_912)
    assert (saa.low, saa.high) == (1, 2)
    assert not made.strategy.net.net.head.bias.any()
    assert isinstance(made.strategy.average, Average)
    assert pooled(saa=True, selection_period=10).strategy.pools.saa.warm_up == 4020


PROMISES = [check for check in CHECKS if check is not learns_a_toy_stream]


@pytest.mark.parametrize("check", PROMISES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ["fixmatch", "flexmatch"])
def test_a_strategy_keeps_its_promises_in_a_pool(name: str, check: Callable[[Any], None]) -> None:
    check(lambda seeds: pooled(name, tuple(seeds), augment=("shift:1",), **QUICK))


def test_a_pool_with_the_sources_schedule_resumes_bit_for_bit_and_is_never_steady() -> None:
    resumes_bit_for_bit(lambda seeds: pooled("fixmatch", tuple(seeds), again="passes=3", schedule="cosine", **QUICK))
    assert not pooled(schedule="cosine").strategy.steady
    never_reads_the_host_once_steady(lambda seeds: pooled("fixmatch", tuple(seeds), schedule="cosine"))


def test_few_labels_suffice_for_digits_in_a_pool() -> None:
    made = pooled(again="draws=400", augment=("shift:1",), **QUICK)
    train(made, 0, 400)
    batches = [made.stream.batch(step) for step in range(15)]
    made.strategy.eval()
    right = [made.strategy.predict(b).argmax(-1) == made.stream.truth(step) for step, b in enumerate(batches)]
    assert torch.cat(right, 1).float().mean().item() > 0.4  # chance: 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"capacity": 40}, "capacity is 40, but has no effect with pool=true"),
        ({"unlabelled": 7}, "unlabelled is 7"),
        ({"min_visits": 1}, "min_visits is 1"),
        ({"again": "passes=1"}, "this stream shows every sample once, or hides no label; use few_labels"),
    ],
)
def test_settings_that_fit_no_pool_are_refused_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig) as caught:
        pooled(**settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stream_without_numbers_or_without_a_label_is_refused() -> None:
    env = pooled().strategy.env
    fields = {name: field for name, field in env.fields.items() if name != "index"}
    with pytest.raises(BadConfig, match=r"does not number its samples \(index\)"):
        fixed(dataclasses.replace(env, fields=fields, pool=None))
    stream = {"name": "few_labels", "of": "split-digits", "settings": ["draws=9"], "fraction": 0.0}
    plan = {"strategy": {"name": "fixmatch", "pool": True}, "stream": stream, "encoder": {"name": "mlp"}}
    config = from_dict(plan)
    with pytest.raises(BadConfig, match="a run has no labelled sample"):
        session.build_strategy(config, session.build_stream(config, (0,)), (0,))


def test_a_pool_is_no_memory_in_tables_and_costs_a_line_per_sample() -> None:
    settings = {"strategy": {"capacity": 1000, "pool": True}}
    assert [report.capacity({"config": merge(settings, more)}) for more in ({}, {"strategy": {"pool": False}})] == [
        0,
        1000,
    ]
    memory = pooled(saa=True).strategy.memory
    assert (memory.bytes_per_row, len(memory)) == (8 + 19, 1438)


def test_a_pool_has_a_gallery_of_its_samples(tmp_path: Path) -> None:
    made = pooled(**QUICK)
    train(made, 0, 12)
    assert views.keep(made.strategy, tmp_path / views.FILE)
    kept = dict(np.load(tmp_path / views.FILE))
    flags, present = made.strategy.memory.table.naive[0, :1438], made.stream.pool.present[0]
    for name, which in (("naive", flags & present), ("other", ~flags & present)):
        numbers = which.nonzero()[:6, 0]
        assert np.array_equal(kept[name][:, 0], made.stream.pool.take(numbers[None])["x"][0].numpy())


# --- the presets

ARMS = ("fixmatch", "saa-fixmatch", "random-fixmatch")
SHORT = {
    "stream": {"of": "split-digits", "settings": ["tasks=1", "batch=28", "draws=24", "subset=100"]},
    "encoder": {"depth": 10, "width": 1, "mean": [], "std": []},
    "evaluate": {"per_task": 3},
    "augment": ["shift:1"],
    "save_every": 8,
    "flush_every": 4,
}


def test_the_presets_have_the_published_constants() -> None:
    made = [from_dict(preset.read(f"{arm}-cifar10-40")) for arm in ARMS]
    plain, saa, random = (one.strategy.config for one in made)
    assert dataclasses.replace(saa, saa=False) == dataclasses.replace(random, saa=False, saa_arm="method") == plain
    assert all(dataclasses.replace(one, strategy=made[0].strategy) == made[0] for one in made)
    stream, encoder = made[0].stream.config, made[0].encoder.config
    assert dict(word.split("=") for word in stream.settings)["draws"] == str(2**20)
    assert dict(word.split("=") for word in stream.settings)["batch"] == str(64 * 7)
    assert (stream.of, stream.per_class) == ("split-cifar10", 4)
    assert (encoder.depth, encoder.width, encoder.momentum) == (28, 2, 0.001)
    assert encoder.mean == pytest.approx([125.3 / 255, 123.0 / 255, 113.9 / 255], abs=1e-6)
    assert encoder.std == pytest.approx([63.0 / 255, 62.1 / 255, 66.7 / 255], abs=1e-6)
    assert made[0].augment == ("flip", "shift:4")
    assert (plain.pool, plain.labelled, plain.lr, plain.momentum, plain.weight_decay) == (True, 64, 0.03, 0.9, 5e-4)
    assert (plain.confidence, plain.lambda_u, plain.average, plain.answer) == (0.95, 1.0, 0.999, "average")
    assert (plain.schedule, plain.history_decay) == ("cosine", 0.001)


def run(folder: Path, stop: Callable[[], bool] = lambda: False) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train a shortened preset with a small net in this folder, or go on; its journal and its last checkpoint."""
    if not (folder / "run.json").exists():
        own = {"selection_period": 2, "warmup_steps": 6}
        plan = merge(preset.read("saa-fixmatch-cifar10-40"), merge(SHORT, {"strategy": own}))
        (folder / "group-0").mkdir(parents=True)
        record = {"id": "short", "config": from_dict(plan).to_dict(), "groups": [[0]]}
        (folder / "run.json").write_text(json.dumps(record))
    session.train(folder, 0, stop)
    state, _ = checkpoint.latest(folder / "group-0", torch.device("cpu"), "short/group-0")
    assert state is not None
    return journal.read(folder / "group-0" / "journal.jsonl")[0], state["strategy"]


def test_a_shortened_preset_runs_stops_and_goes_on_to_the_same_end(tmp_path: Path) -> None:
    lines, state = run(tmp_path / "whole")
    asked = iter(range(100))
    run(tmp_path / "stopped", stop=lambda: next(asked) == 12)
    assert store.ending(tmp_path / "stopped" / "group-0")[0] == "interrupted"
    _, again = run(tmp_path / "stopped")
    tensors = [key for key, value in state.items() if isinstance(value, Tensor)]
    assert len(tensors) > 50
    assert all(torch.equal(state[key], again[key]) for key in tensors)
    curve = [line["values"] for line in lines if line["kind"] == "curve"]
    assert len(curve) == 6
    assert curve[0]["saa_naive"] == [0]
    assert 0 < curve[-1]["saa_naive"][0] < 1
    assert all(0 <= values["saa_recalled_acc"][0] <= 1 for values in curve)
    memory = [line for line in lines if line["kind"] == "memory"]
    assert memory[-1]["counts"] == [[4] * 10]
    assert len([line for line in lines if line["kind"] == "evaluation"]) == 4  # before the first step, 2 small, 1 full
    assert lines[-2]["kind"] == "summary"


CIFAR10 = next(
    (p for p in [*data_folders(""), Path(__file__).parents[2] / "shared" / "data"] if (p / "cifar10").is_dir()), None
)


@pytest.mark.skipif(CIFAR10 is None, reason="CIFAR-10 is not here")
def test_the_preset_builds_its_million_steps_of_cifar10() -> None:
    config = from_dict({**preset.read("saa-fixmatch-cifar10-40"), "data": str(CIFAR10)})
    stream = session.build_stream(config, (0,))
    assert (len(stream), stream.samples, stream.batch_size) == (2**20, 2**20 * 448, 448)
    assert bool(stream.pool.present.all())
    assert stream.pool.present.shape == (1, 50_000)
    assert torch.bincount(stream.pool.take(stream.pool.labelled)["y"][0]).tolist() == [4] * 10
    plan = session.plan_of(config, stream)
    assert len(plan.small) == 1047
    assert plan.evaluates(2**20 - 1)
    assert torch.equal(stream.batch(2**20 - 1)["index"].sort().values[:, :1] >= 0, torch.tensor([[True]]))
