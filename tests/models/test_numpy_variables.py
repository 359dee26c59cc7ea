"""Tests that networks take variables that are NumPy arrays, as files give them, and keep them."""

import jax
import numpy as np
import pytest

from jaxkd import models

IMAGES = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
TOKENS = np.random.default_rng(0).integers(1, 20, (2, 6)).astype(np.int32)
SIZES = {"hidden": 8, "heads": 2, "layers": 2, "intermediate": 12, "positions": 8}
NETWORKS = {
    "cnn": (models.CNN((4, 8), 8), IMAGES),
    "resnet20": (models.resnet20(), IMAGES),
    "wrn16_2": (models.wrn16_2(), IMAGES),
    "mobilenet_v2": (models.mobilenet_v2(num_classes=3), IMAGES),
    "vgg8": (models.vgg8(), np.tile(IMAGES, (1, 2, 2, 1))),
    "plain4": (models.plain4(), IMAGES),
    "lstm": (models.LSTMClassifier(20, 4, (4,), 4), TOKENS),
    "bert": (models.BERT(20, **SIZES), TOKENS),
    "mean_bert": (models.BERT(20, pooling=models.mean_pooling, **SIZES), TOKENS),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_numpy_variables_give_the_same_logits_and_do_not_change(name):
    module, inputs = NETWORKS[name]
    model = models.from_linen(module)
    variables = jax.jit(model.init)(jax.random.key(0), inputs)
    # Writable, as `load_safetensors` returns them.
    arrays = jax.tree.map(np.array, variables)
    expected = model.apply(variables, inputs, train=False)[0].logits
    for _ in range(2):
        logits = model.apply(arrays, inputs, train=False)[0].logits
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for before, after in zip(jax.tree.leaves(variables), jax.tree.leaves(arrays), strict=True):
        np.testing.assert_array_equal(before, after)
