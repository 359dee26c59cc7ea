"""Examples that stay where they are stored, and of which a batch is read when it is needed."""

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from jaxkd._messages import list_some, shorten
from jaxkd.data.errors import DataError, one_line

SAMPLE_SIZE = 256
"""Number of records, spread over all, in which faults are looked for before training."""

MAX_THREADS = 16
"""Largest number of threads that read where none is named."""


class Records(Mapping[str, Any]):
    """Examples of a source with random access, which need not fit into memory.

    A `distill.Stage` takes them as its data, in place of a dict of arrays. Its batches hold the
    same examples as those of the arrays would, so that a training on either ends with the same
    bits, and a training that goes on reads what an unbroken one would have read.

    It maps names to columns. A column has the shape and dtype of the whole array, and reads the
    rows by which it is indexed. Columns and arrays of one length may be mixed:
    `{"inputs": records["inputs"], "labels": labels}`.
    """

    _indices: np.ndarray | None = None

    def __init__(
        self,
        source: Any,
        convert: Callable[[Any], Mapping[str, Any]] | None = None,
        *,
        indices: np.ndarray | None = None,
        fingerprint: str = "",
        threads: int | None = None,
    ) -> None:
        """Reads the first record, for the names, shapes and dtypes.

        Args:
            source: Has `len(source)` and `source[index]`, such as a `grain.MapDataset`, the
                `as_data_source` of TFDS, an `ArrayRecordDataSource` or a list of files. A batch is
                read with `source.__getitems__(indices)` if there is one. Threads read at once. An
                index has the same values each time.
            convert: `record -> {"inputs": ..., "labels": ...}`: arrays and numbers by name, of the
                same shapes and dtypes in every record. By default the records are such dicts.
            indices: The records that take part, in their order. By default all.
            fingerprint: Text that identifies the content, such as the version of the data. A
                training compares it, the number of records and a sample of them with those of its
                checkpoint, since reading all of them would take long.
            threads: Number of threads that read; 1 for a source that only one may use at a time. By
                default one for each processor, at most 16.

        Raises:
            DataError: If the source has no random access or no record, an index is out of range, or
                the first record is no dict of arrays and numbers.

        Example:
            >>> import numpy as np
            >>> from jaxkd import data
            >>> images = [np.full((2, 2, 1), i, np.uint8) for i in range(5)]
            >>> records = data.Records(images, lambda image: {"inputs": image, "labels": 0})
            >>> records["inputs"].shape, records["inputs"][[3, 1]][:, 0, 0, 0].tolist()
            ((5, 2, 2, 1), [3, 1])
        """
        _check_source(source)
        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise DataError(f"threads is {threads!r:.40}: pass a whole number of at least 1")
        self.threads = threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._source = source
        self._convert = convert
        self._fingerprint = fingerprint
        self._identity = f"{fingerprint} {len(source)}"
        self._indices = None if indices is None else _check_indices(indices, len(source))
        self.count = len(source) if self._indices is None else len(self._indices)
        if not self.count:
            raise DataError("there is no record in the source: pass one that has some")
        self._inspect_first()

    def _inspect_first(self) -> None:
        """Reads the first record, for the names, shapes and dtypes."""
        self._lock = threading.Lock()
        first = next(iter(self._read([0])))
        # Copies, in case that the source writes all records into one buffer.
        self._first = {name: np.array(value) for name, value in _name_values(first, 0)}
        self._columns = self._make_columns(first)

    def _make_columns(self, example: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        return {
            name: self._make_columns(value, f"{prefix}{name}/")
            if isinstance(value, Mapping)
            else Column(self, f"{prefix}{name}", self._first[f"{prefix}{name}"])
            for name, value in example.items()
        }

    def __getitem__(self, name: str) -> Any:
        """Returns the column of a name, or the columns by name if a record holds a dict there."""
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self._columns)

    def __len__(self) -> int:
        """Returns the number of names; that of records is `count`."""
        return len(self._columns)

    def select(self, indices: np.ndarray) -> "Records":
        """Returns some of the records. Nothing is read but the first of them.

        Args:
            indices: Integers `[M]` from 0 to `count - 1`.
        """
        rows = _check_indices(indices, self.count)
        return Records(
            self._source,
            self._convert,
            indices=rows if self._indices is None else self._indices[rows],
            fingerprint=self._fingerprint,
            threads=self.threads,
        )

    def read(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Reads records.

        Args:
            rows: Integers `[B]` from 0 to `count - 1`.

        Returns:
            The values `[B, ...]` by name; those of a dict within have names such as
            `inputs/tokens`.

        Raises:
            DataError: If a record cannot be read, or differs from the first one in names, shapes
                or dtypes.
        """
        return self._stack(rows, self._read(rows))

    def _stack(
        self, rows: Sequence[int] | np.ndarray, examples: Iterable[Any]
    ) -> dict[str, np.ndarray]:
        """Returns the values of some records by name, `[B, ...]`."""
        arrays = {
            name: np.empty((len(rows), *first.shape), first.dtype)
            for name, first in self._first.items()
        }
        for i, example in enumerate(examples):
            values = dict(_name_values(example, int(rows[i])))
            self._check_like_first(values, int(rows[i]))
            for name, array in arrays.items():
                array[i] = values[name]
        return arrays

    @functools.cached_property
    def sample_rows(self) -> np.ndarray:
        """The rows of the sample: all of them if they are few, else spread evenly."""
        count = min(self.count, SAMPLE_SIZE)
        return np.linspace(0, self.count - 1, count).astype(np.int64)

    @property
    def sample(self) -> dict[str, np.ndarray]:
        """The values of the sample by name, which are read once.

        Raises:
            DataError: If the first record has other values than when it was read before.
        """
        with self._lock:
            return self._sample

    @functools.cached_property
    def _sample(self) -> dict[str, np.ndarray]:
        sample = self._stack(self.sample_rows, self._read(self.sample_rows))
        for name, first in self._first.items():
            # Bytes, since NaN would differ from itself.
            if sample[name][0].tobytes() != first.tobytes():
                raise DataError(
                    f"record 0 has another {shorten(name, 40)!r} when it is read again: return the "
                    "same values for an index each time, in an array of its own; random views are "
                    "for the augment of a stage"
                )
        return sample

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the fingerprint, of which records take part, and of the sample."""
        digest = hashlib.sha256(f"{self._identity} {self.count}".encode())
        if self._indices is not None:
            digest.update(self._indices.astype(np.int64).tobytes())
        for name, array in self.sample.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    def _read(self, rows: Sequence[int] | np.ndarray) -> Iterable[Any]:
        """Returns some records as dicts."""
        wanted = np.asarray(rows)
        wanted = (wanted if self._indices is None else self._indices[wanted]).tolist()
        reading: Any = rows
        try:
            if hasattr(self._source, "__getitems__"):
                found = list(self._source.__getitems__(wanted))
            else:
                found = []
                for row, index in zip(rows, wanted, strict=True):
                    reading = [row]
                    found.append(self._source[index])
            if self._convert is not None:
                for i, row in enumerate(rows):
                    reading = [row]
                    found[i] = self._convert(found[i])
        # A lack of memory is no fault of the records.
        except (DataError, MemoryError):
            raise
        # The code of the source and of `convert` is the user's.
        except Exception as error:
            raise unreadable(reading, error) from error
        for row, record in zip(rows, found, strict=True):
            check_record(row, record)
        return found

    def _check_like_first(self, values: Mapping[str, np.ndarray], row: int) -> None:
        for name in self._first.keys() | values.keys():
            first, value = self._first.get(name), values.get(name)
            if (
                first is None
                or value is None
                or first.shape != value.shape
                or first.dtype != value.dtype
            ):
                raise DataError(
                    f"record {row} has {shorten(name, 40)!r} as {_describe(value)}, but the first "
                    f"one as {_describe(first)}: convert all to one shape and dtype"
                )


class Column:
    """The values of all records under a name, of which nothing is in memory.

    Attributes:
        records: The records.
        name: The name, such as `inputs/tokens` for a value within a dict.
        shape: `(N, ...)`.
        dtype: The dtype.
    """

    def __init__(self, records: Records, name: str, first: np.ndarray) -> None:
        """Takes the value of the first record."""
        self.records = records
        self.name = name
        self.shape = (records.count, *first.shape)
        self.dtype = first.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of numbers."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """The memory that all of it would take."""
        return self.size * self.dtype.itemsize

    @property
    def sample(self) -> np.ndarray:
        """The values of `records.sample_rows`."""
        return self.records.sample[self.name]

    @property
    def digest(self) -> str:
        """A digest of the name and of the records."""
        return hashlib.sha256(f"{self.name} {self.records.digest}".encode()).hexdigest()

    def select(self, indices: np.ndarray) -> "Column":
        """Returns the column of some records; see `Records.select`."""
        column: Any = self.records.select(indices)
        for name in self.name.split("/"):
            column = column[name]
        return column

    def __len__(self) -> int:
        """Returns the number of records."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads the rows of an integer, a slice, or an array of integers or truth values."""
        rows = np.arange(len(self))[index]
        values = self.records.read(np.atleast_1d(rows))[self.name]
        return values if np.ndim(rows) else values[0]

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises `TypeError`: all of the column need not fit into memory."""
        raise TypeError(
            f"{shorten(self.name, 40)!r} is streamed, {len(self):,} records that need not fit into "
            "memory: read some by [start:stop], or load the data as arrays"
        )


def unreadable(rows: Sequence[int] | np.ndarray, error: Exception) -> DataError:
    """Returns the error that says that one of some records cannot be read, and why."""
    name = f"record {rows[0]}" if len(rows) == 1 else f"a record of {list_some(rows)[:60]}"
    return DataError(
        f"{name} cannot be read ({type(error).__name__}: {one_line(error)}): replace it, or "
        "correct what reads it"
    )


def check_record(row: int, record: Any) -> None:
    """Raises `DataError` if a record is no dict of arrays."""
    if record is None:
        raise DataError(
            f"record {row} is None, as grain's filter leaves in place of what it removes: "
            "pass the indices of those to keep to data.Records instead"
        )
    if not isinstance(record, Mapping):
        raise DataError(
            f"record {row} is a {type(record).__name__}, not a dict of arrays: pass a "
            "function that makes {'inputs': ..., 'labels': ...} of a record"
        )


def is_streamed(arrays: Any) -> bool:
    """Returns whether a column is among the values of a dict, or of dicts within."""
    return find_column(arrays) is not None


def scannable(arrays: Any) -> Any:
    """Returns what can be searched for faults: arrays themselves, or a sample of streamed ones.

    Args:
        arrays: An array, a column, or a dict of them, of scalars, and of dicts. If a column is
            among them, the same rows of all are returned.
    """
    column = find_column(arrays)
    return arrays if column is None else _sample(arrays, column.records.sample_rows)


def _sample(value: Any, rows: np.ndarray) -> Any:
    if isinstance(value, Mapping):
        return {name: _sample(member, rows) for name, member in value.items()}
    if isinstance(value, Column):
        return value.sample
    return value[rows] if np.ndim(value) else value


def find_column(arrays: Any) -> Column | None:
    """Returns the first column of a dict, or of dicts within; `None` if there is none."""
    if isinstance(arrays, Mapping):
        found = map(find_column, arrays.values())
        return next((column for column in found if column is not None), None)
    return arrays if isinstance(arrays, Column) else None


def select_rows(array: Any, indices: np.ndarray) -> Any:
    """Returns some rows of an array, or the column of some records, of which nothing is read."""
    return array.select(indices) if isinstance(array, Column) else array[indices]


def is_dataset(value: Any) -> bool:
    """Returns whether a value seems to be a data set of another library, such as grain's."""
    is_other = callable(value) or isinstance(value, (Mapping, list, tuple, str, bytes))
    return not is_other and hasattr(value, "__iter__") and not hasattr(value, "dtype")


def _check_source(source: Any) -> None:
    has_random_access = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    if isinstance(source, (Mapping, str, bytes)) or not has_random_access:
        raise DataError(
            f"a {type(source).__name__} cannot be read in any order: pass a source with "
            "len(source) and source[index], such as a grain.MapDataset before to_iter_dataset() "
            "and without batches, or data.SequentialRecords(source, count=...)"
        )


def _check_indices(indices: Any, count: int) -> np.ndarray:
    indices = np.asarray(indices)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise DataError(
            f"indices must be integers [M], got {indices.dtype} {list(indices.shape)}: pass "
            "np.flatnonzero(...) of truth values"
        )
    if indices.size and (indices.min() < 0 or indices.max() >= count):
        raise DataError(
            f"indices are from {indices.min()} to {indices.max()}, but there are {count:,} records"
        )
    return indices


def _name_values(
    example: Mapping[str, Any], row: int, prefix: str = ""
) -> Iterator[tuple[str, np.ndarray]]:
    """Iterates over the arrays of an example by name."""
    if not example:
        raise DataError(f"record {row} is empty: return {{'inputs': ..., 'labels': ...}}")
    for name, value in example.items():
        if not isinstance(name, str) or "/" in name:
            raise DataError(f"record {row} has the name {name!r:.40}: use text without '/'")
        if isinstance(value, Mapping):
            yield from _name_values(value, row, f"{prefix}{name}/")
            continue
        array = np.asarray(value)
        if array.dtype.kind in "OSUMm":
            raise DataError(
                f"record {row} has values of dtype {array.dtype} as {prefix + name!r:.40}, which "
                f"are no numbers: keep only what the loss reads of {list_some(example)[:80]}"
            )
        yield prefix + name, array


def _describe(value: np.ndarray | None) -> str:
    return "missing" if value is None else f"{value.dtype} {list(value.shape)}"
