"""How the lines of a table of texts are divided into fields."""

import contextlib
import csv
import io
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxkd.data.errors import DataError, warn
from jaxkd.data.json_lines import iterate_objects
from jaxkd.data.parquet import is_parquet, iterate_records
from jaxkd.data.text_files import check_line_ends, line_origin, split_lines

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}
"""What may divide the columns, by its name."""

# A field, in quotes or without any, and what ends it.
_FIELD = re.compile(r'(?:"((?:[^"]++|"")*+)"|[^"\t\r\n]*+)(\t|\r?\n|\r?\Z)')
# What a field of a quoted table has if programs put only such fields into quotes.
_NEEDS_QUOTES = re.compile(r'["\t\r\n,;]')


class Form(NamedTuple):
    """How the lines of a table are divided into fields.

    Attributes:
        delimiter: What is between two fields.
        is_quoted: Whether a field may be in quotes, and then have delimiters and line breaks.
        has_keys: Whether each line is a JSON object, whose keys are the header, or a row of a
            Parquet file.
    """

    delimiter: str
    is_quoted: bool
    has_keys: bool = False


def find_form(path: Path, text: str) -> Form:
    """Finds how a table is divided; a warning says what differs from the usual."""
    if is_parquet(path):
        return Form("\t", is_quoted=True, has_keys=True)
    suffix = path.name.lower().removesuffix(".gz")
    if suffix.endswith(".jsonl"):
        check_line_ends(path, text)
        return Form("\t", is_quoted=True, has_keys=True)
    if suffix.endswith(".csv"):
        delimiter = _find_delimiter(path, text)
        if delimiter != ",":
            warn(f"{path}: the columns are read as divided by {delimiter!r}, not by commas")
        return Form(delimiter, is_quoted=True)
    check_line_ends(path, text)
    num_quoted, is_quoted = _find_quotes(text)
    if is_quoted:
        warn(f"{path}: fields are in quotes as csv.writer and pandas write them, which are removed")
    elif num_quoted:
        warn(
            f"{path}: {num_quoted:,} fields are in quotes, which are kept, since others of their "
            "kind have none"
        )
    return Form("\t", is_quoted)


def _find_delimiter(path: Path, text: str) -> str:
    """Returns the comma, unless another delimiter alone divides all lines of a `.csv` equally."""
    first_line = next(split_lines(text))
    for delimiter in DELIMITERS:
        if delimiter == "," or delimiter not in first_line or not _fits(path, text, delimiter):
            continue
        if not _fits(path, text, ","):
            return delimiter
        # In "a film, really;0" both divide the line, but no class has a delimiter.
        if all(delimiter in fields[-1] for _, fields in _read_quoted(path, text, ",")):
            return delimiter
    return ","


def _fits(path: Path, text: str, delimiter: str) -> bool:
    """True if a delimiter divides all lines into the same number of fields, at least two."""
    count = None
    try:
        for _, fields in _read_quoted(path, text, delimiter):
            count = count or len(fields)
            if len(fields) != count or count < 2:
                return False
    except DataError:
        return False
    return True


def _find_quotes(text: str) -> tuple[int, bool]:
    """Finds out whether the quotes of a `.tsv` are part of its texts.

    In the files of GLUE they are. Programs put all fields of a column into quotes, or those that
    need them; within quotes, they write a quote twice.

    Returns:
        The number of fields in quotes below the first line, 0 if other quotes are in the file, and
        whether a program has put them there.
    """
    if not (text.startswith('"') or '\t"' in text or '\n"' in text):
        return 0, False
    # For each column, the number of fields in quotes and of others.
    columns: dict[int, list[int]] = {}
    num_quoted = num_doubled = num_needless = 0
    position = row = column = 0
    while position < len(text):
        field = _FIELD.match(text, position)
        if field is None:
            return 0, False
        content = field[1]
        if content is not None:
            # A header is compared without its quotes.
            num_quoted += row > 0
            num_doubled += '""' in content
            num_needless += _NEEDS_QUOTES.search(content) is None
        # A header may be without quotes.
        if row or content is not None:
            columns.setdefault(column, [0, 0])[content is None] += 1
        row, column = (row, column + 1) if field[2] == "\t" else (row + 1, 0)
        position = field.end()
    is_column = any(counts[0] > 1 and not counts[1] for counts in columns.values())
    return num_quoted, is_column or (num_doubled > 0 and not num_needless)


def iterate_rows(path: Path, text: str, form: Form) -> Iterator[tuple[int, list[str]]]:
    """Yields the index of a row's first line, from 0, and the row's fields.

    The first row of JSON Lines are the keys of the first line, which follows with its values. That
    of Parquet are the names of its columns.
    """
    if is_parquet(path):
        yield from iterate_records(path)
        return
    if form.has_keys:
        yield from iterate_objects(path, text)
        return
    if form.is_quoted:
        yield from _read_quoted(path, text, form.delimiter)
        return
    for index, line in enumerate(split_lines(text)):
        yield index, line.split(form.delimiter)


def _read_quoted(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # Lines keep their ends, because a quoted text may contain line breaks.
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = 0
    with _field_limit(len(text)):
        try:
            for fields in reader:
                yield start, fields
                start = reader.line_num
        except csv.Error as error:
            raise DataError(
                f"{line_origin(path, start)} is not CSV ({error}): correct it"
            ) from error


@contextlib.contextmanager
def _field_limit(size: int) -> Generator[None]:
    """Lets a field be as long as a whole text; Python's limit for all readers is 128 kB."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, size))
    try:
        yield
    finally:
        csv.field_size_limit(limit)
