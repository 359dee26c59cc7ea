"""The error of a run, the advice on a missing package, and the check of a folder's name."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path


class RunError(ValueError):
    """A run cannot be started or continued; the one-line message names the cause and the remedy."""


@contextlib.contextmanager
def add_install_command(extra: str = "train") -> Generator[None]:
    """Adds to an `ImportError` the command that installs the missing package.

    Args:
        extra: The extra of jaxkd-distill that contains the package.

    Raises:
        ImportError: If the block raises one. The message has one line.
    """
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(
            f"this needs {error.name}, which cannot be imported ({reason}): "
            f"pip install 'jaxkd-distill[{extra}]'",
            name=error.name,
        ) from error


def check_folder_name(folder: str | os.PathLike) -> Path:
    """Returns a folder's path after a check that every package can write below it.

    Orbax fails with another name only when it saves, which may be hours later.

    Args:
        folder: The folder. It need not exist.

    Raises:
        RunError: If the name is not UTF-8 or contains a null character.
    """
    path = Path(folder)
    try:
        name = str(path.absolute()).encode()
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name:
        raise RunError(
            f"the folder {ascii(str(path))[:200]} has a name that is not UTF-8: name another folder"
        )
    return path
