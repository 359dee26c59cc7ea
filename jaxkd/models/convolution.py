"""Convolutions in the formulation that the device runs fastest, equal in value to XLA's own."""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MAX_PATCH_SIZE = 32
"""Largest patch, in values, that a CPU multiplies as a matrix; 3×3 of three channels has 27.

Up to this size, the patches take no more memory than the outputs of a usual first layer.
"""

_ConvFn = Callable[[Array, Array], Array]


def convolve(
    inputs: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **keywords: Any,
) -> Array:
    """Convolves all channels with all, as `flax.linen.Conv` does, for its `conv_general_dilated`.

    On any platform other than a CPU, this is `lax.conv_general_dilated`. On a CPU, a 1×1 kernel
    becomes a matrix product, whose gradient with respect to the kernel takes a fifth of the time.
    Other kernels are convolved by XLA too, but differentiated in another form:

    - A first layer of few channels becomes a product of patches and weights, whose gradient takes
      half the time.
    - Any other layer is separated from its neighbours. Otherwise XLA fuses the normalisation and
      activation before it into the transposition with which the kernel's gradient begins, and so
      computes them twice. The gradients of ResNet-20 then take 1.5 times as long.

    16-bit outputs are separated from what follows, see `_without_fusion`.

    Args:
        inputs: `[B, H, W, C]`.
        kernel: `[h, w, C, K]`.
        strides: Vertical and horizontal stride.
        padding: "SAME", "VALID", or the padding before and after each axis.
        **keywords: Other arguments of `lax.conv_general_dilated`; no dilation, one group.

    Returns:
        `[B, H', W', K]`, in the inputs' dtype.
    """

    def xla_convolution(inputs: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(inputs, kernel, strides, padding, **keywords)

    def separated_convolution(inputs: Array, kernel: Array) -> Array:
        outputs = xla_convolution(lax.optimization_barrier(inputs), kernel)
        return _separate_cotangent(outputs)

    def patch_product(inputs: Array, kernel: Array) -> Array:
        windows = _shifted_windows(inputs, kernel.shape[:2], strides, padding)
        # Position by position, channels last: the order of the flattened kernel.
        patches = jnp.concatenate(list(windows), -1)
        rows = kernel.reshape(-1, kernel.shape[-1])
        return jnp.matmul(patches, rows, precision=keywords.get("precision"))

    if kernel.shape[:2] == (1, 1):
        cpu_convolution = patch_product
    else:
        patch_size = kernel.size // kernel.shape[-1]
        # Without derivatives, XLA's convolution needs neither patches nor barriers.
        differentiated = patch_product if patch_size <= MAX_PATCH_SIZE else separated_convolution
        cpu_convolution = _with_derivatives_of(differentiated, xla_convolution)
    # The branch is resolved in lowering, so that an exported program holds both formulations.
    return lax.platform_dependent(
        inputs, kernel, cpu=_without_fusion(cpu_convolution), default=xla_convolution
    )


Conv = functools.partial(nn.Conv, conv_general_dilated=convolve)
"""`flax.linen.Conv` that convolves by `convolve`."""


def depthwise_convolve(
    inputs: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **keywords: Any,
) -> Array:
    """Convolves each channel with its own kernel, for `conv_general_dilated` of `flax.linen.Conv`.

    On a CPU, XLA convolves group by group on one thread. There, this is a sum of shifted images,
    each multiplied by a row of weights, which XLA fuses: 20 to 60 times as fast, with gradients 3
    to 10 times as fast. On any other platform it is `lax.conv_general_dilated`.

    Args:
        inputs: `[B, H, W, C]`.
        kernel: `[h, w, 1, C]`.
        strides: Vertical and horizontal stride.
        padding: "SAME", "VALID", or the padding before and after each axis.
        **keywords: Other arguments of `lax.conv_general_dilated`; no dilation.

    Returns:
        `[B, H', W', C]`, in the inputs' dtype. 16-bit inputs are summed in float32.
    """

    def xla_convolution(inputs: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(inputs, kernel, strides, padding, **keywords)

    def cpu_convolution(inputs: Array, kernel: Array) -> Array:
        return _sum_shifted_windows(inputs, kernel, strides, padding)

    return lax.platform_dependent(inputs, kernel, cpu=cpu_convolution, default=xla_convolution)


def _sum_shifted_windows(
    inputs: Array, kernel: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]]
) -> Array:
    """Sums the shifted images, each multiplied by the weights `[1, 1, 1, C]` of its position."""
    size = kernel.shape[:2]
    # In bfloat16, every addition would round to 8 significant bits.
    dtype = jnp.float32 if inputs.dtype.itemsize < 4 else inputs.dtype
    weights = (kernel[i : i + 1, j : j + 1].astype(dtype) for i, j in np.ndindex(*size))
    windows = (window.astype(dtype) for window in _shifted_windows(inputs, size, strides, padding))
    products = map(operator.mul, windows, weights)
    return functools.reduce(operator.add, products).astype(inputs.dtype)


def _shifted_windows(
    inputs: Array,
    size: Sequence[int],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
) -> Iterator[Array]:
    """Yields the pixels `[B, H', W', C]` under each position of the kernel, row by row."""
    borders = (
        lax.padtype_to_pads(inputs.shape[1:3], size, strides, padding)
        if isinstance(padding, str)
        else padding
    )
    padded = jnp.pad(inputs, ((0, 0), *borders, (0, 0)))
    _, height, width, _ = padded.shape
    rows = height - size[0] + 1
    columns = width - size[1] + 1
    for i, j in np.ndindex(*size):
        yield padded[:, i : i + rows : strides[0], j : j + columns : strides[1]]


def _without_fusion(convolution: _ConvFn) -> _ConvFn:
    """Makes a convolution whose 16-bit outputs XLA does not fuse with what follows.

    On a CPU, JAX 0.12.0 computes conv – relu – conv – relu – max, mean or sum of bfloat16 as one
    fusion with a wrong result, NaN or up to 1e38. (Elsewhere,
    `--xla_cpu_experimental_ynn_fusion_type=-reduce` avoids it.) Fusions of float32 are right.
    """

    def separated(inputs: Array, kernel: Array) -> Array:
        outputs = convolution(inputs, kernel)
        return lax.optimization_barrier(outputs) if outputs.dtype.itemsize < 4 else outputs

    return separated


def _with_derivatives_of(differentiated: _ConvFn, evaluated: _ConvFn) -> _ConvFn:
    """Makes a convolution that evaluates one form and differentiates another, equal in value."""
    function = jax.custom_jvp(evaluated)
    function.defjvp(lambda primals, tangents: jax.jvp(differentiated, primals, tangents))
    return function


@jax.custom_jvp
def _separate_cotangent(outputs: Array) -> Array:
    """Returns the outputs; their cotangent is computed once, before the gradients that use it."""
    return outputs


# The barrier is on the tangent alone, so that reverse mode has it on the cotangent.
@_separate_cotangent.defjvp
def _separate_cotangent_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return primals[0], lax.optimization_barrier(tangents[0])
