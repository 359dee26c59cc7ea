"""The training loop without plans: it runs, is short, and imports nothing of the experiments."""

import ast
import re
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
    assert len(source.splitlines()) < 80
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"jax", "jax.numpy", "numpy", "optax", "flax", "jaxkd"}
