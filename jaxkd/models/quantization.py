"""Weights of a few bits: for training that knows of it, and for storing them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd.models.model import Inputs, Model, Outputs

_VALUES, _SCALE = "int8", "scale"
"""The two arrays in place of a weight that is stored in a few bits."""


def with_quantized_weights(model: Model, *, bits: int = 8) -> Model:
    """Makes a model compute with weights of a few bits, which it learns in float32.

    w → s round(w / s) with s = max |w| / (2^(bits − 1) − 1) for each output channel

    The gradient passes the rounding unchanged (straight-through), so that a student learns weights
    that are still good when they are rounded. Store them by `quantize_weights`. Biases, the
    parameters of normalisations and all other arrays of one axis stay as they are.

    Args:
        model: Any model.
        bits: From 2 to 8. All but the lowest negative number of so many bits are used.

    Returns:
        The model, with the same variables.

    Raises:
        ValueError: If the number of bits is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import models
        >>> model = models.from_linen(models.CNN(features=(4,), hidden=8))
        >>> images = jnp.ones((1, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> small = models.with_quantized_weights(model, bits=4)
        >>> stored = models.dequantize_weights(models.quantize_weights(variables, bits=4))
        >>> logits = [m.apply(v, images, train=False)[0].logits for m, v in (
        ...     (small, variables), (model, stored)
        ... )]
        >>> bool((logits[0] == logits[1]).all())
        True

    References:
        Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons for
        Conditional Computation, https://arxiv.org/abs/1308.3432
        Jacob et al., Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference, https://arxiv.org/abs/1712.05877
    """
    _check_bits(bits)

    def round_weight(path: tuple, weight: Array) -> Array:
        if not _is_quantized(weight):
            return weight
        rounded = _restore(*_quantize(path, weight, bits), weight.dtype)
        return weight + jax.lax.stop_gradient(rounded - weight)

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        params = jax.tree_util.tree_map_with_path(round_weight, variables["params"])
        return model.apply({**variables, "params": params}, inputs, train=train, key=key)

    # The network alone would have other weights.
    return model._replace(apply=apply, network=None)


def quantize_weights(variables: dict, *, bits: int = 8) -> dict:
    """Replaces each weight by whole numbers of 8 bits and a scale for each output channel.

    `weights.save_safetensors` stores the result, in about a quarter of the bytes.

    Args:
        variables: Variables of a model.
        bits: From 2 to 8, those of `with_quantized_weights`. Fewer take no less room, but compress
            better.

    Returns:
        The variables. Each array of at least two axes among the parameters is a dict of `int8`, of
        the same shape, and `scale`, float32, in its place.

    Raises:
        ValueError: If the number of bits is out of range, or a weight is NaN or infinite.

    Example:
        >>> import numpy as np
        >>> from jaxkd import models
        >>> variables = {"params": {"dense": {"kernel": np.float32([[1.0, 0.3], [-0.25, 0.2]])}}}
        >>> kernel = models.quantize_weights(variables)["params"]["dense"]["kernel"]
        >>> kernel["int8"].tolist(), kernel["scale"].shape
        ([[127, 127], [-32, 85]], (1, 2))
    """
    _check_bits(bits)

    def store(path: tuple, weight: Any) -> Any:
        if not _is_quantized(weight):
            return weight
        if not np.isfinite(weight).all():
            raise ValueError(
                f"{jax.tree_util.keystr(path)} holds NaN or infinity: quantize sound weights"
            )
        values, scale = _quantize(path, jnp.asarray(weight), bits)
        return {_VALUES: values.astype(jnp.int8), _SCALE: scale}

    return {**variables, "params": jax.tree_util.tree_map_with_path(store, variables["params"])}


def dequantize_weights(variables: dict) -> dict:
    """Makes float32 weights of those that `quantize_weights` stored.

    Args:
        variables: What `quantize_weights` returned, or `weights.load_safetensors` of it.

    Returns:
        The variables of the model: the weights with which `with_quantized_weights` computes.

    Example:
        >>> import numpy as np
        >>> from jaxkd import models
        >>> variables = {"params": {"dense": {"kernel": np.float32([[1.0, 0.3], [-0.25, 0.2]])}}}
        >>> restored = models.dequantize_weights(models.quantize_weights(variables))
        >>> print(restored["params"]["dense"]["kernel"])
        [[ 1.     0.3  ]
         [-0.252  0.201]]
    """

    def is_stored(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == {_VALUES, _SCALE}

    def restore(node: Any) -> Any:
        if not is_stored(node):
            return node
        values, scale = jnp.asarray(node[_VALUES]), jnp.asarray(node[_SCALE])
        return _restore(values.astype(scale.dtype), scale, scale.dtype)

    params = jax.tree.map(restore, variables["params"], is_leaf=is_stored)
    return {**variables, "params": params}


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"bits must be an integer from 2 to 8, got {bits!r:.40}")


def _is_quantized(weight: Any) -> bool:
    return np.ndim(weight) > 1 and jnp.issubdtype(weight.dtype, jnp.floating)


def _quantize(path: tuple, weight: Array, bits: int) -> tuple[Array, Array]:
    """Returns whole numbers as floats, and the scale of each output channel, in float32."""
    weight = weight.astype(jnp.float32)
    # An embedding has a row for each token; other weights have their outputs last.
    is_embedding = getattr(path[-1], "key", "") == "embedding"
    axis = 0 if is_embedding else weight.ndim - 1
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = jnp.abs(weight).max(others, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / jnp.float32(2 ** (bits - 1) - 1)
    return jnp.round(weight / scale), scale


def _restore(values: Array, scale: Array, dtype: Any) -> Array:
    return (values * scale).astype(dtype)
