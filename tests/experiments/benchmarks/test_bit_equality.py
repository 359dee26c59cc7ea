"""Short run of `experiments.benchmarks.bit_equality`: what keeps every bit, and what rounds."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.benchmarks import bit_equality
from jaxkd import runs

ROOT = Path(bit_equality.__file__).parents[2]
SAME = (
    "repeated run",
    "programs from the compilation cache",
    "stopped by an exception and resumed",
    "second seed alone",
    "extra stage in the plan",
)
CLOSE = ("jit on 2 devices", "pmap on 2 devices")


thorough = pytest.mark.thorough  # trains networks, in processes of their own


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The cells of each row, and the content of the file."""
    path = tmp_path_factory.mktemp("bits") / "bits.md"
    options = ("--network", "smooth", "--only", *SAME, *CLOSE, "--write", str(path))
    # Without optimisation the programs compile in half the time.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    benchmark = subprocess.run(
        [sys.executable, "-m", bit_equality.MODULE, *options],
        cwd=ROOT,
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert benchmark.returncode == 0, benchmark.stdout + benchmark.stderr
    content = path.read_text(encoding="utf-8")
    # The command line prints how it was called before the tables.
    tables = benchmark.stdout[benchmark.stdout.index("\n|") :]
    assert tables in content
    lines = [line for line in tables.splitlines() if line.startswith("|")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {name: cells for name, *cells in rows}, content


@thorough
def test_table_names_what_was_compared(table):
    rows, content = table
    assert list(rows) == ["smooth network", ":--|:--|:--", *SAME, *CLOSE]
    assert rows["smooth network"] == ["student's weights", "logits on test images"]
    assert content.startswith("# Bits of a student")
    assert f"jax {jax.__version__}" in content and "SHA-256" in content


@thorough
@pytest.mark.parametrize("condition", SAME)
def test_keeps_every_bit(table, condition):
    assert table[0][condition] == ["same bits", "same bits"]


@thorough
@pytest.mark.parametrize("condition", CLOSE)
def test_rounds(table, condition):
    assert all(cell == "same bits" or float(cell) <= 1e-5 for cell in table[0][condition])


def test_one_bit_is_a_difference(tmp_path):
    """Neither the sign of a zero nor a last digit passes for the same bits."""

    def outcome(name, *values):
        arrays = {"weights0": np.ones(3, np.float32), "weights1": np.array(values, np.float32)}
        np.savez(tmp_path / name, **arrays)
        digests = {key: runs.fingerprint([array]) for key, array in arrays.items()}
        return {"digests": digests, "arrays": str(tmp_path / name)}

    reference = outcome("reference.npz", 3.0, 4.0, 0.0)
    same = outcome("same.npz", 3.0, 4.0, 0.0)
    zero = outcome("zero.npz", 3.0, 4.0, -0.0)
    digit = outcome("digit.npz", 3.0, np.nextafter(np.float32(4), 5), 0.0)
    assert bit_equality.compare("weights", same, reference) == "same bits"
    assert bit_equality.compare("weights", zero, reference) == "0.0e+00"
    assert bit_equality.compare("weights", digit, reference) == "9.5e-08"


def test_unknown_condition_ends_in_one_line(refuse):
    assert "--only 'no such': not a condition" in refuse(bit_equality, "--only", "no such")


def test_worker_with_another_jax_gets_the_user_s_flags_alone(tmp_path, monkeypatch):
    """XLA aborts at a flag that it does not know; each version adds its own when it starts."""
    environments = []

    def run(command, env, **options):
        environments.append(env)
        return subprocess.CompletedProcess(command, 0, '{"stopped": true}\n', "")

    monkeypatch.setenv("XLA_FLAGS", "--xla_of_this_version --xla_of_the_user")
    monkeypatch.setattr(bit_equality, "USER_XLA_FLAGS", "--xla_of_the_user")
    monkeypatch.setattr(bit_equality.subprocess, "run", run)
    bit_equality.start_worker("smooth", tmp_path / "case", python="/usr/bin/python", devices=2)
    assert environments[0]["XLA_FLAGS"] == (
        "--xla_of_the_user --xla_force_host_platform_device_count=2"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--write", "no/such/folder/bits.md"), "must be a file in a folder that exists"),
        (("--python", "no-such-python"), "there is no such program"),
    ],
)
def test_options_that_would_fail_at_the_end_are_refused(refuse, options, expected):
    assert expected in refuse(bit_equality, *options)
