"""The lock that keeps other processes out of a run's folder."""

import os
import platform
import warnings
from pathlib import Path
from typing import Any

from jaxkd._files import add_filename_to_errors
from jaxkd.runs.errors import RunError, add_install_command

LOCK_FILE = ".lock"
# Not in the lock file itself, which Windows lets nobody else read.
HOLDER_FILE = ".lock-holder"
"""Names the process that has the lock, or had it last."""


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
        RunError: If another process has locked the folder.
        OSError: If the folder cannot be written.
        ImportError: If filelock is missing.
    """
    with add_install_command():
        import filelock

    path = folder / LOCK_FILE
    existed = path.exists()
    # With the file in place, an error of `acquire` can only mean that there are no locks.
    path.touch()
    # For a type checker, FileLock is SoftFileLock on every system.
    lock_class: Any = filelock.FileLock
    try:
        if issubclass(lock_class, filelock.SoftFileLock):
            # Such a lock is a file, which would stay behind if the process were killed.
            raise OSError("this system has no file locks that end with their process")
        lock = lock_class(
            path.resolve(),
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
            "or name another --workdir"
        ) from error
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error}): make sure that no other process uses it",
            stacklevel=3,
        )
        return None
    _write_holder(folder)
    return lock


def _write_holder(folder: Path) -> None:
    path = folder / HOLDER_FILE
    with add_filename_to_errors(path):
        path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")


def _read_holder(folder: Path) -> str:
    try:
        holder = (folder / HOLDER_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        holder = ""
    return holder or "another process"
