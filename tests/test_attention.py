"""Tests of attention and alignment.

They compare with values worked by hand, float64 references, Flax and limits, and check masks and
the memory that a compiled program needs.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.test_util import check_grads

from jaxkd import attention

CONTEXT_FUNCTIONS = {
    "attend": lambda *args, **kwargs: attention.attend(*args, **kwargs)[0],
    "attend_context": attention.attend_context,
}
parametrize_context = pytest.mark.parametrize(
    "context", CONTEXT_FUNCTIONS.values(), ids=CONTEXT_FUNCTIONS
)
SCORES = {
    "dot": attention.dot_score,
    "general": attention.general_score(attention.init_general_score(jax.random.key(7), 5, 5)),
    "additive": attention.additive_score(attention.init_additive_score(jax.random.key(8), 5, 5, 4)),
}
parametrize_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)


def draw(seed=0, batch=(2,), n=4, m=6, d=5, v=3, scale=1.0):
    random = np.random.default_rng(seed)
    shapes = (*batch, n, d), (*batch, m, d), (*batch, m, v)
    return tuple(
        jnp.asarray(scale * random.standard_normal(shape), jnp.float32) for shape in shapes
    )


def reference_softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def reference_attend(query, keys, values, scale=None, where=None):
    """Attends with one query at a time, over the keys that it may attend to."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    scale = 1 / np.sqrt(query.shape[-1]) if scale is None else scale
    weights = np.zeros((*query.shape[:-1], keys.shape[-2]))
    where = np.broadcast_to(True if where is None else where, weights.shape)
    for i in np.ndindex(query.shape[:-1]):
        allowed = np.flatnonzero(where[i])
        if len(allowed):
            weights[i][allowed] = reference_softmax(scale * keys[i[:-1]][allowed] @ query[i])
    return weights @ values, weights


def value_and_grads(function, *arrays):
    """Returns the values, and the gradients of a weighted sum of them.

    The weights differ, so that errors in two values cannot cancel.
    """

    def total(*arrays):
        leaves = jax.tree.leaves(function(*arrays))
        return sum(
            jnp.sum(jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x) for x in leaves
        )

    gradient = jax.grad(total, argnums=tuple(range(len(arrays))))
    return jax.jit(function)(*arrays), jax.jit(gradient)(*arrays)


def test_values_worked_by_hand():
    # Scores log 3 and 0: weights 3/4 and 1/4, context 3/4 · 8 + 1/4 · 4 = 7.
    query = jnp.array([[np.log(3.0)]])
    keys = jnp.array([[1.0], [0.0]])
    values = jnp.array([[8.0], [4.0]])
    context, weights = attention.attend(query, keys, values)
    np.testing.assert_allclose(weights, [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(context, [[7.0]], rtol=1e-6)
    # Four features make √D = 2, so scores twice as large are the same.
    padded = jnp.pad(2 * query, ((0, 0), (0, 3))), jnp.pad(keys, ((0, 0), (0, 3))), values
    np.testing.assert_allclose(attention.attend(*padded)[0], [[7.0]], rtol=1e-6)
    np.testing.assert_allclose(attention.attend(*padded, scale=0.5)[0], [[7.0]], rtol=1e-6)
    aligned, weights = attention.align_hidden_states(
        jnp.array([[1.0], [0.0]]), jnp.array([np.log(3.0)])
    )
    np.testing.assert_allclose(weights, [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(aligned, [0.75], rtol=1e-6)


def test_scores_worked_by_hand():
    states = jnp.array([[1.0, 0.0], [2.0, 3.0]])
    state = jnp.array([4.0, 5.0])
    np.testing.assert_allclose(attention.dot_score(states, state), [4.0, 23.0])
    # W s = (4, 4 + 5): h · W s.
    general = attention.general_score({"kernel": jnp.array([[1.0, 0.0], [1.0, 1.0]])})
    np.testing.assert_allclose(general(states, state), [4.0, 8.0 + 27.0])
    # One hidden unit: 2 tanh(h₀ + s₁ − 5).
    additive = {
        "encoder": [[1.0], [0.0]],
        "decoder": [[0.0], [1.0]],
        "bias": [-5.0],
        "output": [2.0],
    }
    additive = attention.additive_score(
        {name: jnp.array(value) for name, value in additive.items()}
    )
    np.testing.assert_allclose(additive(states, state), 2 * np.tanh([1.0, 2.0]), rtol=1e-6)


@pytest.mark.parametrize("batch, scale", [((), None), ((2,), 1.0), ((2, 3), 0.1)])
def test_attend_equals_a_float64_reference(batch, scale):
    arrays = draw(batch=batch)
    context, weights = jax.jit(attention.attend)(*arrays, scale=scale)
    expected = reference_attend(*arrays, scale)
    chex.assert_trees_all_close((context, weights), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


@parametrize_score
def test_align_hidden_states_equals_a_float64_reference(score):
    query, states, _ = draw()
    state = query[:, 0]
    context, weights = attention.align_hidden_states(states, state, score=score)
    for i in range(2):
        scores = np.asarray([score(states[i, m][None], state[i])[0] for m in range(6)], np.float64)
        np.testing.assert_allclose(weights[i], reference_softmax(scores), rtol=1e-5)
        np.testing.assert_allclose(
            context[i], reference_softmax(scores) @ np.asarray(states[i]), rtol=1e-4, atol=1e-5
        )


def test_learned_scores_equal_float64_references():
    query, states, _ = draw()
    state = query[:, 0, :3]
    params = attention.init_general_score(jax.random.key(1), 5, 3)
    h, s, w = (np.asarray(x, np.float64) for x in (states, state, params["kernel"]))
    expected = [[h[b, m] @ w @ s[b] for m in range(6)] for b in range(2)]
    np.testing.assert_allclose(
        attention.general_score(params)(states, state), expected, rtol=1e-5, atol=1e-6
    )
    params = attention.init_additive_score(jax.random.key(1), 5, 3, 4) | {"bias": jnp.arange(4.0)}
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    hidden = [
        [np.tanh(h[b, m] @ p["encoder"] + s[b] @ p["decoder"] + p["bias"]) for m in range(6)]
        for b in range(2)
    ]
    np.testing.assert_allclose(
        attention.additive_score(params)(states, state), hidden @ p["output"], rtol=1e-5, atol=1e-6
    )


def test_unbatched_calls_equal_the_textbook_formulas():
    """Compares with `encoder_states @ decoder_state` and softmax(Q Kᵀ) V, without a batch."""
    query, keys, values = draw(batch=())
    context, weights = attention.align_hidden_states(keys, query[0])
    expected = jax.nn.softmax(keys @ query[0])
    chex.assert_trees_all_close((context, weights), (expected @ keys, expected), rtol=1e-5)
    expected = jax.nn.softmax(query @ keys.T)
    chex.assert_trees_all_close(
        attention.attend(query, keys, values, scale=1), (expected @ values, expected), rtol=1e-5
    )


def test_align_hidden_states_is_attention_of_one_unscaled_query():
    query, states, _ = draw()
    context, weights = attention.align_hidden_states(states, query[:, 0])
    expected = attention.attend(query[:, :1], states, states, scale=1)
    chex.assert_trees_all_close((context[:, None], weights[:, None]), expected, rtol=1e-5)


@parametrize_score
def test_several_decoder_states_align_under_vmap(score):
    decoder_states, states, _ = draw()

    def align(states, state):
        return attention.align_hidden_states(states, state, score=score)

    single = jax.vmap(align, (None, 0))(states[0], decoder_states[0])
    batched = jax.vmap(align, (None, 1), out_axes=1)(states, decoder_states)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[0], batched), single, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(single[1][2], align(states[0], decoder_states[0, 2])[1], rtol=1e-5)


@pytest.mark.thorough
def test_multi_head_attend_equals_flax():
    query, keys, _ = draw(d=6)
    where = jnp.arange(6)[None, None] < jnp.array([6, 4])[:, None, None]
    params = attention.init_multi_head(jax.random.key(1), 6, 6, 6, features=12, heads=3)
    module = linen.MultiHeadDotProductAttention(
        num_heads=3, qkv_features=12, out_features=12, use_bias=False
    )
    names = {"query": "query", "key": "key", "value": "value", "output": "out"}
    variables = {"params": {names[name]: {"kernel": kernel} for name, kernel in params.items()}}
    expected, state = module.apply(
        variables, query, keys, mask=where[:, None], sow_weights=True, mutable="intermediates"
    )
    context, weights = attention.multi_head_attend(params, query, keys, keys, where=where)
    np.testing.assert_allclose(context, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        weights, state["intermediates"]["attention_weights"][0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.thorough
def test_multi_head_attend_between_three_widths_equals_a_float64_reference():
    query, keys, values = draw(d=6)
    keys = keys[..., :4]
    params = attention.init_multi_head(jax.random.key(1), 6, 4, 3, features=10, heads=2)
    chex.assert_shape(
        [params["query"], params["key"], params["value"]], [(6, 2, 5), (4, 2, 5), (3, 2, 5)]
    )
    context, weights = attention.multi_head_attend(params, query, keys, values)
    arrays = {"query": query, "key": keys, "value": values}
    total = np.zeros((2, 4, 10))
    for h in range(2):
        projected = [
            np.asarray(array, np.float64) @ np.asarray(params[name][:, h])
            for name, array in arrays.items()
        ]
        expected, expected_weights = reference_attend(*projected)
        np.testing.assert_allclose(weights[:, h], expected_weights, rtol=1e-5, atol=1e-6)
        total += expected @ np.asarray(params["output"][h], np.float64)
    np.testing.assert_allclose(context, total, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "chunk_size, where",
    [
        (3, None),
        (3, np.arange(6) < 4),
        (3, np.tril(np.ones((1, 7, 6), bool))),
        (1, np.eye(7, 6)[None] > 0),  # the last query may attend to nothing
        (100, np.ones((2, 1, 6), bool)),
    ],
)
def test_attend_context_equals_attend(chunk_size, where):
    arrays = draw(n=7)

    def chunked(*arrays):
        return attention.attend_context(*arrays, where=where, chunk_size=chunk_size)

    expected = value_and_grads(lambda *arrays: attention.attend(*arrays, where=where)[0], *arrays)
    chex.assert_trees_all_close(value_and_grads(chunked, *arrays), expected, rtol=1e-5, atol=1e-6)


def test_attend_context_holds_a_chunk_of_the_weights():
    """Reads the memory of the compiled programs: 4096² float32 weights would take 64 MiB.

    The mask of the keys must not grow to that size either.
    """
    sizes = {}
    shapes = [jax.ShapeDtypeStruct((4096, 16), jnp.float32)] * 3 + [
        jax.ShapeDtypeStruct((4096,), bool)
    ]
    for name, context in CONTEXT_FUNCTIONS.items():

        def total(query, keys, values, where, context=context):
            return context(query, keys, values, where=where).sum()

        for quantity, function in {
            "value": total,
            "gradient": jax.grad(total, argnums=(0, 1, 2)),
        }.items():
            analysis = jax.jit(function).lower(*shapes).compile().memory_analysis()
            sizes[name, quantity] = analysis.temp_size_in_bytes / 2**20
    assert sizes["attend", "value"] > 60 and sizes["attend", "gradient"] > 120
    assert sizes["attend_context", "value"] < 8 and sizes["attend_context", "gradient"] < 16, sizes


@parametrize_context
def test_masked_keys_are_as_if_sliced_away(context):
    """A NaN in a masked key reaches neither value nor gradient, whose masked rows are 0."""
    query, keys, values = draw()
    where = jnp.array([True, False, True, True, False, True])
    indices = np.flatnonzero(where)
    with_nan = [jnp.where(where[:, None], x, jnp.nan) for x in (keys, values)]
    value, grads = value_and_grads(lambda *arrays: context(*arrays, where=where), query, *with_nan)
    expected, expected_grads = value_and_grads(context, query, keys[:, indices], values[:, indices])
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads[0], expected_grads[0], rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(grads[1:], expected_grads[1:], strict=True):
        np.testing.assert_allclose(gradient[:, indices], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(gradient[:, ~np.asarray(where)], 0)


def test_masked_pairs_equal_a_float64_reference():
    arrays = draw()
    where = np.random.default_rng(0).random((2, 4, 6)) < 0.4
    where[0, 1] = False
    expected = reference_attend(*arrays, where=where)
    chex.assert_trees_all_close(
        attention.attend(*arrays, where=jnp.asarray(where)), expected, rtol=1e-5, atol=1e-6
    )
    for sparse in (where[:1], where[:, :1], where[:1, :1], where[0, 0]):
        actual = attention.attend(*arrays, where=jnp.asarray(sparse))
        chex.assert_trees_all_close(
            actual, reference_attend(*arrays, where=sparse), rtol=1e-5, atol=1e-6
        )


@parametrize_context
def test_query_that_may_attend_to_nothing_gets_zero(context):
    """A NaN in the query has no effect either.

    `jax.nn.dot_product_attention` would return the mean of the values.
    """
    query, keys, values = draw()
    where = jnp.array([True, False, True, True])[None, :, None]
    with_nan = jnp.where(where, query, jnp.nan)
    value, (query_grad, *grads) = value_and_grads(
        lambda *arrays: context(*arrays, where=where), with_nan, keys, values
    )
    np.testing.assert_array_equal(value[:, 1], 0)
    np.testing.assert_array_equal(query_grad[:, 1], 0)
    chex.assert_tree_all_finite((value, query_grad, grads))
    masked = value_and_grads(
        lambda *arrays: context(*arrays, where=jnp.array(False)), query, keys, values
    )
    chex.assert_trees_all_equal(masked, jax.tree.map(jnp.zeros_like, masked))


@pytest.mark.thorough
def test_masked_keys_reach_no_parameter_of_the_heads():
    query, keys, values = draw()
    where = jnp.array([True, False, True, True, False, True])
    params = attention.init_multi_head(jax.random.key(1), 5, 5, 3, features=4, heads=2)
    with_nan = [jnp.where(where[:, None], x, jnp.nan) for x in (keys, values)]
    indices = np.flatnonzero(where)
    (context, _), grads = value_and_grads(
        lambda p, q: attention.multi_head_attend(p, q, *with_nan, where=where), params, query
    )
    sliced = keys[:, indices], values[:, indices]
    np.testing.assert_allclose(
        context, attention.multi_head_attend(params, query, *sliced)[0], rtol=1e-5, atol=1e-6
    )
    chex.assert_tree_all_finite(grads)
    masked = attention.multi_head_attend(params, query, *with_nan, where=jnp.array(False))
    chex.assert_trees_all_equal(masked, jax.tree.map(jnp.zeros_like, masked))


@pytest.mark.thorough
@pytest.mark.parametrize("name", SCORES)
def test_masked_encoder_states_are_as_if_sliced_away(name):
    query, states, _ = draw()
    where = jnp.array([[True, True, True, False, False, False], [False] * 6])
    makers = {
        "dot": lambda params: attention.dot_score,
        "general": attention.general_score,
        "additive": attention.additive_score,
    }
    params = {
        "dot": {},
        "general": attention.init_general_score(jax.random.key(1), 5, 5),
        "additive": attention.init_additive_score(jax.random.key(1), 5, 5, 4),
    }[name]

    def align(params, states, state, where=None):
        return attention.align_hidden_states(states, state, score=makers[name](params), where=where)

    with_nan = jnp.where(where[..., None], states, jnp.nan), query[:, 0].at[1].set(jnp.nan)
    # Only the context is compared: `value_and_grads` weights each value by its position, which
    # slicing the attention weights would change.
    value, grads = value_and_grads(
        lambda *arrays: align(*arrays, where=where)[0][0], params, *with_nan
    )
    expected, expected_grads = value_and_grads(
        lambda *arrays: align(*arrays)[0], params, states[0, :3], query[0, 0]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(grads[0], expected_grads[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads[1][0, :3], expected_grads[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(grads[1][0, 3:], 0)
    context, weights = align(params, *with_nan, where=where)
    chex.assert_trees_all_equal((context[1], weights[1]), (jnp.zeros(5), jnp.zeros(6)))
    _, grads = value_and_grads(lambda *arrays: align(*arrays, where=where), params, *with_nan)
    chex.assert_tree_all_finite(grads)
    np.testing.assert_array_equal(grads[2][1], 0)


def test_score_of_minus_infinity_excludes_a_state():
    _, states, _ = draw()

    def score(states, state):
        return jnp.broadcast_to(jnp.where(jnp.arange(6) < 3, 0.0, -jnp.inf), (2, 6))

    _, weights = attention.align_hidden_states(states, jnp.ones((2, 5)), score=score)
    np.testing.assert_allclose(weights, [[1 / 3, 1 / 3, 1 / 3, 0, 0, 0]] * 2, rtol=1e-6)


def test_nan_in_an_unmasked_key_is_not_hidden():
    query, keys, values = draw()
    context, weights = attention.attend(query, keys.at[0, 2].set(jnp.nan), values)
    assert np.isnan(context[0]).all() and np.isnan(weights[0, :, 2]).all()
    assert np.isfinite(context[1]).all()


@parametrize_context
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_extreme_magnitudes_stay_finite(context, size):
    query, keys, values = draw(scale=size)
    chex.assert_tree_all_finite(value_and_grads(context, query, keys, values))


def test_scores_of_ten_thousand_select_a_single_key():
    keys = jnp.array([[1e4, 0.0], [0.0, 1e4], [-1e4, 0.0]])
    query = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    values = jnp.array([[1.0], [2.0], [3.0]])
    (context, weights), grads = value_and_grads(
        lambda *arrays: attention.attend(*arrays, scale=1), query, keys, values
    )
    np.testing.assert_array_equal(weights, [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(context, [[1], [2]])
    chex.assert_tree_all_finite(grads)


def test_limits_of_the_scale():
    """At 0 the weights are uniform; for a large scale the largest score takes all of them."""
    query, keys, values = draw()
    _, weights = attention.attend(query, keys, values, scale=0.0)
    np.testing.assert_allclose(weights, 1 / 6, rtol=1e-6)
    context, weights = attention.attend(query, keys, values, scale=1e6)
    best = jnp.einsum("bnd,bmd->bnm", query, keys).argmax(-1)
    np.testing.assert_allclose(weights, jax.nn.one_hot(best, 6), atol=1e-6)
    np.testing.assert_allclose(
        context, jnp.take_along_axis(values, best[..., None], axis=1), rtol=1e-5
    )


@parametrize_context
def test_permuting_keys_changes_nothing_and_permuting_queries_permutes_the_context(context):
    query, keys, values = draw()
    key_order = np.array([3, 0, 5, 1, 4, 2])
    query_order = np.array([2, 0, 3, 1])
    expected = context(query, keys, values)
    np.testing.assert_allclose(
        context(query, keys[:, key_order], values[:, key_order]), expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        context(query[:, query_order], keys, values), expected[:, query_order], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    attend, align, multi_head = (
        jax.jit(f)
        for f in (attention.attend, attention.align_hidden_states, attention.multi_head_attend)
    )
    query, keys, values = (x.astype(dtype) for x in draw(m=400))
    wide = [x.astype(jnp.float32) for x in (query, keys, values)]
    context, weights = attend(query, keys, values)
    assert (context.dtype, weights.dtype) == (dtype, jnp.float32)
    expected, expected_weights = reference_attend(*wide)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    np.testing.assert_allclose(context.astype(jnp.float32), expected, rtol=1e-2, atol=1e-4)
    assert jax.eval_shape(attention.attend_context, query, keys, values).dtype == dtype
    aligned, weights = align(keys, query[:, 0])
    assert (aligned.dtype, weights.dtype) == (dtype, jnp.float32)
    # Inputs of several dtypes are accepted, even under strict dtype promotion.
    mixed, _ = attend(wide[0], keys, wide[2])
    assert mixed.dtype == jnp.float32
    params = attention.init_multi_head(jax.random.key(0), 5, 5, 3, features=4, heads=2)
    context, weights = multi_head(params, query, keys, values)
    assert (context.dtype, weights.dtype) == (dtype, jnp.float32)


@pytest.mark.thorough
def test_gradients_equal_finite_differences():
    arrays = draw(batch=(), n=2, m=3, d=2, v=2)
    where = jnp.array([[True, True, False], [True, True, True]])
    params = attention.init_multi_head(jax.random.key(0), 2, 2, 2, features=2, heads=2)
    additive = attention.init_additive_score(jax.random.key(0), 2, 2, 3)

    def align(params, states, state):
        return attention.align_hidden_states(states, state, score=attention.additive_score(params))

    cases = [
        (lambda *arrays: attention.attend(*arrays, where=where), arrays),
        (lambda *arrays: attention.attend_context(*arrays, where=where, chunk_size=1), arrays),
        (lambda *arrays: attention.multi_head_attend(*arrays, where=where), (params, *arrays)),
        (align, (additive, arrays[1], arrays[0][0])),
    ]
    for function, arguments in cases:
        check_grads(
            jax.jit(function), arguments, order=1, modes=("rev",), eps=1e-2, atol=1e-2, rtol=1e-2
        )


@pytest.mark.thorough
@parametrize_context
def test_jit_vmap_and_pmap_equal_eager(context):
    arrays = draw(batch=(8,))
    expected = context(*arrays)
    for transform in (jax.jit, jax.vmap, jax.pmap):
        np.testing.assert_allclose(transform(context)(*arrays), expected, rtol=1e-5, atol=1e-6)
    masked = jax.jit(lambda where, scale: context(*arrays, where=where, scale=scale))(
        jnp.arange(6) < 3, 0.5
    )
    np.testing.assert_allclose(
        masked, context(*arrays, where=jnp.arange(6) < 3, scale=0.5), rtol=1e-5, atol=1e-6
    )


def test_parameters_differ_between_keys_and_between_names():
    params = [
        attention.init_multi_head(jax.random.key(i), 4, 4, 4, features=4, heads=1) for i in range(2)
    ]
    assert not np.array_equal(params[0]["query"], params[1]["query"])
    assert not np.array_equal(params[0]["query"], params[0]["key"])
    # Glorot: variance 2 / (in + out).
    kernel = attention.init_general_score(jax.random.key(0), 300, 100)["kernel"]
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / 400), rtol=0.02)


def test_wrong_shapes_and_dtypes_raise():
    query, keys, values = draw()
    for function in (attention.attend, attention.attend_context):
        with pytest.raises(ValueError, match="same number of features.*multi_head_attend"):
            function(query[..., 1:], keys, values)
        for arrays in [
            (query, keys[:, 1:], values),
            (query[0], keys, values),
            (query[0, 0], keys[0, 0], values[0, 0]),
        ]:
            with pytest.raises(
                ValueError, match=r"must be \[..., N, D\], \[..., M, D\] and \[..., M, V\]"
            ):
                function(*arrays)
        for where in [
            jnp.ones((4, 5), bool),
            jnp.ones((6, 4), bool),
            jnp.ones((1, 2, 4, 6), bool),
            jnp.ones((4, 6)),
        ]:
            with pytest.raises(ValueError, match=r"booleans that broadcast to \(2, 4, 6\)"):
                function(query, keys, values, where=where)
        with pytest.raises(ValueError, match="scale must be a scalar"):
            function(query, keys, values, scale=jnp.ones(4))
        with pytest.raises(TypeError, match="keys must be floating-point, got int32"):
            function(query, keys.astype(jnp.int32), values)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        attention.attend_context(query, keys, values, chunk_size=0)
    with pytest.raises(ValueError, match="multiple of heads"):
        attention.init_multi_head(jax.random.key(0), 4, 4, 4, features=10, heads=4)
    params = attention.init_multi_head(jax.random.key(0), 5, 4, 3, features=4, heads=2)
    with pytest.raises(ValueError, match="key .* must have 4 features"):
        attention.multi_head_attend(params, query, keys, values)


def test_wrong_states_and_scores_raise():
    query, states, _ = draw()
    state = query[:, 0]
    for wrong in (state[0], query, state[:1]):
        with pytest.raises(ValueError, match="same leading axes"):
            attention.align_hidden_states(states, wrong)
    with pytest.raises(
        ValueError, match="same number of features for a dot product.*general_score"
    ):
        attention.align_hidden_states(states, state[:, 1:])
    # A padding mask of 4 examples with 4 positions would be read as one of queries and keys.
    square = jnp.zeros((4, 4, 3))
    with pytest.raises(ValueError, match=r"where \(4, 4\) lacks an axis .* where\[:, None\]"):
        attention.attend(square, square, square, where=jnp.ones((4, 4), bool))
    with pytest.raises(ValueError, match=r"where must be booleans that broadcast to \(2, 6\)"):
        attention.align_hidden_states(states, state, where=jnp.ones((2, 5), bool))
    with pytest.raises(
        ValueError, match=r"one number per encoder state, \(2, 6\), got \(2, 6, 5\)"
    ):
        attention.align_hidden_states(states, state, score=lambda states, state: states)
    for score in (
        attention.general_score(attention.init_general_score(jax.random.key(0), 4, 5)),
        attention.additive_score(attention.init_additive_score(jax.random.key(0), 4, 5, 3)),
    ):
        with pytest.raises(ValueError, match="states .* must have 4 features"):
            attention.align_hidden_states(states, state, score=score)
        with pytest.raises(ValueError, match="state .* must have 5 features"):
            attention.align_hidden_states(states[..., :4], state[:, :4], score=score)
    with pytest.raises(TypeError, match="decoder_state must be floating-point"):
        attention.align_hidden_states(states, state.astype(jnp.int32))


def test_parameters_are_no_score():
    params = attention.init_general_score(jax.random.key(0), 4, 4)
    with pytest.raises(TypeError, match=r"got a dict: pass general_score\(params\)"):
        attention.align_hidden_states(jnp.ones((3, 4)), jnp.ones(4), score=params)
