"""Plain networks of the teacher-assistant paper: published sizes, equality with PyTorch."""

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
from jaxkd.models.plain import PlainCNN, plain2, plain4, plain6, plain8, plain10
from jaxkd.transfer import rename


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (plain2(), 13_082),
        (plain4(), 37_338),
        (plain6(), 82_778),
        (plain8(), 327_962),
        (plain10(), 2_487_850),
    ],
)
def test_parameters_as_published(module, parameters):
    assert count_parameters(module) == parameters


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (
            plain4(5),
            {"stage1": (2, 14, 13, 16), "stage2": (2, 7, 6, 32), "pre_logits": (2, 7 * 6 * 32)},
        ),
        (
            plain8(5),
            {
                "stage1": (2, 14, 13, 16),
                "stage2": (2, 7, 6, 32),
                "stage3": (2, 3, 3, 64),
                "stage4": (2, 1, 1, 128),
                "pre_logits": (2, 64),
            },
        ),
    ],
)
def test_named_features_have_the_shapes_of_the_stages(module, expected):
    assert feature_shapes(module, (2, 28, 26, 1), train=True) == expected | {"logits": (2, 5)}


@pytest.mark.parametrize("hidden", [None, 6])
def test_last_feature_is_the_input_of_the_classifier(hidden):
    module = PlainCNN(((3,), (4,)), hidden)
    variables, images = draw_variables(module)
    (logits, named), _ = jax.jit(lambda x: from_linen(module).apply(variables, x, train=True))(
        images
    )
    assert min(feature.min() for feature in named.values()) == 0
    last = variables["params"]["logits"]
    np.testing.assert_allclose(
        logits, named["pre_logits"] @ last["kernel"] + last["bias"][None], rtol=1e-5, atol=1e-6
    )


def test_kernels_start_as_pytorch_does():
    for layer, fan_in in (("stage2_conv0", 9 * 16), ("hidden", 16 * 128)):
        kernel = initial_parameter(PlainCNN(((16,), (128,)), 8), layer, "kernel")
        bound = fan_in**-0.5
        assert 0.99 * bound < jnp.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.02)


@needs_torch
@pytest.mark.parametrize("module", [plain4(), plain8(7)], ids=["plain4", "plain8"])
def test_equals_pytorch_in_evaluation_and_training(module):
    import torch_cifar

    torch_cifar.assert_equal(
        module, torch_cifar.PlainCNN(module.stages, module.hidden, module.num_classes)
    )


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            plain6(),
            {
                "conv_layers.0.weight",
                "conv_layers.10.bias",
                "conv_layers.18.running_var",
                "fc_layers.0.weight",
            },
        ),
        (
            plain10(),
            {
                "conv_layers.31.weight",
                "conv_layers.30.bias",
                "fc_layers.0.bias",
                "fc_layers.2.weight",
            },
        ),
    ],
)
def test_every_variable_has_a_name_in_pytorch(module, names):
    assert names <= torch_names(module)
    assert rename("conv_layers.1.num_batches_tracked", module.torch_rules()).path is None


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 15, 32, 3), "at least 16×16"),
        ((1, 32, 32, 1), "convert the images to 3 channels"),
        (
            (1, 64, 32, 3),
            "another size than 64×32: the dense layer expects 512 values and gets 1024",
        ),
    ],
)
def test_wrong_images(shape, match):
    model, variables = from_linen(plain8()), variable_shapes(plain8())
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.ones(shape))
