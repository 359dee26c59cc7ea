"""CIFAR's VGG networks: published sizes, equality with PyTorch."""

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
from jaxkd.models.vgg import VGG, vgg8, vgg13
from jaxkd.transfer import rename

SMALL = VGG(((4,), (5, 6), (7,), (8,), (9, 10)), num_classes=5)


@pytest.mark.parametrize(
    ("module", "parameters"), [(vgg8(100), 3_965_028), (vgg13(100), 9_462_180)]
)
def test_parameters_as_published(module, parameters):
    assert count_parameters(module) == parameters


@pytest.mark.parametrize(
    ("size", "sides"),
    [((32, 28), [(32, 28), (16, 14), (8, 7), (4, 3), (4, 3)]), ((64, 64), [64, 32, 16, 8, 4])],
)
def test_named_features_have_the_shapes_of_the_blocks(size, sides):
    stages = zip(
        ("stem", "stage1", "stage2", "stage3", "stage4"),
        sides,
        (64, 128, 256, 512, 512),
        strict=True,
    )
    expected = {
        name: (2, *(side if isinstance(side, tuple) else (side, side)), width)
        for name, side, width in stages
    }
    expected |= {"pre_logits": (2, 512), "logits": (2, 5)}
    assert feature_shapes(vgg13(5), (2, *size, 1), train=True) == expected


def test_features_are_activations_and_lead_to_the_logits():
    variables, images = draw_variables(SMALL)
    (logits, named), _ = jax.jit(lambda x: from_linen(SMALL).apply(variables, x, train=True))(
        images
    )
    for name in ("stem", "stage1", "stage2", "stage3", "stage4"):
        assert named[name].min() == 0 < named[name].max()
    np.testing.assert_allclose(
        named["pre_logits"], np.asarray(named["stage4"]).mean((1, 2)), rtol=1e-5
    )
    last = variables["params"]["logits"]
    np.testing.assert_allclose(
        logits, named["pre_logits"] @ last["kernel"] + last["bias"][None], rtol=1e-5, atol=1e-6
    )


def test_kernels_are_initialised_as_he_proposes():
    layer = initial_parameter(VGG(((8,), (8,), (64,), (128,), (8,))), "block3_conv0")
    np.testing.assert_allclose(layer["kernel"].std(), (2 / (9 * 128)) ** 0.5, rtol=0.02)
    assert not layer["bias"].any()


@needs_torch
@pytest.mark.parametrize(
    ("module", "size"),
    [(vgg8(100), 32), (SMALL, 21), (SMALL, 64)],
    ids=["vgg8", "two a block", "64×64"],
)
def test_equals_pytorch_in_evaluation_and_training(module, size):
    import torch_cifar

    torch_cifar.assert_equal(module, torch_cifar.VGG(module.widths, module.num_classes), size=size)


def test_every_variable_has_a_name_in_pytorch():
    names = torch_names(vgg13())
    assert {
        "block0.0.weight",
        "block0.1.running_mean",
        "block4.3.bias",
        "block4.4.weight",
        "classifier.bias",
    } <= names
    assert rename("block0.1.num_batches_tracked", vgg13().torch_rules()).path is None


@pytest.mark.parametrize(
    ("shape", "match"), [((1, 7, 8, 3), "at least 8×8"), ((1, 8, 8, 1), "convert the images to 3")]
)
def test_wrong_images(shape, match):
    model, variables = from_linen(SMALL), variable_shapes(SMALL)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.ones(shape))
