"""The queue's bookkeeping: what is skipped, passed over, cut off, repeated, and how it ends."""

import json
import os
import sys
from typing import NamedTuple

import pytest

from experiments.benchmarks.accelerator import command, process
from experiments.benchmarks.accelerator.device import Device
from experiments.benchmarks.accelerator.measurement import Measurement, Outcome
from experiments.benchmarks.accelerator.process import ProcessError

DEVICE = Device("Imaginary 9", 1, "gpu")


class Options(NamedTuple):
    """Options of a measurement that counts its calls."""

    size: int = 7


calls: list[str] = []


def make(name, *, minutes=1.0, error=None, **attributes):
    def measure(options, context):
        calls.append(name)
        context.once("part", lambda: calls.append(f"{name} part"))
        if error is not None:
            raise error
        return Outcome(f"{options.size} found", 3, {"size": options.size})

    return Measurement(name, measure, Options(), Options(1), minutes, **attributes)


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """Replaces the queue, and runs measurements in this process, with a clock that stands."""
    for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.chdir(tmp_path)
    calls.clear()

    def call_apart(function, *arguments, log, limit=None, environment=None):
        return DEVICE if function is command.find_device else function(*arguments)

    monkeypatch.setattr(process, "call_apart", call_apart)

    def replace(*measurements):
        monkeypatch.setattr(command, "QUEUE", measurements)

    replace(make("first"), make("second"))
    return replace


@pytest.fixture
def run(monkeypatch, queue, capsys):
    """Runs the command and returns its status, output and errors."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["accelerator", *map(str, options)])
        status = 0
        try:
            command.main()
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_measures_once_and_says_so(run, tmp_path):
    status, out, _ = run()
    assert status == 0 and "first: 7 found (" in out
    content = json.loads((tmp_path / "runs/accelerator/imaginary_9/first.json").read_text())
    assert content["options"] == {"size": 7} and content["results"] == {"size": 7}
    assert (content["n"], content["tiny"], content["matmul_precision"]) == (3, False, "default")
    status, out, _ = run()
    assert status == 0 and "first: already measured: 7 found" in out
    assert calls == ["first", "first part", "second", "second part"]


def test_other_options_and_another_source_are_measured(run, queue, monkeypatch):
    run("--only", "first")
    queue(make("first")._replace(options=Options(8)))
    run()
    monkeypatch.setattr(command.results, "source_version", lambda: "another")
    run()
    assert calls.count("first") == 3


def test_again_repeats(run):
    run("--only", "first")
    run("--only", "first", "--again")
    assert calls.count("first") == 2


def test_tiny_results_have_a_folder_of_their_own(run, tmp_path):
    run("--tiny")
    folder = tmp_path / "runs/accelerator"
    assert json.loads((folder / "imaginary_9_tiny/first.json").read_text())["tiny"] is True
    assert not (folder / "imaginary_9").exists()


def test_what_takes_longer_than_the_rest_is_passed_over(run, queue):
    queue(make("long", minutes=30.0), make("short"), make("images", needs_pack=True))
    status, out, _ = run("--minutes", 25)
    assert status == 0 and calls == ["short", "short part"]
    assert "long: passed over, takes about 30.0 min, and 25.0 min are left" in out
    assert "images: passed over, needs --pack" in out
    assert out.endswith("left: long images; the same command goes on\n")


def test_an_error_loses_one_measurement_and_keeps_its_parts(run, queue, tmp_path):
    queue(make("bad", error=ProcessError("it broke", "the details")), make("good"))
    status, out, err = run()
    assert status == 1 and "bad: failed: it broke" in out and "good: 7 found" in out
    assert err.startswith("failed: bad; see ")
    folder = tmp_path / "runs/accelerator/imaginary_9"
    assert (folder / "bad.error.txt").read_text() == "it broke\n\nthe details"
    queue(make("bad"), make("good"))
    assert run()[0] == 0
    # The part is not measured again, and the error is forgotten.
    assert calls.count("bad part") == 1 and calls.count("bad") == 2
    assert not (folder / "bad.error.txt").exists()


def test_the_end_of_the_budget_is_no_failure(run, queue, monkeypatch):
    queue(make("bad", error=ProcessError("killed")))
    times = iter([0.0, 0.0, 0.0])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(times, 1e6))
    status, out, _ = run()
    assert status == 0 and "left: bad; the same command goes on" in out


def test_results_are_copied_as_they_end(run, queue, tmp_path):
    queue(make("good"), make("bad", error=ProcessError("it broke")))
    run("--copy-to", tmp_path / "copies")
    copied = sorted(path.name for path in (tmp_path / "copies/imaginary_9").iterdir())
    assert copied == ["bad.error.txt", "good.json"]


def test_list_measures_nothing(run, tmp_path):
    status, out, _ = run("--list")
    assert status == 0 and "first " in out and "about  1.0 min" in out
    assert not calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "third"), "error: --only third: choose from first second"),
        (("--minutes", "0"), "error: --minutes 0.0: must be above 0"),
        (("--minutes", "nan"), "error: --minutes nan: must be above 0"),
        (("--pack", "nowhere"), "error: --pack nowhere: no such folder"),
        (("--workdir", ""), "error: --workdir is empty"),
        (("--workdir", "/dev/null/x"), "error: --workdir /dev/null/x: cannot be written"),
    ],
)
def test_invalid_options_end_in_one_line(run, options, message):
    status, _, _ = run(*options)
    assert isinstance(status, str) and status.startswith(message) and "\n" not in status


def test_interrupt_ends_in_one_line(run, queue):
    queue(make("slow", error=KeyboardInterrupt()))
    status, _, err = run()
    assert status == 130 and err == "\nstopped; the same command goes on\n"


def test_help_teaches(run):
    status, out, _ = run("--help")
    assert status == 0 and "Command: python -m experiments.benchmarks.accelerator" in out
    assert "--minutes" in out and "Time: " in out


def test_folder_names_have_no_spaces():
    assert Device("NVIDIA H100 80GB HBM3", 1, "gpu").folder_name == "nvidia_h100_80gb_hbm3"
