"""Tests that every command of the documentation, the scripts' headers and the README parses."""

import ast
import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

from experiments.benchmarks.accelerator import command as accelerator
from jaxkd.cli import main as jaxkd_cli

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for folder in ("experiments", "experiments/benchmarks", "experiments/benchmarks/accelerator")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"
]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
START = re.compile(r"(?:python -m )?(?:jaxkd|experiments)\b")


def split_commands(text):
    """Yields the commands of this project in a line of shell code."""
    for part in re.split(r"&&|;|\|", text):
        words = shlex.split(part, comments=True)
        if words[:2] == ["python", "-m"] and re.match(r"experiments\.|jaxkd$", words[2]):
            yield tuple(words[2:])
        elif words[:1] == ["jaxkd"]:
            yield tuple(words)


def page_commands(path):
    text = path.read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", text, re.M | re.S)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += [code for code in re.findall(r"`([^`\n]+)`", prose) if START.match(code)]
    for line in lines:
        yield from split_commands(line)


def header_commands(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    # A line such as "Result: ..." begins a paragraph of its own.
    for paragraph in re.split(r"\n\n|\n(?=[A-Z][\w ,]*: )", docstring):
        for sentence in re.split(r"\.(?=\s+[A-Z]|$)", " ".join(paragraph.split())):
            # Options in the middle of a sentence are mentioned, not given as a command.
            match = re.search(
                r"(?:^|: |&& |\b(?:add|pass|use) )`?(python -m .*|--[a-z].*)", sentence
            )
            if match is None:
                continue
            line = match[1].replace("`", "")
            if line.startswith("--"):
                module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                line = f"python -m {module} {line}"
            yield from split_commands(line)


SOURCES = {}
for _path in PAGES:
    for _command in page_commands(_path):
        SOURCES.setdefault(_command, _path.relative_to(ROOT).as_posix())
for _path in SCRIPTS:
    for _command in header_commands(_path):
        SOURCES.setdefault(_command, _path.relative_to(ROOT).as_posix())


def parse(command):
    """Parses a command as its program does, and returns the options."""
    name, *arguments = command
    if name == "jaxkd":
        # The name of a subcommand alone is a mention of it.
        return jaxkd_cli._parse(arguments if len(arguments) > 1 else [*arguments, "--help"])
    module = importlib.import_module(name)
    if name == "experiments.benchmarks.accelerator":
        # It runs where tyro is not installed.
        return accelerator.parse_arguments(arguments)
    if not hasattr(module, "Config"):
        assert not arguments, f"{name} has no options"
        return None
    return tyro.cli(module.Config, args=arguments)


@pytest.mark.parametrize("command", SOURCES, ids=" ".join)
def test_command_parses(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(command))
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            parse(command)
    except SystemExit as stop:
        # --help ends with status 0.
        assert not stop.code, f"{SOURCES[command]}: {output.getvalue()}"


@pytest.mark.parametrize(
    "path",
    [path for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8")],
    ids=lambda path: path.stem,
)
def test_header_has_a_command(path):
    """A script says in its header how to start it."""
    assert list(header_commands(path))


def test_a_wrong_option_is_noticed():
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()):
        parse(("experiments.two_cnns", "--no-such-option"))
    assert stop.value.code
