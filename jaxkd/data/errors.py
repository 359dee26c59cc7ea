"""The error of loading data, and helpers that turn common failures into it."""

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from jaxkd._extras import describe_missing
from jaxkd._messages import shorten


class DataError(ValueError):
    """A dataset cannot be loaded; the one-line message names the cause and the remedy."""

    def __init__(self, message: str, *, command: str = "") -> None:
        """Makes the error.

        Args:
            message: Cause and remedy. Line breaks become spaces, and of more than 300 characters
                the middle is left out.
            command: A command that the reader copies, appended whole after a space.
        """
        super().__init__(f"{shorten(message)} {command}".strip())
        self.command = command


def warn(message: str) -> None:
    """Warns on one line of at most 300 characters, at the line of code that called `jaxkd.data`."""
    # Counted, because helpers and, before Python 3.12, comprehensions are frames of their own.
    # `skip_file_prefixes` came with Python 3.12.
    level = 2
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("jaxkd.data"):
        frame = frame.f_back
        level += 1
    warnings.warn(shorten(message), stacklevel=level)


def import_or_raise(module: str) -> Any:
    """Imports a module on which `import jaxkd.data` does not depend.

    Args:
        module: Its full name, such as `"PIL.Image"`.

    Returns:
        The module.

    Raises:
        DataError: If the module, or something that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_package_error(error) from error


def expand_user_path(path: str | os.PathLike[str]) -> Path:
    """Replaces a leading `~` or `~user` by the home directory.

    Raises:
        DataError: If there is no such user, or the path has a null character.
    """
    # The system's functions raise a ValueError, each with words of its own.
    if "\0" in os.fspath(path):
        raise DataError(f"{os.fspath(path)!r} has a null character: check the path")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"the home directory of {os.fspath(path)!r} is unknown: check the path"
        ) from error


def missing_package_error(error: ImportError) -> DataError:
    """Makes the error that names a missing package and the command that installs it."""
    return DataError("", command=describe_missing(error, "experiments"))


def one_line(error: Exception) -> str:
    """Returns an error's text on one line of at most 150 characters, or its type if it has none."""
    return shorten(error, 150) or type(error).__name__
