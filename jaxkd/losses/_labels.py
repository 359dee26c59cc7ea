"""Values at the labels of logits, and the true class against all others."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxkd.losses._softmax import Softmax, log_sum_exp


def take_at_labels(values: Array, labels: Array) -> Array:
    """Returns the values at the labels, and NaN where a label is out of range."""
    return take_classes(values, labels[..., None])[..., 0]


def take_classes(values: Array, indices: Array) -> Array:
    """Returns the values of some classes `[..., k]`, and NaN where an index is no class."""
    # JAX counts negative indices from the end: −1 would be read as the last class.
    indices = jnp.where(indices < 0, values.shape[-1], indices)
    return jnp.take_along_axis(values, indices, -1, mode="fill", fill_value=jnp.nan)


def non_target_mask(labels: Array, num_classes: int) -> Array:
    """Returns a mask `[..., C]` that is True for all classes but the label."""
    return ~jax.nn.one_hot(labels, num_classes, dtype=bool)


def target_against_rest(log_probabilities: Array, labels: Array) -> Softmax:
    """Returns the distribution `[..., 2]` over the true class and all other classes together."""
    non_target = non_target_mask(labels, log_probabilities.shape[-1])
    # Not log(1 − p_label), which is −inf once p_label rounds to 1.
    rest = log_sum_exp(jnp.where(non_target, log_probabilities, -jnp.inf))
    logs = jnp.stack([take_at_labels(log_probabilities, labels), rest], -1)
    return Softmax(jnp.exp(logs), logs)
