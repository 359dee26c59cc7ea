"""Tests of last layers with biases, softcaps and tied embeddings in the fused losses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_pairs import PAIRS, assert_near_wide
from jaxkd import losses

PAIRWISE = pytest.mark.parametrize(("fused", "plain"), PAIRS.values(), ids=PAIRS)


def draw(*shape, number=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(jax.random.key(5), number), shape).astype(dtype)


def draw_models(dtype=jnp.float32):
    """Returns states and heads of a student that ties its embedding and a teacher that does not."""
    student = losses.LinearHead(
        draw(21, 6, number=1, dtype=dtype), bias=draw(21, number=2), softcap=2.0, is_embedding=True
    )
    teacher = losses.LinearHead(
        draw(9, 21, number=4, dtype=dtype), bias=draw(21, number=5), softcap=3.0
    )
    return draw(13, 6, dtype=dtype), student, draw(13, 9, number=3, dtype=dtype), teacher


def plain_logits(states, head):
    """Computes the logits of a head from its definition."""
    kernel = head.kernel.T if head.is_embedding else head.kernel
    logits = (states @ kernel).astype(jnp.float32)
    if head.bias is not None:
        logits = logits + head.bias[None]
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)


def on_logits(plain):
    def loss(student, student_head, teacher, teacher_head, **options):
        return plain(
            plain_logits(student, student_head), plain_logits(teacher, teacher_head), **options
        )

    return loss


def weighted(loss, **options):
    """Returns a function to a scalar in which every token has a different weight."""

    def value(*operands, temperature=3.0):
        values = loss(*operands, temperature=temperature, **options)
        return (jnp.arange(1.0, values.size + 1).reshape(values.shape) * values).sum()

    return value


def test_logits_by_hand():
    head = losses.LinearHead(jnp.array([[1.0, -1.0]]), bias=jnp.array([0.5, 0.0]), softcap=2.0)
    expected = 2 * np.tanh([[[1.5 / 2, -1.0 / 2]]])
    np.testing.assert_allclose(head.logits(jnp.ones((1, 1, 1))), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_those_that_the_losses_take(dtype):
    states, head, _, _ = draw_models(dtype)
    logits = head.logits(states)
    assert logits.dtype == jnp.float32
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), head)
    expected = plain_logits(states.astype(jnp.float32), wide)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@PAIRWISE
@pytest.mark.parametrize("chunk_size", [4, 13])
def test_value_and_gradients_equal_the_plain_loss(fused, plain, chunk_size):
    """Parts of the vocabulary overlap at a chunk of 4, where 21 classes are no multiple of 6."""
    models = draw_models()
    argnums = 0, 1, 2, 3
    result = jax.value_and_grad(weighted(fused, chunk_size=chunk_size), argnums)(*models)
    expected = jax.value_and_grad(weighted(on_logits(plain)), argnums)(*models)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@PAIRWISE
def test_bfloat16_gradients_are_near_those_of_float32(fused, plain):
    models = draw_models(jnp.bfloat16)
    value, gradients = jax.value_and_grad(weighted(fused, chunk_size=4), (0, 1))(*models)
    assert gradients[1].kernel.dtype == jnp.bfloat16 and gradients[1].bias.dtype == jnp.float32
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), models)
    expected, wide_gradients = jax.value_and_grad(weighted(on_logits(plain)), (0, 1))(*wide)
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    assert_near_wide(gradients, wide_gradients)


@pytest.mark.thorough
@PAIRWISE
def test_differentiates_the_temperature_of_logits_with_a_bias_and_a_softcap(fused, plain):
    """The logits are then not proportional to the states, which a shorter rule would use."""
    models = draw_models()
    gradient = jax.grad(lambda t: weighted(fused, chunk_size=4)(*models, temperature=t))(2.0)
    expected = jax.grad(lambda t: weighted(on_logits(plain))(*models, temperature=t))(2.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


@PAIRWISE
def test_classes_of_bias_minus_infinity_are_left_out(fused, plain):
    student, head, teacher, teacher_head = draw_models()
    padding = jnp.where(jnp.arange(21) < 17, 0, -jnp.inf)
    models = (
        student,
        losses.LinearHead(head.kernel, bias=padding, is_embedding=True),
        teacher,
        losses.LinearHead(teacher_head.kernel, bias=padding),
    )
    sliced = student, head.kernel[:17].T, teacher, teacher_head.kernel[:, :17]
    value, gradient = jax.value_and_grad(weighted(fused, chunk_size=4), (0, 2))(*models)
    expected = jax.value_and_grad(weighted(fused, chunk_size=4), (0, 2))(*sliced)
    chex.assert_trees_all_close((value, gradient), expected, rtol=1e-4, atol=1e-4)
    temperature_gradient = jax.grad(lambda t: fused(*models, temperature=t).sum())(2.0)
    expected = jax.grad(lambda t: fused(*sliced, temperature=t).sum())(2.0)
    np.testing.assert_allclose(temperature_gradient, expected, rtol=1e-4)


def test_a_head_is_a_tree_of_its_arrays():
    _, head, _, _ = draw_models()
    assert len(jax.tree.leaves(head)) == 2
    assert jax.jit(lambda head: head)(head).softcap == 2.0
    assert len(jax.tree.leaves(losses.LinearHead(head.kernel))) == 1


def test_a_tied_embedding_is_not_transposed_into_a_copy():
    """The program would hold another 1 MB if it were."""
    shapes = {"kernel": (64, 4096), "embedding": (4096, 64)}

    def temporary_bytes(name):
        def loss(states, kernel):
            head = losses.LinearHead(kernel, is_embedding=name == "embedding")
            return losses.fused_linear_kl_divergence(
                states, head, 2 * states, head, chunk_size=16
            ).mean()

        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 64), shapes[name])]
        program = jax.jit(jax.value_and_grad(loss)).lower(*operands).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("embedding") < temporary_bytes("kernel") + 2**19


def test_no_product_is_computed_for_a_frozen_kernel():
    student, head, teacher, teacher_head = draw_models()

    def count_products(argument):
        program = jax.jit(jax.grad(weighted(losses.fused_linear_kl_divergence), argument))
        return program.lower(student, head, teacher, teacher_head).as_text().count("dot_general")

    assert count_products(0) < count_products((0, 1))


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        (losses.LinearHead(draw(6, 21), is_embedding=True), ValueError, r"must be \[V, D\]"),
        (losses.LinearHead(draw(21, 6)), ValueError, "is_embedding=True"),
        (losses.LinearHead(draw(6, 21), bias=draw(6)), ValueError, r"bias of .* must be \[V\]"),
        (losses.LinearHead(draw(6, 21), bias=jnp.zeros(21, int)), TypeError, "floating-point"),
        (losses.LinearHead(draw(6, 21), softcap=-1.0), ValueError, "softcap must be positive"),
        (losses.LinearHead(draw(6, 21), softcap="30"), TypeError, "finite Python number"),
        (losses.LinearHead(draw(6, 21, dtype=jnp.bfloat16)), TypeError, "cast one"),
    ],
)
def test_wrong_heads_raise(head, error, message):
    student, _, teacher, teacher_head = draw_models()
    with pytest.raises(error, match=message) as raised:
        losses.fused_linear_kl_divergence(student, head, teacher, teacher_head)
    assert "\n" not in str(raised.value)
