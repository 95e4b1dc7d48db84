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
