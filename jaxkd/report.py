"""Tables and sentences on a run, and its report, from the rows of `results.json`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxkd.checkpoints import write_atomically
from jaxkd.figures import Metric, Row, plot_accuracy, plot_curves, plot_size, spread

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Headings on the console, in the order in which columns are kept when it is narrow; they stand in the order of _cells.
_HEADINGS = {
    "name": "name",
    "accuracy %": "accuracy\n%",
    "parameters": "params",
    "latency ms": "latency\nms",
    "95 % interval": "95 %\ninterval",
    "size": "size",
    "MFLOPs": "MFLOPs",
    "agreement %": "agrees\n%",
    "training s": "train\ns",
    "ECE %": "ECE\n%",
}


def results_table(rows: Sequence[Row]) -> str:
    """The table of results in GitHub's Markdown.

    Args:
        rows: From `evaluate.summarize`. A value of `None` leaves its cell empty.

    Returns:
        The table, a line per row. `±` is the sample standard deviation over seeds, training time their mean.

    Raises:
        ValueError: If there is no row.

    Example:
        >>> from jaxkd import report
        >>> row = {"name": "student", "accuracy_mean": 0.864, "accuracy_std": None, "accuracy_interval": [0.85, 0.88]}
        >>> row |= {"agreement": None, "ece": 0.031, "parameters": 9, "bytes": 36, "flops": 1e5}
        >>> table = report.results_table([row | {"latency_ms": 0.213, "seconds": [40.0, 42.0]}])
        >>> print(table.splitlines()[-1])
        | student | 86.4 | 85.0–88.0 |  | 3.1 | 9 | 0 kB | 0.1 | 0.21 | 41 |
    """
    if not rows:
        raise ValueError("a table of results needs at least one row")
    cells = [_cells(row) for row in rows]
    return markdown_table(list(cells[0]), [list(row.values()) for row in cells])


def print_table(rows: Sequence[Row], *, console: "Console | None" = None) -> None:
    """Prints the table of results; on a narrow console the less important columns are left out.

    Args:
        rows: From `evaluate.summarize`.
        console: Where to print; by default standard output.

    Raises:
        ValueError: If there is no row.

    Example:
        >>> import sys
        >>> from rich.console import Console
        >>> from jaxkd import report
        >>> row = {"name": "student", "accuracy_mean": 0.864, "accuracy_std": 0.005, "parameters": 167562}
        >>> report.print_table([row], console=Console(file=sys.stdout, width=28))  # doctest: +NORMALIZE_WHITESPACE
                   accuracy
        name              %   params
        ────────────────────────────
        student  86.4 ± 0.5  167,562
    """
    from rich.console import Console
    from rich.measure import Measurement

    if not rows:
        raise ValueError("a table of results needs at least one row")
    console = console or Console()
    unbounded = console.options.update(width=10_000)
    headings = list(_HEADINGS)
    tables = (_console_table(rows, headings[:columns]) for columns in range(len(headings), 1, -1))
    fitting = (table for table in tables if Measurement.get(console, unbounded, table).maximum <= console.width)
    console.print(next(fitting, _console_table(rows, headings[:1])))


def compare(rows: Sequence[Row], name: str, baseline: str) -> str:
    """Says by how much a model beats another one, in percentage points, seed by seed.

    mean ± sample standard deviation of the differences accuracy_i(name) − accuracy_i(baseline)

    Differences of the same seed are compared, as students of one seed share their teacher and their labelled images. A
    difference that is no larger than its own spread is said to be so, and so is one that comes from a single seed. A
    row with one accuracy, such as a pretrained teacher's, stands for all seeds.

    Args:
        rows: From `evaluate.summarize`.
        name: The row to judge.
        baseline: The row to judge it by.

    Returns:
        One or two plain sentences.

    Raises:
        ValueError: If there is no row of that name, or the two have different numbers of seeds, of which none is one.

    Example:
        >>> from jaxkd import report
        >>> rows = [{"name": "alone", "accuracy": [0.82, 0.83]}, {"name": "distilled", "accuracy": [0.86, 0.88]}]
        >>> print(report.compare(rows, "distilled", "alone"))
        Over 2 seeds, distilled is 4.5 ± 0.7 points above alone (82.5 % → 87.0 %).
    """
    after, before = _accuracies(rows, name), _accuracies(rows, baseline)
    if len(after) != len(before) and 1 not in (len(after), len(before)):
        raise ValueError(f"{name} has {len(after)} seeds and {baseline} {len(before)}: pairs need the same seeds")
    differences = 100 * (after - before)
    mean, change = differences.mean(), f"({100 * before.mean():.1f} % → {100 * after.mean():.1f} %)"
    side = {1: "above", 0: "from", -1: "below"}[int(np.sign(mean.round(1)))]
    if len(differences) == 1:
        return (
            f"With one seed, {name} is {abs(mean):.1f} points {side} {baseline} {change}. "
            "One seed cannot tell such a difference from chance."
        )
    spread = differences.std(ddof=1)
    sentence = (
        f"Over {len(differences)} seeds, {name} is {abs(mean):.1f} ± {spread:.1f} points {side} {baseline} {change}."
    )
    return sentence if abs(mean) > spread else f"{sentence} That is within the spread over seeds."


def write_report(
    folder: str | os.PathLike,
    *,
    title: str,
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    comparisons: Sequence[tuple[str, str]],
    settings: Mapping[str, object],
    environment: Mapping[str, object],
    remarks: Sequence[str] = (),
) -> Path:
    """Writes `report.md` and its figures `curves.png`, `accuracy.png` and `size.png`.

    Args:
        folder: Where to; made if absent.
        title: The heading.
        rows: From `evaluate.summarize`.
        metrics: The evaluations during training.
        comparisons: Pairs of a row's name and its baseline's, each of which `compare` puts in words.
        settings: What was asked for, such as epochs and temperature.
        environment: What it ran on, such as versions and device.
        remarks: Further paragraphs in Markdown, before the settings.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: If there are no rows or metrics, or a comparison names an unknown row.

    Example:
        >>> import tempfile
        >>> from jaxkd import report
        >>> row = {"name": "student", "accuracy": [0.86], "accuracy_mean": 0.86, "accuracy_std": None, "parameters": 9}
        >>> metric = {"seed": 0, "stage": "student", "step": 1, "validation_loss": 0.5, "validation_accuracy": 0.8}
        >>> lists = {"rows": [row], "metrics": [metric], "comparisons": []}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = report.write_report(folder, title="Run", **lists, settings={"epochs": 1}, environment={})
        ...     path.read_text(encoding="utf-8").splitlines()[0]
        '# Run'
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [f"- {compare(rows, name, baseline)}" for name, baseline in comparisons]
    parts = [
        f"# {title}",
        results_table(rows),
        "± is the standard deviation over seeds; the interval is Wilson's, for the choice of the test examples.",
        *(["\n".join(sentences)] if sentences else []),
        "![Test accuracy of each model](accuracy.png)",
        "![Test accuracy against number of parameters](size.png)",
        "![Validation loss and accuracy in training](curves.png)",
        *remarks,
        "## Settings",
        markdown_table(["setting", "value"], [[key, str(value)] for key, value in settings.items()]),
        "## Environment",
        markdown_table(["item", "value"], [[key, str(value)] for key, value in environment.items()]),
    ]
    plot_curves(metrics, folder / "curves.png", names=[row["name"] for row in rows])
    plot_accuracy(rows, folder / "accuracy.png")
    plot_size(rows, folder / "size.png")
    # The text last: where it stands, the figures that it shows stand too.
    write_atomically(folder / "report.md", ("\n\n".join(parts) + "\n").encode())
    return folder / "report.md"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown; of more than two columns all but the first are aligned to the right.

    Args:
        headers: The first line.
        rows: The cells of the others.

    Returns:
        The table, without a line's end behind it.

    Example:
        >>> from jaxkd import report
        >>> print(report.markdown_table(["name", "BLEU", "chrF"], [["student", "30.1", "55.2"]]))
        | name | BLEU | chrF |
        |:--|--:|--:|
        | student | 30.1 | 55.2 |
    """
    align = ["--:" if len(headers) > 2 and i else ":--" for i in range(len(headers))]
    lines = [f"| {' | '.join(headers)} |", f"|{'|'.join(align)}|"]
    escaped = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in escaped])


def _cells(row: Row) -> dict[str, str]:
    """A row's cells by their header, from left to right."""
    low, high = row.get("accuracy_interval") or (None, None)
    seconds = row.get("seconds")
    return {
        "name": row["name"],
        "accuracy %": spread(row),
        "95 % interval": f"{_number(low, 100)}–{_number(high, 100)}".strip("–"),
        "agreement %": _number(row.get("agreement"), 100),
        "ECE %": _number(row.get("ece"), 100),
        "parameters": _number(row.get("parameters"), 1, ",.0f"),
        "size": _size(row.get("bytes")),
        "MFLOPs": _number(row.get("flops"), 1e-6, ",.1f"),
        "latency ms": _number(row.get("latency_ms"), 1, ".2f"),
        "training s": _number(np.mean(seconds) if seconds else None, 1, ",.0f"),
    }


def _number(value: float | None, scale: float, form: str = ".1f") -> str:
    return "" if value is None else format(scale * value, form)


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def _console_table(rows: Sequence[Row], columns: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    cells = [{header: cell for header, cell in _cells(row).items() if header in columns} for row in rows]
    for header in cells[0]:
        table.add_column(_HEADINGS[header], justify="left" if header == "name" else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row.values())
    return table


def _accuracies(rows: Sequence[Row], name: str) -> np.ndarray:
    by_name = {row["name"]: np.asarray(row["accuracy"], float) for row in rows}
    if name not in by_name:
        raise ValueError(f"no row is named {name!r}; there are {', '.join(by_name)}")
    return by_name[name]
