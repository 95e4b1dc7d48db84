"""Losses as pure functions of one run; `cl_sim.runs.per_run` lifts them to R runs.

Shapes are static: classes that do not occur are counted as zero or masked, nothing is selected by its value, so the same
code runs on a CPU, under vmap and inside a CUDA graph. N rows in a batch, A anchors, C classes, D features.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.constants import places
from cl_sim.encoders.classifier import unit

Contrast = Literal["proxy", "one", "all"]
Similarity = Literal["dot", "cos"]
Scope = Literal["row", "batch"]
Pairs = Literal["all", "model"]
SHORTEST = 1e-8  # a row that is shorter than this is divided by it instead of by its norm


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Rows of each class.    Shapes: labels [N] -> [C] int64."""
    return (labels[:, None] == places(classes, labels.device)).sum(0)


def cosine_scores(features: Tensor, proxies: Tensor, tau: float) -> Tensor:
    """Cosines between features and proxies over tau, 1e-6 added to each norm.    Shapes: [N, D], [C, D] -> [N, C]."""
    return unit(features) @ unit(proxies).T / tau


def proxy_contrast(features: Tensor, labels: Tensor, proxies: Tensor, tau: float, mode: Contrast = "proxy") -> Tensor:
    """Contrast of each row with the proxies of the batch's labels, one proxy per row of the batch.

    `proxy`: a softmax over the classes of the batch in which a class weighs as much as it has rows. `one`: rows are also
    contrasted with the other rows; `all`: and proxies with all rows and with the other rows' proxies.

    Shapes: features [N, D], labels [N], proxies [C, D] -> [].
    Source: Lin et al. 2023, "PCR: Proxy-based Contrastive Replay for Online Class-Incremental Continual Learning"; the modes:
    Lin et al. 2025, "HPCR: Holistic Proxy-based Contrastive Replay for Online Continual Learning", as released.
    """
    if mode == "proxy":
        scores = cosine_scores(features, proxies, tau)  # [N, C]
        rivals = class_counts(labels, len(proxies)).to(scores.dtype).log()  # log n_c; -inf: not there
        own = scores.gather(1, labels[:, None])[:, 0]
        return ((scores + rivals).logsumexp(1) - own).mean()
    elements = torch.cat([unit(features), unit(proxies)[labels]])  # [2N, D]
    owners = torch.cat([labels, labels])
    anchors = len(labels) if mode == "one" else len(owners)
    return _contrast(elements, owners, anchors, tau).mean()


def supcon(z: Tensor, y: Tensor, tau: float) -> Tensor:
    """Supervised contrastive loss, averaged over the anchors that have a positive; 0 if none has.

    Shapes: z [N, D] unit rows, y [N] -> [].
    Source: Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2.
    """
    if len(y) < 2:
        return z.sum() * 0
    paired = ((y[:, None] == y).sum(1) > 1).to(z.dtype)  # [N]
    per_anchor = _contrast(z, y, len(y), tau)
    return (per_anchor * paired).sum() / paired.sum().clamp(min=1)


def supcon_each(z: Tensor, y: Tensor, tau: float) -> Tensor:
    """What each anchor adds to `supcon`; 0 for one without a positive.    Shapes: z [N, D] unit rows, y [N] -> [N]."""
    return _contrast(z, y, len(y), tau)


def _contrast(elements: Tensor, labels: Tensor, anchors: int, tau: float) -> Tensor:
    """Minus the mean log-share of the positives of the first elements, each left out of its own set; 0 without positives.

    Shapes: elements [E, D], labels [E] -> [anchors].
    """
    itself = torch.eye(anchors, len(labels), dtype=torch.bool, device=labels.device)
    log_share = (elements[:anchors] @ elements.T / tau).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (labels[:anchors, None] == labels) & ~itself
    return -log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1).clamp(min=1)


def proxy_distill(scores: Tensor, stored: Tensor, columns: Tensor) -> Tensor:
    """Mean squared gap between scores now and as stored, over the classes in `columns`, repeated as often as they are there.

    Shapes: scores and stored [A, C], columns [N] class numbers -> [].
    Source: Lin et al. 2025, "HPCR", proxy-based distillation, as released.
    """
    weights = class_counts(columns, scores.shape[1]).to(scores.dtype)
    return ((scores - stored).square() * weights).sum() / (len(scores) * len(columns))


def sample_distill(features: Tensor, stored: Tensor, tau: float) -> Tensor:
    """Cross-entropy between each row's similarities to the other rows now and as stored; 0 for a single row.

    Shapes: features and stored [A, D] -> [].
    Source: Lin et al. 2025, "HPCR", sample-based distillation, as released.
    """
    if len(features) < 2:
        return features.sum() * 0
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    now, then = (unit(rows) @ unit(rows).T / tau for rows in (features, stored))
    log_now = now.masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    return -(then.masked_fill(itself, -torch.inf).softmax(1) * log_now).sum(1).mean()


def distill(scores: Tensor, taught: Tensor, tau: float) -> Tensor:
    """Cross-entropy between the softmaxes of taught and own scores over tau, times tau squared, averaged over rows.

    The factor keeps the gradients' size when tau changes. No gradient flows into what is taught.

    Shapes: scores and taught [N, C] -> [].
    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; Li and Hoiem 2016, "Learning without Forgetting".
    """
    target = (taught.detach() / tau).softmax(1)
    return -(target * (scores / tau).log_softmax(1)).sum(1).mean() * tau**2


def dual_view(first: Tensor, second: Tensor, joint: Tensor, labels: Tensor, weight: float) -> Tensor:
    """What two views of a batch must do: both answer the label, all three answers spread over the classes, and agree.

    Cross-entropy of the views, plus the mean negative entropy of the three mean answers, plus `weight` times the mean
    absolute difference between each view's shares and the joint ones.

    Shapes: scores of the views and of both together [N, C], labels [N] -> [].
    Source: Gu et al. 2022, "Not Just Selection, but Exploration: Online Class-Incremental Continual Learning via Dual View
    Consistency", as released.
    """
    supervised = (F.cross_entropy(first, labels) + F.cross_entropy(second, labels)) / 2
    shares = torch.stack([first, second, joint]).softmax(-1)  # [3, N, C]
    mean = shares.mean(1).clamp(min=torch.finfo(shares.dtype).eps)
    spread = (mean * mean.log()).sum(-1).mean()
    return supervised + spread + weight * (shares[:2] - shares[2]).abs().mean()


def label_contrast(similarity: Tensor, labels: Tensor, tau: float, itself: bool = True) -> Tensor:
    """Minus the log-share of the columns that bear a row's label, averaged over these and then over the rows.

    Without `itself`, a row is not among its columns but still counts as one of those averaged over.

    Shapes: similarity [N, N], labels [N], of rows and columns alike -> [].
    Source: Guo et al. 2022, "Online Continual Learning Through Mutual Information Maximization", as released.
    """
    same = labels[:, None] == labels
    return (_log_shares(similarity, tau, itself) * same).sum(1).div(same.sum(1)).mean().neg()


def pair_contrast(similarity: Tensor, labels: Tensor, tau: float) -> Tensor:
    """Minus the mean log-share of a row's other view, plus twice the contrast of labels, rows not among their columns.

    Shapes: similarity [2N, 2N], labels [2N], N rows and then their other views in the same order -> [].
    Source: as `label_contrast`.
    """
    half, log_share = len(labels) // 2, _log_shares(similarity, tau, itself=False)
    partners = torch.cat([log_share.diagonal(half), log_share.diagonal(-half)])
    return -partners.mean() + 2 * label_contrast(similarity, labels, tau, itself=False)


def _log_shares(similarity: Tensor, tau: float, itself: bool) -> Tensor:
    """Log-softmax of every row, 0 for the row itself if it does not take part.    Shapes: [N, N] -> same."""
    if itself:
        return (similarity / tau).log_softmax(1)
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    return (similarity / tau).masked_fill(own, -torch.inf).log_softmax(1).masked_fill(own, 0)


def info_nce(
    x: Tensor,
    y: Tensor,
    tau: float,
    similarity: Similarity = "dot",
    labels: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Contrast of two views of B samples: each of the 2B rows finds its other view among the rows of both views.

    With labels, rows of the anchor's own label are no negatives; an anchor without negatives is left out, and the loss is 0 if
    all are (also for a single sample). Samples that are not `valid` are neither anchors nor negatives.

    Shapes: x and y [B, D], labels [B], valid [B] bool -> [].
    Source: Qin et al. 2023, "Meta-optimized Contrastive Learning for Sequential Recommendation", as released (the mean over
    the 2B rows, where the paper adds two directions); labels and cosines are ours.
    """
    scores, negative = _pairs(x, y, tau, similarity, labels, valid)  # [2B, 2B]
    positive = _positives(scores)
    itself_and_kin = ~(negative | _partner(len(x), x.device))
    per_row = scores.masked_fill(itself_and_kin, -torch.inf).logsumexp(1) - positive
    return _mean_where(per_row, negative.any(1))


def margin_regulariser(
    x: Tensor,
    y: Tensor,
    tau: float = 1.0,
    similarity: Similarity = "dot",
    labels: Tensor | None = None,
    scope: Scope = "row",
    valid: Tensor | None = None,
) -> Tensor:
    """How far the positives lie above, and the negatives below, the margin between them; 0 for a single sample.

    With p the positive of a row and m its largest negative, lo is the smaller of the two and hi the larger: the mean of p - lo
    over the rows plus the mean of hi - n over all negatives n, each cut at 0. It is 0 when all similarities are equal, so
    it belongs beside a contrast that spreads the rows; alone it would collapse them.

    `scope="batch"` takes the smallest positive and the largest negative of the whole batch for every row. Labels and
    `valid` leave out rows as in `info_nce`.

    Shapes: x and y [B, D], labels [B], valid [B] bool -> [].
    Source: Qin et al. 2023, "Meta-optimized Contrastive Learning for Sequential Recommendation": as released by rows, as
    printed over the batch.
    """
    scores, negative = _pairs(x, y, tau, similarity, labels, valid)
    counted = negative.any(1)  # [2B]
    positive = _positives(scores)
    least = positive
    most = scores.masked_fill(~negative, -torch.inf).amax(1)
    if scope == "batch":
        least = positive.masked_fill(~counted, torch.inf).amin(keepdim=True)
        most = most.amax(keepdim=True)
    most = torch.where(most.isinf(), positive, most)  # no negatives: no margin
    least = torch.where(least.isinf(), positive, least)
    low, high = torch.minimum(least, most), torch.maximum(least, most)  # [2B]
    above = (positive - low).relu()
    below = (high[:, None] - scores).relu()
    return _mean_where(above, counted) + _mean_where(below, negative)


def model_contrast(
    h1: Tensor,
    h2: Tensor,
    w1: Tensor,
    w2: Tensor,
    labels: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    tau: float = 1.0,
    similarity: Similarity = "dot",
    weight: float = 0.1,
    pairs: Pairs = "all",
    scope: Scope = "row",
) -> Tensor:
    """Contrasts of each data view h with the other's model view w, and of both model views, with the margin regulariser.

    The regulariser has the given weight and concerns the same three pairs, or with `pairs="model"` only w1 and w2.

    Shapes: views [B, D], labels [B], valid [B] bool -> [].
    Source: Qin et al. 2023, "Meta-optimized Contrastive Learning for Sequential Recommendation": L_cl2 and L_reg as released;
    the paper regularises only w1 and w2, over the batch.
    """
    contrasted = ((h1, w2), (h2, w1), (w1, w2))
    regularised = contrasted if pairs == "all" else contrasted[2:]
    contrast = torch.stack([info_nce(x, y, tau, similarity, labels, valid) for x, y in contrasted]).sum()
    margin = [margin_regulariser(x, y, tau, similarity, labels, scope, valid) for x, y in regularised]
    return contrast + weight * torch.stack(margin).sum()


def mean_cosine(w1: Tensor, w2: Tensor, valid: Tensor) -> Tensor:
    """Mean inner product of different samples' unit rows, averaged over both views: near 1 where a view has collapsed.

    0 for fewer than two valid samples.    Shapes: w1 and w2 [B, D] unit rows, valid [B] bool -> [].
    """
    count = valid.sum()
    rows = torch.stack([w1, w2]).masked_fill(~valid[:, None], 0)  # [2, B, D]
    among = rows.sum(1).square().sum(-1) - rows.square().sum((1, 2))
    return (among / (count * (count - 1)).clamp(min=1)).mean()


def _pairs(
    x: Tensor, y: Tensor, tau: float, similarity: Similarity, labels: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Similarities over tau of all rows of both views, and which of them are negatives.    Shapes: -> [2B, 2B] both."""
    rows = torch.cat([x, y])
    if similarity == "cos":
        rows = F.normalize(rows, dim=1, eps=SHORTEST)
    negative = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    if labels is not None:
        negative = negative & (labels[:, None] != labels)
    if valid is not None:
        negative = negative & valid[:, None] & valid
    return rows @ rows.T / tau, negative.tile(2, 2)


def _partner(size: int, device: torch.device) -> Tensor:
    """Which entry of each row is its other view.    Shapes: -> [2B, 2B] bool."""
    return torch.eye(2 * size, dtype=torch.bool, device=device).roll(size, 0)


def _positives(scores: Tensor) -> Tensor:
    """Each row's similarity to its other view.    Shapes: [2B, 2B] -> [2B]."""
    half = len(scores) // 2
    return torch.cat([scores.diagonal(half), scores.diagonal(-half)])


def _mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted entries; 0 if there are none.    Shapes: same, same -> []."""
    return values.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)


def fixmatch(weak_logits: Tensor, strong_logits: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """Consistency of a strong view with the class of the weak view, where the weak view is sure enough of it.

    The sum over the sure samples is divided by the number of all samples. `threshold` is one probability or one per class;
    reaching it suffices. The second result is every sample's cross-entropy, sure or not; no gradient reaches the weak view.

    Shapes: weak_logits and strong_logits [N, C], threshold [] or [C] -> [], [N].
    Source: Sohn et al. 2020, "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", eq. 4; a
    threshold per class: Zhang et al. 2021, "FlexMatch", eq. 11.
    """
    confidence, guess = weak_logits.detach().softmax(1).max(1)  # [N] each
    needed = threshold[guess] if isinstance(threshold, Tensor) and threshold.dim() else threshold
    per_sample = F.cross_entropy(strong_logits, guess, reduction="none")
    sure = (confidence >= needed).to(per_sample.dtype)
    return (per_sample * sure).sum() / max(len(guess), 1), per_sample


def alignment(p: Tensor, z: Tensor, neighbours: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Minus the mean cosine between each prediction and the other view's target, averaged with that target's neighbours.

    Rows 0..B-1 are view 1, B..2B-1 view 2 of the same images. Neighbour j of target o counts weights[o, j] times beside the
    target's once (anchor pairing). No gradient enters targets and neighbours. The published row pairing is this function
    on batches that were enlarged with `enhanced`, without neighbours.

    Shapes: p and z [2B, D], neighbours [2B, k, D] of the rows of z, weights [2B, k] (none: 1 each) -> [].
    Source: Poulakakis-Daktylidis and Jamali-Rad 2024, "BECLR: Batch Enhanced Contrastive Few-Shot Learning". Departures: anchor
    pairing is ours; in the released code the appended rows get no gradient.
    """
    other = F.normalize(z.detach(), dim=-1).roll(len(z) // 2, 0)  # row r: the other view of the image of r
    p = F.normalize(p, dim=-1)
    likeness = (p * other).sum(-1)
    if neighbours is None:
        return -likeness.mean()
    near = F.normalize(neighbours.detach(), dim=-1).roll(len(z) // 2, 0)  # [2B, k, D]
    weight = near.new_ones(near.shape[:2]) if weights is None else weights.to(p.dtype).roll(len(z) // 2, 0)
    whole = likeness + (weight * (near * p[:, None]).sum(-1)).sum(1)
    return -(whole / (1 + weight.sum(1))).mean()


def uniformity(z: Tensor, tau: float) -> Tensor:
    """Log of the mean of exp(cosine / tau) over all pairs of rows of different images; 0 for a single image.

    Rows 0..B-1 are view 1, B..2B-1 view 2 of the same images.    Shapes: z [2B, D] -> [].
    Source: BECLR, the negatives of its loss; cf. Wang and Isola 2020, "Understanding Contrastive Representation Learning
    through Alignment and Uniformity on the Hypersphere".
    """
    images = len(z) // 2
    if images < 2:
        return z.sum() * 0
    z = F.normalize(z, dim=-1)
    same = torch.eye(images, dtype=torch.bool, device=z.device).repeat(2, 2)
    return (z @ z.T / tau).masked_fill(same, -torch.inf).flatten().logsumexp(0) - math.log(4 * images * (images - 1))


def enhanced(rows: Tensor, neighbours: Tensor) -> Tensor:
    """The enlarged batch of the published row pairing: per view the rows, then the neighbours of each row, best first.

    Shapes: rows [2B, D], neighbours [2B, k, D] -> [2B(1 + k), D], unit rows; no gradient enters the neighbours.
    Source: BECLR, as released.
    """
    views = zip(F.normalize(rows, dim=-1).chunk(2), F.normalize(neighbours.detach(), dim=-1).chunk(2), strict=True)
    return torch.cat([part for row, near in views for part in (row, near.flatten(0, 1))])


def bank_contrast(
    anchors: Tensor, positives: Tensor, negatives: Tensor, positive_mask: Tensor, negative_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Contrast of anchors with the positives and negatives of each: on dot products, and on cosines.

    embed: log(1 + sum over pairs of a positive and a negative of exp(a.n - a.p)); cosine: mean squared gap of the cosines to 1
    for positives and to 0 for negatives. Both are means over the anchors that have a positive and a negative, unweighted, and 0
    (with a graph) if there are none. Half-precision inputs are computed in float32.

    Shapes: anchors [A, D], positives [A, P, D], negatives [A, N, D], masks [A, P] and [A, N] bool -> [], [].
    Source: Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", as released.
    """
    if anchors.dtype in (torch.float16, torch.bfloat16):
        anchors, positives, negatives = anchors.float(), positives.float(), negatives.float()
    if not positives.shape[1] or not negatives.shape[1] or not len(anchors):
        return anchors[:0].sum(), anchors[:0].sum()
    counted = positive_mask.any(1) & negative_mask.any(1)  # [A]
    anchors = anchors.masked_fill(~counted[:, None], 0)  # padding may hold anything
    takes = torch.cat([positive_mask, negative_mask], 1) & counted[:, None]  # [A, P + N]
    others = torch.cat([positives, negatives], 1).masked_fill(~takes[..., None], 0)
    likeness = (anchors[:, None] * others).sum(-1)
    wanted = torch.arange(others.shape[1], device=anchors.device) < positives.shape[1]  # [P + N]
    hole = ~takes & counted[:, None]  # rows that count for nothing keep finite numbers, for the sake of their gradients
    away = likeness.masked_fill(hole, -torch.inf)[:, positives.shape[1] :].logsumexp(1)
    near = (-likeness).masked_fill(hole, -torch.inf)[:, : positives.shape[1]].logsumexp(1)
    embed = torch.logaddexp(away + near, torch.zeros_like(near))
    cosines = (F.normalize(anchors, dim=1, eps=SHORTEST)[:, None] * F.normalize(others, dim=2, eps=SHORTEST)).sum(-1)
    gaps = (cosines - wanted.to(cosines.dtype)).square().masked_fill(~takes, 0)
    per_anchor = gaps.sum(1) / takes.sum(1).clamp(min=1)
    return _mean_where(embed, counted), _mean_where(per_anchor, counted)


def next_item(scores: Tensor, target: Tensor, counted: Tensor, candidate: Tensor) -> Tensor:
    """Cross-entropy of the next item among the candidates, averaged over the counted rows; 0 without one.

    Shapes: scores [B, I + 1], target [B], counted [B] bool, candidate [I + 1] bool -> [].
    """
    allowed = scores.masked_fill(~candidate, -torch.inf)
    each = allowed.logsumexp(1) - scores.gather(1, target.long()[:, None])[:, 0]
    return each.masked_fill(~counted, 0).sum() / counted.sum().clamp(min=1)
