"""Wide residual networks: published sizes and PyTorch's numbers."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import from_linen
from jaxkd.models.wrn import WideResNet, wrn16_2, wrn40_2
from jaxkd.transfer import rename, rename_back

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


@pytest.mark.parametrize(("module", "parameters"), [(wrn16_2(100), 703_284), (wrn40_2(100), 2_255_156)])
def test_parameters_as_published(module, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module)["params"])) == parameters


def test_named_features_have_the_shapes_of_the_stages():
    model, images = from_linen(wrn16_2(5)), jax.ShapeDtypeStruct((2, 32, 28, 1), jnp.float32)
    outputs, _ = jax.eval_shape(lambda v, x: model.apply(v, x, train=True), shapes(wrn16_2(5), images.shape), images)
    assert {name: feature.shape for name, feature in outputs.features.items()} == {
        "stem": (2, 32, 28, 16),
        "stage1": (2, 32, 28, 32),
        "stage2": (2, 16, 14, 64),
        "stage3": (2, 8, 7, 128),
        "pre_logits": (2, 128),
    }
    assert outputs.logits.shape == (2, 5)


def test_stages_are_before_the_relu_and_the_last_feature_is_after_it():
    variables, images = draw(WideResNet(1, 1))
    (_, named), _ = jax.jit(lambda x: from_linen(WideResNet(1, 1)).apply(variables, x, train=False))(images)
    assert all(named[name].min() < 0 for name in ("stem", "stage1", "stage2", "stage3"))
    learned, moved = variables["params"]["last_bn"], variables["batch_stats"]["last_bn"]
    last = (np.asarray(named["stage3"]) - moved["mean"]) / (moved["var"] + 1e-5) ** 0.5
    last = (last * learned["scale"] + learned["bias"]).clip(0)
    np.testing.assert_allclose(named["pre_logits"], last.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training_and_comes_from_its_key():
    variables, images = draw(WideResNet(1, 1))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def logits(dropout, train, seed=0):
        model = from_linen(WideResNet(1, 1, dropout))
        key = jax.random.key(seed, impl="rbg")  # compiles in a quarter of the time
        return model.apply(variables, images, train=train, key=key)[0].logits

    np.testing.assert_array_equal(logits(0.5, False), logits(0.0, False))
    np.testing.assert_array_equal(logits(0.5, True), logits(0.5, True))
    assert jnp.abs(logits(0.5, True) - logits(0.5, True, 1)).max() > 1e-3
    assert wrn16_2(dropout=0.3).dropout == wrn40_2(dropout=0.3).dropout == 0.3


def test_kernels_start_as_he_proposes():
    kernel = initial(WideResNet(1, 4), "stage2_block0", "conv1", "kernel")  # 64 to 128 channels
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 128)) ** 0.5, rtol=0.02)


@needs_torch
@pytest.mark.parametrize("module", [wrn16_2(100), WideResNet(1, 1)], ids=["wrn16_2", "first stage as wide as the stem"])
def test_equals_pytorch_at_rest_and_in_training(module):
    torch = torch_cifar()
    torch.assert_equal(module, torch.WideResNet(module.blocks, module.widen, module.num_classes))


def test_every_variable_has_a_name_in_pytorch():
    rules = wrn16_2().torch_rules()
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes(wrn16_2()))]
    names = [rename_back(path, rules).path for path in paths]
    assert None not in names and [rename(name, rules).path for name in names] == paths
    assert {"conv1.weight", "block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.running_var", "bn1.bias"} <= {
        *names
    }
    assert rename("block1.layer.0.bn1.num_batches_tracked", rules).path is None


@pytest.mark.parametrize(("shape", "match"), [((1, 3, 8, 3), "at least 4×4"), ((1, 8, 8, 1), "give the images 3")])
def test_wrong_images(shape, match):
    model, variables = from_linen(WideResNet(1, 1)), shapes(WideResNet(1, 1))
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.ones(shape))
