"""The formulations that stand for XLA's convolutions: equal values and gradients, and no branch in the program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from jaxkd.models.convolution import convolve, depthwise

LAYOUT = ("NHWC", "HWIO", "NHWC")


CASES = {"first_layer": (3, (3, 3)), "pointwise": (6, (1, 1)), "inner": (6, (3, 3)), "wide": (3, (7, 7))}
BY_PRODUCT = {"first_layer", "pointwise"}


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


def dense(inputs, kernel, strides, padding):
    return lax.conv_general_dilated(inputs, kernel, strides, padding, dimension_numbers=LAYOUT)


def convolved(inputs, kernel, strides, padding):
    more = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "precision": None, "feature_group_count": 1}
    return convolve(inputs, kernel, strides, padding, dimension_numbers=LAYOUT, **more)


def draw_case(name, dtype=np.float32):
    rng, (channels, size) = np.random.default_rng(0), CASES[name]
    return rng.normal(size=(2, 9, 8, channels)).astype(dtype), rng.normal(size=(*size, channels, 5)).astype(dtype)


def squares(function, strides=(1, 1), padding="SAME"):
    return lambda x, k: (function(x, k, strides, padding) ** 2).sum()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("strides", "padding"), [((1, 1), "VALID"), ((2, 2), "SAME"), ((2, 1), [(2, 1), (0, 2)])])
def test_convolve_equals_the_plain_convolution_and_its_gradients(name, strides, padding):
    arrays = draw_case(name)

    def both(function):
        gradient = jax.grad(squares(function, strides, padding), argnums=(0, 1))
        return jax.jit(lambda *arrays: (function(*arrays, strides, padding), gradient(*arrays)))(*arrays)

    chex.assert_trees_all_close(both(convolved), both(dense), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_convolve_has_derivatives_forward_and_of_second_order(name):
    arrays = draw_case(name)

    def derivatives(function):
        _, forward = jax.jvp(squares(function), arrays, arrays)
        second = jax.grad(lambda x, k: (jax.grad(squares(function))(x, k) ** 2).sum(), argnums=1)(*arrays)
        return forward, second

    chex.assert_trees_all_close(derivatives(convolved), derivatives(dense), rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_convolve_maps_over_a_population(name):
    inputs, kernel = draw_case(name)
    inputs, kernels = np.stack([inputs, inputs[::-1]]), np.stack([kernel, 2 * kernel])
    found = jax.vmap(jax.grad(squares(convolved), argnums=(0, 1)))(inputs, kernels)
    wanted = [jax.grad(squares(dense), argnums=(0, 1))(x, k) for x, k in zip(inputs, kernels, strict=True)]
    chex.assert_trees_all_close(found, jax.tree.map(lambda *each: jnp.stack(each), *wanted), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_convolve_keeps_16_bits(name):
    arrays = tuple(jnp.asarray(array, jnp.bfloat16) for array in draw_case(name))
    exact = dense(*(array.astype(jnp.float32) for array in arrays), (1, 1), "SAME")
    found = convolved(*arrays, (1, 1), "SAME")
    gradients = jax.grad(lambda x, k: convolved(x, k, (1, 1), "SAME").sum(), argnums=(0, 1))(*arrays)
    assert {found.dtype, *(gradient.dtype for gradient in gradients)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_close(found.astype(jnp.float32), exact, rtol=2e-2, atol=0.1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the formulations are for CPUs")
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_by_the_kernel_is_a_product_where_patches_are_short(name):
    arrays = draw_case(name)
    _, pull = jax.vjp(lambda k: convolved(arrays[0], k, (1, 1), "SAME"), arrays[1])
    program = jax.jit(pull).lower(np.ones((2, 9, 8, 5), np.float32)).compile().as_text()
    assert "conditional(" not in program
    assert ("convolution(" not in program) == (name in BY_PRODUCT)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the formulations are for CPUs")
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA of older versions computes it again all the same")
def test_what_is_before_a_convolution_is_computed_once_on_a_cpu():
    def block(function):
        return jax.jit(jax.grad(lambda x, k: (function(jnp.maximum(x, 0), k, (1, 1), "SAME") ** 2).sum(), argnums=1))

    counts = []
    for function in (convolved, dense):
        program = block(function).lower(*draw_case("inner")).compile().as_text()
        counts.append(program.count(" maximum("))
    assert counts == [1, 2]


def test_one_exported_program_holds_the_formulation_of_each_platform():
    inputs, kernel = draw_case("pointwise")
    exported = export.export(jax.jit(lambda x, k: convolved(x, k, (1, 1), "SAME")), platforms=("cpu", "cuda", "tpu"))
    program = exported(inputs, kernel)
    assert "stablehlo.convolution" in program.mlir_module() and "stablehlo.dot_general" in program.mlir_module()
    chex.assert_trees_all_close(
        program.call(inputs, kernel), dense(inputs, kernel, (1, 1), "SAME"), rtol=1e-5, atol=1e-5
    )
