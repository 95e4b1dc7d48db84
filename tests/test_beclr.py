"""BECLR: the clustered memory, its losses and the few-shot read-outs, against slow twins and the properties they promise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import references_beclr as references
import torch
from hypothesis import given, settings
from hypothesis.strategies import floats, integers
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from cl_sim import losses
from cl_sim.errors import BadConfig
from cl_sim.masking import block_mask, erase_patches
from cl_sim.memory.clusters import balanced_assignment, cluster_means, memory_rows, nearest_in_cluster
from cl_sim.metrics.fewshot import (
    Episodes,
    Task,
    adapted,
    answers,
    draw,
    episode_accuracy,
    interval,
    logistic,
    opta,
    standardise,
)
from cl_sim.rng import Rng
from cl_sim.runs import per_run
from cl_sim.schedules import cosine_value
from cl_sim.testing import NoHostReads

F64 = torch.float64
seeds = integers(0, 10**6)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def labels(n: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def number(value: float | list[list[float]]) -> Tensor:
    return torch.tensor(value, dtype=F64)


def cosines(z: Tensor, prototypes: Tensor) -> Tensor:
    return normalize(z, dim=-1) @ normalize(prototypes, dim=-1).T


# balanced assignment


@given(n=integers(1, 9), clusters=integers(1, 5), eps=floats(0.02, 2), iterations=integers(1, 12), seed=seeds)
def test_balanced_assignment_equals_dividing_by_turns(
    n: int, clusters: int, eps: float, iterations: int, seed: int
) -> None:
    scores, share = (
        cosines(rows(n, 4, seed=seed), rows(clusters, 4, seed=seed + 1)),
        rows(clusters, seed=seed).softmax(0),
    )
    for masses in (None, share):
        slow = references.sinkhorn(
            scores.tolist(), eps, iterations, [1 / clusters] * clusters if masses is None else masses.tolist()
        )
        assert_close(balanced_assignment(scores, eps, iterations, masses), number(slow), rtol=1e-9, atol=1e-12)


@given(n=integers(2, 30), clusters=integers(1, 6), seed=seeds)
def test_every_sample_is_given_away_whole_and_every_prototype_gets_its_share(n: int, clusters: int, seed: int) -> None:
    scores, share = rows(n, clusters, seed=seed), rows(clusters, seed=seed + 1).softmax(0)
    q = balanced_assignment(scores, 1.0, 200, share)
    assert_close(q.sum(1), torch.ones(n, dtype=F64))
    assert_close(q.sum(0), n * share, rtol=1e-3, atol=1e-3)


def test_fifty_iterations_bring_equal_parts_to_a_thousandth() -> None:
    scores = cosines(rows(400, 32), rows(10, 32, seed=1))
    q = balanced_assignment(scores, 0.05, 50)
    assert float((q.sum(0) / 40 - 1).abs().max()) < 1e-3


@given(n=integers(1, 9), clusters=integers(2, 5), shift=floats(-50, 50), seed=seeds)
def test_an_assignment_ignores_constants_and_follows_permutations(
    n: int, clusters: int, shift: float, seed: int
) -> None:
    scores = rows(n, clusters, seed=seed)
    q = balanced_assignment(scores, 0.5, 5)
    assert_close(balanced_assignment(scores + shift, 0.5, 5), q)
    order = torch.randperm(clusters, generator=torch.Generator().manual_seed(seed))
    assert_close(balanced_assignment(scores[:, order], 0.5, 5), q[:, order])
    turned = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert_close(balanced_assignment(scores[turned], 0.5, 5), q[turned])


def near_prototypes(each: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    prototypes = normalize(rows(clusters, 16, seed=2), dim=-1)
    owner = torch.arange(clusters).repeat_interleave(each)
    return prototypes[owner] + 0.05 * rows(each * clusters, 16, seed=3), prototypes, owner


def test_samples_drawn_near_prototypes_go_to_them_and_the_wrong_sign_is_noticed() -> None:
    z, prototypes, owner = near_prototypes(10, 8)
    scores = cosines(z, prototypes)
    assert torch.equal(balanced_assignment(scores, 0.05, 10).argmax(1), owner)
    assert float((balanced_assignment(-scores, 0.05, 10).argmax(1) == owner).double().mean()) < 0.05


def test_an_assignment_worked_by_hand() -> None:
    """Both samples prefer prototype 0; balance sends the one that loses less to prototype 1.

    K = [[8, 1], [2, 1]]: in the limit q = [[a, 1-a], [1-a, a]] with (a / (1-a))^2 = 8 * 1 / (1 * 2) = 4, so a = 2/3.
    """
    scores = torch.tensor([[8.0, 1.0], [2.0, 1.0]], dtype=F64).log()
    assert_close(balanced_assignment(scores, 1.0, 60), number([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))


@given(n=integers(2, 7), clusters=integers(2, 4), seed=seeds)
def test_samples_without_scores_and_prototypes_without_share_take_no_part(n: int, clusters: int, seed: int) -> None:
    scores = rows(n, clusters, seed=seed)
    padded = torch.cat([scores, torch.full((3, clusters), -torch.inf, dtype=F64)])
    q = balanced_assignment(padded, 0.3, 7)
    assert_close(q[:n], balanced_assignment(scores, 0.3, 7))
    assert torch.equal(q[n:], torch.zeros(3, clusters, dtype=F64))
    share = torch.tensor([1 / clusters] * clusters + [0.0], dtype=F64)
    wider = torch.cat([scores, rows(n, 1, seed=seed + 1)], 1)
    assert_close(balanced_assignment(wider, 0.3, 7, share)[:, :clusters], balanced_assignment(scores, 0.3, 7))


def test_a_tiny_eps_overflows_nowhere() -> None:
    q = balanced_assignment(cosines(rows(40, 8), rows(5, 8, seed=1)).float(), 1e-5, 10)
    assert bool(q.isfinite().all())
    assert_close(q.sum(1), torch.ones(40))


# cluster means


@given(m=integers(1, 12), clusters=integers(1, 5), gamma=floats(0, 1), seed=seeds)
def test_cluster_means_equal_the_loop(m: int, clusters: int, gamma: float, seed: int) -> None:
    stored, of, old = rows(m, 3, seed=seed), labels(m, clusters + 1, seed) - 1, rows(clusters, 3, seed=seed + 1)
    slow = references.cluster_means(stored.tolist(), of.tolist(), old.tolist(), gamma)
    assert_close(cluster_means(stored, of, old, gamma), number(slow))


def test_an_emptied_cluster_keeps_its_prototype_and_changes_no_other() -> None:
    stored, old = rows(9, 3), rows(4, 3, seed=1)
    of = torch.tensor([0, 0, 2, 2, 2, 3, 3, 3, 3])
    moved = cluster_means(stored, of, old, 0.5)
    assert torch.equal(moved[1], old[1])
    for c in (0, 2, 3):
        assert_close(moved[c], 0.5 * old[c] + 0.5 * stored[of == c].mean(0))


@given(m=integers(1, 12), scale=floats(0.01, 100), seed=seeds)
def test_momentum_one_freezes_and_the_scale_of_rows_assigns_alike(m: int, scale: float, seed: int) -> None:
    stored, of, old = rows(m, 3, seed=seed), labels(m, 4, seed), rows(4, 3, seed=seed + 1)
    assert_close(cluster_means(stored, of, old, 1.0), old)
    plain, scaled = cluster_means(stored, of, old, 0.0), cluster_means(scale * stored, of, old, 0.0)
    assert torch.equal(cosines(stored, plain).argmax(1), cosines(stored, scaled).argmax(1))


# nearest rows of a cluster


@given(n=integers(1, 5), m=integers(3, 14), clusters=integers(1, 4), k=integers(1, 3), seed=seeds)
def test_nearest_in_cluster_equals_the_loop(n: int, m: int, clusters: int, k: int, seed: int) -> None:
    z, stored, prototypes = rows(n, 4, seed=seed), rows(m, 4, seed=seed + 1), rows(clusters, 4, seed=seed + 2)
    of, allowed = labels(m, clusters, seed), rows(n, m, seed=seed + 3) > -0.8
    index, similarity = nearest_in_cluster(z, stored, of, prototypes, k, allowed)
    slow = references.nearest_in_cluster(
        z.tolist(), stored.tolist(), of.tolist(), prototypes.tolist(), k, allowed.tolist()
    )
    for i, expected in enumerate(slow):
        assert index[i, : len(expected)].tolist() == expected
        for j, row in enumerate(expected):
            assert similarity[i, j].item() == pytest.approx(references.cosine(z[i].tolist(), stored[row].tolist()))
        assert bool((similarity[i, len(expected) :] == -torch.inf).all())


def test_all_rows_come_from_the_anchors_cluster_and_other_clusters_change_nothing() -> None:
    z, prototypes, owner = near_prototypes(10, 6)
    anchors = prototypes + 0.01
    index, _ = nearest_in_cluster(anchors, z, owner, prototypes, 4)
    assert bool((owner[index] == torch.arange(6)[:, None]).all())
    changed = z.clone()
    changed[owner != 2] = rows(50, 16, seed=9)
    assert torch.equal(nearest_in_cluster(anchors, changed, owner, prototypes, 4)[0][2], index[2])


@given(m=integers(4, 12), seed=seeds)
def test_nearest_rows_follow_a_permutation_of_the_memory(m: int, seed: int) -> None:
    z, stored, prototypes, of = (
        rows(3, 4, seed=seed),
        rows(m, 4, seed=seed + 1),
        rows(2, 4, seed=seed + 2),
        labels(m, 2, seed),
    )
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    index, similarity = nearest_in_cluster(z, stored, of, prototypes, 2)
    again, alike = nearest_in_cluster(z, stored[order], of[order], prototypes, 2)
    assert torch.equal(order[again], index)
    assert_close(alike, similarity)


def test_a_small_cluster_opens_the_whole_memory() -> None:
    stored = torch.eye(4, dtype=F64) + 0.1
    prototypes, of = stored[[0, 2]], torch.tensor([0, 1, 1, 1])
    anchor = torch.tensor([[1.0, 0.6, 0.3, 0.0]], dtype=F64)
    assert nearest_in_cluster(anchor, stored, of, prototypes, 1)[0].tolist() == [[0]]
    assert nearest_in_cluster(anchor, stored, of, prototypes, 2)[0].tolist() == [[0, 1]]
    blocked = torch.tensor([False, True, True, True])
    assert nearest_in_cluster(anchor, stored, of, prototypes, 1, blocked)[0].tolist() == [[1]]


# losses


@given(images=integers(1, 5), k=integers(0, 3), seed=seeds)
def test_alignment_equals_the_definition(images: int, k: int, seed: int) -> None:
    p, z, near = (
        rows(2 * images, 4, seed=seed),
        rows(2 * images, 4, seed=seed + 1),
        rows(2 * images, k, 4, seed=seed + 2),
    )
    weights = (rows(2 * images, k, seed=seed + 3) > 0).double()
    slow = references.alignment(p.tolist(), z.tolist(), near.tolist(), weights.tolist())
    assert_close(losses.alignment(p, z, near, weights), number(slow))
    whole = references.alignment(p.tolist(), z.tolist(), near.tolist(), torch.ones_like(weights).tolist())
    assert_close(losses.alignment(p, z, near), number(whole))
    assert_close(losses.alignment(p, z), losses.alignment(p, z, near, torch.zeros_like(weights)))


@given(images=integers(2, 6), tau=floats(0.1, 3), seed=seeds)
def test_uniformity_equals_the_double_loop_and_ignores_lengths(images: int, tau: float, seed: int) -> None:
    z = rows(2 * images, 4, seed=seed)
    assert_close(losses.uniformity(z, tau), number(references.uniformity(z.tolist(), tau)))
    lengths = rows(2 * images, 1, seed=seed + 1).exp()
    assert_close(losses.uniformity(z * lengths, tau), losses.uniformity(z, tau))


def test_one_image_alone_has_no_negatives() -> None:
    z = rows(2, 4).requires_grad_()
    loss = losses.uniformity(z, 2.0)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@given(images=integers(1, 4), k=integers(1, 3), seed=seeds)
def test_row_pairing_is_the_alignment_of_enlarged_batches(images: int, k: int, seed: int) -> None:
    p, z = rows(2 * images, 4, seed=seed).requires_grad_(), rows(2 * images, 4, seed=seed + 1)
    of_p, of_z = rows(2 * images, k, 4, seed=seed + 2), rows(2 * images, k, 4, seed=seed + 3)
    loss = losses.alignment(losses.enhanced(p, of_p), losses.enhanced(z, of_z))
    slow = references.row_pairing(p.tolist(), z.tolist(), of_p.tolist(), of_z.tolist())
    assert loss.item() == pytest.approx(slow, abs=1e-12)
    (paired,) = torch.autograd.grad(loss, p)
    (plain,) = torch.autograd.grad(losses.alignment(p, z), p)
    assert_close(paired, plain / (1 + k))  # the published form only weakens the gradient


def test_neighbours_turn_the_gradient_of_anchor_pairing() -> None:
    p, z, near = rows(6, 4).requires_grad_(), rows(6, 4, seed=1), rows(6, 2, 4, seed=2)
    (with_them,) = torch.autograd.grad(losses.alignment(p, z, near), p)
    (without,) = torch.autograd.grad(losses.alignment(p, z), p)
    assert float(torch.nn.functional.cosine_similarity(with_them, without, dim=1).max()) < 0.999


def test_no_gradient_enters_targets_or_neighbours() -> None:
    p, z, near = (tensor.requires_grad_() for tensor in (rows(6, 4), rows(6, 4, seed=1), rows(6, 2, 4, seed=2)))
    losses.alignment(p, z, near).backward()
    assert p.grad is not None
    assert z.grad is None
    assert near.grad is None


def test_gradients_of_both_losses_are_those_of_their_values() -> None:
    p, z, near = rows(6, 3).requires_grad_(), rows(6, 3, seed=1), rows(6, 2, 3, seed=2)
    weights = (rows(6, 2, seed=3) > 0).double()
    assert torch.autograd.gradcheck(lambda p: losses.alignment(p, z, near, weights), (p,))
    assert torch.autograd.gradcheck(lambda p: losses.uniformity(p, 0.7), (p,))


# sizes and schedules


def test_the_published_memories_have_their_published_sizes() -> None:
    assert [memory_rows(40, *case) for case in ((200, 256), (500, 512), (1200, 512))] == [8193, 20481, 48129]


@given(steps=integers(1, 10**6), share=floats(0, 1), base=floats(-2, 2), end=floats(-2, 2))
def test_the_cosine_goes_from_base_to_end_through_its_middle(steps: int, share: float, base: float, end: float) -> None:
    step = round(share * steps)
    expected = base + (end - base) * math.sin(math.pi * step / steps / 2) ** 2
    assert cosine_value(step, steps, base, end) == pytest.approx(expected, abs=1e-9)
    assert float(cosine_value(torch.tensor(step), steps, base, end)) == pytest.approx(expected, abs=1e-9)
    assert cosine_value(0, steps, base, end) == pytest.approx(base)
    assert cosine_value(steps, steps, base, end) == pytest.approx(end)


def test_lifted_functions_equal_the_runs_alone_and_never_read_the_host() -> None:
    z, stored, prototypes = rows(3, 6, 4), rows(3, 9, 4, seed=1), rows(3, 3, 4, seed=2)
    of = torch.stack([labels(9, 3, seed) for seed in range(3)])
    calls = {
        "assignment": lambda z, m, p, y: balanced_assignment(z @ p.T, 0.1, 5),
        "means": lambda z, m, p, y: cluster_means(m, y, p, 0.9),
        "nearest": lambda z, m, p, y: nearest_in_cluster(z, m, y, p, 2, m[:, 0] > -1),
        "alignment": lambda z, m, p, y: losses.alignment(z, m[:6], m[:6, None]),
        "uniformity": lambda z, m, p, y: losses.uniformity(z, 2.0),
        "enhanced": lambda z, m, p, y: losses.enhanced(z, m[:6, None]),
    }
    for name, call in calls.items():
        with NoHostReads():
            together = per_run(call)(z, stored, prototypes, of)
        for run in range(3):
            one = call(z[run], stored[run], prototypes[run], of[run])
            assert_close(
                [t[run] for t in together] if name == "nearest" else together[run],
                list(one) if name == "nearest" else one,
            )


# few-shot read-outs


@given(n=integers(1, 5), width=integers(2, 7), seed=seeds)
def test_standardised_rows_equal_the_definition(n: int, width: int, seed: int) -> None:
    x = 3 * rows(n, width, seed=seed) + 5
    assert_close(standardise(x), number([references.standardise(row) for row in x.tolist()]))


def test_a_constant_row_is_standardised_to_zero() -> None:
    assert torch.equal(standardise(torch.ones(2, 5)), torch.zeros(2, 5))


@given(n=integers(1, 4), m=integers(2, 6), passes=integers(1, 3), eps=floats(0.05, 0.5), seed=seeds)
def test_opta_equals_the_two_potentials_in_loops(n: int, m: int, passes: int, eps: float, seed: int) -> None:
    support, query = rows(n, 3, seed=seed), rows(m, 3, seed=seed + 1)
    slow = references.opta(support.tolist(), query.tolist(), eps, passes, 20, 1e-4)
    fast = opta(support, query, eps, passes, 20, 1e-4)
    assert_close(fast, number(slow), rtol=1e-6, atol=1e-8)
    assert_close(opta(support, query, eps, passes, 20, 1e-4, look_every=3), fast)


def test_opta_on_two_points_worked_by_hand() -> None:
    """Prototypes 0 and 1 on queries 0 and 1: the symmetric plan gives the far query exp(-1 / eps) times the near one's mass."""
    points = number([[0.0], [1.0]])
    far = 1 / (1 + math.exp(2))
    assert_close(opta(points, points, eps=0.5), number([[far], [1 - far]]), rtol=1e-6, atol=1e-6)


def test_balance_moves_a_prototype_that_the_nearest_rule_would_starve() -> None:
    """Both queries lie nearer to prototype 1; equal masses send the left one to prototype 0 nevertheless."""
    support, query = number([[-10.0], [0.0]]), number([[-1.0], [1.0]])
    assert_close(opta(support, query, eps=0.01, tolerance=1e-12), query, rtol=1e-3, atol=1e-3)


@settings(max_examples=10)
@given(n=integers(1, 4), m=integers(2, 7), seed=seeds)
def test_moved_prototypes_are_mixtures_in_which_every_query_counts_alike(n: int, m: int, seed: int) -> None:
    support = rows(n, m, seed=seed)
    mixture = opta(support, torch.eye(m, dtype=F64), eps=0.2, tolerance=1e-12)  # queries are the corners of a simplex
    assert bool((mixture >= 0).all())
    assert_close(mixture.sum(1), torch.ones(n, dtype=F64))
    assert_close(mixture.mean(0), torch.full((m,), 1 / m, dtype=F64), rtol=1e-4, atol=1e-6)


@settings(max_examples=5)
@given(seed=seeds)
def test_opta_does_not_depend_on_the_order_of_the_queries(seed: int) -> None:
    support, query = rows(3, 4, seed=seed), rows(8, 4, seed=seed + 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    assert_close(opta(support, query[order]), opta(support, query))


def test_prototypes_that_are_means_of_tight_balanced_classes_stay() -> None:
    means = 5 * torch.eye(4, dtype=F64)
    query = (means[:, None] + 0.05 * rows(4, 15, 4)).flatten(0, 1)
    own = query.view(4, 15, 4).mean(1)
    assert_close(opta(own, query), own, rtol=1e-3, atol=1e-3)
    assert_close(opta(means, means + 0.1), means + 0.1, rtol=1e-3, atol=1e-3)  # one query per class


def test_opta_over_episodes_equals_each_alone_also_under_vmap() -> None:
    support, query = rows(4, 3, 5), rows(4, 9, 5, seed=1)
    alone = torch.stack([opta(s, q, passes=2, iterations=50) for s, q in zip(support, query, strict=True)])
    assert_close(opta(support, query, passes=2, iterations=50), alone)
    with NoHostReads():
        lifted = per_run(opta)(support, query, passes=2, iterations=50)
    assert_close(lifted, alone)


def test_one_shot_takes_five_passes_and_more_shots_a_part_of_one() -> None:
    support, query = rows(3, 5), rows(9, 5, seed=1)
    assert_close(adapted(support, query, 1), opta(support, query, passes=5))
    assert_close(adapted(support, query, 5), 0.7 * opta(support, query) + 0.3 * support)


@given(n=integers(1, 7), classes=integers(2, 4), strength=floats(0.1, 10), scale=floats(0.1, 10), seed=seeds)
def test_logistic_regression_ends_where_its_gradient_is_zero(
    n: int, classes: int, strength: float, scale: float, seed: int
) -> None:
    x, y = scale * rows(n, 3, seed=seed), labels(n, classes, seed)
    every = torch.cat([y, torch.arange(classes)])  # a class without samples has no finite bias
    x = torch.cat([x, scale * rows(classes, 3, seed=seed + 1)])
    weight, bias = logistic(x, every, classes, strength)
    gradient = references.logistic_gradient(weight.tolist(), bias.tolist(), x.tolist(), every.tolist(), strength)
    assert max(abs(v) for row in gradient for v in row) < 1e-6
    assert float(bias.sum().abs()) < 1e-8


def test_logistic_regression_agrees_with_scikit_learn_on_one_example_per_class() -> None:
    from sklearn.linear_model import LogisticRegression

    means = standardise(rows(5, 64))
    theirs = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(means.numpy(), np.arange(5))
    weight, bias = logistic(means.float(), torch.arange(5), 5)
    assert_close(weight.double(), torch.from_numpy(theirs.coef_), rtol=1e-3, atol=1e-4)
    assert_close(bias.double(), torch.from_numpy(theirs.intercept_), rtol=1e-3, atol=1e-4)


def test_logistic_regressions_side_by_side_equal_each_alone() -> None:
    x, y = rows(3, 6, 4), labels(6, 3).expand(3, -1)
    weight, bias = logistic(x, y, 3)
    for one in range(3):
        assert_close((weight[one], bias[one]), logistic(x[one], y[one], 3))
    assert_close(per_run(logistic)(x, y, classes=3), (weight, bias))


def test_episodes_hold_no_row_twice_and_rows_of_their_classes_alone() -> None:
    owner = np.repeat(np.arange(7), 20)
    episodes = draw(owner, Task(ways=4, shots=3, queries=5), 50, seed=1)
    assert episodes.support.shape == (50, 4, 3)
    assert episodes.query.shape == (50, 4, 5)
    for support, query in zip(*episodes, strict=True):
        whole = torch.cat([support, query], 1)
        assert len(set(whole.flatten().tolist())) == 4 * 8
        classes = torch.from_numpy(owner)[whole]
        assert bool((classes == classes[:, :1]).all())
        assert len(set(classes[:, 0].tolist())) == 4


def test_episodes_are_fixed_by_their_seed_and_share_queries_over_shots() -> None:
    owner = np.repeat(np.arange(7), 20)
    one, same, other = (draw(owner, Task(ways=4, shots=5, queries=5), 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.support, same.support)
    assert not torch.equal(one.support, other.support)
    fewer = one.with_shots(1)
    assert torch.equal(fewer.support[..., 0], one.support[..., 0])
    assert torch.equal(fewer.query, one.query)


def worst_z(episodes: Episodes, total: int) -> float:
    """The largest deviation, in standard errors, of how often a row is a query from what all rows should have."""
    count, ways, queries = episodes.query.shape
    drawn = np.bincount(episodes.query.flatten().numpy(), minlength=total) / count
    expected = ways * queries / total
    return float(np.abs(drawn - expected).max() / math.sqrt(expected * (1 - expected) / count))


def test_every_row_is_drawn_equally_often() -> None:
    owner = np.repeat(np.arange(6), 10)
    assert worst_z(draw(owner, Task(ways=3, shots=1, queries=2), 4000, seed=0), 60) < 4.5  # false alarm: 1 in 2400


def test_the_check_of_the_draws_has_teeth() -> None:
    """With the last row of class 0 never drawn, as one too small a bound would do."""
    owner = np.repeat(np.arange(6), 10)
    owner[9] = 99
    assert worst_z(draw(owner, Task(ways=3, shots=1, queries=2), 4000, seed=0), 60) > 6


def test_too_few_classes_or_rows_are_refused() -> None:
    with pytest.raises(BadConfig, match="only 3 classes"):
        draw(np.repeat(np.arange(4), [20, 20, 20, 15]), Task(ways=4, shots=1, queries=15), 1, seed=0)


def classes_in_noise(noise: float, width: int = 16) -> tuple[Tensor, np.ndarray]:
    owner = np.repeat(np.arange(10), 40)
    return rows(10, width, seed=4)[owner] + noise * rows(400, width, seed=5), owner


@pytest.mark.parametrize("readout", ["nearest_mean", "logistic"])
def test_read_outs_are_right_on_clear_classes_and_lost_without_any(readout: str) -> None:
    clear, owner = classes_in_noise(0.05)
    episodes = draw(owner, Task(queries=5), 60, seed=0)
    assert interval(episode_accuracy(clear, episodes, readout)) == (1.0, 0.0)
    mean, half = interval(episode_accuracy(rows(400, 16, seed=6), episodes, readout))
    assert abs(mean - 0.2) < 2.5 * half  # 4.9 standard errors


def test_opta_gains_on_balanced_queries_of_good_features() -> None:
    features, owner = classes_in_noise(1.3)
    episodes = draw(owner, Task(), 60, seed=0)
    plain, moved = (interval(episode_accuracy(features, episodes, transport=t))[0] for t in (False, True))
    assert 0.4 < plain < 0.9
    assert moved > plain + 0.05


@pytest.mark.parametrize("readout", ["nearest_mean", "logistic"])
@pytest.mark.parametrize("transport", [False, True])
def test_accuracy_is_that_of_each_episode_read_out_alone(readout: str, transport: bool) -> None:
    features, owner = classes_in_noise(1.5)
    episodes = draw(owner, Task(ways=3, shots=2, queries=4), 7, seed=0)
    together, z = episode_accuracy(features, episodes, readout, transport), standardise(features)
    for number_of, (support, query) in enumerate(zip(*episodes, strict=True)):
        scores = answers(z[support][None], z[query].flatten(0, 1)[None], readout, transport)[0]
        hits = [int(scores[i].argmax()) == i // 4 for i in range(12)]
        assert together[number_of].item() == pytest.approx(sum(hits) / 12)


def test_the_interval_is_the_published_one() -> None:
    mean, half = interval(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * math.sqrt(0.05) / 2)


# masks


def covered(low: float, high: float, images: int) -> Tensor:
    """How many patches of a 14x14 grid are masked.    Shapes: -> [images]."""
    return block_mask((14, 14), low, high, Rng((3,), "masks"), images)[0].sum((1, 2)).double()


def test_masks_cover_the_share_that_was_measured_for_a_grid_of_14() -> None:
    shares = covered(0.05, 0.25, 20_000) / 196
    inside = ((shares >= 0.05) & (shares <= 0.25)).double().mean()
    assert inside == pytest.approx(0.97, abs=0.01)
    assert (shares == 0).double().mean() == pytest.approx(0.02, abs=0.01)
    assert shares.mean() == pytest.approx(0.142, abs=0.002)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_masks_are_spread_like_those_of_the_loop_and_never_above_their_share(share: float) -> None:
    draw = random.Random(5)
    slow = number([float(sum(map(sum, references.block_mask(14, 14, share, draw)))) for _ in range(3000)])
    fast = covered(share, share, 30_000)
    assert fast.max() <= share * 196
    for one, two in ((slow, fast), (slow.square(), fast.square())):
        error = (one.var() / len(one) + two.var() / len(two)).sqrt()
        assert ((one.mean() - two.mean()) / error).abs() < 4  # false alarm: 1 in 16,000 each


def test_masks_are_each_images_and_each_runs_own() -> None:
    alone, both = Rng((7,), "masks"), Rng((7, 8), "masks")
    one, two = block_mask((8, 8), 0.2, 0.4, alone, 5), block_mask((8, 8), 0.2, 0.4, both, 5)
    assert one.dtype == torch.bool
    assert torch.equal(one[0], two[0])
    assert not torch.equal(two[0], two[1])
    assert not torch.equal(one[0, 0], one[0, 1])
    assert block_mask((6, 9), 0.2, 0.4, both).shape == (2, 6, 9)
    with pytest.raises(BadConfig, match=r"0.4 to 0.2"):
        block_mask((8, 8), 0.4, 0.2, alone)


@given(patch=integers(1, 4), height=integers(1, 4), width=integers(1, 4), seed=seeds)
def test_masked_patches_are_zero_and_the_others_untouched(patch: int, height: int, width: int, seed: int) -> None:
    x = rows(2, 3, height * patch, width * patch, seed=seed)
    mask = torch.rand(2, height, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    out = erase_patches(x, mask, patch)
    for n in range(2):
        for i in range(height * patch):
            for j in range(width * patch):
                expected = torch.zeros(3, dtype=F64) if mask[n, i // patch, j // patch] else x[n, :, i, j]
                assert torch.equal(out[n, :, i, j], expected)
    with pytest.raises(BadConfig, match="must divide the side"):
        erase_patches(x, mask, patch + 1)
