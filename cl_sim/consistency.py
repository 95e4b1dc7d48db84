"""What FixMatch and its successors share in a stream: settings, the samples of a step, their views, one joint pass.

A step learns from labelled samples (those of the new batch and some from the memory) and from unlabelled ones (the whole new
batch and some of any kind from the memory). A stream without hidden labels is one in which all are labelled.

With `pool` it is the sources' own setting: a fixed set of samples that comes again and again, whose labels, as far as they are
known, are there from the start. There is no memory then; what is known of a sample is kept by its number.

Source: Sohn et al. 2020, "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence"; Gui et al. 2023,
"Enhancing Sample Utilization through Sample Adaptive Augmentation in Semi-Supervised Learning"; both as released. The form for a
stream is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from cl_sim.config import at_least, within
from cl_sim.encoders.classifier import Classifier
from cl_sim.errors import BadConfig
from cl_sim.memory.numbered import Numbered
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import follow_cosine
from cl_sim.randaugment import strong
from cl_sim.rng import Rng
from cl_sim.runs import Lift, join, per_run
from cl_sim.sample_adaptive import AdaptiveConfig, SampleAdaptive
from cl_sim.strategy import Env
from cl_sim.types import Batch, Field, Logs

EPOCH, FIRST = 256, 402  # steps between selections in a pool, and epochs before the first


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """Settings of a semi-supervised method with strong and weak views and a memory."""

    pool: bool = False  # the stream shows a fixed set of samples again and again: no memory, a line for each of them
    capacity: int = 1000  # samples kept per run, labelled or not
    labelled: int = 32  # labelled samples recalled per step; pool: drawn with replacement
    unlabelled: int = 64  # samples of any kind recalled per step, their labels unused
    lr: float = 0.03  # learning rate of SGD with Nesterov momentum
    schedule: Literal["constant", "cosine"] = "constant"  # of the rate; cosine: the source's, over the whole stream
    momentum: float = 0.9
    weight_decay: float = 5e-4  # not of BatchNorm
    confidence: float = 0.95  # of a pseudo-label
    lambda_u: float = 1.0  # weight of the unlabelled samples
    average: float = 0.999  # decay of the averaged weights
    answer: Literal["average", "net"] = "net"  # which weights answer; the averaged ones lag by 1 / (1 - average) steps
    saa: bool = False  # sample-adaptive augmentation: naive samples get two strong views joined
    saa_arm: Literal["method", "all", "random", "inverse"] = "method"  # or who is flagged instead, as a control
    history_decay: float = 0.001  # saa: weight of the old value in a sample's loss history
    selection_period: int = 0  # saa: steps between selections; 0: one expected recall of every slot, pool: 256
    warmup_steps: int = 0  # saa: before the first selection; 0: three periods, pool: 402
    min_visits: int = 2  # saa: recalls of a slot before it takes part in a selection

    def __post_init__(self) -> None:
        at_least(self, capacity=1, labelled=1, unlabelled=1, lr=0, weight_decay=0, lambda_u=0)
        at_least(self, selection_period=0, warmup_steps=0, min_visits=1)
        within(self, 0, 1, "momentum", "confidence", "average", "history_decay")
        if not self.saa and self.saa_arm != "method":
            raise BadConfig(
                f"saa_arm='{self.saa_arm}' is a control of saa=true; add --set strategy.saa=true, or leave it out"
            )
        for name in ("capacity", "unlabelled", "min_visits") if self.pool else ():
            if getattr(self, name) != getattr(type(self), name):
                raise BadConfig(f"{name} is {getattr(self, name)}, but has no effect with pool=true; leave it out")


def labelled_loss(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """Mean cross-entropy of the rows whose label is known; 0 if none is.    Shapes: logits [N, C], labels, known [N] -> []."""
    each = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    return each.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)


supervised = per_run(labelled_loss)


def classifier(cfg: ConsistencyConfig, env: Env) -> Classifier:
    """A fresh net; in a pool with the source's bias of 0."""
    made = Classifier(env.encoder(), env.classes)
    if cfg.pool:
        nn.init.zeros_(made.head.bias)
    return made


class Pools(nn.Module):
    """The memory, and the samples and views of a step.

    Raises: BadConfig for samples that are no images, and for `pool` where the stream has none.
    """

    def __init__(self, cfg: ConsistencyConfig, env: Env) -> None:
        super().__init__()
        shape = env.fields["x"].shape
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise BadConfig(f"strong views need images of 1 or 3 channels, but the samples have shape {list(shape)}")
        self.cfg, self.env = cfg, env
        self.memory: Reservoir | Numbered
        if cfg.pool:
            self.memory = fixed(env)
        else:
            self.memory = Reservoir(cfg.capacity, {**env.fields, "is_labelled": Field((), torch.bool)}, env.rng)
        period = cfg.selection_period or (EPOCH if cfg.pool else 0)
        self.saa: SampleAdaptive | None = None
        if cfg.saa:
            adaptive = AdaptiveConfig(
                saa="ssl" if cfg.saa_arm == "method" else cfg.saa_arm,
                saa_levels="replay" if cfg.saa_arm == "method" else "ssl",
                history_decay=cfg.history_decay,
                selection_period=period,
                warmup_steps=cfg.warmup_steps or (FIRST * period if cfg.pool else 0),
                min_visits=cfg.min_visits,
            )
            self.saa = SampleAdaptive(adaptive, env, self.memory, cfg.unlabelled)
        self.draw = Rng(env.seeds, "strong views", env.device)

    @property
    def full_draws(self) -> bool:
        """Has every draw the size that it will have for ever, and the rate the value?"""
        return self.cfg.schedule == "constant" and self.memory.holds(max(self.cfg.labelled, self.cfg.unlabelled))

    def set_rate(self, optimiser: Optimizer, new: Batch) -> None:
        """The learning rate of this step."""
        if self.cfg.schedule == "cosine":
            follow_cosine(optimiser, self.cfg.lr, max(1, self.env.samples // new["y"].shape[1]))

    def labels(self, new: Batch) -> Batch:
        """The new batch with `is_labelled`, also where the stream hides nothing."""
        return {"is_labelled": torch.ones_like(new["y"], dtype=torch.bool), **new}

    def samples(self, new: Batch) -> tuple[Batch, Batch, Tensor]:
        """The labelled and the unlabelled samples of a step; where they do not suffice, rows that are not labelled pad.

        In a pool, labelled samples of it and the new batch alone: B = 0 in the one, B_u = 0 in the other; its numbers are slots.

        Shapes: each field [R, B + B_l, ...]; [R, B + B_u, ...]; slot [R, B_u], where the last B_u of these rest.
        """
        memory = self.memory
        if isinstance(memory, Numbered):
            return memory.known(self.cfg.labelled), new, new["index"]
        allowed = memory.valid() & memory.row("is_labelled")[:, : memory.capacity]
        known = memory.take(self.env.rng.choose(min(self.cfg.labelled, len(memory)), allowed))
        old = memory.sample(self.cfg.unlabelled)
        return join(new, known), join(new, old), old["slot"]

    def strong(self, both: Batch, slot: Tensor) -> Tensor:
        """Strong views, joined for naive samples of the memory, then the weak ones.    Shapes: -> [R, B + B_u, C, H, W]."""
        x = both["x"]
        out = strong(x, self.draw)
        if self.saa is not None:
            fresh = torch.zeros_like(both["is_labelled"][:, : x.shape[1] - slot.shape[1]])  # no history: not naive
            hard = torch.cat([fresh, self.saa.hard(slot)], 1)
            out = torch.where(hard[..., None, None, None], self.saa.joined(out, x), out)
        return self.env.augment({**both, "x": out})["x"]

    def weak(self, batch: Batch) -> Tensor:
        """Weak views.    Shapes: -> [R, B, C, H, W]."""
        return self.env.augment(batch)["x"]

    def note(self, slot: Tensor, each: Tensor) -> None:
        """Remember the losses of the recalled samples, sure or not.    Shapes: slot [R, B_u], each [R, B + B_u]."""
        if self.saa is not None:
            self.saa.table.visit(slot, each[:, each.shape[1] - slot.shape[1] :].detach(), self.cfg.history_decay)

    def judge(self, new: Batch, known: Batch, z_known: Tensor) -> None:
        """Remember which recalled labelled samples are answered right on their weak views.    Shapes: z_known [R, B + B_l, C]."""
        if self.saa is not None:
            first = 0 if self.cfg.pool else new["y"].shape[1]
            right = z_known.detach().argmax(-1) == known["y"]
            self.saa.answered(right[:, first:], known["is_labelled"][:, first:])

    def add(self, new: Batch) -> Logs:
        """Remember the new batch; select, if it is time.    Shapes: -> each [R]."""
        self.memory.add(new)
        return {} if self.saa is None else self.saa.tick()

    def boundary(self) -> None:
        """A task has ended."""
        if self.saa is not None:
            self.saa.boundary()


def fixed(env: Env) -> Numbered:
    """What is kept of the stream's pool.    Raises: BadConfig if it has none."""
    if env.pool is None:
        why = "shows every sample once" if "index" in env.fields else "does not number its samples (index)"
        raise BadConfig(
            f"strategy.pool is true, but this stream {why}, or hides no label; use few_labels of a split stream with "
            "--set stream.settings=passes=10, or draws=1000"
        )
    return Numbered(env.pool, env.rng)


def in_one_pass(net: Lift, *views: Tensor) -> tuple[Tensor, ...]:
    """The answers to several sets of images that share BatchNorm's statistics.    Shapes: each [R, B_i, ...] -> [R, B_i, C]."""
    logits: Tensor = net(torch.cat(views, 1))
    return torch.split(logits, [view.shape[1] for view in views], 1)
