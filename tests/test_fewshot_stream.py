"""Passes over a pool of unlabelled images, and episodes of classes that never come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cl_sim import engine, fewshot_lists
from cl_sim.arrays import Arrays, DataSet
from cl_sim.errors import BadConfig, BadData, UnknownName
from cl_sim.fewshot_lists import NOVEL, Pool, pool
from cl_sim.metrics.fewshot import NAMES, Episodic, Task, draw, episode_accuracy
from cl_sim.testing import Toy, toy, train
from streams.fewshot import Fewshot, FewshotConfig

CPU = torch.device("cpu")
CLASSES, EACH = 12, 24  # six to learn from, six kept


def pictures(noise: float = 20.0) -> Pool:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(CLASSES), EACH)
    x = rng.uniform(0, 255, (CLASSES, 3, 8, 8))[y] + rng.normal(0, noise, (len(y), 3, 8, 8))
    rows = np.arange(len(y))
    kept = y >= CLASSES // 2
    return Pool(x.clip(0, 255).astype(np.uint8), y, rows[~kept], rows[:0], rows[kept], "made up")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Toy]:
    monkeypatch.setattr("streams.fewshot.pool", lambda name, folder, size: pictures())

    def make(seeds: tuple[int, ...] = (0,), strategy: dict[str, Any] | None = None, **own: Any) -> Toy:
        small = {"capacity": 100, "replay": 0, "clusters": 8, "hidden": 32, "width": 16, "lr": 0.05}
        offline = {"memory": "fifo", "assign": "batch_ot", "gamma": 0.0, "gate": False, "schedule": "cosine"}
        stream = {"name": "fewshot", "batch": 20, "episodes": 150, **own}
        settings = {"strategy": {**small, **offline, **(strategy or {})}, "stream": stream, "augment": ["jitter:1"]}
        return toy("beclr", seeds, settings)

    return make


def test_every_pass_shows_every_image_once_in_another_order(made: Callable[..., Toy]) -> None:
    stream = made((0, 1), passes=3, batch=36).stream
    assert (len(stream), stream.samples, stream.classes) == (12, 432, 6)
    passes = [torch.cat([stream.batch(4 * n + i)["index"] for i in range(4)], 1) for n in range(3)]
    for one in passes:
        assert torch.equal(one.sort(1).values, torch.arange(144).expand(2, -1))
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0][0], passes[0][1])
    assert torch.equal(stream.batch(5)["x"], stream.batch(5)["x"])
    assert set(stream.batch(0)) == {"x", "index"}


def test_the_number_of_an_image_stays_and_tells_the_stream_its_class(made: Callable[..., Toy]) -> None:
    stream = made(passes=2, batch=36).stream
    seen: dict[int, bytes] = {}
    source = pictures()
    for step in range(len(stream)):
        batch = stream.batch(step)
        labels = stream.labels_of(batch)[0]  # type: ignore[attr-defined]
        for number, image, label in zip(batch["index"][0].tolist(), batch["x"][0], labels.tolist(), strict=True):
            content = image.numpy().tobytes()
            assert seen.setdefault(number, content) == content
            row = next(i for i in source.train if source.x[i].tobytes() == content)
            assert source.y[row] == label


@pytest.mark.parametrize(("every", "ends"), [(0, [3 * 7 - 1]), (2, [13, 20]), (1, [6, 13, 20])])
def test_evaluations_come_after_whole_passes(made: Callable[..., Toy], every: int, ends: list[int]) -> None:
    stream = made(passes=3, measure_every=every).stream
    assert [step for step in range(len(stream)) if stream.ends_task(step)] == ends


def test_fewer_images_of_each_class(made: Callable[..., Toy]) -> None:
    stream = made(per_class=10, novel_per_class=21, batch=10).stream
    assert stream.describe()["images"] == 60
    chunks = list(stream.holdout().chunks(0, full=False))  # type: ignore[union-attr]
    y = torch.cat([chunk["y"] for chunk in chunks], 1)[0]
    assert y.bincount().tolist() == [0] * 6 + [21] * 6
    assert int(chunks[0]["episodes"][0, 0]) == 100


def test_the_metric_is_the_mean_over_the_same_episodes_for_every_run() -> None:
    y = torch.arange(10).repeat_interleave(25)
    features = torch.randn(2, 250, 6) + 2 * torch.nn.functional.one_hot(y % 6, 6)
    batch = {"y": y, "split": torch.zeros_like(y), "episodes": torch.full_like(y, 120)}
    metric = Episodic(2, 2)
    for part in (slice(0, 100), slice(100, 250)):
        metric.update(features[:, part], {name: value[part].expand(2, -1) for name, value in batch.items()})
    found = metric.result()
    assert set(found) == set(NAMES)
    episodes = draw(y.numpy(), Task(shots=5), 120, 42)
    for run in range(2):
        for name, shots, readout, transport in (
            ("shot1", 1, "nearest_mean", False),
            ("shot5", 5, "nearest_mean", False),
            ("shot5_opta", 5, "nearest_mean", True),
            ("shot1_logistic", 1, "logistic", False),
        ):
            each = episode_accuracy(features[run], episodes.with_shots(shots), readout, transport)  # type: ignore[arg-type]
            assert_close(found[name][run, 0], each.mean())
    assert bool(found["shot1"][:, 1].isnan().all())
    assert bool(metric.result()["shot1"].isnan().all())


def test_the_offline_profile_learns_features_for_new_classes(made: Callable[..., Toy]) -> None:
    one = made((0, 1), passes=6)
    train(one, 0, len(one.stream))
    memory: Any = one.strategy.memory
    assert memory.recent == 100
    assert memory.long == 0
    holdout = one.stream.holdout()
    assert holdout is not None
    found = engine.evaluate_all(one.strategy, holdout, len(one.stream), full=True)
    assert (found["shot1"] > 0.8).all()
    assert (found["shot5"] >= found["shot1"]).all()


def test_task_lists_are_disjoint_and_complete() -> None:
    sizes = {name: (len(val.split()), len(test.split())) for name, (_, val, test) in NOVEL.items()}
    assert sizes == {"cifar-fs": (16, 20), "fc100": (20, 20), "mini-imagenet": (16, 20), "omniglot": (0, 0)}
    for _, val, test in NOVEL.values():
        assert not set(val.split()) & set(test.split())
        assert len(set(val.split())) == len(val.split())


def named(names: tuple[str, ...]) -> Callable[..., DataSet]:
    y = np.arange(len(names))
    part = Arrays(np.zeros((len(names), 3, 2, 2), np.uint8), y)
    return lambda source, folder, size: DataSet(source, part, part, names, "x")


def test_a_pool_holds_both_parts_of_the_set_and_groups_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    _, val, test = NOVEL["cifar-fs"]
    names = tuple(sorted([*val.split(), *test.split(), "apple", "seal"]))
    monkeypatch.setattr(fewshot_lists, "load", named(names))
    found = pool("cifar-fs")
    for rows, wanted in (
        (found.train, {"apple", "seal"}),
        (found.val, set(val.split())),
        (found.test, set(test.split())),
    ):
        assert {names[c] for c in found.y[rows]} == wanted
        assert len(rows) == 2 * len(wanted)


def test_a_set_with_other_class_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewshot_lists, "load", named(("cat", "dog")))
    with pytest.raises(BadData, match=r"needs a class .*, but the set's classes are called cat, dog"):
        pool("fc100")


def test_mistakes_are_told() -> None:
    with pytest.raises(UnknownName, match="cifar-fs"):
        pool("cifar-f")
    with pytest.raises(BadConfig, match="no validation classes"):
        FewshotConfig(data="omniglot", novel="val")
    assert Fewshot.task == "fewshot"
