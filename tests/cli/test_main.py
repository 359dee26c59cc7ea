"""Tests of the entry point: help, errors and exit statuses."""

import os
import subprocess
import sys

import pytest

from jaxkd.cli import compare, convert, report, verify
from jaxkd.cli.main import main

DESCRIPTIONS = {
    "compare": compare.DESCRIPTION,
    "convert": convert.DESCRIPTION,
    "report": report.DESCRIPTION,
    "verify": verify.DESCRIPTION,
}


def run(*arguments, columns="120"):
    """Runs `python -m jaxkd` in a pipe and returns its output."""
    process = subprocess.run(
        [sys.executable, "-m", "jaxkd", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": columns},
    )
    assert not process.stderr
    return process.stdout


def test_no_arguments_print_the_help():
    text = run()
    assert "usage: python -m jaxkd" in text
    assert "Convert PyTorch weights to a safetensors file for JAX." in text
    assert "Repeat a finished run and compare the results bit for bit." in text
    assert "Examples" not in text
    assert text == run("--help")


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_help_of_a_command_keeps_its_lines(name, columns):
    text = run(name, "--help", columns=columns)
    # tyro pads or strips the ends of lines, depending on its version.
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= int(columns)
    assert DESCRIPTIONS[name] in "\n".join(lines)


def test_help_of_convert_has_the_options():
    text = run("convert", "--help")
    for word in (
        *("WEIGHTS", "--model NAME", "-o OUT", "--output", "--num-classes N", "--partial"),
        *("--entry NAME", "--image-shape H W C", "(default: 32 32 3)"),
    ):
        assert word in text
    assert "python -m jaxkd convert resnet20.th --model resnet20 -o" in text


def test_help_of_verify_has_the_options():
    text = run("verify", "--help")
    assert "RUN" in text and "--keep FOLDER" in text


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_help_imports_no_heavy_packages(name):
    code = f"""
import sys
from jaxkd.cli.main import main
try:
    main(["{name}", "--help"])
except SystemExit as stop:
    assert stop.code == 0
print(*{{name.split(".")[0] for name in sys.modules}})
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    packages = process.stdout.splitlines()[-1].split()
    assert "tyro" in packages
    assert not {"jax", "jaxlib", "flax", "optax", "numpy", "orbax", "safetensors"} & {*packages}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["convert"], "WEIGHTS"),
        (["convert", "weights", "--model", "resnet20"], "--output"),
        (
            ["convert", "weights", "--model", "resnet20", "-o", "out", "--num-classes", "five"],
            "--num-classes",
        ),
        (["convert", "weights", "--image-shape", "2", "2"], "--image-shape"),
        (["report"], "RUN"),
        (["report", "run", "--output"], "--output"),
        (["verify"], "RUN"),
        (["verify", "run", "--keep"], "--keep"),
        (["verify", "run", "--partial"], "--partial"),
        (["transmogrify"], "transmogrify"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_invalid_options(arguments, match, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert match in message and "python -m jaxkd" in message


def test_missing_tyro(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(
        SystemExit, match=r"^error: this needs tyro, .*: pip install -e '.*\[experiments\]'$"
    ):
        main(["verify", "run"])


def test_ctrl_c(monkeypatch, capsys):
    def interrupt(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify.VerifyCommand, "execute", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["verify", "run"])
    assert stop.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


def test_name_of_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/jaxkd", "verify", "--help"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: jaxkd verify")
