"""The VGG networks of CIFAR: published sizes and PyTorch's numbers."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import from_linen
from jaxkd.models.vgg import VGG, vgg8, vgg13
from jaxkd.transfer import rename, rename_back

SMALL = VGG(((4,), (5, 6), (7,), (8,), (9, 10)), num_classes=5)
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")


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


@pytest.mark.parametrize(("module", "parameters"), [(vgg8(100), 3_965_028), (vgg13(100), 9_462_180)])
def test_parameters_as_published(module, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module)["params"])) == parameters


@pytest.mark.parametrize(
    ("size", "sides"), [((32, 28), [(32, 28), (16, 14), (8, 7), (4, 3), (4, 3)]), ((64, 64), [64, 32, 16, 8, 4])]
)
def test_named_features_have_the_shapes_of_the_blocks(size, sides):
    model, images = from_linen(vgg13(5)), jax.ShapeDtypeStruct((2, *size, 1), jnp.float32)
    outputs, _ = jax.eval_shape(lambda v, x: model.apply(v, x, train=True), shapes(vgg13(5), images.shape), images)
    stages = zip(("stem", "stage1", "stage2", "stage3", "stage4"), sides, (64, 128, 256, 512, 512), strict=True)
    expected = {name: (2, *(side if isinstance(side, tuple) else (side, side)), width) for name, side, width in stages}
    assert {name: feature.shape for name, feature in outputs.features.items()} == expected | {"pre_logits": (2, 512)}
    assert outputs.logits.shape == (2, 5)


def test_features_are_activations_and_lead_to_the_logits():
    variables, images = draw(SMALL)
    (logits, named), _ = jax.jit(lambda x: from_linen(SMALL).apply(variables, x, train=True))(images)
    for name in ("stem", "stage1", "stage2", "stage3", "stage4"):
        assert named[name].min() == 0 < named[name].max()
    np.testing.assert_allclose(named["pre_logits"], np.asarray(named["stage4"]).mean((1, 2)), rtol=1e-5)
    last = variables["params"]["logits"]
    np.testing.assert_allclose(logits, named["pre_logits"] @ last["kernel"] + last["bias"][None], rtol=1e-5, atol=1e-6)


def test_kernels_start_as_he_proposes():
    layer = initial(VGG(((8,), (8,), (64,), (128,), (8,))), "block3_conv0")
    np.testing.assert_allclose(layer["kernel"].std(), (2 / (9 * 128)) ** 0.5, rtol=0.02)
    assert not layer["bias"].any()


@needs_torch
@pytest.mark.parametrize(
    ("module", "size"), [(vgg8(100), 32), (SMALL, 21), (SMALL, 64)], ids=["vgg8", "two a block", "64×64"]
)
def test_equals_pytorch_at_rest_and_in_training(module, size):
    torch = torch_cifar()
    torch.assert_equal(module, torch.VGG(module.widths, module.num_classes), size=size)


def test_every_variable_has_a_name_in_pytorch():
    rules = vgg13().torch_rules()
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes(vgg13()))]
    names = [rename_back(path, rules).path for path in paths]
    assert None not in names and [rename(name, rules).path for name in names] == paths
    assert {"block0.0.weight", "block0.1.running_mean", "block4.3.bias", "block4.4.weight", "classifier.bias"} <= {
        *names
    }
    assert rename("block0.1.num_batches_tracked", rules).path is None


@pytest.mark.parametrize(("shape", "match"), [((1, 7, 8, 3), "at least 8×8"), ((1, 8, 8, 1), "give the images 3")])
def test_wrong_images(shape, match):
    model, variables = from_linen(SMALL), shapes(SMALL)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.ones(shape))
