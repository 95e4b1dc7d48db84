"""Sprite clips: digits (or any labelled images) that move, hide and cross each other, with masks, boxes and identities.

A clip depends on its number, its experience and the seed alone and is made when it is asked for; test clips show images of
the test part and are the same for every seed, as far as their classes are. Instances are rows 0 to G - 1 of every frame, in
any order of depth and each always in its own row, so a strategy must not look at row numbers; rows of background follow.

Source: ours, for the training clips of Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance
Segmentation", whose pseudo-videos come from annotated photographs.
Departures: see the source; nothing here was part of the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim import boxes, sprites
from cl_sim.arrays import Arrays, load
from cl_sim.config import at_least, within
from cl_sim.errors import BadConfig
from cl_sim.indexed import class_orders, equal_tasks
from cl_sim.rng import Rng, derive, host_rng
from cl_sim.types import Batch, Field

CHUNK = 2  # test clips made and predicted at once; longer clips than those for training


@dataclass(frozen=True, kw_only=True)
class SpritesConfig:
    """Settings of the sprite stream."""

    data: str = "digits"  # a named set, or folder:PATH, parquet:PATH, npz:PATH
    clips: int = 1200  # in all; each comes once
    batch: int = 4  # clips per step
    frames: int = 10  # per clip
    instances: int = 6  # per clip
    background: int = 4  # boxes per frame that show no instance
    canvas: int = 96  # pixels, the side of a frame
    sprite: int = 24  # pixels, the side of an instance
    silhouette: sprites.Silhouette = "auto"  # ink of a figure, or a rounded ellipse; auto: ink for grey images
    tint: float = 1.0  # how much the brightness or hue of instances varies; 0: identity is in the shape alone
    same_class: float = 0.5  # share of a clip's instances that are of one class
    motion: sprites.Path = "bounce"  # off the border, or exit and enter on the other side
    leaves: float = 0.5  # probability that an instance is away for 3 to 12 frames
    wave: float = 0.0  # pixels by which shapes bend, at most
    backdrop: Literal["smooth", "image"] = "smooth"  # clouds, or another image of the set, darkened
    noise: float = 0.08  # standard deviation of pixels, in units of full brightness
    split: Literal["none", "class", "domain"] = (
        "none"  # experiences with classes, or with a look and pace, of their own
    )
    tasks: int = 0  # experiences; 0: 1, 5 (or one per class) and 3 for the three kinds of split
    order: str = "shuffled"  # classes: shuffled per seed, fixed, or a list such as 3,1,0,2
    announces: bool = True  # strategies may hear of the experiences' ends
    train_errors: float = (
        0.0  # a detector's errors in training clips; 1: boxes off by a pixel, 5 % missed, false, double
    )
    test_errors: float = 0.0  # the same in test clips
    test_clips: int = 30  # per experience
    test_frames: int = 36  # per test clip
    subset: int = 4  # test clips per experience in the small evaluations

    def __post_init__(self) -> None:
        at_least(self, clips=1, batch=1, frames=2, instances=1, background=0, sprite=4, wave=0, noise=0, tasks=0)
        at_least(self, train_errors=0, test_errors=0, test_clips=1, test_frames=2, subset=1, canvas=self.sprite + 1)
        within(self, 0, 1, "tint", "same_class", "leaves")
        if self.split == "none" and self.tasks > 1:
            raise BadConfig(f"stream.tasks is {self.tasks}, but stream.split is 'none'; use class or domain")
        if self.split != "class" and self.order != "shuffled":
            raise BadConfig(
                f"stream.order is '{self.order}', but only --set stream.split=class brings classes in order"
            )


@dataclass(frozen=True)
class Part:
    """What the clips of one part (training or test) are made from.

    Shapes: keys [R, clips] int64, allowed [R, E, k] (the classes of every experience).
    """

    sheet: sprites.Sheet
    keys: Tensor
    allowed: Tensor
    per_task: int
    frames: int
    errors: float


class Sprites:
    """Clips in order, each once.

    Shapes: frames [R, B, T, C, H, W]; boxes [R, B, T, Q, 4]; masks [R, B, T, Q, H, W]; instance, label, present and score
    [R, B, T, Q]; clip [R, B] is the clip's number, which `rebuild` takes. With errors in the test clips their true instances
    come too, as true_boxes, true_masks, true_instance and true_label with G rows.
    """

    Config = SpritesConfig
    task = "associate"

    def __init__(
        self, cfg: SpritesConfig, seeds: tuple[int, ...], device: torch.device, data: str = "", iid: bool = False
    ) -> None:
        self.cfg, self.seeds, self.device = cfg, seeds, device
        loaded = load(cfg.data, data, size=cfg.sprite)
        if loaded.train.x.ndim != 4 or loaded.test is None:
            raise BadConfig(f"stream.data is '{cfg.data}'; sprites are cut out of images, in a set with a test part")
        self.name, self.digest, self.classes = cfg.data, loaded.digest, len(loaded.classes)
        self.tasks = (
            cfg.tasks or {"none": 1, "class": 5 if self.classes % 5 == 0 else self.classes, "domain": 3}[cfg.split]
        )
        self.announces, self.batch_size = cfg.announces and not iid, cfg.batch
        per_task = cfg.clips // self.tasks // cfg.batch * cfg.batch
        if per_task < 1:
            raise BadConfig(
                f"stream.clips is {cfg.clips}; {self.tasks} experiences of a batch need {self.tasks * cfg.batch}"
            )
        self.samples = per_task * self.tasks
        self.train = self._part(loaded.train, "train", per_task, cfg.frames, cfg.train_errors)
        self.test = self._part(loaded.test, "test", cfg.test_clips, cfg.test_frames, cfg.test_errors)
        self.look = torch.as_tensor(
            np.stack([domains(seed, self.tasks, cfg) for seed in seeds]), device=device
        )  # [R, E, 3]
        numbers = np.tile(np.arange(self.samples), (len(seeds), 1))
        if iid:
            numbers = np.stack([host_rng(seed, "clip order").permutation(self.samples) for seed in seeds])
        self.numbers = torch.as_tensor(numbers, device=device)  # [R, N]
        self.since = np.zeros(self.tasks, np.int64) if iid else np.arange(self.tasks) * (per_task // cfg.batch)
        example = self.batch(0)
        self.fields: Mapping[str, Field] = {key: Field(tuple(v.shape[2:]), v.dtype) for key, v in example.items()}

    def _part(self, images: Arrays, name: str, per_task: int, frames: int, errors: float) -> Part:
        sheet = sprites.sheet(np.asarray(images.x), np.asarray(images.y), self.cfg.silhouette, self.device)
        classes = sprites.shown(sheet, self.cfg.instances, self.name)
        keys = [
            [derive(seed, f"{name} clip {j} {k}") for j in range(self.tasks) for k in range(per_task)]
            for seed in (self.seeds if name == "train" else [0] * len(self.seeds))
        ]
        return Part(sheet, torch.tensor(keys, device=self.device), self._of_tasks(classes), per_task, frames, errors)

    def _of_tasks(self, classes: Tensor) -> Tensor:
        """The classes of every experience, out of those that a part shows.    Shapes: [k] -> [R, E, k]."""
        if self.cfg.split != "class":
            return classes.expand(len(self.seeds), self.tasks, -1)
        if len(classes) < self.classes:
            raise BadConfig(
                f"stream.split is 'class', but '{self.name}' trains and tests on different classes; use none or domain"
            )
        equal_tasks(self.classes, self.tasks)
        orders = class_orders(self.classes, self.cfg.order, self.seeds)
        return torch.as_tensor(orders, device=self.device).view(len(orders), self.tasks, -1)

    def __len__(self) -> int:
        return self.samples // self.batch_size

    def batch(self, step: int) -> Batch:
        """The clips of one step."""
        return self.rebuild(self.numbers[:, step * self.batch_size : (step + 1) * self.batch_size])

    def rebuild(self, numbers: Tensor) -> Batch:
        """Training clips by their numbers.    Shapes: numbers [R, B] -> each [R, B, ...]."""
        return self._make(self.train, numbers)

    def _cast(self, part: Part, numbers: Tensor) -> tuple[Rng, Tensor, Tensor]:
        """The numbers of each clip, its experience's look, and its sprites.    Shapes: -> N sequences, [N, 3], [N, G]."""
        task = numbers // part.per_task
        run = torch.arange(len(numbers), device=numbers.device)[:, None]
        rng = Rng.keyed(part.keys.gather(1, numbers).flatten())
        allowed = part.allowed[run, task].flatten(0, 1)
        which = sprites.cast(rng, part.sheet, allowed, self.cfg.instances, self.cfg.same_class)
        return rng, self.look[run, task].flatten(0, 1), which

    def _make(self, part: Part, numbers: Tensor) -> Batch:
        cfg, sheet = self.cfg, part.sheet
        rng, look, which = self._cast(part, numbers)
        speed, deform, light = look.unbind(1)
        pose = sprites.poses(
            rng, part.frames, cfg.instances, cfg.canvas, cfg.sprite, speed, deform, cfg.leaves, cfg.motion
        )
        channels = sheet.pixels.shape[1]
        tint = sprites.tints(rng, cfg.instances, channels, cfg.tint)
        backdrop = sprites.smooth(rng, channels) if cfg.backdrop == "smooth" else sprites.photographs(rng, sheet)
        scene = sprites.scenery(rng, part.frames, backdrop, cfg.canvas, cfg.noise, light)
        drawn = sprites.compose(sheet, which, pose, tint, scene, cfg.wave)
        around, side = boxes.of_masks(drawn.masks), torch.full_like(light, cfg.sprite)
        beside = boxes.beside(rng, around, cfg.background, side, cfg.canvas, cfg.canvas)
        true = boxes.rows(around, drawn.masks, sheet.labels[which], sprites.is_present(drawn), beside)
        offered = boxes.detected(rng, true, cfg.instances, part.errors) if part.errors else true
        batch = {"frames": drawn.frames, **offered._asdict()}
        if part.errors:
            known = {"boxes": true.boxes, "masks": true.masks, "instance": true.instance, "label": true.label}
            batch |= {f"true_{key}": value[:, :, : cfg.instances] for key, value in known.items()}
        shaped = {key: value.unflatten(0, tuple(numbers.shape)) for key, value in batch.items()}
        return {**shaped, "clip": numbers}

    def ends_task(self, step: int) -> bool:
        """Is this the last step of an experience?"""
        return (step + 1) % (self.train.per_task // self.batch_size) == 0

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which experiences have begun.    Shapes: -> [R, E]."""
        return np.tile(self.since <= step, (len(self.seeds), 1))

    def holdout(self) -> SpritesHoldout:
        """Test clips of every experience."""
        return SpritesHoldout(self)

    def clip_labels(self) -> NDArray[np.int64]:
        """The classes of the first run's instances, in order, without painting a clip.    Shapes: -> [clips, G]."""
        _, _, which = self._cast(self.train, self.numbers)
        labels: NDArray[np.int64] = self.train.sheet.labels[which[: self.samples]].cpu().numpy()
        return labels

    def describe(self) -> dict[str, Any]:
        """Counts and choices worth printing."""
        cfg = self.cfg
        parts = {"classes of tasks": self.train.allowed[0].tolist()} if cfg.split == "class" else {}
        factors = {"pace, bending, light": self.look[0].round(decimals=2).tolist()} if cfg.split == "domain" else {}
        return {
            "data": self.name,
            "digest": self.digest,
            "classes": self.classes,
            "clips": self.samples,
            "steps": len(self),
            "batch": f"{cfg.batch} clips of {cfg.frames} frames",
            "frame": f"{cfg.canvas}x{cfg.canvas} pixels, {cfg.instances} instances, {cfg.background} boxes of background",
            "task ends": [step for step in range(len(self)) if self.ends_task(step)],
            "test clips": f"{cfg.test_clips} of {cfg.test_frames} frames for each of {self.tasks} experiences",
            **parts,
            **factors,
        }


class SpritesHoldout:
    """Test clips, a split per experience."""

    def __init__(self, stream: Sprites) -> None:
        self.stream = stream
        self.names = [f"task {task + 1}" for task in range(stream.tasks)] if stream.tasks > 1 else ["test"]

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """Every experience's clips, or a few of each that has begun, a few at once."""
        stream, part = self.stream, self.stream.test
        each = part.per_task if full else min(stream.cfg.subset, part.per_task)
        asked = [task for task in range(stream.tasks) if full or stream.since[task] <= step]
        for task in asked:
            for first in range(0, each, CHUNK):
                one = torch.arange(first, min(first + CHUNK, each), device=stream.device) + task * part.per_task
                numbers = one.expand(len(stream.seeds), -1)
                yield {**stream._make(part, numbers), "split": torch.full_like(numbers, task)}


def domains(seed: int, tasks: int, cfg: SpritesConfig) -> NDArray[np.float32]:
    """Pace and bending (factors) and light (added brightness) of each experience; the first is plain.    Shapes: -> [E, 3]."""
    look = np.tile(np.array([1, 1, 0], np.float32), (tasks, 1))
    if cfg.split == "domain":
        drawn = host_rng(seed, "domains").uniform([0.5, 0.5, 0.1], [2.0, 2.0, 0.4], (tasks - 1, 3))
        look[1:] = drawn
    return look
