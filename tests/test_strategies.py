"""Every registered strategy keeps to the conformance checks, and the checks can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from cl_sim import registry, testing
from cl_sim.testing import CHECKS, Toy, toy
from cl_sim.types import Batch, Logs
from strategies.er import ER, ERConfig

SMALL_STEPS = {"strategy": {"lr": 0.01}}  # sharp cosines on a perceptron without BatchNorm
LARGE_STEPS = {"strategy": {"lr": 0.1}, "augment": []}  # 40 steps; images of 8 pixels do not survive shift:4
NO_CROPS = {"augment": ["jitter:1"]}  # of 8 pixels, in 40 steps
FEW_ROWS = {"strategy": {"capacity": 40, "epochs": 20}}
NARROW = {"strategy": {"replay": 32, "width": 16, "lr": 0.03}, **NO_CROPS}
SMALL_MEMORY = {"strategy": {"capacity": 40}}  # full within the stream
SEMI = {"strategy": {"capacity": 40, "labelled": 10, "unlabelled": 20, "saa": True, "answer": "net"}, "augment": []}
CLIPS = {"strategy": {"lr": 0.003, "capacity": 6, "replay": 2, "w_class": 0.1, "noise_prob": 0.1}}
CLUSTERS = {
    "strategy": {"capacity": 80, "replay": 10, "clusters": 8, "hidden": 32, "width": 16, "lr": 0.05},
    **NO_CROPS,
}
TOYS = {
    "aser": SMALL_MEMORY,
    "beclr": CLUSTERS,
    "ctvis": CLIPS,
    "derpp": LARGE_STEPS,
    "dvc": NO_CROPS,
    "ewc": {"strategy": {"every": 5}},  # tasks of 20 steps
    "fixmatch": SEMI,
    "flexmatch": SEMI,
    "gdumb": FEW_ROWS,
    "gss": SMALL_MEMORY,
    "hpcr": SMALL_STEPS,
    "ocm": NARROW,
    "pcr": SMALL_STEPS,
    "saa": {"strategy": {"capacity": 40}, "augment": []},  # 8 pixels do not survive shift:4
}


@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", registry.names("strategy"))
def test_strategy(name: str, check: Callable[[testing.Make], None]) -> None:
    check(lambda seeds: toy(name, seeds, TOYS.get(name)))


class MixesRuns(ER):
    def predict(self, batch: Batch) -> Tensor:
        logits = super().predict(batch)
        return logits + logits.mean(0, keepdim=True)


class ReadsTheHost(ER):
    def observe(self, new: Batch) -> Logs:
        logs = super().observe(new)
        return {"loss": logs["loss"] * float(logs["loss"].sum() > -1)}


class BringsNumbers(ER):
    def observe(self, new: Batch) -> Logs:
        scale = torch.tensor([0.5])
        return {name: scale * value for name, value in super().observe(new).items()}


class WritesIntoItsBatch(ER):
    def observe(self, new: Batch) -> Logs:
        new["x"].zero_()
        return super().observe(new)


class DrawsGlobally(ER):
    def observe(self, new: Batch) -> Logs:
        torch.rand(1)
        return super().observe(new)


class ForgetsItsCounter(ER):
    steps = 0

    def observe(self, new: Batch) -> Logs:
        self.steps += 1
        with torch.no_grad():
            next(self.net.parameters()).add_(1e-3 * self.steps)
        return super().observe(new)


class IsNeverReplayed(ER):
    """Steady at the first question in each task, and never when it would be recorded."""

    asked = 0

    @property
    def steady(self) -> bool:
        self.asked += 1
        return super().steady and self.asked < 4


class SharesWhatItLearned(ER):
    last: ClassVar[list[Tensor]] = []

    def observe(self, new: Batch) -> Logs:
        with torch.no_grad():
            weight = next(self.net.parameters())
            for other in self.last:
                weight.lerp_(other, 0.1)
            self.last[:] = [weight.clone()]
        return super().observe(new)


class Guesses(ER):
    def predict(self, batch: Batch) -> Tensor:
        return torch.zeros(*batch["y"].shape, self.env.classes)


class ChangesInPredict(ER):
    def predict(self, batch: Batch) -> Tensor:
        logits = super().predict(batch)
        self.memory.seen += 1
        return logits


class GrowsItsBatch(ER):
    def observe(self, new: Batch) -> Logs:
        wider = {key: value.repeat_interleave(1 + len(self.memory) % 3, 1) for key, value in new.items()}
        return super().observe(wider)


CAUGHT = [
    (MixesRuns, testing.runs_do_not_touch_each_other),
    (ReadsTheHost, testing.never_reads_the_host_once_steady),
    (BringsNumbers, testing.never_reads_the_host_once_steady),
    (WritesIntoItsBatch, testing.leaves_its_batch_unchanged),
    (DrawsGlobally, testing.draws_only_from_its_rng),
    (ForgetsItsCounter, testing.resumes_bit_for_bit),
    (ForgetsItsCounter, testing.replays_as_it_steps),
    (IsNeverReplayed, testing.replays_as_it_steps),
    (SharesWhatItLearned, testing.takes_turns_with_another),
    (Guesses, testing.learns_a_toy_stream),
    (ChangesInPredict, testing.predicting_changes_nothing),
    (GrowsItsBatch, testing.keeps_its_shapes_once_steady),
    (Guesses, testing.docstring_names_source_and_departures),
]


@pytest.mark.parametrize(("wrong", "check"), CAUGHT, ids=lambda value: value.__name__)
def test_the_checks_have_teeth(wrong: type[ER], check: Callable[[testing.Make], None]) -> None:
    def make(seeds: Sequence[int]) -> Toy:
        made = toy("er", seeds, {"strategy": {"capacity": 500}})
        made.strategy.env.lifted = 0
        made.strategy.rng.counter.zero_()
        return Toy(made.stream, wrong(ERConfig(capacity=500), made.strategy.env))

    with pytest.raises(AssertionError):
        check(make)


def test_er_with_one_pass_equals_its_definition_on_both_batches() -> None:
    made = toy("er", (0,), {"strategy": {"joint_pass": True}})
    testing.train(made, 0, 3)
    twin = toy("er", (0,), {"strategy": {"joint_pass": True}})
    testing.train(twin, 0, 3)
    new = made.stream.batch(3)
    old = twin.strategy.memory.sample(10)
    logits = twin.strategy.net(torch.cat([new["x"], old["x"]], 1))[0]
    y = torch.cat([new["y"], old["y"]], 1)[0]
    expected = -logits.log_softmax(-1)[torch.arange(20), y].mean()
    assert made.strategy.observe(new)["loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_er_ace_masks_old_classes_but_not_those_of_the_batch_or_of_the_future() -> None:
    made = toy("er_ace", (0,))
    last = len(made.stream) // 2
    testing.train(made, 0, last)  # task 1 holds the classes 0 and 1
    new = made.stream.batch(last)
    twin = toy("er_ace", (0,))
    testing.train(twin, 0, last)
    old = twin.strategy.memory.sample(10)
    logits = twin.strategy.net(new["x"])[0]
    allowed = torch.tensor([c not in (0, 1) or c in new["y"] for c in range(4)])
    first = -(logits[:, allowed].log_softmax(-1)[torch.arange(10), (allowed.cumsum(0) - 1)[new["y"][0]]]).mean()
    second = -twin.strategy.net(old["x"])[0].log_softmax(-1)[torch.arange(10), old["y"][0]].mean()
    assert made.strategy.observe(new)["loss"].item() == pytest.approx((first + second).item(), abs=1e-5)
