"""The error of loading data, and helpers that turn common failures into it."""

import importlib
import os
from pathlib import Path
from typing import Any

# Packages of the extra `text`; all other optional packages belong to the extra `experiments`.
_TEXT_PACKAGES = ("tokenizers", "sacrebleu")


class DataError(ValueError):
    """A dataset cannot be loaded; the one-line message names the cause and the remedy."""


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
        DataError: If there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(
            f"the home directory of {os.fspath(path)!r} is unknown: check the path"
        ) from error


def missing_package_error(error: ImportError) -> DataError:
    """Makes the error that names a missing package and the command that installs it."""
    extra = "text" if error.name in _TEXT_PACKAGES else "experiments"
    command = f"pip install 'jaxkd-distill[{extra}]'"
    return DataError(
        f"this needs {error.name}, which cannot be imported ({one_line(error)}): {command}"
    )


def one_line(error: Exception) -> str:
    """Returns an error's text on one line of at most 200 characters, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
