"""Decodes the images of a set prepared by TensorFlow Datasets."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkd.data import folder_source, tfds_folder, tfds_prepare
from jaxkd.data.dataset import Split, cut_test
from jaxkd.data.errors import DataError, not_installed, one_line, require
from jaxkd.data.progress import track


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


class Fields(NamedTuple):
    """What to read of an example.

    Attributes:
        image: Name of the feature that is the image.
        label: Name of the feature that is the label.
        shape: `(H, W, C)` of decoded images.
        image_size: Side to which images are fitted, `None` if they have `shape` as they are.
        class_names: Name of each class, by label.
    """

    image: str
    label: str
    shape: tuple[int, ...]
    image_size: int | None
    class_names: tuple[str, ...]


@contextlib.contextmanager
def reading(prepared: Prepared) -> Iterator[None]:
    """Reports what goes wrong inside as damage to the dataset."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except ImportError as error:
        raise not_installed(error) from error
    except Exception as error:  # TFDS, protobuf, array_record and Pillow have nothing closer in common
        raise prepared.half_written(one_line(error)) from error


def decode(prepared: Prepared, fields: Fields) -> tuple[Split, Split]:
    """Decodes all images to train on and all to test on.

    Args:
        prepared: The dataset.
        fields: What to read of its examples.

    Returns:
        `train` and, of `test`, `validation` and a fifth of `train`, the first that there is.

    Raises:
        DataError: If there is no `train`, examples are damaged or missing, or TensorFlow is needed and missing.
    """
    splits = prepared.builder.info.splits
    if "train" not in splits:
        raise DataError(f"{prepared.name} has no split named train, only {', '.join(splits)}: choose another dataset")
    train = _decode_split(prepared, fields, "train")
    for held_out in ("test", "validation"):
        if held_out in splits:
            return train, _decode_split(prepared, fields, held_out)
    return cut_test(train)


def _decode_split(prepared: Prepared, fields: Fields, split: str) -> Split:
    total, count = prepared.builder.info.splits[split].num_examples, 0
    decoded = Split(np.empty((total, *fields.shape), np.uint8), np.empty(total, np.int32))
    for example in track(_examples(prepared, split), description=f"decoding {prepared.name} {split}", total=total):
        if count < total:
            decoded.images[count] = _fit(example[fields.image], fields.image_size)
            decoded.labels[count] = example[fields.label]
        count += 1
    if count != total:
        raise prepared.half_written(f"{split} holds {count} examples instead of {total}")
    return decoded


def _fit(image: np.ndarray, image_size: int | None) -> np.ndarray:
    if image_size is None:
        return image
    grey = image.shape[-1] == 1
    return folder_source.fit(require("PIL.Image").fromarray(image[..., 0] if grey else image), image_size)


def _examples(prepared: Prepared, split: str) -> Iterator[dict[str, Any]]:
    """Yields decoded examples in the order in which they are stored."""
    if prepared.file_format != "array_record":
        _import_tensorflow(prepared)
    with reading(prepared), _without_opencv_advice():
        if prepared.file_format == "array_record":
            yield from prepared.builder.as_data_source(split=split)
        else:
            dataset = prepared.builder.as_dataset(split=split, shuffle_files=False)
            yield from require("tensorflow_datasets").as_numpy(dataset)


def _import_tensorflow(prepared: Prepared) -> None:
    try:
        tfds_prepare.import_tensorflow()
    except DataError as error:
        raise DataError(
            f"{prepared.folder} is stored as {prepared.file_format}, which takes TensorFlow to read: pip install "
            "tensorflow, or delete the folder and prepare it as array_record: "
            f"{tfds_folder.command(prepared.name, prepared.data_dir)}"
        ) from error


@contextlib.contextmanager
def _without_opencv_advice() -> Iterator[None]:
    """Keeps TFDS from recommending OpenCV over Pillow, which is what this package asks for."""
    logger = logging.getLogger("absl")

    def is_other(record: logging.LogRecord) -> bool:
        return "OpenCV is not installed" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
