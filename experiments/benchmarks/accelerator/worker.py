"""The process in which `experiments.benchmarks.accelerator.process` calls a function."""

import os
import pickle
import signal
import sys
import threading

from jaxkd._files import write_atomically


def main() -> None:
    """Calls the function that standard input names, and writes its value to a file, if any."""
    path, function, arguments = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    value = function(*arguments)
    if path is not None:
        write_atomically(path, pickle.dumps(value))


def _end_with_parent() -> None:
    """Waits until the parent closes the pipe, as its end does, and ends this process's group."""
    # Not by the buffer, whose lock a thread must not hold when Python ends.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)
