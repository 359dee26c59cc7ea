"""The entry point of the `jaxkd` command."""

import functools
import importlib
import operator
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from jaxkd._cpu_flags import add_flags
from jaxkd.cli import errors

COMMANDS = ("distill", "predict", "compare", "report", "export", "convert", "verify")
"""The subcommands. The module `jaxkd.cli.NAME` has a class `NameCommand` and a DESCRIPTION."""

_DESCRIPTION = """Knowledge distillation for JAX.

Run `python -m jaxkd COMMAND --help` for the options of a command."""


class Command(Protocol):
    """A parsed subcommand."""

    def execute(self) -> None:
        """Runs it."""
        ...


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


def _parse(arguments: Sequence[str]) -> "Command":
    # Not at the top of the module, because `main` reports a missing tyro.
    import tyro

    from jaxkd.cli.help import join_help_lines

    commands = {name: importlib.import_module(f"jaxkd.cli.{name}") for name in COMMANDS}

    def annotate(name: str, command: type) -> Any:
        join_help_lines(command)
        description = commands[name].DESCRIPTION
        # tyro also shows the description in the list of commands, where examples would be clutter.
        if arguments[0] != name:
            description = description.partition("\n")[0]
        return Annotated[command, tyro.conf.subcommand(name, description=description)]

    annotated = [
        annotate(name, getattr(module, f"{name.capitalize()}Command"))
        for name, module in commands.items()
    ]

    def parse() -> "Command":
        return tyro.cli(
            functools.reduce(operator.or_, annotated),
            prog="jaxkd" if Path(sys.argv[0]).stem == "jaxkd" else "python -m jaxkd",
            description=_DESCRIPTION,
            args=arguments,
        )

    return errors.parse(parse)
