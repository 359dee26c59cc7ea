"""Tests losses on tokens: padding has no effect, and the shift of a causal model is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses

LENGTHS = jnp.array([5, 3, 1])
WHERE = jnp.arange(5)[None] < LENGTHS[:, None]


def draw(seed=0, shape=(3, 5, 7)):
    student, teacher = jax.random.normal(jax.random.key(seed), (2, *shape))
    tokens = jax.random.randint(jax.random.key(seed + 1), shape[:-1], 0, shape[-1])
    return student, teacher, tokens


def test_tokens_are_independent_examples():
    student, teacher, tokens = draw()
    value = losses.token_distillation_loss(
        student, teacher, tokens, where=jnp.ones((3, 5), bool), alpha=0.3
    )
    np.testing.assert_allclose(
        value, losses.distillation_loss(student, teacher, tokens, alpha=0.3), rtol=1e-6
    )


@pytest.mark.parametrize("padding", [jnp.nan, jnp.inf, 1e30])
def test_padding_affects_neither_value_nor_gradient(padding):
    student, teacher, tokens = draw()
    padded = [jnp.where(WHERE[..., None], z, padding) for z in (student, teacher)]
    labels = jnp.where(WHERE, tokens, -100)

    def loss(student, teacher, labels):
        return losses.token_mean(
            losses.token_distillation_loss(student, teacher, labels, where=WHERE), where=WHERE
        )

    value, gradient = jax.value_and_grad(loss)(padded[0], padded[1], labels)
    positions = [(i, j) for i, length in enumerate(LENGTHS) for j in range(length)]
    expected = [
        losses.distillation_loss(student[i, j], teacher[i, j], tokens[i, j]) for i, j in positions
    ]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(jnp.where(WHERE[..., None], 0, gradient), 0)


def test_more_padding_changes_nothing():
    student, teacher, tokens = draw()
    longer = [jnp.pad(z, ((0, 0), (0, 4), (0, 0)), constant_values=9.0) for z in (student, teacher)]
    where, labels = jnp.pad(WHERE, ((0, 0), (0, 4))), jnp.pad(tokens, ((0, 0), (0, 4)))
    short = losses.token_mean(
        losses.token_distillation_loss(student, teacher, tokens, where=WHERE), where=WHERE
    )
    long = losses.token_mean(
        losses.token_distillation_loss(*longer, labels, where=where), where=where
    )
    np.testing.assert_allclose(short, long, rtol=1e-6)


def test_next_tokens_shift_by_one_and_drop_padding():
    tokens = jnp.array([[5, 7, 2, 0, 0], [3, 1, 4, 1, 6]])
    where = jnp.array([[True, True, True, False, False], [True] * 5])
    logits = jnp.broadcast_to(jnp.arange(5.0)[None, :, None], (2, 5, 9))
    shifted, labels, counted = losses.next_tokens(logits, tokens, where=where)
    np.testing.assert_array_equal(shifted[0, :, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(labels, [[7, 2, 0, 0], [1, 4, 1, 6]])
    np.testing.assert_array_equal(counted, [[True, True, False, False], [True] * 4])
    # With left padding, no position predicts the first real token.
    _, _, counted = losses.next_tokens(
        logits[:1], tokens[:1], where=jnp.array([[False, False, True, True, True]])
    )
    np.testing.assert_array_equal(counted, [[False, False, True, True]])


def test_a_copying_model_is_perfect_after_the_shift():
    tokens = jnp.array([[2, 0, 1, 3]])
    predicts_next = 50 * jax.nn.one_hot(jnp.array([[0, 1, 3, 0]]), 4)
    logits, labels, where = losses.next_tokens(predicts_next, tokens, where=jnp.ones((1, 4), bool))
    value = losses.token_distillation_loss(logits, logits, labels, where=where, alpha=0.0)
    np.testing.assert_allclose(value, 0, atol=1e-6)


def test_mean_weights_tokens_equally_and_adds_up_over_parts():
    """The divisor is the number of valid tokens in the whole batch, at least 1."""
    values = jnp.arange(15.0).reshape(3, 5)
    expected = np.asarray(values)[np.asarray(WHERE)].mean()
    np.testing.assert_allclose(losses.token_mean(values, where=WHERE), expected, rtol=1e-6)
    parts = [
        losses.token_mean(values[i : i + 1], where=WHERE[i : i + 1], count=WHERE.sum())
        for i in range(3)
    ]
    np.testing.assert_allclose(sum(parts), expected, rtol=1e-6)
    assert losses.token_mean(values, where=jnp.zeros((3, 5), bool)) == 0


@pytest.mark.thorough
def test_divergences_accept_the_mask_of_tokens():
    student, teacher, _ = draw()
    padded = jnp.where(WHERE[..., None], student, jnp.nan)
    value = losses.reverse_kl_divergence(padded, teacher, temperature=2.0, where=WHERE[..., None])
    expected = jnp.where(WHERE, losses.reverse_kl_divergence(student, teacher, temperature=2.0), 0)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(
        lambda s: losses.token_mean(
            losses.reverse_kl_divergence(s, teacher, temperature=2.0, where=WHERE[..., None]),
            where=WHERE,
        )
    )(padded)
    assert np.isfinite(gradient).all()


def test_wrong_arguments_raise():
    """Vocabularies and lengths must agree; nothing is broadcast."""
    student, teacher, tokens = draw()
    with pytest.raises(ValueError, match="must have the same shape"):
        losses.token_distillation_loss(student, teacher[..., :6], tokens, where=WHERE)
    with pytest.raises(ValueError, match="without its last axis"):
        losses.token_distillation_loss(student, teacher, tokens[:, 1:], where=WHERE)
    with pytest.raises(ValueError, match="one entry for each token"):
        losses.token_distillation_loss(student, teacher, tokens, where=WHERE[:, 1:])
    with pytest.raises(TypeError, match="take mask != 0"):
        losses.token_distillation_loss(student, teacher, tokens, where=WHERE.astype(jnp.int32))
    with pytest.raises(ValueError, match="at least two positions"):
        losses.next_tokens(student[:, :1], tokens[:, :1], where=WHERE[:, :1])
    with pytest.raises(ValueError, match=r"\[..., S, V\]"):
        losses.next_tokens(student[0, 0], tokens[0, 0], where=WHERE[0, 0])
    with pytest.raises(TypeError, match="must be integers"):
        losses.next_tokens(student, student[..., 0], where=WHERE)
    with pytest.raises(TypeError, match="floating-point"):
        losses.token_mean(tokens, where=WHERE)
    with pytest.raises(ValueError, match="count must be a scalar"):
        losses.token_mean(student[..., 0], where=WHERE, count=jnp.ones(3))
