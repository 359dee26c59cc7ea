"""Reads the batches of a stage whose examples need not fit into memory.

A batch holds the examples that it would hold if all of them were in memory: it depends on the key
and on the step alone. A training that goes on therefore reads the same batches, without a state of
its reader. Sequential records have their own order, and a state that is saved.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxkd._messages import shorten
from jaxkd.data.read_ahead import count_threads, read_ahead
from jaxkd.data.records import Column, find_column, is_streamed
from jaxkd.data.sequential import find_sequential
from jaxkd.distill._batches import SelectFn
from jaxkd.distill._requirements import named_arrays
from jaxkd.distill.placement import StreamingPlacement
from jaxkd.distill.plan import Stage
from jaxkd.distill.step import BatchInfo

MAX_CALL_BYTES = 2**28
"""Size up to which batches are put onto the devices together, for steps in one loop."""

STEPS_BETWEEN_STATES = 100
"""Number of steps after which a state of sequential records is kept, to read a batch again."""

_LABELS = (jax.tree_util.SequenceKey(0), jax.tree_util.DictKey("labels"))


class BatchStream:
    """Reads batches ahead of the steps that take them, in threads."""

    def __init__(
        self,
        examples: Mapping[str, Any],
        info: BatchInfo,
        select: SelectFn,
        steps: range,
        *,
        batch_size: int,
        placement: StreamingPlacement,
        put_scalar: Callable[[Any], Any],
        state: Mapping[str, Any] | None,
    ) -> None:
        """Reads nothing before the first call of `take`.

        Args:
            examples: The user's columns, arrays and scalars.
            info: What the library adds.
            select: Selects the examples of a step.
            steps: All steps to come.
            batch_size: Number of examples in a batch.
            placement: Where the batches are put.
            put_scalar: Puts a value that all batches share onto the devices.
            state: That of sequential records before the first step, from a checkpoint.
        """
        self._sequential = find_sequential(examples)
        self.state = state
        self._states = {}
        if state is not None and self._sequential is not None:
            self._sequential.set_state(state)
            self._states[steps.start] = state
        self._examples = dict(examples)
        self._select = select
        self._batch_size = batch_size
        self._placement = placement
        self._rows = placement.find_batch_rows(batch_size)
        paths, self._structure = jax.tree_util.tree_flatten_with_path((self._examples, info))
        # By the position among the leaves.
        self._scalars: dict[int, Any] = {}
        self._arrays: dict[int, Any] = {}
        self._labels: int | None = None
        for i, (path, leaf) in enumerate(paths):
            if not np.ndim(leaf):
                self._scalars[i] = put_scalar(leaf)
                continue
            # An array on a device would be indexed there, by a program of its own.
            self._arrays[i] = leaf if isinstance(leaf, Column) else np.asarray(leaf)
            if path == _LABELS:
                self._labels = i
        batch_bytes = sum(array.nbytes // len(array) for array in self._arrays.values())
        self.steps_per_call = min(
            placement.steps_per_call, max(1, MAX_CALL_BYTES // (batch_bytes * batch_size))
        )
        threads = count_threads(examples)
        self._batches = read_ahead(
            self._read_step,
            steps,
            threads=threads,
            # Those of the next call, or one for each thread.
            ahead=max(2 * self.steps_per_call, threads + 1),
        )

    def take(self, steps: range) -> tuple[Any, np.ndarray]:
        """Returns the batches of the next steps on the devices, and their numbers `[K, 1]`."""
        batches = []
        for step in steps:
            arrays, self.state = next(self._batches)
            batches.append(arrays)
            if self.state is not None and (step + 1) % STEPS_BETWEEN_STATES == 0:
                self._states[step + 1] = self.state
        return self._put(batches)

    def load_scanned(
        self, positions: np.ndarray, labels: np.ndarray | None = None
    ) -> tuple[Any, np.ndarray]:
        """Returns a batch of examples in which faults were looked for, like `take`.

        Args:
            positions: `[B]`, positions in what `scannable` returns of the labels, if there are any
                here, or of the inputs.
            labels: All that were scanned, in place of the examples' own.
        """
        column = find_column(self._examples["inputs" if labels is None else "labels"])
        rows = positions if column is None else column.records.sample_rows[positions]
        arrays = self._read(rows[self._rows])
        if labels is not None and self._labels is not None:
            arrays[self._labels] = labels[positions[self._rows]]
        return self._put([arrays])

    def read_batch(self, step: int) -> dict[str, Any]:
        """Returns the user's arrays of a step's batch, and the scalars, on the host.

        Of sequential records, none are read ahead any more.
        """
        known = [start for start in self._states if start <= step]
        if self._sequential is not None:
            self.close()
            if known:
                self._sequential.set_state(self._states[max(known)])
        arrays = self._read(self._select(step))
        leaves = [arrays.get(i, leaf) for i, leaf in enumerate(jax.tree.leaves(self._examples))]
        return jax.tree.unflatten(jax.tree.structure(self._examples), leaves)

    def close(self) -> None:
        """Stops reading."""
        self._batches.close()

    def _read_step(self, step: int) -> tuple[dict[int, np.ndarray], Any]:
        """Reads a step's examples, and the state of sequential records after them."""
        rows = self._select(step)
        if self._sequential is None:
            return self._read(rows[self._rows]), None
        # Each process reads all of them, and keeps its own.
        arrays = {i: array[self._rows] for i, array in self._read(rows).items()}
        return arrays, self._sequential.get_state()

    def _read(self, rows: np.ndarray) -> dict[int, np.ndarray]:
        """Reads some examples of every array, `[R, ...]`."""
        # The columns of some records are read together.
        by_records: dict[int, dict[str, np.ndarray]] = {}
        arrays = {}
        for i, array in self._arrays.items():
            if not isinstance(array, Column):
                arrays[i] = array[rows]
                continue
            if id(array.records) not in by_records:
                by_records[id(array.records)] = array.records.read(rows)
            arrays[i] = by_records[id(array.records)][array.name]
        return arrays

    def _put(self, batches: Sequence[dict[int, np.ndarray]]) -> tuple[Any, np.ndarray]:
        stacked = {i: self._stack([batch[i] for batch in batches]) for i in self._arrays}
        leaves = self._scalars | self._placement.put_batches(stacked, self._batch_size)
        examples = jax.tree.unflatten(self._structure, [leaves[i] for i in sorted(leaves)])
        return examples, np.arange(len(batches), dtype=np.int32)[:, None]

    def _stack(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        # Without a copy, on a CPU.
        if self.steps_per_call == 1 and len(arrays) == 1:
            return arrays[0][None]
        # One number of batches, so that the loop of an accelerator compiles once.
        count = max(self.steps_per_call, len(arrays))
        stacked = np.zeros((count, *arrays[0].shape), arrays[0].dtype)
        for i, array in enumerate(arrays):
            stacked[i] = array
        return stacked


def check_streams(plan: Sequence[Any], seed: int, placement: Any, *, has_buckets: bool) -> None:
    """Raises `ValueError` if a stage streams its examples where that is not possible."""
    for stage in plan:
        if not isinstance(stage, Stage) or not is_streamed(stage.examples(seed)):
            continue
        owner = f"the data of stage {shorten(stage.name, 40)!r} are streamed"
        if not isinstance(placement, StreamingPlacement):
            raise ValueError(
                f"{owner}, which a {type(placement).__name__} does not do: pass a MeshPlacement, "
                "or arrays in memory"
            )
        if has_buckets:
            raise ValueError(
                f"{owner}, but buckets need the length of every example beforehand: leave out the "
                "buckets, or pass arrays in memory"
            )
        if find_sequential(stage.examples(seed)) is not None:
            _check_sequential(stage, seed)


def _check_sequential(stage: Stage, seed: int) -> None:
    """Raises `ValueError` if a stage needs the numbers of sequential records."""
    owner = f"the records of stage {shorten(stage.name, 40)!r} are sequential"
    remedy = "pass a source with random access to data.Records"
    columns = [array for _, array in named_arrays(stage.examples(seed)) if np.ndim(array)]
    records = {id(column.records) if isinstance(column, Column) else None for column in columns}
    if len(records) > 1:
        raise ValueError(
            f"{owner}, so that all of its arrays must be columns of them: return them from convert"
        )
    if stage.views is not None or stage.cache_teachers:
        option = "views" if stage.views is not None else "cache_teachers"
        raise ValueError(f"{owner}, but {option} needs a number for each of them: {remedy}")
