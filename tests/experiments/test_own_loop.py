"""The training loop without plans: it runs, is short, and imports nothing of the experiments."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import own_loop


@pytest.mark.thorough
def test_prints_the_accuracy_of_teacher_and_students(capsys):
    # optax's Adam mixes floats and integers.
    with jax.numpy_dtype_promotion("standard"):
        own_loop.main(num_seeds=2, steps=30)
    lines = capsys.readouterr().out.splitlines()
    matches = [re.fullmatch(r"([\w ]+): ([\d.]+) ± [\d.]+ %", line) for line in lines]
    assert [match[1] for match in matches] == ["teacher", "student alone", "distilled"]
    # Ten classes: guesses would be right in 10 %.
    assert all(float(match[2]) > 40 for match in matches)


def test_is_short_and_imports_nothing_of_the_experiments():
    source = Path(own_loop.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 85
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"argparse", "jax", "jax.numpy", "numpy", "optax", "flax", "jaxkd"}


@pytest.mark.parametrize(("argument", "status"), [("--epochs=1", 2), ("--help", 0)])
def test_takes_no_options(argument, status):
    """An option would be passed over, and the training started."""
    command = [sys.executable, "-m", "experiments.own_loop", argument]
    root = Path(own_loop.__file__).parents[1]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert ended.returncode == status and "%" not in ended.stdout.partition("Result")[0]
