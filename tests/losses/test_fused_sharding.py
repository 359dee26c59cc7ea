"""Tests of fused losses with heads whose classes are sharded over the devices of a mesh."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses

TOKENS, FEATURES, CLASSES = 16, 6, 64
LABELS = jnp.arange(TOKENS) * 7 % CLASSES


def draw(*shape, number=0):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), number), shape)


def draw_models():
    student = losses.LinearHead(
        draw(CLASSES, FEATURES, number=1),
        bias=draw(CLASSES, number=2),
        softcap=4.0,
        is_embedding=True,
    )
    teacher = losses.LinearHead(draw(9, CLASSES, number=4))
    return draw(TOKENS, FEATURES), student, draw(TOKENS, 9, number=3), teacher


def specs(tokens=None):
    student = losses.LinearHead(jax.P("model"), bias=jax.P("model"), softcap=4.0, is_embedding=True)
    return jax.P(tokens), student, jax.P(tokens), losses.LinearHead(jax.P(None, "model"))


def sparse(student, head, teacher, teacher_head, labels, **options):
    kept = losses.top_k(2 * draw(TOKENS, CLASSES, number=6), k=5)
    return losses.fused_linear_sparse_kl_divergence(student, head, kept, **options)


def without_labels(loss, **options):
    def value(student, head, teacher, teacher_head, labels, **others):
        return loss(student, head, teacher, teacher_head, **options, **others)

    return value


LOSSES = {
    "forward": without_labels(losses.fused_linear_kl_divergence),
    "reverse": without_labels(losses.fused_linear_reverse_kl_divergence),
    "jensen_shannon": without_labels(losses.fused_linear_jensen_shannon_divergence, beta=0.3),
    "labels": losses.fused_linear_distillation_loss,
    "sparse": sparse,
}
EACH = pytest.mark.parametrize("name", LOSSES)


def total(name, *models, labels=LABELS, **options):
    values = LOSSES[name](*models, labels, chunk_size=5, **options)
    return (jnp.arange(1.0, values.size + 1) * values).sum()


def on_a_mesh(name, **options):
    """Returns the loss of models whose classes are sharded over eight devices."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(
        functools.partial(total, name, axis_name="model"),
        mesh=mesh,
        in_specs=specs(),
        out_specs=jax.P(),
        **options,
    )


@pytest.mark.thorough
@EACH
def test_sharded_classes_equal_one_device_and_no_head_is_gathered(name):
    models = draw_models()
    argnums = (0, 1) if name == "sparse" else (0, 1, 2, 3)
    expected = jax.value_and_grad(functools.partial(total, name), argnums)(*models)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs())
    placed = jax.device_put(models, shardings)
    program = jax.jit(jax.value_and_grad(on_a_mesh(name), argnums)).lower(*placed).compile()
    value, gradients = program(*placed)
    chex.assert_trees_all_close((value, gradients), expected, rtol=1e-4, atol=1e-4)
    # Only numbers of tokens and gradients of states are exchanged.
    assert "all-reduce" in program.as_text()
    assert not re.search(r"all-(gather|to-all)|collective-permute", program.as_text())
    assert gradients[1].kernel.sharding.shard_shape((CLASSES, FEATURES)) == (8, FEATURES)


@pytest.mark.thorough
def test_tokens_and_classes_may_both_be_sharded():
    models = draw_models()
    expected = jax.value_and_grad(
        lambda *m: losses.fused_linear_distillation_loss(*m, LABELS, chunk_size=3).sum(),
        (0, 1, 2, 3),
    )(*models)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharded(*arguments):
        values = losses.fused_linear_distillation_loss(*arguments, chunk_size=3, axis_name="model")
        return jax.lax.psum(values.sum(), "data")

    mapped = jax.shard_map(
        sharded, mesh=mesh, in_specs=(*specs("data"), jax.P("data")), out_specs=jax.P()
    )
    result = jax.jit(jax.value_and_grad(mapped, (0, 1, 2, 3)))(*models, LABELS)
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_temperature_is_differentiated_on_a_mesh():
    models = draw_models()

    def gradient(loss):
        return jax.grad(lambda t: loss(*models, t))(2.0)

    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(*arguments, axis_name=None):
        *own_models, t = arguments
        return total("labels", *own_models, temperature=t, axis_name=axis_name)

    mapped = jax.shard_map(
        functools.partial(loss, axis_name="model"),
        mesh=mesh,
        in_specs=(*specs(), jax.P()),
        out_specs=jax.P(),
    )
    np.testing.assert_allclose(gradient(jax.jit(mapped)), gradient(loss), rtol=1e-4)


@EACH
def test_unfit_calls_raise(name):
    models = draw_models()
    with pytest.raises(ValueError, match="inside jax.shard_map"):
        total(name, *models, axis_name="model")
    with pytest.raises(ValueError, match="without check_vma=False"):
        on_a_mesh(name, check_vma=False)(*models)


@pytest.mark.parametrize("label", [-100, CLASSES])
def test_a_label_that_no_device_has_is_nan(label):
    labels = LABELS.at[2].set(label)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        lambda states, head: losses.fused_linear_cross_entropy(
            states, head, labels, axis_name="model"
        ),
        mesh=mesh,
        in_specs=specs()[:2],
        out_specs=jax.P(),
    )
    values = jax.jit(mapped)(*draw_models()[:2])
    np.testing.assert_array_equal(jnp.isnan(values), jnp.arange(TOKENS) == 2)
