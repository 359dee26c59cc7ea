"""Reads the examples of a dataset that TensorFlow Datasets (TFDS) has prepared."""

import contextlib
import logging
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxkd._messages import list_some
from jaxkd.data import tfds_prepare
from jaxkd.data.errors import DataError, import_or_raise, missing_package_error, one_line


class PreparedDataset(NamedTuple):
    """A prepared dataset, and what its error messages mention.

    Attributes:
        builder: Its `tfds.core.DatasetBuilder`.
        folder: The folder of its version.
        name: The name that the user gave.
        data_dir: The folder of all datasets.
    """

    builder: Any
    folder: Path
    name: str
    data_dir: Path

    @property
    def file_format(self) -> str:
        """The format in which its examples are stored, such as `"array_record"`."""
        return self.builder.info.file_format.value

    def damaged_error(self, reason: str) -> DataError:
        """Makes the error that the dataset is damaged, with the command that prepares it again."""
        return tfds_prepare.damaged_dataset_error(
            self.folder, reason, name=self.name, data_dir=self.data_dir
        )


def open_prepared(folder: Path, name: str, data_dir: Path) -> PreparedDataset:
    """Opens the folder of a version.

    Args:
        folder: The folder.
        name: The name that the user gave.
        data_dir: The folder of all datasets.

    Raises:
        DataError: If the metadata are damaged, or files of examples are missing.
    """
    tfds = import_or_raise("tensorflow_datasets")
    # Without a builder at first: making one may fail, and the error needs the other fields.
    prepared = PreparedDataset(None, folder, name, data_dir)
    with raise_as_damage(prepared):
        prepared = prepared._replace(builder=tfds.builder_from_directory(folder))
        splits = prepared.builder.info.splits.values()
        shards = [Path(path) for split in splits for path in split.filepaths]
    # Checked here, because with cached images nothing else would notice.
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise prepared.damaged_error(
            f"{len(missing)} of {len(shards)} files are missing, such as {missing[0]}"
        )
    return prepared


def only_feature(prepared: PreparedDataset, kind: type, *, expected: str) -> str:
    """Finds the name of the only feature of a kind.

    If there are several, such as the two labels of CIFAR-100, it is the one among the dataset's
    `supervised_keys`.

    Args:
        prepared: The dataset.
        kind: A class of `tensorflow_datasets.features`.
        expected: The dataset that the caller expects, such as `"an image classification set"`.

    Raises:
        DataError: If there is not exactly one.
    """
    info = prepared.builder.info
    names = [name for name, feature in dict(info.features).items() if isinstance(feature, kind)]
    if len(names) > 1:
        names = [name for name in names if name in (info.supervised_keys or ())]
    if len(names) != 1:
        raise DataError(
            f"{prepared.name} is not {expected}, which has one {kind.__name__} among its features: "
            f"it has {list_some(sorted(info.features))}; choose another dataset"
        )
    return names[0]


def read_examples(prepared: PreparedDataset, split: str) -> Iterator[dict[str, Any]]:
    """Yields decoded examples in the order in which they are stored.

    Raises:
        DataError: If they are damaged, or TensorFlow is needed and missing.
    """
    if prepared.file_format != "array_record":
        _import_tensorflow(prepared)
    with raise_as_damage(prepared):
        if prepared.file_format == "array_record":
            yield from prepared.builder.as_data_source(split=split)
        else:
            # Shuffled files would give every load another order.
            dataset = prepared.builder.as_dataset(split=split, shuffle_files=False)
            yield from import_or_raise("tensorflow_datasets").as_numpy(dataset)


def open_source(prepared: PreparedDataset, split: str, **options: Any) -> Any:
    """Opens the decoded examples of an array_record split, with random access.

    Raises:
        DataError: If they are damaged.
    """
    with raise_as_damage(prepared):
        return prepared.builder.as_data_source(split=split, **options)


@contextlib.contextmanager
def raise_as_damage(prepared: PreparedDataset) -> Generator[None]:
    """Turns the exceptions of reading into the error that the dataset is damaged."""
    try:
        yield
    # A `DataError` names its cause already, and a lack of memory is no damage.
    except (DataError, MemoryError):
        raise
    except ImportError as error:
        raise missing_package_error(error) from error
    # The errors of TFDS, protobuf, array_record and Pillow have no closer common base.
    except Exception as error:
        raise prepared.damaged_error(one_line(error)) from error


def _import_tensorflow(prepared: PreparedDataset) -> None:
    try:
        tfds_prepare.import_tensorflow()
    except DataError as error:
        raise DataError(
            f"{prepared.folder} is stored as {prepared.file_format}, which takes TensorFlow to "
            "read: pip install tensorflow, or delete the folder and prepare it as array_record:",
            command=tfds_prepare.prepare_command(prepared.name, prepared.data_dir),
        ) from error


@contextlib.contextmanager
def without_opencv_advice() -> Generator[None]:
    """Silences the advice of TFDS to install OpenCV; Pillow serves as well."""
    logger = logging.getLogger("absl")

    def is_other_message(record: logging.LogRecord) -> bool:
        return "OpenCV is not installed" not in record.getMessage()

    logger.addFilter(is_other_message)
    try:
        yield
    finally:
        logger.removeFilter(is_other_message)
