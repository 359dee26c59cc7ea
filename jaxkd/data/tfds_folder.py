"""Where TensorFlow Datasets keeps prepared sets: `data_dir/name[/config]/version`."""

import os
import re
import shlex
from pathlib import Path

from jaxkd.data.errors import DataError, expand

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_METADATA = ("dataset_info.json", "features.json")


def resolve(data_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of all datasets: `data_dir`, or where TensorFlow Datasets itself looks if that is `None`."""
    return expand(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def find(name: str, data_dir: Path) -> Path | None:
    """Finds the newest prepared version of a dataset.

    Args:
        name: `name`, `name/config`, either with `:version` or `/version`.
        data_dir: The folder of all datasets.

    Returns:
        Its folder, or `None` if nothing was ever prepared.

    Raises:
        DataError: If what is there is half-written, or prepared in several configurations.
    """
    root = data_dir.joinpath(*re.split("[/:]", name))
    entries = [root, *sorted(root.glob("*")), *sorted(root.glob("*/*"))]
    versions = [entry for entry in entries if _VERSION.fullmatch(entry.name) and entry.is_dir()]
    complete = [folder for folder in versions if all((folder / file).is_file() for file in _METADATA)]
    _check_one_config(name, complete)
    partial = [*versions, *(entry for entry in entries if "incomplete" in entry.name)]
    if partial and not complete:
        raise half_written(partial[0], f"{' and '.join(_METADATA)} are not both there", name=name, data_dir=data_dir)
    return max(complete, key=lambda folder: [int(part) for part in folder.name.split(".")], default=None)


def half_written(folder: Path, reason: str, *, name: str, data_dir: Path) -> DataError:
    """Says that a prepared dataset is damaged and how to make it anew."""
    return DataError(f"{folder} is half-written ({reason}): delete it and prepare it again: {command(name, data_dir)}")


def command(name: str, data_dir: Path) -> str:
    """The shell command that prepares a dataset.

    Not `tfds build`, which in releases of 2025 and later fails without apache_beam.
    """
    call = f"tfds.builder({tfds_name(name)!r}, data_dir={str(data_dir)!r}).download_and_prepare"
    code = f"import tensorflow_datasets as tfds; {call}(file_format='array_record')"
    # shlex.quote would write each of the inner quotes as five characters.
    quoted = f'"{code}"' if not set('"$`\\') & set(code) else shlex.quote(code)
    return f"pip install tensorflow tensorflow-datasets importlib_resources && python -c {quoted}"


def tfds_name(name: str) -> str:
    """Writes a name as TensorFlow Datasets reads it, with a colon before the version."""
    return re.sub(rf"/(?={_VERSION.pattern}$)", ":", name)


def _check_one_config(name: str, folders: list[Path]) -> None:
    parents = sorted({folder.parent for folder in folders})
    if len(parents) > 1:
        choices = ", ".join(f"{name}/{parent.name}" for parent in parents)
        raise DataError(f"{name} is prepared in several configurations: choose one of {choices}")
