"""What every experiment's command line does before it begins."""

import dataclasses
import sys
import warnings

import jax
import pytest

from experiments import cli


@dataclasses.dataclass(frozen=True)
class Config:
    """No options."""


@pytest.fixture
def seen(monkeypatch):
    """Runs an experiment that looks where compiled programs are kept."""
    monkeypatch.setattr(sys, "argv", ["experiment"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    before = jax.config.jax_compilation_cache_dir

    def look(folder):
        jax.config.update("jax_compilation_cache_dir", folder)
        found = []
        cli.run(lambda _: found.append(jax.config.jax_compilation_cache_dir), Config, None)
        return found

    yield look
    jax.config.update("jax_compilation_cache_dir", before)


def test_keeps_compiled_programs_for_the_next_run(seen, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert seen(None) == [str(tmp_path / "jaxkd" / "compiled")]


def test_keeps_them_where_the_user_says(seen, tmp_path):
    assert seen(str(tmp_path)) == [str(tmp_path)]


def test_keeps_a_step_s_memory_unless_the_user_has_decided(monkeypatch):
    calls = []

    class Library:
        def __init__(self, name):
            pass

        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(cli.ctypes, "CDLL", Library)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    cli._keep_memory()
    assert calls == []
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    cli._keep_memory()
    assert dict(calls) == {-1: 2**31 - 1, -3: 2**30, -8: 1}
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: object())
    cli._keep_memory()
    assert len(calls) == 3
