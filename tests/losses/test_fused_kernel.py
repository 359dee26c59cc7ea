"""Tests of the Pallas kernels against the chunks, in Pallas's interpreter."""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses
from jaxkd.losses import _fused_kernel
from jaxkd.losses._fused_terms import Divergence, Vocabulary

BETA = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
BOTH_KERNELS = pytest.mark.parametrize("on_tpu", [True, False], ids=["tpu", "gpu"])
TEMPERATURE = jnp.float32(1.7)


def draw(*shape, number=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.fold_in(jax.random.key(9), number), shape).astype(dtype)


def draw_models(tokens=70, classes=300, dtype=jnp.float32):
    """Returns states and heads of which no axis is a multiple of a block."""
    student = losses.LinearHead(
        draw(classes, 70, number=1, dtype=dtype),
        bias=draw(classes, number=2),
        softcap=8.0,
        is_embedding=True,
    )
    teacher = losses.LinearHead(draw(33, classes, number=4, dtype=dtype))
    states = draw(tokens, 70, dtype=dtype), draw(tokens, 33, number=3, dtype=dtype)
    return states, (student, teacher)


@pytest.fixture
def interpreted(monkeypatch):
    """Lets a loss with `use_pallas` run a kernel on the CPU; returns the function that chooses."""

    def choose(on_tpu):
        kernel = functools.partial(_fused_kernel.evaluate, interpret=True)
        monkeypatch.setattr(_fused_kernel, "evaluate", kernel)

        def run(*operands, tpu, cuda, default):
            return (tpu if on_tpu else cuda)(*operands)

        monkeypatch.setattr(jax.lax, "platform_dependent", run)

    jax.clear_caches()
    yield choose
    # The compiled programs would be those of the interpreter.
    jax.clear_caches()


@pytest.mark.thorough
@BOTH_KERNELS
@BETA
def test_values_and_statistics_equal_those_of_logits(on_tpu, beta):
    states, heads = draw_models()
    divergence = Divergence.from_beta(beta)
    logits = [head.logits(own) / TEMPERATURE for own, head in zip(states, heads, strict=True)]
    for sides in ((0, 1), (0,), ()):
        result = _fused_kernel.evaluate(
            divergence, states, heads, TEMPERATURE, sides, on_tpu=on_tpu, interpret=True
        )
        expected = divergence.evaluate(logits, None, Vocabulary(), sides)
        chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.thorough
@BOTH_KERNELS
@BETA
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradients_equal_those_of_chunks(interpreted, on_tpu, beta, dtype):
    states, heads = draw_models(dtype=dtype)
    weights = jnp.arange(1.0, 71)

    def total(student, student_head, teacher, teacher_head, use_pallas):
        values = losses.fused_linear_jensen_shannon_divergence(
            student,
            student_head,
            teacher,
            teacher_head,
            temperature=TEMPERATURE,
            beta=beta,
            chunk_size=16,
            use_pallas=use_pallas,
        )
        return (weights * values).mean()

    gradient = jax.value_and_grad(total, (0, 1, 2, 3))
    models = states[0], heads[0], states[1], heads[1]
    expected = gradient(*models, use_pallas=False)
    interpreted(on_tpu)
    result = gradient(*models, use_pallas=True)
    tolerance = 1e-4 if dtype == jnp.float32 else 2e-2
    chex.assert_trees_all_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.thorough
@BOTH_KERNELS
@BETA
def test_extreme_and_excluded_classes_stay_finite(on_tpu, beta):
    """The first block of classes has no weight at all, and the logits are large."""
    states, heads = draw_models()
    bias = jnp.where(jnp.arange(300) < 270, -jnp.inf, 0)
    heads = tuple(
        losses.LinearHead(head.kernel, bias=bias, is_embedding=head.is_embedding) for head in heads
    )
    states = tuple(1e3 * own for own in states)
    divergence = Divergence.from_beta(beta)
    result = _fused_kernel.evaluate(
        divergence, states, heads, TEMPERATURE, (0, 1), on_tpu=on_tpu, interpret=True
    )
    logits = [head.logits(own) / TEMPERATURE for own, head in zip(states, heads, strict=True)]
    chex.assert_tree_all_finite(result)
    chex.assert_trees_all_close(
        result[0], divergence.evaluate(logits, None, Vocabulary(), ())[0], rtol=1e-3, atol=1e-2
    )


@pytest.mark.thorough
@BETA
def test_lowers_for_tpus(beta):
    states, heads = draw_models(tokens=300, dtype=jnp.bfloat16)
    evaluate = functools.partial(
        _fused_kernel.evaluate, Divergence.from_beta(beta), sides=(0, 1), on_tpu=True
    )
    program = jax.jit(evaluate).trace(states, heads, TEMPERATURE)
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == (2 if beta == 0.3 else 1)


@pytest.mark.thorough
def test_vmap_and_shard_map_take_the_keyword():
    (student, teacher), heads = draw_models(tokens=16)

    def loss(student, teacher, use_pallas=True):
        values = losses.fused_linear_kl_divergence(
            student, heads[0], teacher, heads[1], use_pallas=use_pallas
        )
        return values, values.sum()

    def total(student, teacher):
        return jax.lax.psum(loss(student, teacher)[1], "tokens")

    expected = loss(student, teacher, use_pallas=False)[0]
    stacked = student.reshape(2, 8, 70), teacher.reshape(2, 8, 33)
    values = jax.jit(jax.vmap(loss))(*stacked)[0]
    chex.assert_trees_all_close(values.reshape(16), expected, rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((8,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        total, mesh=mesh, in_specs=(jax.P("tokens"), jax.P("tokens")), out_specs=jax.P()
    )
    result = jax.jit(jax.value_and_grad(mapped, (0, 1)))(student, teacher)
    expected = jax.value_and_grad(lambda *states: loss(*states, False)[1], (0, 1))(student, teacher)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


def test_on_cpus_the_keyword_changes_nothing():
    (student, teacher), heads = draw_models()

    def loss(student, **options):
        return losses.fused_linear_kl_divergence(
            student, heads[0], teacher, heads[1], chunk_size=16, **options
        ).sum()

    plain, opted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, use_pallas=use_pallas)))(student)
        for use_pallas in (False, True)
    )
    chex.assert_trees_all_equal(plain, opted)


def test_no_tokens():
    (student, teacher), heads = draw_models(tokens=0)
    loss = losses.fused_linear_kl_divergence
    assert loss(student, heads[0], teacher, heads[1], use_pallas=True).shape == (0,)


def test_pallas_is_imported_on_request_alone():
    code = "import sys; import jaxkd.losses; print('jax.experimental.pallas' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_unfit_calls_raise():
    (student, teacher), heads = draw_models()
    loss = functools.partial(losses.fused_linear_kl_divergence, use_pallas=True)
    with pytest.raises(ValueError, match="leave out use_pallas or axis_name"):
        loss(student, heads[0], teacher, heads[1], axis_name="model")
    wide = jnp.ones((4, 5000))
    kernel = np.ones((5000, 8), np.float32)
    with pytest.raises(ValueError, match="take 40000 bytes .* leave out use_pallas"):
        loss(wide, kernel, wide, kernel)
