"""The file `report.json`: what a report shows besides results, metrics and figures."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkd._files import write_atomically
from jaxkd._messages import first_line, shorten
from jaxkd.runs.errors import RunError
from jaxkd.runs.results import is_finite_number

RECORD_FILE = "report.json"

Pairs = Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class ReportRecord:
    """What the report of a run shows and no other file of the run holds.

    Attributes:
        title: The heading.
        comparisons: Names of a row and its baseline.
        remarks: Further paragraphs in Markdown.
        teachers: Names of a teacher and of a stage without a teacher.
        chance: Accuracy of the best constant prediction; `None` if it is unknown.
        settings: The configuration, as the texts that the report shows. A run that is continued
            with other values of `IGNORED_OPTIONS` shows the latest ones, which config.json lacks.
        environment: The environment, as texts too.
    """

    title: str
    comparisons: Pairs = ()
    remarks: Sequence[str] = ()
    teachers: Pairs = ()
    chance: float | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes the record into a folder.

        Args:
            folder: The folder, which must exist.

        Raises:
            OSError: If the file cannot be written.
        """
        content = {
            "title": self.title,
            "comparisons": [list(pair) for pair in self.comparisons],
            "remarks": list(self.remarks),
            "teachers": [list(pair) for pair in self.teachers],
            "chance": None if self.chance is None else float(self.chance),
            # As texts, because a caller of `write_report` may pass what JSON cannot hold.
            "settings": {name: str(value) for name, value in self.settings.items()},
            "environment": {name: str(value) for name, value in self.environment.items()},
        }
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / RECORD_FILE, text.encode())


def read_record(folder: Path) -> ReportRecord | None:
    """Reads the record that a report left in a folder.

    Args:
        folder: The folder of the run.

    Returns:
        The record. `None` if there is none, as in the runs of earlier versions.

    Raises:
        RunError: If the file is damaged.
        OSError: If the file cannot be read.
    """
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        # Reading a pipe or a device may never end.
        if not path.is_file():
            raise ValueError("not a regular file")
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({first_line(error)}): restore it, or delete it to do without the "
            "title, the comparisons and the remarks of the report"
        ) from error


def _from_json(content: Any) -> ReportRecord:
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {shorten(repr(content), 60)}")
    # Fields of another version are left out.
    fields = {field.name for field in dataclasses.fields(ReportRecord)}
    values = {name: value for name, value in content.items() if name in fields}
    for name, is_valid in _CHECKS.items():
        if name in values and not is_valid(values[name]):
            raise ValueError(f"{name} cannot be {shorten(repr(values[name]), 60)}")
    if "title" not in values:
        raise ValueError("there is no title")
    for name in ("comparisons", "teachers"):
        values[name] = [(first, second) for first, second in values.get(name, ())]
    return ReportRecord(**values)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(_are_texts(pair) and len(pair) == 2 for pair in value)


_CHECKS = {
    "title": lambda value: isinstance(value, str),
    "comparisons": _are_pairs,
    "remarks": _are_texts,
    "teachers": _are_pairs,
    "chance": lambda value: value is None or is_finite_number(value),
    "settings": lambda value: isinstance(value, dict),
    "environment": lambda value: isinstance(value, dict),
}
