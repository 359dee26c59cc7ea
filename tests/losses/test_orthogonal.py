"""Tests orthogonal projections and whitening: hand-worked values, references, limits, gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd.losses import orthogonal

SIZES = pytest.mark.parametrize("sizes", [(3, 5), (5, 3), (4, 4)], ids=str)


def draw(student=(6, 3), teacher=(6, 5), seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], student), jax.random.normal(keys[1], teacher)


def draw_params(student=3, teacher=5, seed=1):
    return orthogonal.init_orthogonal_projector(jax.random.key(seed), student, teacher)


def loss(student, teacher):
    return orthogonal.orthogonal_projection_loss(draw_params(), student, teacher)


def kernel_of(params):
    size = params["raw_kernel"].shape[0]
    return orthogonal.project_orthogonally(params, jnp.eye(size))


def as_float64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


def gram_schmidt(matrix):
    """Orthonormalises columns one after another, each with a positive product with the original."""
    columns = []
    for column in matrix.T:
        rest = column - sum((column @ other) * other for other in columns)
        columns.append(rest / np.linalg.norm(rest))
    return np.stack(columns, axis=1)


def reference_kernel(params):
    raw = np.asarray(params["raw_kernel"], np.float64)
    return gram_schmidt(raw.T).T if raw.shape[0] < raw.shape[1] else gram_schmidt(raw)


def reference_loss(params, student, teacher):
    student, teacher = as_float64((student, teacher))
    values = []
    for s, t in zip(student @ reference_kernel(params), teacher, strict=True):
        gap = np.abs(s - (t - t.mean(-1, keepdims=True)) / t.std(-1, keepdims=True))
        values.append(np.where(gap <= 1, gap**2 / 2, gap - 0.5).mean())
    return np.array(values)


@SIZES
def test_kernels_are_orthonormal_and_equal_gram_schmidt(sizes):
    params = draw_params(*sizes)
    kernel = np.asarray(kernel_of(params))
    gram = kernel @ kernel.T if sizes[0] <= sizes[1] else kernel.T @ kernel
    np.testing.assert_allclose(gram, np.eye(min(sizes)), atol=1e-6)
    np.testing.assert_allclose(kernel, reference_kernel(params), atol=2e-6)


def test_values_worked_by_hand():
    # (3, 4) / 5 times (3, 4) is 5. The teacher is (−1, 1) after standardising: huber(5 + 1) = 5.5
    # and huber(0 − 1) = 1/2 with the first row (1, 0).
    params = {"raw_kernel": jnp.array([[3.0], [4.0]])}
    projected = orthogonal.project_orthogonally(params, jnp.array([[3.0, 4.0]]))
    np.testing.assert_allclose(projected, [[5]], rtol=1e-6)
    params = {"raw_kernel": jnp.array([[7.0, 0.0]])}
    value = orthogonal.orthogonal_projection_loss(
        params, jnp.array([[5.0]]), jnp.array([[10.0, 30.0]])
    )
    np.testing.assert_allclose(value, [(5.5 + 0.5) / 2], rtol=1e-5)
    # Independent channels of variance 81 and 1 around (0, 4).
    features = jnp.array([[9.0, 5.0], [9.0, 3.0], [-9.0, 5.0], [-9.0, 3.0]])
    expected = [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    np.testing.assert_allclose(orthogonal.whiten_features(features), expected, rtol=1e-3)


@pytest.mark.parametrize("middle", [(), (2, 4)])
def test_loss_equals_the_reference(middle):
    student, teacher = draw((6, *middle, 3), (6, *middle, 5))
    value = loss(student, teacher)
    chex.assert_shape(value, (6,))
    expected = reference_loss(draw_params(), student, teacher)
    if middle:
        expected = expected.reshape(6)
    np.testing.assert_allclose(value, expected, rtol=2e-5)


def test_wide_projections_keep_lengths_and_angles():
    student, _ = draw()
    projected = orthogonal.project_orthogonally(draw_params(), 100 * student)
    gram = np.asarray(100 * student) @ np.asarray(100 * student).T
    np.testing.assert_allclose(np.asarray(projected) @ np.asarray(projected).T, gram, rtol=1e-4)


@SIZES
def test_kernels_do_not_depend_on_the_scale_and_stay_orthonormal_in_training(sizes):
    params = draw_params(*sizes)
    for scale in (1e-3, 1e3):
        scaled = {"raw_kernel": scale * params["raw_kernel"]}
        chex.assert_trees_all_close(kernel_of(scaled), kernel_of(params), atol=1e-5)
    student, teacher = draw((6, sizes[0]), (6, sizes[1]))

    @jax.jit
    def step(params):
        value, gradient = jax.value_and_grad(
            lambda params: orthogonal.orthogonal_projection_loss(params, student, teacher).mean()
        )(params)
        return jax.tree.map(lambda leaf, slope: leaf - slope, params, gradient), value

    values = []
    for _ in range(20):
        params, value = step(params)
        values.append(value)
    assert values[-1] < 0.95 * values[0]
    kernel = np.asarray(kernel_of(params))
    gram = kernel @ kernel.T if sizes[0] <= sizes[1] else kernel.T @ kernel
    np.testing.assert_allclose(gram, np.eye(min(sizes)), atol=1e-5)


def test_zero_for_a_student_that_is_the_standardised_teacher_in_other_axes():
    _, teacher = draw(teacher=(6, 5))
    standard = (teacher - teacher.mean(-1, keepdims=True)) / teacher.std(-1, keepdims=True)
    params = draw_params(5, 5)
    student = standard @ kernel_of(params).T
    value = orthogonal.orthogonal_projection_loss(params, student, 7 * teacher + 3)
    np.testing.assert_allclose(value, 0, atol=1e-6)


def test_whitened_features_have_mean_zero_and_the_identity_as_covariance():
    mixing = jax.random.normal(jax.random.key(2), (5, 5))
    features = jax.random.normal(jax.random.key(3), (40, 3, 5)) @ mixing + 30.0
    whitened = orthogonal.whiten_features(features)
    chex.assert_shape(whitened, (40, 3, 5))
    vectors = np.asarray(whitened).reshape(-1, 5)
    np.testing.assert_allclose(vectors.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(vectors.T @ vectors / 120, np.eye(5), atol=2e-3)
    vectors = np.asarray(features, np.float64).reshape(-1, 5)
    centred = vectors - vectors.mean(0)
    covariance = centred.T @ centred / 120
    floor = orthogonal.WHITENING_FLOOR * np.trace(covariance) / 5 * np.eye(5)
    expected = np.linalg.solve(np.linalg.cholesky(covariance + floor), centred.T).T
    np.testing.assert_allclose(whitened.reshape(-1, 5), expected, atol=2e-3)
    for scale in (1e-15, 1e15):
        chex.assert_trees_all_close(
            orthogonal.whiten_features(scale * features), whitened, atol=5e-3
        )


def test_fewer_vectors_than_channels_are_whitened_in_their_subspace():
    features = jax.random.normal(jax.random.key(0), (4, 6))
    values = np.linalg.svd(np.asarray(orthogonal.whiten_features(features)))[1]
    np.testing.assert_allclose(values, [2, 2, 2, 0], atol=1e-3)


def test_degenerate_features_are_finite():
    def total(features):
        return (orthogonal.whiten_features(features) ** 3).sum()

    for features in (jnp.zeros((4, 3)), jnp.full((4, 3), 5.0), jnp.ones((1, 3))):
        chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(total))(features))
        np.testing.assert_allclose(orthogonal.whiten_features(features), 0, atol=1e-6)
    assert orthogonal.whiten_features(jnp.zeros((0, 3))).shape == (0, 3)
    student, teacher = draw()
    for pair in ((0 * student, teacher), (student, 0 * teacher), (student, 0 * teacher + 3)):
        gradients = jax.jit(jax.grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1)))(*pair)
        chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_magnitudes_stay_finite(scale):
    student, teacher = draw()
    value_and_gradients = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1)))
    chex.assert_tree_all_finite(value_and_gradients(scale * student, scale * teacher))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_arrays_are_widened_first(dtype):
    student, teacher = (features.astype(dtype) for features in draw())
    value = loss(student, teacher)
    assert value.dtype == jnp.float32
    expected = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert orthogonal.whiten_features(teacher).dtype == jnp.float32
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), draw_params())
    kernel = np.asarray(kernel_of(params))
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(3), atol=1e-6)


@pytest.mark.thorough
def test_gradients_are_those_of_finite_differences():
    student, teacher = draw()
    options = {"order": 1, "modes": ("rev",), "eps": 1e-2, "atol": 2e-2, "rtol": 2e-2}
    check_grads(
        jax.jit(orthogonal.orthogonal_projection_loss), (draw_params(), student, teacher), **options
    )
    tall = draw((6, 5), (6, 3))
    check_grads(
        jax.jit(orthogonal.orthogonal_projection_loss), (draw_params(5, 3), *tall), **options
    )
    check_grads(
        jax.jit(lambda f: (orthogonal.whiten_features(f) ** 3).sum(-1)), (tall[1],), **options
    )


def test_wrong_shapes_and_dtypes_raise():
    student, teacher = draw()
    with pytest.raises(ValueError, match="3 channels in their last axis.*init_orthogonal"):
        orthogonal.project_orthogonally(draw_params(), teacher)
    with pytest.raises(ValueError, match="3 channels in their last axis"):
        loss(teacher, teacher)
    for wrong in (student, teacher[:2], teacher[:, None]):
        with pytest.raises(ValueError, match="call init_orthogonal_projector.*pool"):
            loss(student, wrong)
    with pytest.raises(ValueError, match=r"must be \[B, \.\.\., C\]"):
        loss(student[0], teacher[0])
    with pytest.raises(ValueError, match=r"must be \[B, \.\.\., D\]"):
        orthogonal.whiten_features(teacher[0])
    for call in (
        lambda: loss(student, teacher.astype(jnp.int32)),
        lambda: orthogonal.project_orthogonally(draw_params(), jnp.ones((2, 3), jnp.int32)),
        lambda: orthogonal.whiten_features(jnp.ones((2, 3), jnp.int32)),
    ):
        with pytest.raises(TypeError, match="floating-point"):
            call()
