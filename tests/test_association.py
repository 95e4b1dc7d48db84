"""The association metrics against slow twins, by hand, and against the packages that define them where these are installed."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import references_association as references
from hypothesis import given, settings
from hypothesis.strategies import integers

from cl_sim.errors import BadData
from cl_sim.metrics.association import (
    association_accuracy,
    combine_accuracy,
    combine_hota,
    combine_identity,
    combine_switches,
    hota,
    id_switches,
    identity,
    recovered,
    tube_iou,
    video_ap,
)

seeds = integers(0, 10**6)
Lists = tuple[list[list[int]], list[list[int]], list[list[list[float]]]]


def video(frames: int, seed: int, most: int = 3) -> Lists:
    """Identities 10, 11, 12 and tracks 4, 5, 6, each in some frames, with any similarities."""
    rng = np.random.default_rng(seed)
    truth = [sorted(rng.choice(3, rng.integers(0, most + 1), replace=False) + 10) for _ in range(frames)]
    track = [list(rng.permutation(3)[: rng.integers(0, most + 1)] + 4) for _ in range(frames)]
    likeness = [rng.random((len(a), len(b))) for a, b in zip(truth, track, strict=True)]
    plain = [[int(x) for x in ids] for ids in truth], [[int(x) for x in ids] for ids in track]
    return *plain, [table.tolist() for table in likeness]


def oracle(truth: list[list[int]], track: list[list[int]]) -> Lists:
    """Row i of both lists is the same object, and only that."""
    return truth, track, [np.eye(len(ids)).tolist() for ids in truth]


@given(frames=integers(0, 6), seed=seeds)
def test_hota_equals_the_loops(frames: int, seed: int) -> None:
    made = video(frames, seed)
    found = hota(*made)
    assert [found[k] for k in ("hota", "deta", "assa")] == pytest.approx(references.hota(*made))


@given(frames=integers(0, 6), seed=seeds)
def test_identity_and_switches_equal_the_loops(frames: int, seed: int) -> None:
    made = video(frames, seed)
    assert identity(*made)["idf1"] == pytest.approx(references.idf1(*made))
    idsw, matches, accuracy, reid = references.switches_and_accuracy(*made)
    switches, association = id_switches(*made), association_accuracy(*made)
    assert (switches["idsw"], switches["matches"]) == (idsw, matches)
    assert [association["accuracy"], association["reid"]] == pytest.approx([accuracy, reid], nan_ok=True)


@settings(max_examples=20)
@given(frames=integers(1, 6), seed=seeds)
def test_the_metrics_equal_trackeval(frames: int, seed: int) -> None:
    metrics = pytest.importorskip("trackeval.metrics", reason="pip install 'cl-sim[vis]'")
    truth, track, likeness = video(frames, seed)
    if not any(truth) or not any(track):
        return  # trackeval answers by convention where there is nothing to measure
    who, what = sorted({g for ids in truth for g in ids}), sorted({p for ids in track for p in ids})
    data = {
        "num_timesteps": frames,
        "num_gt_ids": len(who),
        "num_tracker_ids": len(what),
        "num_gt_dets": sum(map(len, truth)),
        "num_tracker_dets": sum(map(len, track)),
        "gt_ids": [np.array([who.index(g) for g in ids], dtype=int) for ids in truth],
        "tracker_ids": [np.array([what.index(p) for p in ids], dtype=int) for ids in track],
        "similarity_scores": [
            np.array(s).reshape(len(a), len(b)) for s, a, b in zip(likeness, truth, track, strict=True)
        ],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quiet = {"PRINT_CONFIG": False}
        theirs = metrics.HOTA().eval_sequence(data)
        clear = metrics.CLEAR(quiet).eval_sequence(data)
        ident = metrics.Identity(quiet).eval_sequence(data)
    ours, switches, identities = (f(truth, track, likeness) for f in (hota, id_switches, identity))
    for name in ("HOTA", "DetA", "AssA"):
        assert ours[name] == pytest.approx(float(np.mean(theirs[name])))
        assert ours[f"{name}_at"] == pytest.approx(theirs[name])
    for name in ("IDF1", "IDP", "IDR", "IDTP", "IDFN", "IDFP"):
        assert identities[name] == pytest.approx(float(ident[name]))
    assert (switches["idsw"], switches["matches"]) == (clear["IDSW"], clear["CLR_TP"])
    assert switches["mota"] == pytest.approx(float(clear["MOTA"]))


def test_with_given_boxes_hota_is_the_root_of_assa() -> None:
    """Identity 0 is tracked by 5 for 3 frames and by 6 for 1; identity 1 by 6 for 3 frames and by 5 for 1."""
    made = oracle([[0, 1]] * 4, [[5, 6], [5, 6], [5, 6], [6, 5]])
    found = hota(*made)
    expected = (6 * 3 / (4 + 4 - 3) + 2 * 1 / (4 + 4 - 1)) / 8
    assert found["deta"] == 1
    assert found["assa"] == pytest.approx(expected)
    assert found["hota"] == pytest.approx(math.sqrt(expected))
    assert identity(*made)["idf1"] == pytest.approx(2 * 6 / 16)
    assert id_switches(*made)["idsw"] == 2
    assert id_switches(*made)["idsw_per_100"] == pytest.approx(25)
    assert association_accuracy(*made)["accuracy"] == pytest.approx(4 / 6)


def test_a_switch_counts_over_any_gap_and_reid_by_its_length() -> None:
    truth = [[0], [], [], [0], [0], *[[]] * 5, [0], *[[]] * 25, [0]]
    track = [[9], [], [], [9], [9], *[[]] * 5, [7], *[[]] * 25, [8]]
    found = association_accuracy(*oracle(truth, track))
    assert found["counts"] == {
        "accuracy": (2, 4),
        "reid": (1, 3),
        "reid_1_3": (1, 1),
        "reid_4_8": (0, 1),
        "reid_9_20": (0, 0),
        "reid_over_20": (0, 1),
    }
    assert math.isnan(found["reid_9_20"])
    assert id_switches(*oracle(truth, track))["idsw"] == 2


@given(frames=integers(1, 5), seed=seeds)
def test_renaming_changes_nothing(frames: int, seed: int) -> None:
    truth, track, likeness = video(frames, seed)
    renamed = [[1000 - 7 * g for g in ids] for ids in truth], [[3 * p - 100 for p in ids] for ids in track]
    for metric in (hota, identity, id_switches, association_accuracy):
        before, after = metric(truth, track, likeness), metric(*renamed, likeness)
        for name in before.keys() - {"counts"}:
            assert np.asarray(before[name]) == pytest.approx(np.asarray(after[name]), nan_ok=True)


@given(seed=seeds)
def test_a_perfect_tracker_scores_one_and_an_absent_one_zero(seed: int) -> None:
    truth = video(5, seed)[0] + [[10]]
    perfect = oracle(truth, [[g + 5 for g in ids] for ids in truth])
    assert hota(*perfect)["hota"] == pytest.approx(1)
    assert identity(*perfect)["idf1"] == 1
    assert id_switches(*perfect)["idsw"] == 0
    nobody = truth, [[] for _ in truth], [np.zeros((len(ids), 0)) for ids in truth]
    assert hota(*nobody)["hota"] == 0
    assert identity(*nobody)["idf1"] == 0


def test_videos_are_combined_by_their_counts() -> None:
    videos = [video(4, seed) for seed in range(5)]
    parts = [hota(*one) for one in videos]
    tp = sum(one["tp"] for one in parts)
    whole = combine_hota(parts)
    assert whole["tp"] == pytest.approx(tp)
    weighted = sum(one["assa_at"] * one["tp"] for one in parts) / np.maximum(tp, 1)
    assert whole["assa"] == pytest.approx(weighted.mean())
    assert combine_switches([id_switches(*one) for one in videos])["idsw"] == sum(
        id_switches(*one)["idsw"] for one in videos
    )
    assert combine_identity([identity(*videos[0])])["idf1"] == identity(*videos[0])["idf1"]
    both = combine_accuracy([association_accuracy(*one) for one in videos])["counts"]["reid"]
    assert both[1] == sum(association_accuracy(*one)["counts"]["reid"][1] for one in videos)


def test_an_empty_video_scores_zero_and_breaks_nothing() -> None:
    for empty in (([], [], []), ([[]], [[]], [[]])):
        assert hota(*empty)["hota"] == 0
        assert identity(*empty)["idf1"] == 0
        assert id_switches(*empty)["idsw_per_100"] == 0
        assert math.isnan(association_accuracy(*empty)["accuracy"])


def test_lists_that_do_not_fit_are_refused_with_the_frame() -> None:
    with pytest.raises(BadData, match="2 frames of identities, 1 of tracks"):
        hota([[0], [0]], [[0]], [[[1.0]]])
    with pytest.raises(BadData, match="frame 1 has 1 identities and 2 tracks"):
        hota([[0], [0]], [[0], [0, 1]], [[[1.0]], [[1.0]]])
    with pytest.raises(BadData, match="frame 0 names an identity twice"):
        hota([[0, 0]], [[1]], [[[1.0], [0.0]]])
    with pytest.raises(KeyError):
        hota([[0]], [[0]], [[[1.0]]])["idf1"]


def test_recovery_asks_for_the_id_before_the_swap() -> None:
    ids = np.array([[0, 1], [0, 1], [1, 0], [1, 1], [1, 0], [0, 2]])
    whose = np.array([[7, 8]] * 6)
    swapped = np.zeros((6, 2), dtype=bool)
    swapped[2] = True
    assert recovered(ids, whose, swapped) == (2, 2)  # 7 gets 0 back in frame 5, 8 gets 1 back in frame 3
    assert recovered(ids, whose, swapped, within=2) == (1, 2)
    whose[3:, 0] = -1  # 7 does not show again
    assert recovered(ids, whose, swapped) == (1, 1)
    assert recovered(ids, whose, np.zeros((6, 2), dtype=bool)) == (0, 0)


# video AP


def square(size: int, place: int = 0, side: int = 20) -> np.ndarray:
    mask = np.zeros((side, side), dtype=bool)
    mask[place : place + size, place : place + size] = True
    return mask


def tube(video_id: int, masks: list[Any], category: int = 1, **more: float) -> dict[str, Any]:
    return {"video_id": video_id, "category_id": category, "segmentations": masks, **more}


def test_tube_iou_counts_frames_in_which_only_one_exists() -> None:
    a, b = square(4), square(2)
    assert tube_iou([a, None], [b, None]) == pytest.approx(4 / 16)
    assert tube_iou([a, a], [a, None]) == pytest.approx(1 / 2)
    assert tube_iou([None, None], [None, None]) == 0
    with pytest.raises(BadData, match="one tube has 1 frames and the other 2"):
        tube_iou([a], [a, a])


def test_video_ap_worked_by_hand() -> None:
    """Two true tubes; the best prediction is right, the second is false, the third overlaps by 0.64."""
    truth = [tube(0, [square(10), None]), tube(1, [square(10), square(10)])]
    claims = [
        tube(0, [square(10), None], score=0.9),
        tube(1, [None, square(3, 15)], score=0.8),
        tube(1, [square(8), square(8)], score=0.7),
    ]
    found = video_ap(truth, claims)
    low = (51 * 1 + 50 * 2 / 3) / 101  # recall 0.5 at precision 1, recall 1 at precision 2/3
    high = 51 / 101
    assert found["ap50"] == pytest.approx(low)
    assert found["ap75"] == pytest.approx(high)
    assert found["ap"] == pytest.approx((3 * low + 7 * high) / 10)
    assert found["ar10"] == pytest.approx((3 * 1 + 7 * 0.5) / 10)
    assert found["ar1"] == pytest.approx(0.5)  # in the second video only the false one counts
    assert found["ap_small"] == pytest.approx(found["ap"])
    assert math.isnan(found["ap_large"])


def test_video_ap_without_predictions_is_zero_and_without_truth_nothing() -> None:
    assert video_ap([tube(0, [square(3)])], [])["ap"] == 0
    assert math.isnan(video_ap([], [tube(0, [square(3)], score=1.0)])["ap"])
    other = video_ap([tube(0, [square(3)])], [tube(0, [square(3)], category=2, score=1.0)])
    assert other["ap"] == 0


@settings(max_examples=15)
@given(seed=seeds)
def test_on_single_frames_video_ap_equals_the_image_ap_of_pycocotools(seed: int) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="pip install 'cl-sim[vis]'")
    from pycocotools import mask as rle
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(seed)

    def some(count: int) -> list[dict[str, Any]]:
        made = []
        for _ in range(count):
            size, place = rng.integers(2, 14), rng.integers(0, 5)
            made.append(tube(int(rng.integers(1, 4)), [square(size, place)], int(rng.integers(1, 3))))
        return made

    truth = some(6)
    claims = [{**one, "score": float(rng.choice([0.3, 0.5, rng.random()]))} for one in some(9)]
    packed = [
        {
            "id": k + 1,
            "image_id": one["video_id"],
            "category_id": one["category_id"],
            "segmentation": rle.encode(np.asfortranarray(one["segmentations"][0].astype(np.uint8))),
            "area": float(one["segmentations"][0].sum()),
            "iscrowd": 0,
            "bbox": [0, 0, 1, 1],
            **({"score": one["score"]} if "score" in one else {}),
        }
        for k, one in enumerate(truth + claims)
    ]
    gt, dt = coco.COCO(), coco.COCO()
    gt.dataset = {
        "images": [{"id": k, "height": 20, "width": 20} for k in (1, 2, 3)],
        "categories": [{"id": k} for k in (1, 2)],
        "annotations": packed[:6],
    }
    dt.dataset = {**gt.dataset, "annotations": packed[6:]}
    gt.createIndex()
    dt.createIndex()
    judge = COCOeval(gt, dt, "segm")
    judge.params.maxDets = [1, 10, 100]
    judge.params.areaRng = [[0, 1e10], [0, 60], [60, 100], [100, 1e10]]
    judge.evaluate()
    judge.accumulate()
    precision, recall = judge.eval["precision"], judge.eval["recall"]

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else math.nan

    with pytest.MonkeyPatch.context() as patch:
        limits = {"small": (0, 60), "medium": (60, 100), "large": (100, 1e10)}
        patch.setattr("cl_sim.metrics.association.AREAS", limits)
        found = video_ap(truth, claims)
    expected = {
        "ap": mean(precision[:, :, :, 0, 2]),
        "ap50": mean(precision[0, :, :, 0, 2]),
        "ap75": mean(precision[5, :, :, 0, 2]),
        "ar1": mean(recall[:, :, 0, 0]),
        "ar10": mean(recall[:, :, 0, 1]),
        "ap_small": mean(precision[:, :, :, 1, 2]),
        "ap_medium": mean(precision[:, :, :, 2, 2]),
        "ap_large": mean(precision[:, :, :, 3, 2]),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
