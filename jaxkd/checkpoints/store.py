"""Checkpoints that are either sound or not there.

Orbax writes the arrays and makes the folder appear in one rename. It restores a flipped bit without a word, so a
manifest of checksums is written beside the folder once it is complete; what has no manifest, or disagrees with it, does
not count.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax


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
    for step in _steps(folder):
        try:
            manifest = _read_sound(folder, step)
        except (ValueError, OSError) as error:
            reason = _first_line(error)
            warnings.warn(f"checkpoint {folder / str(step)} is damaged and passed over: {reason}", stacklevel=2)
            continue
        there, here = manifest["tree"], _describe(like)
        if there != here:
            differing = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
            listed = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing[:3])
            raise ValueError(f"checkpoint {folder / str(step)} is of another tree ({listed})")
        with _checkpointer() as checkpointer:
            tree = checkpointer.restore(folder / str(step), jax.tree.map(_abstract, like))
        return Restored(step, tree, manifest["notes"])
    return None


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
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
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


def _save(folder: Path, step: int, tree: Any, notes: Mapping[str, Any], keep: int) -> None:
    _remove(folder, step)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(folder / str(step), tree)
            checkpointer.wait_until_finished()
    except ValueError as error:  # what orbax makes of a full disk
        raise OSError(f"{folder / str(step)} cannot be written: {_first_line(error)}") from error
    content = {"files": _checksums(folder / str(step)), "tree": _describe(tree), "notes": dict(notes)}
    manifest = {"sha256": _digest(content), **content}
    write_atomically(_manifest(folder, step), json.dumps(manifest, indent=1).encode())
    kept = [number for number in _steps(folder) if number <= step][:keep]
    for path in folder.iterdir():
        number = re.match(r"\.?(\d+)($|\.json|\.orbax-checkpoint-tmp)", path.name)
        if number and (int(number[1]) not in kept or path.name not in (number[1], f"{number[1]}.json")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_sound(folder: Path, step: int) -> dict[str, Any]:
    """A checkpoint's manifest, if that and the files agree with their checksums."""
    manifest = json.loads(_manifest(folder, step).read_bytes())
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest(manifest):
        raise ValueError("its manifest differs from its checksum")
    if manifest["files"] != _checksums(folder / str(step)):
        raise ValueError("its files differ from their checksums")
    return manifest


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


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
