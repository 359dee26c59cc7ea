"""Orthogonal projections of the student's features and normalised teacher features (VkD).

A projection without constraints can absorb what the student should learn. One with orthonormal rows
keeps all distances between the student's features. The teacher's features are standardised for
tasks of discrimination, and whitened for tasks of generation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_shape,
    flatten_examples,
    safe_reciprocal,
    upcast,
    upcast_pair,
)
from jaxkd.losses.logits import standardize_logits

WHITENING_FLOOR = 1e-5
"""Added to each variance in `whiten_features`, as a fraction of the mean variance."""


def init_orthogonal_projector(
    key: Array, student_features: int, teacher_features: int
) -> dict[str, Array]:
    """Draws the parameter of `project_orthogonally`, a normal matrix that is made orthogonal there.

    Args:
        key: A random key.
        student_features: S, the student's channels.
        teacher_features: T, the teacher's channels.

    Returns:
        `{"raw_kernel": [S, T]}`, float32. Its scale does not matter.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_orthogonal_projector(jax.random.key(0), 16, 32)
        >>> print(params["raw_kernel"].shape)
        (16, 32)
    """
    return {"raw_kernel": jax.random.normal(key, (student_features, teacher_features))}


def project_orthogonally(params: dict[str, Array], features: ArrayLike) -> Array:
    """Maps features to the teacher's channels by a matrix with orthonormal rows or columns (VkD).

    f P with P Pᵀ = I if S ≤ T, else Pᵀ P = I, where P or Pᵀ is the Q of the QR decomposition
    Q R of the raw kernel or its transpose, with a positive diagonal of R

    If S ≤ T, lengths and angles of the features stay as they are. Every step of any optimizer on
    the raw kernel gives another such P. The paper takes a part of the matrix exponential of a
    skew-symmetric matrix of size max(S, T), which reaches the same matrices if S is not T, and
    rotations only if S = T; QR costs less where S and T differ. The authors' code uses PyTorch's
    parametrisation `orthogonal`.

    Args:
        params: From `init_orthogonal_projector`; they are trained with the student.
        features: `[..., S]`, floating-point.

    Returns:
        `[..., T]`, in float32 or wider.

    Raises:
        ValueError: If the features' last axis is not the kernel's first.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_orthogonal_projector(jax.random.key(0), 2, 5)
        >>> projected = losses.project_orthogonally(params, jnp.array([[3.0, 4.0]]))
        >>> print(projected.shape, jnp.linalg.norm(projected))
        (1, 5) 5.0

    References:
        Miles et al., VkD: Improving Knowledge Distillation using Orthogonal Projections,
        https://arxiv.org/abs/2403.06213
    """
    features, kernel = upcast_pair(("features", "raw_kernel"), features, params["raw_kernel"])
    check_shape(
        features.shape[-1:] == kernel.shape[:1],
        f"features {features.shape} must have {kernel.shape[0]} channels in their last axis, the "
        "size of params; call init_orthogonal_projector with the features' own size",
    )
    # Full precision, since the lengths are to be kept: TF32 and bfloat16 have three or two digits.
    return jnp.matmul(features, _orthonormalize(kernel), precision="highest")


def orthogonal_projection_loss(
    params: dict[str, Array], student_features: ArrayLike, teacher_features: ArrayLike
) -> Array:
    """Computes the Huber loss of projected student and standardised teacher features (VkD).

    mean huber(s P − (t − mean(t)) / std(t)) over all but the batch, with P of
    `project_orthogonally`, and mean and standard deviation over the channels

    huber(d) is d² / 2 up to 1 and grows linearly beyond. The authors' code averages the features
    over tokens or positions first, and adds 10⁻⁵ to the variance. For tasks of generation the paper
    whitens the teacher's features instead:
    `hint_loss(project_orthogonally(params, student), whiten_features(teacher))`.

    Args:
        params: From `init_orthogonal_projector`; they are trained with the student.
        student_features: `[B, ..., S]`, floating-point.
        teacher_features: `[B, ..., T]`, of the same shape except for the channels.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes do not fit each other or the parameters.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_orthogonal_projector(jax.random.key(0), 2, 4)
        >>> student, teacher = jnp.zeros((1, 2)), jnp.array([[1.0, 3.0, 1.0, 3.0]])
        >>> print(losses.orthogonal_projection_loss(params, student, teacher))
        [0.5]

    References:
        Miles et al., VkD: Improving Knowledge Distillation using Orthogonal Projections,
        https://arxiv.org/abs/2403.06213
    """
    student, teacher = upcast_pair(
        ("student_features", "teacher_features"), student_features, teacher_features
    )
    check_shape(
        student.ndim >= 2, f"features must be [B, ..., C], one row per example, got {student.shape}"
    )
    projected, teacher = upcast_pair(
        ("student_features", "teacher_features"), project_orthogonally(params, student), teacher
    )
    check_shape(
        projected.shape == teacher.shape,
        f"student_features {student.shape} project to {projected.shape}, but teacher_features are "
        f"{teacher.shape}; call init_orthogonal_projector with the teacher's number of channels "
        "where these differ, pool_to on the larger where the spatial sizes differ",
    )
    losses = optax.huber_loss(projected, standardize_logits(teacher))
    return jnp.mean(flatten_examples(losses), axis=1)


def whiten_features(features: ArrayLike) -> Array:
    """Shifts and maps features to mean 0 and the identity as their covariance over the batch.

    (t − μ) L⁻ᵀ with L Lᵀ = C + ε I, where μ and C are the mean and the covariance over the batch
    and all positions, and ε is 10⁻⁵ times the mean variance

    Other whitenings differ from this one by a rotation, which a projection with orthonormal rows
    can follow. With fewer vectors than channels the covariance is singular: the features are then
    whitened in the subspace that they span. The released code of VkD contains no whitening.

    Args:
        features: `[B, ..., D]`, floating-point, of the teacher.

    Returns:
        The features' shape, in float32 or wider. It depends on the whole batch.

    Raises:
        ValueError: If the features have no axis but the channels.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> features = jnp.array([[9.0, 5.0], [9.0, 3.0], [-9.0, 5.0], [-9.0, 3.0]])
        >>> print(losses.whiten_features(features)[0].round(2))
        [1. 1.]

    References:
        Miles et al., VkD: Improving Knowledge Distillation using Orthogonal Projections,
        https://arxiv.org/abs/2403.06213
    """
    features = upcast("features", features)
    check_shape(
        features.ndim >= 2 and features.shape[-1] > 0,
        f"features must be [B, ..., D] with D > 0, got {features.shape}",
    )
    # Whitening removes the scale. Without it the squares neither overflow nor underflow.
    features = features * safe_reciprocal(jax.lax.stop_gradient(jnp.abs(features).max(initial=0)))
    channels = features.shape[-1]
    vectors = features.reshape(features.size // channels, channels)
    count = max(len(vectors), 1)
    centred = vectors - jnp.broadcast_to(vectors.sum(0) / count, vectors.shape)
    covariance = jnp.matmul(centred.T, centred, precision="highest") / count
    variance = jnp.trace(covariance) / channels
    # Without any variance the features are 0, and so is what is returned.
    floor = jnp.where(variance > 0, WHITENING_FLOOR * variance, 1)
    factor = jnp.linalg.cholesky(covariance + floor * jnp.eye(channels, dtype=features.dtype))
    whitened = jax.scipy.linalg.solve_triangular(factor, centred.T, lower=True).T
    return whitened.reshape(features.shape)


def _orthonormalize(kernel: Array) -> Array:
    """Returns the matrix with orthonormal rows or columns that QR finds in a kernel."""
    is_wide = kernel.shape[0] < kernel.shape[1]
    orthonormal, triangular = jnp.linalg.qr(kernel.T if is_wide else kernel)
    # LAPACK leaves the signs open; a fixed sign makes the result continuous in the kernel.
    signs = jnp.where(jnp.diagonal(triangular) < 0, -1, 1).astype(kernel.dtype)
    orthonormal = orthonormal * jnp.broadcast_to(signs, orthonormal.shape)
    return orthonormal.T if is_wide else orthonormal
