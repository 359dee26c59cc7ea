"""Limits of options that every command checks before it does anything."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from jaxkd._messages import shorten

LARGEST_INTEGER = 2**31 - 1
LIMITS: dict[str, float] = {
    **dict.fromkeys(("num_seeds", "max_students", "students", "num_processes"), 10_000),
    **dict.fromkeys(("batch_size", "text_batch_size", "placed_batch_size", "batch"), 2**20),
    **dict.fromkeys(("tokens", "vocabulary", "classes"), 2**24),
    **dict.fromkeys(("vocab_size", "evaluations", "kills", "flips", "inputs"), 1_000_000),
    **dict.fromkeys(("hidden", "teacher_hidden", "embedding"), 2**16),
    **dict.fromkeys(("max_length", "rounds", "repeats", "views", "unlabelled_field"), 100_000),
    **dict.fromkeys(("image_size", "width"), 4096),
    **dict.fromkeys(("teacher_layers", "depths", "student_depth"), 2000),
    **dict.fromkeys(("beams", "teacher_beams", "workers", "devices", "processes"), 1000),
    **dict.fromkeys(("save_every", "clip"), 1e9),
    **dict.fromkeys(("learning_rate", "teacher_learning_rate", "weights"), 1e6),
    **dict.fromkeys(("temperature", "temperatures"), 1e6),
    **dict.fromkeys(("cosine_weight", "hidden_weight", "map_weight", "length_penalty"), 1e6),
}
"""The largest value of an option, beyond which a command would only run out of memory."""
LOWER_LIMITS = {
    # Logits divided by less, and their gradients times its inverse, overflow float32.
    **dict.fromkeys(("temperature", "temperatures"), 1e-3),
}
"""The smallest value of an option that must be above 0."""
OUTPUT_FOLDERS = ("workdir", "teacher_cache")
"""Options that name a folder to write to."""
DATA_FOLDERS = ("data", "dataset")
"""Options that may name a folder to read, whose folders are those of splits and classes."""


def check_limits(options: Any, require: Any) -> None:
    """Checks numbers, texts and output folders of a command's options, whatever it does.

    Args:
        options: The dataclass of options.
        require: `(condition, message)`, which raises the command's error.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        option = f"--{field.name.replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and not isinstance(item, bool):
                _check_number(field.name, option, item, require)
            elif item == "":
                # An empty variable of a shell must not stand for the default.
                require(field.default == "", f"{option} is empty: give a value, or leave it out")
        if field.name in OUTPUT_FOLDERS and value is not None:
            _check_folder(option, value, require)
            for name in DATA_FOLDERS:
                data = getattr(options, name, None)
                require(
                    not data or not _is_within(value, data),
                    f"{option} {shorten(value, 80)} is within --{name} {shorten(data, 80)}, where "
                    "the next start would read it as data: name a folder elsewhere",
                )


def expand(path: str | os.PathLike[str]) -> Path:
    """Returns a path with the home folder for `~`, which shells leave in `--workdir=~/runs`."""
    return Path(path).expanduser()


def _is_within(folder: str, parent: str) -> bool:
    """Returns whether a folder, which need not exist, is one that exists or lies below it."""
    try:
        above = expand(parent).resolve()
        return above.is_dir() and expand(folder).resolve().is_relative_to(above)
    # Of a name that is no path.
    except (OSError, ValueError, RuntimeError):
        return False


def _check_number(name: str, option: str, value: float, require: Any) -> None:
    shown = shorten(value, 40)
    require(math.isfinite(value), f"{option} {shown}: must be a finite number")
    largest = LIMITS.get(name, LARGEST_INTEGER if isinstance(value, int) else math.inf)
    require(value <= largest, f"{option} {shown}: must be at most {largest:,.12g}")
    smallest = LOWER_LIMITS.get(name, -math.inf)
    require(value <= 0 or value >= smallest, f"{option} {shown}: must be at least {smallest:g}")


def _check_folder(option: str, value: str, require: Any) -> None:
    """Checks that a folder can be made and written, without making it."""
    try:
        folder = expand(value).absolute()
        # What exists of it must be a folder, and the rest be possible to create in it.
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        is_folder = existing.is_dir()
        os.fsencode(folder).decode()
        longest = max(len(os.fsencode(part)) for part in folder.parts)
    except RuntimeError:
        require(False, f"{option} {value}: the home folder of this user is unknown")
    except UnicodeDecodeError:
        require(False, f"{option} {value}: is below a folder whose name is not UTF-8")
    except (OSError, ValueError) as error:
        require(False, f"{option} {value}: {error}")
    else:
        require(longest <= 255, f"{option} {value}: File name too long")
        require(is_folder, f"{option} {value}: {existing} is not a folder")
        require(
            os.access(existing, os.W_OK | os.X_OK),
            f"{option} {value}: {existing} cannot be written",
        )
