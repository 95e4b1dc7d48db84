"""ASER: replay and remember by the value of samples to a nearest-neighbour classifier, their KNN Shapley value.

Source: Shim et al. 2021, "Online Class-Incremental Continual Learning with Adversarial Shapley Value".
Symbols: K -> neighbours, n_smp_cls -> per_class, B_n -> new, B_M -> old, M -> memory, ASV and ASV_mu -> score "asv", "asvm".
Departures: as in the online class-incremental code line, the evaluation set of an update also has new samples of rare classes.
That code passes new and old through the net also separately, before the pass that is learned from, which moves BatchNorm
statistics; we do not. Sets have the same shape at every step, padding counting for nothing: where the classes hold fewer
candidates than are to be recalled, random other rows are added, and a mean or largest value over no sample is 0 (both ours; that
code recalls fewer, or fails). Samples are judged as they are stored, training views change only what is learned (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.memory.rows import Rows
from cl_sim.optim import SGD, trainable
from cl_sim.replay import REVIEW, ReplayConfig, Tricks, in_chunks, refuse_rule
from cl_sim.runs import evaluating, join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)


def knn_shapley(
    eval_features: Tensor,
    eval_labels: Tensor,
    cand_features: Tensor,
    cand_labels: Tensor,
    k: int,
    cand_valid: Tensor | None = None,
) -> Tensor:
    """What each candidate adds to the k-nearest-neighbour classification of each evaluation sample; 0 for one not valid.

    Nearness is the squared Euclidean distance, of equally near ones the first is nearer. With at least k candidates this is the
    Shapley value of the game in which a set is worth (its hits among its k nearest) / k.

    Shapes: [E, D], [E], [N, D], [N], cand_valid [N] bool -> [E, N].
    Source: Jia et al. 2019, "Efficient Task-Specific Data Valuation for Nearest Neighbor Algorithms", theorem 1.
    """
    valid = torch.ones_like(cand_labels, dtype=torch.bool) if cand_valid is None else cand_valid
    apart = (eval_features[:, None] - cand_features).square().sum(2)  # [E, N]
    distance = apart.masked_fill(~valid, torch.inf)  # padding comes last
    hit = (eval_labels[:, None] == cand_labels) & valid  # [E, N]
    order = distance.argsort(dim=1, stable=True)
    right = hit.gather(1, order).to(torch.promote_types(distance.dtype, torch.float32))  # 1[y_j = y_e], nearest first
    place = torch.arange(1, len(cand_labels) + 1, dtype=right.dtype, device=right.device)  # j
    after = right.roll(-1, 1) * (place < valid.sum())  # 1[y_j+1 = y_e], 0 beyond the last
    factor = torch.where(place == valid.sum(), 1 / place, place.clamp(max=k) / (k * place))
    values = ((right - after) * factor).flip(1).cumsum(1).flip(1)  # v_j = v_j+1 + ...
    return torch.zeros_like(values).scatter(1, order, values)


def exchange(worth: Tensor, rows: Tensor, valid: Tensor, nowhere: int) -> Tensor:
    """The row that each new sample takes: the better ones take the rows of worse old candidates, one for one, in order of worth.

    As many candidates are kept as there are valid old ones; at equal worth the old one stays.

    Shapes: worth [N + B], old candidates first, rows and valid [N] -> [B], `nowhere` for a sample that is not kept.
    """
    old, new = len(rows), len(worth) - len(rows)
    order = torch.cat([worth[:old].masked_fill(~valid, -torch.inf), worth[old:]]).argsort(descending=True, stable=True)
    kept = torch.arange(len(worth), device=worth.device) < valid.sum()
    enters = kept & (order >= old)
    leaves = ~kept & F.pad(valid, (0, new))[order]
    number = torch.where(leaves, leaves.cumsum(0) - 1, new)  # the first to leave has number 0
    left = torch.full((new + 1,), nowhere, device=rows.device).scatter(0, number, F.pad(rows, (0, new))[order])
    taken = torch.where(enters, left[(enters.cumsum(0) - 1).clamp(min=0)], nowhere)
    return torch.zeros_like(order).scatter(0, order, taken)[old:]


def valued(features: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, valid: Tensor, *, k: int) -> Tensor:
    """`knn_shapley` in a form that can be lifted."""
    return knn_shapley(features, labels, others, other_labels, k, valid)


values, exchanged = per_run(valued), per_run(exchange)


@dataclass(frozen=True, kw_only=True)
class ASERConfig(ReplayConfig):
    """Settings of ASER."""

    per_class: float = 2.0  # memory samples per class in each set; 9 for CIFAR-10, 3 for Mini-ImageNet
    neighbours: int = 3  # of the classifier that samples are valued for
    score: Literal["asvm", "asv"] = "asvm"  # value to the memory less that to the new batch: means, or extremes

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, per_class=1, neighbours=1)
        refuse_rule(self, "aser")


class ASER(Strategy):
    """Replay and memory by adversarial Shapley value."""

    Config, tasks = ASERConfig, frozenset({"classify"})

    def __init__(self, cfg: ASERConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.encode = self.net.part("encoder")
        self.memory = Rows(cfg.capacity, env.fields, env.rng)
        self.tricks = Tricks(cfg, env, self.memory)
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    @property
    def steady(self) -> bool:
        """True once the memory is full: only then are samples valued."""
        return self.memory.holds(self.cfg.capacity)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on recalled and new samples in one pass; then remember new samples worth more than old ones."""
        for _ in range(self.cfg.replay_steps):
            old = self.tricks.harder(self.recall(new)) if len(self.memory) else {}
            loss = self.loss(join(old, new), old) if old else self.loss(new)
            self.descend(loss, self.sgd)  # theta <- SGD(B_M u B_n)
        self.remember(new)
        self.tricks.note(new)
        return {"loss": loss, **self.tricks.tick()}

    def recall(self, new: Batch) -> Batch:
        """Once the memory is full, the candidates that help the memory and hurt the new batch most; before, any.

        Shapes: -> each field [R, n, ...].
        """
        wanted, full = min(self.cfg.replay, self.cfg.capacity), self.memory.holds(self.cfg.capacity)
        if not full:
            return self.memory.sample(wanted)
        some = self.sample_each()  # candidates
        taken = self.memory.mark(some["slot"], some["valid"])
        rest = self.sample_each(taken)
        score = self.score(some, rest, new).masked_fill(~some["valid"], -torch.inf)
        spare = self.rng.choose(wanted, ~taken)  # in case there are fewer candidates than wanted
        last = torch.full_like(spare, torch.finfo(score.dtype).min, dtype=score.dtype)
        best = torch.cat([score, last], 1).argsort(dim=1, descending=True, stable=True)[:, :wanted]
        return self.memory.take(torch.cat([some["slot"], spare], 1).gather(1, best))

    def score(self, some: Batch, rest: Batch, new: Batch) -> Tensor:
        """Adversarial Shapley values of candidates.    Shapes: some [R, N], rest [R, E], new [R, B] -> [R, N]."""
        f, g, h = self.features(some, rest, new)
        friendly, hostile = (
            values(seen, batch["y"], f, some["y"], some["valid"], k=self.cfg.neighbours)
            for seen, batch in ((g, rest), (h, new))
        )  # [R, E, N], [R, B, N]
        counts = rest["valid"][..., None]
        if self.cfg.score == "asv":
            high = friendly.masked_fill(~counts, -torch.inf).amax(1)
            return torch.where(counts.any(1), high, 0) - hostile.amin(1)
        return (friendly * counts).sum(1) / counts.sum(1).clamp(min=1) - hostile.mean(1)

    def remember(self, new: Batch) -> None:
        """Keep everything while there is room, then what is worth more than old samples."""
        late = self.memory.fill(new)
        if late["y"].shape[1]:
            self.memory.write(self.places(late), late)
            self.memory.count(late["y"].shape[1])

    def places(self, new: Batch) -> Tensor:
        """The row that each new sample takes, or M.    Shapes: -> [R, B]."""
        capacity = self.cfg.capacity
        alike = new["y"][..., None] == self.memory.rows()["y"][:, None]  # [R, B, M]
        share = alike.sum(2) / capacity  # of each sample's class
        rare = share < self.rng.uniform(1) / self.env.classes
        judges = self.sample_each()
        allowed = ~self.memory.mark(judges["slot"], judges["valid"])
        pool = self.memory.take(self.rng.choose(min(self.pool_size, capacity), allowed))
        valid = allowed.gather(1, pool["slot"])
        f, g, h = self.features(judges, pool, new)
        counts = torch.cat([judges["valid"], rare], 1)
        candidates = torch.cat([valid, torch.ones_like(rare)], 1)
        labels, others = (torch.cat([batch["y"], new["y"]], 1) for batch in (judges, pool))
        each = values(torch.cat([f, h], 1), labels, torch.cat([g, h], 1), others, candidates, k=self.cfg.neighbours)
        return exchanged((each * counts[..., None]).sum(1), pool["slot"], valid, nowhere=capacity)

    @property
    def pool_size(self) -> int:
        """Memory samples that may have to leave in one update."""
        return int(self.cfg.per_class * self.env.classes)

    def sample_each(self, without: Tensor | None = None) -> Batch:
        """As many samples of each class from the memory.    Shapes: without [R, M] -> each field [R, C * n, ...]."""
        return self.memory.sample_each(int(self.cfg.per_class), self.env.classes, without)

    @torch.no_grad()
    def features(self, *batches: Batch) -> tuple[Tensor, ...]:
        """Encoder features in evaluation mode.    Shapes: -> each [R, N, D]."""
        with evaluating(self.net):
            whole = in_chunks(self.encode, join(*batches)["x"])
        return torch.split(whole, [batch["y"].shape[1] for batch in batches], 1)

    def loss(self, batch: Batch, old: Batch | None = None) -> Tensor:
        """Mean cross-entropy of one forward pass, whose first samples may be recalled ones.    Shapes: -> [R]."""
        view = self.env.augment(batch)
        logits = self.net(view["x"])
        if old is not None:
            self.tricks.judge(old, logits[:, : old["y"].shape[1]])
        return cross_entropy(logits, view["y"])

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.tricks.review(self.memory):
            self.descend(REVIEW * self.loss(old), self.sgd)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])
