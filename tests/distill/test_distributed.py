"""Several processes on this machine train like one, and any number resumes the others' run."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from jaxkd import distill
from jaxkd.distill._fate import MESSAGE
from jaxkd.runs import checkpoints
from small_plans import assert_record_close

pytestmark = pytest.mark.thorough  # starts processes of its own

WORKER = Path(__file__).with_name("distributed_worker.py")


def find_free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(folder, cases, *, num_processes, full_step=0):
    """Starts the worker in each process, with a folder of its own."""
    address = f"127.0.0.1:{find_free_port()}"
    processes = []
    for i in range(num_processes):
        arguments = [address, num_processes, i, folder / str(i), full_step, *cases]
        command = [sys.executable, str(WORKER), *map(str, arguments)]
        processes.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    return processes


def train(folder, cases, **options):
    """Runs the worker in each process.

    Returns:
        The summaries of the cases that each process prints.
    """
    processes = start(folder, cases, **options)
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
    (summaries,) = train(folder, ["mesh", "one_by_one", "sequential"], num_processes=1)
    return summaries, folder / "0"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    cases = ["mesh", "model_axis", "vectorized", "grown", "sequential"]
    return train(folder, cases, num_processes=2), folder


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    """Trains on a model axis that spans processes, among others."""
    folder = tmp_path_factory.mktemp("four_processes")
    return train(folder, ["model_axis", "vectorized"], num_processes=4), folder


def read_records(folder):
    """Returns the records of a run, whose students may have trained in another order."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda r: (r["stage"], r["seed"], r["step"]))


def assert_close(summary, expected):
    """Compares what a case trained with the same stages of another case."""
    assert {name.split(",")[0] for name in summary} >= {"teacher", "last"}
    for name, values in summary.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def assert_same_records(folder, expected_folder):
    records = read_records(folder)
    stages = {record["stage"] for record in records}
    expected = [record for record in read_records(expected_folder) if record["stage"] in stages]
    for record, expected_record in zip(records, expected, strict=True):
        assert_record_close(record, expected_record, 1e-5)


EXPECTED = {
    "mesh": "mesh",
    "model_axis": "mesh",
    "vectorized": "one_by_one",
    "grown": "mesh",
    "sequential": "sequential",
}
"""The case of one process that trains the same."""


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        ("mesh", "two_processes"),
        ("model_axis", "two_processes"),
        ("model_axis", "four_processes"),
        ("vectorized", "two_processes"),
        ("vectorized", "four_processes"),
        ("grown", "two_processes"),
        ("sequential", "two_processes"),
    ],
)
def test_processes_train_like_one(one_process, request, case, processes):
    summaries, folder = request.getfixturevalue(processes)
    assert all(summary == summaries[0] for summary in summaries)
    assert_close(summaries[0][case], one_process[0][EXPECTED[case]])
    assert_same_records(folder / "0" / case, one_process[1] / EXPECTED[case])


def test_each_process_reads_its_share_of_the_records(tmp_path):
    first, second = train(tmp_path, ["streamed"], num_processes=2)
    assert first == second


def test_only_the_primary_process_writes(two_processes, four_processes):
    for summaries, folder in (two_processes, four_processes):
        for case in summaries[0]:
            run = folder / "0" / case
            assert (run / "checkpoints").is_dir() and (run / "config.json").is_file()
        assert [path.name for path in folder.iterdir()] == ["0"]


def test_checkpoints_of_processes_are_those_of_one(four_processes, one_process):
    """`verify` reads checkpoints alone, so that those of several processes have to be alike."""
    _, folder = four_processes
    for name in ("teacher", "last"):
        saved, expected = (
            [checkpoints.load(path / "checkpoints" / f"seed{seed}" / name) for seed in range(3)]
            for path in (folder / "0" / "vectorized", one_process[1] / "one_by_one")
        )
        chex.assert_trees_all_close(
            [checkpoint.tree for checkpoint in saved],
            [checkpoint.tree for checkpoint in expected],
            rtol=1e-5,
            atol=1e-6,
        )


def finish(processes):
    """Returns the exit statuses and what the processes print to stderr."""
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


def test_full_disk_of_the_primary_process_ends_all_and_one_goes_on(one_process, tmp_path):
    processes = start(tmp_path, ["vectorized"], num_processes=2, full_step=3)
    statuses, errors = finish(processes)
    assert statuses == [1, 1]
    assert "No space left on device" in errors[0].splitlines()[-1]
    assert errors[1].splitlines()[-1] == MESSAGE and "Traceback" not in errors[1], errors[1]
    (summaries,) = train(tmp_path, ["vectorized"], num_processes=1)
    assert_close(summaries["vectorized"], one_process[0]["one_by_one"])
    # The last evaluation before the full disk is not repeated.
    assert_same_records(tmp_path / "0" / "vectorized", one_process[1] / "one_by_one")


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
    run = folder / "0" / "mesh"
    (run / "checkpoints" / "seed0" / "last" / "4.json").rename(folder / "kept")
    (run / "metrics.jsonl").write_text("{}\n")


def replace_configuration(folder):
    (folder / "0" / "mesh" / "config.json").write_text("{}")


@pytest.mark.parametrize("damage", [damage_checkpoint, replace_configuration])
def test_error_of_the_primary_process_ends_all(two_processes, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(two_processes[1] / "0", folder / "0")
    damage(folder)
    statuses, errors = finish(start(folder, ["mesh"], num_processes=2))
    for status, error in zip(statuses, errors, strict=True):
        assert status == 1 and "RunError: " in error, error


def test_values_of_the_only_process_are_its_own():
    value = {"step": 3}
    tree = {"weight": np.ones(3)}
    assert jax.process_count() == 1 and distill.is_primary_process()
    assert distill.broadcast_from_primary(value, tree) == (value, tree)
