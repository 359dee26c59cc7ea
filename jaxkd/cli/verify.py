"""The subcommand `jaxkd verify`: a repetition of a finished run and a comparison of both."""

import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from jaxkd.runs.verify import Verdict

# Each paragraph is one short line: see jaxkd.cli.convert.
DESCRIPTION = """Repeat a finished run and compare the results bit for bit.

The new run has the recorded options, and takes as long as the first one.

Everything but times is compared: metrics, checkpoints, results, student.

The exit status is 0 if all are identical, and 1 otherwise.

Examples:
  python -m jaxkd verify runs/two_cnns/cifar10-3seeds-0123abcd
  python -m jaxkd verify RUN --keep runs/again

The second example keeps the new run, and resumes it if it was stopped.

Without --keep, it is kept if it differs, in a temporary folder."""


@dataclasses.dataclass(frozen=True)
class VerifyCommand:
    """Options of `jaxkd verify`."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the finished run."""
    keep: Annotated[
        Path | None,
        tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: a temporary folder)"),
    ] = None
    """Folder for the new run, which is kept."""

    def execute(self) -> None:
        """Repeats the run, prints the differences and exits with status 1 if there are any."""
        # Imported here, because the help of a command must not wait for JAX.
        from jaxkd.runs.verify import verify

        if self.keep is not None:
            verdicts = verify(self.run, self.keep)
            _print_verdicts(verdicts)
        else:
            temporary = Path(tempfile.mkdtemp(prefix="jaxkd-verify-"))
            verdicts = {}
            try:
                verdicts = verify(self.run, temporary, is_temporary=True)
                _print_verdicts(verdicts)
            finally:
                if _differ(verdicts):
                    print(f"the new run is kept in {temporary}")
                else:
                    shutil.rmtree(temporary, ignore_errors=True)
        if _differ(verdicts):
            sys.exit(1)


def _differ(verdicts: Mapping[Path, "Verdict"]) -> bool:
    return any(verdict.differences for verdict in verdicts.values())


def _print_verdicts(verdicts: Mapping[Path, "Verdict"]) -> None:
    for folder, verdict in verdicts.items():
        _print_verdict(folder, verdict)


def _print_verdict(folder: Path, verdict: "Verdict") -> None:
    if verdict.differences:
        print(f"{folder}: differs")
    else:
        print(f"{folder}: identical ({verdict.compared})")
    for line in verdict.differences:
        print(f"  {line}")
    for line in verdict.conditions:
        print(f"  recorded: {line}")
    if verdict.differences and not verdict.conditions:
        print(
            "  options, data and environment are identical; "
            "a GPU repeats bits only if both runs had --deterministic"
        )
