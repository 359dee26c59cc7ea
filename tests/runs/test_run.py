"""A run's folder: started once, continued only with the same configuration, never overwritten."""

import argparse
import concurrent.futures
import contextlib
import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import runs
from jaxkd.runs import ResultRow, environment
from jaxkd.runs import run as run_module

CONFIG = {"epochs": 3, "alpha": 0.5, "workdir": None, "data_dir": None}
ARRAYS = (np.zeros((2, 3), np.uint8),)


def test_starts_and_continues(tmp_path):
    run = runs.open_run(tmp_path / "run", CONFIG, arrays=ARRAYS)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"] == run.config == CONFIG
    assert {
        *"python jax jaxlib device platform platform_version processor vectors cores".split(),
        *"xla_flags libtpu_init_args x64 prng matmul_precision commit".split(),
    } <= set(written["environment"])
    again = runs.open_run(tmp_path / "run", CONFIG | {"data_dir": "moved"}, arrays=ARRAYS)
    assert again.environment == written["environment"]
    folder = run.checkpoint_folder(1, "teacher")
    assert folder == tmp_path / "run" / "checkpoints" / "seed1" / "teacher"


def test_numbers_of_numpy_and_paths_are_json(tmp_path):
    config = {"lr": np.float32(0.5), "n": np.int64(3), "jax": jnp.float32(2.0), "data": tmp_path}
    run = runs.open_run(tmp_path / "r", {**config, "nested": {"values": (1, np.bool_(True))}})
    expected = {"lr": 0.5, "n": 3, "jax": 2.0, "data": str(tmp_path)}
    assert run.config == {**expected, "nested": {"values": [1, True]}}


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"a": {"b": {1, 2}}}, TypeError, "config 'a.b' is a set, which JSON cannot hold"),
        ({"a": [np.ones(2)]}, TypeError, r"config 'a\[0\]' is a ndarray, which JSON cannot hold"),
        ({"lr": float("nan")}, ValueError, "config 'lr' is nan, which JSON cannot hold"),
        (argparse.Namespace(a=1), TypeError, r"must be a dict, got a Namespace: pass vars\(config"),
    ],
)
def test_values_that_are_no_json_are_named(tmp_path, config, error, message):
    with pytest.raises(error, match=message):
        runs.open_run(tmp_path / "r", config)
    assert not (tmp_path / "r").exists()


def test_data_may_be_a_dict_of_arrays(tmp_path):
    arrays = {"inputs": np.ones(3), "labels": np.zeros(3)}
    run = runs.open_run(tmp_path / "r", {}, arrays=arrays)
    assert run.data == runs.fingerprint(arrays.values())
    with pytest.raises(TypeError, match=r"expected arrays, got \[1, 2\]: pass np.asarray"):
        runs.open_run(tmp_path / "s", {}, arrays=[[1, 2]])


def test_an_empty_name_of_a_folder_is_refused():
    with pytest.raises(runs.RunError, match="has an empty name: name a folder"):
        runs.open_run("", {})


def test_refuses_another_configuration_and_overwrites_nothing(tmp_path):
    runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        runs.RunError, match=r"alpha was 0.5 and is 0.7; epochs was 3 and is 4\).*--workdir"
    ):
        runs.open_run(tmp_path, CONFIG | {"epochs": 4, "alpha": 0.7}, arrays=ARRAYS)
    with pytest.raises(runs.RunError, match="other data"):
        runs.open_run(tmp_path, CONFIG, arrays=(np.ones((2, 3), np.uint8),))
    assert (tmp_path / "config.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [".lock", ".lock-holder", "config.json"]


def test_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(runs.RunError, match="not empty and holds no run"):
        runs.open_run(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(runs.RunError, match="is not a folder"):
        runs.open_run(tmp_path / "thesis.tex", CONFIG)
    for content in ("{", "[]", "{}", '{"config": [], "data": "", "environment": {}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(runs.RunError, match="is not the configuration of a run"):
            runs.open_run(tmp_path, CONFIG)


def test_starts_in_a_folder_that_a_killed_process_left(tmp_path):
    for name in (".lock", ".lock-holder", ".config.json.123"):
        (tmp_path / name).write_text("process 123 on host")
    assert runs.open_run(tmp_path, CONFIG).config == CONFIG
    assert (tmp_path / "config.json").is_file()


def test_folder_that_cannot_be_created_is_an_error(tmp_path):
    # Below a file, where not even the superuser, who ignores permissions, can create a folder.
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        runs.open_run(tmp_path / "file" / "run", CONFIG)


def test_read_only_folder_is_an_error(tmp_path, monkeypatch):
    runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)
    # Patched, because the superuser may write everywhere.
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(PermissionError, match="cannot be written"):
        runs.open_run(tmp_path, CONFIG, arrays=ARRAYS)


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full, which refuses every byte")
    run = runs.open_run(tmp_path, CONFIG)
    monkeypatch.setattr(
        run_module, "_open_unlinked", lambda path, flags: os.open("/dev/full", flags)
    )
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        run.append_metrics({"seed": 0, "stage": "teacher", "step": 1})


def test_metrics_rewind_to_a_step_and_leave_out_a_line_that_was_cut_off(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    assert run.metrics() == []
    records = [
        {"seed": 0, "stage": stage, "step": step} for stage in ("a", "b") for step in (1, 2, 3)
    ]
    for record in records:
        run.append_metrics(record)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"seed": 0, "sta')
    assert run.metrics() == records
    run.rewind_metrics(0, "b", 1)
    assert run.metrics() == records[:4]
    run.append_metrics(records[4])
    assert run.metrics() == records[:5]


@pytest.mark.parametrize(
    "line",
    [
        "gibberish",
        "[1]",
        "3",
        "\xff",
        "",
        '{"seed": 0, "stage": "a"}',
        '{"seed": 0, "stage": "a", "step": "x"}',
        '{"seed": 0, "stage": "a", "step": true}',
        '{"seed": 0, "stage": 3, "step": 1}',
        '{"seed": 0, "stage": "a", "step": ' + 5000 * "1" + "}",
        '{"seed": 0, "stage": "a", "step": ' + 400 * "1" + "}",
        '{"seed": 0, "stage": "' + 256 * "a" + '", "step": 1}',
        '{"seed": 0, "stage": "a", "step": 1, "validation_loss": "low"}',
        '{"seed": 0, "stage": "a", "step": 1, "validation_accuracy": NaN}',
        100_000 * "[",
    ],
)
def test_damaged_metrics_are_an_error_that_names_the_line(tmp_path, line):
    run = runs.open_run(tmp_path, CONFIG)
    sound = '{"seed": 0, "stage": "a", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes((sound + line + "\n" + sound).encode("latin-1"))
    for read in (run.metrics, lambda: run.rewind_metrics(0, "a", 0)):
        with pytest.raises(
            runs.RunError, match=r"^line 2 of .*metrics.jsonl is damaged "
        ) as raised:
            read()
        assert len(str(raised.value).replace(str(tmp_path), "")) < 300


@pytest.mark.parametrize("name", [".lock", ".lock-holder", "metrics.jsonl", "config.json"])
def test_links_in_the_folder_are_not_followed(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "thesis.tex").write_text("precious")
    (folder / name).symlink_to(tmp_path / "thesis.tex")
    with contextlib.suppress(runs.RunError, OSError):
        run = runs.open_run(folder, CONFIG)
        run.append_metrics({"seed": 0, "stage": "a", "step": 1})
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_lock_that_is_a_link_is_an_error(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "absent")
    with pytest.raises(runs.RunError, match=r"\.lock is a link or no regular file, .*remove it"):
        runs.open_run(tmp_path, CONFIG)
    assert not (tmp_path / "absent").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("name", [".lock", ".lock-holder", "metrics.jsonl"])
def test_pipes_in_the_folder_are_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with contextlib.suppress(runs.RunError, OSError):
        assert runs.open_run(tmp_path, CONFIG).metrics() == []


def test_what_a_kill_left_of_a_file_is_deleted_when_the_run_is_opened(tmp_path):
    runs.open_run(tmp_path, CONFIG)
    for name in (".metrics.jsonl.0123abcd.tmp", ".report.md.00000000.tmp", ".notes", "x.tmp"):
        (tmp_path / name).write_text("")
    runs.open_run(tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == [
        ".lock",
        ".lock-holder",
        ".notes",
        "config.json",
        "x.tmp",
    ]


@pytest.mark.parametrize("restart", [False, True])
def test_folder_that_was_deleted_is_noticed_at_the_next_write(tmp_path, restart):
    folder = tmp_path / "run"
    run = runs.open_run(folder, CONFIG)
    shutil.rmtree(folder)
    second = runs.open_run(folder, CONFIG) if restart else None
    record = {"seed": 0, "stage": "a", "step": 1}
    for write in (
        lambda: run.append_metrics(record),
        lambda: run.rewind_metrics(0, "a", 0),
        lambda: run.write_results([]),
    ):
        with pytest.raises(runs.RunError, match=r"run was deleted, or its \.lock, while this run"):
            write()
    if second is not None:
        second.append_metrics(record)
        assert second.metrics() == [record]
    assert folder.exists() == restart


@pytest.mark.parametrize("name", [b"\xff", "\0"])
def test_folder_whose_name_is_not_utf8_is_refused_at_once(tmp_path, name):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + name) if name == b"\xff" else f"a{name}"
    with pytest.raises(runs.RunError, match="has a name that is not UTF-8: name another folder"):
        runs.open_run(folder, CONFIG)
    assert os.listdir(tmp_path) == []


LEFT_OPEN = """
import sys
from jaxkd import runs
run = runs.open_run(sys.argv[1], {})
cycle = [run]
cycle.append(cycle)
"""


def test_run_that_a_module_keeps_open_ends_silently(tmp_path):
    command = [sys.executable, "-c", LEFT_OPEN, str(tmp_path)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")
    assert not is_locked(tmp_path)


def test_options_of_the_devices_may_change(tmp_path):
    runs.open_run(tmp_path, {"max_students": 0, "alpha": 0.5})
    with pytest.warns(UserWarning, match="bits may differ .max_students was 0 and is 4"):
        runs.open_run(tmp_path, {"max_students": 4, "alpha": 0.5})


def test_message_of_many_differences_is_short(tmp_path):
    runs.open_run(tmp_path, {f"option_{i}": "x" * 1000 for i in range(100)})
    with pytest.raises(runs.RunError, match="; and 97 more") as raised:
        runs.open_run(tmp_path, {})
    assert len(str(raised.value).replace(str(tmp_path), "")) < 400


def test_warning_about_a_long_name_in_the_environment_is_short(tmp_path):
    runs.open_run(tmp_path / "r", {})
    content = json.loads((tmp_path / "r" / "config.json").read_text())
    content["environment"]["a" * 1000] = "b" * 1000
    (tmp_path / "r" / "config.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="in another environment, so bits may differ") as caught:
        runs.open_run(tmp_path / "r", {})
    assert len(str(caught[0].message)) <= 300


def test_continuing_in_another_environment_warns(tmp_path):
    runs.open_run(tmp_path, CONFIG)
    written = json.loads((tmp_path / "config.json").read_text())
    written["environment"]["jax"] = "0.0.1"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.warns(UserWarning, match=r"bits may differ \(jax was '0.0.1' and is "):
        assert runs.open_run(tmp_path, CONFIG).environment["jax"] == "0.0.1"


def test_continuing_with_another_division_of_the_devices_warns(tmp_path):
    runs.open_run(tmp_path, {"parallel": "jit", "workdir": "a"})
    with pytest.warns(UserWarning, match=r"bits may differ \(parallel was 'jit' and is 'pmap'\)"):
        runs.open_run(tmp_path, {"parallel": "pmap", "workdir": "b"})


def test_commit_is_that_of_this_repository():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("the source is not in a repository")
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert runs.describe_environment()["commit"].removesuffix("+") == head[:12]


def test_commit_of_another_project_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_run_git", lambda folder, *arguments: str(tmp_path))
    assert runs.describe_environment()["commit"] is None


def test_results_are_strict_json(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    rows = [ResultRow("a", accuracy=(0.5,), accuracy_interval=(0.4, 0.6), extra={"bleu": [1.5]})]
    run.write_results(rows)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["name"] == "a" and row["accuracy"] == [0.5] and row["bleu"] == [1.5]
    assert run.read_results() == rows
    with pytest.raises(ValueError):
        run.write_results([ResultRow("a", accuracy=(float("nan"),))])
    assert run.read_results() == rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "a row of results needs a name, got 1"),
        ("3", "not iterable"),
        ('[{"accuracy": [0.5]}]', "needs a name"),
        ('[{"name": "a", "accuracy": null}]', "accuracy must be a list of numbers, got None"),
        ('[{"name": "a", "ece": "low"}]', "ece must be a finite number, got .low."),
    ],
)
def test_damaged_results_are_an_error(tmp_path, content, reason):
    run = runs.open_run(tmp_path, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        run.read_results()
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(runs.RunError, match=rf"results\.json is damaged \(.*{reason}.*--workdir"):
        run.read_results()


def test_results_that_are_a_pipe_are_an_error(tmp_path):
    run = runs.open_run(tmp_path, CONFIG)
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(runs.RunError, match=r"results\.json is not a regular file: restore it"):
        run.read_results()


def test_reading_takes_no_lock_and_writes_nothing(tmp_path):
    run = runs.open_run(tmp_path / "run", CONFIG, arrays=ARRAYS)
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "run" / ".lock-holder").unlink()
    again = runs.read_run(tmp_path / "run")
    assert again == run and again.lock is None
    assert os.listdir(tmp_path / "run") == ["config.json"]
    with pytest.raises(runs.RunError, match=r"holds no run: there is no config\.json"):
        runs.read_run(tmp_path)


HOLDER = """
import os, sys, time
from jaxkd import runs
run = runs.open_run(sys.argv[1], {})
child = os.fork() if hasattr(os, "fork") else 0
if not child:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_lock_keeps_another_process_out_and_ends_with_its_own(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            message = rf"{tmp_path} is in use by process {holder.pid} on {platform.node()}: wait .*"
            with pytest.raises(runs.RunError, match=rf"^{message}\(--workdir\)$"):
                runs.open_run(tmp_path, {})
            assert runs.read_run(tmp_path).config == {}
            holder.kill()
            holder.wait()
            if child != holder.pid:
                os.kill(child, 0)  # raises an error unless the child is alive
            assert runs.open_run(tmp_path, {}).lock is not None
        finally:
            holder.kill()
            if child != holder.pid:
                os.kill(child, signal.SIGKILL)


def is_locked(folder):
    """True if another process finds the folder locked."""
    code = (
        "import filelock, sys\n"
        "try:\n    filelock.FileLock(sys.argv[1]).acquire(blocking=False)\n"
        "except filelock.Timeout:\n    sys.exit(7)"
    )
    command = [sys.executable, "-c", code, str(folder / ".lock")]
    status = subprocess.run(command, check=False).returncode
    assert status in (0, 7)
    return status == 7


def test_lock_lasts_as_long_as_a_run_of_this_process(tmp_path):
    first, second = (runs.open_run(tmp_path, CONFIG) for _ in range(2))
    assert first.lock is second.lock is not None
    del first
    assert is_locked(tmp_path)
    del second
    assert not is_locked(tmp_path)
    with pytest.raises(runs.RunError, match="another configuration"):
        runs.open_run(tmp_path, {})
    assert not is_locked(tmp_path)


def test_run_is_locked_under_every_name_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    first = runs.open_run(tmp_path / "run", CONFIG)
    monkeypatch.chdir(tmp_path)
    assert runs.open_run("link", CONFIG).lock is first.lock
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(runs.open_run, "run", CONFIG).result().lock is first.lock


def test_folder_that_was_deleted_is_locked_again(tmp_path):
    first = runs.open_run(tmp_path / "run", CONFIG)
    shutil.rmtree(tmp_path / "run")
    second = runs.open_run(tmp_path / "run", CONFIG)
    assert is_locked(tmp_path / "run") and first.folder == second.folder
    del first
    assert is_locked(tmp_path / "run")


@pytest.mark.parametrize("error", ["ENOTSUP", "ENOLCK", "ENOSYS"])
def test_file_system_without_locks_warns(tmp_path, monkeypatch, error):
    fcntl = pytest.importorskip("fcntl", reason="only flock can be replaced")
    number = getattr(errno, error)

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = rf"cannot be locked \(.*{os.strerror(number)}.*no other process"
    with pytest.warns(UserWarning, match=message) as warned:
        run = runs.open_run(tmp_path, CONFIG)
    assert len(warned) == 1 and warned[0].filename == __file__
    assert run.lock is None and sorted(os.listdir(tmp_path)) == [".lock", "config.json"]


def test_system_whose_locks_would_outlive_their_process_warns(tmp_path, monkeypatch):
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    with pytest.warns(UserWarning, match=r"cannot be locked .this system has no file locks"):
        assert runs.open_run(tmp_path, CONFIG).lock is None


def test_without_filelock_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    message = r"^this needs filelock, .*: pip install -e '.*\[train\]'$"
    with pytest.raises(ImportError, match=message):
        runs.open_run(tmp_path, CONFIG)


def test_deterministic_flags_are_known_and_recorded():
    code = (
        "from jaxkd import runs; runs.enable_determinism(); "
        "print(runs.describe_environment()['xla_flags'])"
    )
    variables = os.environ | {"XLA_FLAGS": "--xla_gpu_autotune_level=4"}
    completed = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    # The last of two flags with one name counts.
    assert completed.stdout.split() == ["--xla_gpu_autotune_level=4", *runs.DETERMINISM_FLAGS]


def test_deterministic_flags_come_too_late_once_jax_has_started(monkeypatch):
    jnp.zeros(1)
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(
        runs.RunError, match=r"JAX has started already: set XLA_FLAGS='--xla_gpu_exclude"
    ):
        runs.enable_determinism()
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setenv("XLA_FLAGS", " ".join(runs.DETERMINISM_FLAGS))
    runs.enable_determinism()
    assert os.environ["XLA_FLAGS"] == " ".join(runs.DETERMINISM_FLAGS)
