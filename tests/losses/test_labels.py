"""Tests losses on labels: hand-worked values, float64 references, identities and limits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxkd import losses

HALVES = jnp.log(jnp.array([0.5, 0.25, 0.25]))
LAST = jnp.log(jnp.array([0.25, 0.25, 0.5]))
ZERO = jnp.array(0)


def draw(seed=0, shape=(6, 10), scale=3.0):
    student, teacher = scale * jax.random.normal(jax.random.key(seed), (2, *shape))
    labels = jax.random.randint(jax.random.key(seed + 1), shape[:-1], 0, shape[-1])
    return student, teacher, labels


def decoupled(student, teacher, labels, **weights):
    return losses.decoupled_loss(
        student, teacher, labels, **({"temperature": 4.0, "non_target_weight": 8.0} | weights)
    )


TEACHER_LOSSES = (decoupled, losses.normalized_loss)


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def reference_decoupled(student, teacher, labels, temperature, alpha, beta):
    values = []
    for s, t, label in zip(
        *(np.asarray(z, np.float64) for z in (student, teacher)), np.asarray(labels), strict=True
    ):
        q, p = softmax(s / temperature), softmax(t / temperature)
        target = p[label] * np.log(p[label] / q[label]) + (1 - p[label]) * np.log(
            (1 - p[label]) / (1 - q[label])
        )
        rest_q, rest_p = (softmax(np.delete(z, label) / temperature) for z in (s, t))
        values.append(
            temperature**2 * (alpha * target + beta * (rest_p * np.log(rest_p / rest_q)).sum())
        )
    return values


def reference_normalized(student, teacher, labels, temperature, gamma):
    values = []
    for s, t, label in zip(
        *(np.asarray(z, np.float64) for z in (student, teacher)), np.asarray(labels), strict=True
    ):
        rest_q, rest_p = (softmax(np.delete(z, label) / temperature) for z in (s, t))
        rest = gamma * temperature**2 * (rest_p * np.log(rest_q)).sum()
        values.append(-softmax(t)[label] * np.log(softmax(s)[label]) - rest)
    return values


def test_values_worked_by_hand():
    # Binary parts (1/2, 1/2) and (1/4, 3/4): 1/2 log 2 + 1/2 log 2/3. Other classes (1/2, 1/2) and
    # (1/3, 2/3): 1/2 log 3/2 + 1/2 log 3/4.
    value = losses.decoupled_loss(
        LAST, HALVES, ZERO, temperature=1.0, target_weight=3.0, non_target_weight=5.0
    )
    np.testing.assert_allclose(value, 1.5 * np.log(4 / 3) + 2.5 * np.log(9 / 8), rtol=1e-5)
    # 1/2 log 4 for the true class, and 1.5 times the cross-entropy of (1/3, 2/3) under (1/2, 1/2).
    value = losses.normalized_loss(LAST, HALVES, ZERO)
    np.testing.assert_allclose(value, 0.5 * np.log(4) + 1.5 * 0.5 * np.log(9 / 2), rtol=1e-5)
    # 0.7 of −log 1/4, and 0.3 of the mean of log 4, log 4 and log 2.
    value = losses.label_smoothing_loss(LAST, ZERO, smoothing=0.3)
    np.testing.assert_allclose(value, 0.7 * np.log(4) + 0.3 * np.log(32) / 3, rtol=1e-6)
    weighted = losses.hard_cross_entropy(LAST, ZERO, weights=jnp.array([3.0, 1.0, 1.0]))
    np.testing.assert_allclose(weighted, 3 * np.log(4), rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equal_float64_references(temperature):
    inputs = draw()
    value = losses.decoupled_loss(
        *inputs, temperature=temperature, target_weight=0.5, non_target_weight=8.0
    )
    np.testing.assert_allclose(
        value, reference_decoupled(*inputs, temperature, 0.5, 8.0), rtol=2e-4
    )
    value = losses.normalized_loss(*inputs, temperature=temperature, gamma=1.5)
    np.testing.assert_allclose(value, reference_normalized(*inputs, temperature, 1.5), rtol=2e-5)


def test_decoupled_with_the_teachers_own_weight_is_the_kl_divergence():
    """Tests the paper's identity KL = target term + (1 − p_label) · non-target term."""
    student, teacher, labels = draw()
    softened = losses.temperature_softmax(teacher, temperature=4.0)
    weight = 1 - jnp.take_along_axis(softened, labels[:, None], 1)[:, 0]
    for i in range(6):
        value = decoupled(student[i], teacher[i], labels[i], non_target_weight=weight[i])
        np.testing.assert_allclose(
            value, losses.kl_divergence(student[i], teacher[i], temperature=4.0), rtol=1e-4
        )


def test_decoupled_is_zero_where_equal_and_losses_ignore_a_shift():
    student, teacher, labels = draw()
    np.testing.assert_allclose(decoupled(student, student + 3, labels), 0, atol=1e-4)
    for loss in TEACHER_LOSSES:
        np.testing.assert_allclose(
            loss(student + 7, teacher - 5, labels),
            loss(student, teacher, labels),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.thorough
def test_two_classes_leave_only_the_target_term():
    student, teacher, labels = draw(shape=(5, 2))
    np.testing.assert_allclose(
        decoupled(student, teacher, labels),
        losses.kl_divergence(student, teacher, temperature=4.0),
        rtol=1e-4,
    )
    p, q = jax.nn.softmax(teacher), jax.nn.log_softmax(student)
    expected = -(p * q)[jnp.arange(5), labels]
    value = losses.normalized_loss(student, teacher, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.thorough
def test_normalized_loss_is_minimal_where_other_classes_equal_the_teachers():
    _, teacher, labels = draw()
    non_target = ~jax.nn.one_hot(labels, 10, dtype=bool)
    gradient = jax.grad(lambda s: losses.normalized_loss(s, teacher, labels).sum())(teacher)
    # On the other classes the student equals the teacher. The gradient that is left is that of the
    # true class, in proportion to their probabilities.
    p = jax.nn.softmax(teacher)
    confidence = p[jnp.arange(6), labels][:, None]
    np.testing.assert_allclose(
        jnp.where(non_target, gradient, 0), jnp.where(non_target, confidence * p, 0), atol=1e-5
    )


@pytest.mark.parametrize("loss", TEACHER_LOSSES)
@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits_stay_finite(loss, classes, scale):
    """The paper's code masks by subtracting 1000, which fails for logits of 1e4."""
    student, teacher, labels = draw(shape=(6, classes), scale=scale)
    chex.assert_tree_all_finite(
        jax.value_and_grad(lambda s: loss(s, teacher, labels).sum())(student)
    )


@pytest.mark.parametrize("loss", TEACHER_LOSSES)
def test_classes_at_minus_infinity_contribute_nothing(loss):
    student, teacher, _ = draw()
    labels = jnp.arange(6)
    masked = [jnp.concatenate([z, jnp.full((6, 2), -jnp.inf)], 1) for z in (student, teacher)]
    expected = jax.value_and_grad(lambda s: loss(s, teacher, labels).sum())(student)
    value, gradient = jax.value_and_grad(lambda s: loss(s, masked[1], labels).sum())(masked[0])
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(
        gradient, jnp.pad(expected[1], ((0, 0), (0, 2))), rtol=1e-4, atol=1e-5
    )


@pytest.mark.thorough
@pytest.mark.parametrize("loss", TEACHER_LOSSES)
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher, labels = draw(shape=(2, 4), scale=1.0)
    check_grads(
        lambda s, t: loss(s, t, labels),
        (student, teacher),
        1,
        ("rev",),
        atol=2e-2,
        rtol=2e-2,
        eps=1e-2,
    )


def test_label_smoothing_is_distillation_from_a_uniform_teacher():
    student, _, labels = draw()
    np.testing.assert_allclose(
        losses.label_smoothing_loss(student, labels, smoothing=0.1),
        losses.distillation_loss(
            student, jnp.zeros_like(student), labels, temperature=1.0, alpha=0.1
        ),
        rtol=1e-5,
    )


@pytest.mark.thorough
@given(smoothing=st.floats(0, 1), classes=st.integers(2, 5), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_label_smoothing_is_between_its_two_terms(smoothing, classes, seed):
    student, _, labels = draw(seed=seed, shape=(3, classes))
    hard, uniform, value = (
        losses.label_smoothing_loss(student, labels, smoothing=e) for e in (0.0, 1.0, smoothing)
    )
    np.testing.assert_allclose(hard, losses.hard_cross_entropy(student, labels), rtol=1e-5)
    assert (value <= jnp.maximum(hard, uniform) + 1e-5).all() and (
        value >= jnp.minimum(hard, uniform) - 1e-5
    ).all()


def test_virtual_teacher_gives_the_probability_to_the_label():
    logits = losses.virtual_teacher_logits(jnp.array([[0, 3]]), num_classes=5, correct=0.9)
    probabilities = jax.nn.softmax(logits)
    np.testing.assert_allclose(probabilities.max(-1), 0.9, rtol=1e-6)
    np.testing.assert_allclose(probabilities[0, 1], [0.025, 0.025, 0.025, 0.9, 0.025], rtol=1e-5)


def test_class_weights_of_1_change_nothing():
    student, _, labels = draw()
    np.testing.assert_array_equal(
        losses.hard_cross_entropy(student, labels, weights=jnp.ones(10)),
        losses.hard_cross_entropy(student, labels),
    )


def test_label_out_of_range_is_nan():
    student, teacher, _ = draw()
    labels = jnp.array([-1, 10, 0, 1, 2, 9])
    weighted = losses.hard_cross_entropy(student, labels, weights=jnp.ones(10))
    for values in (
        weighted,
        losses.normalized_loss(student, teacher, labels),
        decoupled(student, teacher, labels),
    ):
        np.testing.assert_array_equal(np.isnan(values), [True, True, False, False, False, False])


def test_nan_is_not_treated_as_minus_infinity():
    student, teacher, labels = draw()
    student = student.at[0, 3].set(jnp.nan)
    for loss in (*TEACHER_LOSSES, losses.distillation_loss):
        np.testing.assert_array_equal(
            np.isnan(loss(student, teacher, labels)), [True] + [False] * 5
        )


def test_wrong_arguments_raise():
    student, teacher, labels = draw()
    for loss in TEACHER_LOSSES:
        with pytest.raises(ValueError, match="must have the same shape"):
            loss(student[:, 1:], teacher, labels)
        with pytest.raises(ValueError, match="without its last axis"):
            loss(student, teacher, labels[None])
        with pytest.raises(TypeError, match="must be integers"):
            loss(student, teacher, student[:, 0])
        with pytest.raises(ValueError, match="temperature must be positive"):
            loss(student, teacher, labels, temperature=0.0)
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\]"):
        losses.label_smoothing_loss(student, labels, smoothing=1.1)
    with pytest.raises(ValueError, match="one entry for each class"):
        losses.hard_cross_entropy(student, labels, weights=jnp.ones(6))
    with pytest.raises(ValueError, match=r"correct must be in \(0, 1\)"):
        losses.virtual_teacher_logits(labels, num_classes=10, correct=1.0)
    with pytest.raises(ValueError, match="two classes"):
        losses.virtual_teacher_logits(labels, num_classes=1, correct=0.9)


def test_narrow_labels_do_not_wrap_around():
    student, teacher, _ = draw(shape=(2, 300))
    narrow, wide = jnp.array([1, 250], jnp.uint8), jnp.array([1, 250])
    for loss in (*TEACHER_LOSSES, losses.distillation_loss):
        np.testing.assert_array_equal(loss(student, teacher, narrow), loss(student, teacher, wide))
    logits = losses.virtual_teacher_logits(narrow, num_classes=300, correct=0.9)
    np.testing.assert_array_equal((logits > -1).sum(-1), 1)


def test_alpha_of_zero_needs_no_teacher():
    student, teacher = jnp.array([[1.0, 2.0, -jnp.inf]]), jnp.array([[1.0, 2.0, 3.0]])
    value = losses.distillation_loss(student, teacher, jnp.array([0]), alpha=0.0)
    np.testing.assert_allclose(value, losses.hard_cross_entropy(student, jnp.array([0])), rtol=1e-6)


def test_class_of_weight_zero_may_be_ruled_out():
    logits = jnp.array([[-jnp.inf, 1.0]])
    assert losses.hard_cross_entropy(logits, jnp.array([0]), weights=jnp.array([0.0, 1.0])) == 0


def test_weights_of_terms_are_scalars_or_per_example():
    student, teacher, labels = draw()
    weights = jnp.arange(6.0)
    value = decoupled(student, teacher, labels, non_target_weight=weights)
    for i in range(6):
        single = decoupled(student[i], teacher[i], labels[i], non_target_weight=weights[i])
        np.testing.assert_allclose(value[i], single, rtol=1e-5)
    for wrong in ({"non_target_weight": jnp.ones(5)}, {"target_weight": jnp.ones((6, 1))}):
        with pytest.raises(ValueError, match="one weight per example"):
            decoupled(student, teacher, labels, **wrong)
    with pytest.raises(ValueError, match="one weight per example"):
        losses.normalized_loss(student, teacher, labels, gamma=jnp.ones(5))


def with_nan_row(logits, row=1):
    return logits.at[row].set(jnp.nan)


def assert_row_has_no_effect(loss, arrays, row=1):
    """Checks that what a row holds changes neither value nor gradient, for each array by itself."""
    function = jax.value_and_grad(lambda *arrays: loss(*arrays).sum(), tuple(range(len(arrays))))
    for compiled in (function, jax.jit(function)):
        value, gradients = compiled(*arrays)
        for i, array in enumerate(arrays):
            replaced = [*arrays[:i], with_nan_row(array, row), *arrays[i + 1 :]]
            new_value, new_gradients = compiled(*replaced)
            chex.assert_tree_all_finite(new_gradients)
            np.testing.assert_allclose(new_value, value, rtol=1e-6)
            chex.assert_trees_all_close(new_gradients, gradients, rtol=1e-5)


SOME_WEIGHTS = [0.9, 0.0, 0.5]


@pytest.mark.parametrize("weights", [SOME_WEIGHTS, jnp.array(SOME_WEIGHTS)], ids=["list", "array"])
def test_an_example_of_weight_0_may_hold_anything(weights):
    student, teacher, labels = draw(shape=(3, 4))
    assert_row_has_no_effect(
        lambda t: losses.distillation_loss(student, t, labels, alpha=weights), [teacher]
    )
    assert_row_has_no_effect(
        lambda s, t: decoupled(s, t, labels, target_weight=weights, non_target_weight=weights),
        [student, teacher],
    )
    assert_row_has_no_effect(
        lambda s, t: decoupled(s, t, labels, target_weight=0.0, non_target_weight=weights),
        [student, teacher],
    )


def test_traced_weights_of_0_exclude_as_well():
    student, teacher, labels = draw(shape=(3, 4))
    loss = jax.jit(
        lambda t, weights: losses.distillation_loss(student, t, labels, alpha=weights).sum()
    )
    teacher = with_nan_row(teacher)
    chex.assert_tree_all_finite(jax.value_and_grad(loss)(teacher, jnp.array(SOME_WEIGHTS)))
    assert np.isnan(loss(teacher, jnp.full(3, 0.5)))


def test_gamma_of_0_leaves_out_the_other_classes():
    student, teacher, labels = draw(shape=(3, 4))
    impossible = student.at[1, (labels[1] + 1) % 4].set(-jnp.inf)
    loss = lambda s, gamma: losses.normalized_loss(s, teacher, labels, gamma=gamma).sum()  # noqa: E731
    chex.assert_tree_all_finite(jax.value_and_grad(loss)(impossible, jnp.array(SOME_WEIGHTS)))
    assert loss(impossible, 1.5) == jnp.inf


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_a_label_out_of_range_has_no_weight_that_hides_it(label):
    student, _, labels = draw(shape=(3, 4))
    labels = labels.at[1].set(label)
    weights = jnp.zeros(4).at[2].set(1.0)
    values = losses.hard_cross_entropy(student, labels, weights=weights)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False])
    # `where` and α = 1 exclude it instead.
    where = jnp.array([True, False, True])
    assert_row_has_no_effect(lambda s: losses.hard_cross_entropy(s, labels, where=where), [student])
    alpha = jnp.where(where, 0.5, 1.0)
    assert np.isfinite(losses.distillation_loss(student, student, labels, alpha=alpha)).all()


def test_a_class_of_weight_0_is_left_out_with_its_gradient():
    student, _, labels = draw(shape=(3, 4))
    labels = labels.at[1].set(3).at[0].set(0).at[2].set(1)
    weights = jnp.array([1.0, 2.0, 1.0, 0.0])
    loss = lambda s: losses.hard_cross_entropy(s, labels, weights=weights)  # noqa: E731
    assert_row_has_no_effect(loss, [student])
    assert loss(student)[1] == 0


def test_the_end_points_of_smoothing_leave_a_term_out():
    logits = jnp.array([[0.0, 1.0, -jnp.inf]])
    hard = losses.hard_cross_entropy(logits, jnp.array([1]))
    np.testing.assert_allclose(
        losses.label_smoothing_loss(logits, jnp.array([1]), smoothing=0.0), hard
    )
    unknown = losses.label_smoothing_loss(jnp.zeros((1, 3)), jnp.array([-1]), smoothing=1.0)
    np.testing.assert_allclose(unknown, np.log(3), rtol=1e-6)


def test_class_weights_must_exist():
    with pytest.raises(ValueError, match="at least 0, and one of them more"):
        losses.hard_cross_entropy(HALVES, ZERO, weights=jnp.zeros(3))
    with pytest.raises(ValueError, match="at least 0, and one of them more"):
        losses.kl_divergence(HALVES, LAST, weights=np.array([0.5, np.nan, 1.0]))


def test_a_virtual_teacher_is_above_chance():
    labels = jnp.array([0, 1])
    make = functools.partial(losses.virtual_teacher_logits, labels, num_classes=5)
    for correct in (0.05, 0.2):
        with pytest.raises(ValueError, match=r"correct must be above 1 / num_classes = 0.2, got"):
            make(correct=correct)
    assert np.isnan(jax.jit(lambda correct: make(correct=correct))(0.05)).all()
    np.testing.assert_allclose(
        jax.jit(lambda correct: make(correct=correct))(0.21), make(correct=0.21), rtol=1e-6
    )


def test_a_label_that_is_no_class_has_no_virtual_teacher():
    logits = losses.virtual_teacher_logits(jnp.array([7, 4, -1]), num_classes=5, correct=0.9)
    np.testing.assert_array_equal(np.isnan(logits).all(-1), [True, False, True])
    np.testing.assert_array_equal(np.isnan(logits).any(-1), [True, False, True])


@pytest.mark.parametrize("labels", [["a", "b"], np.array(["a", "b"]), np.array(["a", None])])
def test_names_of_classes_are_no_labels(labels):
    with pytest.raises(TypeError, match="labels must be integers, got .*: number the classes, suc"):
        losses.hard_cross_entropy(jnp.zeros((2, 3)), labels)
