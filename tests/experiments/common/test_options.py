"""The placement that options choose."""

import types

import numpy as np
import optax
import pytest

from experiments.common import options as common_options
from experiments.common.cli import OptionError
from experiments.common.options import Options
from jaxkd import distill, losses, models


@pytest.fixture
def tpu(monkeypatch):
    """Eight devices that are not CPUs."""
    mesh = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(platform="tpu")] * 8), size=8
    )
    monkeypatch.setattr(distill, "make_mesh", lambda **options: mesh)


def make_plan(num_stages):
    """Makes stages that share a program."""
    model = models.from_linen(models.CNN((4,), 4))
    examples = {"inputs": np.zeros((6, 8, 8, 1), np.uint8), "labels": np.arange(6)}
    tx = optax.sgd(0.1)

    def loss(student, teachers, batch, context):
        return losses.hard_cross_entropy(student.logits, batch["labels"])

    return [
        distill.Stage(f"stage{i}", model, examples, loss, tx, steps=1) for i in range(num_stages)
    ]


def make_placement(num_stages=1, **options):
    return common_options.make_placement(Options(**options), make_plan(num_stages))


def test_cpu_trains_one_student_at_a_time_by_default():
    assert isinstance(make_placement(num_seeds=32), distill.MeshPlacement)
    vectorized = make_placement(num_seeds=32, max_students=4)
    assert isinstance(vectorized, distill.VectorizedPlacement)
    assert vectorized.max_students == 4 and vectorized.mesh.size == 8
    assert make_placement(max_students=2, parallel="none").mesh.size == 1


@pytest.mark.parametrize(
    ("num_seeds", "num_stages", "max_students"),
    [(8, 1, 8), (3, 20, 60), (32, 20, common_options.MAX_STUDENTS)],
)
def test_accelerator_trains_all_students_together(tpu, num_seeds, num_stages, max_students):
    placement = make_placement(num_stages, num_seeds=num_seeds)
    assert isinstance(placement, distill.VectorizedPlacement)
    assert placement.max_students == max_students


@pytest.mark.parametrize(
    "options",
    [
        {"num_seeds": 3},
        {"num_seeds": 32, "max_students": 1},
        {"num_seeds": 32, "model_devices": 2},
    ],
)
def test_accelerator_divides_the_batch_if_devices_would_be_idle(tpu, options):
    assert isinstance(make_placement(**options), distill.MeshPlacement)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_students": 2, "model_devices": 2}, "--max-students 2"),
    ],
)
def test_refuses_invalid_options(options, error):
    with pytest.raises(OptionError, match=error):
        Options(**options).check()
