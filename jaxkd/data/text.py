"""Texts with classes, and texts without."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkd.data import tfds_prepare, tfds_texts
from jaxkd.data.errors import DataError, expand_user_path
from jaxkd.data.text_files import (
    FILE_NAMES,
    TEST_SEED,
    VALIDATION_SEED,
    hold_out_tenth,
    line_origin,
    read_labelled_lines,
    read_lines,
    strip_text,
)

# Shorter texts, such as "a good film", occur within others by chance.
_MIN_CONTAINED_LETTERS = 20


class Texts(NamedTuple):
    """Texts and their classes.

    Attributes:
        texts: The texts.
        labels: Their classes, int32 `[N]`.
        origins: Where each text comes from, such as a file and a line; for error messages.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    origins: tuple[str, ...]


class TextDataset(NamedTuple):
    """A text classification dataset.

    Attributes:
        train: The texts that models are trained on.
        validation: The texts for choosing between models.
        test: The texts that results are reported on.
        class_names: Name of each class, by label.
    """

    train: Texts
    validation: Texts
    test: Texts
    class_names: tuple[str, ...]


def load_texts(
    name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None
) -> TextDataset:
    """Loads a text classification dataset by name or path.

    The first of these that fits is loaded:

    1. A folder with `train.tsv`, `test.tsv` and optionally `dev.tsv` (or `validation`, `valid`,
       `val`). A line is a text, a tab and its class, which is a number or a name; a first line
       whose class is `label` is skipped. `.tsv.gz` files are read too.
    2. A TensorFlow dataset with one text and one class per example, such as `"imdb_reviews"` or
       `"glue/sst2"`. If it is not prepared yet and TensorFlow is installed, it is downloaded and
       prepared first.

    If there is no validation set, a tenth of the training texts, drawn by a fixed key, is held out.
    If the test set is missing or, as in GLUE, unlabelled, the validation set becomes the test set.

    Args:
        name: Name or path, as above.
        data_dir: The folder of TensorFlow datasets; `None` means `$TFDS_DATA_DIR` or
            `~/tensorflow_datasets`.

    Returns:
        The texts; equal calls give equal texts.

    Raises:
        DataError: If there is no such dataset, or it is damaged, or something that reading it needs
            is missing.
    """
    name = os.fspath(name)
    if not name:
        raise DataError(
            "the name of the dataset is empty: give a folder with train.tsv and test.tsv, or the "
            "name of a dataset"
        )
    folder = expand_user_path(name)
    if folder.is_dir():
        return _read_folder(folder)
    data_dir = tfds_prepare.resolve_data_dir(data_dir)
    # `glue/sst2` looks like a path; only an unknown `glue` makes it one.
    if os.sep in name and not tfds_prepare.is_known(re.split("[/:]", name)[0], data_dir):
        raise DataError(
            f"there is no folder {folder}: give one with train.tsv and test.tsv, or the name of a "
            "dataset"
        )
    splits, class_names = tfds_texts.read_tfds_texts(name, data_dir)
    return _make_text_dataset(
        {split: Texts(*columns) for split, columns in splits.items()}, class_names
    )


def read_texts(
    path: str | os.PathLike[str], *, field: int = 1
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads texts without classes, one a line.

    Args:
        path: A UTF-8 file, or a `.gz` of one.
        field: Number of the tab-separated field that holds the text, counted from 1.

    Returns:
        The texts, and where each comes from.

    Raises:
        DataError: If a line is empty, has no such field or is not UTF-8; the message names the
            line.
    """
    path = expand_user_path(path)
    if field < 1:
        raise DataError(f"fields are counted from 1, got {field}")
    texts = []
    origins = []
    for index, line in enumerate(read_lines(path)):
        origin = line_origin(path, index)
        fields = line.split("\t")
        if len(fields) < field:
            raise DataError(
                f"{origin} has {len(fields)} fields, not {field}: check which holds the text"
            )
        texts.append(strip_text(fields[field - 1], origin))
        origins.append(origin)
    return tuple(texts), tuple(origins)


def without_overlap(texts: Sequence[str], excluded: Iterable[str]) -> np.ndarray:
    """Finds the texts that contain none of the excluded texts.

    Only letters and digits are compared, in lower case. Public datasets of short texts are often
    cut from one source, so unlabelled training texts may contain the texts of a test set.

    Args:
        texts: The texts.
        excluded: The texts that they must not contain. An excluded text of fewer than 20 letters
            counts only if it equals a whole text.

    Returns:
        Booleans `[N]`, True for a text without overlap.

    Example:
        >>> from jaxkd.data.text import without_overlap
        >>> tested = ["an utter bore", "a most utterly boring film ."]
        >>> without_overlap(["An utter bore!", "Fun!", "A most utterly boring film, alas"], tested)
        array([False,  True, False])
    """
    excluded_letters = {_letters(text) for text in excluded}
    long_excluded = [
        letters for letters in excluded_letters if len(letters) >= _MIN_CONTAINED_LETTERS
    ]

    def overlaps(letters: str) -> bool:
        # The set first: looking up a whole text is the cheaper test.
        return letters in excluded_letters or any(part in letters for part in long_excluded)

    return np.array([not overlaps(_letters(text)) for text in texts], bool)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def _read_folder(folder: Path) -> TextDataset:
    columns = {}
    for split, names in FILE_NAMES.items():
        paths = [folder / f"{name}{suffix}" for name in names for suffix in (".tsv", ".tsv.gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:
            columns[split] = read_labelled_lines(path)
        elif split != "validation":
            raise DataError(
                f"{folder} has no {split}.tsv: each line of it is a text, a tab and a class"
            )
    class_names = sorted(
        {label for _, labels, _ in columns.values() for label in labels}, key=_number_then_name
    )
    # A class that only the other splits have could never be learnt.
    _, train_labels, _ = columns["train"]
    unseen = sorted(set(class_names) - set(train_labels))
    if unseen or len(class_names) < 2:
        raise DataError(
            f"{folder}: train.tsv must have all classes, at least two; "
            f"it lacks {unseen or 'a second one'}"
        )
    indices = {name: index for index, name in enumerate(class_names)}
    splits = {
        split: Texts(texts, np.array([indices[label] for label in labels], np.int32), origins)
        for split, (texts, labels, origins) in columns.items()
    }
    return _make_text_dataset(splits, class_names)


def _number_then_name(class_name: str) -> tuple[float, str]:
    """Returns the sort key that orders numbers by value, before all other names."""
    is_number = class_name.lstrip("-").isdigit()
    return (float(class_name), "") if is_number else (float("inf"), class_name)


def _make_text_dataset(splits: dict[str, Texts], class_names: Sequence[str]) -> TextDataset:
    """Makes a dataset, and holds out a tenth of the training texts for each missing set."""
    train, validation, test = (splits.get(split) for split in ("train", "validation", "test"))
    if train is None:
        raise DataError(
            f"there is nothing to train on, only {sorted(splits)}: choose another dataset"
        )
    # As for GLUE, results are then compared on the published validation set.
    if test is None:
        validation, test = None, validation
    if test is None:
        indices, test_indices = hold_out_tenth(len(train.texts), TEST_SEED)
        train, test = _select_texts(train, indices), _select_texts(train, test_indices)
    if validation is None:
        indices, validation_indices = hold_out_tenth(len(train.texts), VALIDATION_SEED)
        train, validation = _select_texts(train, indices), _select_texts(train, validation_indices)
    return TextDataset(train, validation, test, tuple(class_names))


def _select_texts(split: Texts, indices: np.ndarray) -> Texts:
    return Texts(
        tuple(split.texts[i] for i in indices),
        split.labels[indices],
        tuple(split.origins[i] for i in indices),
    )
