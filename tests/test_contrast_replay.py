"""SCR and its kin: each step against the method written out plainly, each part against a slow twin."""

from __future__ import annotations

import copy
import math

import pytest
import references
import references_contrast_replay as slow
import torch
from hypothesis import given
from hypothesis.strategies import booleans, integers, lists
from torch import Tensor, nn

from cl_sim import losses, testing
from cl_sim.encoders.classifier import Classifier
from cl_sim.encoders.mlp import MLP
from cl_sim.encoders.projector import Projector
from cl_sim.errors import BadConfig
from cl_sim.gradients import ahead, gradient
from cl_sim.memory.greedy import Greedy
from cl_sim.optim import clip
from cl_sim.rng import Rng
from cl_sim.runs import Lift, per_run
from cl_sim.testing import NoHostReads, Toy, toy
from cl_sim.types import Field
from strategies.dvc import DVCConfig, impact
from strategies.ocm import OCMConfig, gap, turned
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


ROW = {"y": Field((), torch.int64), "index": Field((), torch.int64)}


@given(capacity=integers(1, 12), classes=integers(1, 6), items=integers(1, 60), seed=seeds)
def test_greedy_keeps_what_the_lists_keep(capacity: int, classes: int, items: int, seed: int) -> None:
    """Two runs with labels of their own, one sample at a time, who leaves the largest class being free."""
    labels = torch.randint(classes, (2, items), generator=torch.Generator().manual_seed(seed))
    memory = Greedy(capacity, ROW, Rng((seed, seed + 1), "test"), classes)
    twins = [slow.GreedySampler(capacity) for _ in range(2)]
    for item in range(items):
        memory.add({"y": labels[:, item : item + 1], "index": torch.full((2, 1), item)})
        rows = memory.rows()
        for run, twin in enumerate(twins):
            kept = rows["index"][run][rows["valid"][run]].tolist()
            twin.offer(item, int(labels[run, item]), set(kept))
            expected = {c: set(members) for c, members in twin.rows.items() if members}
            assert len(kept) == len(set(kept))
            assert {c: {i for i in kept if labels[run, i] == c} for c in expected} == expected
            assert len(kept) == sum(len(members) for members in expected.values())
            assert rows["y"][run][rows["valid"][run]].tolist() == [int(labels[run, i]) for i in kept]
    assert len(memory) == min(sum(len(members) for members in twin.rows.values()) for twin in twins)


def test_greedy_evicts_every_row_of_the_largest_class_equally_often() -> None:
    """Of ten rows one leaves; over 20000 runs the worst of ten stays within 4.5 standard errors (1 in 15000 by chance)."""
    runs = 20_000
    memory = Greedy(10, ROW, Rng(range(runs), "test"), 2)
    for label, index in ((0, range(10)), (1, range(10, 11))):
        wide = torch.tensor([*index]).expand(runs, -1)
        memory.add({"y": torch.full_like(wide, label), "index": wide})
    rows = memory.rows()["index"]
    left = torch.stack([(rows != item).all(1).float().mean() for item in range(10)])
    assert float((left - 0.1).abs().max()) < 4.5 * (0.1 * 0.9 / runs) ** 0.5


def test_greedy_never_reads_the_host_when_it_takes_samples_in() -> None:
    memory = Greedy(4, ROW, Rng((0, 1), "test"), 3)
    batch = {"y": torch.tensor([[0, 0, 1, 2, 2], [2, 1, 1, 0, 0]]), "index": torch.arange(5).expand(2, -1)}
    with NoHostReads():
        memory.add(batch)


def test_greedy_hands_out_every_row_once_before_any_comes_again() -> None:
    """Run 0 turns its third sample away (there is room for one of class 0), run 1 keeps all three."""
    small = Greedy(3, ROW, Rng((0, 1), "test"), 2)
    small.add({"y": torch.tensor([[0, 1, 0], [0, 0, 1]]), "index": torch.arange(3).expand(2, -1)})
    assert small.filled.tolist() == [2, 3]
    drawn = torch.cat([batch["index"] for batch in small.cycle(2, 3)], 1)  # [2, 6]
    assert sorted(drawn[0, :2].tolist()) == [0, 1]
    assert drawn[0].tolist() == drawn[0, :2].tolist() * 3
    assert sorted(drawn[1, :3].tolist()) == [0, 1, 2]
    assert drawn[1].tolist() == drawn[1, :3].tolist() * 2


@given(runs=integers(1, 3), most=integers(1, 40), seed=seeds)
def test_clipping_equals_the_definition_for_every_run(runs: int, most: int, seed: int) -> None:
    torch.manual_seed(seed)
    lifted = Lift([Classifier(MLP(3, (4,)), 2) for _ in range(runs)]).to(F64)
    gradients = [torch.randn_like(parameter) * 3 for parameter in lifted.parameters()]
    for parameter, made in zip(lifted.parameters(), gradients, strict=True):
        parameter.grad = made.clone()
    clip(lifted, most / 4)
    for run in range(runs):
        parts = [(g if runs == 1 else g[run]).flatten() for g in gradients]
        expected = slow.clipped(torch.cat(parts).tolist(), most / 4)
        parts = [(p.grad if runs == 1 else p.grad[run]).flatten() for p in lifted.parameters()]
        torch.testing.assert_close(torch.cat(parts), torch.tensor(expected, dtype=F64))


QUICK = {"strategy": {"capacity": 50, "epochs": 3, "clip": 1.5}}


def test_a_fit_of_gdumb_equals_the_method_written_out() -> None:
    """A fresh network, three epochs over the memory in random order, the gradient's norm clipped, draws those of a twin."""
    made, twin = toy("gdumb", (3,), QUICK), toy("gdumb", (3,), QUICK)
    for one in (made, twin):
        for step in range(20):
            one.strategy.observe(one.stream.batch(step))
    strategy = twin.strategy
    net, rows = strategy.fresh(1).net, strategy.memory.rows()
    clips = 0
    for _ in range(3):
        order = strategy.rng.choose(50, torch.ones(1, 50, dtype=torch.bool))[0]
        for start in range(0, 50, 10):
            chosen = order[start : start + 10]
            logits = net(rows["x"][0, chosen])
            loss = -logits.log_softmax(1)[torch.arange(10), rows["y"][0, chosen]].mean()
            net.zero_grad()
            loss.backward()
            clips += float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.5)) > 1.5
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.1 * parameter.grad
    made.strategy.boundary()
    assert 0 < clips < 15
    assert_same_weights(made, net)
    assert made.strategy.last.item() == pytest.approx(loss.item(), rel=1e-3)


def test_gdumb_learns_at_boundaries_only_and_then_from_the_memory_alone() -> None:
    made = toy("gdumb", (0, 1), QUICK)
    before = weights(made)
    for step in range(10):
        made.strategy.observe(made.stream.batch(step))
    assert all(torch.equal(one, two) for one, two in zip(before, weights(made), strict=True))
    made.strategy.boundary()
    assert not any(torch.equal(one, two) for one, two in zip(before, weights(made), strict=True))


def test_gdumb_starts_every_fit_from_another_network_the_same_for_a_seed_in_any_company() -> None:
    one, many = toy("gdumb", (1,), QUICK).strategy, toy("gdumb", (0, 1), QUICK).strategy
    first, second = one.fresh(1), one.fresh(2)
    assert not torch.equal(first.weight("head.weight"), second.weight("head.weight"))
    assert torch.equal(first.weight("head.weight")[0], many.fresh(1).weight("head.weight")[1])
    assert torch.equal(first.weight("head.weight"), one.fresh(1).weight("head.weight"))


def test_gdumb_fits_every_refit_samples_and_at_the_end_where_nothing_is_announced() -> None:
    settings = {**QUICK, "stream": {"announces": False}}
    made = toy("gdumb", (0,), {**settings, "strategy": {**QUICK["strategy"], "refit": 150}})
    assert not made.strategy.steady
    fits = []
    for step in range(40):
        testing.train(made, step, step + 1)
        fits.append(int(made.strategy.fits))
    assert fits == [0] * 14 + [1] * 15 + [2] * 10 + [3]


def scores(n: int, classes: int, seed: int) -> Tensor:
    return 2 * torch.randn(n, classes, dtype=F64, generator=torch.Generator().manual_seed(seed))


@given(n=integers(1, 6), classes=integers(1, 5), seed=seeds)
def test_dual_view_equals_its_three_sums(n: int, classes: int, seed: int) -> None:
    three = [scores(n, classes, seed + i) for i in range(3)]
    y = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    expected = slow.dual_view(*(z.tolist() for z in three), y.tolist(), 3.0)
    assert losses.dual_view(*three, y, 3.0).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_gradients_of_dual_view_are_those_of_its_values() -> None:
    three, y = [scores(4, 3, i).requires_grad_() for i in range(3)], torch.tensor([0, 2, 1, 1])
    assert torch.autograd.gradcheck(lambda *z: losses.dual_view(*z, y, 2.0), tuple(three))


def test_dual_view_of_three_undecided_answers_is_the_entropy_of_the_label_less_that_of_the_answer() -> None:
    """Even scores over C classes cost log C, are spread by log C, and agree: 0 in all, whatever the weight."""
    even, y = torch.zeros(6, 4, dtype=F64), torch.arange(6) % 4
    assert losses.dual_view(even, even, even, y, 9.0).item() == pytest.approx(0, abs=1e-12)


def test_lifted_dual_view_equals_the_runs_alone_and_never_reads_the_host() -> None:
    three = [torch.stack([scores(5, 3, 10 * i + run) for run in range(3)]) for i in range(3)]
    y = torch.randint(3, (3, 5), generator=torch.Generator().manual_seed(0))
    with NoHostReads():
        together = per_run(losses.dual_view)(*three, y, weight=2.0)
    alone = [losses.dual_view(*(z[run] for z in three), y[run], 2.0) for run in range(3)]
    torch.testing.assert_close(together, torch.stack(alone))


@given(n=integers(1, 5), seed=seeds)
def test_impact_is_the_size_of_the_gradient_of_the_head(n: int, seed: int) -> None:
    f, w = scores(2 * n, 4, seed), scores(3, 4, seed + 1)
    y = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed)).repeat(2)
    fast = impact(lambda x: x, lambda x: x @ w.T, {"x": f[None], "y": y[None]})[0]
    expected = slow.impact(f[:n].tolist(), (f[:n] @ w.T).tolist(), y[:n].tolist())
    torch.testing.assert_close(fast, torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("runs", [1, 3])
def test_the_parts_of_a_net_one_step_ahead_are_those_of_the_whole(runs: int) -> None:
    torch.manual_seed(0)
    lifted = Lift([Classifier(MLP(3, (4,)), 2) for _ in range(runs)])
    x, before = torch.randn(runs, 5, 3), copy.deepcopy(lifted.state_dict())
    coming = gradient(lifted(x).square().mean((1, 2)), lifted)
    encode, head = (ahead(lifted, coming, 0.5, part) for part in ("encoder", "head"))
    torch.testing.assert_close(head(encode(x)), ahead(lifted, coming, 0.5)(x))
    assert not torch.allclose(head(encode(x)), lifted(x))
    assert all(torch.equal(value, before[name]) for name, value in lifted.state_dict().items())


def plain_dual(net: nn.Module, x: Tensor, other: Tensor, y: Tensor, weight: float) -> Tensor:
    """The loss of DVC on one run, in plain torch."""
    z, n = net(torch.cat([x, other])), len(x)
    joint = net.joint(torch.cat([z[:n], z[n:]], 1)).softmax(1)
    cross = -z.log_softmax(1)[torch.arange(2 * n), torch.cat([y, y])].mean()
    shares = z.softmax(1)
    means = [shares[:n].mean(0), shares[n:].mean(0), joint.mean(0)]
    entropy = sum(-(mean * mean.log()).sum() for mean in means) / 3
    return cross - entropy + weight * (shares - torch.cat([joint, joint])).abs().mean()


def test_a_trace_of_dvc_equals_the_method_written_out() -> None:
    """Losses of eight steps and the weights after them, the virtual step made by a copy of the net."""
    made, twin = toy("dvc", (3,)), toy("dvc", (3,))
    net, strategy = copy.deepcopy(twin.strategy.net.net), twin.strategy
    for step in range(8):
        new = made.stream.batch(step)
        changed = strategy.env.augment(new)["x"][0]
        expected = plain_dual(net, new["x"][0], changed, new["y"][0], 4.0)
        if step:
            net.zero_grad()
            expected.backward(retain_graph=True)
            virtual = copy.deepcopy(net)
            with torch.no_grad():
                for parameter, own in zip(virtual.parameters(), net.parameters(), strict=True):
                    parameter -= 0.1 * own.grad
            drawn = strategy.memory.sample(50)
            other, y = strategy.env.augment(drawn)["x"][0], drawn["y"][0]
            sums = []
            for one in (net, virtual):
                features = one.encoder(torch.cat([drawn["x"][0], other]))[: len(y)]
                sums.append(torch.tensor(slow.impact(features.tolist(), one.head(features).tolist(), y.tolist())))
            best = (sums[1] - sums[0]).topk(10).indices
            expected = expected + plain_dual(net, drawn["x"][0, best], other[best], y[best], 4.0)
        make_step(net, expected, 0.1)
        strategy.memory.add(new)
        loss = made.strategy.observe(new)["loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"step {step}"
    assert_same_weights(made, net)


def test_dvc_cannot_recall_more_than_it_draws() -> None:
    with pytest.raises(BadConfig):
        DVCConfig(replay=60)


def similarities(n: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Similarities of n rows and their other views, whose labels come twice."""
    y = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    return scores(2 * n, 2 * n, seed) / 5, torch.cat([y, y])


@given(n=integers(1, 4), classes=integers(1, 4), itself=booleans(), seed=seeds)
def test_label_contrast_equals_the_double_loop(n: int, classes: int, itself: bool, seed: int) -> None:
    similarity, y = similarities(n, classes, seed)
    expected = slow.label_contrast(similarity.tolist(), y.tolist(), 0.07, itself)
    assert losses.label_contrast(similarity, y, 0.07, itself).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(n=integers(1, 4), classes=integers(1, 4), seed=seeds)
def test_pair_contrast_equals_the_double_loop(n: int, classes: int, seed: int) -> None:
    similarity, y = similarities(n, classes, seed)
    expected = slow.pair_contrast(similarity.tolist(), y.tolist(), 0.07)
    assert losses.pair_contrast(similarity, y, 0.07).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_gradients_of_the_contrasts_of_similarities_are_those_of_their_values() -> None:
    similarity, y = similarities(3, 2, 1)
    similarity.requires_grad_()
    for itself in (True, False):
        assert torch.autograd.gradcheck(lambda s, own=itself: losses.label_contrast(s, y, 0.5, own), (similarity,))
    assert torch.autograd.gradcheck(lambda s: losses.pair_contrast(s, y, 0.5), (similarity,))


def test_equal_similarities_cost_the_logarithm_of_the_columns() -> None:
    """Of 8 rows with labels of 4 each: log 8 with the row itself; without, 3 of the 4 averaged over cost log 7."""
    similarity, y = torch.ones(8, 8, dtype=F64), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    assert losses.label_contrast(similarity, y, 0.07).item() == pytest.approx(math.log(8))
    assert losses.label_contrast(similarity, y, 0.07, itself=False).item() == pytest.approx(math.log(7) * 3 / 4)
    assert losses.pair_contrast(similarity, y, 0.07).item() == pytest.approx(math.log(7) * 5 / 2)


def test_lifted_contrasts_of_similarities_equal_the_runs_alone_and_never_read_the_host() -> None:
    made = [similarities(3, 2, seed) for seed in range(3)]
    stacked = [torch.stack(parts) for parts in zip(*made, strict=True)]
    for loss in (losses.label_contrast, losses.pair_contrast):
        with NoHostReads():
            together = per_run(loss)(*stacked, tau=0.5)
        torch.testing.assert_close(together, torch.stack([loss(*one, tau=0.5) for one in made]))


@pytest.mark.parametrize("size", [4, 5])
def test_an_image_is_turned_into_sixteen_as_written_out_pixel_by_pixel(size: int) -> None:
    x = torch.arange(2 * 2 * 3 * size * size).view(2, 2, 3, size, size)
    made = turned({"x": x, "y": torch.tensor([[0, 1], [2, 0]])}, classes=10)
    assert made["x"].shape == (2, 32, 3, size, size)
    halves = [(False, False), (True, False), (True, True), (False, True)]
    for number in range(16):
        places = [
            slow.turned_pixel(size, row, column, *halves[number % 4], number // 4)
            for row in range(size)
            for column in range(size)
        ]
        rows, columns = (torch.tensor(part).view(size, size) for part in zip(*places, strict=True))
        assert torch.equal(made["x"][:, 2 * number : 2 * number + 2], x[..., rows, columns])
        expected = torch.tensor([[0, 1], [2, 0]]) + 10 * number
        assert torch.equal(made["y"][:, 2 * number : 2 * number + 2], expected)
    one = made["x"][0, ::2].flatten(1)
    assert len({tuple(row) for row in one.tolist()}) == 16


def test_the_gap_to_the_previous_net_counts_known_classes_only() -> None:
    now, then = torch.zeros(2, 3, 4), torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(2, 3, 4)
    known = torch.tensor([[True, True, False, False], [False, False, False, True]])
    assert gap(now, then, known).tolist() == [2.5, 16.0]


SMALL_OCM = {"strategy": {"replay": 12, "width": 16, "lr": 0.01, "similarity": 0.5, "decay": 0.01}}


def plain_pairs(u: Tensor, z: Tensor, start: int) -> Tensor:
    return u @ u.T + u @ z[:, start : start + u.shape[1]].T


def test_a_trace_of_ocm_over_the_boundary_equals_the_method_written_out() -> None:
    """Losses of five steps and the weights after them, in the first task and in the second, the draws being those of a twin."""
    made, twin = toy("ocm", (3,), SMALL_OCM), toy("ocm", (3,), SMALL_OCM)
    net, strategy = copy.deepcopy(twin.strategy.net.net), twin.strategy
    adam = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.01)
    previous = copy.deepcopy(net)

    def views(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        whole = turned(batch, 4)
        return whole["x"][0], torch.cat([whole["x"], strategy.env.augment(whole)["x"]], 1)[0], whole["y"][0]

    def project(one: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        features = one.encoder(x)
        return nn.functional.normalize(one.projection(features)), nn.functional.normalize(features)

    for number, step in enumerate([0, 1, 20, 21, 22]):
        new = made.stream.batch(step)
        if step < 20:
            _, x, labels = views(new)
            u, z = project(net, x)
            similarity = plain_pairs(u, z, int(strategy.rng.below(16, 1)))
            expected = losses.pair_contrast(similarity, torch.cat([labels, labels]), 0.07)
            logits = net(strategy.env.augment(new)["x"][0])
            expected = expected + nn.functional.cross_entropy(logits, new["y"][0])
        else:
            old = strategy.memory.sample(12)
            (_, x, labels), (bare, x_m, labels_m) = views(new), views(old)
            u, z = project(net, torch.cat([x, x_m]))
            size = len(x)
            first = 0.5 * plain_pairs(u[:size], z[:size], int(strategy.rng.below(16, 1)))
            second = 0.5 * plain_pairs(u[size:], z[size:], int(strategy.rng.below(16, 1)))
            past = project(previous, bare)[0].detach()
            expected = losses.pair_contrast(first, torch.cat([labels, labels]), 0.07)
            expected = expected + losses.label_contrast(second, torch.cat([labels_m, labels_m]), 0.07)
            expected = expected + losses.label_contrast(u[size : size + len(bare)] @ past.T, labels_m, 0.07)
            logits = net(strategy.env.augment(old)["x"][0])
            expected = expected + nn.functional.cross_entropy(logits, old["y"][0])
            taught = previous(strategy.env.augment(old)["x"][0]).detach()
            expected = expected + nn.functional.mse_loss(logits[:, :2], taught[:, :2])
        adam.zero_grad()
        expected.backward()
        adam.step()
        strategy.memory.add(new)
        loss = made.strategy.observe(new)["loss"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5), f"step {step}"
        if number == 1:
            previous = copy.deepcopy(net)
            made.strategy.boundary()
    assert made.strategy.taught.tolist() == [[True, True, False, False]]
    assert_same_weights(made, net)


def test_the_previous_net_of_ocm_changes_at_boundaries_only() -> None:
    made = toy("ocm", (0, 1), SMALL_OCM)
    before = [value.clone() for value in made.strategy.previous.parameters()]
    testing.train(made, 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, made.strategy.previous.parameters(), strict=True))
    made.strategy.boundary()
    after = zip(made.strategy.net.parameters(), made.strategy.previous.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in after)


def test_ocm_refuses_what_it_cannot_learn_from_in_one_line() -> None:
    for settings in (
        {"stream": {"announces": False}, **SMALL_OCM},
        {"strategy": {"width": 33}},
    ):
        with pytest.raises(BadConfig):
            toy("ocm", (0,), settings)
    with pytest.raises(BadConfig):
        OCMConfig(review="each")
