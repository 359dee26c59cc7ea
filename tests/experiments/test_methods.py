"""The comparison of methods: every one teaches in a plan, and what it needs beside the student stays behind."""

import json
import subprocess

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import methods


@pytest.fixture(scope="module")
def left(tmp_path_factory, execute):
    """A run of a method without and one with parameters of its own."""
    folder = tmp_path_factory.mktemp("methods") / "run"
    options = ("--image-size", 28, "--num-images", 45, "--seeds", 1, "--epochs", 1, "--workdir", folder)
    return folder, execute("methods", *options, "--only", "kd", "hint").stdout


def test_compares_the_methods_that_were_asked_for(left):
    folder, printed = left
    rows = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "labels", "kd", "hint"]
    assert len({row["parameters"] for row in rows[1:]}) == 1, "a projector is no part of the student"
    assert "kd is" in printed and "hint is" in printed


def test_exports_the_student_alone(left):
    folder, _ = left
    assert {name.split("/")[1] for name in load_file(folder / "student.safetensors")} >= {"conv1", "hidden", "logits"}


def test_every_method_has_a_finite_gradient():
    config = methods.Config()
    draws = iter(jax.random.split(jax.random.key(0), 20))

    def outputs(shape):
        (first, second), hidden = shape
        shapes = {"stage1": (6, 13, 13, first), "stage2": (6, 5, 5, second), "pre_logits": (6, hidden)}
        features = {name: jax.nn.relu(jax.random.normal(next(draws), size)) for name, size in shapes.items()}
        return methods.Outputs(jax.random.normal(next(draws), (6, 10)), features)

    student, teacher = outputs(methods.STUDENT), outputs(methods.TEACHER)
    batch = {"labels": np.arange(6)}
    for name, method in methods.methods(config).items():
        params = () if method.init is None else (method.init(jax.random.key(1)),)
        loss = methods.with_labels(method)

        def mean(student, *params, loss=loss):
            return loss(student, (teacher,), batch, *params).mean()

        value, gradients = jax.value_and_grad(mean, tuple(range(1 + len(params))))(student, *params)
        leaves = jax.tree.leaves((value, gradients))
        assert all(np.isfinite(leaf).all() for leaf in leaves), name
        assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients[0])), name


def test_unknown_methods_are_told_in_one_line(command, environment):
    done = subprocess.run(
        command("methods", "--only", "kd", "telepathy"), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: --only telepathy: choose from kd ") and done.stderr.count("\n") == 1
