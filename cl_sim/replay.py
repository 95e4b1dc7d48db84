"""What the replay strategies share: their common settings, and the tricks that go with any of them.

Source: Mai et al. 2022, "Online Continual Learning in Image Classification: An Empirical Survey" (multiple iterations, review
trick, nearest class mean); Rebuffi et al. 2017, "iCaRL" (nearest mean of exemplars); Gui et al. 2023, "Enhancing Sample
Utilization through Sample Adaptive Augmentation in Semi-Supervised Learning" (`saa`, here for any replay).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_sim.config import at_least
from cl_sim.encoders.classifier import unit
from cl_sim.errors import BadConfig
from cl_sim.memory.rows import Rows
from cl_sim.runs import Lift, join, per_run
from cl_sim.sample_adaptive import AdaptiveConfig, SampleAdaptive
from cl_sim.strategy import Env
from cl_sim.types import Batch, Logs

cross_entropy = per_run(F.cross_entropy)

CHUNK = 250  # memory rows encoded at a time
REVIEW = 0.1  # how much smaller the gradients of a review are: the survey's tenth


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(AdaptiveConfig):
    """Settings of every strategy that replays from a reservoir."""

    capacity: int = 1000  # samples kept per run
    replay: int = 10  # samples recalled per update
    lr: float = 0.1  # learning rate of SGD
    rule: Literal["vitter", "frozen"] = "vitter"  # the reservoir's rule
    replay_steps: int = 1  # updates per batch, each with newly recalled samples
    readout: Literal["head", "class_mean"] = "head"  # answer by the head, or by the nearest class mean of the memory
    review: Literal["never", "last", "each"] = "never"  # learn the memory once more after the last task, or after each
    mask_unseen: bool = False  # never answer a class that has not come yet

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, capacity=1, replay=1, lr=0, replay_steps=1)


def refuse_rule(cfg: ReplayConfig, strategy: str) -> None:
    """Raise BadConfig for a reservoir's rule where the memory has a rule of its own."""
    if cfg.rule != "vitter":
        raise BadConfig(f"rule is '{cfg.rule}', but {strategy} keeps no reservoir; leave strategy.rule out")


def replay_loss(
    new: Batch,
    old: Batch,
    loss: Callable[[Batch], Tensor],
    recalled_loss: Callable[[Batch], Tensor] | None = None,
    *,
    joint_pass: bool = False,
) -> Tensor:
    """The loss of a new and a recalled batch: of each in a pass of its own, added, or of both in one pass.

    Recalled samples may have another loss, and there may be none of them: no rows, or an empty batch.

    Shapes: -> [R].    Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning", algorithm 1.
    """
    if not old or not next(iter(old.values())).shape[1]:
        return loss(new)
    return loss(join(new, old)) if joint_pass else loss(new) + (recalled_loss or loss)(old)


class Tricks(nn.Module):
    """Read-out, review and sample-adaptive views of one replay strategy, whose net has the parts `encoder` and `head`.

    A strategy that hands over its memory takes `saa`: it passes what it recalls through `harder` before its own views, tells
    `judge` how well the net did on them, and adds `tick` to its logs. The others refuse the setting.

    Raises: BadConfig for a review that nothing would announce, and for `saa` without a memory.
    """

    seen: Tensor  # [R, C] bool

    def __init__(self, cfg: ReplayConfig, env: Env, memory: Rows | None = None) -> None:
        super().__init__()
        self.adaptive: SampleAdaptive | None = None
        if cfg.saa != "off":
            if memory is None:
                raise BadConfig(
                    f"saa is '{cfg.saa}', but this strategy does not learn recalled samples by views of their own; leave "
                    "strategy.saa out, or choose another strategy (cl-sim list strategies)"
                )
            self.adaptive = SampleAdaptive(cfg, env, memory, cfg.replay)
        if cfg.review != "never" and not env.announces:
            raise BadConfig(
                f"strategy.review is '{cfg.review}', but this stream announces no task boundaries; "
                "use --set strategy.review=never or --set stream.announces=true"
            )
        self.cfg, self.samples = cfg, env.samples
        self.classes = torch.arange(env.classes, device=env.device)
        self.register_buffer("seen", torch.zeros(env.runs, env.classes, dtype=torch.bool, device=env.device))
        self.means = ClassMeans(env.classes)

    def present(self, batch: Batch) -> Tensor:
        """Which classes the batch has.    Shapes: -> [R, C] bool."""
        return (batch["y"][..., None] == self.classes).any(1)

    def note(self, new: Batch) -> None:
        """Remember which classes have come."""
        self.seen |= self.present(new)

    def harder(self, old: Batch) -> Batch:
        """Recalled samples, with `saa` at the levels of their slots; then come the strategy's own views."""
        return old if self.adaptive is None else self.adaptive.harder(old)

    @torch.no_grad()
    def judge(self, view: Batch, logits: Tensor) -> None:
        """With `saa`: note the loss of each recalled sample, the cross-entropy of the answers.    Shapes: logits [R, B, C]."""
        if self.adaptive is not None:
            self.judge_by(view, cross_entropy(logits, view["y"], reduction="none"), logits.argmax(-1) == view["y"])

    @torch.no_grad()
    def judge_by(self, view: Batch, loss: Tensor, right: Tensor, asked: Tensor | None = None) -> None:
        """The same for a method without class scores, by its own loss of each sample, and by which are right of those asked.

        Shapes: loss [R, B]; right, asked [R, B] bool.
        """
        if self.adaptive is not None and "hard" in view:  # else nothing was in the memory
            self.adaptive.note(view, loss, self.seen)
            self.adaptive.answered(right, ~view["hard"] if asked is None else asked & ~view["hard"])

    def tick(self) -> Logs:
        """A step has been made: with `saa`, select if it is time, and say how it stands.    Shapes: -> each [R]."""
        return {} if self.adaptive is None else self.adaptive.tick()

    def scores(self, net: Lift, memory: Rows | None, x: Tensor) -> Tensor:
        """The answer of the net, or of the class means of the memory.    Shapes: x [R, B, ...] -> [R, B, C]."""
        if self.cfg.readout == "class_mean" and memory is not None:
            return self.means.scores(net.part("encoder"), memory, x)
        scores: Tensor = net(x)
        return self.masked(scores) if self.cfg.mask_unseen else scores

    def masked(self, scores: Tensor) -> Tensor:
        """Minus infinity for classes not yet seen; as it is before any was.    Shapes: [R, B, C] -> same."""
        known = self.seen | ~self.seen.any(1, keepdim=True)
        return scores.masked_fill(~known[:, None], -torch.inf)

    def boundary(self) -> None:
        """A task has ended."""
        if self.adaptive is not None:
            self.adaptive.boundary()

    def review(self, memory: Rows) -> Iterator[Batch]:
        """A task has ended: the whole memory in random order, if a review is due."""
        self.boundary()
        last = memory.offered >= self.samples
        if self.cfg.review == "each" or (self.cfg.review == "last" and last):
            yield from memory.epoch(self.cfg.replay)


class Onset(nn.Module):
    """0 until the second task begins, then 1, on the device: the weight of what needs an older task to speak of.

    Where no boundary is announced, 1 comes after so many steps (ours).    Shapes: weight [].
    """

    weight: Tensor
    step: Tensor

    def __init__(self, env: Env, after: int) -> None:
        super().__init__()
        self.after, self.announced = after, env.announces
        self.register_buffer("weight", torch.zeros((), device=env.device))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64, device=env.device))

    def tick(self) -> None:
        """A step has been made."""
        self.step += 1
        if not self.announced:
            self.weight.copy_(self.step >= self.after)

    def boundary(self) -> None:
        """A task has ended."""
        self.weight.fill_(1)


def in_chunks(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Encode many samples a few at a time; for passes in which samples do not meet.    Shapes: [R, N, ...] -> [R, N, D]."""
    return torch.cat([encode(part) for part in torch.split(x, CHUNK, 1)], 1)


class ClassMeans(nn.Module):
    """Nearest-class-mean scores. The means are kept until a state is loaded or the mode is set again.

    The engine sets the mode around predictions; whoever calls a strategy directly does too: `train()`, learn, `eval()`, predict.

    Per class the mean of the unit features of its rows, made unit again; the score is the cosine to it, which ranks classes
    like the Euclidean distance. A class without rows scores minus infinity (the code line answers a random direction).
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.kept: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> ClassMeans:
        """Forget the means: the weights or the memory may have changed."""
        self.kept = None
        return super().train(mode)

    def scores(self, encode: Callable[[Tensor], Tensor], memory: Rows, x: Tensor) -> Tensor:
        """Cosines to the class means; zeros while the memory is empty.    Shapes: x [R, B, ...] -> [R, B, C]."""
        if not len(memory):
            return torch.zeros(*x.shape[:2], self.classes, device=x.device)
        if self.kept is None or self.training:
            self.kept = self._means(encode, memory)
        means, known = self.kept
        return (unit(encode(x)) @ means.mT).masked_fill(~known[:, None], -torch.inf)

    def _means(self, encode: Callable[[Tensor], Tensor], memory: Rows) -> tuple[Tensor, Tensor]:
        """Shapes: -> [R, C, D], [R, C] bool."""
        rows = memory.rows()
        x, y = (rows[name][:, : len(memory)] for name in ("x", "y"))
        features = unit(in_chunks(encode, x))  # [R, M, D]
        member = y[..., None] == torch.arange(self.classes, device=y.device)  # [R, M, C]
        return unit(member.to(features.dtype).mT @ features), member.any(1)


def _forget(means: Any, keys: Any) -> None:
    means.kept = None
