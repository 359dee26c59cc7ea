"""Tables of texts and their classes, and which of their columns hold them."""

import array
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxkd._messages import list_some, shorten
from jaxkd.data import parquet
from jaxkd.data.errors import DataError, warn
from jaxkd.data.json_lines import Value
from jaxkd.data.table_form import DELIMITERS, Form, find_form, iterate_rows
from jaxkd.data.text_files import LineOrigins, line_origin, read_text

SUFFIXES = (".tsv", ".tsv.gz", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", *parquet.SUFFIXES)
"""Suffixes that a table may have."""

TEXT_NAMES = (
    "text", "texts", "sentence", "sentences", "review", "reviews", "comment", "comments",
    "content", "document", "message", "tweet", "utterance", "phrase", "query", "body",
)  # fmt: skip
"""Names by which a header's column of texts is recognised, in any case."""

LABEL_NAMES = (
    "label", "labels", "class", "classes", "category", "sentiment", "target", "polarity", "rating",
    "stars", "score", "intent", "topic", "emotion", "gold_label",
)  # fmt: skip
"""Names by which a header's column of classes is recognised, in any case."""

PAIR_NAMES = ("question", "premise", "hypothesis", "context", "answer", "passage")
"""Names by which the other text of a pair is recognised, beside a column of `TEXT_NAMES`."""

SPLIT_NAMES = ("split", "subset", "partition", "set")
"""Names of a column that may say in which set a line belongs."""

MAX_SETS = 5
"""Largest number of sets by which such a column divides a table."""

MAX_CLASS_SHARE = 0.5
"""More classes than this share of the texts, and than two, are refused, unless both columns are
named."""

_OPTIONS = "text_column and label_column (--text-column, --label-column)"
_TEXT_OPTION = "column (--text-column)"


class Columns(NamedTuple):
    """Where a table holds its texts and classes.

    Attributes:
        text: Index of the column of the texts.
        label: Index of the column of the classes; `None` if the table has no classes.
        count: Number of columns.
        names: The names of the columns, by its first line; `None` if that is an example.
    """

    text: int
    label: int | None
    count: int
    names: tuple[str, ...] | None


class Table(NamedTuple):
    """The texts of a table.

    Attributes:
        columns: Its columns.
        texts: The texts.
        labels: The name of the class of each text, empty without classes.
        origins: File and line of each text.
    """

    columns: Columns
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    origins: Sequence[str]


class _Source(NamedTuple):
    """A table before its columns are known.

    It is read once to find them and once more for the texts, since the fields of all lines would
    take many times the memory of the file.

    Attributes:
        path: The file.
        text: Its content.
        form: How its lines are divided.
        first: The fields of its first line, without quotes and in lower case.
        counts: How many lines have each number of columns.
        recurring: Indices of the columns in which another line has what the first line has there.
        sets: Values of a column by which lines may be divided, "train" and "test" among them; empty
            without one.
    """

    path: Path
    text: str
    form: Form
    first: list[str]
    counts: Counter[int]
    recurring: set[int]
    sets: set[str]


def read_train_table(
    path: Path,
    *,
    text_column: str | int | None = None,
    label_column: str | int | None = None,
    max_unpacked: int | None = None,
) -> Table:
    """Reads the table of the training texts, and finds its columns.

    Without options, a first line with one of the usual names is a header. Without a header, a line
    is a text and a class.

    Args:
        path: A `.tsv`, `.csv` or `.jsonl` file, a `.gz` of one, or a `.parquet` or `.arrow` file.
        text_column: The column of the texts: its name in the header, or its number from 1.
        label_column: The column of the classes.
        max_unpacked: Number of bytes to which a `.gz` file may unpack.

    Returns:
        The table. A warning says which columns of a header were chosen.

    Raises:
        DataError: If the columns are not known, a line has another form, there is no text, or there
            are too many classes.
    """
    source = _open(path, max_unpacked)
    text, label = _read_option(text_column), _read_option(label_column)
    is_named = isinstance(text, str) or isinstance(label, str)
    if is_named or _is_header(source):
        columns = _choose_named(path, source.first, text, label)
    else:
        columns = _choose_unnamed(source, text, label)
    if columns.names and source.sets:
        raise DataError(
            f"{path} holds several sets, by a column with {list_some(sorted(source.sets))}: write "
            "each into a file of its own, such as train.csv and test.csv"
        )
    table = _make_table(source, columns)
    # Who names both columns may have a text for each class.
    if text is None or label is None:
        _check_share(path, table)
    if columns.names and (text is None or label is None or not is_named):
        _warn_of_header(source, columns)
    return table


def read_other_table(path: Path, train: Table, *, max_unpacked: int | None = None) -> Table:
    """Reads the table of another split, whose columns are those of the training texts.

    Args:
        path: The file.
        train: The table of the training texts.
        max_unpacked: As for `read_train_table`.

    Returns:
        The table, without labels if it has no column of classes or every class is -1, as in GLUE.

    Raises:
        DataError: If a line has another form, or there is no text.
    """
    source = _open(path, max_unpacked)
    columns = train.columns
    repeats_header = _repeats_header(source.first, columns)
    if repeats_header or _is_header(source, set(train.labels)):
        columns = _find_again(path, source.first, columns)
    else:
        columns = columns._replace(names=None)
    table = _make_table(source, columns)
    if columns.names and not repeats_header:
        _warn_of_header(source, columns)
    if set(table.labels) == {"-1"} and "-1" not in train.labels:
        return table._replace(labels=())
    return table


def read_text_table(
    path: Path, *, column: str | int | None = None, max_unpacked: int | None = None
) -> Table:
    """Reads the texts of a table, and no classes.

    Without an option, the column is the one that `read_train_table` would take, or the only one.

    Args:
        path: A `.csv` or `.jsonl` file, or one with tabs between the columns, or a `.gz` of one.
        column: The column of the texts: its name in the header, or its number from 1.
        max_unpacked: As for `read_train_table`.

    Returns:
        The table, without labels. A warning says which column of a header was chosen.

    Raises:
        DataError: If the column is not known, a line has another form, or there is no text.
    """
    source = _open(path, max_unpacked)
    option = _read_option(column)
    has_header = isinstance(option, str) or _is_header(source)
    columns = _choose_texts(source, option, has_header=has_header)
    table = _make_table(source, columns)
    if has_header and not isinstance(option, str):
        chosen = shorten(source.first[columns.text], 40)
        warn(
            f"{path}: {_describe_header(source)}; the text is column {chosen!r}; {_TEXT_OPTION} "
            "chooses another"
        )
    return table


def without_shared_header(path: Path, split_tables: dict[str, Table]) -> dict[str, Table]:
    """Leaves out a first line of unusual names that is a header, since several tables share it.

    Its class is then that of no other line, unlike most classes. A warning says so.

    Args:
        path: The file of the training texts.
        split_tables: The tables by their splits, that of the training texts as `"train"`.

    Returns:
        The tables.
    """
    train = split_tables["train"]
    text, label = train.texts[0], train.labels[0]
    sharing = [
        split
        for split, table in split_tables.items()
        if not table.columns.names and (table.texts[0], table.labels[0]) == (text, label)
    ]
    counts = Counter(train.labels)
    num_lines = sum(table.labels.count(label) for table in split_tables.values())
    others = [count for name, count in counts.items() if name != label]
    is_usual = sum(count > 1 for count in others) > len(others) / 2
    if "train" not in sharing or len(sharing) < 2 or num_lines > len(sharing) or not is_usual:
        return split_tables
    warn(
        f"{path}: line 1, {shorten(text, 40)!r} and {shorten(label, 40)!r}, is read as a header: "
        f"{len(sharing)} files begin with it, and no other line has this class"
    )
    return split_tables | {
        split: split_tables[split]._replace(
            texts=split_tables[split].texts[1:],
            labels=split_tables[split].labels[1:],
            origins=split_tables[split].origins[1:],
        )
        for split in sharing
    }


def check_first_line(path: Path, train: Table, others: Collection[Table]) -> None:
    """Raises if the first line of a table without a header looks like one.

    Its class is then that of no other line, while each other class has several. If only most of
    them have several, a warning says that the line is read as an example.

    Args:
        path: The file of the training texts.
        train: Its table.
        others: The tables of the other splits.

    Raises:
        DataError: If the first line may be a header.
    """
    if train.columns.names:
        return
    text, label = train.texts[0], train.labels[0]
    counts = Counter(train.labels)
    for table in others:
        # The same header may be in each file.
        labels = table.labels[1:] if table.texts[0] == text else table.labels
        counts.update(labels)
    if counts.pop(label) > 1 or len(counts) < 2:
        return
    num_single = sum(count == 1 for count in counts.values())
    found = f"{path}: no other line has the class {shorten(label, 40)!r} of line 1"
    if not num_single:
        raise DataError(
            f"{found}: if it is a header, name its columns by {_OPTIONS}; if it is an example, "
            "move it down"
        )
    if num_single < len(counts) / 2:
        warn(f"{found}, which is read as an example; if it is a header, give {_OPTIONS}")


def is_text_header(field: str) -> bool:
    """Returns True if a field is one of the usual names of a column of texts."""
    return _clean(field) in TEXT_NAMES


def _warn_of_header(source: _Source, columns: Columns) -> None:
    names = columns.names or ()
    chosen = f"the text is column {shorten(names[columns.text], 40)!r}"
    if columns.label is not None:
        chosen += f", the class {shorten(names[columns.label], 40)!r}"
    warn(f"{source.path}: {_describe_header(source)}; {chosen}; {_OPTIONS} choose others")


def _describe_header(source: _Source) -> str:
    if parquet.is_parquet(source.path):
        return "its columns have names"
    return "the keys are the header" if source.form.has_keys else "line 1 is a header"


def _open(path: Path, max_unpacked: int | None) -> _Source:
    """Reads a file, and what must be known of all lines before columns are chosen.

    Raises:
        DataError: If the file cannot be read or a line is empty.
    """
    # A Parquet file is no text, and is read row by row.
    text = "" if parquet.is_parquet(path) else read_text(path, max_unpacked=max_unpacked)
    if text[:100].lstrip().casefold().startswith(("<!doctype html", "<html")):
        raise DataError(f"{path} is a web page: download the file itself")
    form = find_form(path, text)
    counts: Counter[int] = Counter()
    first: list[str] = []
    recurring: set[int] = set()
    sets: set[str] = set()
    column_of_sets: int | None = None
    for index, fields in iterate_rows(path, text, form):
        if not any(fields):
            raise DataError(f"{line_origin(path, index)} is empty: remove it")
        if not counts:
            first = [_clean(field) for field in fields]
            column_of_sets = next((i for i, name in enumerate(first) if name in SPLIT_NAMES), None)
        elif len(recurring) < len(first):
            for column, (name, field) in enumerate(zip(first, fields, strict=False)):
                if name and _clean(field) == name:
                    recurring.add(column)
        if counts and column_of_sets is not None and len(sets) <= MAX_SETS:
            sets.update(_clean(field) for field in fields[column_of_sets:][:1])
        counts[len(fields)] += 1
    has_sets = len(sets) <= MAX_SETS and {"train", "training"} & sets and "test" in sets
    return _Source(path, text, form, first, counts, recurring, sets if has_sets else set())


def _read_option(option: str | int | None) -> str | int | None:
    """Returns a number from 1 as an integer, and a name as it is compared."""
    if not isinstance(option, str):
        return option
    return int(option) if option.isascii() and option.isdecimal() else _clean(option)


def _clean(field: str) -> str:
    return field.strip().strip('"').strip().casefold()


def _is_header(source: _Source, classes: Collection[str] = ()) -> bool:
    """True if the first line has both of the usual names, or one and nothing that recurs."""
    if source.form.has_keys:
        return True
    if not {*TEXT_NAMES}.isdisjoint(source.first) and not {*LABEL_NAMES}.isdisjoint(source.first):
        return True
    # A class may be called "review".
    known_classes = {_clean(label) for label in classes}
    for name in source.first:
        is_usual = name in TEXT_NAMES or name in LABEL_NAMES
        # What recurs in another column is the class of an example.
        if is_usual and not source.recurring and name not in known_classes:
            return True
    # pandas numbers columns without a name.
    return len(source.first) > 1 and source.first == [str(i) for i in range(len(source.first))]


def _repeats_header(header: Sequence[str], columns: Columns) -> bool:
    return columns.names is not None and columns.names[columns.text] in header


def _choose_named(
    path: Path, header: Sequence[str], text: str | int | None, label: str | int | None
) -> Columns:
    text_index = _find_column(path, header, text, TEXT_NAMES)
    label_index = _find_column(path, header, label, LABEL_NAMES)
    if len(header) == 2:
        # Each of two columns is known by the other one.
        if text_index is None and label_index is not None:
            text_index = _other_column(header, label_index, LABEL_NAMES)
        elif label_index is None and text_index is not None:
            label_index = _other_column(header, text_index, TEXT_NAMES)
        elif text_index is None and header == ["0", "1"]:
            text_index, label_index = 0, 1
    _check_two_columns(path, text_index, label_index)
    if text_index is None or label_index is None:
        raise DataError(
            f"{path} has the columns {list_some(header)}: choose those of text and class by "
            f"{_OPTIONS}"
        )
    if text is None:
        _check_pair(path, header, text_index)
    return Columns(text_index, label_index, len(header), tuple(header))


def _check_pair(path: Path, header: Sequence[str], text_index: int) -> None:
    """Raises if a class seems to be that of two texts, of which one would be passed over."""
    others = [name for name in header if name in PAIR_NAMES and name != header[text_index]]
    if others:
        raise DataError(
            f"{path} has the texts {header[text_index]!r} and {others[0]!r}: if its classes are "
            "those of pairs, join the two in one column; else choose one by --text-column"
        )


def _other_column(header: Sequence[str], index: int, usual: Sequence[str]) -> int | None:
    """Returns the other one of two columns, unless both have names of the same kind."""
    return None if header[index] in usual and header[1 - index] in usual else 1 - index


def _find_column(
    path: Path, header: Sequence[str], option: str | int | None, usual: Sequence[str]
) -> int | None:
    """Returns the index of a column, `None` if several or none have one of the usual names."""
    if isinstance(option, int):
        return _check_number(path, option, len(header))
    if option is not None:
        if header.count(option) != 1:
            fault = "several columns" if option in header else "no column"
            place = "" if parquet.is_parquet(path) else " in line 1"
            raise DataError(
                f"{path} has {fault} {shorten(option, 40)!r}{place}, only {list_some(header)}: "
                "give a name that occurs once, or a number from 1"
            )
        return header.index(option)
    found = [index for index, name in enumerate(header) if name in usual]
    # The first of the usual names wins: a table may have a topic and a score beside its label.
    best = [index for index in found if header[index] == usual[0]]
    found = best or found
    return found[0] if len(found) == 1 else None


def _choose_unnamed(source: _Source, text: int | None, label: int | None) -> Columns:
    path = source.path
    # A line without a tab is not a table.
    count = max(2, _count_columns(source.counts))
    text_index = None if text is None else _check_number(path, text, count)
    label_index = None if label is None else _check_number(path, label, count)
    if count == 2:
        if text_index is None:
            text_index = 0 if label_index is None else 1 - label_index
        if label_index is None:
            label_index = 1 - text_index
    _check_two_columns(path, text_index, label_index)
    if text_index is None or label_index is None:
        raise DataError(
            f"{path} has {count} columns and no header: choose those of text and class by their "
            f"numbers from 1, {_OPTIONS}"
        )
    return Columns(text_index, label_index, count, None)


def _check_two_columns(path: Path, text_index: int | None, label_index: int | None) -> None:
    if text_index is not None and text_index == label_index:
        raise DataError(
            f"{path}: text and class would both be column {text_index + 1}: choose two columns by "
            f"{_OPTIONS}"
        )


def _check_number(path: Path, number: int, count: int) -> int:
    if not 1 <= number <= count:
        raise DataError(f"{path} has no column {number}: it has {count}, counted from 1")
    return number - 1


def _count_columns(counts: Counter[int]) -> int:
    """Returns the most frequent number of columns; the smallest, if several are as frequent."""
    return max(counts, key=lambda count: (counts[count], -count))


def _choose_texts(source: _Source, option: str | int | None, *, has_header: bool) -> Columns:
    """Chooses the column of the texts of a table whose classes are not read."""
    path, first = source.path, source.first
    count = len(first) if has_header else _count_columns(source.counts)
    if option is None and count == 1:
        index = 0
    elif has_header:
        index = _find_column(path, first, option, TEXT_NAMES)
    else:
        # Without a header, the option is no name.
        index = _check_number(path, option, count) if isinstance(option, int) else None
    if index is None:
        fault = f"the columns {list_some(first)}" if has_header else f"{count} columns, no header"
        raise DataError(
            f"{path} has {fault}: choose that of the texts by {_TEXT_OPTION}, or call it 'text' in "
            "the header"
        )
    return Columns(index, None, count, tuple(first) if has_header else None)


def _find_again(path: Path, header: Sequence[str], train: Columns) -> Columns:
    """Finds the columns of the training texts by the header of another table."""

    def find(index: int | None, usual: Sequence[str]) -> int | None:
        name = train.names[index] if train.names and index is not None else None
        return _find_column(path, header, name if name in header else None, usual)

    text = find(train.text, TEXT_NAMES)
    label = find(train.label, LABEL_NAMES)
    if len(header) == train.count:
        # The same form under other names.
        text = train.text if text is None and label == train.label else text
        label = train.label if label is None and text == train.text else label
    if text is None:
        raise DataError(
            f"{path} has the columns {list_some(header)}, but not that of the texts of the "
            "training set: give both the same header"
        )
    return Columns(text, label, len(header), tuple(header))


def _make_table(source: _Source, columns: Columns) -> Table:
    path = source.path
    texts, labels, indices = [], [], array.array("q")
    classes: dict[str, str] = {}
    num_joined = 0
    # A text may contain tabs and a class may not.
    may_join = columns[:3] == (0, 1, 2) and not source.form.is_quoted
    rows = iterate_rows(path, source.text, source.form)
    if columns.names:
        next(rows)
    for index, fields in rows:
        if may_join and len(fields) > 2:
            fields = ["\t".join(fields[:-1]), fields[-1]]
            num_joined += 1
        _check_row(source, index, fields, columns)
        if source.form.has_keys:
            _check_values(line_origin(path, index), fields, columns)
        text = fields[columns.text].strip()
        if not text:
            raise DataError(f"{line_origin(path, index)} is empty: remove it")
        if columns.names and not source.form.has_keys and _repeats(fields, columns):
            raise DataError(f"{line_origin(path, index)} repeats the header: remove it")
        texts.append(text)
        if columns.label is not None:
            label = fields[columns.label].strip()
            # One string for each class, not one for each line.
            labels.append(classes.setdefault(label, label))
        indices.append(index)
    if not texts:
        raise DataError(f"{path} has no text below its first line")
    _check_joined(path, num_joined, len(texts))
    _check_quotes(source, columns, texts, classes, indices)
    return Table(columns, tuple(texts), tuple(labels), LineOrigins(path, indices))


def _repeats(fields: Sequence[str], columns: Columns) -> bool:
    """True if a line has the names of the columns, as in files that were joined."""
    names = columns.names or ()
    # The text first, because it differs from its name in almost every line.
    indices = (columns.text,) if columns.label is None else (columns.text, columns.label)
    return all(_clean(fields[index]) == names[index] for index in indices)


def _check_quotes(
    source: _Source,
    columns: Columns,
    texts: Sequence[str],
    classes: Collection[str],
    indices: Sequence[int],
) -> None:
    """Raises if quotes are a part of all classes, or join lines that are rows of their own."""
    if classes and all(len(name) > 1 and name[0] == name[-1] == '"' for name in classes):
        raise DataError(
            f"{source.path}: the classes are in quotes, such as {shorten(min(classes), 40)}, but "
            "other quotes are not doubled: write the table without quotes"
        )
    if not source.form.is_quoted or source.form.has_keys or columns.label is None:
        return
    for text, index in zip(texts, indices, strict=True):
        lines = text.split("\n")
        for number, line in enumerate(lines if len(lines) > 1 else ()):
            fields = line.removesuffix("\r").split(source.form.delimiter)
            # The text begins behind the columns in front of it.
            fields = fields if number else [""] * columns.text + fields
            if len(fields) == columns.count and fields[columns.label] in classes:
                raise DataError(
                    f"{line_origin(source.path, index)}: the text in quotes has several lines; "
                    f"{shorten(line, 40)!r} looks like a row: correct the quotes"
                )


def _check_row(source: _Source, index: int, fields: Sequence[str], columns: Columns) -> None:
    has_label = columns.label is None or (
        len(fields) > columns.label and fields[columns.label].strip()
    )
    if len(fields) == columns.count and has_label:
        return
    origin = line_origin(source.path, index)
    shown = shorten("\t".join(fields), 40)
    if columns[:3] == (0, 1, 2) and not source.form.has_keys:
        separator = DELIMITERS[source.form.delimiter]
        if len(fields) > 2 and source.form.is_quoted:
            raise DataError(
                f"{origin} has {len(fields)} fields instead of two, a text and a class: put a text "
                f"with a {separator} in quotes, or name the columns in line 1"
            )
        remedy = "" if index else "; if it is no example, remove it"
        raise DataError(
            f"{origin} must be a text, a {separator} and a class, got {shown!r}{remedy}"
        )
    fault = "has no class" if len(fields) == columns.count else f"has {len(fields)} columns"
    raise DataError(
        f"{origin} {fault}, but each line must have {columns.count} columns: correct {shown!r}"
    )


def _check_values(origin: str, fields: Sequence[str], columns: Columns) -> None:
    """Raises if a JSON value of the chosen columns is no string, or no integer as a class."""
    names = columns.names or ()
    text = fields[columns.text]
    if isinstance(text, Value):
        raise DataError(
            f"{origin}: {shorten(names[columns.text], 40)!r} is {text.kind}: the text must be a "
            f"string; choose the column by {_TEXT_OPTION if columns.label is None else _OPTIONS}"
        )
    if columns.label is None:
        return
    label = fields[columns.label]
    if isinstance(label, Value) and label.kind != "an integer":
        raise DataError(
            f"{origin}: {shorten(names[columns.label], 40)!r} is {label.kind}: a class must be a "
            "string or an integer; remove the line or correct it"
        )


def _check_joined(path: Path, num_joined: int, num_texts: int) -> None:
    if num_joined > num_texts / 2:
        raise DataError(
            f"{path}: most lines have more than two columns: give each a name in line 1, and "
            f"choose those of text and class by {_OPTIONS}"
        )
    if num_joined:
        warn(f"{path}: {num_joined:,} texts contain tabs; the class is what follows the last tab")


def _check_share(path: Path, table: Table) -> None:
    classes = set(table.labels)
    if len(classes) <= max(2, MAX_CLASS_SHARE * len(table.texts)):
        return
    raise DataError(
        f"{path} has {len(classes):,} classes in {len(table.texts):,} texts, more than "
        f"{MAX_CLASS_SHARE:.0%}, such as {shorten(min(classes), 40)!r}: they are probably in "
        f"another column; choose it by {_OPTIONS}"
    )
