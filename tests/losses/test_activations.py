"""Tests losses on single activations: hand-worked values, float64 references, limits, gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd.losses import activations, features


def draw(student=(3, 4, 2, 6), teacher=None, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], student), jax.random.normal(keys[1], teacher or student)


def many_to_one(student, teacher):
    """Compares with the teacher's first two channels, in three segments."""
    return activations.many_to_one_loss(student, teacher[..., :2])


def reference_boundary(student, teacher, margin=1.0):
    values = np.zeros(len(student))
    for index in np.ndindex(*student.shape):
        s, t = student[index], teacher[index]
        if t > 0 and s < margin:
            values[index[0]] += (margin - s) ** 2
        if t <= 0 and s > -margin:
            values[index[0]] += (margin + s) ** 2
    return values


def reference_many_to_one(student, teacher):
    segments = [student[..., i : i + 2] for i in (0, 2, 4)]
    axes = tuple(range(1, student.ndim))
    return sum(np.mean((segment - teacher[..., :2]) ** 2, axes) for segment in segments)


REFERENCES = {
    activations.activation_boundary_loss: reference_boundary,
    many_to_one: reference_many_to_one,
}
LOSSES = pytest.mark.parametrize("loss", REFERENCES, ids=lambda loss: loss.__name__)


def value_and_gradients(loss, student, teacher):
    return jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1)))(
        student, teacher
    )


def test_values_worked_by_hand():
    # Active: 2 and 1/2 against the margin 1. Not active, at 0 too: −3, 1/2 and 0.
    student = jnp.array([[2.0, 0.5, -3.0, 0.5, 0.0]])
    teacher = jnp.array([[0.1, 9.0, -1.0, -0.1, 0.0]])
    value = activations.activation_boundary_loss(student, teacher)
    np.testing.assert_allclose(value, [0 + 0.5**2 + 0 + 1.5**2 + 1], rtol=1e-6)
    value = activations.activation_boundary_loss(student, teacher, margin=3.0)
    np.testing.assert_allclose(value, [1 + 2.5**2 + 0 + 3.5**2 + 9], rtol=1e-6)
    # Segments (1, 2) and (3, 2) against (1, 2).
    value = activations.many_to_one_loss(jnp.array([[1.0, 2.0, 3.0, 2.0]]), jnp.array([[1.0, 2.0]]))
    np.testing.assert_allclose(value, [2], rtol=1e-6)


@LOSSES
@pytest.mark.parametrize("shape", [(3, 4, 2, 6), (3, 6)])
def test_equal_float64_references(loss, shape):
    student, teacher = draw(shape)
    value = loss(student, teacher)
    chex.assert_shape(value, (3,))
    expected = REFERENCES[loss](np.asarray(student, np.float64), np.asarray(teacher, np.float64))
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_only_the_signs_of_the_teacher_count():
    student, teacher = draw()
    expected = activations.activation_boundary_loss(student, teacher)
    scaled = jnp.where(teacher > 0, 100 * teacher, 0)
    np.testing.assert_array_equal(activations.activation_boundary_loss(student, scaled), expected)
    correct = jnp.where(teacher > 0, 1.0, -1.0) * (1 + jnp.abs(student))
    value, gradients = value_and_gradients(activations.activation_boundary_loss, correct, teacher)
    assert value == 0
    chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


def test_one_segment_is_the_hint_loss_and_equal_segments_are_its_multiple():
    student, teacher = draw()
    expected = features.hint_loss(student, teacher)
    np.testing.assert_allclose(activations.many_to_one_loss(student, teacher), expected, rtol=1e-6)
    tiled = jnp.tile(student, (1, 1, 1, 4))
    np.testing.assert_allclose(
        activations.many_to_one_loss(tiled, teacher), 4 * expected, rtol=1e-5
    )
    copies = jnp.tile(teacher, (1, 1, 1, 4))
    np.testing.assert_array_equal(activations.many_to_one_loss(copies, teacher), 0)


@LOSSES
@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_extreme_magnitudes_stay_finite(loss, scale):
    student, teacher = draw()
    for pair in ((scale * student, scale * teacher), (scale * student, teacher)):
        chex.assert_tree_all_finite(value_and_gradients(loss, *pair))


@LOSSES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_features_are_widened_first(loss, dtype):
    student, teacher = (100 * array.astype(dtype) for array in draw())
    value = loss(student, teacher)
    assert value.dtype == jnp.float32
    expected = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert loss(student.astype(jnp.float32), teacher).dtype == jnp.float32


@pytest.mark.thorough
@LOSSES
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher = draw((1, 2, 2, 6))
    # The teacher's gradient is 0 but for the jump at 0, so it is held fixed.
    check_grads(
        jax.jit(lambda s: loss(s, teacher)), (student,), order=1, modes=("rev",),
        eps=1e-2, atol=1e-2, rtol=1e-2,
    )  # fmt: skip


@LOSSES
def test_wrong_shapes_and_dtypes_raise(loss):
    student, teacher = draw()
    large = jnp.concatenate([teacher, teacher], 1)
    for wrong in (large, teacher[:1], teacher[:, 0]):
        with pytest.raises(ValueError, match="project the student's.*pool"):
            loss(student, wrong)
    with pytest.raises(ValueError, match=r"must be \[B, \.\.\., C\]"):
        loss(student[0, 0, 0], teacher[0, 0, 0])
    with pytest.raises(TypeError, match="floating-point"):
        loss(student, jnp.ones(student.shape, jnp.int32))


def test_wrong_channels_and_margins_raise():
    student, teacher = draw()
    for wrong in (teacher[..., :4], jnp.concatenate([teacher, teacher], -1), teacher[..., :0]):
        with pytest.raises(ValueError, match="a multiple of the channels"):
            activations.many_to_one_loss(student, wrong)
    with pytest.raises(ValueError, match="must have the same shape"):
        activations.activation_boundary_loss(student, teacher[..., :3])
    for margin in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="margin must be positive"):
            activations.activation_boundary_loss(student, teacher, margin=margin)
