"""The largest logits of each example, kept in place of all of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


class TopK(NamedTuple):
    """The largest logits, and the total weight of the others.

    Attributes:
        values: `[..., k]`, float32, in falling order.
        indices: `[..., k]`, int32, their classes.
        rest: `[...]`, float32, the log-sum-exp of all other logits; −inf if there are none.
    """

    values: Array
    indices: Array
    rest: Array


def top_k(logits: ArrayLike, *, k: int) -> TopK:
    """Keeps the k largest logits and the log-sum-exp of the others.

    This stores 2k + 1 numbers in place of C.

    Args:
        logits: `[..., C]`, floating-point. Of equal logits, the first count as larger.
        k: Number of logits to keep, from 1 to C.

    Returns:
        The logits in the form that `expand_top_k` takes.

    Raises:
        ValueError: If the logits have no axis of classes, or `k` is out of range.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> kept = top_k(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), k=2)
        >>> kept.indices.tolist()
        [1, 3]
        >>> [round(float(jnp.exp(value)), 3) for value in (*kept.values, kept.rest)]
        [0.6, 0.2, 0.2]

    References:
        Without the rest, the student's teacher is biased: Anshumann et al., Sparse Logit Sampling,
        https://arxiv.org/abs/2503.16870
    """
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    if not logits.ndim or not 1 <= k <= logits.shape[-1]:
        raise ValueError(
            "k must be from 1 to the number of classes, "
            f"got k={k} for logits of the shape {logits.shape}"
        )
    logits = logits.astype(jnp.float32)
    values, indices = jax.lax.top_k(logits, k)
    # By index, not by a comparison with the smallest kept logit: a class that ties with it but was
    # not kept belongs to the rest.
    masked = jnp.put_along_axis(logits, indices, jnp.float32(-jnp.inf), axis=-1, inplace=False)
    return TopK(values, indices, jax.nn.logsumexp(masked, axis=-1))


def expand_top_k(kept: TopK, *, num_classes: int) -> Array:
    """Returns logits for all classes. The classes that were not kept share their weight evenly.

    log(exp(rest) / (C − k)) for each class that was not kept

    At temperature 1, the softmax gives every kept class its original probability. At a higher
    temperature it does not: an even distribution is flatter than the original one, so the classes
    that were not kept get more weight than they had, and a higher temperature needs a larger k. A
    class at −inf that was not kept gets a share as well. With k = C, the result equals the original
    logits bit for bit.

    Args:
        kept: The result of `top_k`.
        num_classes: C.

    Returns:
        `[..., C]`, float32; NaN for an example of which a traced index is no class.

    Raises:
        ValueError: If there are fewer classes than kept logits, or an index is no class.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> kept = top_k(jnp.log(jnp.array([0.05, 0.6, 0.15, 0.2])), k=2)
        >>> print(jax.nn.softmax(expand_top_k(kept, num_classes=4)).round(3))
        [0.1 0.6 0.1 0.2]

    References:
        Wu et al., TinyViT: Fast Pretraining Distillation for Small Vision Transformers,
        https://arxiv.org/abs/2207.10666
    """
    num_others = num_classes - kept.values.shape[-1]
    if num_others < 0:
        raise ValueError(
            f"{kept.values.shape[-1]} logits of each example were kept, "
            f"but num_classes is {num_classes}"
        )
    indices = _check_indices(kept.indices, num_classes)
    # With k = C no class takes a share. `math.log(0)` would raise an error all the same.
    share = jnp.asarray(kept.rest)[..., None] - math.log(max(num_others, 1))
    shares = jnp.broadcast_to(share, (*share.shape[:-1], num_classes))
    logits = jnp.put_along_axis(shares, indices, kept.values, axis=-1, inplace=False)
    is_class = (indices >= 0) & (indices < num_classes)
    return jnp.where(is_class.all(-1, keepdims=True), logits, jnp.nan)


def _check_indices(indices: ArrayLike, num_classes: int) -> Array:
    """Returns the indices; raises `ValueError` if one that is known is no class."""
    if not isinstance(indices, jax.core.Tracer):
        known = np.asarray(indices)
        if known.size and not 0 <= known.min() <= known.max() < num_classes:
            raise ValueError(
                f"kept logits have indices from {known.min()} to {known.max()}, which are not all "
                f"in [0, {num_classes}): pass the number of classes of the model that made them"
            )
    return jnp.asarray(indices)
