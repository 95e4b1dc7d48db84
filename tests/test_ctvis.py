"""CTVIS: its encoders, its step, its settings, and what is measured of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import integers, sampled_from
from torch import Tensor
from torch.testing import assert_close

from cl_sim import annotations, encoders, engine, preset, session, testing
from cl_sim.clips import Roll, backgrounds, roll, visible
from cl_sim.config import from_dict
from cl_sim.encoders.instances import (
    CropConfig,
    Given,
    GivenConfig,
    RoiConfig,
    crop,
    crop_masks,
    enlarged,
)
from cl_sim.engine import evaluate_all
from cl_sim.errors import BadConfig
from cl_sim.losses import bank_contrast
from cl_sim.metrics.association import video_ap
from cl_sim.metrics.clips import Association, Tracked, claims
from cl_sim.optim import Adam
from cl_sim.sources import data_folders
from cl_sim.testing import NoHostReads, Toy, toy
from cl_sim.toy_clips import ToyClips, ToyClipsConfig
from cl_sim.tracker import TrackerConfig
from cl_sim.tracking import film
from cl_sim.tracking.journal import Journal
from cl_sim.tracking.mlflow import values_of
from cl_sim.types import Batch, Field
from strategies.ctvis import CTVIS, CTVISConfig, clip_items

CPU = torch.device("cpu")
seeds = integers(0, 10**6)
GAIN = 5.0  # of embeddings that know their instance
GATED = TrackerConfig(min_cosine=0.5)  # a new instance is not absorbed by a track that it does not resemble at all


def clips(runs: int = 1, **settings: int | float) -> ToyClips:
    return ToyClips(ToyClipsConfig(**settings), tuple(range(runs)), CPU)


def knowing(batch: Batch, width: int = 12) -> Tensor:
    """Embeddings of a net that knows who is who.    Shapes: -> [R, B, T, Q, width]."""
    return GAIN * torch.nn.functional.one_hot(batch["instance"] % width, width).float()


# encoders


@settings(max_examples=10)
@given(seed=seeds, size=integers(1, 7))
def test_crops_equal_roi_align_with_one_sample_per_cell(seed: int, size: int) -> None:
    ops = pytest.importorskip("torchvision.ops")
    maker = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, 9, 12, generator=maker, dtype=torch.float64)
    corner = torch.rand(2, 4, 2, generator=maker, dtype=torch.float64) * 12 - 3
    boxes = torch.cat([corner, corner + 0.5 + 8 * torch.rand(2, 4, 2, generator=maker, dtype=torch.float64)], -1)
    theirs = ops.roi_align(images, list(boxes), size, sampling_ratio=1, aligned=True).view(2, 4, 3, size, size)
    assert_close(crop(images, boxes, size), theirs, atol=1e-6, rtol=1e-6)


def test_gradients_reach_the_image_through_a_crop() -> None:
    images = torch.rand(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[[0.3, 0.2, 4.1, 4.9]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: crop(x, boxes, 3), (images,))


def test_a_mask_is_cropped_like_its_image() -> None:
    masks = torch.rand(2, 3, 8, 8) > 0.5
    boxes = torch.tensor([1.0, 2.0, 6.0, 7.0]).expand(2, 3, 4)
    found = crop_masks(masks, boxes, 4)
    for n in range(2):
        for q in range(3):
            assert_close(found[n, q], crop(masks[n, q][None, None].float(), boxes[n, q][None, None], 4)[0, 0])


def test_boxes_grow_around_their_centre() -> None:
    assert enlarged(torch.tensor([0.0, 10.0, 10.0, 30.0]), 0.1).tolist() == pytest.approx([-0.5, 9, 10.5, 31])


FIELDS = {
    "frames": Field((2, 3, 24, 24), torch.uint8),
    "boxes": Field((2, 4, 4), torch.float32),
    "features": Field((2, 4, 7), torch.float32),
}


@pytest.mark.parametrize(
    ("name", "cfg"),
    [
        ("crop", CropConfig(size=8, channels=(8, 16), hidden=(12,), width=5)),
        ("crop+mask", CropConfig(size=8, channels=(8,), hidden=(12,), width=5)),
        ("roi", RoiConfig(size=2, channels=(8, 16, 16), hidden=(12,), width=5)),
        ("roi", RoiConfig(size=2, channels=(8,), hidden=(12,), width=5)),
    ],
)
def test_encoders_look_at_their_own_box_and_frame_alone(name: str, cfg: CropConfig | RoiConfig) -> None:
    torch.manual_seed(0)
    net = encoders.make(name, cfg, FIELDS, 10)
    frames = torch.randint(256, (2, 3, 24, 24), dtype=torch.uint8)
    boxes = torch.tensor([[2.0, 2, 10, 10], [12, 12, 22, 22]]).expand(2, 2, 4)
    masks = torch.ones(2, 2, 24, 24, dtype=torch.bool)
    given_ = (frames, boxes, masks) if "masks" in net.takes else (frames, boxes)
    before = net(*given_)
    assert before.shape == (2, 2, 5)
    assert len(before.unique(dim=0)) == 2
    spoilt = frames.clone()
    spoilt[1] = 0
    after = net(spoilt, *given_[1:])
    assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    if name.startswith("crop"):
        spoilt = frames.clone()
        spoilt[:, :, :10, :10] = 0
        assert_close(net(spoilt, *given_[1:])[:, 1], before[:, 1])
    if "masks" in net.takes:
        assert not torch.allclose(net(frames, boxes, ~masks), before)


def test_given_embeddings_are_handed_on() -> None:
    net = encoders.make("given", GivenConfig(), FIELDS, 10)
    features = torch.rand(3, 4, 7)
    assert isinstance(net, Given)
    assert torch.equal(net(features), features)
    assert encoders.usual(FIELDS) == "given"
    with pytest.raises(BadConfig, match="brings no features"):
        encoders.make("given", GivenConfig(), {key: FIELDS[key] for key in ("frames", "boxes")}, 10)


def test_encoders_and_samples_must_fit() -> None:
    with pytest.raises(BadConfig, match=r"clips of instances; use --set encoder\.name=crop"):
        encoders.make("mlp", None, FIELDS, 10)
    with pytest.raises(BadConfig, match=r"no clips of instances; use --set encoder\.name=mlp"):
        encoders.make("crop", CropConfig(), {"x": Field((3, 8, 8), torch.uint8)}, 10)
    with pytest.raises(BadConfig, match="computes in float32"):
        encoders.make("crop", CropConfig(), FIELDS, 10, "bf16")
    with pytest.raises(BadConfig, match="multiple of 8"):
        CropConfig(channels=(4,))
    with pytest.raises(BadConfig, match="3 channels"):
        encoders.make("crop", CropConfig(mean=(0.5,), std=(0.5,)), FIELDS, 10)


def test_means_are_taken_off_and_a_frozen_encoder_does_not_learn() -> None:
    torch.manual_seed(0)
    plain = encoders.make("crop", CropConfig(size=8, channels=(8,)), FIELDS, 10)
    scaled = encoders.make("crop", CropConfig(size=8, channels=(8,), mean=(0.5,) * 3, std=(0.5,) * 3), FIELDS, 10)
    scaled.load_state_dict({**plain.state_dict(), "mean": scaled.mean, "std": scaled.std})
    frames, boxes = torch.rand(1, 3, 24, 24), torch.tensor([[[2.0, 2, 20, 20]]])
    assert_close(scaled(frames, boxes), plain((frames - 0.5) / 0.5, boxes))
    frozen = encoders.make("roi", RoiConfig(channels=(8,), frozen=True), FIELDS, 10)
    assert not any(p.requires_grad for p in frozen.parameters())


# the optimiser


def test_adamw_equals_torchs_and_reads_no_host() -> None:
    torch.manual_seed(0)
    mine = [torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    groups = [[{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:], "weight_decay": 0.0}] for p in (mine, theirs)]
    one, two = Adam(groups[0], 0.01, 0.1), torch.optim.AdamW(groups[1], 0.01)
    for step in range(5):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        with NoHostReads():
            one.step()
        two.step()
        if step == 2:
            again = Adam(groups[0], 0.5, 0.5)
            again.load_state_dict(one.state_dict())
            one = again
    for p, q in zip(mine, theirs, strict=True):
        assert_close(p, q)


# the step


def test_the_loss_of_a_step_is_that_of_its_items() -> None:
    exact = {"strategy": {"p_average": 1.0, "w_embed": 1.5, "w_cosine": 0.5}}
    made, twin = toy("ctvis", (0, 1), exact), toy("ctvis", (0, 1), exact)
    batch = made.stream.batch(0)
    emb = twin.strategy.predict(batch)
    logs = made.strategy.observe(batch)
    for run in range(2):
        parts = []
        for b in range(2):
            one = {key: value[run, b] for key, value in batch.items()}
            who = roll(one["instance"], visible(one), backgrounds(one))
            items = clip_items(emb[run, b], who.present, who.match, "bank+background", 1.0, rows=who.rows)
            parts.append(items)
        embed, cosine = bank_contrast(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        assert logs["loss"][run].item() == pytest.approx((1.5 * embed + 0.5 * cosine).item(), rel=1e-4)
        assert logs["items"][run] == sum(len(p.anchors) for p in parts) - sum(
            int((~(p.positive_mask.any(1) & p.negative_mask.any(1))).sum()) for p in parts
        )


@pytest.mark.parametrize("items", ["bank", "pair", "pairs", "adjacent", "multi"])
def test_every_kind_of_items_learns_to_tell_instances_apart(items: str) -> None:
    made = toy("ctvis", (0,), {"strategy": {"items": items, "lr": 0.003}, "stream": {"steps": 12}})
    first = made.strategy.observe(made.stream.batch(0))["loss"].item()
    for _ in range(12):
        last = made.strategy.observe(made.stream.batch(0))["loss"].item()
    assert last < first


def test_a_step_without_items_changes_nothing_but_the_counters() -> None:
    made = toy("ctvis", (0,), {"strategy": {"weight_decay": 0.0}})
    batch = made.stream.batch(0)
    nobody = {**batch, "instance": torch.full_like(batch["instance"], -1), "present": batch["present"] & False}
    before = [p.clone() for p in made.strategy.net.parameters()]
    logs = made.strategy.observe({**nobody, "boxes": torch.zeros_like(batch["boxes"])})
    assert logs["loss"].item() == 0
    assert logs["items"].item() == 0
    for old, new in zip(before, made.strategy.net.parameters(), strict=True):
        assert torch.equal(old, new)


def test_the_bank_of_a_step_does_not_outlive_it() -> None:
    """Two steps in a row: a graph that reached back into the first one would have been freed."""
    made = toy("ctvis", (0,), {"strategy": {"capacity": 4, "replay": 2}})
    for step in range(3):
        made.strategy.observe(made.stream.batch(step))
    kept = [value for value in made.strategy.state_dict().values() if isinstance(value, Tensor)]
    assert not any(value.requires_grad and not value.is_leaf for value in kept)


def test_noise_disturbs_the_bank_and_nothing_else() -> None:
    loud = {"strategy": {"noise_prob": 1.0, "noise_on": "any", "p_average": 0.0, "negatives": "frame"}}
    quiet = {"strategy": {"p_average": 0.0, "negatives": "frame"}}
    batch = toy("ctvis", (0,), quiet).stream.batch(0)
    plain, noisy = (toy("ctvis", (0,), one).strategy.observe(batch)["loss"] for one in (quiet, loud))
    assert_close(plain, noisy)  # neither the newest view nor the frame before comes from the bank
    loud["strategy"]["p_average"] = quiet["strategy"]["p_average"] = 1.0
    plain, noisy = (toy("ctvis", (0,), one).strategy.observe(batch)["loss"] for one in (quiet, loud))
    assert not torch.allclose(plain, noisy)


def test_more_instances_than_rows_are_counted_as_left_out() -> None:
    instance = torch.tensor([[0, 1], [2, 3], [1, 4]])
    shown = torch.ones(3, 2, dtype=torch.bool)
    who = roll(instance, shown, ~shown)
    assert isinstance(who, Roll)
    assert who.lost.item() == 3


def test_recalled_clips_are_learned_and_rebuilt_where_that_is_possible() -> None:
    replaying = {"strategy": {"capacity": 4, "replay": 2}}
    whole = toy("ctvis", (0, 1), replaying)
    testing.train(whole, 0, 4)
    slim = toy("ctvis", (0, 1), replaying)
    env = slim.strategy.env
    made = {}

    def rebuild(numbers: Tensor) -> Batch:
        found = [[made[run, int(n)] for n in row] for run, row in enumerate(numbers)]
        keys = found[0][0].keys()
        return {key: torch.stack([torch.stack([one[key] for one in row]) for row in found]) for key in keys}

    env.rebuild, env.lifted = rebuild, 0
    env.rng.counter.zero_()
    strategy = CTVIS(CTVISConfig(capacity=4, replay=2), env)
    for step in range(4):
        batch = slim.stream.batch(step)
        made |= {
            (r, int(n)): {k: v[r, b] for k, v in batch.items()}
            for r in range(2)
            for b, n in enumerate(batch["clip"][r])
        }
        strategy.observe(batch)
    assert strategy.memory is not None
    assert strategy.memory.bytes_per_row == 8
    assert sprites().strategy.memory.bytes_per_row == 8
    for one, two in zip(whole.strategy.net.parameters(), strategy.net.parameters(), strict=True):
        assert torch.equal(one, two)


def sprites(**settings_: int | float | str) -> Toy:
    """CTVIS on the sprite stream, the smallest there is."""
    small = {
        "name": "sprites",
        "clips": 8,
        "frames": 4,
        "instances": 3,
        "canvas": 40,
        "test_clips": 2,
        "test_frames": 6,
    }
    plan = {
        "strategy": {"name": "ctvis", "capacity": 4, "replay": 2, **settings_},
        "stream": {**small, "batch": 2},
        "encoder": {"name": "crop", "size": 8, "channels": [8], "hidden": [8], "width": 8},
        "seeds": [0, 1],
    }
    config = from_dict(plan)
    stream = session.build_stream(config, config.seeds)
    return Toy(stream, session.build_strategy(config, stream, config.seeds))


@pytest.mark.parametrize("items", ["bank", "pairs"])
def test_sprites_are_learned_recalled_and_measured(items: str) -> None:
    made = sprites(items=items, w_class=0.5)
    testing.train(made, 0, len(made.stream))
    holdout = made.stream.holdout()
    assert holdout is not None
    found = evaluate_all(made.strategy, holdout, len(made.stream), full=True)
    assert (found["deta"] == 1).all()
    assert ((found["assa"] > 0) & (found["assa"] <= 1)).all()
    assert found["class_accuracy"].shape == (2, 1)


def test_settings_without_effect_are_refused() -> None:
    for given_, words in (
        ({"items": "pairs", "negatives": "frame"}, "negatives has no effect with items=pairs"),
        ({"items": "pair", "noise_prob": 0.1}, "noise_prob has no effect with items=pair"),
        ({"noise_on": "any"}, "noise_on has no effect with noise_prob=0"),
        ({"negatives": "bank", "max_background": 3}, "max_background has no effect with negatives=bank"),
        ({"capacity": 5}, "set both or none"),
        ({"p_average": 1.5}, "between 0 and 1"),
        ({"threshold": -0.1}, "between 0 and 1"),
    ):
        with pytest.raises(BadConfig, match=words):
            CTVISConfig(**given_)


# what is measured


def test_embeddings_that_know_their_instance_associate_without_a_fault() -> None:
    metric, stream = Association(1, 2, CPU, GATED), clips(frames=12)
    for chunk in stream.chunks(0, True):
        metric.update(knowing(chunk), chunk)
    found = metric.result()
    for name in ("assa", "hota", "deta", "idf1", "association", "reid"):
        assert found[name].tolist() == [[1.0, 1.0]], name
    assert found["idsw_per_100"].tolist() == [[0.0, 0.0]]
    assert (found["recovery"] > 0.5).all()
    assert math.isnan(found["reid_over_20"][0, 0])
    assert math.isnan(metric.result()["assa"][0, 0]), "a result starts afresh"


def test_beyond_the_age_of_death_nobody_is_recognised() -> None:
    stream = clips(frames=30, instances=2, hidden=0.0, test_clips=2)
    chunk = next(iter(stream.chunks(0, True)))
    gone = torch.zeros(30, dtype=torch.bool)
    gone[4:27] = True  # 23 frames
    one = (chunk["instance"] == 0) & gone[:, None]
    chunk["present"] = chunk["present"] & ~one
    chunk["instance"] = chunk["instance"].masked_fill(one, -1)
    metric = Association(1, 1, CPU)
    metric.update(knowing(chunk), {**chunk, "split": chunk["split"] * 0})
    found = metric.result()
    assert found["reid_over_20"].item() == 0
    assert found["idf1"].item() < 1


def test_embeddings_that_are_all_equal_associate_by_chance() -> None:
    metric, stream = Association(1, 2, CPU), clips(test_clips=20)
    for chunk in stream.chunks(0, True):
        metric.update(torch.ones_like(knowing(chunk)), chunk)
    assert (metric.result()["assa"] < 0.5).all()


def test_runs_and_splits_are_measured_apart() -> None:
    metric, stream = Association(2, 2, CPU, GATED), clips(runs=2)
    for chunk in stream.chunks(0, False):
        emb = knowing(chunk)
        emb[1] = 1.0
        metric.update(emb, chunk)
    found = metric.result()["assa"]
    assert (found[0] == 1).all()
    assert (found[1] < 1).all()


def test_missed_and_false_candidates_are_measured_against_the_true_instances() -> None:
    stream = clips(frames=6, hidden=0.0)
    chunk = next(iter(stream.chunks(0, True)))
    keep = slice(0, stream.cfg.instances)
    known = {"true_masks": chunk["masks"][..., keep, :, :], "true_instance": chunk["instance"][..., keep]}
    missed = torch.zeros_like(chunk["present"])
    missed[..., 3, 0] = True
    false = torch.zeros_like(missed)
    false[..., 2, -1] = True  # a box of background is taken for an instance
    broken = {
        **chunk,
        **known,
        "present": (chunk["present"] & ~missed) | false,
        "instance": chunk["instance"].masked_fill(missed, -1),
    }
    metric = Association(1, 1, CPU)
    emb = knowing(chunk)
    metric.update(emb, {**broken, "split": chunk["split"] * 0})
    found = metric.result()
    assert found["deta"].item() == pytest.approx(17 / 19, abs=0.02)  # 18 true, of which 1 missed, and 1 false


def test_class_scores_name_the_tracks() -> None:
    stream = clips(test_clips=3)
    chunk = next(iter(stream.chunks(0, True)))
    emb = knowing(chunk)
    right = 4 * torch.nn.functional.one_hot(chunk["label"].clamp(min=0), 4).float()
    metric = Association(1, 1, CPU, dim=emb.shape[-1])
    for scores, expected in ((right, 1.0), (right.roll(2, -1), 0.0)):
        metric.update(torch.cat([emb, scores], -1), {**chunk, "split": chunk["split"] * 0})
        found = metric.result()
        assert found["class_accuracy"].item() == expected
        assert found["video_ap"].item() == pytest.approx(expected)


def test_the_strategy_is_measured_with_its_own_tracker() -> None:
    made = toy("ctvis", (0,), {"strategy": {"threshold": 0.99}})
    holdout = made.stream.holdout()
    assert holdout is not None
    strict = evaluate_all(made.strategy, holdout, 0, full=False)
    usual = evaluate_all(toy("ctvis", (0,)).strategy, holdout, 0, full=False)
    assert strict["idf1"].max() < usual["idf1"].min()


def test_before_a_batch_is_learned_its_associations_are_counted() -> None:
    made = toy("ctvis", (0, 1))
    batch = made.stream.batch(0)
    found = made.strategy.measure().test(made.strategy.predict(batch), batch)
    seen = batch["instance"].numpy()
    could = [
        sum(len(set(clip[t][clip[t] >= 0]) & set(clip[:t].flatten())) for clip in run for t in range(1, clip.shape[0]))
        for run in seen
    ]
    assert found["tested"].tolist() == could
    assert (found["association"] <= found["tested"]).all()


@pytest.mark.parametrize("readout", ["similarity", "last", "momentum", "temporal"])
def test_every_readout_tracks_what_knows_itself(readout: str) -> None:
    made = toy("ctvis", (0,), {"strategy": {"readout": readout, "min_cosine": 0.5}})
    holdout = made.stream.holdout()
    assert holdout is not None
    chunk = next(iter(holdout.chunks(0, True)))
    metric = made.strategy.measure().metric(1, 2, CPU)
    assert isinstance(metric, Association)
    metric.dim = 12
    metric.update(knowing(chunk), chunk)
    assert metric.result()["assa"][0, 0] == 1


@given(seed=seeds, kind=sampled_from(["frames", "masks"]))
def test_toy_clips_are_the_same_whenever_they_are_asked_for(seed: int, kind: str) -> None:
    one, two = (ToyClips(ToyClipsConfig(steps=2), (seed,), CPU) for _ in range(2))
    assert torch.equal(one.batch(1)[kind], two.batch(1)[kind])
    assert not torch.equal(one.batch(1)["frames"], one.batch(0)["frames"])
    assert np.array_equal(one.seen(0), [[True, False]])


class Featured(ToyClips):
    """Clips that bring features of their boxes, and neither frames nor masks."""

    def __init__(self, cfg: ToyClipsConfig, seeds_: tuple[int, ...], device: torch.device) -> None:
        super().__init__(cfg, seeds_, device)
        self.all_fields = dict(self.fields)
        rows = self.fields["instance"].shape
        left = {key: field for key, field in self.fields.items() if key not in ("frames", "masks")}
        self.fields = {**left, "features": Field((*rows, 12), torch.float32)}

    def _stacked(self, runs: list[list[dict[str, Any]]]) -> Batch:
        kept, self.fields = self.fields, self.all_fields
        batch = super()._stacked(runs)
        self.fields = kept
        return {**{key: batch[key] for key in kept if key != "features"}, "features": knowing(batch)}


def test_given_features_are_tracked_without_frames_or_masks() -> None:
    stream = Featured(ToyClipsConfig(), (0, 1), CPU)
    plan = {
        "strategy": {"name": "ctvis", "min_cosine": 0.5},
        "stream": {"name": "synthetic"},
        "encoder": {"name": "given"},
    }
    config = from_dict({**plan, "seeds": [0, 1]})
    strategy = session.build_strategy(config, stream, config.seeds)
    logs = strategy.observe(stream.batch(0))
    assert logs["embed"].max() < 0.1, "they know their instance already"
    found = evaluate_all(strategy, stream.holdout(), 1, full=True)["assa"]
    assert (found > 0.98).all()  # less than 1 where two boxes overlap by more than 0.6: one is suppressed


# pictures


def test_a_tracked_clip_is_kept_and_drawn(tmp_path: Path) -> None:
    made = toy("ctvis", (0, 1), {"strategy": {"w_class": 0.1}})
    film.keep(made.strategy, made.stream, tmp_path / film.FILE)
    with np.load(tmp_path / film.FILE) as kept:
        assert kept["emb"].shape == (5, 5, 16)
        assert kept["track"].shape == kept["instance"].shape == (5, 5)
        assert ((kept["track"] >= 0) == (kept["instance"] >= 0)).all()
    drawn = film.draw(tmp_path / film.FILE, tmp_path)
    assert [path.name for path in drawn] == ["clip.gif", "filmstrip.png", "similarity.png"]
    from PIL import Image

    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 5
        assert gif.size[1] == 2 * gif.size[0]  # the frame above its coloured twin


DAVIS = next(
    (p for p in [*data_folders(""), Path(__file__).parents[2] / "shared" / "data"] if (p / "davis_vis").is_dir()), None
)


@pytest.mark.skipif(DAVIS is None, reason="the excerpt of DAVIS is not here")
def test_the_excerpt_of_davis_is_tracked_scored_exported_and_read_back(tmp_path: Path) -> None:
    plan = {
        "strategy": {"name": "ctvis", "w_class": 1.0},
        "stream": {"name": "video", "height": 60, "width": 107, "frames": 4, "per_video": 1},
        "encoder": {"name": "crop", "size": 8, "channels": [8], "hidden": [8], "width": 8},
        "data": str(DAVIS),
    }
    config = from_dict(plan)
    stream: Any = session.build_stream(config, config.seeds)
    strategy = session.build_strategy(config, stream, config.seeds)
    testing.train(Toy(stream, strategy), 0, 3)
    assert isinstance(strategy, CTVIS)
    results, scored = [], []
    truth = annotations.read(DAVIS / "davis_vis" / "instances_valid.json")
    for number, video in enumerate(stream.test_videos):
        batch = stream.test_batch(number)
        with torch.no_grad():
            output = strategy.predict(batch)
        made = Tracked(output, batch, strategy.cfg, strategy.dim)
        found = claims(
            made.ids[0, 0].numpy(), batch["masks"][0, 0].numpy(), output[0, 0, ..., strategy.dim :].double().numpy()
        )
        for one in found:
            masks = [
                None if mask is None else stream.original(torch.from_numpy(mask), video)
                for mask in one["segmentations"]
            ]
            results.append(annotations.Result(video.id, one["category_id"], one["score"], tuple(masks)))
            scored.append(tube(results[-1]))
    again = annotations.read_results(annotations.write_results(tmp_path / "results.zip", results, truth), truth)
    assert len(again) == len(results) >= 17
    right = [tube(one) for one in annotations.true_results(truth)]
    assert video_ap(right, scored)["ap"] == pytest.approx(video_ap(right, [tube(one) for one in again])["ap"])
    best = [{**one, "category_id": 0} for one in right], [{**tube(one), "category_id": 0} for one in again]
    assert video_ap(*best)["ap50"] > 0.9  # given boxes, one instance each: only the small masks and the order cost


def tube(one: annotations.Result) -> dict[str, Any]:
    """A result as `video_ap` takes it."""
    return {"video_id": one.video_id, "category_id": one.label, "score": one.score, "segmentations": one.masks}


def test_the_same_seed_gives_the_same_clips_and_losses() -> None:
    losses = []
    for _ in range(2):
        made = sprites(noise_prob=0.3)
        losses.append([made.strategy.observe(made.stream.batch(step))["loss"] for step in range(3)])
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert not torch.equal(losses[0][2][0], losses[0][2][1]), "another seed gives others"


# records


def test_every_metric_of_an_evaluation_is_logged_as_the_mean_over_seen_splits() -> None:
    line = {
        "kind": "evaluation",
        "samples": 8,
        "time": 0,
        "task_end": True,
        "measure": "assa",
        "accuracy": [[0.5, 0.1], [0.7, None]],
        "seen": [[True, True], [True, False]],
        "idf1": [[0.4, 0.2], [0.6, None]],
        "reid_over_20": [[None, None], [None, None]],
    }
    found = values_of(line)
    assert found.keys() == {"assa_seen", "idf1_seen"}
    assert found["idf1_seen"] == pytest.approx([0.3, 0.6])


def test_a_finished_run_on_sprites_sums_up_its_association_and_draws_a_clip(tmp_path: Path) -> None:
    made = sprites(w_class=0.5)
    plan = session.Plan.of(made.stream, per_task=1, prequential=1, flush_every=2, save_every=10)
    place = session.Place(tmp_path, "test")
    with Journal(tmp_path / "journal.jsonl") as journal:
        progress = engine.drain(engine.steps(made.stream, made.strategy, plan, journal, place))
    assert progress is not None
    values = session.summarise(tmp_path, made.strategy, made.stream, progress)
    for name in (
        "assa_end",
        "idf1_end",
        "idsw_per_100_end",
        "reid_end",
        "association_prequential",
        "class_accuracy_end",
    ):
        assert len(values[name]) == 2, name
    assert 0 < values["assa_end"][0] <= 1
    assert math.isnan(values["reid_over_20_end"][0])  # clips of 6 frames have no such gap


def test_the_arms_of_the_sprites_differ_in_one_thing_each() -> None:
    bank = preset.read("ctvis-bank-sprites")
    for arm, change in (("pair", {"items": "pair"}), ("pairs", {"items": "pairs"}), ("noise", {"noise_prob": 0.05})):
        other = preset.read(f"ctvis-{arm}-sprites")
        assert other == {**bank, "strategy": {**bank["strategy"], **change}}
        assert preset.filed(f"ctvis-{arm}-sprites") == ("sprites", f"ctvis-{arm}")
