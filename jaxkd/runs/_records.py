"""The records of `metrics.jsonl`."""

import json
from pathlib import Path
from typing import Any

from jaxkd._messages import first_line, shorten
from jaxkd.runs.errors import RunError
from jaxkd.runs.results import is_finite_number

_CURVES = {"epoch", "loss", "validation_loss", "validation_accuracy"}
_MAX_NAME = 255
"""Largest length of a folder's name in bytes."""


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a file, without a last one that a crash cut off; none without a file.

    Raises:
        RunError: If a line is damaged. The message names it.
        OSError: If the file cannot be read.
    """
    # A pipe, which is no regular file, would never end.
    content = path.read_bytes() if path.is_file() else b""
    # Each record ends with a line break, so a line without one was cut off.
    lines = content.split(b"\n")[:-1]
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """Returns a record of `metrics.jsonl` after a check of what identifies it and is drawn."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not a record")
        for name, expected in (("seed", int), ("stage", str), ("step", int)):
            value = record.get(name)
            # No bool, which is an int as well, and no number beyond that of a float.
            if type(value) is not expected or (expected is int and not is_finite_number(value)):
                kind = "an integer" if expected is int else "a string"
                raise ValueError(f"{name} must be {kind}, got {shorten(repr(value), 80)}")
        # Checkpoints and loggers name folders after it.
        if len(record["stage"].encode(errors="replace")) > _MAX_NAME:
            raise ValueError(
                f"stage must have at most {_MAX_NAME} bytes, got {shorten(record['stage'], 40)!r}"
            )
        for name in record.keys() & _CURVES:
            value = record[name]
            if value is not None and not is_finite_number(value):
                raise ValueError(f"{name} must be a finite number, got {shorten(repr(value), 80)}")
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"line {number} of {path} is damaged ({first_line(error)}): restore it, delete that "
            "line, or name another folder (--workdir)"
        ) from error
    return record
