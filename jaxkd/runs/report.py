"""Tables, comparisons and the report of a run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxkd._files import write_atomically
from jaxkd._messages import list_some
from jaxkd.runs._report_record import ReportRecord
from jaxkd.runs.errors import add_install_command
from jaxkd.runs.figures import Metric, plot_accuracy, plot_curves, plot_size
from jaxkd.runs.results import Column, ResultRow, choose_columns
from jaxkd.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def results_table(rows: Sequence[ResultRow]) -> str:
    """Formats the table of results in GitHub's Markdown.

    Args:
        rows: The rows. A value of `None` gives an empty cell.

    Returns:
        The table, one line per row. `±` is the sample standard deviation over seeds. The training
        time is the mean over seeds.

    Raises:
        ValueError: If there is no row.
        ImportError: If tabulate is missing.

    Example:
        >>> from jaxkd.runs import ResultRow, report
        >>> row = ResultRow("student", accuracy=(0.86, 0.87), parameters=9, seconds=(40.0, 42.0))
        >>> line = report.results_table([row]).splitlines()[-1]
        >>> [cell.strip() for cell in line.split("|") if cell.strip()]
        ['student', '86.5 ± 0.7', '9', '41']
    """
    if not rows:
        raise ValueError("a table of results needs at least one row")
    columns = choose_columns(rows)
    cells = [[column.cell(row) for column in columns] for row in rows]
    return markdown_table([column.title for column in columns], cells)


def print_table(rows: Sequence[ResultRow], *, console: "Console | None" = None) -> None:
    """Prints the table of results. A narrow console leaves out the less important columns.

    Args:
        rows: The rows.
        console: The console to print on. Defaults to standard output.

    Raises:
        ValueError: If there is no row.
        ImportError: If rich is missing.

    Example:
        >>> import sys
        >>> from rich.console import Console
        >>> from jaxkd.runs import ResultRow, report
        >>> row = ResultRow("student", accuracy=(0.86, 0.87), parameters=167562)
        >>> console = Console(file=sys.stdout, width=28)
        >>> report.print_table([row], console=console)  # doctest: +NORMALIZE_WHITESPACE
                   accuracy
        name              %   params
        ────────────────────────────
        student  86.5 ± 0.7  167,562
    """
    with add_install_command("experiments"):
        from rich.console import Console
        from rich.measure import Measurement

    if not rows:
        raise ValueError("a table of results needs at least one row")
    console = console or Console()
    # Measured without a limit: within its own width, a console would wrap cells to make them fit.
    unbounded = console.options.update(width=10_000)
    by_priority = sorted(choose_columns(rows), key=lambda column: column.priority)
    for count in range(len(by_priority), 1, -1):
        table = _console_table(rows, by_priority[:count])
        if Measurement.get(console, unbounded, table).maximum <= console.width:
            break
    else:
        table = _console_table(rows, by_priority[:1])
    console.print(table)


def print_results(
    rows: Sequence[ResultRow],
    *,
    comparisons: Sequence[tuple[str, str]] = (),
    teachers: Sequence[tuple[str, str]] | None = None,
    chance: float | None = None,
) -> None:
    """Prints what an experiment prints at its end: table, comparisons and doubts.

    Args:
        rows: The rows.
        comparisons: Names of a row and its baseline, for `compare_rows`.
        teachers: Names of a teacher and of a stage without a teacher, for `describe_doubts`.
        chance: Accuracy of the best constant prediction, for `describe_doubts`.

    Raises:
        ValueError: If there is no row, or a comparison names an unknown row.
        ImportError: If rich is missing.
    """
    print_table(rows)
    for name, baseline in comparisons:
        print(compare_rows(rows, name, baseline))
    for doubt in describe_doubts(rows, teachers=teachers, chance=chance):
        print(f"Note: {doubt}")


def compare_rows(rows: Sequence[ResultRow], name: str, baseline: str) -> str:
    """Describes the difference in accuracy between two models, in percentage points.

    mean ± sample standard deviation of the differences accuracy_i(name) − accuracy_i(baseline)

    The differences are those of equal seeds, because students of one seed share their teacher and
    their labelled images. The text claims no difference within twice the standard error of the
    mean, the deviation divided by √n for n seeds, nor from a single seed. A row with one accuracy,
    such as that of a pretrained teacher, counts for all seeds.

    Args:
        rows: The rows.
        name: Name of the row to judge.
        baseline: Name of the row to compare it with.

    Returns:
        One or two sentences.

    Raises:
        ValueError: If there is no row of such a name, or several, a row has no accuracy or one
            that is NaN, or the numbers of seeds differ and neither is 1.

    Example:
        >>> from jaxkd.runs import ResultRow, report
        >>> alone = ResultRow("alone", accuracy=(0.82, 0.83))
        >>> distilled = ResultRow("distilled", accuracy=(0.86, 0.88))
        >>> print(report.compare_rows([alone, distilled], "distilled", "alone"))
        Over 2 seeds, distilled is 4.5 ± 0.7 points above alone (82.5 % → 87.0 %).
    """
    accuracies = _find_accuracies(rows, name)
    baseline_accuracies = _find_accuracies(rows, baseline)
    counts = len(accuracies), len(baseline_accuracies)
    if counts[0] != counts[1] and 1 not in counts:
        raise ValueError(
            f"{name} has {counts[0]} seeds and {baseline} {counts[1]}: pairs need the same seeds"
        )
    # A single accuracy, such as that of a pretrained teacher, broadcasts over the seeds.
    differences = 100 * (accuracies - baseline_accuracies)
    mean = differences.mean()
    single = [n for n, count in zip((name, baseline), counts, strict=True) if count == 1]
    # A stage that was trained once is not told apart from a pretrained model.
    note = f" {single[0]} has one accuracy, which counts for all seeds." if len(single) == 1 else ""
    change = f"({100 * baseline_accuracies.mean():.1f} % → {100 * accuracies.mean():.1f} %)"
    # Rounded first: a difference that is printed as 0.0 is neither above nor below.
    side = {1: "above", 0: "from", -1: "below"}[int(np.sign(mean.round(1)))]
    if len(differences) == 1:
        return (
            f"With one seed, {name} is {abs(mean):.1f} points {side} {baseline} {change}. "
            "One seed does not separate such a difference from chance."
        )
    # The deviation of paired differences leaves out what a seed does to both models.
    std = differences.std(ddof=1)
    sentence = (
        f"Over {len(differences)} seeds, {name} is {abs(mean):.1f} ± {std:.1f} points "
        f"{side} {baseline} {change}.{note}"
    )
    margin = 2 * std / len(differences) ** 0.5
    if abs(mean) > margin:
        return sentence
    return (
        f"{sentence} That is within twice the standard error of the mean, {margin:.1f} points: no "
        "difference is claimed."
    )


def describe_doubts(
    rows: Sequence[ResultRow],
    *,
    teachers: Sequence[tuple[str, str]] | None = None,
    chance: float | None = None,
) -> list[str]:
    """Describes what makes the results of a comparison doubtful.

    That is a teacher that is no better than its student's network without a teacher, results of all
    models at the level of chance, and intervals of all models that overlap.

    Args:
        rows: The rows. Those without an accuracy are passed over.
        teachers: Names of a teacher and of a stage without a teacher, such as from
            `jaxkd.distill.teacher_baselines`. Pairs of which a row is missing are passed over. By
            default those of the rows, which `jaxkd.distill.evaluate_plan` has found.
        chance: Accuracy of the best constant prediction, such as from
            `jaxkd.evaluate.chance_accuracy`. By default that of the rows.

    Returns:
        A sentence for each doubt, none if there is no doubt.

    Example:
        >>> from jaxkd.runs import ResultRow, report
        >>> teacher = ResultRow("teacher", accuracy=(0.317,))
        >>> alone = ResultRow("alone", accuracy=(0.75,))
        >>> (doubt,) = report.describe_doubts([teacher, alone], teachers=[("teacher", "alone")])
        >>> print(doubt.split(":")[0])
        The teacher 'teacher' (31.7%) is no better than 'alone' (75.0%), which has no teacher
    """
    teachers = _find_teachers(rows) if teachers is None else teachers
    chance = _find_chance(rows) if chance is None else chance
    by_name = {row.name: row for row in rows if row.accuracy}
    sentences = []
    for teacher, alone in teachers:
        if teacher in by_name and alone in by_name:
            accuracy, baseline = (
                float(np.mean(by_name[name].accuracy)) for name in (teacher, alone)
            )
            if accuracy <= baseline:
                sentences.append(
                    f"The teacher {teacher!r} ({accuracy:.1%}) is no better than {alone!r} "
                    f"({baseline:.1%}), which has no teacher: improve the teacher first."
                )
    lows = [low for low, _ in map(_get_interval, by_name.values())]
    highs = [high for _, high in map(_get_interval, by_name.values())]
    if chance is not None and lows and max(lows) <= chance:
        sentences.append(
            f"No model is better than chance, {chance:.1%}, the share of the most frequent class: "
            "check labels, inputs and learning rate."
        )
    elif len(by_name) > 1 and max(lows) <= min(highs):
        sentences.append(
            f"The 95 % intervals of all {len(by_name)} models overlap: so few test examples do not "
            "tell them apart."
        )
    return sentences


_ACCURACY_FIGURES = (
    "![Test accuracy of each model](accuracy.png)",
    "![Test accuracy against number of parameters](size.png)",
)


def write_report(
    folder: str | os.PathLike,
    *,
    title: str,
    rows: Sequence[ResultRow],
    metrics: Sequence[Metric],
    comparisons: Sequence[tuple[str, str]],
    settings: Mapping[str, object],
    environment: Mapping[str, object],
    remarks: Sequence[str] = (),
    teachers: Sequence[tuple[str, str]] | None = None,
    chance: float | None = None,
) -> Path:
    """Writes `report.md` and its figures `curves.png`, `accuracy.png` and `size.png`.

    Rows that have scores of one's own instead of an accuracy get `curves.png` alone.

    It also writes `report.json`: title, comparisons, remarks and the like, from which
    `jaxkd.runs.redraw.redraw_report` writes the same report again.

    Args:
        folder: The folder of the report. It is created if absent.
        title: The heading.
        rows: The rows of the table of results.
        metrics: The records of the evaluations during training.
        comparisons: Names of a row and its baseline, for `compare_rows`.
        settings: The configuration, such as epochs and temperature.
        environment: Versions, device and the like, as from `jaxkd.runs.describe_environment`.
        remarks: Further paragraphs in Markdown, before the settings.
        teachers: Names of a teacher and of a stage without a teacher, for `describe_doubts`.
        chance: Accuracy of the best constant prediction, for `describe_doubts`.

    Returns:
        The path of `report.md`.

    Raises:
        TypeError: If `comparisons` are no pairs, or `remarks` is one string.
        ValueError: If there are no rows or metrics, or a comparison names an unknown row.
        ImportError: If matplotlib or tabulate is missing.

    Example:
        >>> import tempfile
        >>> from jaxkd.runs import ResultRow, report
        >>> row = ResultRow("student", accuracy=(0.86,), parameters=9)
        >>> metric = {"seed": 0, "stage": "student", "step": 1}
        >>> metric |= {"validation_loss": 0.5, "validation_accuracy": 0.8}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = report.write_report(
        ...         folder,
        ...         title="Run",
        ...         rows=[row],
        ...         metrics=[metric],
        ...         comparisons=[],
        ...         settings={"epochs": 1},
        ...         environment={},
        ...     )
        ...     path.read_text(encoding="utf-8").splitlines()[0]
        '# Run'
    """
    _check_texts(comparisons, remarks)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [f"- {compare_rows(rows, name, baseline)}" for name, baseline in comparisons]
    doubts = describe_doubts(rows, teachers=teachers, chance=chance)
    doubts += _describe_other_trainings(rows, metrics)
    teachers = _find_teachers(rows) if teachers is None else teachers
    chance = _find_chance(rows) if chance is None else chance
    # Rows without any accuracy have scores of the user's own.
    has_accuracy = any(row.accuracy for row in rows) or not any(row.scores for row in rows)
    baselines = {baseline for _, baseline in comparisons} - {teacher for teacher, _ in teachers}
    # Part of the remarks, so that a report that is drawn again has them, too.
    remarks = [*remarks, *_describe_cached_teachers(rows)]
    record = ReportRecord(title, comparisons, remarks, teachers, chance, settings, environment)
    paragraphs = [
        f"# {title}",
        results_table(rows),
        "± is the standard deviation over seeds; "
        "the interval is Wilson's, for the choice of the test examples."
        if has_accuracy
        else "± is the standard deviation over seeds.",
        *(["\n".join(sentences)] if sentences else []),
        *(f"**Note:** {doubt}" for doubt in doubts),
        *(_ACCURACY_FIGURES if has_accuracy else []),
        "![Validation scores in training](curves.png)",
        *remarks,
        "## Settings",
        markdown_table(["setting", "value"], list(settings.items())),
        "## Environment",
        markdown_table(["item", "value"], list(environment.items())),
    ]
    plot_curves(metrics, folder / "curves.png", names=[row.name for row in rows])
    # With several baselines, a line for one of them would be arbitrary.
    baseline = baselines.pop() if len(baselines) == 1 else None
    if has_accuracy:
        plot_accuracy(rows, folder / "accuracy.png", baseline=baseline)
        plot_size(rows, folder / "size.png")
    record.write(folder)
    # The text comes last, so that a report never refers to a figure that is missing.
    path = folder / "report.md"
    write_atomically(path, ("\n\n".join(paragraphs) + "\n").encode())
    return path


def _describe_cached_teachers(rows: Sequence[ResultRow]) -> list[str]:
    """Returns a paragraph on what the models learned from; none without cached teachers."""
    # Most students of a plan share their teachers.
    lines = dict.fromkeys(line for row in rows for line in row.cached_teachers)
    return [f"Cached teachers: {'; '.join(lines)}."] if lines else []


def report_run(
    run: Run,
    rows: Sequence[ResultRow],
    *,
    title: str,
    comparisons: Sequence[tuple[str, str]] = (),
    remarks: Sequence[str] = (),
    teachers: Sequence[tuple[str, str]] | None = None,
    chance: float | None = None,
) -> Path:
    """Writes `results.json`, `report.md`, its figures and `report.json` into a run's folder.

    Args:
        run: The run, whose metrics, configuration and environment the report shows.
        rows: The rows of the table of results, such as from `jaxkd.distill.evaluate_plan`.
        title: The heading.
        comparisons: Names of a row and its baseline, for `compare_rows`.
        remarks: Further paragraphs in Markdown.
        teachers: Names of a teacher and of a stage without a teacher, for `describe_doubts`.
        chance: Accuracy of the best constant prediction, for `describe_doubts`.

    Returns:
        The path of `report.md`.

    Raises:
        TypeError: If `comparisons` are no pairs, or `remarks` is one string.
        ValueError: If there are no rows or metrics, or a comparison names an unknown row.
        ImportError: If matplotlib or tabulate is missing.
    """
    _check_texts(comparisons, remarks)
    run.write_results(rows)
    return write_report(
        run.folder,
        title=title,
        rows=rows,
        metrics=run.metrics(),
        comparisons=comparisons,
        settings=run.config,
        environment=run.environment,
        remarks=remarks,
        teachers=teachers,
        chance=chance,
    )


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats a table in GitHub's Markdown.

    The first column is aligned to the left, and the others to the right if there are more than two.

    Args:
        headers: The headings.
        rows: The cells of each row. Line breaks in them become spaces.

    Returns:
        The table, without a line break at the end.

    Raises:
        ImportError: If tabulate is missing.

    Example:
        >>> from jaxkd.runs import report
        >>> print(report.markdown_table(["name", "BLEU", "chrF"], [["student", "30.1", "55.2"]]))
        | name    |   BLEU |   chrF |
        |:--------|-------:|-------:|
        | student |   30.1 |   55.2 |
    """
    with add_install_command():
        from tabulate import tabulate

    other_columns = "right" if len(headers) > 2 else "left"
    alignment = ("left", *[other_columns] * (len(headers) - 1))
    return tabulate(
        [[_format_cell(cell) for cell in row] for row in rows],
        headers=list(headers),
        tablefmt="pipe",
        # Cells are text already: as a number, 86.0 would be printed as 86.
        disable_numparse=True,
        # tabulate 0.9 fails on the alignment of a table without rows.
        colalign=alignment if rows else None,
    )


def _format_cell(cell: object) -> str:
    """Returns a cell's text, in which nothing ends the cell or its row."""
    return " ".join(str(cell).splitlines()).replace("|", r"\|")


def _check_texts(comparisons: Sequence[tuple[str, str]], remarks: Sequence[str]) -> None:
    """Raises `TypeError` for one string or pair where a sequence of them is meant."""
    # A string is a sequence as well, of its characters.
    if isinstance(remarks, str):
        raise TypeError('remarks must be a sequence of paragraphs: write remarks=["..."]')
    if isinstance(comparisons, str) or any(
        isinstance(pair, str) or len(pair) != 2 for pair in comparisons
    ):
        raise TypeError(
            "comparisons must be pairs of a row's name and its baseline's: write "
            'comparisons=[("student", "baseline")]'
        )


def _console_table(rows: Sequence[ResultRow], columns: Sequence[Column]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    # Not in the order of their priority.
    titles = {column.title for column in columns}
    columns = [column for column in choose_columns(rows) if column.title in titles]
    for column in columns:
        justify = "left" if column.title == "name" else "right"
        table.add_column(column.short_title, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table


def _describe_other_trainings(rows: Sequence[ResultRow], metrics: Sequence[Metric]) -> list[str]:
    """Describes the trainings of earlier calls in a run's folder, which only the curves show."""
    seeds: dict[str, set[int]] = {}
    for metric in metrics:
        seeds.setdefault(str(metric["stage"]), set()).add(metric["seed"])
    sentences = []
    names = {row.name for row in rows}
    if others := [stage for stage in seeds if stage not in names]:
        sentences.append(
            f"The curves also show {list_some(others)}, which the table does not have: another "
            "plan was trained in this folder."
        )
    for row in rows:
        num_seeds = len(seeds.get(row.name, ()))
        if row.accuracy and num_seeds > len(row.accuracy):
            sentences.append(
                f"The curves of {row.name!r} are those of {num_seeds} seeds, and its row in the "
                f"table of {len(row.accuracy)}: other seeds were trained in this folder."
            )
    return sentences


def _find_teachers(rows: Sequence[ResultRow]) -> list[tuple[str, str]]:
    """Returns the names of each teacher and of the stages that it should be better than."""
    return [(row.name, alone) for row in rows for alone in row.baselines]


def _find_chance(rows: Sequence[ResultRow]) -> float | None:
    return next((row.chance for row in rows if row.chance is not None), None)


def _get_interval(row: ResultRow) -> tuple[float, float]:
    """Returns the interval of a row's accuracy, or the accuracy alone where there is none."""
    mean = float(np.mean(row.accuracy))
    return row.accuracy_interval or (mean, mean)


def _find_accuracies(rows: Sequence[ResultRow], name: str) -> np.ndarray:
    found = [row for row in rows if row.name == name]
    if not found:
        names = list_some(dict.fromkeys(row.name for row in rows))
        raise ValueError(f"there is no row named {name!r}: choose from {names}")
    if len(found) > 1:
        raise ValueError(f"there are {len(found)} rows named {name!r}: give them different names")
    accuracies = np.asarray(found[0].accuracy, float)
    if not accuracies.size or np.isnan(accuracies).any():
        raise ValueError(f"the row {name!r} has no accuracy to compare, or one that is NaN")
    return accuracies
