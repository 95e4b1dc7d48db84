"""FixMatch on a stream: where the weak view of a sample is sure of its class, the strong view learns that class.

Source: Sohn et al. 2020, "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence"; with `saa=true`, Gui
et al. 2023, "Enhancing Sample Utilization through Sample Adaptive Augmentation in Semi-Supervised Learning"; both as released.
Symbols: x, y -> known; u -> both; q -> softmax of z_weak; tau -> confidence; lambda_u -> lambda_u; e -> average.
Departures: one pass over a stream with a memory in place of many over a pool (ours), so the labelled samples are those of the
new batch and some recalled ones, without replacement, the unlabelled ones the whole new batch and some recalled ones of any
kind; a constant learning rate, as the length of a stream is not known (`schedule=cosine` is the source's, over the whole
stream); BatchNorm's momentum is the encoder's; the newest weights answer (`answer=average` is the source's: an average over
1000 steps lags by most of a short stream; after 143 steps on digits it was right in 53 %, the newest weights in 66 %).
The source's own setting is `pool=true`, on a stream of few labels that shows its samples again and again: with `draws` of a split
stream the unlabelled ones are drawn with replacement, as there, with `passes` each comes once per pass. The preset
saa-fixmatch-cifar10-40 has all of the source's settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cl_sim import losses
from cl_sim.consistency import ConsistencyConfig, Pools, classifier, in_one_pass, supervised
from cl_sim.optim import SGD, Average, without_decay_of_norms
from cl_sim.runs import per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

consistency = per_run(losses.fixmatch)


@dataclass(frozen=True, kw_only=True)
class FixMatchConfig(ConsistencyConfig):
    """Settings of FixMatch."""


class FixMatch(Strategy):
    """Semi-supervised learning from confident pseudo-labels."""

    Config, tasks = FixMatchConfig, frozenset({"classify"})
    views, takes_unlabelled = ("flip", "shift"), True

    def __init__(self, cfg: FixMatchConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: classifier(cfg, env))
        self.pools = Pools(cfg, env)
        self.memory = self.pools.memory
        self.average = Average(self.net, cfg.average)
        groups = without_decay_of_norms(self.net, cfg.weight_decay)
        self.sgd = SGD(groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0)

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of samples."""
        return self.pools.full_draws

    def observe(self, new: Batch) -> Logs:
        """One gradient step on labelled and unlabelled samples, in one pass; then remember the new batch."""
        new = self.pools.labels(new)
        known, both, slot = self.pools.samples(new)
        weak, strong = self.pools.weak(both), self.pools.strong(both, slot)
        z_known, z_weak, z_strong = in_one_pass(self.net, self.pools.weak(known), weak, strong)
        labelled = supervised(z_known, known["y"], known["is_labelled"])
        unlabelled, each = consistency(z_weak, z_strong, threshold=self.cfg.confidence)
        loss = labelled + self.cfg.lambda_u * unlabelled
        self.pools.set_rate(self.sgd, new)
        self.descend(loss, self.sgd)
        self.average.update(self.net)
        self.pools.note(slot, each)
        self.pools.judge(new, known, z_known)
        sure = (z_weak.detach().softmax(-1).amax(-1) >= self.cfg.confidence).float().mean(1)
        logs = {"loss": loss, "labelled": labelled, "unlabelled": unlabelled, "sure": sure}
        return {**{name: value.detach() for name, value in logs.items()}, **self.pools.add(new)}

    def boundary(self) -> None:
        """A task has ended."""
        self.pools.boundary()

    def predict(self, batch: Batch) -> Tensor:
        """Class scores of the averaged weights, or of the newest.    Shapes: -> [R, B, C]."""
        scores: Tensor = (self.average if self.cfg.answer == "average" else self.net)(batch["x"])
        return scores
