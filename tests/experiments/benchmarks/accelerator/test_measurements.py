"""Parts of the measurements that need no process of their own."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.benchmarks.accelerator import peaks, process, resume, smoke, steps, students
from experiments.benchmarks.accelerator.measurement import Context
from experiments.benchmarks.training_cases import Settings, make_training
from jaxkd import losses

TINY = smoke.TINY._replace(only=())


def test_every_public_loss_is_compared():
    compared = set(smoke.make_functions(TINY))
    # DIST is the sum of both terms.
    compared |= {"dist_inter_loss", "dist_intra_loss"} if "dist_loss" in compared else set()
    public = {
        name for name in losses.__all__ if name.endswith(("_loss", "_divergence", "_entropy"))
    }
    assert public <= compared


def test_every_function_has_a_value_and_gradients():
    for name, (function, arrays) in smoke.make_functions(TINY).items():
        value, gradients = jax.eval_shape(function, *arrays)
        assert value.shape == () and jax.tree.leaves(gradients), name


def test_other_losses_are_finite_and_depend_on_the_student():
    for name, (loss, arrays) in smoke.make_other_losses(4).items():
        value, gradient = jax.value_and_grad(lambda *x, loss=loss: loss(*x).mean())(*arrays)
        assert np.isfinite(value) and np.isfinite(gradient).all() and np.any(gradient), name


def test_relative_difference_is_the_largest():
    reference = [np.array([1.0, 100.0]), np.array([2.0])]
    arrays = [np.array([1.5, 100.0]), np.array([2.2])]
    assert smoke.relative_difference(arrays, reference) == pytest.approx(0.1)
    assert smoke.relative_difference(reference, reference) == 0.0
    assert smoke.relative_difference([np.array([np.nan])], [np.array([1.0])]) == np.inf
    assert smoke.relative_difference([np.array([1e-3])], [np.array([0.0])]) == 1e-3


def test_roofline_is_the_slower_of_arithmetic_and_memory():
    h200 = {"device_kind": "NVIDIA H200", "bf16": True}
    share = peaks.roofline_share(**h200, flops=989.4e12, num_bytes=1.0, seconds=2.0)
    assert share == pytest.approx(0.5)
    share = peaks.roofline_share(**h200, flops=1.0, num_bytes=4.8e12, seconds=4.0)
    assert share == pytest.approx(0.25)
    unknown = {"device_kind": "abacus", "flops": 1.0, "num_bytes": 1.0, "seconds": 1.0}
    assert peaks.roofline_share(**unknown, bf16=False) is None


def test_operations_of_a_step_are_those_of_its_networks():
    training = make_training(steps.PAIRS["tiny_cnn"], Settings(batch_size=4))
    cost = steps.read_cost(training)
    # Convolution and dense layers: the student's three passes, and the teacher's forward pass.
    forward = {width: 30 * 30 * width * 27 + 15 * 15 * width * 4 + 40 for width in (4, 8)}
    # The images need no gradient, so the first convolution has two passes.
    student = 3 * forward[4] - 30 * 30 * 4 * 27
    expected = 2 * 4 * (student + forward[8])
    assert cost["flops"] == pytest.approx(expected, rel=0.2)
    assert cost["bytes"] > 0


def test_every_pair_has_a_student_and_a_teacher():
    options = steps.Options(bf16=False)
    assert set(options.pairs) <= set(steps.PAIRS)
    assert all(case.teacher for case in steps.PAIRS.values())


def test_rows_are_vectorized_only_where_that_was_faster(tmp_path):
    assert not students.is_vectorizing_faster(tmp_path)
    path = tmp_path / "students.json"
    row = '{"results": {"rows": [{"network": "resnet20", "students": 3, "ratio": [1, %s, 9]}]}}'
    path.write_text(row % 2.5)
    assert students.is_vectorizing_faster(tmp_path)
    path.write_text(row % 3.5)
    assert not students.is_vectorizing_faster(tmp_path)


def test_a_training_that_ends_before_the_kill_is_started_anew(tmp_path, monkeypatch):
    def start(function, options, folder, *, log):
        folder.mkdir()
        return subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)

    monkeypatch.setattr(process, "start", start)
    context = Context(tmp_path, tmp_path, tmp_path, None, tmp_path / "log")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="ended before it could be killed"):
            resume.measure(resume.TINY, context)
    assert list(tmp_path.iterdir()) == []
