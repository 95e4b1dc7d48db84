"""The clusters of a memory in pictures: the images nearest to each prototype, and sizes and purity over time.

Kept by the process that trained; the clusters are those of its first run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cl_sim.memory.clustered import Clustered

FILE = "groups.npz"
GROUPS = 24  # clusters shown, the largest first
EACH = 12  # images of each, the nearest first
SIDE = 32  # pixels; smaller images are enlarged to about this
GAP = 2  # pixels between images
GREY = 255  # of the ground
Bytes = NDArray[np.uint8]


def nearest_rows(z: Tensor, prototypes: Tensor, labels: Tensor, groups: int, each: int) -> tuple[Tensor, Tensor]:
    """Row numbers of the largest clusters, most like their prototype first, -1 where a cluster has no more; and all sizes.

    Shapes: z [M, D], prototypes [P, D], labels [M] (-1: none) -> [min(groups, P), min(each, M)], [P].
    """
    member = labels[:, None] == torch.arange(len(prototypes), device=labels.device)  # [M, P]
    sizes = member.sum(0)
    shown = sizes.argsort(descending=True, stable=True)[:groups]
    likeness = (z @ F.normalize(prototypes, dim=-1).T).masked_fill(~member, -torch.inf).T[shown]  # [G, M]
    value, row = likeness.topk(min(each, len(z)), dim=1)
    return row.masked_fill(value == -torch.inf, -1), sizes


def keep(memory: Clustered, path: Path) -> None:
    """Write images [G, S, C, H, W] and which of them there are, for memories of images with clusters.

    Keys: images, there [G, S] bool, sizes [P].
    """
    x, labels = memory.row("x")[0, : memory.capacity], memory.row("cluster")[0, : memory.capacity]
    if x.dim() != 4 or x.dtype != torch.uint8 or not memory.prototypes[0].any():
        return
    labels = labels.masked_fill(~memory.valid()[0], -1)
    rows, sizes = nearest_rows(memory.row("z")[0, : memory.capacity], memory.prototypes[0], labels, GROUPS, EACH)
    kept = {"images": x[rows.clamp(min=0)], "there": rows >= 0, "sizes": sizes}
    arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in kept.items()}
    np.savez_compressed(path, **arrays)


def draw(path: Path, folder: Path) -> list[Path]:
    """The picture of the kept clusters: a row for each, its nearest images from left to right."""
    from PIL import Image

    with np.load(path) as kept:
        sheet, zoom = contact_sheet(kept["images"], kept["there"]), max(1, SIDE // kept["images"].shape[-1])
    Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1)).save(folder / "clusters.png")
    return [folder / "clusters.png"]


def contact_sheet(images: Bytes, there: NDArray[np.bool_]) -> Bytes:
    """Images side by side, a row per cluster, with gaps; grey ones become coloured, missing ones white.

    Shapes: images [G, S, C, H, W], there [G, S] -> [G (H + gap), S (W + gap), 3].
    """
    colour = images if images.shape[2] == 3 else images[:, :, :1].repeat(3, 2)
    shown = np.where(there[:, :, None, None, None], colour, np.uint8(GREY))
    padded = np.pad(shown, ((0, 0), (0, 0), (0, 0), (0, GAP), (0, GAP)), constant_values=GREY)
    groups, each, channels, height, width = padded.shape
    sheet: Bytes = padded.transpose(0, 3, 1, 4, 2).reshape(groups * height, each * width, channels)
    return sheet


def curves(lines: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
    """Samples seen, and by name the first run's share of rows in the largest cluster, clusters in use, purity and the rest."""
    samples = np.array([line["samples"] for line in lines], dtype=np.int64)
    sizes = np.array([line["sizes"][0] for line in lines], dtype=np.float64)  # [n, P]
    found = {
        "clusters in use": (sizes > 0).mean(1),
        "rows in the largest": sizes.max(1) / np.maximum(sizes.sum(1), 1),
    }
    words = {"cluster_purity": "purity", "cluster_nmi": "mutual information", "memory_entropy": "class entropy"}
    return samples, found | {said: np.array([line[name][0] for line in lines]) for name, said in words.items()}
