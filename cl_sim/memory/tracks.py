"""What is remembered of instances over the frames of a video: a few newest vectors of each, and their running average.

Everything is a pure function on dense slots: M tracks, H stored vectors of each (the newest last), D features. Slots that hold
nothing have id -1, seen 0 and an empty mask. The functions are written for one video; lift them with vmap to many.

Source: Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", as released; the
read-out `temporal`: Wu et al. 2022, "In Defense of Online Models for Video Instance Segmentation" (IDOL).
Departures: a video whose tracks have all died goes on as at its first frame, ids counting on (the released code fails).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Readout = Literal["similarity", "last", "momentum", "temporal"]
MOMENTUM = 0.75  # weight of the newest vector in the read-out `momentum`
SHORTEST = 1e-8  # norms below this count as this


def running_average(average: Tensor, history: Tensor, mask: Tensor, new: Tensor, detach: bool = False) -> Tensor:
    """The average moved towards a new vector, the further the more that vector agrees with what is stored.

    The weight of the new one is its mean cosine to the stored vectors, cut at 0. Where nothing is stored the average is the new
    vector. With `detach` no gradient enters the weight.

    Shapes: average [..., D], history [..., H, D], mask [..., H] bool, new [..., D] -> [..., D].
    """
    stored = history.masked_fill(~mask[..., None], 0)
    cosines = (F.normalize(stored, dim=-1, eps=SHORTEST) * F.normalize(new, dim=-1, eps=SHORTEST)[..., None, :]).sum(-1)
    count = mask.sum(-1)
    agreement = (cosines.sum(-1) / count.clamp(min=1)).clamp(min=0)[..., None]
    if detach:
        agreement = agreement.detach()
    moved = (1 - agreement) * average + agreement * new
    return torch.where((count > 0)[..., None], moved, new)


def last(history: Tensor, mask: Tensor) -> Tensor:
    """The newest stored vector; zeros where nothing is stored.    Shapes: [..., H, D], [..., H] -> [..., D]."""
    order = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    newest = (mask * order).argmax(-1, keepdim=True)  # [..., 1]
    taken = torch.take_along_dim(history, newest[..., None], dim=-2)[..., 0, :]
    return taken.masked_fill(~mask.any(-1, keepdim=True), 0)


def temporal(history: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
    """Mean of the stored vectors weighted by detection score + j / L, for j = 1 (oldest) to L; zeros where nothing is stored.

    Shapes: history [..., H, D], mask and scores [..., H] -> [..., D].
    """
    place = mask.cumsum(-1).to(history.dtype) / mask.sum(-1, keepdim=True).clamp(min=1)
    weight = (scores.to(history.dtype) + place).masked_fill(~mask, 0)
    total = (weight[..., None] * history.masked_fill(~mask[..., None], 0)).sum(-2)
    whole = weight.sum(-1, keepdim=True)
    return total / torch.where(whole > 0, whole, torch.ones_like(whole))


def ageing(age: Tensor, observed: Tensor, max_age: int) -> tuple[Tensor, Tensor]:
    """Frames since each track was last observed, and which tracks live on: those with at most `max_age`.

    Shapes: age [...] int64, observed [...] bool -> both [...].    Units: frames.
    """
    older = (age + 1).masked_fill(observed, 0)
    return older, older <= max_age


def noise(hit: Tensor, pick: Tensor, allowed: Tensor) -> Tensor:
    """Which wrong candidate is stored in place of an instance's own; -1: none, also where none is allowed.

    Shapes: hit [...] bool, pick [...] uniform numbers, allowed [..., Q] bool -> [...] int64.
    """
    count = allowed.sum(-1)
    wanted = (pick.to(torch.float64) * count).long().clamp(max=allowed.shape[-1] - 1)  # from 0
    chosen = ((allowed.cumsum(-1) == wanted[..., None] + 1) & allowed).int().argmax(-1)
    return torch.where(hit & (count > 0), chosen, -1)


def bi_softmax(
    candidates: Tensor, averages: Tensor, candidate_mask: Tensor | None = None, average_mask: Tensor | None = None
) -> Tensor:
    """Likeness of candidates to tracks: the mean of the softmaxes of the dot products over tracks and over candidates.

    Masked rows and columns take no part and get 0. With one track, its softmax over tracks is 1 for every candidate: likeness is
    relative, and a lonely track takes the best candidate whatever it looks like.

    Shapes: candidates [N, D], averages [K, D], masks [N] and [K] bool -> [N, K].
    """
    scores = candidates @ averages.mT
    both = torch.ones_like(scores, dtype=torch.bool)
    if candidate_mask is not None:
        both = both & candidate_mask[..., :, None]
    if average_mask is not None:
        both = both & average_mask[..., None, :]
    return (_shares(scores, both, -1) + _shares(scores, both, -2)) / 2


def cosine(
    candidates: Tensor, averages: Tensor, candidate_mask: Tensor | None = None, average_mask: Tensor | None = None
) -> Tensor:
    """Likeness of candidates to tracks by cosine; masked ones get 0.    Shapes: as `bi_softmax`."""
    scores = F.normalize(candidates, dim=-1, eps=SHORTEST) @ F.normalize(averages, dim=-1, eps=SHORTEST).mT
    if candidate_mask is not None:
        scores = scores.masked_fill(~candidate_mask[..., :, None], 0)
    return scores if average_mask is None else scores.masked_fill(~average_mask[..., None, :], 0)


def _shares(scores: Tensor, both: Tensor, axis: int) -> Tensor:
    """Softmax along an axis over what takes part, 0 elsewhere."""
    if not scores.shape[axis]:
        return scores
    nothing = ~both.any(axis, keepdim=True)
    return scores.masked_fill(~both & ~nothing, -torch.inf).softmax(axis).masked_fill(~both, 0)


class Tracks(NamedTuple):
    """The tracks of one video.    Units: age in frames.

    Shapes: id [M] int64 (-1: free), average and slow [M, D], history [M, H, D], scores and mask [M, H], seen and age [M],
    given [] (how many ids were ever given out).
    """

    id: Tensor
    average: Tensor
    slow: Tensor  # the fixed average of the read-out `momentum`
    history: Tensor
    scores: Tensor
    mask: Tensor
    seen: Tensor  # how often it was observed
    age: Tensor
    given: Tensor

    @property
    def alive(self) -> Tensor:
        """Which slots hold a track.    Shapes: -> [M] bool."""
        return self.id >= 0

    def read(self, readout: Readout = "similarity") -> Tensor:
        """The vector that each track offers for matching; zeros in free slots.    Shapes: -> [M, D]."""
        if readout == "similarity":
            return self.average
        if readout == "momentum":
            return self.slow
        return last(self.history, self.mask) if readout == "last" else temporal(self.history, self.mask, self.scores)


def empty(slots: int, history: int, like: Tensor) -> Tracks:
    """No tracks yet, for embeddings like these.    Shapes: like [..., D]."""
    rows, width = like.new_zeros(slots, like.shape[-1]), like.shape[-1]
    number = torch.zeros(slots, dtype=torch.int64, device=like.device)
    return Tracks(
        id=number - 1,
        average=rows,
        slow=rows,
        history=like.new_zeros(slots, history, width),
        scores=like.new_zeros(slots, history),
        mask=torch.zeros(slots, history, dtype=torch.bool, device=like.device),
        seen=number,
        age=number,
        given=number[:1].sum(),
    )


def store(tracks: Tracks, observed: Tensor, new: Tensor, scores: Tensor) -> Tracks:
    """Each observed track takes its new vector: average first, then history (the oldest leaves), and age 0.

    Tracks that are not observed stay as they are, their age too (`ageing` raises it).

    Shapes: observed [M] bool, new [M, D], scores [M].
    """
    average = running_average(tracks.average, tracks.history, tracks.mask, new)
    slow = torch.where((tracks.seen > 0)[:, None], MOMENTUM * new + (1 - MOMENTUM) * tracks.slow, new)
    one = observed[:, None]
    pushed = torch.cat([tracks.history[:, 1:], new[:, None]], 1)
    return tracks._replace(
        average=torch.where(one, average, tracks.average),
        slow=torch.where(one, slow, tracks.slow),
        history=torch.where(one[..., None], pushed, tracks.history),
        scores=torch.where(one, torch.cat([tracks.scores[:, 1:], scores[:, None]], 1), tracks.scores),
        mask=torch.where(one, torch.cat([tracks.mask[:, 1:], torch.ones_like(tracks.mask[:, :1])], 1), tracks.mask),
        seen=tracks.seen + observed,
        age=tracks.age.masked_fill(observed, 0),
    )


def clear(tracks: Tracks, gone: Tensor) -> Tracks:
    """Free some slots.    Shapes: gone [M] bool."""
    row = gone[:, None]
    return tracks._replace(
        id=tracks.id.masked_fill(gone, -1),
        average=tracks.average.masked_fill(row, 0),
        slow=tracks.slow.masked_fill(row, 0),
        history=tracks.history.masked_fill(row[..., None], 0),
        scores=tracks.scores.masked_fill(row, 0),
        mask=tracks.mask & ~row,
        seen=tracks.seen.masked_fill(gone, 0),
        age=tracks.age.masked_fill(gone, 0),
    )
