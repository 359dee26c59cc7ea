"""File names, held-out sets and line-by-line reading, shared by all datasets of texts."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from jaxkd.data.dataset import fixed_key, hold_out_indices
from jaxkd.data.errors import DataError, one_line

FILE_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""Names that the file of each split may have, without the suffix."""

# Seeds of the held-out sets. They are part of a dataset: another seed changes every result.
TEST_SEED = 0x7E57
VALIDATION_SEED = 0xDA7A


def read_utf8(path: Path) -> str:
    """Returns the text of a UTF-8 file; a `.gz` file is decompressed.

    Raises:
        DataError: If the file cannot be read or a line is not UTF-8; the message names the line.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path} ({one_line(error)}): check the path and the file"
        ) from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line} is not UTF-8 ({one_line(error)}): save it as UTF-8"
        ) from error


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a UTF-8 file without line ends; a `.gz` file is decompressed.

    Raises:
        DataError: If the file cannot be read or is empty, or a line is not UTF-8; the message names
            the line.
    """
    # Not str.splitlines, which also splits at U+2028, form feeds and others within a text.
    lines = read_utf8(path).removeprefix("\ufeff").removesuffix("\n").split("\n")
    if lines == [""]:
        raise DataError(f"{path} is empty: it must hold one text a line")
    return [line.removesuffix("\r") for line in lines]


def line_origin(path: Path, index: int) -> str:
    """Names a line of a file by its index, which counts from 0."""
    return f"{path}, line {index + 1}"


def strip_text(text: str, origin: str) -> str:
    """Strips a text of surrounding white space.

    Raises:
        DataError: If nothing remains; the message begins with `origin`.
    """
    if not text.strip():
        raise DataError(f"{origin} is empty: remove it")
    return text.strip()


def read_labelled_lines(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Reads lines of a text, a tab and a class; a header line is skipped.

    Returns:
        The texts, the names of their classes, and their origins.

    Raises:
        DataError: If a line has another form, or there is no text; the message names the line.
    """
    rows = []
    for index, line in enumerate(read_lines(path)):
        # From the right, since a text may contain tabs and a class may not.
        text, tab, label = line.rpartition("\t")
        if index == 0 and label.strip().lower() == "label":
            continue
        origin = line_origin(path, index)
        if not tab or not label.strip():
            raise DataError(f"{origin} must be a text, a tab and a class, got {line[:40]!r}")
        rows.append((strip_text(text, origin), label.strip(), origin))
    if not rows:
        raise DataError(f"{path} has no text below its first line")
    texts, labels, origins = zip(*rows, strict=True)
    return texts, labels, origins


def hold_out_tenth(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides indices into the remaining and a tenth that is held out, both sorted.

    Args:
        count: Number of texts.
        seed: Draws the tenth; `TEST_SEED` or `VALIDATION_SEED`.

    Raises:
        DataError: If there are fewer than two texts.
    """
    if count < 2:
        raise DataError(f"{count} texts cannot be divided: more are needed")
    return hold_out_indices(count, max(1, count // 10), key=fixed_key(seed))
