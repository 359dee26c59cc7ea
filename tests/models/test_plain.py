"""The plain networks of the teacher-assistant paper: published sizes and PyTorch's numbers."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import from_linen
from jaxkd.models.plain import PlainCNN, plain2, plain4, plain6, plain8, plain10
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


@pytest.mark.parametrize(
    ("module", "parameters"),
    [(plain2(), 13_082), (plain4(), 37_338), (plain6(), 82_778), (plain8(), 327_962), (plain10(), 2_487_850)],
)
def test_parameters_as_published(module, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module)["params"])) == parameters


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (plain4(5), {"stage1": (2, 14, 13, 16), "stage2": (2, 7, 6, 32), "pre_logits": (2, 7 * 6 * 32)}),
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
    model, images = from_linen(module), jax.ShapeDtypeStruct((2, 28, 26, 1), jnp.float32)
    outputs, _ = jax.eval_shape(lambda v, x: model.apply(v, x, train=True), shapes(module, images.shape), images)
    assert {name: feature.shape for name, feature in outputs.features.items()} == expected
    assert outputs.logits.shape == (2, 5)


@pytest.mark.parametrize("hidden", [None, 6])
def test_last_feature_is_what_the_classifier_sees(hidden):
    module = PlainCNN(((3,), (4,)), hidden)
    variables, images = draw(module)
    (logits, named), _ = jax.jit(lambda x: from_linen(module).apply(variables, x, train=True))(images)
    assert min(feature.min() for feature in named.values()) == 0
    last = variables["params"]["logits"]
    np.testing.assert_allclose(logits, named["pre_logits"] @ last["kernel"] + last["bias"][None], rtol=1e-5, atol=1e-6)


def test_kernels_start_as_pytorch_does():
    for layer, fan_in in (("stage2_conv0", 9 * 16), ("hidden", 16 * 128)):
        kernel, bound = initial(PlainCNN(((16,), (128,)), 8), layer, "kernel"), fan_in**-0.5
        assert 0.99 * bound < jnp.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.02)


@needs_torch
@pytest.mark.parametrize("module", [plain4(), plain8(7)], ids=["plain4", "plain8"])
def test_equals_pytorch_at_rest_and_in_training(module):
    torch = torch_cifar()
    torch.assert_equal(module, torch.PlainCNN(module.stages, module.hidden, module.num_classes))


@pytest.mark.parametrize(
    ("module", "some"),
    [
        (plain6(), {"conv_layers.0.weight", "conv_layers.10.bias", "conv_layers.18.running_var", "fc_layers.0.weight"}),
        (plain10(), {"conv_layers.31.weight", "conv_layers.30.bias", "fc_layers.0.bias", "fc_layers.2.weight"}),
    ],
)
def test_every_variable_has_a_name_in_pytorch(module, some):
    rules = module.torch_rules()
    paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes(module))]
    names = [rename_back(path, rules).path for path in paths]
    assert None not in names and [rename(name, rules).path for name in names] == paths
    assert some <= {*names}
    assert rename("conv_layers.1.num_batches_tracked", rules).path is None


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 15, 32, 3), "at least 16×16"),
        ((1, 32, 32, 1), "give the images 3 channels"),
        ((1, 64, 32, 3), "another size than 64×32, which leave 1024 values .* instead of 512"),
    ],
)
def test_wrong_images(shape, match):
    model, variables = from_linen(plain8()), shapes(plain8())
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, jnp.ones(shape))
