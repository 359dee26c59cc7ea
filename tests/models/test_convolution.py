"""The formulations that stand for XLA's convolutions: equal values and gradients, and no branch in the program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxkd.models.convolution import depthwise

LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain(inputs, kernel, strides, padding):
    return lax.conv_general_dilated(
        inputs, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=inputs.shape[-1]
    )


def ours(inputs, kernel, strides, padding):
    more = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "precision": None}
    return depthwise(
        inputs, kernel, strides, padding, dimension_numbers=LAYOUT, feature_group_count=inputs.shape[-1], **more
    )


def draw(shape, size, dtype=np.float32):
    rng = np.random.default_rng(0)
    return rng.normal(size=shape).astype(dtype), rng.normal(size=(*size, 1, shape[-1])).astype(dtype)


@pytest.mark.parametrize("shape", [(2, 7, 9, 3), (1, 8, 8, 4), (2, 3, 3, 1)])
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (1, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", [(2, 2), (2, 1)]])
def test_equals_the_plain_convolution(shape, size, strides, padding):
    inputs, kernel = draw(shape, size)
    found, wanted = ours(inputs, kernel, strides, padding), plain(inputs, kernel, strides, padding)
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_equals_the_plain_gradients():
    inputs, kernel = draw((2, 7, 9, 3), (3, 3))

    def gradients(function):
        return jax.jit(jax.grad(lambda x, k: (function(x, k, (2, 2), "SAME") ** 2).sum(), argnums=(0, 1)))

    chex.assert_trees_all_close(gradients(ours)(inputs, kernel), gradients(plain)(inputs, kernel), rtol=1e-4, atol=1e-4)


def test_16_bit_numbers_are_summed_in_float32():
    inputs, kernel = (jnp.asarray(array, jnp.bfloat16) for array in draw((1, 9, 9, 8), (5, 5)))
    exact = plain(*(jnp.asarray(array, jnp.float32) for array in (inputs, kernel)), (1, 1), "SAME")
    found = ours(inputs, kernel, (1, 1), "SAME")
    assert found.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(found, exact.astype(jnp.bfloat16))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the sum of shifts is for CPUs")
def test_the_program_has_neither_a_branch_nor_a_grouped_convolution():
    inputs, kernel = draw((2, 8, 8, 4), (3, 3))
    step = jax.grad(lambda x, k: (ours(x, k, (1, 1), "SAME") ** 2).sum(), argnums=(0, 1))
    program = jax.jit(step).lower(inputs, kernel).compile().as_text()
    assert "conditional(" not in program and "convolution(" not in program


def test_maps_over_a_population():
    inputs, kernel = draw((3, 2, 6, 6, 2), (3, 3))
    kernels = jnp.stack([kernel, 2 * kernel, 3 * kernel])
    found = jax.vmap(lambda x, k: ours(x, k, (1, 1), "SAME"))(inputs, kernels)
    wanted = jnp.stack([plain(x, k, (1, 1), "SAME") for x, k in zip(inputs, kernels, strict=True)])
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)
