"""What optimisers and teachers need beside torch's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cl_sim.runs import Lift


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


def without_decay_of_norms(net: Lift, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn as groups of an optimiser, so that those of BatchNorm layers do not decay."""
    norms = {
        id(parameter)
        for part in net.modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm)
        for parameter in part.parameters()
    }
    own = trainable(net)
    decays = [parameter for parameter in own if id(parameter) not in norms]
    rest = [parameter for parameter in own if id(parameter) in norms]
    groups = [{"params": decays, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
