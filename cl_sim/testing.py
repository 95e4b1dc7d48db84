"""The conformance kit: what every strategy must keep to, as checks that run on a CPU in seconds.

    from cl_sim.testing import CHECKS, toy

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_strategy(check):
        check(lambda seeds: toy("my_strategy", seeds))

Each check raises AssertionError with a sentence. `toy` builds a strategy by its registered name on a small made-up stream.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cl_sim import checkpoint, registry, session
from cl_sim.capture import Captured
from cl_sim.config import from_dict, merge
from cl_sim.engine import evaluate
from cl_sim.strategy import Strategy
from cl_sim.stream import Stream
from cl_sim.toy_clips import ToyClips, ToyClipsConfig
from cl_sim.types import Batch, Logs

aten = torch.ops.aten
HOST_READS = frozenset(
    {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "_unique", "_unique2", "unique_dim", "equal"}
)
TOLERANCE = 1e-3  # stacked against alone: float32 sums in another order, over some dozen steps


CLASSES: dict[str, dict[str, Any]] = {
    "stream": {"name": "synthetic", "classes": 4, "tasks": 2, "per_class": 100, "noise": 0.1, "order": "fixed"},
    "encoder": {"name": "mlp", "hidden": [32]},
}
ITEMS: dict[str, dict[str, Any]] = {
    "stream": {"name": "sequences", "data": "made-up", "batch": 16, "segments": 2, "longest": 8},
    "encoder": {"name": "sasrec", "dim": 16, "layers": 1, "heads": 2, "inner": 16, "dropout": 0.1},
}
SMALL_CROPS = {"name": "crop", "size": 8, "channels": [8, 16], "hidden": [32], "width": 16}
FAR_ABOVE_CHANCE = {  # chance is 25 %, 17 % and, for embeddings that are all equal, 38 %
    "classify": (0.8, "accuracy"),
    "rank": (0.35, "HR@10"),
    "associate": (0.6, "AssA"),
}


class Toy(NamedTuple):
    """A strategy and the small stream it learns from."""

    stream: Stream
    strategy: Strategy


Make = Callable[[Sequence[int]], Toy]


def toy(name: str, seeds: Sequence[int], settings: Mapping[str, Any] | None = None) -> Toy:
    """A registered strategy on a small made-up stream, with a small net; `settings` overrides any of that.

    That is 4 classes in 2 tasks, or for strategies that only rank, 80 users and 60 items in 2 segments; for those that
    associate, 80 clips of 3 instances. A stream or an encoder of another name has only the settings that are given.
    """
    strategy = registry.load("strategy", name)
    if "associate" in strategy.tasks:
        return _toy_of_clips(name, tuple(seeds), settings or {})
    usual: dict[str, dict[str, Any]] = CLASSES if "classify" in strategy.tasks else ITEMS
    named = {part: (settings or {}).get(part, {}).get("name", own["name"]) for part, own in usual.items()}
    parts = {part: own for part, own in usual.items() if own["name"] == named[part]}
    base = {
        "strategy": {"name": name},
        **parts,
        "augment": list(strategy.views),
        "seeds": list(seeds),
        "stack": len(seeds),
    }
    config = from_dict(merge(base, settings or {}))
    stream = session.build_stream(config, config.seeds)
    return Toy(stream, session.build_strategy(config, stream, config.seeds))


def _toy_of_clips(name: str, seeds: tuple[int, ...], settings: Mapping[str, Any]) -> Toy:
    own = dict(settings)
    stream = ToyClips(ToyClipsConfig(**own.pop("stream", {})), seeds, torch.device("cpu"))
    encoder = SMALL_CROPS if own.get("encoder", SMALL_CROPS).get("name", "crop") == "crop" else {}
    base = {"strategy": {"name": name}, "stream": {"name": "synthetic"}, "encoder": encoder, "seeds": list(seeds)}
    config = from_dict(merge(base, own))
    return Toy(stream, session.build_strategy(config, stream, seeds))


def train(made: Toy, start: int, stop: int) -> None:
    """Observe the steps start..stop-1, with boundaries if the stream announces them."""
    made.strategy.train()
    for step in range(start, stop):
        made.strategy.observe(made.stream.batch(step))
        if made.stream.announces and made.stream.ends_task(step):
            made.strategy.boundary()


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where a tensor would be read by the host, or where its values would decide a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse the operators that read the host; run the others."""
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
        )
        reads = name in HOST_READS or by_mask
        assert not reads, f"a steady step must not read the host, but it calls {func}"
        return func(*args, **(kwargs or {}))


class NothingOfTheHost(NoHostReads):  # type: ignore[no-untyped-call]
    """Raises, too, where numbers of the host become a tensor: a copy to the device, which a graph cannot hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse new tensors and reads; run the others."""
        assert func.overloadpacket.__name__ != "lift_fresh", (
            "a steady step must not make tensors of the host's numbers; take them from cl_sim.constants"
        )
        return super().__torch_dispatch__(func, types, args, kwargs)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each operator with the shapes that go in."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Write the call down and make it."""
        shapes = tuple(tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.calls.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A recorded step on a CPU, as a CUDA graph would hold it: the same operators on the same memory, with no Python between.

    Whatever the host decided or counted in the step that was recorded, stays so.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []  # operator, arguments, keywords, result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make the call and keep everything that it met."""
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def warm(self, step: Callable[[], Logs]) -> Logs:
        """Just make it."""
        return step()

    def first(self, step: Callable[[], Logs]) -> Logs:
        """Record."""
        self.drop()
        with self:
            return step()

    def drop(self) -> None:
        """Keep nothing."""
        self.calls = []

    @torch.inference_mode()
    def again(self) -> None:
        """Make the recorded calls; what they return goes where it went the first time."""
        for func, args, kwargs, result in self.calls:
            for before, now in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(before, Tensor) and before.data_ptr() != now.data_ptr():
                    before.copy_(now)


def first_steady_step(made: Toy) -> int | None:
    """Train until the strategy says it is steady; that step's number, or None if it never is."""
    for step in range(len(made.stream) - 2):
        if made.strategy.steady:
            return step
        train(made, step, step + 1)
    return None


def resumes_bit_for_bit(make: Make) -> None:
    """A strategy saved and loaded in the middle ends with the same state as one that was not."""
    whole, half = make((0,)), len(make((0,)).stream) // 2 + 3
    train(whole, 0, half)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), half, {"owner": "check", "strategy": whole.strategy.state_dict()})
        again = make((0,))
        again.strategy.load_state_dict(checkpoint.load(path, torch.device("cpu"), "check")["strategy"])
    for made in (whole, again):
        train(made, half, len(made.stream))
    _same_state(whole.strategy.state_dict(), again.strategy.state_dict(), "state")
    batch = whole.stream.batch(0)
    assert torch.equal(_answer(whole, batch), _answer(again, batch)), "predictions differ after a resume"


def _answer(made: Toy, batch: Batch) -> Tensor:
    made.strategy.eval()
    with torch.inference_mode():
        return made.strategy.predict(batch)


def _same_state(one: Any, two: Any, where: str, when: str = "after a resume") -> None:
    if isinstance(one, Mapping):
        assert one.keys() == two.keys(), f"{where} has other keys {when}"
        for key in one.keys() - {"pickle"}:  # equal objects may pickle to different bytes
            _same_state(one[key], two[key], f"{where}.{key}", when)
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), f"{where} has another length {when}"
        for number, (left, right) in enumerate(zip(one, two, strict=True)):
            _same_state(left, right, f"{where}[{number}]", when)
    elif isinstance(one, Tensor):
        assert torch.equal(one, two), f"{where} differs {when}"
    else:
        assert one == two, f"{where} differs {when}"


def runs_do_not_touch_each_other(make: Make) -> None:
    """A run answers the same whether it trains alone or stacked with others."""
    alone, stacked = make((1,)), make((0, 1, 2))
    for made in (alone, stacked):
        train(made, 0, len(made.stream) // 2)
        made.strategy.eval()
    batch = alone.stream.batch(0)
    many = {key: value.expand(3, *value.shape[1:]) for key, value in batch.items()}
    with torch.inference_mode():
        one, three = alone.strategy.predict(batch)[0], stacked.strategy.predict(many)[1]
    worst = float((one - three).masked_fill(one == three, 0).abs().max())  # both minus infinity: a masked class
    scale = max(1.0, float(one.masked_fill(one.isinf(), 0).abs().max()))
    assert worst <= TOLERANCE * scale, f"a stacked run answers differently, by {worst:.2g}"


def never_reads_the_host_once_steady(make: Make) -> None:
    """A steady step makes no host read, so that it can become one CUDA graph."""
    made = make((0,))
    step = first_steady_step(made)
    if step is None:
        return
    train(made, step, step + 1)  # constants may come to the device once
    batch = made.stream.batch(step + 1)
    with NothingOfTheHost():  # type: ignore[no-untyped-call]
        made.strategy.observe(batch)


def keeps_its_shapes_once_steady(make: Make) -> None:
    """Two steady steps make the same calls on the same shapes."""
    made = make((0,))
    step = first_steady_step(made)
    if step is None:
        return
    train(made, step, step + 1)
    traces = []
    for later in (step + 1, step + 2):
        batch = made.stream.batch(later)
        with Trace() as trace:
            made.strategy.observe(batch)
        traces.append(trace.calls)
    for one, two in zip(*traces, strict=False):
        assert one == two, f"a steady step changed: {one} became {two}"
    assert len(traces[0]) == len(traces[1]), "a steady step made another number of calls"


def replays_as_it_steps(make: Make) -> None:
    """Steady steps that are recorded and replayed without Python end in the same state as steps that are run."""
    run, replayed = make((0,)), make((0,))
    learner = Captured(replayed.strategy, Tape(), warm_up=1)
    run.strategy.train()
    replayed.strategy.train()
    for step in range(len(run.stream)):
        batch = run.stream.batch(step)
        logs, others = run.strategy.observe(batch), learner.observe(batch)
        _same_state(dict(logs), dict(others), f"the logs of step {step}", "where steps are replayed")
        if run.stream.announces and run.stream.ends_task(step):
            run.strategy.boundary()
            learner.boundary()
    assert not learner.given_up, learner.given_up
    assert learner.replays or first_steady_step(make((0,))) is None, "it is steady, but no step was replayed"
    _same_state(run.strategy.state_dict(), replayed.strategy.state_dict(), "state", "where steps are replayed")
    batch = run.stream.batch(0)
    assert torch.equal(_answer(run, batch), _answer(replayed, batch)), "predictions differ where steps are replayed"


def takes_turns_with_another(make: Make) -> None:
    """Two runs that take turns in one process end as each alone: nothing that lasts is shared by strategies."""
    alone, abreast = [make((0,)), make((1,))], [make((0,)), make((1,))]
    stream = alone[0].stream
    ends = next(step for step in range(len(stream)) if stream.ends_task(step))
    steps = min(ends + 2, len(stream))
    for made in alone:
        train(made, 0, steps)
    for step in range(steps):
        for made in abreast:
            train(made, step, step + 1)
    batch, when = stream.batch(0), "where another run takes turns"
    for one, two in zip(alone, abreast, strict=True):
        _same_state(one.strategy.state_dict(), two.strategy.state_dict(), "state", when)
        assert torch.equal(_answer(one, batch), _answer(two, batch)), f"predictions differ {when}"


def leaves_its_batch_unchanged(make: Make) -> None:
    """Observing and predicting do not write into the batch."""
    made = make((0,))
    batch = made.stream.batch(0)
    before = {key: value.clone() for key, value in batch.items()}
    made.strategy.observe(batch)
    made.strategy.eval()
    with torch.inference_mode():
        made.strategy.predict(batch)
    assert batch.keys() == before.keys(), "the batch has other keys after observe"
    for key, value in batch.items():
        assert torch.equal(value, before[key]), f"observe or predict changed '{key}' of its batch"


def predicting_changes_nothing(make: Make) -> None:
    """A prediction, at any step, leaves the state as it is, and two of them are equal."""
    made = make((0,))
    made.strategy.eval()
    with torch.inference_mode():
        made.strategy.predict(made.stream.batch(0))
    train(made, 0, 5)
    made.strategy.eval()
    before = {key: value.clone() for key, value in made.strategy.state_dict().items() if isinstance(value, Tensor)}
    with torch.inference_mode():
        one, two = (made.strategy.predict(made.stream.batch(0)) for _ in range(2))
    assert torch.equal(one, two), "two predictions of the same batch differ"
    for key, value in before.items():
        assert torch.equal(made.strategy.state_dict()[key], value), f"predict changed {key}"


def draws_only_from_its_rng(make: Make) -> None:
    """No global random generator moves, so that a run depends on its seed alone."""
    made = make((0,))
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    train(made, 0, 5)
    assert torch.equal(torch_state, torch.get_rng_state()), "observe draws from torch's global generator"
    assert str(numpy_state) == str(np.random.get_state()), "observe draws from numpy's global generator"
    assert python_state == random.getstate(), "observe draws from Python's global generator"


def learns_a_toy_stream(make: Make) -> None:
    """After the stream, the classes seen last are told apart, or the newest events ranked, far above chance."""
    made = make((0, 1))
    train(made, 0, len(made.stream))
    holdout = made.stream.holdout()
    assert holdout is not None
    if made.stream.task not in FAR_ABOVE_CHANCE:
        return
    wanted, name = FAR_ABOVE_CHANCE[made.stream.task]
    last = evaluate(made.strategy, holdout, len(made.stream), full=True)[:, -1]
    assert (last >= wanted).all(), f"{name} on the last task is {last}, expected at least {wanted}"


def docstring_names_source_and_departures(make: Make) -> None:
    """The file says where the method comes from and where it departs from that."""
    text = sys.modules[type(make((0,)).strategy).__module__].__doc__ or ""
    for word in ("Source:", "Departures:"):
        assert word in text, f"the strategy's file has no '{word}' in its docstring"


CHECKS: tuple[Callable[[Make], None], ...] = (
    resumes_bit_for_bit,
    runs_do_not_touch_each_other,
    never_reads_the_host_once_steady,
    keeps_its_shapes_once_steady,
    replays_as_it_steps,
    takes_turns_with_another,
    leaves_its_batch_unchanged,
    predicting_changes_nothing,
    draws_only_from_its_rng,
    learns_a_toy_stream,
    docstring_names_source_and_departures,
)
