"""Several teachers: their averaged distribution as one teacher, and weighted sums of losses."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive, check_shape, check_weights, wide
from jaxkd.losses._softmax import log_add_exp, log_of, logits_of, logits_pair, softmax
from jaxkd.losses.labels import hard_cross_entropy


def ensemble_logits(
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike,
    weights: ArrayLike | Sequence[float] | None = None,
    axis: int = -1,
) -> Array:
    """One teacher out of several: logits whose softened probabilities are the average of theirs.

    T log Σ_k w_k softmax(t_k / T), so that softmax(ensemble / T) = Σ_k w_k softmax(t_k / T)

    Give it to any loss on logits, at the same temperature. Probabilities are averaged, not logits: the mean of logits
    is the geometric mean of the distributions, which a single doubtful teacher can veto.

    Args:
        teacher_logits: `[K, ..., C]`, floating-point, one entry for each teacher.
        temperature: T > 0, a scalar; that of the loss.
        weights: w, at least 0, `[K]` or one for each teacher and example `[K, ...]`; they are divided by their sum. All
            alike if not given.
        axis: The axis of the classes.

    Returns:
        Logits `[..., C]`, in float32 or wider; −inf where every teacher has −inf.

    Raises:
        ValueError: If there is no axis of teachers, the temperature is not a positive scalar, or the weights are
            negative or of another shape.
        TypeError: If the logits are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> teachers = jnp.log(jnp.array([[[0.8, 0.2]], [[0.4, 0.6]]]))
        >>> print(jax.nn.softmax(losses.ensemble_logits(teachers, temperature=1.0)))
        [[0.6 0.4]]

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531
    """
    check_positive("temperature", temperature)
    check_shape(jnp.ndim(teacher_logits) >= 2, f"teacher_logits must be [K, ..., C], got {jnp.shape(teacher_logits)}")
    logits = logits_of("teacher_logits", teacher_logits)
    axis = axis % logits.ndim
    check_shape(axis > 0, "axis 0 is that of the teachers; name another one for the classes")
    examples = logits.shape[:axis] + logits.shape[axis + 1 :]
    weights = jnp.ones(logits.shape[0], logits.dtype) if weights is None else weights
    shares = _shaped(check_weights("teachers", weights, logits.dtype), examples)
    logs = [
        softmax(one, axis - 1, temperature=temperature).logs + share
        for one, share in zip(logits, jnp.expand_dims(softmax(log_of(shares), 0).logs, axis), strict=True)
    ]
    averaged = log_add_exp(*logs)
    possible = averaged != -jnp.inf
    return jnp.where(possible, temperature * jnp.where(possible, averaged, 0), -jnp.inf)


def weighted_sum(terms: Sequence[ArrayLike], *, weights: ArrayLike | Sequence[float]) -> Array:
    """Losses by several teachers, or of several kinds, as one.

    Σ_k w_k L_k

    `losses.weighted_sum([by_large, by_medium], weights=(0.7, 0.3))` learns from two teachers with 0.7 and 0.3. The
    weights are taken as they are: those of losses of several kinds need not add up to 1.

    Args:
        terms: K arrays of one shape `[...]`, floating-point, each one value per example.
        weights: w, `[K]`, or one for each term and example `[K, ...]`, such as `teacher_weights` gives.

    Returns:
        One value per example `[...]`, in float32 or wider.

    Raises:
        ValueError: If the terms' shapes differ or the weights' shape is neither `[K]` nor `[K, ...]`.
        TypeError: If a term is not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.weighted_sum([jnp.array([1.0, 2.0]), jnp.array([3.0, 0.0])], weights=(0.7, 0.3)))
        [1.6 1.4]

    References:
        You et al., Learning from Multiple Teacher Networks, https://doi.org/10.1145/3097983.3098135
    """
    shapes = [jnp.shape(term) for term in terms]
    check_shape(len(set(shapes)) == 1, f"the terms of a sum must have one shape, one value per example; got {shapes}")
    wider = [wide("a term", term) for term in terms]
    dtype = max((term.dtype for term in wider), key=lambda dtype: dtype.itemsize)
    stacked = jnp.stack([term.astype(dtype) for term in wider])
    weights = _shaped(jnp.asarray(weights, stacked.dtype), stacked.shape)
    # A term of weight 0 is left out, even where it is infinite.
    return jnp.where(weights != 0, weights * jnp.where(weights != 0, stacked, 0), 0).sum(0)


def teacher_weights(teacher_logits: ArrayLike, labels: ArrayLike) -> Array:
    """How far to trust each of several teachers with each example, by their cross-entropy with its label.

    w_k = (1 − exp(CE_k) / Σ_j exp(CE_j)) / (K − 1)

    For `weighted_sum` or `ensemble_logits`. A single teacher has weight 1.

    Args:
        teacher_logits: `[K, ..., C]`, floating-point.
        labels: `[...]`, integers in [0, C).

    Returns:
        Weights `[K, ...]`, at least 0, with sum 1 over the teachers.

    Raises:
        ValueError: If shapes disagree.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> teachers = jnp.log(jnp.array([[[0.8, 0.2]], [[0.4, 0.6]]]))
        >>> print(losses.teacher_weights(teachers, jnp.array([0])))
        [[0.667]
         [0.333]]

    References:
        Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, https://arxiv.org/abs/2201.00007
    """
    logits = logits_of("teacher_logits", teacher_logits)
    check_shape(logits.ndim >= 2, f"teacher_logits must be [K, ..., C], got {logits.shape}")
    if logits.shape[0] == 1:
        return jnp.ones_like(hard_cross_entropy(logits[0], labels))[None]
    entropies = jnp.stack([hard_cross_entropy(one, labels) for one in logits])
    # A teacher that rules the label out has no weight, rather than making a NaN of all.
    entropies = jnp.minimum(entropies, jnp.finfo(entropies.dtype).max)
    return (1 - jax.nn.softmax(entropies, axis=0)) / (logits.shape[0] - 1)


def example_weights(student_logits: ArrayLike, teacher_logits: ArrayLike, labels: ArrayLike) -> Array:
    """How much soft targets are worth to each example: more where the student is worse than the teacher.

    1 − exp(−CE(label, s) / CE(label, t))

    Multiply a soft loss by it, as the paper does `soft_cross_entropy`, with the gradient stopped here
    (`jax.lax.stop_gradient`): the weight is not to be minimised.

    Args:
        student_logits: `[..., C]`, floating-point.
        teacher_logits: The same shape.
        labels: `[...]`, integers in [0, C).

    Returns:
        Weights `[...]` in [0, 1]; 1 where the teacher's cross-entropy is 0, and 0 where it is infinite.

    Raises:
        ValueError: If shapes disagree.
        TypeError: If the logits are not floating-point or the labels are not integers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(jnp.array([[0.5, 0.5]]))
        >>> print(losses.example_weights(student, teacher, jnp.array([0])))
        [0.865]

    References:
        Zhou et al., Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective,
        https://arxiv.org/abs/2102.00650
    """
    logits = logits_pair(student_logits, teacher_logits)
    student, teacher = (hard_cross_entropy(one, labels) for one in logits)
    unsure = (teacher != 0) & (teacher != jnp.inf)
    weights = -jnp.expm1(-student / jnp.where(unsure, teacher, 1))
    return jnp.where(unsure, weights, jnp.where(teacher == 0, 1, 0))


def _shaped(weights: Array, shape: tuple[int, ...]) -> Array:
    """Weights `[K]` or `[K, ...]` as `[K, ...]`."""
    check_shape(
        weights.shape in (shape[:1], shape),
        f"weights {weights.shape} must have one entry for each of the {shape[0]}, or one for each and example {shape}",
    )
    return jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(shape) - weights.ndim)), shape)
