"""Expected errors of a command line: one line each, and a status that is not 0."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxkd._extras import describe_missing
from jaxkd._messages import shorten

T = TypeVar("T")

MAX_ARGUMENT = 4096
"""Number of characters of the longest argument, that of the longest path on Linux."""
_MAX_QUOTED = 100
# Sections of a parser's error that say nothing of the fault.
_HELP_TITLES = ("For full helptext", "Argument helptext")


def check_arguments(arguments: Sequence[str]) -> None:
    """Ends the process in one line if an argument cannot be printed, saved or read as a path."""
    for argument in arguments:
        quoted = shorten(argument, _MAX_QUOTED)
        if len(argument) > MAX_ARGUMENT:
            exit_with(
                f"an argument has {len(argument):,} characters, of which {MAX_ARGUMENT:,} are "
                f"possible: shorten {quoted}"
            )
        try:
            argument.encode()
        except UnicodeEncodeError:
            exit_with(f"'{quoted}' is not UTF-8, which files need here: rename the file or folder")
        if "\0" in argument:
            exit_with(f"'{quoted}' has a null character: remove it")


def parse(parse_arguments: Callable[[], T]) -> T:
    """Calls a parser, and makes one line of the error that it prints in a box.

    Args:
        parse_arguments: Parses the arguments, or prints an error and exits.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return parse_arguments()
    except SystemExit as stop:
        if stop.code != 2:
            raise
        print(f"error: {_join_box(errors.getvalue())}", file=sys.stderr)
        raise


@contextlib.contextmanager
def errors_in_one_line(*expected: type[Exception]) -> Generator[None]:
    """Ends the process in one line and with status 1 at an expected error.

    Errors of imports and of the operating system, and a lack of memory, are always expected.

    Args:
        *expected: The other types of errors that the user can cause.
    """
    try:
        yield
    except ImportError as error:
        exit_with(describe_missing(error))
    except BrokenPipeError:  # of standard output, see `end_without_reader`
        raise
    except (OSError, *expected) as error:
        exit_with(error)
    except Exception as error:
        if not _is_lack_of_memory(error):
            raise
        exit_with(
            f"there is not enough memory ({shorten(error, 150)}): use smaller batches, images or "
            "networks, or end other programs"
        )


def require(condition: bool, message: str) -> None:
    """Raises `ValueError` with a message unless a condition on the options holds."""
    if not condition:
        raise ValueError(message)


def check_parent(path: Path) -> None:
    """Raises `ValueError` unless the folder of a file to write exists."""
    require(
        path.absolute().parent.is_dir(),
        f"the folder {path.parent} does not exist: create it or choose another one",
    )


def check_new(path: Path) -> None:
    """Raises `ValueError` if a file to write exists, also as a link that leads nowhere."""
    require(
        path.is_file() or not path.exists(),
        f"{path} is not a regular file: choose another --output",
    )
    require(not os.path.lexists(path), f"{path} exists: choose another --output, or remove it")


def option_name(field: str) -> str:
    """Returns the option of a field, such as `--num-seeds`."""
    return f"--{field.replace('_', '-')}"


def exit_with(error: object) -> None:
    """Ends the process with an error of one line. A command that it ends with is never cut."""
    command = getattr(error, "command", "")
    text = shorten(str(error).removesuffix(command), 290)
    sys.exit(" ".join(filter(None, ["error:", text, command])))


@contextlib.contextmanager
def end_without_reader() -> Generator[None]:
    """Ends the process silently if nobody reads its output any more, as in `... --help | head`.

    Its status is 141, that of a program that the closed pipe has killed.
    """
    try:
        try:
            yield
        finally:
            # Here, since Python would flush after the last line of the program.
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end.
        sys.stdout = open(os.devnull, "w")
        sys.exit(141)


def show_warning(
    message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None
) -> None:
    """Prints a warning on one line, in place of `warnings.showwarning`."""
    print_warning(message)


def print_warning(message: object) -> None:
    """Prints a warning on one line of stderr."""
    print(f"warning: {shorten(message, 290)}", file=sys.stderr)


def _join_box(box: str) -> str:
    """Joins what a parser prints in a box: faults and similar options, without their help."""
    # Without the title, which the next lines repeat, and the frame, which only UTF-8 has.
    lines = [re.sub("^[│|] ?|[│|]$", "", line).rstrip() for line in box.strip().splitlines()[1:]]
    sections: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[ ─╰╯+-]*", line):
            sections.append([])
        # The help of an option is indented twice.
        elif not line.startswith(" " * 8):
            sections[-1].append(line.strip())
    texts = [" ".join(section) for section in sections]
    faults = [text for text in texts if text and not text.startswith(_HELP_TITLES)]
    asked = re.search(r"For full helptext, (?:run|see):? (.* --help)", " ".join(texts))
    advice = f": see {asked[1]}" if asked else ""
    return shorten("; ".join(faults), 290 - len(advice)) + advice


def _is_lack_of_memory(error: Exception) -> bool:
    # By its name, because JAX need not have been imported.
    is_from_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (is_from_jax and "RESOURCE_EXHAUSTED" in str(error))
