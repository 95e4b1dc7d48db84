"""What a step of meta-optimised augmentation costs, as a ratio to the base strategy in the same process.

    python tests/bench/meta_augment.py [--data FOLDER] [--steps 10] [--device cpu] [PRESET ...]

Arms take turns, five rounds each after a warm-up, and the median counts: processor time on a CPU, elapsed time on a GPU.
Beside it, the samples that the encoder takes in, forward and with a graph for the backward pass, over those of the base
strategy's step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cl_sim import preset, session
from cl_sim.config import from_dict, merge
from cl_sim.testing import Toy

ROUNDS = 5
ARMS: dict[str, dict[str, Any]] = {
    "off": {"arm": "off"},
    "data-only": {"arm": "data-only"},
    "frozen": {"arm": "frozen"},
    "joint": {"arm": "joint"},
    "first_order": {},
    "first_order, two encoder steps": {"second_encoder_step": True},
}


class Rows:
    """Counts the samples that a module takes in, and those of them with a graph."""

    def __init__(self, module: nn.Module) -> None:
        self.forward, self.backward = 0, 0
        module.register_forward_hook(self.note)

    def note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add one call."""
        self.forward += len(output)
        self.backward += len(output) * output.requires_grad


def made(name: str, settings: dict[str, Any], data: str, device: str) -> Toy:
    """A preset's strategy and stream, for one seed."""
    config = from_dict(merge({**preset.read(name), "data": data, "device": device, "seeds": [0]}, settings))
    stream = session.build_stream(config, config.seeds)
    return Toy(stream, session.build_strategy(config, stream, config.seeds).train())


def clock(device: str) -> Callable[[], float]:
    """Seconds: of the processor, or elapsed once the device has finished."""
    if device == "cpu":
        return time.process_time

    def elapsed() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return elapsed


def measure(name: str, data: str, device: str, steps: int) -> None:
    """Print one line per arm."""
    toys = {arm: made(name, {"strategy": settings}, data, device) for arm, settings in ARMS.items()}
    at = dict.fromkeys(toys, 0)
    seconds: dict[str, list[float]] = {arm: [] for arm in toys}
    now = clock(device)

    def go(arm: str, count: int) -> float:
        stream, strategy = toys[arm]
        batches = [stream.batch(step % len(stream)) for step in range(at[arm], at[arm] + count)]
        at[arm] += count
        start = now()
        for batch in batches:
            strategy.observe(batch)
        return (now() - start) / count

    for arm, toy in toys.items():
        while not toy.strategy.steady:
            go(arm, 1)
        go(arm, 3)
    rows = {arm: Rows(toy.strategy.task.net.net.encoder) for arm, toy in toys.items()}  # type: ignore[union-attr, arg-type]
    for _ in range(ROUNDS):
        for arm in toys:
            seconds[arm].append(go(arm, steps))
    median = {arm: statistics.median(values) for arm, values in seconds.items()}
    print(f"{name}, one run on {device}: ms per step, ratio to off, samples forward / backward over off's")
    for arm in toys:
        forward, backward = (count / rows["off"].forward for count in (rows[arm].forward, rows[arm].backward))
        print(
            f"  {arm:32}{1000 * median[arm]:8.1f}{median[arm] / median['off']:8.2f}   {forward:.1f} / {backward:.1f}",
            flush=True,
        )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["meta-augment-er-cifar10-short-m200"])
    parser.add_argument("--data", default="")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    torch.set_num_threads(1)
    for name in told.presets:
        measure(name, told.data, told.device, told.steps)


if __name__ == "__main__":
    main()
