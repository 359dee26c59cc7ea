"""Start-up of several processes that run one program, and values of the primary process."""

import json
from typing import Any

import jax
import numpy as np


def initialize_distributed(
    coordinator: str, *, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process to the others, so that all their devices belong to one program.

    Call it before any other JAX function. Every process runs the same command and reads the same
    data, and puts its own share of the data onto its devices. Only the primary process writes
    files.

    Args:
        coordinator: Address and port of the primary process, such as "10.0.0.1:1234". With "auto",
            `jax.distributed.initialize` detects it, as it can on TPU pods and under SLURM.
        num_processes: Number of processes. Not needed with "auto".
        process_id: Index of this process, from 0. Not needed with "auto".

    References:
        Multi-process JAX, https://docs.jax.dev/en/latest/multi_process.html
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(coordinator, num_processes, process_id)


def is_primary_process() -> bool:
    """Returns whether this process writes the run's files."""
    return jax.process_index() == 0


def broadcast_from_primary(value: Any, tree: Any) -> tuple[Any, Any]:
    """Gives every process the values of the primary process.

    Args:
        value: A JSON value. Only that of the primary process counts.
        tree: Arrays. All processes pass the same structure, shapes and dtypes.

    Returns:
        The value and the tree of the primary process, the latter as arrays on the host.
    """
    if jax.process_count() == 1:
        return value, tree
    from jax.experimental import multihost_utils

    # Broadcasts need equal shapes everywhere, so the length of the text is sent first.
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = text if is_primary_process() else np.zeros(length, np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes()
    return json.loads(text), multihost_utils.broadcast_one_to_all(jax.device_get(tree))
