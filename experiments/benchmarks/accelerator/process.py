"""Calls functions in processes of their own, which end with the process that started them."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxkd._messages import shorten

ROOT = Path(__file__).resolve().parents[3]
"""The clone, in which `python -m experiments...` finds its modules."""
WORKER = "from experiments.benchmarks.accelerator.worker import main; main()"
LOG_BYTES = 8000
"""Bytes of a log's end that tell why a process failed."""


class ProcessError(Exception):
    """A process crashed, hung, or ended with an exception.

    Attributes:
        details: The end of its standard error.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def call_apart(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Any:
    """Calls a function in a new process and returns its value.

    The process has its own session, so that Ctrl-C reaches its parent alone, which ends it. It ends
    by itself when its standard input does: when the parent is killed.

    Args:
        function: A function of a module; it, its arguments and its value can be pickled.
        *arguments: Its arguments.
        log: File to which the process's standard error is appended.
        environment: Variables to set in its environment.
        limit: Seconds after which it is killed.

    Raises:
        ProcessError: If it crashes, takes longer, or the function raises an exception.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        worker = start(function, *arguments, log=log, environment=environment, result=result)
        try:
            worker.wait(limit)
        except subprocess.TimeoutExpired:
            raise ProcessError(f"killed after its limit of {limit:.0f} s", _tail(log)) from None
        finally:
            kill_group(worker)
        if worker.returncode:
            raise ProcessError(_describe_end(worker.returncode, log), _tail(log))
        return pickle.loads(result.read_bytes())


def start(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    environment: Mapping[str, str] | None = None,
    result: Path | None = None,
) -> subprocess.Popen:
    """Starts a process that calls a function, as `call_apart` does, and does not wait for it.

    Args:
        function: A function of a module; it and its arguments can be pickled.
        *arguments: Its arguments.
        log: File to which the process's standard error is appended.
        environment: Variables to set in its environment.
        result: File to which its value is pickled, if any.
    """
    with log.open("ab") as errors:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert worker.stdin is not None
    try:
        # The pipe stays open, as the worker lives as long as it.
        worker.stdin.write(pickle.dumps((result, function, arguments)))
        worker.stdin.flush()
    except BrokenPipeError:
        # It has ended already, which its caller sees.
        pass
    except BaseException:
        kill_group(worker)
        raise
    return worker


def kill_group(worker: subprocess.Popen) -> None:
    """Kills a process with its group, unless it has ended, and closes the pipe to it."""
    # The number of a process that has ended may be another one's by now.
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    if worker.stdin is not None:
        # What the worker did not read is flushed here.
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()


def _describe_end(status: int, log: Path) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line for line in _tail(log).splitlines() if line.strip()]
    return shorten(lines[-1], 200) if lines else f"exit status {status}"


def _tail(log: Path) -> str:
    return log.read_bytes()[-LOG_BYTES:].decode("utf-8", "replace")
