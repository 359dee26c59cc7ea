"""Losses on maps B H W C: channel distributions, masked generation, class activation maps.

`pool_to` lets two spatial sizes meet; none of the losses resizes a map unasked.
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import (
    check_fraction,
    check_mask,
    check_positive,
    check_shape,
    flatten_examples,
    normalize,
    upcast_pair,
)
from jaxkd.losses._maps import (
    average_pool,
    check_image_pair,
    check_images,
    convolve,
    init_convolution,
)
from jaxkd.losses._softmax import divergence, softmax
from jaxkd.losses.features import hint_loss, init_projector, project

_FEATURE_NAMES = "student_features", "teacher_features"


def pool_to(features: ArrayLike, size: int | tuple[int, int]) -> Array:
    """Averages maps to a smaller spatial size, which need not divide their own.

    p_ij = mean of f over rows ⌊i H / h⌋ to ⌈(i + 1) H / h⌉ − 1 and columns ⌊j W / w⌋ to
    ⌈(j + 1) W / w⌉ − 1

    These are the windows of PyTorch's `adaptive_avg_pool2d`. They overlap where h does not divide H
    or w does not divide W.

    Args:
        features: `[B, H, W, C]`, floating-point.
        size: (h, w), or one integer for both.

    Returns:
        `[B, h, w, C]`, in float32 or wider.

    Raises:
        ValueError: If the features are not `[B, H, W, C]`, or the size is not from 1 to their own.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> rows = jnp.array([1.0, 2.0, 6.0])[None, :, None, None]
        >>> print(losses.pool_to(rows, (2, 1)).ravel())
        [1.5 4. ]
    """
    features = check_images("features", features)
    sizes = size if isinstance(size, tuple) else (size, size)
    check_shape(
        len(sizes) == 2 and all(isinstance(n, numbers.Integral) and n > 0 for n in sizes),
        f"size must be a positive integer or two of them, (height, width), got {size!r}",
    )
    check_shape(
        sizes[0] <= features.shape[1] and sizes[1] <= features.shape[2],
        f"pooling cannot enlarge maps {features.shape} to {sizes[0]} × {sizes[1]}: pool the maps "
        "of the other network to the size of these, or enlarge these with jax.image.resize",
    )
    return average_pool(average_pool(features, 1, sizes[0]), 2, sizes[1])


def channel_wise_divergence(
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Computes KL(teacher ‖ student) of each channel's distribution over positions (CWD).

    (T² / C) Σ_c KL(softmax_hw(t_hwc / T) ‖ softmax_hw(s_hwc / T))

    A channel says where something is, whatever its scale. The maps may be features, projected to
    the teacher's channels, or the logits of a segmentation, one channel per class. The default
    temperature is that of the authors' code and of MMRazor.

    Args:
        student_features: `[B, H, W, C]`, floating-point. Use `project` first where the channels
            differ.
        teacher_features: The same shape.
        temperature: T > 0, a scalar.
        where: Booleans `[B, H, W]`, True for positions that count, such as those that are not
            padding.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes differ, or the temperature is not a positive scalar.
        TypeError: If the features are not floating-point, or `where` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> teacher = jnp.log(jnp.array([[[[3.0, 1.0], [1.0, 1.0]]]]))
        >>> print(losses.channel_wise_divergence(0 * teacher, teacher))
        [0.0654]

    References:
        Shu et al., Channel-wise Knowledge Distillation for Dense Prediction,
        https://arxiv.org/abs/2011.13256
    """
    temperature = check_positive("temperature", temperature)
    student, teacher = _check_same_images(student_features, teacher_features)
    where = check_mask("position", where, student.shape[:3])
    batch, height, width, channels = student.shape
    where = where.reshape(batch, height * width, 1)
    student_softmax, teacher_softmax = (
        softmax(maps.reshape(batch, height * width, channels), 1, where, temperature)
        for maps in (student, teacher)
    )
    divergences = divergence(teacher_softmax, student_softmax, axis=1)
    return jnp.square(jnp.asarray(temperature, student.dtype)) * divergences.mean(1)


def init_masked_generation(
    key: Array, student_features: int, teacher_features: int
) -> dict[str, Any]:
    """Draws the parameters of `masked_generation_loss`.

    The kernels are LeCun normal (variance 1 / fan-in). PyTorch's default in the authors' code has
    a third of that variance.

    Args:
        key: A random key.
        student_features: S, the student's channels.
        teacher_features: T, the teacher's channels.

    Returns:
        `first` and `second`, the 3×3 convolutions of the generation block, each
        `{"kernel": [3, 3, T, T], "bias": [T]}` in float32; and, as in the authors' code only where
        S is not T, `projector` from `init_projector`.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_masked_generation(jax.random.key(0), 16, 32)
        >>> print(sorted(params), params["first"]["kernel"].shape)
        ['first', 'projector', 'second'] (3, 3, 32, 32)
    """
    first_key, second_key, projector_key = jax.random.split(key, 3)
    params: dict[str, Any] = {
        "first": init_convolution(first_key, teacher_features, teacher_features),
        "second": init_convolution(second_key, teacher_features, teacher_features),
    }
    if student_features != teacher_features:
        params["projector"] = init_projector(projector_key, student_features, teacher_features)
    return params


def masked_generation_loss(
    params: dict[str, Any],
    key: Array,
    student_features: ArrayLike,
    teacher_features: ArrayLike,
    *,
    masked_fraction: ArrayLike,
) -> Array:
    """Computes the squared error of teacher maps generated from masked student maps (MGD).

    Σ_hwc (t − G(m · (s W + b)))², where m is 0 at random positions and 1 elsewhere, and G is a 3×3
    convolution, ReLU and a 3×3 convolution

    The sum over all units, rather than their mean, is that of paper and code, whose weights of the
    loss are therefore small: 2·10⁻⁵ to 7·10⁻⁵. A position is masked in all channels, as in the
    paper and in the authors' code for segmentation; their code for classification masks a fraction
    of 0.15 of the channels at all positions instead.

    Args:
        params: From `init_masked_generation`; they are trained with the student.
        key: A random key, a new one at each step.
        student_features: `[B, H, W, S]`, floating-point.
        teacher_features: `[B, H, W, T]`.
        masked_fraction: Probability that a position is masked, in [0, 1]; 0.75 in the authors' code
            for segmentation.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the shapes do not fit each other or the parameters, or the fraction is not in
            [0, 1].
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_masked_generation(jax.random.key(0), 2, 3)
        >>> student, teacher = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 4, 4, 3))
        >>> key = jax.random.key(1)  # everything is masked, and the biases are 0
        >>> print(losses.masked_generation_loss(params, key, student, teacher, masked_fraction=1.0))
        [48.]

    References:
        Yang et al., Masked Generative Distillation, https://arxiv.org/abs/2205.01529
    """
    fraction = check_fraction("masked_fraction", masked_fraction)
    student, teacher = check_image_pair(_FEATURE_NAMES, student_features, teacher_features)
    if "projector" in params:
        student = project(params["projector"], student)
    channels = params["first"]["kernel"].shape[-1]
    check_shape(
        student.shape[-1] == teacher.shape[-1] == channels,
        f"the parameters generate {channels} channels of a teacher, got {teacher.shape} from a "
        f"student of {jnp.shape(student_features)}; call init_masked_generation with the channels "
        "of both",
    )
    fraction = jnp.asarray(fraction, student.dtype)
    keep = jax.random.uniform(key, (*student.shape[:3], 1), student.dtype) >= fraction
    # 0 times the fraction, so that a traced fraction that is not in [0, 1], NaN, gives NaN.
    student = jnp.where(keep, student, 0 * fraction)
    generated = convolve(params["second"], jax.nn.relu(convolve(params["first"], student)))
    generated, teacher = upcast_pair(_FEATURE_NAMES, generated, teacher)
    return jnp.sum(jnp.square(flatten_examples(teacher - generated)), axis=1)


def class_activation_maps(features: ArrayLike, kernel: ArrayLike) -> Array:
    """Computes class activation maps: the last features times the weights of the classifier.

    a_hwk = Σ_c f_hwc W_ck

    Their mean over positions is the logits without the bias, if the network averages its last
    features over positions before the classifier.

    Args:
        features: `[B, H, W, C]`, floating-point: the last ones before that average. For
            `class_attention_loss`, call `pool_to` first: it gives the same maps at less cost.
        kernel: `[C, K]`, the kernel of the classifier.

    Returns:
        Maps `[B, H, W, K]`, in float32 or wider.

    Raises:
        ValueError: If the shapes do not fit.
        TypeError: If an argument is not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> features, kernel = jnp.array([[[[1.0, 2.0]]]]), jnp.array([[1.0, 0.0], [1.0, -1.0]])
        >>> print(losses.class_activation_maps(features, kernel).ravel())
        [ 3. -2.]

    References:
        Zhou et al., Learning Deep Features for Discriminative Localization,
        https://arxiv.org/abs/1512.04150
    """
    features = check_images("features", features)
    features, kernel = upcast_pair(("features", "kernel"), features, kernel)
    check_shape(
        kernel.ndim == 2 and features.shape[-1] == kernel.shape[0],
        f"kernel {kernel.shape} must be [C, classes] for the C channels of features "
        f"{features.shape}; transpose PyTorch's weight of a linear layer",
    )
    return features @ kernel


def class_attention_loss(
    student_maps: ArrayLike, teacher_maps: ArrayLike, *, size: int | tuple[int, int]
) -> Array:
    """Computes the mean squared difference of pooled, normalised class activation maps (CAT-KD).

    mean over h, w and k of (a / ‖a_k‖ − b / ‖b_k‖)², where a and b are the maps of student and
    teacher, averaged to `size`, and the norm of a class k is over positions

    A map of 0 stays 0. Some configurations of the authors' code leave out the norms; that is
    `hint_loss` of the maps of `pool_to`.

    Args:
        student_maps: `[B, H, W, K]`, floating-point, from `class_activation_maps`.
        teacher_maps: `[B, H', W', K]`; the spatial size may differ.
        size: (h, w) to which both maps are averaged, or one integer; in the authors' code 2 for
            CIFAR-100 and 4 for ImageNet.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the batches or classes differ, or the size is larger than the maps.
        TypeError: If the maps are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student, teacher = jnp.array([[[[3.0], [4.0]]]]), jnp.array([[[[0.0], [2.0]]]])
        >>> print(losses.class_attention_loss(student, teacher, size=(1, 2)))
        [0.2]

    References:
        Guo et al., Class Attention Transfer Based Knowledge Distillation,
        https://arxiv.org/abs/2304.12777
    """
    student = check_images("student_maps", student_maps)
    teacher = check_images("teacher_maps", teacher_maps)
    check_shape(
        student.shape[::3] == teacher.shape[::3],
        f"student_maps {student.shape} and teacher_maps {teacher.shape} must be of the same "
        "examples (first axis) and classes (last axis)",
    )
    student, teacher = (normalize(pool_to(maps, size), (1, 2)) for maps in (student, teacher))
    return hint_loss(student, teacher)


def _check_same_images(student: ArrayLike, teacher: ArrayLike) -> tuple[Array, Array]:
    student, teacher = check_image_pair(_FEATURE_NAMES, student, teacher)
    check_shape(
        student.shape == teacher.shape,
        f"student_features {student.shape} and teacher_features {teacher.shape} must have the same "
        "channels (the last axis); project the student's first",
    )
    return student, teacher
