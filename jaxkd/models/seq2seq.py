"""A recurrent encoder-decoder with attention, and decoding of any encoder-decoder token by token.

A pair of sentences is one array `[2, S]`: the tokens of the source, and the tokens of the target
from the token that starts a sentence to the one that ends it. 0 is padding, on the right.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkd import attention
from jaxkd.models.layers import Dropout, Embed, RowDense
from jaxkd.models.model import Outputs
from jaxkd.models.recurrent import GRU, LSTM, State


class Alignment(NamedTuple):
    """Score of a decoder's state against the encoder's states, with parameters or without.

    `DOT`, `GENERAL` and `additive(features)` are alignments.

    Attributes:
        init: `(key, encoder_features, decoder_features) -> params`; `None` without parameters.
        score: `(params) -> score`, which `jaxkd.attention.align_hidden_states` takes.
    """

    init: Callable[[Array, int, int], dict[str, Array]] | None
    score: Callable[[dict[str, Array]], attention.ScoreFn]


DOT = Alignment(None, lambda params: attention.dot_score)
"""Alignment by `jaxkd.attention.dot_score`."""

GENERAL = Alignment(attention.init_general_score, attention.general_score)
"""Alignment by `jaxkd.attention.general_score`."""


def additive(features: int) -> Alignment:
    """Makes the alignment by `jaxkd.attention.additive_score` with a hidden layer of this width."""

    def init(key: Array, encoder_features: int, decoder_features: int) -> dict[str, Array]:
        return attention.init_additive_score(key, encoder_features, decoder_features, features)

    return Alignment(init, attention.additive_score)


class Decoder(NamedTuple):
    """A pair of pure functions that translate with an encoder-decoder token by token.

    See `jaxkd.decode`.

    Attributes:
        init_state: `(variables, source [B, S], max_length) -> state`: encodes the source, for
            targets of up to `max_length` tokens after the first. The first axis of all leaves of
            the state is the batch.
        step: `(variables, state, tokens [B]) -> (logits [B, V], state)`: reads one more token and
            predicts the next.
    """

    init_state: Callable[[dict, Array, int], Any]
    step: Callable[[dict, Any, Array], tuple[Array, Any]]


def make_decoder(module: nn.Module) -> Decoder:
    """Makes a decoder from a module with the methods `init_state` and `step`.

    `Seq2Seq` and `Transformer` have these methods.

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
        >>> state = decoder.init_state(variables, pairs[:, 0], 7)
        >>> step = functools.partial(decoder.step, variables)
        >>> decode.greedy(step, state, max_length=7).shape
        (1, 7)
    """
    for name in ("init_state", "step"):
        if not hasattr(module, name):
            raise TypeError(
                f"{type(module).__name__} has no method {name!r}: pass an encoder-decoder, such as "
                "Seq2Seq or Transformer"
            )

    def init_state(variables: dict, source: Array, max_length: int) -> Any:
        return module.apply(variables, source, max_length, method="init_state")

    def step(variables: dict, state: Any, tokens: Array) -> tuple[Array, Any]:
        logits_and_state: Any = module.apply(variables, state, tokens, method="step")
        return logits_and_state

    return Decoder(init_state, step)


class _RecurrentDecoderState(NamedTuple):
    """State of a decoder between two tokens.

    Attributes:
        layers: State of each layer of the decoder.
        encoded: States `[B, S, H]` of the encoder.
        where: Booleans `[B, S]`, True for tokens of the source.
        summary: Final hidden state `[B, H]` of the encoder's last layer.
    """

    layers: tuple[State, ...]
    encoded: Array
    where: Array
    summary: Array


class Seq2Seq(nn.Module):
    """Recurrent encoder-decoder: an encoder reads the source, a decoder writes the target.

    The decoder starts from the encoder's final state.

    h_t = decoder(embed(y_t), h_{t−1}),  context_t = align(encoder's states, h_t),
    h̃_t = tanh(W [context_t; h_t] + b)

    This is Luong's architecture without input feeding: the context does not reach the next step, so
    that everything but the recurrence itself is computed for all steps at once.

    Attributes:
        vocab_size: Number of tokens of the source.
        target_vocab_size: Number of tokens of the target, and of logits; `vocab_size` by default.
        embedding: Width of the embeddings.
        hidden: Width of the encoder's and the decoder's states.
        layers: Number of recurrent layers, of the encoder and of the decoder.
        cell: `GRU` or `LSTM`.
        alignment: Score of the attention. With `None` there is no attention: the context is the
            encoder's final state at every step, as in Cho et al.
        bidirectional: The encoder reads from both ends, with half of the width in each direction.
        teacher_forcing: Probability with which a step of training reads the true token. Otherwise
            it reads the token that the model, without dropout, finds most probable after the tokens
            that it has read.
        dropout: Probability of dropping a value of the embeddings and final states in training.

    References:
        Sutskever et al., Sequence to Sequence Learning with Neural Networks,
        https://arxiv.org/abs/1409.3215
        Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical
        Machine Translation, https://arxiv.org/abs/1406.1078
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
        target_vocab_size = self.target_vocab_size or self.vocab_size
        encoder_width = self.hidden // 2 if self.bidirectional else self.hidden
        # Flax names the layers of a dict by their keys, such as `encoder_1`.
        numbers = [str(i + 1) for i in range(self.layers)]
        self.source_embedding = Embed(self.vocab_size, self.embedding)
        self.target_embedding = Embed(target_vocab_size, self.embedding)
        self.encoder = {number: self.cell(encoder_width) for number in numbers}
        self.encoder_reverse = {
            number: self.cell(encoder_width, reverse=True) for number in numbers
        }
        self.decoder = {number: self.cell(self.hidden) for number in numbers}
        self.combined = RowDense(self.hidden)
        self.drop = Dropout(self.dropout)
        self.logits = RowDense(target_vocab_size)
        if self.alignment and self.alignment.init:
            self.score_params = self.param(
                "alignment", self.alignment.init, self.hidden, self.hidden
            )

    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Predicts each token of the target from the source and the tokens before it.

        Args:
            inputs: Pairs of sentences `[B, 2, S]`, integers, padded with 0 on the right.
            train: If true, applies dropout, and reads the model's own tokens if `teacher_forcing`
                is less than 1.

        Returns:
            Logits `[B, S − 1, V]` for the tokens `inputs[:, 1, 1:]`; features `encoder`
            `[B, S, hidden]`, `decoder` and `pre_logits` `[B, S − 1, hidden]`, and with attention
            the weights `alignment` `[B, S − 1, S]`, each 0 at padding.

        Raises:
            ValueError: If the inputs are not pairs, or an attribute is out of range.
            TypeError: If the tokens are not integers.
        """
        check_pairs(inputs)
        source = inputs[:, 0]
        target = inputs[:, 1, :-1]
        state = self._encode(source, train)
        # `make_decoder` needs the variables that initialisation is about to create.
        if train and self.teacher_forcing < 1 and not self.is_initializing():
            tokens = self._sample_tokens(source, target)
        else:
            tokens = target
        x = self._embed(self.target_embedding, tokens, train)
        for layer, layer_state in zip(self.decoder.values(), state.layers, strict=True):
            x, _ = layer(x, target != 0, layer_state)
        pre_logits, weights = self._attend(x, target != 0, state)
        features = {"encoder": state.encoded, "decoder": x, "pre_logits": pre_logits}
        if weights is not None:
            features["alignment"] = weights
        return Outputs(self.logits(self.drop(pre_logits, deterministic=not train)), features)

    def init_state(self, source: Array, max_length: int) -> _RecurrentDecoderState:
        """Returns the state before the first token of the target, for sources `[B, S]`.

        Targets may have any length.
        """
        del max_length
        return self._encode(source, train=False)

    def step(
        self, state: _RecurrentDecoderState, tokens: Array
    ) -> tuple[Array, _RecurrentDecoderState]:
        """Returns the logits `[B, V]` of the next tokens after tokens `[B]`, and the new state."""
        x = self.target_embedding(tokens)
        layer_states = []
        for layer, layer_state in zip(self.decoder.values(), state.layers, strict=True):
            x, layer_state = layer.step(x, layer_state)
            layer_states.append(layer_state)
        # Every token counts: the caller knows which sentences have ended.
        pre_logits, _ = self._attend(x[:, None], jnp.ones((len(x), 1), bool), state)
        return self.logits(pre_logits[:, 0]), state._replace(layers=tuple(layer_states))

    def _encode(self, source: Array, train: bool) -> _RecurrentDecoderState:
        """Encodes the source; the encoder's final states become the decoder's first."""
        self._check_attributes()
        where = source != 0
        x = self._embed(self.source_embedding, source, train)
        finals = []
        for forward, backward in zip(
            self.encoder.values(), self.encoder_reverse.values(), strict=True
        ):
            directions = [forward, backward] if self.bidirectional else [forward]
            results = [layer(x, where) for layer in directions]
            x, final = jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *results)
            finals.append(final)
        # The hidden state, the first leaf, is float32 even if the features are bfloat16.
        summary = jax.tree.leaves(finals[-1])[0].astype(x.dtype)
        return _RecurrentDecoderState(tuple(finals), x, where, summary)

    def _embed(self, embedding: nn.Embed, tokens: Array, train: bool) -> Array:
        return self.drop(embedding(tokens), deterministic=not train)

    def _attend(
        self, x: Array, where: Array, state: _RecurrentDecoderState
    ) -> tuple[Array, Array | None]:
        """Combines the decoder's states `[B, T, H]` with their context.

        Returns:
            The combined states, and the weights of the attention if there is one, both 0 where
            `where` is False.
        """
        context, weights = self._compute_context(x, state)
        # Luong's order: [context; state].
        x = jnp.tanh(self.combined(jnp.concatenate([context, x], -1)))
        x, weights = jax.tree.map(lambda array: jnp.where(where[..., None], array, 0), (x, weights))
        return x, weights

    def _compute_context(
        self, x: Array, state: _RecurrentDecoderState
    ) -> tuple[Array, Array | None]:
        """Returns the context of states `[B, T, H]`, and the weights of the attention if any."""
        if self.alignment is None:
            return jnp.broadcast_to(state.summary[:, None], x.shape), None
        score = self.alignment.score(self.score_params if self.alignment.init else {})

        def align(query: Array) -> tuple[Array, Array]:
            return attention.align_hidden_states(
                state.encoded, query, score=score, where=state.where
            )

        # Over the steps: `align_hidden_states` takes one state of the decoder per sentence.
        return jax.vmap(align, in_axes=1, out_axes=1)(x)

    def _sample_tokens(self, source: Array, target: Array) -> Array:
        """Chooses the tokens that each step reads in training: the true or the model's own.

        The choice of a token has no gradient. So this function finds the tokens step by step
        without one, and the caller then computes the logits for all of them at once.
        """
        module, bound_variables = self.unbind()
        decoder = make_decoder(module)
        variables = dict(lax.stop_gradient(bound_variables))
        is_true = jax.random.bernoulli(self.make_rng("dropout"), self.teacher_forcing, target.shape)

        def step(
            carry: tuple[Any, Array], inputs: tuple[Array, Array]
        ) -> tuple[tuple[Any, Array], Array]:
            state, predicted = carry
            true_tokens, use_true = inputs
            tokens = jnp.where(use_true, true_tokens, predicted)
            logits, state = decoder.step(variables, state, tokens)
            # As in `jaxkd.decode`, neither padding nor the start token is ever predicted.
            excluded = jnp.arange(logits.shape[-1])[None] == target[:, :1]
            excluded = excluded.at[:, 0].set(True)
            predicted = jnp.where(excluded, -jnp.inf, logits).argmax(-1).astype(target.dtype)
            return (state, predicted), tokens

        # The start token is the first "prediction", so that the first step reads it in any case.
        carry = decoder.init_state(variables, source, target.shape[1]), target[:, 0]
        _, tokens = lax.scan(step, carry, (target.T, is_true.T))
        return tokens.T

    def _check_attributes(self) -> None:
        if self.bidirectional and self.hidden % 2:
            raise ValueError(
                f"hidden must be even, half for each direction of the encoder, got {self.hidden}"
            )
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if not 0 <= self.teacher_forcing <= 1:
            raise ValueError(
                f"teacher_forcing must be a probability in [0, 1], got {self.teacher_forcing}"
            )


def check_pairs(inputs: Array) -> None:
    """Checks that the inputs are pairs of sentences `[B, 2, S]` with a target to predict.

    Raises:
        ValueError: If the shape is wrong.
        TypeError: If the tokens are not integers.
    """
    if inputs.ndim != 3 or inputs.shape[1] != 2 or inputs.shape[2] < 2:
        raise ValueError(
            f"expected pairs of sentences [B, 2, S] with S of at least 2, got {inputs.shape}: pad "
            "the tokens of source and target to one length and stack them on axis 1"
        )
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise TypeError(f"expected tokens as integers, got {inputs.dtype}: see jaxkd.data.tokens")
