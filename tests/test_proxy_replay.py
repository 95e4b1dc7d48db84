"""PCR and HPCR: the self-checks of the methods, and every step against the method written out plainly."""

from __future__ import annotations

import copy
import math

import pytest
import references
import torch
from hypothesis import given
from hypothesis.strategies import integers
from torch import Tensor

from cl_sim import session, testing
from cl_sim.config import from_dict
from cl_sim.testing import Toy, toy
from strategies.hpcr import temperature_factor

SMALL_STEPS = {"strategy": {"lr": 0.01}}
PLAIN = {"strategy": {"lr": 0.01, "alpha": 0.0, "beta": 0.0, "low": 1.0, "high": 1.0}}


def weights(made: Toy) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in made.strategy.net.parameters()]


@pytest.mark.parametrize("name", ["pcr", "hpcr"])
def test_the_first_batch_changes_no_weight_and_is_remembered(name: str) -> None:
    made = toy(name, (0,))
    before = weights(made)
    logs = made.strategy.observe(made.stream.batch(0))
    assert all(torch.equal(one, two) for one, two in zip(before, weights(made), strict=True))
    assert len(made.strategy.memory) == 10
    assert logs["loss"].tolist() == [0]


def test_the_first_batch_moves_the_statistics_of_batch_norm() -> None:
    settings = {
        "strategy": {"name": "pcr"},
        "stream": {"name": "synthetic", "size": 16},
        "encoder": {"name": "reduced_resnet18", "width": 2},
    }
    config = from_dict(settings)
    stream = session.build_stream(config, (0,))
    made = Toy(stream, session.build_strategy(config, stream, (0,)))
    before = made.strategy.net.net.encoder.encoder.stem[1].running_mean.clone()
    made.strategy.observe(made.stream.batch(0))
    assert not torch.equal(before, made.strategy.net.net.encoder.encoder.stem[1].running_mean)


@pytest.mark.parametrize("name", ["pcr", "hpcr"])
def test_proxies_of_classes_that_have_not_come_keep_their_bits(name: str) -> None:
    made = toy(name, (0, 1))  # the order is fixed: task 1 holds the classes 0 and 1
    before = made.strategy.net.weight("head.weight").detach().clone()
    testing.train(made, 0, len(made.stream) // 2)
    after = made.strategy.net.weight("head.weight").detach()
    assert torch.equal(before[:, 2:], after[:, 2:])
    assert not torch.equal(before[:, :2], after[:, :2])


def test_a_joint_batch_of_one_class_costs_log_n_and_moves_nothing() -> None:
    made = toy("pcr", (0,))
    for step in range(3):
        one_class = {**made.stream.batch(step), "y": torch.zeros(1, 10, dtype=torch.int64)}
        before = weights(made)
        logs = made.strategy.observe(one_class)
    assert logs["loss"].item() == pytest.approx(math.log(40), abs=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(before, weights(made), strict=True)) < 1e-6


def test_the_temperature_factor_takes_its_reference_values() -> None:
    known = {0: 0.5625, 50: 0.6806707347, 125: 1.18125, 250: 1.8, 500: 0.5625, 750: 1.8}
    for step, value in known.items():
        assert temperature_factor(step) == pytest.approx(value, abs=1e-10)
        assert float(temperature_factor(torch.tensor(step))) == pytest.approx(value, abs=1e-6)


@given(step=integers(0, 10**6), period=integers(2, 900))
def test_the_temperature_factor_equals_its_other_form(step: int, period: int) -> None:
    slow = references.temperature_factor(step, 0.5, 2.0, period)
    assert temperature_factor(step, 0.5, 2.0, period) == pytest.approx(slow, abs=1e-6)


def test_hpcr_without_its_additions_is_pcr_to_the_bit() -> None:
    pcr, hpcr = toy("pcr", (0, 1), SMALL_STEPS), toy("hpcr", (0, 1), PLAIN)
    for made in (pcr, hpcr):
        testing.train(made, 0, len(made.stream))
    assert all(torch.equal(one, two) for one, two in zip(weights(pcr), weights(hpcr), strict=True))


def test_stored_images_labels_answers_and_features_stay_together() -> None:
    made = toy("hpcr", (0, 1), {"strategy": {"lr": 0.01, "capacity": 47}})
    arrived: dict[tuple[int, int], dict[str, Tensor]] = {}
    add = made.strategy.memory.add

    def noting(batch: dict[str, Tensor]) -> None:
        for run in range(2):
            for item in range(10):
                arrived[run, int(batch["index"][run, item])] = {k: v[run, item].clone() for k, v in batch.items()}
        add(batch)

    made.strategy.memory.add = noting
    testing.train(made, 0, len(made.stream))
    rows = made.strategy.memory.rows()
    assert bool(rows["valid"].all())
    for run in range(2):
        for row in range(47):
            came = arrived[run, int(rows["index"][run, row])]
            for name in ("x", "y", "logits", "feature"):
                assert torch.equal(rows[name][run, row], came[name]), f"{name} of row {row} is another sample's"


def test_what_hpcr_stores_is_the_answer_before_the_step() -> None:
    made = toy("hpcr", (0,), SMALL_STEPS)
    testing.train(made, 0, 4)
    new, net = made.stream.batch(4), copy.deepcopy(made.strategy.net.net)
    made.strategy.observe(new)
    rows = made.strategy.memory.rows()
    features = net.encoder(new["x"][0])
    scores = references.cosine_scores(features.tolist(), net.head.weight.tolist(), 0.09)
    torch.testing.assert_close(rows["feature"][0, 40:50], features)
    torch.testing.assert_close(rows["logits"][0, 40:50], torch.tensor(scores), rtol=1e-4, atol=1e-4)


def unit(rows: Tensor) -> Tensor:
    return rows / (rows.norm(dim=1, keepdim=True) + 1e-6)


def plain_contrast(f: Tensor, y: Tensor, w: Tensor) -> Tensor:
    chosen = unit(w)[y]
    parts = []
    for i in range(len(y)):
        scores = torch.stack([unit(f)[i] @ chosen[k] / 0.09 for k in range(len(y))])
        own = scores[int((y == y[i]).nonzero()[0])]
        parts.append(scores.exp().sum().log() - own)
    return torch.stack(parts).mean()


def plain_distill(f: Tensor, old: dict[str, Tensor], y: Tensor, w: Tensor) -> Tensor:
    stored, h = torch.cat([old["logits"][0]] * 2), torch.cat([old["feature"][0]] * 2)
    scores = unit(f) @ unit(w).T / 0.09
    by_proxy = torch.stack([(scores[a, y[k]] - stored[a, y[k]]) ** 2 for a in range(len(f)) for k in range(len(y))])
    by_sample = []
    for a in range(len(f)):
        others = [c for c in range(len(f)) if c != a]
        now = torch.stack([unit(f)[a] @ unit(f)[c] / 0.09 for c in others]).log_softmax(0)
        then = torch.stack([unit(h)[a] @ unit(h)[c] / 0.09 for c in others]).softmax(0)
        by_sample.append(-(then * now).sum())
    return 0.1 * by_proxy.mean() + 0.5 * torch.stack(by_sample).mean()


@pytest.mark.parametrize("name", ["pcr", "hpcr"])
def test_a_trace_over_the_boundary_equals_the_method_written_out(name: str) -> None:
    """Losses and weights of every step, the draws of the views and of the memory being those of a twin."""
    made, twin = toy(name, (3,), SMALL_STEPS), toy(name, (3,), SMALL_STEPS)
    net, strategy = copy.deepcopy(twin.strategy.net.net), twin.strategy
    boundary = len(made.stream) // 2
    for step in range(boundary + 3):
        new = made.stream.batch(step)
        y = torch.cat([new["y"][0]] * 2)
        f = net.encoder(torch.cat([new["x"], strategy.env.augment(new)["x"]], 1)[0])
        w, size = net.head.weight, 10
        answered = {"feature": f[None, :size].detach(), "logits": (unit(f) @ unit(w).T / 0.09)[None, :size].detach()}
        old = strategy.memory.sample(10)
        expected = torch.zeros(())
        if step:
            f_m = net.encoder(torch.cat([old["x"], strategy.env.augment(old)["x"]], 1)[0])
            both = torch.cat([old["y"][0], old["y"][0], y])
            expected = plain_contrast(torch.cat([f_m, f]), both, w)
            if name == "hpcr":
                expected = expected * references.temperature_factor(step, 0.5625, 1.8, 500)
                if step >= boundary:
                    expected = expected + plain_distill(f_m, old, both, w)
            net.zero_grad()
            expected.backward()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.01 * parameter.grad
        strategy.memory.add({**new, **answered})
        loss = made.strategy.observe(new)["loss"]
        if made.stream.ends_task(step):
            made.strategy.boundary()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"step {step}"
    for fast, slow in zip(made.strategy.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-5)


def test_distillation_starts_after_onset_steps_where_nothing_is_announced() -> None:
    settings = {"stream": {"announces": False}, "strategy": {"lr": 0.01, "onset": 7}}
    made = toy("hpcr", (0,), settings)
    weight = []
    for step in range(10):
        testing.train(made, step, step + 1)
        weight.append(float(made.strategy.onset.weight))
    assert weight == [0.0] * 6 + [1.0] * 4


def test_unseen_classes_are_never_answered_unless_asked_for() -> None:
    masked, free = toy("pcr", (0,)), toy("pcr", (0,), {"strategy": {"mask_unseen": False}})
    for made in (masked, free):
        testing.train(made, 0, 5)
        made.strategy.eval()
    batch = masked.stream.batch(0)
    answer = masked.strategy.predict(batch)
    assert bool((answer[..., 2:] == -torch.inf).all())
    assert bool(free.strategy.predict(batch).isfinite().all())
    assert torch.equal(answer[..., :2], free.strategy.predict(batch)[..., :2])


def test_the_price_of_a_row_counts_the_stored_answers_and_features() -> None:
    pcr, hpcr = toy("pcr", (0,)).strategy.memory, toy("hpcr", (0,)).strategy.memory
    assert pcr.bytes_per_row == 3 * 8 * 8 + 8 + 8  # image, label, index
    assert hpcr.bytes_per_row == pcr.bytes_per_row + 4 * (4 + 32)  # 4 classes, 32 features
