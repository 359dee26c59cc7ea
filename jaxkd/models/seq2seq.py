"""A recurrent encoder-decoder with attention, and how any encoder-decoder is asked for one token after another.

A pair of sentences is one array `[2, S]`: the source's tokens, and the target's, which begin with the token that starts
a sentence and end with the one that ends it. 0 is padding, on the right.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkd import attention
from jaxkd.models.layers import Dropout, RowDense
from jaxkd.models.model import Outputs
from jaxkd.models.recurrent import GRU, LSTM, State


class Alignment(NamedTuple):
    """How a decoder's states score the encoder's: one of `DOT`, `GENERAL`, `additive(features)`, or one of one's own.

    Attributes:
        init: `(key, encoder_features, decoder_features) -> params`; `None` if there are none.
        score: `(params) -> score`, as `jaxkd.attention.align_hidden_states` takes it.
    """

    init: Callable[[Array, int, int], dict[str, Array]] | None
    score: Callable[[dict[str, Array]], attention.Score]


DOT = Alignment(None, lambda params: attention.dot_score)
"""`jaxkd.attention.dot_score`."""

GENERAL = Alignment(attention.init_general_score, attention.general_score)
"""`jaxkd.attention.general_score`."""


def additive(features: int) -> Alignment:
    """`jaxkd.attention.additive_score` with a hidden layer of this width."""

    def init(key: Array, encoder_features: int, decoder_features: int) -> dict[str, Array]:
        return attention.init_additive_score(key, encoder_features, decoder_features, features)

    return Alignment(init, attention.additive_score)


class Decoder(NamedTuple):
    """An encoder-decoder as a pair of pure functions that translate token by token; see `jaxkd.decode`.

    Attributes:
        begin: `(variables, source [B, S], max_length) -> state`, whose leaves all begin with the batch's axis, for
            targets of up to `max_length` tokens after the first.
        step: `(variables, state, tokens [B]) -> (logits [B, V], state)`: what follows, after one token more.
    """

    begin: Callable[[dict, Array, int], Any]
    step: Callable[[dict, Any, Array], tuple[Array, Any]]


def make_decoder(module: nn.Module) -> Decoder:
    """Makes the decoder of a module that has the methods `begin` and `step`, as `Seq2Seq` and `Transformer` have.

    Args:
        module: The module, unbound.

    Returns:
        The two functions, over the variables of `from_linen(module)`.

    Raises:
        TypeError: If the module lacks one of the methods.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> from jaxkd import decode
        >>> from jaxkd.models import from_linen
        >>> from jaxkd.models.seq2seq import Seq2Seq, make_decoder
        >>> module, pairs = Seq2Seq(10, embedding=4, hidden=4), jnp.array([[[5, 6, 3], [2, 7, 3]]])
        >>> variables = from_linen(module).init(jax.random.key(0), pairs)
        >>> decoder = make_decoder(module)
        >>> state = decoder.begin(variables, pairs[:, 0], 7)
        >>> decode.greedy(functools.partial(decoder.step, variables), state, max_length=7).shape
        (1, 7)
    """
    for name in ("begin", "step"):
        if not hasattr(module, name):
            raise TypeError(f"{type(module).__name__} has no method {name!r}: it is no encoder-decoder")

    def begin(variables: dict, source: Array, max_length: int) -> Any:
        return module.apply(variables, source, max_length, method="begin")

    def step(variables: dict, state: Any, tokens: Array) -> tuple[Array, Any]:
        answer: Any = module.apply(variables, state, tokens, method="step")
        return answer

    return Decoder(begin, step)


class _Reading(NamedTuple):
    """What a decoder knows: the state of each of its layers; the source's states, which of them count, and the last."""

    layers: tuple[State, ...]
    states: Array
    where: Array
    last: Array


class Seq2Seq(nn.Module):
    """Two recurrent networks: one reads the source, the other goes on from its last state and writes the target.

    h_t = decoder(embed(y_t), h_{t−1}),  context_t = align(encoder's states, h_t),  h̃_t = tanh(W [context_t; h_t] + b)

    That is Luong's arrangement without input feeding: what is attended does not reach the next step, so that everything
    but the recurrence itself is computed for all steps at once.

    Attributes:
        vocab_size: Number of the source's tokens.
        target_vocab_size: Number of the target's tokens, and of logits; by default as many.
        embedding: Width of the embeddings.
        hidden: Width of the encoder's and the decoder's states.
        layers: How many recurrent layers each of the two has.
        cell: `GRU` or `LSTM`.
        alignment: How the decoder's states score the encoder's. Without any, the context is at every step the last
            state, Cho's summary of the whole source.
        bidirectional: Whether the encoder reads from both ends; each of its directions then has half of the width.
        teacher_forcing: Probability with which a step reads the true token in training; else it reads the token that
            the model, without dropout, finds most probable after what it has read.
        dropout: Share of the embeddings and of the last states that training drops.

    References:
        Sutskever et al., Sequence to Sequence Learning with Neural Networks, https://arxiv.org/abs/1409.3215
        Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation,
        https://arxiv.org/abs/1406.1078
        Luong et al., Effective Approaches to Attention-based Neural Machine Translation,
        https://arxiv.org/abs/1508.04025
        Bengio et al., Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks,
        https://arxiv.org/abs/1506.03099
    """

    vocab_size: int
    target_vocab_size: int | None = None
    embedding: int = 128
    hidden: int = 128
    layers: int = 1
    cell: type[LSTM] | type[GRU] = GRU
    alignment: Alignment | None = DOT
    bidirectional: bool = True
    teacher_forcing: float = 1.0
    dropout: float = 0.0

    def setup(self) -> None:
        """Declares the layers."""
        targets = self.target_vocab_size or self.vocab_size
        width = self.hidden // 2 if self.bidirectional else self.hidden
        numbers = [str(number + 1) for number in range(self.layers)]
        self.source_embedding = nn.Embed(self.vocab_size, self.embedding)
        self.target_embedding = nn.Embed(targets, self.embedding)
        self.encoder = {number: self.cell(width) for number in numbers}
        self.encoder_reverse = {number: self.cell(width, reverse=True) for number in numbers}
        self.decoder = {number: self.cell(self.hidden) for number in numbers}
        self.combined = RowDense(self.hidden)
        self.drop = Dropout(self.dropout)
        self.logits = RowDense(targets)
        if self.alignment and self.alignment.init:
            self.score_params = self.param("alignment", self.alignment.init, self.hidden, self.hidden)

    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Predicts each of the target's tokens from the source and the tokens before it.

        Args:
            inputs: Pairs of sentences `[B, 2, S]`, integers, padded with 0 on the right.
            train: Whether to drop, and to read the model's own tokens if `teacher_forcing` is less than 1.

        Returns:
            Logits `[B, S − 1, V]` for the tokens `inputs[:, 1, 1:]`; features `encoder` `[B, S, hidden]`, `decoder` and
            `pre_logits` `[B, S − 1, hidden]`, and with attention the weights `alignment` `[B, S − 1, S]`, each 0 at
            padding.

        Raises:
            ValueError: If the shape is none of pairs, or an attribute makes no sense.
            TypeError: If the tokens are not integers.
        """
        check_pairs(inputs)
        source, target = inputs[:, 0], inputs[:, 1, :-1]
        reading = self._read(source, train)
        mixed = train and self.teacher_forcing < 1 and not self.is_initializing()
        x = self._embed(self.target_embedding, self._mixed(source, target) if mixed else target, train)
        for layer, state in zip(self.decoder.values(), reading.layers, strict=True):
            x, _ = layer(x, target != 0, state)
        pre_logits, weights = self._aligned(x, target != 0, reading)
        named = {"encoder": reading.states, "decoder": x, "pre_logits": pre_logits}
        named |= {} if weights is None else {"alignment": weights}
        return Outputs(self.logits(self.drop(pre_logits, deterministic=not train)), named)

    def begin(self, source: Array, max_length: int) -> _Reading:
        """The state before the target's first token, for sources `[B, S]`; targets may be of any length."""
        del max_length
        return self._read(source, train=False)

    def step(self, reading: _Reading, tokens: Array) -> tuple[Array, _Reading]:
        """Logits `[B, V]` for what follows tokens `[B]`, and the state after them."""
        x, states = self.target_embedding(tokens), []
        for layer, state in zip(self.decoder.values(), reading.layers, strict=True):
            x, state = layer.step(x, state)
            states.append(state)
        pre_logits, _ = self._aligned(x[:, None], jnp.ones((len(x), 1), bool), reading)
        return self.logits(pre_logits[:, 0]), reading._replace(layers=tuple(states))

    def _read(self, source: Array, train: bool) -> _Reading:
        """The source's states, and the last ones as the decoder's first."""
        self._check()
        where = source != 0
        x, states = self._embed(self.source_embedding, source, train), []
        for forward, backward in zip(self.encoder.values(), self.encoder_reverse.values(), strict=True):
            read = [layer(x, where) for layer in ([forward, backward] if self.bidirectional else [forward])]
            x, last = jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *read)
            states.append(last)
        return _Reading(tuple(states), x, where, jax.tree.leaves(states[-1])[0].astype(x.dtype))

    def _embed(self, embedding: nn.Embed, tokens: Array, train: bool) -> Array:
        return self.drop(embedding(tokens), deterministic=not train)

    def _aligned(self, x: Array, where: Array, reading: _Reading) -> tuple[Array, Array | None]:
        """The decoder's states `[B, T, H]` with what they attend, and the weights, 0 where no token counts."""
        context, weights = self._context(x, reading)
        x = jnp.tanh(self.combined(jnp.concatenate([context, x], -1)))
        x, weights = jax.tree.map(lambda array: jnp.where(where[..., None], array, 0), (x, weights))
        return x, weights

    def _context(self, x: Array, reading: _Reading) -> tuple[Array, Array | None]:
        """What states `[B, T, H]` are told of the source, and with attention the weights."""
        if self.alignment is None:
            return jnp.broadcast_to(reading.last[:, None], x.shape), None
        score = self.alignment.score(self.score_params if self.alignment.init else {})

        def align(state: Array) -> tuple[Array, Array]:
            return attention.align_hidden_states(reading.states, state, score=score, where=reading.where)

        return jax.vmap(align, in_axes=1, out_axes=1)(x)

    def _mixed(self, source: Array, target: Array) -> Array:
        """The tokens that each step reads in training: true ones, and the model's own.

        No gradient passes a choice of tokens. So the tokens are found step by step without one, and what they lead to
        is computed at once.
        """
        module, bound = self.unbind()
        decoder, variables = make_decoder(module), dict(lax.stop_gradient(bound))
        true = jax.random.bernoulli(self.make_rng("dropout"), self.teacher_forcing, target.shape)

        def step(carry: tuple[Any, Array], now: tuple[Array, Array]) -> tuple[tuple[Any, Array], Array]:
            state, own = carry
            read = jnp.where(now[1], now[0], own)
            logits, state = decoder.step(variables, state, read)
            never = jnp.arange(logits.shape[-1])[None] == target[:, :1]
            own = jnp.where(never.at[:, 0].set(True), -jnp.inf, logits).argmax(-1).astype(target.dtype)
            return (state, own), read

        first = decoder.begin(variables, source, target.shape[1]), target[:, 0]
        return lax.scan(step, first, (target.T, true.T))[1].T

    def _check(self) -> None:
        if self.bidirectional and self.hidden % 2:
            raise ValueError(f"hidden must be even, half for each direction of the encoder, got {self.hidden}")
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if not 0 <= self.teacher_forcing <= 1:
            raise ValueError(f"teacher_forcing must be a probability in [0, 1], got {self.teacher_forcing}")


def check_pairs(inputs: Array) -> None:
    """Raises unless these are pairs of sentences `[B, 2, S]` with a target to predict.

    Raises:
        ValueError: If the shape is another.
        TypeError: If they are not integers.
    """
    if inputs.ndim != 3 or inputs.shape[1] != 2 or inputs.shape[2] < 2:
        raise ValueError(
            f"expected pairs of sentences [B, 2, S] with S of at least 2, got {inputs.shape}: stack the source's and "
            "the target's tokens, padded to one length, on axis 1"
        )
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise TypeError(f"expected tokens as integers, got {inputs.dtype}: see jaxkd.data.tokens")
