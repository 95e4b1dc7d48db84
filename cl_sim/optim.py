"""What optimisers and teachers need beside torch's own."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_sim.runs import Lift
from cl_sim.schedules import cosine_decay


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn: all but those of a frozen encoder."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


@torch.no_grad()
def clip(net: Lift, norm: float) -> None:
    """Scale down the gradient of each run whose norm, over all parameters, is larger than this."""
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    squares = torch.stack([gradient.reshape(net.runs, -1).square().sum(1) for gradient in gradients])  # [parameters, R]
    factor = (norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1)  # [R]
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)) if net.runs > 1 else factor)


class SGD(torch.optim.SGD):
    """torch's own, with all parameters in one call also on a CPU: the same numbers, 0.6 times the host's work.

    Not `fused`: on a CPU that reads gradients as if they lay in memory like their parameters, which is not so for those that
    were computed elsewhere and put there (agem, meta_augment).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, foreach=True
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or set them to 0. To drop them in torch's own way costs the host 150 microseconds more."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class Adam(Optimizer):
    """Adam that never reads the host: its step counters lie beside the parameters.

    torch's own does the same with `capturable`, but refuses that on a CPU. A parameter without a gradient stays as it is.
    Weight decay is decoupled from the gradient, as in torch's AdamW.

    Source: Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization"; Loshchilov and Hutter 2019, "Decoupled Weight
    Decay Regularization", algorithm 2, without a schedule.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float64, device=parameter.device),
                    "mean": torch.zeros_like(parameter, requires_grad=False),
                    "square": torch.zeros_like(parameter, requires_grad=False),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(state["mean"] / size * (group["lr"] / (1 - first ** state["step"])))


class Previous(nn.Module):
    """A net as it was when last told so, in evaluation mode and without gradients: the teacher of distillation.

    It starts as a copy of the net. Its weights are part of the strategy's state.
    """

    def __init__(self, net: Lift) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Previous:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, net: Lift) -> None:
        """Become a copy of the net, in place."""
        for mine, other in zip(self.net.state_dict().values(), net.state_dict().values(), strict=True):
            mine.copy_(other)

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """What the net answered then.    Shapes: each [R, ...] -> [R, ...]."""
        return self.net(*inputs)


class Average(nn.Module):
    """A moving average of a net's weights, in evaluation mode and without gradients; buffers are those of the net.

    After update k (from 0) a weight is a * average + (1 - a) * own, a = min(1 - 1 / (k + 1), decay), so that the first update
    forgets the start; without `ramp`, a is the decay from the first update on.

    Source: the weights that FixMatch and its successors are evaluated with, as released.
    """

    updates: Tensor  # [] int64

    def __init__(self, net: Lift, decay: float, ramp: bool = True) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay, self.ramp = decay, ramp
        device = next(net.parameters()).device
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    def train(self, mode: bool = True) -> Average:
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, net: Lift) -> None:
        """Move towards the net, in place."""
        stays = self.updates.double() / (self.updates + 1) if self.ramp else torch.ones_like(self.updates).double()
        stays = stays.clamp(max=self.decay)
        for mine, other in zip(self.net.parameters(), net.parameters(), strict=True):
            mine.copy_(stays * mine + (1 - stays) * other)
        for kept, other_kept in zip(self.net.buffers(), net.buffers(), strict=True):
            kept.copy_(other_kept)
        self.updates += 1

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """What the averaged net answers.    Shapes: each [R, ...] -> [R, ...]."""
        return self.net(*inputs)


class Teacher(nn.Module):
    """A part of a net that follows it slowly: mine <- decay * mine + (1 - decay) * theirs, parameters only, no gradients.

    It starts as a copy and is in training mode when its owner is: its BatchNorm normalises by the batch at hand and keeps
    statistics of its own.    Source: the EMA teachers of self-supervised learning, as BECLR's.
    """

    def __init__(self, net: Lift, part: str) -> None:
        super().__init__()
        self.part = part
        self.net = copy.deepcopy(net)
        self.net.net = self.net.net.get_submodule(part)
        self.net.requires_grad_(False)

    @torch.no_grad()
    def update(self, net: Lift, decay: Tensor | float) -> None:
        """Move towards the net, in place."""
        theirs = net.net.get_submodule(self.part).parameters()
        for mine, other in zip(self.net.parameters(), theirs, strict=True):
            mine.copy_(decay * mine + (1 - decay) * other)

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        """What the teacher answers.    Shapes: each [R, ...] -> [R, ...]."""
        return self.net(*inputs)


def follow_cosine(optimiser: Optimizer, base: float, steps: int) -> None:
    """Set the rate of the coming step on FixMatch's cosine; the optimiser's own state counts the steps.

    The rate is a number of the host: such a step must not be captured.
    """
    for group in optimiser.param_groups:
        done = group.get("steps_made", 0)
        group["lr"], group["steps_made"] = cosine_decay(done, steps, base), done + 1


def without_decay_of_norms(net: Lift, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn as groups of an optimiser, so that those of norms do not decay."""
    norms = {
        id(parameter)
        for part in net.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm)
        for parameter in part.parameters()
    }
    own = trainable(net)
    decays = [parameter for parameter in own if id(parameter) not in norms]
    rest = [parameter for parameter in own if id(parameter) in norms]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
