"""Meta-optimised augmentation: two small nets learn views of an embedding that the encoder is contrasted with.

The encoder learns its task and tells two views of each sample, made by edits (h1, h2) and by augmenters (w1, w2), from those
of other samples. The augmenters learn on remembered samples, through the encoder as it is after its step.

Source: Qin et al. 2023, "Meta-optimized Contrastive Learning for Sequential Recommendation", as released; its form for a
stream of any kind is ours.
Symbols: lambda -> data_weight, beta -> model_weight, gamma / beta -> reg_weight, sigma'_1 and sigma'_2 -> augmenters.
Departures: the meta step draws its samples from the memory instead of taking the batch once more (`meta_on=batch` does), and the
encoder moves once per update (`second_encoder_step=true`: twice): both with `capacity=0`, `replay=0` and `padding=true` are the
released schedule. Images are contrasted by cosines over 0.2, with samples of the same class left out. BatchNorm statistics
come from passes of the task alone. `second_order` is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cl_sim import tasks
from cl_sim.config import at_least
from cl_sim.encoders.augmenter import Augmenter
from cl_sim.errors import BadConfig
from cl_sim.gradients import gradient, put, trained
from cl_sim.losses import Pairs, Scope, Similarity, info_nce, mean_cosine, model_contrast
from cl_sim.optim import Adam
from cl_sim.replay import REVIEW, replay_loss
from cl_sim.rng import Rng
from cl_sim.runs import join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.tasks.base import TaskConfig
from cl_sim.types import Batch, Logs

__all__ = ["Augmenter", "MetaAugment", "MetaAugmentConfig"]

SMALL = 200_000  # parameters of a net through whose step second_order differentiates
FORMS: dict[str, tuple[Similarity, float]] = {"classify": ("cos", 0.2), "rank": ("dot", 1.0)}
TINY = 1e-12  # least gradient norm that another is compared with
Augment = Callable[[Tensor], Tensor]
Views = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class MetaAugmentConfig(TaskConfig):
    """Settings of meta-optimised augmentation.

    Arms: `off` is the base strategy, `data-only` contrasts h1 with h2 alone, `frozen` never trains the augmenters, `joint` trains
    them with the encoder on its loss, `first_order` is the method, `second_order` trains them to make the encoder's next step
    lower the task loss of remembered samples. All draw the same samples and update the encoder equally often.
    """

    arm: Literal["off", "data-only", "frozen", "joint", "first_order", "second_order"] = "first_order"
    data_weight: float = 0.03  # of the contrast of h1 and h2
    model_weight: float = 0.1  # of the contrasts with w1 and w2
    reg_weight: float = 0.1  # of the margin regulariser among these
    reg_pairs: Pairs = "all"  # regularised pairs: those contrasted, or w1 and w2 as printed
    reg_scope: Scope = "row"  # margins by row, or over the batch as printed
    similarity: Literal["task", "dot", "cos"] = "task"  # task: cosines for classes, inner products for items
    tau: float = 0.0  # temperature; 0: 0.2 for classes, 1 for items
    mask_same_class: Literal["task", "yes", "no"] = "task"  # samples of one class are no negatives; task: for classes
    warm_up: int = 0  # updates over which model_weight grows to its value
    second_encoder_step: bool = False  # the encoder moves again after the augmenters
    meta_lr: float = 1e-3  # learning rate of the augmenters' Adam
    meta_on: Literal["memory", "batch"] = "memory"  # samples of the meta step
    meta_replay: int = 0  # samples drawn for it; 0: as many as are recalled
    meta_every: int = 1  # updates from one meta step to the next
    min_meta: int = 0  # samples in memory before the first one; 0: twice as many as it draws

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, data_weight=0, model_weight=0, reg_weight=0, tau=0, warm_up=0)
        at_least(self, meta_lr=0, meta_replay=0, meta_every=1, min_meta=0)
        if self.arm == "data-only" and not self.data_weight:
            raise BadConfig("arm is 'data-only', but data_weight is 0: that is arm=off")
        if self.arm == "second_order" and self.meta_on == "batch":
            raise BadConfig("second_order asks for the loss of remembered samples; leave strategy.meta_on out")
        if not self.meta_from_memory:
            return
        if not self.drawn:
            raise BadConfig(
                f"arm '{self.arm}' draws samples from the memory for its meta step, but replay is 0; "
                "set strategy.meta_replay (and capacity), or meta_on=batch"
            )
        if 0 < self.min_meta < self.drawn:
            raise BadConfig(
                f"min_meta is {self.min_meta}, but a meta step draws {self.drawn} samples; use at least that"
            )
        if self.waits_for > self.capacity:
            raise BadConfig(
                f"the meta step waits for {self.waits_for} samples in memory, but capacity is {self.capacity}; "
                "use a smaller strategy.min_meta, or meta_on=batch"
            )

    @property
    def meta_from_memory(self) -> bool:
        """Does a meta step read the memory?"""
        return self.arm in ("first_order", "second_order") and self.meta_on == "memory"

    @property
    def drawn(self) -> int:
        """Samples of a meta step."""
        return self.meta_replay or self.replay

    @property
    def waits_for(self) -> int:
        """Samples in memory before the first meta step."""
        return self.min_meta or 2 * self.drawn

    @property
    def reads_memory(self) -> bool:
        """Is there a use for a memory?"""
        return super().reads_memory or self.meta_from_memory


class Seen(NamedTuple):
    """Two views of some samples, their labels, and which of them count.    Shapes: labels and counted [R, B]."""

    views: tuple[Batch, Batch]
    labels: Tensor
    counted: Tensor


class MetaAugment(Strategy):
    """Replay with contrasts among data views and learned model views."""

    Config, tasks = MetaAugmentConfig, frozenset({"classify", "rank"})
    updates: Tensor  # [] int64

    def __init__(self, cfg: MetaAugmentConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.task = tasks.of(cfg, env)
        self.optimiser = self.task.optimiser()
        self.draws = Rng(env.seeds, "meta augmentation", env.device)  # its own, so that replay is the base strategy's
        self.pair = [env.lift(lambda: Augmenter(self.task.dim)) for _ in range(2)]
        self.augmenters = nn.ModuleList(self.pair)
        self.adam = Adam(self.augmenters.parameters(), lr=cfg.meta_lr)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=env.device))
        similarity, tau = FORMS[env.task]
        self.similarity, self.tau = cfg.similarity if cfg.similarity != "task" else similarity, cfg.tau or tau
        self.data_term = per_run(lambda x, y, labels, valid: info_nce(x, y, self.tau, self.similarity, labels, valid))
        self.masks = cfg.mask_same_class == "yes" or (cfg.mask_same_class == "task" and env.task == "classify")
        self.data_weight = cfg.data_weight if cfg.arm != "off" else 0.0
        self.model_weight = cfg.model_weight if cfg.arm not in ("off", "data-only") else 0.0
        size = sum(parameter.numel() for parameter in self.task.net.parameters()) // env.runs
        if cfg.arm == "second_order" and size > SMALL:
            raise BadConfig(
                f"arm 'second_order' differentiates through a step of the whole net, which has {size:,} parameters; it is for "
                f"nets of at most {SMALL:,}: use a smaller encoder, or arm=first_order"
            )

    @property
    def steady(self) -> bool:
        """True once every update recalls the same number of samples and makes a meta step, if any is made."""
        evenly: bool = self.task.recalls_evenly
        return evenly and (not self.learns or (self.ready and self.cfg.meta_every == 1))

    @property
    def learns(self) -> bool:
        """Do the augmenters have steps of their own?"""
        return self.cfg.arm in ("first_order", "second_order")

    @property
    def ready(self) -> bool:
        """Is there enough to make a meta step of its final size?"""
        return self.cfg.meta_on == "batch" or self.task.holds(self.cfg.waits_for)

    def observe(self, new: Batch) -> Logs:
        """Learn the new batch and what the memory recalls; then remember the new batch."""
        for _ in range(self.cfg.replay_steps):
            logs = self.update(new, self.task.recall())
        self.task.remember(new)
        return logs

    def update(self, new: Batch, old: Batch) -> Logs:
        """One encoder step, one step of the augmenters if it is due, and another encoder step if that is asked for."""
        seen = self.see(join(new, old) if old else new) if self.cfg.arm != "off" else None
        logs = self.encoder_step(new, old, seen)
        if seen and self.learns and self.ready and self._due():
            self.meta_step(new, old, seen)
        if self.cfg.second_encoder_step:
            self.encoder_step(new, old, seen)
        self.updates += 1
        return logs

    def _due(self) -> bool:
        return bool(self.cfg.meta_every == 1 or int(self.updates) % self.cfg.meta_every == 0)

    def see(self, batch: Batch) -> Seen:
        """Draw two views of each sample."""
        labels = self.task.labels(batch)
        if not self.masks:
            labels = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)  # each of its own kind
        return Seen(self.task.views(batch, self.draws), labels, self.task.counted(batch))

    def encoder_step(self, new: Batch, old: Batch, seen: Seen | None) -> Logs:
        """Move the encoder on the task and the contrasts, and nothing else (with `joint`, the augmenters too)."""
        loss = replay_loss(new, old, self.task.loss, joint_pass=self.cfg.joint_pass)
        if seen is None or not (self.data_weight or self.model_weight):
            self.descend(loss, self.optimiser)
            return {"loss": loss.detach()}
        joint = self.cfg.arm == "joint"
        h = self.encode(seen)
        w = self.model_views(h, self.pair if joint else self.fixed())
        contrast = self.contrast(seen, h, w)
        pull = gradient(contrast, self.task.net, keep=joint)
        own = gradient(loss, self.task.net)
        if joint:
            self.move_augmenters(contrast)
        put(own + pull, self.task.net)
        self.optimiser.step()  # theta <- theta - grad L_0
        self.optimiser.zero_grad()
        logs = {"loss": loss, "contrast": contrast, "contrast_pull": pull.norm(dim=1) / own.norm(dim=1).clamp(min=TINY)}
        if self.model_weight:
            logs["view_cosine"] = per_run(mean_cosine)(*w, seen.counted)
        return {name: value.detach() for name, value in logs.items()}

    def meta_step(self, new: Batch, old: Batch, seen: Seen) -> None:
        """Move the augmenters, and nothing else, on what they do to samples that the encoder has not just learned."""
        if self.cfg.arm == "second_order":
            loss = self.look_ahead(new, old, seen, self.task.draw(self.cfg.drawn, self.draws))
        else:
            if self.cfg.meta_on == "memory":
                seen = self.see(self.task.draw(self.cfg.drawn, self.draws))
            with torch.no_grad():
                h = self.encode(seen)
            loss = self.model_terms(seen, h, self.model_views(h, self.pair))  # L_1
        self.move_augmenters(loss)

    def move_augmenters(self, loss: Tensor) -> None:
        """One step of Adam, for the augmenters alone.    Shapes: loss [R]."""
        parameters = list(self.augmenters.parameters())
        slopes = torch.autograd.grad(loss.sum(), parameters, allow_unused=True, materialize_grads=True)
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        self.adam.step()
        self.adam.zero_grad()

    def look_ahead(self, new: Batch, old: Batch, seen: Seen, asked: Batch) -> Tensor:
        """The task loss of the samples asked for after a plain gradient step that these augmenters guide.    Shapes: -> [R]."""
        net = self.task.net
        plain = partial(self.task.plain_loss, rng=self.draws, net=net.with_parameters({}))
        h = self.encode(seen)
        guided = replay_loss(new, old, plain, joint_pass=self.cfg.joint_pass)
        guided = guided + self.contrast(seen, h, self.model_views(h, self.pair))
        parts = trained(net)
        slopes = torch.autograd.grad(guided.sum(), list(parts.values()), create_graph=True)
        step = zip(parts.items(), slopes, strict=True)
        ahead = net.with_parameters({name: value - self.task.lr * slope for (name, value), slope in step})
        return self.task.plain_loss(asked, self.draws, ahead)  # task(Q; theta'(phi))

    def encode(self, seen: Seen) -> Views:
        """The embeddings h1 and h2.    Shapes: -> [R, B, D] both."""
        one, two = (self.task.features(view, self.draws) for view in seen.views)
        return one, two

    def model_views(self, h: Views, augmenters: Iterable[Augment]) -> Views:
        """The model views w1 and w2.    Shapes: -> [R, B, D] both."""
        one, two = (augment(view) for augment, view in zip(augmenters, h, strict=True))
        return one, two

    def fixed(self) -> list[Augment]:
        """The augmenters as functions whose parameters take no gradient."""
        return [
            lift.with_parameters({name: value.detach() for name, value in trained(lift).items()}) for lift in self.pair
        ]

    def contrast(self, seen: Seen, h: Views, w: Views) -> Tensor:
        """What L_0 has beside the task loss.    Shapes: -> [R]."""
        total = torch.zeros_like(h[0][:, 0, 0])
        if self.data_weight:
            total = total + self.data_weight * self.data_term(*h, seen.labels, seen.counted)
        if self.model_weight:
            grown = ((self.updates + 1) / self.cfg.warm_up).clamp(max=1) if self.cfg.warm_up else 1.0
            total = total + self.model_weight * grown * self.model_terms(seen, h, w)
        return total

    def model_terms(self, seen: Seen, h: Views, w: Views) -> Tensor:
        """L_cl2 + L_reg.    Shapes: -> [R]."""
        return per_run(model_contrast)(
            *h,
            *w,
            seen.labels,
            seen.counted,
            tau=self.tau,
            similarity=self.similarity,
            weight=self.cfg.reg_weight,
            pairs=self.cfg.reg_pairs,
            scope=self.cfg.reg_scope,
        )

    def boundary(self) -> None:
        """Review the memory, if that is asked for."""
        for old in self.task.review():
            self.descend(REVIEW * self.task.loss(old), self.optimiser)

    def predict(self, batch: Batch) -> Tensor:
        """The answers of the task's net; augmenters have no part in them.    Shapes: -> [R, B, C]."""
        return self.task.answer(batch)
