"""The encoder `query`: any net that proposes instances itself, such as a DETR or Mask2Former with an embedding head.

It looks at whole frames and answers, for each of its queries, class scores (the last class is "no object"), mask scores and an
embedding. Training matches queries to the true instances by a Hungarian assignment; tracking takes queries for candidates.

Source: Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", as released, for the costs.
Departures: mask costs are taken on all cells of the mask scores, not on 12544 random points; instances that are not visible
are not assigned; the segmenter's own losses are left to whoever brings it (bring it trained).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cl_sim.clips import Roll
from cl_sim.encoders.base import EncoderConfig
from cl_sim.errors import BadConfig
from cl_sim.tracker import overlap_of
from cl_sim.types import Batch, Fields

CLASS, MASK, DICE = 2.0, 5.0, 5.0  # weights of the three costs
FOUND = 0.5  # overlap from which a query shows an instance


@dataclass(frozen=True, kw_only=True)
class QueryConfig(EncoderConfig):
    """Settings of `query`."""

    factory: str = ""  # module:function that makes the net from channels and classes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mean:
            raise BadConfig("encoder.mean has no effect with encoder.name=query; scale the frames inside your net")


class Query(nn.Module):
    """Someone's net, its three answers side by side: embedding, class scores, mask scores.

    The net takes frames in [0, 1] and returns class scores [N, Q, K + 1], mask scores [N, Q, h, w] and embeddings [N, Q, D]; its
    attributes `dim` and `size` are D and (h, w).

    Shapes: frames [N, C, H, W] -> [N, Q, D + K + 1 + h * w].
    """

    takes, proposes = ("frames",), True

    def __init__(self, net: Any, classes: int) -> None:
        super().__init__()
        self.net, self.dim, self.size, self.classes = net, int(net.dim), tuple(net.size), classes

    def forward(self, frames: Tensor) -> Tensor:
        """All answers of all queries."""
        numbers = frames.float() / 255 if frames.dtype == torch.uint8 else frames
        scores, masks, embedded = self.net(numbers)
        return torch.cat([embedded, scores, masks.flatten(2)], -1)


class Reader:
    """Takes the answers of `query` apart, and compares them with what was there."""

    def __init__(self, net: Query) -> None:
        self.dim, self.size, self.classes = net.dim, net.size, net.classes

    def parts(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, class scores and mask scores.    Shapes: [..., Q, D + K + 1 + h * w] -> [..., Q, D], [..., Q, K + 1],
        [..., Q, h, w].
        """
        own, scores, masks = torch.split(output, [self.dim, self.classes + 1, self.size[0] * self.size[1]], -1)
        return own, scores, masks.reshape(*masks.shape[:-1], *self.size)

    def roll(self, output: Tensor, batch: Batch, who: Roll) -> Roll:
        """The roll with queries in place of boxes; instances that no query is left for are not present.

        Shapes: roll of R runs and B clips, [R, B, ...]. It works on the host.
        """
        _, scores, masks = (x.detach() for x in self.parts(output))
        run, clip, frame = (
            torch.arange(n, device=output.device).view(-1, *[1] * k)
            for n, k in zip(output.shape[:3], (3, 2, 1), strict=True)
        )
        match = who.match.transpose(2, 3)  # [R, B, T, G], rows of the batch
        labels, true = batch["label"][run, clip, frame, match], batch["masks"][run, clip, frame, match]
        costs = assignment_cost(scores, masks, labels, resized(true, self.size))
        there = who.present.transpose(2, 3).cpu().numpy()
        chosen = np.full(there.shape, -1)
        for place in np.ndindex(*there.shape[:3]):
            chosen[place] = assigned(costs[place].cpu().numpy(), there[place])
        found = torch.as_tensor(chosen, device=output.device).transpose(2, 3)  # [R, B, G, T]
        free = ~(found[..., None] == torch.arange(output.shape[3], device=output.device)).any(2)  # [R, B, T, Q]
        return Roll(found >= 0, found.clamp(min=0), torch.ones_like(free), free, who.lost)

    def candidates(self, output: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        """What the tracker and its metrics take: embeddings and class scores, and a batch whose rows are the queries.

        The score of a query is its largest probability of a class; the true instances are kept beside.
        """
        own, scores, masks = self.parts(output)
        shape = batch["masks"].shape[-2:]
        large = F.interpolate(masks.flatten(0, 2), shape, mode="bilinear", align_corners=False)
        drawn = (large > 0).view(*masks.shape[:4], *shape)  # [R, B, T, Q, H, W]
        true = batch.get("true_instance", batch["instance"].masked_fill(~batch["present"], -1))
        known = batch.get("true_masks", batch["masks"])
        pairs = zip(known.flatten(0, 2), drawn.flatten(0, 2), strict=True)
        overlap = torch.stack([overlap_of(*pair) for pair in pairs]).view(*true.shape, -1)  # [R, B, T, G, Q]
        best, query = overlap.masked_fill((true < 0)[..., None], 0).max(-1)  # [R, B, T, G]
        shown = (best >= FOUND)[..., None] & (query[..., None] == torch.arange(masks.shape[3], device=output.device))
        instance = torch.where(shown, true[..., None], -1).amax(-2)
        label = torch.where(shown, batch["label"][..., : true.shape[-1], None], -1).amax(-2)
        rows = {
            "masks": drawn,
            "instance": instance,
            "label": label,
            "present": torch.ones_like(instance, dtype=torch.bool),
            "score": scores.softmax(-1)[..., :-1].amax(-1),
            "true_instance": true,
            "true_masks": known,
        }
        return torch.cat([own, scores[..., :-1]], -1), {**batch, **rows}


def resized(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    """The share of each cell that a mask covers.    Shapes: [..., H, W] bool -> [..., h, w] float."""
    flat = masks.flatten(0, -3)[:, None].float()
    return F.adaptive_avg_pool2d(flat, (size[0], size[1])).view(*masks.shape[:-2], *size)


def assignment_cost(scores: Tensor, masks: Tensor, labels: Tensor, true: Tensor) -> Tensor:
    """What it would cost to let each query show each instance: class probability, mask cross-entropy and dice, 2 : 5 : 5.

    An unknown label (-1) costs nothing.

    Shapes: scores [..., Q, K + 1], masks [..., Q, h, w], labels [..., G], true [..., G, h, w] in [0, 1] -> [..., Q, G].
    """
    share = scores.softmax(-1)
    wanted = labels.clamp(min=0)[..., None, :].expand(*share.shape[:-1], labels.shape[-1])
    named = -share.gather(-1, wanted).masked_fill((labels < 0)[..., None, :], 0)
    flat, target = masks.flatten(-2), true.flatten(-2)  # [..., Q, P], [..., G, P]
    cells = flat.shape[-1]
    entropy = (F.softplus(-flat) @ target.mT + F.softplus(flat) @ (1 - target).mT) / cells
    drawn = flat.sigmoid()
    dice = 1 - (2 * drawn @ target.mT + 1) / (drawn.sum(-1)[..., :, None] + target.sum(-1)[..., None, :] + 1)
    return CLASS * named + MASK * entropy + DICE * dice


def assigned(cost: NDArray[np.float64], there: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The query of every instance that is there, -1 for the others, at the least total cost.    Shapes: [Q, G], [G] -> [G]."""
    from scipy.optimize import linear_sum_assignment

    chosen = np.full(len(there), -1)
    known = np.flatnonzero(there)
    rows, columns = linear_sum_assignment(cost[:, known])
    chosen[known[columns]] = rows
    return chosen


def build(name: str, cfg: QueryConfig, fields: Fields, classes: int) -> Query:
    """The net that the setting names.    Raises: BadConfig if it cannot be found or lacks `dim` or `size`."""
    module, colon, function = cfg.factory.partition(":")
    hint = "it must be MODULE:FUNCTION, called with channels and classes; use --set encoder.factory=mypackage.nets:make"
    if not colon:
        raise BadConfig(f"encoder.factory is '{cfg.factory}'; {hint}")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadConfig(f"encoder.factory is '{cfg.factory}': {error}; {hint}") from None
    net = make(fields["frames"].shape[1], classes)
    if not hasattr(net, "dim") or not hasattr(net, "size"):
        raise BadConfig(
            f"encoder.factory is '{cfg.factory}', but its net has no 'dim' (width of an embedding) and 'size' (of its masks); "
            "set both"
        )
    made = Query(net, classes)
    if cfg.frozen:
        made.requires_grad_(False)
    return made
