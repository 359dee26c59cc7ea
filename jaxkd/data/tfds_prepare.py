"""Finds the datasets that TensorFlow Datasets (TFDS) has prepared, and prepares missing ones.

TFDS keeps a prepared dataset in `data_dir/name[/config]/version`. Preparing one takes TensorFlow
and a network. Reading it again takes neither if it was stored as array_record.
"""

import contextlib
import difflib
import importlib.util
import os
import re
import shlex
from pathlib import Path

from jaxkd._messages import list_some
from jaxkd.data import embedded
from jaxkd.data.errors import DataError, expand_user_path, import_or_raise, one_line

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_METADATA_FILES = ("dataset_info.json", "features.json")
_CATALOG = "https://www.tensorflow.org/datasets/catalog"


def resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    """Returns the folder of all datasets: `data_dir`, or the default of TFDS if it is `None`."""
    return expand_user_path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def find_or_prepare(name: str, data_dir: Path) -> Path:
    """Returns the folder of a dataset's version, and prepares the dataset first if it is missing.

    Args:
        name: `name`, `name/config`, either with `:version` or `/version`; without a version, the
            newest that is prepared.
        data_dir: The folder of all datasets.

    Raises:
        DataError: As `find_prepared` and `prepare`.
    """
    return find_prepared(name, data_dir) or prepare(name, data_dir)


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """Finds the newest prepared version of a dataset.

    Args:
        name: `name`, `name/config`, either with `:version` or `/version`.
        data_dir: The folder of all datasets.

    Returns:
        Its folder, or `None` if no version was ever prepared.

    Raises:
        DataError: If all versions are incomplete, or the dataset is prepared in several
            configurations.
    """
    root = data_dir.joinpath(*re.split("[/:]", name))
    # The name may end with the dataset, its configuration or its version.
    entries = [root, *sorted(root.glob("*")), *sorted(root.glob("*/*"))]
    versions = [entry for entry in entries if _VERSION.fullmatch(entry.name) and entry.is_dir()]
    complete = [folder for folder in versions if _has_metadata(folder)]
    _check_one_config(name, complete)
    # TFDS prepares in a folder `incomplete.<random>_<version>`, which it renames at the end.
    incomplete = [*versions, *(entry for entry in entries if "incomplete" in entry.name)]
    if incomplete and not complete:
        reason = f"{' and '.join(_METADATA_FILES)} are not both there"
        raise damaged_dataset_error(incomplete[0], reason, name=name, data_dir=data_dir)
    return max(complete, key=_version_numbers, default=None)


def prepare(name: str, data_dir: Path) -> Path:
    """Downloads a dataset and writes it as array_record, which is read without TensorFlow.

    Args:
        name: Name, optionally with a configuration and a version.
        data_dir: The folder of all datasets.

    Returns:
        The folder of the version that was prepared.

    Raises:
        DataError: If there is no such dataset, TensorFlow is missing, or preparing fails.
    """
    _check_known(name)
    if not importlib.util.find_spec("tensorflow"):
        raise DataError(
            f"{name} is not in {data_dir}, and preparing it needs TensorFlow (not installed) and a "
            "network: on a machine with both, run",
            command=prepare_command(name, data_dir),
        )
    import_tensorflow()
    tfds = import_or_raise("tensorflow_datasets")
    try:
        builder = tfds.builder(tfds_name(name), data_dir=data_dir)
        builder.download_and_prepare(file_format="array_record")
    # Each dataset fails in its own way: download, checksum, manual steps, disk.
    except Exception as error:
        raise DataError(
            f"cannot prepare {name} in {data_dir} ({one_line(error)}): check the network and the "
            f"disk, and see {_CATALOG}"
        ) from error
    return Path(builder.data_dir)


def is_known(name: str, data_dir: Path) -> bool:
    """Returns True if TFDS has prepared or can prepare a dataset, without asking the network.

    Args:
        name: The name alone, without configuration and version.
        data_dir: The folder of all datasets.
    """
    if (data_dir / name).is_dir():
        return True
    return importlib.util.find_spec("tensorflow_datasets") is not None and name in _builder_names()


def import_tensorflow() -> None:
    """Imports TensorFlow quietly and hides the accelerators from it.

    TensorFlow would otherwise reserve the memory of the accelerators that JAX uses.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tensorflow = import_or_raise("tensorflow")
    for kind in ("GPU", "TPU"):
        # Raised if the caller has used TensorFlow before; its choice of devices then holds.
        with contextlib.suppress(RuntimeError):
            tensorflow.config.set_visible_devices([], kind)


def prepare_command(name: str, data_dir: Path) -> str:
    """Returns the shell command that prepares a dataset."""
    # Not `tfds build`, which in releases of 2025 and later fails without apache_beam.
    call = f"tfds.builder({tfds_name(name)!r}, data_dir={str(data_dir)!r}).download_and_prepare"
    code = f"import tensorflow_datasets as tfds; {call}(file_format='array_record')"
    # shlex.quote would write each of the inner quotes as five characters.
    quoted = f'"{code}"' if not set('"$`\\') & set(code) else shlex.quote(code)
    return f"pip install tensorflow tensorflow-datasets importlib_resources && python -c {quoted}"


def tfds_name(name: str) -> str:
    """Converts a name to the form that TFDS reads, with a colon before the version."""
    return re.sub(rf"/(?={_VERSION.pattern}$)", ":", name)


def damaged_dataset_error(folder: Path, reason: str, *, name: str, data_dir: Path) -> DataError:
    """Makes the error that names a damaged dataset and the command that prepares it again."""
    return DataError(
        f"{folder} is incomplete or damaged ({reason}): delete it and prepare it again:",
        command=prepare_command(name, data_dir),
    )


def _has_metadata(folder: Path) -> bool:
    return all((folder / file).is_file() for file in _METADATA_FILES)


def _version_numbers(folder: Path) -> list[int]:
    return [int(part) for part in folder.name.split(".")]


def _check_one_config(name: str, folders: list[Path]) -> None:
    parents = sorted({folder.parent for folder in folders})
    if len(parents) > 1:
        choices = list_some(f"{name}/{parent.name}" for parent in parents)
        raise DataError(f"{name} is prepared in several configurations: choose one of {choices}")


def _builder_names() -> list[str]:
    # The list of community datasets would be fetched from a server.
    return import_or_raise("tensorflow_datasets").list_builders(with_community_datasets=False)


def _check_known(name: str) -> None:
    builder_names = _builder_names()
    head = re.split("[/:]", name)[0]
    if head in builder_names:
        return
    close_names = difflib.get_close_matches(head.lower(), [embedded.NAME, *builder_names])
    remedy = (
        f"did you mean {' or '.join(close_names)}?"
        if close_names
        else f"give the path of a folder or a name from {_CATALOG}"
    )
    raise DataError(f"unknown dataset {name!r}; {remedy}")
