"""Texts and their translations."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkd._messages import list_some
from jaxkd.data.dataset import warn_of_equal_examples, warn_of_shared_validation
from jaxkd.data.errors import DataError, expand_user_path, warn
from jaxkd.data.text_files import (
    FILE_NAMES,
    TEST_SEED,
    VALIDATION_SEED,
    LineOrigins,
    check_different,
    hold_out_tenth,
    iterate_lines,
    line_origin,
    take,
    warn_of_columns,
)

MAX_EXCHANGED_SHARE = 0.3
"""By how much the share of a split's source words that are words of the training targets may exceed
that of words of the training sources."""


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
    origins: Sequence[str]


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


def load_pairs(
    folder: str | os.PathLike[str], *, source: str, target: str, max_unpacked: int | None = None
) -> PairDataset:
    """Loads texts and their translations from a folder of files with one text a line.

    Each split has a file for each language: `train.en` and `train.de`, `val.en` (or `validation`,
    `valid`, `dev`) and so on, and `test.en` or a name that begins with it, such as
    `test_2016_flickr.en`. Both files of a pair have the same name but for the language. `.gz` files
    are read too. For a missing validation or test set a tenth of the training texts, drawn by a
    fixed key, is held out.

    Args:
        folder: The folder.
        source: Suffix of the files to translate from, such as `"en"`.
        target: Suffix of the files to translate to.
        max_unpacked: Number of bytes to which a `.gz` file may unpack. By default 8 MiB or 16
            times its size, whichever is more.

    Returns:
        The pairs. A warning says which files are read if a split has several pairs or a file is
        there both packed and unpacked, that there is no test set, how many pairs two splits share,
        and how many sentences equal their translation or have tabs if most do.

    Raises:
        DataError: If a file is missing or has no partner of the same name, the two files of a split
            differ in length or have the same sentences, two splits are the same file, or a line is
            empty or not UTF-8; the message names file and line.
    """
    root = expand_user_path(folder)
    if not os.path.isdir(root):
        raise DataError(
            f"there is no folder {root}: give one with train.{source} and train.{target}"
        )
    files = {}
    for split, names in FILE_NAMES.items():
        pair = _find_pair(root, names, source, target)
        if pair is not None:
            files[split] = pair
        elif split == "train":
            raise _missing_pair_error(root, names[0], source, target, root.iterdir())
    check_different(source_path for source_path, _ in files.values())
    splits = {split: read_pairs(*pair, max_unpacked=max_unpacked) for split, pair in files.items()}
    if "test" not in splits:
        warn(f"{root}: there is no test set; a tenth of the training pairs is the test set")
    train_words = [_collect_words(texts) for texts in splits["train"][:2]]
    for split, pairs in splits.items():
        if split != "train" and _are_exchanged(pairs, *train_words):
            warn(
                f"{files[split][0]} seems to be in the language of {files['train'][1].name}, by "
                "its words: if the two languages are exchanged, rename the files"
            )
    dataset = make_pair_dataset(splits["train"], splits.get("validation"), splits.get("test"))
    train, validation, test = ([*zip(*split[:2], strict=True)] for split in dataset)
    if "validation" in splits:
        warn_of_shared_validation(str(root), "pairs", train, validation, test)
    # Pairs have no classes, which cannot differ.
    warn_of_equal_examples(str(root), "pairs", train, np.zeros(len(train), np.int32), test)
    return dataset


def read_pairs(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    max_unpacked: int | None = None,
) -> Pairs:
    """Reads two files whose lines with the same number are translations of each other.

    Args:
        source: The file of the texts.
        target: The file of their translations.
        max_unpacked: As for `load_pairs`.

    Returns:
        The pairs.

    Raises:
        DataError: If the files differ in length or have the same sentences, the lines of one hold
            those of the other behind a tab, or a line is empty or not UTF-8; the message names file
            and line.
    """
    source_path = expand_user_path(source)
    target_path = expand_user_path(target)
    if source_path == target_path:
        raise DataError(f"source and target are both {source_path}: choose two files")
    source_lines = list(iterate_lines(source_path, max_unpacked=max_unpacked))
    target_lines = list(iterate_lines(target_path, max_unpacked=max_unpacked))
    if len(source_lines) != len(target_lines):
        longer_path = source_path if len(source_lines) > len(target_lines) else target_path
        first_unpaired = line_origin(longer_path, min(len(source_lines), len(target_lines)))
        raise DataError(
            f"{source_path} has {len(source_lines)} lines and {target_path} {len(target_lines)}, "
            f"but each line must have its translation: {first_unpaired} has none"
        )
    sources = _strip_lines(source_path, source_lines)
    targets = _strip_lines(target_path, target_lines)
    _check_translated(source_path, target_path, sources, targets)
    for path, lines in ((source_path, sources), (target_path, targets)):
        warn_of_columns(path, lines, "leave the sentence alone in each line")
    return Pairs(sources, targets, LineOrigins(source_path, range(len(sources))))


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


def _check_translated(
    source_path: Path, target_path: Path, sources: Sequence[str], targets: Sequence[str]
) -> None:
    for path, lines, others in (
        (source_path, sources, targets),
        (target_path, targets, sources),
    ):
        if sum(map(_has_field, lines, others)) > len(lines) / 2:
            raise DataError(
                f"the lines of {path} hold their translation behind a tab: leave one text in each"
            )
    # A name or a number is its own translation.
    num_equal = sum(map(str.__eq__, sources, targets))
    if num_equal == len(sources) > 1:
        raise DataError(
            f"{source_path} and {target_path} have the same sentences: replace one by its "
            "translation"
        )
    if num_equal > len(sources) / 2 and num_equal > 1:
        warn(
            f"{num_equal:,} of {len(sources):,} sentences of {source_path} equal their translation "
            f"in {target_path.name}"
        )


def _are_exchanged(pairs: Pairs, train_sources: set[str], train_targets: set[str]) -> bool:
    """Returns whether the words of a split's sources are rather those of the training targets."""
    words = _collect_words(pairs.sources)
    if not words:
        return False
    in_sources, in_targets = (
        len(words & known) / len(words) for known in (train_sources, train_targets)
    )
    return in_targets > in_sources + MAX_EXCHANGED_SHARE


def _collect_words(texts: Sequence[str]) -> set[str]:
    return {word for text in texts for word in text.casefold().split() if word.isalpha()}


def _has_field(line: str, text: str) -> bool:
    """Returns whether one of the fields of a line, which tabs divide, is a text."""
    return "\t" in line and text in map(str.strip, line.split("\t"))


def _strip_lines(path: Path, lines: Sequence[str]) -> tuple[str, ...]:
    for index, line in enumerate(lines):
        if not line.strip():
            raise DataError(
                f"{line_origin(path, index)} is empty: remove this line from both files"
            )
    return tuple(line.strip() for line in lines)


def _select_pairs(pairs: Pairs, indices: np.ndarray) -> Pairs:
    sources, targets = (tuple(column[i] for i in indices) for column in pairs[:2])
    return Pairs(sources, targets, take(pairs.origins, indices))


def _find_pair(
    folder: Path, names: Sequence[str], source: str, target: str
) -> tuple[Path, Path] | None:
    """Finds the two files of a split, which have the same name but for the language.

    Returns:
        The files, `None` if there are none of this split in either language.

    Raises:
        DataError: If there are files, but no two of the same name.
    """
    source_files = _find_language_files(folder, names, source)
    target_files = _find_language_files(folder, names, target)
    stems = [stem for stem in source_files if stem in target_files]
    # A single file of a pair is an error even in a split that may be missing.
    if not stems and (source_files or target_files):
        files = [*source_files.values(), *target_files.values()]
        raise _missing_pair_error(folder, names[0], source, target, files)
    if not stems:
        return None

    # Exact names first: `test.en` wins over `test_2016_flickr.en`.
    def rank(stem: str) -> tuple[bool, int | None, str]:
        return stem not in names, _find_name(stem, names), stem

    chosen = min(stems, key=rank)
    others = [stem for stem in stems if stem != chosen]
    if others:
        warn(f"{folder}: of several pairs {chosen} is read, not {list_some(others)}")
    pair = source_files[chosen], target_files[chosen]
    for path in pair:
        packed = path.with_name(f"{path.name}.gz")
        if packed.is_file():
            warn(f"{path} is read, {packed.name} beside it not")
    return pair


def _find_language_files(folder: Path, names: Sequence[str], language: str) -> dict[str, Path]:
    """Returns the files of a split in a language by their names without language and `.gz`."""
    files = {}
    # Sorted, because the order depends on the file system; an unpacked file wins over its `.gz`.
    for path in sorted(folder.iterdir()):
        stem = path.name.removesuffix(".gz").removesuffix(f".{language}")
        has_language = path.name.removesuffix(".gz") != stem
        if has_language and _find_name(stem, names) is not None and path.is_file():
            files.setdefault(stem, path)
    return files


def _find_name(stem: str, names: Sequence[str]) -> int | None:
    """Returns the index of the name that a stem is or begins with."""
    for index, name in enumerate(names):
        # `test_2016_flickr` belongs to the split `test`, unlike `testimony`.
        if re.match(rf"{name}($|[_.-])", stem):
            return index
    return None


def _missing_pair_error(
    folder: Path, name: str, source: str, target: str, files: Iterable[Path]
) -> DataError:
    listed = list_some(sorted(path.name for path in files))
    return DataError(
        f"{folder} has no pair {name}.{source} and {name}.{target}, of the same name but for the "
        f"language: it has {listed or 'nothing'}"
    )
