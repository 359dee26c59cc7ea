"""Sentences with labels, sentences without, and sentences with their translations."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkd.data import tfds_text
from jaxkd.data.dataset import cut_rows, fixed_key
from jaxkd.data.errors import DataError, expand, read_utf8
from jaxkd.data.tfds_folder import resolve

TRAIN, VALIDATION, TEST = ("train",), ("validation", "valid", "val", "dev"), ("test",)
"""What the files of a split may be called."""


class Texts(NamedTuple):
    """Texts with a class each.

    Attributes:
        texts: The texts.
        labels: Their classes, int32 `[N]`.
        places: Where each comes from, such as a file and its line; for errors.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    places: tuple[str, ...]


class TextDataset(NamedTuple):
    """Texts to classify.

    Attributes:
        train: To learn from.
        validation: To choose by.
        test: To report on.
        class_names: Name of each class, by label.
    """

    train: Texts
    validation: Texts
    test: Texts
    class_names: tuple[str, ...]


class Pairs(NamedTuple):
    """Texts with their translations.

    Attributes:
        sources: The texts.
        targets: What each means in the other language.
        places: Where each comes from, such as its line; for errors.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    places: tuple[str, ...]


class PairDataset(NamedTuple):
    """Texts to translate.

    Attributes:
        train: To learn from.
        validation: To choose by.
        test: To report on.
    """

    train: Pairs
    validation: Pairs
    test: Pairs


def load_texts(name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> TextDataset:
    """Loads a text classification set; what a name means is decided in this order.

    1. A folder with `train.tsv`, `test.tsv` and, if there is one, `dev.tsv` (or `validation`, `valid`, `val`): a line
       is a text, a tab and its class, a number or a name; a first line that says `label` is passed over. `.tsv.gz` too.
    2. A TensorFlow dataset with one text and one class an example, such as `"imdb_reviews"` or `"glue/sst2"`, prepared
       or, where TensorFlow and a network are at hand, prepared now.

    Without a validation set a tenth of the training texts is cut off, drawn by a fixed key; a test set without classes,
    as GLUE has them, gives way to the validation set.

    Args:
        name: Name or path, as above.
        data_dir: Where TensorFlow datasets are; `None` means `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Returns:
        The texts; equal calls give equal ones.

    Raises:
        DataError: If there is no such dataset, or it is damaged, or something that reading it needs is missing.
    """
    if not os.fspath(name):
        raise DataError("no dataset is named: give a folder with train.tsv and test.tsv, or the name of a dataset")
    folder = expand(name)
    if folder.is_dir():
        return _from_folder(folder)
    if os.sep in os.fspath(name) and not tfds_text.is_known(os.fspath(name), resolve(data_dir)):
        raise DataError(f"there is no folder {folder}: give one with train.tsv and test.tsv, or the name of a dataset")
    splits, class_names = tfds_text.read(os.fspath(name), resolve(data_dir))
    return _complete({split: Texts(*each) for split, each in splits.items()}, class_names)


def read_texts(path: str | os.PathLike[str], *, field: int = 1) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads texts without labels, one a line.

    Args:
        path: The file, `.gz` or not, in UTF-8.
        field: Which of the fields between tabs holds the text, counted from 1.

    Returns:
        The texts, and where each comes from.

    Raises:
        DataError: If a line is empty, has no such field or is not UTF-8; it names the line.
    """
    path, texts = expand(path), []
    if field < 1:
        raise DataError(f"fields are counted from 1, got {field}")
    lines = read_lines(path)
    for i, line in enumerate(lines):
        parts = line.split("\t")
        if len(parts) < field:
            raise DataError(f"{_place(path, i)} has {len(parts)} fields, not {field}: check which holds the text")
        texts.append(_filled(parts[field - 1], _place(path, i)))
    return tuple(texts), tuple(_place(path, i) for i in range(len(lines)))


def apart_from(texts: Sequence[str], others: Iterable[str]) -> np.ndarray:
    """Which texts hold none of the others, whose letters alone are compared, in lower case.

    Public sets of short texts are often cut from one source: what is learnt from without labels must not hold what is
    tested on.

    Args:
        texts: The texts.
        others: What they must not hold; of these, one of fewer than 20 letters counts only as a whole.

    Returns:
        Booleans `[N]`.

    Example:
        >>> from jaxkd.data.text import apart_from
        >>> tested = ["an utter bore", "a most utterly boring film ."]
        >>> apart_from(["An utter bore!", "Fun!", "A most utterly boring film, alas"], tested)
        array([False,  True, False])
    """
    letters = [_letters(text) for text in texts]
    held = {_letters(text) for text in others}
    long = [one for one in held if len(one) >= 20]
    return np.array([one not in held and not any(other in one for other in long) for one in letters], bool)


def load_pairs(folder: str | os.PathLike[str], *, source: str, target: str) -> PairDataset:
    """Loads texts and their translations from a folder of files with one text a line.

    Of each split there is a file a language, `train.en` and `train.de`, `val.en` and so on (or `validation`, `valid`,
    `dev`), and `test.en`, or one that begins so, such as `test_2016_flickr.en`; also `.gz`. Without a validation or
    test set a tenth of the training texts is cut off for it, drawn by a fixed key.

    Args:
        folder: The folder.
        source: Ending of the files to translate from, such as `"en"`.
        target: Ending of the files to translate to.

    Returns:
        The pairs.

    Raises:
        DataError: If a file is missing, two of a split differ in length, or a line is empty or not UTF-8; it names file
            and line.
    """
    root = expand(folder)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}: give one with train.{source} and train.{target}")
    found = {}
    for split, names in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        files = [_of_language(root, names, language) for language in (source, target)]
        there = [path for path in files if path]
        if len(there) == 2:
            found[split] = pair_files(*there)
        elif there or split == "train":
            holds = ", ".join(sorted(path.name for path in root.iterdir())[:8])
            raise DataError(
                f"{root} has no pair {names[0]}.{source} and {names[0]}.{target}: it has {holds or 'nothing'}"
            )
    return cut_pairs(found["train"], found.get("validation"), found.get("test"))


def pair_files(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Pairs:
    """Reads two files of which each line of one is the translation of the same line of the other.

    Raises:
        DataError: If their lengths differ, or a line is empty or not UTF-8; it names file and line.
    """
    paths = [expand(path) for path in (source, target)]
    both = [read_lines(path) for path in paths]
    if len(both[0]) != len(both[1]):
        shorter = int(len(both[1]) < len(both[0]))
        raise DataError(
            f"{paths[0]} has {len(both[0])} lines and {paths[1]} {len(both[1])}, but each line must have its "
            f"translation: {_place(paths[1 - shorter], len(both[shorter]))} has none"
        )
    sources, targets = (
        tuple(_filled(line, _place(path, i)) for i, line in enumerate(lines))
        for path, lines in zip(paths, both, strict=True)
    )
    return Pairs(sources, targets, tuple(_place(paths[0], i) for i in range(len(sources))))


def cut_pairs(train: Pairs, validation: Pairs | None = None, test: Pairs | None = None) -> PairDataset:
    """Cuts a tenth of the training pairs off for each set that is missing, drawn by a fixed key.

    Raises:
        DataError: If there are too few pairs.
    """
    if test is None:
        train, test = (_chosen(train, rows) for rows in _tenth(len(train.sources), _TEST_SEED))
    if validation is None:
        train, validation = (_chosen(train, rows) for rows in _tenth(len(train.sources), _VALIDATION_SEED))
    return PairDataset(train, validation, test)


def read_lines(path: Path) -> list[str]:
    """The lines of a file in UTF-8, of a `.gz` unpacked, without their ends.

    Raises:
        DataError: If it cannot be read, holds nothing, or a line is not UTF-8; it names the line.
    """
    lines = read_utf8(path).removeprefix("\ufeff").removesuffix("\n").split("\n")
    if lines == [""]:
        raise DataError(f"{path} is empty: it must hold one text a line")
    return [line.removesuffix("\r") for line in lines]


_TEST_SEED, _VALIDATION_SEED = 0x7E57, 0xDA7A


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def _place(path: Path, number: int) -> str:
    return f"{path}, line {number + 1}"


def _filled(text: str, place: str) -> str:
    if not text.strip():
        raise DataError(f"{place} is empty: take it out")
    return text.strip()


def _from_folder(folder: Path) -> TextDataset:
    labelled = {}
    for split, names in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        paths = [folder / f"{name}{ending}" for name in names for ending in (".tsv", ".tsv.gz")]
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:
            labelled[split] = _labelled(path)
        elif split != "validation":
            raise DataError(f"{folder} has no {split}.tsv: each line of it is a text, a tab and a class")
    names = sorted({label for _, labels, _ in labelled.values() for label in labels}, key=_by_number)
    numbers = {name: i for i, name in enumerate(names)}
    unseen = sorted({*names} - {*labelled["train"][1]})
    if unseen or len(names) < 2:
        raise DataError(f"{folder}: train.tsv must have all classes, at least two; it lacks {unseen or 'a second one'}")
    splits = {
        split: Texts(texts, np.array([numbers[label] for label in labels], np.int32), places)
        for split, (texts, labels, places) in labelled.items()
    }
    return _complete(splits, tuple(names))


def _by_number(name: str) -> tuple[float, str]:
    return (float(name), "") if name.lstrip("-").isdigit() else (float("inf"), name)


def _labelled(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Texts, names of their classes and places."""
    rows = []
    for i, line in enumerate(read_lines(path)):
        text, tab, label = line.rpartition("\t")
        if i == 0 and label.strip().lower() == "label":
            continue
        if not tab or not label.strip():
            raise DataError(f"{_place(path, i)} must be a text, a tab and a class, got {line[:40]!r}")
        rows.append((_filled(text, _place(path, i)), label.strip(), _place(path, i)))
    if not rows:
        raise DataError(f"{path} has no text below its first line")
    texts, labels, places = zip(*rows, strict=True)
    return texts, labels, places


def _complete(splits: dict[str, Texts], class_names: Sequence[str]) -> TextDataset:
    """Cuts off what is missing."""
    train, validation, test = (splits.get(name) for name in ("train", "validation", "test"))
    if train is None:
        raise DataError(f"there is nothing to train on, only {sorted(splits)}: choose another dataset")
    if test is None:
        validation, test = None, validation
    if test is None:
        train, test = (_picked(train, rows) for rows in _tenth(len(train.texts), _TEST_SEED))
    if validation is None:
        train, validation = (_picked(train, rows) for rows in _tenth(len(train.texts), _VALIDATION_SEED))
    return TextDataset(train, validation, test, tuple(class_names))


def _tenth(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that stay and those that are cut off, each in their order."""
    if count < 2:
        raise DataError(f"{count} texts cannot be divided: more are needed")
    return cut_rows(count, max(1, count // 10), key=fixed_key(seed))


def _picked(split: Texts, rows: np.ndarray) -> Texts:
    return Texts(tuple(split.texts[i] for i in rows), split.labels[rows], tuple(split.places[i] for i in rows))


def _chosen(pairs: Pairs, rows: np.ndarray) -> Pairs:
    return Pairs(*(tuple(column[i] for i in rows) for column in pairs))


def _of_language(folder: Path, names: Sequence[str], language: str) -> Path | None:
    """The file of a split in a language: of its name, or the first that begins with it."""
    for pattern in (f"{name}{rest}.{language}" for rest in ("", "[_.-]*") for name in names):
        for ending in ("", ".gz"):
            if found := sorted(folder.glob(pattern + ending)):
                return found[0]
    return None
