"""Whether images fit into memory."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from jaxkd._messages import format_bytes
from jaxkd.data.errors import warn

STREAM_SHARE = 0.5
"""Share of the memory above which images are not loaded, but read when they are needed."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which Linux has the memory of a container, in bytes."""


def should_stream(name: str, shape: Sequence[int], *, stream: bool | None) -> bool:
    """Returns whether images are read when they are needed, and says so if that was not asked for.

    The memory is that of the machine or the container, used or not, so that a command that is
    repeated finds the same answer.

    Args:
        name: The name of the dataset, for the message.
        shape: `(N, H, W, C)` of all images, uint8.
        stream: The user's choice, or `None`.
    """
    if stream is not None:
        return stream
    needed, memory = math.prod(shape), total_memory()
    if memory is None or needed <= STREAM_SHARE * memory:
        return False
    warn(
        f"{name}: {shape[0]:,} images take {format_bytes(needed)}, more than {STREAM_SHARE:.0%} of "
        f"the {format_bytes(memory)} of memory: they are read batch by batch"
    )
    return True


def total_memory() -> int | None:
    """Returns the memory of this machine, or of its container, in bytes; `None` if unknown."""
    sizes = []
    try:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # Windows
        pass
    for path in _LIMITS:
        try:
            # Without a limit, the word "max".
            sizes.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return min((size for size in sizes if size > 0), default=None)
