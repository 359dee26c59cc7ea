"""A progress bar for terminals."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from jaxkd.data.errors import import_or_raise

T = TypeVar("T")


def track(items: Iterable[T], *, description: str, total: int) -> Iterable[T]:
    """Yields `items` unchanged, and shows a progress bar if stderr is a terminal.

    Args:
        items: The items to iterate over.
        description: The text beside the bar.
        total: Number of items, at which the bar is full.

    Returns:
        The items.
    """
    # Logs and notebooks get nothing, and rich need not be installed for them.
    if not sys.stderr.isatty():
        return items
    console = import_or_raise("rich.console").Console(stderr=True)
    return import_or_raise("rich.progress").track(
        items, description=description, total=total, console=console, transient=True
    )
