"""A file of JPEG images and labels: the bytes of the JPEG files as they are, in one npz file."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkd.data import DataError
from jaxkd.data.dataset import Split
from jaxkd.data.errors import import_or_raise

SPLITS = ("train", "test")


class JpegSplit(NamedTuple):
    """Images as JPEG files, and their classes.

    Attributes:
        files: The bytes of each file.
        labels: The class of each image.
    """

    files: Sequence[bytes]
    labels: Sequence[int]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(map(len, self.files))


def write_jpegs(path: Path, train: JpegSplit, test: JpegSplit, class_names: Sequence[str]) -> None:
    """Writes both splits."""
    arrays: dict[str, Any] = {"class_names": np.array(class_names)}
    for name, split in zip(SPLITS, (train, test), strict=True):
        arrays[f"{name}_bytes"] = np.frombuffer(b"".join(split.files), np.uint8)
        arrays[f"{name}_ends"] = np.cumsum([len(file) for file in split.files])
        arrays[f"{name}_labels"] = np.array(split.labels, np.int32)
    # Small JPEG files have more header than image, and the headers are alike.
    np.savez_compressed(path, **arrays)


def read_jpegs(path: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads and decodes both splits.

    Returns:
        Training split, test split and class names.

    Raises:
        DataError: If the file is missing or damaged, or Pillow is not installed.
    """
    try:
        with path.open("rb") as handle, np.load(handle) as arrays:
            train, test = (_decode_split(arrays, name) for name in SPLITS)
            return train, test, tuple(map(str, arrays["class_names"]))
    # A damaged file raises any of these, according to which bytes are wrong.
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: is no file of images ({error}); make it again") from error


def _decode_split(arrays: np.lib.npyio.NpzFile, name: str) -> Split:
    image = import_or_raise("PIL.Image")
    files = np.split(arrays[f"{name}_bytes"], arrays[f"{name}_ends"][:-1])
    images = [
        np.asarray(image.open(io.BytesIO(file.tobytes())).convert("RGB"), np.uint8)
        for file in files
    ]
    return Split(np.stack(images), arrays[f"{name}_labels"])
