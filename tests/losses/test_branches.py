"""Tests the loss on exit branches: hand-worked values, a float64 reference, limits, extremes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd import losses
from jaxkd.losses import branches

LABELS = jnp.array([0, 3, 1, 3])


def draw(seed=0, scale=2.0):
    keys = jax.random.split(jax.random.key(seed))
    return tuple(scale * jax.random.normal(key, (4, 5)) for key in keys)


def loss(student, teacher, labels=LABELS, exponent=1.4, temperature=1.5):
    return branches.enhanced_target_loss(
        student, teacher, labels, exponent=exponent, temperature=temperature
    )


def softmax(logits, temperature):
    odds = np.exp(np.asarray(logits, np.float64) / temperature)
    return odds / odds.sum(-1, keepdims=True)


def reference(student, teacher, labels, exponent, temperature):
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    values = []
    for i, label in enumerate(labels):
        value = 0.0
        for c in range(p.shape[1]):
            weight = (1 + p[i, c]) ** exponent - 1 if c == label else p[i, c] ** exponent
            value -= weight * np.log(q[i, c])
        values.append(value)
    return np.array(values)


def test_value_by_hand():
    # p = 3/4 and 1/4, q = 1/2: ((7/4)² − 1 + (1/4)²) log 2 for the first class.
    teacher = jnp.log(jnp.array([[3.0, 1.0]]))
    for label, weight in ((0, (7 / 4) ** 2 - 1 + 1 / 16), (1, (5 / 4) ** 2 - 1 + 9 / 16)):
        value = loss(0 * teacher, teacher, jnp.array([label]), exponent=2.0, temperature=1.0)
        np.testing.assert_allclose(value, [weight * np.log(2)], rtol=1e-5)


@pytest.mark.parametrize(("exponent", "temperature"), [(1.0, 1.0), (1.5, 1.0), (0.5, 4.0)])
def test_equals_the_reference(exponent, temperature):
    student, teacher = draw()
    expected = reference(student, teacher, LABELS, exponent, temperature)
    value = loss(student, teacher, exponent=exponent, temperature=temperature)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    shape = (2, 2)
    value = loss(
        student.reshape(*shape, 5), teacher.reshape(*shape, 5), LABELS.reshape(shape),
        exponent, temperature,
    )  # fmt: skip
    np.testing.assert_allclose(value, expected.reshape(shape), rtol=2e-5)


def test_an_exponent_of_1_is_the_cross_entropy_with_the_teacher():
    student, teacher = draw()
    expected = losses.soft_cross_entropy(student, teacher, temperature=3.0) / 9
    value = loss(student, teacher, exponent=1.0, temperature=3.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_sure_teacher_weights_the_label_alone():
    student, _ = draw()
    sure = losses.virtual_teacher_logits(LABELS, num_classes=5, correct=1 - 1e-7)
    expected = (2**1.5 - 1) * losses.hard_cross_entropy(student, LABELS)
    value = loss(student, sure, exponent=1.5, temperature=1.0)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_logits_may_be_shifted():
    student, teacher = draw()
    np.testing.assert_allclose(loss(student + 30, teacher - 20), loss(student, teacher), rtol=1e-4)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("scale", [1e4, -1e4, 1e-4, 0.0])
def test_extreme_logits_stay_finite(exponent, scale):
    student, teacher = draw()

    @jax.jit
    def value_and_gradients(student, teacher):
        return jax.value_and_grad(lambda s, t: loss(s, t, exponent=exponent).sum(), argnums=(0, 1))(
            student, teacher
        )

    for pair in ((scale * student, scale * teacher), (student, scale * teacher)):
        chex.assert_tree_all_finite(value_and_gradients(*pair))
    # A class that neither of them considers possible counts for nothing.
    absent = [logits.at[:, 4].set(-jnp.inf) for logits in (student, teacher)]
    value, gradients = value_and_gradients(*absent)
    chex.assert_tree_all_finite((value, gradients))
    expected = loss(student[:, :4], teacher[:, :4], exponent=exponent).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_widened_first(dtype):
    student, teacher = (logits.astype(dtype) for logits in draw())
    value = loss(student, teacher)
    assert value.dtype == jnp.float32
    expected = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.thorough
def test_gradients_are_those_of_finite_differences():
    check_grads(jax.jit(loss), draw(), order=1, modes=("rev",), eps=1e-2, atol=1e-2, rtol=1e-2)


def test_options_may_be_traced():
    student, teacher = draw()
    traced = jax.jit(lambda e, t: loss(student, teacher, exponent=e, temperature=t))
    np.testing.assert_allclose(traced(1.4, 1.5), loss(student, teacher), rtol=1e-5)


def test_wrong_arguments_raise():
    student, teacher = draw()
    with pytest.raises(ValueError, match="must have the same shape"):
        loss(student, teacher[:, :4])
    with pytest.raises(ValueError, match="labels .* must have the logits' shape"):
        loss(student, teacher, LABELS[:2])
    with pytest.raises(ValueError, match="have one class"):
        loss(student[:, :1], teacher[:, :1], 0 * LABELS)
    with pytest.raises(TypeError, match="labels must be integers"):
        loss(student, teacher, LABELS.astype(jnp.float32))
    with pytest.raises(TypeError, match="floating-point"):
        loss(student, teacher.astype(jnp.int32))
    with pytest.raises(ValueError, match="exponent must be positive"):
        loss(student, teacher, exponent=0.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(student, teacher, temperature=-1.0)
