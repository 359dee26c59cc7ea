"""Blocks that are computed again for the gradient: same variables, draws, results and gradients."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.models import BERT, CifarResNet, ResNet, Transformer, WideResNet, from_linen

IMAGES = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((4, 6), jnp.int32)
PAIRS = jax.ShapeDtypeStruct((4, 2, 6), jnp.int32)
BLOCKS = {
    BERT(13, hidden=8, layers=2, heads=2, intermediate=12, positions=10, dropout=0.3): TOKENS,
    CifarResNet(2, (4, 4, 4, 8)): IMAGES,
    CifarResNet(1, (4, 4, 8, 8), projection=True): IMAGES,
    ResNet((1, 2), bottleneck=True, width=4, num_classes=3): IMAGES,
    WideResNet(1, 1, dropout=0.3): IMAGES,
    Transformer(13, hidden=8, heads=2, intermediate=12, dropout=0.3): PAIRS,
}
every_network = pytest.mark.parametrize(
    ("module", "inputs", "count"),
    [
        (module, inputs, count)
        for (module, inputs), count in zip(BLOCKS.items(), (2, 6, 3, 3, 3, 4), strict=True)
    ],
    ids=["BERT", "CifarResNet", "projection", "ResNet", "WideResNet", "Transformer"],
)


def rematerialized(module):
    return dataclasses.replace(module, remat=True)


def shapes(module, inputs):
    return jax.eval_shape(from_linen(module).init, jax.random.key(0), inputs)


def draw(module, inputs):
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: np.abs(rng.normal(0.3, 0.2, leaf.shape)).astype(np.float32),
        shapes(module, inputs),
    )
    if inputs.dtype == jnp.int32:
        return variables, rng.integers(1, 13, inputs.shape).astype(np.int32)
    return variables, rng.normal(size=inputs.shape).astype(np.float32)


def count_remat(module, inputs, *, train):
    """Counts the blocks that are computed again, in the program of `apply`."""

    def apply(variables, x):
        return from_linen(module).apply(variables, x, train=train, key=jax.random.key(1))

    jaxpr = jax.make_jaxpr(apply)(shapes(module, inputs), inputs)
    return sum(equation.primitive.name in ("checkpoint", "remat2") for equation in jaxpr.eqns)


@every_network
def test_blocks_are_computed_again_in_training_alone(module, inputs, count):
    module = rematerialized(module)
    assert count_remat(module, inputs, train=True) == count
    # Programs are exported from evaluation.
    assert count_remat(module, inputs, train=False) == 0


@every_network
def test_variables_have_the_same_paths(module, inputs, count):
    chex.assert_trees_all_equal(shapes(rematerialized(module), inputs), shapes(module, inputs))


@pytest.mark.thorough
@every_network
def test_training_is_the_same(module, inputs, count):
    """With batch statistics, dropout and every feature."""
    variables, x = draw(module, inputs)

    def differentiate(module):
        def loss(params):
            outputs, batch_stats = from_linen(module).apply(
                {**variables, "params": params}, x, train=True, key=jax.random.key(1)
            )
            squares = jax.tree.map(lambda leaf: jnp.square(leaf).mean(), outputs)
            return sum(jax.tree.leaves(squares)), (outputs, batch_stats)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    expected, actual = differentiate(module), differentiate(rematerialized(module))
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.thorough
def test_outputs_of_inner_layers_are_features():
    module = rematerialized(WideResNet(1, 1))
    variables, images = draw(module, IMAGES)
    path = "stage2_block0/conv1"

    def apply(module):
        model = from_linen(module, features=(path,))
        return model.apply(variables, images, train=True)[0].features[path]

    chex.assert_trees_all_close(apply(module), apply(WideResNet(1, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "description", ["BERT(vocab_size=9, remat=True)", "wrn16_2(remat=True)", "resnet50(remat=True)"]
)
def test_description(description):
    module = models.make_module(description)
    assert module.remat
    assert models.make_module(models.describe_module(module)) == module
