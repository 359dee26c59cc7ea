"""Texts and their translations."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkd.data.errors import DataError, expand_user_path
from jaxkd.data.text_files import (
    FILE_NAMES,
    TEST_SEED,
    VALIDATION_SEED,
    hold_out_tenth,
    line_origin,
    read_lines,
    strip_text,
)


class Pairs(NamedTuple):
    """Texts and their translations.

    Attributes:
        sources: The texts.
        targets: Their translations.
        origins: Where each pair comes from, such as the file and line of its source; for error
            messages.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    origins: tuple[str, ...]


class PairDataset(NamedTuple):
    """A translation dataset.

    Attributes:
        train: The pairs that models are trained on.
        validation: The pairs for choosing between models.
        test: The pairs that results are reported on.
    """

    train: Pairs
    validation: Pairs
    test: Pairs


def load_pairs(folder: str | os.PathLike[str], *, source: str, target: str) -> PairDataset:
    """Loads texts and their translations from a folder of files with one text a line.

    Each split has a file for each language: `train.en` and `train.de`, `val.en` (or `validation`,
    `valid`, `dev`) and so on, and `test.en` or a name that begins with it, such as
    `test_2016_flickr.en`. `.gz` files are read too. For a missing validation or test set a tenth of
    the training texts, drawn by a fixed key, is held out.

    Args:
        folder: The folder.
        source: Suffix of the files to translate from, such as `"en"`.
        target: Suffix of the files to translate to.

    Returns:
        The pairs.

    Raises:
        DataError: If a file is missing, the two files of a split differ in length, or a line is
            empty or not UTF-8; the message names file and line.
    """
    root = expand_user_path(folder)
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}: give one with train.{source} and train.{target}"
        )
    splits = {}
    for split, names in FILE_NAMES.items():
        source_file = _find_language_file(root, names, source)
        target_file = _find_language_file(root, names, target)
        if source_file and target_file:
            splits[split] = read_pairs(source_file, target_file)
        # A single file of a pair is an error even in a split that may be missing.
        elif source_file or target_file or split == "train":
            files = ", ".join(sorted(path.name for path in root.iterdir())[:8])
            raise DataError(
                f"{root} has no pair {names[0]}.{source} and {names[0]}.{target}: "
                f"it has {files or 'nothing'}"
            )
    return make_pair_dataset(splits["train"], splits.get("validation"), splits.get("test"))


def read_pairs(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Pairs:
    """Reads two files whose lines with the same number are translations of each other.

    Raises:
        DataError: If the files differ in length, or a line is empty or not UTF-8; the message names
            file and line.
    """
    source_path = expand_user_path(source)
    target_path = expand_user_path(target)
    source_lines = read_lines(source_path)
    target_lines = read_lines(target_path)
    if len(source_lines) != len(target_lines):
        longer_path = source_path if len(source_lines) > len(target_lines) else target_path
        first_unpaired = line_origin(longer_path, min(len(source_lines), len(target_lines)))
        raise DataError(
            f"{source_path} has {len(source_lines)} lines and {target_path} {len(target_lines)}, "
            f"but each line must have its translation: {first_unpaired} has none"
        )
    return Pairs(
        _strip_lines(source_path, source_lines),
        _strip_lines(target_path, target_lines),
        tuple(line_origin(source_path, index) for index in range(len(source_lines))),
    )


def make_pair_dataset(
    train: Pairs, validation: Pairs | None = None, test: Pairs | None = None
) -> PairDataset:
    """Makes a dataset; for each missing set a tenth of the training pairs is held out.

    Raises:
        DataError: If there are too few pairs.
    """
    # The test set first, so that it is the same with and without a validation set.
    if test is None:
        indices, test_indices = hold_out_tenth(len(train.sources), TEST_SEED)
        train, test = _select_pairs(train, indices), _select_pairs(train, test_indices)
    if validation is None:
        indices, validation_indices = hold_out_tenth(len(train.sources), VALIDATION_SEED)
        train, validation = _select_pairs(train, indices), _select_pairs(train, validation_indices)
    return PairDataset(train, validation, test)


def _strip_lines(path: Path, lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(strip_text(line, line_origin(path, index)) for index, line in enumerate(lines))


def _select_pairs(pairs: Pairs, indices: np.ndarray) -> Pairs:
    return Pairs(*(tuple(column[i] for i in indices) for column in pairs))


def _find_language_file(folder: Path, names: Sequence[str], language: str) -> Path | None:
    """Finds a split's file in a language by its name, else by the beginning of its name."""
    # Exact names first: `test.en` wins over `test_2016_flickr.en`.
    for rest in ("", "[_.-]*"):
        for name in names:
            for suffix in ("", ".gz"):
                # Sorted, because the order of `glob` depends on the file system.
                if paths := sorted(folder.glob(f"{name}{rest}.{language}{suffix}")):
                    return paths[0]
    return None
