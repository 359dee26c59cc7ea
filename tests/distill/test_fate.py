"""When a process ends, the others end soon, with one line."""

import socket
import subprocess
import sys
import time

import pytest

from jaxkd.distill import _relay
from jaxkd.distill._fate import MESSAGE

SECONDS = 30
"""Time in which all must end. It is about one second on an idle machine."""

PROGRAM = """
import os, signal, sys, time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
import numpy as np
from jax.experimental import multihost_utils
from jaxkd import distill, runs

address, num_processes, process_id, fault, is_cause = sys.argv[1:]
distill.initialize_distributed(
    address, num_processes=int(num_processes), process_id=int(process_id)
)

def wait_for_all():
    multihost_utils.broadcast_one_to_all(np.zeros(1))

def fail():
    print("now", flush=True)
    if fault == "interrupt":
        # A process that a shell has put into the background ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGINT)
    elif fault == "exit":
        sys.exit("error: mine")
    elif fault == "error":
        raise runs.RunError("mine")
    elif fault in ("kill", "kill_at_rest"):
        os.kill(os.getpid(), signal.SIGKILL)

with distill.share_fate():
    wait_for_all()
    if int(is_cause):
        fail()
    if fault == "kill_at_rest":
        time.sleep(60)  # no operation fails, as on accelerators
    elif fault == "no_fault":
        time.sleep(0 if int(is_cause) else 3)
    else:
        wait_for_all()
print("done")
"""


def run_program(fault, causes, *, num_processes):
    """Runs the program in each process.

    Returns:
        Status and stderr of each process, and the seconds from the fault to the last end.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    processes = []
    for i in range(num_processes):
        arguments = [address, num_processes, i, fault, int(i in causes)]
        command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        for line in processes[causes[0]].stdout:
            if line == "now\n":
                break
        started = time.monotonic()
        errors = [process.communicate(timeout=2 * SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [p.returncode for p in processes], errors, time.monotonic() - started


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fault", "cause", "num_processes", "status"),
    [
        ("kill", 3, 4, -9),
        ("kill_at_rest", 0, 2, -9),
        ("interrupt", 1, 2, 130),
        ("exit", 0, 2, 1),
    ],
)
def test_others_end_with_one_line(fault, cause, num_processes, status):
    statuses, errors, seconds = run_program(fault, [cause], num_processes=num_processes)
    assert statuses.pop(cause) == status
    assert MESSAGE not in errors.pop(cause)
    assert statuses == [1] * (num_processes - 1)
    for error in errors:
        # The library that connects CPUs says how many there are.
        lines = [line for line in error.splitlines() if not line.startswith("[Gloo]")]
        assert lines == [MESSAGE]
    assert seconds < SECONDS


@pytest.mark.thorough
def test_error_of_all_processes_is_told_by_each():
    statuses, errors, seconds = run_program("error", [0, 1], num_processes=2)
    assert statuses == [1, 1] and seconds < SECONDS
    for error in errors:
        assert error.splitlines()[-1].endswith("RunError: mine"), error


@pytest.mark.thorough
def test_process_that_is_done_waits_for_the_others():
    statuses, errors, _ = run_program("no_fault", [0], num_processes=2)
    assert statuses == [0, 0] and MESSAGE not in "".join(errors)


def test_message_is_one_line_of_an_error():
    assert MESSAGE.startswith("error: ") and len(MESSAGE) <= 300 and "\n" not in MESSAGE


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="not on this system")
def test_silent_machine_is_given_up_in_time():
    """A machine without power cannot be had here, so this reads what the system was told."""
    with socket.socket() as connection:
        _relay.keep_alive(connection, 30)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, count, unacknowledged = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (
                socket.TCP_KEEPIDLE,
                socket.TCP_KEEPINTVL,
                socket.TCP_KEEPCNT,
                socket.TCP_USER_TIMEOUT,
            )
        )
        assert idle + count * interval == 30 and unacknowledged == 30_000


def test_connection_is_given_up_in_time():
    port = _relay.find_free_port()
    with pytest.raises(OSError):
        _relay.connect(("127.0.0.1", port), 0.1)
