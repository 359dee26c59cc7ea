"""A set that TensorFlow Datasets has prepared, and how to speak of what is wrong with it."""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxkd.data import tfds_folder, tfds_prepare
from jaxkd.data.errors import DataError, not_installed, one_line, require


class Prepared(NamedTuple):
    """A prepared dataset and how to speak of it in errors.

    Attributes:
        builder: Its `tfds.core.DatasetBuilder`.
        folder: The folder of its version.
        name: What the user called it.
        data_dir: The folder of all datasets.
    """

    builder: Any
    folder: Path
    name: str
    data_dir: Path

    @property
    def file_format(self) -> str:
        """How its examples are stored, such as `"array_record"`."""
        return self.builder.info.file_format.value

    def half_written(self, reason: str) -> DataError:
        """Says that the dataset is damaged and how to make it anew."""
        return tfds_folder.half_written(self.folder, reason, name=self.name, data_dir=self.data_dir)


def open_prepared(folder: Path, name: str, data_dir: Path) -> Prepared:
    """Opens the folder of a version.

    Raises:
        DataError: If it is damaged, or files are missing.
    """
    tfds = require("tensorflow_datasets")
    prepared = Prepared(None, folder, name, data_dir)
    with reading(prepared):
        prepared = prepared._replace(builder=tfds.builder_from_directory(folder))
        shards = [Path(path) for split in prepared.builder.info.splits.values() for path in split.filepaths]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise prepared.half_written(f"{len(missing)} of {len(shards)} files are missing, such as {missing[0]}")
    return prepared


def only_feature(prepared: Prepared, kind: type, *, of: str) -> str:
    """Finds the feature of a kind; of several, such as the two labels of CIFAR-100, the one to be supervised by.

    Args:
        prepared: The dataset.
        kind: A class of `tensorflow_datasets.features`.
        of: What there is to classify, such as "an image".

    Raises:
        DataError: If there is not exactly one.
    """
    info = prepared.builder.info
    keys = [key for key, feature in dict(info.features).items() if isinstance(feature, kind)]
    if len(keys) > 1:
        keys = [key for key in keys if key in (info.supervised_keys or ())]
    if len(keys) != 1:
        raise DataError(
            f"{prepared.name} is not {of} classification set, which has one {kind.__name__} among its features: "
            f"it has {', '.join(sorted(info.features))}; choose another dataset"
        )
    return keys[0]


def examples(prepared: Prepared, split: str) -> Iterator[dict[str, Any]]:
    """Yields decoded examples in the order in which they are stored.

    Raises:
        DataError: If they are damaged, or TensorFlow is needed and missing.
    """
    if prepared.file_format != "array_record":
        _import_tensorflow(prepared)
    with reading(prepared):
        if prepared.file_format == "array_record":
            yield from prepared.builder.as_data_source(split=split)
        else:
            dataset = prepared.builder.as_dataset(split=split, shuffle_files=False)
            yield from require("tensorflow_datasets").as_numpy(dataset)


@contextlib.contextmanager
def reading(prepared: Prepared) -> Generator[None]:
    """Reports what goes wrong inside as damage to the dataset."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except ImportError as error:
        raise not_installed(error) from error
    except Exception as error:  # TFDS, protobuf, array_record and Pillow have nothing closer in common
        raise prepared.half_written(one_line(error)) from error


def _import_tensorflow(prepared: Prepared) -> None:
    try:
        tfds_prepare.import_tensorflow()
    except DataError as error:
        raise DataError(
            f"{prepared.folder} is stored as {prepared.file_format}, which takes TensorFlow to read: pip install "
            "tensorflow, or delete the folder and prepare it as array_record: "
            f"{tfds_folder.command(prepared.name, prepared.data_dir)}"
        ) from error
