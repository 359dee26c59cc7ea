"""Where the arrays of a training live, and how its steps run.

`MeshPlacement` compiles a step as one program over a mesh of devices and divides the batch among
them. `PmapPlacement` does the same with `jax.pmap`. `VectorizedPlacement` trains many students in
one program. They all implement `Placement`, so that callers never ask which one they have.

`put_states`, `put_examples`, `put_teachers` and `put_keys` take one entry per student of a group.
Only a vectorised placement takes more than one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill._multi_step import (
    Metrics,
    MultiStep,
    default_steps_per_call,
    for_one_student,
    is_on_cpu,
    repeat_step,
    step_by_step,
)
from jaxkd.distill.distributed import (
    gather_from_processes,
    is_primary_process,
    sum_over_processes,
)
from jaxkd.distill.step import StepFn
from jaxkd.evaluate import make_predict
from jaxkd.models.model import Model, Outputs

DATA = "data"
"""The mesh axis that divides batches."""
MODEL = "model"
"""The mesh axis that divides the weights of large teachers."""
STUDENTS = ((DATA, MODEL),)
"""Partitioning of the axis of vectorised students: over all devices."""
MAX_COPIED_BYTES = 2**30
"""Size of the largest array of examples that every accelerator gets a copy of."""
MakeStep = Callable[..., StepFn]
"""`make_train_step` with all of its arguments bound except `axis_name`."""


class Placement(Protocol):
    """The interface of all placements."""

    @property
    def max_students(self) -> int:
        """The largest number of students that train in one program."""
        ...

    @property
    def steps_per_call(self) -> int:
        """The number of steps that one call of a `MultiStep` should take."""
        ...

    def put_states(self, states: Sequence[Any]) -> Any:
        """Puts the training state of each student onto the devices."""
        ...

    def get_states(self, states: Any, count: int) -> list[Any]:
        """Returns the training states of the first `count` students.

        Every process gets all of them, so the processes call it together.
        """
        ...

    def get_metrics(self, metrics: Sequence[Metrics], count: int) -> dict[str, np.ndarray]:
        """Joins the metrics `[K, P]` of several calls of a `MultiStep`, at least one, on the host.

        Columns after the first `count` students are left out. The processes call it together.
        """
        ...

    def put_array(self, array: Any) -> Array:
        """Puts examples `[N, ...]`, or a scalar that all batches share, onto the devices."""
        ...

    def put_examples(self, examples: Sequence[Any]) -> Any:
        """Combines the trees of examples of each student. The leaves come from `put_array`."""
        ...

    def put_teachers(self, teachers: Sequence[Any]) -> Any:
        """Puts the variables of each student's teachers onto the devices."""
        ...

    def put_keys(self, keys: Sequence[Array]) -> Any:
        """Puts the PRNG key of each student onto the devices."""
        ...

    def make_multi_step(self, make_step: MakeStep) -> MultiStep:
        """Compiles a training step into a function that takes several steps."""
        ...

    def make_predict(
        self,
        model: Model,
        *,
        buckets: LengthBuckets | None = None,
        read: Callable[[Outputs], Any] | None = None,
    ) -> Callable[[dict, Any], Any]:
        """Makes a function that predicts any number of examples.

        It returns logits, or what `read` returns of the outputs, as `evaluate.make_predict`.
        """
        ...


@runtime_checkable
class StreamingPlacement(Placement, Protocol):
    """A placement that also trains on examples that need not fit into memory."""

    def find_batch_rows(self, batch_size: int) -> np.ndarray:
        """Returns the positions in a batch of the examples that this process has to read."""
        ...

    def put_batches(self, batches: Any, batch_size: int) -> Any:
        """Puts the batches of several steps onto the devices.

        Args:
            batches: A tree of arrays `[K, R, ...]`, of the R examples that `find_batch_rows` names.
            batch_size: Number of examples in a batch, B.

        Returns:
            Arrays `[K, B, ...]`, of which step k selects the batch by its number.
        """
        ...


def make_mesh(*, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a mesh with the axes "data" and "model".

    Args:
        model: Size of the "model" axis, over which the weights of a large teacher are divided. With
            1, each device holds all of them.
        devices: The devices. By default all of them, including those of other processes.

    Returns:
        The mesh.

    Raises:
        ValueError: If there is no device, or their number is not a multiple of `model`.
        TypeError: If `model` is no integer.

    Example:
        >>> import jax
        >>> from jaxkd import distill
        >>> dict(distill.make_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("a mesh needs at least one device: leave devices out to take all")
    if not isinstance(model, (int, np.integer)) or isinstance(model, bool):
        raise TypeError(f"model must be an integer, the size of an axis, got {model!r:.40}")
    if model < 1 or len(devices) % model:
        raise ValueError(f"model={model} does not divide the number of devices, {len(devices)}")
    # The axis types are passed because their default changed to Explicit in JAX 0.10.
    shape = (len(devices) // model, model)
    return jax.make_mesh(shape, (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices)


def single_device() -> "MeshPlacement":
    """Returns the placement on the first device of this process."""
    return MeshPlacement(make_mesh(devices=jax.local_devices()[:1]))


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
    """Runs each step as one program over a mesh, with the batch divided among the devices.

    The batch may have any size: XLA pads it where the number of devices does not divide it.

    Attributes:
        mesh: A mesh from `make_mesh`.
        max_copied_bytes: Size of the largest array of examples of which every device gets a copy. A
            larger one is divided, so that each device and each process holds only its share: a step
            then exchanges its batch, which for small networks takes longer than all else that
            devices exchange. By default 1 GiB on accelerators, and 0 on CPUs, whose devices share
            one memory.
    """

    mesh: Mesh
    max_copied_bytes: int | None = None

    # Without an annotation, which would make it a field of the dataclass.
    max_students = 1
    """Students train one after another."""

    @property
    def steps_per_call(self) -> int:
        """1 on a CPU, where XLA runs convolutions slowly inside a loop; more on accelerators."""
        return default_steps_per_call(self.mesh)

    def put_states(self, states: Sequence[Any]) -> Any:
        """Copies the state of the only student to every device."""
        (state,) = states
        return jax.tree.map(lambda leaf: _put(leaf, self._sharding(), leaf.shape), state)

    def get_states(self, states: Any, count: int) -> list[Any]:
        """Returns the state of the only student, from the first device of this process."""
        del count
        return [_first_copy(states)]

    def get_metrics(self, metrics: Sequence[Metrics], count: int) -> dict[str, np.ndarray]:
        """Returns the metrics of the only student, `[K, 1]`."""
        return _join_metrics(metrics, count)

    def put_array(self, array: Any) -> Array:
        """Copies small arrays `[N, ...]` and scalars to every device, and divides large ones.

        Where the number of devices does not divide N, the last example is repeated.
        """
        if not np.ndim(array):
            return _put(jnp.asarray(array), self._sharding(), ())
        if self._is_copied(array):
            return _put(array, self._sharding(), array.shape)
        # JAX puts an array onto devices in equal parts only. No batch selects the repeated
        # examples, because the indices stay below N.
        length = -(-len(array) // self.mesh.size) * self.mesh.size
        return _put(array, self._sharding((DATA, MODEL)), (length, *array.shape[1:]))

    def put_examples(self, examples: Sequence[Any]) -> Any:
        """Puts the examples of the only student onto the devices."""
        (tree,) = examples
        return jax.tree.map(self.put_array, tree)

    def find_batch_rows(self, batch_size: int) -> np.ndarray:
        """Returns the positions in a batch of the shares of this process's devices."""
        sharding = self._batch_sharding(batch_size)
        shares = sharding.addressable_devices_indices_map((1, batch_size)).values()
        rows = [np.arange(batch_size)[share[1]] for share in shares if share is not None]
        return np.unique(np.concatenate(rows))

    def put_batches(self, batches: Any, batch_size: int) -> Any:
        """Puts its share of each batch `[K, B, ...]` onto each device.

        Where the number of devices does not divide the batch, each device gets all of it.
        """
        sharding, rows = self._batch_sharding(batch_size), self.find_batch_rows(batch_size)

        def put(array: np.ndarray) -> Array:
            if sharding.is_fully_addressable:
                return jax.device_put(array, sharding)

            def read(index: Any) -> np.ndarray:
                positions = np.arange(batch_size)[index[1]]
                return array[:, np.searchsorted(rows, positions)]

            # JAX holds float64 in float32, unless x64 is enabled.
            array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
            shape = (len(array), batch_size, *array.shape[2:])
            return jax.make_array_from_callback(shape, sharding, read)

        return jax.tree.map(put, batches)

    def put_teachers(self, teachers: Sequence[Any]) -> Any:
        """Divides each weight over the "model" axis, along its longest divisible dimension."""
        (variables,) = teachers
        return jax.tree.map(self._put_weight, variables)

    def put_keys(self, keys: Sequence[Array]) -> Array:
        """Returns the key of the only student. It stays where it is."""
        # The key is not committed to a device, so `jit` may move it to those of the step.
        (key,) = keys
        return key

    def make_multi_step(self, make_step: MakeStep) -> MultiStep:
        """Compiles a step; an accelerator takes several in one loop, a CPU one after another."""
        step = make_step()

        def divide(array: Array) -> Array:
            if not array.ndim:
                return array
            return lax.with_sharding_constraint(array, self._sharding((DATA, MODEL)))

        def take_step(
            state: Any, examples: Any, indices: Array, teachers: Any, key: Array
        ) -> tuple[Any, Metrics]:
            # Without the constraint, XLA may gather the whole batch on every device and compute it
            # many times.
            batch, info = jax.tree.map(divide, _select(examples, indices))
            state, metrics = step(state, batch, teachers, key, info)
            # The state returns as it came, whole on every device, so that its buffers can be
            # donated to the next step.
            return lax.with_sharding_constraint(state, self._sharding()), metrics

        return for_one_student(repeat_step(take_step, self.mesh.size, self.steps_per_call))

    def make_predict(
        self,
        model: Model,
        *,
        buckets: LengthBuckets | None = None,
        read: Callable[[Outputs], Any] | None = None,
    ) -> Callable[[dict, Any], Any]:
        """Makes a function that divides each batch of predictions among the devices."""
        predict = make_predict(model, mesh=self.mesh, buckets=buckets, read=read)
        # Divided as those of a teacher: the variables of a large model need not fit one device.
        return lambda variables, inputs: predict(self.put_teachers([variables]), inputs)

    def _is_copied(self, array: Any) -> bool:
        limit = self.max_copied_bytes
        if limit is None:
            limit = 0 if is_on_cpu(self.mesh) else MAX_COPIED_BYTES
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        # JAX holds float64 in float32, unless x64 is enabled.
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        return math.prod(array.shape) * dtype.itemsize <= limit

    def _put_weight(self, weight: Any) -> Array:
        size = self.mesh.shape[MODEL]
        spec: list[str | None] = [None] * len(weight.shape)
        divisible = [axis for axis, length in enumerate(weight.shape) if length % size == 0]
        if size > 1 and divisible:
            spec[max(divisible, key=lambda axis: weight.shape[axis])] = MODEL
        return _put(weight, self._sharding(*spec), weight.shape)

    def _batch_sharding(self, batch_size: int) -> NamedSharding:
        # JAX divides an axis in equal parts only.
        is_divided = batch_size % self.mesh.size == 0
        return self._sharding(None, (DATA, MODEL)) if is_divided else self._sharding()

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))


@dataclasses.dataclass(frozen=True)
class PmapPlacement:
    """Runs each step with `jax.pmap` on all devices. Their number must divide the batch size.

    Every device holds all examples and all weights, and augments the whole batch. Each device runs
    the networks on its share. The loss gets the outputs of all devices, so that losses which
    compare examples see the whole batch. `jaxkd.models.BatchNorm` takes the statistics of the whole
    batch; another batch norm must name the axis "data".
    """

    max_students = 1
    """Students train one after another."""
    steps_per_call = 1
    """Steps run one after another."""

    def put_states(self, states: Sequence[Any]) -> Any:
        """Copies the state of the only student to every device."""
        (state,) = states
        return self._replicate(state)

    def get_states(self, states: Any, count: int) -> list[Any]:
        """Returns the state of the only student, from the first device of this process."""
        del count
        return [_first_copy(states)]

    def get_metrics(self, metrics: Sequence[Metrics], count: int) -> dict[str, np.ndarray]:
        """Returns the metrics of the only student, `[K, 1]`."""
        return _join_metrics(metrics, count)

    def put_array(self, array: Any) -> Array:
        """Copies examples `[N, ...]` to every device."""
        return self._replicate(jnp.asarray(array))

    def put_examples(self, examples: Sequence[Any]) -> Any:
        """Copies the examples of the only student to every device."""
        (tree,) = examples
        return jax.tree.map(
            # `DeviceArrays` has put the leaves that several stages share already.
            lambda leaf: leaf if isinstance(leaf, Array) else self.put_array(leaf),
            tree,
        )

    def put_teachers(self, teachers: Sequence[Any]) -> Any:
        """Copies the weights of the teachers to every device."""
        (variables,) = teachers
        return self._replicate(variables)

    def put_keys(self, keys: Sequence[Array]) -> Array:
        """Returns the key of the only student. It stays where it is."""
        (key,) = keys
        return key

    def make_multi_step(self, make_step: MakeStep) -> MultiStep:
        """Maps a step over the devices; steps run one after another.

        Raises:
            ValueError: When called, if the number of devices does not divide the batch size.
        """
        step = make_step(axis_name=DATA)

        def take_share_of_step(
            state: Any, examples: Any, indices: Array, teachers: Any, key: Array
        ) -> tuple[Any, Metrics]:
            # Losses that compare examples, and the augmentation, need the whole batch.
            all_indices = lax.all_gather(indices, DATA, tiled=True)
            batch, info = _select(examples, all_indices)
            state, metrics = step(state, batch, teachers, key, info)
            return state, metrics

        # Summed gradients make the new state equal on all devices. Without an output axis it comes
        # back in the form in which it is passed in.
        mapped = jax.pmap(
            take_share_of_step, axis_name=DATA, in_axes=(None, None, 0, None, None), out_axes=None
        )

        def take_step(
            state: Any, examples: Any, indices: np.ndarray, teachers: Any, key: Array
        ) -> tuple[Any, Metrics]:
            count = jax.device_count()
            if len(indices) % count:
                raise ValueError(
                    f"pmap cannot divide a batch of {len(indices)} among {count} devices: choose a "
                    "multiple as the batch size, or a MeshPlacement, which pads"
                )
            shares = indices.reshape(count, -1)
            # Each process passes the shares of its own devices, in the global order of devices.
            local = [i for i, device in enumerate(jax.devices()) if device in jax.local_devices()]
            return mapped(state, examples, shares[local], teachers, key)

        return for_one_student(step_by_step(take_step, jax.device_count()))

    def make_predict(
        self,
        model: Model,
        *,
        buckets: LengthBuckets | None = None,
        read: Callable[[Outputs], Any] | None = None,
    ) -> Callable[[dict, Any], Any]:
        """Makes a function that predicts on the default device."""
        return make_predict(model, buckets=buckets, read=read)

    def _replicate(self, tree: Any) -> Any:
        # The second argument is there because pmap refuses to map nothing.
        return _make_copy()(tree, np.zeros(jax.local_device_count(), np.int32))


# Made once: a new function would be traced and compiled for every array.
@functools.cache
def _make_copy() -> Callable[..., Any]:
    """Makes a function that copies arrays to every device."""
    # `jax.device_put_replicated` is missing in the newest JAX.
    return jax.pmap(_get_first, in_axes=(None, 0), out_axes=None)


def _get_first(tree: Any, _: Array) -> Any:
    return tree


@dataclasses.dataclass(frozen=True)
class VectorizedPlacement:
    """Trains many students in one program that is vectorised over them.

    The students are divided among the devices, which do not communicate. Where the number of
    devices does not divide the number of students, the last student is trained more than once. An
    array that several students share is held once on every device. Each student gets the numbers of
    its training alone, to rounding.

    The devices may belong to several processes. Each process then holds the states of its own
    students. All states are gathered on every process for evaluations and checkpoints.

    Attributes:
        mesh: A mesh from `make_mesh`.
        max_students: The largest number of students that train in one program.
    """

    mesh: Mesh
    max_students: int

    def __post_init__(self) -> None:
        """Raises `ValueError` without a student, and `TypeError` unless it is an integer."""
        if not isinstance(self.max_students, (int, np.integer)) or self.max_students is True:
            raise TypeError(f"max_students must be an integer, got {self.max_students!r:.40}")
        if self.max_students < 1:
            raise ValueError(f"max_students must be at least 1, got {self.max_students}")

    @property
    def steps_per_call(self) -> int:
        """1 on a CPU, where XLA runs convolutions slowly inside a loop; more on accelerators."""
        return default_steps_per_call(self.mesh)

    def put_states(self, states: Sequence[Any]) -> Any:
        """Stacks the states along a new first axis, which is divided among the devices."""
        return self._stack(states)

    def get_states(self, states: Any, count: int) -> list[Any]:
        """Returns the states of the first `count` students, on the host."""
        # One transfer for all students; slices on the device would be a small program each.
        states = gather_from_processes(states)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(count)]

    def get_metrics(self, metrics: Sequence[Metrics], count: int) -> dict[str, np.ndarray]:
        """Returns the metrics of the first `count` students, `[K, count]`."""
        arrays = jax.tree.leaves(metrics)
        if all(isinstance(array, np.ndarray) or array.is_fully_addressable for array in arrays):
            return _join_metrics(metrics, count)
        # Joined before they are gathered: a collective operation for each call would be slow.
        return {
            name: sum_over_processes(
                np.concatenate([_own_part(call[name])[:, :count] for call in metrics])
            )
            for name in sorted(metrics[0])
        }

    def put_array(self, array: Any) -> Array:
        """Puts an array onto the default device."""
        return jnp.asarray(array)

    def put_examples(self, examples: Sequence[Any]) -> Any:
        """Copies the distinct arrays of all students to every device, each of them once."""
        return self._deduplicate(examples)

    def put_teachers(self, teachers: Sequence[Any]) -> Any:
        """Copies the distinct weights of all teachers to every device, each of them once."""
        return self._deduplicate(teachers)

    def put_keys(self, keys: Sequence[Array]) -> Array:
        """Stacks the keys like the states."""
        return self._stack(keys)

    def make_multi_step(self, make_step: MakeStep) -> MultiStep:
        """Compiles a step of all students; an accelerator takes several steps in one loop."""
        step = make_step()

        def take_step(
            state: Any, examples: Any, indices: Array, teachers: Any, key: Array
        ) -> tuple[Any, Metrics]:
            batch, info = _select(_get_own(examples), indices)
            state, metrics = step(state, batch, _get_own(teachers), key, info)
            return state, metrics

        # The distinct arrays are not mapped, so `jax.vmap` makes no copy of them for each student.
        # A student picks its own by its position.
        per_student = _Shared(None, 0)
        vectorized: Any = jax.vmap(take_step, in_axes=(0, per_student, 0, per_student, 0))
        if jax.__version_info__ < (0, 10):
            vectorized = _trace_without_mesh(vectorized)
        divided = PartitionSpec(*STUDENTS)
        shared = _Shared(PartitionSpec(), divided)
        sharded: Any = jax.shard_map(
            vectorized,
            mesh=self.mesh,
            in_specs=(divided, shared, divided, shared, divided),
            out_specs=divided,
            check_vma=False,
        )
        repeat = repeat_step(sharded, self.mesh.size, self.steps_per_call)

        def multi_step(
            states: Any, examples: Any, indices: np.ndarray, teachers: Any, keys: Any
        ) -> tuple[Any, Metrics]:
            indices = indices[:, self._fill(indices.shape[1])]
            return repeat(states, examples, indices, teachers, keys)

        return multi_step

    def make_predict(
        self,
        model: Model,
        *,
        buckets: LengthBuckets | None = None,
        read: Callable[[Outputs], Any] | None = None,
    ) -> Callable[[dict, Any], Any]:
        """Makes a function that predicts on the default device."""
        return make_predict(model, buckets=buckets, read=read)

    def _stack(self, trees: Sequence[Any]) -> Any:
        filled = [trees[i] for i in self._fill(len(trees))]
        sharding = self._sharding(*STUDENTS)
        return jax.tree.map(lambda *leaves: _put_whole(jnp.stack(leaves), sharding), *filled)

    def _deduplicate(self, trees: Sequence[Any]) -> "_Shared":
        def stack_distinct(*leaves: Any) -> Array:
            # Compared by identity: comparing values would read all of them.
            distinct = {id(leaf): jnp.asarray(leaf) for leaf in leaves}
            return _put_whole(jnp.stack(list(distinct.values())), self._sharding())

        def find_position(*leaves: Any) -> Array:
            # Dicts keep the order of first insertion, so the positions are those of
            # `stack_distinct`.
            positions = {leaf_id: i for i, leaf_id in enumerate(dict.fromkeys(map(id, leaves)))}
            position = np.array([positions[id(leaf)] for leaf in leaves], np.int32)
            return _put_whole(position[self._fill(len(leaves))], self._sharding(*STUDENTS))

        return _Shared(jax.tree.map(stack_distinct, *trees), jax.tree.map(find_position, *trees))

    def _fill(self, count: int) -> np.ndarray:
        """Returns student indices, with the last one repeated up to a multiple of the devices."""
        return np.minimum(np.arange(-(-count // self.mesh.size) * self.mesh.size), count - 1)

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))


class _Shared(NamedTuple):
    """Arrays that students may share.

    Attributes:
        distinct: For each array, its distinct values among the students, `[U, ...]`.
        position: For each array, the index of each student's value in `distinct`, `[P]`.
    """

    distinct: Any
    position: Any


def _get_own(shared: _Shared) -> Any:
    """Returns the arrays of one student. An array that all share gets no axis of students."""
    return jax.tree.map(
        lambda distinct, position: distinct[0] if len(distinct) == 1 else distinct[position],
        *shared,
    )


def _trace_without_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function that traces `function` as if on one device, and then computes the trace.

    The gradient of a convolution asks for the sharding of its kernel. Inside `jax.shard_map` there
    is one, and the `jax.vmap` of JAX 0.7 has no rule for a convolution that asks for a sharding.
    """

    def traced(*arguments: Any) -> Any:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            jaxpr, result = jax.make_jaxpr(function, return_shape=True)(*shapes)
        leaves = jaxpr_as_fun(jaxpr)(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(result), leaves)

    return traced


def _select(examples: Any, indices: Array) -> Any:
    """Selects the rows of a batch. Scalars are the same for every batch."""
    return jax.tree.map(lambda array: array[indices] if array.ndim else array, examples)


def _join_metrics(metrics: Sequence[Metrics], count: int) -> dict[str, np.ndarray]:
    """Joins metrics `[K, P]` that this process can read, without those that fill the devices up."""
    on_host = jax.device_get(list(metrics))
    return {
        name: np.concatenate([call[name][:, :count] for call in on_host]) for name in on_host[0]
    }


def _first_copy(tree: Any) -> Any:
    """Returns this process's first copy of arrays that every device holds whole."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _own_part(array: Any) -> np.ndarray:
    """Returns what this process adds to the sum over processes that is the whole array.

    Zeros take the place of what other processes hold, and of what the primary process adds.
    """
    part = np.zeros(array.shape, array.dtype)
    if isinstance(array, Array):
        for shard in array.addressable_shards:
            part[shard.index] = shard.data
    elif is_primary_process():
        part[...] = array
    return part


def _put_whole(array: Any, sharding: NamedSharding) -> Array:
    return _put(array, sharding, array.shape)


def _put(array: Any, sharding: NamedSharding, shape: Sequence[int]) -> Array:
    """Puts an array where a sharding says, repeating its last row up to the length of `shape`.

    Each process reads only its own part of the array.
    """
    # `put_examples` also passes the arrays that `DeviceArrays` has put there before.
    if isinstance(array, Array) and array.sharding == sharding and array.shape == tuple(shape):
        return array
    if sharding.is_fully_addressable and array.shape == tuple(shape):
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        # Callbacks return NumPy arrays, which cannot hold typed keys.
        data = jax.random.key_data(array)
        return jax.random.wrap_key_data(_put(data, sharding, (*shape, data.shape[-1])))

    def read(index: Any) -> np.ndarray:
        if not shape:
            return np.asarray(array)
        rows = np.arange(*index[0].indices(shape[0]))
        is_whole = len(rows) == len(array)
        part = array if is_whole else array[np.minimum(rows, len(array) - 1)]
        return np.asarray(part)[(slice(None), *index[1:])]

    return jax.make_array_from_callback(tuple(shape), sharding, read)
