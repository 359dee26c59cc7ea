"""What the convolutional networks share: PyTorch's batch normalisation, a look at the images, rules for weights."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
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
