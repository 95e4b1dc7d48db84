"""From a trained run to results for the evaluation servers of YouTube-VIS and OVIS: track whole test videos, name the tracks.

Source: Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", as released, for the names: class
scores of a track are their mean over its frames, and of each video the best pairs of track and class are kept, as many as
there are classes.
Departures: masks are those of the candidates that the stream offers, so there is no mask score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_sim import checkpoint, session, store
from cl_sim.annotations import Annotations, Result, Video, read_results, true_results, write_results
from cl_sim.config import from_dict
from cl_sim.errors import BadCheckpoint, BadConfig
from cl_sim.metrics.association import video_ap
from cl_sim.metrics.clips import Tracked
from cl_sim.strategy import Strategy
from cl_sim.tracker import TrackerConfig
from cl_sim.types import Batch


@runtime_checkable
class Exportable(Protocol):
    """A stream whose test videos come from an annotation file."""

    test_videos: Sequence[Video]

    @property
    def annotations(self) -> Annotations:
        """The file of the test videos."""
        ...

    def test_batch(self, number: int) -> Batch:
        """A whole test video, for every run.    Shapes: each [R, 1, ...]."""
        ...

    def original(self, mask: Tensor, video: Video) -> NDArray[np.bool_]:
        """A mask in the size of its video.    Shapes: [H, W] -> [height, width]."""
        ...


def export(run_dir: Path, seed: int, path: Path) -> tuple[int, dict[str, float]]:
    """Write the results of one seed of a run; returns how many tracks, and the AP of what was written, by name.

    Raises: BadConfig if the run has no such seed, no annotated videos or no classes; BadCheckpoint if it was not trained.
    """
    record = store.record_of(run_dir)
    if seed not in record["seeds"]:
        raise BadConfig(f"--seed is {seed}, but {run_dir.name} has the seeds {', '.join(map(str, record['seeds']))}")
    group = next(number for number, seeds in enumerate(record["groups"]) if seed in seeds)
    config, seeds = from_dict(record["config"]), tuple(record["groups"][group])
    stream = session.build_stream(config, seeds)
    if not isinstance(stream, Exportable):
        raise BadConfig(
            f"{run_dir.name} is on '{config.stream.name}'; results are made of annotated videos (stream video)"
        )
    strategy = session.build_strategy(config, stream, seeds)
    state, _ = checkpoint.latest(run_dir / f"group-{group}", strategy.env.device, f"{record['id']}/group-{group}")
    if state is None:
        raise BadCheckpoint(
            f"{run_dir.name} has no checkpoint of seed {seed}; train it first: cl-sim resume {run_dir.name}"
        )
    strategy.load_state_dict(state["strategy"])
    write_results(path, results(stream, strategy, seeds.index(seed)), stream.annotations)
    again = read_results(path, stream.annotations)
    return len(again), scores(again, stream)


def results(stream: Exportable, strategy: Strategy, run: int = 0) -> list[Result]:
    """The named tracks of all test videos, as one run sees them.    Raises: BadConfig without class scores."""
    cfg = getattr(strategy, "cfg", None)
    tracker = cfg if isinstance(cfg, TrackerConfig) else TrackerConfig()
    found: list[Result] = []
    strategy.eval()
    for number, video in enumerate(stream.test_videos):
        batch = stream.test_batch(number)
        with torch.inference_mode():
            output = strategy.predict(batch)
        dim = int(getattr(strategy, "dim", output.shape[-1]))
        if output.shape[-1] == dim:
            raise BadConfig("the run gives its tracks no classes; train it with --set strategy.w_class=1")
        made = Tracked(output, batch, tracker, dim)
        ids, masks = made.ids[run, 0].cpu(), batch["masks"][run, 0].cpu()
        logits = output[run, 0, ..., dim:].cpu().double()
        for track, label, score in best_pairs(ids, logits):
            rows = ids == track  # [T, Q]
            shown = [masks[t, rows[t]] for t in range(len(rows))]
            tube = tuple(stream.original(mask[0], video) if len(mask) else None for mask in shown)
            found.append(Result(video.id, label, score, tube))
    strategy.train()
    return found


def best_pairs(ids: Tensor, logits: Tensor) -> list[tuple[int, int, float]]:
    """Pairs of track and class by falling probability, as many as there are classes: (track, class, probability).

    Shapes: ids [T, Q] (-1: no track), logits [T, Q, K].
    """
    tracks = [int(track) for track in np.unique(ids.numpy()) if track >= 0]
    if not tracks:
        return []
    means = torch.stack([logits[ids == track].mean(0).softmax(0) for track in tracks])  # [n, K]
    classes = means.shape[1]
    order = means.flatten().argsort(descending=True, stable=True)[:classes].tolist()
    return [(tracks[k // classes], k % classes, float(means.flatten()[k])) for k in order]


def scores(claims: Sequence[Result], stream: Exportable) -> dict[str, float]:
    """AP and its kin of results, against the annotations of the test videos."""
    asked = {video.id for video in stream.test_videos}
    truth = [_tube(one) for one in true_results(stream.annotations) if one.video_id in asked]
    return dict(video_ap(truth, [_tube(one) for one in claims]))


def _tube(one: Result) -> dict[str, Any]:
    return {
        "video_id": one.video_id,
        "category_id": one.label,
        "segmentations": list(one.masks),
        "score": one.score,
    }
