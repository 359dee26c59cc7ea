"""A small Transformer that reads one sentence and writes another."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd import attention
from jaxkd.models.layers import Dropout, LayerNorm, RowDense
from jaxkd.models.model import Outputs
from jaxkd.models.seq2seq import check_pairs


class _Memory(NamedTuple):
    """What may be attended: keys and values `[B, M, heads, D]`."""

    keys: Array
    values: Array


class _Reading(NamedTuple):
    """What a decoder knows: each layer's memory of the target and of the source, with the source's tokens that count.

    `position` `[B]` counts the target's tokens that were read, alike for all sentences.
    """

    target: tuple[_Memory, ...]
    source: tuple[_Memory, ...]
    where: Array
    position: Array


class Transformer(nn.Module):
    """Encoder and decoder of attention, normalised before each part; one embedding for source, target and output.

    Positions are the paper's sine and cosine waves.

    Attributes:
        vocab_size: Number of tokens, of source and target together, and of logits.
        hidden: Width of the states.
        heads: Heads of each attention, which divide the width.
        layers: How many layers the encoder and the decoder have each.
        intermediate: Width of the hidden layer of each dense part.
        positions: The longest sentence.
        dropout: Share of the embeddings and of each part's outputs that training drops.

    References:
        Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762
        Xiong et al., On Layer Normalization in the Transformer Architecture, https://arxiv.org/abs/2002.04745
    """

    vocab_size: int
    hidden: int = 128
    heads: int = 4
    layers: int = 2
    intermediate: int = 512
    positions: int = 128
    dropout: float = 0.0

    def setup(self) -> None:
        """Declares the layers."""
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}")
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(f"hidden must be even and a multiple of heads, got {self.hidden} and {self.heads}")
        sizes = self.hidden, self.heads, self.intermediate, self.dropout
        numbers = [str(number + 1) for number in range(self.layers)]
        self.embedding = nn.Embed(
            self.vocab_size, self.hidden, embedding_init=nn.initializers.normal(self.hidden**-0.5)
        )
        self.encoder = {number: _Layer(*sizes) for number in numbers}
        self.decoder = {number: _Layer(*sizes, reads_source=True) for number in numbers}
        self.encoder_norm = LayerNorm()
        self.decoder_norm = LayerNorm()
        self.drop = Dropout(self.dropout)

    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Predicts each of the target's tokens from the source and the tokens before it.

        Args:
            inputs: Pairs of sentences `[B, 2, S]`, integers, padded with 0 on the right.
            train: Whether to drop.

        Returns:
            Logits `[B, S − 1, vocab_size]` for the tokens `inputs[:, 1, 1:]`; features `encoder_layer1` …
            `[B, S, hidden]` and `decoder_layer1` … `[B, S − 1, hidden]` after each layer, `encoder` and `decoder`, the
            last ones normalised, and `alignment` `[B, S − 1, S]`, the last layer's attention to the source, mean over
            heads; each 0 at padding.

        Raises:
            ValueError: If the shape is none of pairs, or S is more than `positions`.
            TypeError: If the tokens are not integers.
        """
        check_pairs(inputs)
        self._check_length(inputs.shape[2])
        source, target = inputs[:, 0], inputs[:, 1, :-1]
        states, named = self._read(source, train)
        x, weights = self._embed(target, np.arange(target.shape[1])[None], train), jnp.zeros(())
        seen, where = jnp.tri(target.shape[1], dtype=bool)[None, None], _keys(source != 0)
        for number, layer in self.decoder.items():
            memory = layer.source_memory(states)
            x, _, weights = layer(x, lambda memory: memory, seen, memory, where, train)
            named[f"decoder_layer{number}"] = _only(target != 0, x)
        x = self.decoder_norm(x)
        named["decoder"], named["alignment"] = _only(target != 0, x), _only(target != 0, weights.mean(1))
        logits = self.embedding.attend(x.reshape(-1, self.hidden))  # as rows, for the same reason as in `RowDense`
        return Outputs(logits.reshape(*x.shape[:-1], -1), named)

    def begin(self, source: Array, max_length: int) -> _Reading:
        """The state before the target's first token, for sources `[B, S]` and up to `max_length` tokens to read."""
        self._check_length(source.shape[1])
        self._check_length(max_length)
        states, _ = self._read(source, train=False)
        memories = tuple(layer.source_memory(states) for layer in self.decoder.values())
        shape = len(source), max_length, *memories[0].keys.shape[2:]
        empty = _Memory(*(jnp.zeros(shape, memories[0].keys.dtype) for _ in range(2)))
        return _Reading((empty,) * self.layers, memories, source != 0, jnp.zeros(len(source), jnp.int32))

    def step(self, reading: _Reading, tokens: Array) -> tuple[Array, _Reading]:
        """Logits `[B, V]` for what follows tokens `[B]`, and the state after them."""
        positions = jnp.arange(reading.target[0].keys.shape[1])[None]
        now = positions == reading.position[:, None]
        seen, where = _keys(positions <= reading.position[:, None]), _keys(reading.where)

        def keeping(old: _Memory) -> Callable[[_Memory], _Memory]:
            return lambda new: _Memory(*(_written(*pair, now) for pair in zip(old, new, strict=True)))

        x, memories = self._embed(tokens[:, None], reading.position[:, None], train=False), []
        for layer, old, source in zip(self.decoder.values(), reading.target, reading.source, strict=True):
            x, memory, _ = layer(x, keeping(old), seen, source, where, False)
            memories.append(memory)
        logits = self.embedding.attend(self.decoder_norm(x)[:, 0])
        return logits, reading._replace(target=tuple(memories), position=reading.position + 1)

    def _read(self, source: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """The source's states, and the features on the way to them."""
        named, where = {}, source != 0
        x = self._embed(source, np.arange(source.shape[1])[None], train)
        for number, layer in self.encoder.items():
            x, _, _ = layer(x, lambda memory: memory, _keys(where), None, None, train)
            named[f"encoder_layer{number}"] = _only(where, x)
        x = named["encoder"] = _only(where, self.encoder_norm(x))
        return x, named

    def _embed(self, tokens: Array, positions: Array | np.ndarray, train: bool) -> Array:
        x = self.embedding(tokens) * self.hidden**0.5
        waves = jnp.asarray(_waves(self.positions, self.hidden), x.dtype)[positions]
        return self.drop(x + jnp.broadcast_to(waves, x.shape), deterministic=not train)

    def _check_length(self, length: int) -> None:
        if length > self.positions:
            raise ValueError(
                f"a sentence of {length} tokens is longer than the {self.positions} positions of this Transformer: cut "
                "it, or give the module more positions"
            )


class _Layer(nn.Module):
    """A layer of the encoder, or of the decoder, which attends the source too."""

    hidden: int
    heads: int
    intermediate: int
    dropout: float
    reads_source: bool = False

    def setup(self) -> None:
        self.own_norm, self.own_attention = LayerNorm(), _Attention(self.hidden, self.heads)
        if self.reads_source:
            self.source_norm, self.source_attention = LayerNorm(), _Attention(self.hidden, self.heads)
        self.dense_norm = LayerNorm()
        self.intermediate_dense, self.output_dense = RowDense(self.intermediate), RowDense(self.hidden)
        self.drop = Dropout(self.dropout)

    def __call__(
        self,
        x: Array,
        keep: Callable[[_Memory], _Memory],
        seen: Array,
        source: _Memory | None,
        where: Array | None,
        train: bool,
    ) -> tuple[Array, _Memory, Array]:
        """The states `[B, N, hidden]` after the layer, what it remembers of them, and the weights of its attention.

        `keep` makes the memory of all that was read from that of `x`; `seen` says which of it each state may attend.
        """
        normalised = self.own_norm(x)
        memory = keep(self.own_attention.memory(normalised))
        change, weights = self.own_attention(normalised, memory, seen)
        x = x + self.drop(change, deterministic=not train)
        if source is not None:
            change, weights = self.source_attention(self.source_norm(x), source, where)
            x = x + self.drop(change, deterministic=not train)
        change = self.output_dense(nn.relu(self.intermediate_dense(self.dense_norm(x))))
        return x + self.drop(change, deterministic=not train), memory, weights

    def source_memory(self, states: Array) -> _Memory:
        """What the layer remembers of the source."""
        return self.source_attention.memory(states)


class _Attention(nn.Module):
    """Attention of several heads, whose keys and values can be kept."""

    hidden: int
    heads: int

    def setup(self) -> None:
        self.query, self.key, self.value, self.output = (RowDense(self.hidden) for _ in range(4))

    def memory(self, x: Array) -> _Memory:
        """Keys and values of states `[B, M, hidden]`."""
        return _Memory(self._apart(self.key(x)), self._apart(self.value(x)))

    def __call__(self, x: Array, memory: _Memory, where: Array | None) -> tuple[Array, Array]:
        """What states `[B, N, hidden]` attend, and the weights `[B, heads, N, M]`."""
        by_head = (array.swapaxes(1, 2) for array in (self._apart(self.query(x)), *memory))
        context, weights = attention.attend(*by_head, where=where)
        return self.output(context.swapaxes(1, 2).reshape(x.shape)), weights

    def _apart(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


@functools.cache
def _waves(length: int, features: int) -> np.ndarray:
    """The paper's encoding of positions, sines first, `[length, features]`."""
    rates = 10000.0 ** (-np.arange(0, features, 2) / features)
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], -1)


def _keys(where: Array) -> Array:
    """Booleans `[B, M]` as `attend` takes them."""
    return where[:, None, None]


def _only(where: Array, states: Array) -> Array:
    return jnp.where(where[..., None], states, 0)


def _written(old: Array, new: Array, now: Array) -> Array:
    """The memory `[B, M, heads, D]` with new entries `[B, 1, heads, D]` at one place, `[B, M]`."""
    return jnp.where(now[..., None, None], new, old)
