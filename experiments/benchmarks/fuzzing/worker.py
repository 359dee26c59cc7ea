"""A process that makes inputs and gives them to the library, one after another.

It reads the number of an input on each line of stdin, and writes two lines of JSON for each: one
when the input is made, and the outcome.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import resource
import stat
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TextIO

from experiments.benchmarks.fuzzing import EXECUTED, KINDS
from jaxkd._messages import MAX_LENGTH

MEMORY = 300 * 2**20
"""Bytes that an input may take besides four times its size."""
RESERVE = 3 * 2**30
"""Further address space that a process may reserve: threads and allocators do not use all of it."""
EXPECTED = (ValueError, OSError)
"""The errors that the docstrings promise for an input that cannot be used."""


def main(seed: int, folder: Path) -> None:
    """Answers the numbers on stdin until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What the library prints must not mix with the answers.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if "--verbose" not in sys.argv:
        os.dup2(null, 2)
    sys.setrecursionlimit(1000)
    for line in sys.stdin:
        _answer(seed, int(line), folder, answers)


def _answer(seed: int, index: int, folder: Path, answers: TextIO) -> None:
    kind = KINDS[index % len(KINDS)]
    module = importlib.import_module(f"experiments.benchmarks.fuzzing.{kind}")
    case = folder / str(index)
    case.mkdir()
    try:
        # A text, because other seeds of Python's generator are not stable.
        call = module.make(random.Random(f"{seed} {kind} {index}"), case)
    # A fault of this tool, which must not pass for one of the library.
    except Exception as error:
        outcome = {"outcome": "maker", "detail": _describe(error), "traceback": _format_error()}
        print(json.dumps({"made": index}), file=answers)
        print(json.dumps({"index": index} | outcome), file=answers)
        return
    print(json.dumps({"made": index}), file=answers)
    may_change = getattr(module, "may_change", lambda path: False)
    extra = getattr(module, "EXTRA_MEMORY", 0)
    outcome = try_call(call, case, may_change, extra_memory=extra)
    print(json.dumps({"index": index} | outcome), file=answers)


def try_call(
    call: Callable[[], Any],
    folder: Path,
    may_change: Callable[[Path], bool],
    *,
    extra_memory: int = 0,
) -> dict[str, Any]:
    """Calls a function that reads a folder, and returns the outcome.

    Args:
        call: The function.
        folder: The input.
        may_change: Of a path, whether the function may rewrite or delete that file.
        extra_memory: Bytes that the function may take besides those of every input.

    Returns:
        `outcome`, which is "accepted", "refused" or a fault, a `detail`, the `seconds` and the
        `traceback`.
    """
    before = _snapshot(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    memory = 4 * size + MEMORY + extra_memory
    start = time.monotonic()
    with _limit_memory(memory) as resident, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome, detail, trace = _classify(call, folder)
    seconds = time.monotonic() - start
    used = _read_status("VmHWM") - resident
    for warning in caught:
        if outcome in ("accepted", "refused") and _is_bad_message(str(warning.message), folder):
            outcome, detail = "message", f"warning: {warning.message}"
    after = _snapshot(folder)
    changed = [
        str(path)
        for path, content in before.items()
        if after.get(path) != content and not may_change(path)
    ]
    if used > memory:
        outcome, detail = "memory", f"{used / 2**20:.0f} MiB for {size:,} bytes; {detail}"
    if changed:
        outcome, detail = "overwritten", ", ".join(changed)
    if (folder / EXECUTED).exists():
        outcome, detail = "executed", detail
    return {
        "outcome": outcome,
        "detail": detail[:500],
        "seconds": round(seconds, 3),
        "traceback": trace,
    }


def _classify(call: Callable[[], Any], folder: Path) -> tuple[str, str, str]:
    try:
        call()
    except EXPECTED as error:
        outcome = "message" if _is_bad_message(str(error), folder) else "refused"
        if not _is_raised_by_library(error):
            outcome = "unexplained"
        return outcome, _describe(error), _format_error()
    except MemoryError as error:
        return "memory", _describe(error), _format_error()
    # Rust's panics are no `Exception`.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "traceback", _describe(error), _format_error()
    return "accepted", "", ""


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace").decode()


def _is_raised_by_library(error: Exception) -> bool:
    """True for an error of the system, and for one that the library raises with its own words."""
    # `int("²")` raises a `ValueError` as well, which names neither cause nor remedy.
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, OSError) or (frame.line or "").startswith("raise ")


def _format_error() -> str:
    return traceback.format_exc().encode("utf-8", "backslashreplace").decode()[-4000:]


def _is_bad_message(message: str, folder: Path) -> bool:
    # Without the folder of the inputs, which may be deep. Lines as a terminal breaks them.
    message = message.replace(str(folder), ".")
    # A command to copy is never cut.
    message = message.partition("pip install ")[0]
    return len(message) > MAX_LENGTH or re.search(r"[\n\r]", message) is not None


@contextlib.contextmanager
def _limit_memory(memory: int) -> Generator[int]:
    """Limits the address space, so that a fault ends in an error and not in a stuck machine.

    Yields:
        The bytes that the process has in memory. `VmHWM` is reset, and then the most in the block.
    """
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory + RESERVE
    Path("/proc/self/clear_refs").write_text("5")
    resource.setrlimit(resource.RLIMIT_AS, (limit, limits[1]))
    try:
        yield _read_status("VmRSS")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _read_status(name: str) -> int:
    """Returns a number of bytes of this process."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(match[1]) if match else 0


def _snapshot(folder: Path) -> dict[Path, str]:
    """Returns what each file below a folder is and holds, without following links."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            contents[path.relative_to(folder)] = f"link to {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            contents[path.relative_to(folder)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return contents


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
