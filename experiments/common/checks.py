"""Checks of options, for command lines with and without tyro."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxkd._messages import list_some


class OptionError(ValueError):
    """An invalid value of an option."""


def require(condition: bool, message: str) -> None:
    """Raises `OptionError(message)` unless the condition holds."""
    if not condition:
        raise OptionError(message)


def select_names(only: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Returns the known names that `--only` lists, or all of them if it is empty.

    Raises:
        OptionError: If it lists an unknown name.
    """
    known = tuple(known)
    unknown = sorted({*only} - {*known})
    require(not unknown, f"--only {list_some(unknown)}: choose from {' '.join(known)}")
    return tuple(name for name in known if not only or name in only)


def check_writable(option: str, folder: Path) -> None:
    """Makes a folder and checks that files can be written to it.

    Raises:
        OptionError: If they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a name, so that nothing stays behind.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise OptionError(
            f"{option} {folder}: cannot be written ({reason}); name another folder"
        ) from error
