"""The residual networks of CIFAR: published sizes, PyTorch's numbers, and the real ResNet-20."""

import functools
import importlib.util
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.checkpoints import weights
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
from jaxkd.transfer import rename, rename_back

SHARED = Path(__file__).parents[3] / "shared" / "data"
CHECKPOINT, LOSSLESS = SHARED / "pretrained" / "resnet20-12fca82f.th", SHARED / "cifar10_lossless_train5k.npz"
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")
needs_data = pytest.mark.skipif(
    not (CHECKPOINT.is_file() and LOSSLESS.is_file()),
    reason="../shared/data/pretrained or the lossless CIFAR is absent",
)


def torch_cifar():
    spec = importlib.util.spec_from_file_location("torch_cifar", Path(__file__).with_name("torch_cifar.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes(module, shape=(1, 32, 32, 3)):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(from_linen(module).init, jax.random.key(0), images)


def draw(module, size=8):
    """Variables in which nothing is at its default, drawn where `init` would compile for seconds, and images."""
    rng, paths = np.random.default_rng(0), shapes(module, (1, size, size, 3))
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), paths)
    variables["batch_stats"] = jax.tree.map(lambda leaf: np.abs(leaf) + 0.5, variables["batch_stats"])
    return variables, rng.normal(size=(2, size, size, 3)).astype(np.float32)


def initial(module, *names):
    """One of the initial parameters; the others are compiled away."""
    images = jnp.zeros((1, 16, 16, 3))
    return jax.jit(
        lambda key: functools.reduce(dict.__getitem__, names, from_linen(module).init(key, images)["params"])
    )(jax.random.key(0))


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
    ids=lambda value: None if isinstance(value, int) else f"{6 * value.blocks + 2}, {value.widths[0]} channels",
)
def test_parameters_as_published(module, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module)["params"])) == parameters


@pytest.mark.parametrize("module", [CifarResNet(1, num_classes=5), resnet8x4(5)], ids=["option A", "option B"])
def test_named_features_have_the_shapes_of_the_stages(module):
    model, images = from_linen(module), jax.ShapeDtypeStruct((2, 32, 28, 1), jnp.float32)
    variables = shapes(module, images.shape)
    outputs, _ = jax.eval_shape(lambda v, x: model.apply(v, x, train=True), variables, images)
    stem, *widths = module.widths
    assert {name: feature.shape for name, feature in outputs.features.items()} == {
        "stem": (2, 32, 28, stem),
        "stage1": (2, 32, 28, widths[0]),
        "stage2": (2, 16, 14, widths[1]),
        "stage3": (2, 8, 7, widths[2]),
        "pre_logits": (2, widths[2]),
    }
    assert outputs.logits.shape == (2, 5)


def test_features_are_activations_and_lead_to_the_logits():
    variables, images = draw(CifarResNet(1))
    (logits, named), _ = jax.jit(lambda x: from_linen(CifarResNet(1)).apply(variables, x, train=True))(images)
    for name in ("stem", "stage1", "stage2", "stage3"):
        assert named[name].min() == 0 < named[name].max()
    np.testing.assert_allclose(named["pre_logits"], np.asarray(named["stage3"]).mean((1, 2)), rtol=1e-5)
    last = variables["params"]["logits"]
    np.testing.assert_allclose(logits, named["pre_logits"] @ last["kernel"] + last["bias"][None], rtol=1e-5, atol=1e-6)


def test_shortcut_without_parameters_takes_every_second_pixel_between_zeros():
    variables, images = draw(CifarResNet(1))
    variables["params"] |= {  # blocks in which nothing but the shortcut is left
        name: jax.tree.map(np.zeros_like, block) for name, block in variables["params"].items() if "block" in name
    }
    (_, named), _ = jax.jit(lambda x: from_linen(CifarResNet(1)).apply(variables, x, train=False))(images[:, :, :7])
    np.testing.assert_array_equal(named["stage1"], named["stem"])
    np.testing.assert_array_equal(named["stage2"][..., 8:24], named["stem"][:, ::2, ::2])
    assert not named["stage2"][..., :8].any() and not named["stage2"][..., 24:].any()


@pytest.mark.parametrize(("projection", "fan"), [(False, 9 * 32), (True, 9 * 64)], ids=["fan-in", "fan-out"])
def test_kernels_start_as_he_proposes(projection, fan):
    kernel = initial(CifarResNet(1, (32, 64, 64, 64), projection=projection), "stage1_block0", "conv1", "kernel")
    np.testing.assert_allclose(kernel.std(), (2 / fan) ** 0.5, rtol=0.02)


def test_channels_cannot_shrink_without_a_projection():
    with pytest.raises(ValueError, match=r"\(16, 8, 8, 8\).*projection=True"):
        shapes(CifarResNet(1, (16, 8, 8, 8)))
    shapes(CifarResNet(1, (16, 8, 8, 8), projection=True))


# --- against PyTorch ---


@needs_torch
@pytest.mark.parametrize(
    ("module", "size"),
    [(resnet20(), 32), (resnet8x4(100), 32), (CifarResNet(1), 15)],
    ids=["resnet20", "resnet8x4", "odd size"],
)
def test_equals_pytorch_at_rest_and_in_training(module, size):
    torch = torch_cifar()
    reference = torch.ResNet(module.blocks, module.widths, module.projection, module.num_classes)
    torch.assert_equal(module, reference, size=size)


@pytest.mark.parametrize("module", [resnet20(), resnet8x4()], ids=["option A", "option B"])
def test_every_variable_has_a_name_in_pytorch(module):
    rules = module.torch_rules()
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes(module))]
    names = [rename_back(path, rules).path for path in paths]
    assert None not in names and [rename(name, rules).path for name in names] == paths
    last = "fc" if module.projection else "linear"
    expected = {"conv1.weight", "bn1.running_mean", "layer2.0.conv1.weight", "layer3.0.bn2.running_var", f"{last}.bias"}
    assert expected <= set(names)
    assert ("layer1.0.downsample.1.weight" in names) == module.projection
    assert rename("layer1.0.bn1.num_batches_tracked", rules).path is None


# --- what is wrong with images ---


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (jnp.ones((8, 8, 3)), ValueError, r"\[B, H, W, C\], got \(8, 8, 3\).*x\[None\]"),
        (jnp.ones((1, 3, 8, 3)), ValueError, r"at least 4×4, got \(1, 3, 8, 3\)"),
        (jnp.ones((1, 8, 0, 3)), ValueError, r"at least 4×4, got \(1, 8, 0, 3\)"),
        (jnp.ones((1, 8, 8, 1)), ValueError, r"\[B, H, W, 3\], got \(1, 8, 8, 1\).*3 channels.*weights for 1"),
        (jnp.ones((1, 8, 8, 3), jnp.uint8), TypeError, "got uint8.*standardized"),
    ],
    ids=["rank", "height", "empty", "channels", "dtype"],
)
def test_wrong_images(images, error, match):
    model = from_linen(CifarResNet(1))
    variables = shapes(CifarResNet(1))
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)


def test_images_of_one_channel_are_no_error_in_themselves():
    assert shapes(CifarResNet(1), (1, 28, 28, 1))["params"]["stem_conv"]["kernel"].shape == (3, 3, 1, 16)


# --- the real ResNet-20 ---


@needs_data
def test_real_checkpoint_knows_its_training_images():
    variables, report = weights.from_torch(
        weights.load_weights(CHECKPOINT), shapes(resnet20()), resnet20().torch_rules()
    )
    assert report.complete
    chex.assert_tree_all_finite(variables)
    with np.load(LOSSLESS) as data:
        images, labels = data["images"][:2000], data["labels"][:2000]
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    model = from_linen(resnet20())
    classify = jax.jit(lambda x: model.apply(variables, x, train=False)[0].logits.argmax(-1))
    right = [
        classify((images[i : i + 250].astype(np.float32) / 255 - mean.reshape(1, 1, 1, 3)) / std.reshape(1, 1, 1, 3))
        == labels[i : i + 250]
        for i in range(0, 2000, 250)
    ]
    assert np.mean(right) > 0.99
