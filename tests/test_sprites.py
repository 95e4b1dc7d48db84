"""Sprite clips: exact masks, who is in front, what a seed decides, and what a detector gets wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references_video as slow
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cl_sim import boxes, session, sprites, timeline
from cl_sim.cli import main
from cl_sim.config import from_dict
from cl_sim.errors import BadConfig
from cl_sim.rng import Rng
from cl_sim.testing import NoHostReads
from cl_sim.tracking import strips
from streams.sprites import Sprites, SpritesConfig

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "clips": 12, "batch": 2, "frames": 4, "instances": 3, "background": 2, "canvas": 40, "sprite": 12,
    "test_clips": 3, "test_frames": 5, "subset": 1,
}  # fmt: skip


def make(seeds: tuple[int, ...] = (0,), iid: bool = False, **settings: Any) -> Sprites:
    return Sprites(SpritesConfig(**{**SMALL, **settings}), seeds, CPU, iid=iid)


def deviations(found: Tensor, rate: float) -> float:
    """How far a share is from its rate, in standard deviations of independent trials."""
    return (float(found.float().mean()) - rate) / math.sqrt(rate * (1 - rate) / found.numel())


def errors(seen: boxes.Candidates, instances: int) -> tuple[Tensor, ...]:
    """Which instances are missed, which are doubled, and which false boxes there are."""
    return (~seen.present[:, :, :instances], *seen.present[:, :, instances:].split(instances, 2))


def random_sheet(rng: np.random.Generator, count: int, channels: int, side: int) -> sprites.Sheet:
    pixels = torch.from_numpy(rng.integers(0, 256, (count, channels, side, side), dtype=np.uint8))
    masks = torch.from_numpy(rng.random((count, side, side)) < 0.7)
    labels = torch.zeros(count, dtype=torch.int64)
    return sprites.Sheet(pixels, masks, labels, torch.zeros(1, dtype=torch.int64), torch.tensor([count]))


@given(
    seed=st.integers(0, 10_000),
    instances=st.integers(1, 4),
    channels=st.sampled_from([1, 3]),
    wave=st.sampled_from([0.0, 1.5]),
)
def test_a_clip_equals_the_one_painted_pixel_by_pixel(seed: int, instances: int, channels: int, wave: float) -> None:
    rng = np.random.default_rng(seed)
    sheet = random_sheet(rng, 5, channels, 5)
    n, t, size = 2, 2, 11

    def draw(low: float, high: float) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, t, instances)))

    hidden, depth = draw(0, 1) < 0.2, torch.from_numpy(np.stack([rng.permutation(instances) for _ in range(n)]))
    pose = sprites.Pose(
        draw(-2, 13), draw(-2, 13), draw(-3, 3), draw(0.5, 2), draw(-0.5, 0.5), draw(0, 6), hidden, depth
    )
    which = torch.from_numpy(rng.integers(0, 5, (n, instances)))
    tint, scene = (
        torch.from_numpy(rng.random((n, instances, channels))),
        torch.from_numpy(rng.uniform(-0.2, 1.2, (n, t, channels, size, size))),
    )
    drawn = sprites.compose(sheet, which, pose, tint, scene, wave)
    for clip in range(n):
        for frame in range(t):
            at = {
                key: (value[clip] if key == "depth" else value[clip, frame]).tolist()
                for key, value in pose._asdict().items()
            }
            picture, owner = slow.compose(
                sheet.pixels.tolist(), sheet.masks.tolist(), which[clip].tolist(), at, tint[clip].tolist(),
                scene[clip, frame].tolist(), wave,
            )  # fmt: skip
            assert drawn.frames[clip, frame].tolist() == picture
            for g in range(instances):
                mine = [[who == g for who in row] for row in owner]
                assert drawn.masks[clip, frame, g].tolist() == mine
                assert boxes.of_masks(drawn.masks[clip, frame, g]).tolist() == list(slow.box(mine))


def test_the_nearer_of_two_takes_the_shared_pixels_and_a_hidden_one_takes_none() -> None:
    solid = sprites.Sheet(
        torch.tensor([255, 100], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4).contiguous(),
        torch.ones(2, 4, 4, dtype=torch.bool), torch.tensor([0, 0]), torch.tensor([0]), torch.tensor([2]),
    )  # fmt: skip
    zero = torch.zeros(1, 2, 2)
    x = torch.tensor([[[4.0, 6.0], [4.0, 6.0]]])
    hidden = torch.tensor([[[False, False], [False, True]]])
    pose = sprites.Pose(x, zero + 4, zero, zero + 1, zero, zero, hidden, torch.tensor([[1, 0]]))
    scene = torch.zeros(1, 2, 1, 8, 8)
    drawn = sprites.compose(solid, torch.tensor([[0, 1]]), pose, torch.ones(1, 2, 1), scene)
    assert drawn.masks.sum((-2, -1)).tolist() == [[[8, 16], [16, 0]]]
    assert drawn.visible.tolist() == [[[0.5, 1.0], [1.0, 0.0]]]
    assert drawn.frames[0, 0, 0, 3].tolist() == [0, 0, 255, 255, 100, 100, 100, 100]
    assert drawn.frames[0, 1, 0, 3].tolist() == [0, 0, 255, 255, 255, 255, 0, 0]
    assert boxes.of_masks(drawn.masks)[0, 0].tolist() == [[2, 2, 4, 6], [4, 2, 8, 6]]
    assert not sprites.is_present(drawn).any()  # 16 pixels are too few


def test_presence_needs_25_pixels_and_a_fifth() -> None:
    masks = torch.zeros(1, 1, 4, 10, 10, dtype=torch.bool)
    for g, pixels in enumerate((24, 25, 30, 30)):
        masks[0, 0, g].view(-1)[:pixels] = True
    drawn = sprites.Drawn(masks.byte(), masks, torch.tensor([[[0.9, 0.9, 0.19, 0.2]]]))
    assert sprites.is_present(drawn).tolist() == [[[False, True, False, True]]]


@pytest.mark.parametrize("split", ["none", "class", "domain"])
@pytest.mark.parametrize("errors", [0.0, 2.0])
def test_a_batch_depends_on_seed_and_step_alone(split: Any, errors: float) -> None:
    settings = {"split": split, "train_errors": errors, "clips": 20, "noise": 0.05}
    alone, stacked = make((4,), **settings), make((3, 4), **settings)
    for step in (len(alone) - 1, 0, 3, 0):
        one, two = alone.batch(step), stacked.batch(step)
        assert one.keys() == two.keys() == stacked.fields.keys()
        for key, field in stacked.fields.items():
            assert torch.equal(one[key][0], two[key][1]), key
            assert (one[key].shape[2:], one[key].dtype) == (field.shape, field.dtype)
        assert torch.equal(alone.rebuild(one["clip"])["frames"], one["frames"])  # made again from its number
    assert not torch.equal(stacked.batch(0)["frames"][0], stacked.batch(0)["frames"][1])


def test_a_clip_is_the_same_beside_other_clips() -> None:
    stream = make()
    four = stream.rebuild(torch.tensor([[7, 3, 9, 0]]))
    for place, number in enumerate((7, 3, 9, 0)):
        one = stream.rebuild(torch.tensor([[number]]))
        for key, value in one.items():
            assert torch.equal(value[:, 0], four[key][:, place]), key


def test_a_strategy_remembers_clips_by_their_numbers_alone() -> None:
    settings = {"strategy": {"name": "ctvis", "capacity": 6, "replay": 2}, "stream": {"name": "sprites", **SMALL}}
    config = from_dict({**settings, "encoder": {"name": "crop"}, "seeds": [0], "stack": 1})
    stream = session.build_stream(config, config.seeds)
    strategy = session.build_strategy(config, stream, config.seeds)
    for step in range(3):
        strategy.observe(stream.batch(step))
    assert strategy.memory.bytes_per_row == 8
    numbers = strategy.memory.rows()["clip"][:, :4]
    again = strategy.env.rebuild(numbers)
    assert torch.equal(again["frames"], torch.cat([stream.batch(step)["frames"] for step in range(2)], 1))


def test_making_a_batch_reads_nothing_on_the_host() -> None:
    stream = make(train_errors=1.0, wave=1.0)
    with NoHostReads():  # type: ignore[no-untyped-call]
        stream.batch(1)


def test_every_clip_comes_once_and_shuffled_order_shows_the_same_ones() -> None:
    plain, iid = make(split="class", clips=40), make(split="class", clips=40, iid=True)
    orders = [torch.cat([s.batch(step)["clip"] for step in range(len(s))], 1)[0].tolist() for s in (plain, iid)]
    assert orders[0] == list(range(40))
    assert sorted(orders[1]) == orders[0] != orders[1]
    assert iid.seen(0).all()
    assert not iid.announces


def test_rows_agree_with_each_other() -> None:
    stream = make(leaves=1.0, clips=20, batch=20, frames=8)
    batch = {key: value[0] for key, value in stream.batch(0).items()}
    present, background = batch["present"], slice(3, None)
    assert 0.2 < present[:, :, :3].float().mean() < 0.9
    assert not present[:, :, background].any()
    assert (batch["instance"] == torch.where(present, torch.arange(5), -1)).all()
    assert ((batch["label"] >= 0) == present).all()
    assert (batch["score"] == present.float()).all()
    assert torch.equal(boxes.of_masks(batch["masks"][:, :, :3]), batch["boxes"][:, :, :3])
    assert (batch["masks"][:, :, :3].sum(2) <= 1).all()
    ghosts = boxes.overlap(batch["boxes"][:, :, background], batch["boxes"][:, :, :3])
    assert ghosts.max() < boxes.BESIDE
    found = batch["boxes"][:, :, background, 2] > 0
    assert found.float().mean() > 0.9
    labels = [set(one[one >= 0].tolist()) for one in batch["label"][:, :, 0]]
    assert all(len(one) <= 1 for one in labels)  # an instance keeps its class


@given(seed=st.integers(0, 10_000))
def test_overlap_equals_counting_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 6, (2, 3, 2))
    both = torch.from_numpy(np.concatenate([low, low + rng.integers(0, 6, (2, 3, 2))], -1)).double()
    both[..., 2:] = torch.where((both[..., 2:] > both[..., :2]).all(-1, keepdim=True), both[..., 2:], both[..., :2])
    found = boxes.overlap(both[0], both[1])
    for i in range(3):
        for j in range(3):
            assert math.isclose(found[i, j], slow.overlap(both[0, i].tolist(), both[1, j].tolist()), abs_tol=1e-12)


def test_filling_a_box_of_whole_pixels_and_taking_its_box_gives_it_back() -> None:
    given_boxes = torch.tensor([[0, 0, 3, 2], [2, 1, 7, 5], [0, 0, 0, 0]]).float()
    assert torch.equal(boxes.of_masks(boxes.fill(given_boxes, 6, 8)), given_boxes)


def test_a_clip_shows_no_sprite_twice_and_half_of_them_of_one_class() -> None:
    labels = torch.arange(10).repeat_interleave(20)
    count = torch.full((10,), 20)
    sheet = sprites.Sheet(torch.zeros(200, 1, 4, 4), torch.ones(200, 4, 4) > 0, labels, torch.arange(10) * 20, count)
    n = 4000
    which = sprites.cast(Rng.keyed(torch.arange(n)), sheet, torch.arange(10).expand(n, -1), 6, 0.5)
    assert (which.sort(1).values.diff(dim=1) > 0).all()
    of = labels[which]
    assert (of[:, :3] == of[:, :1]).all()
    same = float((of[:, 3:] == of[:, :1]).float().mean())
    assert abs(same - 0.1) < 4.5 * math.sqrt(0.1 * 0.9 / (3 * n))  # false alarm: 7 in a million
    used = torch.bincount(which[:, 0], minlength=200)
    assert abs(used - n / 200).max() < 5 * math.sqrt(n / 200)  # 200 cells; false alarm: 1 in 5000


def test_an_instance_is_away_as_often_and_as_long_as_is_said() -> None:
    n, g, frames = 500, 4, 40
    ones = torch.ones(n)
    pose = sprites.poses(Rng.keyed(torch.arange(n)), frames, g, 96, 24, ones, ones, 0.3, "bounce")
    away = pose.hidden.sum(1)
    assert abs(deviations(away > 0, 0.3)) < 4.5  # false alarm: 7 in a million
    more = sprites.poses(Rng.keyed(torch.arange(n)), frames, g, 96, 24, ones, ones, 0.4, "bounce")
    assert deviations(more.hidden.any(1), 0.3) > 6  # the check has teeth
    starts = pose.hidden[:, 1:] & ~pose.hidden[:, :-1]
    assert (starts.sum(1) <= 1).all()
    inner = away[(away > 0) & ~pose.hidden[:, -1]]
    assert (int(inner.min()), int(inner.max())) == (3, 12)


@pytest.mark.parametrize("path", ["bounce", "exit"])
def test_instances_move_at_the_stated_pace_and_stay_where_they_may(path: Any) -> None:
    n, frames = 300, 30
    ones = torch.ones(n)
    pose = sprites.poses(Rng.keyed(torch.arange(n)), frames, 3, 96, 24, ones, ones, 0.0, path)
    low, high = (12, 84) if path == "bounce" else (-24, 120)
    for place in (pose.x, pose.y):
        assert low <= float(place.min()) <= float(place.max()) <= high
    step = torch.stack([pose.x.diff(dim=1), pose.y.diff(dim=1)]).square().sum(0).sqrt()
    usual = step.median(1).values
    assert 0.7 < float(usual.min()) < 1.1
    assert 2.9 < float(usual.max()) < 3.6
    assert (pose.angle.abs() <= 0.35).all()
    assert ((pose.scale - 1).abs() <= 0.15 + 1e-6).all()
    outside = (pose.x < -12) | (pose.x > 108)
    assert bool(outside.any()) == (path == "exit")


def test_a_detector_errs_as_often_as_is_said() -> None:
    n, t, g = 100, 10, 5
    corner = torch.arange(g).float() * 20
    around = torch.stack([corner, corner, corner + 15, corner + 15], -1).expand(n, t, g, 4)
    masks = boxes.fill(around, 100, 100)
    present = torch.ones(n, t, g, dtype=torch.bool)
    true = boxes.rows(around, masks, torch.zeros(n, g, dtype=torch.int64), present, torch.zeros(n, t, 0, 4))
    seen = boxes.detected(Rng.keyed(torch.arange(n)), true, g, 2.0)
    for found, rate in zip(errors(seen, g), (0.1, 0.09, 0.1), strict=True):  # only what is seen is seen twice
        assert abs(deviations(found, rate)) < 4.5  # false alarm: 7 in a million
    for found in errors(boxes.detected(Rng.keyed(torch.arange(n)), true, g, 4.0), g):
        assert deviations(found, 0.1) > 6  # the check has teeth
    kept = seen.present[:, :, :g]
    off = (seen.boxes[:, :, :g] - around)[kept]
    inner = off[:, 2].reshape(-1)  # right edges, of which none is at the border
    assert abs(float(inner.std()) - 2.0) < 0.1
    assert (seen.instance[:, :, g:] == -1).all()
    assert (seen.instance[:, :, :g] == torch.where(kept, torch.arange(g), -1)).all()
    assert not seen.masks[:, :, :g][~kept].any()
    assert (seen.boxes[:, :, :g][~kept] == 0).all()
    first, second = seen.score[:, :, :g], seen.score[:, :, g : 2 * g]
    assert (second[seen.present[:, :, g : 2 * g]] < first[seen.present[:, :, g : 2 * g]]).all()
    none = boxes.detected(Rng.keyed(torch.arange(n)), true, g, 0.0)
    assert torch.equal(none.boxes[:, :, :g], around)
    assert not none.present[:, :, g:].any()


def test_test_clips_carry_the_truth_when_a_detector_errs() -> None:
    stream = make(test_errors=4.0)
    chunk = next(stream.holdout().chunks(0, True))
    plain = next(make().holdout().chunks(0, True))
    for key in ("boxes", "masks", "instance", "label"):
        assert torch.equal(chunk[f"true_{key}"], plain[key][:, :, :, :3])
    assert not torch.equal(chunk["boxes"][:, :, :, :3], plain["boxes"][:, :, :, :3])
    assert torch.equal(chunk["frames"], plain["frames"])
    assert "true_boxes" not in plain


def test_experiences_of_classes_show_their_own_and_the_test_clips_too() -> None:
    stream = make((0, 5), split="class", clips=40, tasks=5, leaves=0.0)
    ends = [step for step in range(len(stream)) if stream.ends_task(step)]
    assert ends == [3, 7, 11, 15, 19]
    for step in range(len(stream)):
        labels = stream.batch(step)["label"]
        for run in range(2):
            allowed = set(stream.train.allowed[run, step // 4].tolist())
            assert set(labels[run][labels[run] >= 0].tolist()) <= allowed
        assert stream.seen(step).sum(1).tolist() == [step // 4 + 1] * 2
    full = list(stream.holdout().chunks(0, True))
    assert sum(chunk["clip"].shape[1] for chunk in full) == 15
    for chunk in full:
        for run, task in enumerate(chunk["split"][:, 0].tolist()):
            labels = chunk["label"][run]
            assert set(labels[labels >= 0].tolist()) <= set(stream.train.allowed[run, task].tolist())
    assert sum(chunk["clip"].shape[1] for chunk in stream.holdout().chunks(4, False)) == 2
    assert stream.clip_labels().shape == (40, 3)


def test_domains_differ_from_the_plain_first_one_and_between_seeds() -> None:
    stream = make((0, 1), split="domain", clips=24, noise=0.0)
    assert stream.tasks == 3
    assert stream.look[:, 0].tolist() == [[1, 1, 0]] * 2
    assert not torch.equal(stream.look[0, 1:], stream.look[1, 1:])
    dark, light = stream.batch(0)["frames"].float(), stream.batch(len(stream) - 1)["frames"].float()
    assert light.median() > dark.median() + 20


def test_a_backdrop_is_another_image_at_half_brightness() -> None:
    rng = np.random.default_rng(0)
    sheet = random_sheet(rng, 40, 3, 6)
    keys = torch.arange(400)
    found = sprites.photographs(Rng.keyed(keys), sheet)
    known = sheet.pixels.flatten(1).float() / 510
    which = (found.flatten(1)[:, None] == known).all(2)
    assert (which.sum(1) == 1).all()
    assert (which.sum(0) > 0).all()  # all 40 come among 400 draws; false alarm: 1 in 600
    scene = sprites.scenery(Rng.keyed(keys), 2, found, 6, 0.0, torch.zeros(400))
    assert torch.allclose(scene[:, 1], found)
    one, two = make(backdrop="image").batch(0), make().batch(0)
    assert torch.equal(one["masks"][:, :, :, :3], two["masks"][:, :, :, :3])
    assert not torch.equal(one["frames"], two["frames"])


def test_labels_counted_without_painting_are_those_of_the_batches() -> None:
    stream = make(split="class", clips=20, leaves=0.0)
    labels = torch.cat([stream.batch(step)["label"] for step in range(len(stream))], 1)[0, :, :, :3].amax(1)
    known = torch.from_numpy(stream.clip_labels())
    assert (labels == torch.where(labels < 0, -1, known)).all()


def test_frames_without_an_instance_and_clips_of_one_are_possible() -> None:
    alone = make(instances=1, leaves=1.0, clips=10, batch=10, frames=12)
    batch = alone.batch(0)
    shown = batch["present"].any(-1)
    assert (~shown).any()
    assert shown.any()
    empty = torch.where(shown[..., None, None, None], False, batch["masks"][:, :, :, :1])
    assert not empty.any()


def test_only_classes_that_have_images_are_shown() -> None:
    x, y = np.zeros((12, 1, 8, 8), np.uint8), np.array([2] * 5 + [4] * 7)
    x[:, :, 3] = 255
    sheet = sprites.sheet(x, y, "auto", CPU)
    assert sprites.shown(sheet, 5, "mine").tolist() == [2, 4]
    which = sprites.cast(Rng.keyed(torch.arange(50)), sheet, torch.tensor([2, 4]).expand(50, -1), 5, 0.5)
    assert set(sheet.labels[which].flatten().tolist()) == {2, 4}


@pytest.mark.parametrize("kind", ["ink", "ellipse"])
def test_silhouettes_are_what_is_said(kind: Any) -> None:
    x = np.full((2, 1, 9, 9), 255, np.uint8)
    x[:, :, 4, 4] = 0  # a dark dot on white
    sheet = sprites.sheet(x, np.array([0, 1]), kind, CPU)
    if kind == "ink":
        assert sheet.masks.sum((1, 2)).tolist() == [9, 9]  # the dot and a pixel around it
        assert int(sheet.pixels[0, 0, 4, 4]) == 255
    else:
        assert torch.equal(sheet.pixels, torch.from_numpy(x))
        assert (sheet.masks == sheet.masks.flip(-1)).all()
        assert (sheet.masks.sum((1, 2)) > 0.4 * 81).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"canvas": 12}, "canvas is 12; it must be at least 13"),
        ({"tasks": 2}, "stream.split is 'none'"),
        ({"split": "class", "tasks": 3}, "10 classes need one of"),
        ({"clips": 1}, "experiences of a batch need 2"),
        ({"instances": 60}, "a class of 'digits' has only"),
        ({"order": "fixed"}, "only --set stream.split=class"),
    ],
)
def test_a_mistake_gets_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig, match=words) as caught:
        make(**settings)
    assert "\n" not in str(caught.value)


def test_the_timeline_counts_instances_by_class() -> None:
    stream = make(split="class", clips=20, tasks=5, order="fixed")
    counts = timeline.of(stream).counts
    assert counts.sum() == 20 * 3
    assert counts[:2, :2].sum() == counts[:2].sum() == 12  # the first experience: 4 clips of classes 0 and 1


def test_an_instance_is_painted_in_its_colour_and_others_are_left_alone() -> None:
    frame = np.full((1, 5, 6), 100, np.uint8)
    masks = np.zeros((2, 5, 6), bool)
    masks[0, 1:4, 1:4] = True
    masks[1] = True
    picture = strips.painted(frame, masks, [3, -1])
    assert picture[1, 1].tolist() == list(strips.colour(3))
    within = [round(100 + strips.SHARE * (hue - 100)) for hue in strips.colour(3)]
    assert np.abs(picture[2, 2].astype(int) - within).max() <= 1
    picture[1:4, 1:4] = 100
    assert (picture == 100).all()
    assert len({strips.colour(number) for number in range(50)}) == 50


@pytest.mark.parametrize("name", ["clip.png", "clip.gif"])
def test_describe_draws_the_first_clip(name: str, tmp_path: Path) -> None:
    words = [f"stream.{key}={value}" for key, value in SMALL.items()]
    sets = [part for word in words for part in ("--set", word)]
    result = CliRunner().invoke(main, ["describe", "sprites", *sets, "--png", str(tmp_path / name)])
    assert result.exit_code == 0, result.output
    assert "12 samples" in result.output
    with Image.open(tmp_path / name) as drawn:
        if name.endswith("png"):
            assert drawn.size == (4 * 80 + 3 * 2, 160)  # four frames side by side, in pairs, twice their size
        else:
            assert (drawn.size, getattr(drawn, "n_frames", 1)) == ((80, 160), 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"background": 0, "instances": 1, "train_errors": 1.0},
        {"canvas": 13, "train_errors": 1.0},  # no room beside the instances
        {"motion": "exit", "leaves": 1.0, "frames": 2, "noise": 0.0, "tint": 0.0},
        {"silhouette": "ellipse", "wave": 2.0, "same_class": 1.0, "batch": 1, "clips": 1},
    ],
)
def test_unusual_settings_give_batches_of_their_fields(settings: dict[str, Any]) -> None:
    stream = make(**settings)
    batch = stream.batch(len(stream) - 1)
    for key, field in stream.fields.items():
        assert batch[key].shape[2:] == field.shape
    box = batch["boxes"]
    assert (box[..., 2:] >= box[..., :2]).all()
    assert (box[batch["present"]][:, 2:] > box[batch["present"]][:, :2]).all()
    assert not batch["masks"][(box[..., 2] == 0)].any()
