"""Images of a TensorFlow dataset that are decoded when they are needed."""

import contextlib
import hashlib
import os
import uuid
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd.data import tfds_reader
from jaxkd.data.dataset import Split
from jaxkd.data.errors import DataError, import_or_raise
from jaxkd.data.progress import track
from jaxkd.data.records import Records
from jaxkd.data.tfds_reader import PreparedDataset


class _Images:
    """A source of images, for `Records`."""

    def __init__(self, source: Any, read: Callable[[Any], np.ndarray]) -> None:
        self._source = source
        self._read = read

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
        with tfds_reader.without_opencv_advice():
            examples = self._source.__getitems__(list(indices))
            return [{"inputs": self._read(example)} for example in examples]


def stream_split(
    prepared: PreparedDataset,
    split: str,
    *,
    image: str,
    label: str,
    read: Callable[[Any], np.ndarray],
    fingerprint: str,
) -> Split:
    """Returns a split whose images are read when they are needed, and its labels.

    All records are read once for the labels, which are then kept beside the version's folder, in
    `<version>.labels.npz`, if that is writable.

    Args:
        prepared: The dataset, stored as array_record.
        split: Name of the split.
        image: Name of the feature that is the image.
        label: Name of the feature that is the label.
        read: Returns the pixels of an example.
        fingerprint: Identifies the files and how they are decoded.

    Raises:
        DataError: If the dataset has another format, which has no random access, or its labels
            cannot be read.
    """
    if prepared.file_format != "array_record":
        raise DataError(
            f"{prepared.folder} is stored as {prepared.file_format}, which cannot be read in any "
            "order: prepare it as array_record, or load it into memory"
        )
    labels = _read_labels(prepared, split, image=image, label=label, fingerprint=fingerprint)
    source = tfds_reader.open_source(prepared, split)
    identity = f"{fingerprint} {split}"
    images: Any = Records(_Images(source, read), fingerprint=identity)["inputs"]
    if len(images) != len(labels):
        raise prepared.damaged_error(f"{split} holds {len(images)} images and {len(labels)} labels")
    return Split(images, labels)


def _read_labels(
    prepared: PreparedDataset, split: str, *, image: str, label: str, fingerprint: str
) -> np.ndarray:
    path = prepared.folder.with_name(f"{prepared.folder.name}.{split}-labels.npz")
    digest = hashlib.sha256(f"{fingerprint} {split} {label}".encode()).hexdigest()
    labels = _load_labels(path, digest)
    if labels is None:
        skipped = {image: import_or_raise("tensorflow_datasets").decode.SkipDecoding()}
        source = tfds_reader.open_source(prepared, split, decoders=skipped)
        examples = track(
            source, description=f"reading labels of {prepared.name} {split}", total=len(source)
        )
        with tfds_reader.raise_as_damage(prepared):
            labels = np.fromiter((example[label] for example in examples), np.int32, len(source))
        _save_labels(path, digest, labels)
    return labels


def _load_labels(path: Path, digest: str) -> np.ndarray | None:
    """Returns saved labels, or `None` if the file is missing, damaged or has another digest."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as handle, np.load(handle) as file:
            return file["labels"] if str(file["digest"]) == digest else None
    # A damaged file raises any of these, according to which bytes are wrong.
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None


def _save_labels(path: Path, digest: str, labels: np.ndarray) -> None:
    """Saves labels atomically; does nothing if the folder is not writable."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, digest=np.array(digest), labels=labels)
        os.replace(temporary, path)
    # Only the next load is slower.
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
