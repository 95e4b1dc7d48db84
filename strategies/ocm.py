"""OCM: online continual learning by mutual information. Every image is turned into 16, each a class of its own to a contrast.

Source: Guo et al. 2022, "Online Continual Learning Through Mutual Information Maximization", and its code.
Symbols: X^new -> new, X^buf -> old, G(X) -> turned views, F -> encode, z -> u, F* -> previous.
Departures: the previous net answers in evaluation mode, in the code it is left in training mode; 64 samples are recalled from
the second task on, where the code takes 7 per class seen as long as that is fewer; the pseudo-class of a label counts in steps of
all classes, not of 100; the loss lacks a constant of the code, which gives no gradient; the reservoir is the textbook's
(`rule=frozen`: the code's). The code halves the similarities on CIFAR-10, and only from the second task on: `similarity=0.5`.
It trains a full ResNet-18, several times the work of the other methods: --set encoder.name=resnet18.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier, unit
from cl_sim.errors import BadConfig
from cl_sim.losses import label_contrast, pair_contrast
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import Previous, trainable
from cl_sim.replay import ReplayConfig, Tricks
from cl_sim.runs import Lift, join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)
contrast_labels, contrast_pairs = per_run(label_contrast), per_run(pair_contrast)
TURNS = 16  # 4 images with halves turned upside down, each in 4 orientations


@dataclass(frozen=True, kw_only=True)
class OCMConfig(ReplayConfig):
    """Settings of OCM."""

    replay: int = 64  # samples recalled per update
    lr: float = 0.001  # learning rate of Adam
    decay: float = 0.0001  # weight decay
    tau: float = 0.07  # temperature of the similarities
    width: int = 128  # of the projection, and of the slice of features it is compared with
    similarity: float = 1.0  # factor of the similarities from the second task on; 0.5 for CIFAR-10

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, decay=0, tau=1e-6, width=1, similarity=0)
        if self.review != "never":
            raise BadConfig(
                "strategy.review makes gradients smaller, but Adam's steps do not depend on that; leave it out"
            )


class Projected(Classifier):
    """A classifier with a linear projection beside its head.    Shapes: projection [B, D] -> [B, width]."""

    def __init__(self, encoder: Any, classes: int, width: int) -> None:
        super().__init__(encoder, classes)
        self.projection = nn.Linear(encoder.dim, width)


class OCM(Strategy):
    """Replay with contrasts that keep and add information."""

    Config, tasks = OCMConfig, frozenset({"classify"})
    views = ("flip", "grey:0.25", "resized_crop:0.3")
    taught: Tensor  # [R, C] bool, the classes that the previous net knows

    def __init__(self, cfg: OCMConfig, env: Env) -> None:
        super().__init__(cfg, env)
        refuse(env)
        self.net = env.lift(lambda: Projected(env.encoder(), env.classes, cfg.width))
        self.features = self.net.weight("head.weight").shape[-1]
        if cfg.width > self.features:
            raise BadConfig(f"strategy.width is {cfg.width}, but this encoder has only {self.features} features")
        self.previous = Previous(self.net)
        self.memory = Reservoir(cfg.capacity, env.fields, env.rng, cfg.rule)
        self.tricks = Tricks(cfg, env, self.memory)
        self.adam = Adam(
            trainable(self.net),
            lr=cfg.lr,
            betas=(0.9, 0.99),
            weight_decay=cfg.decay,
            capturable=env.device.type == "cuda",
        )
        self.register_buffer("taught", torch.zeros_like(self.tricks.seen))

    @property
    def steady(self) -> bool:
        """Never: the step changes with the second task, and on a CPU torch's Adam reads its counter."""
        return False

    def observe(self, new: Batch) -> Logs:
        """One step of Adam on the new batch, from the second task on also on recalled samples; then remember the new batch."""
        for _ in range(self.cfg.replay_steps):
            loss = self.later_loss(new) if bool(self.taught.any()) else self.first_loss(new)
            self.descend(loss, self.adam)
        self.memory.add(new)
        self.tricks.note(new)
        return {"loss": loss.detach(), **self.tricks.tick()}

    def first_loss(self, new: Batch) -> Tensor:
        """The contrast of the new batch and its cross-entropy.    Shapes: -> [R]."""
        both = self.two_views(turned(new, self.env.classes))
        u, z = self.project(self.net, both["x"])
        contrast = contrast_pairs(self.similarity(u, z), both["y"], tau=self.cfg.tau)
        return contrast + cross_entropy(self.net(self.env.augment(new)["x"]), new["y"])

    def later_loss(self, new: Batch) -> Tensor:
        """The contrasts of new and old and of old with its past, cross-entropy and distillation of old.    Shapes: -> [R]."""
        old = self.memory.sample(self.cfg.replay)
        fresh, recalled = (turned(batch, self.env.classes) for batch in (new, old))
        views = self.two_views(fresh), self.two_views(recalled)
        sizes = [view["y"].shape[1] for view in views]
        u, z = (
            torch.split(part, sizes, 1) for part in self.project(self.net, join(*views)["x"])
        )  # one pass over everything
        now = [self.cfg.similarity * self.similarity(*parts) for parts in zip(u, z, strict=True)]
        then = u[1][:, : sizes[1] // 2] @ self.past(recalled["x"]).mT  # turned, but not augmented
        contrast = contrast_pairs(now[0], views[0]["y"], tau=self.cfg.tau)
        contrast = contrast + contrast_labels(now[1], views[1]["y"], tau=self.cfg.tau)
        contrast = contrast + contrast_labels(then, recalled["y"], tau=self.cfg.tau)
        view = self.env.augment(self.tricks.harder(old))
        logits = self.net(view["x"])
        self.tricks.judge(view, logits)
        taught = self.previous(self.env.augment(old)["x"])  # a view of its own, as in the code
        return contrast + cross_entropy(logits, old["y"]) + gap(logits, taught, self.taught)

    def two_views(self, batch: Batch) -> Batch:
        """The batch and then its augmented view.    Shapes: [R, N, ...] -> [R, 2N, ...]."""
        return join(batch, self.env.augment(batch))

    def project(self, net: Lift, x: Tensor) -> tuple[Tensor, Tensor]:
        """Projections and features, both as unit rows.    Shapes: -> [R, N, width], [R, N, D]."""
        features = net.part("encoder")(x)
        return unit(net.part("projection")(features)), unit(features)

    @torch.no_grad()
    def past(self, x: Tensor) -> Tensor:
        """The previous net's projections.    Shapes: -> [R, N, width]."""
        return self.project(self.previous.net, x)[0]

    def similarity(self, u: Tensor, z: Tensor) -> Tensor:
        """Cosines of projections, plus their products with a random slice of the features.    Shapes: -> [R, N, N]."""
        start = self.rng.below(max(1, self.features - self.cfg.width), 1)  # [R, 1]
        place = start + torch.arange(self.cfg.width, device=z.device)
        part = z.gather(2, place[:, None].expand(-1, z.shape[1], -1))
        return u @ u.mT + u @ part.mT

    def boundary(self) -> None:
        """The net becomes the previous one, which knows all classes seen."""
        self.tricks.boundary()
        self.previous.update(self.net)
        self.taught.copy_(self.tricks.seen)

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        return self.tricks.scores(self.net, self.memory, batch["x"])


def refuse(env: Env) -> None:
    """Raise BadConfig for a stream that OCM cannot learn from."""
    shape = env.fields["x"].shape
    if len(shape) != 3 or shape[1] != shape[2]:
        raise BadConfig(f"ocm turns square images, but the samples have shape {list(shape)}; choose another strategy")
    if not env.announces:
        raise BadConfig("ocm needs task boundaries, but this stream announces none; use --set stream.announces=true")


def turned(batch: Batch, classes: int) -> Batch:
    """Every image 16 times: its halves as they are, the left, both, or the right one turned by 180 degrees, in 4 orientations.

    Each of the 16 has classes of its own: label + number * classes.    Shapes: x [R, B, K, S, S] -> [R, 16 B, K, S, S].
    """
    x, y = batch["x"], batch["y"]
    middle = x.shape[-1] // 2
    left, right = x[..., :middle], x[..., middle:]
    left_turned, right_turned = left.flip(-2, -1), right.flip(-2, -1)
    pairs = [(left, right), (left_turned, right), (left_turned, right_turned), (left, right_turned)]
    halves = torch.cat([torch.cat(pair, -1) for pair in pairs], 1)  # [R, 4 B, ...]
    images = torch.cat([halves.rot90(quarter, (-2, -1)) for quarter in range(4)], 1)
    return {"x": images, "y": torch.cat([y + number * classes for number in range(TURNS)], 1)}


def gap(logits: Tensor, taught: Tensor, known: Tensor) -> Tensor:
    """Mean squared difference over the known classes.    Shapes: scores [R, B, C], known [R, C] -> [R]."""
    squares = (logits - taught).square() * known[:, None]
    return squares.sum((1, 2)) / (logits.shape[1] * known.sum(1).clamp(min=1))
