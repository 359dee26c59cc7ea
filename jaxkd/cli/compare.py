"""The subcommand `jaxkd compare`: finished runs side by side."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

# Each paragraph is one short line: see jaxkd.cli.convert.
DESCRIPTION = """Compare finished runs: results, options, differences over seeds.

Each other run is compared with the first one, stage by stage.

Differences are paired where seeds and data are equal.

None is claimed if the data differ or its 95 % interval has 0.

Examples:
  python -m jaxkd compare runs/a runs/b
  python -m jaxkd compare runs/a runs/b runs/c --stage kd -o runs/compared
  python -m jaxkd compare runs/a:alone runs/b:kd --json"""


@dataclasses.dataclass(frozen=True)
class CompareCommand:
    """Options of `jaxkd compare`."""

    runs: tyro.conf.Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    ]
    """Folders of two runs or more, each with :STAGE behind it to choose a stage."""
    stage: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: all)")
    ] = None
    """Stage to compare."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print a JSON object."""
    output: Annotated[
        Path | None, tyro.conf.arg(metavar="FOLDER", aliases=["-o"], help_behavior_hint="")
    ] = None
    """Folder for compare.md, compare.json and the curves of all runs in one figure."""

    def execute(self) -> None:
        """Prints the comparison, and writes it if there is a folder."""
        # Imported here, because the help of a command must not wait for JAX.
        from jaxkd.runs import comparison, report

        found = comparison.compare_results(self.runs, stage=self.stage)
        path = None if self.output is None else comparison.write_comparison(found, self.output)
        if self.json:
            print(json.dumps(found.to_json(), indent=2, allow_nan=False, default=str))
            return
        report.print_table(found.rows)
        for name, values in found.options.items():
            sides = zip(found.runs, values, strict=True)
            print(f"{name}: {', '.join(f'{value} in {run}' for run, value in sides)}")
        for sentence in (*found.differences, *found.notes):
            print(sentence)
        if path is not None:
            print(f"wrote {path}")
