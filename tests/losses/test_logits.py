"""Tests losses on logits: hand-worked values, float64 references, limits, common mistakes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxkd import losses, models

SOFT = (losses.kl_divergence, losses.soft_cross_entropy)
REVERSE = losses.reverse_kl_divergence


def draw(seed=0, shape=(6, 10), scale=3.0):
    student, teacher = scale * jax.random.normal(jax.random.key(seed), (2, *shape))
    labels = jax.random.randint(jax.random.key(seed + 1), shape[:-1], 0, shape[-1])
    return student, teacher, labels


def reference_log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference_kl(student, teacher, temperature):
    p, q = (
        reference_log_softmax(np.asarray(z, np.float64) / temperature) for z in (teacher, student)
    )
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)


def reference_soft(student, teacher, temperature):
    p, q = (
        reference_log_softmax(np.asarray(z, np.float64) / temperature) for z in (teacher, student)
    )
    return -(temperature**2) * (np.exp(p) * q).sum(-1)


def test_values_worked_by_hand():
    # Odds 1:3 for the teacher and 1:1 for the student: KL = 1/4 log 1/2 + 3/4 log 3/2.
    teacher, student = jnp.log(jnp.array([1.0, 3.0])), jnp.zeros(2)
    expected = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    np.testing.assert_allclose(
        losses.kl_divergence(student, teacher, temperature=1.0), expected, rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.soft_cross_entropy(student, teacher, temperature=1.0), np.log(2), rtol=1e-6
    )
    # Twice the logits at T=2 are the same distributions; the factor T² stays.
    np.testing.assert_allclose(
        losses.kl_divergence(student, 2 * teacher, temperature=2.0), 4 * expected, rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.temperature_softmax(2 * teacher, temperature=2.0), [0.25, 0.75], rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.hard_cross_entropy(teacher, jnp.array(1)), np.log(4 / 3), rtol=1e-6
    )
    mixed = losses.distillation_loss(
        student, 2 * teacher, jnp.array(1), temperature=2.0, alpha=0.75
    )
    np.testing.assert_allclose(mixed, 0.75 * 4 * np.log(2) + 0.25 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_equal_float64_references(temperature):
    student, teacher, labels = draw()
    kl = losses.kl_divergence(student, teacher, temperature=temperature)
    soft = losses.soft_cross_entropy(student, teacher, temperature=temperature)
    np.testing.assert_allclose(
        kl, reference_kl(student, teacher, temperature), rtol=2e-4, atol=1e-4
    )
    np.testing.assert_allclose(soft, reference_soft(student, teacher, temperature), rtol=1e-5)
    hard = losses.hard_cross_entropy(student, labels)
    np.testing.assert_allclose(
        hard, -reference_log_softmax(student)[np.arange(6), labels], rtol=1e-5
    )
    mixed = losses.distillation_loss(student, teacher, labels, temperature=temperature, alpha=0.3)
    np.testing.assert_allclose(mixed, 0.3 * soft + 0.7 * hard, rtol=1e-6)


def test_sums_over_classes_and_keeps_examples():
    """An element-wise mean would be too small by a factor of the number of classes."""
    student, teacher, _ = draw(shape=(2, 3, 100))
    values = losses.kl_divergence(student, teacher, temperature=4.0)
    chex.assert_shape(values, (2, 3))
    np.testing.assert_allclose(values, reference_kl(student, teacher, 4.0), rtol=1e-4)


def test_gradient_keeps_its_size_over_temperatures():
    """Without T² the gradient at T=100 would be 10,000 times smaller."""
    student, teacher, _ = draw(scale=1.0)

    def norm(loss, temperature):
        return jnp.linalg.norm(
            jax.grad(lambda s: loss(s, teacher, temperature=temperature).mean())(student)
        )

    for loss in SOFT:
        ratio = norm(loss, 100.0) / norm(loss, 1.0)
        assert 0.2 < ratio < 5, ratio


def test_large_temperature_is_half_the_squared_distance_of_centred_logits():
    student, teacher, _ = draw(scale=1.0)
    gap = (student - student.mean(-1, keepdims=True)) - (teacher - teacher.mean(-1, keepdims=True))
    limit = (gap**2).sum(-1) / (2 * 10)
    np.testing.assert_allclose(
        losses.kl_divergence(student, teacher, temperature=20.0), limit, rtol=0.05
    )
    gradient = jax.grad(lambda s: losses.kl_divergence(s, teacher, temperature=1e4).sum())(student)
    np.testing.assert_allclose(gradient, gap / 10, rtol=0.01, atol=5e-4)


@pytest.mark.parametrize("size", [200.0, 1e4])
def test_extreme_logits_stay_finite(size):
    """The logarithm of a softmax would be −inf."""
    student, teacher = jnp.array([[size, -size, 0.0]]), jnp.array([[-size, size, 0.0]])
    labels = jnp.array([1])
    functions = [lambda s, f=f: f(s, teacher, temperature=1.0) for f in SOFT]
    functions.append(lambda s: losses.distillation_loss(s, teacher, labels))
    for function in functions:
        value, gradient = jax.value_and_grad(lambda s, f=function: f(s).sum())(student)
        chex.assert_tree_all_finite((value, gradient))
        assert value > size / 2


@pytest.mark.parametrize("loss", SOFT)
def test_masked_classes_contribute_nothing(loss):
    """A mask and logits of −inf both equal slicing, in value and gradient."""
    student, teacher, _ = draw()
    where = jnp.arange(10) < 7
    masked = [jnp.where(where, z, -jnp.inf) for z in (student, teacher)]

    def value_and_gradient(function, student):
        return jax.value_and_grad(lambda s: function(s).sum())(student)

    expected = value_and_gradient(
        lambda s: loss(s[:, :7], teacher[:, :7], temperature=3.0), student
    )
    by_where = value_and_gradient(
        lambda s: loss(s, teacher, temperature=3.0, where=where[None]), student
    )
    by_infinity = value_and_gradient(lambda s: loss(s, masked[1], temperature=3.0), masked[0])
    chex.assert_trees_all_close(by_where, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(by_infinity, expected, rtol=1e-5, atol=1e-5)


def test_where_that_masks_everything_gives_zero():
    student, teacher, _ = draw()
    for loss in SOFT:
        value, gradient = jax.value_and_grad(
            lambda s, f=loss: f(s, teacher, temperature=2.0, where=jnp.zeros((1, 10), bool)).sum()
        )(student)
        assert value == 0
        chex.assert_trees_all_equal(gradient, jnp.zeros_like(student))


def test_class_that_only_one_side_rules_out_is_finite_for_the_teacher():
    finite, ruled_out = jnp.zeros((1, 3)), jnp.array([[0.0, 0.0, -jnp.inf]])
    kl = losses.kl_divergence(finite, ruled_out, temperature=1.0)
    np.testing.assert_allclose(kl, np.log(3 / 2), rtol=1e-6)
    assert losses.kl_divergence(ruled_out, finite, temperature=1.0) == jnp.inf
    masked = losses.hard_cross_entropy(ruled_out, jnp.array([0]))
    np.testing.assert_allclose(masked, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_widened_first(dtype):
    """Over many classes a bf16 softmax loses most of its mass."""
    student, teacher, _ = draw(shape=(2, 50_000), scale=1.0)
    narrow = student.astype(dtype), teacher.astype(dtype)
    for loss, reference in zip(SOFT, (reference_kl, reference_soft), strict=True):
        value = loss(*narrow, temperature=1.0)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(
            value, reference(*(z.astype(jnp.float32) for z in narrow), 1.0), rtol=1e-3
        )


def test_zero_where_equal_and_positive_elsewhere():
    student, teacher, _ = draw()
    np.testing.assert_allclose(
        losses.kl_divergence(student, student, temperature=3.0), 0, atol=1e-6
    )
    assert (losses.kl_divergence(student, teacher, temperature=3.0) > 0).all()
    gradient = jax.grad(lambda s: losses.kl_divergence(s, student, temperature=3.0).sum())(student)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("loss", SOFT)
def test_shift_and_permutation_invariance(loss):
    student, teacher, _ = draw()
    expected = loss(student, teacher, temperature=2.0)
    np.testing.assert_allclose(loss(student + 7, teacher - 5, temperature=2.0), expected, rtol=1e-4)
    np.testing.assert_allclose(
        loss(student[:, ::-1], teacher[:, ::-1], temperature=2.0), expected, rtol=1e-5
    )


@pytest.mark.parametrize("loss", SOFT)
def test_axis_is_the_axis_of_classes(loss):
    student, teacher, _ = draw()
    np.testing.assert_allclose(
        loss(student.T, teacher.T, temperature=2.0, axis=0),
        loss(student, teacher, temperature=2.0),
        rtol=1e-6,
    )


@pytest.mark.thorough
def test_jit_vmap_and_pmap_equal_eager():
    student, teacher, labels = draw(shape=(8, 10))
    expected = losses.distillation_loss(student, teacher, labels)
    for transform in (jax.jit, jax.vmap, jax.pmap):
        np.testing.assert_allclose(
            transform(losses.distillation_loss)(student, teacher, labels), expected, rtol=1e-6
        )
    traced = jax.jit(
        lambda t, a: losses.distillation_loss(student, teacher, labels, temperature=t, alpha=a)
    )(2.0, 0.5)
    np.testing.assert_allclose(traced, expected, rtol=1e-6)


@pytest.mark.parametrize("loss", SOFT)
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher, _ = draw(shape=(2, 4), scale=1.0)
    check_grads(
        lambda s, t: loss(s, t, temperature=2.0),
        (student, teacher),
        order=1,
        modes=("rev",),
        eps=1e-2,
        atol=1e-2,
        rtol=1e-2,
    )


def test_alpha_is_the_weight_of_the_soft_term():
    """In Keras' example and torchdistill alpha is the weight of the hard term."""
    student, teacher, labels = draw()
    soft_only = losses.distillation_loss(student, teacher, labels, temperature=4.0, alpha=1.0)
    hard_only = losses.distillation_loss(student, teacher, labels, temperature=4.0, alpha=0.0)
    np.testing.assert_allclose(
        soft_only, losses.soft_cross_entropy(student, teacher, temperature=4.0), rtol=1e-6
    )
    np.testing.assert_allclose(hard_only, losses.hard_cross_entropy(student, labels), rtol=1e-6)


def test_alpha_of_one_hides_a_label():
    student, teacher, labels = draw()
    known = jnp.arange(6) < 2
    alpha = jnp.where(known, 0.5, 1.0)
    values = losses.distillation_loss(student, teacher, labels, alpha=alpha)
    other_values = losses.distillation_loss(student, teacher, (labels + 1) % 10, alpha=alpha)
    np.testing.assert_array_equal(np.asarray(values == other_values), ~np.asarray(known))


def test_alpha_of_one_accepts_a_placeholder_label_at_minus_infinity():
    student, teacher = jnp.array([[-jnp.inf, 1.0, 2.0]]), jnp.array([[-jnp.inf, 2.0, 1.0]])

    def loss(student):
        return losses.distillation_loss(student, teacher, jnp.array([0]), alpha=1.0).sum()

    chex.assert_tree_all_finite(jax.value_and_grad(loss)(student))


def test_label_out_of_range_is_nan_not_another_class():
    student, _, _ = draw()
    values = losses.hard_cross_entropy(student, jnp.array([-1, 10, 0, 1, 2, 9]))
    np.testing.assert_array_equal(np.isnan(values), [True, True, False, False, False, False])


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    student, teacher, labels = draw()
    calls = [lambda f=f: f(student, teacher, temperature=temperature) for f in SOFT]
    calls.append(lambda: losses.temperature_softmax(student, temperature=temperature))
    calls.append(
        lambda: losses.distillation_loss(student, teacher, labels, temperature=temperature)
    )
    for call in calls:
        for function in (call, jax.jit(call)):
            with pytest.raises(ValueError, match="temperature must be positive"):
                function()


def test_wrong_shapes_and_dtypes_raise():
    """Logits [4, 4] with [4], or [B, C] with [C], would otherwise broadcast silently."""
    student, teacher, labels = draw(shape=(4, 4))
    for loss in SOFT:
        with pytest.raises(ValueError, match="must have the same shape"):
            loss(student, teacher[0], temperature=1.0)
        with pytest.raises(TypeError, match="floating-point"):
            loss(student, labels, temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be a scalar"):
        losses.kl_divergence(student, teacher, temperature=jnp.ones(4))
    with pytest.raises(ValueError, match="without its last axis"):
        losses.hard_cross_entropy(student[None], labels)
    message = (
        r"must be integers, got float32: use labels.astype\(int\) .* jnp.log\(p\), temperature=1"
    )
    with pytest.raises(TypeError, match=message):
        losses.hard_cross_entropy(student, teacher[:, 0])
    for loss in (
        losses.distillation_loss,
        jax.jit(losses.distillation_loss, static_argnames="alpha"),
    ):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
            loss(student, teacher, labels, alpha=1.5)
    with pytest.raises(ValueError, match="one weight per example"):
        losses.distillation_loss(student[None], teacher[None], labels[None], alpha=jnp.zeros(4))
    with pytest.raises(ValueError, match="class axis"):
        losses.temperature_softmax(jnp.array(1.0), temperature=1.0)


def test_further_divergences_worked_by_hand():
    # p = (1/4, 3/4), q = (1/2, 1/2), and with β = 1/2 their mean (3/8, 5/8).
    teacher, student = jnp.log(jnp.array([1.0, 3.0])), jnp.zeros(2)
    reverse = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(
        losses.reverse_kl_divergence(student, teacher, temperature=1.0), reverse, rtol=1e-6
    )
    forward_part = 0.25 * np.log(2 / 3) + 0.75 * np.log(6 / 5)
    reverse_part = 0.5 * np.log(4 / 3) + 0.5 * np.log(4 / 5)
    value = losses.jensen_shannon_divergence(student, 2 * teacher, temperature=2.0, beta=0.5)
    np.testing.assert_allclose(value, 4 * (forward_part + reverse_part) / 2, rtol=1e-5)
    np.testing.assert_allclose(losses.logit_mse_loss(jnp.array([1.0, 4.0]), jnp.zeros(2)), 8.5)
    # Mean 3, population deviation 2.
    np.testing.assert_allclose(losses.standardize_logits(jnp.array([1.0, 5.0])), [-1, 1], rtol=1e-6)


def reference_jensen_shannon(student, teacher, temperature, beta):
    p, q = (
        np.exp(reference_log_softmax(np.asarray(z, np.float64) / temperature))
        for z in (teacher, student)
    )
    m = beta * p + (1 - beta) * q
    return temperature**2 * (beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_further_divergences_equal_float64_references(temperature):
    student, teacher, _ = draw()
    value = losses.reverse_kl_divergence(student, teacher, temperature=temperature)
    np.testing.assert_allclose(
        value, reference_kl(teacher, student, temperature), rtol=2e-4, atol=1e-4
    )
    for beta in (0.1, 0.5, 0.9):
        value = losses.jensen_shannon_divergence(
            student, teacher, temperature=temperature, beta=beta
        )
        expected = reference_jensen_shannon(student, teacher, temperature, beta)
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4)


def test_direction_of_beta():
    """β is the teacher's share: near 0 the value is β KL(teacher ‖ student), near 1 the reverse."""
    student, teacher, _ = draw(scale=1.0)
    forward, reverse = (
        f(student, teacher, temperature=1.0) for f in (losses.kl_divergence, REVERSE)
    )
    for beta, expected in ((0.0, forward), (1.0, reverse)):
        value = losses.jensen_shannon_divergence(student, teacher, temperature=1.0, beta=beta)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        traced = jax.jit(
            lambda b: losses.jensen_shannon_divergence(student, teacher, temperature=1.0, beta=b)
        )(beta)
        np.testing.assert_allclose(traced, expected, rtol=1e-5)
    for beta, expected in ((1e-2, 1e-2 * forward), (1 - 1e-2, 1e-2 * reverse)):
        value = losses.jensen_shannon_divergence(student, teacher, temperature=1.0, beta=beta)
        np.testing.assert_allclose(value, expected, rtol=0.1)


@pytest.mark.thorough
@given(
    seed=st.integers(0, 2**16),
    beta=st.floats(0.05, 0.95),
    scale=st.floats(0.1, 30),
    classes=st.integers(2, 6),
)
@settings(max_examples=25, deadline=None)
def test_jensen_shannon_is_bounded_and_mirrors(seed, beta, scale, classes):
    student, teacher, _ = draw(seed=seed, shape=(3, classes), scale=scale)
    value = losses.jensen_shannon_divergence(student, teacher, temperature=1.0, beta=beta)
    mirrored = losses.jensen_shannon_divergence(teacher, student, temperature=1.0, beta=1 - beta)
    np.testing.assert_allclose(value, mirrored, rtol=1e-3, atol=1e-5)
    entropy = -(beta * np.log(beta) + (1 - beta) * np.log(1 - beta))
    assert (value >= -1e-5).all() and (value <= entropy + 1e-5).all()


def test_jensen_shannon_is_finite_whatever_is_ruled_out():
    student, teacher = (
        jnp.array([[-jnp.inf, 1.0, 2.0, 0.0]]),
        jnp.array([[1.0, -jnp.inf, 1.0, 0.0]]),
    )

    def loss(student, teacher):
        return losses.jensen_shannon_divergence(student, teacher, temperature=2.0, beta=0.3).sum()

    chex.assert_tree_all_finite(jax.value_and_grad(loss, (0, 1))(student, teacher))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_class_weights_make_a_balanced_teacher(temperature):
    student, teacher, _ = draw()
    weights = jnp.arange(10.0)
    probabilities = np.exp(
        reference_log_softmax(np.asarray(teacher, np.float64) / temperature)
    ) * np.arange(10)
    probabilities /= probabilities.sum(-1, keepdims=True)
    log_q = reference_log_softmax(np.asarray(student, np.float64) / temperature)
    soft = losses.soft_cross_entropy(student, teacher, temperature=temperature, weights=weights)
    np.testing.assert_allclose(soft, -(temperature**2) * (probabilities * log_q).sum(-1), rtol=1e-5)
    kl = losses.kl_divergence(student, teacher, temperature=temperature, weights=weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(probabilities > 0, probabilities * (np.log(probabilities) - log_q), 0)
    np.testing.assert_allclose(kl, temperature**2 * terms.sum(-1), rtol=1e-4, atol=1e-4)
    for loss in SOFT:
        even = loss(student, teacher, temperature=temperature, weights=jnp.full(10, 3.0))
        np.testing.assert_allclose(
            even, loss(student, teacher, temperature=temperature), rtol=1e-4, atol=1e-5
        )


def test_standardized_logits_have_mean_0_and_deviation_1_and_do_not_see_scale_or_shift():
    logits, _, _ = draw()
    standardized = losses.standardize_logits(logits)
    np.testing.assert_allclose(standardized.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(standardized.std(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        losses.standardize_logits(5 * logits - 2), standardized, rtol=1e-4, atol=1e-5
    )
    masked = jnp.concatenate([logits, jnp.full((6, 1), -jnp.inf)], 1)
    np.testing.assert_allclose(losses.standardize_logits(masked)[:, :-1], standardized, rtol=1e-5)
    np.testing.assert_array_equal(losses.standardize_logits(masked)[:, -1], -jnp.inf)
    np.testing.assert_allclose(
        losses.standardize_logits(logits.T, axis=0), standardized.T, rtol=1e-5
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -jnp.inf])
def test_standardized_constant_logits_are_zero_without_a_gradient(value):
    """The rounding error of the mean must not be scaled up to a deviation of 1."""
    logits = jnp.full((2, 7), value)
    result, gradient = jax.value_and_grad(
        lambda z: jnp.where(z > -jnp.inf, losses.standardize_logits(z), 0).sum()
    )(logits)
    assert result == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "loss", [REVERSE, lambda *z, **k: losses.jensen_shannon_divergence(*z, beta=0.3, **k)]
)
def test_further_divergences_at_their_edges(loss):
    student, teacher, _ = draw()
    where = jnp.arange(10) % 3 != 0
    expected, gradient = jax.value_and_grad(
        lambda s: loss(s[:, where], teacher[:, where], temperature=2.0).sum()
    )(student)
    masked = jax.value_and_grad(
        lambda s: loss(s, teacher, temperature=2.0, where=where[None]).sum()
    )(student)
    chex.assert_trees_all_close(masked, (expected, gradient), rtol=1e-4, atol=1e-5)
    masked_logits = (
        jnp.where(where[None], student, -jnp.inf),
        jnp.where(where[None], teacher, -jnp.inf),
    )
    by_infinity = jax.value_and_grad(lambda s: loss(s, masked_logits[1], temperature=2.0).sum())(
        masked_logits[0]
    )
    chex.assert_trees_all_close(by_infinity, (expected, gradient), rtol=1e-4, atol=1e-5)
    for scale in (1e4, 1e-4):
        chex.assert_tree_all_finite(
            jax.value_and_grad(lambda s, k=scale: loss(k * s, k * teacher, temperature=2.0).sum())(
                student
            )
        )
    np.testing.assert_allclose(loss(student, student + 1, temperature=3.0), 0, atol=1e-5)
    check_grads(
        lambda s, t: loss(s, t, temperature=2.0),
        (student[:2, :4], teacher[:2, :4]),
        1,
        ("rev",),
        2e-2,
        2e-2,
        1e-2,
    )
    with pytest.raises(ValueError, match="must have the same shape"):
        loss(student, teacher[0], temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(student, teacher, temperature=0.0)


def test_wrong_beta_and_weights_raise():
    student, teacher, _ = draw()
    for beta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
            losses.jensen_shannon_divergence(student, teacher, temperature=1.0, beta=beta)
    with pytest.raises(ValueError, match="beta must be a scalar"):
        losses.jensen_shannon_divergence(student, teacher, temperature=1.0, beta=jnp.ones(6))
    with pytest.raises(ValueError, match="at least 0"):
        losses.kl_divergence(student, teacher, temperature=1.0, weights=-jnp.ones(10))
    with pytest.raises(ValueError, match="do not broadcast"):
        losses.kl_divergence(student, teacher, temperature=1.0, weights=jnp.ones(6))
    with pytest.raises(ValueError, match="must have the same shape"):
        losses.logit_mse_loss(student, teacher[0])


def test_masks_of_large_negative_numbers_and_of_minus_infinity_agree():
    """In practice one side is often masked by −1e9 and the other by −inf."""
    low, out = jnp.array([[1.0, 2.0, -1e9]]), jnp.array([[1.0, 2.5, -jnp.inf]])
    labels = jnp.array([0])
    for loss in (
        lambda s: REVERSE(s, out, temperature=1.0),
        lambda s: losses.jensen_shannon_divergence(s, out, temperature=1.0, beta=1.0),
    ):
        chex.assert_tree_all_finite(jax.value_and_grad(lambda s, f=loss: f(s).sum())(low))
    for loss in (
        lambda t: losses.kl_divergence(out, t, temperature=1.0),
        lambda t: losses.soft_cross_entropy(out, t, temperature=1.0),
        lambda t: losses.jensen_shannon_divergence(out, t, temperature=1.0, beta=0.0),
        lambda t: losses.decoupled_loss(out, t, labels, temperature=1.0, non_target_weight=1.0),
        lambda t: losses.normalized_loss(out, t, jnp.array([2])),
    ):
        assert np.isfinite(loss(low)).all()


def test_gradient_of_the_temperature_beside_classes_at_minus_infinity():
    student, teacher, _ = draw(shape=(2, 4))
    masked = [jnp.pad(z, ((0, 0), (0, 1)), constant_values=-jnp.inf) for z in (student, teacher)]
    padded = [jnp.pad(z, ((0, 0), (0, 1)), constant_values=jnp.nan) for z in (student, teacher)]
    for loss in (*SOFT, REVERSE):
        expected = jax.grad(lambda t, f=loss: f(student, teacher, temperature=t).sum())(2.0)
        by_infinity = jax.grad(lambda t, f=loss: f(*masked, temperature=t).sum())(2.0)
        by_where = jax.grad(
            lambda t, f=loss: f(*padded, temperature=t, where=jnp.arange(5) < 4).sum()
        )(2.0)
        np.testing.assert_allclose([by_infinity, by_where], [expected, expected], rtol=1e-4)
    gradient = jax.grad(lambda t: losses.temperature_softmax(masked[0], temperature=t)[:, 0].sum())(
        2.0
    )
    assert np.isfinite(gradient)


def test_wrong_masks_and_hyper_parameters_raise():
    student, teacher, _ = draw()
    with pytest.raises(TypeError, match="take mask != 0"):
        losses.kl_divergence(student, teacher, temperature=1.0, where=jnp.zeros(10).at[2].set(-1e9))
    with pytest.raises(ValueError, match="can be broadcast"):
        losses.kl_divergence(student, teacher, temperature=1.0, where=jnp.ones(6, bool))
    with pytest.raises(ValueError, match="positive and finite"):
        losses.kl_divergence(student, teacher, temperature=jnp.inf)


def test_a_mask_that_fits_examples_and_classes_is_refused():
    student, teacher, _ = draw(shape=(4, 4))
    mask = jnp.array([True, True, False, True])
    with pytest.raises(
        ValueError, match=r"where \(4,\) may be a mask of the classes or of the examples"
    ):
        losses.kl_divergence(student, teacher, where=mask)
    by_class = losses.kl_divergence(student, teacher, where=mask[None])
    kept = losses.kl_divergence(student[:3], teacher[:3], where=mask)
    np.testing.assert_allclose(by_class[:3], kept, rtol=1e-6)


@pytest.mark.parametrize("value", [None, "4", True, "0.9"])
def test_hyper_parameters_that_are_no_numbers_raise(value):
    student, teacher, labels = draw()
    with pytest.raises(TypeError, match=f"temperature must be a number, got {value!r}"):
        losses.kl_divergence(student, teacher, temperature=value)
    with pytest.raises(TypeError, match=f"alpha must be a number, got {value!r}"):
        losses.distillation_loss(student, teacher, labels, alpha=value)


@pytest.mark.parametrize("options", [{"temperature": -4.0}, {"temperature": 0}, {"alpha": 9.0}])
def test_traced_hyper_parameters_out_of_range_give_nan(options):
    """The values of a traced number are unknown while it is checked."""
    student, teacher, labels = draw()
    (name,) = options

    @jax.jit
    def loss(value):
        return losses.distillation_loss(student, teacher, labels, **{name: value})

    assert np.isnan(loss(options[name])).all()
    np.testing.assert_allclose(
        loss(0.5), losses.distillation_loss(student, teacher, labels, **{name: 0.5}), rtol=1e-6
    )


def test_outputs_of_a_model_are_no_logits():
    student, teacher, _ = draw()
    outputs = models.Outputs(student, {})
    with pytest.raises(TypeError, match="student_logits are the outputs of a model.* pass .logits"):
        losses.kl_divergence(outputs, teacher)


def test_standardized_logits_of_any_size():
    logits, _, _ = draw(shape=(2, 5))
    for scale in (1e-20, 1e20):
        np.testing.assert_allclose(
            losses.standardize_logits(scale * logits),
            losses.standardize_logits(logits),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("axis", [0, 1, -3])
def test_one_entry_per_class_goes_along_the_axis_of_the_classes(axis):
    """Broadcasting would put it last, on an axis of the same length."""
    full_shape = (4 if axis == 0 else 3, 4, 2, 4)
    student, teacher = (
        jax.random.normal(jax.random.key(seed), full_shape, jnp.float32) for seed in (0, 1)
    )
    shape = tuple(4 if i == axis % 4 else 1 for i in range(4))
    weights, where = jnp.array([1.0, 0.5, 0.0, 2.0]), jnp.array([True, False, True, True])
    np.testing.assert_array_equal(
        losses.kl_divergence(student, teacher, axis=axis, weights=weights, where=where),
        losses.kl_divergence(
            student, teacher, axis=axis, weights=weights.reshape(shape), where=where.reshape(shape)
        ),
    )
    np.testing.assert_array_equal(
        losses.reverse_kl_divergence(student, teacher, axis=axis, where=where),
        losses.reverse_kl_divergence(student, teacher, axis=axis, where=where.reshape(shape)),
    )
