"""Tests of products, memory orders and conversions.

Products are compared with NumPy and their compiled programs are searched for copies. Conversions
are compared with PyTorch's definitions written in NumPy, and with results of PyTorch.
"""

import itertools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.layout import Format, Layout
from jax.test_util import check_grads

from jaxkd import layout

ORDERS = list(itertools.product(("row", "column"), repeat=3))


def draw(shape, seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def stored(matrix, order):
    return np.ascontiguousarray(matrix if order == "row" else np.swapaxes(matrix, -1, -2))


def product(orders, **options):
    """Returns `matmul` with the orders of its operands and its result bound."""
    return lambda lhs, rhs: layout.matmul(
        lhs, rhs, lhs_order=orders[0], rhs_order=orders[1], out_order=orders[2], **options
    )


# --- matmul ---


def test_value_worked_by_hand():
    lhs, rhs = jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 5.0], [4.0, 6.0]])
    # As rows [3 5] and [4 6]: 1·3 + 2·4 = 11, 1·5 + 2·6 = 17.
    # As columns [3 5] and [4 6]: 1·3 + 2·5 = 13, 1·4 + 2·6 = 16.
    np.testing.assert_array_equal(layout.matmul(lhs, rhs), [[11, 17]])
    np.testing.assert_array_equal(layout.matmul(lhs, rhs, rhs_order="column"), [[13, 16]])
    np.testing.assert_array_equal(layout.matmul(lhs, rhs, out_order="column"), [[11], [17]])
    np.testing.assert_array_equal(layout.matmul(lhs.T, rhs, lhs_order="column"), [[11, 17]])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("orders", ORDERS)
def test_equals_numpy(orders, batch):
    lhs, rhs = draw((*batch, 5, 7)), draw((*batch, 7, 4), seed=1)
    out = product(orders)(
        stored(lhs, orders[0]).astype(np.float32), stored(rhs, orders[1]).astype(np.float32)
    )
    np.testing.assert_allclose(out, stored(lhs @ rhs, orders[2]), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(0, 6)] * 3), st.sampled_from(ORDERS), st.integers(0, 99))
def test_every_size_has_the_shape_and_values_of_numpy(sizes, orders, seed):
    n, k, m = sizes
    lhs, rhs = (np.round(9 * draw(shape, seed)).astype(np.int32) for shape in ((n, k), (k, m)))
    out = product(orders)(stored(lhs, orders[0]), stored(rhs, orders[1]))
    np.testing.assert_array_equal(out, stored(lhs @ rhs, orders[2]), strict=True)


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(np.float32, 1e-5), (jnp.bfloat16, 2e-2), (np.float16, 2e-3), (np.int32, 0), (np.int8, 0)],
)
@pytest.mark.parametrize("orders", ORDERS)
def test_dtypes(orders, dtype, rtol):
    lhs, rhs = np.round(4 * draw((6, 8))), np.round(4 * draw((8, 3), seed=1))
    operands = [
        jnp.asarray(stored(matrix, order), dtype)
        for matrix, order in zip((lhs, rhs), orders[:2], strict=True)
    ]
    wide = np.float32 if jnp.issubdtype(dtype, jnp.floating) else np.int32
    out = product(orders, preferred_element_type=wide)(*operands)
    assert out.dtype == wide
    # Sums of small integers are exact.
    np.testing.assert_array_equal(out, stored(lhs @ rhs, orders[2]))
    if dtype == np.int8:
        return
    out = product(orders)(*operands)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), stored(lhs @ rhs, orders[2]), rtol=rtol)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16])
def test_products_of_narrow_integers_need_a_dtype(dtype):
    ones = np.full((1, 4), 100, dtype)
    with pytest.raises(TypeError, match=f"{np.dtype(dtype)} would wrap around: pass preferred"):
        layout.matmul(ones, ones, rhs_order="column")
    out = layout.matmul(ones, ones, rhs_order="column", preferred_element_type=np.int32)
    np.testing.assert_array_equal(out, [[40_000]])


def test_float64_stays():
    lhs, rhs = draw((5, 7)), draw((4, 7), seed=1)
    with jax.experimental.enable_x64() if not hasattr(jax, "enable_x64") else jax.enable_x64(True):
        out = layout.matmul(lhs, rhs, rhs_order="column")
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, lhs @ rhs.T, rtol=1e-14)


@pytest.mark.parametrize("precision", ["default", "highest", jax.lax.Precision.HIGH])
def test_precision_reaches_the_product(precision):
    options = {"precision": precision, "preferred_element_type": np.float32}
    lhs, rhs = jnp.ones((2, 3)), jnp.ones((3, 4))
    (equation,) = jax.make_jaxpr(product(("row",) * 3, **options))(lhs, rhs).eqns
    expected = jax.lax.Precision(precision)
    assert equation.params["precision"] in (expected, (expected, expected))
    assert equation.params["preferred_element_type"] == np.float32


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("orders", ORDERS)
def test_gradients(orders, batch):
    lhs = draw((*batch, 4, 3))
    rhs = draw((*batch, 3, 2), seed=1)
    weight = draw((*batch, 4, 2), seed=2)
    operands = [
        jnp.asarray(stored(matrix, order), np.float32)
        for matrix, order in zip((lhs, rhs), orders[:2], strict=True)
    ]
    check_grads(product(orders), operands, order=2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)
    cotangent = jnp.asarray(stored(weight, orders[2]), np.float32)
    _, pullback = jax.vjp(product(orders), *operands)
    expected = weight @ np.swapaxes(rhs, -1, -2), np.swapaxes(lhs, -1, -2) @ weight
    for gradient, value, order in zip(pullback(cotangent), expected, orders[:2], strict=True):
        np.testing.assert_allclose(gradient, stored(value, order), rtol=1e-5, atol=1e-5)


def compiled_operations(function, *shapes):
    """Returns the operations of the compiled program, including those within its fusions."""
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    text = jax.jit(function).lower(*arrays).compile().as_text()
    return re.findall(r"= \S+ ([a-z][a-z0-9-]*)\(", text)


def assert_copies_nothing(operations, dots=1):
    copies = {"transpose", "copy", "copy-start", "custom-call", "broadcast", "concatenate", "pad"}
    assert operations.count("dot") == dots, operations
    assert not copies & {*operations}, operations


@pytest.mark.parametrize("sizes", [(64, 48, 32), (517, 389, 1031)])
@pytest.mark.parametrize("orders", ORDERS)
def test_compiled_program_transposes_and_copies_nothing(orders, sizes):
    n, k, m = sizes
    lhs = (n, k) if orders[0] == "row" else (k, n)
    rhs = (k, m) if orders[1] == "row" else (m, k)
    assert_copies_nothing(compiled_operations(product(orders), lhs, rhs))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("orders", ORDERS)
def test_compiled_gradients_transpose_and_copy_nothing(orders, batch):
    lhs, rhs, out = (
        (*batch, *(shape if order == "row" else shape[::-1]))
        for shape, order in zip(((64, 48), (48, 32), (64, 32)), orders, strict=True)
    )
    assert_copies_nothing(compiled_operations(product(orders), lhs, rhs))
    operations = compiled_operations(
        lambda lhs, rhs, out: jax.vjp(product(orders), lhs, rhs)[1](out), lhs, rhs, out
    )
    assert_copies_nothing(operations, dots=2)


def test_compiled_operations_include_a_transpose():
    """Makes sure that the tests that search for copies can fail."""
    operations = compiled_operations(
        lambda lhs, rhs: jnp.einsum("bkn,km->bnm", lhs, rhs), (4, 48, 64), (48, 32)
    )
    assert {"transpose", "copy"} & {*operations}


@pytest.mark.parametrize("weight_order", ["row", "column"])
@pytest.mark.parametrize("batch", [(4,), (2, 3)])
def test_single_matrix_serves_a_stack_without_a_copy(batch, weight_order):
    stack, weight = draw((*batch, 5, 7), dtype=np.float32), draw((7, 6), seed=1, dtype=np.float32)
    orders = ("row", weight_order, "row")
    out = product(orders)(stack, stored(weight, weight_order))
    np.testing.assert_allclose(out, stack @ weight, rtol=1e-5, atol=1e-5)
    assert_copies_nothing(
        compiled_operations(product(orders), stack.shape, stored(weight, weight_order).shape)
    )

    mirrored = (weight_order, "column", "column")  # (stack @ weight)ᵀ = weightᵀ @ stackᵀ
    transposed = stored(weight.T, weight_order)
    out = product(mirrored)(transposed, stack)
    np.testing.assert_allclose(out, stack @ weight, rtol=1e-5, atol=1e-5)
    assert_copies_nothing(compiled_operations(product(mirrored), transposed.shape, stack.shape))


@pytest.mark.parametrize(
    "orders", [orders for orders in ORDERS if orders[0] != "row" or orders[2] != "row"]
)
def test_single_matrix_that_needs_a_copy_raises(orders):
    with pytest.raises(ValueError, match=r"\(2, 5, 5\).*broadcast_to"):
        product(orders)(jnp.ones((2, 5, 5)), jnp.ones((5, 5)))


def test_vmap_and_jit_equal_a_loop():
    lhs, rhs = draw((3, 7, 5), dtype=np.float32), draw((3, 4, 7), seed=1, dtype=np.float32)
    multiply = product(("column", "column", "column"))
    looped = [multiply(*matrices) for matrices in zip(lhs, rhs, strict=True)]
    chex.assert_trees_all_close(jax.jit(jax.vmap(multiply))(lhs, rhs), np.stack(looped))


@pytest.mark.parametrize(
    ("lhs", "rhs", "options", "match"),
    [
        (
            (2, 3),
            (4, 5),
            {},
            r"\(2, 3\) in row order has 3 columns, but rhs \(4, 5\) in row order has 4 rows",
        ),
        ((2, 3), (3, 2), {"lhs_order": "column"}, "has 2 columns, .* has 3 rows"),
        ((3,), (3, 2), {}, "at least 2 axes"),
        ((2, 4, 3), (5, 3, 2), {}, r"leading axes of \(2, 4, 3\) and \(5, 3, 2\) differ"),
        ((2, 3), (3, 2), {"out_order": "rows"}, "out_order .* 'rows'"),
        ((2, 3), (3, 2), {"rhs_order": None}, "rhs_order .* None"),
    ],
)
def test_wrong_operands_raise(lhs, rhs, options, match):
    with pytest.raises(ValueError, match=match):
        layout.matmul(jnp.ones(lhs), jnp.ones(rhs), **options)


def test_different_dtypes_raise():
    with pytest.raises(TypeError, match="float32 and int32: cast"):
        layout.matmul(jnp.ones((2, 3)), jnp.ones((3, 2), jnp.int32))


# --- memory orders ---

MAKERS = {"numpy": np.asarray, "jax": jnp.asarray}


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_as_order_changes_the_memory_and_keeps_the_values(make, shape):
    array = make(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    assert layout.order_of(array) == "row"
    column = layout.as_order(array, "column")
    assert type(column) is type(array) and column.dtype == array.dtype
    np.testing.assert_array_equal(column, array, strict=True)
    assert layout.order_of(column) == "column"
    row = layout.as_order(column, "row")
    assert layout.order_of(row) == "row"
    np.testing.assert_array_equal(row, array, strict=True)
    # The bytes in memory are the rows of the transpose.
    assert (
        np.asarray(column).ravel("K").tolist()
        == np.swapaxes(np.asarray(array), -1, -2).ravel().tolist()
    )


def test_numpy_array_in_the_order_is_not_copied():
    array = np.ones((3, 4))
    assert layout.as_order(array, "row") is array
    assert np.shares_memory(layout.as_order(array.T, "column"), array)
    # The transpose of an array in column order is a view in row order.
    assert layout.order_of(layout.as_order(array, "column").T) == "row"


def test_jax_array_keeps_its_devices():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    array = jax.device_put(jnp.arange(32.0).reshape(8, 4), sharding)
    column = layout.as_order(array, "column")
    assert column.sharding == sharding and layout.order_of(column) == "column"
    np.testing.assert_array_equal(column, array)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (3, 1, 5), (0, 4), (2, 0)])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_arrays_in_both_orders_are_in_row_order(make, shape):
    for order in ("row", "column"):
        assert layout.order_of(layout.as_order(make(np.ones(shape, np.float32)), order)) == "row"


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, ::2], lambda x: x[::-1], lambda x: x[:, :1], lambda x: x.reshape(2, 3, 4).T],
)
def test_arrays_with_gaps_are_in_neither_order(view):
    array = view(np.arange(24.0).reshape(6, 4))
    with pytest.raises(ValueError, match=r"strides .*as_order"):
        layout.order_of(array)
    for order in ("row", "column"):
        contiguous = layout.as_order(array, order)
        np.testing.assert_array_equal(contiguous, array)
        assert layout.order_of(contiguous) == (order if min(array.shape[-2:]) > 1 else "row")


def test_arrays_with_leading_axes_last_are_in_neither_order():
    array = jnp.arange(24.0).reshape(2, 3, 4)
    batch_last = jax.device_put(array, Format(Layout((1, 2, 0)), array.sharding))
    with pytest.raises(ValueError, match=r"axes \(1, 2, 0\) from major to minor"):
        layout.order_of(batch_last)
    assert layout.order_of(layout.as_order(batch_last, "column")) == "column"


@pytest.mark.parametrize(
    "function", [layout.order_of, lambda array: layout.as_order(array, "column")]
)
def test_orders_need_an_array_in_memory(function):
    with pytest.raises(TypeError, match="inside jit the compiler"):
        jax.jit(function)(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="NumPy or JAX array, got list"):
        function([[1.0]])
    with pytest.raises(ValueError, match=r"2 axes, got \(3,\)"):
        function(np.ones(3))
    with pytest.raises(ValueError, match="order .* 'C'"):
        layout.as_order(np.ones((2, 3)), "C")


def test_column_memory_gives_the_same_product():
    lhs, rhs = draw((5, 7), dtype=np.float32), draw((7, 4), seed=1, dtype=np.float32)
    out = layout.matmul(
        layout.as_order(jnp.asarray(lhs), "column"), layout.as_order(jnp.asarray(rhs), "column")
    )
    np.testing.assert_allclose(out, lhs @ rhs, rtol=1e-5, atol=1e-6)


# --- PyTorch's operations in NumPy, written from its documentation ---


def torch_conv(x, weight, *, stride=1, padding=0, dilation=1, groups=1):
    """Convolves x [C, *spatial] with weight [O, C / groups, *kernel]."""
    x = np.pad(x, [(0, 0), *[(padding, padding)] * (x.ndim - 1)])
    kernel, per_group = weight.shape[2:], weight.shape[1]
    spatial = [
        (n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[1:], kernel, strict=True)
    ]
    out = np.zeros((len(weight), *spatial))
    for o, *at in np.ndindex(out.shape):
        for c, *k in np.ndindex(weight.shape[1:]):
            channel = o // (len(weight) // groups) * per_group + c
            where = tuple(stride * a + dilation * b for a, b in zip(at, k, strict=True))
            out[o, *at] += weight[o, c, *k] * x[channel, *where]
    return out


def torch_conv_transpose(x, weight, *, stride=1, padding=0, output_padding=0, dilation=1):
    """Adds a multiple of the kernel to the output for every input.

    x is [C, *spatial] and weight [C, O, *kernel].
    """
    spatial = [
        (n - 1) * stride + dilation * (k - 1) + output_padding + 1
        for n, k in zip(x.shape[1:], weight.shape[2:], strict=True)
    ]
    out = np.zeros((weight.shape[1], *spatial))
    for c, *at in np.ndindex(x.shape):
        for o, *k in np.ndindex(weight.shape[1:]):
            out[o, *(stride * a + dilation * b for a, b in zip(at, k, strict=True))] += (
                x[c, *at] * weight[c, o, *k]
            )
    return out[:, *[slice(padding, n - padding) for n in spatial]]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def torch_lstm(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    i, f, g, o = np.split(x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def torch_gru(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    r_i, z_i, n_i = np.split(x @ weight_ih.T + bias_ih, 3, axis=-1)
    r_h, z_h, n_h = np.split(h @ weight_hh.T + bias_hh, 3, axis=-1)
    z, n = sigmoid(z_i + z_h), np.tanh(n_i + sigmoid(r_i + r_h) * n_h)
    return (1 - z) * n + z * h


def torch_rnn(x, h, weight_ih, weight_hh, bias_ih, bias_hh):
    return np.tanh(x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh)


def torch_attention(query, memory, num_heads, in_proj_weight, in_proj_bias, out_weight, out_bias):
    """Attends from query [N, E] to memory [M, E]."""
    projected = (
        x @ w.T + b
        for x, w, b in zip(
            (query, memory, memory),
            np.split(in_proj_weight, 3),
            np.split(in_proj_bias, 3),
            strict=True,
        )
    )
    heads = []
    for q, k, v in zip(*(np.split(x, num_heads, axis=-1) for x in projected), strict=True):
        scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    return np.concatenate(heads, axis=-1) @ out_weight.T + out_bias


def wave(*shape):
    """Returns sin 0, sin 1, sin 2, ..., which is easy to reproduce in PyTorch."""
    return np.sin(np.arange(np.prod(shape), dtype=np.float64)).reshape(shape)


# Results of torch 2.13.0 in float64 for the weights below.
TORCH = {
    "depth-wise": [
        [[0.0, 1.417174], [-0.1826, -0.012688]],
        [[0.0, 1.528851], [-0.140192, 0.313887]],
        [[0.222672, -1.005788], [-0.140291, 0.372642]],
        [[0.328009, -1.094124], [0.027668, 0.342555]],
    ],
    "transposed": [
        [
            [-0.690976, -0.405922, -0.263739, -0.042323],
            [-0.358805, 0.763155, 0.403029, 0.354961],
            [0.405979, 1.073505, 0.702442, 0.441208],
            [0.4521, 0.998029, 0.74169, 0.453549],
        ]
    ],
    "LSTM": [[-0.400314, -0.528492], [-0.008445, -0.742981]],
    "GRU": [[0.99377, -0.021763], [0.43408, 0.914145]],
    "RNN": [[0.992316, 0.969845], [-0.409268, 0.999938]],
    "attention": [
        [-0.051491, -0.723199, 0.126418, -0.150605],
        [-0.094334, -0.733843, 0.160624, -0.20723],
    ],
}


# --- conversions ---


def apply(module, params, *inputs):
    """Applies a Flax module to converted weights, after a check of their names and shapes."""
    inputs = [jnp.asarray(value, np.float32) for value in inputs]
    params = jax.tree.map(lambda value: jnp.asarray(value, np.float32), params)
    expected = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    chex.assert_trees_all_equal_shapes(params, expected)
    return module.apply({"params": params}, *inputs)


def channels_last(x):
    """Moves the channels from the first axis to the last."""
    return np.moveaxis(np.asarray(x), 0, -1)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)


def test_dense():
    x, weight, bias = draw((2, 3)), draw((4, 3), 1), draw(4, 2)
    out = apply(nn.Dense(4), {"kernel": layout.DENSE.to_flax(weight), "bias": bias}, x)
    assert_close(out, x @ weight.T + bias)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 1},
        {"groups": 1, "stride": 2, "padding": 1, "dilation": 2},
        {"groups": 2, "padding": 1},
        {"groups": 4, "stride": 2},
    ],
    ids=["plain", "strided", "grouped", "depth-wise"],
)
def test_convolution(rank, options):
    x = draw((4, *(6, 7, 5)[:rank]))
    weight = draw((8, 4 // options["groups"], *(3, 2, 2)[:rank]), 1)
    module = nn.Conv(
        8,
        weight.shape[2:],
        strides=options.get("stride", 1),
        padding=options.get("padding", 0),
        kernel_dilation=options.get("dilation", 1),
        feature_group_count=options["groups"],
        use_bias=False,
    )
    out = apply(module, {"kernel": layout.CONV.to_flax(weight)}, channels_last(x)[None])
    assert_close(out[0], channels_last(torch_conv(x, weight, **options)))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"stride": 3, "padding": 2, "dilation": 2},
    ],
    ids=["plain", "strided", "dilated"],
)
def test_transposed_convolution(rank, options):
    x = draw((3, *(4, 3, 2)[:rank]))
    weight = draw((3, 2, *(3, 4, 2)[:rank]), 1)
    dilation = options.get("dilation", 1)
    p = options.get("padding", 0)
    q = options.get("output_padding", 0)
    arguments = {
        "features": 2,
        "kernel_size": weight.shape[2:],
        "strides": (options.get("stride", 1),) * rank,
        "padding": [(dilation * (k - 1) - p, dilation * (k - 1) - p + q) for k in weight.shape[2:]],
        "kernel_dilation": (dilation,) * rank,
        "use_bias": False,
    }
    expected = channels_last(torch_conv_transpose(x, weight, **options))
    inputs = channels_last(x)[None]
    kernel = layout.CONV_TRANSPOSE.to_flax(weight)
    assert_close(apply(nn.ConvTranspose(**arguments), {"kernel": kernel}, inputs)[0], expected)
    # With transpose_kernel=True, Flax reads the kernel as PyTorch does, without the flip.
    module = nn.ConvTranspose(**arguments, transpose_kernel=True)
    kernel = layout.Rearrangement("i o ...", "... o i").to_flax(weight)
    assert_close(apply(module, {"kernel": kernel}, inputs)[0], expected)


def test_convolutions_equal_those_of_torch():
    weight = np.cos(wave(4, 1, 2, 2))
    module = nn.Conv(4, (2, 2), strides=2, padding=1, feature_group_count=2, use_bias=False)
    out = apply(module, {"kernel": layout.CONV.to_flax(weight)}, channels_last(wave(2, 3, 3))[None])
    assert_close(out[0], channels_last(TORCH["depth-wise"]))
    weight = np.cos(wave(2, 1, 3, 3))
    module = nn.ConvTranspose(1, (3, 3), strides=(2, 2), padding=[(1, 2)] * 2, use_bias=False)
    out = apply(
        module,
        {"kernel": layout.CONV_TRANSPOSE.to_flax(weight)},
        channels_last(wave(2, 2, 2))[None],
    )
    assert_close(out[0], channels_last(TORCH["transposed"]))


@pytest.mark.parametrize("spatial", [(5,), (3, 5), (2, 3, 4)])
def test_dense_after_a_flatten(spatial):
    x, weight = draw((4, *spatial)), draw((6, 4 * np.prod(spatial)), 1)
    kernel = layout.flattened_dense(channels=4).to_flax(weight)
    assert_close(
        apply(nn.Dense(6, use_bias=False), {"kernel": kernel}, channels_last(x).reshape(1, -1))[0],
        weight @ x.ravel(),
    )


def cell_weights(gates):
    """Returns the weights of a PyTorch cell with 3 inputs, 2 hidden units and `gates` gates."""
    return {
        "weight_ih": wave(2 * gates, 3),
        "weight_hh": np.cos(wave(2 * gates, 2)),
        "bias_ih": wave(2 * gates) + 0.1,
        "bias_hh": 2 * wave(2 * gates) - 0.3,
    }


STATE = {"x": wave(2, 3), "h": np.cos(wave(2, 2)), "c": wave(2, 2) - 0.5}
CELLS = {"LSTM": (layout.LSTM, 4), "GRU": (layout.GRU, 3), "RNN": (layout.RNN, 1)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell])
def test_lstm(cell, bias):
    weights = cell_weights(4)
    x, h, c = STATE.values()
    if not bias:
        weights |= {"bias_ih": np.zeros(8), "bias_hh": np.zeros(8)}
    inputs = {name: value for name, value in weights.items() if bias or name.startswith("weight")}
    (new_c, new_h), out = apply(cell(2), layout.LSTM.to_flax(inputs), (c, h), x)
    expected = torch_lstm(x, h, c, **weights)
    assert_close(out, expected[0])
    assert_close((new_h, new_c), expected)
    if bias:
        assert_close(new_h, TORCH["LSTM"])


@pytest.mark.parametrize(
    ("name", "cell", "reference"),
    [("GRU", nn.GRUCell, torch_gru), ("RNN", nn.SimpleCell, torch_rnn)],
)
def test_gru_and_simple_cell(name, cell, reference):
    conversion, gates = CELLS[name]
    x, h, _ = STATE.values()
    weights = cell_weights(gates)
    new, out = apply(cell(2), conversion.to_flax(weights), h, x)
    assert_close(out, reference(x, h, **weights))
    assert_close(new, TORCH[name])
    without_bias = {name: value for name, value in weights.items() if name.startswith("weight")}
    zeros = {name: 0 * value for name, value in weights.items() if name.startswith("bias")}
    _, out = apply(cell(2), conversion.to_flax(without_bias), h, x)
    assert_close(out, reference(x, h, **without_bias, **zeros))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("name", CELLS)
def test_cells_round_trip(name, make):
    conversion, gates = CELLS[name]
    weights = {key: make(value.astype(np.float32)) for key, value in cell_weights(gates).items()}
    params = conversion.to_flax(weights)
    back = conversion.to_torch(params)
    assert {type(leaf) for leaf in jax.tree.leaves((params, back))} == {type(weights["weight_ih"])}
    for key in ("weight_ih", "weight_hh"):
        np.testing.assert_array_equal(back[key], weights[key], strict=True)
    np.testing.assert_array_equal(
        back["bias_ih"] + back["bias_hh"], weights["bias_ih"] + weights["bias_hh"]
    )
    chex.assert_trees_all_equal(conversion.to_flax(back), params)
    reference, states = {
        "LSTM": (torch_lstm, STATE.values()),
        "GRU": (torch_gru, list(STATE.values())[:2]),
        "RNN": (torch_rnn, list(STATE.values())[:2]),
    }[name]
    back, weights = jax.tree.map(np.asarray, (back, weights))
    assert_close(reference(*states, **back), reference(*states, **weights))


@pytest.mark.parametrize("cell", [layout.LSTM, layout.GRU, layout.RNN])
def test_every_missing_part_of_a_cell_is_named(cell):
    gates = len(cell.gates)
    weights = {"weight_ih": np.ones((gates * 2, 3)), "weight_hh": np.ones((gates * 2, 2))}
    params = cell.to_flax(weights)
    for layer, arrays in params.items():
        for name in arrays:
            rest = {key: value for key, value in arrays.items() if key != name}
            with pytest.raises(ValueError, match=rf"the layer {layer} .*missing: \['{name}'\]"):
                cell.to_torch({**params, layer: rest})


def test_wrong_names_and_shapes_of_a_cell_raise():
    weights = cell_weights(4)
    with pytest.raises(
        ValueError, match=r"missing: \['weight_ih'\], unexpected: \['weight_ih_l0'\]"
    ):
        layout.LSTM.to_flax({"weight_ih_l0": weights.pop("weight_ih"), **weights})
    with pytest.raises(ValueError, match="weight_ih must be .* G = 4 stacked gates"):
        layout.LSTM.to_flax(cell_weights(3))
    for name in cell_weights(4):
        with pytest.raises(ValueError, match="stacked gates|does not fit"):
            layout.LSTM.to_flax(cell_weights(4) | {name: wave(8)[None, None]})
    params = layout.GRU.to_flax(cell_weights(3))
    with pytest.raises(ValueError, match=r"missing: \['hf', .*unexpected: \['hn', 'hr', 'hz'"):
        layout.LSTM.to_torch(params)
    with pytest.raises(ValueError, match=r"layer hn .*missing: \['bias'\]"):
        layout.GRU.to_torch(params | {"hn": {"kernel": params["hn"]["kernel"]}})
    with pytest.raises(ValueError, match=r"layer hz .*unexpected: \['bias'\]"):
        layout.GRU.to_torch(params | {"hz": params["hn"]})
    with pytest.raises(ValueError, match="stacked gates"):
        layout.GRU.to_torch(params | {"hz": {"kernel": wave(2, 3)}})


@pytest.mark.parametrize("separate", [False, True])
def test_attention(separate):
    weight, bias = wave(12, 4), np.cos(wave(12))
    out_weight, out_bias = wave(4, 4) - 0.2, wave(4)
    query, memory = wave(2, 4), np.cos(wave(3, 4))
    if separate:
        projection = layout.attention_projection(num_heads=2)
        kernels = [projection.to_flax(part) for part in np.split(weight, 3)]
        biases = [projection.to_flax(part) for part in np.split(bias, 3)]
    else:
        kernels = layout.fused_qkv(num_heads=2).to_flax(weight)
        biases = layout.fused_qkv(num_heads=2).to_flax(bias)
    params = {
        name: {"kernel": kernels[i], "bias": biases[i]}
        for i, name in enumerate(("query", "key", "value"))
    }
    params["out"] = {
        "kernel": layout.attention_output(num_heads=2).to_flax(out_weight),
        "bias": out_bias,
    }
    out = apply(nn.MultiHeadDotProductAttention(num_heads=2), params, query, memory)
    assert_close(out, torch_attention(query, memory, 2, weight, bias, out_weight, out_bias))
    assert_close(out, TORCH["attention"])


CONVERSIONS = {
    "dense": (layout.DENSE, (4, 3)),
    "conv": (layout.CONV, (4, 3, 2, 5)),
    "transposed": (layout.CONV_TRANSPOSE, (4, 3, 2, 5)),
    "flattened": (layout.flattened_dense(channels=3), (4, 12)),
    "projection": (layout.attention_projection(num_heads=2), (6, 5)),
    "bias": (layout.attention_projection(num_heads=2), (6,)),
    "fused": (layout.fused_qkv(num_heads=2), (12, 5)),
    "output": (layout.attention_output(num_heads=2), (5, 6)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("conversion", "shape"), CONVERSIONS.values(), ids=CONVERSIONS)
def test_weights_round_trip(conversion, shape, make):
    array = make(np.arange(np.prod(shape), dtype=np.int32).reshape(shape))
    converted = conversion.to_flax(array)
    assert type(converted) is type(array)
    assert sorted(np.ravel(converted)) == list(range(array.size))
    assert not np.array_equal(converted, array) or array.ndim == 1
    np.testing.assert_array_equal(conversion.to_torch(converted), array, strict=True)
    np.testing.assert_array_equal(jax.jit(conversion.to_flax)(array), converted)


def test_dtypes_are_kept():
    for dtype in (np.float64, np.float16, jnp.bfloat16):
        assert layout.CONV.to_flax(np.zeros((2, 3, 1, 1), dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("conversion", "shape", "match"),
    [
        (layout.DENSE, (4, 3, 1), r"\(4, 3, 1\) does not fit the axes 'o i'"),
        (layout.CONV, (4,), r"\(4,\) does not fit"),
        (
            layout.flattened_dense(channels=5),
            (4, 12),
            r"\(4, 12\) does not fit the axes 'o \(c s\)', c = 5",
        ),
        (layout.attention_projection(num_heads=4), (6, 5), "h = 4"),
    ],
)
def test_shapes_that_do_not_fit_raise(conversion, shape, match):
    with pytest.raises(ValueError, match=match):
        conversion.to_flax(np.zeros(shape))


def test_shapes_that_do_not_fit_raise_in_to_torch():
    with pytest.raises(ValueError, match=r"\(5, 3, 4\) does not fit the axes '... h d', h = 2"):
        layout.attention_projection(num_heads=2).to_torch(np.zeros((5, 3, 4)))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"torch": "o i", "flax": "i p"}, "same names"),
        ({"torch": "o o", "flax": "o o"}, "each once"),
        ({"torch": "o (c s)", "flax": "(s c) o"}, "all but one"),
        ({"torch": "(o ...)", "flax": "... o"}, "not a pattern"),
        ({"torch": "o...", "flax": "o..."}, "'o...' is not a pattern"),
        ({"torch": "...o", "flax": "o ..."}, "'...o' is not a pattern"),
        ({"torch": "(o i)k", "flax": "o i k"}, "not a pattern"),
        ({"torch": "......", "flax": "......"}, "not a pattern"),
        ({"torch": "_0 ...", "flax": "... _0"}, "a name like _0 beside ..."),
        ({"torch": "o (c s", "flax": "(s c) o"}, "not a pattern"),
        ({"torch": "o i", "flax": "i o", "flip": "k"}, r"\['k'\] are not names"),
        ({"torch": "o i", "flax": "i o", "sizes": {"h": 2}}, r"\['h'\] are not names"),
        ({"torch": "o i", "flax": "i o", "sizes": {"o": 0}}, r"positive, got {'o': 0}"),
    ],
)
def test_malformed_patterns_raise(fields, match):
    with pytest.raises(ValueError, match=match):
        layout.Rearrangement(**fields)
