"""Annotated videos: files in the format of YouTube-VIS and OVIS, and results for their evaluation servers.

A file holds `videos` (id, width, height, file_names), `categories` (id, name) and `annotations` (one per track: id, video_id,
category_id, and per frame `segmentations` and `bboxes`, null where the instance is not seen). Test files have no annotations.

Source: Yang et al. 2019, "Video Instance Segmentation", for the format.
Departures: boxes are those of the masks; of a written box only counts whether there is one.
"""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_sim import rle
from cl_sim.errors import BadData
from cl_sim.rle import Mask

RESULTS = "results.json"  # the name the servers expect inside the archive


@dataclass(frozen=True, eq=False)
class Track:
    """One instance of a video: its class (numbered from 0), and per frame its mask as written, or None."""

    id: int
    label: int
    written: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of a video, and its instances if they are annotated."""

    id: int
    height: int
    width: int
    files: tuple[str, ...]
    tracks: tuple[Track, ...]


@dataclass(frozen=True)
class Annotations:
    """A file of annotated videos.

    Classes are numbered 0 to K - 1 in the order of their ids in the file, which may have gaps.
    """

    path: Path
    videos: tuple[Video, ...]
    categories: tuple[int, ...]  # id of each class in the file
    names: tuple[str, ...]
    annotated: bool

    def mask(self, video: Video, track: Track, frame: int) -> Mask | None:
        """The mask of an instance in a frame; None where it is not seen.    Raises: BadData naming file, track and frame."""
        written = track.written[frame]
        if written is None:
            return None
        try:
            mask = rle.decode(written, video.height, video.width)
        except BadData as error:
            raise BadData(f"{self.path}, annotation {track.id}, frame {frame}: {error}") from None
        return mask if mask.any() else None


def read(path: Path) -> Annotations:
    """A file of annotated videos.    Raises: BadData naming the file and what is wrong in it."""
    content = _content(path)
    categories = _listed(content, "categories", path)
    ids = sorted(_field(one, "id", int, f"{path}, category {n}") for n, one in enumerate(categories))
    names = {one["id"]: str(one.get("name", one["id"])) for one in categories}
    if len(names) < len(ids):
        raise BadData(f"{path}: category {_repeated(ids)} is listed twice")
    plain = [_video(one, f"{path}, video {n}") for n, one in enumerate(_listed(content, "videos", path))]
    by_id = {video.id: video for video in plain}
    if not plain:
        raise BadData(f"{path} lists no video")
    if len(by_id) < len(plain):
        raise BadData(f"{path}: video {_repeated([video.id for video in plain])} is listed twice")
    annotated = content.get("annotations") is not None
    tracks: dict[int, list[Track]] = defaultdict(list)
    known = set[int]()
    for number, one in enumerate(_listed(content, "annotations", path) if annotated else []):
        where = f"{path}, annotation {one.get('id', f'in place {number}') if isinstance(one, dict) else number}"
        found = _track(one, by_id, ids, where)
        if found.id in known:
            raise BadData(f"{where}: there are two of that id")
        known.add(found.id)
        if not one.get("iscrowd"):
            tracks[one["video_id"]].append(found)
    videos = tuple(Video(v.id, v.height, v.width, v.files, tuple(tracks[v.id])) for v in plain)
    return Annotations(path, videos, tuple(ids), tuple(names[one] for one in ids), annotated)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadData(f"there is no annotation file {path}") from None
    except (OSError, ValueError) as error:
        raise BadData(f"{path} cannot be read as JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise BadData(f"{path} holds a {type(content).__name__}; it must be an object with videos and categories")
    return content


def _listed(content: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    found = content.get(key)
    if not isinstance(found, list):
        there = ", ".join(content) or "nothing"
        raise BadData(f"{path} has no list '{key}' (it has {there}); see the format of YouTube-VIS")
    return found


def _field(one: Any, key: str, kind: type, where: str) -> Any:
    value = one.get(key) if isinstance(one, dict) else None
    if type(value) is not kind:
        words = {int: "a whole number", list: "a list"}[kind]
        raise BadData(f"{where}: '{key}' must be {words}, it is {rle.short(value)}")
    return value


def _video(one: Any, where: str) -> Video:
    height, width = _field(one, "height", int, where), _field(one, "width", int, where)
    files = _field(one, "file_names", list, where)
    if min(height, width) < 1 or not files or not all(isinstance(file, str) for file in files):
        raise BadData(f"{where}: it needs a height, a width and the names of one or more files")
    return Video(_field(one, "id", int, where), height, width, tuple(files), ())


def _track(one: Any, videos: Mapping[int, Video], categories: Sequence[int], where: str) -> Track:
    video, category = _field(one, "video_id", int, where), _field(one, "category_id", int, where)
    if video not in videos:
        raise BadData(f"{where}: video_id is {video}, but there is no such video")
    if category not in categories:
        raise BadData(f"{where}: category_id is {category}, but the categories are {', '.join(map(str, categories))}")
    masks = _field(one, "segmentations", list, where)
    boxes = one.get("bboxes")
    boxes = masks if boxes is None else boxes
    for key, given in (("segmentations", masks), ("bboxes", boxes)):
        if not isinstance(given, list) or len(given) != len(videos[video].files):
            count = len(given) if isinstance(given, list) else "no"
            raise BadData(f"{where}: {count} {key} for a video of {len(videos[video].files)} frames")
    seen = tuple(None if box is None else mask for mask, box in zip(masks, boxes, strict=True))
    return Track(_field(one, "id", int, where), categories.index(category), seen)


def _repeated(ids: Iterable[int]) -> int:
    seen = set[int]()
    return next(one for one in ids if one in seen or seen.add(one))  # type: ignore[func-returns-value]


# --- results ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Result:
    """A predicted track: class (numbered from 0), score, and a mask per frame of the video, None where it is not seen."""

    video_id: int
    label: int
    score: float
    masks: tuple[Mask | None, ...]


def write_results(path: Path, results: Iterable[Result], truth: Annotations) -> Path:
    """Write an archive that the evaluation servers of YouTube-VIS and OVIS take; masks in the size of the video.

    Raises: BadData for a track that does not fit its video.
    """
    by_id = {video.id: video for video in truth.videos}
    written = []
    for number, one in enumerate(results):
        _check_result(one, by_id, truth, f"result {number}")
        masks = [None if mask is None or not mask.any() else rle.encode(mask) for mask in one.masks]
        written.append(
            {
                "video_id": one.video_id,
                "category_id": truth.categories[one.label],
                "score": float(one.score),
                "segmentations": masks,
            }
        )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo(RESULTS), json.dumps(written), zipfile.ZIP_DEFLATED)
    return path


def _check_result(one: Result, videos: Mapping[int, Video], truth: Annotations, where: str) -> None:
    if one.video_id not in videos:
        raise BadData(f"{where}: {truth.path} has no video {one.video_id}")
    video = videos[one.video_id]
    if not 0 <= one.label < len(truth.categories):
        raise BadData(f"{where}: class {one.label} is not one of 0 to {len(truth.categories) - 1}")
    if len(one.masks) != len(video.files):
        raise BadData(f"{where}: {len(one.masks)} masks for video {video.id} of {len(video.files)} frames")
    if not np.isfinite(one.score):
        raise BadData(f"{where}: the score is {one.score}")
    for frame, mask in enumerate(one.masks):
        if mask is not None and mask.shape != (video.height, video.width):
            raise BadData(
                f"{where}, frame {frame}: the mask is {list(mask.shape)}, the video {[video.height, video.width]}"
            )


def read_results(path: Path, truth: Annotations) -> list[Result]:
    """Results from an archive, or from a plain JSON file, of tracks in the videos of a file.    Raises: BadData."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = json.loads(archive.read(RESULTS))
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, KeyError, ValueError) as error:
        raise BadData(f"{path} holds no {RESULTS}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, list):
        raise BadData(f"{path}: results are a list of tracks, not a {type(content).__name__}")
    by_id = {video.id: video for video in truth.videos}
    results = []
    for number, one in enumerate(content):
        where = f"{path}, result {number}"
        track = _track({"id": number, **one} if isinstance(one, dict) else one, by_id, truth.categories, where)
        score = one.get("score")
        if not isinstance(score, int | float):
            raise BadData(f"{where}: the score is {rle.short(score)}; it must be a number")
        video = by_id[one["video_id"]]
        masks = []
        for frame, mask in enumerate(track.written):
            try:
                masks.append(None if mask is None else rle.decode(mask, video.height, video.width))
            except BadData as error:
                raise BadData(f"{where}, frame {frame}: {error}") from None
        results.append(Result(video.id, track.label, float(score), tuple(masks)))
    return results


def true_results(truth: Annotations) -> list[Result]:
    """The annotations as results of score 1: what a perfect tracker would send in."""
    return [
        Result(video.id, track.label, 1.0, tuple(truth.mask(video, track, t) for t in range(len(video.files))))
        for video in truth.videos
        for track in video.tracks
    ]
