"""Tests of fused losses with labels and with a teacher's largest logits, against the plain ones."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_pairs import assert_near_wide
from jaxkd import losses

LABELS = jnp.arange(13) * 5 % 21


def draw(*shape, number=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(jax.random.key(7), number), shape).astype(dtype)


def draw_models(dtype=jnp.float32):
    head = losses.LinearHead(draw(6, 21, number=1, dtype=dtype), bias=draw(21, number=2))
    teacher = losses.LinearHead(draw(21, 9, number=4, dtype=dtype), softcap=3.0, is_embedding=True)
    return draw(13, 6, dtype=dtype), head, draw(13, 9, number=3, dtype=dtype), teacher


def draw_kept(k=4):
    return losses.top_k(2 * draw(13, 21, number=6), k=k)


def weighted(loss, **options):
    """Returns a function to a scalar in which every token has a different weight."""

    def value(*operands):
        values = loss(*operands, **options)
        return (jnp.arange(1.0, values.size + 1).reshape(values.shape) * values).sum()

    return value


def plain_cross_entropy(states, head, labels, **options):
    return losses.hard_cross_entropy(head.logits(states), labels, **options)


def plain_distillation_loss(
    student, head, teacher, teacher_head, labels, *, temperature=2.0, alpha=0.5, beta=0.0
):
    logits, teacher_logits = head.logits(student), teacher_head.logits(teacher)
    soft = losses.jensen_shannon_divergence(
        logits, teacher_logits, temperature=temperature, beta=beta
    )
    return alpha * soft + (1 - alpha) * losses.hard_cross_entropy(logits, labels)


def plain_sparse_kl_divergence(states, head, kept, **options):
    return losses.sparse_kl_divergence(head.logits(states), kept, **options)


def test_cross_entropy_by_hand():
    kernel = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    values = losses.fused_linear_cross_entropy(jnp.ones((2, 1)), kernel, jnp.array([2, 0]))
    np.testing.assert_allclose(values, -np.log([5 / 8, 1 / 8]), rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("chunk_size", [4, 13])
def test_cross_entropy_equals_the_plain_one(chunk_size):
    student, head, _, _ = draw_models()
    fused = weighted(losses.fused_linear_cross_entropy, chunk_size=chunk_size)
    result = jax.value_and_grad(fused, (0, 1))(student, head, LABELS)
    expected = jax.value_and_grad(weighted(plain_cross_entropy), (0, 1))(student, head, LABELS)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_size", [4, 13])
def test_distillation_loss_equals_the_plain_terms(beta, chunk_size):
    models = draw_models()
    options = {"temperature": 3.0, "alpha": 0.7, "beta": beta}
    fused = weighted(losses.fused_linear_distillation_loss, chunk_size=chunk_size, **options)
    argnums = 0, 1, 2, 3
    result = jax.value_and_grad(fused, argnums)(*models, LABELS)
    plain = weighted(plain_distillation_loss, **options)
    chex.assert_trees_all_close(
        result, jax.value_and_grad(plain, argnums)(*models, LABELS), rtol=1e-4, atol=1e-4
    )


@pytest.mark.thorough
def test_distillation_loss_differs_from_the_plain_one_by_the_teachers_entropy():
    student, head, teacher, teacher_head = draw_models()

    def on_logits(student, head):
        return losses.distillation_loss(
            head.logits(student), teacher_head.logits(teacher), LABELS, temperature=3.0, alpha=0.7
        )

    def fused(student, head):
        return losses.fused_linear_distillation_loss(
            student, head, teacher, teacher_head, LABELS, temperature=3.0, alpha=0.7
        )

    teacher_logits = teacher_head.logits(teacher)
    entropy = losses.soft_cross_entropy(teacher_logits, teacher_logits, temperature=3.0)
    np.testing.assert_allclose(
        on_logits(student, head) - fused(student, head), 0.7 * entropy, rtol=1e-4, atol=1e-4
    )
    gradients = (jax.grad(weighted(loss), (0, 1))(student, head) for loss in (fused, on_logits))
    chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_temperature_and_alpha_are_differentiated():
    models = draw_models()
    alphas = jnp.linspace(0.1, 0.9, 13)

    def gradient(loss):
        return jax.grad(
            lambda t, a: weighted(loss, temperature=t, alpha=a)(*models, LABELS), (0, 1)
        )(2.0, alphas)

    fused = functools.partial(losses.fused_linear_distillation_loss, chunk_size=4)
    chex.assert_trees_all_close(
        gradient(fused), gradient(plain_distillation_loss), rtol=1e-3, atol=1e-3
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["cross_entropy", "distillation_loss"])
def test_tokens_that_do_not_count_have_no_trace(name):
    student, head, teacher, teacher_head = draw_models()
    where = jnp.arange(13) % 3 > 0
    labels = jnp.where(where, LABELS, -100)
    spoilt = [jnp.where(where[:, None], states, jnp.nan) for states in (student, teacher)]

    def loss(student, head, teacher, labels, **options):
        if name == "cross_entropy":
            return losses.fused_linear_cross_entropy(student, head, labels, **options)
        return losses.fused_linear_distillation_loss(
            student, head, teacher, teacher_head, labels, **options
        )

    def total(student, head, teacher):
        return loss(student, head, teacher, labels, where=where, chunk_size=4).sum()

    value, gradients = jax.value_and_grad(total, (0, 1))(spoilt[0], head, spoilt[1])
    expected, expected_gradients = jax.value_and_grad(
        lambda student, head: loss(student, head, teacher[where], LABELS[where]).sum(), (0, 1)
    )(student[where], head)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradients[1], expected_gradients[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradients[0][where], expected_gradients[0], rtol=1e-4, atol=1e-5)
    assert not gradients[0][~where].any()


@pytest.mark.parametrize("label", [-1, -100, 21])
def test_a_label_out_of_range_that_counts_is_nan(label):
    models = draw_models()
    labels = LABELS.at[3].set(label)
    for values in (
        losses.fused_linear_cross_entropy(*models[:2], labels, chunk_size=4),
        losses.fused_linear_distillation_loss(*models, labels, chunk_size=4),
    ):
        np.testing.assert_array_equal(jnp.isnan(values), jnp.arange(13) == 3)


def test_ends_of_alpha():
    student, head, teacher, teacher_head = draw_models()
    loss = losses.fused_linear_distillation_loss
    unlabelled = jnp.full(13, -100)
    divergence = losses.fused_linear_kl_divergence(student, head, teacher, teacher_head)
    chex.assert_trees_all_close(
        loss(student, head, teacher, teacher_head, unlabelled, alpha=1.0), divergence
    )

    def total(student, alpha):
        broken = jnp.where(jnp.arange(13)[:, None] < 4, jnp.nan, teacher)
        return loss(student, head, broken, teacher_head, LABELS, alpha=alpha).sum()

    alpha = jnp.where(jnp.arange(13) < 4, 0.0, 0.5)
    chex.assert_tree_all_finite(jax.value_and_grad(total)(student, alpha))
    expected = losses.fused_linear_cross_entropy(student, head, LABELS)
    values = loss(student, head, jnp.full_like(teacher, jnp.nan), teacher_head, LABELS, alpha=0.0)
    chex.assert_trees_all_close(values, expected)


@pytest.mark.thorough
def test_bfloat16_labels_and_teacher_are_near_float32():
    models = draw_models(jnp.bfloat16)
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), models)
    value, gradients = jax.value_and_grad(
        weighted(losses.fused_linear_distillation_loss, chunk_size=4), (0, 1)
    )(*models, LABELS)
    assert value.dtype == jnp.float32 and gradients[0].dtype == jnp.bfloat16
    expected, wide_gradients = jax.value_and_grad(weighted(plain_distillation_loss), (0, 1))(
        *wide, LABELS
    )
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    assert_near_wide(gradients, wide_gradients)


@pytest.mark.thorough
@pytest.mark.parametrize("k", [1, 4, 20, 21])
@pytest.mark.parametrize("chunk_size", [4, 13])
def test_sparse_kl_divergence_equals_the_plain_one(k, chunk_size):
    student, head, _, _ = draw_models()
    options = {"temperature": 3.0}
    fused = weighted(losses.fused_linear_sparse_kl_divergence, chunk_size=chunk_size, **options)
    plain = weighted(plain_sparse_kl_divergence, **options)
    result = jax.value_and_grad(fused, (0, 1))(student, head, draw_kept(k))
    expected = jax.value_and_grad(plain, (0, 1))(student, head, draw_kept(k))
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_sparse_kl_divergence_differentiates_temperature_and_kept_logits():
    student, head, _, _ = draw_models()
    kept = draw_kept()

    def gradient(loss):
        def value(t, values, rest):
            kept_logits = losses.TopK(values, kept.indices, rest)
            return weighted(loss, temperature=t)(student, head, kept_logits)

        return jax.grad(value, (0, 1, 2))(2.0, kept.values, kept.rest)

    fused = functools.partial(losses.fused_linear_sparse_kl_divergence, chunk_size=4)
    chex.assert_trees_all_close(
        gradient(fused), gradient(plain_sparse_kl_divergence), rtol=1e-3, atol=1e-3
    )


def test_sparse_kl_divergence_takes_stored_sets():
    """NumPy arrays of narrow dtypes, and garbage where a token does not count."""
    student, head, _, _ = draw_models()
    kept = draw_kept()
    where = jnp.arange(13) != 5
    stored = losses.TopK(
        np.asarray(jnp.where(where[:, None], kept.values, jnp.nan)).astype(np.float16),
        np.asarray(kept.indices).astype(np.uint8),
        np.asarray(kept.rest),
    )
    loss = functools.partial(losses.fused_linear_sparse_kl_divergence, where=where, chunk_size=4)
    values = loss(jnp.where(where[:, None], student, jnp.nan), head, stored)
    expected = jnp.where(where, plain_sparse_kl_divergence(student, head, kept), 0)
    np.testing.assert_allclose(values, expected, rtol=1e-2, atol=1e-3)


def test_sparse_kl_divergence_of_a_traced_index_that_is_no_class_is_nan():
    student, head, _, _ = draw_models()
    kept = draw_kept()
    for index in (-1, 21):
        indices = kept.indices.at[2, 1].set(index)
        values = jax.jit(
            lambda indices: losses.fused_linear_sparse_kl_divergence(
                student, head, losses.TopK(kept.values, indices, kept.rest)
            )
        )(indices)
        np.testing.assert_array_equal(jnp.isnan(values), jnp.arange(13) == 2)


def temporary_bytes(loss, *arrays):
    """Returns the bytes that value and gradient need in addition to arguments and results."""
    program = jax.jit(jax.value_and_grad(lambda *a: loss(*a).mean(), (0, 1)))
    return program.lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_neither_models_logits_of_all_tokens_are_stored():
    states, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2048, 32), (32, 4096)))
    labels = jax.ShapeDtypeStruct((2048,), jnp.int32)
    kept = losses.TopK(
        *(
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (((2048, 4), "float32"), ((2048, 4), "int32"), ((2048,), "float32"))
        )
    )

    def from_kernels(loss):
        def value(student, kernel, teacher, teacher_kernel, labels, **options):
            heads = losses.LinearHead(kernel), losses.LinearHead(teacher_kernel)
            return loss(student, heads[0], teacher, heads[1], labels, **options)

        return value

    for fused, plain, arrays in (
        (
            losses.fused_linear_distillation_loss,
            from_kernels(plain_distillation_loss),
            (states, kernel, states, kernel, labels),
        ),
        (
            losses.fused_linear_sparse_kl_divergence,
            lambda s, w, kept: plain_sparse_kl_divergence(s, losses.LinearHead(w), kept),
            (states, kernel, kept),
        ),
    ):
        chunked = functools.partial(fused, chunk_size=128)
        assert temporary_bytes(chunked, *arrays) < temporary_bytes(plain, *arrays) / 4


@pytest.mark.thorough
@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_differentiates_a_compiled_or_rematerialised_loss(wrap):
    student, head, teacher, teacher_head = draw_models()
    kept = draw_kept()

    def loss(student, head, labels):
        values = losses.fused_linear_distillation_loss(
            student, head, teacher, teacher_head, labels, chunk_size=4
        )
        return (
            values + losses.fused_linear_sparse_kl_divergence(student, head, kept, chunk_size=4)
        ).sum()

    chex.assert_trees_all_close(
        jax.grad(wrap(loss), (0, 1))(student, head, LABELS),
        jax.grad(loss, (0, 1))(student, head, LABELS),
        rtol=1e-4,
        atol=1e-4,
    )


def test_wrong_arguments_raise():
    student, head, teacher, teacher_head = draw_models()
    models = student, head, teacher, teacher_head
    distil = losses.fused_linear_distillation_loss
    with pytest.raises(ValueError, match=r"labels \(12,\) must have"):
        distil(*models, LABELS[1:])
    with pytest.raises(TypeError, match="labels must be integers"):
        distil(*models, LABELS.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        distil(*models, LABELS, alpha=1.5)
    with pytest.raises(ValueError, match="alpha .* must be a scalar or one weight"):
        distil(*models, LABELS, alpha=jnp.full(5, 0.5))
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        distil(*models, LABELS, beta=-1.0)
    with pytest.raises(TypeError, match="Python number"):
        jax.jit(lambda beta: distil(*models, LABELS, beta=beta))(0.5)
    with pytest.raises(ValueError, match="vocabularies of student_head, 21 classes"):
        distil(student, head, teacher, losses.LinearHead(draw(9, 20)), LABELS)
    with pytest.raises(ValueError, match=r"head must be \[D, V\] for states"):
        losses.fused_linear_cross_entropy(student, head.kernel.T, LABELS)
    with pytest.raises(TypeError, match=r"pass losses.top_k"):
        losses.fused_linear_sparse_kl_divergence(student, head, teacher)
    with pytest.raises(ValueError, match="must have the axes of student_states"):
        losses.fused_linear_sparse_kl_divergence(student[1:], head, draw_kept())
    with pytest.raises(ValueError, match="not all in"):
        losses.fused_linear_sparse_kl_divergence(student, head.kernel[:, :5], draw_kept())
