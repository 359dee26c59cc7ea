"""Tests refined logits and the levels of multi-level distillation against float64 references."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd import losses

LOSS = functools.partial(losses.refined_logits_loss, correlation_weight=2.0)


def draw(shape=(6, 5), scale=2.0):
    student, teacher = scale * jax.random.normal(jax.random.key(0), (2, *shape))
    return student, teacher, jnp.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % shape[-1]


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return powers / powers.sum()


def kl(p, q):
    return (p * np.log(p / q)).sum()


def reference(student, teacher, label, temperature, weight):
    """Follows the definition for one example."""
    student, teacher = (np.asarray(z, np.float64) for z in (student, teacher))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    top, true = p.max(), q[label]
    value = kl(np.array([top, 1 - top]), np.array([true, 1 - true]))
    below = teacher < teacher[label]
    if below.any():
        value += weight * kl(
            softmax(teacher[below] / temperature), softmax(student[below] / temperature)
        )
    return temperature**2 * value


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_refined_logits_equal_a_reference(temperature):
    student, teacher, labels = draw()
    expected = [
        reference(*example, temperature, 2.0)
        for example in zip(student, teacher, labels, strict=True)
    ]
    values = LOSS(student, teacher, labels, temperature=temperature)
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    check_grads(
        lambda s: LOSS(s, teacher, labels, temperature=temperature),
        (student,),
        order=1,
        modes=["rev"],
        rtol=2e-2,
    )


def test_refined_logits_ignore_what_the_teacher_ranks_above_the_label():
    """The teacher is wrong: of its classes above the true one only the confidence counts."""
    teacher = jnp.array([5.0, 4.0, 1.0, 0.0])
    student = jnp.array([1.0, 2.0, 3.0, 0.5])
    label = jnp.array(2)
    gradient = jax.jit(
        jax.grad(
            lambda s: losses.refined_logits_loss(
                s, teacher, label, temperature=1.0, correlation_weight=0.0
            )
        )
    )(student)
    # The student's true class is drawn up to the confidence of the teacher.
    q = np.asarray(jax.nn.softmax(student))
    confidence = float(jax.nn.softmax(teacher)[0])
    np.testing.assert_allclose(gradient[2], q[2] - confidence, rtol=1e-4)
    # One class is below: its distribution is certain, so that the second term is 0.
    values = [
        losses.refined_logits_loss(student, teacher, label, correlation_weight=weight)
        for weight in (0.0, 8.0)
    ]
    np.testing.assert_allclose(*values, rtol=1e-6)


def test_refined_logits_of_extreme_logits_and_unknown_labels():
    student, teacher, labels = draw(scale=1e4)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: LOSS(s, teacher, labels).sum()))(student)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    values = LOSS(student, teacher, labels.at[1].set(-1).at[2].set(5))
    assert np.isnan(values).tolist() == [False, True, True, False, False, False]
    assert LOSS(*draw((2, 3, 4))).shape == (2, 3)


def test_levels_equal_a_reference():
    student, teacher, _ = draw()
    temperature = 3.0
    p, q = (np.stack([softmax(row / temperature) for row in z]) for z in (teacher, student))
    batch = ((p @ p.T - q @ q.T) ** 2).sum(1)
    classes = ((p.T @ p - q.T @ q) ** 2).sum() / 5
    options = {"temperature": temperature}
    np.testing.assert_allclose(
        losses.batch_correlation_loss(student, teacher, **options), batch, rtol=1e-4
    )
    np.testing.assert_allclose(
        losses.class_correlation_loss(student, teacher, **options), [classes] * 6, rtol=1e-4
    )
    kd = losses.kl_divergence(student, teacher, **options)
    total = losses.multi_level_loss(student, teacher, temperatures=(3.0,))
    np.testing.assert_allclose(total, kd + batch + classes, rtol=1e-4)
    double = losses.multi_level_loss(student, teacher, temperatures=(3.0, 3.0))
    np.testing.assert_allclose(double, 2 * total, rtol=1e-5)
    np.testing.assert_allclose(losses.multi_level_loss(student, student + 1), 0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t, y: LOSS(s, t, y[:2]), "labels"),
        (lambda s, t, y: LOSS(s, t, y.astype(float)), "labels must be integers"),
        (lambda s, t, y: LOSS(s, t[:, :2], y), "must have the same shape"),
        (lambda s, t, y: losses.batch_correlation_loss(s[0], t[0]), r"logits must be \[B, C\]"),
        (lambda s, t, y: losses.multi_level_loss(s, t, temperatures=()), "no temperatures"),
        (
            lambda s, t, y: losses.refined_logits_loss(s, t, y, correlation_weight=jnp.ones(2)),
            "correlation_weight",
        ),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(*draw())
