"""Decodes the images of a set prepared by TensorFlow Datasets."""

import contextlib
import logging
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxkd.data import folder_source
from jaxkd.data.dataset import Split, cut_test
from jaxkd.data.errors import DataError, require
from jaxkd.data.progress import track
from jaxkd.data.tfds_prepared import Prepared, examples


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
    with _without_opencv_advice():
        yield from examples(prepared, split)


@contextlib.contextmanager
def _without_opencv_advice() -> Generator[None]:
    """Keeps TFDS from recommending OpenCV over Pillow, which is what this package asks for."""
    logger = logging.getLogger("absl")

    def is_other(record: logging.LogRecord) -> bool:
        return "OpenCV is not installed" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
