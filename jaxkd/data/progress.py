"""A progress bar on a terminal, nothing anywhere else."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from jaxkd.data.errors import require

T = TypeVar("T")


def track(items: Iterable[T], *, description: str, total: int) -> Iterable[T]:
    """Yields `items` unchanged behind a bar on stderr, where that is a terminal.

    Args:
        items: What to iterate over.
        description: What the bar says.
        total: Number of items that make it full.

    Returns:
        The items.
    """
    if not sys.stderr.isatty():
        return items
    console = require("rich.console").Console(stderr=True)
    return require("rich.progress").track(items, description=description, total=total, console=console, transient=True)
