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
from cl_sim.tracking import figures, strips

FILE = "clip.npz"


def keep(strategy: Strategy, stream: Stream, path: Path) -> None:
    """Write the first test clip of the first run, with its embeddings and tracks; nothing if there is none, or no frames.

    Keys: frames [T, C, H, W], masks [T, Q, H, W], instance and track [T, Q], emb [T, Q, D].
    """
    holdout = stream.holdout()
    chunk = next(iter(holdout.chunks(len(stream), False)), None) if holdout is not None else None
    if chunk is None or "frames" not in chunk:
        return
    one = {key: value[:, :1] for key, value in chunk.items()}
    strategy.eval()
    with torch.inference_mode():
        output = strategy.predict(one)
    strategy.train()
    proposed = strategy.measure().candidates
    if proposed is not None:
        output, one = proposed(output, one)
    cfg = getattr(strategy, "cfg", None)
    dim = int(getattr(strategy, "dim", output.shape[-1]))
    made = Tracked(output, one, cfg if isinstance(cfg, TrackerConfig) else TrackerConfig(), dim)
    shown = one["instance"].masked_fill(~one["present"], -1)
    kept = {
        "frames": one["frames"],
        "masks": one["masks"],
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
    batch = {key: torch.from_numpy(clip[key])[None, None] for key in ("frames", "masks", "instance")}
    strip = [strips.draw(batch, folder / name, tracks=clip["track"]) for name in ("clip.gif", "filmstrip.png")]
    return [*strip, similarity_figure(clip["emb"], clip["instance"], folder / "similarity.png")]


def similarity_figure(emb: NDArray[np.float32], instance: NDArray[np.int64], path: Path) -> Path:
    """Cosines of all views of a clip, sorted by instance and then by frame: blocks on the diagonal are what is wanted.

    Shapes: emb [T, Q, D], instance [T, Q], -1 for none.
    """
    frame, row = np.nonzero(instance >= 0)
    order = np.lexsort((frame, instance[frame, row]))
    views = emb[frame, row][order]
    whose = instance[frame, row][order]
    unit = views / np.maximum(np.linalg.norm(views, axis=1, keepdims=True), 1e-8)
    figure = figures.blank(5.6, 4.8)
    axes = figure.subplots()
    image = axes.imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    for edge in np.flatnonzero(np.diff(whose)) + 0.5:
        axes.axhline(edge, color="black", lw=0.5)
        axes.axvline(edge, color="black", lw=0.5)
    axes.set(xlabel="views, by instance and then by frame", ylabel="views")
    figure.colorbar(image, label="cosine")
    return figures.save(figure, path)
