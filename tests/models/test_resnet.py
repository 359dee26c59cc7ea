"""ImageNet's ResNets: published sizes, equality with PyTorch, and their max-pooling."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torch_imagenet as imagenet
from any_model import count_parameters, feature_shapes, needs_torch
from jaxkd.models import from_linen
from jaxkd.models.resnet import (
    ResidualBlock,
    ResNet,
    overlapping_max_pool,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
)

BASIC = ResNet((1, 1), False, 8, 5)
BOTTLENECK = ResNet((1, 2), True, 4, 5)


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (resnet18, 11_689_512),
        (resnet34, 21_797_672),
        (resnet50, 25_557_032),
        (resnet101, 44_549_160),
    ],
)
def test_parameters_are_as_published(make, parameters):
    assert count_parameters(make()) == parameters


def test_parameters_of_a_classifier_of_ten_classes():
    assert count_parameters(resnet18(num_classes=10)) == 11_689_512 - 990 * 513


@pytest.mark.parametrize(
    ("module", "shape", "train", "expected"),
    [
        (resnet18(num_classes=5), (2, 64, 64, 3), False, (109.70207, -74.570056, 66.426382)),
        (
            ResNet((1, 1, 1, 1), True, num_classes=5),
            (3, 33, 38, 3),
            True,
            (-0.121881, -0.823579, 1.804425),
        ),
    ],
)
def test_logits_are_those_of_torchvision(module, shape, train, expected):
    imagenet.check_logits(module, imagenet.images(*shape), expected, train=train)


@needs_torch
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("module", [BASIC, BOTTLENECK])
def test_equals_torch(module, train):
    imagenet.check_equals_torch(module, imagenet.resnet, imagenet.images(3, 33, 38, 3), train=train)


@pytest.mark.parametrize("module", [BASIC, BOTTLENECK])
def test_rules_name_every_variable(module):
    imagenet.check_rules(module)


def test_named_features_have_the_shapes_of_the_stages():
    assert feature_shapes(resnet50(), (2, 64, 96, 3), train=False) == {
        "stem": (2, 16, 24, 64),
        "stage1": (2, 16, 24, 256),
        "stage2": (2, 8, 12, 512),
        "stage3": (2, 4, 6, 1024),
        "stage4": (2, 2, 3, 2048),
        "pre_logits": (2, 2048),
        "logits": (2, 1000),
    }


def test_the_stride_of_a_bottleneck_is_in_its_middle():
    def conv_outputs(x):
        _, updates = ResidualBlock(4, 2, True).init_with_output(
            jax.random.key(0), x, False, capture_intermediates=True
        )
        return {
            name: outputs["__call__"][0]
            for name, outputs in updates["intermediates"].items()
            if "conv" in name
        }

    outputs = jax.eval_shape(conv_outputs, jnp.ones((1, 8, 8, 16)))
    assert {name: output.shape for name, output in outputs.items()} == {
        "conv1": (1, 8, 8, 4),
        "conv2": (1, 4, 4, 4),
        "conv3": (1, 4, 4, 16),
        "shortcut_conv": (1, 4, 4, 16),
    }


def test_convolutions_are_initialised_as_by_he_and_the_classifier_as_in_pytorch():
    model = from_linen(ResNet((1,), False, 64, 1000))
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
    np.testing.assert_allclose(
        params["stem_conv"]["kernel"].std(), (2 / (49 * 64)) ** 0.5, rtol=0.05
    )
    np.testing.assert_allclose(
        params["stage1_block0"]["conv2"]["kernel"].std(), (2 / (9 * 64)) ** 0.5, rtol=0.05
    )
    np.testing.assert_allclose(abs(params["logits"]["kernel"]).max(), 64**-0.5, rtol=0.01)
    np.testing.assert_array_equal(params["stage1_block0"]["bn2"]["scale"], 1)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 9, 3), (1, 1, 2, 1)])
def test_max_pool_equals_flax_in_value_and_gradient(shape):
    x = jax.random.normal(jax.random.key(0), shape) - 3  # padding by zeros would be the maximum
    weights = jax.random.normal(
        jax.random.key(1), (shape[0], (shape[1] + 1) // 2, (shape[2] + 1) // 2, shape[3])
    )

    def value_and_gradient(pool):
        return jax.jit(jax.value_and_grad(lambda x: (pool(x) * weights).sum()))(x)

    expected = value_and_gradient(
        lambda x: nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    )
    chex.assert_trees_all_close(value_and_gradient(overlapping_max_pool), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((32, 32, 3), r"expected images \[B, H, W, C\], got \(32, 32, 3\)"),
        ((2, 0, 32, 3), "at least 1×1, got"),
        ((2, 32, 32, 1), r"for images \[B, H, W, 3\], got \(2, 32, 32, 1\)"),
    ],
)
def test_wrong_images_raise(shape, match):
    with pytest.raises(ValueError, match=match):
        from_linen(BASIC).apply(imagenet.draw(BASIC), jnp.ones(shape), train=False)


def test_uint8_images_raise():
    with pytest.raises(TypeError, match="expected floating-point images, got uint8"):
        from_linen(BASIC).init(jax.random.key(0), jnp.ones((2, 32, 32, 3), jnp.uint8))
