"""Text classification datasets prepared by TensorFlow Datasets (TFDS)."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxkd.data import tfds_prepare, tfds_reader
from jaxkd.data.errors import DataError, import_or_raise

Columns = tuple[tuple[str, ...], np.ndarray, tuple[str, ...]]
"""Texts, labels and origins of a split."""


def is_prepared_text(name: str, data_dir: Path) -> bool:
    """Returns whether a TensorFlow dataset is prepared and has texts and no images."""
    try:
        folder = tfds_prepare.find_prepared(name, data_dir)
        features = (folder / "features.json").read_text(encoding="utf-8") if folder else ""
    except (DataError, OSError, ValueError):
        return False
    return "text_feature.Text" in features and "image_feature" not in features


def read_tfds_texts(name: str, data_dir: Path) -> tuple[dict[str, Columns], tuple[str, ...]]:
    """Reads a TensorFlow dataset, and prepares it first if it is missing.

    Args:
        name: `name`, `name/config`, either with `:version` or `/version`; without a version, the
            newest that is prepared.
        data_dir: The folder of all datasets.

    Returns:
        The splits `train`, `validation` and `test`, without those that are missing or unlabelled,
        and the names of the classes.

    Raises:
        DataError: If the dataset is unknown, cannot be prepared, is damaged, or does not classify
            texts.
    """
    folder = tfds_prepare.find_or_prepare(name, data_dir)
    prepared = tfds_reader.open_prepared(folder, name, data_dir)
    features = import_or_raise("tensorflow_datasets").features
    expected = "a text classification set"
    text = tfds_reader.only_feature(prepared, features.Text, expected=expected)
    label = tfds_reader.only_feature(prepared, features.ClassLabel, expected=expected)
    class_names = tuple(prepared.builder.info.features[label].names)
    splits = {}
    for split in ("train", "validation", "test"):
        if split not in prepared.builder.info.splits:
            continue
        examples = tfds_reader.read_examples(prepared, split)
        columns = _to_columns(f"{name}, {split}", [(row[text], row[label]) for row in examples])
        # TFDS gives the label -1 to the examples of an unlabelled split.
        if (columns[1] == -1).all():
            continue
        _check_labels(f"{name}, {split}", columns[1], len(class_names))
        splits[split] = columns
    return splits, class_names


def _check_labels(origin: str, labels: np.ndarray, num_classes: int) -> None:
    invalid = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if invalid.size:
        raise DataError(
            f"{origin} has label {labels[invalid[0]]} at example {invalid[0] + 1}, outside "
            f"0..{num_classes - 1}: choose a dataset whose splits are labelled or not as a whole"
        )


def _to_columns(origin: str, rows: list[tuple[Any, Any]]) -> Columns:
    origins = tuple(f"{origin}, example {i + 1}" for i in range(len(rows)))
    texts = tuple(_decode(text, name) for (text, _), name in zip(rows, origins, strict=True))
    return texts, np.array([label for _, label in rows], np.int32), origins


def _decode(text: Any, origin: str) -> str:
    # TFDS leaves texts as UTF-8 bytes unless a dataset decodes them itself.
    if not isinstance(text, bytes):
        return str(text)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin} is not UTF-8 ({error.reason}): choose another dataset"
        ) from error
