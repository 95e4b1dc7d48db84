"""What the clustered memory costs: a step of BECLR over one of its control without memory, on equally many images.

    python tests/bench/beclr_step.py [--width 20] [--steps 10] [--device cpu]

Both learn the same kind of images in one process: 32 new and 32 replayed ones with neighbours, or 64 new ones. Steps are taken by
turns, the first three of each do not count; the medians and their ratio are printed. Processor time on a CPU; on a
GPU the clock waits for the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from cl_sim import session
from cl_sim.config import from_dict
from cl_sim.strategy import Strategy
from cl_sim.stream import Stream

WARM_UP = 3
SAMPLES = 4000  # before the first timed step, so that neighbours count


def made(batch: int, width: int, device: str, **strategy: Any) -> tuple[Stream, Strategy]:
    """A strategy on made-up images of 32 pixels."""
    config = from_dict(
        {
            "strategy": {"name": "beclr", **strategy},
            "stream": {
                "name": "unlabelled",
                "of": "synthetic",
                "settings": ["size=32", "per_class=1000", f"batch={batch}"],
                "supports": 5,
            },
            "encoder": {"name": "reduced_resnet18", "width": width},
            "augment": ["resized_crop", "flip", "jitter", "grey"],
            "device": device,
        }
    )
    stream = session.build_stream(config, (0,))
    return stream, session.build_strategy(config, stream, (0,))


def with_full_memory(strategy: Strategy, device: str) -> None:
    """Fill the memory with directions and find clusters, as if the samples had come."""
    memory: Any = strategy.memory
    z = torch.randn(memory.row("z").shape, generator=torch.Generator().manual_seed(0)).to(device)
    memory.row("z").copy_(torch.nn.functional.normalize(z, dim=-1))
    memory.count(SAMPLES)
    memory.start()


def seconds(stream: Stream, strategy: Strategy, step: int) -> float:
    """One step."""
    batch = stream.batch(step)
    on_gpu = batch["x"].is_cuda
    clock = time.perf_counter if on_gpu else time.process_time  # so that other work on the machine does not count
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    strategy.observe(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    """Time both and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    whole = made(32, asked.width, asked.device)
    with_full_memory(whole[1], asked.device)
    control = made(64, asked.width, asked.device, memory="none", replay=0, neighbours="none")
    times: dict[str, list[float]] = {"memory": [], "control": []}
    for step in range(WARM_UP + asked.steps):
        for name, (stream, strategy) in (("memory", whole), ("control", control)):
            times[name].append(seconds(stream, strategy, step))
    ms = {name: 1000 * statistics.median(values[WARM_UP:]) for name, values in times.items()}
    assert whole[1].steady
    print(
        json.dumps(
            {**{f"{name}_ms": round(value, 1) for name, value in ms.items()}, "ratio": ms["memory"] / ms["control"]}
        )
    )


if __name__ == "__main__":
    main()
