"""The fused divergences beside the plain ones, and a comparison that several tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import losses

PAIRS = {
    "forward": (losses.fused_linear_kl_divergence, losses.kl_divergence),
    "reverse": (losses.fused_linear_reverse_kl_divergence, losses.reverse_kl_divergence),
    "jensen_shannon": (
        functools.partial(losses.fused_linear_jensen_shannon_divergence, beta=0.3),
        functools.partial(losses.jensen_shannon_divergence, beta=0.3),
    ),
}


def assert_near_wide(gradients, wide_gradients):
    """Compares gradients in bfloat16 with those in float32, each by its largest entry."""
    for gradient, wide_gradient in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(wide_gradients), strict=True
    ):
        scale = jnp.abs(wide_gradient).max()
        np.testing.assert_allclose(
            gradient.astype(jnp.float32) / scale, wide_gradient / scale, atol=2e-2
        )
