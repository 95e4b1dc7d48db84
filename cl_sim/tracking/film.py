"""A test clip as it was tracked: kept by the process that trained, drawn as a film strip, a GIF and a matrix of similarities.

Colours are track ids, so an instance whose colour changes was taken for another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cl_sim.metrics.clips import Tracked
from cl_sim.strategy import Strategy
from cl_sim.stream import Stream
from cl_sim.tracker import TrackerConfig

FILE = "clip.npz"
ZOOM = 2  # screen pixels per pixel
SHOWN = 12  # frames of a film strip, at most
PAUSE = 200  # milliseconds per frame of the GIF
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def keep(strategy: Strategy, stream: Stream, path: Path) -> None:
    """Write the first test clip of the first run, with its embeddings and tracks; nothing if there is none, no frames, or no
    boxes because the net proposes masks.

    Keys: frames [T, C, H, W], boxes [T, Q, 4], instance and track [T, Q], emb [T, Q, D].
    """
    holdout = stream.holdout()
    chunk = next(iter(holdout.chunks(len(stream), False)), None) if holdout is not None else None
    if chunk is None or "frames" not in chunk or strategy.measure().candidates is not None:
        return
    one = {key: value[:, :1] for key, value in chunk.items()}
    strategy.eval()
    with torch.inference_mode():
        output = strategy.predict(one)
    strategy.train()
    cfg = getattr(strategy, "cfg", None)
    dim = int(getattr(strategy, "dim", output.shape[-1]))
    made = Tracked(output, one, cfg if isinstance(cfg, TrackerConfig) else TrackerConfig(), dim)
    shown = one["instance"].masked_fill(~one["present"], -1)
    kept = {
        "frames": one["frames"],
        "boxes": one["boxes"],
        "instance": shown,
        "track": made.ids,
        "emb": output[..., :dim],
    }
    arrays: dict[str, Any] = {key: value[0, 0].cpu().numpy() for key, value in kept.items()}
    np.savez_compressed(path, **arrays)


def draw(path: Path, folder: Path) -> list[Path]:
    """The pictures of a kept clip: clip.gif, filmstrip.png and similarity.png."""
    with np.load(path) as kept:
        clip = {key: kept[key] for key in kept.files}
    pictures = [framed(*parts) for parts in zip(clip["frames"], clip["boxes"], clip["track"], strict=True)]
    return [
        _gif(pictures, folder / "clip.gif"),
        _strip(pictures, folder / "filmstrip.png"),
        similarity_figure(clip["emb"], clip["instance"], folder / "similarity.png"),
    ]


def colour(track: int) -> tuple[int, int, int]:
    """A bright colour of its own for every track."""
    from colorsys import hsv_to_rgb

    red, green, blue = hsv_to_rgb(track * 0.618034 % 1, 0.9, 1.0)  # the golden section keeps neighbours apart
    return round(255 * red), round(255 * green), round(255 * blue)


def framed(frame: Bytes, boxes: NDArray[np.float32], track: Ints) -> Bytes:
    """A frame, enlarged, with the boxes of its tracks in their colours.    Shapes: frame [C, H, W] -> [H', W', 3]."""
    values = frame if frame.dtype == np.uint8 else np.clip(255 * frame, 0, 255).astype(np.uint8)
    picture = np.repeat(values[:1], 3, 0) if len(values) != 3 else values
    large: Bytes = picture.transpose(1, 2, 0).repeat(ZOOM, 0).repeat(ZOOM, 1).copy()
    height, width = large.shape[:2]
    for box, number in zip(boxes, track, strict=True):
        if number >= 0:
            x0, y0, x1, y1 = (int(v) for v in np.round(box * ZOOM))
            x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
            for edge in np.s_[y0:y1, x0 : x0 + ZOOM], np.s_[y0:y1, max(x1 - ZOOM, 0) : x1]:
                large[edge] = colour(int(number))
            for edge in np.s_[y0 : y0 + ZOOM, x0:x1], np.s_[max(y1 - ZOOM, 0) : y1, x0:x1]:
                large[edge] = colour(int(number))
    return large


def _gif(pictures: list[Bytes], path: Path) -> Path:
    from PIL import Image

    first, *rest = [Image.fromarray(picture) for picture in pictures]
    first.save(path, save_all=True, append_images=rest, duration=PAUSE, loop=0)
    return path


def _strip(pictures: list[Bytes], path: Path) -> Path:
    """Frames side by side, evenly spaced if there are too many."""
    from PIL import Image

    chosen = np.linspace(0, len(pictures) - 1, min(SHOWN, len(pictures))).round().astype(int)
    gap = np.full((pictures[0].shape[0], ZOOM, 3), 255, np.uint8)
    parts: list[Any] = [part for k in chosen for part in (pictures[k], gap)][:-1]
    Image.fromarray(np.concatenate(parts, 1)).save(path)
    return path


def similarity_figure(emb: NDArray[np.float32], instance: Ints, path: Path) -> Path:
    """Cosines of all views of a clip, sorted by instance and then by frame: blocks on the diagonal are what is wanted.

    Shapes: emb [T, Q, D], instance [T, Q], -1 for none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frame, row = np.nonzero(instance >= 0)
    order = np.lexsort((frame, instance[frame, row]))
    views = emb[frame, row][order]
    whose = instance[frame, row][order]
    unit = views / np.maximum(np.linalg.norm(views, axis=1, keepdims=True), 1e-8)
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    for edge in np.flatnonzero(np.diff(whose)) + 0.5:
        axes.axhline(edge, color="black", lw=0.5)
        axes.axvline(edge, color="black", lw=0.5)
    axes.set(xlabel="views, by instance and then by frame", ylabel="views")
    figure.colorbar(image, label="cosine")
    figure.savefig(path, dpi=140)
    return path
