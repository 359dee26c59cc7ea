"""The error of loading data, and what raises it everywhere: missing packages, homes, files and letters."""

import gzip
import importlib
import os
import zlib
from pathlib import Path
from typing import Any

_TEXT = ("tokenizers", "sacrebleu")


class DataError(ValueError):
    """A dataset cannot be loaded; the one-line message names the cause and the remedy."""


def read_utf8(path: Path) -> str:
    """The text of a file in UTF-8, of a `.gz` unpacked.

    Raises:
        DataError: If it cannot be read or a line is not UTF-8; it names the line.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path} ({one_line(error)}): check the path and the file") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line} is not UTF-8 ({one_line(error)}): save it as UTF-8") from error


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
