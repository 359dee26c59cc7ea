"""The command line of an experiment: its help, its first line, and the caches that it sets up."""

import dataclasses
import sys
import warnings

import jax
import pytest

from experiments.common import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """No options."""


@dataclasses.dataclass(frozen=True)
class BaseOptions:
    """Options of which some are described again."""

    epochs: int = 1
    """Passes over the examples,
    for each network."""
    size: int = 2
    """A number."""


@dataclasses.dataclass(frozen=True)
class Options(BaseOptions):
    """Options with a docstring of two lines."""

    size: int = 3
    """Side in pixels of each image, which is not the same as the
    number of pixels."""


@pytest.fixture
def run(monkeypatch):
    """Runs an experiment with a command line, and returns the cache of compiled programs it saw."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = jax.config.jax_compilation_cache_dir

    def run_experiment(cache, config=Config, description=None, arguments=()):
        monkeypatch.setattr(sys, "argv", ["experiment", *arguments])
        jax.config.update("jax_compilation_cache_dir", cache)
        caches = []
        cli.run(lambda _: caches.append(jax.config.jax_compilation_cache_dir), config, description)
        return caches

    yield run_experiment
    jax.config.update("jax_compilation_cache_dir", before)


def test_keeps_compiled_programs_for_the_next_run(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run(None) == [str(tmp_path / "jaxkd" / "compiled")]


def test_keeps_compiled_programs_in_the_user_s_cache(run, tmp_path):
    assert run(str(tmp_path)) == [str(tmp_path)]


def test_first_line_says_how_long_the_default_options_take(run, tmp_path, capsys):
    description = "A title.\n\nTime: 2 minutes on\n2 CPU cores\n\nMore."
    run(str(tmp_path), Options, description)
    assert capsys.readouterr().out.endswith(": takes 2 minutes on 2 CPU cores\n")
    run(str(tmp_path), Options, description, ("--epochs", "2"))
    assert capsys.readouterr().out.endswith(
        ": takes 2 minutes on 2 CPU cores with its default options\n"
    )
    run(str(tmp_path), Options, "A title.")
    assert "takes" not in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_wraps_text_where_the_terminal_ends(run, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = " ".join(f"word{i}" for i in range(40))
    with pytest.raises(SystemExit):
        run(None, Options, "A title.\n\n" + words.replace("word20 ", "word20\n"), ("--help",))
    printed = capsys.readouterr().out
    text, options = printed.split("usage: ")
    title, paragraph = text.strip().split("\n\n")
    assert title == "A title." and " ".join(paragraph.split()) == words
    lines = paragraph.splitlines()
    assert all(min(columns, 100) - 7 < len(line) <= columns for line in lines[:-1])
    # tyro does not wrap the line of usage.
    options = options[options.index("\n") :]
    assert max(map(len, options.splitlines())) <= columns
    explanations = " ".join(options.replace("│", " ").split())
    assert "Passes over the examples, for each network. (default: 1)" in explanations
    assert "is not the same as the number of pixels. (default: 3)" in explanations
    assert "A number" not in explanations
    # The source breaks this line, but a wide terminal has room for it.
    assert "same as the number of pixels" in options or columns < 120
