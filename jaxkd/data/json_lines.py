"""Tables of texts as JSON Lines: an object a line, whose keys are the header."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxkd._messages import list_some, shorten
from jaxkd.data.errors import DataError, one_line
from jaxkd.data.text_files import line_origin, split_lines

_KINDS = {bool: "true or false", type(None): "null", list: "a list", dict: "an object"}


class Value(str):
    """A value that is no string, as a field of a table.

    Only the columns that are chosen must hold strings, so the reader of the table refuses it.

    Attributes:
        kind: What it is, such as `"a list"`; `"an integer"` may be a class.
    """

    kind: str

    def __new__(cls, text: str, kind: str) -> "Value":
        """Makes a field that shows `text`."""
        value = super().__new__(cls, text)
        value.kind = kind
        return value


def iterate_objects(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields the keys of the first object as a header, and then the values of each line.

    Args:
        path: The file, for error messages.
        text: Its content.

    Yields:
        The index of the line, from 0, and its fields in the order of the header. A value that is no
        string is a `Value`.

    Raises:
        DataError: If a line is no JSON object, has other keys than the first line, or a key twice.
    """
    keys: list[str] = []
    for index, line in enumerate(split_lines(text)):
        origin = line_origin(path, index)
        item = _parse(line, origin)
        if not index:
            keys = list(item)
            yield index, keys
        if item.keys() != set(keys):
            raise DataError(
                f"{origin} has the keys {list_some(item)}, line 1 {list_some(keys)}: give all "
                "lines the same keys"
            )
        yield index, [make_field(item[key], origin) for key in keys]


def _parse(line: str, origin: str) -> dict[str, Any]:
    if not line.strip():
        raise DataError(f"{origin} is empty: remove it")
    if line.lstrip().startswith("["):
        raise DataError(f"{origin} is a JSON list: write one object a line, as `jq -c '.[]'` does")

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        item = dict(pairs)
        if len(item) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(
                f"{origin} has the key {shorten(repr(twice), 40)} twice: remove one of them"
            )
        return item

    try:
        item = json.loads(
            line,
            object_pairs_hook=make_object,
            # As they are written: Python refuses integers of thousands of digits.
            parse_int=lambda digits: Value(digits, "an integer"),
            parse_float=lambda digits: Value(digits, "a number with a fraction"),
            parse_constant=lambda name: Value(name, "no number"),
        )
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin} is not JSON ({error.msg}, column {error.colno}): write one object a line"
        ) from error
    except RecursionError as error:
        raise DataError(f"{origin} nests too deep ({one_line(error)}): correct it") from error
    if not isinstance(item, dict) or not item:
        raise DataError(
            f"{origin} is not an object with keys, got {shorten(line, 40)!r}: write such as "
            '{"text": "a good film", "label": "good"}'
        )
    return item


def make_field(value: Any, origin: str) -> str:
    """Makes a field of a table of a value.

    Args:
        value: A string, a `Value`, or a value of JSON but for numbers.
        origin: Its line, for messages.

    Raises:
        DataError: If it is a string that UTF-8 or a text cannot hold.
    """
    if not isinstance(value, str):
        kind = _KINDS[type(value)]
        return Value(kind, kind)
    if isinstance(value, Value):
        return value
    # JSON can spell what UTF-8 cannot hold.
    if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{origin} has a null character or half a surrogate pair by \\u: remove it")
    return value
