"""Attention and the alignment of hidden states.

Axes: N queries, M keys, D features, H heads. All is computed in float32 or wider, whatever comes in; matrix products
run at JAX's default precision, which `jax.default_matmul_precision` changes.

Where nothing may be attended, weights, context and gradients are 0, unlike in `jax.nn.dot_product_attention`, which
gives the mean of the values. What no query may attend can hold anything, even NaN: it is as if it were sliced away, in
value and gradient.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Score = Callable[[Array, Array], Array]
"""`(states [..., M, D], state [..., D']) -> scores [..., M]`: how much the state has to do with each of the states."""


def attend(
    query: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Scaled dot-product attention.

    weights = softmax(scale · Q Kᵀ),  context = weights · V

    Args:
        query: `[..., N, D]`, floating-point.
        keys: `[..., M, D]`.
        values: `[..., M, V]`.
        where: Booleans that broadcast to `[..., N, M]`: which query may attend (True) which key.
        scale: A scalar; 1/√D unless given, and 1 for the unscaled form.

    Returns:
        The context `[..., N, V]` in the values' dtype, and the weights `[..., N, M]` in float32 or wider.

    Raises:
        ValueError: If the shapes do not fit each other.
        TypeError: If an array is not floating-point.

    Example:
        Unscaled, it is softmax(Q Kᵀ) V:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import attention
        >>> query, keys = jnp.log(jnp.array([[3.0, 1.0], [1.0, 3.0]])), jnp.array([[1.0, 0.0], [0.0, 1.0]])
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
    query, keys, values, where = _prepare(query, keys, values, where)
    context, weights = _attend(query, keys, values, where, _scale(scale, query, keys))
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
    """The context of `attend` without its weights, for long sequences.

    Queries are taken a chunk at a time and their weights are computed again for the gradient, so that forward and
    backward hold `chunk_size` × M weights instead of N × M, on every platform; `jax.nn.dot_product_attention` holds
    all of them, unless its dtypes and shapes are such that cuDNN can compute it on a GPU. An axis along which `where`
    does not vary should have length 1 in it.

    Call it under `jit`, since by itself every call compiles.

    Args:
        query: `[..., N, D]`, floating-point.
        keys: `[..., M, D]`.
        values: `[..., M, V]`.
        where: Booleans that broadcast to `[..., N, M]`: which query may attend (True) which key.
        scale: A scalar; 1/√D unless given.
        chunk_size: How many queries to take at a time; it need not divide N.

    Returns:
        The context `[..., N, V]` in the values' dtype.

    Raises:
        ValueError: If the shapes do not fit each other or `chunk_size` is less than 1.
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
    query, keys, values, where = _prepare(query, keys, values, where)
    scale = _scale(scale, query, keys)

    def context(row: tuple[Array, Array | None]) -> Array:
        query, own = row
        allowed = where if own is None else own[..., None, :]
        return _attend(query[..., None, :], keys, values, allowed, scale)[0][..., 0, :]

    # What all queries share is not an input of each: broadcast to them, it would be as large as the weights.
    rows = jnp.moveaxis(query, -2, 0), None if where.shape[-2] == 1 else jnp.moveaxis(where, -2, 0)
    contexts = jax.lax.map(jax.checkpoint(context), rows, batch_size=chunk_size)
    return jnp.moveaxis(contexts, 0, -2).astype(dtype)


def init_multi_head(
    key: Array, query_features: int, key_features: int, value_features: int, *, features: int, heads: int
) -> dict[str, Array]:
    """Draws the parameters of `multi_head_attend`, Glorot-uniform over all heads together.

    Args:
        key: A random key.
        query_features: Width of the queries.
        key_features: Width of the keys.
        value_features: Width of the values.
        features: Width of all heads together and of the context.
        heads: How many heads share it.

    Returns:
        `query`, `key`, `value` `[width, H, features / H]` and `output` `[H, features / H, features]`, in float32: the
        kernels of Flax's `MultiHeadDotProductAttention`.

    Raises:
        ValueError: If `heads` does not divide `features`.
    """
    if heads < 1 or features % heads:
        raise ValueError(f"features must be a multiple of heads, got {features} and {heads}")
    widths = {"query": query_features, "key": key_features, "value": value_features, "output": features}
    kernels = {
        name: _glorot(subkey, (width, features))
        for (name, width), subkey in zip(widths.items(), jax.random.split(key, 4), strict=True)
    }
    output = kernels.pop("output").reshape(heads, features // heads, features)
    return {name: kernel.reshape(-1, heads, features // heads) for name, kernel in kernels.items()} | {"output": output}


def multi_head_attend(
    params: Mapping[str, ArrayLike],
    query: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Multi-head attention: each head attends between projections of its own.

    context = Σ_h attend(Q W_h^Q, K W_h^K, V W_h^V) W_h^O, without biases

    Every head has weights and a context of its own, so this is no score of `align_hidden_states`; one decoder state
    attends by `multi_head_attend(params, state[..., None, :], states, states)`.

    Args:
        params: From `init_multi_head`; they hold the number of heads.
        query: `[..., N, query_features]`, floating-point.
        keys: `[..., M, key_features]`.
        values: `[..., M, value_features]`.
        where: Booleans that broadcast to `[..., N, M]`: which query may attend (True) which key, in every head.

    Returns:
        The context `[..., N, features]` in the values' dtype, and the weights `[..., H, N, M]` in float32 or wider.

    Raises:
        ValueError: If the shapes do not fit each other.
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
    query, keys, values, where = _prepare(query, keys, values, where)
    heads = []
    for name, array in {"query": query, "key": keys, "value": values}.items():
        kernel, array = _wide({f"params['{name}']": params[name], name: array})
        _check_features(name, array, kernel)
        heads.append(jnp.einsum("...nd,dhf->...hnf", array, kernel))
    contexts, weights = attend(*heads, where=where[..., None, :, :])
    contexts, output = _wide({"context": contexts, "params['output']": params["output"]})
    return jnp.einsum("...hnf,hfo->...no", contexts, output).astype(dtype), weights


def dot_score(states: ArrayLike, state: ArrayLike) -> Array:
    """The dot product of a state with each of the states.

    score_m = h_m · s

    Args:
        states: h, `[..., M, D]`, floating-point.
        state: s, `[..., D]`.

    Returns:
        Scores `[..., M]`, in float32 or wider.

    Raises:
        ValueError: If the states differ in width.
        TypeError: If an array is not floating-point.

    References:
        Luong et al., Effective Approaches to Attention-based Neural Machine Translation,
        https://arxiv.org/abs/1508.04025
    """
    states, state = _wide({"states": states, "state": state})
    if states.shape[-1] != state.shape[-1]:
        raise ValueError(
            f"states {states.shape} and state {state.shape} must have one width for a dot product; "
            "between others there are general_score and additive_score"
        )
    return jnp.einsum("...md,...d->...m", states, state)


def init_general_score(key: Array, encoder_features: int, decoder_features: int) -> dict[str, Array]:
    """Draws the parameters of `general_score`, Glorot-uniform.

    Args:
        key: A random key.
        encoder_features: Width of the states that are attended.
        decoder_features: Width of the state that attends.

    Returns:
        `kernel` `[encoder_features, decoder_features]`, in float32.
    """
    return {"kernel": _glorot(key, (encoder_features, decoder_features))}


def general_score(params: Mapping[str, ArrayLike]) -> Score:
    """A learned bilinear score, for states of any two widths.

    score_m = h_mᵀ W s

    Args:
        params: From `init_general_score`.

    Returns:
        A score `(states [..., M, E], state [..., D]) -> [..., M]`, in float32 or wider, which raises `ValueError` if
        the parameters are for other widths.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jaxkd import attention
        >>> params = attention.init_general_score(jax.random.key(0), 4, 3)
        >>> encoder_states, decoder_state = jnp.ones((5, 4)), jnp.ones(3)
        >>> score = attention.general_score(params)
        >>> context, weights = attention.align_hidden_states(encoder_states, decoder_state, score=score)
        >>> print(weights)
        [0.2 0.2 0.2 0.2 0.2]

    References:
        Luong et al., Effective Approaches to Attention-based Neural Machine Translation,
        https://arxiv.org/abs/1508.04025
    """

    def score(states: ArrayLike, state: ArrayLike) -> Array:
        states, state, kernel = _wide({"states": states, "state": state, "params['kernel']": params["kernel"]})
        _check_features("states", states, kernel)
        _check_features("state", state, kernel.T)
        return jnp.einsum("...me,...e->...m", states, jnp.einsum("ed,...d->...e", kernel, state))

    return score


def init_additive_score(key: Array, encoder_features: int, decoder_features: int, features: int) -> dict[str, Array]:
    """Draws the parameters of `additive_score`: Glorot-uniform, and biases of 0.

    Args:
        key: A random key.
        encoder_features: Width of the states that are attended.
        decoder_features: Width of the state that attends.
        features: Width of the hidden layer.

    Returns:
        `encoder` `[encoder_features, features]`, `decoder` `[decoder_features, features]`, `bias` and `output`
        `[features]`, in float32.
    """
    encoder_key, decoder_key, output_key = jax.random.split(key, 3)
    return {
        "encoder": _glorot(encoder_key, (encoder_features, features)),
        "decoder": _glorot(decoder_key, (decoder_features, features)),
        "bias": jnp.zeros(features, jnp.float32),
        "output": _glorot(output_key, (features, 1))[:, 0],
    }


def additive_score(params: Mapping[str, ArrayLike]) -> Score:
    """A score by a network with one hidden layer, for states of any two widths.

    score_m = vᵀ tanh(W_e h_m + W_d s + b)

    Args:
        params: From `init_additive_score`.

    Returns:
        A score `(states [..., M, E], state [..., D]) -> [..., M]`, in float32 or wider, which raises `ValueError` if
        the parameters are for other widths.

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
        named = {f"params['{name}']": params[name] for name in ("encoder", "decoder", "bias", "output")}
        states, state, encoder, decoder, bias, output = _wide({"states": states, "state": state, **named})
        _check_features("states", states, encoder)
        _check_features("state", state, decoder)
        from_state = jnp.einsum("...d,df->...f", state, decoder)
        hidden = jnp.einsum("...me,ef->...mf", states, encoder) + from_state[..., None, :]
        return jnp.einsum("...mf,f->...m", jnp.tanh(hidden + jnp.broadcast_to(bias, hidden.shape)), output)

    return score


def align_hidden_states(
    encoder_states: ArrayLike, decoder_state: ArrayLike, *, score: Score = dot_score, where: ArrayLike | None = None
) -> tuple[Array, Array]:
    """The mean of the encoder's states, weighted by what each has to do with a state of the decoder.

    weights = softmax over m of score(h_m, s),  context = Σ_m weights_m h_m

    Several decoder states `[T, D]` of one sequence align by
    `jax.vmap(align_hidden_states, in_axes=(None, 0))(encoder_states, decoder_states)`; with a batch in front of them,
    by `in_axes=(None, 1), out_axes=1`.

    Args:
        encoder_states: h, `[..., M, D]`, floating-point.
        decoder_state: s, `[..., D]`; of another width if the score takes it.
        score: `dot_score`, `general_score(params)`, `additive_score(params)`, or any function
            `(states [..., M, D], state [..., D']) -> [..., M]`. It gets states in float32 or wider. A score of −inf
            rules a finite state out; `where` does so with any.
        where: Booleans that broadcast to `[..., M]`: the states that may be attended (True).

    Returns:
        The context `[..., D]` in the encoder's dtype, and the weights `[..., M]` in float32 or wider.

    Raises:
        ValueError: If the shapes do not fit each other.
        TypeError: If an array is not floating-point.

    Example:
        The scores are `encoder_states @ decoder_state`; their softmax weighs the encoder's states:

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
    dtype = jnp.asarray(encoder_states).dtype
    states, state = _wide({"encoder_states": encoder_states, "decoder_state": decoder_state})
    if states.ndim < 2 or state.ndim < 1 or states.shape[:-2] != state.shape[:-1]:
        raise ValueError(
            "encoder_states and decoder_state must be [..., M, D] and [..., D] with the same leading axes, "
            f"got {states.shape} and {state.shape}; for several decoder states use jax.vmap"
        )
    where = _allowed(where, states.shape[:-1])
    states = jnp.where(where[..., None], states, 0)
    state = jnp.where(where.any(-1)[..., None], state, 0)
    scores = score(states, state)
    if scores.shape != states.shape[:-1]:
        raise ValueError(f"score must return one number per encoder state {states.shape[:-1]}, got {scores.shape}")
    weights = _softmax(scores, where)
    return jnp.einsum("...m,...md->...d", weights, states).astype(dtype), weights


def _attend(query: Array, keys: Array, values: Array, where: Array, scale: Array) -> tuple[Array, Array]:
    weights = _softmax(scale * jnp.einsum("...nd,...md->...nm", query, keys), where)
    return jnp.einsum("...nm,...mv->...nv", weights, values), weights


def _softmax(scores: Array, where: Array) -> Array:
    """Softmax over the last axis in which what is masked or at −inf gets 0, even if that is all."""
    allowed = where & (scores != -jnp.inf)
    # The lowest number instead of −inf: a row of nothing else would give NaN, which a mask hides but does not undo.
    weights = jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(scores.dtype).min))
    return jnp.where(allowed, weights, 0)


def _prepare(
    query: ArrayLike, keys: ArrayLike, values: ArrayLike, where: ArrayLike | None
) -> tuple[Array, Array, Array, Array]:
    """The arrays widened, with 0 for a query that may attend nothing and for what no query may attend, and the mask."""
    query, keys, values = _wide({"query": query, "keys": keys, "values": values})
    fit = query.ndim >= 2 and query.shape[:-2] == keys.shape[:-2] and keys.shape[:-1] == values.shape[:-1]
    if not fit:
        raise ValueError(
            "query, keys and values must be [..., N, D], [..., M, D] and [..., M, V] with the same leading axes, "
            f"got {query.shape}, {keys.shape} and {values.shape}"
        )
    where = _allowed(where, (*query.shape[:-1], keys.shape[-2]))
    attended = where.any(-2)[..., None]
    query = jnp.where(where.any(-1)[..., None], query, 0)
    return query, jnp.where(attended, keys, 0), jnp.where(attended, values, 0), where


def _allowed(where: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    """The mask with the axes of `shape`, of length 1 where it lacks them: it is never copied along an axis."""
    where = jnp.ones((), bool) if where is None else jnp.asarray(where)
    sizes = (1,) * (len(shape) - where.ndim) + where.shape
    fits = len(sizes) == len(shape) and all(size in (1, full) for size, full in zip(sizes, shape, strict=True))
    if where.dtype != bool or not fits:
        raise ValueError(f"where must be booleans that broadcast to {shape}, got {where.dtype} {where.shape}")
    return where.reshape(sizes)


def _scale(scale: ArrayLike | None, query: Array, keys: Array) -> Array:
    if query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"query {query.shape} and keys {keys.shape} must have one width; multi_head_attend projects them to one"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if jnp.ndim(scale):
        raise ValueError(f"scale must be a scalar, got shape {jnp.shape(scale)}")
    return jnp.asarray(scale, query.dtype)


def _check_features(name: str, array: Array, kernel: Array) -> None:
    if array.shape[-1] != kernel.shape[0]:
        raise ValueError(f"{name} {array.shape} must have {kernel.shape[0]} features, as the parameters do")


def _wide(arrays: Mapping[str, ArrayLike]) -> tuple[Array, ...]:
    """The arrays in float32, or all in float64 if one of them came in that."""
    converted = {name: jnp.asarray(array) for name, array in arrays.items()}
    for name, array in converted.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating-point, got {array.dtype}")
    dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in converted.values()) else jnp.float32
    return tuple(array.astype(dtype) for array in converted.values())


def _glorot(key: Array, shape: tuple[int, int]) -> Array:
    return jax.nn.initializers.glorot_uniform()(key, shape, jnp.float32)
