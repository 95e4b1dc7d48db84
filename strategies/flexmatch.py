"""FlexMatch on a stream: FixMatch whose pseudo-labels need less confidence for classes that are learned less.

Source: Zhang et al. 2021, "FlexMatch: Boosting Semi-Supervised Learning with Curriculum Pseudo Labeling"; with `saa=true`, Gui et
al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation in Semi-Supervised Learning"; both as released.
Symbols: x, y -> known; u -> both; sigma_t / beta_t -> status; T_t -> thresholds; tau -> confidence; e -> average.
Departures: those of `fixmatch`; in a pool none is known but the net (the source's wide ResNet starts otherwise) and, without
`augment=shift_mirrored`, the padding of crops; in a stream the classes that samples chose are counted over the memory (ours),
where a new one has chosen none yet, so a class that comes late starts at threshold 0, unless `min_threshold` is set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_sim import losses
from cl_sim.adaptive import class_status as class_status
from cl_sim.adaptive import class_thresholds as class_thresholds
from cl_sim.config import within
from cl_sim.consistency import ConsistencyConfig, Pools, classifier, in_one_pass, supervised
from cl_sim.optim import SGD, Average, without_decay_of_norms
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

consistency, thresholds_of = per_run(losses.fixmatch), per_run(class_thresholds)
status_of = per_run(lambda selected, before, **shared: class_status(selected, before=before, **shared))
EMPTY = -2  # the class of a slot that is not filled


@dataclass(frozen=True, kw_only=True)
class FlexMatchConfig(ConsistencyConfig):
    """Settings of FlexMatch."""

    warm_up: bool = True  # slots that never were sure count against every class
    min_threshold: float = 0.0  # no class needs less confidence

    def __post_init__(self) -> None:
        super().__post_init__()
        within(self, 0, 1, "min_threshold")


class FlexMatch(Strategy):
    """Semi-supervised learning with a threshold for each class."""

    Config, tasks = FlexMatchConfig, frozenset({"classify"})
    views, takes_unlabelled = ("flip", "shift"), True
    status: Tensor  # [R, C]

    def __init__(self, cfg: FlexMatchConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: classifier(cfg, env))
        self.pools = Pools(cfg, env)
        self.memory = self.pools.memory
        self.table = self.memory.table or self.memory.keep_table()
        self.average = Average(self.net, cfg.average, ramp=False)
        groups = without_decay_of_norms(self.net, cfg.weight_decay)
        self.sgd = SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0)
        self.register_buffer("status", torch.zeros(env.runs, env.classes, device=env.device))

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.pools.full_draws

    def observe(self, new: Batch) -> Logs:
        """One gradient step on labelled and unlabelled samples, in one pass; then remember the new batch."""
        new, needed = self.pools.labels(new), self.thresholds()
        known, both, slot = self.pools.samples(new)
        weak, strong = self.pools.weak(both), self.pools.strong(both, slot)
        z_known, z_weak, z_strong = in_one_pass(self.net, self.pools.weak(known), weak, strong)
        labelled = supervised(z_known, known["y"], known["is_labelled"])
        unlabelled, each = consistency(z_weak, z_strong, needed)
        loss = labelled + self.cfg.lambda_u * unlabelled
        self.pools.set_rate(self.sgd, new)
        self.descend(loss, self.sgd)
        self.average.update(self.net)
        self.pools.note(slot, each)
        self.pools.judge(new, known, z_known)
        sure = self.choose(slot, z_weak.detach())
        logs = {"loss": loss, "labelled": labelled, "unlabelled": unlabelled, "sure": sure, "threshold": needed.mean(1)}
        return {**{name: value.detach() for name, value in logs.items()}, **self.pools.add(new)}

    def thresholds(self) -> Tensor:
        """How sure a pseudo-label of each class must be in this step.    Shapes: -> [R, C]."""
        filled = self.memory.valid()
        selected = torch.where(filled, self.table.selected[:, : self.table.capacity], EMPTY)
        status = status_of(selected, self.status, classes=self.env.classes, warm_up=self.cfg.warm_up)
        self.status.copy_(status)
        needed: Tensor = thresholds_of(self.status, confidence=self.cfg.confidence)
        return needed.clamp(min=self.cfg.min_threshold)

    def choose(self, slot: Tensor, z_weak: Tensor) -> Tensor:
        """Note the classes that recalled samples are sure of.    Shapes: slot [R, B_u], z_weak [R, B + B_u, C] -> [R]."""
        confidence, guess = z_weak.softmax(-1).max(-1)
        sure, recalled = confidence >= self.cfg.confidence, slice(z_weak.shape[1] - slot.shape[1], None)
        self.table.choose(slot, guess[:, recalled], sure[:, recalled])
        share: Tensor = sure.float().mean(1)
        return share

    def boundary(self) -> None:
        """A task has ended."""
        self.pools.boundary()

    def predict(self, batch: Batch) -> Tensor:
        """Class scores of the averaged weights, or of the newest.    Shapes: -> [R, B, C]."""
        scores: Tensor = (self.average if self.cfg.answer == "average" else self.net)(batch["x"])
        return scores
