"""A picture of sample-adaptive augmentation: naive and other samples of the memory, as they are and in their stronger views.

The process that trains keeps the images beside its journal; the process that launched it draws them.

Source: ours, after the method of Gui et al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation in
Semi-Supervised Learning".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_sim.augment import join_halves, to_dtype
from cl_sim.randaugment import strong
from cl_sim.rng import Rng
from cl_sim.sample_adaptive import SampleAdaptive
from cl_sim.tracking import figures

FILE = "views.npz"  # beside a group's journal
SHOWN = 6  # samples of each kind
COLUMNS = ("sample", "strong", "joined")
CELL = 0.9  # inches


def keep(strategy: nn.Module, path: Path) -> bool:
    """Write images of the first run's memory, if the strategy has sample-adaptive views; nothing of its state changes."""
    for part in strategy.modules():
        if isinstance(part, SampleAdaptive):
            pictures: dict[str, Any] = {**gallery(part)}
            np.savez_compressed(path, **pictures)
            return True
    return False


@torch.no_grad()
def gallery(part: SampleAdaptive) -> dict[str, NDArray[np.uint8]]:
    """Some naive samples and some others of the first run, each with two views; drawn from random numbers of their own.

    Shapes: -> naive, other: each [n, 3, C, H, W], n up to 6: the sample, a strong view, two strong views joined.
    """
    flags, filled = part.table.naive[0, : part.memory.capacity], part.memory.valid()[0]
    rng = Rng(part.env.seeds[:1], "pictures of views", part.env.device)
    kinds = {"naive": flags & filled, "other": ~flags & filled}
    slots = {name: which.nonzero()[:SHOWN, 0].expand(part.env.runs, -1) for name, which in kinds.items()}
    return {name: _pictures(part.memory.take(slot)["x"][0], rng) for name, slot in slots.items()}


def _pictures(x: Tensor, rng: Rng) -> NDArray[np.uint8]:
    """Shapes: [n, C, H, W] -> [n, 3, C, H, W]."""
    raw = (x if x.dtype == torch.uint8 else to_dtype(x.clamp(0, 1), torch.uint8))[None]
    if not raw.shape[1]:
        return np.zeros((0, len(COLUMNS), *x.shape[1:]), np.uint8)
    first, second = strong(raw, rng), strong(raw, rng)
    joined = join_halves(first, second, rng.chance(0.5, raw.shape[1]))
    made: NDArray[np.uint8] = torch.stack([raw[0], first[0], joined[0]], 1).cpu().numpy()
    return made


def draw(path: Path, folder: Path) -> list[Path]:
    """The picture `views.png` of what was kept: naive samples on the left, others on the right, a sample in a row."""
    with np.load(path) as kept:
        kinds = {name: kept[name] for name in ("naive", "other")}
    rows = max(1, *(len(images) for images in kinds.values()))
    figure = figures.blank(CELL * 2 * len(COLUMNS) + 0.6, CELL * rows + 0.8)
    halves: Any = figure.subfigures(1, 2)
    for half, (name, images) in zip(halves, kinds.items(), strict=True):
        half.suptitle(f"{name} samples" if len(images) else f"no {name} sample", fontsize=9)
        axes = half.subplots(rows, len(COLUMNS), squeeze=False)
        for row in range(rows):
            for column, title in enumerate(COLUMNS):
                _show(axes[row, column], images[row, column] if row < len(images) else None, title if row == 0 else "")
    return [figures.save(figure, folder / "views.png")]


def _show(axes: Any, image: NDArray[np.uint8] | None, title: str) -> None:
    axes.axis("off")
    axes.set_title(title, fontsize=7)
    if image is not None:
        axes.imshow(np.moveaxis(image, 0, -1).squeeze(), cmap="gray", vmin=0, vmax=255)
