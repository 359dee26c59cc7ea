"""Shape checks, pooling and convolutions of maps B H W C."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_shape, upcast, upcast_pair


def check_images(name: str, features: ArrayLike) -> Array:
    """Widens maps; raises `ValueError` if they are not `[B, H, W, C]`."""
    features = upcast(name, features)
    check_shape(features.ndim == 4, f"{name} must be [B, H, W, C], got {features.shape}")
    return features


def check_image_pair(
    names: tuple[str, str], first: ArrayLike, second: ArrayLike
) -> tuple[Array, Array]:
    """Returns two maps in one dtype; raises `ValueError` if more than their channels differ."""
    first = check_images(names[0], first)
    second = check_images(names[1], second)
    check_shape(
        first.shape[:3] == second.shape[:3],
        f"{names[0]} {first.shape} and {names[1]} {second.shape} must agree in all but their "
        "channels (the last axis); call pool_to on the larger maps first",
    )
    return upcast_pair(names, first, second)


def average_pool(array: Array, axis: int, size: int) -> Array:
    """Averages over the windows [⌊i n / size⌋, ⌈(i + 1) n / size⌉) of an axis of length n.

    The windows overlap where n is not a multiple of `size`.
    """
    length = array.shape[axis]
    if length == size:
        return array
    start = np.arange(size)[:, None] * length
    position = np.arange(length)[None]
    # Negating twice rounds the integer quotient up instead of down.
    in_window = (position >= start // size) & (position < -(-(start + length) // size))
    means = jnp.asarray(in_window / in_window.sum(1, keepdims=True), array.dtype)
    # Full precision, since a matrix product at default precision would round the features to
    # bfloat16 on TPU, which an average by sums does not.
    return jnp.moveaxis(jnp.tensordot(array, means, (axis, 1), precision="highest"), -1, axis)


def init_convolution(
    key: Array, in_features: int, out_features: int, *, size: int = 3, bias: bool = True
) -> dict[str, Array]:
    """Draws a LeCun normal kernel `[size, size, in, out]` and a zero bias `[out]`, float32."""
    kernel = jax.nn.initializers.lecun_normal()(
        key, (size, size, in_features, out_features), jnp.float32
    )
    return {"kernel": kernel} | ({"bias": jnp.zeros(out_features)} if bias else {})


def convolve(params: dict[str, Array], maps: Array) -> Array:
    """Applies a convolution of stride 1 that keeps the spatial size, with a bias if there is one.

    The channels must be the kernel's; callers check them, to name the argument.
    """
    maps, kernel = upcast_pair(("maps", "kernel"), maps, params["kernel"])
    convolved = jax.lax.conv_general_dilated(
        maps, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    if "bias" not in params:
        return convolved
    return convolved + jnp.broadcast_to(params["bias"].astype(convolved.dtype), convolved.shape)
