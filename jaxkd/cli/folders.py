"""The folder of a run, named after what it holds, and a note on one that is not finished."""

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from jaxkd.cli.limits import expand
from jaxkd.runs import IGNORED_OPTIONS, RunError, read_run
from jaxkd.runs.growth import describe_unfinished


def choose_folder(name: str, options: Any, data_name: str) -> Path:
    """Returns the options' workdir, or a folder in runs/NAME/ named after data and options.

    The name has the data, the number of seeds and some of the options that are not the default. The
    digits at its end stand for all of them.

    Args:
        name: Name of the experiment or command.
        options: A dataclass with the fields `workdir` and `num_seeds`.
        data_name: Name of the data set.
    """
    if options.workdir:
        return expand(options.workdir)
    values = dataclasses.asdict(options).items()
    # Options that change no result, such as `--save-every`, resume the same folder.
    identifying = {name: value for name, value in values if name not in IGNORED_OPTIONS}
    digest = hashlib.sha256(json.dumps(identifying, sort_keys=True).encode()).hexdigest()[:8]
    seeds = f"{options.num_seeds}seed{'s' if options.num_seeds > 1 else ''}"
    parts = [_clean_name(Path(data_name).resolve().name), seeds, *_name_changes(options), digest]
    return Path("runs") / name / "-".join(parts)


def note_unfinished(path: Path) -> None:
    """Says on stderr that the student in a run's folder is older than the run's options."""
    # Not every student lies in the folder of a run.
    with contextlib.suppress(RunError, OSError):
        if note := describe_unfinished(read_run(path if path.is_dir() else path.parent)):
            print(f"note: {note}", file=sys.stderr)


def _name_changes(options: Any) -> list[str]:
    """Names the first few options with another value than the default, such as `epochs2`."""
    changes = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        # The data and the number of seeds are named in any case.
        is_named = field.name in ("dataset", "data", "num_seeds", *IGNORED_OPTIONS)
        if not is_named and value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            changes.append(_clean_name(field.name + "_".join(map(str, values))))
    return changes[:3]


def _clean_name(text: str) -> str:
    """Returns the part of a file's name for a text, without what a shell would interpret."""
    return re.sub(r"(?:[^\w.]|_|\.\.+)+", "_", text).strip("._")[:40] or "data"
