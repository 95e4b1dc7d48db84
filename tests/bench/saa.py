"""What sample-adaptive views cost: a step with them over a step without, as a ratio; prints JSON.

    python tests/bench/saa.py
    python tests/bench/saa.py --strategy hpcr --rounds 7

Both learners see the same made-up images of 32x32 in one process. Rounds take turns, so that other work on the machine hits both
alike; the ratio is the median over rounds of processor time (wall time on a GPU). Wanted: at most 1.15 with the encoder of the
replay papers (width 20).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from typing import Any

import torch

from cl_sim.testing import Toy, toy

WANTED = 1.15


def learner(args: argparse.Namespace, saa: Any) -> Toy:
    """The strategy on made-up images, with its memory full and, if it has flags, the first ones set."""
    semi = args.strategy in ("fixmatch", "flexmatch")
    size = {"labelled": 16, "unlabelled": 32} if semi else {}
    own = {"capacity": 200, "saa": saa, **size}
    if saa not in (False, "off"):
        own |= {"selection_period": 10, "warmup_steps": 20, "min_visits": 1}
    settings = {
        "strategy": own,
        "stream": {"name": "synthetic", "classes": 10, "tasks": 1, "per_class": 200, "size": 32, "order": "shuffled"},
        "encoder": {"name": "reduced_resnet18", "width": args.width},
        "augment": ["flip", "shift"],
        "device": args.device,
    }
    made = toy(args.strategy, (0,), settings)
    advance(made, 0, 24)
    return made


def advance(made: Toy, start: int, steps: int) -> float:
    """Learn some steps; the seconds that took."""
    clock = time.perf_counter if made.strategy.env.device.type == "cuda" else time.process_time
    made.strategy.train()
    before = clock()
    for step in range(start, start + steps):
        made.strategy.observe(made.stream.batch(step % len(made.stream)))
    if made.strategy.env.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - before


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of both, each beginning with the other one in turn."""
    semi = args.strategy in ("fixmatch", "flexmatch")
    plain, method = learner(args, False if semi else "off"), learner(args, True if semi else args.arm)
    seconds: dict[str, list[float]] = {"plain": [], "saa": []}
    for number in range(args.rounds):
        order = [("plain", plain), ("saa", method)]
        for name, made in order if number % 2 == 0 else order[::-1]:
            seconds[name].append(advance(made, 24 + number * args.steps, args.steps) / args.steps)
    ratios = [one / other for one, other in zip(seconds["saa"], seconds["plain"], strict=True)]
    return {
        "what": f"step of {args.strategy} with sample-adaptive views over a step without",
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "wanted": WANTED,
        "plain_ms": round(1000 * statistics.median(seconds["plain"]), 1),
        "saa_ms": round(1000 * statistics.median(seconds["saa"]), 1),
        "encoder": f"reduced_resnet18, width {args.width}",
        "rounds": args.rounds,
        "steps": args.steps,
        "threads": torch.get_num_threads(),
        "device": args.device,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="er", help="er, hpcr, fixmatch or another that takes saa")
    parser.add_argument("--arm", default="replay", help="of replay: replay, replay-soft or ssl")
    parser.add_argument("--width", type=int, default=20, help="channels of the encoder's first stage")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="per round and learner")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args), indent=1))


if __name__ == "__main__":
    main()
