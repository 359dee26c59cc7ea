"""A run's directory: started once, continued only as it was, never overwritten."""

import errno
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import runs

CONFIG = {"epochs": 3, "alpha": 0.5, "workdir": None, "data_dir": None}
ARRAYS = (np.zeros((2, 3), np.uint8),)


def test_starts_and_continues(tmp_path):
    run = runs.open_run(tmp_path / "run", CONFIG, arrays=ARRAYS)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"] == run.config == CONFIG
    recorded = "python jax jaxlib device platform platform_version processor vectors cores xla_flags libtpu_init_args"
    assert {*recorded.split(), "x64", "prng", "matmul_precision", "commit"} <= set(written["environment"])
    again = runs.open_run(tmp_path / "run", CONFIG | {"data_dir": "moved"}, arrays=ARRAYS)
    assert again.environment == written["environment"]
    assert run.checkpoints(1, "teacher") == tmp_path / "run" / "checkpoints" / "seed1" / "teacher"


def test_refuses_another_configuration_and_overwrites_nothing(tmp_path):
    runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(runs.RunError, match=r"alpha 0.5 there and 0.7 here; epochs 3 there and 4 here.*--workdir"):
        runs.open_run(tmp_path, CONFIG | {"epochs": 4, "alpha": 0.7}, arrays=ARRAYS)
    with pytest.raises(runs.RunError, match="other data"):
        runs.open_run(tmp_path, CONFIG, arrays=(np.ones((2, 3), np.uint8),))
    assert (tmp_path / "config.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json"]


def test_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(runs.RunError, match="not empty and holds no run"):
        runs.open_run(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(runs.RunError, match="is not a folder"):
        runs.open_run(tmp_path / "thesis.tex", CONFIG)
    for content in ("{", "[]", "{}", '{"config": [], "data": "", "environment": {}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(runs.RunError, match="no run's configuration"):
            runs.open_run(tmp_path, CONFIG)


def test_unwritable_place_is_told(tmp_path):
    # A folder cannot be made below a file, by nobody; permissions alone would not stop the superuser.
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        runs.open_run(tmp_path / "file" / "run", CONFIG)


def test_read_only_folder_is_told(tmp_path, monkeypatch):
    runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # the superuser may write everywhere
    with pytest.raises(PermissionError, match="cannot be written"):
        runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)


def test_full_disk_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full, which refuses every byte")
    run = runs.open_run(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        run.append_metrics({"seed": 0, "stage": "teacher", "step": 1})


def test_metrics_rewind_to_a_step_and_forget_a_line_cut_off(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    assert run.metrics() == []
    records = [{"seed": 0, "stage": stage, "step": step} for stage in ("a", "b") for step in (1, 2, 3)]
    for record in records:
        run.append_metrics(record)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"seed": 0, "sta')
    assert run.metrics() == records
    run.rewind_metrics(0, "b", 1)
    assert run.metrics() == records[:4]
    run.append_metrics(records[4])
    assert run.metrics() == records[:5]


@pytest.mark.parametrize("line", ["gibberish\n", "[1]\n", "\xff\n"])
def test_damaged_metrics_are_told(tmp_path, line):
    run = runs.open_run(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(runs.RunError, match=r"metrics.jsonl is damaged"):
        run.metrics()


def test_continuing_elsewhere_is_told(tmp_path):
    runs.open_run(tmp_path, CONFIG)
    written = json.loads((tmp_path / "config.json").read_text())
    written["environment"]["jax"] = "0.0.1"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.warns(UserWarning, match="bits may differ .jax '0.0.1' there and"):
        assert runs.open_run(tmp_path, CONFIG).environment["jax"] == "0.0.1"


def test_continuing_on_devices_divided_otherwise_is_told(tmp_path):
    runs.open_run(tmp_path, {"parallel": "jit", "workdir": "a"})
    with pytest.warns(UserWarning, match=r"bits may differ \(parallel 'jit' there and 'pmap' here\)"):
        runs.open_run(tmp_path, {"parallel": "pmap", "workdir": "b"})


def test_commit_of_another_project_is_not_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_git", lambda folder, *arguments: str(tmp_path))
    assert runs.environment()["commit"] is None


def test_results_are_strict_json(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    run.write_results([{"name": "a", "accuracy": [0.5]}])
    assert json.loads((tmp_path / "results.json").read_text()) == [{"name": "a", "accuracy": [0.5]}]
    with pytest.raises(ValueError):
        run.write_results([{"name": "a", "accuracy": [float("nan")]}])


def test_reading_takes_no_lock_and_writes_nothing(tmp_path):
    run = runs.open_run(tmp_path / "run", CONFIG, arrays=ARRAYS)
    (tmp_path / "run" / ".lock").unlink()
    found = runs.read_run(tmp_path / "run")
    assert found == run and found.lock is None
    assert os.listdir(tmp_path / "run") == ["config.json"]
    with pytest.raises(runs.RunError, match=r"holds no run: there is no config\.json"):
        runs.read_run(tmp_path)


needs_flock = pytest.mark.skipif(runs.fcntl is None, reason="this system has no flock")

HOLDER = """
import os, sys, time
from jaxkd import runs
run = runs.open_run(sys.argv[1], {})
if not os.fork():
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@needs_flock
def test_lock_keeps_another_process_out_and_dies_with_its_own(tmp_path):
    line = [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as holder:
        forked = int(holder.stdout.readline())
        try:
            with pytest.raises(runs.RunError, match=rf"{tmp_path} is in use by process {holder.pid} on .*--workdir"):
                runs.open_run(tmp_path, {})
            assert runs.read_run(tmp_path).config == {}
            holder.kill()
            holder.wait()
            os.kill(forked, 0)  # a fork that lives on holds nothing
            assert runs.open_run(tmp_path, {}).lock is not None
        finally:
            holder.kill()
            os.kill(forked, signal.SIGKILL)


def is_locked(folder):
    """Whether a process that comes now finds the folder locked."""
    code = (
        "import fcntl, sys\n"
        "try:\n    fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError:\n    sys.exit(7)"
    )
    return subprocess.run([sys.executable, "-c", code, str(folder / ".lock")], check=False).returncode == 7


@needs_flock
def test_lock_lasts_as_long_as_a_run_of_this_process(tmp_path):
    first, second = (runs.open_run(tmp_path, CONFIG) for _ in range(2))
    assert first.lock is second.lock
    del first
    assert is_locked(tmp_path)
    del second
    assert not is_locked(tmp_path)
    with pytest.raises(runs.RunError, match="another configuration"):
        runs.open_run(tmp_path, {})
    assert not is_locked(tmp_path)


@needs_flock
def test_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(runs.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked .*not supported.*no other process"):
        runs.open_run(tmp_path / "remote", CONFIG)
    monkeypatch.setattr(runs, "fcntl", None)
    with pytest.warns(UserWarning, match=r"cannot be locked .this system has no file locks"):
        runs.open_run(tmp_path / "windows", CONFIG)


def test_deterministic_flags_are_known_and_recorded():
    code = "from jaxkd import runs; runs.make_deterministic(); print(runs.environment()['xla_flags'])"
    environment = os.environ | {"XLA_FLAGS": "--xla_gpu_autotune_level=4"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--xla_gpu_autotune_level=4", *runs.DETERMINISTIC]  # the last of a kind counts


def test_deterministic_flags_come_too_late_once_jax_has_started(monkeypatch):
    jnp.zeros(1)
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(runs.RunError, match=r"JAX has started already: set XLA_FLAGS='--xla_gpu_exclude"):
        runs.make_deterministic()
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setenv("XLA_FLAGS", " ".join(runs.DETERMINISTIC))
    runs.make_deterministic()
    assert os.environ["XLA_FLAGS"] == " ".join(runs.DETERMINISTIC)
