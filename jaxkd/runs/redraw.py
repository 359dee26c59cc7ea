"""The report of a run, drawn again from its files."""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxkd._messages import list_some
from jaxkd.runs._report_record import RECORD_FILE, ReportRecord, read_record
from jaxkd.runs.errors import RunError
from jaxkd.runs.figures import plot_curves
from jaxkd.runs.report import write_report
from jaxkd.runs.results import ResultRow
from jaxkd.runs.run import Run, read_run


class RedrawnReport(NamedTuple):
    """What was drawn.

    Attributes:
        rows: The rows of the table; none for a run without results.
        comparisons: Names of a row and its baseline, for `report.print_results`.
        teachers: Names of a teacher and of a stage without a teacher, for the same.
        chance: Accuracy of the best constant prediction, for the same.
        path: The file to start with: `report.md`, or `curves.png` without a report.
        left_out: A sentence on what the run's files do not tell, empty if they tell all.
    """

    rows: Sequence[ResultRow]
    comparisons: Sequence[tuple[str, str]]
    teachers: Sequence[tuple[str, str]]
    chance: float | None
    path: Path
    left_out: str


def redraw_report(
    folder: str | os.PathLike, *, output: str | os.PathLike | None = None
) -> RedrawnReport:
    """Writes `report.md` and its figures again, from the files of a run.

    Nothing is trained or measured. The report has the bytes of the one that `report.write_report`
    wrote, if the run's files did not change since. A run without results, or with rows that have no
    accuracy, gets its curves alone.

    Args:
        folder: The folder of the run.
        output: The folder of the report, which is created if absent. By default that of the run.

    Returns:
        The rows, what `report.print_results` shows besides, the file to start with, and what is
        left out.

    Raises:
        RunError: If there is no run or a file of it is damaged, if there are no metrics, if
            `output` holds another run or is no folder, or if a report of the run would be lost.
        ValueError: If the results lack a row of a comparison.
        OSError: If a file cannot be read or written.
        ImportError: If matplotlib or tabulate is missing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from jaxkd import runs
        >>> from jaxkd.runs import redraw, report
        >>> metric = {"seed": 0, "stage": "student", "step": 1}
        >>> metric |= {"validation_loss": 0.5, "validation_accuracy": 0.8}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = runs.open_run(Path(folder) / "run", {"alpha": 0.5})
        ...     run.append_metrics(metric)
        ...     row = runs.ResultRow("student", accuracy=(0.86,), parameters=9)
        ...     before = report.report_run(run, [row], title="Mine").read_bytes()
        ...     redrawn = redraw.redraw_report(run.folder, output=Path(folder) / "again")
        ...     redrawn.path.read_bytes() == before
        True
    """
    run = read_run(folder)
    rows = run.read_results() if (run.folder / "results.json").exists() else []
    metrics = run.metrics()
    if not metrics:
        raise RunError(
            f"{run.folder} has no metrics, from which the curves are drawn: run it first"
        )
    target = run.folder if output is None else Path(output)
    left_out = _find_obstacle(run, rows)
    _check_target(run, target, has_report=not left_out)
    record = read_record(run.folder)
    if left_out:
        target.mkdir(parents=True, exist_ok=True)
        path = target / "curves.png"
        plot_curves(metrics, path, names=[row.name for row in rows])
        return RedrawnReport(rows, (), (), None, path, left_out)
    known = record or ReportRecord(
        run.folder.resolve().name, settings=run.config, environment=run.environment
    )
    if record is None:
        left_out = (
            f"{run.folder} has no {RECORD_FILE}: title, comparisons, remarks and notes of its "
            "report are left out"
        )
    path = write_report(
        target,
        title=known.title,
        rows=rows,
        metrics=metrics,
        comparisons=known.comparisons,
        settings=known.settings,
        environment=known.environment,
        remarks=known.remarks,
        teachers=known.teachers,
        chance=known.chance,
    )
    _copy_figures(known.remarks, run.folder, target)
    return RedrawnReport(rows, known.comparisons, known.teachers, known.chance, path, left_out)


def _check_target(run: Run, target: Path, *, has_report: bool) -> None:
    """Raises `RunError` if a report in a folder would be in the place of something else."""
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is not a folder: choose another --output")
    if (target / "config.json").exists() and target.resolve() != run.folder.resolve():
        raise RunError(f"{target} holds another run: choose another --output")
    path = target / "report.md"
    # A report of another form, such as that of translations, or of an earlier version.
    if has_report and path.exists() and not (target / RECORD_FILE).exists():
        raise RunError(
            f"{path} has no {RECORD_FILE} beside it, without which its title, comparisons and "
            "remarks would be lost: name a new folder with --output"
        )


def _find_obstacle(run: Run, rows: Sequence[ResultRow]) -> str:
    """Describes why a run has curves but no report, or returns an empty string."""
    if not rows:
        return f"{run.folder} has no results yet, so only its curves are drawn"
    lacking = [row.name for row in rows if not row.accuracy or row.parameters is None]
    if lacking:
        return (
            f"{run.folder} has no accuracy or size of {list_some(lacking)}, so only its curves are "
            "drawn"
        )
    return ""


def _copy_figures(remarks: Sequence[str], folder: Path, target: Path) -> None:
    """Copies the figures of remarks, which the run has drawn into its folder."""
    if target.resolve() == folder.resolve():
        return
    for name in re.findall(r"!\[[^\]]*\]\(([^()/\\]+)\)", "\n".join(remarks)):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
