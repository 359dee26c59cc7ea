"""File names, held-out sets and line-by-line reading, shared by all datasets of texts."""

import codecs
import gzip
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import overload

import numpy as np

from jaxkd.data.dataset import fixed_key, hold_out_indices
from jaxkd.data.errors import DataError, one_line, warn

FILE_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""Names that the file of each split may have, without the suffix."""

# Seeds of the held-out sets. They are part of a dataset: another seed changes every result.
TEST_SEED = 0x7E57
VALIDATION_SEED = 0xDA7A

# Text packs to a third or a fifth. A file of one repeated line packs to a thousandth.
_MIN_UNPACKED = 2**23
_MAX_RATIO = 16
_CHUNK = 2**20
_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as text in UTF-8",
    b"\x1f\x8b": "packed by gzip, but not named so: add .gz to its name, or unpack it",
    b"PAR1": "a Parquet file, but not named so: add .parquet to its name",
    b"%PDF": "a PDF file: save it as text in UTF-8",
    b"\x89PNG": "an image, but texts are read here: give a file of text",
    b"\xff\xd8\xff": "an image, but texts are read here: give a file of text",
    b"GIF8": "an image, but texts are read here: give a file of text",
}
"""Other files by their first bytes, and what to do with them."""
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_utf8(path: Path, *, max_unpacked: int | None = None) -> str:
    """Returns the text of a UTF-8 file; a `.gz` file is decompressed.

    Args:
        path: The file.
        max_unpacked: Number of bytes to which a `.gz` file may unpack. By default 8 MiB or 16
            times its size, whichever is more.

    Raises:
        DataError: If the file cannot be read, unpacks to more, is UTF-16, or a line is not UTF-8 or
            has a null character; the message names the line.
    """
    # A pipe or a device may never end.
    if not os.path.isfile(path):
        fault = "is not a regular file" if os.path.lexists(path) else "does not exist"
        raise DataError(f"{path} {fault}: check the path")
    try:
        content = _unpack(path, max_unpacked) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise DataError(
            f"cannot read {path} ({one_line(error)}): check the path and the file"
        ) from error
    for mark, description in _OTHER_FILES.items():
        if content.startswith(mark):
            raise DataError(f"{path} is {description}")
    # UTF-16 without a mark at its beginning is valid UTF-8 of every second character null.
    if content.startswith(_UTF16_MARKS) or content.count(0) > len(content) // 4:
        raise DataError(f"{path} is UTF-16 or UTF-32: save it as UTF-8")
    if 0 in content:
        line = content[: content.index(0)].count(b"\n") + 1
        raise DataError(f"{path}, line {line} has a null character: remove it")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line} is not UTF-8 ({_describe_byte(error)}): save it as UTF-8"
        ) from error


def iterate_lines(path: Path, *, max_unpacked: int | None = None) -> Iterator[str]:
    """Yields the lines of a UTF-8 file without line ends; a `.gz` file is decompressed.

    Args:
        path: The file.
        max_unpacked: As for `read_utf8`.

    Raises:
        DataError: As `read_text`, or if the lines end as those of old Macs.
    """
    text = read_text(path, max_unpacked=max_unpacked)
    check_line_ends(path, text)
    return split_lines(text)


def read_text(path: Path, *, max_unpacked: int | None = None) -> str:
    """Returns the text of a UTF-8 file without its mark at the beginning and its last line end.

    Args:
        path: The file.
        max_unpacked: As for `read_utf8`.

    Raises:
        DataError: As `read_utf8`, or if the file is empty.
    """
    text = read_utf8(path, max_unpacked=max_unpacked).removeprefix("\ufeff").removesuffix("\n")
    if not text:
        raise DataError(f"{path} is empty: it must hold one text a line")
    return text


def check_line_ends(path: Path, text: str) -> None:
    """Raises `DataError` if lines end by the carriage return of old Macs alone."""
    if "\r" in text.removesuffix("\r") and "\n" not in text:
        raise DataError(f"{path} ends its lines by \\r alone: save it with \\n, as Unix does")


def check_texts(texts: Iterable[str], name: str = "texts") -> None:
    """Raises `TypeError` if texts are a single one, or have no order."""
    if isinstance(texts, str):
        raise TypeError(
            f"{name} must be a sequence, got the one text {texts[:20]!r}: put it into a list"
        )
    if isinstance(texts, (Mapping, Set)):
        raise TypeError(f"{name} must be a sequence, got a {type(texts).__name__}: make it a list")


def check_different(paths: Iterable[Path]) -> None:
    """Raises `DataError` if two paths, of which each is that of a split, are one file or folder."""
    for first, second in itertools.combinations(paths, 2):
        if os.path.samefile(first, second):
            raise DataError(
                f"{first} and {second} are the same: a split must not have the examples of another"
            )


def warn_of_columns(path: Path, lines: Sequence[str], remedy: str) -> None:
    """Warns of lines that tabs divide, such as a number and a sentence.

    Args:
        path: The file.
        lines: Its lines, each of which is read as one text.
        remedy: What to do, for the message.
    """
    num_divided = sum("\t" in line for line in lines)
    if num_divided > len(lines) / 2 and num_divided > 1:
        warn(
            f"{num_divided:,} of {len(lines):,} lines of {path} have tabs, and are read as one "
            f"text with all that they divide: {remedy}"
        )


def split_lines(text: str) -> Iterator[str]:
    """Yields the lines of a text without line ends."""
    start = 0
    # Not str.splitlines, which also splits at U+2028, form feeds and others within a text. Not
    # str.split, whose list of a million empty lines takes more memory than the file.
    while start <= len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        yield text[start:end].removesuffix("\r")
        start = end + 1


class LineOrigins(Sequence[str]):
    """Names the lines of a file when they are asked for.

    A string for each line would take more memory than short lines themselves.
    """

    def __init__(self, path: Path, indices: Sequence[int] | np.ndarray) -> None:
        """Names lines by their indices, which count from 0."""
        self._path = path
        self._indices = np.asarray(indices)

    def __len__(self) -> int:
        """Returns the number of lines."""
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """Returns the name of a line, or the names of a slice."""
        if isinstance(index, slice):
            return LineOrigins(self._path, self._indices[index])
        return line_origin(self._path, int(self._indices[index]))

    def take(self, indices: np.ndarray) -> "LineOrigins":
        """Returns the names of some of the lines."""
        return LineOrigins(self._path, self._indices[indices])


def take(column: Sequence[str], indices: np.ndarray) -> Sequence[str]:
    """Returns some of the texts or origins of a column."""
    if isinstance(column, LineOrigins):
        return column.take(indices)
    return tuple(column[i] for i in indices)


def line_origin(path: Path, index: int) -> str:
    """Names a line of a file, or a row of Parquet, by its index, which counts from 0."""
    unit = "row" if path.suffix.lower() in (".parquet", ".arrow") else "line"
    return f"{path}, {unit} {index + 1}"


def strip_text(text: str, origin: str) -> str:
    """Strips a text of surrounding white space.

    Raises:
        DataError: If nothing remains; the message begins with `origin`.
    """
    if not text.strip():
        raise DataError(f"{origin} is empty: remove it")
    return text.strip()


def hold_out_tenth(
    count: int, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divides indices into the remaining and a tenth that is held out, both sorted.

    Args:
        count: Number of texts.
        seed: Draws the tenth; `TEST_SEED` or `VALIDATION_SEED`.
        labels: `[count]`, the class of each text, of which none may lose its last one; `None` for
            texts without classes.

    Raises:
        DataError: If there are fewer than two texts, or each class has only one.
    """
    if count < 2:
        raise DataError(f"{count} texts cannot be divided: more are needed")
    return hold_out_indices(count, max(1, count // 10), key=fixed_key(seed), labels=labels)


def _unpack(path: Path, max_unpacked: int | None) -> bytearray:
    limit = max_unpacked
    if limit is None:
        limit = max(_MIN_UNPACKED, _MAX_RATIO * path.stat().st_size)
    content = bytearray()
    with gzip.open(path) as file:
        # In pieces, because a single read would reserve the memory of the limit at once.
        while chunk := file.read(_CHUNK):
            content += chunk
            if len(content) > limit:
                raise DataError(
                    f"{path} unpacks to more than {limit:,} bytes: unpack it by `gunzip`, or raise "
                    "max_unpacked"
                )
    return content


def _describe_byte(error: UnicodeDecodeError) -> str:
    # Not str(error): Python puts the whole content into some messages.
    return f"byte 0x{error.object[error.start]:02x}, {error.reason}"
