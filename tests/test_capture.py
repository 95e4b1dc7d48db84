"""Replayed steps: the same journal and state as steps that are run, and what happens where they cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from journals import untimed
from torch import Tensor

from cl_sim import capture, engine, testing
from cl_sim.capture import Captured, CudaGraph
from cl_sim.config import merge
from cl_sim.engine import Place, Plan
from cl_sim.errors import BadConfig
from cl_sim.testing import Tape
from cl_sim.tracking.journal import Journal, read
from cl_sim.types import Logs
from strategies.er import ER

PLAIN = {"augment": []}


def train(
    folder: Path, name: str, seeds: tuple[int, ...], settings: dict[str, Any], replayed: bool, stop_at: int
) -> Any:
    """A whole stream through the engine, stopped once and resumed; the strategy and its journal."""
    folder.mkdir()
    for steps in (stop_at, 10**6):
        made = testing.toy(name, seeds, settings)
        learner = Captured(made.strategy, Tape(), warm_up=1) if replayed else None
        through_the_engine(folder, made, learner, steps)
        if learner is not None:
            assert not learner.given_up
            assert learner.replays > 5
    return made.strategy, [
        line for line in read(folder / "journal.jsonl")[0] if line["kind"] in ("curve", "evaluation")
    ]


def through_the_engine(folder: Path, made: testing.Toy, learner: Captured | None, steps: int) -> None:
    plan = Plan.of(made.stream, per_task=4, prequential=5, flush_every=7, save_every=9)
    left = iter(range(steps, -1, -1))
    with Journal(folder / "journal.jsonl") as journal:
        place = Place(folder, "test")
        engine.drain(
            engine.steps(
                made.stream, made.strategy, plan, journal, place, learner=learner, stop=lambda: next(left) == 0
            )
        )


@pytest.mark.parametrize(
    ("name", "seeds", "settings"),
    [
        ("er", (0,), PLAIN),
        ("er", (0, 1), PLAIN),
        ("er", (0,), PLAIN | {"precision": "bf16"}),
        ("hpcr", (0, 1), {"strategy": {"lr": 0.01, "capacity": 40}}),
        ("scr", (0,), {"strategy": {"capacity": 120}}),
    ],
    ids=["er", "two runs", "bf16", "hpcr", "scr"],
)
def test_a_replayed_stream_has_the_journal_and_state_of_one_that_is_run(
    tmp_path: Path, name: str, seeds: tuple[int, ...], settings: dict[str, Any]
) -> None:
    run, lines = train(tmp_path / "run", name, seeds, settings, replayed=False, stop_at=28)
    replayed, others = train(tmp_path / "replayed", name, seeds, settings, replayed=True, stop_at=28)
    assert [untimed(line) for line in lines] == [untimed(line) for line in others]
    assert len(run.memory) == len(replayed.memory)
    assert run.memory.offered == replayed.memory.offered
    for key, value in run.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, replayed.state_dict()[key]), key


class Spoils(Tape):
    """Records, and moves a weight on the way."""

    spoiled: ER

    def first(self, step: Callable[[], Logs]) -> Logs:
        logs = super().first(step)
        with torch.no_grad():
            next(self.spoiled.parameters()).add_(0.1)
        return logs


class Loses(Tape):
    """Records a step whose changes of the weights do not come through."""

    spoiled: ER

    def first(self, step: Callable[[], Logs]) -> Logs:
        before = [weight.detach().clone() for weight in self.spoiled.parameters()]
        logs = super().first(step)
        with torch.no_grad():
            for weight, old in zip(self.spoiled.parameters(), before, strict=True):
                weight.copy_(old)
        return logs


class Fails(Tape):
    """Has made half of the step when it is refused, and fails again when it ends the recording."""

    def first(self, step: Callable[[], Logs]) -> Logs:
        step()
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")  # as torch does


class FailsWordlessly(Tape):
    def first(self, step: Callable[[], Logs]) -> Logs:
        raise RuntimeError


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (Spoils, "a replayed step differs from the same step run, in net."),
        (Loses, "a replayed step differs from the same step run, in net."),
        (Fails, "recording failed: operation not permitted"),
        (FailsWordlessly, "recording failed: RuntimeError"),
    ],
)
def test_a_step_that_cannot_be_replayed_is_run_on_as_if_nothing_had_happened(graph: type[Tape], why: str) -> None:
    run, tried = testing.toy("er", (0,), PLAIN), testing.toy("er", (0,), PLAIN)
    Spoils.spoiled = Loses.spoiled = tried.strategy
    told: list[str] = []
    learner = Captured(tried.strategy, graph(), warm_up=1, note=told.append)
    for made, learns in ((run, run.strategy), (tried, learner)):
        made.strategy.train()
        for step in range(12):
            logs = learns.observe(made.stream.batch(step))
    assert learner.given_up.startswith(why)
    assert told == [f"steps are not captured: {learner.given_up}"]
    assert "\n" not in told[0]
    for key, value in run.strategy.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, tried.strategy.state_dict()[key]), key
    assert run.strategy.memory.offered == tried.strategy.memory.offered == 120
    assert not learner.held
    assert not learner.graph.calls
    assert float(logs["loss"].detach()) > 0


def test_steps_that_are_never_steady_are_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "UNSTEADY", 6)
    monkeypatch.setattr(ER, "steady", False)
    made, told = testing.toy("er", (0,), PLAIN), []
    learner = Captured(made.strategy, Tape(), note=told.append)
    for step in range(20):
        learner.observe(made.stream.batch(step))
    assert told == ["none of the first 6 steps was steady; only steady ones are replayed"]


def test_a_boundary_makes_the_next_step_record_anew() -> None:
    made = testing.toy("er", (0,), PLAIN)
    learner = Captured(made.strategy, Tape(), warm_up=2)
    counts = []
    for step in range(12):
        learner.observe(made.stream.batch(step))
        counts.append(learner.replays)
        if step == 6:
            learner.boundary()
    assert counts == [0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 5]  # not steady, two to warm up, one recorded; after 6 again


def test_a_batch_of_another_size_is_run_as_usual() -> None:
    run, replayed = testing.toy("er", (0,), PLAIN), testing.toy("er", (0,), PLAIN)
    learner = Captured(replayed.strategy, Tape(), warm_up=1)
    for step in range(10):
        batch = run.stream.batch(step)
        few = {name: value[:, :4] for name, value in batch.items()} if step in (6, 7) else batch
        run.strategy.observe(few)
        learner.observe(few)
    assert learner.replays == 5  # of 10: the first meets an empty memory, one warms up, one is recorded, two are small
    assert run.strategy.memory.offered == replayed.strategy.memory.offered == 88
    assert not capture.differs(replayed.strategy.state_dict(), run.strategy.state_dict())


def test_logs_and_states_are_compared_by_name() -> None:
    one = {"a": torch.ones(3), "b": [{"c": torch.zeros(2)}, 5]}
    other = {"a": torch.ones(3), "b": [{"c": torch.tensor([0.0, 0.1])}, 5]}
    assert capture.differs(one, one) == ""
    assert capture.differs(one, other) == "b[0].c"
    assert capture.differs({"seen": torch.tensor([50_000])}, {"seen": torch.tensor([50_010])}) == "seen"
    assert capture.differs({"lr": 0.1}, {"lr": 0.2}) == "lr"
    before, run = torch.tensor([0.1, 50.0]), torch.tensor([0.1001, 50.0])
    assert capture.differs(before, run, before, "weight") == "weight"  # nothing was learned
    assert capture.differs(run + 1e-7, run, before) == ""
    lost = {"a": torch.full((3,), np.nan)}
    assert capture.differs(lost, lost) == ""
    assert capture.differs({"a": torch.ones(3)}, lost) == "a"


def test_capture_on_a_cpu_is_refused() -> None:
    with pytest.raises(BadConfig, match=r"capture is on.*'cpu'.*leave it out"):
        testing.toy("er", (0,), {"capture": True})


class Device:
    """Stands in for torch.cuda and writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def stream(self, name: str) -> Any:
        def wait_stream(other: Any) -> None:
            self.calls.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, device=torch.device("cuda"), wait_stream=wait_stream)

    @contextmanager
    def inside(self, what: str) -> Iterator[None]:
        self.calls.append(f"enter {what}")
        yield
        self.calls.append(f"leave {what}")

    def patch(self, monkeypatch: pytest.MonkeyPatch, own: str | None = None) -> None:
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "Stream", lambda device: self.stream("side"))
        usual = self.stream("main")
        current = usual if own is None else self.stream(own)
        monkeypatch.setattr(cuda, "current_stream", lambda device: current)
        monkeypatch.setattr(cuda, "default_stream", lambda device: usual)
        monkeypatch.setattr(cuda, "stream", lambda stream: self.inside(stream.name))
        graphs = count()

        def made() -> Any:
            number = next(graphs)
            return SimpleNamespace(name=f"graph {number}", replay=lambda: self.calls.append(f"replay graph {number}"))

        monkeypatch.setattr(cuda, "CUDAGraph", made)

        def recording(graph: Any, stream: Any, capture_error_mode: str) -> Any:
            return self.inside(f"{graph.name} on {stream.name}, {capture_error_mode}")

        monkeypatch.setattr(cuda, "graph", recording)


def test_a_cuda_graph_warms_up_and_is_recorded_on_one_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    device.patch(monkeypatch)

    def step() -> Logs:
        device.calls.append("step")
        return {}

    graph = CudaGraph(torch.device("cuda"))
    graph.warm(step)
    for _ in range(2):  # the second time after a boundary
        graph.first(step)
        graph.again()
    recorded = [
        ["enter {} on side, thread_local", "step", "leave {} on side, thread_local", "replay {}", "replay {}"]
    ] * 2
    named = [line.format(f"graph {number}") for number, lines in enumerate(recorded, 1) for line in lines]
    warm = ["side waits for main", "enter side", "step", "leave side", "main waits for side"]
    assert device.calls == warm + named


def test_a_cuda_graph_is_recorded_on_the_stream_that_a_run_has_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    device.patch(monkeypatch, own="lane")
    CudaGraph(torch.device("cuda")).first(dict)
    assert device.calls[:2] == ["enter graph 1 on lane, thread_local", "leave graph 1 on lane, thread_local"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["finetune", "er", "er_ace", "derpp", "pcr", "hpcr", "scr"])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2, 3)], ids=["one run", "four runs"])
def test_a_cuda_graph_steps_as_the_strategy_does(name: str, seeds: tuple[int, ...]) -> None:
    settings = merge({"device": "cuda", "encoder": {"name": "reduced_resnet18", "width": 8}}, {})
    run, replayed = testing.toy(name, seeds, settings), testing.toy(name, seeds, settings)
    learner = Captured(replayed.strategy)
    for made, learns in ((run, run.strategy), (replayed, learner)):
        made.strategy.train()
        for step in range(len(made.stream)):
            learns.observe(made.stream.batch(step))
            if made.stream.ends_task(step):
                learns.boundary()
    assert not learner.given_up
    assert learner.replays > 10
    assert not capture.differs(run.strategy.state_dict(), replayed.strategy.state_dict())
