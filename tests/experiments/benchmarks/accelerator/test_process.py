"""Processes that crash, hang or raise an error end in one line, and leave nothing behind."""

import math
import os
import subprocess
import sys
import time

import pytest

from experiments.benchmarks.accelerator import process
from experiments.benchmarks.accelerator.process import ProcessError


def test_returns_the_value_of_a_function(tmp_path):
    assert process.call_apart(math.sqrt, 4.0, log=tmp_path / "log") == 2.0


def test_passes_variables_of_the_environment(tmp_path):
    value = process.call_apart(
        os.getenv, "JAXKD_TEST", log=tmp_path / "log", environment={"JAXKD_TEST": "7"}
    )
    assert value == "7"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (int, ("x",), "ValueError: invalid literal for int"),
        (os.abort, (), "killed by SIGABRT"),
        (os._exit, (3,), "exit status 3"),
        (time.sleep, (60,), "killed after its limit of 1 s"),
    ],
    ids=["exception", "crash", "exit", "hang"],
)
def test_a_failure_is_an_error_of_one_line(function, arguments, message, tmp_path):
    start = time.monotonic()
    with pytest.raises(ProcessError, match=message) as caught:
        process.call_apart(function, *arguments, log=tmp_path / "log", limit=1)
    assert time.monotonic() - start < 30
    assert "\n" not in str(caught.value)


def test_details_hold_the_traceback(tmp_path):
    with pytest.raises(ProcessError) as caught:
        process.call_apart(int, "x", log=tmp_path / "log")
    assert caught.value.details.startswith("Traceback")


def test_a_worker_ends_with_its_pipe(tmp_path):
    """As it does when the parent is killed."""
    worker = process.start(time.sleep, 60, log=tmp_path / "log")
    worker.stdin.close()
    assert worker.wait(30) == -9


@pytest.mark.parametrize("package", ["tyro", "flax"])
def test_command_needs_little_more_than_jax(package):
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); "
        "sys.orig_argv[:] = ['python', '-m', 'experiments.benchmarks.accelerator']; "
        "sys.argv[:] = ['-m']; import experiments"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code, package],
        cwd=process.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if package == "tyro":
        assert completed.returncode == 0, completed.stderr
    else:
        (line,) = completed.stderr.splitlines()
        assert line.startswith("error: this needs flax")
