import io
import os
import re
import sys

import pytest
from rich.console import Console

from jaxkd import runs
from jaxkd.runs import report


def print_to_text(rows, width):
    console = Console(file=io.StringIO(), width=width)
    report.print_table(rows, console=console)
    return console.file.getvalue()


def split_cells(line):
    """The cells of a line of a Markdown table, without the spaces that align them."""
    cells = re.split(r"(?<!\\)\|", line)
    assert cells[0] == cells[-1] == ""
    return [cell.strip() for cell in cells[1:-1]]


def test_table_shows_each_value_in_its_column(rows):
    lines = report.results_table(rows).splitlines()
    header, alignment, teacher, alone, *_ = map(split_cells, lines)
    assert header == (
        "name|accuracy %|95 % interval|agreement %|ECE %|parameters|size|MFLOPs|latency ms"
        "|training s"
    ).split("|")
    assert re.fullmatch(r"\|:-+\|(-+:\|){9}", lines[1]) and len(alignment) == 10
    assert teacher == "teacher|91.2 ± 0.3|85.1–87.5||3.1|2,400,000|9.6 MB|8.2|0.21|42".split("|")
    assert alone == "student_alone|82.0 ± 1.0|85.1–87.5|90.3|3.1|167,562|670 kB|8.2|0.21|42".split(
        "|"
    )


def test_a_missing_value_is_an_empty_cell(make_row):
    unknown = dict.fromkeys(
        ("accuracy_interval", "agreement", "ece", "bytes", "flops", "latency_ms")
    )
    table = report.results_table([make_row("a|b", [0.5], **unknown, seconds=())])
    line = table.splitlines()[-1]
    assert split_cells(line) == [r"a\|b", "50.0", "", "", "", "167,562", "", "", "", ""]


def test_zero_is_not_missing(make_row):
    row = make_row("lucky", [0.0, 0.0], ece=0.0, agreement=0.0, accuracy_interval=(0.0, 0.1))
    line = report.results_table([row]).splitlines()[-1]
    assert split_cells(line)[:5] == ["lucky", "0.0 ± 0.0", "0.0–10.0", "0.0", "0.0"]


def test_console_shows_all_columns_in_100_characters(rows, make_row):
    text = print_to_text([*rows, make_row("student_born_again_2", [0.86, 0.87])], 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for word in (
        "95 %",
        "agrees",
        "ECE",
        "params",
        "MFLOPs",
        "latency",
        "train",
        "student_born_again_2",
        "2,400,000",
    ):
        assert word in text


def test_a_narrow_console_loses_columns_but_no_text(rows):
    text = print_to_text(rows, 60)
    assert max(map(len, text.splitlines())) <= 60 and "…" not in text
    assert "82.0 ± 1.0" in text and "167,562" in text
    assert "ECE" not in text and "train" not in text


@pytest.mark.parametrize(
    ("after", "before", "sentence"),
    [
        (
            [0.86, 0.87, 0.865],
            [0.82, 0.82, 0.826],
            "Over 3 seeds, new is 4.3 ± 0.6 points above old (82.2 % → 86.5 %).",
        ),
        (
            [0.80, 0.81],
            [0.82, 0.82],
            "Over 2 seeds, new is 1.5 ± 0.7 points below old (82.0 % → 80.5 %).",
        ),
        (
            [0.80, 0.84],
            [0.82, 0.81],
            "Over 2 seeds, new is 0.5 ± 3.5 points above old (81.5 % → 82.0 %). "
            "That is within twice the standard error of the mean, 5.0 points: no difference is "
            "claimed.",
        ),
        (
            [0.80, 0.82],
            [0.82, 0.80],
            "Over 2 seeds, new is 0.0 ± 2.8 points from old (81.0 % → 81.0 %). "
            "That is within twice the standard error of the mean, 4.0 points: no difference is "
            "claimed.",
        ),
        (
            # Beyond one standard deviation, but not beyond two standard errors.
            [0.84, 0.82, 0.824],
            [0.82, 0.82, 0.82],
            "Over 3 seeds, new is 0.8 ± 1.1 points above old (82.0 % → 82.8 %). "
            "That is within twice the standard error of the mean, 1.2 points: no difference is "
            "claimed.",
        ),
        (
            [0.834, 0.82, 0.828],
            [0.82, 0.82, 0.82],
            "Over 3 seeds, new is 0.7 ± 0.7 points above old (82.0 % → 82.7 %). "
            "That is within twice the standard error of the mean, 0.8 points: no difference is "
            "claimed.",
        ),
        (
            [0.86],
            [0.82],
            "With one seed, new is 4.0 points above old (82.0 % → 86.0 %). "
            "One seed does not separate such a difference from chance.",
        ),
        (
            [0.80],
            [0.82],
            "With one seed, new is 2.0 points below old (82.0 % → 80.0 %). "
            "One seed does not separate such a difference from chance.",
        ),
    ],
)
def test_a_comparison_says_what_the_seeds_allow(after, before, sentence, make_row):
    rows = [make_row("old", before), make_row("new", after)]
    assert report.compare_rows(rows, "new", "old") == sentence


def test_a_comparison_pairs_the_seeds(make_row):
    # Seeds differ by ten points, models by one on every seed: only the paired deviation is zero.
    rows = [make_row("old", [0.70, 0.80, 0.90]), make_row("new", [0.71, 0.81, 0.91])]
    assert "1.0 ± 0.0 points above" in report.compare_rows(rows, "new", "old")


def test_a_comparison_needs_both_rows_and_the_same_seeds(rows, make_row):
    with pytest.raises(
        ValueError, match="no row named 'nobody': choose from teacher, student_alone, student_d"
    ):
        report.compare_rows(rows, "nobody", "teacher")
    with pytest.raises(ValueError, match="'nobody'"):
        report.compare_rows(rows, "teacher", "nobody")
    with pytest.raises(ValueError, match="old 2: pairs need the same seeds"):
        report.compare_rows([*rows, make_row("old", [0.8, 0.8])], "teacher", "old")
    with pytest.raises(ValueError, match="the row 'old' has no accuracy to compare"):
        report.compare_rows([*rows, make_row("old", [])], "teacher", "old")
    with pytest.raises(ValueError, match="the row 'old' has no .* or one that is NaN"):
        report.compare_rows([*rows, make_row("old", [float("nan")])], "teacher", "old")
    # Of two runs, the last row would count.
    with pytest.raises(ValueError, match="there are 2 rows named 'teacher': give them different"):
        report.compare_rows([*rows, *rows], "teacher", "student_alone")


def test_percentages_are_no_accuracies(make_row):
    with pytest.raises(ValueError, match=r"accuracy of 'a' must be in \[0, 1\], got 86.0: divide"):
        make_row("a", [0.5, 86.0])
    with pytest.raises(TypeError, match="must be a tuple of one number per seed, got 0.5"):
        runs.ResultRow("a", accuracy=0.5)
    assert make_row("a", [0.0, 1.0, float("nan")]).name == "a"


def test_a_report_names_trainings_that_only_the_curves_show(make_row, metrics, tmp_path):
    stages = {metric["stage"] for metric in metrics}
    rows = [make_row(stage, [0.5]) for stage in sorted(stages)[1:]]
    settings = {"title": "Run", "comparisons": [], "settings": {}, "environment": {}}
    text = report.write_report(tmp_path, rows=rows, metrics=metrics, **settings).read_text()
    assert f"The curves also show {sorted(stages)[0]}, which the table does not have" in text
    seeds = len({metric["seed"] for metric in metrics})
    assert seeds > 1 and f"are those of {seeds} seeds, and its row in the table of 1" in text


def test_a_single_accuracy_counts_for_all_seeds(make_row):
    rows = [make_row("teacher", [0.9]), make_row("student", [0.8, 0.82, 0.81])]
    sentence = "Over 3 seeds, student is 9.0 ± 1.0 points below teacher (90.0 % → 81.0 %)."
    sentence += " teacher has one accuracy, which counts for all seeds."
    assert report.compare_rows(rows, "student", "teacher") == sentence
    assert report.compare_rows(rows, "teacher", "student").startswith(
        "Over 3 seeds, teacher is 9.0 ± 1.0 points above"
    )


def test_remarks_come_before_the_settings(tmp_path, rows, metrics):
    lists = {
        "rows": rows,
        "metrics": metrics,
        "comparisons": [],
        "settings": {"a": 1},
        "environment": {},
    }
    text = report.write_report(
        tmp_path, title="Run", **lists, remarks=["Kept: 97 %.", "![kept](kept.png)"]
    ).read_text()
    assert "\n\nKept: 97 %.\n\n![kept](kept.png)\n\n## Settings" in text


def test_no_rows_are_refused():
    for show in (report.results_table, report.print_table):
        with pytest.raises(ValueError, match="at least one row"):
            show([])


def test_a_table_may_have_no_rows_and_cells_of_any_type():
    table = report.markdown_table(["setting", "value"], [])
    assert list(map(split_cells, table.splitlines()))[0] == ["setting", "value"]
    assert len(table.splitlines()) == 2
    table = report.markdown_table(["setting", "value"], [["epochs", 3], ["digits", "1e5"]])
    assert re.fullmatch(r"\|:-+\|:-+\|", table.splitlines()[1])
    assert list(map(split_cells, table.splitlines()[2:])) == [["epochs", "3"], ["digits", "1e5"]]


def test_without_tabulate_the_error_names_the_command(rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "tabulate", None)
    with pytest.raises(ImportError, match=r"needs tabulate, .*: pip install .*\[train\]'$"):
        report.results_table(rows)


def test_a_report_that_cannot_be_written_writes_nothing(rows, metrics, tmp_path):
    options = {"title": "", "rows": rows, "metrics": metrics, "settings": {}, "environment": {}}
    with pytest.raises(ValueError, match="'nobody'"):
        report.write_report(tmp_path, comparisons=[("nobody", "teacher")], **options)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"remarks": "Kept."}, r'must be a sequence of paragraphs: write remarks=\["..."\]'),
        ({"comparisons": ("student", "teacher")}, r'write comparisons=\[\("student", "baseline"'),
        ({"comparisons": ["ab"]}, "comparisons must be pairs of a row's name and its baseline's"),
        ({"comparisons": [("a", "b", "c")]}, "comparisons must be pairs"),
    ],
)
def test_one_remark_or_pair_is_no_list_of_them(change, message, rows, metrics, tmp_path):
    options = {"title": "", "rows": rows, "metrics": metrics, "settings": {}, "environment": {}}
    with pytest.raises(TypeError, match=message):
        report.write_report(tmp_path, **options | {"comparisons": []} | change)
    assert not os.listdir(tmp_path)


def test_a_line_break_does_not_end_a_row():
    table = report.markdown_table(["setting", "value"], [["command", "a\r\nb|c\nd"]])
    assert table.splitlines()[2:] == [r"| command   | a b\|c d |"]


def test_a_report_holds_table_sentences_and_figures(rows, metrics, tmp_path):
    path = report.write_report(
        tmp_path / "run",
        title="CIFAR-10",
        rows=rows,
        metrics=metrics,
        comparisons=[("student_direct", "student_alone")],
        settings={"temperature": 4.0, "plan": "a|b"},
        environment={"jax": "0.12"},
    )
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "run" / "report.md" and text.startswith("# CIFAR-10\n\n| name ")
    assert report.results_table(rows) in text
    assert f"- {report.compare_rows(rows, 'student_direct', 'student_alone')}\n" in text
    cells = [split_cells(line) for line in text.splitlines() if line.startswith("| ")]
    settings = cells.index(["temperature", "4.0"])
    assert cells[settings + 1] == ["plan", r"a\|b"] and ["jax", "0.12"] in cells
    assert sorted(os.listdir(path.parent)) == [
        "accuracy.png",
        "curves.png",
        "report.json",
        "report.md",
        "size.png",
    ]
    for figure in ("accuracy.png", "curves.png", "size.png"):
        assert f"]({figure})" in text and (path.parent / figure).read_bytes().startswith(b"\x89PNG")


def test_a_teacher_that_is_no_better_than_its_student_alone_is_named(make_row):
    rows = [
        make_row("teacher", [0.317], accuracy_interval=(0.29, 0.34)),
        make_row("alone", [0.74, 0.76], accuracy_interval=(0.72, 0.78)),
        make_row("distilled", [0.317, 0.317], accuracy_interval=(0.29, 0.34)),
    ]
    pairs = [("teacher", "alone"), ("teacher", "unlisted")]
    (doubt,) = report.describe_doubts(rows, teachers=pairs, chance=0.1)
    assert doubt == (
        "The teacher 'teacher' (31.7%) is no better than 'alone' (75.0%), which has no teacher: "
        "improve the teacher first."
    )
    better = [make_row("teacher", [0.9], accuracy_interval=(0.88, 0.92)), *rows[1:]]
    assert report.describe_doubts(better, teachers=pairs, chance=0.1) == []


def test_doubts_are_found_from_rows_alone(make_row):
    interval = {"accuracy_interval": (0.08, 0.12), "chance": 0.15}
    rows = [
        make_row("teacher", [0.1], baselines=("alone",), **interval),
        make_row("alone", [0.11], **interval),
    ]
    teacher, chance = report.describe_doubts(rows)
    assert teacher.startswith("The teacher 'teacher' (10.0%) is no better than 'alone' (11.0%)")
    assert chance.startswith("No model is better than chance, 15.0%")
    assert len(report.describe_doubts(rows, teachers=(), chance=0.05)) == 1


def test_results_at_chance_and_ties_are_named(make_row):
    def make_rows(*intervals):
        return [
            make_row(f"model{i}", [(low + high) / 2], accuracy_interval=(low, high))
            for i, (low, high) in enumerate(intervals)
        ]

    (doubt,) = report.describe_doubts(make_rows((0.08, 0.12), (0.09, 0.13)), chance=0.1)
    assert doubt.startswith("No model is better than chance, 10.0%")
    (doubt,) = report.describe_doubts(make_rows((0.70, 0.80), (0.72, 0.82)), chance=0.1)
    assert doubt.startswith("The 95 % intervals of all 2 models overlap")
    assert report.describe_doubts(make_rows((0.70, 0.75), (0.76, 0.82)), chance=0.1) == []
    assert report.describe_doubts(make_rows((0.70, 0.75)), chance=None) == []
    assert report.describe_doubts([make_row("none", [])], chance=0.1) == []


def test_a_report_shows_its_doubts(rows, metrics, tmp_path):
    text = report.write_report(
        tmp_path,
        title="Run",
        rows=rows,
        metrics=metrics,
        comparisons=[("student_direct", "student_alone")],
        settings={},
        environment={},
        teachers=[("student_alone", "teacher")],
        chance=0.1,
    ).read_text()
    assert "**Note:** The teacher 'student_alone' (82.0%) is no better than 'teacher'" in text
