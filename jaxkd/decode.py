"""Greedy decoding, sampling and beam search, for any model that predicts one token after another.

A model is a function from its state and the last token to the logits of the next one. Token 0 is
padding. Neither it nor the token that starts a sentence is ever produced, but scores are the
model's own log-probabilities, which are normalised over all tokens, those two included.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

DecodeStep: TypeAlias = Callable[[Any, Array], tuple[Array, Any]]
"""`(state, tokens [N]) -> (logits [N, V], state)`: reads one more token of each of N sentences.

The state is a tree whose leaves all have the sentences as their first axis, and keep their shape
and dtype. In a beam search, N is a multiple of the batch size. A leaf that a step returns as it
received it, the very same array, is not copied when beams are reordered.
"""


class Beams(NamedTuple):
    """The sentences that a beam search returns, best first.

    Attributes:
        tokens: `[B, K, T]`, int32, without the start token and with the end token, padded with 0.
        scores: `[B, K]`, log-probability divided by the length penalty. −inf for beams without a
            sentence, if there are fewer than K; NaN where logits were NaN; their tokens are 0.
    """

    tokens: Array
    scores: Array


def greedy(step: DecodeStep, state: Any, *, max_length: int, start: int = 2, end: int = 3) -> Array:
    """Decodes by choosing the most probable token in every step.

    The loop stops when every sentence has ended.

    Args:
        step: The model.
        state: The state of the model before the first token, for B sentences.
        max_length: Maximum number of tokens; longer sentences are cut off.
        start: The token that starts a sentence.
        end: The token that ends a sentence.

    Returns:
        Tokens `[B, max_length]`, int32, without the start token and with the end token, padded
        with 0. They mean nothing where logits are NaN; `beam_search` shows that in its scores.

    Raises:
        ValueError: If `max_length` is no integer of at least 1, `start` and `end` are equal, less
            than 1 or not in the vocabulary, or `step` returns logits or a state of other shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import decode
        >>> # After the start token 2 follow 5, 4 and the end token 3.
        >>> table = jnp.zeros((6, 6)).at[jnp.array([2, 5, 4]), jnp.array([5, 4, 3])].set(1.0)
        >>> decode.greedy(lambda state, tokens: (table[tokens], state), jnp.zeros(1), max_length=5)
        Array([[5, 4, 3, 0, 0]], dtype=int32)
    """
    _check_options(max_length, start, end)
    return _decode(
        step,
        state,
        lambda _, log_probabilities: log_probabilities.argmax(-1),
        max_length=max_length,
        start=start,
        end=end,
    )


def sample(
    step: DecodeStep,
    state: Any,
    key: Array,
    *,
    max_length: int,
    temperature: ArrayLike = 1.0,
    start: int = 2,
    end: int = 3,
) -> Array:
    """Decodes by drawing every token from the model's distribution.

    p(token) ∝ softmax(z / T) over all tokens but 0 and `start`, which are never produced

    The loop stops when every sentence has ended. What is drawn for a sentence depends on the key
    and on the sentence's place in the batch.

    On-policy distillation trains on samples of the student. `losses.sequence_reverse_kl_loss`
    expects the log-probabilities with which they were drawn: where 0 or `start` have probability,
    set their logits to −inf before they are computed.

    Args:
        step: The model.
        state: The state of the model before the first token, for B sentences.
        key: A random key.
        max_length: Maximum number of tokens; longer sentences are cut off.
        temperature: T > 0, a scalar. Near 0 it is `greedy`.
        start: The token that starts a sentence.
        end: The token that ends a sentence.

    Returns:
        Tokens `[B, max_length]`, int32, without the start token and with the end token, padded
        with 0. They mean nothing where logits are NaN.

    Raises:
        ValueError: If `max_length` is no integer of at least 1, the temperature is known and not
            positive, `start` and `end` are equal, less than 1 or not in the vocabulary, or `step`
            returns logits or a state of other shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import decode
        >>> # Tokens 4 and 5 are as probable as the end token 3, until it is drawn.
        >>> table = jnp.zeros(6)
        >>> model = lambda state, tokens: (jnp.broadcast_to(table, (len(tokens), 6)), state)
        >>> tokens = decode.sample(model, jnp.zeros(2), jax.random.key(0), max_length=5)
        >>> tokens.shape
        (2, 5)
    """
    _check_options(max_length, start, end)
    if not isinstance(temperature, jax.core.Tracer) and not np.asarray(temperature) > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def draw(position: Array, log_probabilities: Array) -> Array:
        scaled = log_probabilities / jnp.asarray(temperature, log_probabilities.dtype)
        return jax.random.categorical(jax.random.fold_in(key, position), scaled)

    return _decode(step, state, draw, max_length=max_length, start=start, end=end)


def _decode(
    step: DecodeStep,
    state: Any,
    choose: Callable[[Array, Array], Array],
    *,
    max_length: int,
    start: int,
    end: int,
) -> Array:
    """Decodes by choosing each token from `(position, log-probabilities [B, V])`."""
    batch_size = _read_batch_size(state)

    def cond_fn(carry: tuple) -> Array:
        position, _, _, unfinished, _ = carry
        return (position < max_length) & unfinished.any()

    def body_fn(carry: tuple) -> tuple:
        position, tokens, last, unfinished, state = carry
        logits, state = _take_step(step, state, last, start, end)
        chosen = choose(position, _log_probabilities(logits, start))
        # Finished sentences stay in the batch and produce padding.
        chosen = jnp.where(unfinished, chosen, 0).astype(jnp.int32)
        tokens = tokens.at[:, position].set(chosen)
        return position + 1, tokens, chosen, unfinished & (chosen != end), state

    tokens = jnp.zeros((batch_size, max_length), jnp.int32)
    last = jnp.full(batch_size, start, jnp.int32)
    unfinished = jnp.ones(batch_size, bool)
    _, tokens, *_ = lax.while_loop(cond_fn, body_fn, (0, tokens, last, unfinished, state))
    return tokens


class _Search(NamedTuple):
    """State of a beam search over B sentences with K beams each.

    Attributes:
        position: Number of tokens chosen so far.
        tokens: `[B, K, T]`.
        sums: Log-probabilities `[B, K]`.
        lengths: Number of tokens in each beam, `[B, K]`.
        finished: True for beams that have ended, `[B, K]`.
        last: The latest tokens, `[B, K]`.
        state: The state of the model, whose leaves have a first axis of `B · K`.
    """

    position: Array | int
    tokens: Array
    sums: Array
    lengths: Array
    finished: Array
    last: Array
    state: Any


def beam_search(
    step: DecodeStep,
    state: Any,
    *,
    beams: int,
    max_length: int,
    length_penalty: float = 0.0,
    start: int = 2,
    end: int = 3,
) -> Beams:
    """Decodes by keeping the K best prefixes of every sentence and extending each of them.

    score = log p(tokens) / ((5 + n) / 6)^length_penalty, with n tokens, the last included

    A finished sentence keeps its beam and its score until K others are better. The loop stops when
    all beams of all sentences are finished. With one beam this is `greedy`.

    Args:
        step: The model.
        state: The state of the model before the first token, for B sentences.
        beams: K, the number of prefixes to keep.
        max_length: T, the maximum number of tokens. Longer sentences are cut off and ranked by the
            score that they have then.
        length_penalty: Exponent of the length penalty. At 0 the score is the log-probability;
            larger values favour long sentences.
        start: The token that starts a sentence.
        end: The token that ends a sentence.

    Returns:
        The K best sentences.

    Raises:
        ValueError: If `beams` or `max_length` is no integer of at least 1, `length_penalty` is
            negative, `start` and `end` are equal, less than 1 or not in the vocabulary, or `step`
            returns logits or a state of other shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import decode
        >>> # In every step the end token 3 has probability 0.4 and token 4 has 0.6.
        >>> table = jnp.log(jnp.array([0.0, 0.0, 0.0, 0.4, 0.6]))
        >>> model = lambda state, tokens: (jnp.broadcast_to(table, (len(tokens), 5)), state)
        >>> best = decode.beam_search(model, jnp.zeros(1), beams=2, max_length=2)
        >>> best.tokens.tolist()
        [[[3, 0], [4, 4]]]
        >>> print(jnp.exp(best.scores))
        [[0.4  0.36]]

    References:
        Wu et al., Google's Neural Machine Translation System, https://arxiv.org/abs/1609.08144
    """
    _check_options(max_length, start, end)
    _check_count("beams", beams)
    # `not >=` rather than `<`, so that NaN is refused as well.
    if not length_penalty >= 0:
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}")

    def score(sums: Array, lengths: Array) -> Array:
        return sums / ((5 + lengths.astype(sums.dtype)) / 6) ** length_penalty

    def cond_fn(search: _Search) -> Array:
        # A beam at −inf holds no sentence, so it must not keep the loop running.
        unfinished = ~search.finished & (search.sums > -jnp.inf)
        return (search.position < max_length) & unfinished.any()

    def body_fn(search: _Search) -> _Search:
        logits, state = _take_step(step, search.state, search.last.reshape(-1), start, end)
        vocab_size = logits.shape[-1]
        increments = _log_probabilities(logits, start).reshape(*search.finished.shape, -1)
        # A finished beam has a single continuation: padding, at no cost.
        padding = jnp.where(jnp.arange(vocab_size) == 0, 0.0, -jnp.inf)
        increments = jnp.where(search.finished[..., None], padding[None, None], increments)
        sums = search.sums[..., None] + increments
        lengths = jnp.where(search.finished, search.lengths, search.position + 1)
        # All continuations compete, since several of one beam may be among the best.
        scores = score(sums, lengths[..., None]).reshape(len(sums), -1)
        _, indices = lax.top_k(scores, beams)
        parents = indices // vocab_size
        chosen_tokens = (indices % vocab_size).astype(jnp.int32)
        tokens = _take_beams(search.tokens, parents)
        return _Search(
            position=search.position + 1,
            tokens=tokens.at[..., search.position].set(chosen_tokens),
            sums=jnp.take_along_axis(sums.reshape(len(sums), -1), indices, 1),
            lengths=_take_beams(lengths, parents),
            finished=_take_beams(search.finished, parents) | (chosen_tokens == end),
            last=chosen_tokens,
            state=jax.tree.map(functools.partial(_reorder_leaf, parents), search.state, state),
        )

    search = _init_search(state, beams, max_length, start)
    search = lax.while_loop(cond_fn, body_fn, search)
    scores = score(search.sums, search.lengths)
    return Beams(jnp.where(scores[..., None] > -jnp.inf, search.tokens, 0), scores)


def _init_search(state: Any, beams: int, max_length: int, start: int) -> _Search:
    shape = _read_batch_size(state), beams
    # Before the first token all beams of a sentence are equal. All but the first start at −inf:
    # otherwise the search would extend K copies of one sentence.
    sums = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    return _Search(
        position=0,
        tokens=jnp.zeros((*shape, max_length), jnp.int32),
        sums=jnp.broadcast_to(sums, shape),
        lengths=jnp.zeros(shape, jnp.int32),
        finished=jnp.zeros(shape, bool),
        last=jnp.full(shape, start, jnp.int32),
        state=jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, 0), state),
    )


def _log_probabilities(logits: Array, start: int) -> Array:
    """Returns log-probabilities `[N, V]`, with −inf for tokens that must not be produced.

    A row in which all logits are −inf gives −inf, never NaN.
    """
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    tokens = jnp.arange(logits.shape[-1])[None]
    excluded = (logits == -jnp.inf) | (tokens == 0) | (tokens == start)
    # The softmax is over all tokens: excluding some must not raise the probability of the others.
    return jnp.where(excluded, -jnp.inf, jax.nn.log_softmax(logits))


def _take_beams(array: Array, beams: Array) -> Array:
    """Takes the entries of the given beams `[B, K]` from an array `[B, K, ...]`."""
    return array[jnp.arange(len(array))[:, None], beams]


def _reorder_leaf(parents: Array, before: Array, after: Array) -> Array:
    """Reorders a leaf `[B · K, ...]` of the state by the beams `[B, K]` that were extended."""
    # A leaf that the step returned untouched, such as the encoder's states, is equal in all beams
    # of a sentence, so reordering it would be a copy for nothing.
    if after is before:
        return after
    by_beam = after.reshape(-1, parents.shape[1], *after.shape[1:])
    reordered = _take_beams(by_beam, parents)
    return reordered.reshape(-1, *reordered.shape[2:])


def _read_batch_size(state: Any) -> int:
    leading_axes = {leaf.shape[:1] for leaf in jax.tree.leaves(state)}
    if len(leading_axes) != 1 or () in leading_axes:
        raise ValueError(
            "all leaves of the state must have the sentences as their first axis, got the leading "
            f"axes {sorted(leading_axes)}"
        )
    return leading_axes.pop()[0]


def _take_step(
    step: DecodeStep, state: Any, tokens: Array, start: int, end: int
) -> tuple[Array, Any]:
    """Reads one more token of each sentence; raises `ValueError` if the results do not fit."""
    expected = _describe_leaves(state)
    logits, state = step(state, tokens)
    shape = getattr(logits, "shape", ())
    # Logits of one sentence would be broadcast to all.
    if len(shape) != 2 or shape[0] != tokens.size:
        raise ValueError(
            f"step must return (logits [N, V], state), with N = {tokens.size} tokens to read, got "
            f"logits of the shape {shape}"
        )
    actual = _describe_leaves(state)
    changed = sorted(
        path for path in {**expected, **actual} if expected.get(path) != actual.get(path)
    )
    if changed:
        path = changed[0]
        raise ValueError(
            "step must return a state of the structure, shapes and dtypes that it gets, but "
            f"{f'the leaf {path[:80]}' if path else 'the state'} is {actual.get(path, 'missing')} "
            f"instead of {expected.get(path, 'missing')}"
        )
    vocab_size = logits.shape[-1]
    if max(start, end) >= vocab_size:
        raise ValueError(
            f"start and end must be tokens of the model, in [1, {vocab_size}), got {start} and "
            f"{end}: pass those of its tokenizer"
        )
    return logits, state


def _describe_leaves(state: Any) -> dict[str, str]:
    """Returns shape and dtype of each leaf of a state by path."""
    return {
        jax.tree_util.keystr(path): f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r:.80}")


def _check_options(max_length: int, start: int, end: int) -> None:
    _check_count("max_length", max_length)
    if start == end or min(start, end) < 1:
        raise ValueError(
            "start and end must be different tokens of at least 1, since 0 is padding; got "
            f"{start} and {end}"
        )
