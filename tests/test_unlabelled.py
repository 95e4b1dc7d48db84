"""Streams without labels, and what a few labelled samples read out of embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import references_beclr_stream as references
import torch
from hypothesis import given
from hypothesis.strategies import integers, lists
from torch import Tensor
from torch.testing import assert_close

from cl_sim import engine, measure, session
from cl_sim.config import from_dict, merge
from cl_sim.engine import Plan
from cl_sim.errors import BadConfig
from cl_sim.metrics import clustering, fewshot, probe
from cl_sim.stream import Stream
from cl_sim.testing import Toy, toy, train
from cl_sim.tracking import plots
from streams.unlabelled import Unlabelled, UnlabelledConfig, ranks

F64 = torch.float64
CPU = torch.device("cpu")
seeds = integers(0, 10**6)
SYNTHETIC = ("classes=4", "tasks=2", "order=fixed", "noise=0.1")


def unlabelled(which: tuple[int, ...] = (0,), **own: Any) -> Unlabelled:
    settings = {"of": "synthetic", "settings": SYNTHETIC, "supports": 5, **own}
    return Unlabelled(UnlabelledConfig(**settings), which, CPU)


def made(which: tuple[int, ...] = (0,), strategy: dict[str, Any] | None = None) -> Toy:
    small = {"capacity": 80, "replay": 10, "clusters": 8, "hidden": 32, "width": 16, "lr": 0.05}
    stream = {"name": "unlabelled", "of": "synthetic", "settings": list(SYNTHETIC), "supports": 5}
    return toy("beclr", which, {"strategy": merge(small, strategy or {}), "stream": stream, "augment": ["jitter:1"]})


def random_rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# --- the stream ---------------------------------------------------------------------------------------------------------


def test_batches_are_those_of_the_other_stream_without_their_labels() -> None:
    stream = unlabelled((0, 1))
    assert stream.task == "embed"
    assert set(stream.fields) == {"x", "index"}
    for step in (0, 7, len(stream) - 1):
        batch, plain = stream.batch(step), stream.inner.batch(step)
        assert set(batch) == {"x", "index"}
        assert torch.equal(batch["x"], plain["x"])
        labels = stream.labels_of(batch)
        assert labels is not None
        assert torch.equal(labels, plain["y"])


def test_sample_numbers_say_nothing_about_classes() -> None:
    """In the set, rows are sorted by class; the numbers handed out are not."""
    stream = unlabelled()
    numbers = torch.cat([stream.batch(step)["index"][0] for step in range(len(stream))])
    labels = torch.cat([stream.inner.batch(step)["y"][0] for step in range(len(stream))])
    assert sorted(numbers.tolist()) == list(range(400))
    correlation = float(torch.corrcoef(torch.stack([numbers.double(), labels.double()]))[0, 1])
    assert abs(correlation) < 0.2  # four standard deviations


def test_supports_and_queries_are_disjoint_balanced_and_fixed() -> None:
    stream = unlabelled((0, 1), queries=9, few=3)
    for full, asked in ((True, 9), (False, 3)):
        chunks = list(stream.holdout().chunks(0, full))
        y, known = (torch.cat([chunk[name] for chunk in chunks], 1) for name in ("y", "support"))
        for c in range(4):
            assert int(((y[0] == c) & known[0]).sum()) == 5
            assert int(((y[0] == c) & ~known[0]).sum()) == asked
        assert torch.equal(known[0], known[1])
        again = torch.cat([chunk["x"] for chunk in stream.holdout().chunks(39, full)], 1)
        assert torch.equal(again, torch.cat([chunk["x"] for chunk in chunks], 1))


@given(y=lists(integers(0, 3), min_size=1, max_size=12), seed=seeds)
def test_ranks_count_every_class_of_every_split_from_zero(y: list[int], seed: int) -> None:
    labels, split = np.array(y), np.random.default_rng(seed).integers(0, 2, len(y))
    found = ranks(labels, split)
    for c in range(4):
        for s in range(2):
            own = found[(labels == c) & (split == s)]
            assert sorted(own.tolist()) == list(range(len(own)))


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"of": "few_labels-split-digits", "settings": ()}, "classification stream with labels"),
        ({"supports": 20}, "only 20 samples"),
        ({"episodes": 10}, "5 classes of 20 samples are needed, but only 4"),
        ({"of": "sequences-made-up", "settings": ("batch=16", "segments=2")}, "classification stream"),
    ],
)
def test_streams_that_cannot_be_read_out_are_refused(own: dict[str, Any], word: str) -> None:
    with pytest.raises(BadConfig, match=word):
        unlabelled(**own)


def test_strategies_that_need_labels_are_refused() -> None:
    settings = {"strategy": {"name": "er"}, "stream": {"name": "unlabelled"}, "encoder": {"name": "mlp"}}
    with pytest.raises(BadConfig, match="asks to embed"):
        session.build_stream(from_dict(settings), (0,))


# --- the read-outs ------------------------------------------------------------------------------------------------------


@given(n=integers(1, 9), k=integers(1, 5), seed=seeds)
def test_nearest_neighbours_equal_the_loop(n: int, k: int, seed: int) -> None:
    support, query = random_rows(n, 4, seed=seed), random_rows(3, 4, seed=seed + 1)
    labels = torch.arange(n) % 3
    fast = probe.nearest_neighbours(support, labels, query, 3, k, 0.2)
    slow = [references.votes(support.tolist(), labels.tolist(), row, 3, k, 0.2) for row in query.tolist()]
    assert_close(fast, torch.tensor(slow, dtype=F64))


@given(seed=seeds)
def test_ridge_is_where_the_gradient_of_its_objective_vanishes(seed: int) -> None:
    support, labels = random_rows(8, 4, seed=seed), torch.arange(8) % 3
    ends = torch.cat([torch.zeros(1, 4, dtype=F64), torch.eye(4, dtype=F64)])
    scores = probe.ridge(support, labels, ends, 3)
    bias = scores[0].clone().requires_grad_()
    weight = (scores[1:] - scores[0]).clone().requires_grad_()
    centred = support - support.mean(0)
    penalty = 0.1 * centred.square().sum() / 4
    target = torch.nn.functional.one_hot(labels, 3).double()
    loss = (support @ weight + bias - target).square().sum() + penalty * weight.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert bias.grad is not None
    assert weight.grad is not None
    assert_close(bias.grad, torch.zeros_like(bias), atol=1e-8, rtol=0)
    assert_close(weight.grad, torch.zeros_like(weight), atol=1e-8, rtol=0)


def test_nearest_mean_never_answers_a_class_without_supports() -> None:
    support, labels = torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 0, 2])
    scores = probe.nearest_mean(support, labels, torch.tensor([[1.0, 1.0]]), 3)
    assert scores.tolist() == [[-1.0, -torch.inf, -65.0]]


def test_read_outs_know_separated_classes_and_guess_on_noise() -> None:
    y = torch.arange(400) % 4
    known = torch.arange(400) < 200
    corner = torch.eye(4, 6, dtype=F64)
    for rows, low, high in (
        (corner[y] + 0.1 * random_rows(400, 6, seed=1), 0.99, 1),
        (random_rows(400, 6, seed=2), 0.1, 0.4),
    ):
        for hits in probe.accuracies(rows, y, known).values():
            assert low <= float(hits.double().mean()) <= high


def test_the_probe_measures_each_split_and_starts_afresh() -> None:
    y = torch.tensor([[0, 1, 0, 1, 0, 1]])
    x = torch.tensor([[[3.0, 0, 0], [0, 3, 0], [3, 0, 1], [0, 3, 1], [0, 3, 0], [3, 0, 0]]])
    batch = {"y": y, "split": torch.tensor([[0, 0, 0, 0, 2, 2]]), "support": torch.tensor([[True, True] + [False] * 4])}
    metric = probe.Probe(1, 3)
    for part in (slice(0, 3), slice(3, 6)):
        metric.update(x[:, part], {name: value[:, part] for name, value in batch.items()})
    for value in metric.result().values():
        assert_close(value, torch.tensor([[1.0, torch.nan, 0.0]], dtype=F64), equal_nan=True)
    assert all(bool(value.isnan().all()) for value in metric.result().values())


@given(rows=lists(lists(integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=12))
def test_cluster_metrics_equal_their_definitions(rows: list[list[int]]) -> None:
    clusters, labels = ([row[i] for row in rows] for i in range(2))
    counts = clustering.table(torch.tensor(clusters), torch.tensor(labels), 4, 4)
    assert float(clustering.purity(counts)) == pytest.approx(references.purity(clusters, labels))
    assert float(clustering.entropy(counts.sum(0))) == pytest.approx(references.entropy(labels), abs=1e-12)
    expected = references.mutual_information(clusters, labels)
    assert float(clustering.mutual_information(counts)) == pytest.approx(expected, abs=1e-9)


def test_numbers_outside_the_table_are_left_out() -> None:
    counts = clustering.table(torch.tensor([0, -1, 0, 5]), torch.tensor([1, 1, -1, 1]), 2, 3)
    assert counts.tolist() == [[0, 1, 0], [0, 0, 0]]


# --- both in the engine -------------------------------------------------------------------------------------------------


def test_what_cannot_be_tested_before_it_is_learned_is_not() -> None:
    plan = Plan.of(unlabelled(), per_task=2, prequential=1, flush_every=5, save_every=5)
    assert not any(plan.tests(step) for step in range(plan.steps))
    assert measure.of("embed").test is None


def test_embeddings_of_a_toy_stream_are_read_out_well() -> None:
    one = made((0, 1))
    train(one, 0, len(one.stream))
    holdout = one.stream.holdout()
    assert holdout is not None
    found = engine.evaluate_all(one.strategy, holdout, len(one.stream), full=True)
    assert set(found) == {"linear", "knn", "ncm"}
    assert all((value >= 0.9).all() for value in found.values())


def test_a_run_has_the_same_numbers_alone_and_stacked_where_the_stream_leaves_samples_out() -> None:
    inner = ("classes=4", "tasks=1", "per_class=23", "batch=50")  # 50 of 92 samples come, others in each run
    alone = {seed: unlabelled((seed,), settings=inner) for seed in range(6)}
    stacked = unlabelled(tuple(range(6)), settings=inner)
    assert len({one.number.shape[1] for one in alone.values()}) > 1
    for seed, one in alone.items():
        for step in range(len(one)):
            batch, together = one.batch(step), stacked.batch(step)
            assert torch.equal(batch["index"][0], together["index"][seed])
            mine, theirs = one.labels_of(batch), stacked.labels_of(together)
            assert mine is not None
            assert theirs is not None
            assert torch.equal(mine[0], theirs[seed])


def test_no_label_reaches_the_state() -> None:
    """The same samples with other labels in the other stream: every weight and row is the same."""
    one, other = made(), made()
    stream: Stream = other.stream
    assert isinstance(stream, Unlabelled)
    inner: Any = stream.inner
    inner.labels = torch.randint(0, 4, inner.labels.shape, generator=torch.Generator().manual_seed(0))
    for step in range(25):
        one.strategy.observe(one.stream.batch(step))
        other.strategy.observe(other.stream.batch(step))
    state = other.strategy.state_dict()
    for key, value in one.strategy.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, state[key]), key
    assert not any("row_y" in key for key in state)


def test_episodes_of_all_classes_are_asked_in_large_evaluations_alone() -> None:
    six = ["classes=6", "tasks=3", "order=fixed", "noise=0.1"]
    stream = {"name": "unlabelled", "of": "synthetic", "settings": six, "supports": 5, "episodes": 30}
    one = toy("beclr", (0, 1), {"strategy": {"capacity": 80, "clusters": 8}, "stream": stream})
    holdout = one.stream.holdout()
    assert holdout is not None
    assert set(engine.evaluate_all(one.strategy, holdout, 5, full=False)) == {"linear", "knn", "ncm"}
    found = engine.evaluate_all(one.strategy, holdout, 5, full=True)
    assert set(found) == {"linear", "knn", "ncm", *fewshot.NAMES}
    chunks = list(holdout.chunks(5, full=True))
    one.strategy.eval()
    with torch.inference_mode():
        rows = torch.cat([one.strategy.predict(chunk)[1] for chunk in chunks]).double()
    y = torch.cat([chunk["y"][1] for chunk in chunks]).numpy()
    episodes = fewshot.draw(y, fewshot.Task(shots=5), 30, 42)
    expected = fewshot.episode_accuracy(rows, episodes, "nearest_mean", transport=True).mean()
    assert found["shot5_opta"][1].tolist() == pytest.approx([float(expected)] * 3)
    assert 0.2 < float(expected) <= 1


def test_the_health_of_clusters_is_measured_with_labels_that_only_the_stream_knows() -> None:
    from sklearn.metrics import davies_bouldin_score

    one = made((0, 1))
    train(one, 0, 20)
    memory: Any = one.strategy.memory
    rows = engine.known_rows(one.stream, memory.rows())
    assert torch.equal(rows["y"], one.stream.labels_of(memory.rows()))  # type: ignore[attr-defined]
    health = engine.cluster_health(rows, memory.prototypes, one.stream.classes)
    assert health["sizes"].sum(1).tolist() == [80, 80]
    clusters, labels = (rows[name][1].tolist() for name in ("cluster", "y"))
    assert health["cluster_purity"][1] == pytest.approx(references.purity(clusters, labels))
    assert health["memory_entropy"][1] == pytest.approx(references.entropy(labels) / np.log(4))
    expected = davies_bouldin_score(rows["z"][1].double().numpy(), clusters)
    assert health["davies_bouldin"][1] == pytest.approx(expected, abs=1e-9)
    z, prototypes, right, asked = rows["z"][1].tolist(), memory.prototypes[1].tolist(), 0, 0
    for anchor, row in enumerate(z):
        group = references.nearest(row, prototypes)
        inside = [m for m in range(80) if clusters[m] == group and m != anchor]
        searched = inside if len(inside) >= 5 else [m for m in range(80) if m != anchor]
        best = sorted(searched, key=lambda m: -references.cosine(z[m], row))[:5]
        right, asked = right + sum(labels[m] == labels[anchor] for m in best), asked + 5
    assert health["neighbour_precision"][1] == pytest.approx(right / asked)
    assert 0.3 < right / asked < 1


def test_davies_bouldin_leaves_out_what_has_no_cluster() -> None:
    rows = torch.tensor([[0.0, 1.0], [0.0, -1.0], [4.0, 0.0], [6.0, 0.0], [5.0, 9.0], [7.0, 7.0]])
    clusters = torch.tensor([0, 0, 2, 2, 4, -1])  # means (0, 0), (5, 0), (5, 9), widths 1, 1, 0
    expected = (2 / 5 + 2 / 5 + 1 / 9) / 3
    assert float(clustering.davies_bouldin(rows, clusters, 5)) == pytest.approx(expected)
    assert float(clustering.davies_bouldin(rows, torch.zeros(6, dtype=torch.int64), 5)) == 0
    assert float(clustering.davies_bouldin(rows, torch.full((6,), -1), 5)) == 0


def test_every_measure_has_words_for_its_pictures() -> None:
    assert {one.name for one in measure.MEASURES.values()} <= plots.WORDS.keys()


def test_vote_needs_labels() -> None:
    with pytest.raises(BadConfig, match="no labels to vote with"):
        made(strategy={"readout": "vote"})
