"""A cache of decoded images, which loads twenty times faster than the images decode.

The cache of a dataset is a single uncompressed npz file.
"""

import contextlib
import os
import uuid
import zipfile
from pathlib import Path

import numpy as np

from jaxkd.data.dataset import Split


def read_decoded(path: Path, fingerprint: str) -> tuple[Split, Split] | None:
    """Reads a cache.

    Args:
        path: The file.
        fingerprint: Identifies what was decoded and how.

    Returns:
        The training and the test split, or `None` if the file is missing, damaged or has another
        fingerprint.
    """
    # Reading from a pipe or a device may never end.
    if not path.is_file():
        return None
    try:
        # Opened here, because np.load leaks the handle if the zip file is damaged.
        with path.open("rb") as handle, np.load(handle) as file:
            if str(file["fingerprint"]) != fingerprint:
                return None
            train = Split(file["train_images"], file["train_labels"])
            return train, Split(file["test_images"], file["test_labels"])
    # A damaged file raises any of these, according to which bytes are wrong.
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None


def write_decoded(path: Path, fingerprint: str, train: Split, test: Split) -> None:
    """Writes a cache atomically; does nothing if the folder is not writable.

    Args:
        path: The file, replaced if it exists.
        fingerprint: Identifies what was decoded and how.
        train: The training split.
        test: The test split.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                fingerprint=np.array(fingerprint),
                train_images=train.images,
                train_labels=train.labels,
                test_images=test.images,
                test_labels=test.labels,
            )
        os.replace(temporary, path)
    # The disk may be read-only or full. The caller has its data; only the next load is slower.
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
