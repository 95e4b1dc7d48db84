"""What the replay strategies share: class means, masks, reviews, several updates, gradients as vectors, teachers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import references
import torch
from hypothesis import given
from hypothesis.strategies import integers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from cl_sim import checkpoint, testing
from cl_sim.encoders.classifier import Classifier
from cl_sim.encoders.resnet import ResNet18
from cl_sim.errors import BadConfig
from cl_sim.gradients import ahead, flat, gradient, put, trained, unflat
from cl_sim.memory.reservoir import Reservoir
from cl_sim.optim import Previous
from cl_sim.replay import CHUNK, ClassMeans, Onset
from cl_sim.rng import Rng
from cl_sim.runs import Lift, per_run
from cl_sim.testing import Toy, toy
from cl_sim.types import Batch, Field

seeds = integers(0, 10**6)
cross_entropy = per_run(F.cross_entropy)
TRICKS = toy("er", (0, 1), {"strategy": {"mask_unseen": True}}).strategy.tricks
VECTORS = {"x": Field((3,), torch.float32), "y": Field((), torch.int64)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).double()


def identity(x: Tensor) -> Tensor:
    return x


# class means


def stored(runs: int, size: int, classes: int, seed: int, capacity: int = 600) -> Reservoir:
    memory = Reservoir(capacity, VECTORS, Rng(range(runs), "test"))
    y = torch.randint(classes, (runs, size), generator=torch.Generator().manual_seed(seed))
    memory.add({"x": normal(runs, size, 3, seed=seed), "y": y})
    return memory


@given(runs=integers(1, 2), size=integers(1, 12), classes=integers(1, 5), seed=seeds)
def test_class_means_equal_the_nearest_mean_of_unit_features(runs: int, size: int, classes: int, seed: int) -> None:
    memory = stored(runs, size, classes, seed)
    x = normal(runs, 4, 3, seed=seed + 1)
    scores = ClassMeans(classes).scores(identity, memory, x)
    rows = memory.rows()
    for run in range(runs):
        held = [references.unit(row) for row in rows["x"][run, :size].tolist()]
        owners = rows["y"][run, :size].tolist()
        for item in range(4):
            here, gaps = references.unit(x[run, item].tolist()), {}
            for c in sorted(set(owners)):
                members = [row for row, owner in zip(held, owners, strict=True) if owner == c]
                mean = [math.fsum(column) / len(members) for column in zip(*members, strict=True)]
                mean = [value / math.hypot(*mean) for value in mean]
                assert scores[run, item, c].item() == pytest.approx(references.dot(here, mean), abs=1e-4)
                gaps[c] = math.dist(here, mean)
            nearest = [c for c, gap in gaps.items() if gap < min(gaps.values()) + 1e-3]
            assert int(scores[run, item].argmax()) in nearest
            assert all(scores[run, item, c] == -torch.inf for c in range(classes) if c not in gaps)


def test_class_means_of_a_memory_larger_than_a_chunk_are_those_of_all_rows() -> None:
    memory, x = stored(1, 2 * CHUNK + 7, 3, 0), normal(1, 5, 3, seed=1)
    sizes = []

    def encode(part: Tensor) -> Tensor:
        sizes.append(part.shape[1])
        return part

    scores = ClassMeans(3).scores(encode, memory, x)
    assert sizes == [CHUNK, CHUNK, 7, 5]
    rows = memory.rows()
    held, owners = F.normalize(rows["x"][0], dim=1)[rows["valid"][0]], rows["y"][0][rows["valid"][0]]
    means = F.normalize(torch.stack([held[owners == c].mean(0) for c in range(3)]), dim=1)
    assert_close(scores[0], F.normalize(x[0], dim=1) @ means.T, rtol=1e-4, atol=1e-5)


def test_class_means_of_an_empty_memory_answer_zeros() -> None:
    memory = Reservoir(5, VECTORS, Rng((0, 1), "test"))
    assert torch.equal(ClassMeans(4).scores(identity, memory, normal(2, 3, 3)), torch.zeros(2, 3, 4))


def test_class_means_are_encoded_once_per_evaluation_and_again_after_a_step() -> None:
    made = toy("er", (0,), {"strategy": {"readout": "class_mean"}})
    batch, calls, means = made.stream.batch(0), [], made.strategy.tricks.means
    slow = means._means
    means._means = lambda *args: calls.append(1) or slow(*args)
    answers = []
    for step in range(3):
        testing.train(made, step, step + 1)
        made.strategy.eval()
        answers += [made.strategy.predict(batch) for _ in range(2)]
        fresh = ClassMeans(4).scores(made.strategy.net.part("encoder"), made.strategy.memory, batch["x"])
        assert torch.equal(answers[-1], fresh)
    assert len(calls) == 3
    assert not torch.equal(answers[0], answers[2])


def test_class_means_are_encoded_again_after_loading() -> None:
    one, two = (toy("er", (0,), {"strategy": {"readout": "class_mean"}}) for _ in range(2))
    testing.train(one, 0, 5)
    testing.train(two, 0, 9)
    batch = one.stream.batch(0)
    for made in (one, two):
        made.strategy.eval()
        made.strategy.predict(batch)
    one.strategy.load_state_dict(two.strategy.state_dict())
    assert torch.equal(one.strategy.predict(batch), two.strategy.predict(batch))


# the mask


@given(seed=seeds)
def test_the_mask_hides_exactly_the_classes_that_have_not_come(seed: int) -> None:
    tricks = copy.deepcopy(TRICKS)
    scores = normal(2, 3, 4, seed=seed)
    assert torch.equal(tricks.masked(scores), scores), "before the first batch nothing is hidden"
    came: list[set[int]] = [set(), set()]
    for part in range(2):
        y = torch.randint(4, (2, 2), generator=torch.Generator().manual_seed(seed + part))
        tricks.note({"y": y})
        for run in range(2):
            came[run] |= set(y[run].tolist())
        masked = tricks.masked(scores)
        for run in range(2):
            for c in range(4):
                expected = scores[run, :, c] if c in came[run] else torch.full((3,), -torch.inf)
                assert torch.equal(masked[run, :, c], expected)


# review


def reviewed(review: str, announces: bool = True) -> tuple[Toy, list[list[Batch]]]:
    """A toy run, and per boundary the batches that its review learned."""
    settings = {"strategy": {"review": review, "capacity": 47}, "stream": {"announces": announces}}
    made = toy("er", (0, 1), settings)
    batches: list[list[Batch]] = []
    inner = made.strategy.tricks.review

    def noting(memory: Any) -> Any:
        batches.append([])
        for batch in inner(memory):
            batches[-1].append(batch)
            yield batch

    made.strategy.tricks.review = noting
    testing.train(made, 0, len(made.stream))
    return made, batches


@pytest.mark.parametrize(("review", "times"), [("never", [0, 0]), ("last", [0, 1]), ("each", [1, 1])])
def test_a_review_comes_after_the_last_task_or_after_each_and_sees_every_row_once(
    review: str, times: list[int]
) -> None:
    made, batches = reviewed(review)
    assert [len(part) for part in batches] == [5 * count for count in times]  # 47 rows, ten at a time
    if times[-1]:
        rows = made.strategy.memory.rows()["index"]
        learned = torch.cat([batch["index"] for batch in batches[-1]], 1)
        for run in range(2):
            assert sorted(learned[run].tolist()) == sorted(rows[run].tolist())
        assert not torch.equal(learned[0], rows[0]), "the order is random"


def test_a_review_has_gradients_of_a_tenth() -> None:
    made = toy("er", (0,), {"strategy": {"review": "each", "capacity": 30}})
    made.strategy.train()
    for step in range(5):
        made.strategy.observe(made.stream.batch(step))
    twin = copy.deepcopy(made.strategy)
    net = twin.net.net
    for batch in twin.memory.epoch(10):
        net.zero_grad()
        (-net(batch["x"][0]).log_softmax(1)[torch.arange(10), batch["y"][0]].mean()).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * 0.1 * parameter.grad
    made.strategy.boundary()
    for fast, slow in zip(made.strategy.net.parameters(), net.parameters(), strict=True):
        assert_close(fast, slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("review", ["last", "each"])
def test_a_review_that_nothing_announces_is_refused(review: str) -> None:
    with pytest.raises(BadConfig, match=f"strategy.review is '{review}', but this stream announces no task boundaries"):
        reviewed(review, announces=False)
    reviewed("never", announces=False)


# several updates


@pytest.mark.parametrize("updates", [1, 3])
def test_replay_steps_make_as_many_updates_each_with_its_own_draw(updates: int) -> None:
    made, twin = (toy("er", (0, 1), {"strategy": {"replay_steps": updates, "capacity": 60}}) for _ in range(2))
    for one in (made, twin):
        testing.train(one, 0, 8)
    drawn: list[Tensor] = []
    sample, step, steps = made.strategy.memory.sample, made.strategy.sgd.step, []

    def noting(n: int) -> Batch:
        batch = sample(n)
        drawn.append(batch["slot"])
        return batch

    made.strategy.memory.sample = noting
    made.strategy.sgd.step = lambda: steps.append(1) or step()
    made.strategy.observe(made.stream.batch(8))
    expected = [twin.strategy.memory.sample(10)["slot"] for _ in range(updates)]
    assert len(steps) == len(drawn) == updates
    assert all(torch.equal(one, two) for one, two in zip(drawn, expected, strict=True))
    assert len({tuple(slot.flatten().tolist()) for slot in drawn}) == updates
    assert int(made.strategy.memory.seen[0]) == 90, "the batch is remembered once"


# onset


def onset_of(announces: bool, after: int) -> Onset:
    return Onset(toy("er", (0,), {"stream": {"announces": announces}}).strategy.env, after)


def test_what_waits_for_the_second_task_starts_at_the_first_boundary() -> None:
    onset = onset_of(True, after=2)
    for _ in range(5):
        onset.tick()
    assert onset.weight.item() == 0, "steps do not count where tasks are announced"
    onset.boundary()
    onset.tick()
    assert onset.weight.item() == 1


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_waits_starts_after_so_many_steps_where_nothing_is_announced(after: int) -> None:
    onset, weights = onset_of(False, after), []
    for _ in range(5):
        onset.tick()
        weights.append(onset.weight.item())
    assert weights == [float(step >= after) for step in range(1, 6)]


@pytest.mark.parametrize("announces", [True, False])
def test_what_waits_goes_on_waiting_after_a_resume(announces: bool) -> None:
    onset, again = onset_of(announces, 3), onset_of(announces, 3)
    onset.tick()
    onset.tick()
    again.load_state_dict(onset.state_dict())
    weights = [again.weight.item()]
    again.tick()
    if announces:
        again.boundary()
    weights.append(again.weight.item())
    assert weights == [0, 1]
    onset.load_state_dict(again.state_dict())
    assert onset.weight.item() == 1


# gradients as vectors, in float64


def perceptron(seed: int, frozen: bool = False) -> Classifier:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
    encoder.dim = 4  # type: ignore[assignment]
    encoder.requires_grad_(not frozen)
    return Classifier(encoder, 3).double()


def convolutional(seed: int) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(ResNet18((1, 8, 8), 2, 4), 3).double()


MAKERS: list[tuple[Callable[[int], Classifier], tuple[int, ...]]] = [(perceptron, (5,)), (convolutional, (1, 8, 8))]


@pytest.fixture(autouse=True)
def keep_the_global_generator() -> Any:
    with torch.random.fork_rng(devices=[]):
        yield


def plain_gradient(net: Classifier, x: Tensor, y: Tensor) -> Tensor:
    parts = torch.autograd.grad(F.cross_entropy(net(x), y), [p for p in net.parameters() if p.requires_grad])
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize(("make", "shape"), MAKERS, ids=["perceptron", "convolutional"])
def test_a_gradient_is_that_of_each_run_alone(
    make: Callable[[int], Classifier], shape: tuple[int, ...], runs: int
) -> None:
    nets = [make(seed) for seed in range(runs)]
    alone = [copy.deepcopy(net) for net in nets]
    x, y = images(runs, 6, *shape), torch.randint(3, (runs, 6))
    net = Lift(nets)
    vector = gradient(cross_entropy(net(x), y), net)
    for run in range(runs):
        assert_close(vector[run], plain_gradient(alone[run], x[run], y[run]))
    again = flat(list(unflat(vector, net).values()), runs)
    assert torch.equal(again, vector), "there and back"


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize(("make", "shape"), MAKERS, ids=["perceptron", "convolutional"])
def test_a_gradient_put_is_what_backward_would_have_left(
    make: Callable[[int], Classifier], shape: tuple[int, ...], runs: int
) -> None:
    net = Lift([make(seed) for seed in range(runs)])
    x, y = images(runs, 6, *shape), torch.randint(3, (runs, 6))
    vector = gradient(cross_entropy(net(x), y), net)
    net.zero_grad()
    cross_entropy(net(x), y).sum().backward()
    left = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    put(vector, net)
    for parameter, grad in zip(net.parameters(), left, strict=True):
        assert_close(parameter.grad, grad)
        assert not parameter.grad.requires_grad


@pytest.mark.parametrize("runs", [1, 2])
def test_a_gradient_leaves_out_what_is_frozen_and_is_zero_where_the_loss_does_not_reach(runs: int) -> None:
    net = Lift([perceptron(seed, frozen=True) for seed in range(runs)])
    assert list(trained(net)) == ["head.weight", "head.bias"]
    vector = gradient(net.weight("head.bias").square().sum(1), net)
    assert vector.shape == (runs, 4 * 3 + 3)
    assert bool((vector[:, :12] == 0).all())
    assert_close(vector[:, 12:], 2 * net.weight("head.bias").detach())
    loss = cross_entropy(net(images(runs, 6, 5)), torch.randint(3, (runs, 6)))
    assert torch.equal(gradient(loss, net, keep=True), gradient(loss, net))


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize(("make", "shape"), MAKERS, ids=["perceptron", "convolutional"])
def test_the_net_ahead_answers_like_a_copy_that_took_the_step_and_leaves_the_net_alone(
    make: Callable[[int], Classifier], shape: tuple[int, ...], runs: int
) -> None:
    nets = [make(seed) for seed in range(runs)]
    alone = [copy.deepcopy(net) for net in nets]
    x, y, other = images(runs, 6, *shape), torch.randint(3, (runs, 6)), images(runs, 4, *shape, seed=1)
    net = Lift(nets)
    vector = gradient(cross_entropy(net(x), y), net)
    before = copy.deepcopy(net.state_dict())
    answers = ahead(net, vector, 0.3)(other)
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "weights and statistics keep their bits"
    for run, one in enumerate(alone):
        slope = plain_gradient(one, x[run], y[run])
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(one.parameters()) - 0.3 * slope, one.parameters())
        assert_close(answers[run], one(other[run]))


# the previous net


@pytest.mark.parametrize("runs", [1, 3])
def test_the_previous_net_is_the_net_at_its_update_in_evaluation_mode(runs: int) -> None:
    net = Lift([convolutional(seed) for seed in range(runs)])
    teacher = Previous(net)
    whole = nn.ModuleDict({"net": net, "teacher": teacher}).train()
    assert not any(module.training for module in teacher.modules())
    x = images(runs, 6, 1, 8, 8)
    for _ in range(2):
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        cross_entropy(net(x), torch.randint(3, (runs, 6))).sum().backward()
        optimiser.step()
        before = teacher(x)
        frozen = copy.deepcopy(net).eval()
        assert not torch.equal(before, frozen(x)), "it does not follow by itself"
        teacher.update(net)
        assert torch.equal(teacher(x), frozen(x))
        assert not teacher(x).requires_grad
        assert net.training
    kept = copy.deepcopy(teacher.state_dict())
    net(x)
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items()), "statistics stay too"
    assert whole.training


def test_the_previous_net_asks_for_no_gradient_and_shares_nothing_with_the_net() -> None:
    net = Lift([perceptron(0)])
    teacher = Previous(net)
    teacher.update(net)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    mine = {value.data_ptr() for value in teacher.state_dict().values()}
    assert mine.isdisjoint(value.data_ptr() for value in net.state_dict().values())


def test_the_previous_net_comes_back_with_the_state(tmp_path: Any) -> None:
    one = toy("lwf", (0, 1))
    testing.train(one, 0, len(one.stream) // 2 + 3)
    path = checkpoint.save(tmp_path, 1, {"owner": "test", "strategy": one.strategy.state_dict()})
    two = toy("lwf", (0, 1))
    x = one.stream.batch(0)["x"]
    assert not torch.equal(one.strategy.teacher(x), two.strategy.teacher(x))
    two.strategy.load_state_dict(checkpoint.load(path, torch.device("cpu"), "test")["strategy"])
    assert torch.equal(one.strategy.teacher(x), two.strategy.teacher(x))
