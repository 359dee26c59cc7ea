"""Short run of `experiments.benchmarks.fuzz`, and what counts as a fault of it."""

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.benchmarks import fuzz
from experiments.benchmarks.fuzzing import EXECUTED, KINDS, tables, values, weights, worker

# Answers as the worker does, but as the number of the input asks for.
FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    index = int(line)
    os.mkdir(f"{sys.argv[2]}/{index}")
    print(json.dumps({"made": index}), flush=True)
    if index % 100 == 97:
        time.sleep(60)
    if index % 100 == 98:
        os.abort()
    outcome = "traceback" if index % 100 == 99 else "refused"
    print(json.dumps({"index": index, "outcome": outcome, "detail": "a\\nb"}), flush=True)
"""


@pytest.fixture
def fake_worker(tmp_path, monkeypatch):
    """Replaces the process that tries inputs by one that needs no library."""
    (tmp_path / "fake_worker.py").write_text(FAKE_WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(fuzz, "WORKER", "fake_worker")
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    return tmp_path


def run(folder, **options):
    """Runs the tool and returns its exit status and the outcomes by index."""
    config = fuzz.Config(workdir=str(folder / "fuzz"), **options)
    try:
        fuzz.main(config)
        status = 0
    except SystemExit as stop:
        status = stop.code
    lines = (folder / "fuzz" / "outcomes.jsonl").read_text().splitlines()[1:]
    return status, {line["index"]: line["outcome"] for line in map(json.loads, lines)}


@pytest.mark.thorough  # starts processes that import the library
def test_odd_inputs_are_accepted_or_refused_in_one_line(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", fuzz.MODULE, "--inputs", "200", "--workdir", str(tmp_path)],
        cwd=fuzz.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (header, *rows) = process.stdout.splitlines()[-1 - len(KINDS) :]
    assert header.split() == ["kind", "accepted", "refused", "faults"]
    for kind, row in zip(KINDS, rows, strict=True):
        name, accepted, refused, faults = row.split()
        assert (name, faults) == (kind, "none")
        # Each kind reaches the library's code behind its first checks.
        assert int(accepted) >= 2 and int(refused) >= 2


def test_faults_are_found_kept_and_repeated(fake_worker, capsys):
    status, outcomes = run(fake_worker, inputs=100, workers=1)
    assert status == 1
    assert {index: outcome for index, outcome in outcomes.items() if outcome != "refused"} == {
        97: "hang",
        98: "crash",
        99: "traceback",
    }
    assert len(outcomes) == 100
    printed = capsys.readouterr().out
    assert "python -m experiments.benchmarks.fuzz --seed 0 --only 99" in printed
    kept = fake_worker / "fuzz" / "faults" / f"{fuzz.kind_of(99)}-99"
    assert (kept / "input").is_dir() and "traceback: a\nb" in (kept / "fault.txt").read_text()
    assert not list((fake_worker / "fuzz" / "inputs").iterdir())


def test_a_stopped_run_goes_on(fake_worker, monkeypatch, capsys):
    _, first = run(fake_worker, inputs=10)
    path = fake_worker / "fuzz" / "outcomes.jsonl"
    path.write_text(path.read_text().replace('"refused"', '"accepted"')[:-5])
    # The last line was cut off, and only its input and the further ones are tried.
    status, outcomes = run(fake_worker, inputs=12)
    assert (status, len(outcomes)) == (0, 12)
    assert list(outcomes.values()).count("accepted") == 9
    monkeypatch.setattr(fuzz, "fingerprint_code", lambda: "other")
    _, again = run(fake_worker, inputs=12)
    assert list(again.values()).count("refused") == 12
    assert "all inputs are tried again" in capsys.readouterr().out


def test_ctrl_c_ends_at_once_and_keeps_the_outcomes(fake_worker):
    arguments = [sys.executable, "-c", f"import sys; sys.argv[0] = 'fuzz'; {CTRL_C}"]
    process = subprocess.Popen(
        [*arguments, "--inputs", "98", "--workers", "1", "--workdir", str(fake_worker / "fuzz")],
        env=os.environ | {"PYTHONPATH": f"{fuzz.ROOT}:{fake_worker}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = fake_worker / "fuzz" / "outcomes.jsonl"
    # All but the last input, which sleeps.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= 98:
            break
        time.sleep(0.05)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - start < 5
    assert "Traceback" not in errors
    assert len(path.read_text().splitlines()) == 98
    assert not (fake_worker / "fuzz" / "faults").exists()


# A process in the background of a shell ignores Ctrl-C, and so do those that it starts.
CTRL_C = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from experiments.common import cli; from experiments.benchmarks import fuzz; "
    "fuzz.WORKER = 'fake_worker'; fuzz.SECONDS = 300; cli.run(fuzz.main, fuzz.Config, None)"
)


# What counts as a fault


def raise_error(error):
    raise error


def try_call(call, folder, may_change=lambda path: False):
    return worker.try_call(call, folder, may_change)["outcome"]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: 3, "accepted"),
        (lambda: raise_error(ValueError("it is damaged: copy it")), "refused"),
        (lambda: open("/no/such/file"), "refused"),
        (lambda: raise_error(ValueError("x" * 301)), "message"),
        (lambda: raise_error(OSError("two\nlines")), "message"),
        (lambda: raise_error(KeyError("x")), "traceback"),
        (lambda: raise_error(RecursionError("x")), "traceback"),
        (lambda: raise_error(SystemExit("x")), "traceback"),
        (lambda: int("²"), "unexplained"),
        (lambda: json.loads("{"), "unexplained"),
        (lambda: raise_error(MemoryError()), "memory"),
    ],
)
def test_outcome_of_a_call(call, expected, tmp_path):
    assert try_call(call, tmp_path) == expected


# In a process of its own, as the worker is: one that has run many tests frees memory meanwhile.
ALLOCATE = """
import pathlib, sys
import numpy as np
from experiments.benchmarks.fuzzing import worker
def allocate():
    np.ones(500 * 2**20, np.uint8).sum()
print(worker.try_call(allocate, pathlib.Path(sys.argv[1]), lambda path: False)["outcome"])
"""


@pytest.mark.thorough  # starts a process that imports the library
def test_memory_beyond_the_limit_is_a_fault(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", ALLOCATE, str(tmp_path)],
        cwd=fuzz.ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert process.stdout.split() == ["memory"]


def test_a_changed_file_is_a_fault(tmp_path):
    path = tmp_path / "mine"
    path.write_text("mine")
    assert try_call(lambda: path.write_text("mine"), tmp_path) == "accepted"
    assert try_call(lambda: path.write_text("yours"), tmp_path, lambda _: True) == "accepted"
    assert try_call(lambda: path.write_text("theirs"), tmp_path) == "overwritten"
    assert try_call(path.unlink, tmp_path) == "overwritten"


def test_executed_code_is_a_fault(tmp_path):
    assert try_call(lambda: (tmp_path / EXECUTED).write_text(""), tmp_path) == "executed"


def test_the_executing_inputs_would_execute(tmp_path):
    """Python's own unpickler runs some of the pickles, so the detector has something to detect."""
    executed = 0
    for seed in range(200):
        folder = tmp_path / str(seed)
        folder.mkdir()
        content = weights._pickle(weights._make_bomb(random.Random(seed), folder))
        if b"posix" in content or b"mkdir" in content or b"exec" in content:
            with contextlib.suppress(Exception):
                pickle.loads(content)
            executed += (folder / EXECUTED).exists()
    assert executed > 5


def test_memory_is_that_of_the_call_alone(tmp_path):
    kept = np.ones(400 * 2**20, np.uint8)
    assert try_call(lambda: kept.sum(), tmp_path) == "accepted"
    (tmp_path / "input").write_bytes(bytes(100 * 2**20))
    # Four times the input are 400 MB.
    assert try_call(lambda: np.ones(500 * 2**20, np.uint8).sum(), tmp_path) == "accepted"


# Inputs


@pytest.mark.thorough  # starts processes that import the library
# Without folders of runs, whose checkpoints hold times and random names.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "run_folders"])
def test_inputs_follow_from_the_seed_alone(kind, tmp_path):
    """In processes whose sets have another order."""
    code = (
        "import importlib, pathlib, random, sys; folder = pathlib.Path(sys.argv[2])\n"
        "module = importlib.import_module(f'experiments.benchmarks.fuzzing.{sys.argv[1]}')\n"
        "for i in range(15):\n"
        "    (folder / str(i)).mkdir(parents=True)\n"
        "    module.make(random.Random(i), folder / str(i))\n"
        "from experiments.benchmarks.fuzzing import worker\n"
        "print(worker._snapshot(folder))"
    )
    snapshots = []
    for seed in ("1", "2"):
        # One path, because some inputs name their folder.
        process = subprocess.run(
            [sys.executable, "-c", code, kind, str(tmp_path / "inputs")],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(fuzz.ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        snapshots.append(process.stdout)
        (tmp_path / "inputs").rename(tmp_path / seed)
    assert len(snapshots[0]) > 1000 and snapshots[0] == snapshots[1]


def test_values_are_odd(tmp_path):
    rng = random.Random(0)
    content = {"a": [1, {"b": 2}], "c": "d"}
    changed = [values.change_json(rng, content) for _ in range(100)]
    assert sum(value != content for value in changed) > 90
    assert content == {"a": [1, {"b": 2}], "c": "d"}
    encoded = [values.encode_json(rng, values.pick_value(rng)) for _ in range(300)]
    assert any(values.LONG_NUMBER.encode() in text for text in encoded)
    assert any(text.startswith(b"\xff\xfe") for text in encoded)
    damaged = [values.damage(rng, b"0123456789" * 9) for _ in range(100)]
    assert sum(data != b"0123456789" * 9 for data in damaged) > 90
    assert values.damage(rng, b"") == b""


def test_most_tables_have_some_rows():
    found = [len(tables._make_table(random.Random(seed))) for seed in range(50)]
    assert found.count(20) > 20 and max(found) > 100


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--inputs", "0"), "must be at least 1"),
        (("--kinds", "pickles"), "choose from weights configurations"),
        (("--only", "-1"), "counted from 0"),
        (("--workdir", "/dev/null/x"), "is not a folder"),
    ],
)
def test_bad_options_end_in_one_line(options, expected, refuse):
    assert expected in refuse(fuzz, *options)


def test_summary_counts_by_kind():
    outcomes = [{"index": i, "outcome": "refused"} for i in range(len(KINDS))]
    outcomes += [{"index": 0, "outcome": "hang"}, {"index": 0, "outcome": "accepted"}]
    lines = [line.split() for line in fuzz.summarize(outcomes)]
    assert lines[1] == ["weights", "1", "1", "1", "hang"]
    assert lines[2] == ["configurations", "0", "1", "none"]
    assert Path(fuzz.ROOT, "experiments/benchmarks/fuzz.py").is_file()
