"""A small encoder-decoder Transformer for pairs of sentences."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd import attention
from jaxkd.models.layers import Dropout, Embed, LayerNorm, RowDense, call_block
from jaxkd.models.model import Outputs
from jaxkd.models.seq2seq import check_pairs


class _KeysValues(NamedTuple):
    """Keys and values `[B, M, heads, D]` of an attention."""

    keys: Array
    values: Array


class _TransformerDecoderState(NamedTuple):
    """State of a decoder between two tokens.

    Attributes:
        target: Cache of each layer for the tokens of the target, 0 where none has been read yet.
        source: Keys and values of each layer for the source.
        where: Booleans `[B, S]`, True for tokens of the source.
        position: Number of tokens of the target read so far, `[B]`, the same for all sentences.
    """

    target: tuple[_KeysValues, ...]
    source: tuple[_KeysValues, ...]
    where: Array
    # One number a sentence, since beam search reorders and repeats the first axis of every leaf.
    position: Array


class Transformer(nn.Module):
    """Encoder-decoder Transformer with pre-layer normalisation and sinusoidal positions.

    Source, target and output share one embedding.

    Attributes:
        vocab_size: Number of tokens, of source and target together, and of logits.
        hidden: Width of the states, even.
        heads: Heads of each attention; must divide `hidden`.
        layers: Number of layers, of the encoder and of the decoder.
        intermediate: Width of the hidden layer of each feed-forward network.
        positions: Length of the longest sentence, in tokens.
        dropout: Probability of dropping, in training, a value of the embeddings or of the output of
            an attention or feed-forward network.
        remat: If true, training stores no values within layers and computes them again for the
            gradient: a second forward pass, less memory, the same variables and results.

    References:
        Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
        Xiong et al., On Layer Normalization in the Transformer Architecture,
        https://arxiv.org/abs/2002.04745
    """

    vocab_size: int
    hidden: int = 128
    heads: int = 4
    layers: int = 2
    intermediate: int = 512
    positions: int = 128
    dropout: float = 0.0
    remat: bool = False

    def setup(self) -> None:
        """Declares the layers."""
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(
                f"hidden must be even and a multiple of heads, got {self.hidden} and {self.heads}"
            )
        sizes = (self.hidden, self.heads, self.intermediate, self.dropout)
        # Flax names the layers of a dict by their keys, such as `encoder_1`.
        numbers = [str(i + 1) for i in range(self.layers)]
        # Logits of unit scale: the output multiplies normalised states by the embedding.
        self.embedding = Embed(
            self.vocab_size, self.hidden, embedding_init=nn.initializers.normal(self.hidden**-0.5)
        )
        self.encoder = {number: _TransformerLayer(*sizes) for number in numbers}
        self.decoder = {
            number: _TransformerLayer(*sizes, cross_attention=True) for number in numbers
        }
        self.encoder_norm = LayerNorm()
        self.decoder_norm = LayerNorm()
        self.drop = Dropout(self.dropout)

    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Predicts each token of the target from the source and the tokens before it.

        Args:
            inputs: Pairs of sentences `[B, 2, S]`, integers, padded with 0 on the right.
            train: If true, applies dropout.

        Returns:
            Logits `[B, S − 1, vocab_size]` for the tokens `inputs[:, 1, 1:]`; features
            `encoder_layer1` … `[B, S, hidden]` and `decoder_layer1` … `[B, S − 1, hidden]` after
            each layer, `encoder` and `decoder`, the last of these after normalisation, and
            `alignment` `[B, S − 1, S]`, the attention of the decoder's last layer to the source,
            averaged over the heads; each 0 at padding.

        Raises:
            ValueError: If the inputs are not pairs, or S is more than `positions`.
            TypeError: If the tokens are not integers.
        """
        check_pairs(inputs)
        self._check_length(inputs.shape[2])
        source = inputs[:, 0]
        target = inputs[:, 1, :-1]
        encoded, features = self._encode(source, train)
        x = self._embed(target, np.arange(target.shape[1])[None], train)
        # Replaced in the loop: there is at least one layer.
        weights = jnp.zeros(())
        # Padding is on the right, where the causal mask hides it from every token of the target.
        causal = jnp.tri(target.shape[1], dtype=bool)[None, None]
        where = _key_mask(source != 0)
        for number, layer in self.decoder.items():
            memory = layer.project_source(encoded)
            x, _, weights = call_block(
                layer, x, causal, memory, where, train=train, remat=self.remat and train
            )
            features[f"decoder_layer{number}"] = _zero_padding(x, target != 0)
        x = self.decoder_norm(x)
        features["decoder"] = _zero_padding(x, target != 0)
        features["alignment"] = _zero_padding(weights.mean(1), target != 0)
        # As rows, for the same reason as in `RowDense`.
        logits = self.embedding.attend(x.reshape(-1, self.hidden))
        return Outputs(logits.reshape(*x.shape[:-1], -1), features)

    def init_state(self, source: Array, max_length: int) -> _TransformerDecoderState:
        """Returns the state before the first token of the target.

        Args:
            source: Tokens `[B, S]`.
            max_length: Largest number of tokens of the target that will be read.

        Returns:
            The state.

        Raises:
            ValueError: If S or `max_length` is more than `positions`.
        """
        self._check_length(source.shape[1])
        self._check_length(max_length)
        encoded, _ = self._encode(source, train=False)
        memories = tuple(layer.project_source(encoded) for layer in self.decoder.values())
        # Of full length from the start: a state keeps its shapes in a compiled loop.
        empty = jnp.zeros(
            (len(source), max_length, *memories[0].keys.shape[2:]), memories[0].keys.dtype
        )
        return _TransformerDecoderState(
            target=(_KeysValues(empty, empty),) * self.layers,
            source=memories,
            where=source != 0,
            position=jnp.zeros(len(source), jnp.int32),
        )

    def step(
        self, state: _TransformerDecoderState, tokens: Array
    ) -> tuple[Array, _TransformerDecoderState]:
        """Returns the logits `[B, V]` of the next tokens after tokens `[B]`, and the new state."""
        positions = jnp.arange(state.target[0].keys.shape[1])[None]
        current = positions == state.position[:, None]
        causal = _key_mask(positions <= state.position[:, None])
        where = _key_mask(state.where)

        def make_update(cache: _KeysValues) -> Callable[[_KeysValues], _KeysValues]:
            return lambda new: _KeysValues(
                _write_position(cache.keys, new.keys, current),
                _write_position(cache.values, new.values, current),
            )

        x = self._embed(tokens[:, None], state.position[:, None], train=False)
        caches = []
        for layer, cache, source in zip(
            self.decoder.values(), state.target, state.source, strict=True
        ):
            x, cache, _ = layer(x, causal, source, where, update=make_update(cache), train=False)
            caches.append(cache)
        logits = self.embedding.attend(self.decoder_norm(x)[:, 0])
        return logits, state._replace(target=tuple(caches), position=state.position + 1)

    def _encode(self, source: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """Returns the encoder's normalised states and its features."""
        where = source != 0
        features = {}
        x = self._embed(source, np.arange(source.shape[1])[None], train)
        for number, layer in self.encoder.items():
            x, _, _ = call_block(
                layer, x, _key_mask(where), None, None, train=train, remat=self.remat and train
            )
            features[f"encoder_layer{number}"] = _zero_padding(x, where)
        x = features["encoder"] = _zero_padding(self.encoder_norm(x), where)
        return x, features

    def _embed(self, tokens: Array, positions: Array | np.ndarray, train: bool) -> Array:
        # The paper's factor: embeddings of deviation 1/√hidden get the scale of the positions.
        x = self.embedding(tokens) * self.hidden**0.5
        encoding = jnp.asarray(_sinusoidal_encoding(self.positions, self.hidden), x.dtype)
        offset = jnp.broadcast_to(encoding[positions], x.shape)
        return self.drop(x + offset, deterministic=not train)

    def _check_length(self, length: int) -> None:
        if length > self.positions:
            raise ValueError(
                f"a sentence of {length} tokens is longer than the {self.positions} positions of "
                "this Transformer: cut the sentence, or make the module with more positions"
            )


class _TransformerLayer(nn.Module):
    """Layer of the encoder, or of the decoder, which also attends to the source."""

    hidden: int
    heads: int
    intermediate: int
    dropout: float
    cross_attention: bool = False

    def setup(self) -> None:
        self.own_norm = LayerNorm()
        self.own_attention = _MultiHeadAttention(self.hidden, self.heads)
        if self.cross_attention:
            self.source_norm = LayerNorm()
            self.source_attention = _MultiHeadAttention(self.hidden, self.heads)
        self.dense_norm = LayerNorm()
        self.intermediate_dense = RowDense(self.intermediate)
        self.output_dense = RowDense(self.hidden)
        self.drop = Dropout(self.dropout)

    def __call__(
        self,
        x: Array,
        visible: Array,
        source: _KeysValues | None,
        where: Array | None,
        *,
        train: bool,
        update: Callable[[_KeysValues], _KeysValues] = lambda new: new,
    ) -> tuple[Array, _KeysValues, Array]:
        """Applies the layer.

        Args:
            x: States `[B, N, hidden]`.
            visible: Booleans that broadcast to `[B, heads, N, M]`: the keys that a state may attend
                to.
            source: Keys and values of the source; `None` in an encoder.
            where: Booleans `[B, 1, 1, S]`, True for tokens of the source; `None` in an encoder.
            train: If true, applies dropout.
            update: Returns the keys and values to attend to, given those of `x`: the same, or a
                cache into which they are written.

        Returns:
            The new states, the keys and values from `update`, and the weights of the last
            attention: to the source if there is one.
        """
        # Pre-layer normalisation: the sum itself is normalised only after the last layer.
        normalized = self.own_norm(x)
        keys_values = update(self.own_attention.project_keys_values(normalized))
        change, weights = self.own_attention(normalized, keys_values, visible)
        x = x + self.drop(change, deterministic=not train)
        if source is not None:
            change, weights = self.source_attention(self.source_norm(x), source, where)
            x = x + self.drop(change, deterministic=not train)
        change = self.output_dense(nn.relu(self.intermediate_dense(self.dense_norm(x))))
        return x + self.drop(change, deterministic=not train), keys_values, weights

    def project_source(self, encoded: Array) -> _KeysValues:
        """Returns this layer's keys and values for the encoder's states."""
        return self.source_attention.project_keys_values(encoded)


class _MultiHeadAttention(nn.Module):
    """Multi-head attention that projects keys and values separately, so that they can be cached."""

    hidden: int
    heads: int

    def setup(self) -> None:
        self.query, self.key, self.value, self.output = (RowDense(self.hidden) for _ in range(4))

    def project_keys_values(self, x: Array) -> _KeysValues:
        """Returns the keys and values of states `[B, M, hidden]`."""
        return _KeysValues(self._split_heads(self.key(x)), self._split_heads(self.value(x)))

    def __call__(
        self, x: Array, keys_values: _KeysValues, where: Array | None
    ) -> tuple[Array, Array]:
        """Returns the output for states `[B, N, hidden]` and the weights `[B, heads, N, M]`."""
        query = self._split_heads(self.query(x))
        # `attend` contracts the last two axes: [B, heads, N, D].
        by_head = (array.swapaxes(1, 2) for array in (query, *keys_values))
        context, weights = attention.attend(*by_head, where=where)
        return self.output(context.swapaxes(1, 2).reshape(x.shape)), weights

    def _split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


@functools.cache
def _sinusoidal_encoding(length: int, features: int) -> np.ndarray:
    """Returns the paper's positional encoding `[length, features]`, sines before cosines."""
    rates = 10000.0 ** (-np.arange(0, features, 2) / features)
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def _key_mask(where: Array) -> Array:
    """Reshapes booleans `[B, M]` as `attention.attend` takes them for several heads."""
    return where[:, None, None]


def _zero_padding(x: Array, where: Array) -> Array:
    return jnp.where(where[..., None], x, 0)


def _write_position(cache: Array, new: Array, current: Array) -> Array:
    """Writes `[B, 1, heads, D]` into a cache `[B, M, heads, D]` where `current` is true."""
    # A selection instead of `lax.dynamic_update_slice`, since there is one position per sentence.
    return jnp.where(current[..., None, None], new, cache)
