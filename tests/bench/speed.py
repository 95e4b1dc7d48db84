"""Step times as ratios taken side by side: `make bench`, or python tests/bench/speed.py --out results/speed.json [--only NAME].

Every table is measured in processes of its own. On a CPU with one thread and in processor time, so that other work on the
machine counts as little as possible; on a GPU in wall time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learner import BATCH, CAPACITY, AvalancheLearner, Bare, Learner
from timing import alternate, milliseconds, operators, python_calls, ratio

from cl_sim import config, engine, store
from cl_sim.tracking.journal import Journal, read

STRATEGIES = ("finetune", "er", "er_ace", "derpp", "pcr", "hpcr", "scr")
AVALANCHE = {"finetune": "Naive", "er": "Replay", "er_ace": "ER_ACE", "scr": "SCR"}
STACKS = (1, 2, 4, 8, 16)
LONG = 1_000_000  # samples
STEP_COLUMNS = [
    "strategy",
    "replay",
    "passes",
    "bare ms",
    "step / bare",
    "bf16 step / step",
    "Avalanche / step",
    "operators",
    "Python calls",
    "peak MB",
]
Row = list[Any]


def settings(name: str, replay: int) -> dict[str, Any]:
    """The settings of a timed strategy."""
    return {} if name == "finetune" else {"strategy": {"capacity": CAPACITY, "replay": replay}}


def steps(device: str) -> dict[str, Any]:
    """The whole training step against the bare passes of the same batches."""
    cases = [(name, replay) for name in STRATEGIES for replay in ((0,) if name == "finetune" else (10, 100))]
    return {
        "title": "A training step against bare forward and backward passes",
        "note": "Reduced ResNet-18, 32x32 images, batches of 10; the step includes stream, memory, augmentation, loss, "
        "optimiser. Avalanche: its own loop on the same samples, network and batch sizes; it joins the recalled samples to the "
        "new ones in one pass and augments none.",
        "columns": STEP_COLUMNS,
        "rows": [in_process(one_step, name, replay, device) for name, replay in cases],
    }


def one_step(name: str, replay: int, device: str) -> Row:
    """One row: a strategy at one number of recalled samples."""
    ours = Learner(name, settings(name, replay), device=device).settle()
    passes = ours.passes()
    cases = {"bare": Bare(passes, device).step, "ours": ours.step}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cases["bf16"] = Learner(name, settings(name, replay), device=device, precision="bf16").settle().step
    if name in AVALANCHE and device == "cpu":
        theirs = AvalancheLearner(AVALANCHE[name], replay)
        cases["avalanche"] = theirs.step
    times = alternate(cases, torch.device(device))
    versus = ratio(times["avalanche"], times["ours"]) / theirs.steps if "avalanche" in times else None
    return [
        name,
        replay,
        " + ".join(str(size) if learns else f"({size})" for size, learns in passes),
        round(milliseconds(times["bare"]), 1),
        round(ratio(times["ours"], times["bare"]), 3),
        round(ratio(times["bf16"], times["ours"]), 3),
        None if versus is None else round(versus, 3),
        operators(ours.step),
        python_calls(ours.step),
        round(peak),
    ]


ADAPTIVE = {"selection_period": 10, "warmup_steps": 20, "min_visits": 1}  # so that there are flags soon
SEMI = {"capacity": 200, "labelled": 16, "unlabelled": 32}
NO_MEMORY = {"memory": "none", "replay": 0, "neighbours": "none"}
VIEWS = {"augment": ["flip", "shift"]}
METHODS: dict[
    str, tuple[str, dict[str, Any], dict[str, Any]]
] = {  # what: strategy, settings of the base, of the method
    "er with adaptive views": (
        "er",
        VIEWS | settings("er", 10),
        VIEWS | {"strategy": {"capacity": 200, "replay": 10, "saa": "replay", **ADAPTIVE}},
    ),
    "fixmatch with adaptive views": (
        "fixmatch",
        VIEWS | {"strategy": SEMI},
        VIEWS | {"strategy": {**SEMI, "saa": True, **ADAPTIVE}},
    ),
    "er with contrast of data views": (
        "meta_augment",
        {"strategy": {"capacity": 200, "replay": 10, "arm": "off"}},
        {"strategy": {"capacity": 200, "replay": 10, "arm": "data-only"}},
    ),
    "er with meta-optimised views": (
        "meta_augment",
        {"strategy": {"capacity": 200, "replay": 10, "arm": "off"}},
        {"strategy": {"capacity": 200, "replay": 10}},
    ),
    "the same, two encoder steps": (
        "meta_augment",
        {"strategy": {"capacity": 200, "replay": 10, "arm": "off"}},
        {"strategy": {"capacity": 200, "replay": 10, "second_encoder_step": True}},
    ),
    "beclr, against as many images without memory": (
        "beclr",
        {"stream": {"batch": 64}, "strategy": NO_MEMORY},
        {"stream": {"batch": 32}, "strategy": {"replay": 32}},
    ),
}


def methods(device: str) -> dict[str, Any]:
    """What the parts of a method cost on top of what they stand on."""
    return {
        "title": "Methods against their base",
        "note": "Reduced ResNet-18, 32x32 images, batches of 10 unless said. Images per step that pass the encoder, and of "
        "these how many with a gradient.",
        "columns": ["method", "base ms", "step / base", "images", "with gradient", "images of the base"],
        "rows": [[what, *in_process(one_method, what, device)] for what in METHODS],
    }


def one_method(what: str, device: str) -> Row:
    """One row: the method and its base in turns."""
    name, base, own = METHODS[what]
    made = {key: Learner(name, chosen, device=device).settle() for key, chosen in (("base", base), ("own", own))}
    for learner in made.values():
        for _ in range(24):  # selections begin
            learner.step()
    times = alternate({key: learner.step for key, learner in made.items()}, torch.device(device))
    passes = {key: learner.passes() for key, learner in made.items()}
    return [
        round(milliseconds(times["base"]), 1),
        round(ratio(times["own"], times["base"]), 3),
        sum(part.batch for part in passes["own"]),
        sum(part.batch for part in passes["own"] if part.learns),
        sum(part.batch for part in passes["base"]),
    ]


def overhead(device: str) -> dict[str, Any]:
    """What a step adds to its passes where the network is next to nothing, and what augmentation costs."""
    return {
        "title": "Host overhead",
        "note": "Network of width 1, replay of 10: step less bare passes, median of 5 processes. Augmentation: random resized "
        "crop, flip, colour jitter and grey on batches of 20.",
        "columns": ["what", "milliseconds", "target"],
        "rows": [
            ["er, step less passes", typical(added, "er", device), 1.5],
            ["pcr, step less passes", typical(added, "pcr", device), 4.0],
            ["augmentation per image", in_process(augmentation, device), 0.1],
        ],
    }


def typical(measure: Callable[..., float], *words: Any) -> float:
    """The median over processes: the gap is a sixth of the time, and where memory lies shifts it by as much again."""
    return statistics.median(in_process(measure, *words) for _ in range(5))


def added(name: str, device: str) -> float:
    """Milliseconds that a whole step takes more than its passes."""
    ours = Learner(name, settings(name, 10) | {"encoder": {"width": 1}}, device=device).settle()
    cases = {"ours": ours.step, "bare": Bare(ours.passes(), device, width=1).step}
    times = alternate(cases, torch.device(device), rounds=9)
    gaps = [one - other for one, other in zip(times["ours"], times["bare"], strict=True)]
    return round(1000 * statistics.median(gaps), 3)


def augmentation(device: str) -> float:
    """Milliseconds per image of the views of the contrastive replay line."""
    ours = Learner("pcr", settings("pcr", 10), device=device)
    batch = {key: value.repeat_interleave(2, 1) for key, value in ours.stream.batch(0).items()}
    times = alternate({"views": lambda: void(ours.strategy.env.augment(batch))}, torch.device(device))
    return round(milliseconds(times["views"]) / batch["x"].shape[1], 4)


def void(anything: object) -> None:
    """Drop a result."""


def captured(device: str) -> dict[str, Any]:
    """Steps replayed as one CUDA graph against the same steps run. Only on a GPU."""
    return {
        "title": "Captured steps",
        "note": "Reduced ResNet-18, 32x32 images, batches of 10: milliseconds of a step as it is run and as one CUDA graph.",
        "columns": ["strategy", "replay", "runs", "run ms", "captured ms", "run / captured"],
        "rows": [
            [name, replay, runs, *in_process(one_captured, name, replay, runs, device)]
            for name in STRATEGIES
            for replay in ((0,) if name == "finetune" else (10, 100))
            for runs in (1, 16)
        ],
    }


def one_captured(name: str, replay: int, runs: int, device: str) -> Row:
    """One row: both kinds of step in turns."""
    cases = {
        kind: Learner(name, settings(name, replay), device=device, runs=runs, captured=kind == "captured").settle().step
        for kind in ("run", "captured")
    }
    times = alternate(cases, torch.device(device))
    return [*(round(milliseconds(times[kind]), 3) for kind in cases), round(ratio(times["run"], times["captured"]), 2)]


def abreast(device: str) -> dict[str, Any]:
    """Captured steps of many seeds, as one stack and in turns on streams of their own. Only on a GPU."""
    return {
        "title": "Seeds as one stack and abreast, both captured",
        "note": "Reduced ResNet-18, 32x32 images, batches of 10, replay of 10: milliseconds in which every run makes a step.",
        "columns": ["strategy", "runs", "stack ms", "abreast ms", "stack / abreast"],
        "rows": [
            [name, runs, *in_process(one_abreast, name, runs, device)]
            for name in ("er", "pcr", "hpcr")
            for runs in STACKS
        ],
    }


def one_abreast(name: str, runs: int, device: str) -> Row:
    """One row: both in turns."""

    def captured() -> Learner:
        return Learner(name, settings(name, 10), device=device, captured=True).settle()

    lanes = [torch.cuda.Stream(device) for _ in range(runs)]  # type: ignore[no-untyped-call]
    each = []
    for lane in lanes:
        with torch.cuda.stream(lane):
            each.append(captured())

    def turn() -> None:
        for lane, learner in zip(lanes, each, strict=True):
            with torch.cuda.stream(lane):
                learner.step()

    stack = Learner(name, settings(name, 10), device=device, runs=runs, captured=True).settle()
    times = alternate({"stack": stack.step, "abreast": turn}, torch.device(device))
    return [*(round(milliseconds(times[kind]), 3) for kind in times), round(ratio(times["stack"], times["abreast"]), 2)]


def stacks(device: str) -> dict[str, Any]:
    """Many seeds in one process."""
    return {
        "title": "Seeds stacked in one process",
        "note": "Runs x samples per second, er with a replay of 10. On a CPU the default is one process per seed for networks "
        "with convolutions, one stack for perceptrons on samples of up to 1,024 numbers.",
        "columns": ["network", "images", *(f"R = {runs}" for runs in STACKS)],
        "rows": [
            [network, f"{channels}x{size}x{size}", *in_process(stacked, network, channels, size, device)]
            for network, channels, size in (("mlp", 1, 8), ("mlp", 1, 28), ("mlp", 3, 32), ("reduced_resnet18", 3, 32))
        ],
    }


def stacked(network: str, channels: int, size: int, device: str) -> list[float]:
    """Runs x samples per second at every size of the stack, measured in turns."""
    own = {"encoder": {"name": network}, "stream": {"channels": channels, "size": size}}
    made = {runs: Learner("er", settings("er", 10) | own, device=device, runs=runs).settle() for runs in STACKS}
    times = alternate({str(runs): learner.step for runs, learner in made.items()}, torch.device(device))
    return [round(1000 * BATCH * runs / milliseconds(times[str(runs)]), 1) for runs in STACKS]


def evaluation(device: str) -> dict[str, Any]:
    """What the default schedule of evaluations adds to a run of 50,000 images in five tasks."""
    return {
        "title": "Evaluation",
        "note": "Time of the default schedule's evaluations over the time of all training steps: 50,000 training and 10,000 test "
        "images in five tasks, er with a replay of 10. Anytime: nine of 500 images or fewer within each task, and every tenth "
        "batch before it is learned.",
        "columns": ["evaluations", "images", "of the training time"],
        "rows": in_process(evaluated, device),
    }


def evaluated(device: str) -> list[Row]:
    """Count what the schedule predicts, and time an evaluation of each kind beside the steps."""
    stream = {"per_class": 5000, "test_per_class": 1000}
    ours = Learner("er", settings("er", 10) | {"stream": stream}, device=device).settle()
    holdout = ours.stream.holdout()
    assert holdout is not None
    evaluate = config.EvaluateConfig()
    plan = engine.Plan.of(
        ours.stream, per_task=evaluate.per_task, prequential=evaluate.prequential, flush_every=50, save_every=1000
    )

    def asked(steps: Iterable[int], full: bool) -> int:
        return sum(chunk["y"].numel() for step in steps for chunk in holdout.chunks(step, full))

    middle = sorted(plan.small)[len(plan.small) // 2]
    batch = ours.stream.batch(0)
    cases = {
        "step": ours.step,
        "evaluation": lambda: void(engine.evaluate(ours.strategy, holdout, middle, False)),
        "test": lambda: void(engine.test(ours.strategy, batch, batch)),
    }
    times = alternate(cases, torch.device(device))
    each = milliseconds(times["evaluation"]) / asked([middle], False)  # of one image
    tests = sum(plan.tests(step) for step in range(plan.steps))
    small, full = asked(plan.small, False), asked(plan.full, True)
    anytime = (small * each + tests * milliseconds(times["test"])) / (plan.steps * milliseconds(times["step"]))
    whole = full * each / (plan.steps * milliseconds(times["step"]))
    return [
        ["anytime", small + tests * BATCH, round(anytime, 3)],
        ["on the whole test set at the end of each task", full, round(whole, 3)],
    ]


def long(device: str) -> dict[str, Any]:
    """A million samples through the engine."""
    return {
        "title": "A million samples",
        "note": "er on a perceptron, batches of 10, through the whole engine with its journal and checkpoints. Drift of the step "
        "time: slope of a line through the windows of 500 steps, over the whole stream, with its 95 % interval.",
        "columns": ["samples", "step ms", "drift of the step time %", "± %", "main memory at 10 % MB", "at the end MB"],
        "rows": [in_process(million, device)],
    }


def million(device: str) -> Row:
    """Train to the end and look at the journal's windows and at the memory held."""
    from scipy import stats

    stream = {"per_class": LONG // 10, "test_per_class": 100, "size": 8}
    ours = Learner("er", settings("er", 10) | {"stream": stream, "encoder": {"name": "mlp"}}, device=device)
    plan = engine.Plan.of(ours.stream, per_task=10, prequential=10, flush_every=500, save_every=20_000)
    held: list[float] = []

    def look() -> bool:
        held.append(resident())
        return False

    with tempfile.TemporaryDirectory() as folder:
        place = engine.Place(Path(folder), "bench")
        with Journal(place.folder / "journal.jsonl") as journal:
            engine.drain(engine.steps(ours.stream, ours.strategy, plan, journal, place, stop=look))
        lines = read(place.folder / "journal.jsonl")[0]
    speeds = [line["values"]["samples_per_second"][0] for line in lines if line["kind"] == "curve"][1:]
    times = 1000 * BATCH / np.array(speeds)
    fit = stats.linregress(np.linspace(0, 1, len(times)), times)
    half = float(stats.t.ppf(0.975, len(times) - 2)) * fit.stderr
    percent = [round(100 * float(value) / float(np.median(times)), 2) for value in (fit.slope, half)]
    return [LONG, round(float(np.median(times)), 3), *percent, round(held[len(held) // 10]), round(held[-1])]


def resident() -> float:
    """Main memory held now, in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def start(device: str) -> dict[str, Any]:
    """How soon the command line answers."""
    return {
        "title": "Start",
        "note": "Processor time of a fresh interpreter, median of five.",
        "columns": ["command", "seconds"],
        "rows": [
            ["cl-sim --help", started("from cl_sim.cli import main; main(['--help'])")],
            ["import cl_sim", started("import cl_sim")],
            ["import cl_sim.session (with torch)", started("import cl_sim.session")],
        ],
    }


def started(code: str) -> float:
    """Seconds of processor time of `python -c code`."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return round(statistics.median(times), 3)


TABLES: dict[str, Callable[[str], dict[str, Any]]] = {
    made.__name__: made for made in (steps, methods, overhead, stacks, captured, abreast, evaluation, long, start)
}
GPU_ONLY = ("captured", "abreast")


def in_process(measure: Callable[..., Any], *words: Any) -> Any:
    """Measure in a fresh process with one thread."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=one_thread) as pool:
        found = pool.submit(measure, *words).result()
    print(*words, found, flush=True)
    return found


def one_thread() -> None:
    """As a worker of cl-sim: one thread, no denormal numbers."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def main(words: Sequence[str]) -> None:
    """Measure the tables and write them into one file; with --only, the others stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/speed.json"))
    parser.add_argument("--only", choices=sorted(TABLES), action="append")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args(words)
    device = torch.device(asked.device)
    known = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {"tables": {}}
    for name in asked.only or (name for name in TABLES if device.type == "cuda" or name not in GPU_ONLY):
        machine = store.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
        origin = {"commit": store.commit(), "machine": machine, "torch": torch.__version__}
        known["tables"][name] = {**TABLES[name](asked.device), **origin}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        store.write_json(asked.out, known)


if __name__ == "__main__":
    main(sys.argv[1:])
