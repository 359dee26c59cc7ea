"""What changes no bit, and what rounds: the short form of bits.py, which stands beside this."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

BITS = Path(__file__).with_name("bits.py")
SAME = (
    "run again",
    "programs from the compilation cache",
    "stopped by an exception and resumed",
    "the second seed alone",
    "another stage in the plan",
)
CLOSE = ("jit on 2 devices", "pmap on 2 devices")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The cells of each row, and the file."""
    path = tmp_path_factory.mktemp("bits") / "bits.md"
    line = [sys.executable, str(BITS), "--network", "smooth", "--only", *SAME, *CLOSE, "--write", str(path)]
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiles in half the time
    done = subprocess.run(line, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = path.read_text(encoding="utf-8")
    assert done.stdout in written
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows}, written


def test_table_says_what_was_compared(table):
    rows, written = table
    assert list(rows) == ["smooth network", ":--|:--|:--", *SAME, *CLOSE]
    assert rows["smooth network"] == ["student's weights", "logits on test images"]
    assert written.startswith("# What changes no bit")
    assert f"jax {jax.__version__}" in written and "SHA-256" in written


@pytest.mark.parametrize("condition", SAME)
def test_changes_no_bit(table, condition):
    assert table[0][condition] == ["same bits", "same bits"]


@pytest.mark.parametrize("condition", CLOSE)
def test_rounds(table, condition):
    assert all(cell == "same bits" or float(cell) <= 1e-5 for cell in table[0][condition])


def test_one_bit_is_a_difference(tmp_path):
    """The table above can fail: neither the sign of a zero nor a last digit passes for the same bits."""
    names = runpy.run_path(str(BITS))

    def told(name, *values):
        arrays = {"weights0": np.ones(3, np.float32), "weights1": np.array(values, np.float32)}
        np.savez(tmp_path / name, **arrays)
        digests = {key: names["runs"].fingerprint([array]) for key, array in arrays.items()}
        return json.loads(json.dumps({"digests": digests, "arrays": str(tmp_path / name)}))

    reference = told("reference.npz", 3.0, 4.0, 0.0)
    assert names["cell"]("weights", told("same.npz", 3.0, 4.0, 0.0), reference) == "same bits"
    assert names["cell"]("weights", told("zero.npz", 3.0, 4.0, -0.0), reference) == "0.0e+00"
    assert names["cell"]("weights", told("digit.npz", 3.0, np.nextafter(np.float32(4), 5), 0.0), reference) == "9.5e-08"
