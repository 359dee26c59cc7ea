"""CIFAR's residual networks: published sizes, equality with PyTorch, and the public ResNet-20."""

from pathlib import Path

import chex
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
from jaxkd import weights
from jaxkd.models import from_linen
from jaxkd.models.cifar_resnet import (
    CifarResNet,
    resnet8x4,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from jaxkd.transfer import rename

SHARED = Path(__file__).parents[3] / "shared" / "data"
CHECKPOINT = SHARED / "pretrained" / "resnet20-12fca82f.th"
LOSSLESS = SHARED / "cifar10_lossless_train5k.npz"
needs_data = pytest.mark.skipif(
    not (CHECKPOINT.is_file() and LOSSLESS.is_file()),
    reason="../shared/data/pretrained or the lossless CIFAR is absent",
)


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (resnet20(), 269_722),
        (resnet32(), 464_154),
        (resnet44(), 658_586),
        (resnet56(), 853_018),
        (resnet110(), 1_727_962),
        (resnet8x4(100), 1_233_540),
        (resnet32x4(100), 7_433_860),
    ],
    ids=lambda value: (
        None if isinstance(value, int) else f"{6 * value.blocks + 2}, {value.widths[0]} channels"
    ),
)
def test_parameters_as_published(module, parameters):
    assert count_parameters(module) == parameters


@pytest.mark.parametrize(
    "module", [CifarResNet(1, num_classes=5), resnet8x4(5)], ids=["option A", "option B"]
)
def test_named_features_have_the_shapes_of_the_stages(module):
    stem, *widths = module.widths
    assert feature_shapes(module, (2, 32, 28, 1), train=True) == {
        "stem": (2, 32, 28, stem),
        "stage1": (2, 32, 28, widths[0]),
        "stage2": (2, 16, 14, widths[1]),
        "stage3": (2, 8, 7, widths[2]),
        "pre_logits": (2, widths[2]),
        "logits": (2, 5),
    }


def test_features_are_activations_and_lead_to_the_logits():
    variables, images = draw_variables(CifarResNet(1))
    (logits, named), _ = jax.jit(
        lambda x: from_linen(CifarResNet(1)).apply(variables, x, train=True)
    )(images)
    for name in ("stem", "stage1", "stage2", "stage3"):
        assert named[name].min() == 0 < named[name].max()
    np.testing.assert_allclose(
        named["pre_logits"], np.asarray(named["stage3"]).mean((1, 2)), rtol=1e-5
    )
    last = variables["params"]["logits"]
    np.testing.assert_allclose(
        logits, named["pre_logits"] @ last["kernel"] + last["bias"][None], rtol=1e-5, atol=1e-6
    )


def test_shortcut_without_parameters_takes_every_second_pixel_between_zeros():
    variables, images = draw_variables(CifarResNet(1))
    variables["params"] |= {  # blocks of which only the shortcut remains
        name: jax.tree.map(np.zeros_like, block)
        for name, block in variables["params"].items()
        if "block" in name
    }
    # Not in one program, which may compute an array twice and round it differently.
    (_, named), _ = from_linen(CifarResNet(1)).apply(variables, images[:, :, :7], train=False)
    np.testing.assert_array_equal(named["stage1"], named["stem"])
    np.testing.assert_array_equal(named["stage2"][..., 8:24], named["stem"][:, ::2, ::2])
    assert not named["stage2"][..., :8].any() and not named["stage2"][..., 24:].any()


@pytest.mark.parametrize(
    ("projection", "fan"), [(False, 9 * 32), (True, 9 * 64)], ids=["fan-in", "fan-out"]
)
def test_kernels_are_initialised_as_he_proposes(projection, fan):
    kernel = initial_parameter(
        CifarResNet(1, (32, 64, 64, 64), projection=projection), "stage1_block0", "conv1", "kernel"
    )
    np.testing.assert_allclose(kernel.std(), (2 / fan) ** 0.5, rtol=0.02)


def test_channels_cannot_shrink_without_a_projection():
    with pytest.raises(ValueError, match=r"\(16, 8, 8, 8\).*projection=True"):
        variable_shapes(CifarResNet(1, (16, 8, 8, 8)))
    variable_shapes(CifarResNet(1, (16, 8, 8, 8), projection=True))


# --- against PyTorch ---


@needs_torch
@pytest.mark.parametrize(
    ("module", "size"),
    [(resnet20(), 32), (resnet8x4(100), 32), (CifarResNet(1), 15)],
    ids=["resnet20", "resnet8x4", "odd size"],
)
def test_equals_pytorch_in_evaluation_and_training(module, size):
    import torch_cifar

    reference = torch_cifar.ResNet(
        module.blocks, module.widths, module.projection, module.num_classes
    )
    torch_cifar.assert_equal(module, reference, size=size)


@pytest.mark.parametrize("module", [resnet20(), resnet8x4()], ids=["option A", "option B"])
def test_every_variable_has_a_name_in_pytorch(module):
    names = torch_names(module)
    last = "fc" if module.projection else "linear"
    expected = {
        "conv1.weight",
        "bn1.running_mean",
        "layer2.0.conv1.weight",
        "layer3.0.bn2.running_var",
        f"{last}.bias",
    }
    assert expected <= names
    assert ("layer1.0.downsample.1.weight" in names) == module.projection
    assert rename("layer1.0.bn1.num_batches_tracked", module.torch_rules()).path is None


# --- wrong images ---


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (jnp.ones((8, 8, 3)), ValueError, r"\[B, H, W, C\], got \(8, 8, 3\).*x\[None\]"),
        (jnp.ones((1, 3, 8, 3)), ValueError, r"at least 4×4, got \(1, 3, 8, 3\)"),
        (jnp.ones((1, 8, 0, 3)), ValueError, r"at least 4×4, got \(1, 8, 0, 3\)"),
        (
            jnp.ones((1, 8, 8, 1)),
            ValueError,
            r"\[B, H, W, 3\], got \(1, 8, 8, 1\).*3 channels.*weights for 1",
        ),
        (jnp.ones((1, 8, 8, 3), jnp.uint8), TypeError, "got uint8.*with_input_normalization"),
    ],
    ids=["rank", "height", "empty", "channels", "dtype"],
)
def test_wrong_images(images, error, match):
    model = from_linen(CifarResNet(1))
    variables = variable_shapes(CifarResNet(1))
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)


def test_init_takes_images_of_one_channel():
    assert variable_shapes(CifarResNet(1), (1, 28, 28, 1))["params"]["stem_conv"][
        "kernel"
    ].shape == (
        3,
        3,
        1,
        16,
    )


# --- the public ResNet-20 ---


@needs_data
def test_public_checkpoint_classifies_its_training_images():
    variables, report = weights.from_torch(
        weights.load_weights(CHECKPOINT), variable_shapes(resnet20()), resnet20().torch_rules()
    )
    assert report.complete
    chex.assert_tree_all_finite(variables)
    with np.load(LOSSLESS) as data:
        images, labels = data["images"][:2000], data["labels"][:2000]
    mean = np.float32([0.485, 0.456, 0.406]).reshape(1, 1, 1, 3)
    std = np.float32([0.229, 0.224, 0.225]).reshape(1, 1, 1, 3)
    model = from_linen(resnet20())
    classify = jax.jit(lambda x: model.apply(variables, x, train=False)[0].logits.argmax(-1))
    correct = [
        classify((images[i : i + 250].astype(np.float32) / 255 - mean) / std) == labels[i : i + 250]
        for i in range(0, 2000, 250)
    ]
    assert np.mean(correct) > 0.99
