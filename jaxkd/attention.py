"""Attention and hidden-state alignment.

Axes: N queries, M keys, D features, H heads. Everything is computed in float32, or in float64 if
an input has that dtype. Matrix products run at JAX's default precision, which
`jax.default_matmul_precision` changes.

A query that may not attend to any key gets weights, context and gradients of 0, where
`jax.nn.dot_product_attention` returns the mean of the values. A key that no query may attend to can
hold any value, even NaN: values and gradients are the same as if it were sliced away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

ScoreFn = Callable[[Array, Array], Array]
"""`(states [..., M, D], state [..., D']) -> scores [..., M]`: scores each of the states by how
relevant it is to `state`."""


def attend(
    query: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Computes scaled dot-product attention.

    weights = softmax(scale · Q Kᵀ),  context = weights · V

    Args:
        query: `[..., N, D]`, floating-point.
        keys: `[..., M, D]`.
        values: `[..., M, V]`.
        where: Booleans that broadcast to `[..., N, M]`, True where a query may attend to a key.
        scale: A scalar; by default 1/√D. Pass 1 for the unscaled form.

    Returns:
        The context `[..., N, V]` in the dtype of `values`, and the weights `[..., N, M]` in float32
        or wider.

    Raises:
        ValueError: If the shapes are incompatible.
        TypeError: If an array is not floating-point.

    Example:
        Unscaled, it is softmax(Q Kᵀ) V:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import attention
        >>> query = jnp.log(jnp.array([[3.0, 1.0], [1.0, 3.0]]))
        >>> keys = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> values = jnp.array([[10.0], [20.0]])
        >>> context, weights = attention.attend(query, keys, values, scale=1)
        >>> weights.tolist(), context.tolist()
        ([[0.75, 0.25], [0.25, 0.75]], [[12.5], [17.5]])
        >>> (jax.nn.softmax(query @ keys.T) @ values).tolist()
        [[12.5], [17.5]]

    References:
        Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """
    dtype = jnp.asarray(values).dtype
    query, keys, values, where = _prepare_inputs(query, keys, values, where)
    context, weights = _attend(query, keys, values, where, _resolve_scale(scale, query, keys))
    # Only the context returns to a narrow dtype: weights in bfloat16 would no longer sum to 1.
    return context.astype(dtype), weights


def attend_context(
    query: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    chunk_size: int = 128,
) -> Array:
    """Computes the context of `attend` without its weights, for long sequences.

    Queries are processed in chunks, and the weights of a chunk are recomputed for the gradient.
    Forward and backward pass therefore hold `chunk_size` × M weights instead of N × M, on every
    platform. `jax.nn.dot_product_attention` holds all of them, unless its dtypes and shapes allow
    cuDNN to compute it on a GPU. Give `where` length 1 on each axis along which it is constant.

    Call it under `jit`: outside of it, every call compiles.

    Args:
        query: `[..., N, D]`, floating-point.
        keys: `[..., M, D]`.
        values: `[..., M, V]`.
        where: Booleans that broadcast to `[..., N, M]`, True where a query may attend to a key.
        scale: A scalar; by default 1/√D.
        chunk_size: Number of queries in a chunk; it need not divide N.

    Returns:
        The context `[..., N, V]` in the dtype of `values`.

    Raises:
        ValueError: If the shapes are incompatible or `chunk_size` is less than 1.
        TypeError: If an array is not floating-point.

    Example:
        >>> import jax
        >>> from jaxkd import attention
        >>> query, keys, values = jax.random.normal(jax.random.key(0), (3, 1000, 16))
        >>> attention.attend_context(query, keys, values, chunk_size=64).shape
        (1000, 16)

    References:
        Rabe & Staats, Self-attention Does Not Need O(n²) Memory, https://arxiv.org/abs/2112.05682
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    dtype = jnp.asarray(values).dtype
    query, keys, values, where = _prepare_inputs(query, keys, values, where)
    scale = _resolve_scale(scale, query, keys)

    def attend_one(row: tuple[Array, Array | None]) -> Array:
        query_row, where_row = row
        allowed = where if where_row is None else where_row[..., None, :]
        context, _ = _attend(query_row[..., None, :], keys, values, allowed, scale)
        return context[..., 0, :]

    query_rows = jnp.moveaxis(query, -2, 0)
    # A mask that all queries share is not repeated for each of them: it would be as large as the
    # weights.
    where_rows = None if where.shape[-2] == 1 else jnp.moveaxis(where, -2, 0)
    # Without checkpoint, lax.map would store the weights of every chunk for the backward pass.
    contexts = jax.lax.map(
        jax.checkpoint(attend_one), (query_rows, where_rows), batch_size=chunk_size
    )
    return jnp.moveaxis(contexts, 0, -2).astype(dtype)


def init_multi_head(
    key: Array,
    query_features: int,
    key_features: int,
    value_features: int,
    *,
    features: int,
    heads: int,
) -> dict[str, Array]:
    """Draws the parameters of `multi_head_attend`, Glorot-uniform over all heads together.

    Args:
        key: A random key.
        query_features: Width of the queries.
        key_features: Width of the keys.
        value_features: Width of the values.
        features: Width of all heads together and of the context.
        heads: Number of heads, H.

    Returns:
        `query`, `key`, `value` `[width, H, features / H]` and `output` `[H, features / H,
        features]`, in float32. They are the kernels of Flax's `MultiHeadDotProductAttention`.

    Raises:
        ValueError: If `heads` does not divide `features`.
    """
    if heads < 1 or features % heads:
        raise ValueError(f"features must be a multiple of heads, got {features} and {heads}")
    head_features = features // heads
    widths = {"query": query_features, "key": key_features, "value": value_features}
    *subkeys, output_key = jax.random.split(key, 4)
    # Each kernel is drawn as one matrix and then split: Glorot's bound depends on the width of all
    # heads together, as in Flax.
    params = {
        name: _glorot(subkey, (width, features)).reshape(width, heads, head_features)
        for (name, width), subkey in zip(widths.items(), subkeys, strict=True)
    }
    output = _glorot(output_key, (features, features)).reshape(heads, head_features, features)
    return params | {"output": output}


def multi_head_attend(
    params: Mapping[str, ArrayLike],
    query: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Computes multi-head attention, in which every head attends between its own projections.

    context = Σ_h attend(Q W_h^Q, K W_h^K, V W_h^V) W_h^O, without biases

    Every head has its own weights and context, so this cannot serve as a score of
    `align_hidden_states`. To align a single decoder state, call
    `multi_head_attend(params, state[..., None, :], states, states)`.

    Args:
        params: From `init_multi_head`; their shapes give the number of heads.
        query: `[..., N, query_features]`, floating-point.
        keys: `[..., M, key_features]`.
        values: `[..., M, value_features]`.
        where: Booleans that broadcast to `[..., N, M]`, True where a query may attend to a key. It
            holds for every head.

    Returns:
        The context `[..., N, features]` in the dtype of `values`, and the weights `[..., H, N, M]`
        in float32 or wider.

    Raises:
        ValueError: If the shapes are incompatible.
        TypeError: If an array is not floating-point.

    Example:
        >>> import jax
        >>> from jaxkd import attention
        >>> params = attention.init_multi_head(jax.random.key(0), 6, 8, 8, features=12, heads=3)
        >>> student = jax.random.normal(jax.random.key(1), (5, 6))
        >>> teacher = jax.random.normal(jax.random.key(2), (7, 8))
        >>> context, weights = attention.multi_head_attend(params, student, teacher, teacher)
        >>> context.shape, weights.shape
        ((5, 12), (3, 5, 7))

    References:
        Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
    """
    dtype = jnp.asarray(values).dtype
    query, keys, values, where = _prepare_inputs(query, keys, values, where)
    projections = []
    for name, array in {"query": query, "key": keys, "value": values}.items():
        kernel, array = _widen_dtypes({f"params['{name}']": params[name], name: array})
        _check_features(name, array, kernel)
        projections.append(jnp.einsum("...nd,dhf->...hnf", array, kernel))
    # The heads are one more leading axis of `attend`, and the mask holds for all of them.
    contexts, weights = attend(*projections, where=where[..., None, :, :])
    contexts, output = _widen_dtypes({"context": contexts, "params['output']": params["output"]})
    return jnp.einsum("...hnf,hfo->...no", contexts, output).astype(dtype), weights


def dot_score(states: ArrayLike, state: ArrayLike) -> Array:
    """Scores each of the states by its dot product with `state`.

    score_m = h_m · s

    Args:
        states: h, `[..., M, D]`, floating-point.
        state: s, `[..., D]`.

    Returns:
        Scores `[..., M]`, in float32 or wider.

    Raises:
        ValueError: If `states` and `state` have different numbers of features.
        TypeError: If an array is not floating-point.

    References:
        Luong et al., Effective Approaches to Attention-based Neural Machine Translation,
        https://arxiv.org/abs/1508.04025
    """
    states, state = _widen_dtypes({"states": states, "state": state})
    if states.shape[-1] != state.shape[-1]:
        raise ValueError(
            f"states {states.shape} and state {state.shape} must have the same number of features "
            "for a dot product; for different numbers use general_score or additive_score"
        )
    return jnp.einsum("...md,...d->...m", states, state)


def init_general_score(
    key: Array, encoder_features: int, decoder_features: int
) -> dict[str, Array]:
    """Draws the parameters of `general_score`, Glorot-uniform.

    Args:
        key: A random key.
        encoder_features: Width of the encoder states, which are attended to.
        decoder_features: Width of the decoder state, which attends.

    Returns:
        `kernel` `[encoder_features, decoder_features]`, in float32.
    """
    return {"kernel": _glorot(key, (encoder_features, decoder_features))}


def general_score(params: Mapping[str, ArrayLike]) -> ScoreFn:
    """Makes a learned bilinear score between states of any two widths.

    score_m = h_mᵀ W s

    Args:
        params: From `init_general_score`.

    Returns:
        A score `(states [..., M, E], state [..., D]) -> [..., M]`, in float32 or wider. It raises
        `ValueError` if the parameters have other widths than the states.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import attention
        >>> params = attention.init_general_score(jax.random.key(0), 4, 3)
        >>> score = attention.general_score(params)
        >>> context, weights = attention.align_hidden_states(
        ...     jnp.ones((5, 4)), jnp.ones(3), score=score
        ... )
        >>> print(weights)
        [0.2 0.2 0.2 0.2 0.2]

    References:
        Luong et al., Effective Approaches to Attention-based Neural Machine Translation,
        https://arxiv.org/abs/1508.04025
    """

    def score(states: ArrayLike, state: ArrayLike) -> Array:
        states, state, kernel = _widen_dtypes(
            {"states": states, "state": state, "params['kernel']": params["kernel"]}
        )
        _check_features("states", states, kernel)
        _check_features("state", state, kernel.T)
        # W s comes first: one matrix-vector product instead of M.
        projected = jnp.einsum("ed,...d->...e", kernel, state)
        return jnp.einsum("...me,...e->...m", states, projected)

    return score


def init_additive_score(
    key: Array, encoder_features: int, decoder_features: int, features: int
) -> dict[str, Array]:
    """Draws the parameters of `additive_score`: Glorot-uniform, and biases of 0.

    Args:
        key: A random key.
        encoder_features: Width of the encoder states, which are attended to.
        decoder_features: Width of the decoder state, which attends.
        features: Width of the hidden layer.

    Returns:
        `encoder` `[encoder_features, features]`, `decoder` `[decoder_features, features]`, `bias`
        and `output` `[features]`, in float32.
    """
    encoder_key, decoder_key, output_key = jax.random.split(key, 3)
    return {
        "encoder": _glorot(encoder_key, (encoder_features, features)),
        "decoder": _glorot(decoder_key, (decoder_features, features)),
        "bias": jnp.zeros(features, jnp.float32),
        # Drawn as a matrix, since Glorot's bound needs a fan-in and a fan-out.
        "output": _glorot(output_key, (features, 1))[:, 0],
    }


def additive_score(params: Mapping[str, ArrayLike]) -> ScoreFn:
    """Makes a learned score with one hidden layer, between states of any two widths.

    score_m = vᵀ tanh(W_e h_m + W_d s + b)

    Args:
        params: From `init_additive_score`.

    Returns:
        A score `(states [..., M, E], state [..., D]) -> [..., M]`, in float32 or wider. It raises
        `ValueError` if the parameters have other widths than the states.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import attention
        >>> params = attention.init_additive_score(jax.random.key(0), 4, 3, features=8)
        >>> attention.additive_score(params)(jnp.ones((5, 4)), jnp.ones(3)).shape
        (5,)

    References:
        Bahdanau et al., Neural Machine Translation by Jointly Learning to Align and Translate,
        https://arxiv.org/abs/1409.0473
    """

    def score(states: ArrayLike, state: ArrayLike) -> Array:
        named_params = {
            f"params['{name}']": params[name] for name in ("encoder", "decoder", "bias", "output")
        }
        states, state, encoder, decoder, bias, output = _widen_dtypes(
            {"states": states, "state": state, **named_params}
        )
        _check_features("states", states, encoder)
        _check_features("state", state, decoder)
        from_states = jnp.einsum("...me,ef->...mf", states, encoder)
        from_state = jnp.einsum("...d,df->...f", state, decoder)
        hidden = from_states + from_state[..., None, :]
        # The bias is broadcast explicitly, since strict rank promotion refuses to do it.
        hidden = jnp.tanh(hidden + jnp.broadcast_to(bias, hidden.shape))
        return jnp.einsum("...mf,f->...m", hidden, output)

    return score


def align_hidden_states(
    encoder_states: ArrayLike,
    decoder_state: ArrayLike,
    *,
    score: ScoreFn = dot_score,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Averages the encoder states, weighted by their scores for a decoder state.

    weights = softmax over m of score(h_m, s),  context = Σ_m weights_m h_m

    For several decoder states `[T, D]` of one sequence, use
    `jax.vmap(align_hidden_states, in_axes=(None, 0))(encoder_states, decoder_states)`. If both have
    a leading batch axis, use `in_axes=(None, 1), out_axes=1`.

    Args:
        encoder_states: h, `[..., M, D]`, floating-point.
        decoder_state: s, `[..., D]`. Its width may differ if the score allows it.
        score: `dot_score`, `general_score(params)`, `additive_score(params)`, or any function
            `(states [..., M, D], state [..., D']) -> [..., M]`. Its arguments are in float32 or
            wider. A score of −inf excludes a finite state; `where` excludes a state of any value.
        where: Booleans that broadcast to `[..., M]`, True for the states that may be attended to.

    Returns:
        The context `[..., D]` in the dtype of `encoder_states`, and the weights `[..., M]` in
        float32 or wider.

    Raises:
        ValueError: If the shapes are incompatible.
        TypeError: If an array is not floating-point, or `score` is no function.

    Example:
        The scores are `encoder_states @ decoder_state`; their softmax weights the encoder states:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import attention
        >>> encoder_states = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> decoder_state = jnp.array([2.0, 1.0])
        >>> context, weights = attention.align_hidden_states(encoder_states, decoder_state)
        >>> print(weights.round(3))
        [0.245 0.09  0.665]
        >>> print(context.round(3))
        [0.91  0.755]
        >>> print((jax.nn.softmax(encoder_states @ decoder_state) @ encoder_states).round(3))
        [0.91  0.755]

    References:
        Bahdanau et al., Neural Machine Translation by Jointly Learning to Align and Translate,
        https://arxiv.org/abs/1409.0473
        Luong et al., Effective Approaches to Attention-based Neural Machine Translation,
        https://arxiv.org/abs/1508.04025
    """
    if not callable(score):
        raise TypeError(
            f"score must be a function (states, state) -> scores, got a {type(score).__name__}: "
            "pass general_score(params) or additive_score(params) for their parameters"
        )
    dtype = jnp.asarray(encoder_states).dtype
    states, state = _widen_dtypes(
        {"encoder_states": encoder_states, "decoder_state": decoder_state}
    )
    if states.ndim < 2 or state.ndim < 1 or states.shape[:-2] != state.shape[:-1]:
        raise ValueError(
            "encoder_states and decoder_state must be [..., M, D] and [..., D] with the same "
            f"leading axes, got {states.shape} and {state.shape}; for several decoder states use "
            "jax.vmap"
        )
    where = _expand_mask(where, states.shape[:-1])
    # Masked states become 0 before the score sees them: a NaN in them would otherwise reach the
    # context (NaN · 0 is NaN) and the gradients of the score's parameters.
    states = jnp.where(where[..., None], states, 0)
    state = jnp.where(where.any(-1)[..., None], state, 0)
    scores = score(states, state)
    if scores.shape != states.shape[:-1]:
        raise ValueError(
            f"score must return one number per encoder state, {states.shape[:-1]}, "
            f"got {scores.shape}"
        )
    weights = _softmax_where(scores, where)
    return jnp.einsum("...m,...md->...d", weights, states).astype(dtype), weights


def _attend(
    query: Array, keys: Array, values: Array, where: Array, scale: Array
) -> tuple[Array, Array]:
    weights = _softmax_where(scale * jnp.einsum("...nd,...md->...nm", query, keys), where)
    return jnp.einsum("...nm,...mv->...nv", weights, values), weights


def _softmax_where(scores: Array, where: Array) -> Array:
    """Computes a softmax over the last axis that is 0 at masked scores and at scores of −inf.

    A row without any other scores is 0 throughout.
    """
    allowed = where & (scores != -jnp.inf)
    # The lowest finite number instead of −inf: the softmax of a row of −inf is NaN, and the outer
    # `where` would hide that in the value but not in the gradient.
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min))
    return jnp.where(allowed, weights, 0)


def _prepare_inputs(
    query: ArrayLike, keys: ArrayLike, values: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """Checks and widens the arrays, and sets to 0 every row that is masked throughout."""
    query, keys, values = _widen_dtypes({"query": query, "keys": keys, "values": values})
    compatible = (
        query.ndim >= 2
        and query.shape[:-2] == keys.shape[:-2]
        and keys.shape[:-1] == values.shape[:-1]
    )
    if not compatible:
        raise ValueError(
            "query, keys and values must be [..., N, D], [..., M, D] and [..., M, V] with the same "
            f"leading axes, got {query.shape}, {keys.shape} and {values.shape}"
        )
    where = _expand_mask(where, (*query.shape[:-1], keys.shape[-2]))
    # A NaN in a masked row would reach context and gradients even with a weight of 0.
    may_attend = where.any(-1)[..., None]
    may_be_attended = where.any(-2)[..., None]
    query = jnp.where(may_attend, query, 0)
    keys = jnp.where(may_be_attended, keys, 0)
    values = jnp.where(may_be_attended, values, 0)
    return query, keys, values, where


def _expand_mask(where: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """Gives the mask all axes of `shape`, with length 1 where it lacks one.

    The mask is not copied along an axis: a full `[..., N, M]` mask would defeat `attend_context`.
    """
    where = jnp.ones((), bool) if where is None else jnp.asarray(where)
    mask_shape = (1,) * (len(shape) - where.ndim) + where.shape
    broadcasts = len(mask_shape) == len(shape) and all(
        size in (1, full_size) for size, full_size in zip(mask_shape, shape, strict=True)
    )
    if where.dtype != bool or not broadcasts:
        raise ValueError(
            f"where must be booleans that broadcast to {shape}, got {where.dtype} {where.shape}"
        )
    # The first axis might be that of the batch, if its size happens to fit.
    if where.ndim not in (0, 1, len(shape)) and where.size > 1:
        raise ValueError(
            f"where {where.shape} lacks an axis of {shape}: write where[None] for a mask that the "
            "whole batch shares, where[:, None] for one of the keys of each example"
        )
    return where.reshape(mask_shape)


def _resolve_scale(scale: ArrayLike | None, query: Array, keys: Array) -> Array:
    """Returns the scale as a scalar in the dtype of `query`, 1/√D if it is None."""
    if query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"query {query.shape} and keys {keys.shape} must have the same number of features; "
            "multi_head_attend projects them to a common one"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if jnp.ndim(scale):
        raise ValueError(f"scale must be a scalar, got shape {jnp.shape(scale)}")
    return jnp.asarray(scale, query.dtype)


def _check_features(name: str, array: Array, kernel: Array) -> None:
    if array.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name} {array.shape} must have {kernel.shape[0]} features, as the parameters do"
        )


def _widen_dtypes(arrays: Mapping[str, ArrayLike]) -> tuple[Array, ...]:
    """Converts all arrays to float32, or all to float64 if any of them has that dtype."""
    converted = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name, array in converted.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating-point, got {array.dtype}")
    # One dtype for all, since strict dtype promotion refuses operands of several.
    has_float64 = any(array.dtype == jnp.float64 for array in converted.values())
    dtype = jnp.float64 if has_float64 else jnp.float32
    return tuple(array.astype(dtype) for array in converted.values())


def _glorot(key: Array, shape: tuple[int, int]) -> Array:
    return jax.nn.initializers.glorot_uniform()(key, shape, jnp.float32)
