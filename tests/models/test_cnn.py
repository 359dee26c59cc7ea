"""The plain CNNs: published sizes, a reference, and the custom gradient of the pooling."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from any_model import count_parameters
from jaxkd.models import CNN, from_linen, max_pool


@pytest.mark.parametrize(
    ("features", "hidden", "parameters"),
    [((64, 128), 128, 666_890), ((32, 64), 64, 167_562), ((16,), 32, 116_010)],
)
def test_parameters_of_teacher_assistant_and_student(features, hidden, parameters):
    assert count_parameters(CNN(features, hidden)) == parameters


@pytest.mark.thorough
def test_named_features_have_the_shapes_of_the_stages():
    model = from_linen(CNN((8, 16), 12, num_classes=5))
    images = jnp.ones((2, 28, 28, 1))
    outputs, batch_stats = model.apply(model.init(jax.random.key(0), images), images, train=True)
    shapes = {name: feature.shape for name, feature in outputs.features.items()}
    assert shapes == {"stage1": (2, 13, 13, 8), "stage2": (2, 5, 5, 16), "pre_logits": (2, 12)}
    assert outputs.logits.shape == (2, 5) and batch_stats == {}


def test_equals_a_reference_of_lax_operations():
    model = from_linen(CNN((4,), 6))
    images = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    variables = model.init(jax.random.key(1), images)
    params = variables["params"]
    x = jax.lax.conv_general_dilated(
        images,
        params["conv1"]["kernel"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = nn.max_pool(
        nn.relu(x + params["conv1"]["bias"].reshape(1, 1, 1, -1)), (2, 2), strides=(2, 2)
    ).reshape(2, -1)
    x = nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    expected = x @ params["logits"]["kernel"] + params["logits"]["bias"][None]
    outputs, _ = model.apply(variables, images, train=False)
    chex.assert_trees_all_close(outputs.logits, expected, rtol=1e-5, atol=1e-5)


def test_too_small_an_image_raises():
    model = from_linen(CNN((4, 4), 6))
    with pytest.raises(
        ValueError,
        match="8×8 image is too small for 2 convolutions: "
        "convolution 2 needs at least 4×4 and gets 3×3",
    ):
        model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))


@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 9, 3)])
def test_max_pool_equals_flax_in_value_and_gradient(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    weights = jax.random.normal(jax.random.key(1), (2, shape[1] // 2, shape[2] // 2, 3))

    def value_and_gradient(pool):
        return jax.jit(jax.value_and_grad(lambda x: (pool(x) * weights).sum()))(x)

    expected = value_and_gradient(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)))
    chex.assert_trees_all_close(value_and_gradient(max_pool), expected, rtol=1e-6)


def test_max_pool_gives_the_gradient_of_a_tie_to_a_single_pixel():
    gradient = jax.grad(lambda x: max_pool(x).sum())(jnp.zeros((1, 4, 4, 1)))
    assert gradient.sum() == 4 and set(gradient.ravel().tolist()) == {0.0, 1.0}


def test_max_pool_keeps_bfloat16():
    value, gradient = jax.value_and_grad(lambda x: max_pool(x).sum().astype(jnp.float32))(
        jnp.ones((1, 4, 4, 1), "bfloat16")
    )
    assert gradient.dtype == jnp.bfloat16 and value == 4
