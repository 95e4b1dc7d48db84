"""Tables: intervals, paired differences, and what each format says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from scipy import stats

from cl_sim import report
from cl_sim.errors import ClSimError


def result(strategy: str, values: list[float | None], seeds: list[int] | None = None, **more: Any) -> report.Result:
    return {
        "name": f"{strategy}-run",
        "strategy": strategy,
        "stream": "split-digits",
        "encoder": "mlp",
        "role": "strategy",
        "seeds": seeds or list(range(len(values))),
        "metrics": {"acc_end": values, "memory_bytes": [2e6] * len(values)},
        "config": {"data": ""},
        "commit": "0123456789abcdef",
        "command": f"cl-sim run {strategy} split-digits",
        "data_digest": "feed0123456",
        "versions": {"torch": "2.0"},
        "machine": "2 cores",
        "status": "finished",
        **more,
    }


ER = result("er", [0.5, 0.6, 0.7])
FINETUNE = result("finetune", [0.2, 0.2, 0.5])


def test_the_interval_is_students() -> None:
    # mean 0.6, s = 0.1, n = 3: half-width = t(0.975, 2) * 0.1 / sqrt(3) = 4.302653 * 0.057735
    estimate = report.interval([0.5, 0.6, 0.7])
    assert (estimate.mean, estimate.half, estimate.n) == (pytest.approx(0.6), pytest.approx(0.2484138), 3)


def test_one_seed_has_no_interval_and_missing_values_do_not_count() -> None:
    assert math.isnan(report.interval([0.5]).half)
    assert report.interval([0.5, None, 0.7]).n == 2
    assert report.interval([None]).n == 0


def test_a_paired_difference_equals_the_paired_t_test() -> None:
    found = report.paired(FINETUNE, ER, "acc_end")
    expected = stats.ttest_rel([0.5, 0.6, 0.7], [0.2, 0.2, 0.5])
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.estimate.mean == pytest.approx(0.3)
    assert found.estimate.half == pytest.approx((high - low) / 2)


def test_joined_results_hold_the_seeds_of_both_and_where_they_came_from() -> None:
    late = result(
        "er", [0.9, 0.8], seeds=[3, 4], command="cl-sim run er split-digits --seeds 3-4", commit="fedcba9876543"
    )
    late["metrics"]["acc_late"] = [0.1, 0.2]
    both = report.joined(ER, late)
    assert both["seeds"] == [0, 1, 2, 3, 4]
    assert both["metrics"]["acc_end"] == [0.5, 0.6, 0.7, 0.9, 0.8]
    assert both["metrics"]["acc_late"] == [None, None, None, 0.1, 0.2]
    assert both["commit"] == ER["commit"]
    more = report.joined(both, result("er", [0.4], seeds=[5]))
    assert [part["seeds"] for part in more["added"]] == [[3, 4], [5]]
    with pytest.raises(ClSimError, match=r"seeds 3, 4 .* there already.*--seeds 5-7"):
        report.joined(both, late)


def test_only_shared_seeds_are_paired_in_their_order() -> None:
    other = result("other", [0.9, 0.1, 0.6], seeds=[7, 1, 0])
    found = report.paired(ER, other, "acc_end")
    assert found.estimate.n == 2
    assert found.estimate.mean == pytest.approx(((0.6 - 0.5) + (0.1 - 0.6)) / 2)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (result("far", [0.5], seeds=[9]), "share no seed"),
        (result("far", [0.5], stream="split-mnist"), "same stream and data"),
        (result("far", [0.5], data_digest="other"), "same stream and data"),
    ],
)
def test_what_cannot_be_paired_is_refused(other: report.Result, words: str) -> None:
    with pytest.raises(ClSimError, match=words):
        report.paired(ER, other, "acc_end")


MARKDOWN = """\
| strategy | seeds | acc_end % | memory MB |
| --- | ---: | ---: | ---: |
| er | 3 | **60.0 ± 24.8** | 2.00 |
| finetune | 3 | 30.0 ± 43.0 | 2.00 |

| minus er | pairs | acc_end % |
| --- | ---: | ---: |
| finetune | 3 | -30.0 ± 24.8 |
"""
CSV = """\
strategy,seeds,acc_end %,memory MB
er,3,60.0 ± 24.8,2.00
finetune,3,30.0 ± 43.0,2.00

minus er,pairs,acc_end %
finetune,3,-30.0 ± 24.8
"""
LATEX = r"""\begin{tabular}{lrrr}
\toprule
strategy & seeds & acc\_end \% & memory MB \\
\midrule
er & 3 & \textbf{60.0 $\pm$ 24.8} & 2.00 \\
finetune & 3 & 30.0 $\pm$ 43.0 & 2.00 \\
\bottomrule
\end{tabular}

\begin{tabular}{lrr}
\toprule
minus er & pairs & acc\_end \% \\
\midrule
finetune & 3 & -30.0 $\pm$ 24.8 \\
\bottomrule
\end{tabular}
"""


@pytest.mark.parametrize(("form", "text"), [("markdown", MARKDOWN), ("csv", CSV), ("latex", LATEX)])
def test_a_format_is_written_exactly(form: str, text: str) -> None:
    assert report.render([ER, FINETUNE], form) == text


def test_the_terminal_shows_means_and_differences_in_80_columns() -> None:
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    report.show([ER, FINETUNE], console)
    console.file.close()
    text = console.export_text()
    assert "60.0 ± 24.8" in text
    assert "-30.0 ± 24.8" in text
    assert "…" not in text


def test_an_upper_bound_is_never_the_best() -> None:
    joint = result("joint", [0.9, 0.9, 0.9], role="upper bound")
    assert "**60.0" in report.render([ER, joint], "markdown")
    assert "**90.0" not in report.render([ER, joint], "markdown")


def test_an_unknown_metric_is_refused_with_those_there_are() -> None:
    with pytest.raises(ClSimError, match=r"'acc_ned'.*acc_end"):
        report.render([ER], "csv", metrics=["acc_ned"])


def test_an_unfinished_run_is_refused_with_the_way_on(tmp_path: Path) -> None:
    with pytest.raises(ClSimError, match="cl-sim resume"):
        report.read(tmp_path)


def test_the_results_document_holds_every_file_and_its_origin(tmp_path: Path) -> None:
    for one in (ER, {**FINETUNE, "data_note": "JPEG copies", "paper": {"acc_end": [0.25, 0.01, "Someone 2020"]}}):
        path = tmp_path / one["stream"] / f"{one['strategy']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(one))
    text = report.tables_from_results(tmp_path)
    for words in (
        "## split-digits",
        "| er | 3 | **60.0 ± 24.8**",
        "25.0 ± 1.0 (Someone 2020)",
        "Data: JPEG copies",
        "commit 0123456789",
    ):
        assert words in text
    assert text == report.tables_from_results(tmp_path)


def file(folder: Path, name: str, one: report.Result) -> None:
    path = folder / one["stream"] / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(one))


def test_the_document_compares_a_result_with_the_one_it_names(tmp_path: Path) -> None:
    file(tmp_path, "finetune", FINETUNE)
    file(tmp_path, "er-extra", {**ER, "title": "er-extra", "against": "finetune"})
    text = report.tables_from_results(tmp_path)
    gap = report.paired(FINETUNE, ER, "acc_end").estimate
    assert f"| er-extra - finetune | 3 | +{100 * gap.mean:.1f} ± {100 * gap.half:.1f} |" in text
    file(tmp_path, "er-extra", {**ER, "title": "er-extra", "against": "nobody"})
    with pytest.raises(ClSimError, match=r"'er-extra'.*'nobody'.*finetune"):
        report.tables_from_results(tmp_path)


def test_the_document_ends_with_the_tables_of_the_benchmark(tmp_path: Path) -> None:
    file(tmp_path, "er", ER)
    assert "# Speed" not in report.tables_from_results(tmp_path)
    table = {"title": "Steps", "note": "One core.", "columns": ["strategy", "step / bare", "images"]}
    table |= {
        "rows": [["er", 1.03, 68500], ["scr", None, 10]],
        "commit": "0123456789ab",
        "machine": "2 cores",
        "torch": "2",
    }
    (tmp_path / "speed.json").write_text(json.dumps({"tables": {"steps": table}}))
    text = report.tables_from_results(tmp_path)
    assert text.endswith(
        "## Steps\n\nOne core.\n\n| strategy | step / bare | images |\n| --- | ---: | ---: |\n| er | 1.03 | 68,500 |\n"
        "| scr | - | 10 |\n\nMeasured on 2 cores, torch 2, commit 0123456789.\n"
    )


def test_a_page_gets_the_tables_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    file(tmp_path, "er", {**ER, "config": {"strategy": {"capacity": 5}}})
    file(tmp_path, "er-extra", {**ER, "title": "er-extra"})
    brief = report.brief(tmp_path)
    assert "memory of 5 samples" in brief
    assert "| er | 3 | 60.0 ± 24.8" in brief
    assert "er-extra" not in brief
    page = report.put_between("a\n<!-- on -->\nold\n<!-- off -->\nz\n", "<!-- on -->", "<!-- off -->", brief)
    assert page.startswith("a\n<!-- on -->\n")
    assert page.endswith("<!-- off -->\nz\n")
    assert brief in page
    assert "old" not in page
    assert report.put_between(page, "<!-- on -->", "<!-- off -->", brief) == page
    with pytest.raises(ClSimError, match="add them first"):
        report.put_between("a\n<!-- on -->\n", "<!-- on -->", "<!-- off -->", brief)


def test_a_strategy_that_was_told_to_remember_nothing_has_no_memory() -> None:
    sized = {**ER, "config": {"strategy": {"capacity": 5}}}
    assert (report.capacity(sized), report.entry(sized)) == (5, "er-m5")
    without = {**sized, "metrics": {**ER["metrics"], "memory_bytes": [0, 0, 0]}}
    assert (report.capacity(without), report.entry(without)) == (0, "er")


def test_twins_are_told_apart_by_the_settings_in_which_they_differ() -> None:
    twins = [{**ER, "config": {"strategy": {"lr": lr, "replay": 10}}} for lr in (0.1, 0.2)]
    assert [report.label(twin, twins) for twin in twins] == ["er lr=0.1", "er lr=0.2"]
    assert report.label(twins[0], [twins[0], twins[0]]) == "er-run"


def test_an_empty_results_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(ClSimError, match="report RUN"):
        report.tables_from_results(tmp_path)
