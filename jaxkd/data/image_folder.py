"""Photographs in folders named after their classes."""

import itertools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxkd.data.dataset import Split
from jaxkd.data.errors import DataError, import_or_raise, one_line
from jaxkd.data.progress import track

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp"}


def read_image_folder(path: Path, *, image_size: int) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads `path/train/<class>/*` and `path/test/<class>/*`, in sorted order.

    Images are jpg, jpeg, png, bmp, gif (the first frame) and webp files, in upper or lower case.
    Other files and hidden files are skipped.

    Args:
        path: The folder.
        image_size: Side in pixels to which every image is fitted.

    Returns:
        Training split, test split and class names. Images are uint8
        `[N, image_size, image_size, 3]`.

    Raises:
        DataError: If a folder is missing or empty, train and test differ in their classes, or an
            image is damaged.
    """
    if not path.is_dir():
        raise DataError(f"there is no folder {path}: check the path")
    class_names = _class_names(path / "train")
    _check_same_classes(path, class_names, _class_names(path / "test"))
    train = _read_split(path / "train", class_names, image_size)
    test = _read_split(path / "test", class_names, image_size)
    return train, test, class_names


def fit_image(image: "Image", image_size: int) -> np.ndarray:
    """Turns an image upright, converts it to RGB, and crops and scales it to a square.

    Args:
        image: Any Pillow image.
        image_size: Side of the square in pixels.

    Returns:
        uint8 `[image_size, image_size, 3]`. The largest centred square is kept and resampled with
        antialiasing.

    Raises:
        ValueError: If the image has more than 8 bits a channel.
    """
    # convert("RGB") would silently clip these modes to 255.
    if image.mode.startswith(("I", "F")):
        raise ValueError(
            f"its mode is {image.mode}, of more than 8 bits a channel, which would be clipped"
        )
    image_ops = import_or_raise("PIL.ImageOps")
    # Cameras store photographs as the sensor sees them and the orientation in the EXIF data.
    upright = image_ops.exif_transpose(image).convert("RGB")
    return np.asarray(image_ops.fit(upright, (image_size, image_size)))


def _class_names(part: Path) -> tuple[str, ...]:
    if not part.is_dir():
        raise DataError(
            f"there is no folder {part}: images are expected in train/<class>/ and test/<class>/"
        )
    names = sorted(
        entry.name for entry in part.iterdir() if entry.is_dir() and not _is_hidden(entry)
    )
    if not names:
        raise DataError(f"{part} has no class folders: images are expected in {part.name}/<class>/")
    return tuple(names)


def _check_same_classes(
    path: Path, train_names: tuple[str, ...], test_names: tuple[str, ...]
) -> None:
    missing_names = {
        "test": set(train_names) - set(test_names),
        "train": set(test_names) - set(train_names),
    }
    for part, names in missing_names.items():
        if names:
            raise DataError(
                f"{path / part} lacks the class folders {', '.join(sorted(names))}: "
                "add or remove them"
            )


def _read_split(part: Path, class_names: tuple[str, ...], image_size: int) -> Split:
    files = [_image_files(part / name) for name in class_names]
    labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(members) for members in files])
    paths = track(itertools.chain(*files), description=f"reading {part.name}", total=len(labels))
    return Split(np.stack([_read_image(path, image_size) for path in paths]), labels)


def _image_files(folder: Path) -> list[Path]:
    files = [
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() in _SUFFIXES and not _is_hidden(entry)
    ]
    if not files:
        raise DataError(
            f"{folder} has no images ({', '.join(sorted(_SUFFIXES))}): "
            "add some or remove the folder"
        )
    # iterdir's order depends on the file system; results must not.
    return sorted(files)


def _is_hidden(entry: Path) -> bool:
    return entry.name.startswith(".")


def _read_image(path: Path, image_size: int) -> np.ndarray:
    pillow = import_or_raise("PIL.Image")
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged EXIF data and of transparent palettes; such images are usable.
            warnings.filterwarnings("ignore", module="PIL")
            with pillow.open(path) as image:
                return fit_image(image, image_size)
    # SyntaxError is what Pillow raises for a broken PNG chunk.
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise DataError(
            f"cannot read the image {path} ({one_line(error)}): replace or delete it"
        ) from error
