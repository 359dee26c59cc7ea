"""Start and end of several processes that run one program, and values that they exchange."""

import contextlib
import json
import threading
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from jaxkd.distill import _fate
from jaxkd.runs import RunError

CONNECTION_SECONDS = 300
"""Time that processes wait for each other at the start."""
SILENCE_SECONDS = 30
"""Time after which a machine that does not answer counts as gone."""

# Of this process, which can join the others once: a list of one, or none without others.
_joined: list[_fate.Fate] = []


def initialize_distributed(
    coordinator: str,
    *,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = CONNECTION_SECONDS,
    silence: int = SILENCE_SECONDS,
) -> None:
    """Connects this process to the others, so that all their devices belong to one program.

    Call it before any other JAX function. Every process runs the same command and reads the same
    data, and puts its own share of the data onto its devices. Only the primary process writes
    files.

    When a process ends by an error or is killed, the others end within a few seconds, with one
    line and exit status 1. The same command then goes on from the newest checkpoint, also on fewer
    hosts. A process that has come to its end waits for the others.

    Args:
        coordinator: Address and port of the primary process, such as "10.0.0.1:1234". With "auto",
            `jax.distributed.initialize` detects it, as it can on TPU pods and under SLURM.
        num_processes: Number of processes. Not needed with "auto".
        process_id: Index of this process, from 0. Not needed with "auto".
        timeout: Seconds to wait for the other processes.
        silence: Seconds after which a machine that does not answer, such as one without power,
            counts as gone. With "auto", JAX finds out that a process has ended, and ends the others
            in about this time, with its own log.

    Raises:
        RunError: If they cannot be reached in that time, or "auto" finds no coordinator.

    References:
        Multi-process JAX, https://docs.jax.dev/en/latest/multi_process.html
    """
    errors: list[BaseException] = []

    def connect() -> None:
        # JAX ends the process with an abort when its own time is up, so it gets more.
        longer = timeout + 60
        try:
            if coordinator == "auto" or num_processes is None or process_id is None:
                address = None if coordinator == "auto" else coordinator
                jax.distributed.initialize(
                    address,
                    num_processes,
                    process_id,
                    initialization_timeout=longer,
                    heartbeat_timeout_seconds=silence,
                )
                return
            fate, address = _fate.join(
                coordinator, num_processes, process_id, timeout=longer, silence=silence
            )
            jax.distributed.initialize(
                address,
                num_processes,
                process_id,
                initialization_timeout=longer,
                coordinator_bind_address=address,
            )
            _joined.append(fate)
        except BaseException as error:
            errors.append(error)

    # In a thread, because the connection cannot be given up.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise RunError(
            f"the {num_processes or 'other'} processes did not connect to {coordinator} within "
            f"{timeout} s: check the address, and that each was started with its own process_id"
        )
    for error in errors:
        # XLA raises a `RuntimeError`, and JAX a `ValueError` if it detects nothing.
        if not isinstance(error, (RuntimeError, ValueError, OSError)):
            raise error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise RunError(f"no connection to the coordinator {coordinator}: {reason}") from error
    for fate in _joined:
        _fate.end_together(fate)


@contextlib.contextmanager
def share_fate() -> Generator[None]:
    """Ends the other processes if an error leaves the block in this one alone.

    `run_plan` uses it. Use it around a loop of your own, or around `main`, where it notices
    `sys.exit` as well. An error that is caught nowhere is noticed without it. If an operation fails
    because another process has ended, this process ends with one line instead of the error.

    Example:
        >>> from jaxkd import distill
        >>> with distill.share_fate():
        ...     pass
    """
    for fate in _joined:
        fate.start()
    try:
        yield
    except BaseException as error:
        for fate in _joined:
            fate.fail(error)
        raise


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
    if not jax.tree.leaves(tree):
        return json.loads(text), tree
    return json.loads(text), multihost_utils.broadcast_one_to_all(jax.device_get(tree))


def gather_from_processes(tree: Any) -> Any:
    """Returns the whole arrays of a tree on the host of every process.

    Args:
        tree: Arrays on the devices. Those whose parts are on the devices of several processes are
            gathered, so that all processes must call this function.
    """
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    # Array by array: all of them at once need not fit on one device.
    return multihost_utils.process_allgather(tree, tiled=True)


def sum_over_processes(array: np.ndarray) -> np.ndarray:
    """Returns the sum of the arrays of one shape that all processes pass."""
    from jax.experimental import multihost_utils

    return np.sum(multihost_utils.process_allgather(array), axis=0)
