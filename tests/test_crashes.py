"""Kills and flipped bits do no harm: the short form of crashes.py, which stands beside this."""

import subprocess
import sys
from pathlib import Path


def test_no_kill_and_no_flipped_bit_does_harm():
    line = [sys.executable, str(Path(__file__).with_name("crashes.py")), "--kills=2", "--flips=30", "--seed=1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\n2 of 2 kills, " in done.stdout and "30 of 30 flipped bits in " in done.stdout
