"""BECLR on a stream: learning without labels from two views of new and replayed samples and from their neighbours in memory.

A clustered memory hands every image the rows that are most like it; the prediction of one view is drawn to the teacher's
projection of the other view and to those neighbours, while a uniformity term spreads the images. With labels for some
samples (a classification stream) a linear head learns beside it.

Source: Poulakakis-Daktylidis and Jamali-Rad 2024, "BECLR: Batch Enhanced Contrastive Few-Shot Learning", and its code; controls:
Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations" (simclr), and Chen and He 2021,
"Exploring Simple Siamese Representation Learning" (simsiam).
Symbols: f, g, h -> net (branch.encoder, branch.head, predictor); f', g' -> teacher; p, z_s, z_t -> p, z, target; m -> decay;
DyCE -> memory; lambda -> spread; kappa, tau, eps, gamma as there.
Departures: for one pass over a stream, ours: behind the queue stands a reservoir, whose inputs are replayed and whose rows are
refreshed then; one row per image, the mean of both views; balance is asked of the whole memory, not of a batch of few
classes (`assign=batch_ot`: as published); neighbours are positives for the anchor (the released rows give no gradient),
found before the memory is written to, and only those that are almost as near as the other view (`gate`); phases by samples seen;
constant rates unless `schedule=cosine`. `neighbours=random`: each row that would be kept is replaced by a random one.
`pairing=row negatives=enhanced` is the released loss: the batch is enlarged with neighbours from three memories, of p, of z_s
and of z_t, and rows are paired by their place; as neighbours get no gradient, they only shrink that of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl_sim import losses
from cl_sim.config import at_least, within
from cl_sim.consistency import supervised
from cl_sim.encoders.siamese import Siamese
from cl_sim.errors import BadConfig
from cl_sim.masking import block_mask, erase_patches
from cl_sim.memory.clustered import Assign, Clustered, label_of, nearest_prototype
from cl_sim.memory.clusters import memory_rows, nearest_in_cluster
from cl_sim.optim import SGD, Teacher, trainable
from cl_sim.runs import join, per_run
from cl_sim.schedules import cosine_value
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

__all__ = ["BECLR", "BECLRConfig", "cosine_value", "memory_rows"]

alignment = per_run(losses.alignment)
uniformity = per_run(losses.uniformity)
enhanced = per_run(losses.enhanced)
info_nce = per_run(losses.info_nce)
LAST_LR = 1e-6  # where a cosine schedule ends


@per_run
def nearest(
    z: Tensor, rows: Tensor, labels: Tensor, prototypes: Tensor, allowed: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """`nearest_in_cluster` of every run."""
    return nearest_in_cluster(z, rows, labels, prototypes, k, allowed)


@dataclass(frozen=True, kw_only=True)
class BECLRConfig:
    """Settings of BECLR and of its controls."""

    objective: Literal["beclr", "simclr", "simsiam"] = "beclr"  # the last two: no teacher, no neighbours
    neighbours: Literal["cluster", "global", "random", "none"] = "cluster"  # positives beside the other view
    memory: Literal["both", "fifo", "reservoir", "none"] = "both"  # a ring and a reservoir, one of them, or nothing
    assign: Assign = "memory_ot"  # balance over the memory, over the batch as published, or the nearest prototype
    gate: bool = True  # only neighbours with a cosine of kappa times that of two views
    pairing: Literal["anchor", "row"] = "anchor"  # row: as released, by place in the enlarged batch
    negatives: Literal["batch", "enhanced"] = "batch"  # enhanced: as released, neighbours of the student's rows too
    capacity: int = 2000  # rows in all
    recent: int = 0  # of these, rows of the ring in `both`; 0: a quarter
    replay: int = 32  # rows of the reservoir (fifo: of the ring) replayed per step
    clusters: int = 100
    k: int = 3  # neighbours per view
    kappa: float = 0.9  # see gate
    onset: float = 0.15  # share of the stream before neighbours count
    renew: float = 0.0  # share of the stream after which clusters are found anew; the source's: 0.15; 0: never
    hidden: int = 512  # units inside the projection head
    width: int = 128  # of the projections and the memory's embeddings
    lr: float = 0.03  # learning rate of SGD
    momentum: float = 0.9
    weight_decay: float = 1e-4
    teacher: bool = True  # False: the student's own projections, without gradient
    decay: float = 0.99  # of the teacher
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: lr to 1e-6, decay to 1 at the stream's end
    mask_low: float = 0.0  # least and largest share of the student's images that is hidden, in blocks of patches
    mask_high: float = (
        0.0  # 0: nothing is hidden, as is usual below 64 pixels; the source has 0.05 to 0.25 for larger ones
    )
    mask_patch: int = 0  # pixels of a patch's side; 0: an eighth of the image's
    spread: float = 0.1  # weight of the uniformity
    tau: float = 2.0  # its temperature
    contrast: float = 0.5  # temperature of simclr
    eps: float = 0.05  # entropy weight of the assignment
    gamma: float = 0.9  # inertia of the prototypes
    readout: Literal["head", "vote"] = "head"  # of class scores: a linear head, or the labels of the nearest cluster

    def __post_init__(self) -> None:
        at_least(self, capacity=1, recent=0, replay=0, clusters=1, k=1, hidden=1, width=2)
        at_least(self, lr=0, weight_decay=0, spread=0, tau=1e-6, contrast=1e-6, eps=1e-6)
        within(self, 0, 1, "onset", "renew", "momentum", "decay", "gamma", "kappa", "mask_low", "mask_high")
        at_least(self, mask_patch=0)
        if self.mask_low > self.mask_high:
            raise BadConfig(
                f"mask_low is {self.mask_low}, above mask_high={self.mask_high}; set both, e.g. 0.05 and 0.25"
            )
        if self.mask_patch and not self.mask_high:
            raise BadConfig("mask_patch has no effect without a mask; set strategy.mask_low and strategy.mask_high")
        if self.memory == "none" and (self.replay or self.neighbours != "none" or self.readout == "vote"):
            raise BadConfig("memory is 'none', so nothing can come from it; add replay=0 neighbours=none readout=head")
        if self.objective != "beclr" and self.neighbours != "none":
            raise BadConfig(f"objective '{self.objective}' takes no neighbours; add --set strategy.neighbours=none")
        if self.spaces and self.neighbours == "none":
            raise BadConfig("pairing=row and negatives=enhanced are about neighbours, but neighbours is 'none'")
        if self.pairing == "row" and self.gate:
            raise BadConfig("pairing is 'row', which takes every neighbour; add --set strategy.gate=false")
        most = max(self.clusters, self.k)
        if self.memory != "none" and most > self.capacity:
            raise BadConfig(f"capacity is {self.capacity}, but clusters or k is {most}; a memory needs as many rows")
        if self.recent and (self.memory != "both" or self.recent >= self.capacity):
            raise BadConfig(f"recent is {self.recent}; it needs memory=both and must be below capacity={self.capacity}")

    @property
    def parts(self) -> tuple[int, int]:
        """Rows of the ring and of the reservoir."""
        ring = {"fifo": self.capacity, "reservoir": 0}.get(self.memory, self.recent or max(self.capacity // 4, 1))
        return ring, self.capacity - ring

    @property
    def spaces(self) -> tuple[str, ...]:
        """Embeddings of the student that the memory keeps beside the teacher's: predictions, projections."""
        return ("p",) * (self.pairing == "row") + ("s",) * (self.negatives == "enhanced")


class BECLR(Strategy):
    """Two views, a slow teacher, and positives from a clustered memory."""

    Config, tasks = BECLRConfig, frozenset({"embed", "fewshot", "classify"})
    views, takes_unlabelled = ("resized_crop", "flip", "jitter", "grey"), True
    likeness: Tensor  # [R] v, the running mean of the cosine between the two views of an image
    step: Tensor  # []

    def __init__(self, cfg: BECLRConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Siamese(env.encoder(), cfg.hidden, cfg.width))
        learned = trainable(self.net)
        self.labels = env.task == "classify"
        if self.labels:
            dim = int(self.net.net.branch.encoder.dim)  # type: ignore[arg-type, union-attr]
            self.head = env.lift(lambda: nn.Linear(dim, env.classes))
            learned += trainable(self.head)
        elif cfg.readout == "vote":
            raise BadConfig("strategy.readout is 'vote', but this stream has no labels to vote with; use readout=head")
        self.teacher = Teacher(self.net, "branch") if cfg.teacher and cfg.objective == "beclr" else None
        self.memory = self.make_memory(cfg, env) if cfg.memory != "none" else None
        fill = max(10 * cfg.clusters, cfg.parts[0])
        self.fill, self.onset = fill, max(2 * fill, round(cfg.onset * env.samples))  # samples seen
        self.renew = round(cfg.renew * env.samples)  # samples between clusterings anew
        self.register_buffer("likeness", torch.zeros(env.runs, device=env.device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=env.device))
        self.sgd = SGD(learned, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)

    @staticmethod
    def make_memory(cfg: BECLRConfig, env: Env) -> Clustered:
        """Inputs, stream numbers and labels where there are any, with embeddings."""
        fields = {name: field for name, field in env.fields.items() if name in ("x", "y", "index")}
        rule = {"assign": cfg.assign, "eps": cfg.eps, "gamma": cfg.gamma, "spaces": cfg.spaces}
        return Clustered(*cfg.parts, cfg.clusters, cfg.width, fields, env.rng, **rule)  # type: ignore[arg-type]

    @property
    def steady(self) -> bool:
        """True once neighbours count and every step replays the same number; never with what the host decides on its way."""
        if self.renew:
            return False
        if self.cfg.schedule == "cosine" or self.memory is None:
            return bool(self.cfg.schedule == "constant")
        return self.memory.offered >= self.onset and self.memory.can_replay(self.cfg.replay)

    def observe(self, new: Batch) -> Logs:
        """One gradient step on two views of new and replayed samples; then remember."""
        old = self.memory.replay(self.cfg.replay) if self.memory is not None else {}
        both = join(new, old) if old else new
        x = torch.cat([self.env.augment(both)["x"] for _ in range(2)], 1)  # [R, 2N, ...] view 1, then view 2
        p, z, features = self.net(self.masked(x))
        target = normalize((self.teacher(x) if self.teacher is not None else z).detach(), dim=-1)  # z_t
        student = {"p": p, "s": z}
        rows = {"z": target, **{space: normalize(student[space].detach(), dim=-1) for space in self.cfg.spaces}}
        near, weight = self.neighbours(rows, both, old)
        loss = self.loss(p, z, target, near, weight)
        if self.labels:
            y = both["y"].repeat(1, 2)
            loss = loss + supervised(self.head(features), y, y >= 0)
        self.descend(loss, self.sgd)
        self.follow(new)
        views = target.chunk(2, 1)
        agreement = (views[0] * views[1]).sum(-1).mean(1)
        self.likeness.copy_(torch.where(self.step == 0, agreement, 0.95 * self.likeness + 0.05 * agreement))
        self.step += 1
        logs = {"loss": loss, "view_cosine": agreement, "embedding_std": target.std(1).mean(-1)}
        return logs | self.remember(new, old, rows, weight)

    def masked(self, x: Tensor) -> Tensor:
        """What the student sees: the images with blocks of patches at 0.    Shapes: [R, 2N, ...] -> same."""
        if not self.cfg.mask_high:
            return x
        patch = self.cfg.mask_patch or max(min(x.shape[-2:]) // 8, 1)
        grid = (x.shape[-2] // patch, x.shape[-1] // patch)
        return erase_patches(x, block_mask(grid, self.cfg.mask_low, self.cfg.mask_high, self.rng, x.shape[1]), patch)

    def loss(self, p: Tensor, z: Tensor, target: Tensor, near: Mapping[str, Tensor], weight: Tensor | None) -> Tensor:
        """The objective of a batch of two views.

        Shapes: p, z and target [R, 2N, D], neighbours [R, 2N, k, D] by space, or none, and which count [R, 2N, k] -> [R].
        """
        if self.cfg.objective == "simclr":
            return info_nce(*z.chunk(2, 1), tau=self.cfg.contrast, similarity="cos")
        aligned: Tensor
        if "p" in near:
            aligned = alignment(enhanced(p, near["p"]), enhanced(target, near["z"]))
        else:
            aligned = alignment(p, target, near["z"], weight) if near else alignment(p, target)
        if self.cfg.objective == "simsiam":
            return aligned
        whole: Tensor = aligned + self.cfg.spread * uniformity(
            enhanced(z, near["s"]) if "s" in near else z, tau=self.cfg.tau
        )
        return whole

    def neighbours(self, found: Batch, both: Batch, old: Batch) -> tuple[Batch, Tensor | None]:
        """Rows of the memory for every row of a batch, by space, and which of the targets' count; none at first.

        Shapes: found [R, 2N, D] by space, targets in `z` -> [R, 2N, k, D] by space, [R, 2N, k].
        """
        memory = self.memory
        if memory is None or self.cfg.neighbours == "none" or memory.offered < self.onset:
            return {}, None
        fresh = both["x"].shape[1] - old["slot"].shape[1]
        own = nn.functional.pad(old["slot"], (fresh, 0), value=memory.capacity).repeat(1, 2)  # [R, 2N] never itself
        slots = torch.arange(memory.capacity, device=own.device)
        allowed = memory.valid()[:, None] & (slots != own[..., None])  # [R, 2N, M]
        index, cosine = self.lookup(memory, "z", found["z"], allowed)
        there = cosine > -torch.inf
        weight = there & (cosine >= self.cfg.kappa * self.likeness[:, None, None]) if self.cfg.gate else there
        if self.labels:
            theirs, mine = memory.row("y")[memory.run[..., None], index], both["y"].repeat(1, 2)[..., None]
            weight = torch.where((theirs >= 0) & (mine >= 0), (theirs == mine) & there, weight)
        chosen = {"z": index, **{s: self.lookup(memory, s, found[s], allowed)[0] for s in self.cfg.spaces}}
        near = {space: memory.row(space)[memory.run[..., None], which] for space, which in chosen.items()}
        return near, weight.to(near["z"].dtype)

    def lookup(self, memory: Clustered, space: str, rows: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Places of k neighbours of each row in one space, and the cosines of the nearest.    Shapes: -> [R, 2N, k] twice."""
        kept, labels = (memory.row(name)[:, : memory.capacity] for name in (space, label_of(space)))
        centres = memory.centres(space)
        if self.cfg.neighbours == "global":
            labels, centres = labels * 0, centres[:, :1]
        index, cosine = nearest(rows, kept, labels, centres, allowed, k=self.cfg.k)
        if self.cfg.neighbours == "random":
            index = self.rng.uniform(*allowed.shape[1:]).masked_fill(~allowed, -1).topk(self.cfg.k).indices
        return index, cosine

    def follow(self, new: Batch) -> None:
        """Move the teacher; with a schedule, set both rates for the next step by the samples seen."""
        decay: float | Tensor = self.cfg.decay
        if self.cfg.schedule == "cosine":
            steps = max(self.env.samples // new["x"].shape[1], 1)
            now = min(int(self.step) + 1, steps)
            self.sgd.param_groups[0]["lr"] = cosine_value(now, steps, self.cfg.lr, LAST_LR)
            decay = cosine_value(now - 1, steps, self.cfg.decay, 1.0)
        if self.teacher is not None:
            self.teacher.update(self.net, decay)

    @torch.no_grad()
    def remember(self, new: Batch, old: Batch, found: Batch, weight: Tensor | None) -> Logs:
        """Refresh the replayed rows, store the new ones, group all.    Shapes: found [R, 2N, D] by space -> each log [R]."""
        memory = self.memory
        if memory is None:
            return {}
        size, before = new["x"].shape[1], memory.offered
        clustered = before >= self.fill
        balanced = clustered and self.cfg.assign == "batch_ot"
        fresh: Batch = {}
        for space in memory.spaces:
            one, two = found[space].chunk(2, 1)
            z = normalize(one + two, dim=-1)
            own = memory.assigned(z, space) if balanced else nearest_prototype(z, memory.centres(space))
            fresh |= {space: z, label_of(space): own}
        memory.write(old["slot"], {name: rows[:, size:] for name, rows in fresh.items()})
        memory.add({**new, **{name: rows[:, :size] for name, rows in fresh.items()}})
        anew = self.renew > 0 and before // self.renew < memory.offered // self.renew
        if clustered and not anew:
            memory.regroup()
        elif memory.offered >= self.fill:
            memory.start()
        chosen = [nearest_prototype(view, memory.prototypes) for view in found["z"].chunk(2, 1)]
        sizes = memory.sizes()
        return {
            "neighbours_kept": weight.mean((1, 2)) if weight is not None else torch.zeros_like(self.likeness),
            "memory_age": memory.age(),
            "clusters_used": (sizes > 0).sum(1).float(),
            "cluster_largest": sizes.amax(1).float(),
            "same_prototype": (chosen[0] == chosen[1]).float().mean(1),
        }

    def predict(self, batch: Batch) -> Tensor:
        """Features of the student's encoder, or class scores where the stream has labels.    Shapes: -> [R, B, dim or C]."""
        if self.cfg.readout == "vote" and self.memory is not None:
            return self.vote(batch["x"])
        features: Tensor = self.net.part("branch.encoder")(batch["x"])
        return self.head(features) if self.labels else features

    def vote(self, x: Tensor) -> Tensor:
        """Shares of the known labels in the cluster of the nearest prototype.    Shapes: -> [R, B, C]."""
        memory = self.memory
        assert memory is not None
        z = self.teacher(x) if self.teacher is not None else self.net.part("branch")(x)
        labels, y = (memory.row(name)[:, : memory.capacity, None] for name in ("cluster", "y"))
        classes, groups = (torch.arange(n, device=x.device) for n in (self.env.classes, memory.prototypes.shape[1]))
        known = ((y == classes) & memory.valid()[..., None]).float()  # [R, M, C]
        counts = (labels == groups).float().mT @ known  # [R, P, C]
        shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        return shares[memory.run, nearest_prototype(normalize(z, dim=-1), memory.prototypes)]
