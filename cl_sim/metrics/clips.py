"""Association measured on clips: embeddings are tracked from the first frame on, and the tracks are compared with who was there.

Source: the tracker of `cl_sim.tracker` and the metrics of `cl_sim.metrics.association`; recovery after a forced exchange is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap  # type: ignore[attr-defined]

from cl_sim import boxes
from cl_sim.metrics.association import (
    association_accuracy,
    combine_accuracy,
    combine_hota,
    combine_identity,
    combine_switches,
    hota,
    id_switches,
    identity,
    recovered,
    video_ap,
)
from cl_sim.tracker import TrackerConfig, follow, hashed, mask_overlap, order_of, overlap_of, suppress
from cl_sim.types import Batch

Candidates = Callable[[Tensor, Batch], tuple[Tensor, Batch]]  # the answers of a net that proposes instances, as rows
EXTRAS = (
    "hota",
    "deta",
    "idf1",
    "idsw_per_100",
    "association",
    "reid",
    "reid_1_3",
    "reid_4_8",
    "reid_9_20",
    "reid_over_20",
    "recovery",
    "class_accuracy",
    "video_ap",
)


class Tracked:
    """The tracks of a batch of clips, with everything that the metrics ask for.

    Shapes: ids [R, B, T, Q] (-1: no track), swapped_ids and swapped the same after a forced exchange, overlap [R, B, T, Q, Q].
    """

    def __init__(self, output: Tensor, batch: Batch, cfg: TrackerConfig, dim: int, swap: bool = False) -> None:
        runs, clips, frames, rows = batch["instance"].shape
        flat = {key: value.flatten(0, 1) for key, value in batch.items() if value.dim() > 3 or key == "clip"}
        emb, valid = output[..., :dim].flatten(0, 1), flat["present"]
        scores = flat["score"].to(emb.dtype) if "score" in flat else torch.ones_like(valid, dtype=emb.dtype)
        tie = vmap(lambda clip: hashed(clip, frames, rows))(flat["clip"])
        if "masks" in flat:
            overlap = vmap(vmap(mask_overlap))(flat["masks"] & valid[..., None, None])
        else:
            shown = flat["boxes"] * valid[..., None]
            overlap = boxes.overlap(shown, shown)
        if cfg.suppress < 1:
            order = vmap(vmap(order_of))(scores, valid, tie)
            valid = vmap(vmap(partial(suppress, limit=cfg.suppress)))(overlap, order, valid)
        forced = torch.tensor([False, True] if swap else [False], device=emb.device)
        both = vmap(vmap(partial(_followed, cfg=cfg), (0, 0, 0, 0, None)), (None, None, None, None, 0))
        ids, swapped = both(emb, scores, valid, tie, forced)
        shape = (runs, clips, frames, rows)
        self.ids, self.swapped_ids, self.swapped = (x.view(shape) for x in (ids[0], ids[-1], swapped[-1]))
        self.overlap = overlap.view(*shape, rows)

    def lists(self, batch: Batch, run: int, clip: int) -> tuple[list[Any], list[Any], list[Any]]:
        """Identities, tracks and similarities of one clip, frame by frame, on the host.

        Without true instances in the batch the candidates are taken for them, each as similar to itself as can be; of two rows
        that show one identity, the first is the true one.
        """
        ids = self.ids[run, clip].cpu().numpy()
        own_rows = "true_instance" not in batch
        if own_rows:
            instance = batch["instance"][run, clip].masked_fill(~batch["present"][run, clip], -1)
            shared = self.overlap[run, clip]
        else:
            instance = batch["true_instance"][run, clip]
            shared = vmap(overlap_of)(batch["true_masks"][run, clip], batch["masks"][run, clip])
        whose, overlap = instance.cpu().numpy(), shared.cpu().numpy()
        truth, track, similarity = [], [], []
        for t in range(len(ids)):
            own = _first_of_each(whose[t], np.flatnonzero(whose[t] >= 0))
            claimed = np.flatnonzero(ids[t] >= 0)
            table = overlap[t][own[:, None], claimed]
            if own_rows:
                table = np.where(own[:, None] == claimed, 1.0, table)
            truth.append(whose[t][own])
            track.append(ids[t][claimed])
            similarity.append(table)
        return truth, track, similarity


def _followed(
    emb: Tensor, scores: Tensor, valid: Tensor, tie: Tensor, swap: Tensor, cfg: TrackerConfig
) -> tuple[Tensor, Tensor]:
    return follow(emb, scores, valid, tie, cfg, swap)


def _first_of_each(whose: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first = np.unique(whose[rows], return_index=True)
    kept: NDArray[np.int64] = rows[np.sort(first)]
    return kept


class Association:
    """All association metrics per run and split, over whole clips. It works on the host: evaluation is no part of a step.

    `dim` is the width of the embedding; what follows it in the output are class scores, from which the tracks' classes and the
    video AP are made. Clips without masks are compared by their boxes, and have no tubes.
    """

    def __init__(
        self,
        runs: int,
        splits: int,
        device: torch.device | str,
        cfg: TrackerConfig | None = None,
        dim: int = 0,
        candidates: Candidates | None = None,
    ) -> None:
        self.runs, self.splits, self.device, self.candidates = runs, splits, device, candidates
        self.cfg, self.dim = cfg or TrackerConfig(), dim
        self._clear()

    def _clear(self) -> None:
        cells = [[[] for _ in range(self.splits)] for _ in range(self.runs)]  # type: ignore[var-annotated]
        self.clips: list[list[list[dict[str, Any]]]] = cells

    def update(self, output: Tensor, batch: Batch) -> None:
        """Add the clips of a chunk.

        Shapes: output [R, B, T, Q, dim (+ C)]; batch: the keys of clips, optionally split and valid [R, B].
        """
        if self.candidates is not None:
            output, batch = self.candidates(output, batch)
        dim = self.dim or output.shape[-1]
        made = Tracked(output, batch, self.cfg, dim, swap=True)
        split = batch["split"] if "split" in batch else torch.zeros(output.shape[:2], dtype=torch.int64)
        counted = batch.get("valid", torch.ones_like(split, dtype=torch.bool))
        for run in range(output.shape[0]):
            for clip in range(output.shape[1]):
                if counted[run, clip]:
                    found = self._measure(made, batch, run, clip)
                    if output.shape[-1] > dim and "masks" in batch:
                        found |= _classes(made, output[run, clip, ..., dim:], batch, run, clip)
                    self.clips[run][int(split[run, clip])].append(found)

    def _measure(self, made: Tracked, batch: Batch, run: int, clip: int) -> dict[str, Any]:
        lists = made.lists(batch, run, clip)
        ids, whose, forced = (x[run, clip].cpu().numpy() for x in (made.swapped_ids, batch["instance"], made.swapped))
        return {
            "hota": hota(*lists),
            "identity": identity(*lists),
            "switches": id_switches(*lists),
            "accuracy": association_accuracy(*lists),
            "recovery": recovered(ids, whose, forced),
        }

    def result(self) -> dict[str, Tensor]:
        """Each metric [R, S], AssA under `assa`; NaN for a split without clips. Then starts afresh."""
        cells = [[_summary(clips) for clips in row] for row in self.clips]
        names = ["assa", *(name for name in EXTRAS if any(name in cell for row in cells for cell in row))]
        self._clear()
        tables = {name: [[cell.get(name, math.nan) for cell in row] for row in cells] for name in names}
        return {name: torch.tensor(table, dtype=torch.float64) for name, table in tables.items()}


def _summary(clips: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of the clips of one split."""
    if not clips:
        return {}
    whole = combine_hota(clip["hota"] for clip in clips)
    accuracy = combine_accuracy(clip["accuracy"] for clip in clips)
    back, forced = (sum(clip["recovery"][k] for clip in clips) for k in (0, 1))
    found = {name: float(whole[name]) for name in ("assa", "hota", "deta")}
    found["idf1"] = combine_identity(clip["identity"] for clip in clips)["idf1"]
    found["idsw_per_100"] = combine_switches(clip["switches"] for clip in clips)["idsw_per_100"]
    found["association"] = accuracy["accuracy"]
    found |= {name: value for name, value in accuracy.items() if name.startswith("reid")}
    found["recovery"] = back / forced if forced else math.nan
    if "tubes" in clips[0]:
        right, every = (sum(clip["named"][k] for clip in clips) for k in (0, 1))
        found["class_accuracy"] = right / every if every else math.nan
        truth, claims = (
            [{**tube, "video_id": n} for n, clip in enumerate(clips) for tube in clip["tubes"][k]] for k in (0, 1)
        )
        found["video_ap"] = video_ap(truth, claims)["ap"]
    return found


def claims(ids: NDArray[np.int64], masks: NDArray[np.bool_], logits: NDArray[np.float64]) -> list[dict[str, Any]]:
    """The tracks of one clip as tubes for `video_ap`: class and score from the mean of the class scores over their frames.

    Shapes: ids [T, Q], masks [T, Q, H, W], logits [T, Q, C].
    """
    made = []
    for track in np.unique(ids[ids >= 0]):
        on = ids == track
        mean = logits[on].mean(0)
        share = np.exp(mean - mean.max()) / np.exp(mean - mean.max()).sum()
        tube = {"category_id": int(share.argmax()), "segmentations": _tube(masks, on), "score": float(share.max())}
        made.append({"track": int(track), **tube})
    return made


def _classes(made: Tracked, scores: Tensor, batch: Batch, run: int, clip: int) -> dict[str, Any]:
    """True and claimed tubes of one clip, and how many true observations lie on a track of their class.

    Shapes: scores [T, Q, C].
    """
    ids, masks, label = (x[run, clip].cpu().numpy() for x in (made.ids, batch["masks"], batch["label"]))
    whose = batch["instance"][run, clip].masked_fill(~batch["present"][run, clip], -1).cpu().numpy()
    found = claims(ids, masks, scores.cpu().double().numpy())
    answers = {tube["track"]: tube["category_id"] for tube in found}
    on = (ids >= 0) & (whose >= 0)
    right = sum(int(answers[track] == own) for track, own in zip(ids[on], label[on], strict=True))
    names = {one: int(label[whose == one][0]) for one in np.unique(whose[whose >= 0])}
    if "true_instance" in batch:
        whose, masks = (batch[f"true_{key}"][run, clip].cpu().numpy() for key in ("instance", "masks"))
    true = [
        {"category_id": names.get(one, -1), "segmentations": _tube(masks, whose == one)}
        for one in np.unique(whose[whose >= 0])
    ]
    return {"tubes": (true, found), "named": (right, int(on.sum()))}


def _tube(masks: NDArray[np.bool_], on: NDArray[np.bool_]) -> list[NDArray[np.bool_] | None]:
    """The mask of each frame in which one of the rows is on, None elsewhere.    Shapes: [T, Q, H, W], [T, Q]."""
    return [frame[row.argmax()] if row.any() else None for frame, row in zip(masks, on, strict=True)]
