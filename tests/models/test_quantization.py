"""Weights of a few bits: how they are rounded, trained through and stored."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import data, evaluate, losses, models, weights

MODEL = models.from_linen(models.CNN(features=(4,), hidden=8))
IMAGES = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))


def draw():
    return MODEL.init(jax.random.key(0), IMAGES)


def stored_kernel(kernel, name="kernel", bits=8):
    variables = {"params": {"layer": {name: np.asarray(kernel, np.float32)}}}
    return models.quantize_weights(variables, bits=bits)["params"]["layer"][name]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_output_channel_is_rounded_to_its_scale(bits):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 5, 6)) * np.arange(6)
    stored = stored_kernel(kernel, bits=bits)
    levels = 2 ** (bits - 1) - 1
    largest = np.abs(kernel).max((0, 1, 2))
    expected = np.where(largest > 0, largest, 1) / levels
    np.testing.assert_allclose(stored["scale"].ravel(), expected, rtol=1e-6)
    assert stored["int8"].dtype == jnp.int8 and stored["scale"].dtype == jnp.float32
    assert np.abs(stored["int8"]).max() == levels
    error = np.abs(np.float32(stored["int8"]) * np.float32(stored["scale"]) - kernel)
    assert (error <= expected / 2 * 1.0001).all()
    # A channel of zeros has no scale of its own.
    assert not stored["int8"][..., 0].any()


def test_an_embedding_has_a_scale_for_each_row():
    rows = np.array([[1.0, -0.25], [0.0125, 0.02]])
    stored = stored_kernel(rows, "embedding")
    assert stored["scale"].shape == (2, 1)
    assert stored["int8"].tolist() == [[127, -32], [79, 127]]


def test_stored_weights_are_those_of_the_model(tmp_path):
    variables = draw()
    small = models.with_quantized_weights(MODEL, bits=3)
    logits = small.apply(variables, IMAGES, train=False)[0].logits
    stored = models.quantize_weights(variables, bits=3)
    weights.save_safetensors(tmp_path / "small.safetensors", stored)
    restored = models.dequantize_weights(weights.load_safetensors(tmp_path / "small.safetensors"))
    np.testing.assert_array_equal(MODEL.apply(restored, IMAGES, train=False)[0].logits, logits)
    # Again: rounded weights are rounded to themselves.
    twice = models.dequantize_weights(models.quantize_weights(restored, bits=3))
    np.testing.assert_allclose(MODEL.apply(twice, IMAGES, train=False)[0].logits, logits, rtol=1e-5)
    assert restored["params"]["conv1"]["bias"].shape == (4,)
    full, few = evaluate.parameter_bytes(variables), evaluate.parameter_bytes(stored)
    assert 0.25 < few / full < 0.45
    assert small.network is None and small.init is MODEL.init


def test_the_gradient_passes_the_rounding():
    variables = draw()

    def loss(variables, model):
        return (model.apply(variables, IMAGES, train=False)[0].logits ** 2).sum()

    small = models.with_quantized_weights(MODEL, bits=4)
    stored = models.dequantize_weights(models.quantize_weights(variables, bits=4))
    gradients = jax.jit(jax.grad(lambda v: loss(v, small)))(variables)
    expected = jax.jit(jax.grad(lambda v: loss(v, MODEL)))(stored)
    for first, second in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_training_with_the_rounding_beats_rounding_afterwards():
    """With weights of 2 bits, a student that knows of the rounding keeps most of its accuracy."""
    dataset = data.load("fashion_mnist_mini")
    images, test_images = (
        jnp.asarray(split.images[:2000, ::2, ::2], jnp.float32) / 255
        for split in (dataset.train, dataset.test)
    )
    labels, test_labels = dataset.train.labels[:2000], dataset.test.labels[:2000]
    plain = models.from_linen(models.CNN(features=(8,), hidden=16))
    tx = optax.adam(3e-3)

    def train(model):
        def step(number, state):
            params, opt_state = state
            key = jax.random.fold_in(jax.random.key(1), number)
            rows = jax.random.randint(key, (64,), 0, len(images))

            def loss(params):
                outputs, _ = model.apply({"params": params}, images[rows], train=True)
                return losses.hard_cross_entropy(outputs.logits, jnp.asarray(labels)[rows]).mean()

            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params = model.init(jax.random.key(0), images[:1])["params"]
        with jax.numpy_dtype_promotion("standard"):
            loop = jax.jit(lambda state: jax.lax.fori_loop(0, 150, step, state))
            return {"params": loop((params, tx.init(params)))[0]}

    def accuracy(variables, model):
        outputs, _ = jax.jit(lambda v: model.apply(v, test_images, train=False))(variables)
        return evaluate.accuracy(outputs.logits, test_labels)

    small = models.with_quantized_weights(plain, bits=2)
    assert accuracy(train(small), small) > accuracy(train(plain), small) + 0.1


@pytest.mark.parametrize("bits", [1, 9, True, 4.0])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 8"):
        models.with_quantized_weights(MODEL, bits=bits)


def test_weights_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match=r"\['layer'\]\['kernel'\] holds NaN or infinity"):
        stored_kernel([[1.0, np.nan]])
