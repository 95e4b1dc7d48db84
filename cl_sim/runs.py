"""The run axis: a net per run, a loss for every run, batches side by side.

Networks and losses are written for one run, as in a paper; here they are lifted to R runs. One run skips the lift.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap  # type: ignore[attr-defined]
from torch.utils._pytree import tree_map

from cl_sim.types import Batch

Out = TypeVar("Out")  # a tensor, or a tuple of tensors


class Lift(nn.Module):
    """One network per run: parameters and buffers stacked on axis 0, evaluated by vmap in one call.

    Called with tensors [R, ...], it returns what the network returns, with [R] in front. With a single run it holds the
    network as it is, in channels-last layout (on 2 cores a third faster for 32x32 images, forward and backward).
    """

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.runs = len(nets)
        self.net = nets[0] if self.runs == 1 else _stack(nets)
        if self.runs == 1:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, *inputs: Tensor) -> Any:
        """Evaluate every run's net on its own inputs.    Shapes: each [R, ...] -> [R, ...]."""
        return self._evaluate(self.net, *inputs)

    def part(self, name: str) -> Callable[..., Any]:
        """One child of the net, say its encoder, as a function lifted like the whole.    Shapes: each [R, ...] -> [R, ...]."""
        return partial(self._evaluate, self.net.get_submodule(name))

    def weight(self, name: str) -> Tensor:
        """A parameter of the net with the run axis in front.    Shapes: -> [R, *shape]."""
        parameter = self.net.get_parameter(name)
        return parameter[None] if self.runs == 1 else parameter

    def with_parameters(self, values: Mapping[str, Tensor], part: str = "") -> Callable[..., Any]:
        """The net, or a child, as it would be with other values of some parameters; its own and its buffers stay as they are.

        Values are named as in the whole net.
        """
        net, inside = self.net.get_submodule(part), f"{part}." if part else ""
        other = {name.removeprefix(inside): value for name, value in values.items() if name.startswith(inside)}
        state = {**dict(net.named_parameters()), **other}, {name: kept.clone() for name, kept in net.named_buffers()}
        if self.runs > 1:
            return lambda *inputs: vmap(lambda held, args: functional_call(net, held, args))(state, inputs)
        return lambda *inputs: _in_front(functional_call(net, state, tuple(_single(x) for x in inputs)))

    def _evaluate(self, net: nn.Module, *inputs: Tensor) -> Any:
        if self.runs == 1:
            return _in_front(net(*(_single(x) for x in inputs)))
        state = dict(net.named_parameters()), dict(net.named_buffers())
        return vmap(lambda held, args: functional_call(net, held, args))(state, inputs)


def _in_front(outputs: Any) -> Any:
    """The run axis before each output of a single run."""
    if isinstance(outputs, Tensor):  # the usual case; a tree takes 15 microseconds
        return outputs[None]
    return tree_map(lambda out: out[None], outputs)


def _single(x: Tensor) -> Tensor:
    return x[0].contiguous(memory_format=torch.channels_last) if x.dim() == 5 else x[0]


def _stack(nets: Sequence[nn.Module]) -> nn.Module:
    """The first net, with every parameter and buffer replaced by the stack over all nets."""
    whole = copy.deepcopy(nets[0])
    for path, module in whole.named_modules():
        twins = [net.get_submodule(path) for net in nets]
        for name, parameter in list(module.named_parameters(recurse=False)):
            stacked = torch.stack([twin.get_parameter(name).detach() for twin in twins])
            setattr(module, name, nn.Parameter(stacked, requires_grad=parameter.requires_grad))
        for name, _ in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.stack([twin.get_buffer(name) for twin in twins]))
    return whole


def per_run(function: Callable[..., Out]) -> Callable[..., Out]:
    """Lift a function of one run's tensors to R runs; keyword arguments are shared by all runs.

    Shapes: each positional argument [R, ...] -> [R, ...], or a tuple of such.
    """

    @wraps(function)
    def lifted(*args: Tensor, **shared: Any) -> Out:
        if len(args[0]) == 1:
            only = (arg.squeeze(0) for arg in args)  # unlike a pick, its gradient is a view
            alone: Out = _in_front(function(*only, **shared))
            return alone
        result: Out = vmap(lambda *one: function(*one, **shared))(*args)
        return result

    return lifted


def join(*batches: Batch) -> Batch:
    """Put batches side by side along the sample axis; only the keys all of them have.

    Shapes: [R, B_i, ...] -> [R, sum of B_i, ...].
    """
    shared = [key for key in batches[0] if all(key in batch for batch in batches)]
    return {key: torch.cat([batch[key] for batch in batches], dim=1) for key in shared}


def pick(batch: Batch, place: Tensor) -> Batch:
    """Some samples of a batch, each run's own.    Shapes: batch [R, B, ...], place [R, n] -> [R, n, ...]."""
    run = torch.arange(len(place), device=place.device)[:, None]
    return {key: value[run, place] for key, value in batch.items()}


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """The net is in evaluation mode inside, and afterwards in the mode it had."""
    mode = net.training
    net.eval()
    yield
    net.train(mode)


@contextmanager
def statistics_move_if(moved: Tensor, net: nn.Module) -> Iterator[None]:
    """Passes made inside leave the net's buffers, its BatchNorm statistics, as they were unless `moved`.    Shapes: moved []."""
    before = [buffer.clone() for buffer in net.buffers()]
    yield
    for buffer, kept in zip(net.buffers(), before, strict=True):
        buffer.copy_(torch.where(moved, buffer, kept))
