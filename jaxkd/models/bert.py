"""BERT and its kin: encoders of texts with attention maps and hidden states to distil."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxkd.models.layers import Dropout, LayerNorm, RowDense, dense_rules
from jaxkd.models.model import Outputs
from jaxkd.transfer import Rule

gelu = functools.partial(nn.gelu, approximate=False)
"""BERT's activation, by the error function; `flax.linen.gelu` by itself takes the hyperbolic tangent."""

_normal = nn.initializers.normal(0.02)
_Dense = functools.partial(RowDense, kernel_init=_normal)


class Pooling(NamedTuple):
    """How the states of a text's tokens become one vector.

    Attributes:
        reduce: `(states [B, S, D], where [B, S]) -> [B, D]`; `where` is True for tokens, False for padding.
        dense: Name of a dense layer behind it; `None` for none.
        activation: What follows that layer.
        torch: The layer's name in PyTorch.
    """

    reduce: Callable[[Array, Array], Array]
    dense: str | None = None
    activation: Callable[[Array], Array] = nn.tanh
    torch: str = ""


def mean_of_tokens(states: Array, where: Array) -> Array:
    """The mean of the states `[B, S, D]` that count, 0 for a text of none; summed in float32."""
    counts = jnp.maximum(where.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    total = jnp.where(where[..., None], states.astype(jnp.float32), 0).sum(axis=1)
    return (total / counts).astype(states.dtype)


def first_token(states: Array, where: Array) -> Array:
    """The state of `[CLS]`."""
    del where
    return states[:, 0]


mean_pooling = Pooling(mean_of_tokens)
"""That of sentence-transformers."""

bert_pooling = Pooling(first_token, "pooler", nn.tanh, "bert.pooler.dense")
"""A dense layer of the first token's state, and tanh."""

distilbert_pooling = Pooling(first_token, "pre_classifier", nn.relu, "pre_classifier")
"""A dense layer of the first token's state, and ReLU."""


class BERT(nn.Module):
    """Encoder of BERT, DistilBERT or MiniLM, with a classifier.

    A block is `y = norm(x + attention(x))`, `norm(y + dense(gelu(dense(y))))`. All weights start normal with standard
    deviation 0.02, all biases at 0. Dropout acts as in PyTorch's BERT: on the embeddings, the attention weights, what a
    block adds, and before the classifier. DistilBERT is the same with `segments=0` and `distilbert_pooling`.

    Attributes:
        vocab_size: Number of tokens; 0 is padding.
        hidden: Width of the hidden states, a multiple of `heads`.
        layers: Number of blocks; their parameters are `block0`, `block1`, …
        heads: Attention heads of a block.
        intermediate: Width within a block.
        positions: Tokens of the longest text.
        num_classes: Number of logits.
        segments: Kinds of segments, all tokens being of the first; 0 leaves their embedding out.
        pooling: `bert_pooling`, `distilbert_pooling`, `mean_pooling`, or a `Pooling` of your own.
        dropout: Probability of dropping a value in training; without a key nothing is dropped.
        epsilon: What layer normalisation adds to the variance.
        activation: Within a block.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import from_linen
        >>> model = from_linen(BERT(vocab_size=100, hidden=8, layers=2, heads=2, intermediate=16, positions=16))
        >>> tokens = jnp.array([[2, 7, 9, 3], [2, 7, 3, 0]], jnp.int32)
        >>> outputs, _ = model.apply(model.init(jax.random.key(0), tokens), tokens, train=False)
        >>> outputs.logits.shape, outputs.features["layer2"].shape, outputs.features["scores1"].shape
        ((2, 2), (2, 4, 8), (2, 2, 4, 4))

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        https://arxiv.org/abs/1810.04805
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

    @nn.compact
    def __call__(self, tokens: Array, train: bool = False) -> Outputs:
        """Classifies texts.

        Args:
            tokens: Integers `[B, S]`, 0 for padding behind a text. Ids are not checked: one that is not in the
                vocabulary makes its text's states NaN.
            train: Whether to drop.

        Returns:
            Logits `[B, num_classes]`. Features: `embeddings` and `layer1` … `layerN`, `[B, S, hidden]`; of each layer
            `scores1` … before the softmax and without mask, `attention1` …, the weights, 0 at padded keys,
            `[B, heads, S, S]` in float32, and `queries1` …, `keys1` …, `values1` … `[B, S, heads, hidden / heads]`;
            `pooled` `[B, hidden]` and the same as `pre_logits`, which the classifier gets. Nothing of a text depends
            on padding; at padded positions states are finite and mean nothing, so that losses must mask them. A text
            without tokens is pooled to 0.

        Raises:
            ValueError: If the shape is none of texts or they are too long, or heads do not divide the width.
            TypeError: If the tokens are not integers.
        """
        self._check(tokens)
        drop = Dropout(self.dropout, deterministic=not (train and self.has_rng("dropout")))
        where = tokens != 0
        x = drop(LayerNorm(self.epsilon, name="embedding_norm")(self._embed(tokens)))
        named = {"embeddings": x}
        for i in range(self.layers):
            block = _Block(self.heads, self.intermediate, self.epsilon, self.activation, name=f"block{i}")
            x, inner = block(x, where, drop)
            named |= {f"{name}{i + 1}": value for name, value in inner.items()} | {f"layer{i + 1}": x}
        x = self.pooling.reduce(x, where)
        if self.pooling.dense is not None:
            x = self.pooling.activation(_Dense(self.hidden, name=self.pooling.dense)(x))
        x = named["pooled"] = named["pre_logits"] = jnp.where(where.any(axis=1, keepdims=True), x, 0)
        return Outputs(_Dense(self.num_classes, name="logits")(drop(x)), named)

    def _embed(self, tokens: Array) -> Array:
        x = nn.Embed(self.vocab_size, self.hidden, embedding_init=_normal, name="token_embedding")(tokens)
        own = self.param("position_embedding", _normal, (self.positions, self.hidden))[: tokens.shape[1]]
        if self.segments:
            own += self.param("segment_embedding", _normal, (self.segments, self.hidden))[:1]
        return x + own[None]

    def _check(self, tokens: Array) -> None:
        if tokens.ndim != 2 or not tokens.shape[1]:
            raise ValueError(f"expected tokens [B, S], got {tokens.shape}: put a single text into a batch by x[None]")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"expected integer tokens, got {tokens.dtype}: see jaxkd.data.tokens.encode")
        if tokens.shape[1] > self.positions:
            raise ValueError(f"tokens {tokens.shape} are more than the {self.positions} positions: cut the texts")
        if self.hidden % self.heads:
            raise ValueError(f"hidden must be a multiple of heads, got {self.hidden} and {self.heads}")

    def torch_rules(self) -> tuple[Rule, ...]:
        """How PyTorch's weights become this module's.

        Returns:
            Rules for the names of `BertForSequenceClassification`, or without segments of
            `DistilBertForSequenceClassification`, in Hugging Face's transformers; `canonical_names` gives these names
            to the weights of their other models.
        """
        places, embeddings = (_BERT, "bert.embeddings") if self.segments else (_DISTILBERT, "distilbert.embeddings")
        segments = Rule(f"{embeddings}.token_type_embeddings.weight", "params/segment_embedding")
        pooling = self.pooling.dense and dense_rules(self.pooling.torch, self.pooling.dense)
        return (
            Rule(f"{embeddings}.word_embeddings.weight", "params/token_embedding/embedding"),
            Rule(f"{embeddings}.position_embeddings.weight", "params/position_embedding"),
            *((segments,) if self.segments else ()),
            *_norm_rules(f"{embeddings}.LayerNorm", "embedding_norm"),
            *(rule for ours, theirs in places.items() for rule in _place_rules(theirs, f"block{{i}}/{ours}")),
            *(pooling or ()),
            *dense_rules("classifier", "logits"),
            *(Rule(pattern, None) for pattern in _LEFT_OUT),
        )


def canonical_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of transformers' BERT or DistilBERT under the names that `BERT.torch_rules` reads.

    Models without a head lack the prefix `bert.` or `distilbert.`; old files call the scale and bias of a layer
    normalisation `gamma` and `beta`.

    Args:
        weights: Arrays by name, as `jaxkd.checkpoints.load_weights` returns them.

    Returns:
        The same arrays.

    Example:
        >>> canonical_names({"embeddings.LayerNorm.gamma": 1, "encoder.layer.0.output.dense.bias": 2})
        {'bert.embeddings.LayerNorm.weight': 1, 'bert.encoder.layer.0.output.dense.bias': 2}
    """

    def canonical(name: str) -> str:
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        return f"{prefix}{name}" if name.split(".")[0] in ("embeddings", "encoder", "transformer", "pooler") else name

    prefix = "distilbert." if any(name.startswith("transformer.") for name in weights) else "bert."
    return {canonical(name): array for name, array in weights.items()}


class _Block(nn.Module):
    heads: int
    intermediate: int
    epsilon: float
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array, where: Array, drop: Callable[[Array], Array]) -> tuple[Array, dict[str, Array]]:
        by_head = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        queries, keys, values = (
            _Dense(x.shape[2], name=name)(x).reshape(by_head) for name in ("query", "key", "value")
        )
        scores = by_head[-1] ** -0.5 * jnp.einsum("bnhd,bmhd->bhnm", queries, keys, preferred_element_type=jnp.float32)
        weights = _masked_softmax(scores, where[:, None, None])
        context = jnp.einsum("bhnm,bmhd->bnhd", drop(weights).astype(x.dtype), values).reshape(x.shape)
        x = LayerNorm(self.epsilon, name="attention_norm")(
            x + drop(_Dense(x.shape[2], name="attention_output")(context))
        )
        inner = self.activation(_Dense(self.intermediate, name="mlp_in")(x))
        x = LayerNorm(self.epsilon, name="mlp_norm")(x + drop(_Dense(x.shape[2], name="mlp_out")(inner)))
        return x, {"queries": queries, "keys": keys, "values": values, "scores": scores, "attention": weights}


def _masked_softmax(scores: Array, where: Array) -> Array:
    """Softmax over the last axis in which padding gets 0, even if that is all."""
    # The lowest number instead of −inf: a row of nothing else would give NaN, which a mask hides but does not undo.
    weights = jax.nn.softmax(jnp.where(where, scores, jnp.finfo(scores.dtype).min))
    return jnp.where(where, weights, 0)


_BERT = {
    "query": "bert.encoder.layer.{i}.attention.self.query",
    "key": "bert.encoder.layer.{i}.attention.self.key",
    "value": "bert.encoder.layer.{i}.attention.self.value",
    "attention_output": "bert.encoder.layer.{i}.attention.output.dense",
    "attention_norm": "bert.encoder.layer.{i}.attention.output.LayerNorm",
    "mlp_in": "bert.encoder.layer.{i}.intermediate.dense",
    "mlp_out": "bert.encoder.layer.{i}.output.dense",
    "mlp_norm": "bert.encoder.layer.{i}.output.LayerNorm",
}
_DISTILBERT = {
    "query": "distilbert.transformer.layer.{i}.attention.q_lin",
    "key": "distilbert.transformer.layer.{i}.attention.k_lin",
    "value": "distilbert.transformer.layer.{i}.attention.v_lin",
    "attention_output": "distilbert.transformer.layer.{i}.attention.out_lin",
    "attention_norm": "distilbert.transformer.layer.{i}.sa_layer_norm",
    "mlp_in": "distilbert.transformer.layer.{i}.ffn.lin1",
    "mlp_out": "distilbert.transformer.layer.{i}.ffn.lin2",
    "mlp_norm": "distilbert.transformer.layer.{i}.output_layer_norm",
}
# Buffers, the heads of pretraining, and a pooler that the module has not got.
_LEFT_OUT = (
    "bert.embeddings.position_ids",
    "bert.embeddings.token_type_ids",
    "distilbert.embeddings.position_ids",
    "cls.{head...}",
    "vocab_{head...}",
    "qa_outputs.{head...}",
    "bert.pooler.{layer...}",
    "pre_classifier.{layer...}",
)


def _place_rules(source: str, target: str) -> tuple[Rule, ...]:
    return (_norm_rules if target.endswith("norm") else dense_rules)(source, target)


def _norm_rules(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", f"params/{target}/scale"), Rule(f"{source}.bias", f"params/{target}/bias")
