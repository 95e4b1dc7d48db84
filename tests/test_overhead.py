"""What a step does beside its passes, counted: tensor operators do not depend on the load of the machine."""

from __future__ import annotations

import pytest
from bench.learner import Bare, Learner, Pass
from bench.timing import operators, python_calls

# A small tensor's operator takes 2 to 5 microseconds of one core: 200 of them are under a millisecond.
BUDGET = {"finetune": 25, "er": 105, "er_ace": 175, "derpp": 335, "scr": 450, "pcr": 405, "hpcr": 605}


def learner(name: str) -> Learner:
    own = {} if name == "finetune" else {"strategy": {"capacity": 40, "replay": 10}}
    return Learner(name, own | {"encoder": {"width": 1}}).settle()


@pytest.mark.parametrize("name", sorted(BUDGET))
def test_a_steady_step_calls_few_operators_beside_its_passes(name: str) -> None:
    made = learner(name)
    passes = made.passes()
    assert sum(part.batch for part in passes if part.learns) >= 10
    beside = operators(made.step) - operators(Bare(passes, width=1).step)
    assert 0 < beside <= BUDGET[name]


def test_the_passes_of_er_are_the_new_and_the_recalled_batch() -> None:
    assert learner("er").passes() == [Pass(10, True), Pass(10, True)]


def test_python_calls_are_counted() -> None:
    def inner() -> None:
        pass

    def outer() -> None:
        for _ in range(7):
            inner()

    assert python_calls(outer) == 8
