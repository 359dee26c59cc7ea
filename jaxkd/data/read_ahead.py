"""Reads columns of records in threads, ahead of what takes them."""

import collections
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxkd.data.records import MAX_THREADS, Column, is_streamed

MAX_CHUNKS = 4
"""Largest number of chunks that are read ahead, which are larger than batches."""


def count_threads(examples: Any) -> int:
    """Returns the number of threads that may read columns, the smallest of all their records'."""
    if isinstance(examples, Mapping):
        return min(map(count_threads, examples.values()), default=MAX_THREADS)
    return examples.records.threads if isinstance(examples, Column) else MAX_THREADS


def read_ahead(
    read: Callable[[Any], Any], items: Iterable[Any], *, threads: int, ahead: int
) -> Generator[Any]:
    """Yields `read(item)` of each item in their order, while threads read the next ones.

    Close the generator to stop the threads. An error of `read` is raised in the item's turn.

    Args:
        read: The function.
        items: Its arguments.
        threads: Number of threads.
        ahead: Number of results that are read or waiting while one is used.
    """
    pending: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="jaxkd-read") as pool:
        try:
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def read_chunks(inputs: Any, chunks: Iterable[Any]) -> Iterator[Any]:
    """Iterates over some rows of an array, or of a dict of arrays, after the others.

    Args:
        inputs: An array, a column, or a dict of them, of which the next chunks are read ahead.
        chunks: Slices or arrays of integers.
    """

    def read(rows: Any) -> Any:
        if isinstance(inputs, Mapping):
            return {name: array[rows] for name, array in inputs.items()}
        return inputs[rows]

    if not is_streamed(inputs):
        return map(read, chunks)
    threads = min(count_threads(inputs), MAX_CHUNKS)
    return read_ahead(read, chunks, threads=threads, ahead=threads)
