"""The whole queue at toy sizes on a CPU, where nothing but JAX's packages is installed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.benchmarks.accelerator import report
from experiments.benchmarks.accelerator.queue import QUEUE
from experiments.common.cli import OptionError

NAMES = [measurement.name for measurement in QUEUE]
# `rich` is Flax's own, and is there wherever Flax is.
ABSENT = """
import sys
NAMES = "tyro docstring_parser tensorflow_datasets array_record tabulate flatbuffers".split()
class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in NAMES or (top == "rich" and not is_imported_by("flax")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def is_imported_by(package):
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == package:
            return True
        frame = frame.f_back
    return False
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def bare_environment(tmp_path, environment):
    """The environment of processes in which these packages cannot be imported."""
    folder = tmp_path / "absent"
    folder.mkdir()
    # Python imports this module as it starts.
    (folder / "sitecustomize.py").write_text(ABSENT, encoding="utf-8")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def command(*options):
    return [sys.executable, "-m", "experiments.benchmarks.accelerator", *map(str, options)]


def children_of(pid):
    """Returns the processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        # A process that has ended and whose parent has not asked for its status is a zombie.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds children by Linux's /proc")
def test_killed_queue_goes_on_and_measures_everything(bare_environment, tmp_path, jpeg_pack):
    workdir, copies = tmp_path / "work", tmp_path / "copies"
    line = command("--tiny", "--minutes", 20, "--workdir", workdir, "--copy-to", copies)
    line += ["--pack", str(jpeg_pack)]
    # In the middle of the second measurement.
    first = subprocess.Popen(line, env=bare_environment, stdout=subprocess.PIPE, text=True)
    with first:
        for text in first.stdout:
            if text.startswith("smoke: "):
                break
        wait_until(lambda: children_of(first.pid))
        (worker,) = children_of(first.pid)
        first.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(worker))
    (folder,) = (path for path in workdir.iterdir() if path.name.endswith("_tiny"))
    assert [path.name for path in folder.glob("*.json")] == ["smoke.json"]

    completed = subprocess.run(
        line, env=bare_environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "smoke: already measured: largest relative difference" in completed.stdout
    for name in NAMES:
        content = json.loads((folder / f"{name}.json").read_text("utf-8"))
        assert content["tiny"] and content["results"] and content["seconds"] > 0
        assert content["environment"]["jax"] and content["device"] == "cpu" and content["n"] >= 1
        assert f"{name}: " in completed.stdout
        assert (copies / folder.name / f"{name}.json").exists()
    assert not list(folder.glob("*.error.txt"))
    check_values({name: json.loads((folder / f"{name}.json").read_text()) for name in NAMES})
    with pytest.raises(OptionError, match="toy sizes"):
        report.read_device(folder)


def check_values(contents):
    """Checks what the measurements must find on a CPU, whatever its speed."""
    results = {name: content["results"] for name, content in contents.items()}
    # A CPU agrees with itself.
    differences = results["smoke"]["differences"]
    assert set(differences) == {"default", "highest"}
    assert max(max(parts.values()) for parts in differences.values()) < 1e-4
    flags = contents["smoke_deterministic"]["environment"]["xla_flags"]
    assert "--xla_gpu_exclude_nondeterministic_ops=true" in flags
    pair = results["steps_float32"]["pairs"]["tiny_cnn"]
    assert pair["flops"] > 0 and pair["bytes"] > 0 and pair["roofline_share"] is None
    assert len(pair["seconds"]["jaxkd"]) == contents["steps_float32"]["n"]
    assert results["students"]["sweep"]["programs"] == 1
    assert results["fused_losses"]["rows"][0]["planned_bytes"] > 0
    epochs = results["cifar10_30_epochs"]
    assert 0 < epochs["seconds"] < epochs["whole_seconds"]
    assert results["resume"] == {"was_killed": True, "differences": {"killed": []}}
    for name in ("labels", "kd_rows_crd"):
        assert len(results[name]["test_accuracies"]) == 2
