"""Examples that can only be read one after another."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxkd._messages import shorten
from jaxkd.data.errors import DataError
from jaxkd.data.records import SAMPLE_SIZE, Records, check_record, find_column, unreadable


class SequentialRecords(Records):
    """Examples of a source without random access, such as a `grain.IterDataset`.

    A `distill.Stage` takes them as its data. Its batches hold the records in the order of the
    source, which shuffles them itself. When the source has ended, it is started again. The state of
    its iterator is part of each checkpoint, so that a training that goes on reads what an unbroken
    one would have read.

    Choose `Records` where a source has random access: its order is drawn from the key of the run,
    each process reads its own part alone, and logits of teachers can be cached.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[int], Iterable[Any]],
        convert: Callable[[Any], Mapping[str, Any]] | None = None,
        *,
        count: int,
        fingerprint: str = "",
    ) -> None:
        """Reads the first record, for the names, shapes and dtypes.

        Args:
            source: Gives the records, such as a `grain.IterDataset` or `grain.DataLoader` without
                batches, each time from the start and in the same order; or a function of the number
                of the epoch, from 0, that returns such a source. If its iterators have `get_state`
                and `set_state`, a training goes on by them. Otherwise it reads all records up to
                its step again.
            convert: `record -> {"inputs": ..., "labels": ...}`: arrays and numbers by name, of the
                same shapes and dtypes in every record. By default the records are such dicts.
            count: Number of records that count as an epoch in records and figures.
            fingerprint: Text that identifies the content, such as the version of the data. A
                training compares it and the first records with those of its checkpoint.

        Raises:
            DataError: If the source is an iterator, which cannot start again, or has no record, the
                count is no whole number of at least 1, or the first record is no dict of arrays and
                numbers.

        Example:
            >>> import numpy as np
            >>> from jaxkd import data
            >>> def read_lines(epoch):
            ...     for line in ("1 0", "2 1", "3 0"):
            ...         value, label = line.split()
            ...         yield {"inputs": np.float32([float(value)]), "labels": np.int32(label)}
            >>> records = data.SequentialRecords(read_lines, count=3)
            >>> records.read(np.arange(2, 4))["inputs"].tolist()  # the source is started again
            [[3.0], [1.0]]
        """
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise DataError(f"count is {count!r:.40}: pass the number of records of an epoch")
        self._start = _make_start(source)
        self._convert = convert
        self._identity = f"{fingerprint} sequential"
        self.count = int(count)
        # Threads would take the records in another order.
        self.threads = 1
        self._cursor = _Cursor(self._start)
        self._inspect_first()

    @functools.cached_property
    def sample_rows(self) -> np.ndarray:
        """The rows of the sample: the first ones."""
        return np.arange(min(self.count, SAMPLE_SIZE))

    def select(self, indices: np.ndarray) -> Records:
        """Raises `DataError`: records that are read one after another cannot be chosen."""
        raise DataError(
            "sequential records cannot be selected, since they are read one after another: select "
            "in their source, or pass a source with random access to data.Records"
        )

    def read(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Reads records that follow each other.

        Args:
            rows: Integers `[B]`, each one above that before. From `count` on, they are of later
                epochs. Rows of the sample may have any order.

        Returns:
            The values `[B, ...]` by name; those of a dict within have names such as
            `inputs/tokens`.

        Raises:
            DataError: If the rows have another order, a record cannot be read, or differs from the
                first one in names, shapes or dtypes.
        """
        rows = np.asarray(rows)
        if rows.max(initial=0) < len(self.sample_rows):
            return {name: values[rows] for name, values in self.sample.items()}
        if np.any(np.diff(rows) != 1):
            raise DataError(
                "sequential records are read in their order alone: pass a source with random "
                "access to data.Records"
            )
        with self._lock:
            return self._stack(rows, self._take(self._cursor, rows))

    def get_state(self) -> dict[str, Any]:
        """Returns the state of the iterator after what was read last, as JSON values."""
        return self._cursor.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Takes back the state of an iterator of the same source.

        Args:
            state: What `get_state` returned.

        Raises:
            DataError: If the source does not take it.
        """
        cursor = _Cursor(self._start)
        try:
            cursor.set_state(state)
        # The iterator is the user's.
        except Exception as error:
            raise DataError(
                f"the source does not go on from its state in the checkpoint ({shorten(error, 80)})"
                ": pass the source that the training began with, or name another folder"
            ) from error
        self._cursor = cursor

    def _read(self, rows: Sequence[int] | np.ndarray) -> Iterator[Any]:
        """Reads the first records from a start of their own."""
        return self._take(_Cursor(self._start), rows)

    def _take(self, cursor: _Cursor, rows: Sequence[int] | np.ndarray) -> Iterator[Any]:
        for row in rows:
            try:
                cursor.move(int(row))
                record = cursor.take()
                if self._convert is not None:
                    record = self._convert(record)
            # A lack of memory is no fault of the records.
            except (DataError, MemoryError):
                raise
            # The code of the source and of `convert` is the user's.
            except Exception as error:
                raise unreadable([int(row)], error) from error
            check_record(int(row), record)
            yield record


class _Cursor:
    """A place in the records of a source, from which they are read on."""

    def __init__(self, start: Callable[[int], Iterator[Any]]) -> None:
        """Stands before the first record; `start` makes the iterator of an epoch."""
        self._start = start
        self._row = 0
        self._epoch = 0
        self._row_in_epoch = 0
        self._iterator: Iterator[Any] | None = None

    def move(self, row: int) -> None:
        """Reads up to a row, from the start if that has passed."""
        if row < self._row:
            self._row, self._epoch, self._row_in_epoch, self._iterator = 0, 0, 0, None
        while self._row < row:
            self.take()

    def take(self) -> Any:
        """Returns the next record."""
        if self._iterator is None:
            self._iterator = self._start(self._epoch)
        while True:
            try:
                record = next(self._iterator)
                break
            except StopIteration:
                pass
            if not self._row_in_epoch:
                raise DataError(
                    f"there is no record in epoch {self._epoch} of the source: pass one that has "
                    "some, and that can be read more than once"
                )
            self._epoch += 1
            self._row_in_epoch = 0
            self._iterator = self._start(self._epoch)
        self._row += 1
        self._row_in_epoch += 1
        return record

    def get_state(self) -> dict[str, Any]:
        """Returns the place as JSON values."""
        state: Any = None
        if hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state"):
            state = self._iterator.get_state()
        if isinstance(state, bytes):
            state = {"base64": base64.b64encode(state).decode()}
        return {
            "row": self._row,
            "epoch": self._epoch,
            "row_in_epoch": self._row_in_epoch,
            "iterator": state,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to the place that `get_state` told."""
        self._row, self._epoch = state["row"], state["epoch"]
        self._row_in_epoch = state["row_in_epoch"]
        self._iterator = self._start(self._epoch)
        saved = state["iterator"]
        if saved is None:
            for _ in range(self._row_in_epoch):
                next(self._iterator)
            return
        if isinstance(saved, dict) and saved.keys() == {"base64"}:
            saved = base64.b64decode(saved["base64"])
        self._iterator.set_state(saved)  # pyrefly: ignore[missing-attribute]


def _make_start(
    source: Iterable[Any] | Callable[[int], Iterable[Any]],
) -> Callable[[int], Iterator[Any]]:
    """Makes the function that starts an epoch of a source."""
    if callable(source):
        return lambda epoch: iter(source(epoch))
    if not hasattr(source, "__iter__") or isinstance(source, (Mapping, str, bytes)):
        raise DataError(
            f"a {type(source).__name__} has no records to iterate over: pass a grain.IterDataset, "
            "or a function of the epoch that returns an iterable"
        )
    if iter(source) is source:
        raise DataError(
            f"a {type(source).__name__} cannot be started again: pass a function of the epoch that "
            "returns it anew"
        )
    return lambda epoch: iter(source)


def find_sequential(arrays: Any) -> SequentialRecords | None:
    """Returns the sequential records of which a dict holds columns; `None` without any."""
    column = find_column(arrays)
    records = None if column is None else column.records
    return records if isinstance(records, SequentialRecords) else None
