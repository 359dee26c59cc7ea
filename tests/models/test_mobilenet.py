"""MobileNetV2: published sizes, equality with PyTorch, and the block that EfficientNet shares."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torch_imagenet as imagenet
from any_model import count_parameters, feature_shapes, needs_torch
from jaxkd.models import from_linen
from jaxkd.models.mobilenet import (
    BlockGroup,
    ConvNorm,
    ConvNormConfig,
    InvertedResidual,
    MobileNetV2,
    mobilenet_v2,
    round_channels,
)

CONFIG = ConvNormConfig(nn.relu6)
SMALL = MobileNetV2(
    (BlockGroup(1, 8, 1, 1), BlockGroup(3, 16, 2, 2)),
    32,
    1280,
    CONFIG,
    num_classes=5,
    dropout=0.0,
)


@pytest.mark.parametrize(
    ("width", "parameters"), [(1.0, 3_504_872), (0.5, 1_968_680), (1.4, 6_108_776)]
)
def test_parameters_are_as_published(width, parameters):
    assert count_parameters(mobilenet_v2(width=width)) == parameters


@pytest.mark.parametrize("train", [False, True])
def test_logits_are_those_of_torchvision(train):
    expected = {False: (-2.740116, -0.55493, 3.19005), True: (-0.170471, 0.401026, 0.604794)}
    imagenet.check_logits(SMALL, imagenet.images(3, 33, 38, 3), expected[train], train=train)


@needs_torch
@pytest.mark.parametrize("train", [False, True])
def test_equals_torch(train):
    imagenet.check_equals_torch(
        SMALL, imagenet.mobilenet, imagenet.images(3, 33, 38, 3), train=train
    )


def test_rules_name_every_variable():
    imagenet.check_rules(SMALL)


def test_named_features_have_the_shapes_of_the_stages():
    assert feature_shapes(mobilenet_v2(num_classes=10), (2, 64, 96, 3), train=False) == {
        "stem": (2, 32, 48, 32),
        "stage1": (2, 32, 48, 16),
        "stage2": (2, 16, 24, 24),
        "stage3": (2, 8, 12, 32),
        "stage4": (2, 4, 6, 64),
        "stage5": (2, 4, 6, 96),
        "stage6": (2, 2, 3, 160),
        "stage7": (2, 2, 3, 320),
        "pre_logits": (2, 1280),
        "logits": (2, 10),
    }


def test_no_width_narrows_the_last_convolution():
    narrow, wide = mobilenet_v2(width=0.5), mobilenet_v2(width=1.4)
    assert (narrow.stem, narrow.head) == (16, 1280) and (wide.stem, wide.head) == (48, 1792)


def test_channels_are_not_rounded_down_by_more_than_a_tenth():
    assert [round_channels(channels) for channels in (1, 8, 11, 12, 19, 20, 90, 91.9)] == [
        8,
        8,
        16,
        16,
        24,
        24,
        88,
        88,
    ]


def test_a_depthwise_convolution_starts_by_the_fan_out_of_a_channel():
    def std(module, channels):
        init = jax.jit(lambda key: module.init(key, jnp.ones((1, 4, 4, channels)), False))
        variables = init(jax.random.key(0))
        return variables["params"]["conv"]["kernel"].std()

    np.testing.assert_allclose(
        std(ConvNorm(512, CONFIG, 3, depthwise=True), 512), (2 / 9) ** 0.5, rtol=0.05
    )
    np.testing.assert_allclose(std(ConvNorm(512, CONFIG), 64), (2 / 512) ** 0.5, rtol=0.05)


@pytest.mark.parametrize(
    ("stride", "channels", "shortcut"), [(1, 8, True), (2, 8, False), (1, 16, False)]
)
def test_a_shortcut_only_where_the_shape_stays(stride, channels, shortcut):
    block = InvertedResidual(BlockGroup(2, channels, 1, stride), CONFIG)
    x = imagenet.images(2, 6, 6, 8)

    @jax.jit
    def without_branch(key):
        variables = block.init(key, x, False)
        variables["params"]["project"]["bn"]["scale"] *= 0.0
        return block.apply(variables, x, False)

    y = without_branch(jax.random.key(0))
    np.testing.assert_array_equal(y, x if shortcut else np.zeros_like(y))


def test_dropout_comes_between_pooling_and_logits():
    model = from_linen(SMALL.clone(dropout=0.5))
    images = imagenet.images(2, 32, 32, 3)
    apply = jax.jit(lambda key: model.apply(imagenet.draw(SMALL), images, train=True, key=key)[0])
    first, second = apply(jax.random.key(0)), apply(jax.random.key(1))
    assert (first.features["pre_logits"] == second.features["pre_logits"]).all()
    assert (first.logits != second.logits).any()


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((32, 32, 3), r"expected images \[B, H, W, C\], got \(32, 32, 3\)"),
        ((2, 32, 0, 3), "at least 1×1, got"),
        ((2, 32, 32, 1), r"for images \[B, H, W, 3\], got \(2, 32, 32, 1\)"),
    ],
)
def test_wrong_images_raise(shape, match):
    with pytest.raises(ValueError, match=match):
        from_linen(SMALL).apply(imagenet.draw(SMALL), jnp.ones(shape), train=False)
