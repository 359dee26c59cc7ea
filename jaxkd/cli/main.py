"""The entry point of the `jaxkd` command."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jaxkd._cpu_flags import add_flags
from jaxkd.cli import errors

if TYPE_CHECKING:
    from jaxkd.cli.convert import ConvertCommand
    from jaxkd.cli.verify import VerifyCommand

_DESCRIPTION = """Knowledge distillation for JAX.

Run `python -m jaxkd COMMAND --help` for the options of a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand.

    An expected error ends in one line on stderr and exit status 1. Invalid options end in exit
    status 2, and Ctrl-C in exit status 130.

    Args:
        arguments: The arguments of the command. Defaults to those of the command line.
    """
    if arguments is None:
        # Only as a command, since a caller in Python chooses the flags.
        add_flags()
        arguments = sys.argv[1:]
    arguments = list(arguments)
    errors.check_arguments(arguments)
    try:
        with errors.end_without_reader(), errors.errors_in_one_line(ValueError):
            _parse(arguments or ["--help"]).execute()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _parse(arguments: Sequence[str]) -> "ConvertCommand | VerifyCommand":
    # Not at the top of the module, because `main` reports a missing tyro.
    import tyro

    from jaxkd.cli import convert, verify

    def describe(name: str, description: str) -> str:
        # tyro also shows the description in the list of commands, where examples would be clutter.
        return description if arguments[0] == name else description.partition("\n")[0]

    def parse() -> "ConvertCommand | VerifyCommand":
        return tyro.cli(
            Annotated[
                convert.ConvertCommand,
                tyro.conf.subcommand(
                    "convert", description=describe("convert", convert.DESCRIPTION)
                ),
            ]
            | Annotated[
                verify.VerifyCommand,
                tyro.conf.subcommand("verify", description=describe("verify", verify.DESCRIPTION)),
            ],
            prog="jaxkd" if Path(sys.argv[0]).stem == "jaxkd" else "python -m jaxkd",
            description=_DESCRIPTION,
            args=arguments,
        )

    return errors.parse(parse)
