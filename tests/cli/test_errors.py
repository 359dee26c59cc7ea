"""Expected errors of a command line."""

import os
import subprocess
import sys

import pytest

from jaxkd.cli import errors
from jaxkd.cli.main import main
from jaxkd.data import DataError


def exit_message(function, *arguments):
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    return stop.value.code


def raise_in_one_line(error, *expected):
    with errors.errors_in_one_line(*expected):
        raise error


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("1" * 5000, "has 5,000 characters"),
        ("--workdir=runs/\udcff", "is not UTF-8"),
        ("a\0b", "null character"),
    ],
)
def test_arguments_that_cannot_be_used(argument, expected):
    message = exit_message(errors.check_arguments, ["--option", argument])
    assert message.startswith("error: ") and expected in message and len(message) <= 300
    assert exit_message(main, ["verify", argument]) == message


def test_long_arguments_are_quoted_in_part(capsys):
    assert (
        exit_message(
            main, ["convert", "w", "--model", "vgg8", "-o", "o", "--num-classes", "9" * 4001 + "x"]
        )
        == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "--num-classes" in line and len(line) <= 300


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["convert", "f", "--model", "vgg8"],
            "Missing from python -m jaxkd convert: -o OUT, --output OUT: "
            "see python -m jaxkd convert --help",
        ),
        (["verify", "a", "b"], "Unrecognized options: b: see python -m jaxkd --help"),
        (
            ["convrt", "f"],
            "Unrecognized options: convrt, f; Available subcommands: distill, predict, compare, "
            "report, export, convert, verify: see python -m jaxkd --help",
        ),
        (
            ["convert", "f", "--model", "vgg8", "-o", "o", "--num-classes", "x"],
            "Error parsing --num-classes: no type matching {None}|INT could be instantiated from "
            "['x'].; Got errors: - <class 'NoneType'>: ['x'] does not match choices ('None',) - "
            "<class 'int'>: invalid literal for int() with base 10: 'x': "
            "see python -m jaxkd --help",
        ),
    ],
)
@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_options_that_cannot_be_parsed_end_in_one_line(
    arguments, expected, columns, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", columns)
    assert exit_message(main, arguments) == 2
    assert capsys.readouterr() == ("", f"error: {expected}\n")


def test_similar_options_are_in_the_line(capsys):
    options = ["convert", "f", "--model", "vgg8", "-o", "o", "--num-clases", "9"]
    assert exit_message(main, options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--num-clases" in line and "Perhaps you meant: --num-classes" in line
    assert line.endswith(": see python -m jaxkd --help") and len(line) <= 300


def test_a_command_is_never_cut():
    command = "python -c " + "x" * 400
    message = exit_message(raise_in_one_line, DataError("cause " * 100, command=command), DataError)
    assert message.startswith("error: cause cause") and message.endswith(f"cause {command}")
    assert len(message) <= 300 + len(command)


def test_long_valid_arguments_are_kept():
    assert exit_message(main, ["verify", "x/" * 200]).startswith("error: x/x/")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "x" * 1000),
        ValueError("many\nlines\n" * 100),
        ImportError("of " + "x" * 1000),
        MemoryError("Unable to allocate 450. GiB"),
    ],
)
def test_expected_errors_end_in_one_short_line(error):
    message = exit_message(raise_in_one_line, error, ValueError)
    assert message.startswith("error: ") and "\n" not in message and len(message) <= 300


def test_lack_of_memory_on_a_device_is_expected():
    error = type("JaxRuntimeError", (RuntimeError,), {})("RESOURCE_EXHAUSTED: Out of memory")
    assert "smaller batches" in exit_message(raise_in_one_line, error)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), ValueError("a bug")])
def test_other_errors_keep_their_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        raise_in_one_line(error, UnicodeError)


def test_unrelated_import_error_gets_no_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxkd.cli.verify", None)
    message = exit_message(main, ["verify", "run"])
    assert message.startswith("error: ") and "pip" not in message


@pytest.mark.parametrize("command", ["jaxkd convert", "experiments.two_cnns"])
def test_output_that_nobody_reads_ends_the_command_silently(command):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        completed = subprocess.run(
            [sys.executable, "-m", *command.split(), "--help"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (completed.returncode, completed.stderr) == (141, "")
