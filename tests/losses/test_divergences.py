"""Tests divergences: values by hand, a float64 reference, limits, gradients, classes at −inf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd import losses

INF = jnp.inf


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def adaptive(p, q, head=0.5):
    values = []
    for p_row, q_row in zip(p, q, strict=True):
        total, in_head = 0.0, []
        for number, index in enumerate(np.argsort(-p_row)):
            total += p_row[index]
            if total <= head or not number:
                in_head.append(index)
        gaps = np.abs(p_row - q_row)
        share = gaps[in_head].sum() / gaps.sum()
        values.append(share * kl(p_row, q_row) + (1 - share) * kl(q_row, p_row))
    return np.array(values)


def alpha_beta(p, q, alpha, beta):
    total = alpha + beta
    powers = alpha / total * p**total + beta / total * q**total
    return (powers - p**alpha * q**beta).sum(-1) / (alpha * beta)


# name: (the loss, its reference on probabilities, the power of T that multiplies it)
CASES = {
    "skewed": (losses.skewed_kl_divergence, lambda p, q: kl(p, 0.1 * p + 0.9 * q), 2),
    "skewed reverse": (
        losses.skewed_reverse_kl_divergence,
        lambda p, q: kl(q, 0.9 * p + 0.1 * q),
        2,
    ),
    "adaptive": (losses.adaptive_kl_divergence, adaptive, 2),
    "alpha-beta": (
        functools.partial(losses.alpha_beta_divergence, alpha=0.2, beta=0.7),
        lambda p, q: alpha_beta(p, q, 0.2, 0.7),
        2,
    ),
    "alpha alone": (
        functools.partial(losses.alpha_beta_divergence, alpha=0.5, beta=0),
        lambda p, q: alpha_beta(p, q, 0.5, 1e-7),
        2,
    ),
    "beta alone": (
        functools.partial(losses.alpha_beta_divergence, alpha=0, beta=0.5),
        lambda p, q: alpha_beta(p, q, 1e-7, 0.5),
        2,
    ),
    "Rényi 2": (
        functools.partial(losses.renyi_divergence, order=2),
        lambda p, q: np.log((p**2 / q).sum(-1)),
        2,
    ),
    "Rényi 0.5": (
        functools.partial(losses.renyi_divergence, order=0.5),
        lambda p, q: -2 * np.log(np.sqrt(p * q).sum(-1)),
        2,
    ),
    "total variation": (
        losses.total_variation_distance,
        lambda p, q: np.abs(p - q).sum(-1) / 2,
        1,
    ),
}
DIVERGENCES = {name: loss for name, (loss, *_) in CASES.items()}


def draw(shape=(6, 10), scale=3.0):
    return scale * jax.random.normal(jax.random.key(0), (2, *shape))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_float64_reference(name, temperature):
    loss, reference, power = CASES[name]
    student, teacher = draw()
    expected = temperature**power * reference(
        softmax(teacher / temperature), softmax(student / temperature)
    )
    values = loss(student, teacher, temperature=temperature)
    np.testing.assert_allclose(values, expected, rtol=2e-4, atol=1e-5)


def test_values_worked_by_hand():
    """The teacher has the probabilities 1/4 and 3/4, the student 1/2 and 1/2."""
    teacher, student = jnp.log(jnp.array([1.0, 3.0])), jnp.zeros(2)
    value = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    value(losses.total_variation_distance(student, teacher, temperature=1.0), 0.25)
    value(losses.renyi_divergence(student, teacher, temperature=1.0, order=2), np.log(1.25))
    half_square = losses.alpha_beta_divergence(student, teacher, temperature=1.0, alpha=1, beta=1)
    value(half_square, (0.25**2 + 0.25**2) / 2)
    mixed = 0.25 * np.log(0.25 / 0.375) + 0.75 * np.log(0.75 / 0.625)
    value(losses.skewed_kl_divergence(student, teacher, temperature=1.0, skew=0.5), mixed)
    # softmax(t / 2) is (1, √3) / (1 + √3).
    p = np.array([1, 3**0.5]) / (1 + 3**0.5)
    value(losses.transformed_teacher_loss(student, teacher), (p * np.log(2 * p)).sum())
    weight = 0.25**0.5 + 0.75**0.5
    weighted = losses.transformed_teacher_loss(student, teacher, weighted=True)
    value(weighted, weight * (p * np.log(2 * p)).sum())


LIMITS = {
    "skew 0": (
        functools.partial(losses.skewed_kl_divergence, skew=0.0),
        losses.kl_divergence,
    ),
    "skew 0, reverse": (
        functools.partial(losses.skewed_reverse_kl_divergence, skew=0.0),
        losses.reverse_kl_divergence,
    ),
    "alpha 1, beta 0": (
        functools.partial(losses.alpha_beta_divergence, alpha=1, beta=0),
        losses.kl_divergence,
    ),
    "alpha 0, beta 1": (
        functools.partial(losses.alpha_beta_divergence, alpha=0, beta=1),
        losses.reverse_kl_divergence,
    ),
    "order 1": (functools.partial(losses.renyi_divergence, order=1), losses.kl_divergence),
    "head 1": (
        functools.partial(losses.adaptive_kl_divergence, head=1.0),
        losses.kl_divergence,
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name):
    loss, expected = LIMITS[name]
    student, teacher = draw()
    np.testing.assert_allclose(
        loss(student, teacher), expected(student, teacher), rtol=2e-5, atol=1e-5
    )


def test_a_traced_order_of_1_is_the_limit_with_a_gradient():
    student, teacher = draw()
    loss = jax.jit(
        jax.value_and_grad(lambda s, order: losses.renyi_divergence(s, teacher, order=order).sum())
    )
    value, gradient = loss(student, 1.0)
    expected, expected_gradient = jax.jit(
        jax.value_and_grad(lambda s: losses.kl_divergence(s, teacher).sum())
    )(student)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_is_zero_for_equal_logits_and_has_the_right_gradient(name):
    loss = jax.jit(DIVERGENCES[name])
    student, teacher = draw((3, 4), 1.0)
    np.testing.assert_allclose(loss(student, student + 2), 0, atol=2e-5)
    gradient = jax.jit(jax.grad(lambda s: loss(s, student).sum()))(student)
    # The distance has a kink where the two are equal.
    assert np.isfinite(gradient).all()
    if "total" not in name:
        np.testing.assert_allclose(gradient, 0, atol=2e-5)
    if name != "adaptive":
        check_grads(lambda s: loss(s, teacher), (student,), order=1, modes=["rev"], rtol=2e-2)


def test_the_weights_of_adaptive_divergences_have_no_gradient():
    student, teacher = draw((1, 5), 1.0)
    gradients = [
        jax.jit(jax.grad(lambda s, loss=loss: loss(s, teacher).sum()))(student)
        for loss in (losses.kl_divergence, losses.reverse_kl_divergence)
    ]
    gradient = jax.jit(jax.grad(lambda s: losses.adaptive_kl_divergence(s, teacher).sum()))(student)
    # The gradient is a mixture of the two, with one share for all classes.
    difference = gradients[0] - gradients[1]
    share = ((gradient - gradients[1]) * difference).sum() / jnp.square(difference).sum()
    assert 0 < share < 1
    np.testing.assert_allclose(
        gradient, share * gradients[0] + (1 - share) * gradients[1], rtol=1e-3, atol=1e-5
    )


TRANSFORMED = {
    "transformed": losses.transformed_teacher_loss,
    "weighted": functools.partial(losses.transformed_teacher_loss, weighted=True),
}


@pytest.mark.parametrize("name", [*DIVERGENCES, *TRANSFORMED])
def test_masked_classes_are_as_if_sliced_away(name):
    loss = (DIVERGENCES | TRANSFORMED)[name]
    student, teacher = draw((4, 6))
    mask = jnp.array([True, False, True, True, False, True])
    kept = loss(student[:, mask], teacher[:, mask])
    np.testing.assert_allclose(loss(student, teacher, where=mask), kept, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        loss(student.T, teacher.T, axis=0, where=mask), kept, rtol=1e-5, atol=1e-6
    )
    poisoned = jnp.where(mask, teacher, jnp.nan)
    gradient = jax.jit(
        jax.grad(lambda s: loss(jnp.where(mask, s, -INF), poisoned, where=mask).sum())
    )(student)
    assert np.isfinite(gradient).all()
    assert not loss(student, teacher, where=jnp.zeros(6, bool)).any()


@pytest.mark.parametrize("name", [*DIVERGENCES, *TRANSFORMED])
def test_extreme_logits_are_finite(name):
    loss = (DIVERGENCES | TRANSFORMED)[name]
    student, teacher = draw((3, 5), 1e4)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: loss(s, teacher).sum()))(student)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_class_that_both_rule_out_is_as_if_sliced_away(name):
    loss = DIVERGENCES[name]
    student, teacher = draw((3, 5))
    ruled_out = jnp.array([[0.0, -INF, 0.0, 0.0, 0.0]])
    value, gradient = jax.jit(
        jax.value_and_grad(lambda s: loss(s + ruled_out, teacher + ruled_out).sum())
    )(student)
    kept = jnp.array([0, 2, 3, 4])
    np.testing.assert_allclose(value, loss(student[:, kept], teacher[:, kept]).sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_a_class_that_the_student_alone_rules_out():
    teacher, student = jnp.zeros(2), jnp.array([0.0, -INF])
    options = {"temperature": 1.0}
    assert losses.renyi_divergence(student, teacher, order=2, **options) == INF
    np.testing.assert_allclose(
        losses.renyi_divergence(student, teacher, order=0.5, **options), np.log(2), rtol=1e-6
    )
    skewed = losses.skewed_kl_divergence(student, teacher, skew=0.5, **options)
    np.testing.assert_allclose(skewed, 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(2), rtol=1e-6)
    assert losses.total_variation_distance(student, teacher, **options) == 0.5
    assert losses.renyi_divergence(student, student[::-1], order=0.5, **options) == INF


def test_transformed_teachers_soften_the_teacher_alone():
    student, teacher = draw()
    loss = losses.transformed_teacher_loss(student, teacher, temperature=4.0)
    p, q = softmax(teacher / 4), softmax(student)
    np.testing.assert_allclose(loss, kl(p, q), rtol=1e-5)
    weighted = losses.transformed_teacher_loss(student, teacher, temperature=4.0, weighted=True)
    weights = (softmax(teacher) ** 0.25).sum(-1)
    np.testing.assert_allclose(weighted, weights * kl(p, q), rtol=1e-5)
    np.testing.assert_allclose(
        losses.transformed_teacher_loss(student, teacher, temperature=1.0, weighted=True),
        losses.kl_divergence(student, teacher, temperature=1.0),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t: losses.skewed_kl_divergence(s, t, skew=1.5), ValueError, "skew must be in"),
        (lambda s, t: losses.adaptive_kl_divergence(s, t, head=-1), ValueError, "head must be in"),
        (lambda s, t: losses.renyi_divergence(s, t, order=0), ValueError, "order must be positive"),
        (
            lambda s, t: losses.alpha_beta_divergence(s, t, alpha=0, beta=0),
            ValueError,
            "must be at least 0, and one of them more, got 0.0 and 0.0",
        ),
        (
            lambda s, t: losses.alpha_beta_divergence(s, t, alpha=-1, beta=1),
            ValueError,
            "must be at least 0",
        ),
        (
            lambda s, t: jax.jit(
                lambda alpha: losses.alpha_beta_divergence(s, t, alpha=alpha, beta=1)
            )(0.5),
            TypeError,
            "alpha must be a finite Python number",
        ),
        (
            lambda s, t: losses.alpha_beta_divergence(s, t, alpha="a", beta=1),
            TypeError,
            "alpha must be a finite Python number, got 'a'",
        ),
        (lambda s, t: losses.renyi_divergence(s, t[:2], order=2), ValueError, "same shape"),
        (
            lambda s, t: losses.transformed_teacher_loss(s, t[:, :3]),
            ValueError,
            "must have the same shape",
        ),
        (lambda s, t: losses.total_variation_distance(s, t > 0), TypeError, "floating-point"),
    ],
)
def test_wrong_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call(*draw((3, 5)))
