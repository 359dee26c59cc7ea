"""Short run of `experiments.benchmarks.crash_recovery`: kills and flipped bits are harmless."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.benchmarks import crash_recovery

pytestmark = pytest.mark.thorough  # trains networks, in processes of their own

ROOT = Path(crash_recovery.__file__).parents[2]


def test_kills_and_flipped_bits_are_harmless():
    benchmark = subprocess.run(
        [sys.executable, "-m", crash_recovery.MODULE, "--kills=2", "--flips=30", "--seed=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert benchmark.returncode == 0, benchmark.stdout + benchmark.stderr
    assert "\n2 of 2 kills, " in benchmark.stdout
    assert "30 of 30 flipped bits in " in benchmark.stdout


@pytest.mark.parametrize("options", [("--kills", "-1"), ("--flips", "-1")])
def test_bad_options_end_in_one_line(options, refuse):
    assert f"{options[0]} -1: must be at least 0" in refuse(crash_recovery, *options)
