"""Results -> tables: means with 95 % intervals over seeds, and paired differences."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_sim.errors import ClSimError

Result = dict[str, Any]
USUAL = (
    "acc_end",
    "acc_aaa",
    "acc_incremental",
    "acc_worst_case",
    "acc_first_task",
    "acc_last_task",
    "forgetting_chaudhry",
    "acc_prequential",
    "hr10_prequential",
    "ndcg10_prequential",
    "hr10_second_half",
    "hr10_end",
    "hr5_test",
    "hr10_test",
    "hr20_test",
    "ndcg5_test",
    "ndcg10_test",
    "ndcg20_test",
    "hr10_test_last",
    "ndcg10_test_last",
    "mrr10_validation",
    "best_pass",
    "passes",
    "assa_end",
    "idf1_end",
    "idsw_per_100_end",
    "association_end",
    "reid_end",
    "reid_1_3_end",
    "reid_4_8_end",
    "reid_9_20_end",
    "recovery_end",
    "linear_end",
    "knn_end",
    "ncm_end",
    "linear_aaa",
    "shot1_end",
    "shot5_end",
    "shot1_opta_end",
    "shot5_opta_end",
    "cluster_purity_end",
    "neighbour_precision_end",
    "davies_bouldin_end",
    "memory_entropy_end",
    "samples_per_second",
    "memory_bytes",
    "bytes_per_row",
)
TERMINAL = (
    "acc_end",
    "acc_aaa",
    "forgetting_chaudhry",
    "acc_prequential",
    "hr10_prequential",
    "ndcg10_prequential",
    "hr10_test",
    "ndcg10_test",
    "hr10_test_last",
    "best_pass",
    "assa_end",
    "idf1_end",
    "idsw_per_100_end",
    "linear_end",
    "knn_end",
    "shot1_end",
    "shot5_end",
    "samples_per_second",
)  # fit into 80 columns
PROBES = ("linear", "knn", "ncm", "shot1", "shot5", "cluster", "neighbour", "memory_entropy")
RANKINGS = ("hr", "ndcg", "mrr")  # small numbers: shown with one more decimal
SHARES = (  # metrics in [-1, 1], shown in percent
    *("acc", "forgetting", "bwt", "fwt", *RANKINGS),
    *("assa", "association", "class_acc", "deta", "hota", "idf1", "recovery", "reid", "video_ap"),
    *PROBES,
)
LOWER_IS_BETTER = (
    "forgetting",
    "davies",
    "idsw",
    "step_ms",
    "memory_bytes",
    "bytes_per_row",
    "peak_bytes",
    "parameters",
)
COSTS = (
    *("samples_per_second", "step_ms", "memory_bytes", "bytes_per_row", "peak_bytes", "parameters"),
    *("best_pass", "passes"),
)
UNRANKED = (*COSTS, "acc_last_task")  # never in bold: no method is better for it alone


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with the half-width of its 95 % interval (NaN for one seed)."""

    mean: float
    half: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A paired difference: its estimate, and the p-value of the paired t test (NaN below two pairs)."""

    estimate: Estimate
    p: float


def read(path: Path) -> Result:
    """The result of a finished run, from its folder or its result.json.    Raises: ClSimError."""
    file = path / "result.json" if path.is_dir() else path
    if not file.is_file():
        raise ClSimError(f"{path} has no result yet; finish it with: cl-sim resume {path.name}")
    result: Result = json.loads(file.read_text(encoding="utf-8"))
    return result


def joined(one: Result, more: Result) -> Result:
    """One result with the seeds of both; where the seeds of `more` come from is kept under `added`.    Raises: ClSimError."""
    twice = sorted(set(one["seeds"]) & set(more["seeds"]))
    if twice:
        raise ClSimError(
            f"seeds {', '.join(map(str, twice))} of {more['name']} are there already; run others, as in --seeds "
            f"{max(one['seeds']) + 1}-{max(one['seeds']) + 3}"
        )

    def values(result: Result, metric: str) -> list[Any]:
        return list(result["metrics"].get(metric, [None] * len(result["seeds"])))

    metrics = sorted({*one["metrics"], *more["metrics"]})
    origin = {key: more[key] for key in ("seeds", "commit", "command", "machine", "versions")}
    return {
        **one,
        "seeds": [*one["seeds"], *more["seeds"]],
        "metrics": {metric: values(one, metric) + values(more, metric) for metric in metrics},
        "added": [*one.get("added", []), origin],
    }


def interval(values: Sequence[float | None]) -> Estimate:
    """Mean and t_{0.975, n-1} * s / sqrt(n) over the values that are there."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    n = len(known)
    if n == 0:
        return Estimate(math.nan, math.nan, 0)
    if n == 1:
        return Estimate(float(known[0]), math.nan, 1)
    from scipy import stats

    half = float(stats.t.ppf(0.975, n - 1) * known.std(ddof=1) / math.sqrt(n))
    return Estimate(float(known.mean()), half, n)


def paired(one: Result, two: Result, metric: str) -> Difference:
    """The difference two - one over the seeds that both have.    Raises: ClSimError if they cannot be paired."""
    if one["data_digest"] != two["data_digest"] or one["stream"] != two["stream"]:
        raise ClSimError(
            f"{one['name']} ran on {one['stream']} and {two['name']} on {two['stream']} (or on other data); differences "
            "need the same stream and data"
        )
    pairs = [
        (a, b)
        for a, b in zip(_by_seed(one, metric, two), _by_seed(two, metric, one), strict=True)
        if None not in (a, b)
    ]
    if not pairs:
        raise ClSimError(f"{one['name']} and {two['name']} share no seed with {metric}; run both with the same --seeds")
    gaps = [b - a for a, b in pairs]
    estimate = interval(gaps)
    if len(gaps) < 2 or np.std(gaps) == 0:
        return Difference(estimate, math.nan)
    from scipy import stats

    return Difference(estimate, float(stats.ttest_1samp(gaps, 0).pvalue))


def _by_seed(result: Result, metric: str, other: Result) -> list[Any]:
    values = dict(zip(result["seeds"], result["metrics"].get(metric, [None] * len(result["seeds"])), strict=True))
    return [values[seed] for seed in sorted(set(result["seeds"]) & set(other["seeds"]))]


def columns(results: Sequence[Result], metrics: Sequence[str]) -> list[str]:
    """The metrics to show: those asked for, else the usual ones that any result has.    Raises: ClSimError."""
    there = {key for result in results for key in result["metrics"]}
    for metric in metrics:
        if metric not in there:
            raise ClSimError(f"no result has the metric '{metric}'; they have {', '.join(sorted(there))}")
    return list(metrics) or [metric for metric in USUAL if metric in there]


def shown(metric: str, estimate: Estimate, plus: str = "±", signed: bool = False) -> str:
    """An estimate in words: percent for accuracies, megabytes for bytes."""
    if estimate.n == 0:
        return "-"
    sign = "+" if signed else ""
    scale, places = (100, 1) if metric.startswith(SHARES) else (1e-6, 2) if metric.endswith("_bytes") else (1, 1)
    places += metric.startswith(RANKINGS)
    places = 0 if abs(estimate.mean * scale) >= 200 else places
    mean = f"{estimate.mean * scale:{sign}.{places}f}"
    exact = scale != 100 and estimate.half <= 1e-9 * abs(estimate.mean)  # a size or a speed that all seeds share
    return mean if exact or math.isnan(estimate.half) else f"{mean} {plus} {estimate.half * scale:.{places}f}"


def heading(metric: str) -> str:
    """A column's title with its unit."""
    if metric.startswith(SHARES):
        return f"{metric} %"
    return metric.replace("_bytes", " MB") if metric.endswith("_bytes") else metric


def capacity(result: Result) -> int:
    """The size of the run's memory in samples; 0 for a strategy that has none, was told to have none, or has a fixed pool."""
    own, kept = result["config"].get("strategy", {}), result.get("metrics", {}).get("memory_bytes", [1])
    return int(own.get("capacity", 0)) if any(kept or [1]) and not own.get("pool", False) else 0


def entry(result: Result) -> str:
    """How a result is filed and how a preset ends: the strategy, and the size of its memory if it has one."""
    size = capacity(result)
    return f"{result['strategy']}-m{size}" if size else str(result["strategy"])


def label(result: Result, results: Sequence[Result]) -> str:
    """The title that the result was filed under, else the strategy with what tells it from the others.

    That is its memory where memories differ, the settings that differ where it comes twice, and the run's name where none do.
    """
    if result.get("title"):
        return str(result["title"])
    twins = [other for other in results if entry(other) == entry(result) and not other.get("title")]
    sizes = {capacity(other) for other in results} - {0}
    name = entry(result) if len(sizes) > 1 else str(result["strategy"])
    if len(twins) == 1:
        return name
    own = " ".join(f"{key}={_setting(result, key)}" for key in _differing(twins))
    alike = sum(all(_setting(other, key) == _setting(result, key) for key in _differing(twins)) for other in twins)
    return f"{name} {own}" if alike == 1 else str(result["name"])


def _differing(twins: Sequence[Result]) -> list[str]:
    """The strategy's settings in which results of one strategy differ."""
    keys = {key for twin in twins for key in twin["config"].get("strategy", {})}
    return sorted(key for key in keys if len({str(_setting(twin, key)) for twin in twins}) > 1)


def _setting(result: Result, key: str) -> Any:
    return result["config"].get("strategy", {}).get(key)


def _best(results: Sequence[Result], metric: str) -> float:
    means = [
        interval(result["metrics"].get(metric, [])).mean for result in results if result.get("role") != "upper bound"
    ]
    known = [mean for mean in means if not math.isnan(mean)]
    if not known or metric in UNRANKED:
        return math.nan
    return min(known) if metric.startswith(LOWER_IS_BETTER) else max(known)


def means_table(
    results: Sequence[Result], metrics: Sequence[str], plus: str = "±", bold: str = "{}"
) -> list[list[str]]:
    """Header and one row per result; the best of a column (the upper bound left out) in bold."""
    rows = [["strategy", "seeds", *(heading(metric) for metric in metrics)]]
    for result in results:
        row = [label(result, results), str(len(result["seeds"]))]
        for metric in metrics:
            estimate = interval(result["metrics"].get(metric, []))
            text = shown(metric, estimate, plus)
            row.append(bold.format(text) if estimate.mean == _best(results, metric) and len(results) > 1 else text)
        rows.append(row)
    return rows


def difference_table(
    results: Sequence[Result], metrics: Sequence[str], base: Result, plus: str = "±"
) -> list[list[str]]:
    """Header and one row per other result: its paired difference to the baseline."""
    rows = [[f"minus {label(base, results)}", "pairs", *(heading(metric) for metric in metrics)]]
    for result in results:
        if result["name"] == base["name"]:
            continue
        cells, pairs = [], 0
        for metric in metrics:
            if metric not in result["metrics"] or metric not in base["metrics"]:
                cells.append("-")
                continue
            difference = paired(base, result, metric)
            pairs = max(pairs, difference.estimate.n)
            cells.append(shown(metric, difference.estimate, plus, signed=True))
        rows.append([label(result, results), str(pairs), *cells])
    return rows


def comparable(results: Sequence[Result], base: Result) -> list[Result]:
    """The results on the baseline's stream and data."""
    same = (base["stream"], base["data_digest"])
    return [result for result in results if (result["stream"], result["data_digest"]) == same]


def render(results: Sequence[Result], form: str, *, metrics: Sequence[str] = (), baseline: Result | None = None) -> str:
    """The means and, with several results on one stream, the differences; as markdown, csv or latex."""
    wanted = columns(results, metrics)
    base = baseline or results[0]
    accuracies = [metric for metric in wanted if metric.startswith(SHARES)]
    twins = comparable(results, base)
    writer = {"markdown": markdown, "csv": csv_text, "latex": latex}[form]
    plus, bold = {"markdown": ("±", "**{}**"), "csv": ("±", "{}"), "latex": (r"$\pm$", r"\textbf{{{}}}")}[form]
    parts = [writer(means_table(results, wanted, plus, bold))]
    if len(twins) > 1 and accuracies:
        parts.append(writer(difference_table(twins, accuracies, base, plus)))
    return "\n".join(parts)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A pipe table."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join("| " + " | ".join(row) + " |\n" for row in lines)


def csv_text(rows: Sequence[Sequence[str]]) -> str:
    """Comma-separated values."""
    import csv

    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def latex(rows: Sequence[Sequence[str]]) -> str:
    """A tabular for the booktabs package."""
    head, *body = [[cell.replace("_", r"\_").replace("%", r"\%") for cell in row] for row in rows]
    lines = [r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}", r"\toprule", " & ".join(head) + r" \\", r"\midrule"]
    lines += [" & ".join(row) + r" \\" for row in body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def show(
    results: Sequence[Result], console: Any, *, metrics: Sequence[str] = (), baseline: Result | None = None
) -> None:
    """Print the means and the differences to a terminal, in 80 columns if nothing more is asked for."""
    there = set(columns(results, ()))
    wanted = columns(results, metrics or [metric for metric in TERMINAL if metric in there])
    base = baseline or results[0]
    stream = ", ".join(sorted({result["stream"] for result in results}))
    title = f"{stream}: mean ± 95 % interval over {_seed_counts(results)}"
    _print(title, means_table(results, wanted, bold="[bold]{}[/bold]"), console)
    accuracies = [metric for metric in wanted if metric.startswith(SHARES)]
    twins = comparable(results, base)
    if len(twins) > 1 and accuracies:
        title = f"minus {label(base, results)}, paired by seed"
        _print(title, difference_table(twins, accuracies, base), console)


def _seed_counts(results: Sequence[Result]) -> str:
    counts = sorted({len(result["seeds"]) for result in results})
    return "1 seed" if counts == [1] else " or ".join(str(count) for count in counts) + " seeds"


def _print(title: str, rows: Sequence[Sequence[str]], console: Any) -> None:
    """A table without its second column (seeds, pairs), long headings broken at underscores."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    head, *body = [[row[0], *row[2:]] for row in rows]
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False
    )
    for number, name in enumerate(head):
        broken = name.replace("_", "\n", 2) if len(name) > 12 else name
        table.add_column("strategy" if number == 0 else broken, justify="right" if number else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    console.print(table)


def tables_from_results(folder: Path) -> str:
    """One document from results/<stream>/*.json, a table per stream and memory size.    Raises: ClSimError if there is none."""
    files = sorted(folder.glob("*/*.json"))
    if not files:
        raise ClSimError(f"{folder} holds no <stream>/*.json; add a run with: cl-sim report RUN")
    text = "# Results\n\nMade by `cl-sim report` from the files beside it; mean ± 95 % interval over seeds (Student's t).\n"
    for stream in sorted({file.parent.name for file in files}):
        results = [read(file) for file in files if file.parent.name == stream]
        for size in sorted({capacity(result) for result in results} - {0}) or [0]:
            group = _ranked([result for result in results if capacity(result) in (0, size)])
            title = f"{stream}, memory of {size} samples" if size else stream
            text += f"\n## {title}\n\n" + markdown(_with_paper(group, columns(group, ())))
            text += _differences(group)
        for note in sorted({r["data_note"] for r in results if r.get("data_note")}):
            text += f"\nData: {note}\n"
        text += "\n" + "".join(_origin(result) for result in results)
    return text + speed(folder / "speed.json")


def speed(path: Path) -> str:
    """The tables of `make bench`, each with where it was measured; nothing if there are none."""
    if not path.is_file():
        return ""
    text = "\n# Speed\n\nMade by `make bench`; ratios are medians over rounds in which the cases took turns.\n"
    for table in json.loads(path.read_text(encoding="utf-8"))["tables"].values():
        rows = [table["columns"], *([_cell(value) for value in row] for row in table["rows"])]
        origin = f"{table['machine']}, torch {table['torch']}, commit {table['commit'][:10]}"
        text += f"\n## {table['title']}\n\n{table['note']}\n\n{markdown(rows)}\nMeasured on {origin}.\n"
    return text


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _differences(group: Sequence[Result]) -> str:
    """Each result that names another one to be measured against, less that one, paired by seed."""
    rows: list[list[str]] = []
    wanted = [metric for metric in columns(group, ()) if metric not in COSTS]
    for result in group:
        if not result.get("against"):
            continue
        base = next((other for other in group if label(other, group) == result["against"]), None)
        if base is None:
            names = ", ".join(label(other, group) for other in group)
            raise ClSimError(
                f"'{label(result, group)}' is to be compared with '{result['against']}', but there is {names}"
            )
        head, *lines = difference_table([base, result], wanted, base)
        rows += [["difference", *head[1:]]] * (not rows)
        rows += [[f"{label(result, group)} - {result['against']}", *line[1:]] for line in lines]
    return f"\nPaired by seed:\n\n{markdown(rows)}" if rows else ""


BRIEF = ("acc_end", "acc_aaa", "forgetting_chaudhry", "acc_first_task", "acc_last_task", "memory_bytes")


def brief(folder: Path) -> str:
    """The same tables with fewer columns, accuracy by task boundaries alone, for a front page."""
    text = ""
    for stream in sorted({file.parent.name for file in folder.glob("*/*.json")}):
        results = [read(file) for file in sorted((folder / stream).glob("*.json"))]
        shown_there = [result for result in results if not result.get("title") and "acc_end" in result["metrics"]]
        for size in sorted({capacity(result) for result in shown_there} - {0}):
            group = _ranked([result for result in shown_there if capacity(result) in (0, size)])
            there = columns(group, ())
            rows = means_table(group, [metric for metric in BRIEF if metric in there], bold="**{}**")
            text += f"\n{stream}, memory of {size} samples:\n\n{markdown(rows)}"
    return text


def put_between(text: str, begin: str, end: str, middle: str) -> str:
    """The text with what lies between two marks exchanged.    Raises: ClSimError if they are not there."""
    head, mark, rest = text.partition(begin)
    _, other, tail = rest.partition(end)
    if not mark or not other:
        raise ClSimError(f"the tables go between the lines '{begin}' and '{end}', which are not there; add them first")
    return f"{head}{begin}\n{middle}\n{end}{tail}"


def _ranked(group: Sequence[Result]) -> list[Result]:
    """By accuracy, or by what stands in its place."""
    main = next(
        (name for name in ("acc_end", "assa_end", "hr10_test") if any(name in r["metrics"] for r in group)), "acc_end"
    )
    return sorted(group, key=lambda r: (interval(r["metrics"].get(main, [])).mean, r["strategy"]))


def _with_paper(results: Sequence[Result], metrics: Sequence[str]) -> list[list[str]]:
    rows = means_table(results, metrics, bold="**{}**")
    if not any(result.get("paper") for result in results):
        return rows
    published = ["paper's acc_end %"]
    for result in results:
        value, half, source = result.get("paper", {}).get("acc_end", (None, None, ""))
        published.append("-" if value is None else f"{100 * value:.1f} ± {100 * half:.1f} ({source})")
    return [[*row, cell] for row, cell in zip(rows, published, strict=True)]


def _origin(result: Result) -> str:
    name = result.get("title") or entry(result)
    added = result.get("added", [])
    late = {seed for part in added for seed in part["seeds"]}
    parts = [{**result, "seeds": [seed for seed in result["seeds"] if seed not in late]}, *added]
    return "".join(
        f"- `{name}`: `{part['command']}`; seeds {part['seeds']}, commit {part['commit'][:10]}, data "
        f"{result['data_digest'][:8]}, {part['machine']}, torch {part['versions'].get('torch', '?')}\n"
        for part in parts
    )
