"""Checkpoints of arrays that are either sound or do not count.

Orbax writes the arrays, and its folder appears in one rename. Because orbax restores a flipped bit
silently, a manifest of checksums is written beside the folder once that is complete. A folder
without a manifest, or with one that disagrees with it, does not count. The manifest also holds the
step and what the training is called, so that a checkpoint which was copied to another place does
not count there.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd._files import delete, describe_differences, write_atomically
from jaxkd._messages import first_line, list_some, shorten
from jaxkd.runs.errors import add_install_command

ATTEMPTS = 3
"""Number of times that a save is tried which orbax ends for taking too long.

It measures with a clock that a user or a time server may set forward.
"""
RETRY_SECONDS = 1.0
"""Time between two attempts."""

_STEP = r"0|[1-9][0-9]*"
"""The name of a checkpoint. `007` and digits of other scripts are none that `save` writes."""
# Orbax's barriers and its logger belong to the process: saves of two threads would wait for each
# other forever.
_ORBAX_LOCK = threading.Lock()


class ForeignCheckpointError(ValueError):
    """A sound checkpoint is that of another step or another training."""


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
        step: Step of the checkpoint.
        tree: The arrays.
        notes: The JSON values that were saved with them.
    """

    step: int
    tree: Any
    notes: dict[str, Any]


class OtherArraysError(ValueError):
    """A checkpoint has another structure, shapes or dtypes than what is to be restored.

    Attributes:
        differences: The first differences as text.
        notes: The notes of the checkpoint.
    """

    def __init__(self, checkpoint: Path, differences: str, notes: Mapping[str, Any]) -> None:
        """Makes the message."""
        super().__init__(
            f"checkpoint {checkpoint} has other arrays ({differences}): use the model and the "
            "optimizer with which it was saved, or another folder"
        )
        self.differences, self.notes = differences, notes


def save(
    folder: str | os.PathLike,
    step: int,
    tree: Any,
    *,
    notes: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> None:
    """Saves a tree of arrays as the newest checkpoint in a folder.

    Checkpoints of later steps are deleted: training that comes to this step has passed over them
    because they are damaged or foreign. Files that are not checkpoints are left alone. Ctrl-C takes
    effect after the save. Threads may save at the same time, each into a folder of its own; one
    waits for the other.

    Args:
        folder: The folder with the checkpoints of one training. It is created if absent.
        step: Step of the checkpoint. An older checkpoint of this step is replaced.
        tree: A pytree of arrays.
        notes: JSON values to save with the arrays.
        identity: JSON values that name the training, such as its seed. A checkpoint is restored
            only under the same ones.
        keep: Number of the newest checkpoints that are kept. With two, one may become damaged.

    Raises:
        ValueError: If `step` or `keep` is not an integer, `step` is below 0 or `keep` below 1.
        OSError: If the checkpoint cannot be written. Those of earlier steps are kept.
        ImportError: If orbax is missing.
    """
    step = _check_integer("step", step, 0)
    keep = _check_integer("keep", keep, 1)
    # Orbax refuses relative paths.
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with _delay_interrupts(), _ORBAX_LOCK:
        _save(folder, step, tree, notes or {}, identity or {}, keep)


def restore(
    folder: str | os.PathLike, like: Any, *, identity: Mapping[str, Any] | None = None
) -> Restored | None:
    """Restores the newest sound checkpoint in a folder.

    A checkpoint that is damaged, or that is one of another training or step, is passed over with a
    warning.

    Args:
        folder: The folder with the checkpoints of one training.
        like: A tree with the structure, shapes and dtypes that were saved. The leaves are arrays or
            `jax.ShapeDtypeStruct`.
        identity: The identity with which it was saved. A checkpoint that was saved without one, or
            by an older version, has any. `None` takes every checkpoint.

    Returns:
        The checkpoint, its leaves placed as those of `like`, or `None` if there is no sound one.

    Raises:
        ValueError: If the newest sound checkpoint has another structure, shape or dtype, or the
            folder is that of one checkpoint or of a run.
        ImportError: If orbax is missing.
    """
    folder = Path(folder).absolute()
    _check_folder(folder)
    newest = _find_newest_sound(folder, _find_steps(folder), identity)
    if newest is None:
        return None
    step, manifest = newest
    saved = manifest["tree"]
    expected = _describe_tree(like)
    if saved != expected:
        # A few paths are enough, of possibly hundreds.
        differences = shorten(describe_differences(saved, expected, limit=2), 120)
        raise OtherArraysError(folder / str(step), differences, manifest["notes"])
    with _ORBAX_LOCK, _make_checkpointer() as checkpointer:
        tree = checkpointer.restore(folder / str(step), jax.tree.map(_to_abstract, like))
    return Restored(step, tree, manifest["notes"])


def load(
    folder: str | os.PathLike,
    *,
    step: int | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Restored | None:
    """Loads a checkpoint into host memory, whatever its structure: the newest sound one by default.

    A checkpoint that is damaged, or that is one of another training or step, is passed over with a
    warning.

    Args:
        folder: The folder with the checkpoints of one training.
        step: The step of the checkpoint, among those that `run_plan(keep=...)` has kept.
        identity: As for `restore`.

    Returns:
        The checkpoint with a tree of nested dicts and lists of NumPy arrays, or `None` if there is
        no sound one.

    Raises:
        ValueError: If the folder is that of one checkpoint or of a run, or has no checkpoint of the
            step.
        ImportError: If orbax is missing.
    """
    folder = Path(folder).absolute()
    _check_folder(folder)
    steps = _find_steps(folder)
    if step is not None:
        if step not in steps:
            found = f"only those of {list_some(steps)}" if steps else "none at all"
            raise ValueError(f"{folder} has no checkpoint of step {step!r:.20}, {found}")
        steps = [step]
    newest = _find_newest_sound(folder, steps, identity)
    if newest is None:
        return None
    step, manifest = newest
    with add_install_command():
        import orbax.checkpoint as ocp

    with _ORBAX_LOCK, ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder / str(step)).item_metadata.tree
        # By default orbax would place the arrays on devices like those of the run that saved them,
        # which this process need not have.
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(folder / str(step), restore_args=on_host)
    return Restored(step, tree, manifest["notes"])


def _check_integer(name: str, value: Any, minimum: int) -> int:
    """Returns an integer of Python. A fraction or a truth value is not one, even if it is whole."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return int(value)


@contextlib.contextmanager
def _delay_interrupts() -> Generator[None]:
    """Delays Ctrl-C until the end of the block.

    After an interrupted save, orbax's threads would continue to write.
    """
    # Only the main thread receives signals and may handle them.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupts = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupts:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _silence_orbax() -> Generator[None]:
    """Keeps orbax from logging the traceback of an error that it also raises."""
    logger = logging.getLogger("absl")
    disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = disabled


def _to_os_error(error: ValueError, path: Path) -> OSError:
    """Extracts the OS error from orbax's message, which fills a page."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None:
        return OSError(f"{path} cannot be written: {first_line(error)}")
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path))


def _save(
    folder: Path,
    step: int,
    tree: Any,
    notes: Mapping[str, Any],
    identity: Mapping[str, Any],
    keep: int,
) -> None:
    # The manifest is the last file to be written and the first to be deleted: while it is there,
    # the folder is complete.
    delete(_manifest_path(folder, step))
    _write_arrays(folder / str(step), tree)
    content = {
        "step": step,
        "identity": dict(identity),
        "files": _compute_checksums(folder / str(step)),
        "tree": _describe_tree(tree),
        "notes": dict(notes),
    }
    manifest = {"sha256": _digest(content), **content}
    write_atomically(_manifest_path(folder, step), _encode(manifest))
    # Only now that the new checkpoint counts may the others be deleted.
    _delete_others(folder, [number for number in _find_steps(folder) if number <= step][:keep])


def _write_arrays(path: Path, tree: Any) -> None:
    """Writes the folder of a checkpoint, and tries again if orbax says that it took too long."""
    for attempt in range(1, ATTEMPTS + 1):
        # What an earlier attempt or another process left: orbax would refuse to write over it.
        for leftover in (path, *path.parent.glob(f"{path.name}.orbax-checkpoint-tmp*")):
            delete(leftover)
        try:
            with _silence_orbax(), _make_checkpointer() as checkpointer:
                checkpointer.save(path, tree)
                # `save` returns while threads still write, but the checksums are those of complete
                # files.
                checkpointer.wait_until_finished()
            return
        except TimeoutError as error:  # an OSError, but none that says more
            if attempt == ATTEMPTS:
                message = f"orbax took too long {ATTEMPTS} times ({first_line(error)})"
                raise OSError(errno.ETIMEDOUT, message, str(path)) from error
            warnings.warn(
                f"{path} took too long to write, or the clock was set: trying again", stacklevel=4
            )
            # Threads of this attempt may still write under the same name.
            time.sleep(RETRY_SECONDS)
        except ValueError as error:  # orbax raises it even for a full disk
            raise _to_os_error(error, path) from error


def _delete_others(folder: Path, steps: list[int]) -> None:
    """Deletes all checkpoints but those of some steps, and what killed processes left of others."""
    for path in folder.iterdir():
        # A kill leaves `.7.json.<random>.tmp` in the middle of `write_atomically`, and
        # `7.orbax-checkpoint-tmp` in the middle of orbax's save.
        match = re.match(r"\.?([0-9]+)($|\.json|\.orbax-checkpoint-tmp)", path.name)
        if match is None:
            continue
        step = match[1]
        # Compared as text, because `007` is another name than `7`.
        if step not in map(str, steps) or path.name not in (step, f"{step}.json"):
            delete(path)


def _find_newest_sound(
    folder: Path, steps: Sequence[int], identity: Mapping[str, Any] | None
) -> tuple[int, dict[str, Any]] | None:
    """Returns the step and the manifest of the first sound checkpoint among some steps."""
    for step in steps:
        try:
            return step, _read_sound_manifest(folder, step, identity)
        # A deeply nested manifest is a `RecursionError`.
        except (ValueError, OSError, RecursionError) as error:
            kind = "foreign" if isinstance(error, ForeignCheckpointError) else "damaged"
            warnings.warn(
                f"checkpoint {folder / str(step)} is {kind} and passed over: {first_line(error)}",
                stacklevel=3,
            )
    return None


def _check_folder(folder: Path) -> None:
    """Raises `ValueError` if a folder holds no checkpoints, but the one above or below it does."""
    is_step = re.fullmatch(_STEP, folder.name) is not None
    if is_step and _manifest_path(folder.parent, int(folder.name)).is_file():
        raise ValueError(
            f"{folder} is one checkpoint: name the folder {folder.parent} of the training"
        )
    if (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        raise ValueError(
            f"{folder} is the folder of a run: name that of a training in it, "
            "run.checkpoint_folder(seed, stage)"
        )


def _read_sound_manifest(
    folder: Path, step: int, identity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns a checkpoint's manifest, or raises `ValueError` if it is damaged or foreign."""
    path = _manifest_path(folder, step)
    if not path.is_file():  # reading a pipe would never end
        raise ValueError("its manifest is not a file")
    content = path.read_bytes()
    manifest = json.loads(content)
    # Parsing hides some flipped bits: 1e-5 and 1E-5 are one bit apart.
    if not isinstance(manifest, dict) or content != _encode(manifest):
        raise ValueError("its manifest is not as it was written")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError("its manifest differs from its checksum")
    if not all(isinstance(manifest.get(name), dict) for name in ("files", "tree", "notes")):
        raise ValueError("its manifest is not that of a checkpoint")
    _check_identity(manifest, step, identity)
    if manifest["files"] != _compute_checksums(folder / str(step)):
        raise ValueError("its files differ from their checksums")
    return manifest


def _check_identity(
    manifest: Mapping[str, Any], step: int, identity: Mapping[str, Any] | None
) -> None:
    """Raises `ForeignCheckpointError` if a checkpoint was saved as another step or training."""
    # Manifests of older versions have neither.
    saved_step = manifest.get("step", step)
    if saved_step != step:
        raise ForeignCheckpointError(f"it was saved as step {saved_step!r}")
    saved = manifest.get("identity")
    if saved and identity is not None and saved != dict(identity):
        differences = describe_differences(saved, identity) if isinstance(saved, dict) else saved
        raise ForeignCheckpointError(f"it is that of another training ({differences})")


def _make_checkpointer() -> Any:
    with add_install_command():
        import orbax.checkpoint as ocp

    # By default orbax waits for all processes, but only the primary one saves.
    active_processes = {jax.process_index()} if jax.process_count() > 1 else None
    options = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes=active_processes
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _to_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe_tree(tree: Any) -> dict[str, str]:
    """Returns dtype and shape of each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _encode(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest_path(folder: Path, step: int) -> Path:
    return folder / f"{step}.json"


def _find_steps(folder: Path) -> list[int]:
    """Returns the steps that have a manifest, newest first."""
    stems = (path.stem for path in folder.glob("*.json"))
    return sorted((int(s) for s in stems if re.fullmatch(_STEP, s)), reverse=True)


def _compute_checksums(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }
