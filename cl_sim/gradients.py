"""Gradients as vectors, one per run, and the net one step ahead.

A vector holds the trainable parameters of a net in their order, flattened: [R, P], whether the net is stacked or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_sim.runs import Lift


def trained(net: Lift) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name in the lifted net."""
    return {name: parameter for name, parameter in net.net.named_parameters() if parameter.requires_grad}


def flat(parts: Sequence[Tensor], runs: int) -> Tensor:
    """Tensors of parameter shape as one vector per run.    Shapes: -> [R, P]."""
    return torch.cat([part.reshape(runs, -1) for part in parts], 1)


def unflat(vector: Tensor, net: Lift) -> dict[str, Tensor]:
    """A vector per run as tensors of the parameters' shapes.    Shapes: [R, P] -> by name."""
    parameters = trained(net)
    sizes = [parameter.numel() // net.runs for parameter in parameters.values()]
    parts = torch.split(vector, sizes, 1)
    return {name: part.reshape(value.shape) for part, (name, value) in zip(parts, parameters.items(), strict=True)}


def gradient(loss: Tensor, net: Lift, keep: bool = False) -> Tensor:
    """Gradient of every run's loss, zero where it does not reach; `keep` the graph for another one.

    Shapes: loss [R] -> [R, P].
    """
    parameters = list(trained(net).values())
    parts = torch.autograd.grad(loss.sum(), parameters, retain_graph=keep, allow_unused=True, materialize_grads=True)
    return flat(parts, net.runs)


def cosines(vector: Tensor, others: Tensor) -> Tensor:
    """Cosines between a vector and others, of one run; 0 with a zero vector.    Shapes: [P], [G, P] -> [G]."""
    lengths = vector.norm() * others.norm(dim=1)
    found: Tensor = others @ vector / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
    return found


def put(vector: Tensor, net: Lift) -> None:
    """Make the vector what the optimiser will find.    Shapes: [R, P]."""
    parts = unflat(vector, net)
    for name, parameter in trained(net).items():
        parameter.grad = parts[name].detach()


def ahead(net: Lift, vector: Tensor, lr: float, part: str = "") -> Callable[..., Any]:
    """The net, or a child, after a virtual step of gradient descent; its own weights and BatchNorm statistics stay as they are.

    Source: the look-ahead of Aljundi et al. 2019, "Online Continual Learning with Maximally Interfered Retrieval".
    Shapes: vector [R, P] -> a function like the net or its child.
    """
    parts = unflat(vector, net)
    return net.with_parameters({name: value - lr * parts[name] for name, value in trained(net).items()}, part)
