"""Texts with classes, and texts without."""

import array
import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkd._messages import list_some, shorten
from jaxkd.data import parquet, tables, tfds_prepare, tfds_texts
from jaxkd.data.class_names import (
    describe_minus_one,
    describe_respelling,
    find_missing_label,
    sort_classes,
)
from jaxkd.data.dataset import (
    warn_of_equal_examples,
    warn_of_lacking_classes,
    warn_of_missing_classes,
    warn_of_shared_validation,
)
from jaxkd.data.errors import DataError, expand_user_path, warn
from jaxkd.data.text_files import (
    FILE_NAMES,
    TEST_SEED,
    VALIDATION_SEED,
    LineOrigins,
    check_different,
    check_texts,
    hold_out_tenth,
    iterate_lines,
    line_origin,
    strip_text,
    take,
    warn_of_columns,
)

# Shorter texts, such as "a good film", occur within others by chance.
_MIN_CONTAINED_LETTERS = 20
# Files whose lines cannot be divided at tabs.
_TABLES = (".csv", ".jsonl", *parquet.SUFFIXES)
# One for each of the three sets that one table is divided into.
_MIN_CLASS_TEXTS = 3
_NUMBER = re.compile(r"[+-]?[0-9]*[.,]?[0-9]+(e[+-]?[0-9]+)?", re.I)
_CLASS_SEPARATORS = re.compile(r"\s*[,;|]\s*")


class Texts(NamedTuple):
    """Texts and their classes.

    Attributes:
        texts: The texts.
        labels: Their classes, int32 `[N]`.
        origins: Where each text comes from, such as a file and a line; for error messages.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    origins: Sequence[str]


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


def is_text_source(
    name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None
) -> bool:
    """Returns whether a name or path stands for texts rather than images.

    Args:
        name: A table, a folder with tables, or a TensorFlow dataset. One that is not prepared yet
            is taken for images.
        data_dir: The folder of TensorFlow datasets, as for `load_texts`.
    """
    path = expand_user_path(os.fspath(name))
    if os.path.isdir(path):
        found = [table for names in FILE_NAMES.values() for table in _list_tables(path, names)]
        return bool(found) and not (parquet.is_parquet(found[0]) and parquet.find_images(found[0]))
    if _is_table(path):
        return True
    return tfds_texts.is_prepared_text(os.fspath(name), tfds_prepare.resolve_data_dir(data_dir))


def load_texts(
    name: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    text_column: str | int | None = None,
    label_column: str | int | None = None,
    max_unpacked: int | None = None,
) -> TextDataset:
    """Loads a text classification dataset by name or path.

    The first of these that fits is loaded:

    1. A folder with `train.tsv`, `test.tsv` and optionally `dev.tsv` (or `validation`, `valid`,
       `val`). A line is a text, a tab and its class, which is a number or a name. A table of other
       columns needs a header, whose usual names, such as `text` and `label`, are recognised, or the
       options below. `.csv` and `.jsonl` files, and `.gz` files of each, are read too. A line of
       `.jsonl` is an object, whose keys are the header; a class is a string or an integer.
       `.parquet` files are read in the forms that the Hugging Face hub has them, such as
       `data/train-00000-of-00002.parquet`, and the folders of `DatasetDict.save_to_disk`. A class
       has its name in the `ClassLabel` of the file.
    2. One such table, `reviews.csv`. A text that occurs again is left out. A tenth of the texts,
       drawn by a fixed key, is the test set. Each class needs three texts.
    3. A TensorFlow dataset with one text and one class per example, such as `"imdb_reviews"` or
       `"glue/sst2"`. If it is not prepared yet and TensorFlow is installed, it is downloaded and
       prepared first.

    If there is no validation set, a tenth of the training texts, drawn by a fixed key, is held out.
    If the test set of a TensorFlow dataset is missing, or that of any dataset is unlabelled, as in
    GLUE, the validation set becomes the test set. Classes are sorted, integers in numeric order
    before other names. A warning says what was chosen without being asked for.

    Args:
        name: Name or path, as above.
        data_dir: The folder of TensorFlow datasets; `None` means `$TFDS_DATA_DIR` or
            `~/tensorflow_datasets`.
        text_column: For tables: the column of the texts, by its name in the header or by its
            number from 1.
        label_column: The column of the classes.
        max_unpacked: For tables: number of bytes to which a `.gz` file may unpack. By default 8
            MiB or 16 times its size, whichever is more.

    Returns:
        The texts; equal calls give equal texts.

    Raises:
        DataError: If there is no such dataset, or it is damaged, or something that reading it needs
            is missing; if the columns are not known, or half as many classes as texts make it
            likely that they are the wrong ones.
    """
    name = os.fspath(name)
    if not name:
        raise DataError(
            "the name of the dataset is empty: give a folder with train.tsv and test.tsv, or the "
            "name of a dataset"
        )
    folder = expand_user_path(name)
    if os.path.isdir(folder):
        return _read_folder(folder, text_column, label_column, max_unpacked)
    if _is_table(folder):
        return _read_file(folder, text_column, label_column, max_unpacked)
    if name.lower().endswith(tables.SUFFIXES):
        raise DataError(f"there is no file {folder}: check the path")
    # A file without a suffix may be beside a dataset of that name.
    if folder.suffix and os.path.isfile(folder):
        raise DataError(
            f"{folder} is not a table by its name: save it as .csv, .tsv or .jsonl (a JSON list by "
            "`jq -c '.[]'`)"
        )
    if text_column is not None or label_column is not None:
        raise DataError(f"there is no folder {folder}, and only its tables have columns to choose")
    data_dir = tfds_prepare.resolve_data_dir(data_dir)
    # `glue/sst2` looks like a path; only an unknown `glue` makes it one.
    if os.sep in name and not tfds_prepare.is_known(re.split("[/:]", name)[0], data_dir):
        raise DataError(
            f"there is no folder {folder}: give one with train.tsv and test.tsv, or the name of a "
            "dataset"
        )
    return _read_tfds(name, data_dir)


def read_texts(
    path: str | os.PathLike[str],
    *,
    field: int | None = 1,
    column: str | int | None = None,
    max_unpacked: int | None = None,
) -> tuple[tuple[str, ...], Sequence[str]]:
    """Reads texts without classes, one a line, or a column of a table.

    A `.csv` or `.jsonl` file is a table, and so is a file of which a `column` is chosen, with tabs
    between its columns. Without a choice, the column has one of the usual names in the header,
    such as `text`, or is the only one. A warning says which it is.

    In other files, a first line with one of the usual names is left out, and a warning says so.

    Args:
        path: A UTF-8 file, or a `.gz` of one.
        field: Number of the tab-separated field of a line that holds the text, counted from 1;
            `None` for the whole line, or for the column of the usual name if it is a `.tsv` file.
        column: The column of a table: its name in the header, or its number from 1. Unlike a
            field, a column may be in quotes, and all lines have the same number of columns.
        max_unpacked: Number of bytes to which a `.gz` file may unpack. By default 8 MiB or 16
            times its size, whichever is more.

    Returns:
        The texts, and where each comes from.

    Raises:
        DataError: If a line is empty, has no such field or is not UTF-8; the message names the
            line. If all texts are numbers or JSON objects, or the column is not known.
        ValueError: If both a field and a column are chosen.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd.data.text import read_texts
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "reviews.csv")
        ...     with path.open("w") as file:
        ...         print("stars,review", file=file)
        ...         print('4,"fine, so fine"', file=file)
        ...     texts, origins = read_texts(path, column="review")
        >>> texts
        ('fine, so fine',)
    """
    path = expand_user_path(path)
    if field is not None and field < 1:
        raise DataError(f"fields are counted from 1, got {field}")
    if column is not None and field not in (None, 1):
        raise ValueError(f"field={field} and column={column!r} both choose the texts: give one")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".json"):
        raise DataError(
            f"{path} is JSON by its name: write one object a line into a .jsonl file, as "
            "`jq -c '.[]'` does"
        )
    is_table = name.endswith(_TABLES) or (field is None and name.endswith(".tsv"))
    if column is not None or is_table:
        # The first field is the default, any other one was chosen.
        column = field if column is None and field != 1 else column
        table = tables.read_text_table(path, column=column, max_unpacked=max_unpacked)
        _check_are_texts(path, table.texts, "the column of the texts", "column (--text-column)")
        return table.texts, table.origins
    return _read_lines(path, field, max_unpacked)


def _read_lines(
    path: Path, field: int | None, max_unpacked: int | None
) -> tuple[tuple[str, ...], Sequence[str]]:
    texts = []
    indices = array.array("q")
    for index, line in enumerate(iterate_lines(path, max_unpacked=max_unpacked)):
        origin = line_origin(path, index)
        fields = [line] if field is None else line.split("\t")
        number = field or 1
        if len(fields) < number:
            raise DataError(
                f"{origin} has {len(fields)} fields, not {number}: check which holds the text"
            )
        if index == 0 and tables.is_text_header(fields[number - 1]):
            warn(f"{origin} is a header and is left out")
            continue
        texts.append(strip_text(fields[number - 1], origin))
        indices.append(index)
    if not texts:
        raise DataError(f"{path} has no text below its first line")
    if field is None:
        _check_are_texts(path, texts, "each line", "column (--text-column)")
        warn_of_columns(path, texts, "choose a column of a table by --text-column")
    else:
        _check_are_texts(path, texts, f"field {field}", "field (--unlabelled-field)")
    return tuple(texts), LineOrigins(path, indices)


def _check_are_texts(path: Path, texts: Sequence[str], part: str, option: str) -> None:
    """Raises `DataError` if texts are numbers or JSON objects, as of another part or format."""
    # A text alone may be a number.
    if len(texts) > 1 and all(map(_NUMBER.fullmatch, texts)):
        raise DataError(
            f"{part} of {path} holds numbers alone, such as {shorten(texts[0], 20)}: choose "
            f"that of the texts by {option}"
        )
    if all(text.startswith("{") and text.endswith("}") for text in texts):
        raise DataError(f"the lines of {path} are JSON objects: give the file the suffix .jsonl")


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

    Raises:
        TypeError: If either is a single text, whose letters would be compared.

    Example:
        >>> from jaxkd.data.text import without_overlap
        >>> tested = ["an utter bore", "a most utterly boring film ."]
        >>> without_overlap(["An utter bore!", "Fun!", "A most utterly boring film, alas"], tested)
        array([False,  True, False])
    """
    check_texts(texts)
    if isinstance(excluded, str):
        check_texts(excluded, "excluded")
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


def _read_folder(
    folder: Path,
    text_column: str | int | None,
    label_column: str | int | None,
    max_unpacked: int | None,
) -> TextDataset:
    paths = {split: _find_table(folder, names) for split, names in FILE_NAMES.items()}
    if paths["train"] is None or paths["test"] is None:
        missing = "test" if paths["train"] else "train"
        raise DataError(
            f"{folder} has no {missing}.tsv: each line of it is a text, a tab and a class"
        )
    check_different(filter(None, paths.values()))
    split_tables = _read_tables(paths, text_column, label_column, max_unpacked)
    split_tables = tables.without_shared_header(paths["train"], split_tables)
    train = split_tables["train"]
    others = [table for table in split_tables.values() if table is not train]
    tables.check_first_line(paths["train"], train, others)
    for split, table in split_tables.items():
        _check_missing_label(paths[split], table, {*train.labels, *table.labels})
    class_names = _sort_known_classes(paths["train"], train, others)
    if doubt := describe_minus_one(class_names):
        warn(f"{paths['train']}: {doubt}")
    if "test" not in split_tables:
        _warn_of_test_set(str(folder), has_validation="validation" in split_tables)
    indices = {name: index for index, name in enumerate(class_names)}
    splits = {}
    for split, table in split_tables.items():
        labels = np.array([indices[label] for label in table.labels], np.int32)
        splits[split] = Texts(table.texts, labels, table.origins)
    return _make_text_dataset(str(folder), splits, class_names)


def _is_table(path: Path) -> bool:
    return path.name.lower().endswith(tables.SUFFIXES) and os.path.isfile(path)


def _read_file(
    path: Path,
    text_column: str | int | None,
    label_column: str | int | None,
    max_unpacked: int | None,
) -> TextDataset:
    """Reads one table, from which validation and test set are held out."""
    table = tables.read_train_table(
        path, text_column=text_column, label_column=label_column, max_unpacked=max_unpacked
    )
    if not table.labels:
        raise DataError(f"{path} has no classes: name their column by label_column")
    tables.check_first_line(path, table, [])
    _check_missing_label(path, table, {*table.labels})
    class_names = _sort_known_classes(path, table, [])
    if doubt := describe_minus_one(class_names):
        warn(f"{path}: {doubt}")
    indices = {name: index for index, name in enumerate(class_names)}
    labels = np.array([indices[label] for label in table.labels], np.int32)
    texts = _without_repetitions(path, Texts(table.texts, labels, table.origins))
    _check_class_sizes(path, texts.labels, class_names)
    warn(f"{path}: a tenth of the texts is held out as the test set, and a tenth for validation")
    return _make_text_dataset(str(path), {"train": texts}, class_names)


def _without_repetitions(path: Path, texts: Texts) -> Texts:
    """Leaves out texts that occurred before, which could fall into two sets."""
    first: dict[str, int] = {}
    for index, text in enumerate(texts.texts):
        first.setdefault(text, index)
    if len(first) == len(texts.texts):
        return texts
    num_others = sum(
        texts.labels[index] != texts.labels[first[text]] for index, text in enumerate(texts.texts)
    )
    others = f", {num_others:,} of them with another class" if num_others else ""
    warn(
        f"{path}: {len(texts.texts) - len(first):,} texts occur again{others}: the first of each "
        "is used"
    )
    return _select_texts(texts, np.array([*first.values()]))


def _check_class_sizes(path: Path, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Raises `DataError` if a class has too few texts for three sets."""
    counts = np.bincount(labels, minlength=len(class_names))
    small = [class_names[label] for label in np.flatnonzero(counts < _MIN_CLASS_TEXTS).tolist()]
    if small:
        raise DataError(
            f"{path}: {len(small):,} of {len(class_names):,} classes have fewer than "
            f"{_MIN_CLASS_TEXTS} different texts, such as {shorten(small[0], 40)!r}: add texts, "
            "leave these classes out, or give a folder with train.tsv and test.tsv"
        )


def _check_missing_label(path: Path | None, table: tables.Table, labels: Collection[str]) -> None:
    """Raises `DataError` if a table has a class whose name usually means a missing label."""
    missing = find_missing_label({*labels})
    if missing in table.labels:
        raise DataError(
            f"{path}: {table.labels.count(missing):,} labels are {missing!r}, which usually means "
            "missing: remove these lines, or rename the class if it is one"
        )


def _read_tables(
    paths: dict[str, Path | None],
    text_column: str | int | None,
    label_column: str | int | None,
    max_unpacked: int | None,
) -> dict[str, tables.Table]:
    """Reads the tables of all splits, and leaves out those without classes."""
    split_tables: dict[str, tables.Table] = {}
    for split, path in paths.items():
        if path is None:
            continue
        # The training texts come first, and their columns are those of the others.
        if split == "train":
            table = tables.read_train_table(
                path,
                text_column=text_column,
                label_column=label_column,
                max_unpacked=max_unpacked,
            )
        else:
            table = tables.read_other_table(path, split_tables["train"], max_unpacked=max_unpacked)
        if table.labels:
            split_tables[split] = table
        else:
            warn(f"{path} has no classes and is left out")
    return split_tables


def _read_tfds(name: str, data_dir: Path) -> TextDataset:
    splits, class_names = tfds_texts.read_tfds_texts(name, data_dir)
    if "test" not in splits:
        _warn_of_test_set(name, has_validation="validation" in splits)
    return _make_text_dataset(
        name, {split: Texts(*columns) for split, columns in splits.items()}, class_names
    )


def _find_table(folder: Path, names: Sequence[str]) -> Path | None:
    """Finds the table of a split; a warning says which is read if there are several."""
    found = _list_tables(folder, names)
    if len(found) > 1:
        others = list_some(path.name for path in found[1:])
        warn(f"{found[0]} is read, {others} beside it not")
    return found[0] if found else None


def _list_tables(folder: Path, names: Sequence[str]) -> list[Path]:
    suffixes = [suffix for suffix in tables.SUFFIXES if suffix not in parquet.SUFFIXES]
    paths = [folder / f"{name}{suffix}" for name in names for suffix in suffixes]
    found = [path for path in paths if os.path.isfile(path)]
    return found + parquet.list_splits(folder, names)


def _sort_known_classes(
    path: Path, train: tables.Table, others: Sequence[tables.Table]
) -> tuple[str, ...]:
    """Returns the classes of the training texts, after a check that there are no others."""
    class_names = sort_classes(train.labels)
    # A class that only the other splits have could never be learnt.
    known = set(class_names)
    unseen = {}
    for table in others:
        for index, label in enumerate(table.labels):
            if label not in known and label not in unseen:
                unseen[label] = table.origins[index]
    if respelled := describe_respelling(class_names, {*class_names, *unseen}):
        raise DataError(f"{path}: the classes {respelled}: rename one in all files")
    for table in others:
        if table.labels and known.issuperset(table.texts):
            raise DataError(
                f"the texts of {table.origins[0]} and below are the classes of {path}: give both "
                "the same order of columns"
            )
    if unseen:
        raise DataError(
            f"{path} must have all classes: it lacks {list_some(map(repr, unseen))}, which "
            f"{shorten(next(iter(unseen.values())), 80)} has"
        )
    _warn_of_lists(path, class_names)
    if len(class_names) < 2:
        raise DataError(
            f"{path} must have all classes, at least two: it has {shorten(class_names[0], 40)!r} "
            "alone"
        )
    return class_names


def _warn_of_lists(path: Path, class_names: Sequence[str]) -> None:
    """Warns of classes such as `2,27` beside `2` and `27`, the labels of texts of several."""
    known = set(class_names)
    lists = [
        name
        for name in class_names
        if len(parts := _CLASS_SEPARATORS.split(name)) > 1 and known.issuperset(parts)
    ]
    if lists:
        warn(
            f"{path}: {len(lists):,} of {len(class_names):,} classes are lists of other classes, "
            f"such as {shorten(repr(lists[0]), 40)}, and are learnt as classes of their own: give "
            "each text one class"
        )


def _warn_of_test_set(name: str, *, has_validation: bool) -> None:
    substitute = "the validation set" if has_validation else "a tenth of the training texts"
    warn(f"{name}: there is no test set with classes; {substitute} is the test set")


def _make_text_dataset(
    name: str, splits: dict[str, Texts], class_names: Sequence[str]
) -> TextDataset:
    """Makes a dataset, and holds out a tenth of the training texts for each missing set."""
    train, validation, test = (splits.get(split) for split in ("train", "validation", "test"))
    if train is None:
        raise DataError(
            f"there is nothing to train on, only {list_some(sorted(splits)) or 'nothing'}: "
            "choose another dataset"
        )
    # As for GLUE, results are then compared on the published validation set.
    if test is None:
        validation, test = None, validation
    if test is None:
        train, test = _hold_out(name, "test", train, TEST_SEED, class_names)
    if validation is None:
        train, validation = _hold_out(name, "validation", train, VALIDATION_SEED, class_names)
    else:
        warn_of_shared_validation(name, "texts", train.texts, validation.texts, test.texts)
    given = [split for split in ("validation", "test") if split in splits]
    warn_of_missing_classes(
        name, {split: splits[split].labels for split in given}, train.labels, class_names
    )
    warn_of_equal_examples(name, "texts", train.texts, train.labels, test.texts)
    return TextDataset(train, validation, test, tuple(class_names))


def _hold_out(
    name: str, split: str, train: Texts, seed: int, class_names: Sequence[str]
) -> tuple[Texts, Texts]:
    """Returns the remaining texts and a tenth that is held out."""
    indices, held_out = hold_out_tenth(len(train.texts), seed, train.labels)
    labels = train.labels[held_out]
    warn_of_lacking_classes(name, split, labels, train.labels, class_names)
    return _select_texts(train, indices), _select_texts(train, held_out)


def _select_texts(split: Texts, indices: np.ndarray) -> Texts:
    texts = tuple(split.texts[i] for i in indices)
    return Texts(texts, split.labels[indices], take(split.origins, indices))
