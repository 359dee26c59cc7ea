"""Losses on single activations: the side of zero on which they are, and many copies of a teacher.

Axis 0 is the batch and the last axis the channels. Features narrower than 32 bits are widened
first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_positive, check_shape, flatten_examples, upcast_pair

_FEATURE_NAMES = "student_features", "teacher_features"


def activation_boundary_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, margin: ArrayLike = 1.0
) -> Array:
    """Computes a squared hinge loss on whether the units of the teacher are active (AB).

    Σ max(0, m − s)² over units with t > 0, plus Σ max(0, m + s)² over units with t ≤ 0

    Only the sign of the teacher's units counts, and the student's have to be on the same side of
    zero by the margin. The features are those before the ReLU. The sum over all units, rather than
    their mean, is that of paper and code; the code divides it by 1000, halves it for each stage
    before the last, and trains with it alone, before the training on labels.

    Args:
        student_features: `[B, ...]`, floating-point. Use `project` first where the channels differ.
        teacher_features: The same shape.
        margin: m > 0, a scalar.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ, there is no axis after the batch, or the margin is not a
            positive scalar.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[2.0, 0.5, 0.5]]), jnp.array([[9.0, 0.1, -0.1]])
        >>> print(losses.activation_boundary_loss(student, teacher))  # 0 + 0.5² + 1.5²
        [2.5]

    References:
        Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
        Neurons, https://arxiv.org/abs/1811.03233
    """
    margin = check_positive("margin", margin)
    student, teacher = upcast_pair(_FEATURE_NAMES, student_features, teacher_features)
    _check_batch(student)
    check_shape(
        student.shape == teacher.shape,
        f"student_features {student.shape} and teacher_features {teacher.shape} must have the same "
        "shape; project the student's first where the channels (the last axis) differ, pool_to "
        "on the larger where the spatial sizes differ",
    )
    towards_teacher = jnp.where(teacher > 0, student, -student)
    shortfall = jax.nn.relu(jnp.asarray(margin, student.dtype) - towards_teacher)
    return jnp.sum(jnp.square(flatten_examples(shortfall)), axis=1)


def many_to_one_loss(student_features: ArrayLike, teacher_features: ArrayLike) -> Array:
    """Computes the squared differences of N segments of student channels to the teacher's (NORM).

    Σ_n mean((s_n − t)²) over the N segments of C channels, where the mean is over all but the batch

    The student gets a 1×1 convolution to N C channels behind its last features, whose output is
    compared, and a second one back to its own channels, whose output is added to them; both are
    linear and merge into the layer that follows after the training. They are part of the student's
    network, in the authors' code with batch normalisation. N is 4 there by default, and 8 in its
    example.

    Args:
        student_features: `[B, ..., N C]`, floating-point: the output of the first convolution, such
            as `project` with `init_projector(key, student_channels, N * C)`.
        teacher_features: `[B, ..., C]`, of the same shape except for the channels.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the student's channels are not a multiple of the teacher's, or other axes
            differ.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[1.0, 2.0, 3.0, 2.0]]), jnp.array([[1.0, 2.0]])
        >>> print(losses.many_to_one_loss(student, teacher))  # 0 + (2² + 0) / 2
        [2.]

    References:
        Liu et al., NORM: Knowledge Distillation via N-to-One Representation Matching,
        https://arxiv.org/abs/2305.13803
    """
    student, teacher = upcast_pair(_FEATURE_NAMES, student_features, teacher_features)
    _check_batch(student)
    check_shape(
        student.shape[:-1] == teacher.shape[:-1]
        and teacher.shape[-1] > 0
        and student.shape[-1] % teacher.shape[-1] == 0,
        f"student_features {student.shape} must have a multiple of the channels (the last axis) of "
        f"teacher_features {teacher.shape}, and agree in the other axes; project the student's, "
        "call pool_to on the larger maps",
    )
    count = student.shape[-1] // teacher.shape[-1]
    segments = student.reshape(*teacher.shape[:-1], count, teacher.shape[-1])
    differences = segments - jnp.broadcast_to(teacher[..., None, :], segments.shape)
    # The mean over all segments, times their number.
    means = jnp.mean(jnp.square(flatten_examples(differences)), axis=1)
    return count * means


def _check_batch(features: Array) -> None:
    check_shape(
        features.ndim >= 2,
        f"features must be [B, ..., C], one row per example, got {features.shape}",
    )
