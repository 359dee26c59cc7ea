"""The subcommand `jaxkd report`: the report of a run, drawn again."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

# Each paragraph is one short line: see jaxkd.cli.convert.
DESCRIPTION = """Draw the report of a run again, from the files in its folder.

Nothing is trained or measured: report.md and its figures are written.

A run that was stopped has no results yet, and gets its curves alone.

Examples:
  python -m jaxkd report runs/two_cnns/cifar10-3seeds-0123abcd
  python -m jaxkd report RUN --output FOLDER

The second example leaves the run as it is."""


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """Options of `jaxkd report`."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the run."""
    output: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", aliases=["-o"], help_behavior_hint="(default: the run's)"),
    ] = None
    """Folder for the report."""

    def execute(self) -> None:
        """Draws the report and prints the table, comparisons and doubts."""
        # Imported here, because the help of a command must not wait for JAX.
        from jaxkd.cli.folders import note_unfinished
        from jaxkd.runs import report
        from jaxkd.runs.redraw import redraw_report

        redrawn = redraw_report(self.run, output=self.output)
        note_unfinished(self.run)
        if redrawn.rows:
            report.print_results(
                redrawn.rows,
                comparisons=redrawn.comparisons,
                teachers=redrawn.teachers,
                chance=redrawn.chance,
            )
        if redrawn.left_out:
            print(f"Note: {redrawn.left_out}.")
        print(f"wrote {redrawn.path}")
