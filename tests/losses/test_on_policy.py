"""Tests that losses on sampled sequences estimate the divergence of sequences and its gradient."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses

V, S = 3, 3
WHERE = jnp.array([[True] * 4, [True, True, False, False], [False, True, True, False]])


def draw(seed=0, shape=(3, 4)):
    return -jax.random.exponential(jax.random.key(seed), (2, *shape))


def reference_rewards(student, teacher, where, normalized):
    result = np.zeros(student.shape)
    for b, t in np.ndindex(*result.shape):
        rest = [
            np.float64(teacher[b, u]) - np.float64(student[b, u])
            for u in range(t, student.shape[1])
            if where[b, u]
        ]
        if where[b, t]:
            result[b, t] = np.sum(rest) / (len(rest) if normalized else 1)
    return result


@pytest.mark.parametrize("normalized", [True, False])
def test_rewards_equal_reference(normalized):
    student, teacher = draw()
    value = losses.rewards_to_go(student, teacher, where=WHERE, length_normalized=normalized)
    expected = reference_rewards(student, teacher, np.asarray(WHERE), normalized)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_values_and_gradients_by_hand():
    student, teacher = jnp.array([[-1.0, -1.0, -9.0]]), jnp.array([[-2.0, -4.0, -1.0]])
    where = jnp.array([[True, True, False]])

    def total(student, **options):
        values = losses.sequence_reverse_kl_loss(student, teacher, where=where, **options)
        return values.sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(student)
    np.testing.assert_allclose(values, [[1, 3, 0]])
    np.testing.assert_allclose(gradient, [[2, 3, 0]])
    gradient, _ = jax.grad(total, has_aux=True)(student, length_normalized=False, baseline=1.0)
    np.testing.assert_allclose(gradient, [[4 + 1, 3 + 1, 0]])


def sequence_log_probabilities(table, sequence):
    """Returns the log-probability of each token, which depends on the tokens before it."""
    history, values = 0, []
    for token in sequence:
        values.append(jax.nn.log_softmax(table[history])[token])
        history = (V * history + token + 1) % len(table)
    return jnp.stack(values)


def test_expectation_is_the_divergence_and_its_gradient():
    """Over all sequences, weighted by their probability, the estimates are exact."""
    student, teacher = jax.random.normal(jax.random.key(0), (2, 13, V))
    sequences = list(itertools.product(range(V), repeat=S))
    where = jnp.ones((len(sequences), S), bool)

    def log_probabilities(table):
        return jnp.stack([sequence_log_probabilities(table, y) for y in sequences])

    teacher_log_p = log_probabilities(teacher)

    def divergence(table):
        log_q = log_probabilities(table).sum(1)
        return jnp.sum(jnp.exp(log_q) * (log_q - teacher_log_p.sum(1)))

    def estimate(table):
        log_q = log_probabilities(table)
        probabilities = jax.lax.stop_gradient(jnp.exp(log_q.sum(1)))
        # A baseline that differs between positions, but not between tokens.
        baseline = jnp.broadcast_to(jnp.array([[0.7, -2.0, 0.3]]), log_q.shape)
        values = losses.sequence_reverse_kl_loss(
            log_q, teacher_log_p, where=where, baseline=baseline, length_normalized=False
        )
        return jnp.sum(probabilities * values.sum(1))

    value, gradient = jax.jit(jax.value_and_grad(estimate))(student)
    expected, expected_gradient = jax.jit(jax.value_and_grad(divergence))(student)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_equal_models_have_neither_value_nor_gradient():
    student, _ = draw()
    value, gradient = jax.value_and_grad(
        lambda s: losses.sequence_reverse_kl_loss(s, student, where=WHERE).sum()
    )(student)
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("padding", [jnp.nan, -jnp.inf, 1e30])
def test_padding_has_no_effect(padding):
    student, teacher = draw()
    padded = [jnp.where(WHERE, x, padding) for x in (student, teacher)]
    baseline = jnp.where(WHERE, 0.5, padding)

    def total(student, teacher, baseline):
        return losses.sequence_reverse_kl_loss(
            student, teacher, where=WHERE, baseline=baseline
        ).sum()

    gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    value, (student_gradient, *others) = gradients(*padded, baseline)
    expected, (expected_gradient, *_) = gradients(student, teacher, jnp.full((3, 4), 0.5))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(student_gradient, expected_gradient, rtol=1e-6)
    assert (student_gradient[~np.asarray(WHERE)] == 0).all()
    # Neither the teacher nor the baseline is trained.
    assert not np.any(others)


def test_the_baseline_of_other_samples_is_that_of_the_docstring():
    student, teacher = draw()
    rewards = losses.rewards_to_go(student, teacher, where=jnp.ones((3, 4), bool))
    baseline = (rewards.sum(0, keepdims=True) - rewards) / 2
    np.testing.assert_allclose(baseline[0], (rewards[1] + rewards[2]) / 2, rtol=1e-5)


def test_wrong_arguments_raise():
    student, teacher = draw()
    for function in (losses.rewards_to_go, losses.sequence_reverse_kl_loss):
        with pytest.raises(ValueError, match="must have the same shape"):
            function(student, teacher[:, :3], where=WHERE)
        with pytest.raises(ValueError, match="one entry for each token"):
            function(student, teacher, where=WHERE[:1])
        with pytest.raises(TypeError, match="where must be boolean"):
            function(student, teacher, where=jnp.ones((3, 4)))
        with pytest.raises(TypeError, match="must be floating-point"):
            function(student.astype(int), teacher, where=WHERE)
    with pytest.raises(ValueError, match="baseline .* must be a scalar or one number per token"):
        losses.sequence_reverse_kl_loss(student, teacher, where=WHERE, baseline=jnp.zeros(4))
