"""A classifier of sentences by recurrent layers."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxkd.models.layers import Dropout, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.models.recurrent import LSTM, recurrent_rules
from jaxkd.transfer import Rule


class LSTMClassifier(nn.Module):
    """Embedding, LSTM layers, the last one's last state, a dense layer with ReLU, dropout and the classifier.

    `LSTMClassifier(10_000, hidden=(64, 32))` is Embedding 64 – LSTM 64 – LSTM 32 – Dense 64 – Dense `num_classes`.

    Attributes:
        vocab_size: Number of tokens, of which 0 is padding.
        embedding: Width of the embeddings.
        hidden: Width of each LSTM layer; each one gets all states of the one below.
        dense: Width of the dense layer before the classifier.
        num_classes: Number of logits.
        dropout: Share of the dense layer's outputs that training drops.
        bidirectional: Whether every layer reads from both ends; its two states stand side by side, twice as wide.
    """

    vocab_size: int
    embedding: int = 64
    hidden: Sequence[int] = (64, 32)
    dense: int = 64
    num_classes: int = 2
    dropout: float = 0.0
    bidirectional: bool = False

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies sentences.

        Args:
            inputs: Tokens `[B, S]`, integers, padded with 0 on the right.
            train: Whether to drop.

        Returns:
            Logits `[B, num_classes]`; features `embeddings` `[B, S, embedding]`, `lstm1` … `[B, S, hidden[i]]` (twice
            as wide if bidirectional), each 0 at padding, and `pre_logits` `[B, dense]`.

        Raises:
            ValueError: If the shape is none of tokens, or there is no LSTM layer.
            TypeError: If the tokens are not integers.
        """
        check_tokens(inputs)
        if not self.hidden:
            raise ValueError("hidden must name the width of at least one LSTM layer, got none")
        where, named, last = inputs != 0, {}, []
        x = nn.Embed(self.vocab_size, self.embedding, name="embedding")(inputs)
        x = named["embeddings"] = jnp.where(where[..., None], x, 0)
        for i, features in enumerate(self.hidden, start=1):
            x, state = self._layer(f"lstm{i}", features, x, where)
            named[f"lstm{i}"] = x
            last.append(state)
        x = named["pre_logits"] = nn.relu(nn.Dense(self.dense, name="dense")(last[-1]))
        x = Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes, name="logits")(x), named)

    def _layer(self, name: str, features: int, inputs: Array, where: Array) -> tuple[Array, Array]:
        """All states and the last one, of both directions if there are two."""
        layers = [LSTM(features, name=name)]
        if self.bidirectional:
            layers.append(LSTM(features, reverse=True, name=f"{name}_reverse"))
        states, last = zip(*(layer(inputs, where) for layer in layers), strict=True)
        hidden = [state.astype(inputs.dtype) for state, _ in last]
        return jnp.concatenate(states, -1), jnp.concatenate(hidden, -1)

    def torch_rules(self) -> tuple[Rule, ...]:
        """How PyTorch's weights become this module's.

        Returns:
            Rules for a module with `embedding`, an `Embedding`; `lstm1`, `lstm2`, …, each an `LSTM` of one layer with
            `batch_first=True`, and `bidirectional` as here; `dense` and `logits`, each a `Linear`. PyTorch's `LSTM`
            steps over padding if it gets `pack_padded_sequence`, and gives its last state as `(h_n, c_n)`.
        """
        rules = [Rule("embedding.weight", "params/embedding/embedding")]
        for i in range(1, len(self.hidden) + 1):
            rules += recurrent_rules(f"lstm{i}", f"lstm{i}")
            if self.bidirectional:
                rules += recurrent_rules(f"lstm{i}", f"lstm{i}_reverse", suffix="l0_reverse")
        return *rules, *dense_rules("dense", "dense"), *dense_rules("logits", "logits")


def check_tokens(inputs: Array) -> None:
    """Raises unless these are tokens `[B, S]`.

    Raises:
        ValueError: If the shape is another.
        TypeError: If they are not integers.
    """
    if inputs.ndim != 2:
        raise ValueError(f"expected tokens [B, S], got {inputs.shape}: put a single sentence into a batch by x[None]")
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise TypeError(f"expected tokens as integers, got {inputs.dtype}: see jaxkd.data.tokens")
