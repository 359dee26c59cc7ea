"""Texts and images in Parquet or Arrow files, as Hugging Face `datasets` keeps them."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxkd._messages import list_some, shorten
from jaxkd.data.errors import DataError, import_or_raise, one_line
from jaxkd.data.json_lines import Value, make_field
from jaxkd.data.text_files import line_origin

SUFFIXES = (".parquet", ".arrow")
"""Suffixes of the files: `.parquet` of the hub, `.arrow` of `Dataset.save_to_disk`."""

# A shard of several, of old files with a hash: train-00000-of-00002-0123456789abcdef.parquet.
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{16})?")
# As the hub names the files that it converts.
_NUMBER = re.compile(r"\d{4}")
_FIRST_SHARD = "-00000-of-"
# Number of rows that are read at once, which may be images.
_BATCH = 1024
# Written by save_to_disk; others in its folder are results that datasets has cached.
_SAVED = "data-"


def is_parquet(path: Path) -> bool:
    """True if a file is a Parquet or Arrow table by its name."""
    return path.name.lower().endswith(SUFFIXES)


def list_splits(folder: Path, names: Sequence[str]) -> list[Path]:
    """Lists the files of a split in the forms in which Hugging Face's libraries write a dataset.

    Args:
        folder: Its folder.
        names: The names that the split may have, such as `("train",)`.

    Returns:
        `train.parquet`, `data/train-00000-of-00002.parquet`, `train/0000.parquet` or
        `train/data-00000-of-00001.arrow`: the first file of each.
    """
    paths = []
    for name in names:
        for parent in (folder, folder / "data"):
            paths += [parent / f"{name}{suffix}" for suffix in SUFFIXES]
            paths += sorted(parent.glob(f"{name}{_FIRST_SHARD}*.parquet"))
        paths += [folder / name / "0000.parquet"]
        paths += sorted((folder / name).glob(f"{_SAVED}00000-of-*.arrow"))
    return [path for path in paths if os.path.isfile(path)]


def find_images(path: Path) -> tuple[str, ...]:
    """Returns the names of the columns of images, as `datasets` writes them.

    Raises:
        DataError: If pyarrow is missing or the file is damaged.
    """
    types = import_or_raise("pyarrow").types
    with _describe_errors(path):
        schema, _ = next(_iterate_batches(path, lambda kind: False))
    return tuple(
        field.name
        for field in schema
        if types.is_struct(field.type) and {part.name for part in field.type} == {"bytes", "path"}
    )


def iterate_images(path: Path, image: str, label: str) -> Iterator[tuple[bytes | None, int, str]]:
    """Yields the content of the file of each image, its class and its origin.

    Args:
        path: The file, or the first of several shards, all of which are read.
        image: The column of the images.
        label: The column of the classes, integers.

    Raises:
        DataError: As `iterate_records`.
    """
    row = 0
    for file in list_shards(path):
        with _describe_errors(file):
            for schema, batch in _iterate_batches(file, lambda kind: True, [image, label]):
                if {image, label} - {*schema.names}:
                    raise DataError(f"{file} lacks {image} or {label}: give all shards the same")
                if not batch.num_rows:
                    continue
                images, labels = (
                    batch.column(batch.schema.get_field_index(name)) for name in (image, label)
                )
                for content, value in zip(images, labels.to_pylist(), strict=True):
                    origin = line_origin(file, row)
                    if type(value) is not int:
                        raise DataError(f"{origin} has no class: correct it")
                    yield (content.as_py() or {}).get("bytes"), value, origin
                    row += 1


def iterate_labels(path: Path, label: str) -> Iterator[int | None]:
    """Yields the classes of a column of integers, over all shards."""
    for file in list_shards(path):
        with _describe_errors(file):
            for _, batch in _iterate_batches(file, lambda kind: True, [label]):
                if batch.num_rows:
                    yield from batch.column(batch.schema.get_field_index(label)).to_pylist()


def read_class_columns(path: Path) -> dict[str, list[str]]:
    """Returns the names of the classes of each column that has a `ClassLabel`."""
    with _describe_errors(path):
        schema, _ = next(_iterate_batches(path, lambda kind: False))
    return _read_class_names(path, schema)


@contextlib.contextmanager
def _describe_errors(file: Path) -> Generator[None]:
    """Raises `DataError` for what pyarrow raises for a damaged file."""
    # Arrow's errors are ValueErrors, OSErrors and others of its own.
    errors = import_or_raise("pyarrow").lib.ArrowException, OSError, ValueError
    try:
        yield
    except errors as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {file} ({one_line(error)}): copy it again") from error


def iterate_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the names of the columns, and then the fields of each row.

    Args:
        path: The file, or the first of several shards, all of which are read.

    Yields:
        The index of the row over all shards, from 0, and its fields. Classes have their names, if
        the file has the features of `datasets`. A value that is no string is a
        `jaxkd.data.json_lines.Value`, and only its kind is known unless it is an integer.

    Raises:
        DataError: If pyarrow is missing, a shard is missing, the shards have different columns, or
            a file is damaged.
    """
    header: list[str] = []
    row = 0
    for file in list_shards(path):
        with _describe_errors(file):
            for schema, batch in _iterate_batches(file, _is_light):
                if not header:
                    header = _check_names(file, schema.names)
                    yield 0, header
                if schema.names != header:
                    raise DataError(
                        f"{file} has the columns {list_some(schema.names)}, {path.name} "
                        f"{list_some(header)}: give all shards the same"
                    )
                for fields in _read_rows(file, schema, batch, row):
                    yield row, fields
                    row += 1


def list_shards(path: Path) -> list[Path]:
    """Returns a file, or all shards if it is one of several.

    Raises:
        DataError: If a shard is missing.
    """
    shard = _SHARD.fullmatch(path.stem)
    if shard is None:
        # One of 0000.parquet, 0001.parquet, ...
        is_numbered = _NUMBER.fullmatch(path.stem) is not None
        siblings = path.parent.glob(f"[0-9][0-9][0-9][0-9]{path.suffix}")
        return sorted(siblings) if is_numbered else [path]
    count = int(shard["count"])
    files = sorted(
        file
        for file in path.parent.glob(f"{shard['stem']}-*-of-{shard['count']}*{path.suffix}")
        if _SHARD.fullmatch(file.stem)
    )
    numbers = [_SHARD.fullmatch(file.stem)["number"] for file in files]  # type: ignore
    missing = sorted({f"{number:05d}" for number in range(count)} - {*numbers})
    if missing:
        raise DataError(
            f"{path}: of {count} shards, {list_some(missing)} are missing: copy them too"
        )
    if len(numbers) > count:
        raise DataError(f"{path.parent} has a shard twice: {list_some(f.name for f in files)}")
    return files


def _iterate_batches(
    file: Path, is_read: Callable[[Any], bool], names: Sequence[str] = ()
) -> Iterator[tuple[Any, Any]]:
    """Yields the schema of a file and batches of its rows, of which the first has no row.

    Args:
        file: A file.
        is_read: Whether a column of a type is read. Images and lists would take many times the
            memory of the texts.
        names: Only columns of these names are read.
    """
    arrow = import_or_raise("pyarrow")
    if file.suffix.lower() == ".parquet":
        with import_or_raise("pyarrow.parquet").ParquetFile(file) as table:
            schema = table.schema_arrow
            read = [field.name for field in schema if is_read(field.type)]
            read = [name for name in read if not names or name in names]
            yield schema, arrow.RecordBatch.from_pylist([], schema=arrow.schema([]))
            for batch in table.iter_batches(_BATCH, columns=read or schema.names[:1]):
                yield schema, batch
        return
    with arrow.memory_map(os.fspath(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = arrow.ipc.open_file(source) if is_file else arrow.ipc.open_stream(source)
        yield reader.schema, arrow.RecordBatch.from_pylist([], schema=arrow.schema([]))
        count = reader.num_record_batches if is_file else None
        batches = reader if count is None else map(reader.get_batch, range(count))
        for batch in batches:
            yield reader.schema, batch


def _is_light(kind: Any) -> bool:
    types = import_or_raise("pyarrow").types
    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_integer(kind) or _is_string(kind)


def _is_string(kind: Any) -> bool:
    types = import_or_raise("pyarrow").types
    # A string view came with pyarrow 16.
    is_view = getattr(types, "is_string_view", lambda kind: False)
    return types.is_string(kind) or types.is_large_string(kind) or is_view(kind)


def _check_names(file: Path, names: list[str]) -> list[str]:
    if len({*names}) < len(names):
        raise DataError(f"{file} has two columns of one name, {list_some(names)}: rename one")
    return names


def _read_rows(file: Path, schema: Any, batch: Any, first: int) -> Iterator[list[str]]:
    """Yields the fields of the rows of a batch, the first of which has the index `first`."""
    if not batch.num_rows:
        return
    names = _read_class_names(file, schema)
    columns = []
    for field in schema:
        if not _is_light(field.type):
            kind = _describe(field.type)
            columns.append([Value(kind, kind)] * batch.num_rows)
            continue
        make = _field_maker(names.get(field.name))
        values = batch.column(batch.schema.get_field_index(field.name)).to_pylist()
        fields = []
        for row, value in enumerate(values, start=first):
            fields.append(make(value, line_origin(file, row)))
        columns.append(fields)
    yield from map(list, zip(*columns, strict=True))


def _field_maker(class_names: Sequence[str] | None) -> Callable[[Any, str], str]:
    """Returns the function that makes a field of a table of a value and its origin."""

    def make(value: Any, origin: str) -> str:
        if type(value) is not int:
            return make_field(value, origin)
        # In GLUE, the class of a text of the test set is -1.
        if class_names is None or value == -1:
            return Value(str(value), "an integer")
        if not 0 <= value < len(class_names):
            raise DataError(
                f"{origin} has the class {value}, but the file names {len(class_names)}: correct it"
            )
        return class_names[value]

    return make


def _read_class_names(file: Path, schema: Any) -> dict[str, list[str]]:
    """Returns the names of the classes of each column that has any, as `datasets` writes them."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata["info"]["features"] if metadata else {}
        found = {
            column: feature["names"]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Other programs may use the key, and integers are classes too.
        return {}
    for column, names in found.items():
        shown = f"{file}: the classes of {shorten(column, 40)!r}"
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{shown} must be a list of names: write the file again")
        if len({*names}) < len(names):
            raise DataError(f"{shown} have one name twice: rename one")
    return found


def _describe(kind: Any) -> str:
    """Describes a type of values that is neither a string nor an integer."""
    types = import_or_raise("pyarrow").types
    if types.is_boolean(kind):
        return "true or false"
    if types.is_floating(kind):
        return "a number with a fraction"
    if types.is_null(kind):
        return "null"
    if types.is_struct(kind):
        return "an object"
    return "a list" if types.is_list(kind) or types.is_large_list(kind) else f"{kind!s:.40}"
