"""One training step on one device, on many, and on those of many hosts.

`Sharded` runs it as one program over a mesh: each device computes its part of the batch, and batch statistics, losses
that compare examples and gradients are those of the whole batch, as on one device. `Mapped` is the same by `jax.pmap`.
`Population` trains many students at once, each as if it were alone. Each says where arrays lie and how steps run.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, MODEL = "data", "model"
"""Names of the mesh's axes."""
STUDENTS = ((DATA, MODEL),)
"""How a population lies on them."""
CHUNK = 32
"""Steps that an accelerator takes at once."""
IN_FLIGHT = 8
"""Steps that wait on several virtual CPU devices; JAX up to 0.11.2 deadlocks from about 32 on."""

MakeStep = Callable[..., Callable[..., Any]]
"""`jaxkd.train.make_train_step` with all but its `axis_name`."""

Advance = Callable[[Any, Any, np.ndarray, Any, Array], tuple[Any, Array]]
"""`(state, examples, indices [K, B], teacher_variables, key) -> (state, losses [K])`: takes K steps.

Examples are arrays of which a batch is a selection; those without an axis are the same for every batch. A population
has one more axis for its students, P: behind K, and before all others.
"""


def make_mesh(*, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in rows of `model` each, over which large teachers are divided.

    Args:
        model: Devices over which a teacher's weights are divided; at 1 each device holds all of them.
        devices: Which; by default all, those of other hosts included.

    Returns:
        A mesh with the axes "data" and "model".

    Raises:
        ValueError: If the devices do not fill rows of this length.

    Example:
        >>> import jax
        >>> from jaxkd import parallel
        >>> dict(parallel.make_mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if model < 1 or len(devices) % model:
        raise ValueError(f"{len(devices)} devices cannot be divided into rows of {model}")
    return jax.make_mesh((len(devices) // model, model), (DATA, MODEL), (AxisType.Auto,) * 2, devices=devices)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Runs each step as one program over a mesh, with the batch divided over all its devices.

    A batch may have any size; where the devices do not divide it, XLA pads and masks. The examples are divided as well,
    so that each device, and each host, holds its part of the data set alone, of which a step gathers its batch.

    Attributes:
        mesh: From `make_mesh`.
    """

    mesh: Mesh

    @property
    def chunk(self) -> int:
        """How many steps to take at once: one on a CPU, where XLA runs convolutions slower inside a loop."""
        return _chunk(self.mesh)

    def place(self, tree: Any) -> Any:
        """Puts arrays on every device, whole, such as a student's state."""
        return jax.tree.map(lambda leaf: _put(leaf, self._sharding(), leaf.shape), tree)

    def place_examples(self, array: Any) -> Array:
        """Divides examples `[N, ...]` over all devices; where they do not divide N, the last one is repeated."""
        if not np.ndim(array):
            return _put(jnp.asarray(array), self._sharding(), ())
        count = -(-len(array) // self.mesh.size) * self.mesh.size
        return _put(array, self._sharding((DATA, MODEL)), (count, *array.shape[1:]))

    def place_teacher(self, variables: Any) -> Any:
        """Divides each array over the mesh's second axis along its longest axis that this divides; others are whole."""
        size = self.mesh.shape[MODEL]

        def divided(leaf: Any) -> Array:
            axes = [axis for axis, length in enumerate(leaf.shape) if size > 1 and length % size == 0]
            spec: list[str | None] = [None] * len(leaf.shape)
            if axes:
                spec[max(axes, key=lambda axis: leaf.shape[axis])] = MODEL
            return _put(leaf, self._sharding(*spec), leaf.shape)

        return jax.tree.map(divided, variables)

    def make_advance(self, make_step: MakeStep) -> Advance:
        """Makes the function that takes steps: on a CPU one after the other, elsewhere in one loop on the device.

        The loop's number of turns is an argument, so that it compiles once for all numbers of steps.
        """
        step = make_step()

        def constrained(array: Array) -> Array:
            return lax.with_sharding_constraint(array, self._sharding((DATA, MODEL))) if array.ndim else array

        def one(state: Any, examples: Any, indices: Array, teachers: Any, key: Array) -> tuple[Any, Array]:
            batch = jax.tree.map(constrained, _take(examples, indices))
            state, metrics = step(state, batch, teachers, key)
            return lax.with_sharding_constraint(state, self._sharding()), metrics["loss"]

        return _make_advance(one, self.mesh.size, self.chunk)

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Runs each step by `jax.pmap`, on all devices, which must divide the batch.

    Every device holds all examples and all weights. It augments the whole batch, computes on its part, and the loss
    sees the outputs of all, so that losses that compare examples are those of the whole batch.
    `jaxkd.models.BatchNorm` takes the statistics of the whole batch; another's must name the axis "data".
    """

    chunk = 1
    """How many steps to take at once."""

    def place(self, tree: Any) -> Any:
        """Puts arrays on every device, whole."""
        same = jax.pmap(lambda tree, _: tree, in_axes=(None, 0), out_axes=None)
        return same(tree, np.zeros(jax.local_device_count(), np.int32))

    def place_examples(self, array: Any) -> Array:
        """Puts examples `[N, ...]` on every device."""
        return self.place(jnp.asarray(array))

    def place_teacher(self, variables: Any) -> Any:
        """Puts a teacher's weights on every device."""
        return self.place(variables)

    def make_advance(self, make_step: MakeStep) -> Advance:
        """Makes the function that takes steps one after the other.

        Raises:
            ValueError: From the function, if the devices do not divide the batch.
        """
        step = make_step(axis_name=DATA)

        def one(state: Any, examples: Any, indices: Array, teachers: Any, key: Array) -> tuple[Any, Array]:
            whole = lax.all_gather(indices, DATA, tiled=True)
            state, metrics = step(state, _take(examples, whole), teachers, key)
            return state, metrics["loss"]

        mapped = jax.pmap(one, axis_name=DATA, in_axes=(None, None, 0, None, None), out_axes=None)

        def taken(state: Any, examples: Any, indices: np.ndarray, teachers: Any, key: Array) -> tuple[Any, Array]:
            count = jax.device_count()
            if len(indices) % count:
                raise ValueError(
                    f"pmap divides a batch of {len(indices)} into equal parts for {count} devices, which it cannot: "
                    "choose another batch size, or jit, which pads"
                )
            parts = indices.reshape(count, -1)
            here = [i for i, device in enumerate(jax.devices()) if device.process_index == jax.process_index()]
            return mapped(state, examples, parts[here], teachers, key)

        return _one_by_one(taken, jax.device_count())


@dataclasses.dataclass(frozen=True)
class Population:
    """Trains many students at once, as one program that is vectorised over them, each as it would train alone.

    They are divided over the devices, which do not talk to each other; where the devices do not divide their number,
    the last one is trained more than once. What several of them learn from is held once on every device. A student's
    numbers are those of its training alone, to rounding.

    Attributes:
        mesh: From `make_mesh`, of this host's devices.
        size: How many students train at once, at most.
    """

    mesh: Mesh
    size: int

    def __post_init__(self) -> None:
        """Raises `ValueError` if there is nobody to train, or if devices are another host's."""
        if self.size < 1:
            raise ValueError(f"a population needs at least one student, not {self.size}")
        if jax.process_count() > 1:
            raise ValueError("a population trains on one host's devices: start a run on each host, with its own seeds")

    @property
    def chunk(self) -> int:
        """How many steps to take at once, as for `Sharded`."""
        return _chunk(self.mesh)

    def stack(self, trees: Sequence[Any]) -> Any:
        """Puts trees of one structure, one a student, onto the devices, along a new first axis."""
        filled = [trees[i] for i in self._filled(len(trees))]
        return jax.tree.map(lambda *leaves: jax.device_put(jnp.stack(leaves), self._sharding(*STUDENTS)), *filled)

    def unstack(self, tree: Any, count: int) -> list[Any]:
        """The first `count` students' trees, on the host."""
        tree = jax.device_get(tree)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]

    def gather(self, trees: Sequence[Any]) -> Any:
        """Puts what students learn from onto the devices; an array that several of them share is put there once."""

        def stacked(*leaves: Any) -> Array:
            different = {id(leaf): jnp.asarray(leaf) for leaf in leaves}
            return jax.device_put(jnp.stack(list(different.values())), self._sharding())

        def which(*leaves: Any) -> Array:
            places = {identity: i for i, identity in enumerate(dict.fromkeys(map(id, leaves)))}
            chosen = np.array([places[id(leaf)] for leaf in leaves], np.int32)[self._filled(len(leaves))]
            return jax.device_put(chosen, self._sharding(*STUDENTS))

        return _Chosen(jax.tree.map(stacked, *trees), jax.tree.map(which, *trees))

    def make_advance(self, make_step: MakeStep) -> Advance:
        """Makes the function that takes steps of all students, in a loop on the device where that is faster.

        States and keys are from `stack`, examples and teachers from `gather`.
        """
        step = make_step()

        def one(state: Any, examples: Any, indices: Array, teachers: Any, key: Array) -> tuple[Any, Array]:
            state, metrics = step(state, _take(_choose(examples), indices), _choose(teachers), key)
            return state, metrics["loss"]

        chosen = _Chosen(None, 0)
        each = jax.vmap(one, in_axes=(0, chosen, 0, chosen, 0))
        students, everywhere = PartitionSpec(*STUDENTS), PartitionSpec()
        divided = _Chosen(everywhere, students)
        parts: Any = jax.shard_map(
            each,
            mesh=self.mesh,
            in_specs=(students, divided, students, divided, students),
            out_specs=students,
            check_vma=False,
        )
        taken = _make_advance(parts, self.mesh.size, self.chunk)

        def advance(state: Any, examples: Any, indices: np.ndarray, teachers: Any, key: Array) -> tuple[Any, Array]:
            count = indices.shape[1]
            state, losses = taken(state, examples, indices[:, self._filled(count)], teachers, key)
            return state, losses[:, :count]

        return advance

    def _filled(self, count: int) -> np.ndarray:
        """Students' numbers, filled up by the last to a multiple of the devices."""
        return np.minimum(np.arange(-(-count // self.mesh.size) * self.mesh.size), count - 1)

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))


class _Chosen(NamedTuple):
    """For each array the different ones among students, `[U, ...]`, and which of them is whose, `[P]`."""

    different: Any
    which: Any


def join_hosts(coordinator: str, *, num_hosts: int | None = None, host: int | None = None) -> None:
    """Makes the devices of several hosts those of one program, in which every host runs the same command.

    Call it before anything else of JAX. Every host reads the same data and gets its part of it onto its devices; the
    first one alone writes.

    Args:
        coordinator: Address and port of the first host, such as "10.0.0.1:1234"; "auto" on TPU pods, under SLURM and
            wherever else `jax.distributed.initialize` finds out by itself.
        num_hosts: How many there are.
        host: Which of them this is, from 0.

    References:
        Multi-process JAX, https://docs.jax.dev/en/latest/multi_process.html
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(coordinator, num_hosts, host)


def is_first_host() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def tell_all(value: Any, tree: Any) -> tuple[Any, Any]:
    """Gives every host what the first one has.

    Args:
        value: A JSON value; what the others give does not count.
        tree: Arrays, on the others of the same structure, shapes and dtypes.

    Returns:
        The first host's value and, as arrays on the host, its tree.
    """
    if jax.process_count() == 1:
        return value, tree
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(length, np.uint8) if not is_first_host() else text
    text = np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes()
    return json.loads(text), multihost_utils.broadcast_one_to_all(jax.device_get(tree))


def local(tree: Any) -> Any:
    """The first of this host's copies of arrays that every device holds whole."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def _take(examples: Any, indices: Array) -> Any:
    return jax.tree.map(lambda array: array[indices] if array.ndim else array, examples)


def _choose(chosen: _Chosen) -> Any:
    """A student's own of what `Population.gather` put together; what all share stays without an axis for them."""
    return jax.tree.map(lambda different, which: different[0] if len(different) == 1 else different[which], *chosen)


def _chunk(mesh: Mesh) -> int:
    return 1 if mesh.devices.flat[0].platform == "cpu" else CHUNK


def _make_advance(one: Callable[..., tuple[Any, Array]], devices: int, chunk: int) -> Advance:
    """Steps on a CPU one after the other, elsewhere in one loop on the device.

    The loop's number of turns is an argument, so that it compiles once for all numbers of steps.
    """
    if chunk == 1:
        return _one_by_one(jax.jit(one, donate_argnums=0), devices)

    @functools.partial(jax.jit, donate_argnums=0)
    def many(state: Any, examples: Any, indices: Array, count: Array, teachers: Any, key: Array) -> tuple[Any, Array]:
        def turn(i: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
            state, losses = carry
            state, loss = one(state, examples, indices[i], teachers, key)
            return state, losses.at[i].set(loss)

        return lax.fori_loop(0, count, turn, (state, jnp.zeros(indices.shape[:-1], jnp.float32)))

    def advance(state: Any, examples: Any, indices: np.ndarray, teachers: Any, key: Array) -> tuple[Any, Array]:
        count, room = len(indices), -(-len(indices) // CHUNK) * CHUNK
        padded = np.concatenate([indices, np.zeros((room - count, *indices.shape[1:]), indices.dtype)])
        state, losses = many(state, examples, padded, np.int32(count), teachers, key)
        return state, losses[:count]

    return advance


def _put(array: Any, sharding: NamedSharding, shape: Sequence[int]) -> Array:
    """An array where a sharding wants it, of a longer first axis by its last entry; each host reads its part alone."""
    if sharding.is_fully_addressable and array.shape == tuple(shape):
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(array), sharding, (2,)))

    def read(index: Any) -> np.ndarray:
        if not shape:
            return np.asarray(array)
        rows = np.arange(*index[0].indices(shape[0]))
        whole = len(rows) == len(array)
        return np.asarray(array if whole else array[np.minimum(rows, len(array) - 1)])[(slice(None), *index[1:])]

    return jax.make_array_from_callback(tuple(shape), sharding, read)


def _one_by_one(one: Callable[..., tuple[Any, Array]], devices: int) -> Advance:
    def advance(state: Any, examples: Any, indices: np.ndarray, teachers: Any, key: Array) -> tuple[Any, Array]:
        losses = []
        for number, chosen in enumerate(indices):
            state, loss = one(state, examples, chosen, teachers, key)
            losses.append(loss)
            if devices > 1 and number % IN_FLIGHT == 0:
                jax.block_until_ready(loss)
        return state, jnp.stack(losses)

    return advance
