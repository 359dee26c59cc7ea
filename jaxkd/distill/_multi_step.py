"""Functions that take several training steps: in one loop on a device, or step by step."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

STEPS_PER_CALL = 32
"""Number of steps that run in one loop on an accelerator."""
MAX_STEPS_IN_FLIGHT = 8
"""Largest number of steps queued on several devices. On CPUs, JAX up to 0.11.2 deadlocks from
about 32 on."""

Metrics = Mapping[str, Any]
"""The `loss` and its terms by name, `[K, P]` for K steps of P students."""

MultiStep = Callable[[Any, Any, np.ndarray, Any, Any], tuple[Any, Metrics]]
"""`(states, examples, indices [K, P, B], teachers, keys) -> (states, metrics [K, P])`.

Takes K steps of P students. `indices` select the examples of each step's batch; `[K, 1]`, they
select whole batches that `StreamingPlacement.put_batches` put onto the devices. A placement that
fills its devices up adds columns of metrics at the end; `Placement.get_metrics` drops them.
"""


def for_one_student(repeat: Callable[..., tuple[Any, Metrics]]) -> MultiStep:
    """Adds the axis of students to a function `indices [K, B] -> metrics [K]`."""

    def multi_step(
        states: Any, examples: Any, indices: np.ndarray, teachers: Any, keys: Any
    ) -> tuple[Any, Metrics]:
        states, metrics = repeat(states, examples, indices[:, 0], teachers, keys)
        return states, {name: values[:, None] for name, values in metrics.items()}

    return multi_step


def repeat_step(
    take_step: Callable[..., tuple[Any, Metrics]], num_devices: int, steps_per_call: int
) -> Callable[..., tuple[Any, Metrics]]:
    """Compiles a step and repeats it: in one loop on an accelerator, one by one on a CPU."""
    if steps_per_call == 1:
        return step_by_step(jax.jit(take_step, donate_argnums=0), num_devices)

    # The number of steps is an argument, so that one program serves every number of steps.
    @functools.partial(jax.jit, donate_argnums=0)
    def loop(
        state: Any, examples: Any, indices: Array, count: Array, teachers: Any, key: Array
    ) -> tuple[Any, Metrics]:
        def body(i: Array, carry: tuple[Any, Metrics]) -> tuple[Any, Metrics]:
            state, metrics = carry
            state, new = take_step(state, examples, indices[i], teachers, key)
            return state, jax.tree.map(lambda all, value: all.at[i].set(value), metrics, new)

        # Traced for the names of the terms.
        _, shapes = jax.eval_shape(take_step, state, examples, indices[0], teachers, key)
        # Whole batches that were read for the steps are selected by one index each.
        shape = indices.shape[: max(1, indices.ndim - 1)]
        zeros = {name: jnp.zeros(shape, jnp.float32) for name in shapes}
        return lax.fori_loop(0, count, body, (state, zeros))

    def repeat(
        state: Any, examples: Any, indices: np.ndarray, teachers: Any, key: Array
    ) -> tuple[Any, Metrics]:
        count = len(indices)
        # The loop has one shape of indices, so that it compiles once. Steps beyond `count` do not
        # run.
        padding = -count % STEPS_PER_CALL
        zeros = np.zeros((padding, *indices.shape[1:]), indices.dtype)
        padded = np.concatenate([indices, zeros])
        state, metrics = loop(state, examples, padded, np.int32(count), teachers, key)
        return state, {name: values[:count] for name, values in metrics.items()}

    return repeat


def step_by_step(
    take_step: Callable[..., tuple[Any, Metrics]], num_devices: int
) -> Callable[..., tuple[Any, Metrics]]:
    # Counted over all calls: a call may take only one step.
    num_steps = itertools.count(1)

    def repeat(
        state: Any, examples: Any, indices: np.ndarray, teachers: Any, key: Array
    ) -> tuple[Any, Metrics]:
        metrics = []
        for batch_indices in indices:
            state, step_metrics = take_step(state, examples, batch_indices, teachers, key)
            metrics.append(step_metrics)
            # A single device cannot wait for another one, so that its queue may grow.
            if num_devices > 1 and next(num_steps) % MAX_STEPS_IN_FLIGHT == 0:
                jax.block_until_ready(step_metrics)
        return state, {name: jnp.stack([m[name] for m in metrics]) for name in metrics[0]}

    return repeat


def default_steps_per_call(mesh: jax.sharding.Mesh) -> int:
    """Returns 1 on a CPU, where XLA runs convolutions slowly inside a loop, and more elsewhere."""
    return 1 if is_on_cpu(mesh) else STEPS_PER_CALL


def is_on_cpu(mesh: jax.sharding.Mesh) -> bool:
    """Returns whether the devices of a mesh are those of CPUs."""
    return mesh.devices.flat[0].platform == "cpu"
