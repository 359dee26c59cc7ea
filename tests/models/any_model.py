"""Helpers to test any model: its shapes, size, names in PyTorch, and variables without `init`."""

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


def variable_shapes(module, shape=(1, 32, 32, 3)):
    """Returns the shapes of a module's variables."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(from_linen(module).init, jax.random.key(0), images)


def feature_shapes(module, shape, *, train):
    """Returns the shapes of the features and of the logits."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    apply = functools.partial(from_linen(module).apply, train=train)
    outputs, _ = jax.eval_shape(apply, variable_shapes(module, shape), images)
    return {name: feature.shape for name, feature in outputs.features.items()} | {
        "logits": outputs.logits.shape
    }


def count_parameters(module):
    """Returns the number of parameters of a module."""
    return sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(module)["params"]))


def torch_names(module):
    """Returns the names of the variables in PyTorch, after checking that each maps to its path."""
    rules = module.torch_rules()
    paths = [*leaves_by_path(variable_shapes(module))]
    names = [rename_back(path, rules).path for path in paths]
    assert None not in names and [rename(name, rules).path for name in names] == paths, names
    return {*names}


def draw_variables(module, size=8):
    """Draws variables without any default value, and images; `init` would compile for seconds."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
        variable_shapes(module, (1, size, size, 3)),
    )
    variables["batch_stats"] = jax.tree.map(
        lambda leaf: np.abs(leaf) + 0.5, variables["batch_stats"]
    )
    return variables, rng.normal(size=(2, size, size, 3)).astype(np.float32)


def initial_parameter(module, *names):
    """Returns one of the initial parameters; XLA removes the computation of all others."""
    images = jnp.zeros((1, 16, 16, 3))

    @jax.jit
    def init(key):
        params = from_linen(module).init(key, images)["params"]
        return functools.reduce(dict.__getitem__, names, params)

    return init(jax.random.key(0))
