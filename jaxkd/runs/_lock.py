"""The lock that keeps other processes out of a run's folder."""

import atexit
import contextlib
import os
import platform
import stat
import threading
import warnings
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

from jaxkd._files import add_filename_to_errors, write_atomically
from jaxkd.runs.errors import RunError, add_install_command

LOCK_FILE = ".lock"
# Not in the lock file itself, which Windows lets nobody else read.
HOLDER_FILE = ".lock-holder"
"""Names the process that has the lock, or had it last."""

_RESERVED: set[Path] = set()
_RESERVATION = threading.Lock()
"""Guards the folders that threads of this process have reserved."""


def lock_folder(folder: Path) -> object | None:
    """Locks a run's folder for this process.

    The lock ends when the last reference to it is dropped, or with the process, even if that is
    killed. A child that is forked does not hold it. This process may lock the folder again.

    Args:
        folder: The folder. It must exist.

    Returns:
        The lock, the same one for every call, or `None`, after a warning, if the file system has
        no locks.

    Raises:
        RunError: If another process has locked the folder, or the file of the lock is a link or
            anything else but a regular file.
        OSError: If the folder cannot be written.
        ImportError: If filelock is missing.
    """
    with add_install_command():
        import filelock

    path = folder / LOCK_FILE
    # With the file in place, an error of `acquire` can only mean that there are no locks.
    existed = _create(path)
    # For a type checker, FileLock is SoftFileLock on every system.
    lock_class: Any = filelock.FileLock
    try:
        if issubclass(lock_class, filelock.SoftFileLock):
            # Such a lock is a file, which would stay behind if the process were killed.
            raise OSError("this system has no file locks that end with their process")
        lock = lock_class(
            # The folder has one name then. The file itself is no link.
            folder.resolve() / LOCK_FILE,
            thread_local=False,
            is_singleton=True,
            # Also refuses the lock above where only this file system has no real ones.
            preserve_lock_file=True,
        )
        if lock.is_locked and existed:
            return lock
        # If the file was missing, a held lock is that of an earlier run whose folder was deleted.
        lock.release(force=True)
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise RunError(
            f"{folder} is in use by {_read_holder(folder)}: wait until it ends, "
            "or name another folder (--workdir)"
        ) from error
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error}): make sure that no other process uses it",
            stacklevel=4,
        )
        return None
    _release_at_exit(lock)
    _write_holder(folder)
    return lock


@contextlib.contextmanager
def reserve_folder(folder: Path) -> Generator[None]:
    """Keeps other threads of this process out of a run's folder, as the lock does processes.

    Args:
        folder: The folder.

    Raises:
        RunError: If another thread is in a block for this folder.
    """
    path = folder.resolve()
    with _RESERVATION:
        if path in _RESERVED:
            raise RunError(
                f"{folder} is in use by another run_plan of this process: wait until it ends, or "
                "name another folder"
            )
        _RESERVED.add(path)
    try:
        yield
    finally:
        with _RESERVATION:
            _RESERVED.discard(path)


def identify_lock(folder: Path) -> tuple[int, int] | None:
    """Returns device and inode of a folder's lock file, or `None` if there is none.

    A folder that was deleted and made again has another one.
    """
    try:
        status = (folder / LOCK_FILE).lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _release_at_exit(lock: Any) -> None:
    """Releases a lock before Python takes its modules apart, where a release may fail noisily."""
    reference = weakref.ref(lock)
    pid = os.getpid()

    def release() -> None:
        held = reference()
        # A forked child does not hold the lock, and must not take it from its parent.
        if held is not None and held.is_locked and os.getpid() == pid:
            held.release(force=True)

    atexit.register(release)


def _create(path: Path) -> bool:
    """Creates the lock file unless it is there, and returns whether it was."""
    try:
        with add_filename_to_errors(path):
            # Exclusively, which does not follow a link either.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        return False
    except FileExistsError:
        if stat.S_ISREG(path.lstat().st_mode):
            return True
    raise RunError(
        f"{path} is a link or no regular file, which a lock would overwrite: "
        "remove it, or name another folder (--workdir)"
    )


def _write_holder(folder: Path) -> None:
    # In one step, because another process may read it, and a link is not followed then.
    write_atomically(folder / HOLDER_FILE, f"process {os.getpid()} on {platform.node()}".encode())


def _read_holder(folder: Path) -> str:
    path = folder / HOLDER_FILE
    try:
        is_file = stat.S_ISREG(path.lstat().st_mode)
        holder = path.read_text(encoding="utf-8", errors="replace") if is_file else ""
    except OSError:
        holder = ""
    # Whoever wrote it, the message has one short line.
    return " ".join(holder.split())[:100] or "another process"
