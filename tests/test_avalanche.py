"""Avalanche's strategies and benchmarks here, and our memories and records there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cl_sim import store, testing
from cl_sim.engine import evaluate
from cl_sim.errors import BadConfig, UnknownName
from cl_sim.memory.reservoir import Reservoir
from cl_sim.rng import Rng
from cl_sim.tracking.journal import read
from cl_sim.types import Field
from strategies import avalanche as bridge
from streams import avalanche as benchmarks

# jaxopt, which avalanche imports through qpsolvers; avalanche 0.6's own deprecated calls; numpy 2 in synaptic intelligence
pytestmark = [
    pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Call to deprecated function:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning"),
]

FORGETS = ("Naive", "LwF", "EWC", "SynapticIntelligence")  # allowed to forget the first of two tasks


def trained(name: str, seeds: tuple[int, ...] = (0,), **settings: Any) -> testing.Toy:
    made = testing.toy("avalanche", seeds, {"strategy": {"strategy": name, "capacity": 200, **settings}})
    testing.train(made, 0, len(made.stream))
    return made


@pytest.mark.parametrize("name", [*bridge.BY_BATCH, *bridge.BY_TASK])
def test_a_supported_strategy_learns_and_those_with_a_memory_remember(name: str) -> None:
    made = trained(name)
    holdout = made.stream.holdout()
    assert holdout is not None
    first, last = evaluate(made.strategy, holdout, len(made.stream), full=True)[0]
    assert last >= 0.6  # chance is 0.25 over the four classes
    if name not in FORGETS:
        assert first >= 0.4


@pytest.mark.parametrize("name", bridge.REFUSED)
def test_a_refused_strategy_is_refused_in_a_sentence_and_would_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadConfig, match=f"avalanche:{name} does not work with avalanche 0.6.0"):
        trained(name)
    monkeypatch.setattr(bridge, "REFUSED", {})
    monkeypatch.setattr(bridge, "BY_TASK", (*bridge.BY_TASK, name))
    monkeypatch.setitem(bridge.USUAL, "LFL", {"lambda_e": 0.1})
    with pytest.raises((RuntimeError, AttributeError, NotImplementedError)):
        trained(name)


@pytest.mark.parametrize("name", ["Replay", "ER_ACE", "MIR", "SCR", "DER", "EWC", "AGEM", "GEM"])
def test_a_resumed_strategy_answers_bit_for_bit_the_same(name: str) -> None:
    settings = {"strategy": {"strategy": name, "capacity": 50}}
    whole, half = testing.toy("avalanche", (0,), settings), 25
    testing.train(whole, 0, half)
    again = testing.toy("avalanche", (0,), settings)
    again.strategy.load_state_dict(whole.strategy.state_dict())
    for made in (whole, again):
        testing.train(made, half, len(made.stream))
        made.strategy.eval()
    batch = whole.stream.batch(0)
    with torch.inference_mode():
        assert torch.equal(whole.strategy.predict(batch), again.strategy.predict(batch))


def test_names_options_and_streams_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'Replay'"):
        trained("Replai")
    with pytest.raises(BadConfig, match="no argument 'ewc_lamda'; did you mean 'ewc_lambda'"):
        trained("EWC", options=["ewc_lamda=1"])
    with pytest.raises(BadConfig, match="announces no boundaries"):
        testing.toy("avalanche", (0,), {"strategy": {"strategy": "EWC"}, "stream": {"announces": False}})
    assert bridge.resolve("SLDA") == "StreamingLDA"


def tensors(classes: int = 4, each: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(classes), each)
    x = (y[:, None, None, None] * 50 + rng.integers(0, 20, (len(y), 1, 4, 4))) / 255
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def benchmark() -> Any:
    from avalanche.benchmarks import nc_benchmark
    from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset as dataset

    x, y = tensors()
    sets = [dataset(x, y, task_labels=0), dataset(x, y, task_labels=0)]
    return nc_benchmark(*sets, n_experiences=2, task_labels=False, fixed_class_order=[2, 0, 1, 3])


def test_a_benchmark_becomes_a_stream_of_its_experiences() -> None:
    stream = benchmarks.from_benchmark(benchmark(), (0, 1), batch=10)
    assert len(stream) == 12
    assert [step for step in range(12) if stream.ends_task(step)] == [5, 11]
    first = torch.cat([stream.batch(step)["y"] for step in range(6)], 1)
    assert first.unique().tolist() == [0, 2]
    index = torch.cat([stream.batch(step)["index"] for step in range(12)], 1)
    assert all(sorted(row) == list(range(120)) for row in index.tolist())
    assert stream.fields["x"] == Field((1, 4, 4), torch.uint8)
    assert stream.seen(0).tolist() == [[True, False]] * 2
    chunks = list(stream.holdout().chunks(12, True))
    splits = torch.cat([chunk["split"][0] for chunk in chunks])
    labels = torch.cat([chunk["y"][0] for chunk in chunks])
    assert set(labels[splits == 0].tolist()) == {0, 2}


def test_an_online_stream_keeps_its_order_and_boundaries() -> None:
    from avalanche.benchmarks.scenarios.online import split_online_stream

    made = benchmark()
    online = split_online_stream(made.train_stream, experience_size=10, shuffle=False, drop_last=True)
    stream = benchmarks.from_benchmark(
        SimpleNamespace(train_stream=online, test_stream=made.test_stream), (0,), batch=10
    )
    assert [step for step in range(len(stream)) if stream.ends_task(step)] == [5, 11]
    assert stream.batch(0)["index"][0].tolist() == list(range(10))


def test_the_name_of_a_benchmark_and_its_options_are_checked() -> None:
    with pytest.raises(UnknownName, match="did you mean 'SplitMNIST'"):
        benchmarks.classic(benchmarks.AvalancheConfig(benchmark="SplitMNST"), "")
    with pytest.raises(BadConfig, match="did you mean 'n_experiences'"):
        benchmarks.classic(benchmarks.AvalancheConfig(options=("n_experience=2",)), "")


def avalanche_strategy(plugins: list[Any], logger: Any) -> Any:
    from avalanche.models import SimpleMLP
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin

    torch.manual_seed(0)
    model = SimpleMLP(num_classes=4, input_size=16, hidden_size=32)
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=10,
        train_epochs=5,
        eval_mb_size=60,
        plugins=plugins,
        evaluator=EvaluationPlugin(loggers=[logger]),
    )


def test_our_reservoir_serves_avalanche_and_our_records_hold_its_numbers(tmp_path: Path) -> None:
    from avalanche.training.plugins import ReplayPlugin

    from cl_sim.bridge import exemplars_buffer, run_logger

    memory = Reservoir(20, {"x": Field((1, 4, 4), torch.float32), "y": Field((), torch.int64)}, Rng([0], "test"))
    replay = ReplayPlugin(mem_size=20, storage_policy=exemplars_buffer(memory))
    logger = run_logger(tmp_path, "naive", "mine", classes=4)
    learner, made = avalanche_strategy([replay], logger), benchmark()
    matrix = []
    for experience in made.train_stream:
        learner.train(experience, num_workers=0)
        learner.eval(made.test_stream, num_workers=0)
        matrix.append([right_answers(learner.model, test) for test in made.test_stream])
    run = logger.finish()

    assert len(memory) == 20
    assert int(memory.seen[0]) == 120
    assert len(replay.storage_policy.buffer) == 20
    stored = {int(y) for _, y, *_ in replay.storage_policy.buffer}
    assert stored == {0, 1, 2, 3}
    lines = [line for line in read(run / "group-0" / "journal.jsonl")[0] if line["kind"] == "evaluation"]
    np.testing.assert_allclose([line["accuracy"][0] for line in lines], matrix)
    result = json.loads((run / "result.json").read_text())
    assert result["metrics"]["acc_end"] == [pytest.approx(np.mean(matrix[-1]))]
    assert store.status(run) == "finished"


def right_answers(model: torch.nn.Module, experience: Any) -> float:
    model.eval()
    hits = [int(model(x[None]).argmax()) == int(y) for x, y, *_ in experience.dataset]
    return float(np.mean(hits))
