"""The error of a run, the advice on a missing package, and the check of a folder's name."""

import os
from pathlib import Path

from jaxkd._extras import add_install_command

__all__ = ["RunError", "add_install_command", "check_folder_name"]


class RunError(ValueError):
    """A run cannot be started or continued; the one-line message names the cause and the remedy."""


def check_folder_name(folder: str | os.PathLike) -> Path:
    """Returns a folder's path after a check that every package can write below it.

    Orbax fails with another name only when it saves, which may be hours later.

    Args:
        folder: The folder. It need not exist.

    Raises:
        RunError: If the name is empty, is not UTF-8 or contains a null character.
    """
    if not os.fspath(folder):
        raise RunError("the folder of the run has an empty name: name a folder")
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
