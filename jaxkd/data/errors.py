"""The error of loading data, and what raises it everywhere: missing packages and homes."""

import importlib
import os
from pathlib import Path
from typing import Any

_TEXT = ("tokenizers", "sacrebleu")


class DataError(ValueError):
    """A dataset cannot be loaded; the one-line message names the cause and the remedy."""


def require(module: str) -> Any:
    """Imports a module that `import jaxkd.data` does without.

    Args:
        module: Its full name, such as `"PIL.Image"`.

    Returns:
        The module.

    Raises:
        DataError: If it, or something that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise not_installed(error) from error


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with `~` spelled out.

    Raises:
        DataError: If that is a user who is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{os.fspath(path)!r} is in nobody's home directory: check the path") from error


def not_installed(error: ImportError) -> DataError:
    """Says which package is missing and how to get it."""
    extra = "text" if error.name in _TEXT else "experiments"
    remedy = f"pip install 'jaxkd-distill[{extra}]'"
    return DataError(f"this needs {error.name}, which cannot be imported ({one_line(error)}): {remedy}")


def one_line(error: Exception) -> str:
    """The text of another library's error, cut to the length of a line, or its kind if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
