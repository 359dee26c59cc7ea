"""The error of a run, and the advice on a missing package."""

import contextlib
from collections.abc import Generator


class RunError(ValueError):
    """A run cannot be started or continued; the one-line message names the cause and the remedy."""


@contextlib.contextmanager
def add_install_command(extra: str = "train") -> Generator[None]:
    """Adds to an `ImportError` the command that installs the missing package.

    Args:
        extra: The extra of jaxkd-distill that contains the package.

    Raises:
        ImportError: If the block raises one. The message has one line.
    """
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ImportError(
            f"this needs {error.name}, which cannot be imported ({reason}): "
            f"pip install 'jaxkd-distill[{extra}]'",
            name=error.name,
        ) from error
