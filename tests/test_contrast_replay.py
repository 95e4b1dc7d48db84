"""SCR and its kin: each step against the method written out plainly, each part against a slow twin."""

from __future__ import annotations

import copy

import pytest
import references
import references_contrast_replay as slow
import torch
from hypothesis import given
from hypothesis.strategies import integers, lists
from torch import Tensor, nn

from cl_sim import testing
from cl_sim.encoders.projector import Projector
from cl_sim.errors import BadConfig
from cl_sim.testing import Toy, toy
from strategies.scr import SCRConfig

F64 = torch.float64
seeds = integers(0, 10**6)


def weights(made: Toy) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in made.strategy.net.parameters()]


def make_step(net: nn.Module, loss: Tensor, lr: float) -> None:
    """Plain gradient descent."""
    net.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad


def assert_same_weights(made: Toy, net: nn.Module) -> None:
    for fast, plain in zip(made.strategy.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-5)


class Flat(nn.Module):
    """An encoder that hands its input on."""

    dim = 4

    def forward(self, x: Tensor) -> Tensor:
        return x


@given(hidden=lists(integers(1, 5), max_size=2), width=integers(1, 5), seed=seeds)
def test_the_projector_equals_its_layers_written_out(hidden: list[int], width: int, seed: int) -> None:
    torch.manual_seed(seed)
    net, x = Projector(Flat(), width, tuple(hidden)).to(F64), torch.randn(3, 4, dtype=F64)
    layers = [(m.weight.tolist(), m.bias.tolist()) for m in net.head if isinstance(m, nn.Linear)]
    expected = torch.tensor([slow.projection(layers, row) for row in x.tolist()], dtype=F64)
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


def test_a_trace_of_scr_equals_the_method_written_out() -> None:
    """Losses of seven steps and the weights after them, the draws being those of a twin."""
    made, twin = toy("scr", (3,)), toy("scr", (3,))
    net, strategy = copy.deepcopy(twin.strategy.net.net), twin.strategy
    for step in range(7):
        new = made.stream.batch(step)
        old = strategy.memory.sample(100)
        expected = torch.zeros(())
        if step:
            x, y = torch.cat([old["x"], new["x"]], 1), torch.cat([old["y"], new["y"]], 1)[0]
            augmented = strategy.env.augment({"x": x})["x"][0]
            z = torch.cat([net(x[0]), net(augmented)])
            owners = torch.cat([y, y])
            parts = []
            for i in range(len(z)):
                others = torch.tensor([k for k in range(len(z)) if k != i])
                shares = (z[others] @ z[i] / 0.07).log_softmax(0)
                parts.append(-shares[owners[others] == owners[i]].mean())
            expected = torch.stack(parts).mean()
            by_hand = references.supcon(z.tolist(), owners.tolist(), 0.07)
            assert expected.item() == pytest.approx(by_hand, rel=1e-4)
            make_step(net, expected, 0.1)
        strategy.memory.add(new)
        loss = made.strategy.observe(new)["loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"step {step}"
    assert_same_weights(made, net)


def test_the_first_batch_of_scr_changes_nothing_and_is_remembered() -> None:
    made = toy("scr", (0,))
    before = weights(made)
    logs = made.strategy.observe(made.stream.batch(0))
    assert logs["loss"].tolist() == [0]
    assert all(torch.equal(one, two) for one, two in zip(before, weights(made), strict=True))
    assert len(made.strategy.memory) == 10


def test_scr_answers_the_nearest_class_mean_of_the_encoder_not_of_the_projection() -> None:
    made = toy("scr", (0,), {"strategy": {"capacity": 40}})
    testing.train(made, 0, 30)
    made.strategy.eval()
    rows, batch, encoder = made.strategy.memory.rows(), made.stream.batch(31), made.strategy.net.net.encoder
    with torch.no_grad():
        memory, queries = encoder(rows["x"][0]).tolist(), encoder(batch["x"][0]).tolist()
        answers = made.strategy.predict(batch)[0].argmax(-1).tolist()
    assert answers == [slow.nearest_class(memory, rows["y"][0].tolist(), query) for query in queries]


@pytest.mark.parametrize("settings", [{"readout": "head"}, {"mask_unseen": True}, {"tau": 0.0}, {"width": 0}])
def test_scr_refuses_what_has_no_effect_or_no_meaning(settings: dict[str, object]) -> None:
    with pytest.raises(BadConfig):
        SCRConfig(**settings)


def test_a_review_of_scr_goes_over_the_memory_with_a_tenth_of_the_gradient() -> None:
    settings = {"strategy": {"review": "each", "capacity": 60}}
    made, twin = toy("scr", (1,), settings), toy("scr", (1,), settings)
    for one in (made, twin):
        for step in range(7):
            one.strategy.observe(one.stream.batch(step))
    net, strategy = copy.deepcopy(twin.strategy.net.net), twin.strategy
    made.strategy.boundary()
    for old in strategy.memory.epoch(100):
        z = torch.cat([net(old["x"][0]), net(strategy.env.augment(old)["x"][0])])
        owners = torch.cat([old["y"][0]] * 2)
        shares = (z @ z.T / 0.07).masked_fill(torch.eye(120, dtype=torch.bool), -torch.inf).log_softmax(1)
        same = (owners[:, None] == owners) & ~torch.eye(120, dtype=torch.bool)
        make_step(net, -(shares.masked_fill(~same, 0).sum(1) / same.sum(1)).mean(), 0.01)
    assert_same_weights(made, net)


def test_a_trace_of_derpp_equals_the_method_written_out() -> None:
    """Losses of seven steps and the weights after them: three passes, the draws being those of a twin."""
    made, twin = toy("derpp", (3,)), toy("derpp", (3,))
    net, strategy = copy.deepcopy(twin.strategy.net.net), twin.strategy
    for step in range(7):
        new = made.stream.batch(step)
        logits = net(strategy.env.augment(new)["x"][0])
        expected = -logits.log_softmax(1)[torch.arange(10), new["y"][0]].mean()
        if step:
            first, second = strategy.memory.sample(10), strategy.memory.sample(10)
            dark = net(strategy.env.augment(first)["x"][0])
            expected = expected + 0.5 * (dark - first["logits"][0]).square().sum() / 40
            recalled = net(strategy.env.augment(second)["x"][0]).log_softmax(1)
            expected = expected - recalled[torch.arange(10), second["y"][0]].mean()
        make_step(net, expected, 0.01)
        strategy.memory.add({**new, "logits": logits[None].detach()})
        logs = made.strategy.observe(new)
        assert logs["loss"].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"step {step}"
    assert_same_weights(made, net)
    torch.testing.assert_close(
        made.strategy.memory.rows()["logits"], strategy.memory.rows()["logits"], rtol=1e-4, atol=1e-5
    )


def test_the_two_draws_of_derpp_are_independent() -> None:
    """Among 20 rows the two draws of 10 share 5 on average; the mean of 3 runs x 100 has a deviation of 0.07."""
    made = toy("derpp", (0, 1, 2), {"strategy": {"capacity": 20}})
    testing.train(made, 0, 4)
    drawn: list[Tensor] = []
    sample = made.strategy.memory.sample

    def noting(n: int) -> dict[str, Tensor]:
        batch = sample(n)
        drawn.append(batch["slot"])
        return batch

    made.strategy.memory.sample = noting
    new = made.stream.batch(4)
    for _ in range(100):
        made.strategy.observe(new)
    shared = [(a[:, :, None] == b[:, None]).sum((1, 2)) for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
    assert abs(torch.stack(shared).float().mean().item() - 5) < 0.35  # 5 deviations: false alarm in 1 of 10^6


def test_derpp_without_its_distillation_is_replay_from_one_draw() -> None:
    """With alpha 0 the gradient comes from the new and the second draw alone: forgetting the stored logits changes nothing."""
    one, two = (toy("derpp", (0,), {"strategy": {"alpha": 0.0}}) for _ in range(2))
    testing.train(one, 0, 12)
    for step in range(12):
        two.strategy.memory.row("logits").fill_(7.0)
        testing.train(two, step, step + 1)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
