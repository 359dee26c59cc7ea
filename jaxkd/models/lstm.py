"""Classifier of sentences with LSTM layers."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxkd.models.layers import Dropout, Embed, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.models.recurrent import LSTM, recurrent_rules
from jaxkd.transfer import Rule


class LSTMClassifier(nn.Module):
    """Embedding, LSTM layers, a dense layer of the last layer's final state, and a classifier.

    The dense layer has ReLU, and dropout follows it. `LSTMClassifier(10_000, hidden=(64, 32))` is
    Embedding 64 – LSTM 64 – LSTM 32 – Dense 64 – Dense `num_classes`.

    Attributes:
        vocab_size: Number of tokens; 0 is padding.
        embedding: Width of the embeddings.
        hidden: Width of each LSTM layer; each layer reads all states of the one before.
        dense: Width of the dense layer before the classifier.
        num_classes: Number of logits.
        dropout: Probability of dropping an output of the dense layer in training, in [0, 1).
        bidirectional: Each layer reads from both ends and concatenates the two states, so that its
            output is twice as wide.
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
            inputs: Tokens `[B, S]`, integers, padded with 0 on the right. One that is not in the
                vocabulary makes the logits of its sentence NaN.
            train: If true, applies dropout.

        Returns:
            Logits `[B, num_classes]`; features `embeddings` `[B, S, embedding]`, `lstm1` …
            `[B, S, hidden[i]]` (twice as wide if bidirectional), each 0 at padding, and
            `pre_logits` `[B, dense]`.

        Raises:
            ValueError: If the tokens are not `[B, S]`, there is no LSTM layer, or the dropout rate
                is not in [0, 1).
            TypeError: If the tokens are not integers.
        """
        check_tokens(inputs)
        if not self.hidden:
            raise ValueError("hidden must have the width of at least one LSTM layer, got none")
        where = inputs != 0
        x = Embed(self.vocab_size, self.embedding, name="embedding")(inputs)
        # 0 at padding, so that a loss on this feature sees tokens alone.
        x = jnp.where(where[..., None], x, 0)
        features = {"embeddings": x}
        finals = []
        for i, width in enumerate(self.hidden, start=1):
            x, final = self._apply_lstm(f"lstm{i}", width, x, where)
            features[f"lstm{i}"] = x
            finals.append(final)
        x = features["pre_logits"] = nn.relu(nn.Dense(self.dense, name="dense")(finals[-1]))
        x = Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes, name="logits")(x), features)

    def _apply_lstm(
        self, name: str, width: int, inputs: Array, where: Array
    ) -> tuple[Array, Array]:
        """Returns all hidden states and the final one, concatenated over the directions."""
        layers = [LSTM(width, name=name)]
        if self.bidirectional:
            layers.append(LSTM(width, reverse=True, name=f"{name}_reverse"))
        states, finals = zip(*(layer(inputs, where) for layer in layers), strict=True)
        # The final state is float32 even if the inputs are bfloat16.
        hidden = [hidden.astype(inputs.dtype) for hidden, _ in finals]
        return jnp.concatenate(states, -1), jnp.concatenate(hidden, -1)

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from the names of PyTorch's weights to this module's variables.

        Returns:
            Rules for a module with `embedding`, an `Embedding`; `lstm1`, `lstm2`, …, each an `LSTM`
            of one layer with `batch_first=True` and the same `bidirectional`; `dense` and `logits`,
            each a `Linear`. PyTorch's `LSTM` skips padding if its input is a
            `pack_padded_sequence`, and returns its final state as `(h_n, c_n)`.
        """
        rules = [Rule("embedding.weight", "params/embedding/embedding")]
        for i in range(1, len(self.hidden) + 1):
            rules += recurrent_rules(f"lstm{i}", f"lstm{i}")
            # One module of PyTorch has both directions.
            if self.bidirectional:
                rules += recurrent_rules(f"lstm{i}", f"lstm{i}_reverse", suffix="l0_reverse")
        return *rules, *dense_rules("dense", "dense"), *dense_rules("logits", "logits")


def check_tokens(inputs: Array) -> None:
    """Checks that the inputs are tokens `[B, S]`.

    Raises:
        ValueError: If the shape is wrong.
        TypeError: If the tokens are not integers.
    """
    if inputs.ndim != 2:
        raise ValueError(
            f"expected tokens [B, S], got {inputs.shape}: pass a single sentence as x[None]"
        )
    if not jnp.issubdtype(inputs.dtype, jnp.integer):
        raise TypeError(f"expected tokens as integers, got {inputs.dtype}: see jaxkd.data.tokens")
