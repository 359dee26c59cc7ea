"""XLA's flags that CPUs need: which ones, and never against the user's own."""

import os
import subprocess
import sys

import jax
import pytest

from jaxkd import _cpu_flags
from jaxkd._cpu_flags import CONVOLUTION_FLAG, CONVOLUTION_OPTION, PRODUCT_FLAG


@pytest.mark.parametrize(
    ("version", "flags"),
    [
        ("0.7.2", [PRODUCT_FLAG]),
        ("0.8.3", []),
        ("0.9.2", [CONVOLUTION_FLAG]),
        ("0.10.2", [CONVOLUTION_FLAG]),
        ("0.11.2", [CONVOLUTION_FLAG]),
        ("0.12.0.1", [CONVOLUTION_FLAG]),
        # XLA would end the process for a flag that it does not know.
        ("0.13.0", []),
        ("0.1.9", []),
    ],
)
def test_each_version_has_its_flags(version, flags):
    assert _cpu_flags.choose_flags(version) == flags


@pytest.fixture
def version(monkeypatch):
    """Sets the version of the installed JAX to one that needs a flag for convolutions."""
    monkeypatch.setattr(_cpu_flags.importlib.metadata, "version", lambda package: "0.12.0")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", CONVOLUTION_FLAG),
        ("--xla_of_the_user=1", f"{CONVOLUTION_FLAG} --xla_of_the_user=1"),
        (f"{CONVOLUTION_OPTION}=-reduce", f"{CONVOLUTION_OPTION}=-reduce"),
        (f"{CONVOLUTION_OPTION}=", f"{CONVOLUTION_OPTION}="),
        (CONVOLUTION_FLAG, CONVOLUTION_FLAG),
    ],
)
def test_an_option_of_the_user_is_kept(version, monkeypatch, before, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    _cpu_flags.add_flags()
    assert os.environ["XLA_FLAGS"] == after
    assert not _cpu_flags.lacks_convolution_flag("0.12.0")


def test_a_missing_flag_is_noticed(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    assert _cpu_flags.lacks_convolution_flag("0.12.0")
    assert not _cpu_flags.lacks_convolution_flag("0.7.2")
    monkeypatch.delenv("XLA_FLAGS")
    assert _cpu_flags.lacks_convolution_flag("0.12.0")


CODE = """
import jax, os, sys
from jaxkd import _cpu_flags
assert _cpu_flags.choose_flags(jax.__version__) == os.environ["XLA_FLAGS"].split()
assert jax.numpy.ones(2).sum() == 2
"""


@pytest.mark.thorough
def test_the_installed_version_knows_its_flags():
    flags = " ".join(_cpu_flags.choose_flags(jax.__version__))
    environment = os.environ | {"XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", CODE], env=environment, check=True)


@pytest.mark.parametrize("command", [["-m", "jaxkd"], ["-m", "experiments.own_loop"]])
def test_commands_add_the_flags(command):
    code = (
        "import os, runpy, sys, jaxkd._cpu_flags as f\n"
        "f.add_flags = lambda: sys.exit('flags are added')\n"
        f"sys.argv = {command[1:]!r}\n"
        f"runpy.run_module({command[1]!r}, run_name='__main__')\n"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (completed.returncode, completed.stderr) == (1, "flags are added\n")
