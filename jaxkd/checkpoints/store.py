"""Checkpoints that are either sound or not there.

Orbax writes the arrays and makes the folder appear in one rename. It restores a flipped bit without a word, so a
manifest of checksums is written beside the folder once it is complete; what has no manifest, or disagrees with it, does
not count.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class Restored(NamedTuple):
    """A checkpoint as it was found.

    Attributes:
        step: Its number.
        tree: The arrays, in the structure that was asked for.
        notes: What was saved beside them.
    """

    step: int
    tree: Any
    notes: dict


def save(
    folder: str | os.PathLike, step: int, tree: Any, *, notes: Mapping[str, Any] | None = None, keep: int = 2
) -> None:
    """Saves a tree of arrays as the newest checkpoint of a folder.

    Checkpoints of higher numbers go: they were damaged, or passed over, if training has come to this one. Nothing in
    the folder is touched that is no checkpoint.

    Args:
        folder: Holds the checkpoints of one training; made if absent.
        step: Number of the checkpoint; an older one of this number is replaced.
        tree: Any pytree of arrays.
        notes: Small JSON values to keep beside it.
        keep: How many of the newest checkpoints stay: with two, one may be damaged.

    Raises:
        OSError: If it cannot be written; the checkpoints of lower numbers still stand.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with _uninterrupted():
        _save(folder, step, tree, notes or {}, keep)


def restore(folder: str | os.PathLike, like: Any) -> Restored | None:
    """Restores the newest sound checkpoint of a folder.

    A damaged one is passed over with a warning, for the one before it.

    Args:
        folder: Holds the checkpoints of one training.
        like: A tree of arrays, or of `jax.ShapeDtypeStruct`, in the structure that was saved.

    Returns:
        The checkpoint, or `None` if there is no sound one.

    Raises:
        ValueError: If the newest sound one has another structure, other shapes or other dtypes.
    """
    folder = Path(folder).absolute()
    found = _newest_sound(folder)
    if found is None:
        return None
    step, manifest = found
    there, here = manifest["tree"], _describe(like)
    if there != here:
        differing = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        listed = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing[:3])
        raise ValueError(f"checkpoint {folder / str(step)} is of another tree ({listed})")
    with _checkpointer() as checkpointer:
        tree = checkpointer.restore(folder / str(step), jax.tree.map(_abstract, like))
    return Restored(step, tree, manifest["notes"])


def load(folder: str | os.PathLike) -> Restored | None:
    """Loads the newest sound checkpoint of a folder onto the host, whatever its structure.

    A damaged one is passed over with a warning, for the one before it.

    Args:
        folder: Holds the checkpoints of one training.

    Returns:
        The checkpoint, its tree nested dicts and lists of NumPy arrays, or `None` if there is no sound one.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    found = _newest_sound(folder)
    if found is None:
        return None
    step, manifest = found
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder / str(step)).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(folder / str(step), restore_args=on_host)
    return Restored(step, tree, manifest["notes"])


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file so that, whenever the process dies, it holds all of its old or all of its new content.

    Args:
        path: The file; its folder exists.
        content: The new content.

    Raises:
        OSError: If it cannot be written; the old content still stands.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Generator[None]:
    """Has an error of writing say which file it is about, as one of opening does; a full disk names none by itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def _uninterrupted() -> Generator[None]:
    """Puts Ctrl-C off to the end of the block; orbax's threads would go on writing behind an interrupted save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []
    before = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _unlogged() -> Generator[None]:
    """Keeps orbax from logging the traceback of an error that it raises as well."""
    logger = logging.getLogger("absl")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _os_error(error: ValueError, path: Path) -> OSError:
    """The system's error out of the page that orbax says on it."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None:
        return OSError(f"{path} cannot be written: {_first_line(error)}")
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path))


def _save(folder: Path, step: int, tree: Any, notes: Mapping[str, Any], keep: int) -> None:
    _remove(folder, step)
    try:
        with _unlogged(), _checkpointer() as checkpointer:
            checkpointer.save(folder / str(step), tree)
            checkpointer.wait_until_finished()
    except ValueError as error:  # what orbax makes of a full disk
        raise _os_error(error, folder / str(step)) from error
    content = {"files": _checksums(folder / str(step)), "tree": _describe(tree), "notes": dict(notes)}
    write_atomically(_manifest(folder, step), _as_bytes({"sha256": _digest(content), **content}))
    kept = [number for number in _steps(folder) if number <= step][:keep]
    for path in folder.iterdir():
        number = re.match(r"\.?(\d+)($|\.json|\.orbax-checkpoint-tmp)", path.name)
        if number and (int(number[1]) not in kept or path.name not in (number[1], f"{number[1]}.json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _newest_sound(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The number and the manifest of the newest checkpoint that is sound."""
    for step in _steps(folder):
        try:
            return step, _read_sound(folder, step)
        except (ValueError, OSError) as error:
            reason = _first_line(error)
            warnings.warn(f"checkpoint {folder / str(step)} is damaged and passed over: {reason}", stacklevel=3)
    return None


def _read_sound(folder: Path, step: int) -> dict[str, Any]:
    """A checkpoint's manifest, if that and the files agree with their checksums."""
    content = _manifest(folder, step).read_bytes()
    manifest = json.loads(content)
    # Not all that reads alike is alike: 1e-5 and 1E-5 are one bit apart.
    if not isinstance(manifest, dict) or content != _as_bytes(manifest):
        raise ValueError("its manifest is not as it was written")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError("its manifest differs from its checksum")
    if manifest["files"] != _checksums(folder / str(step)):
        raise ValueError("its files differ from their checksums")
    return manifest


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Of several hosts the one that saves does so on its own, and waits for no other.
    alone = {jax.process_index()} if jax.process_count() > 1 else None
    options = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes=alone)
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _as_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _manifest(folder: Path, step: int) -> Path:
    return folder / f"{step}.json"


def _steps(folder: Path) -> list[int]:
    """The numbers that have a manifest, newest first."""
    return sorted((int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()), reverse=True)


def _remove(folder: Path, step: int) -> None:
    _manifest(folder, step).unlink(missing_ok=True)
    shutil.rmtree(folder / str(step), ignore_errors=True)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
