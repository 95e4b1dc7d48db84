"""CTVIS: embeddings of instances are trained against the memory bank that the tracker would have by then.

Source: Ying et al. 2023, "CTVIS: Consistent Training for Online Video Instance Segmentation", and its code (MIT licence).
Symbols: e_i^t -> emb at match[i, t], a_i^t -> running_average, f -> bi_softmax, L_emb and L_cos -> bank_contrast.
Departures: no segmenter, boxes and identities are given by the stream, so queries are boxes. Paper and code differ in the
negatives, and we follow the paper: averages of the other stored instances, to which the boxes of the frame before that show
no instance are added; `negatives=frame` is the code's rule. Noise, which the code has switched off, changes the bank alone,
never anchors or the newest true observation, and only once an instance has been truly seen; a first appearance looks ahead
by the intended rule (`clip_items` has the released one as `strict_reference`). Small encoders want AdamW at 1e-3 and gradients
of norm 1, where the code has 1e-4 and 0.01 for a large one. `pair`, `pairs`, `adjacent` and `multi` are the baselines without
a bank. Ours: a class head, and the replay of clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torch.func import vmap  # type: ignore[attr-defined]
from torch.nn import functional as F

from cl_sim import measure
from cl_sim.clips import (
    Items,
    Negatives,
    Roll,
    backgrounds,
    clip_items,
    pair_items,
    pairing,
    roll,
    visible,
    wrong_rows,
)
from cl_sim.config import at_least, within
from cl_sim.encoders.instances import Embedder
from cl_sim.encoders.queries import Query, Reader
from cl_sim.errors import BadConfig
from cl_sim.losses import bank_contrast
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import Adam, clip, without_decay_of_norms
from cl_sim.runs import join, per_run
from cl_sim.strategy import Env, Strategy
from cl_sim.tracker import TrackerConfig
from cl_sim.types import Batch, Logs

contrast, rolls = per_run(bank_contrast), per_run(vmap(roll))


@dataclass(frozen=True, kw_only=True)
class CTVISConfig(TrackerConfig):
    """Settings of CTVIS, and of its tracker."""

    items: Literal["bank", "pair", "pairs", "adjacent", "multi"] = "bank"  # what an anchor is compared with
    negatives: Negatives = "bank+background"  # of a bank's items
    p_average: float = 0.5  # probability that a positive is the running average, not the newest view
    max_background: int = 0  # background rows among the negatives of an item; 0: all
    bidirectional: bool = False  # also items from the average to the frame
    detach_weights: bool = False  # no gradients through the weights of the averages
    noise_prob: float = 0.0  # probability that a wrong vector enters the bank; 0.05 to begin with
    noise_source: Literal["any", "instances", "background"] = "any"  # which rows may enter
    noise_on: Literal["absent", "any"] = "absent"  # in frames where the instance is hidden, or in all
    w_embed: float = 2.0  # weight of the contrast of dot products
    w_cosine: float = 3.0  # weight of the contrast of cosines
    w_class: float = 0.0  # weight of a class head; 0: none
    lr: float = 0.001  # learning rate of AdamW
    weight_decay: float = 0.05
    max_norm: float = 1.0  # gradients are cut to this norm
    capacity: int = 0  # clips remembered per run
    replay: int = 0  # clips recalled per step

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, w_embed=0, w_cosine=0, w_class=0, lr=0, weight_decay=0, max_norm=1e-12, capacity=0, replay=0)
        at_least(self, max_background=0)
        within(self, 0, 1, "p_average", "noise_prob")
        if (self.capacity > 0) != (self.replay > 0):
            raise BadConfig(
                f"capacity is {self.capacity} and replay {self.replay}: clips are remembered to be recalled; set both or none"
            )
        if self.items != "bank":
            self._refuse("items", self.items, "negatives", "p_average", "bidirectional", "detach_weights", "noise_prob")
        if self.negatives != "bank+background":
            self._refuse("negatives", self.negatives, "max_background")
        if not self.noise_prob:
            self._refuse("noise_prob", 0, "noise_source", "noise_on")

    def _refuse(self, cause: str, value: object, *names: str) -> None:
        """Raise BadConfig for settings that are not at their default but have no effect."""
        for name in names:
            if getattr(self, name) != getattr(type(self), name):
                raise BadConfig(f"{name} has no effect with {cause}={value}; leave strategy.{name} out")


class CTVIS(Strategy):
    """Training by replay of the inference bank, and the tracker that reads it."""

    Config, tasks = CTVISConfig, frozenset({"associate"})

    def __init__(self, cfg: CTVISConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Embedder(env.encoder(), env.classes if cfg.w_class else 0))
        self.dim, self.takes = embedder(self.net.net)
        self.queries = reader(self.net.net, cfg)
        kept = {"clip": env.fields["clip"]} if env.rebuild else env.fields  # 8 bytes, if clips can be made again
        self.memory = Reservoir(cfg.capacity, kept, env.rng) if cfg.capacity else None
        groups = without_decay_of_norms(self.net, cfg.weight_decay)
        self.adam = Adam(groups, cfg.lr, cfg.weight_decay) if groups else None  # given embeddings learn nothing

    @property
    def steady(self) -> bool:
        """True once every step recalls the same number of clips; never with queries, which are assigned on the host."""
        return self.queries is None and (self.memory is None or self.memory.holds(self.cfg.replay))

    def observe(self, new: Batch) -> Logs:
        """One gradient step on the items of new and recalled clips; then remember the new ones."""
        both = new
        if self.memory is not None and len(self.memory):
            old = self.memory.sample(self.cfg.replay)
            both = join(new, self.env.rebuild(old["clip"]) if self.env.rebuild else old)
        logs = self.losses(both)
        if self.adam is not None:
            self.adam.zero_grad()
            logs["loss"].sum().backward()  # type: ignore[no-untyped-call]
            clip(self.net, self.cfg.max_norm)
            self.adam.step()
        if self.memory is not None:
            self.memory.add(new)
        return logs

    def losses(self, batch: Batch) -> Logs:
        """Both contrasts over the items of all clips, the class loss, and how many items there were.    Shapes: -> each [R]."""
        output = self.answer(batch)
        shown = visible(batch)
        who = rolls(batch["instance"], shown, backgrounds(batch))
        if self.queries is not None:
            who = self.queries.roll(output, batch, who)
        items = self.items(output[..., : self.dim], who)
        embed, cosine = contrast(*items)
        loss = self.cfg.w_embed * embed + self.cfg.w_cosine * cosine
        logs = {"loss": loss, "embed": embed, "cosine": cosine}
        logs["items"] = (items.positive_mask.any(2) & items.negative_mask.any(2)).sum(1).float()  # [R]
        logs["instances_left_out"] = who.lost.sum(1).float()
        if self.cfg.w_class:
            logs["class"] = class_loss(
                output[..., self.dim :].flatten(1, 3), batch["label"].flatten(1), shown.flatten(1)
            )
            logs["loss"] = loss + self.cfg.w_class * logs["class"]
        return logs

    def items(self, emb: Tensor, who: Roll) -> Items:
        """The items of every clip, side by side.    Shapes: emb [R, B, T, Q, D], roll [R, B, ...] -> [R, B * A, ...]."""
        cfg, shape = self.cfg, who.present.shape  # [R, B, G, T]
        if cfg.items != "bank":
            order = self.rng.bits(shape[1], shape[3]).argsort(-1)  # [R, B, T]
            compared = per_run(vmap(partial(paired, kind=cfg.items)))
            made = compared(emb, *who, order)
        else:
            coins, hits, picks = self.rng.uniform(3, *shape[1:]).unbind(1)
            settings = {"probability": cfg.noise_prob, "source": cfg.noise_source, "on": cfg.noise_on}
            wrong = per_run(vmap(partial(disturbed, **settings)))(*who, hits, picks)
            make = partial(
                replayed,
                negatives=cfg.negatives,
                p_average=cfg.p_average,
                max_background=cfg.max_background,
                bidirectional=cfg.bidirectional,
                detach_weights=cfg.detach_weights,
            )
            made = per_run(vmap(make))(emb, who.present, who.match, coins, who.rows, wrong)
        return Items(*(part.flatten(1, 2) for part in made))

    def answer(self, batch: Batch) -> Tensor:
        """What the net says of every row.    Shapes: -> [R, B, T, Q, D (+ C)]."""
        inputs = [batch[name].flatten(1, 2) for name in self.takes]  # clips end to end: [R, B * T, ...]
        output: Tensor = self.net(*inputs)
        return output.view(*batch["instance"].shape[:3], -1, output.shape[-1])

    def predict(self, batch: Batch) -> Tensor:
        """Embeddings, then class scores if there is a class head, or what queries answer.    Shapes: -> [R, B, T, Q, ...]."""
        return self.answer(batch)

    def measure(self) -> measure.Measure:
        """By tracks that are made with this strategy's settings."""
        return measure.association(self.cfg, self.dim, self.queries.candidates if self.queries else None)


def embedder(net: object) -> tuple[int, tuple[str, ...]]:
    """The width of its embeddings, and the fields that it takes."""
    assert isinstance(net, Embedder)
    return net.dim, net.takes


def reader(net: object, cfg: CTVISConfig) -> Reader | None:
    """What takes the answers of queries apart, if the net has any.    Raises: BadConfig for a class head beside theirs."""
    encoder = getattr(net, "encoder", None)
    if not isinstance(encoder, Query):
        return None
    if cfg.w_class:
        raise BadConfig(
            "w_class has no effect with encoder.name=query, whose net names classes; leave strategy.w_class out"
        )
    return Reader(encoder)


def replayed(
    emb: Tensor, present: Tensor, match: Tensor, coins: Tensor, rows: Tensor, wrong: Tensor, **rule: object
) -> Items:
    """`clip_items` of one clip, all tensors in a row."""
    return clip_items(emb, present, match, coins=coins, rows=rows, wrong=wrong, **rule)  # type: ignore[arg-type]


def disturbed(*parts: Tensor, probability: float, source: str, on: str) -> Tensor:
    """`wrong_rows` of one clip.    Shapes: the roll, then uniform numbers for whether and for which, [G, T] -> [G, T]."""
    *who, hit, pick = parts
    return wrong_rows(Roll(*who), hit < probability, pick, source, on)


def paired(emb: Tensor, *parts: Tensor, kind: str) -> Items:
    """`pair_items` of one clip.    Shapes: emb [T, Q, D], the roll, then an order of the frames [T]."""
    *who, order = parts
    return pair_items(emb, Roll(*who), *pairing(kind, len(emb), order))


@per_run
def class_loss(scores: Tensor, labels: Tensor, shown: Tensor) -> Tensor:
    """Mean cross-entropy over the rows that show an instance; 0 without any.    Shapes: [N, C], [N], [N] -> []."""
    each = F.cross_entropy(scores, labels.clamp(min=0), reduction="none")
    return each.masked_fill(~shown, 0).sum() / shown.sum().clamp(min=1)
