"""The comparison of methods: each one trains a student, without a trace of its own parameters."""

import json
import re
import subprocess

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import methods
from jaxkd.distill import LossContext
from jaxkd.models import Outputs

pytestmark = pytest.mark.thorough  # trains networks, in processes of their own


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, execute):
    """A run of a method without and one with parameters of its own: its folder and its output."""
    folder = tmp_path_factory.mktemp("methods") / "run"
    options = (
        "--image-size",
        28,
        "--num-images",
        45,
        "--num-seeds",
        1,
        "--epochs",
        1,
        "--workdir",
        folder,
    )
    return folder, execute("methods", *options, "--only", "kd", "hint").stdout


def test_compares_the_selected_methods(finished_run):
    folder, printed = finished_run
    rows = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "labels", "kd", "hint"]
    student_sizes = {row["parameters"] for row in rows[1:]}
    assert len(student_sizes) == 1, "a projector is not part of the student"
    assert "kd is" in printed and "hint is" in printed


def test_tunes_the_weights_with_another_seed(tmp_path, execute):
    options = ("--image-size", 28, "--num-images", 45, "--num-seeds", 1, "--epochs", 1)
    folder = tmp_path / "run"
    printed = execute(
        "methods", *options, "--workdir", folder, "--tune", "--only", "kd", "ctkd"
    ).stdout
    line = next(line for line in printed.splitlines() if line.startswith("weight of kd,"))
    accuracies = {
        float(weight): float(accuracy)
        for weight, accuracy in re.findall(r"([\d.]+): ([\d.]+)", line)
    }
    assert list(accuracies) == [0.09, 0.9, 9.0]
    best = max(accuracies, key=accuracies.get)
    assert f"kd {best:g}, ctkd " in (folder / "report.md").read_text()
    for name, seed in [("run_tuning", 1), ("run", 0)]:
        records = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert {json.loads(record)["seed"] for record in records} == {seed}


def test_exports_the_student_alone(finished_run):
    folder, _ = finished_run
    layers = {name.split("/")[1] for name in load_file(folder / "student.safetensors")}
    assert layers >= {"conv1", "hidden", "logits"}


def test_every_method_has_a_finite_gradient():
    config = methods.Config()
    keys = iter(jax.random.split(jax.random.key(0), 20))

    def make_outputs(architecture):
        (first, second), hidden = architecture
        shapes = {
            "stage1": (6, 13, 13, first),
            "stage2": (6, 5, 5, second),
            "pre_logits": (6, hidden),
        }
        features = {
            name: jax.nn.relu(jax.random.normal(next(keys), shape))
            for name, shape in shapes.items()
        }
        return Outputs(jax.random.normal(next(keys), (6, 10)), features)

    student = make_outputs(methods.STUDENT)
    teacher = make_outputs(methods.TEACHER)
    batch = {"labels": np.arange(6)}
    for name, method in methods.make_methods(config).items():
        params = () if method.init is None else (method.init(jax.random.key(1)),)
        loss = methods.make_loss(method)

        def mean(student, *params, loss=loss):
            own_params = params[0] if params else None
            context = LossContext(0, 0.0, jax.random.key(2), own_params, None)
            return loss(student, (teacher,), batch, context).mean()

        value_and_grad = jax.jit(jax.value_and_grad(mean, tuple(range(1 + len(params)))))
        value, gradients = value_and_grad(student, *params)
        leaves = jax.tree.leaves((value, gradients))
        assert all(np.isfinite(leaf).all() for leaf in leaves), name
        assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients[0])), name


def test_unknown_method_ends_in_one_line(command, environment):
    process = subprocess.run(
        command("methods", "--only", "kd", "telepathy"),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: --only telepathy: choose from kd ")
    assert process.stderr.count("\n") == 1
