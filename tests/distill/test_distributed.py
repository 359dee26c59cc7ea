"""Two processes on this machine train like one, and either resumes the other's run."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxkd import distill

pytestmark = pytest.mark.thorough  # starts processes of its own

WORKER = Path(__file__).with_name("distributed_worker.py")


def find_free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def train(folder, *, num_processes, stop_step=0):
    """Runs the worker in each process, with a folder of its own.

    Returns:
        The summary that each process prints.
    """
    address = f"127.0.0.1:{find_free_port()}"
    processes = []
    for i in range(num_processes):
        arguments = [address, num_processes, i, folder / str(i), stop_step]
        command = [sys.executable, str(WORKER), *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_process")
    (summary,) = train(folder, num_processes=1)
    return summary, folder / "0"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    return train(folder, num_processes=2), folder


def read_records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(summary, expected):
    assert summary.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(summary[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_two_processes_train_like_one(one_process, two_processes):
    (summary, other_summary), folder = two_processes
    assert summary == other_summary
    assert_close(summary, one_process[0])
    records, expected = read_records(folder / "0"), read_records(one_process[1])
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    np.testing.assert_allclose(
        [record["loss"] for record in records],
        [record["loss"] for record in expected],
        rtol=1e-5,
    )


def test_only_the_primary_process_writes(two_processes):
    _, folder = two_processes
    assert (folder / "0" / "checkpoints").is_dir() and (folder / "0" / "config.json").is_file()
    assert not (folder / "1").exists()


def test_run_resumes_on_another_number_of_processes(one_process, tmp_path):
    stopped = train(tmp_path, num_processes=2, stop_step=4)
    assert stopped == [{}, {}]
    (summary,) = train(tmp_path, num_processes=1)
    assert_close(summary, one_process[0])


def test_values_of_the_only_process_are_its_own():
    value = {"step": 3}
    tree = {"weight": np.ones(3)}
    assert jax.process_count() == 1 and distill.is_primary_process()
    assert distill.broadcast_from_primary(value, tree) == (value, tree)
