"""Image classification datasets in Parquet files, as Hugging Face `datasets` keeps them."""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkd._messages import list_some
from jaxkd.data import parquet
from jaxkd.data.dataset import Split, hold_out_test
from jaxkd.data.errors import DataError, import_or_raise, one_line, warn
from jaxkd.data.image_folder import decode_image
from jaxkd.data.progress import track
from jaxkd.data.text_files import FILE_NAMES

_USUAL_LABEL = "label"
_GREY_MODES = {"1", "L"}


class _Columns(NamedTuple):
    """The columns that are read, and the names of the classes."""

    image: str
    label: str
    class_names: tuple[str, ...]


def has_images(folder: Path) -> bool:
    """True if a folder has Parquet or Arrow files with a column of images."""
    files = parquet.list_splits(folder, FILE_NAMES["train"])
    return bool(files) and bool(parquet.find_images(files[0]))


def read_parquet_images(
    folder: Path, *, image_size: int | None, default_size: int
) -> tuple[Split, Split, tuple[str, ...], Split | None]:
    """Reads the images of a folder as the Hugging Face hub has it.

    Args:
        folder: The folder; see `jaxkd.data.parquet.list_splits`.
        image_size: Side in pixels to which every image is fitted. With `None`, images that all have
            the same size keep it.
        default_size: The side for images of various sizes.

    Returns:
        Training split, test split, class names and, if there is one beside the test set, the
        validation split. Images are uint8 `[N, H, W, 3]`, or `[N, H, W, 1]` if all are grey. Labels
        and classes have the order of the file. Without a test set with classes, the validation set
        or a fifth of the training images is the test set.

    Raises:
        DataError: If there are several columns of images or of classes, or a file or an image is
            damaged.
    """
    files = {split: parquet.list_splits(folder, names) for split, names in FILE_NAMES.items()}
    first = {split: paths[0] for split, paths in files.items() if paths}
    columns = _find_columns(first["train"])
    first = {split: path for split, path in first.items() if _has_classes(path, columns)}
    if "train" not in first:
        raise DataError(f"{files['train'][0]} has no classes: choose another dataset")
    shape, counts = _find_shape(first, columns, image_size, default_size)
    splits = {
        split: _read_split(path, columns, shape, counts[split]) for split, path in first.items()
    }
    train, test, validation = splits["train"], splits.get("test"), splits.get("validation")
    if test is None:
        substitute = "a fifth of train" if validation is None else "the validation set"
        warn(f"{folder}: there is no test set with classes; {substitute} is the test set")
        if validation is None:
            return *hold_out_test(train), columns.class_names, None
        test, validation = validation, None
    return train, test, columns.class_names, validation


def _find_columns(path: Path) -> _Columns:
    images, classes = parquet.find_images(path), parquet.read_class_columns(path)
    if len(images) != 1:
        raise DataError(f"{path} has the images {list_some(images)}: leave one column")
    # CIFAR-100 has a coarse label beside the fine one.
    label = _USUAL_LABEL if _USUAL_LABEL in classes else next(iter(classes), "")
    if not classes or (len(classes) > 1 and label != _USUAL_LABEL):
        found = list_some(classes) or "none"
        raise DataError(
            f"{path} must have one ClassLabel, or one that is called label, but has {found}: "
            "rename that of the classes"
        )
    return _Columns(images[0], label, tuple(classes[label]))


def _has_classes(path: Path, columns: _Columns) -> bool:
    """False, with a warning, if every class of a split is -1, as in unlabelled test sets."""
    if any(label != -1 for label in parquet.iterate_labels(path, columns.label)):
        return True
    warn(f"{path} has no classes and is left out")
    return False


def _find_shape(
    first: dict[str, Path], columns: _Columns, image_size: int | None, default_size: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Returns the shape to which images are decoded, and the number of images of each split."""
    sizes, modes, counts = set(), set(), {}
    for split, path in first.items():
        counts[split] = 0
        for content, _, origin in parquet.iterate_images(path, columns.image, columns.label):
            size, mode = _read_header(content, origin)
            sizes.add(size)
            modes.add(mode)
            counts[split] += 1
    channels = 1 if modes <= _GREY_MODES else 3
    if image_size is None and len(sizes) == 1:
        width, height = sizes.pop()
        return (height, width, channels), counts
    side = image_size or default_size
    return (side, side, channels), counts


def _read_header(content: bytes | None, origin: str) -> tuple[tuple[int, int], str]:
    """Returns the size and the mode of an image, without decoding it."""
    if content is None:
        raise DataError(f"{origin} has no image: the files must hold the images, not their paths")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            with import_or_raise("PIL.Image").open(io.BytesIO(content)) as image:
                return image.size, image.mode
    # As for `image_folder.read_image`.
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(
            f"cannot read the image of {origin} ({one_line(error)}): copy the file again"
        ) from error


def _read_split(path: Path, columns: _Columns, shape: tuple[int, int, int], count: int) -> Split:
    # Filled in place: a list of the images and their stack would take twice the memory.
    images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int32)
    examples = parquet.iterate_images(path, columns.image, columns.label)
    tracked = track(examples, description=f"decoding {path.name}", total=count)
    num_transparent = 0
    for i, (content, label, origin) in enumerate(tracked):
        if not 0 <= label < len(columns.class_names):
            raise DataError(
                f"{origin} has the class {label}, but the file names {len(columns.class_names)}: "
                "correct it"
            )
        picture = decode_image(content or b"", shape, f"of {origin}")
        images[i], labels[i] = picture.pixels, label
        num_transparent += picture.is_transparent
    if num_transparent:
        warn(f"{path}: {num_transparent:,} images have transparent parts, which are shown on white")
    return Split(images, labels)
