"""Text classification sets prepared by TensorFlow Datasets, read without TensorFlow."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd.data import tfds_folder, tfds_prepare
from jaxkd.data.errors import require
from jaxkd.data.tfds_prepared import examples, only_feature, open_prepared

Columns = tuple[tuple[str, ...], np.ndarray, tuple[str, ...]]
"""Texts, labels and places."""


def is_known(name: str, data_dir: Path) -> bool:
    """Tells whether the first part of a name is a TensorFlow dataset."""
    return tfds_prepare.is_known(re.split("[/:]", name)[0], data_dir)


def read(name: str, data_dir: Path) -> tuple[dict[str, Columns], tuple[str, ...]]:
    """Reads a TensorFlow dataset, preparing it first if need be.

    Args:
        name: `name`, `name/config`, either with `:version` or `/version`; without one, the newest prepared.
        data_dir: The folder of all datasets.

    Returns:
        The splits train, validation and test, as far as they are there and have classes; and the classes' names.

    Raises:
        DataError: If the dataset is unknown, cannot be prepared, is half-written, or does not classify texts.
    """
    folder = tfds_folder.find(name, data_dir) or tfds_prepare.prepare(name, data_dir)
    prepared = open_prepared(folder, name, data_dir)
    features, splits = require("tensorflow_datasets").features, {}
    text, label = (only_feature(prepared, kind, of="a text") for kind in (features.Text, features.ClassLabel))
    for split in ("train", "validation", "test"):
        if split in prepared.builder.info.splits:
            found = [(one[text], one[label]) for one in examples(prepared, split)]
            splits[split] = _columns(f"{name}, {split}", found)
    return (
        {split: columns for split, columns in splits.items() if (columns[1] >= 0).all()},
        tuple(prepared.builder.info.features[label].names),
    )


def _columns(where: str, examples: list[tuple[Any, Any]]) -> Columns:
    texts = tuple(text.decode("utf-8") if isinstance(text, bytes) else str(text) for text, _ in examples)
    labels = np.array([label for _, label in examples], np.int32)
    return texts, labels, tuple(f"{where}, example {i + 1}" for i in range(len(texts)))
