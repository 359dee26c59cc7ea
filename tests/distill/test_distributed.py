"""Two processes on this machine train as one does, and a run goes on on another number of them."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

HOST = Path(__file__).with_name("host.py")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def train(folder, *, hosts, steps=12):
    """Runs `host.py` as so many processes, each with a folder of its own; returns what each leaves."""
    address = f"127.0.0.1:{free_port()}"
    lines = [
        [
            sys.executable,
            str(HOST),
            address,
            str(hosts),
            str(host),
            str(folder / str(host)),
            str(steps),
        ]
        for host in range(hosts)
    ]
    processes = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in lines
    ]
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, printed, strict=True):
        assert process.returncode == 0, error
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return train(folder, hosts=1)[0], folder / "0"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    return train(folder, hosts=2), folder


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(found, wanted):
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_processes_leave_what_one_leaves(alone, together):
    (first, second), folder = together
    assert first == second
    assert_close(first, alone[0])
    here, there = records(folder / "0"), records(alone[1])
    assert [record["step"] for record in here] == [record["step"] for record in there]
    np.testing.assert_allclose([r["loss"] for r in here], [r["loss"] for r in there], rtol=1e-5)


def test_the_first_process_alone_writes(together):
    _, folder = together
    assert (folder / "0" / "checkpoints").is_dir() and (folder / "0" / "config.json").is_file()
    assert not (folder / "1").exists()


def test_a_run_goes_on_on_another_number_of_processes(alone, tmp_path):
    train(tmp_path, hosts=2, steps=-6)  # stops behind its sixth step
    resumed = train(tmp_path, hosts=1)[0]
    assert_close(resumed, alone[0])
    assert jax.process_count() == 1
