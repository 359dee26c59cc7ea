"""Losses on features: hints, attention transfer, VID, neuron selectivity and FSP matrices.

Axis 0 is the batch and the last axis the channels; images are B H W C. Features narrower than 32
bits are widened first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_positive,
    check_shape,
    flatten_examples,
    normalize,
    safe_divide,
    safe_sqrt,
    upcast_pair,
)
from jaxkd.losses._maps import check_image_pair, check_images

VARIANCE_FLOOR = 1e-5
"""Smallest variance of `variational_information_loss`, as in its authors' code."""

_FEATURE_NAMES = "student_features", "teacher_features"


def init_projector(key: Array, student_features: int, teacher_features: int) -> dict[str, Array]:
    """Draws the parameters of `project`: a LeCun normal kernel (variance 1 / S) and a zero bias.

    Args:
        key: A random key.
        student_features: S, the student's channels.
        teacher_features: T, the teacher's channels.

    Returns:
        `{"kernel": [S, T], "bias": [T]}`, float32.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_projector(jax.random.key(0), 16, 32)
        >>> print(params["kernel"].shape, params["bias"].shape)
        (16, 32) (32,)
    """
    kernel = jax.nn.initializers.lecun_normal()(
        key, (student_features, teacher_features), jnp.float32
    )
    return {"kernel": kernel, "bias": jnp.zeros(teacher_features, jnp.float32)}


def project(params: dict[str, Array], features: ArrayLike) -> Array:
    """Maps the student's features to the number of channels of the teacher's.

    f W + b

    On images this is a 1×1 convolution.

    Args:
        params: From `init_projector`.
        features: `[..., S]`, floating-point.

    Returns:
        `[..., T]`, in float32 or wider.

    Raises:
        ValueError: If the features' last axis is not the kernel's first.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_projector(jax.random.key(0), 16, 32)
        >>> print(losses.project(params, jnp.ones((8, 4, 4, 16))).shape)
        (8, 4, 4, 32)

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, https://arxiv.org/abs/1412.6550
    """
    features, kernel = upcast_pair(("features", "kernel"), features, params["kernel"])
    check_shape(
        features.shape[-1:] == kernel.shape[:1],
        f"features {features.shape} must have {kernel.shape[0]} channels in their last axis, the "
        "size of params; call init_projector with the features' own size",
    )
    projected = features @ kernel
    # Broadcast by hand, for users who set `jax_numpy_rank_promotion` to "raise".
    return projected + jnp.broadcast_to(params["bias"].astype(projected.dtype), projected.shape)


def hint_loss(student_features: ArrayLike, teacher_features: ArrayLike) -> Array:
    """Computes the mean squared difference of the features (FitNets, feature mimicking).

    mean (s − t)² over all but the batch

    The paper takes half the sum instead of the mean.

    Args:
        student_features: `[B, ...]`, floating-point. Use `project` first where the channels differ.
        teacher_features: The same shape.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or there is no axis after the batch.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> print(losses.hint_loss(jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 4.0]])))
        [2.5]

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, https://arxiv.org/abs/1412.6550
    """
    student, teacher = upcast_pair(_FEATURE_NAMES, student_features, teacher_features)
    _check_batch(student)
    check_shape(
        student.shape == teacher.shape,
        f"student_features {student.shape} and teacher_features {teacher.shape} must have the same "
        "shape; project the student's first where the channels (the last axis) differ, pool_to "
        "on the larger where the spatial sizes differ",
    )
    return jnp.mean(jnp.square(flatten_examples(student - teacher)), axis=1)


def attention_transfer_map(features: ArrayLike, *, power: ArrayLike = 2) -> Array:
    """Computes attention maps: powers of activations, summed over channels and normalised.

    q / ‖q‖ with q_hw = Σ_c |a_hwc|^p

    A map that is 0 everywhere stays 0. Code that leaves out the absolute value (RepDistiller)
    agrees for even p only.

    Args:
        features: `[B, H, W, C]`, floating-point.
        power: p > 0, a scalar. A larger p puts more weight on the strongest activations.

    Returns:
        Maps `[B, H * W]` of length 1, in float32 or wider.

    Raises:
        ValueError: If the features are not `[B, H, W, C]` or the power is not a positive scalar.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> activations = jnp.array([[[[1.0, -1.0], [0.0, 2.0]]]])
        >>> print(losses.attention_transfer_map(activations))
        [[0.447 0.894]]

    References:
        Zagoruyko & Komodakis, Paying More Attention to Attention, https://arxiv.org/abs/1612.03928
    """
    power = check_positive("power", power)
    features = check_images("features", features)
    # The map does not depend on the scale. With a largest entry of 1 no power overflows, and not
    # all of them underflow.
    largest = jax.lax.stop_gradient(jnp.abs(features).max((1, 2, 3), keepdims=True))
    magnitudes = safe_divide(jnp.abs(features), largest)
    # For p < 1 the gradient of the power is infinite at 0.
    active = magnitudes > 0
    powers = jnp.where(active, magnitudes, 1) ** jnp.asarray(power, features.dtype)
    return normalize(flatten_examples(jnp.where(active, powers, 0).sum(-1)))


def attention_transfer_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, power: ArrayLike = 2
) -> Array:
    """Computes the distance between the attention maps of student and teacher, as in the paper.

    ‖q_s / ‖q_s‖ − q_t / ‖q_t‖‖ with q from `attention_transfer_map`

    It is at most √2, and 0 for maps of a single position. The paper weights it by β / 2 and sums it
    over pairs of layers. The norm is not squared here; the authors' code squares it, which is
    `attention_transfer_mse_loss`. Where the maps are equal, the gradient is 0.

    Args:
        student_features: `[B, H, W, C]`, floating-point.
        teacher_features: `[B, H, W, C']`; the number of channels may differ.
        power: p > 0, a scalar.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the batches or spatial sizes differ, or the power is not a positive scalar.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[[[1.0], [0.0]]]]), jnp.array([[[[0.0], [3.0]]]])
        >>> print(losses.attention_transfer_loss(student, teacher))
        [1.414]

    References:
        Zagoruyko & Komodakis, Paying More Attention to Attention, https://arxiv.org/abs/1612.03928
    """
    difference = _attention_difference(student_features, teacher_features, power)
    return safe_sqrt(jnp.sum(jnp.square(difference), axis=1))


def attention_transfer_mse_loss(
    student_features: ArrayLike, teacher_features: ArrayLike, *, power: ArrayLike = 2
) -> Array:
    """Computes the mean squared difference of the attention maps, as in the authors' code.

    mean over positions of (q_s / ‖q_s‖ − q_t / ‖q_t‖)² with q from `attention_transfer_map`

    It is the square of `attention_transfer_loss` divided by H W. The code averages over channels
    where the paper sums, which gives the same maps after normalisation.

    Args:
        student_features: `[B, H, W, C]`, floating-point.
        teacher_features: `[B, H, W, C']`; the number of channels may differ.
        power: p > 0, a scalar.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the batches or spatial sizes differ, or the power is not a positive scalar.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[[[1.0], [0.0]]]]), jnp.array([[[[0.0], [3.0]]]])
        >>> print(losses.attention_transfer_mse_loss(student, teacher))
        [1.0]

    References:
        Zagoruyko & Komodakis, Paying More Attention to Attention, https://arxiv.org/abs/1612.03928
    """
    difference = _attention_difference(student_features, teacher_features, power)
    return jnp.mean(jnp.square(difference), axis=1)


def init_variational_information(
    key: Array, student_features: int, teacher_features: int, *, variance: float = 5.0
) -> dict[str, Array]:
    """Draws the parameters of `variational_information_loss`: a projector and channel variances.

    Args:
        key: A random key.
        student_features: S, the student's channels.
        teacher_features: T, the teacher's channels.
        variance: The initial variance of every channel, more than `VARIANCE_FLOOR`; 5 in the
            authors' code.

    Returns:
        `{"kernel": [S, T], "bias": [T], "raw_variance": [T]}`, float32, with one variance for each
        of the teacher's channels: softplus(raw_variance) + `VARIANCE_FLOOR`.

    Raises:
        ValueError: If the variance is not a scalar above the floor.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_variational_information(jax.random.key(0), 16, 2)
        >>> print(jax.nn.softplus(params["raw_variance"]))
        [5. 5.]
    """
    check_positive("variance", variance)
    if not variance > VARIANCE_FLOOR:
        raise ValueError(f"variance must be more than the floor {VARIANCE_FLOOR}, got {variance}")
    excess = jnp.asarray(variance - VARIANCE_FLOOR, jnp.float32)
    # The inverse of softplus, log(expm1(x)), in a form that does not overflow for large x.
    raw_variance = excess + jnp.log(-jnp.expm1(-excess))
    projector = init_projector(key, student_features, teacher_features)
    return projector | {"raw_variance": jnp.full(teacher_features, raw_variance)}


def variational_information_loss(
    params: dict[str, Array], student_features: ArrayLike, teacher_features: ArrayLike
) -> Array:
    """Computes the variational bound on the information that student and teacher share (VID).

    mean over units of ½ ((t − μ(s))² / σ²_c + log σ²_c) with μ(s) = s W + b,
    σ²_c = softplus(raw_c) + 10⁻⁵

    It is the negative log-likelihood of the teacher's features under a Gaussian of learned mean and
    variance, without its constant ½ log 2π. It is negative where the variance is small, and never
    below ½ log 10⁻⁵ = −5.76. The paper sums over units, its code takes the mean. Its μ
    is a stack of 1×1 convolutions; here it is one, `project`.

    Args:
        params: From `init_variational_information`; they are trained with the student.
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
        >>> params = losses.init_variational_information(jax.random.key(0), 3, 2, variance=1.0)
        >>> student, teacher = jnp.zeros((1, 3)), jnp.array([[1.0, 3.0]])
        >>> print(losses.variational_information_loss(params, student, teacher))
        [2.5]

    References:
        Ahn et al., Variational Information Distillation for Knowledge Transfer,
        https://arxiv.org/abs/1904.05835
    """
    student, teacher = upcast_pair(_FEATURE_NAMES, student_features, teacher_features)
    _check_batch(student)
    # Once more, because the projection is in float64 if the parameters are.
    mean, teacher = upcast_pair(_FEATURE_NAMES, project(params, student), teacher)
    check_shape(
        mean.shape == teacher.shape,
        f"student_features {student.shape} project to {mean.shape}, but teacher_features are "
        f"{teacher.shape}; call init_variational_information with the teacher's number of channels "
        "where these differ, pool_to on the larger where the spatial sizes differ",
    )
    variance = jax.nn.softplus(params["raw_variance"].astype(mean.dtype)) + VARIANCE_FLOOR
    variance = jnp.broadcast_to(variance, mean.shape)
    values = jnp.square(teacher - mean) / variance + jnp.log(variance)
    return jnp.mean(flatten_examples(values), axis=1) / 2


def neuron_selectivity_loss(student_features: ArrayLike, teacher_features: ArrayLike) -> Array:
    """Computes the squared maximum mean discrepancy of the channels (neuron selectivity, NST).

    mean k(t, t') + mean k(s, s') − 2 mean k(s, t) with k(x, y) = (x·y)², over all pairs of channels

    A channel is represented by its activation map, scaled to length 1; a map of zeros stays 0. The
    value is in [0, 2] up to rounding, and the order of the channels does not matter. The kernel is
    the paper's polynomial kernel with d = 2 and c = 0; the paper weights the loss by λ / 2.

    Args:
        student_features: `[B, H, W, C]`, floating-point.
        teacher_features: `[B, H, W, C']`; the number of channels may differ.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the batches or spatial sizes differ.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.array([[[[1.0], [0.0]]]])
        >>> teacher = jnp.array([[[[0.0, 1.0], [3.0, 1.0]]]])
        >>> print(losses.neuron_selectivity_loss(student, teacher))
        [1.25]

    References:
        Huang & Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer,
        https://arxiv.org/abs/1707.01219
    """
    student, teacher = check_image_pair(_FEATURE_NAMES, student_features, teacher_features)
    student = normalize(student, (1, 2))
    teacher = normalize(teacher, (1, 2))

    def mean_kernel(first: Array, second: Array) -> Array:
        return jnp.mean(jnp.square(_channel_products(first, second)), axis=(1, 2))

    within = mean_kernel(teacher, teacher) + mean_kernel(student, student)
    return within - 2 * mean_kernel(student, teacher)


def flow_matrix(first: ArrayLike, second: ArrayLike) -> Array:
    """Computes the FSP matrix (flow of solution procedure) between the channels of two layers.

    G_ij = 1 / (H W) Σ_hw f_hwi g_hwj

    Args:
        first: `[B, H, W, C1]`, floating-point.
        second: `[B, H, W, C2]`; the paper max-pools the larger layer to the size of the smaller.

    Returns:
        Matrices `[B, C1, C2]`, in float32 or wider.

    Raises:
        ValueError: If the batches or spatial sizes differ.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> first = jnp.array([[[[1.0], [3.0]]]])
        >>> second = jnp.array([[[[2.0, 0.0], [0.0, 1.0]]]])
        >>> print(losses.flow_matrix(first, second))
        [[[1.  1.5]]]

    References:
        Yim et al., A Gift from Knowledge Distillation, https://doi.org/10.1109/CVPR.2017.754
    """
    return _flow_matrix(("first", "second"), first, second)


def flow_of_solution_procedure_loss(
    student_first: ArrayLike,
    student_second: ArrayLike,
    teacher_first: ArrayLike,
    teacher_second: ArrayLike,
) -> Array:
    """Computes the squared distance between the FSP matrices of student and teacher.

    Σ_ij (G^s_ij − G^t_ij)² with G from `flow_matrix`

    The paper sums it over pairs of layers with weights λ. RepDistiller takes the mean over i and j,
    which is C1 C2 times less, and average-pools where the paper max-pools.

    Args:
        student_first: `[B, H, W, C1]`, floating-point.
        student_second: `[B, H, W, C2]`.
        teacher_first: `[B, H', W', C1]`; the spatial size may differ from the student's.
        teacher_second: `[B, H', W', C2]`.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the two layers of a network differ in batch or spatial size, or the channels
            of student and teacher differ.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> ones = jnp.ones((1, 2, 2, 3))
        >>> print(losses.flow_of_solution_procedure_loss(ones, ones, 2 * ones, ones))
        [9.]

    References:
        Yim et al., A Gift from Knowledge Distillation, https://doi.org/10.1109/CVPR.2017.754
    """
    student = _flow_matrix(("student_first", "student_second"), student_first, student_second)
    teacher = _flow_matrix(("teacher_first", "teacher_second"), teacher_first, teacher_second)
    check_shape(
        student.shape == teacher.shape,
        f"the flow matrices of student {student.shape} and teacher {teacher.shape}, [B, C1, C2], "
        "must have the same shape; project the student's features first",
    )
    student, teacher = upcast_pair(("student", "teacher"), student, teacher)
    return jnp.sum(jnp.square(student - teacher), axis=(1, 2))


def _attention_difference(
    student_features: ArrayLike, teacher_features: ArrayLike, power: ArrayLike
) -> Array:
    student, teacher = check_image_pair(_FEATURE_NAMES, student_features, teacher_features)
    student_map = attention_transfer_map(student, power=power)
    return student_map - attention_transfer_map(teacher, power=power)


def _flow_matrix(names: tuple[str, str], first: ArrayLike, second: ArrayLike) -> Array:
    first, second = check_image_pair(names, first, second)
    return _channel_products(first, second) / (first.shape[1] * first.shape[2])


def _channel_products(first: Array, second: Array) -> Array:
    """Computes the inner products of the channels of two layers, `[B, C1, C2]`."""
    # The products are subtracted from each other: at the default precision of accelerators
    # (bfloat16 on TPU, TF32 on GPU) few correct digits would be left.
    return jnp.einsum("bhwi,bhwj->bij", first, second, precision=jax.lax.Precision.HIGHEST)


def _check_batch(features: Array) -> None:
    check_shape(
        features.ndim >= 2,
        f"features must be [B, ..., C], one row per example, got {features.shape}",
    )
