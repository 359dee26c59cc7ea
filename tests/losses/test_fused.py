"""Tests that fused losses equal the plain ones in values and gradients, in less memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fused_pairs import PAIRS
from jaxkd import losses

BOTH = pytest.mark.parametrize(("fused", "plain"), PAIRS.values(), ids=PAIRS)


def draw(tokens=(13,), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (*tokens, 6), (6, 21), (*tokens, 9), (9, 21)
    return tuple(
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    )


def on_logits(plain):
    """Returns a plain loss as a function of the operands of a fused one."""

    def loss(student, student_kernel, teacher, teacher_kernel, **options):
        return plain(student @ student_kernel, teacher @ teacher_kernel, **options)

    return loss


def weighted(loss, **options):
    """Returns a function to a scalar in which every token has a different weight."""

    def value(*operands):
        values = loss(*operands, temperature=3.0, **options)
        return (jnp.arange(1.0, values.size + 1).reshape(values.shape) * values).sum()

    return value


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize("argnums", [(0, 1), (2, 3), (1,), (0, 1, 2, 3)], ids=str)
def test_value_and_gradients_equal_the_plain_loss(fused, plain, argnums):
    result = jax.value_and_grad(weighted(fused, chunk_size=4), argnums)(*draw())
    expected = jax.value_and_grad(weighted(on_logits(plain)), argnums)(*draw())
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("chunk_size", [1, 13, 100])
def test_chunks_of_any_size_give_the_same(chunk_size):
    fused = losses.fused_linear_kl_divergence
    expected = jax.value_and_grad(weighted(fused, chunk_size=4), (0, 1))(*draw())
    result = jax.value_and_grad(weighted(fused, chunk_size=chunk_size), (0, 1))(*draw())
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_ends_of_beta_are_the_divergences(beta):
    operands = draw()
    fused = functools.partial(losses.fused_linear_jensen_shannon_divergence, beta=beta)
    plain = functools.partial(losses.jensen_shannon_divergence, beta=beta)
    chex.assert_trees_all_close(
        jax.value_and_grad(weighted(fused))(*operands),
        jax.value_and_grad(weighted(on_logits(plain)))(*operands),
        rtol=1e-4,
    )


@pytest.mark.thorough
@BOTH
def test_tokens_that_do_not_count(fused, plain):
    operands = draw(tokens=(3, 5))
    where = jnp.arange(5)[None] < jnp.array([5, 0, 2])[:, None]
    student, student_kernel, teacher, teacher_kernel = operands
    padded_student = jnp.where(where[..., None], student, jnp.nan)
    padded_teacher = jnp.where(where[..., None], teacher, jnp.nan)
    result = jax.value_and_grad(weighted(fused, where=where, chunk_size=4), (0, 1))(
        padded_student, student_kernel, padded_teacher, teacher_kernel
    )

    def masked_loss(student, student_kernel):
        values = plain(student @ student_kernel, teacher @ teacher_kernel, temperature=3.0)
        return jnp.where(where, jnp.arange(1.0, 16).reshape(3, 5) * values, 0).sum()

    expected = jax.value_and_grad(masked_loss, (0, 1))(student, student_kernel)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@BOTH
def test_differentiates_the_temperature_and_takes_a_traced_one(fused, plain):
    operands = draw()
    gradient = jax.jit(jax.grad(lambda t: fused(*operands, temperature=t).sum()))(2.0)
    expected = jax.grad(lambda t: on_logits(plain)(*operands, temperature=t).sum())(2.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3)


@pytest.mark.thorough
@BOTH
def test_jit_vmap_and_sharded_tokens_equal_eager(fused, plain):
    operands = draw(tokens=(16,))
    gradients = jax.value_and_grad(weighted(fused, chunk_size=5), (0, 1))
    expected = gradients(*operands)
    chex.assert_trees_all_close(jax.jit(gradients)(*operands), expected, rtol=1e-5, atol=1e-5)
    stacked = tuple(jnp.stack([operand, 2 * operand]) for operand in operands)
    first = jax.tree.map(lambda leaf: leaf[0], jax.vmap(gradients)(*stacked))
    chex.assert_trees_all_close(first, expected, rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((8,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.NamedSharding(mesh, jax.P("tokens"))
    replicated = jax.NamedSharding(mesh, jax.P())
    shardings = sharded, replicated, sharded, replicated
    placed = jax.device_put(operands, shardings)
    chex.assert_trees_all_close(jax.jit(gradients)(*placed), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.thorough
@BOTH
def test_shard_map_over_tokens_sums_the_gradient_of_a_shared_kernel(fused, plain):
    operands = draw(tokens=(16,))
    expected = jax.value_and_grad(
        lambda *o: on_logits(plain)(*o, temperature=3.0).sum(), (0, 1, 2, 3)
    )(*operands)
    mesh = jax.make_mesh((8,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, replicated = jax.P("tokens"), jax.P()
    in_specs = sharded, replicated, sharded, replicated

    def sum_over_devices(*operands):
        return jax.lax.psum(fused(*operands, temperature=3.0, chunk_size=1).sum(), "tokens")

    mapped = jax.shard_map(sum_over_devices, mesh=mesh, in_specs=in_specs, out_specs=replicated)
    result = jax.jit(jax.value_and_grad(mapped, (0, 1, 2, 3)))(*operands)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


@BOTH
def test_temperature_is_not_rounded_to_the_states(fused, plain):
    """At T = 1.7 a bf16 temperature is off by 0.2 %, and T² is not."""
    operands = draw(dtype=jnp.bfloat16)
    wide = [operand.astype(jnp.float32) for operand in operands]
    expected = on_logits(plain)(*wide, temperature=1.7)
    np.testing.assert_allclose(fused(*operands, temperature=1.7), expected, rtol=1e-4, atol=1e-5)


def test_student_and_teacher_may_differ_in_dtype():
    student, student_kernel, teacher, teacher_kernel = draw()
    narrow = teacher.astype(jnp.bfloat16), teacher_kernel.astype(jnp.bfloat16)
    wide = [operand.astype(jnp.float32) for operand in narrow]
    loss = functools.partial(
        losses.fused_linear_kl_divergence, student, student_kernel, temperature=2.0
    )
    np.testing.assert_allclose(loss(*narrow), loss(*wide), rtol=1e-4)


@pytest.mark.thorough
@BOTH
def test_bf16_states_give_float32_values_and_bf16_gradients(fused, plain):
    operands = draw(dtype=jnp.bfloat16)
    value, gradients = jax.value_and_grad(weighted(fused, chunk_size=4), (0, 1))(*operands)
    assert value.dtype == jnp.float32 and all(
        gradient.dtype == jnp.bfloat16 for gradient in gradients
    )
    wide = [operand.astype(jnp.float32) for operand in operands]
    expected, wide_gradients = jax.value_and_grad(weighted(on_logits(plain)), (0, 1))(*wide)
    np.testing.assert_allclose(value, expected, rtol=2e-2)
    for gradient, wide_gradient in zip(gradients, wide_gradients, strict=True):
        scale = jnp.abs(wide_gradient).max()
        np.testing.assert_allclose(
            gradient.astype(jnp.float32) / scale, wide_gradient / scale, atol=3e-2
        )


@BOTH
def test_extreme_states_stay_finite(fused, plain):
    student, kernel, teacher, teacher_kernel = draw()
    for scale in (1e4, 1e-4):
        chex.assert_tree_all_finite(
            jax.value_and_grad(weighted(fused), (0, 1, 2, 3))(
                scale * student, kernel, scale * teacher, teacher_kernel
            )
        )


def temporary_bytes(loss, tokens=2048, features=32, vocabulary=4096):
    """Returns the bytes that value and gradient need in addition to arguments and results."""
    shapes = (tokens, features), (features, vocabulary), (tokens, features), (features, vocabulary)
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(jax.value_and_grad(lambda *o: loss(*o, temperature=2.0).mean(), (0, 1)))
    return program.lower(*operands).compile().memory_analysis().temp_size_in_bytes


@BOTH
def test_does_not_store_the_logits_of_all_tokens(fused, plain):
    fused_bytes = temporary_bytes(functools.partial(fused, chunk_size=128))
    assert fused_bytes < temporary_bytes(on_logits(plain)) / 6


def test_nothing_is_computed_for_a_teacher_that_is_not_differentiated():
    operands = draw()

    def count_products(argnums):
        program = jax.jit(jax.grad(weighted(losses.fused_linear_kl_divergence), argnums))
        return program.lower(*operands).as_text().count("dot_general")

    assert count_products((0, 1)) < count_products((0, 1, 2, 3))


@pytest.mark.thorough
@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
@pytest.mark.parametrize("argnums", [(0, 1), (3,)], ids=str)
def test_differentiates_a_compiled_or_rematerialised_loss(wrap, argnums):
    loss = weighted(losses.fused_linear_kl_divergence, chunk_size=4)
    expected = jax.grad(loss, argnums)(*draw())
    chex.assert_trees_all_close(
        jax.grad(wrap(loss), argnums)(*draw()), expected, rtol=1e-4, atol=1e-4
    )


def test_no_tokens():
    student, kernel, teacher, teacher_kernel = draw(tokens=(0,))
    assert losses.fused_linear_kl_divergence(
        student, kernel, teacher, teacher_kernel, temperature=1.0
    ).shape == (0,)


@BOTH
def test_wrong_arguments_raise(fused, plain):
    student, kernel, teacher, teacher_kernel = draw()
    with pytest.raises(ValueError, match="an embedding table"):
        fused(student, kernel.T, teacher, teacher_kernel, temperature=1.0)
    with pytest.raises(ValueError, match="vocabularies"):
        fused(student, kernel[:, 1:], teacher, teacher_kernel, temperature=1.0)
    with pytest.raises(ValueError, match="same leading axes"):
        fused(student[1:], kernel, teacher, teacher_kernel, temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        fused(student, kernel, teacher, teacher_kernel, temperature=0.0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        fused(student, kernel, teacher, teacher_kernel, temperature=1.0, chunk_size=0)
    with pytest.raises(ValueError, match="one entry for each token"):
        fused(student, kernel, teacher, teacher_kernel, temperature=1.0, where=jnp.ones(5, bool))
    with pytest.raises(TypeError, match="take mask != 0"):
        fused(
            student, kernel, teacher, teacher_kernel, temperature=1.0, where=jnp.ones(13, jnp.int32)
        )
    with pytest.raises(TypeError, match="floating-point"):
        fused(jnp.ones((13, 6), jnp.int32), kernel, teacher, teacher_kernel, temperature=1.0)
    with pytest.raises(TypeError, match="cast one"):
        fused(student.astype(jnp.bfloat16), kernel, teacher, teacher_kernel, temperature=1.0)


def test_traced_beta_raises():
    operands = draw()
    with pytest.raises(TypeError, match="Python number"):
        jax.jit(
            lambda b: losses.fused_linear_jensen_shannon_divergence(
                *operands, temperature=1.0, beta=b
            )
        )(0.5)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"):
        losses.fused_linear_jensen_shannon_divergence(*operands, temperature=1.0, beta=2.0)


def test_calls_without_jit_compile_once(caplog):
    """Each call compiled its loops again, and kept the program."""
    key = jax.random.key(0)
    states, kernel = jax.random.normal(key, (8, 4)), jax.random.normal(key, (4, 30))
    teacher, others = 2 * states, [3 * states, 4 * states]
    gradient = jax.grad(
        lambda s: losses.fused_linear_kl_divergence(s, kernel, teacher, kernel, chunk_size=4).sum()
    )
    gradient(states)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for other in others:
            gradient(other)
    assert "Finished XLA compilation" not in caplog.text
