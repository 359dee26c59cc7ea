"""What the networks share: normalisations, dropout, a look at the images, rules for weights."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkd import layout
from jaxkd.models.model import mapped_axis
from jaxkd.transfer import Rule


class BatchNorm(nn.BatchNorm):
    """Batch normalisation whose running variance is PyTorch's: that of a sample, divided by n − 1 instead of n.

    Flax and TensorFlow store the variance of the batch itself. Momentum 0.9 is PyTorch's 0.1, and 0.99 its 0.01. Within
    `synchronized` the batch is that of all devices.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None, **keywords: Any) -> Array:
        """Normalises over all axes but the last one; see `flax.linen.BatchNorm`."""
        trains = not nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        if not trains or self.is_initializing() or not self.is_mutable_collection("batch_stats"):
            return super().__call__(x, use_running_average, **keywords)
        if axis_name := mapped_axis():
            object.__setattr__(self, "axis_name", axis_name)  # a bound module is frozen, and its parent knows no axis
        kept = self.momentum * self.get_variable("batch_stats", "var")
        count = x.size // x.shape[-1] * (lax.psum(1, axis_name) if axis_name else 1)
        result = super().__call__(x, use_running_average, **keywords)
        fresh = self.get_variable("batch_stats", "var") - kept
        self.put_variable("batch_stats", "var", kept + fresh * (count / max(count - 1, 1)))
        return result


class LayerNorm(nn.Module):
    """Layer normalisation with statistics in float32 or wider; Flax's own cannot be strict about dtypes.

    Attributes:
        epsilon: What is added to the variance.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises over the last axis."""
        dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        places = ("scale", nn.initializers.ones), ("bias", nn.initializers.zeros)
        around = (1,) * (x.ndim - 1)
        scale, bias = (self.param(name, init, x.shape[-1:]).astype(dtype).reshape(*around, -1) for name, init in places)
        centred = x.astype(dtype) - x.mean(-1, keepdims=True, dtype=dtype)
        inverse = lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (centred * inverse * scale + bias).astype(x.dtype)


class RowDense(nn.Dense):
    """A dense layer that takes all axes but the last one for one of rows.

    It computes what `flax.linen.Dense` computes. XLA on a CPU is slow at a kernel gradient that sums over several axes:
    a BERT trains 1.4 times as fast so.
    """

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps `[..., D]` to `[..., features]`."""
        return super().__call__(inputs.reshape(-1, inputs.shape[-1])).reshape(*inputs.shape[:-1], self.features)


class Dropout(nn.Module):
    """Dropout that draws a byte a value, where Flax's draws four, and draws it once.

    The rate is rounded to 256ths, so that 0.1 drops 10.2 % of the values; what is kept is divided by its true share.
    With 4 draws from 32 bits, and without drawing anew for the gradient, a BERT trains a fifth faster on a CPU.

    Attributes:
        rate: Share of the values that are dropped.
        deterministic: Whether nothing is, as in prediction; may be given at the call instead.

    References:
        Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting,
        https://jmlr.org/papers/v15/srivastava14a.html
    """

    rate: float
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        """Drops values and scales the others up."""
        dropped = round(256 * self.rate)
        if nn.merge_param("deterministic", self.deterministic, deterministic) or not dropped:
            return x
        if dropped >= 256:
            return jnp.zeros_like(x)
        draws = jax.random.bits(self.make_rng("dropout"), (-(-x.size // 4),), jnp.uint32)
        each = lax.bitcast_convert_type(draws, jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
        # Behind the barrier, or the gradient would draw it once more.
        kept = lax.optimization_barrier(each >= dropped)
        return jnp.where(kept, x * (256 / (256 - dropped)), 0)


def check_images(inputs: Array, first: Mapping[str, Any] | None, *, least: int) -> None:
    """Raises unless a network with these weights can classify these images.

    Args:
        inputs: What was given for `[B, H, W, C]`.
        first: Parameters of the first convolution; `None` while they are made.
        least: Height and width of the smallest images.

    Raises:
        ValueError: If the rank, size or channels are others.
        TypeError: If the images are not floating-point.
    """
    if inputs.ndim != 4:
        raise ValueError(f"expected images [B, H, W, C], got {inputs.shape}: put a single one into a batch by x[None]")
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"expected floating-point images, got {inputs.dtype}: see jaxkd.models.standardized")
    if min(inputs.shape[1:3]) < least:
        raise ValueError(f"expected images [B, H, W, C] of at least {least}×{least}, got {inputs.shape}: resize them")
    channels = inputs.shape[-1] if first is None else first["kernel"].shape[-2]
    if channels != inputs.shape[-1]:
        raise ValueError(
            f"the weights are for images [B, H, W, {channels}], got {inputs.shape}: give the images {channels} "
            f"channels, or initialise weights for {inputs.shape[-1]}"
        )


def norm_rules(source: str, target: str) -> tuple[Rule, ...]:
    """From a PyTorch batch normalisation to Flax's, at a place in either tree."""
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
        Rule(f"{source}.num_batches_tracked", None),
    )


def dense_rules(source: str, target: str, kernel: layout.Rearrangement = layout.DENSE) -> tuple[Rule, ...]:
    """From a PyTorch dense layer or a convolution with biases to Flax's, at a place in either tree."""
    return Rule(f"{source}.weight", f"params/{target}/kernel", kernel), Rule(f"{source}.bias", f"params/{target}/bias")
