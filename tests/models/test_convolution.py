"""Formulations of convolutions: equal values and gradients, and no branch in the program."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jaxkd.models.cnn import max_pool
from jaxkd.models.convolution import Conv, convolve, depthwise_convolve

LAYOUT = ("NHWC", "HWIO", "NHWC")

# Channels and size of the kernel.
CASES = {
    "first_layer": (3, (3, 3)),
    "pointwise": (6, (1, 1)),
    "inner": (6, (3, 3)),
    "wide": (3, (7, 7)),
}
WITH_PATCH_PRODUCT = {"first_layer", "pointwise"}


def reference_depthwise(inputs, kernel, strides, padding):
    return lax.conv_general_dilated(
        inputs,
        kernel,
        strides,
        padding,
        dimension_numbers=LAYOUT,
        feature_group_count=inputs.shape[-1],
    )


def depthwise(inputs, kernel, strides, padding):
    keywords = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "precision": None}
    return depthwise_convolve(
        inputs,
        kernel,
        strides,
        padding,
        dimension_numbers=LAYOUT,
        feature_group_count=inputs.shape[-1],
        **keywords,
    )


def draw(shape, size, dtype=np.float32):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=shape).astype(dtype)
    kernel = rng.normal(size=(*size, 1, shape[-1])).astype(dtype)
    return inputs, kernel


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(2, 7, 9, 3), (1, 8, 8, 4), (2, 3, 3, 1)])
@pytest.mark.parametrize("size", [(3, 3), (5, 5), (1, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", [(2, 2), (2, 1)]])
def test_equals_the_plain_convolution(shape, size, strides, padding):
    inputs, kernel = draw(shape, size)
    actual = depthwise(inputs, kernel, strides, padding)
    expected = reference_depthwise(inputs, kernel, strides, padding)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_equals_the_plain_gradients():
    inputs, kernel = draw((2, 7, 9, 3), (3, 3))

    def gradients(function):
        return jax.jit(
            jax.grad(lambda x, k: (function(x, k, (2, 2), "SAME") ** 2).sum(), argnums=(0, 1))
        )

    actual = gradients(depthwise)(inputs, kernel)
    expected = gradients(reference_depthwise)(inputs, kernel)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_16_bit_numbers_are_summed_in_float32():
    inputs, kernel = (jnp.asarray(array, jnp.bfloat16) for array in draw((1, 9, 9, 8), (5, 5)))
    exact = reference_depthwise(
        inputs.astype(jnp.float32), kernel.astype(jnp.float32), (1, 1), "SAME"
    )
    actual = depthwise(inputs, kernel, (1, 1), "SAME")
    assert actual.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(actual, exact.astype(jnp.bfloat16))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the sum of shifts is for CPUs")
def test_the_program_has_neither_a_branch_nor_a_grouped_convolution():
    inputs, kernel = draw((2, 8, 8, 4), (3, 3))
    step = jax.grad(lambda x, k: (depthwise(x, k, (1, 1), "SAME") ** 2).sum(), argnums=(0, 1))
    program = jax.jit(step).lower(inputs, kernel).compile().as_text()
    assert "conditional(" not in program and "convolution(" not in program


def test_depthwise_under_vmap():
    inputs, kernel = draw((3, 2, 6, 6, 2), (3, 3))
    kernels = jnp.stack([kernel, 2 * kernel, 3 * kernel])
    actual = jax.vmap(lambda x, k: depthwise(x, k, (1, 1), "SAME"))(inputs, kernels)
    expected = [
        reference_depthwise(x, k, (1, 1), "SAME") for x, k in zip(inputs, kernels, strict=True)
    ]
    chex.assert_trees_all_close(actual, jnp.stack(expected), rtol=1e-5, atol=1e-5)


def reference(inputs, kernel, strides, padding):
    return lax.conv_general_dilated(inputs, kernel, strides, padding, dimension_numbers=LAYOUT)


def convolved(inputs, kernel, strides, padding):
    keywords = {
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "precision": None,
        "feature_group_count": 1,
    }
    return convolve(inputs, kernel, strides, padding, dimension_numbers=LAYOUT, **keywords)


def draw_case(name, dtype=np.float32):
    rng = np.random.default_rng(0)
    channels, size = CASES[name]
    inputs = rng.normal(size=(2, 9, 8, channels)).astype(dtype)
    kernel = rng.normal(size=(*size, channels, 5)).astype(dtype)
    return inputs, kernel


def squares(function, strides=(1, 1), padding="SAME"):
    return lambda x, k: (function(x, k, strides, padding) ** 2).sum()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("strides", "padding"), [((1, 1), "VALID"), ((2, 2), "SAME"), ((2, 1), [(2, 1), (0, 2)])]
)
def test_convolve_equals_the_plain_convolution_and_its_gradients(name, strides, padding):
    arrays = draw_case(name)

    def value_and_gradients(function):
        gradient = jax.grad(squares(function, strides, padding), argnums=(0, 1))
        return jax.jit(lambda *arrays: (function(*arrays, strides, padding), gradient(*arrays)))(
            *arrays
        )

    chex.assert_trees_all_close(
        value_and_gradients(convolved), value_and_gradients(reference), rtol=1e-4, atol=1e-3
    )


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_convolve_has_derivatives_forward_and_of_second_order(name):
    arrays = draw_case(name)

    def derivatives(function):
        _, forward = jax.jvp(squares(function), arrays, arrays)
        second = jax.grad(lambda x, k: (jax.grad(squares(function))(x, k) ** 2).sum(), argnums=1)(
            *arrays
        )
        return forward, second

    chex.assert_trees_all_close(derivatives(convolved), derivatives(reference), rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_convolve_under_vmap(name):
    inputs, kernel = draw_case(name)
    inputs = np.stack([inputs, inputs[::-1]])
    kernels = np.stack([kernel, 2 * kernel])
    actual = jax.vmap(jax.grad(squares(convolved), argnums=(0, 1)))(inputs, kernels)
    gradients = [
        jax.grad(squares(reference), argnums=(0, 1))(x, k)
        for x, k in zip(inputs, kernels, strict=True)
    ]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_convolve_keeps_16_bits(name):
    arrays = tuple(jnp.asarray(array, jnp.bfloat16) for array in draw_case(name))
    exact = reference(*(array.astype(jnp.float32) for array in arrays), (1, 1), "SAME")
    actual = convolved(*arrays, (1, 1), "SAME")
    gradients = jax.grad(lambda x, k: convolved(x, k, (1, 1), "SAME").sum(), argnums=(0, 1))(
        *arrays
    )
    assert {actual.dtype, *(gradient.dtype for gradient in gradients)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_close(actual.astype(jnp.float32), exact, rtol=2e-2, atol=0.1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the formulations are for CPUs")
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_by_the_kernel_is_a_product_where_patches_are_short(name):
    arrays = draw_case(name)
    _, pull_back = jax.vjp(lambda k: convolved(arrays[0], k, (1, 1), "SAME"), arrays[1])
    program = jax.jit(pull_back).lower(np.ones((2, 9, 8, 5), np.float32)).compile().as_text()
    assert "conditional(" not in program
    assert ("convolution(" not in program) == (name in WITH_PATCH_PRODUCT)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the formulations are for CPUs")
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="older versions of XLA compute it twice in any case"
)
def test_the_activation_before_a_convolution_is_computed_once_on_a_cpu():
    def block(function):
        return jax.jit(
            jax.grad(
                lambda x, k: (function(jnp.maximum(x, 0), k, (1, 1), "SAME") ** 2).sum(), argnums=1
            )
        )

    counts = []
    for function in (convolved, reference):
        program = block(function).lower(*draw_case("inner")).compile().as_text()
        counts.append(program.count(" maximum("))
    assert counts == [1, 2]


def test_one_exported_program_holds_the_formulation_of_each_platform():
    inputs, kernel = draw_case("pointwise")
    exported = export.export(
        jax.jit(lambda x, k: convolved(x, k, (1, 1), "SAME")), platforms=("cpu", "cuda", "tpu")
    )
    program = exported(inputs, kernel)
    assert (
        "stablehlo.convolution" in program.mlir_module()
        and "stablehlo.dot_general" in program.mlir_module()
    )
    chex.assert_trees_all_close(
        program.call(inputs, kernel),
        reference(inputs, kernel, (1, 1), "SAME"),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("reduce", ["max_pool", "mean"])
def test_bfloat16_is_right_where_a_reduction_follows_two_convolutions(reduce):
    """XLA of JAX 0.12.0 fuses these layers, and returns NaN or 1e38."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(Conv(32, (3, 3))(x))
            return max_pool(x) if reduce == "max_pool" else x.mean((1, 2))

    images = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    variables = Net().init(jax.random.key(1), images)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (variables, images))
    computed = jax.jit(Net().apply)(*narrow).astype(jnp.float32)
    np.testing.assert_allclose(computed, Net().apply(variables, images), rtol=0.1, atol=0.02)
