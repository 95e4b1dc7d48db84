"""How well instances are associated over frames: HOTA, IDF1, identity switches, association accuracy, ReID, video AP.

All but `video_ap` take lists with an entry per frame of one video: the identities that are there, the tracks that are claimed,
and the similarity of every identity to every track [identities, tracks] (IoU of masks or boxes, in [0, 1]). No identity and no
track comes twice in a frame.
Source: Luiten et al. 2021, "HOTA: A Higher Order Metric for Evaluating Multi-Object Tracking"; Ristani et al. 2016, "Performance
Measures and a Data Set for Multi-Target, Multi-Camera Tracking" (IDF1); Bernardin and Stiefelhagen 2008, "Evaluating Multiple
Object Tracking Performance: The CLEAR MOT Metrics" (switches); Yang et al. 2019, "Video Instance Segmentation" (video AP).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cl_sim.errors import BadData

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ALPHAS: Floats = np.arange(1, 20) / 20  # 0.05, 0.10, ..., 0.95
HALF = 0.5  # similarity from which an identity counts as found
CONTINUES = 1000.0  # what a match of the frame before is worth, against similarities up to 1
EPS = float(np.finfo(np.float64).eps)
GAPS = {"1_3": (1, 3), "4_8": (4, 8), "9_20": (9, 20), "over_20": (21, math.inf)}  # frames unseen
RECALLS: Floats = np.linspace(0, 1, 101)
AREAS = {"small": (0.0, 128.0**2), "medium": (128.0**2, 256.0**2), "large": (256.0**2, math.inf)}  # pixels
MOST = 100  # predictions that count per video and class


class Scores(dict[str, Any]):
    """Results by name in small letters; the spelling of the literature (AssA, IDF1) finds them too."""

    def __missing__(self, name: str) -> Any:
        if name.lower() in self:
            return self[name.lower()]
        raise KeyError(name)


class Video(NamedTuple):
    """A checked video with identities and tracks numbered from 0.

    Shapes: per frame truth [n], track [m], similarity [n, m]; seen [identities] and claimed [tracks], how often they come.
    """

    truth: list[Ints]
    track: list[Ints]
    similarity: list[Floats]
    seen: Ints
    claimed: Ints


def read(truth_ids: Sequence[ArrayLike], track_ids: Sequence[ArrayLike], similarity: Sequence[ArrayLike]) -> Video:
    """The video behind three lists.    Raises: BadData naming the frame where they do not fit."""
    if not len(truth_ids) == len(track_ids) == len(similarity):
        raise BadData(
            f"there are {len(truth_ids)} frames of identities, {len(track_ids)} of tracks and {len(similarity)} of "
            "similarities; give as many of each"
        )
    truth = [np.asarray(ids, dtype=np.int64).reshape(-1) for ids in truth_ids]
    track = [np.asarray(ids, dtype=np.int64).reshape(-1) for ids in track_ids]
    likeness = []
    for t, (own, other, given) in enumerate(zip(truth, track, similarity, strict=True)):
        table = np.asarray(given, dtype=np.float64)
        if table.size != len(own) * len(other):
            raise BadData(
                f"frame {t} has {len(own)} identities and {len(other)} tracks, but similarities {table.shape}"
            )
        for ids, what in ((own, "identity"), (other, "track")):
            if len(np.unique(ids)) < len(ids):
                raise BadData(f"frame {t} names an {what} twice: {ids.tolist()}")
        likeness.append(table.reshape(len(own), len(other)))
    numbered, seen = zip(*(_numbered(ids) for ids in (truth, track)), strict=True)
    return Video(numbered[0], numbered[1], likeness, seen[0], seen[1])


def _numbered(frames: list[Ints]) -> tuple[list[Ints], Ints]:
    _, place, counts = np.unique(
        np.concatenate([*frames, np.zeros(0, np.int64)]), return_inverse=True, return_counts=True
    )
    ends = np.cumsum([len(ids) for ids in frames])[:-1]
    return (np.split(place.reshape(-1), ends) if frames else []), counts.astype(np.int64)


def _assign(gain: Floats) -> tuple[Ints, Ints]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-gain)
    return rows, columns


def hota(truth_ids: Sequence[ArrayLike], track_ids: Sequence[ArrayLike], similarity: Sequence[ArrayLike]) -> Scores:
    """HOTA, DetA and AssA of one video: means over 19 thresholds, and the counts that `combine_hota` adds.

    Shapes: lists per frame -> hota, deta, assa; tp, fn, fp, hota_at, deta_at, assa_at [19].    Raises: BadData.
    """
    video = read(truth_ids, track_ids, similarity)
    aligned = np.zeros((len(video.seen), len(video.claimed)))
    for own, other, s in zip(video.truth, video.track, video.similarity, strict=True):
        whole = s.sum(0, keepdims=True) + s.sum(1, keepdims=True) - s
        aligned[own[:, None], other] += np.divide(s, whole, out=np.zeros_like(s), where=whole > EPS)
    alignment = aligned / np.maximum(video.seen[:, None] + video.claimed - aligned, EPS)
    matches = np.zeros((len(ALPHAS), *aligned.shape))
    for own, other, s in zip(video.truth, video.track, video.similarity, strict=True):
        rows, columns = _assign(alignment[own[:, None], other] * s)
        hit = s[rows, columns] >= ALPHAS[:, None] - EPS  # [19, pairs]
        matches[:, own[rows], other[columns]] += hit
    tp = matches.sum((1, 2))
    ever = np.maximum(video.seen[:, None] + video.claimed - matches, 1)
    assa = (matches * (matches / ever)).sum((1, 2)) / np.maximum(tp, 1)
    return _hota_of(tp, video.seen.sum() - tp, video.claimed.sum() - tp, assa)


def combine_hota(results: Iterable[Mapping[str, Any]]) -> Scores:
    """HOTA of several videos: detections are added up, AssA is averaged with the number of true positives as weight."""
    found = list(results)
    tp, fn, fp = (sum((one[key] for one in found), np.zeros(len(ALPHAS))) for key in ("tp", "fn", "fp"))
    weighted = sum((one["assa_at"] * one["tp"] for one in found), np.zeros(len(ALPHAS)))
    return _hota_of(tp, fn, fp, weighted / np.maximum(tp, 1))


def _hota_of(tp: Floats, fn: Floats, fp: Floats, assa: Floats) -> Scores:
    deta = tp / np.maximum(tp + fn + fp, 1)
    at = {"hota_at": np.sqrt(deta * assa), "deta_at": deta, "assa_at": assa}
    means = {name.removesuffix("_at"): float(values.mean()) for name, values in at.items()}
    return Scores(**means, **at, tp=tp, fn=fn, fp=fp)


def identity(truth_ids: Sequence[ArrayLike], track_ids: Sequence[ArrayLike], similarity: Sequence[ArrayLike]) -> Scores:
    """IDF1, IDP and IDR of one video: one track for each identity, chosen for most frames with similarity 0.5 or more.

    Shapes: lists per frame -> idf1, idp, idr, idtp, idfn, idfp.    Raises: BadData.
    """
    video = read(truth_ids, track_ids, similarity)
    together = np.zeros((len(video.seen), len(video.claimed)))
    for own, other, s in zip(video.truth, video.track, video.similarity, strict=True):
        together[own[:, None], other] += s >= HALF
    rows, columns = _assign(together)
    idtp = int(together[rows, columns].sum())
    return _identity_of(idtp, int(video.seen.sum()) - idtp, int(video.claimed.sum()) - idtp)


def combine_identity(results: Iterable[Mapping[str, Any]]) -> Scores:
    """IDF1 of several videos: the counts are added up."""
    found = list(results)
    return _identity_of(*(sum(one[key] for one in found) for key in ("idtp", "idfn", "idfp")))


def _identity_of(idtp: int, idfn: int, idfp: int) -> Scores:
    return Scores(
        idf1=2 * idtp / max(2 * idtp + idfn + idfp, 1),
        idp=idtp / max(idtp + idfp, 1),
        idr=idtp / max(idtp + idfn, 1),
        idtp=idtp,
        idfn=idfn,
        idfp=idfp,
    )


def matched(video: Video) -> list[tuple[Ints, Ints]]:
    """Frame by frame the identities and the tracks that are matched, at similarity 0.5 or more.

    Pairs of the frame before come first, then the larger similarity. Frames without identities or without tracks are passed
    over, as the packages do: the frame before is the last one in which both were there.
    """
    before = np.full(len(video.seen), -1)
    pairs = []
    for own, other, s in zip(video.truth, video.track, video.similarity, strict=True):
        gain = np.where(s >= HALF - EPS, CONTINUES * (before[own][:, None] == other) + s, 0)
        rows, columns = _assign(gain)
        kept = gain[rows, columns] > EPS
        found = own[rows[kept]], other[columns[kept]]
        if s.size:
            before[:] = -1
            before[found[0]] = found[1]
        pairs.append(found)
    return pairs


def id_switches(
    truth_ids: Sequence[ArrayLike], track_ids: Sequence[ArrayLike], similarity: Sequence[ArrayLike]
) -> Scores:
    """Matched identities whose track differs from that of their last match, however many frames ago.

    Shapes: lists per frame -> idsw, matches, idsw_per_100 (of matched observations), fn, fp, mota.    Raises: BadData.
    """
    video = read(truth_ids, track_ids, similarity)
    latest = np.full(len(video.seen), -1)
    switches = matches = 0
    for own, other in matched(video):
        known = latest[own] >= 0
        switches += int((known & (latest[own] != other)).sum())
        matches += len(own)
        latest[own] = other
    return _switches_of(switches, matches, int(video.seen.sum()) - matches, int(video.claimed.sum()) - matches)


def combine_switches(results: Iterable[Mapping[str, Any]]) -> Scores:
    """Switches of several videos: the counts are added up."""
    found = list(results)
    return _switches_of(*(sum(one[key] for one in found) for key in ("idsw", "matches", "fn", "fp")))


def _switches_of(idsw: int, matches: int, fn: int, fp: int) -> Scores:
    return Scores(
        idsw=idsw,
        matches=matches,
        idsw_per_100=100 * idsw / max(matches, 1),
        fn=fn,
        fp=fp,
        mota=(matches - fp - idsw) / max(matches + fn, 1),
    )


def association_accuracy(
    truth_ids: Sequence[ArrayLike], track_ids: Sequence[ArrayLike], similarity: Sequence[ArrayLike]
) -> Scores:
    """Share of the matched observations of known identities whose track is that of the match before; and after a gap (ReID).

    Shapes: lists per frame -> accuracy, reid, reid_1_3, reid_4_8, reid_9_20, reid_over_20 (NaN: none such), and under
    `counts` the pairs (right, all) of each.    Units: gaps in frames without a match.
    Source: ours.    Raises: BadData.
    """
    video = read(truth_ids, track_ids, similarity)
    latest, when = np.full(len(video.seen), -1), np.full(len(video.seen), -1)
    counts: dict[str, tuple[int, int]] = dict.fromkeys(["accuracy", "reid", *(f"reid_{name}" for name in GAPS)], (0, 0))
    for t, (own, other) in enumerate(matched(video)):
        for who, track in zip(own, other, strict=True):
            if when[who] >= 0:
                gap = int(t - when[who] - 1)
                names = ["accuracy"] + ["reid"] * (gap > 0)
                names += [f"reid_{name}" for name, (low, high) in GAPS.items() if low <= gap <= high]
                for name in names:
                    right, every = counts[name]
                    counts[name] = (right + int(latest[who] == track), every + 1)
        latest[own], when[own] = other, t
    return _shares_of(counts)


def combine_accuracy(results: Iterable[Mapping[str, Any]]) -> Scores:
    """Association accuracy and ReID of several videos: the counts are added up."""
    whole: dict[str, tuple[int, int]] = {}
    for one in results:
        for name, (right, every) in one["counts"].items():
            before = whole.get(name, (0, 0))
            whole[name] = (before[0] + right, before[1] + every)
    return _shares_of(whole)


def _shares_of(counts: Mapping[str, tuple[int, int]]) -> Scores:
    shares = {name: right / every if every else math.nan for name, (right, every) in counts.items()}
    return Scores(**shares, counts=dict(counts))


def recovered(ids: ArrayLike, instances: ArrayLike, swapped: ArrayLike, within: int = 10) -> tuple[int, int]:
    """Of the identities whose ids were exchanged by force, how many got their own id back within so many frames, and of how many.

    Identities that do not show in these frames do not count.

    Shapes: ids and instances [T, N] (-1: none), swapped [T, N] bool -> right, all.    Source: ours.
    """
    tracks, whose, forced = np.asarray(ids), np.asarray(instances), np.asarray(swapped)
    right = every = 0
    for t, row in np.argwhere(forced):
        own = whose == whose[t, row]
        before = [track for at in range(t) for track in tracks[at][own[at]] if track >= 0]
        after = [track for at in range(t + 1, min(t + 1 + within, len(tracks))) for track in tracks[at][own[at]]]
        if whose[t, row] >= 0 and before and after:
            every += 1
            right += before[-1] in after
    return right, every


def tube_iou(one: Sequence[ArrayLike | None], other: Sequence[ArrayLike | None]) -> float:
    """Intersection over union of two mask tubes, summed over all frames; None is a frame without a mask. 0 if both are empty.

    Shapes: T masks [H, W] each.    Raises: BadData for tubes of different length.
    """
    if len(one) != len(other):
        raise BadData(f"one tube has {len(one)} frames and the other {len(other)}; give None for frames without a mask")
    both = union = 0
    for a, b in zip(one, other, strict=True):
        first = None if a is None else np.asarray(a, dtype=np.bool_)
        second = None if b is None else np.asarray(b, dtype=np.bool_)
        if first is None or second is None:
            union += sum(int(mask.sum()) for mask in (first, second) if mask is not None)
        else:
            both += int((first & second).sum())
            union += int((first | second).sum())
    return both / union if union else 0.0


def video_ap(truth: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> Scores:
    """Average precision of mask tubes over thresholds 0.50, 0.55, ..., 0.95, recalls and classes, as YouTube-VIS defines it.

    Both lists hold tubes with the keys of its files: video_id, category_id, segmentations (a mask [H, W] or None per frame), and
    predictions a score. At most 100 predictions per video and class count. Without truth of a kind the result is NaN.

    Shapes: -> ap, ap50, ap75, ar1, ar10 (recall with at most 1 or 10 predictions per video and class), ap_small, ap_medium and
    ap_large (by the mean area of a tube over its frames; limits 128^2 and 256^2 pixels).
    """
    tables = _tables(truth, predictions)
    by_area = {name: _precision(tables, MOST, limits)[0] for name, limits in AREAS.items()}
    precision, _ = _precision(tables, MOST)
    first, ten = (_precision(tables, most)[1] for most in (1, 10))
    return Scores(
        ap=_mean(precision),
        ap50=_mean(precision[:, 0]),
        ap75=_mean(precision[:, 5]),
        ar1=_mean(first),
        ar10=_mean(ten),
        **{f"ap_{name}": _mean(values) for name, values in by_area.items()},
    )


class Table(NamedTuple):
    """One class in one video, predictions by falling score.    Shapes: scores [P], iou [P, G], areas [P] and [G]."""

    scores: Floats
    iou: Floats
    areas: Floats
    true_areas: Floats


def _tables(truth: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> dict[Any, list[Table]]:
    """The tables of every class that has truth, one per video."""
    groups: dict[Any, tuple[list[Any], list[Any]]] = defaultdict(lambda: ([], []))
    for place, tubes in enumerate((truth, predictions)):
        for tube in tubes:
            groups[tube["category_id"], tube["video_id"]][place].append(tube)
    known = {tube["category_id"] for tube in truth}
    tables: dict[Any, list[Table]] = defaultdict(list)
    for (category, _), (true, claimed) in sorted(groups.items(), key=lambda item: item[0][1]):  # ties go by video
        if category in known:
            best = sorted(claimed, key=lambda tube: -tube["score"])[:MOST]
            iou = [[tube_iou(a["segmentations"], b["segmentations"]) for b in true] for a in best]
            tables[category].append(
                Table(
                    np.array([tube["score"] for tube in best], dtype=np.float64),
                    np.array(iou, dtype=np.float64).reshape(len(best), len(true)),
                    np.array([_area(tube["segmentations"]) for tube in best]),
                    np.array([_area(tube["segmentations"]) for tube in true]),
                )
            )
    return tables


def _area(tube: Sequence[ArrayLike | None]) -> float:
    """Mean area over the frames in which the tube exists."""
    areas = [float(np.asarray(mask).astype(np.bool_).sum()) for mask in tube if mask is not None]
    return sum(areas) / len(areas) if areas else 0.0


def _precision(
    tables: Mapping[Any, list[Table]], most: int, limits: tuple[float, float] = (0.0, math.inf)
) -> tuple[Floats, Floats]:
    """Precision at 101 recalls and the final recall, of each class and threshold; NaN without truth.

    Shapes: -> [K, 10, 101], [K, 10].
    """
    thresholds: Floats = np.arange(10, dtype=np.float64) * 0.05 + 0.5
    precision = np.full((len(tables), 10, len(RECALLS)), np.nan)
    recall = np.full((len(tables), 10), np.nan)
    for k, videos in enumerate(tables.values()):
        parts = [_matches(video, thresholds, most, limits) for video in videos]
        positives = sum(count for _, _, _, count in parts)
        if not positives:
            continue
        scores = np.concatenate([scores for scores, _, _, _ in parts])
        order = np.argsort(-scores, kind="stable")
        hit = np.concatenate([hit for _, hit, _, _ in parts], 1)[:, order]
        left_out = np.concatenate([left_out for _, _, left_out, _ in parts], 1)[:, order]
        for i in range(10):
            tp = np.cumsum(hit[i] & ~left_out[i])
            fp = np.cumsum(~hit[i] & ~left_out[i])
            reached = tp / positives
            exact = np.maximum.accumulate((tp / np.maximum(tp + fp, EPS))[::-1])[::-1]  # monotone from the right
            place = np.searchsorted(reached, RECALLS, side="left")
            padded = np.concatenate([exact, np.zeros(1)])
            precision[k, i] = padded[np.minimum(place, len(exact))]
            recall[k, i] = reached[-1] if len(reached) else 0.0
    return precision, recall


def _matches(
    table: Table, thresholds: Floats, most: int, limits: tuple[float, float]
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_], int]:
    """Who takes which true tube, best score first; tubes outside the limits are left out of the count, not matched against.

    Shapes: -> scores [P], hit and left out [10, P], the number of true tubes that count.
    """
    low, high = limits
    aside = (table.true_areas < low) | (table.true_areas > high)  # [G]
    size = min(most, len(table.scores))
    hit, left_out = np.zeros((2, len(thresholds), size), dtype=np.bool_)
    outside = (table.areas < low) | (table.areas > high)
    for i, threshold in enumerate(thresholds):
        free = np.ones(len(aside), dtype=np.bool_)
        for p in range(size):
            for group in (~aside, aside):  # tubes that count come first
                able = np.flatnonzero(free & group & (table.iou[p] >= min(threshold, 1 - 1e-10)))
                if len(able):
                    best = able[np.flatnonzero(table.iou[p][able] == table.iou[p][able].max())[-1]]
                    free[best], hit[i, p], left_out[i, p] = False, True, aside[best]
                    break
            else:
                left_out[i, p] = outside[p]
    return table.scores[:size], hit, left_out, int((~aside).sum())


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
