"""FLOPs and bytes of a network's layers, from the shapes of their inputs, weights and outputs.

A multiplication and an addition are two FLOPs. Only products count: convolutions, dense layers, the
recurrent layers and attention. Elementwise operations (activations, normalisation, pooling, sums of
a residual block) are taken to be fused into their neighbours.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import Array, lax

from jaxkd import models
from jaxkd.models.layers import LayerNorm
from jaxkd.models.recurrent import LSTM

WEIGHT_BYTES = 4
"""Weights, their gradients and the optimizer's state are float32 in any compute dtype."""


class Layer(NamedTuple):
    """What a layer computes and moves in its forward pass.

    Attributes:
        flops: FLOPs of its products.
        inputs: Values that it reads.
        outputs: Values that it writes.
        weights: Weights that it reads.
        gradients: Weights whose gradient is written; an embedding reads a few rows of its table,
            but the gradient has all of them.
        repeated: The part of `flops` in a loop's iterations after the first one, which XLA does not
            count.
    """

    flops: int
    inputs: int
    outputs: int
    weights: int
    gradients: int
    repeated: int = 0


class Cost(NamedTuple):
    """FLOPs and bytes of memory traffic."""

    flops: int
    bytes: int


def conv(inputs: Sequence[int], outputs: Sequence[int], kernel: Sequence[int], taps: int) -> Layer:
    """Counts a convolution `[B, H, W, C] -> [B, H', W', K]` with a kernel `[h, w, C, K]`.

    Args:
        inputs: Shape of the inputs.
        outputs: Shape of the outputs.
        kernel: Shape of the kernel.
        taps: Pairs of an output pixel and a position of the kernel that lies within the image.
    """
    flops = 2 * inputs[0] * taps * kernel[2] * kernel[3]
    return Layer(flops, size(inputs), size(outputs), size(kernel), size(kernel))


def dense(inputs: Sequence[int], features: int) -> Layer:
    """Counts a dense layer `[..., D] -> [..., features]`."""
    rows = size(inputs[:-1])
    weights = inputs[-1] * features
    return Layer(2 * rows * weights, size(inputs), rows * features, weights, weights)


def embedding(tokens: Sequence[int], vocabulary: int, features: int) -> Layer:
    """Counts an embedding `[...] -> [..., features]`, which reads a row for each token."""
    outputs = size(tokens) * features
    return Layer(0, size(tokens), outputs, outputs, vocabulary * features)


def normalization(inputs: Sequence[int]) -> Layer:
    """Counts a normalisation `[..., C]` with scale and bias: no products, but memory traffic."""
    return Layer(0, size(inputs), size(inputs), 2 * inputs[-1], 2 * inputs[-1])


def lstm(inputs: Sequence[int], features: int) -> Layer:
    """Counts an LSTM `[B, S, D] -> [B, S, H]`: inputs and hidden state times four gates each."""
    batch, length, width = inputs
    weights = (width + features) * 4 * features
    step = 2 * batch * features * 4 * features
    return Layer(
        flops=2 * batch * length * width * 4 * features + length * step,
        inputs=size(inputs),
        outputs=batch * length * features,
        # The loop reads the recurrent kernel in each step.
        weights=(width + length * features) * 4 * features,
        gradients=weights,
        repeated=(length - 1) * step,
    )


def attention(batch: int, heads: int, length: int, width: int) -> Layer:
    """Counts the scores of queries and keys and their product with the values, for all heads."""
    scores = batch * heads * length * length
    states = batch * heads * length * width
    # The scores are written, then read as weights.
    return Layer(2 * 2 * scores * width, 3 * states + scores, states + scores, 0, 0)


def size(shape: Sequence[int]) -> int:
    """Returns the number of values of a shape."""
    count = 1
    for length in shape:
        count *= length
    return count


def count_taps(length: int, kernel: int, stride: int, padding: tuple[int, int]) -> int:
    """Counts the products along an axis that are not with padding, over all outputs.

    Example:
        >>> count_taps(4, 3, 1, (1, 1))    # 2 + 3 + 3 + 2
        10
    """
    outputs = (length + sum(padding) - kernel) // stride + 1
    starts = (i * stride - padding[0] for i in range(outputs))
    return sum(min(start + kernel, length) - max(start, 0) for start in starts)


def forward(layers: Iterable[Layer], *, item_bytes: int = 4) -> Cost:
    """Sums a forward pass: each layer reads its inputs and weights and writes its outputs."""
    layers = tuple(layers)
    moved = sum(item_bytes * (x.inputs + x.outputs) + WEIGHT_BYTES * x.weights for x in layers)
    return Cost(sum(layer.flops for layer in layers), moved)


def backward(layers: Sequence[Layer], *, item_bytes: int = 4) -> Cost:
    """Sums a backward pass: twice the products of the forward pass, without one of the first layer.

    The gradient of the weights reads inputs and outputs' gradients, that of the inputs reads
    weights and outputs' gradients. Nobody needs the gradient of the network's inputs.
    """
    flops = moved = 0
    for i, layer in enumerate(layers):
        passes = 1 if i == 0 else 2
        flops += passes * layer.flops
        moved += passes * item_bytes * (layer.inputs + layer.outputs)
        moved += WEIGHT_BYTES * (layer.gradients + (passes - 1) * layer.weights)
    return Cost(flops, moved)


def optimizer(num_parameters: int) -> Cost:
    """Counts SGD with momentum: `m = decay m + g`, `p = p - rate m`.

    It reads gradient, momentum and parameter, and writes the latter two.
    """
    return Cost(4 * num_parameters, 5 * WEIGHT_BYTES * num_parameters)


def loss(batch: int, num_classes: int) -> Cost:
    """Counts the memory traffic of the distillation loss with its gradient; it has no products.

    It reads both logits and the labels and writes the gradient of the student's logits.
    """
    return Cost(0, 4 * batch * (3 * num_classes + 1))


def add(*costs: Cost) -> Cost:
    """Adds costs."""
    return Cost(sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs))


def repeated(layers: Iterable[Layer]) -> int:
    """Sums the FLOPs of a forward pass in loops' iterations after the first one."""
    return sum(layer.repeated for layer in layers)


def find_layers(model: models.Model, inputs: Any, *, train: bool) -> list[Layer]:
    """Finds the layers of a model in the order in which they run, without computing anything.

    Args:
        model: A model of Linen modules.
        inputs: Its inputs, of which only shape and dtype matter.
        train: Whether it trains or predicts.
    """
    found: list[Layer] = []
    running: list[nn.Module] = []

    def record(next_function: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        # A module that extends one of Flax's calls the `__call__` of its base class.
        is_base = any(context.module is module for module in running)
        running.append(context.module)
        outputs = next_function(*args, **kwargs)
        running.pop()
        if context.method_name == "__call__" and not is_base:
            layer = _count(context.module, args[0], outputs)
            found.extend([layer] if layer else [])
        return outputs

    key = jax.random.key(0)
    variables = jax.eval_shape(model.init, key, inputs)
    with nn.intercept_methods(record):
        outputs, _ = jax.eval_shape(
            lambda variables, inputs: model.apply(variables, inputs, train=train, key=key),
            variables,
            inputs,
        )
    return found + _find_attention(outputs.features)


def _count(module: nn.Module, inputs: Array, outputs: Any) -> Layer | None:
    """Counts a layer; `None` for a module that consists of others."""
    if isinstance(module, nn.Conv):
        kernel = module.get_variable("params", "kernel").shape
        taps = _count_all_taps(module, inputs.shape, kernel)
        return conv(inputs.shape, outputs.shape, kernel, taps)
    if isinstance(module, nn.Dense):
        return dense(inputs.shape, module.features)
    if isinstance(module, nn.Embed):
        return embedding(inputs.shape, module.num_embeddings, module.features)
    if isinstance(module, nn.BatchNorm | LayerNorm):
        return normalization(inputs.shape)
    if isinstance(module, LSTM):
        return lstm(inputs.shape, module.features)
    return None


def _count_all_taps(module: nn.Conv, image: Sequence[int], kernel: Sequence[int]) -> int:
    strides = (module.strides,) * 2 if isinstance(module.strides, int) else module.strides or (1, 1)
    padding: Any = module.padding
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(image[1:3], kernel[:2], strides, padding)
    elif isinstance(padding, int):
        padding = [(padding, padding)] * 2
    rows, columns = (
        count_taps(*axis) for axis in zip(image[1:3], kernel[:2], strides, padding, strict=True)
    )
    return rows * columns


def _find_attention(features: dict[str, Any]) -> list[Layer]:
    """Finds the attention of each block, which is no module of its own, by its features."""
    return [
        attention(scores.shape[0], scores.shape[1], scores.shape[2], queries.shape[-1])
        for i in range(1, len(features) + 1)
        if (scores := features.get(f"scores{i}")) is not None
        and (queries := features.get(f"queries{i}")) is not None
    ]
