"""A small stream of clips for tests: bright patterns that move over a dark ground, hide and return.

Source: ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from cl_sim.rng import host_rng
from cl_sim.types import Batch, Field

SIDE, PATTERN = 28, 8  # pixels


@dataclass(frozen=True, kw_only=True)
class ToyClipsConfig:
    """Settings of the toy clips."""

    frames: int = 5
    instances: int = 3
    background: int = 2  # boxes without an instance, per frame
    hidden: float = 0.25  # probability that an instance is not there in a frame
    steps: int = 40
    batch: int = 2  # clips per step
    test_clips: int = 8


class ToyClips:
    """Clips in two tasks that differ in their patterns; every instance has a pattern of its own.

    Shapes: frames [R, B, T, 1, 28, 28] and the other keys of a stream that asks to associate.
    """

    Config: ClassVar[type] = ToyClipsConfig
    names: Sequence[str] = ("task 1", "task 2")
    task, classes, announces = "associate", 4, True

    def __init__(self, cfg: ToyClipsConfig, seeds: tuple[int, ...], device: torch.device) -> None:
        self.cfg, self.seeds, self.device = cfg, seeds, device
        self.batch_size, self.samples = cfg.batch, cfg.steps * cfg.batch
        t, q, integer = cfg.frames, cfg.instances + cfg.background, torch.int64
        self.fields: Mapping[str, Field] = {
            "frames": Field((t, 1, SIDE, SIDE), torch.uint8),
            "boxes": Field((t, q, 4), torch.float32),
            "masks": Field((t, q, SIDE, SIDE), torch.bool),
            "instance": Field((t, q), integer),
            "label": Field((t, q), integer),
            "present": Field((t, q), torch.bool),
            "clip": Field((), integer),
        }
        self.digest = hashlib.sha256(repr(cfg).encode()).hexdigest()

    def __len__(self) -> int:
        return self.cfg.steps

    def batch(self, step: int) -> Batch:
        """The clips of one step, of every run its own."""
        task = 2 * step // self.cfg.steps
        numbers = range(step * self.cfg.batch, (step + 1) * self.cfg.batch)
        return self._stacked([[self._clip(seed, "train", task, n) for n in numbers] for seed in self.seeds])

    def ends_task(self, step: int) -> bool:
        """Is this the last step of a task?"""
        return (step + 1) % (self.cfg.steps // 2) == 0

    def seen(self, step: int) -> NDArray[np.bool_]:
        """Which tasks have begun.    Shapes: -> [R, 2]."""
        begun = np.array([step >= 0, step >= self.cfg.steps // 2])
        return np.tile(begun, (len(self.seeds), 1))

    def holdout(self) -> ToyClips:
        """The test clips: this stream hands them over itself."""
        return self

    def chunks(self, step: int, full: bool) -> Iterator[Batch]:
        """The test clips of both tasks, the same for all runs; half of them unless all are asked for."""
        for task in range(2):
            clips = [self._clip(0, "test", task, n) for n in range(self.cfg.test_clips // (1 if full else 2))]
            made = self._stacked([clips] * len(self.seeds))
            yield made | {"split": torch.full_like(made["clip"], task)}

    def describe(self) -> Mapping[str, Any]:
        """Counts."""
        return {"samples": self.samples, "classes": self.classes, "steps": self.cfg.steps}

    def _stacked(self, runs: list[list[dict[str, Any]]]) -> Batch:
        return {
            key: torch.as_tensor(np.array([[clip[key] for clip in clips] for clips in runs]), device=self.device)
            for key in self.fields
        }

    def _clip(self, seed: int, part: str, task: int, number: int) -> dict[str, Any]:
        cfg, rng = self.cfg, host_rng(seed, f"toy clip {part} {task} {number}")
        t, n, q = cfg.frames, cfg.instances, cfg.instances + cfg.background
        frames = rng.integers(0, 20, (t, 1, SIDE, SIDE))
        boxes, masks = np.zeros((t, q, 4), np.float32), np.zeros((t, q, SIDE, SIDE), np.bool_)
        instance, label = np.full((t, q), -1), np.full((t, q), -1)
        patterns = rng.integers(60, 255, (n, PATTERN // 4, PATTERN // 4)).repeat(4, 1).repeat(4, 2)
        classes = rng.integers(2, size=n) + 2 * task
        corners = rng.integers(0, SIDE - PATTERN + 1, (t, q, 2))
        shown = rng.random((t, n)) >= cfg.hidden
        for at, row in np.ndindex(t, q):
            y, x = corners[at, row]
            place = slice(y, y + PATTERN), slice(x, x + PATTERN)
            if row < n and shown[at, row]:
                frames[at, 0][place] = patterns[row]
                masks[at, row][place] = True
                masks[at, :row] &= ~masks[at, row]
                instance[at, row], label[at, row] = row, classes[row]
            if row >= n or shown[at, row]:
                boxes[at, row] = x, y, x + PATTERN, y + PATTERN
        covered = (instance >= 0) & ~masks.any((2, 3))  # by those in front
        instance[covered] = label[covered] = -1
        boxes[covered] = 0
        return {
            "frames": frames.astype(np.uint8),
            "boxes": boxes,
            "masks": masks,
            "instance": instance,
            "label": label,
            "present": instance >= 0,
            "clip": number + 1000 * task,
        }
