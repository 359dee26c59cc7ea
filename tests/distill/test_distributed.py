"""Two processes on this machine train like one, and either resumes the other's run."""

import json
import shutil
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


def start(folder, *, num_processes, stop_step=0):
    """Starts the worker in each process, with a folder of its own."""
    address = f"127.0.0.1:{find_free_port()}"
    processes = []
    for i in range(num_processes):
        arguments = [address, num_processes, i, folder / str(i), stop_step]
        command = [sys.executable, str(WORKER), *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return processes


def train(folder, **options):
    """Runs the worker in each process.

    Returns:
        The summary that each process prints.
    """
    processes = start(folder, **options)
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


UNREACHABLE = """
import sys
from jaxkd import distill, runs
try:
    distill.initialize_distributed(
        sys.argv[1], num_processes=2, process_id=int(sys.argv[2]), timeout=2
    )
except runs.RunError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("process_id", [0, 1])
def test_processes_that_do_not_connect_end_in_time_with_one_line(process_id):
    address = f"127.0.0.1:{find_free_port()}"
    completed = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, address, str(process_id)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert completed.returncode == 1
    # XLA's own log may follow, if this process is the coordinator.
    assert completed.stderr.splitlines()[0] == (
        f"error: the 2 processes did not connect to {address} within 2 s: check the address, and "
        "that each was started with its own process_id"
    )


def damage_checkpoint(folder):
    (folder / "0" / "checkpoints" / "seed0" / "live" / "6.json").rename(folder / "kept")
    (folder / "0" / "metrics.jsonl").write_text("{}\n")


def replace_configuration(folder):
    (folder / "0" / "config.json").write_text("{}")


@pytest.mark.parametrize("damage", [damage_checkpoint, replace_configuration])
def test_error_of_the_primary_process_ends_all(two_processes, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(two_processes[1] / "0", folder / "0")
    damage(folder)
    processes = start(folder, num_processes=2)
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode != 0 and "RunError: " in error, error


def test_values_of_the_only_process_are_its_own():
    value = {"step": 3}
    tree = {"weight": np.ones(3)}
    assert jax.process_count() == 1 and distill.is_primary_process()
    assert distill.broadcast_from_primary(value, tree) == (value, tree)
