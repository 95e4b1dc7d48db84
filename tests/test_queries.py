"""The encoder `query`: someone's net that proposes instances, matched in training and tracked in evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import references_tracks as references
import torch
from hypothesis import given
from hypothesis.strategies import integers
from torch import Tensor, nn
from torch.testing import assert_close

from cl_sim import testing
from cl_sim.clips import backgrounds, roll, visible
from cl_sim.encoders.queries import Query, QueryConfig, Reader, assigned, assignment_cost, resized
from cl_sim.errors import BadConfig
from cl_sim.runs import per_run
from cl_sim.testing import toy
from cl_sim.tracking import film
from cl_sim.types import Batch
from strategies.ctvis import CTVIS

F64 = torch.float64
SHADE = 60  # brightness of instance 0; instance i is i + 1 times as bright


class Shades(nn.Module):
    """Query q shows what is of the brightness of instance 2 - q; the last query shows nothing."""

    dim, size = 6, (28, 28)

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 6))
        self.classes = classes

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shade = SHADE / 255 * torch.tensor([3.0, 2.0, 1.0, 9.0]).view(1, 4, 1, 1)
        near = nn.functional.adaptive_avg_pool2d(frames, self.size)
        masks = 40 * (0.1 - (near - shade).abs())  # [N, 4, 28, 28]
        nothing = (masks.flatten(2).amax(2) <= 0)[..., None]
        kinds = torch.arange(self.classes + 1)
        scores = 9.0 * torch.where(nothing, kinds == self.classes, kinds == 0)
        return scores, masks, self.table.expand(len(frames), -1, -1)


def shades(channels: int, classes: int) -> nn.Module:
    return Shades(classes)


def unfinished(channels: int, classes: int) -> nn.Module:
    return nn.Identity()


def painted(batch: Batch) -> Batch:
    """The clips with every instance in its own shade, and no two in each other's way."""
    level = torch.where(batch["masks"], SHADE * (batch["instance"].clamp(min=-1) + 1)[..., None, None], 0).amax(-3)
    label = batch["label"].clamp(max=0)  # one class
    return {**batch, "frames": level[..., None, :, :].to(torch.uint8), "label": label}


QUERY = {"encoder": {"name": "query", "factory": "test_queries:shades"}}


def querying(runs: int = 1, **settings: float | str) -> testing.Toy:
    return toy("ctvis", tuple(range(runs)), {"strategy": settings, **QUERY})


@given(q=integers(1, 4), g=integers(1, 3), seed=integers(0, 10**6))
def test_the_cost_of_an_assignment_equals_the_loops(q: int, g: int, seed: int) -> None:
    maker = torch.Generator().manual_seed(seed)
    scores, masks = torch.randn(q, 4, dtype=F64, generator=maker), torch.randn(q, 2, 3, dtype=F64, generator=maker)
    labels, true = torch.randint(-1, 3, (g,), generator=maker), torch.rand(g, 2, 3, dtype=F64, generator=maker)
    slow = references.assignment_cost(
        scores.tolist(), masks.flatten(1).tolist(), labels.tolist(), true.flatten(1).tolist()
    )
    assert_close(assignment_cost(scores, masks, labels, true), torch.tensor(slow, dtype=F64))


def test_only_visible_instances_are_assigned_and_each_to_a_query_of_its_own() -> None:
    cost = np.array([[0.0, 5, 1], [0, 1, 9]])
    assert assigned(cost, np.array([True, True, False])).tolist() == [0, 1, -1]
    assert assigned(cost, np.array([True, False, True])).tolist() == [1, -1, 0]
    assert assigned(cost, np.array([False] * 3)).tolist() == [-1, -1, -1]
    assert sorted(assigned(cost, np.array([True] * 3)).tolist()) == [-1, 0, 1]


def test_masks_are_reduced_to_the_share_that_they_cover() -> None:
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[1, :2, :3] = True
    assert resized(masks, (2, 2)).tolist() == [[[0, 0], [0, 0]], [[1, 0.5], [0, 0]]]


def test_the_roll_finds_the_query_of_every_instance() -> None:
    made = querying()
    batch = painted(made.stream.batch(0))
    net = made.strategy.net.net.encoder
    assert isinstance(net, Query)
    output = made.strategy.predict(batch)
    who = per_run(torch.func.vmap(roll))(batch["instance"], visible(batch), backgrounds(batch))
    found = Reader(net).roll(output, batch, who)
    for g in range(3):
        for b, t in np.ndindex(2, 5):
            if who.present[0, b, g, t]:
                number = batch["instance"][0, b, t, who.match[0, b, g, t]]
                assert found.match[0, b, g, t] == 2 - number
    assert found.present.sum() == who.present.sum()
    assert found.background[..., 3].all()


def test_queries_are_learned_and_tracked_to_the_true_instances() -> None:
    made = querying(2, lr=0.05, min_cosine=0.5)
    assert not made.strategy.steady
    losses = [made.strategy.observe(painted(made.stream.batch(step)))["loss"] for step in range(25)]
    assert (losses[-1] < losses[0]).all()
    metric = made.strategy.measure().metric(2, 2, torch.device("cpu"))
    holdout = made.stream.holdout()
    assert holdout is not None
    made.strategy.eval()
    with torch.inference_mode():
        for chunk in holdout.chunks(0, True):
            clean = painted(chunk)
            metric.update(made.strategy.predict(clean), clean)
    found = metric.result()
    assert (found["assa"] > 0.95).all()
    assert (found["deta"] > 0.95).all()
    assert (found["class_accuracy"] == 1).all()
    assert (found["video_ap"] > 0.9).all()
    assert found["recovery"].nan_to_num(0).sum() > 0
    before = made.strategy.measure().test(made.strategy.predict(clean), clean)
    assert (before["tested"] > 0).all()


def test_the_net_of_a_run_is_its_own() -> None:
    alone, stacked = querying(), querying(3)
    batch = painted(alone.stream.batch(0))
    many = {key: value.expand(3, *value.shape[1:]) for key, value in batch.items()}
    assert_close(alone.strategy.predict(batch)[0], stacked.strategy.predict(many)[0])


def test_a_film_shows_what_queries_propose(tmp_path: Path) -> None:
    made = querying()
    film.keep(made.strategy, made.stream, tmp_path / film.FILE)
    with np.load(tmp_path / film.FILE) as kept:
        assert kept["masks"].shape == (5, 4, 28, 28)
        assert kept["track"].shape == (5, 4)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("", "it must be MODULE:FUNCTION"),
        ("nowhere_at_all:make", "No module named"),
        ("test_queries:missing", "has no attribute 'missing'"),
        ("test_queries:unfinished", "has no 'dim'"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused(factory: str, words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        toy("ctvis", (0,), {"encoder": {"name": "query", "factory": factory}})


def test_settings_that_queries_ignore_are_refused() -> None:
    with pytest.raises(BadConfig, match="w_class has no effect"):
        querying(w_class=0.5)
    with pytest.raises(BadConfig, match=r"encoder\.mean has no effect"):
        QueryConfig(mean=(0.5,), std=(0.5,))
    assert isinstance(querying().strategy, CTVIS)
