"""Ours for Avalanche users: a memory as its storage policy, and a logger that writes our run folders.

    replay = ReplayPlugin(mem_size=200, storage_policy=exemplars_buffer(Reservoir(200, fields, rng)))
    logger = run_logger(Path("runs"), strategy="naive+reservoir", stream="SplitMNIST", classes=10)

Afterwards `cl-sim sync RUN` brings the run to MLflow beside ours.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from cl_sim import store
from cl_sim.memory.rows import Rows
from cl_sim.metrics import transfer
from cl_sim.tracking.journal import Journal, read


def exemplars_buffer(memory: Rows) -> Any:
    """An Avalanche ExemplarsBuffer whose content is one of our memories (one run, fields x and y)."""
    from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset
    from avalanche.training.storage_policy import ExemplarsBuffer

    class MemoryBuffer(ExemplarsBuffer):  # type: ignore[misc]
        """Samples kept by one of our memories."""

        def __init__(self) -> None:
            super().__init__(memory.capacity)
            self.memory = memory

        def update(self, strategy: Any, **more: Any) -> None:
            """Offer the experience that the strategy has just learned."""
            self.post_adapt(strategy, strategy.experience)

        def post_adapt(self, agent_state: Any, exp: Any) -> None:
            """Offer the experience's samples, in the order of its data set."""
            samples = [(x, y) for x, y, *_ in exp.dataset]
            x = torch.stack([torch.as_tensor(sample) for sample, _ in samples])
            y = torch.tensor([int(label) for _, label in samples])
            dtype = memory.fields["x"].dtype
            memory.add({"x": x.to(dtype)[None], "y": y[None]})
            rows = memory.rows()
            held = len(memory)
            self.buffer = _make_taskaware_tensor_classification_dataset(
                rows["x"][0, :held].clone(), rows["y"][0, :held].clone(), task_labels=0
            )

        def resize(self, strategy: Any, new_size: int) -> None:
            """Our memories keep their size."""
            raise NotImplementedError(f"the memory has a fixed capacity of {memory.capacity}")

    return MemoryBuffer()


def run_logger(folder: Path, strategy: str, stream: str, classes: int, seed: int = 0) -> Any:
    """An Avalanche logger that writes a run folder of ours: accuracy per experience after each training experience.

    Hand it to an EvaluationPlugin and call its `finish()` at the end; its `run_dir` is what `cl-sim sync` takes. Steps are
    samples seen in training.
    """
    from avalanche.logging import BaseLogger

    class RunLogger(BaseLogger):  # type: ignore[misc]
        """Writes evaluations into a journal."""

        def __init__(self) -> None:
            super().__init__()
            self.run_dir = store.new_folder(folder, f"{strategy}-{stream}-{datetime.now():%m%d-%H%M%S}")
            (self.run_dir / "group-0").mkdir()
            self.journal = Journal(self.run_dir / "group-0" / "journal.jsonl")
            self.samples, self.trained = 0, 0
            self.accuracies: list[float] = []
            self.losses: list[float] = []

        def after_training_iteration(self, strategy: Any, *args: Any, **more: Any) -> None:
            """Count what was seen."""
            self.samples += len(strategy.mb_y)
            self.losses.append(float(torch.as_tensor(strategy.loss).detach()))

        def after_training_exp(self, strategy: Any, *args: Any, **more: Any) -> None:
            """Write the mean loss of the experience."""
            self.trained += 1
            if self.losses:
                loss = sum(self.losses) / len(self.losses)
                self.journal.write("curve", self.samples, values={"loss": [loss]})
            self.losses = []

        def before_eval(self, strategy: Any, *args: Any, **more: Any) -> None:
            """A new evaluation begins."""
            self.accuracies = []

        def before_eval_exp(self, strategy: Any, *args: Any, **more: Any) -> None:
            """A new test experience begins."""
            self.hits, self.count = 0, 0

        def after_eval_iteration(self, strategy: Any, *args: Any, **more: Any) -> None:
            """Count hits."""
            self.hits += int((strategy.mb_output.argmax(1) == strategy.mb_y).sum())
            self.count += len(strategy.mb_y)

        def after_eval_exp(self, strategy: Any, *args: Any, **more: Any) -> None:
            """Keep the experience's accuracy."""
            self.accuracies.append(self.hits / max(self.count, 1))

        def after_eval(self, strategy: Any, *args: Any, **more: Any) -> None:
            """Write the row of the accuracy matrix."""
            seen = [number < self.trained for number in range(len(self.accuracies))]
            row = {"accuracy": [self.accuracies], "seen": [seen], "task_end": self.samples > 0}
            self.journal.write("evaluation", self.samples, **row)

        def finish(self) -> Path:
            """Write the summary and the run's record; returns the run folder."""
            lines = [line for line in read(self.journal.path)[0] if line["kind"] == "evaluation"]
            values = {key: [value] for key, value in transfer.summary(transfer.record(lines, 0)).items()}
            self.journal.write("summary", self.samples, values=values)
            self.journal.end("finished", "")
            self.journal.close()
            record = {
                "id": self.run_dir.name,
                "strategy": strategy,
                "stream": stream,
                "encoder": "avalanche",
                "role": "strategy",
                "comparison": self.run_dir.name,
                "seeds": [seed],
                "groups": [[seed]],
                "config": {},
                "command": "avalanche",
                "commit": store.commit(),
                "versions": store.versions(),
                "machine": store.machine(),
                "data": {"name": stream, "digest": "unknown", "samples": self.samples, "classes": classes},
                "created": datetime.now().astimezone().isoformat(timespec="milliseconds"),
                "splits": [f"experience {number + 1}" for number in range(len(self.accuracies))],
                "classes": classes,
            }
            store.write_json(self.run_dir / "run.json", record)
            store.collect(self.run_dir)
            return Path(self.run_dir)

    return RunLogger()
