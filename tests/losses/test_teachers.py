"""Tests losses with several teachers: averaged probabilities, weighted sums and weights."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxkd import losses


def draw(seed=0, teachers=3, shape=(6, 5), scale=3.0):
    logits = scale * jax.random.normal(jax.random.key(seed), (teachers, *shape))
    return logits, jax.random.randint(jax.random.key(seed + 1), shape[:-1], 0, shape[-1])


@pytest.mark.thorough
@given(seed=st.integers(0, 2**16), temperature=st.floats(0.5, 20), teachers=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_ensemble_averages_probabilities(seed, temperature, teachers):
    """The mean of the logits would be a geometric mean."""
    logits, _ = draw(seed, teachers)
    ensemble = losses.ensemble_logits(logits, temperature=temperature)
    averaged = jax.nn.softmax(logits / temperature).mean(0)
    np.testing.assert_allclose(
        jax.nn.softmax(ensemble / temperature), averaged, rtol=1e-3, atol=1e-6
    )


@pytest.mark.thorough
def test_ensemble_weights_of_teachers_and_examples():
    logits, _ = draw()
    probabilities = jax.nn.softmax(logits)
    weighted = jax.nn.softmax(
        losses.ensemble_logits(logits, temperature=1.0, weights=(7.0, 3.0, 0.0))
    )
    np.testing.assert_allclose(weighted, 0.7 * probabilities[0] + 0.3 * probabilities[1], rtol=1e-5)
    one_hot = jax.nn.one_hot(jnp.arange(6) % 3, 3, axis=0)
    selected = jax.nn.softmax(losses.ensemble_logits(logits, temperature=1.0, weights=one_hot))
    np.testing.assert_allclose(selected, probabilities[jnp.arange(6) % 3, jnp.arange(6)], rtol=1e-5)


@pytest.mark.thorough
def test_ensemble_on_another_axis_and_with_classes_ruled_out():
    logits, _ = draw()
    expected = losses.ensemble_logits(logits, temperature=2.0)
    np.testing.assert_allclose(
        losses.ensemble_logits(jnp.moveaxis(logits, -1, 1), temperature=2.0, axis=1),
        expected.T,
        rtol=1e-5,
        atol=1e-5,
    )
    masked = logits.at[:, :, 2].set(-jnp.inf).at[0, :, 1].set(-jnp.inf)
    ensemble, gradient = jax.value_and_grad(
        lambda z: jnp.where(
            jnp.arange(5) != 2, losses.ensemble_logits(z, temperature=2.0)[0], 0
        ).sum()
    )(masked)
    chex.assert_tree_all_finite((ensemble, gradient))
    np.testing.assert_array_equal(losses.ensemble_logits(masked, temperature=2.0)[:, 2], -jnp.inf)


def test_ensemble_of_a_single_teacher():
    logits, _ = draw(teachers=1)
    student = logits[0, ::-1]
    for loss in (losses.kl_divergence, losses.soft_cross_entropy):
        ensemble = losses.ensemble_logits(logits, temperature=4.0)
        np.testing.assert_allclose(
            loss(student, ensemble, temperature=4.0),
            loss(student, logits[0], temperature=4.0),
            rtol=1e-4,
        )


def test_weighted_sum_worked_by_hand():
    terms = [jnp.array([1.0, 2.0]), jnp.array([3.0, 5.0])]
    np.testing.assert_allclose(
        losses.weighted_sum(terms, weights=(0.7, 0.3)), [1.6, 2.9], rtol=1e-6
    )
    weights = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(losses.weighted_sum(terms, weights=weights), [1.0, 10.0])


def test_weighted_sum_of_cross_entropies_is_that_of_the_ensemble():
    """The soft cross-entropy is linear in the teacher, so that both kinds of mixture agree."""
    logits, _ = draw()
    student = logits[0] + logits[1]
    weights = jnp.array([0.2, 0.5, 0.3])
    summed = losses.weighted_sum(
        [losses.soft_cross_entropy(student, teacher, temperature=2.0) for teacher in logits],
        weights=weights,
    )
    ensemble = losses.ensemble_logits(logits, temperature=2.0, weights=weights)
    np.testing.assert_allclose(
        losses.soft_cross_entropy(student, ensemble, temperature=2.0), summed, rtol=1e-4
    )


def test_a_term_of_weight_0_is_left_out():
    def loss(x):
        return losses.weighted_sum([x, jnp.full(3, jnp.inf)], weights=(1.0, 0.0)).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.ones(3))
    assert value == 3 and np.isfinite(gradient).all()


def test_teacher_weights_worked_by_hand():
    # exp(CE) is 1 / p: 5/4 and 5/2, whose shares are 1/3 and 2/3.
    teachers = jnp.log(jnp.array([[[0.8, 0.2]], [[0.4, 0.6]]]))
    np.testing.assert_allclose(
        losses.teacher_weights(teachers, jnp.array([0])), [[2 / 3], [1 / 3]], rtol=1e-5
    )


def test_teacher_weights_sum_to_1_and_follow_the_label():
    logits, labels = draw(teachers=4)
    weights = losses.teacher_weights(logits, labels)
    np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-5)
    entropies = jnp.stack([losses.hard_cross_entropy(teacher, labels) for teacher in logits])
    np.testing.assert_array_equal(weights.argmax(0), entropies.argmin(0))
    np.testing.assert_array_equal(losses.teacher_weights(logits[:1], labels), jnp.ones((1, 6)))


def test_examples_that_the_student_knows_have_weight_0():
    teacher = jnp.log(jnp.array([[0.5, 0.5]] * 3))
    student = jnp.array([[100.0, 0.0], [0.0, 0.0], [0.0, 100.0]])
    weights = losses.example_weights(student, teacher, jnp.zeros(3, jnp.int32))
    np.testing.assert_allclose(weights, [0, 1 - np.exp(-1), 1], atol=1e-6)
    certain = jnp.array([[1e4, 0.0]])
    value, gradient = jax.value_and_grad(
        lambda s: losses.example_weights(s, certain, jnp.array([0])).sum()
    )(student[1:2])
    assert value == 1 and np.isfinite(gradient).all()


@pytest.mark.thorough
def test_gradients_and_narrow_dtypes():
    logits, labels = draw(shape=(2, 4), scale=1.0)
    for function in (
        lambda z: losses.ensemble_logits(z, temperature=2.0),
        lambda z: losses.teacher_weights(z, labels),
        lambda z: losses.example_weights(z[0], z[1], labels),
    ):
        check_grads(function, (logits,), 1, ("rev",), 2e-2, 2e-2, 1e-2)
        for dtype in (jnp.bfloat16, jnp.float16):
            assert function(logits.astype(dtype)).dtype == jnp.float32
            np.testing.assert_allclose(
                function(logits.astype(dtype)), function(logits), rtol=0.05, atol=0.05
            )
        for scale in (1e4, 1e-4):
            chex.assert_tree_all_finite(
                jax.value_and_grad(lambda z, f=function: f(z).sum())(scale * logits)
            )


def test_wrong_arguments_raise():
    logits, labels = draw()
    with pytest.raises(ValueError, match=r"must be \[K, ..., C\]"):
        losses.ensemble_logits(logits[0, 0], temperature=1.0)
    with pytest.raises(ValueError, match="axis 0 is the axis of teachers"):
        losses.ensemble_logits(logits, temperature=1.0, axis=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.ensemble_logits(logits, temperature=-1.0)
    with pytest.raises(ValueError, match="one entry for each of the 3"):
        losses.ensemble_logits(logits, temperature=1.0, weights=(0.7, 0.3))
    with pytest.raises(ValueError, match="at least 0"):
        losses.ensemble_logits(logits, temperature=1.0, weights=(0.7, 0.5, -0.2))
    with pytest.raises(ValueError, match="must have the same shape"):
        losses.weighted_sum([jnp.ones(2), jnp.ones(3)], weights=(0.7, 0.3))
    with pytest.raises(ValueError, match="must have the same shape"):
        losses.weighted_sum([], weights=())
    with pytest.raises(ValueError, match="one entry for each of the 2"):
        losses.weighted_sum([jnp.ones(2), jnp.ones(2)], weights=(0.7, 0.2, 0.1))
    with pytest.raises(ValueError, match="without its last axis"):
        losses.teacher_weights(logits, labels[:-1])


def test_a_teacher_that_rules_the_label_out_has_no_weight():
    teachers = jnp.array([[[0.0, -jnp.inf]], [[0.0, 1.0]], [[1.0, 0.0]]])
    weights = losses.teacher_weights(teachers, jnp.array([1]))
    np.testing.assert_allclose(weights[:, 0], [0, 0.5, 0.5])


def test_terms_of_several_dtypes_are_widened():
    narrow = jnp.array([1.0, 2.0], jnp.bfloat16)
    value = losses.weighted_sum([narrow, jnp.array([3.0, 4.0])], weights=(0.7, 0.3))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, [1.6, 2.6], rtol=1e-6)
    with pytest.raises(TypeError, match="floating-point"):
        losses.weighted_sum([jnp.array([1, 2])], weights=(1.0,))
    with pytest.raises(ValueError, match="must have the same shape"):
        losses.example_weights(jnp.zeros((2, 3)), jnp.ones((2, 5)), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 0.0, 2.0), "per example"])
def test_a_teacher_of_weight_0_may_be_nan(weights, traced):
    logits, _ = draw()
    if weights == "per example":
        weights = np.array([[1.0] * 6, [0.0] * 6, [2.0] * 6])

    def loss(z, w):
        ensemble = losses.ensemble_logits(z, temperature=2.0, weights=w)
        return losses.kl_divergence(logits[0], ensemble).sum()

    value_and_gradient = jax.value_and_grad(loss)
    if traced:
        compiled = jax.jit(value_and_gradient)
        value_and_gradient = lambda z, w: compiled(z, jnp.asarray(w))  # noqa: E731
    value, gradient = value_and_gradient(logits.at[1].set(jnp.nan), weights)
    chex.assert_tree_all_finite((value, gradient))
    expected = loss(logits[jnp.array([0, 2])], (1.0, 2.0))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_an_ensemble_needs_a_teacher():
    logits, _ = draw(teachers=2)
    with pytest.raises(ValueError, match="at least 0, and one of them more, got"):
        losses.ensemble_logits(logits, temperature=1.0, weights=(0, 0))
    # An example without a teacher has no class that counts, and no loss.
    weights = np.ones((2, 6))
    weights[:, 1] = 0
    ensemble = losses.ensemble_logits(logits, temperature=2.0, weights=weights)
    np.testing.assert_array_equal(ensemble[1], -np.inf)
    values = losses.kl_divergence(logits[0], ensemble)
    assert values[1] == 0 and (values[2:] > 0).all()


def test_a_term_without_weight_has_no_gradient():
    logits, _ = draw(teachers=2)
    unsound = logits[1].at[0].set(jnp.nan)

    def loss(student, weights):
        terms = [losses.kl_divergence(student, teacher) for teacher in (logits[1], unsound)]
        return losses.weighted_sum(terms, weights=weights).sum()

    expected = jax.grad(lambda s: losses.kl_divergence(s, logits[1]).sum())(logits[0])
    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss), static_argnums=1)):
        np.testing.assert_allclose(gradient(logits[0], (1.0, 0.0)), expected, rtol=1e-5)
    # Weights may mix known and traced numbers.
    value = jax.jit(lambda s, w: losses.weighted_sum([s[:, 0], s[:, 1]], weights=[1.0, w]))(
        logits[0], 2.0
    )
    np.testing.assert_allclose(value, logits[0, :, 0] + 2 * logits[0, :, 1], rtol=1e-5)
