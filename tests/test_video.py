"""Annotated videos: masks in every written form, files with gaps and mistakes, real frames, results out and in again."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import references_video as slow
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cl_sim import annotations, boxes, commands, export, rle, session, stills, store
from cl_sim.cli import main
from cl_sim.config import from_dict
from cl_sim.errors import BadConfig, BadData
from cl_sim.sources import data_folders
from streams.video import VideoConfig, Videos

ROOT = Path(__file__).resolve().parent.parent


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


# --- cameras ------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), flip=st.booleans())
def test_a_camera_sees_what_is_seen_point_by_point(seed: int, flip: bool) -> None:
    rng = np.random.default_rng(seed)
    camera = stills.panning(rng, 3)._replace(flip=flip)
    pictures = torch.from_numpy(rng.integers(0, 256, (3, 1, 9, 12), dtype=np.uint8))
    masks = torch.from_numpy(rng.random((3, 2, 9, 12)) < 0.5)
    seen, shown = stills.look(pictures, masks, camera)
    for t in range(3):
        for g in range(2):
            picture, mask = slow.look(
                pictures[t, 0].tolist(), masks[t, g].tolist(), camera.corner[t], camera.side, camera.angle[t],
                camera.centre, flip,
            )  # fmt: skip
            assert shown[t, g].tolist() == mask
            assert np.abs(np.array(picture) - seen[t, 0].numpy()).max() <= 1  # single precision


def test_a_still_camera_changes_nothing_and_a_mirror_twice_neither() -> None:
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (2, 3, 8, 10), dtype=np.uint8))
    masks = torch.from_numpy(rng.random((2, 1, 8, 10)) < 0.5)
    still = stills.Camera(np.zeros((2, 2)), 1.0, np.zeros(2), np.full(2, 0.5), False)
    assert all(torch.equal(a, b) for a, b in zip(stills.look(pictures, masks, still), (pictures, masks), strict=True))
    seen, shown = stills.look(pictures, masks, still._replace(flip=True))
    assert torch.equal(seen, pictures.flip(-1))
    assert torch.equal(shown, masks.flip(-1))


def test_a_panning_camera_drifts_one_way_and_turns_one_way_inside_the_picture() -> None:
    drifting = 0
    for seed in range(200):
        camera = stills.panning(np.random.default_rng(seed), 6)
        assert 0.6 <= camera.side <= 1
        assert (camera.corner >= 0).all()
        assert (camera.corner + camera.side <= 1 + 1e-12).all()
        assert (np.abs(camera.angle) <= np.pi / 12).all()
        for series in (*camera.corner.T, camera.angle):
            steps = np.diff(series)
            assert (steps >= 0).all() or (steps <= 0).all()
        drifting += camera.side < 1
        assert np.ptp(stills.fixed(np.random.default_rng(seed), 6).corner, 0).max() == 0
    assert abs(drifting - 100) < 4.5 * np.sqrt(50)  # false alarm: 7 in a million


def test_frames_of_a_clip_are_in_order_near_the_centre_and_a_short_video_is_repeated() -> None:
    for seed in range(100):
        numbers = stills.around(np.random.default_rng(seed), 50, 10, 7)
        assert len(numbers) == 10
        assert (np.diff(numbers) >= 0).all()
        assert any((np.abs(numbers - centre) <= 7).all() for centre in numbers)
    assert stills.around(np.random.default_rng(0), 1, 4, 20).tolist() == [0, 0, 0, 0]
    found = np.bincount(np.concatenate([stills.around(np.random.default_rng(s), 3, 2, 20) for s in range(300)]))
    assert abs(found - 200).max() < 4.5 * np.sqrt(600 * 2 / 9)


# --- files --------------------------------------------------------------------------------------------------------------


def made_up(folder: Path, videos: int = 7, name: str = "instances_train.json") -> dict[str, Any]:
    """Videos of 8x12 pixels with two instances: one in run lengths, one in polygons, each away in a frame."""
    content: dict[str, Any] = {
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}],
        "videos": [],
        "annotations": [],
    }
    rng = np.random.default_rng(0)
    for number in range(videos):
        files = [f"v{number}/{t}.png" for t in range(3)]
        for file in files:
            path = folder / "JPEGImages" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)).save(path)
        content["videos"].append({"id": 10 + number, "height": 8, "width": 12, "length": 3, "file_names": files})
        mask = np.zeros((8, 12), bool)
        mask[1:4, 2:7] = True
        text, listed = rle.encode(mask), {"size": [8, 12], "counts": rle.runs(mask)}
        square = [[6, 4, 10, 4, 10, 7, 6, 7]]
        common = {"video_id": 10 + number, "iscrowd": 0}
        content["annotations"] += [
            {**common, "id": 2 * number, "category_id": 7, "segmentations": [text, None, listed],
             "bboxes": [[2, 1, 5, 3], None, [2, 1, 5, 3]]},
            {**common, "id": 2 * number + 1, "category_id": 3, "segmentations": [square, square, square],
             "bboxes": [[6, 4, 4, 3], [6, 4, 4, 3], None]},
        ]  # fmt: skip
    write(folder / name, content)
    return content


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def stream_of(folder: Path, seeds: tuple[int, ...] = (0,), **settings: Any) -> Videos:
    small = {"test": "", "frames": 4, "height": 16, "width": 24, "background": 1, "per_video": 2}
    cfg = VideoConfig(data=f"folder:{folder}", **{**small, **settings})
    return Videos(cfg, seeds, torch.device("cpu"))


def test_a_file_is_read_with_gaps_in_ids_crowds_and_nulls(tmp_path: Path) -> None:
    content = made_up(tmp_path, 2)
    content["annotations"][1]["iscrowd"] = 1
    found = annotations.read(write(tmp_path / "a.json", content))
    assert (found.categories, found.names) == ((3, 7), ("ant", "cat"))
    assert [len(video.tracks) for video in found.videos] == [1, 2]
    video = found.videos[1]
    assert [track.label for track in video.tracks] == [1, 0]
    cat, ant = ([found.mask(video, track, t) for t in range(3)] for track in video.tracks)
    assert np.array_equal(cat[0], cat[2])
    assert cat[0] is not None
    assert cat[0].sum() == 15
    assert cat[1] is None
    assert ant[0] is not None
    assert ant[0].sum() == 12
    assert ant[2] is None  # its box is null


def test_files_without_annotations_are_read(tmp_path: Path) -> None:
    content = made_up(tmp_path, 1)
    for nothing in ({}, {"annotations": None}):
        plain = {key: value for key, value in content.items() if key != "annotations"} | nothing
        found = annotations.read(write(tmp_path / "a.json", plain))
        assert not found.annotated
        assert found.videos[0].tracks == ()


def broken(*path: Any, value: Any) -> Callable[[Any], None]:
    """A change of one place of a file."""

    def change(content: Any) -> None:
        here = content
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (broken("videos", value=None), "has no list 'videos'"),
        (broken("videos", value=[]), "lists no video"),
        (broken("videos", 1, "id", value=10), "video 10 is listed twice"),
        (broken("videos", 0, "height", value="8"), "video 0: 'height' must be a whole number, it is '8'"),
        (broken("videos", 0, "file_names", value=[]), "video 0: it needs a height"),
        (broken("categories", 1, "id", value=7), "category 7 is listed twice"),
        (broken("annotations", 0, "video_id", value=99), "annotation 0: video_id is 99, but there is no such video"),
        (broken("annotations", 1, "category_id", value=5), "annotation 1: category_id is 5, but the categories are 3, 7"),
        (broken("annotations", 2, "segmentations", value=[None]), "annotation 2: 1 segmentations for a video of 3 frames"),
        (broken("annotations", 2, "bboxes", value=[None] * 4), "annotation 2: 4 bboxes for a video of 3 frames"),
        (broken("annotations", 2, "id", value=1), "annotation 1: there are two of that id"),
        (broken("annotations", 0, value=3), "annotation 0: 'video_id' must be a whole number"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_gets_one_line(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    content = made_up(tmp_path, 2)
    change(content)
    with pytest.raises(BadData, match=words) as caught:
        annotations.read(write(tmp_path / "a.json", content))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.json") in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("{", "cannot be read as JSON"), ("[]", "it must be an object")])
def test_what_is_no_annotation_file_says_so(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=words):
        annotations.read(write(tmp_path / "a.json", text))
    with pytest.raises(BadData, match="there is no annotation file"):
        annotations.read(tmp_path / "none.json")


def test_a_broken_mask_names_its_annotation_and_frame(tmp_path: Path) -> None:
    content = made_up(tmp_path, 1)
    content["annotations"][0]["segmentations"][2]["counts"] = [5]
    found = annotations.read(write(tmp_path / "a.json", content))
    with pytest.raises(BadData, match="annotation 0, frame 2: the run lengths add up to 5"):
        found.mask(found.videos[0], found.videos[0].tracks[0], 2)


# --- the stream ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_videos_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    made_up(tmp_path)
    alone, stacked = stream_of(tmp_path, (4,), batch=2), stream_of(tmp_path, (3, 4), batch=2)
    assert len(alone) == 6 * 2 // 2
    for step in (5, 0, 3, 0):
        one, two = alone.batch(step), stacked.batch(step)
        assert one.keys() == two.keys() == stacked.fields.keys()
        for key, field in stacked.fields.items():
            assert torch.equal(one[key][0], two[key][1]), key
            assert (one[key].shape[2:], one[key].dtype) == (field.shape, field.dtype)
    numbers = torch.cat([stacked.batch(step)["clip"] for step in range(6)], 1)
    assert numbers.sort(1).values.tolist() == [list(range(12))] * 2
    assert stacked.clip_labels().tolist() == [[1, 0]] * 12


def test_frames_and_rows_of_a_video_are_those_of_its_file(tmp_path: Path) -> None:
    made_up(tmp_path)
    stream = stream_of(tmp_path, height=8, width=14)  # two columns to spare
    (video,) = stream.test_videos
    assert video.id == 14  # the fifth of seven is held out
    chunk = {key: value[0, 0] for key, value in next(stream.holdout().chunks(0, True)).items()}
    assert chunk["frames"].shape == (3, 3, 8, 14)
    assert (chunk["frames"][..., 12:] == 0).all()
    original = np.asarray(Image.open(tmp_path / "JPEGImages" / "v4" / "1.png")).transpose(2, 0, 1)
    assert np.array_equal(chunk["frames"][1, :, :, :12].numpy(), original)
    assert chunk["instance"].tolist() == [[0, 1, -1], [-1, 1, -1], [0, -1, -1]]
    assert chunk["label"].tolist() == [[1, 0, -1], [-1, 0, -1], [1, -1, -1]]
    assert chunk["boxes"][:, :2].tolist() == [
        [[2, 1, 7, 4], [6, 4, 10, 7]],
        [[0, 0, 0, 0], [6, 4, 10, 7]],
        [[2, 1, 7, 4], [0, 0, 0, 0]],
    ]
    mask = chunk["masks"][0, 1]
    assert mask[4:7, 6:10].all()
    assert mask.sum() == 12
    assert np.array_equal(stream.original(mask, video), mask[:, :12].numpy())


@pytest.mark.parametrize(
    ("frames", "file"),
    [
        ("train/JPEGImages", "train.json"),  # YouTube-VIS 2019
        ("train/JPEGImages", "annotations/instances_train_sub.json"),
        ("train/JPEGImages", "train/instances.json"),  # 2021
        ("train", "annotations_train.json"),  # OVIS
    ],
)
def test_frames_are_found_where_the_data_sets_have_them(frames: str, file: str, tmp_path: Path) -> None:
    made_up(tmp_path)
    (tmp_path / frames).parent.mkdir(exist_ok=True)
    (tmp_path / "JPEGImages").rename(tmp_path / frames)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / "instances_train.json").rename(tmp_path / file)
    stream = stream_of(tmp_path, train=file)
    assert stream.source.folder == tmp_path / frames


def test_frames_are_fitted_without_distortion_and_masks_go_with_them(tmp_path: Path) -> None:
    made_up(tmp_path)
    chunk = next(stream_of(tmp_path, height=32, width=24).holdout().chunks(0, True))
    assert (chunk["frames"][..., 16:, :] == 0).all()
    assert chunk["boxes"][0, 0, 0, 0].tolist() == [4, 2, 14, 8]


def test_stills_become_clips_of_a_moving_camera(tmp_path: Path) -> None:
    made_up(tmp_path)
    stills_file = made_up(tmp_path, 2, "stills.json")
    for video, (cat, ant) in zip(
        stills_file["videos"], zip(*[iter(stills_file["annotations"])] * 2, strict=True), strict=True
    ):
        video["file_names"] = video["file_names"][:1]
        for track in (cat, ant):
            track["segmentations"], track["bboxes"] = track["segmentations"][:1], track["bboxes"][:1]
    write(tmp_path / "stills.json", stills_file)
    stream = stream_of(tmp_path, stills="stills.json", per_still=3, per_video=0, crop=0.0, flip=0.0, turn=0.0)
    assert len(stream) == 6
    batch = stream.batch(0)
    assert (batch["frames"] == batch["frames"][:, :, :1]).all()
    moving = stream_of(tmp_path, stills="stills.json", per_still=3, per_video=0).batch(0)
    assert not (moving["frames"] == moving["frames"][:, :, :1]).all()
    assert moving["instance"].unique().tolist() == [-1, 0, 1]


def test_without_annotated_tests_videos_are_held_out_and_it_is_said(tmp_path: Path) -> None:
    content = made_up(tmp_path)
    del content["annotations"]
    write(tmp_path / "instances_valid.json", content)
    stream = stream_of(tmp_path, test="instances_valid.json")
    assert stream.describe()["tests"] == (
        "instances_valid.json has no annotations, so AP on it cannot be computed here; every fifth training video is held "
        "out: 1 videos"
    )
    trained = {video.id for _, video in stream.origins}
    assert trained == {10, 11, 12, 13, 15, 16}


def test_a_detector_may_err_on_test_videos(tmp_path: Path) -> None:
    made_up(tmp_path)
    chunk = next(stream_of(tmp_path, errors=1.0).holdout().chunks(0, True))
    assert chunk["true_masks"].shape[3] == chunk["true_boxes"].shape[3] == chunk["true_instance"].shape[3] == 2
    assert chunk["boxes"].shape[3] == 2 + 1 + 4


@pytest.mark.parametrize(
    ("settings", "words", "kind"),
    [
        ({"stills": "s.json"}, "give both", BadConfig),
        ({"batch": 100}, "too few", BadConfig),
        ({"train": "none.json"}, "there is no annotation file", BadData),
        ({"data": "folder:/nowhere"}, "type video-folder:PATH", BadData),
    ],
)
def test_a_mistake_in_the_settings_gets_one_line(settings: Any, words: str, kind: type, tmp_path: Path) -> None:
    made_up(tmp_path)
    cfg = {"data": f"folder:{tmp_path}", "test": "", **settings}
    with pytest.raises(kind, match=words) as caught:
        Videos(VideoConfig(**cfg), (0,), torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_missing_and_wrong_frames_are_named(tmp_path: Path) -> None:
    made_up(tmp_path)
    for number in range(7):
        Image.new("RGB", (3, 3)).save(tmp_path / "JPEGImages" / f"v{number}" / "1.png")
    with pytest.raises(BadData, match=r"1.png has 3x3 pixels, but .* says 12x8"):
        list(stream_of(tmp_path).holdout().chunks(0, True))
    (tmp_path / "JPEGImages" / "v0" / "0.png").unlink()
    with pytest.raises(BadData, match=r"names the frame v0/0\.png, which is not in"):
        stream_of(tmp_path)


# --- results ------------------------------------------------------------------------------------------------------------


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    made_up(tmp_path, 2)
    truth = annotations.read(tmp_path / "instances_train.json")
    results = annotations.true_results(truth)
    path = annotations.write_results(tmp_path / "results.zip", results, truth)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["results.json"]
        written = json.loads(archive.read("results.json"))
    assert {one["category_id"] for one in written} == {3, 7}
    assert {one["video_id"] for one in written} == {10, 11}
    assert isinstance(written[0]["segmentations"][0]["counts"], str)
    assert written[0]["segmentations"][1] is None
    again = annotations.read_results(path, truth)
    assert len(again) == len(results) == 4
    for one, two in zip(again, results, strict=True):
        assert (one.video_id, one.label, one.score) == (two.video_id, two.label, two.score)
        for left, right in zip(one.masks, two.masks, strict=True):
            assert (left is None) == (right is None)
            assert left is None or np.array_equal(left, right)
    plain = write(tmp_path / "plain.json", written)
    assert len(annotations.read_results(plain, truth)) == 4
    assert path.read_bytes() == annotations.write_results(tmp_path / "again.zip", results, truth).read_bytes()


def test_results_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made_up(tmp_path, 1)
    truth = annotations.read(tmp_path / "instances_train.json")
    good = annotations.true_results(truth)[0]
    small = np.ones((2, 2), bool)
    for wrong, words in (
        ((99, 0, 1.0, good.masks), "has no video 99"),
        ((10, 2, 1.0, good.masks), "class 2 is not one of 0 to 1"),
        ((10, 0, float("nan"), good.masks), "the score is nan"),
        ((10, 0, 1.0, good.masks[:2]), "2 masks for video 10 of 3 frames"),
        ((10, 0, 1.0, (small, None, None)), r"the mask is \[2, 2\], the video \[8, 12\]"),
    ):
        with pytest.raises(BadData, match=words):
            annotations.write_results(tmp_path / "r.zip", [annotations.Result(*wrong)], truth)
    path = write(tmp_path / "r.json", [{"video_id": 10, "category_id": 3, "segmentations": [None] * 3}])
    with pytest.raises(BadData, match="result 0: the score is None; it must be a number"):
        annotations.read_results(path, truth)
    with pytest.raises(BadData, match=r"holds no results.json"):
        annotations.read_results(write(tmp_path / "r.json", "{"), truth)


DAVIS = next((p for p in [*data_folders(""), ROOT.parent / "shared" / "data"] if (p / "davis_vis").is_dir()), None)


@pytest.mark.skipif(DAVIS is None, reason="the excerpt of DAVIS is not here")
def test_the_excerpt_of_davis_is_read_shown_exported_and_read_back(tmp_path: Path) -> None:
    cfg = VideoConfig(stills="instances_stills.json", per_still=1, per_video=1, frames=3, height=60, width=107)
    stream = Videos(cfg, (0,), torch.device("cpu"), str(DAVIS))
    assert (len(stream), stream.rows, len(stream.test_videos)) == (27, 7, 17)
    assert stream.describe()["classes"] == "person, dog, car, bird, large_mammal, rider"
    assert stream.batch(0)["present"].any()
    for name, masks in (("train", 104), ("valid", 102), ("stills", 28)):  # both forms of run lengths
        truth = annotations.read(DAVIS / "davis_vis" / f"instances_{name}.json")
        content = json.loads(truth.path.read_text(encoding="utf-8"))
        results = annotations.true_results(truth)
        areas = [area for one in content["annotations"] for area in one["areas"]]
        found = [None if mask is None else int(mask.sum()) for one in results for mask in one.masks]
        assert found == areas
        assert sum(area is not None for area in found) == masks
        written = [box for one in content["annotations"] for box in one["bboxes"] if box]
        drawn = [
            boxes.of_masks(torch.from_numpy(mask)).tolist() for one in results for mask in one.masks if mask is not None
        ]
        assert [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in drawn] == written
        again = annotations.read_results(annotations.write_results(tmp_path / f"{name}.zip", results, truth), truth)
        for one, two in zip(again, results, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one.masks, two.masks, strict=True) if b is not None)


# --- from a run to results ----------------------------------------------------------------------------------------------


def cl_sim(*words: str) -> Any:
    return CliRunner().invoke(main, list(words))


def test_a_trained_run_is_exported_and_its_numbers_are_those_of_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(tmp_path)
    monkeypatch.chdir(tmp_path)
    small = {"test": "", "frames": 3, "height": 16, "width": 24, "per_video": 1}
    config = from_dict(
        {
            "stream": {"name": "video", "data": f"folder:{tmp_path}", **small},
            "strategy": {"name": "ctvis", "w_class": 1.0},
            "encoder": {"name": "crop"},
            "evaluate": {"per_task": 0},
            "seeds": [0, 5],
            "stack": 2,
        }
    )
    facts = commands._facts(config, session.build_stream(config, (0,)), "test")
    assert session.train(store.create(tmp_path / "runs", config, facts), 0) == "finished"
    done = cl_sim("export", "last", "out.zip", "--seed", "5")
    assert done.exit_code == 0, done.output
    truth = annotations.read(tmp_path / "instances_train.json")
    found = annotations.read_results(tmp_path / "out.zip", truth)
    assert {one.video_id for one in found} == {14}
    assert len(found) <= 2  # as many as classes
    assert sum(one.score for one in found) > 0.5
    (run,) = store.all_runs(tmp_path / "runs")
    count, scores = export.export(run, 5, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()
    assert f"wrote {count} tracks to out.zip; read back: ap {100 * scores['ap']:.1f} %" in done.output
    for words, message in (
        (["export", "last", "x.zip", "--seed", "9"], "--seed is 9, but"),
        (["export", "nothing", "x.zip"], "no run is called 'nothing'"),
    ):
        refused = cl_sim(*words)
        assert refused.exit_code != 0
        assert message in refused.output
        assert "Traceback" not in refused.output


def test_the_best_pairs_of_track_and_class_are_kept() -> None:
    ids = torch.tensor([[0, 4], [0, -1]])
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[0.0, 2.0, 0.0], [9.0, 9.0, 0.0]]]).double()
    found = export.best_pairs(ids, logits)
    first = math.e / (2 * math.e + 1)
    assert [(track, label) for track, label, _ in found] == [(0, 0), (0, 1), (4, 1)]
    assert [score for _, _, score in found] == pytest.approx([first] * 3)
    assert export.best_pairs(torch.full((2, 2), -1), logits) == []


class Perfect:
    """Answers with one direction per instance, and with its class."""

    def __init__(self, stream: Videos) -> None:
        self.rows, self.classes, self.dim = 8, stream.classes, 8

    def eval(self) -> None: ...

    def train(self) -> None: ...

    def predict(self, batch: Any) -> torch.Tensor:
        emb = torch.nn.functional.one_hot(batch["instance"].clamp(min=0), self.rows).float() * 8
        scores = torch.nn.functional.one_hot(batch["label"].clamp(min=0), self.classes).float() * 20
        return torch.cat([emb, scores], -1)


@pytest.mark.skipif(DAVIS is None, reason="the excerpt of DAVIS is not here")
def test_a_perfect_tracker_of_davis_gets_full_marks_for_what_is_read_back(tmp_path: Path) -> None:
    cfg = VideoConfig(per_video=1, frames=3, height=240, width=427)
    stream = Videos(cfg, (0,), torch.device("cpu"), str(DAVIS))
    claims = export.results(stream, cast(Any, Perfect(stream)))
    path = annotations.write_results(tmp_path / "results.zip", claims, stream.annotations)
    again = annotations.read_results(path, stream.annotations)
    assert len(again) == 17 * 6  # one track in each video, with each class
    scores = export.scores(again, stream)
    assert scores["ap"] == scores["ap50"] == scores["ar1"] == 1.0
    coarse = Videos(VideoConfig(per_video=1, frames=3, height=60, width=107), (0,), torch.device("cpu"), str(DAVIS))
    rough = export.scores(export.results(coarse, cast(Any, Perfect(coarse))), coarse)
    assert 0.6 < rough["ap"] < 1.0  # masks of a quarter of the side lose the last thresholds
    assert rough["ap50"] == 1.0


def test_runs_on_other_streams_and_without_classes_are_not_exported(tmp_path: Path) -> None:
    made_up(tmp_path)
    stream = stream_of(tmp_path)
    plain = Perfect(stream)
    plain.dim = plain.rows + plain.classes
    with pytest.raises(BadConfig, match=r"train it with --set strategy.w_class=1"):
        export.results(stream, cast(Any, plain))
    assert isinstance(stream, export.Exportable)
