"""Sentences from a model that predicts one token after another: greedily, and by beam search.

Nothing here knows the model: it is a function of what it has read and the token that it reads next. 0 is padding, and
neither it nor the token that starts a sentence is ever produced; scores are the model's own log-probabilities, in which
the two keep their part.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

Step: TypeAlias = Callable[[Any, Array], tuple[Array, Any]]
"""`(state, tokens [N]) -> (logits [N, V], state)`: what follows N sentences, after one token more of each.

The state is a tree whose leaves all begin with the axis of the sentences, and stay as they are in shape and dtype. N is
a multiple of the batch in a beam search, which does not copy what a step hands on as it got it, the array itself.
"""


class Beams(NamedTuple):
    """The sentences that a beam search found, best first.

    Attributes:
        tokens: `[B, K, T]`, int32: without the token that starts a sentence, with the one that ends it, then 0.
        scores: `[B, K]`: log-probability over length penalty; −inf where there are less than K sentences, whose tokens
            are 0.
    """

    tokens: Array
    scores: Array


def greedy(step: Step, state: Any, *, max_length: int, start: int = 2, end: int = 3) -> Array:
    """The most probable token, again and again.

    The loop stops when every sentence has ended.

    Args:
        step: The model.
        state: What it knows before the first token, of B sentences.
        max_length: How many tokens to produce at most; a sentence that has not ended by then is cut off.
        start: The token that starts a sentence.
        end: The token that ends a sentence.

    Returns:
        Tokens `[B, max_length]`, int32: without the token that starts a sentence, with the one that ends it, then 0.

    Raises:
        ValueError: If `max_length` is less than 1, or `start` and `end` are not two tokens other than 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import decode
        >>> follows = {2: 5, 5: 4, 4: 3}  # 2, which starts a sentence, then 5, 4 and 3, which ends it
        >>> table = jnp.zeros((6, 6)).at[jnp.array([*follows]), jnp.array([*follows.values()])].set(1.0)
        >>> decode.greedy(lambda state, tokens: (table[tokens], state), jnp.zeros(1), max_length=5)
        Array([[5, 4, 3, 0, 0]], dtype=int32)
    """
    _check(max_length, start, end)
    batch = _batch(state)

    def goes_on(carry: tuple) -> Array:
        position, _, _, open_, _ = carry
        return (position < max_length) & open_.any()

    def advance(carry: tuple) -> tuple:
        position, tokens, last, open_, state = carry
        logits, state = step(state, last)
        best = jnp.where(open_, _log_probabilities(logits, start).argmax(-1), 0).astype(jnp.int32)
        return position + 1, tokens.at[:, position].set(best), best, open_ & (best != end), state

    first = jnp.full(batch, start, jnp.int32), jnp.ones(batch, bool), state
    return lax.while_loop(goes_on, advance, (0, jnp.zeros((batch, max_length), jnp.int32), *first))[1]


class _Search(NamedTuple):
    """A beam search on its way, over B sentences with K beams each.

    Attributes:
        position: How many tokens have been chosen.
        tokens: `[B, K, T]`.
        sums: Log-probabilities `[B, K]`.
        lengths: Tokens of each beam `[B, K]`.
        ended: Whether a beam has ended `[B, K]`.
        last: The newest tokens `[B, K]`.
        state: The model's, whose leaves begin with `B · K`.
    """

    position: Array | int
    tokens: Array
    sums: Array
    lengths: Array
    ended: Array
    last: Array
    state: Any


def beam_search(
    step: Step,
    state: Any,
    *,
    beams: int,
    max_length: int,
    length_penalty: float = 0.0,
    start: int = 2,
    end: int = 3,
) -> Beams:
    """Keeps the best beginnings of a sentence and goes on with each of them.

    score = log p(tokens) / ((5 + n) / 6)^length_penalty, with n tokens, the last included

    A sentence that has ended keeps its place and its score until K others are better. The loop stops when no beam is
    open any more, of any sentence. One beam is `greedy`.

    Args:
        step: The model.
        state: What it knows before the first token, of B sentences.
        beams: K, how many beginnings to keep.
        max_length: T, how many tokens to produce at most; a sentence that has not ended by then is cut off, and is
            ranked with the score that it has.
        length_penalty: 0 for the sum of the log-probabilities; more is kinder to long sentences.
        start: The token that starts a sentence.
        end: The token that ends a sentence.

    Returns:
        The K best sentences.

    Raises:
        ValueError: If `beams` or `max_length` is less than 1, `length_penalty` is negative, or `start` and `end` are
            not two tokens other than 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import decode
        >>> table = jnp.log(jnp.array([0.0, 0.0, 0.0, 0.4, 0.6]))  # 3 ends a sentence, 4 does not, whatever was read
        >>> model = lambda state, tokens: (jnp.broadcast_to(table, (len(tokens), 5)), state)
        >>> found = decode.beam_search(model, jnp.zeros(1), beams=2, max_length=2)
        >>> found.tokens.tolist()
        [[[3, 0], [4, 4]]]
        >>> print(jnp.exp(found.scores))
        [[0.4  0.36]]

    References:
        Wu et al., Google's Neural Machine Translation System, https://arxiv.org/abs/1609.08144
    """
    _check(max_length, start, end)
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    if not length_penalty >= 0:
        raise ValueError(f"length_penalty must be at least 0, got {length_penalty}")

    def ranked(sums: Array, lengths: Array) -> Array:
        return sums / ((5 + lengths.astype(sums.dtype)) / 6) ** length_penalty

    def goes_on(search: _Search) -> Array:
        return (search.position < max_length) & (~search.ended & (search.sums > -jnp.inf)).any()

    def advance(search: _Search) -> _Search:
        logits, state = step(search.state, search.last.reshape(-1))
        follows = _log_probabilities(logits, start).reshape(*search.ended.shape, -1)
        # An ended sentence has one way to go on, by padding, which costs nothing.
        stays = jnp.where(jnp.arange(logits.shape[-1]) == 0, 0.0, -jnp.inf)
        sums = search.sums[..., None] + jnp.where(search.ended[..., None], stays[None, None], follows)
        lengths = jnp.where(search.ended, search.lengths, search.position + 1)
        _, chosen = lax.top_k(ranked(sums, lengths[..., None]).reshape(len(sums), -1), beams)
        parent, token = chosen // logits.shape[-1], (chosen % logits.shape[-1]).astype(jnp.int32)
        tokens = _taken(search.tokens, parent).at[..., search.position].set(token)
        return _Search(
            search.position + 1,
            tokens,
            jnp.take_along_axis(sums.reshape(len(sums), -1), chosen, 1),
            _taken(lengths, parent),
            _taken(search.ended, parent) | (token == end),
            token,
            jax.tree.map(functools.partial(_follow, parent), search.state, state),
        )

    search = lax.while_loop(goes_on, advance, _first(state, beams, max_length, start))
    scores = ranked(search.sums, search.lengths)
    return Beams(jnp.where(scores[..., None] > -jnp.inf, search.tokens, 0), scores)


def _first(state: Any, beams: int, max_length: int, start: int) -> _Search:
    """The search before its first token: all beams are alike, so that one alone may be gone on with."""
    shape = _batch(state), beams
    return _Search(
        position=0,
        tokens=jnp.zeros((*shape, max_length), jnp.int32),
        sums=jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), shape),
        lengths=jnp.zeros(shape, jnp.int32),
        ended=jnp.zeros(shape, bool),
        last=jnp.full(shape, start, jnp.int32),
        state=jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, 0), state),
    )


def _log_probabilities(logits: Array, start: int) -> Array:
    """Those of the tokens that may be produced, `[N, V]`; −inf, never NaN, for others and where nothing may follow."""
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    tokens = jnp.arange(logits.shape[-1])[None]
    never = (logits == -jnp.inf) | (tokens == 0) | (tokens == start)
    return jnp.where(never, -jnp.inf, jax.nn.log_softmax(logits))


def _taken(array: Array, beam: Array) -> Array:
    """The entries `[B, K, ...]` of other beams `[B, K]`."""
    return array[jnp.arange(len(array))[:, None], beam]


def _follow(parent: Array, before: Array, now: Array) -> Array:
    """What the beams `[B, K]` that are gone on with remember, `[B · K, ...]`."""
    # What the model hands on as it got it, such as the source's states, all beams of a sentence have in common.
    return now if now is before else _merged(_taken(_apart(now, parent.shape[1]), parent))


def _apart(leaf: Array, beams: int) -> Array:
    return leaf.reshape(-1, beams, *leaf.shape[1:])


def _merged(leaf: Array) -> Array:
    return leaf.reshape(-1, *leaf.shape[2:])


def _batch(state: Any) -> int:
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(state)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"all leaves of the state must begin with the axis of the sentences, got {sorted(sizes)}")
    return sizes.pop()[0]


def _check(max_length: int, start: int, end: int) -> None:
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if start == end or min(start, end) < 1:
        raise ValueError(
            f"start and end must be two tokens, neither of them 0, which is padding; got {start} and {end}"
        )
