"""What is asked of any model: its shapes, size and names in PyTorch, and variables without a long compilation."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import from_linen
from jaxkd.transfer import leaves_by_path, rename, rename_back

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")


def shapes(module, shape=(1, 32, 32, 3)):
    """The shapes of a module's variables."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(from_linen(module).init, jax.random.key(0), images)


def feature_shapes(module, shape, *, train):
    """The shapes of the features and of the logits."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    apply = functools.partial(from_linen(module).apply, train=train)
    outputs, _ = jax.eval_shape(apply, shapes(module, shape), images)
    return {name: feature.shape for name, feature in outputs.features.items()} | {"logits": outputs.logits.shape}


def count(module):
    """How many parameters a module has."""
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(module)["params"]))


def torch_names(module):
    """The names of the variables in PyTorch, each of which leads back to its path."""
    rules, paths = module.torch_rules(), [*leaves_by_path(shapes(module))]
    names = [rename_back(path, rules).path for path in paths]
    assert None not in names and [rename(name, rules).path for name in names] == paths, names
    return {*names}


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
