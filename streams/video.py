"""Annotated videos: YouTube-VIS, OVIS, or any files of their format, as training clips and whole test videos.

A training clip is a frame of a video and others near it, in order; or, of an annotated still, what a moving camera sees of it.
Every video gives `per_video` clips, every still `per_still`, in one shuffled order. Tests show whole videos. Instances have a
row each in all frames, rows of background follow.

Source: Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", for the choice of frames and the
pseudo-videos, as released.
Departures: pictures are fitted into one size and filled up with black, instead of a size drawn per clip; stills and videos are
mixed by how many clips each gives instead of by chance, so that each comes as often as is said; see also `cl_sim.stills`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim import boxes, stills
from cl_sim.annotations import Annotations, Video, read
from cl_sim.config import at_least, within
from cl_sim.errors import BadConfig, BadData
from cl_sim.rng import Rng, derive, host_rng
from cl_sim.sources import data_folders
from cl_sim.types import Batch, Field

HELD_OUT = 5  # every fifth video is a test video, where no test file is annotated
KEPT = 256  # decoded frames
FRAMES = ("JPEGImages", "train/JPEGImages", "valid/JPEGImages", "test/JPEGImages", "train", "valid", "test", ".")


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """Settings of the stream of annotated videos."""

    data: str = "davis_vis"  # a folder under --data DIR, or folder:PATH
    train: str = "instances_train.json"  # annotations of the training videos, in that folder
    test: str = "instances_valid.json"  # of the test videos; empty or not annotated: every fifth training video
    stills: str = ""  # of annotated stills (videos of one frame) to make clips of
    per_video: int = 5  # clips of every training video
    per_still: int = 0  # clips of every still
    batch: int = 1  # clips per step
    frames: int = 10  # per clip
    reach: int = 20  # frames of a clip are at most so far from its centre
    height: int = 180  # pixels of a frame
    width: int = 320
    background: int = 4  # boxes per frame that show no instance
    crop: float = 0.5  # probability of a window in a training clip (of a still: one that drifts)
    flip: float = 0.5  # probability that a training clip is mirrored
    turn: float = 15.0  # degrees that the camera turns over a still, at most
    errors: float = 0.0  # a detector's errors in test videos; 1: boxes off by a pixel, 5 % missed, false, double
    subset: int = 3  # test videos of the small evaluations

    def __post_init__(self) -> None:
        at_least(self, per_video=0, per_still=0, batch=1, frames=2, reach=1, height=8, width=8, background=0)
        at_least(self, turn=0, errors=0, subset=1)
        within(self, 0, 1, "crop", "flip")
        if bool(self.stills) != bool(self.per_still):
            raise BadConfig(
                f"stream.stills is '{self.stills}' and stream.per_still {self.per_still}; give both, e.g. --set "
                "stream.stills=instances_stills.json --set stream.per_still=5, or neither"
            )


class Source:
    """Videos of one file with their frames, fitted into one size.

    Frames are looked for in the usual places, beside the file and in the folder of the set.

    Raises: BadData if the first frame is nowhere.
    """

    def __init__(self, folder: Path, name: str, cfg: VideoConfig) -> None:
        path = folder / name
        self.truth, self.height, self.width = read(path), cfg.height, cfg.width
        first = self.truth.videos[0].files[0]
        places = [base / place for base in dict.fromkeys((path.parent, folder)) for place in FRAMES]
        found = next((place for place in places if (place / first).is_file()), None)
        if found is None:
            raise BadData(f"{path} names the frame {first}, which is not in {places[0]}; put the videos' folders there")
        self.folder = found
        self.frame = lru_cache(KEPT)(self._frame)
        self.masks = lru_cache(KEPT)(self._masks)

    def size(self, video: Video) -> tuple[int, int]:
        """Height and width of a video's frames when they fit."""
        scale = min(self.height / video.height, self.width / video.width)
        return max(1, round(video.height * scale)), max(1, round(video.width * scale))

    def _frame(self, video: Video, number: int) -> Tensor:
        """A frame in the size that fits.    Shapes: -> [3, h, w] uint8."""
        from PIL import Image

        path = self.folder / video.files[number]
        try:
            with Image.open(path) as image:
                if image.size != (video.width, video.height):
                    raise BadData(
                        f"{path} has {image.width}x{image.height} pixels, but {self.truth.path} says "
                        f"{video.width}x{video.height}"
                    )
                height, width = self.size(video)
                picture = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        except OSError as error:
            raise BadData(f"{path}: this frame cannot be read ({str(error).splitlines()[0]})") from None
        return torch.from_numpy(np.array(picture)).movedim(-1, 0)

    def _masks(self, video: Video, number: int) -> Tensor:
        """The masks of a video's instances in a frame, in the size that fits.    Shapes: -> [G, h, w] bool."""
        height, width = self.size(video)
        rows = ((np.arange(height) + 0.5) * video.height / height).astype(np.int64)
        columns = ((np.arange(width) + 0.5) * video.width / width).astype(np.int64)
        masks = np.zeros((len(video.tracks), height, width), dtype=bool)
        for g, track in enumerate(video.tracks):
            mask = self.truth.mask(video, track, number)
            if mask is not None:
                masks[g] = mask[rows[:, None], columns]
        return torch.from_numpy(masks)

    def clip(self, video: Video, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Some frames and their masks.    Shapes: numbers [T] -> [T, 3, h, w] uint8, [T, G, h, w] bool."""
        chosen = [int(number) for number in numbers]
        pairs = [(self.frame(video, t), self.masks(video, t)) for t in chosen]
        return torch.stack([picture for picture, _ in pairs]), torch.stack([masks for _, masks in pairs])


class Videos:
    """Clips of annotated videos.

    Shapes: frames [R, B, T, 3, H, W]; boxes [R, B, T, Q, 4]; masks [R, B, T, Q, H, W]; instance, label, present and score
    [R, B, T, Q]; clip [R, B] is the clip's number, in tests the video's place in its file. With errors in the tests their true
    instances come too, as true_boxes, true_masks, true_instance and true_label.
    """

    Config = VideoConfig
    task = "associate"
    announces = False

    def __init__(
        self, cfg: VideoConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        self.cfg, self.seeds, self.device, self.batch_size = cfg, seeds, device, cfg.batch
        folder = find(cfg.data, data)
        self.source = Source(folder, cfg.train, cfg)
        self.still = Source(folder, cfg.stills, cfg) if cfg.stills else None
        given = Source(folder, cfg.test, cfg) if cfg.test else None
        self.silent = given is not None and not given.truth.annotated
        self.tested = self.source if given is None or self.silent else given
        for one in (self.source, self.still):
            if one is not None and not one.truth.annotated:
                raise BadData(f"{one.truth.path} has no annotations; training needs some")
        if self.tested.truth.categories != self.source.truth.categories:
            raise BadData(f"{folder / cfg.test} has other categories than {folder / cfg.train}")
        videos, held = list(self.source.truth.videos), self.tested is self.source
        self.test_videos = videos[HELD_OUT - 1 :: HELD_OUT] if held else list(self.tested.truth.videos)
        out = {video.id for video in self.test_videos} if held else set()
        clips = [(self.source, video) for video in videos if video.id not in out for _ in range(cfg.per_video)]
        if self.still is not None:
            clips += [(self.still, video) for video in self.still.truth.videos for _ in range(cfg.per_still)]
        self.origins = clips
        self.samples = len(clips) // cfg.batch * cfg.batch
        if not self.samples or not self.test_videos:
            raise BadConfig(
                f"{len(clips)} clips of {len(videos)} videos are too few; use a smaller stream.batch, or more videos"
            )
        self.rows = max(1, *(len(video.tracks) for _, video in clips))
        self.order = np.stack([host_rng(seed, "clip order").permutation(len(clips)) for seed in seeds])  # [R, N]
        self.classes, self.digest = len(self.source.truth.categories), _digest(self.source, self.tested, self.still)
        example = self.batch(0)
        self.fields: Mapping[str, Field] = {key: Field(tuple(v.shape[2:]), v.dtype) for key, v in example.items()}

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def batch(self, step: int) -> Batch:
        """The clips of one step."""
        part = self.order[:, step * self.batch_size : (step + 1) * self.batch_size]
        made = [self._clip(seed, int(number)) for seed, row in zip(self.seeds, part, strict=True) for number in row]
        keys = [derive(seed, f"train {number}") for seed, row in zip(self.seeds, part, strict=True) for number in row]
        return self._batch(made, part, keys, self.rows, 0.0)

    def _clip(self, seed: int, number: int) -> tuple[Tensor, Tensor, Video]:
        """Pictures and masks of a training clip.    Shapes: -> [T, 3, h, w], [T, G, h, w]."""
        cfg, (source, video), rng = self.cfg, self.origins[number], host_rng(seed, f"clip {number}")
        if source is self.still:
            pictures, masks = source.clip(video, np.zeros(cfg.frames, dtype=np.int64))
            return *stills.look(pictures, masks, stills.panning(rng, cfg.frames, cfg.crop, cfg.flip, cfg.turn)), video
        pictures, masks = source.clip(video, stills.around(rng, len(video.files), cfg.frames, cfg.reach))
        return *stills.look(pictures, masks, stills.fixed(rng, cfg.frames, cfg.crop, cfg.flip)), video

    def _batch(
        self,
        clips: list[tuple[Tensor, Tensor, Video]],
        numbers: NDArray[np.int64],
        keys: list[int],
        rows: int,
        errors: float,
    ) -> Batch:
        """Clips filled up to one size, with their rows; what is drawn comes from the keys.    Shapes: numbers [R, B]."""
        frames, masks, labels = (torch.stack(x) for x in zip(*(self._filled(*one, rows) for one in clips), strict=True))
        frames, masks, labels = (x.to(self.device) for x in (frames, masks, labels))
        rng = Rng.keyed(torch.tensor(keys, device=self.device))
        around = boxes.of_masks(masks)
        side = torch.full((len(clips),), max(masks.shape[-2:]) / 4, device=self.device)
        beside = boxes.beside(rng, around, self.cfg.background, side, self.cfg.height, self.cfg.width)
        true = boxes.rows(around, masks, labels, masks.any(-1).any(-1), beside)
        offered = boxes.detected(rng, true, rows, errors) if errors else true
        batch = {"frames": frames, **offered._asdict()}
        if errors:
            known = {"boxes": true.boxes, "masks": true.masks, "instance": true.instance, "label": true.label}
            batch |= {f"true_{key}": value[:, :, :rows] for key, value in known.items()}
        shaped = {key: value.unflatten(0, numbers.shape) for key, value in batch.items()}
        return {**shaped, "clip": torch.as_tensor(numbers, device=self.device)}

    def _filled(self, pictures: Tensor, masks: Tensor, video: Video, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Black to the right and below, and rows without an instance.    Shapes: -> [T, 3, H, W], [T, rows, H, W], [rows]."""
        t, g, height, width = masks.shape
        whole = torch.zeros(t, 3, self.cfg.height, self.cfg.width, dtype=torch.uint8)
        whole[..., :height, :width] = pictures
        every = torch.zeros(t, rows, self.cfg.height, self.cfg.width, dtype=torch.bool)
        every[:, :g, :height, :width] = masks
        labels = torch.full((rows,), -1)
        labels[:g] = torch.tensor([track.label for track in video.tracks], dtype=torch.int64)
        return whole, every, labels

    def ends_task(self, step: int) -> bool:
        """Only the last step ends the one task there is."""
        return step == len(self) - 1

    def seen(self, step: int) -> NDArray[np.bool_]:
        """The test videos count from the first step on.    Shapes: -> [R, 1]."""
        return np.full((len(self.seeds), 1), step >= 0)

    def holdout(self) -> VideosHoldout:
        """Whole test videos."""
        return VideosHoldout(self)

    def test_batch(self, number: int) -> Batch:
        """A whole test video, for every run.    Shapes: each [R, 1, ...]."""
        video = self.test_videos[number]
        clip = *self.tested.clip(video, np.arange(len(video.files))), video
        rows = max(1, *(len(one.tracks) for one in self.test_videos), 1)
        alone = np.full((1, 1), number)
        batch = self._batch([clip], alone, [derive(0, f"test {number}")], rows, self.cfg.errors)
        return {key: value.expand(len(self.seeds), *value.shape[1:]) for key, value in batch.items()}

    @property
    def annotations(self) -> Annotations:
        """The file of the test videos."""
        return self.tested.truth

    def original(self, mask: Tensor, video: Video) -> NDArray[np.bool_]:
        """A mask of the stream's size in the video's own size, for results.    Shapes: [H, W] -> [height, width]."""
        height, width = self.tested.size(video)
        rows = ((np.arange(video.height) + 0.5) * height / video.height).astype(np.int64)
        columns = ((np.arange(video.width) + 0.5) * width / video.width).astype(np.int64)
        whole: NDArray[np.bool_] = mask.cpu().numpy()[rows[:, None], columns]
        return whole

    def clip_labels(self) -> NDArray[np.int64]:
        """The classes of the first run's instances, in order; -1 is none.    Shapes: -> [clips, G]."""
        labels = np.full((self.samples, self.rows), -1)
        for place, number in enumerate(self.order[0, : self.samples]):
            own = [track.label for track in self.origins[number][1].tracks]
            labels[place, : len(own)] = own
        return labels

    def describe(self) -> dict[str, Any]:
        """Counts and choices worth printing."""
        cfg, whole = self.cfg, self.source.truth
        kinds = f"{len(whole.videos)} videos" + (f", {len(self.still.truth.videos)} stills" if self.still else "")
        silent = f"{cfg.test} has no annotations, so AP on it cannot be computed here; " if self.silent else ""
        held = silent + "every fifth training video is held out: " if self.tested is self.source else ""
        return {
            "data": cfg.data,
            "digest": self.digest,
            "classes": ", ".join(whole.names),
            "training": kinds,
            "tracks": sum(len(video.tracks) for video in whole.videos),
            "clips": self.samples,
            "steps": len(self),
            "batch": f"{cfg.batch} clips of {cfg.frames} frames",
            "frame": f"{cfg.width}x{cfg.height} pixels, {self.rows} instances, {cfg.background} boxes of background",
            "tests": f"{held}{len(self.test_videos)} videos",
        }


class VideosHoldout:
    """Whole test videos, one at a time."""

    names = ("test",)

    def __init__(self, stream: Videos) -> None:
        self.stream = stream

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """All of them, or the first few."""
        count = len(self.stream.test_videos)
        for number in range(count if full else min(count, self.stream.cfg.subset)):
            batch = self.stream.test_batch(number)
            yield {**batch, "split": torch.zeros_like(batch["clip"])}


def find(name: str, folder: str) -> Path:
    """The folder of a set of videos.    Raises: BadData naming the ways to get it."""
    form, colon, rest = name.partition(":")
    place = Path(rest).expanduser() if colon and form == "folder" else data_folders(folder)[0] / name
    if not place.is_dir():
        raise BadData(
            f"the videos '{name}' are not at {place}; put annotation files and JPEGImages/VIDEO/FRAME.jpg there, name "
            "another folder with --data DIR, or type video-folder:PATH"
        )
    return place


def _digest(*sources: Source | None) -> str:
    """A hash of the annotation files."""
    found = hashlib.sha256()
    for source in sources:
        found.update(source.truth.path.read_bytes() if source else b"-")
    return found.hexdigest()[:32]
