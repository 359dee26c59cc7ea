"""Layers of the networks: dropout and layer normalisation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn

from jaxkd import models
from jaxkd.models.bert import BERT
from jaxkd.models.layers import Dropout, Embed, LayerNorm
from jaxkd.models.lstm import LSTMClassifier


def drop(x, key=0, **keywords):
    return Dropout(**keywords).apply({}, x, rngs={"dropout": jax.random.key(key)})


@pytest.mark.parametrize("make", [models.CNN, models.resnet20, models.wrn16_2])
def test_images_with_channels_before_the_height_are_refused(make):
    """PyTorch's order would give a network of 32 channels and 3 rows."""
    with pytest.raises(ValueError, match=r"seem to be \[N, C, H, W\]: pass images.transpose"):
        jax.eval_shape(make().init, jax.random.key(0), jnp.zeros((2, 3, 32, 32)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_its_share(rate):
    values = np.asarray(drop(jnp.ones((301, 403)), rate=rate, deterministic=False))
    assert np.mean(values == 0) == pytest.approx(rate, abs=0.004)
    assert values.mean() == pytest.approx(1, abs=0.02)
    assert len(np.unique(values)) == 2


def test_neighbours_are_dropped_independently():
    dropped = np.asarray(drop(jnp.ones(40_003), rate=0.5, deterministic=False)) == 0
    for distance in (1, 2, 3, 4, 128):
        assert np.mean(dropped[distance:] == dropped[:-distance]) == pytest.approx(0.5, abs=0.02)


def test_the_gradient_uses_the_same_mask():
    x = jax.random.normal(jax.random.key(1), (7, 9))
    value = drop(x, rate=0.3, deterministic=False)
    gradient = jax.grad(lambda x: drop(x, rate=0.3, deterministic=False).sum())(x)
    np.testing.assert_allclose(value, gradient * x, rtol=1e-6)
    assert 0 < np.mean(np.asarray(gradient) == 0) < 1


def test_the_mask_depends_on_the_key_alone():
    x = jnp.ones(1000)
    first, repeated, other = (
        np.asarray(drop(x, key, rate=0.5, deterministic=False)) for key in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, repeated)
    assert (first != other).any()


def test_nothing_is_dropped_in_prediction_or_at_rate_0_and_all_near_1():
    x = jnp.ones(10)
    np.testing.assert_array_equal(Dropout(0.5, deterministic=True).apply({}, x), x)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, deterministic=True), x)
    np.testing.assert_array_equal(Dropout(0.0, deterministic=False).apply({}, x), x)
    np.testing.assert_array_equal(drop(x, rate=0.999, deterministic=False), jnp.zeros(10))
    with pytest.raises(errors.InvalidRngError):
        Dropout(0.5, deterministic=False).apply({}, x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 10, math.nan])
def test_a_dropout_rate_is_a_probability_below_1(rate):
    tokens = jnp.ones((2, 3), jnp.int32)
    sizes = {"hidden": 4, "layers": 1, "heads": 1, "intermediate": 4, "positions": 4}
    modules = (
        (Dropout(rate, deterministic=True), jnp.ones(3)),
        (LSTMClassifier(11, hidden=(4,), dropout=rate), tokens),
        (BERT(11, **sizes, dropout=rate), tokens),
    )
    for module, inputs in modules:
        with pytest.raises(ValueError, match=r"dropout rate must be in \[0, 1\), got .*: it is"):
            jax.eval_shape(module.init, jax.random.key(0), inputs)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: lambda x: jax.vmap(f)(x[None])[0]])
def test_dropout_under_transforms(transform):
    x = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(
        transform(lambda x: drop(x, rate=0.5, deterministic=False))(x),
        drop(x, rate=0.5, deterministic=False),
    )


def test_layer_norm_is_the_formula_and_keeps_the_dtype():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8)) * 5 + 2
    variables = LayerNorm(1e-6).init(jax.random.key(1), x)
    variables = jax.tree.map(lambda leaf: leaf + jnp.linspace(0, 1, 8), variables)
    array = np.asarray(x)
    mean, var = array.mean(-1, keepdims=True), array.var(-1, keepdims=True)
    scale, bias = (np.asarray(variables["params"][name]) for name in ("scale", "bias"))
    expected = (array - mean) / np.sqrt(var + 1e-6) * scale + bias
    np.testing.assert_allclose(LayerNorm(1e-6).apply(variables, x), expected, atol=1e-5)
    assert LayerNorm().apply(variables, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.uint8])
def test_an_embedding_of_an_unknown_token_is_nan(dtype):
    module = Embed(120, 2)
    tokens = jnp.array([0, 5, 119], dtype)
    variables = module.init(jax.random.key(0), tokens)
    expected = nn.Embed(120, 2).apply(variables, tokens)
    np.testing.assert_array_equal(module.apply(variables, tokens), expected)
    unknown = jnp.array([120, 200] if dtype == jnp.uint8 else [-100, -1], dtype)
    assert np.isnan(module.apply(variables, unknown)).all()


@pytest.mark.parametrize("token", [-100, -1, 11])
def test_a_text_with_an_unknown_token_has_no_prediction(token):
    """A negative token would read the embedding of another one, counted from the end."""
    tokens = jnp.array([[3, 4, 5], [3, token, 5]], jnp.int32)
    bert = BERT(11, hidden=4, layers=1, heads=1, intermediate=4, positions=4)
    for module in (LSTMClassifier(11, embedding=4, hidden=(4,), dense=4), bert):
        variables = module.init(jax.random.key(0), jnp.ones((2, 3), jnp.int32))
        is_nan = np.isnan(module.apply(variables, tokens).logits).all(1)
        np.testing.assert_array_equal(is_nan, [False, True])
