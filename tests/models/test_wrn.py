"""Wide residual networks: published sizes, equality with PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any_model import (
    count_parameters,
    draw_variables,
    feature_shapes,
    initial_parameter,
    needs_torch,
    torch_names,
    variable_shapes,
)
from jaxkd.models import from_linen
from jaxkd.models.wrn import WideResNet, wrn16_2, wrn40_2
from jaxkd.transfer import rename


@pytest.mark.parametrize(
    ("module", "parameters"), [(wrn16_2(100), 703_284), (wrn40_2(100), 2_255_156)]
)
def test_parameters_as_published(module, parameters):
    assert count_parameters(module) == parameters


def test_named_features_have_the_shapes_of_the_stages():
    assert feature_shapes(wrn16_2(5), (2, 32, 28, 1), train=True) == {
        "stem": (2, 32, 28, 16),
        "stage1": (2, 32, 28, 32),
        "stage2": (2, 16, 14, 64),
        "stage3": (2, 8, 7, 128),
        "pre_logits": (2, 128),
        "logits": (2, 5),
    }


def test_stages_are_before_the_relu_and_the_last_feature_is_after_it():
    variables, images = draw_variables(WideResNet(1, 1))
    (_, named), _ = jax.jit(
        lambda x: from_linen(WideResNet(1, 1)).apply(variables, x, train=False)
    )(images)
    assert all(named[name].min() < 0 for name in ("stem", "stage1", "stage2", "stage3"))
    params, stats = variables["params"]["last_bn"], variables["batch_stats"]["last_bn"]
    last = (np.asarray(named["stage3"]) - stats["mean"]) / (stats["var"] + 1e-5) ** 0.5
    last = (last * params["scale"] + params["bias"]).clip(0)
    np.testing.assert_allclose(named["pre_logits"], last.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training_and_depends_on_the_key():
    variables, images = draw_variables(WideResNet(1, 1))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def logits(dropout, train, seed=0):
        model = from_linen(WideResNet(1, 1, dropout))
        key = jax.random.key(seed, impl="rbg")  # compiles in a quarter of the time
        return model.apply(variables, images, train=train, key=key)[0].logits

    np.testing.assert_array_equal(logits(0.5, False), logits(0.0, False))
    np.testing.assert_array_equal(logits(0.5, True), logits(0.5, True))
    assert jnp.abs(logits(0.5, True) - logits(0.5, True, 1)).max() > 1e-3
    assert wrn16_2(dropout=0.3).dropout == wrn40_2(dropout=0.3).dropout == 0.3


def test_kernels_are_initialised_as_he_proposes():
    kernel = initial_parameter(
        WideResNet(1, 4), "stage2_block0", "conv1", "kernel"
    )  # 64 to 128 channels
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 128)) ** 0.5, rtol=0.02)


@needs_torch
@pytest.mark.parametrize(
    "module", [wrn16_2(100), WideResNet(1, 1)], ids=["wrn16_2", "first stage as wide as the stem"]
)
def test_equals_pytorch_in_evaluation_and_training(module):
    import torch_cifar

    torch_cifar.assert_equal(
        module, torch_cifar.WideResNet(module.blocks, module.widen, module.num_classes)
    )


def test_every_variable_has_a_name_in_pytorch():
    names = torch_names(wrn16_2())
    assert {
        "conv1.weight",
        "block1.layer.0.convShortcut.weight",
        "block3.layer.1.bn2.running_var",
        "bn1.bias",
    } <= names
    assert rename("block1.layer.0.bn1.num_batches_tracked", wrn16_2().torch_rules()).path is None


@pytest.mark.parametrize(
    ("shape", "match"), [((1, 3, 8, 3), "at least 4×4"), ((1, 8, 8, 1), "convert the images to 3")]
)
def test_wrong_images(shape, match):
    model, variables = from_linen(WideResNet(1, 1)), variable_shapes(WideResNet(1, 1))
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.ones(shape))
