"""Messages of one line that stay readable, however long what they quote is."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

MAX_LENGTH = 300
"""Number of characters of the longest message."""


def shorten(text: object, limit: int = MAX_LENGTH) -> str:
    """Returns a text on one line, of which the middle is left out if it is too long.

    The beginning of a message names the cause and its end the remedy, so both are kept.

    Example:
        >>> shorten("the classes " + ", ".join(map(str, range(100))) + " are too many", 50)
        'the classes 0, 1, 2, 3, 4, 5, … 99 are too many'
    """
    line = to_one_line(str(text))
    if len(line) <= limit:
        return line
    # The cut is between words, if there are any near.
    end = limit // 3
    start = limit - end - 3
    head = line[:start].rpartition(" ")[0]
    tail = line[-end:].partition(" ")[2]
    head = head if len(head) > start // 2 else line[:start]
    tail = tail if len(tail) > end // 2 else line[-end:]
    return f"{head} … {tail}"


def to_one_line(text: str) -> str:
    """Replaces line breaks and control characters by single spaces, and escapes lone surrogates.

    The names of files need not be UTF-8. Python holds the bytes that are not as lone surrogates,
    which cannot be printed.
    """
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or its type if it has none."""
    return shorten((str(error).splitlines() or [""])[0], 150) or type(error).__name__


def describe_lacking_params(variables: Any) -> str:
    """Says that variables lack the level `params`; empty if they have it."""
    if isinstance(variables, Mapping) and "params" in variables:
        return ""
    names = list_some(variables) if isinstance(variables, Mapping) else type(variables).__name__
    return (
        "expected variables {'params': ..., 'batch_stats': ...} as model.init returns them, got "
        f"{names or 'an empty dict'}: pass {{'params': params, 'batch_stats': {{}}}}"
    )


def list_some(names: Iterable[object], count: int = 4, limit: int = 40) -> str:
    """Lists the first few names, of at most `limit` characters each, and counts the others.

    Example:
        >>> list_some(["a", "b", "c", "d"], count=2)
        'a, b and 2 more'
        >>> list_some(["a", "b"])
        'a, b'
    """
    texts = [shorten(name, limit) for name in names]
    rest = f" and {len(texts) - count:,} more" if len(texts) > count else ""
    return ", ".join(texts[:count]) + rest


def format_bytes(count: int) -> str:
    """Formats a number of bytes in kB, or from 1 MB on in MB.

    Example:
        >>> format_bytes(670_248), format_bytes(9_600_000)
        ('670 kB', '9.6 MB')
    """
    return f"{count / 1e3:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"
