"""BERT, DistilBERT and MiniLM: text encoders with attention maps and hidden states to distil."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxkd.models.layers import Dropout, Embed, LayerNorm, RowDense, call_block, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule

gelu = functools.partial(nn.gelu, approximate=False)
"""BERT's activation, with the error function; `flax.linen.gelu` approximates it by tanh."""

_normal = nn.initializers.normal(0.02)
_Dense = functools.partial(RowDense, kernel_init=_normal)


class Pooling(NamedTuple):
    """Reduction of the states of a text's tokens to one vector.

    Attributes:
        reduce: `(states [B, S, D], where [B, S]) -> [B, D]`; `where` is True for tokens and False
            for padding.
        dense: Name of a dense layer that follows; `None` for none.
        activation: Activation of that layer.
        torch_name: Name of that layer in PyTorch.
    """

    reduce: Callable[[Array, Array], Array]
    dense: str | None = None
    activation: Callable[[Array], Array] = nn.tanh
    torch_name: str = ""


def mean_of_tokens(states: Array, where: Array) -> Array:
    """Averages the states `[B, S, D]` of the tokens; 0 for a text without tokens.

    The sum is in float32.
    """
    counts = jnp.maximum(where.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    total = jnp.where(where[..., None], states.astype(jnp.float32), 0).sum(axis=1)
    return (total / counts).astype(states.dtype)


def first_token(states: Array, where: Array) -> Array:
    """Returns the state of the first token, `[CLS]`."""
    del where
    return states[:, 0]


mean_pooling = Pooling(mean_of_tokens)
"""Pooling of sentence-transformers: the mean of the tokens."""

bert_pooling = Pooling(first_token, "pooler", nn.tanh, "bert.pooler.dense")
"""Pooling of BERT: a dense layer of the first token's state, and tanh."""

distilbert_pooling = Pooling(first_token, "pre_classifier", nn.relu, "pre_classifier")
"""Pooling of DistilBERT: a dense layer of the first token's state, and ReLU."""


class BERT(nn.Module):
    """Encoder of BERT, DistilBERT or MiniLM with a classifier.

    A block is `y = norm(x + attention(x))`, `norm(y + dense(gelu(dense(y))))`. All weights are
    initialised normal with standard deviation 0.02, all biases to 0. Dropout acts as in PyTorch's
    BERT: on the embeddings, the attention weights, what a block adds, and before the classifier.
    DistilBERT is the same network with `segments=0` and `distilbert_pooling`.

    Attributes:
        vocab_size: Number of tokens; 0 is padding.
        hidden: Width of the hidden states, a multiple of `heads`.
        layers: Number of blocks; their parameters are `block0`, `block1`, …
        heads: Attention heads of a block.
        intermediate: Width of the hidden layer of a block's feed-forward network.
        positions: Length of the longest text, in tokens.
        num_classes: Number of logits.
        segments: Number of segment types; all tokens have the first. 0 omits their embedding.
        pooling: `bert_pooling`, `distilbert_pooling`, `mean_pooling`, or your own `Pooling`.
        dropout: Probability of dropping a value in training, in [0, 1); without a key nothing is
            dropped.
        epsilon: Epsilon that layer normalisation adds to the variance.
        activation: Activation of the feed-forward networks.
        remat: If true, training stores no values within blocks and computes them again for the
            gradient: a second forward pass, less memory, the same variables and results.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> module = BERT(100, hidden=8, layers=2, heads=2, intermediate=16, positions=16)
        >>> model = from_linen(module)
        >>> tokens = jnp.array([[2, 7, 9, 3], [2, 7, 3, 0]], jnp.int32)
        >>> variables = model.init(jax.random.key(0), tokens)
        >>> (logits, features), _ = model.apply(variables, tokens, train=False)
        >>> logits.shape, features["layer2"].shape, features["scores1"].shape
        ((2, 2), (2, 4, 8), (2, 2, 4, 4))

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
        Understanding", https://arxiv.org/abs/1810.04805
        Sanh et al., "DistilBERT, a distilled version of BERT", https://arxiv.org/abs/1910.01108
    """

    vocab_size: int
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    positions: int = 512
    num_classes: int = 2
    segments: int = 2
    pooling: Pooling = bert_pooling
    dropout: float = 0.1
    epsilon: float = 1e-12
    activation: Callable[[Array], Array] = gelu
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Array, train: bool = False) -> Outputs:
        """Classifies texts.

        Args:
            tokens: Integers `[B, S]`, padded with 0 after each text. Ids are not checked: one that
                is not in the vocabulary makes all states of its text NaN.
            train: If true, applies dropout.

        Returns:
            Logits `[B, num_classes]` and features:

            - `embeddings` and `layer1` … `layerN`, `[B, S, hidden]`;
            - for each layer `scores1` …, before mask and softmax, and `attention1` …, the weights,
              0 at padded keys, `[B, heads, S, S]` in float32;
            - for each layer `queries1` …, `keys1` … and `values1` …,
              `[B, S, heads, hidden / heads]`;
            - `pooled` `[B, hidden]`, and under the name `pre_logits` the same.

            Logits and the states of tokens do not depend on the padding. States of padding are
            finite but meaningless, so that losses must mask them. A text without tokens is pooled
            to 0.

        Raises:
            ValueError: If the tokens are not `[B, S]` or longer than `positions`, if `heads` does
                not divide `hidden`, or if the dropout rate is not in [0, 1).
            TypeError: If the tokens are not integers.
        """
        self._check_tokens(tokens)
        drop = Dropout(self.dropout, deterministic=not (train and self.has_rng("dropout")))
        where = tokens != 0
        x = drop(LayerNorm(self.epsilon, name="embedding_norm")(self._embed(tokens)))
        features = {"embeddings": x}
        for i in range(self.layers):
            block = _BERTBlock(
                self.heads, self.intermediate, self.epsilon, self.activation, name=f"block{i}"
            )
            x, block_features = call_block(block, x, where, drop, remat=self.remat and train)
            features |= {f"{name}{i + 1}": value for name, value in block_features.items()}
            features[f"layer{i + 1}"] = x
        x = self.pooling.reduce(x, where)
        if self.pooling.dense is not None:
            x = self.pooling.activation(_Dense(self.hidden, name=self.pooling.dense)(x))
        # After the dense layer, whose bias would make a text without tokens differ from 0.
        x = jnp.where(where.any(axis=1, keepdims=True), x, 0)
        features["pooled"] = features["pre_logits"] = x
        return Outputs(_Dense(self.num_classes, name="logits")(drop(x)), features)

    def _embed(self, tokens: Array) -> Array:
        token_embedding = Embed(
            self.vocab_size, self.hidden, embedding_init=_normal, name="token_embedding"
        )
        x = token_embedding(tokens)
        positions = self.param("position_embedding", _normal, (self.positions, self.hidden))
        offset = positions[: tokens.shape[1]]
        if self.segments:
            segments = self.param("segment_embedding", _normal, (self.segments, self.hidden))
            # Not in place, which would change variables that are NumPy arrays.
            offset = offset + segments[:1]
        return x + offset[None]

    def _check_tokens(self, tokens: Array) -> None:
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(
                f"expected tokens [B, S], got {tokens.shape}: pass a single text as x[None]"
            )
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(
                f"expected integer tokens, got {tokens.dtype}: see jaxkd.data.tokens.encode"
            )
        if tokens.shape[1] > self.positions:
            raise ValueError(
                f"tokens {tokens.shape} are more than the {self.positions} positions: cut the texts"
            )
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}"
            )

    def torch_rules(self) -> tuple[Rule, ...]:
        """Makes the rules from the names of PyTorch's weights to this module's variables.

        Returns:
            Rules for the names of `BertForSequenceClassification`, or without segments of
            `DistilBertForSequenceClassification`, in Hugging Face's transformers. Weights of other
            models from there get these names by `canonical_names`.
        """
        names = _BERT_NAMES if self.segments else _DISTILBERT_NAMES
        embeddings = "bert.embeddings" if self.segments else "distilbert.embeddings"
        rules = [
            Rule(f"{embeddings}.word_embeddings.weight", "params/token_embedding/embedding"),
            Rule(f"{embeddings}.position_embeddings.weight", "params/position_embedding"),
        ]
        if self.segments:
            segments = f"{embeddings}.token_type_embeddings.weight"
            rules.append(Rule(segments, "params/segment_embedding"))
        rules += _layer_norm_rules(f"{embeddings}.LayerNorm", "embedding_norm")
        for target, source in names.items():
            make_rules = _layer_norm_rules if target.endswith("norm") else dense_rules
            rules += make_rules(source, f"block{{i}}/{target}")
        if self.pooling.dense is not None:
            rules += dense_rules(self.pooling.torch_name, self.pooling.dense)
        rules += dense_rules("classifier", "logits")
        # Last: the first rule that matches decides, and this module may have one of these poolers.
        rules += [Rule(pattern, None) for pattern in _OMITTED_NAMES]
        return tuple(rules)


def canonical_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Renames weights of transformers' BERT or DistilBERT to the names that `torch_rules` reads.

    Models without a head lack the prefix `bert.` or `distilbert.`, and old files call the scale and
    bias of a layer normalisation `gamma` and `beta`.

    Args:
        weights: Arrays by name, as `jaxkd.weights.load_weights` returns them.

    Returns:
        The same arrays under the canonical names.

    Example:
        >>> canonical_names({"embeddings.LayerNorm.gamma": 1, "encoder.layer.0.output.bias": 2})
        {'bert.embeddings.LayerNorm.weight': 1, 'bert.encoder.layer.0.output.bias': 2}
    """

    def canonical(name: str) -> str:
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        without_prefix = name.split(".")[0] in ("embeddings", "encoder", "transformer", "pooler")
        return f"{prefix}{name}" if without_prefix else name

    # Only DistilBERT calls its layers "transformer"; names that have a prefix keep it.
    prefix = "distilbert." if any(name.startswith("transformer.") for name in weights) else "bert."
    return {canonical(name): array for name, array in weights.items()}


class _BERTBlock(nn.Module):
    heads: int
    intermediate: int
    epsilon: float
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(
        self, x: Array, where: Array, drop: Callable[[Array], Array]
    ) -> tuple[Array, dict[str, Array]]:
        by_head = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        queries, keys, values = (
            _Dense(x.shape[2], name=name)(x).reshape(by_head) for name in ("query", "key", "value")
        )
        # Not by `attention.attend`, which has no dropout and does not return the scores, features
        # that some losses compare.
        scores = by_head[-1] ** -0.5 * jnp.einsum(
            "bnhd,bmhd->bhnm", queries, keys, preferred_element_type=jnp.float32
        )
        weights = _masked_softmax(scores, where[:, None, None])
        # The features have the weights before dropout.
        context = jnp.einsum("bhnm,bmhd->bnhd", drop(weights).astype(x.dtype), values)
        change = _Dense(x.shape[2], name="attention_output")(context.reshape(x.shape))
        x = LayerNorm(self.epsilon, name="attention_norm")(x + drop(change))
        hidden = self.activation(_Dense(self.intermediate, name="mlp_in")(x))
        change = _Dense(x.shape[2], name="mlp_out")(hidden)
        x = LayerNorm(self.epsilon, name="mlp_norm")(x + drop(change))
        return x, {
            "queries": queries,
            "keys": keys,
            "values": values,
            "scores": scores,
            "attention": weights,
        }


def _masked_softmax(scores: Array, where: Array) -> Array:
    """Applies a softmax over the last axis; padding gets 0, also in a row of padding alone."""
    # The lowest finite number instead of −inf: a row of −inf alone would give NaN, and a mask after
    # the softmax removes NaN from the value, but not from the gradient.
    weights = jax.nn.softmax(jnp.where(where, scores, jnp.finfo(scores.dtype).min))
    return jnp.where(where, weights, 0)


_BERT_NAMES = {
    "query": "bert.encoder.layer.{i}.attention.self.query",
    "key": "bert.encoder.layer.{i}.attention.self.key",
    "value": "bert.encoder.layer.{i}.attention.self.value",
    "attention_output": "bert.encoder.layer.{i}.attention.output.dense",
    "attention_norm": "bert.encoder.layer.{i}.attention.output.LayerNorm",
    "mlp_in": "bert.encoder.layer.{i}.intermediate.dense",
    "mlp_out": "bert.encoder.layer.{i}.output.dense",
    "mlp_norm": "bert.encoder.layer.{i}.output.LayerNorm",
}
_DISTILBERT_NAMES = {
    "query": "distilbert.transformer.layer.{i}.attention.q_lin",
    "key": "distilbert.transformer.layer.{i}.attention.k_lin",
    "value": "distilbert.transformer.layer.{i}.attention.v_lin",
    "attention_output": "distilbert.transformer.layer.{i}.attention.out_lin",
    "attention_norm": "distilbert.transformer.layer.{i}.sa_layer_norm",
    "mlp_in": "distilbert.transformer.layer.{i}.ffn.lin1",
    "mlp_out": "distilbert.transformer.layer.{i}.ffn.lin2",
    "mlp_norm": "distilbert.transformer.layer.{i}.output_layer_norm",
}
# Buffers, the heads of pretraining, and a pooler that the module does not have.
_OMITTED_NAMES = (
    "bert.embeddings.position_ids",
    "bert.embeddings.token_type_ids",
    "distilbert.embeddings.position_ids",
    "cls.{head...}",
    "vocab_{head...}",
    "qa_outputs.{head...}",
    "bert.pooler.{layer...}",
    "pre_classifier.{layer...}",
)


def _layer_norm_rules(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
    )
