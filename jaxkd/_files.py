"""Atomic writes, and the differences between two mappings."""

import contextlib
import os
from collections.abc import Container, Generator, Mapping
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file so that it always holds either all of its old or all of its new content.

    Args:
        path: The file. Its folder must exist.
        content: The new content.

    Raises:
        OSError: If the file cannot be written. The old content is kept.
    """
    path = Path(path)
    # In the same folder, because a file can only be moved in one step within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with add_filename_to_errors(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                # Without it, a power cut after the rename may leave an empty file under the final
                # name.
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def add_filename_to_errors(path: str | os.PathLike) -> Generator[None]:
    """Adds a file's name to an `OSError` that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def describe_differences(before: Mapping, after: Mapping, *, ignore: Container[str] = ()) -> str:
    """Describes the values in which two mappings differ, such as two configurations.

    Args:
        before: The values by name.
        after: The other values by name. A name that one side lacks counts as `None`.
        ignore: Names that may differ.

    Returns:
        One line, or an empty string if nothing differs.

    Example:
        >>> describe_differences({"jax": "0.10.2", "cores": 2}, {"jax": "0.12.0", "cores": 2})
        "jax was '0.10.2' and is '0.12.0'"
    """
    names = [name for name in sorted(before.keys() | after.keys()) if name not in ignore]
    differing = [name for name in names if before.get(name) != after.get(name)]
    return "; ".join(
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in differing
    )
