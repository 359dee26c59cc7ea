"""Atomic writes, deletion, disk use, and the differences between two mappings."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Container, Generator, Mapping
from pathlib import Path

from jaxkd._messages import shorten

MAX_DIFFERENCES = 3
"""Number of differences that a message lists. The others are counted."""


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file so that it always holds either all of its old or all of its new content.

    Threads and processes may write the same file: one of the contents stays. A symbolic link is
    replaced, not followed. A device or a pipe is kept.

    Args:
        path: The file. Its folder must exist.
        content: The new content.

    Raises:
        OSError: If the folder is absent or the file cannot be written. The old content is kept.
    """
    path = Path(path)
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, "no such folder, make it first", str(path.parent))
    # As root, the rename below would turn /dev/null into a file.
    if path.exists() and not path.is_symlink() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file, name another one", str(path))
    # In the same folder, because a file can only be moved in one step within a file system.
    # A random name, because another thread may write the same path, and a process of another host
    # may have this one's number.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Exclusively: a file or a link that is already there belongs to somebody else.
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            # Without it, a power cut after the rename may leave an empty file under the final name.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # Instead of the hidden name, or of none, as for a full disk.
        error.filename = str(path)
        del error.filename2
        raise
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Returns whether a killed process may have left a file of this name in `write_atomically`."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", name) is not None


def delete(path: Path) -> None:
    """Deletes a file, a folder or a link, but never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def measure_disk_use(folder: Path) -> int:
    """Returns the total size in bytes of the files in a folder, without what links lead to."""
    total = 0
    for path in folder.rglob("*"):
        # Another process may delete a file in the meantime.
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


@contextlib.contextmanager
def add_filename_to_errors(path: str | os.PathLike) -> Generator[None]:
    """Adds a file's name to an `OSError` that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def describe_differences(
    before: Mapping,
    after: Mapping,
    *,
    ignore: Container[str] = (),
    limit: int | None = MAX_DIFFERENCES,
) -> str:
    """Describes the values in which two mappings differ, such as two configurations.

    Args:
        before: The values by name.
        after: The other values by name. A name that one side lacks counts as `None`.
        ignore: Names that may differ.
        limit: Number of differences that are listed. `None` lists all.

    Returns:
        One line, or an empty string if nothing differs.

    Example:
        >>> describe_differences({"jax": "0.10.2", "cores": 2}, {"jax": "0.12.0", "cores": 2})
        "jax was '0.10.2' and is '0.12.0'"
    """
    names = [name for name in sorted(before.keys() | after.keys()) if name not in ignore]
    differing = [name for name in names if before.get(name) != after.get(name)]
    descriptions = [
        f"{shorten(name, 60)} was {shorten(repr(before.get(name)), 60)} "
        f"and is {shorten(repr(after.get(name)), 60)}"
        for name in differing[:limit]
    ]
    if len(differing) > len(descriptions):
        descriptions.append(f"and {len(differing) - len(descriptions)} more")
    return "; ".join(descriptions)
