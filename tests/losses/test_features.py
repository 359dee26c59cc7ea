"""Tests feature losses: hand-worked values, float64 references, limits, invariances, zero maps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxkd.losses import features


def draw(seed=0, student=(3, 4, 2, 5), teacher=None):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], student), jax.random.normal(keys[1], teacher or student)


PARAMS = features.init_variational_information(jax.random.key(7), 5, 5, variance=0.5)
PARAMS = PARAMS | {"bias": jnp.linspace(-1, 1, 5), "raw_variance": jnp.linspace(-2, 2, 5)}


def variational(student, teacher):
    return features.variational_information_loss(PARAMS, student, teacher)


def flow(student, teacher):
    """Computes the FSP loss between all channels and the first three."""
    return features.flow_of_solution_procedure_loss(
        student, student[..., :3], teacher, teacher[..., :3]
    )


def reference_map(activations, power=2):
    result = np.zeros((activations.shape[0], activations.shape[1] * activations.shape[2]))
    for b, image in enumerate(np.asarray(activations, np.float64)):
        attention = [sum(abs(a) ** power for a in position) for row in image for position in row]
        result[b] = attention / np.sqrt(np.sum(np.square(attention)))
    return result


def reference_attention(student, teacher):
    return np.linalg.norm(reference_map(student) - reference_map(teacher), axis=1)


def reference_attention_mse(student, teacher):
    return np.mean((reference_map(student) - reference_map(teacher)) ** 2, axis=1)


def reference_hint(student, teacher):
    return np.array([np.mean((s - t) ** 2) for s, t in zip(student, teacher, strict=True)])


def reference_variational(student, teacher):
    kernel, bias, raw = (
        np.asarray(PARAMS[name], np.float64) for name in ("kernel", "bias", "raw_variance")
    )
    variance = np.log(1 + np.exp(raw)) + 1e-5
    values = []
    for s, t in zip(student.reshape(-1, *student.shape[-3:]), teacher, strict=True):
        units = [
            (t[h, w, c] - s[h, w] @ kernel[:, c] - bias[c]) ** 2 / (2 * variance[c])
            + np.log(np.sqrt(variance[c]))
            for h, w, c in np.ndindex(*t.shape)
        ]
        values.append(np.mean(units))
    return np.array(values)


def reference_selectivity(student, teacher):
    def kernel(first, second):
        return np.mean([(x @ y) ** 2 for x in first for y in second])

    values = []
    for s, t in zip(student, teacher, strict=True):
        s, t = (
            [x / np.linalg.norm(x) for x in maps.reshape(-1, maps.shape[-1]).T] for maps in (s, t)
        )
        values.append(kernel(s, s) + kernel(t, t) - 2 * kernel(s, t))
    return np.array(values)


def reference_flow_matrix(first, second):
    result = np.zeros((first.shape[0], first.shape[-1], second.shape[-1]))
    for b, i, j in np.ndindex(*result.shape):
        result[b, i, j] = np.mean(first[b, :, :, i] * second[b, :, :, j])
    return result


def reference_flow(student, teacher):
    gap = reference_flow_matrix(student, student[..., :3]) - reference_flow_matrix(
        teacher, teacher[..., :3]
    )
    return np.array([np.linalg.norm(matrix, "fro") ** 2 for matrix in gap])


REFERENCES = {
    features.hint_loss: reference_hint,
    features.attention_transfer_loss: reference_attention,
    features.attention_transfer_mse_loss: reference_attention_mse,
    features.neuron_selectivity_loss: reference_selectivity,
    flow: reference_flow,
    variational: reference_variational,
}
LOSSES = pytest.mark.parametrize("loss", REFERENCES, ids=lambda loss: loss.__name__)
DISTANCES = pytest.mark.parametrize("loss", list(REFERENCES)[:-1], ids=lambda loss: loss.__name__)
ATTENTION = (features.attention_transfer_loss, features.attention_transfer_mse_loss)
IMAGE_LOSSES = (*ATTENTION, features.neuron_selectivity_loss)


def value_and_gradients(loss, student, teacher):
    return jax.value_and_grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1))(student, teacher)


def images(*positions):
    """Makes an image of one row of positions, given as lists of channels."""
    return jnp.array([[[[float(a) for a in position] for position in positions]]])


def test_values_worked_by_hand():
    # Differences 1, 0, 2, 1 over four units: (1 + 0 + 4 + 1) / 4.
    hint = features.hint_loss(images([1, 2], [3, 4]), images([2, 2], [5, 3]))
    np.testing.assert_allclose(hint, [1.5], rtol=1e-6)
    # Energies 1 + 2² + 2² = 9 and 12, length 15: 3/5 and 4/5 against 1 and 0.
    student, teacher = images([1, 2, -2], [0, 0, np.sqrt(12)]), images([-7], [0])
    np.testing.assert_allclose(features.attention_transfer_map(student), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(
        features.attention_transfer_loss(student, teacher), [np.sqrt(0.16 + 0.64)], rtol=1e-6
    )
    np.testing.assert_allclose(
        features.attention_transfer_mse_loss(student, teacher), [0.8 / 2], rtol=1e-6
    )
    # p = 1: |1| + |−2| = 3 and |4| = 4.
    linear = features.attention_transfer_map(images([1, -2], [0, 4]), power=1)
    np.testing.assert_allclose(linear, [[0.6, 0.8]], rtol=1e-6)
    # Channels (1, 0) and (0, 1) against (3/5, 4/5): student 2/4, teacher 1, between them
    # (9/25 + 16/25) / 2.
    selectivity = features.neuron_selectivity_loss(images([2, 0], [0, 5]), images([3], [4]))
    np.testing.assert_allclose(selectivity, [0.5 + 1 - 2 * 0.5], rtol=1e-6)
    # (1·3 + 2·4) / 2 and (1·0 + 2·1) / 2; the teacher's matrix is twice that, so the difference is
    # the matrix.
    first, second = images([1], [2]), images([3, 0], [4, 1])
    np.testing.assert_allclose(features.flow_matrix(first, second), [[[5.5, 1]]], rtol=1e-6)
    gap = features.flow_of_solution_procedure_loss(first, second, 2 * first, second)
    np.testing.assert_allclose(gap, [5.5**2 + 1], rtol=1e-6)
    # A mean of 2·3 + 1 = 7 against 10, at variance 4 + 10⁻⁵: (9 / 4 + log 4) / 2.
    raw = np.log(np.expm1(4.0))
    params = {
        "kernel": jnp.array([[2.0]]),
        "bias": jnp.array([1.0]),
        "raw_variance": jnp.array([raw]),
    }
    value = features.variational_information_loss(params, jnp.array([[3.0]]), jnp.array([[10.0]]))
    np.testing.assert_allclose(value, [(9 / 4 + np.log(4)) / 2], rtol=1e-5)


@LOSSES
def test_equal_float64_references(loss):
    student, teacher = draw()
    value = loss(student, teacher)
    chex.assert_shape(value, (3,))
    expected = REFERENCES[loss](np.asarray(student, np.float64), np.asarray(teacher, np.float64))
    np.testing.assert_allclose(value, expected, rtol=2e-5)


@pytest.mark.parametrize("power", [0.5, 1, 3, 4.0])
def test_powers_equal_the_reference(power):
    """An odd power without the absolute value would let channels of opposite sign cancel."""
    student, _ = draw()
    np.testing.assert_allclose(
        features.attention_transfer_map(student, power=power),
        reference_map(student, power),
        rtol=1e-5,
    )


def test_a_large_power_leaves_the_strongest_position():
    student, _ = draw()
    strongest = np.abs(student).max(-1).reshape(3, -1).argmax(-1)
    for scale in (1e-4, 1.0, 1e4):
        attention = features.attention_transfer_map(scale * student, power=300)
        np.testing.assert_allclose(attention, np.eye(8)[strongest], atol=0.02)


@pytest.mark.thorough
@DISTANCES
def test_zero_where_equal_and_positive_elsewhere(loss):
    student, teacher = draw()
    value, gradients = value_and_gradients(loss, student, student)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    chex.assert_trees_all_close(gradients, jax.tree.map(jnp.zeros_like, gradients), atol=1e-6)
    assert (loss(student, teacher) > 1e-3).all()


def test_the_forms_of_attention_transfer_agree():
    student, teacher = draw()
    distance, mean = (loss(student, teacher) for loss in ATTENTION)
    np.testing.assert_allclose(mean, distance**2 / 8, rtol=1e-5)


@pytest.mark.thorough
@given(seed=st.integers(0, 1000), channels=st.sampled_from([1, 6]), dead=st.booleans())
@settings(max_examples=25, deadline=None)
def test_losses_between_directions_are_bounded(seed, channels, dead):
    student, teacher = draw(seed, (2, 2, 2, 4), (2, 2, 2, channels))
    student = (
        student * (jnp.arange(4) > 1).astype(jnp.float32)[None, None, None] if dead else student
    )
    distance = features.attention_transfer_loss(student, teacher)
    assert (distance >= 0).all() and (distance <= np.sqrt(2) + 1e-6).all()
    selectivity = features.neuron_selectivity_loss(student, teacher)
    assert (selectivity > -1e-6).all() and (selectivity <= 2).all()
    # The discrepancy is the squared distance of two means of x xᵀ, which cannot be negative.
    outer = [
        np.einsum("bpc,bqc->bpq", x, x) / x.shape[-1]
        for x in map(unit_channels, (student, teacher))
    ]
    np.testing.assert_allclose(selectivity, np.square(outer[0] - outer[1]).sum((1, 2)), atol=1e-5)


def unit_channels(maps):
    maps = np.asarray(maps, np.float64).reshape(maps.shape[0], -1, maps.shape[-1])
    length = np.linalg.norm(maps, axis=1, keepdims=True)
    return np.divide(maps, length, out=np.zeros_like(maps), where=length > 0)


@pytest.mark.parametrize("loss", IMAGE_LOSSES, ids=lambda loss: loss.__name__)
def test_scale_sign_and_order_of_channels_do_not_matter(loss):
    student, teacher = draw(teacher=(3, 4, 2, 7))
    expected = loss(student, teacher)
    np.testing.assert_allclose(loss(-30 * student[..., ::-1], 0.01 * teacher), expected, rtol=1e-4)
    np.testing.assert_allclose(loss(student[:, ::-1], teacher[:, ::-1]), expected, rtol=1e-4)
    assert (np.abs(loss(student[:, ::-1], teacher) - expected) > 1e-4).all()


def test_neuron_selectivity_does_not_depend_on_the_scale_of_a_channel():
    student, teacher = draw()
    scales = jnp.array([1.0, 10.0, 0.1, 3.0, 7.0])[None, None, None]
    expected = features.neuron_selectivity_loss(student, teacher)
    np.testing.assert_allclose(
        features.neuron_selectivity_loss(student * scales, teacher), expected, rtol=1e-4
    )
    assert (np.abs(features.attention_transfer_loss(student * scales, student)) > 1e-2).all()


def test_flow_ignores_positions_and_compares_images_of_different_sizes():
    student, teacher = draw(teacher=(3, 4, 4, 5))
    expected = flow(student, teacher)
    np.testing.assert_allclose(flow(student[:, ::-1], teacher[:, :, ::-1]), expected, rtol=1e-5)
    np.testing.assert_allclose(flow(jnp.tile(student, (1, 2, 1, 1)), teacher), expected, rtol=1e-5)
    student_norm = np.square(reference_flow_matrix(student, student[..., :3])).sum((1, 2))
    np.testing.assert_allclose(flow(student, 0 * teacher), student_norm, rtol=1e-5)


@LOSSES
def test_examples_are_independent(loss):
    student, teacher = draw()
    expected = loss(student, teacher)
    np.testing.assert_allclose(loss(student[1:2], teacher[1:2]), expected[1:2], rtol=1e-5)
    np.testing.assert_allclose(loss(student[::-1], teacher[::-1]), expected[::-1], rtol=1e-5)


@pytest.mark.thorough
@LOSSES
def test_degenerate_maps_are_finite(loss):
    random, _ = draw()
    zero = jnp.zeros_like(random)
    constant = jnp.ones_like(random)
    for student in (zero, constant, random.at[..., 0].set(0)):
        for teacher in (zero, constant, random):
            chex.assert_tree_all_finite(value_and_gradients(loss, student, teacher))


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_attention_of_a_layer_of_zeros(power):
    """The distance is then the length of the teacher's map, 1, and the gradient is 0."""
    teacher, _ = draw()
    sparse = jax.nn.relu(teacher)
    zero = jnp.zeros_like(teacher)
    value, gradient = jax.value_and_grad(
        lambda s: features.attention_transfer_loss(s, teacher, power=power).sum()
    )(zero)
    np.testing.assert_allclose(value, 3, rtol=1e-6)
    chex.assert_trees_all_equal(gradient, zero)
    chex.assert_tree_all_finite(
        value_and_gradients(
            lambda s, t: features.attention_transfer_loss(s, t, power=power), sparse, teacher
        )
    )


@pytest.mark.thorough
@LOSSES
def test_maps_of_a_single_position(loss):
    student, teacher = draw(student=(3, 1, 1, 5))
    chex.assert_tree_all_finite(value_and_gradients(loss, student, teacher))
    if loss in ATTENTION:
        np.testing.assert_allclose(loss(student, teacher), 0, atol=1e-6)


@LOSSES
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_magnitudes_stay_finite(loss, scale):
    student, teacher = draw()
    for pair in ((scale * student, scale * teacher), (scale * student, teacher)):
        value, gradients = value_and_gradients(loss, *pair)
        chex.assert_tree_all_finite((value, gradients))
        assert float(np.abs(value)) > 0


@LOSSES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_features_are_widened_first(loss, dtype):
    student, teacher = (100 * x.astype(dtype) for x in draw(student=(2, 8, 8, 5)))
    value = loss(student, teacher)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        value, loss(student.astype(jnp.float32), teacher.astype(jnp.float32)), rtol=1e-6
    )
    assert loss(student.astype(jnp.float32), teacher).dtype == jnp.float32


@pytest.mark.thorough
@LOSSES
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher = draw(student=(1, 2, 2, 5))
    check_grads(loss, (student, teacher), order=1, modes=("rev",), eps=1e-2, atol=1e-2, rtol=1e-2)


def test_variational_gradients_reach_every_parameter():
    student, teacher = draw(student=(2, 5))

    def loss(params):
        return features.variational_information_loss(params, student, teacher)

    check_grads(loss, (PARAMS,), order=1, modes=("rev",), eps=1e-2, atol=1e-2, rtol=1e-2)
    gradients = jax.grad(lambda params: loss(params).mean())(PARAMS)
    assert all((np.abs(leaf) > 1e-6).all() for leaf in jax.tree.leaves(gradients))


def test_variational_minimum_is_at_the_variance_of_the_errors():
    """At μ = 0 the best σ² is the mean square of the teacher, with the loss (1 + log σ²) / 2."""
    teacher = 3 * jax.random.normal(jax.random.key(0), (64, 1))
    best = float(jnp.mean(jnp.square(teacher)))

    def loss(variance):
        params = features.init_variational_information(jax.random.key(1), 2, 1, variance=variance)
        return features.variational_information_loss(params, jnp.zeros((64, 2)), teacher).mean()

    np.testing.assert_allclose(loss(best), (1 + np.log(best)) / 2, rtol=1e-5)
    assert loss(best) < loss(0.9 * best) and loss(best) < loss(1.1 * best)


def test_variance_has_a_floor():
    params = PARAMS | {
        "raw_variance": jnp.full(5, -1e4),
        "kernel": jnp.zeros((5, 5)),
        "bias": jnp.zeros(5),
    }
    for teacher in (jnp.zeros((2, 5)), jnp.full((2, 5), 1e4)):
        value, gradients = jax.value_and_grad(
            lambda p, t=teacher: features.variational_information_loss(p, jnp.ones((2, 5)), t).sum()
        )(params)
        chex.assert_tree_all_finite((value, gradients))
    at_floor = features.variational_information_loss(params, jnp.ones((2, 5)), jnp.zeros((2, 5)))
    np.testing.assert_allclose(at_floor, np.log(1e-5) / 2, rtol=1e-5)


@pytest.mark.parametrize("variance", [2e-5, 1.0, 5.0, 1e4])
def test_initial_variance(variance):
    params = features.init_variational_information(jax.random.key(0), 3, 2, variance=variance)
    np.testing.assert_allclose(
        jax.nn.softplus(params["raw_variance"]) + 1e-5, [variance] * 2, rtol=1e-5
    )


def test_projector_is_a_linear_map_of_the_channels():
    params = features.init_projector(jax.random.key(0), 400, 50)
    np.testing.assert_allclose(params["kernel"].std(), 1 / 20, rtol=0.03)
    chex.assert_trees_all_equal(params["bias"], jnp.zeros(50))
    student, _ = draw(student=(2, 3, 400))
    params = params | {"bias": jnp.arange(50, dtype=jnp.float32)}
    expected = np.asarray(student, np.float64) @ np.asarray(
        params["kernel"], np.float64
    ) + np.arange(50)
    np.testing.assert_allclose(features.project(params, student), expected, atol=1e-4)
    np.testing.assert_allclose(features.project(params, student[0, 0]), expected[0, 0], atol=1e-4)
    narrow = features.project(
        jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), student.astype(jnp.bfloat16)
    )
    assert narrow.dtype == jnp.float32


def test_power_may_be_traced():
    student, teacher = draw()
    traced = jax.jit(lambda p: features.attention_transfer_loss(student, teacher, power=p))(2)
    np.testing.assert_allclose(
        traced, features.attention_transfer_loss(student, teacher), rtol=1e-5
    )


def test_wrong_shapes_raise():
    student, teacher = draw()
    wide, large = jnp.concatenate([teacher, teacher], -1), jnp.concatenate([teacher, teacher], 1)
    for wrong in (wide, large, teacher[:1]):
        with pytest.raises(ValueError, match="must have the same shape.*project.*pool"):
            features.hint_loss(student, wrong)
        with pytest.raises(ValueError, match="init_variational_information.*pool"):
            variational(student, wrong)
    for loss in IMAGE_LOSSES:
        for wrong in (large, teacher[:1]):
            with pytest.raises(ValueError, match="all but their channels.*pool"):
                loss(student, wrong)
        with pytest.raises(ValueError, match=r"teacher_features must be \[B, H, W, C\]"):
            loss(student, teacher[0])
    for name, arguments in {
        "student_first .* student_second": (student, large, teacher, teacher),
        "teacher_first .* teacher_second": (student, student, large, teacher),
        "flow matrices .* project": (student, student, wide, teacher),
    }.items():
        with pytest.raises(ValueError, match=name):
            features.flow_of_solution_procedure_loss(*arguments)
    with pytest.raises(ValueError, match="first .* second .*pool"):
        features.flow_matrix(student, large)
    with pytest.raises(ValueError, match=r"must be \[B, \.\.\., C\]"):
        features.hint_loss(student[0, 0, 0], teacher[0, 0, 0])
    with pytest.raises(ValueError, match="5 channels in their last axis"):
        features.project(PARAMS, wide)
    with pytest.raises(ValueError, match="5 channels in their last axis"):
        features.project(PARAMS, jnp.array(1.0))


@LOSSES
def test_integers_are_refused(loss):
    student, _ = draw()
    with pytest.raises(TypeError, match="floating-point"):
        loss(student, jnp.ones(student.shape, jnp.int32))


@pytest.mark.parametrize("power", [0, -1.0, float("nan")])
def test_power_must_be_positive(power):
    with pytest.raises(ValueError, match="power must be positive"):
        features.attention_transfer_loss(*draw(), power=power)


def test_variance_must_exceed_the_floor():
    for variance, message in ((1e-5, "more than the floor"), (-1.0, "must be positive")):
        with pytest.raises(ValueError, match=message):
            features.init_variational_information(jax.random.key(0), 3, 2, variance=variance)
