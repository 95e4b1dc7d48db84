"""Pictures of a run: accuracy matrix, anytime curve, classes in the memory; and a stream's class timeline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_sim import store
from cl_sim.metrics import transfer
from cl_sim.report import interval
from cl_sim.tracking import figures, film, groups, journal, views

Floats = NDArray[np.float64]
Journals = list[list[dict[str, Any]]]  # the lines of each group
KEPT = (groups, film, views)  # pictures of what the process that trained has kept beside its journal
LABELLED = 12  # cells per side that still get their number written in
FEW = 20  # classes that still get a colour and a legend entry of their own
WIDTH, HEIGHT = 6.4, 4.0  # inches
WORDS = {
    "acc": "accuracy",
    "hr10": "HR@10",
    "assa": "AssA",
    "linear": "accuracy of a linear read-out",
    "shot5": "5-shot accuracy",
}  # for what the matrix of evaluations holds


def draw_run(run_dir: Path) -> list[Path]:
    """Write a run's pictures and matrices into its `artifacts` folder; returns what was written."""
    record = store.record_of(run_dir)
    folder = run_dir / "artifacts"
    journals = _journals(run_dir)
    evaluations, counts = _evaluations(journals), _memory(journals)
    if not evaluations:
        return []
    folder.mkdir(exist_ok=True)
    measured = _measured(journals)
    seeds = record["seeds"][: len(evaluations)]
    matrices = [transfer.matrix(one) for one in evaluations]
    content = {str(seed): np.round(matrix, 6).tolist() for seed, matrix in zip(seeds, matrices, strict=True)}
    text = json.dumps({"splits": record["splits"], "accuracy": content}).replace("NaN", "null")
    (folder / "matrix.json").write_text(text + "\n", encoding="utf-8")
    made = [folder / "matrix.json"]
    shapes = {matrix.shape for matrix in matrices}
    if len(shapes) == 1 and min(shapes.pop()) > 0:
        title = f"{record['strategy']} on {record['stream']}: {measured}, mean over {len(seeds)} seeds"
        made.append(matrix_figure(np.mean(matrices, 0), record["splits"], title, folder / "matrix.png", measured))
    curves = {record["strategy"]: _anytime(evaluations)}
    made.append(anytime_figure(curves, folder / "anytime.png", measured))
    if counts is not None:
        title = f"{record['strategy']} on {record['stream']}: memory of seed {record['seeds'][0]}"
        made.append(memory_figure(*counts, folder / "memory.png", title))
    health = _first(journals, "clusters")
    if health:
        title = f"{record['strategy']} on {record['stream']}: clusters of seed {record['seeds'][0]}"
        made.append(shares_figure(*groups.curves(health), folder / "cluster_health.png", title))
    for part in KEPT:
        file = store.group_folders(run_dir)[0] / part.FILE
        made += part.draw(file, folder) if file.exists() else []
    return made


def _evaluations(journals: Journals) -> list[transfer.Record]:
    """One record per seed, of the groups that have any evaluation."""
    found = []
    for lines in journals:
        evaluations = [line for line in lines if line["kind"] == "evaluation"]
        runs = len(evaluations[0]["accuracy"]) if evaluations else 0
        found += [transfer.record(evaluations, run) for run in range(runs)]
    return found


def _measured(journals: Journals) -> str:
    """What the evaluations hold, in words."""
    kinds = {line.get("measure", "acc") for lines in journals for line in lines if line["kind"] == "evaluation"}
    return WORDS[kinds.pop()] if len(kinds) == 1 else "accuracy"


def _memory(journals: Journals) -> tuple[NDArray[np.int64], Floats] | None:
    """Samples seen and rows per class in the first seed's memory."""
    lines = _first(journals, "memory")
    if not lines:
        return None
    return np.array([line["samples"] for line in lines]), np.array([line["counts"][0] for line in lines], float)


def _first(journals: Journals, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in the first group that has any."""
    return next((own for lines in journals if (own := [line for line in lines if line["kind"] == kind])), [])


def _journals(run_dir: Path) -> Journals:
    paths = [folder / "journal.jsonl" for folder in store.group_folders(run_dir)]
    return [journal.read(path)[0] for path in paths if path.exists()]


def _anytime(evaluations: Sequence[transfer.Record]) -> tuple[NDArray[np.int64], Floats, Floats]:
    curves = [transfer.anytime(one) for one in evaluations]
    length = min(len(samples) for samples, _ in curves)
    estimates = [interval([float(values[point]) for _, values in curves]) for point in range(length)]
    means, halves = np.array([e.mean for e in estimates]), np.array([e.half for e in estimates])
    return curves[0][0][:length], means, halves


def matrix_figure(matrix: Floats, names: Sequence[str], title: str, path: Path, measured: str = "accuracy") -> Path:
    """Heat map: a row per task end, a column per split.    Shapes: matrix [T, S]."""
    figure, axes = _figure(WIDTH, 1.2 + 0.45 * min(len(matrix), 12) + 1.0)
    rows, columns = matrix.shape
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    image = axes.imshow(
        100 * matrix, vmin=0, vmax=100 if measured == "accuracy" else None, cmap="viridis", aspect="auto", extent=extent
    )
    if max(matrix.shape) <= LABELLED:
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if value < 0.6 else "black"
            text = "" if np.isnan(value) else f"{100 * value:.0f}"
            axes.text(column + 1, row + 1, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(1, columns + 1), names, fontsize=8)
        axes.set_yticks(range(1, rows + 1), [f"after {t + 1}" for t in range(rows)], fontsize=8)
    else:
        axes.set(xlabel="split", ylabel="after task")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, label=f"{measured}, %")
    return figures.save(figure, path)


def anytime_figure(
    curves: Mapping[str, tuple[NDArray[np.int64], Floats, Floats]], path: Path, measured: str = "accuracy"
) -> Path:
    """Mean accuracy (or what else is measured) over seen splits against samples, with its interval; one curve per name."""
    figure, axes = _figure(WIDTH, HEIGHT)
    for name, (samples, mean, half) in curves.items():
        (line,) = axes.plot(samples, 100 * mean, label=name)
        known = np.nan_to_num(half)
        axes.fill_between(samples, 100 * (mean - known), 100 * (mean + known), alpha=0.2, color=line.get_color(), lw=0)
    axes.set(xlabel="samples seen", ylabel=f"{measured} on seen splits, %", ylim=(0, 100))
    if measured != "accuracy":  # hit rates are small
        axes.autoscale(axis="y")
    axes.grid(alpha=0.3)
    axes.legend()
    return figures.save(figure, path)


def memory_figure(samples: NDArray[np.int64], counts: Floats, path: Path, title: str = "") -> Path:
    """Share of each class in the memory at each task end.    Shapes: samples [n], counts [n, C]."""
    figure, axes = _figure(WIDTH, HEIGHT)
    bottom = np.zeros(len(samples))
    width = 0.8 * (np.diff(samples, prepend=0).min() if len(samples) else 1)
    palette = _palette(counts.shape[1])
    for label, column in enumerate(counts.T):
        axes.bar(samples, column, width, bottom, color=palette[label], label=str(label))
        bottom += column
    axes.set(xlabel="samples seen", ylabel="rows in the memory")
    axes.set_title(title, fontsize=9)
    if counts.shape[1] <= FEW:
        axes.legend(title="class", fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        _class_bar(figure, axes, counts.shape[1])
    return figures.save(figure, path)


def shares_figure(samples: NDArray[np.int64], shares: Mapping[str, Floats], path: Path, title: str = "") -> Path:
    """Several shares of 1 against samples.    Shapes: samples [n], each share [n]."""
    figure, axes = _figure(WIDTH, HEIGHT)
    for name, values in shares.items():
        axes.plot(samples, values, marker=".", label=name)
    axes.set(xlabel="samples seen", ylim=(0, 1.02))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figures.save(figure, path)


def timeline_figure(edges: NDArray[np.int64], counts: Floats, ends: Sequence[int], path: Path) -> Path:
    """Which classes arrive when.    Shapes: edges [bins + 1] in samples, counts [bins, C], ends in samples."""
    figure, axes = _figure(WIDTH, max(2.5, min(8.0, 0.8 + 0.22 * counts.shape[1])))
    extent = (float(edges[0]), float(edges[-1]), counts.shape[1] - 0.5, -0.5)
    image = axes.imshow(counts.T, aspect="auto", extent=extent, cmap="Blues", interpolation="nearest", vmin=0)
    for end in ends[:-1]:
        axes.axvline(end, color="tab:red", lw=0.8)
    axes.set(xlabel="samples seen", ylabel="class")
    figure.colorbar(image, label="samples per bin")
    return figures.save(figure, path)


def _figure(width: float, height: float) -> Any:
    figure = figures.blank(width, height)
    return figure, figure.subplots()


def _palette(count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20" if count <= FEW else "turbo"](np.linspace(0, 1, max(count, 2)))


def _class_bar(figure: Any, axes: Any, count: int) -> None:
    """A colour bar over class numbers, where a legend would not fit."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure.colorbar(ScalarMappable(Normalize(0, count - 1), "turbo"), ax=axes, label="class")
