"""Tests that outputs of a softmax or sigmoid are told from logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import evaluate, losses

LOGITS = jax.random.normal(jax.random.key(0), (8, 3, 5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_probabilities_raise(dtype):
    with pytest.raises(ValueError, match="are probabilities, each row sums to 1"):
        losses.check_logits(jax.nn.softmax(LOGITS).astype(dtype))
    with pytest.raises(ValueError, match="all between 0 and 1, as a sigmoid gives them"):
        losses.check_logits(jax.nn.sigmoid(4 * LOGITS).astype(dtype))


@pytest.mark.parametrize(
    "logits",
    [LOGITS, jax.nn.log_softmax(LOGITS), 0 * LOGITS, 0.1 * jnp.abs(LOGITS), LOGITS[:0], 1 + LOGITS],
)
def test_logits_pass(logits):
    assert losses.check_logits(logits) is None
    assert losses.check_logits(np.asarray(logits)) is None


def test_one_row_that_is_no_distribution_is_enough():
    logits = jax.nn.softmax(LOGITS).at[1, 1].add(1.0)
    losses.check_logits(logits)


def test_unknown_values_and_integers_raise():
    with pytest.raises(TypeError, match="not known under jit"):
        jax.jit(losses.check_logits)(LOGITS)
    with pytest.raises(TypeError, match="must be floating-point"):
        losses.check_logits(jnp.ones((2, 2), int))


def test_evaluate_decides_by_the_same_function():
    assert evaluate.are_probabilities(jax.nn.softmax(LOGITS))
    assert not evaluate.are_probabilities(LOGITS)
