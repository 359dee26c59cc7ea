"""Knowledge review (ReviewKD): each stage of the teacher is learnt by all deeper student stages.

From the deepest stage to the first, a fusion block (ABF) merges the features of a student stage
with what the deeper ones left, by a learned attention map for each of the two. Its output is
compared with the teacher's stage at several spatial sizes (HCL). In a stage of a plan:

    def loss(student, teachers, batch, context):
        names = ("stage1", "stage2", "stage3")
        student_features = [student.features[name] for name in names]
        teacher_features = [teachers[0].features[name] for name in names]
        return losses.review_loss(context.params, student_features, teacher_features)

    def init_loss(key):
        return losses.init_review(key, (16, 32, 64), (64, 128, 256), 64)

    distill.Stage("student", ..., loss=loss, init_loss=init_loss, teachers=("teacher",))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import check_shape, widest_dtype
from jaxkd.losses._maps import average_pool, check_images, convolve, init_convolution
from jaxkd.losses.features import hint_loss

VARIANCE_FLOOR = 1e-5
"""Added to the variance of a channel in the fusion blocks, as in PyTorch's batch normalisation."""

LEVELS = (4, 2, 1)
"""Sizes to which `hierarchical_context_loss` averages maps, as in the authors' code."""


def init_review(
    key: Array,
    student_features: Sequence[int],
    teacher_features: Sequence[int],
    middle_features: int,
) -> list[dict[str, Any]]:
    """Draws the parameters of `review_loss`, one fusion block per stage.

    Args:
        key: A random key.
        student_features: Channels of each student stage, from the first to the deepest.
        teacher_features: Channels of each teacher stage.
        middle_features: M, the channels of the fusion; in the authors' code the student's last, but
            at most 512.

    Returns:
        One dictionary per stage: `input` and `output`, convolutions 1×1 to M channels and 3×3 to
        the teacher's, each with the `scale` and `shift` of a batch normalisation; and `attention`,
        a 1×1 convolution from 2 M channels to 2, which the deepest stage has not. float32.

    Raises:
        ValueError: If there is no stage, or not as many of the teacher.

    Example:
        >>> import jax
        >>> from jaxkd import losses
        >>> params = losses.init_review(jax.random.key(0), (8, 16), (32, 64), 16)
        >>> print(sorted(params[0]), sorted(params[1]))
        ['attention', 'input', 'output'] ['input', 'output']
        >>> print(params[0]["output"]["kernel"].shape)
        (3, 3, 16, 32)
    """
    check_shape(
        0 < len(student_features) == len(teacher_features),
        "student and teacher need the same number of stages, at least one, "
        f"got channels {student_features} and {teacher_features}",
    )
    blocks = []
    stages = len(student_features)
    for stage, subkey in enumerate(jax.random.split(key, stages)):
        input_key, output_key, attention_key = jax.random.split(subkey, 3)
        block = {
            "input": _init_normalized_convolution(
                input_key, student_features[stage], middle_features, 1
            ),
            "output": _init_normalized_convolution(
                output_key, middle_features, teacher_features[stage], 3
            ),
        }
        if stage < stages - 1:
            block["attention"] = init_convolution(attention_key, 2 * middle_features, 2, size=1)
        blocks.append(block)
    return blocks


def review_features(
    params: Sequence[Mapping[str, Any]],
    student_features: Sequence[ArrayLike],
    sizes: Sequence[Sequence[int]],
) -> list[Array]:
    """Computes student features for the teacher's stages, fused from deep to shallow (ABF).

    y_i = BN(conv₃ₓ₃(u_i)), u_i = resize(a · x_i + b · resize(u_{i+1})), x_i = BN(conv₁ₓ₁(s_i)),
    (a, b) = sigmoid(conv₁ₓ₁([x_i, resize(u_{i+1})])), two attention maps, and u_i = resize(x_i) in
    the deepest stage

    The batch normalisation uses the mean and variance over the batch, as PyTorch's does in
    training, so that the features of an example depend on the others. There are no running
    statistics: the blocks are dropped after the training. Sizes change by the nearest position, as
    PyTorch's `interpolate` rounds it.

    Args:
        params: From `init_review`.
        student_features: Maps `[B, H, W, C]` of each stage, floating-point, from the first to the
            deepest. The authors' last stage is the pooled features, `pooled[:, None, None]`.
        sizes: (height, width) of the teacher's maps of each stage.

    Returns:
        Maps `[B, height, width, T]` of each stage, in float32 or wider.

    Raises:
        ValueError: If the features do not fit the parameters or each other.
        TypeError: If a feature is not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_review(jax.random.key(0), (8, 16), (32, 64), 16)
        >>> student = [jnp.ones((2, 8, 8, 8)), jnp.ones((2, 4, 4, 16))]
        >>> reviewed = losses.review_features(params, student, [(8, 8), (2, 2)])
        >>> print([maps.shape for maps in reviewed])
        [(2, 8, 8, 32), (2, 2, 2, 64)]

    References:
        Chen et al., Distilling Knowledge via Knowledge Review, https://arxiv.org/abs/2104.09044
    """
    student = _check_stages("student", params, "input", -2, student_features)
    check_shape(
        len(sizes) == len(student) and all(np.shape(size) == (2,) for size in sizes),
        f"sizes must be (height, width) for each of {len(student)} stages, got {sizes}",
    )
    reviewed, residual = [], None
    for block, maps, size in reversed(list(zip(params, student, sizes, strict=True))):
        maps = _convolve_and_normalize(block["input"], maps)
        if residual is not None:
            maps = _fuse(block["attention"], maps, residual)
        residual = _resize_nearest(maps, size)
        reviewed.append(_convolve_and_normalize(block["output"], residual))
    return reviewed[::-1]


def hierarchical_context_loss(student_features: ArrayLike, teacher_features: ArrayLike) -> Array:
    """Computes the mean squared difference of maps at several spatial sizes (HCL).

    Σ_l w_l mean((s_l − t_l)²) / Σ_l w_l, where s_l and t_l are the maps at their own size, and
    averaged to 4 × 4, 2 × 2 and 1 × 1 if that is smaller, and w_l is 1, 1/2, 1/4, 1/8 in this order

    A size is smaller if it is less than both height and width; the authors' code, for square maps,
    looks at the height.

    Args:
        student_features: `[B, H, W, C]`, floating-point.
        teacher_features: The same shape.

    Returns:
        One value per example `[B]`, in float32 or wider.

    Raises:
        ValueError: If the features are not `[B, H, W, C]`, or their shapes differ.
        TypeError: If the features are not floating-point.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> student = jnp.array([[[[1.0], [-1.0]], [[1.0], [-1.0]]]])
        >>> print(losses.hierarchical_context_loss(student, 0 * student))  # (1 + 0 / 2) / (3 / 2)
        [0.667]

    References:
        Chen et al., Distilling Knowledge via Knowledge Review, https://arxiv.org/abs/2104.09044
    """
    student = check_images("student_features", student_features)
    teacher = check_images("teacher_features", teacher_features)
    # This one raises if the shapes differ.
    total, weight, weights = hint_loss(student, teacher), 1.0, 1.0
    for level in LEVELS:
        if level < min(student.shape[1:3]):
            weight /= 2
            pooled = (
                average_pool(average_pool(maps, 1, level), 2, level) for maps in (student, teacher)
            )
            total = total + weight * hint_loss(*pooled)
            weights += weight
    return total / weights


def review_loss(
    params: Sequence[Mapping[str, Any]],
    student_features: Sequence[ArrayLike],
    teacher_features: Sequence[ArrayLike],
) -> Array:
    """Computes the distances of reviewed student features to the teacher's stages (ReviewKD).

    Σ_i HCL(y_i, t_i) over the stages i, with y of `review_features` and HCL of
    `hierarchical_context_loss`

    mdistiller raises the weight of this loss linearly to its full value in the first 20 epochs, and
    compares with the teacher's features before the last ReLU of a stage.

    Args:
        params: From `init_review`; they are trained with the student.
        student_features: Maps `[B, H, W, C]` of each stage, floating-point, from the first to the
            deepest. The authors' last stage is the pooled features, `pooled[:, None, None]`.
        teacher_features: Maps `[B, H', W', T]` of each stage; the spatial sizes may differ.

    Returns:
        One value per example `[B]`, in float32 or wider. It depends on the whole batch.

    Raises:
        ValueError: If the features do not fit the parameters or each other.
        TypeError: If a feature is not floating-point.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import losses
        >>> params = losses.init_review(jax.random.key(0), (8, 16), (32, 64), 16)
        >>> student = [jnp.ones((2, 8, 8, 8)), jnp.ones((2, 4, 4, 16))]
        >>> teacher = [jnp.ones((2, 8, 8, 32)), jnp.ones((2, 4, 4, 64))]
        >>> print(losses.review_loss(params, student, teacher).shape)
        (2,)

    References:
        Chen et al., Distilling Knowledge via Knowledge Review, https://arxiv.org/abs/2104.09044
    """
    teacher = _check_stages("teacher", params, "output", -1, teacher_features)
    sizes = [maps.shape[1:3] for maps in teacher]
    reviewed = review_features(params, student_features, sizes)
    check_shape(
        len(reviewed[0]) == len(teacher[0]),
        f"student and teacher must have the same examples, got {len(reviewed[0])} and "
        f"{len(teacher[0])}",
    )
    total = jnp.zeros(len(teacher[0]), widest_dtype(*reviewed, *teacher))
    for student_maps, teacher_maps in zip(reviewed, teacher, strict=True):
        values = hierarchical_context_loss(student_maps, teacher_maps)
        total = total + values.astype(total.dtype)
    return total


def _check_stages(
    side: str,
    params: Sequence[Mapping[str, Any]],
    convolution: str,
    axis: int,
    features: Sequence[ArrayLike],
) -> list[Array]:
    """Returns the maps of all stages; raises if their channels are not those of the parameters."""
    check_shape(
        len(features) == len(params),
        f"the parameters are for {len(params)} stages, got {len(features)} of the {side}",
    )
    maps = [check_images(f"{side}_features[{i}]", stage) for i, stage in enumerate(features)]
    for i, (block, stage) in enumerate(zip(params, maps, strict=True)):
        channels = block[convolution]["kernel"].shape[axis]
        check_shape(
            stage.shape[-1] == channels and len(stage) == len(maps[0]),
            f"{side}_features[{i}] {stage.shape} must be {len(maps[0])} examples of {channels} "
            "channels, as the parameters and the other stages are",
        )
    return maps


def _init_normalized_convolution(
    key: Array, in_features: int, out_features: int, size: int
) -> dict[str, Array]:
    return init_convolution(key, in_features, out_features, size=size, bias=False) | {
        "scale": jnp.ones(out_features, jnp.float32),
        "shift": jnp.zeros(out_features, jnp.float32),
    }


def _convolve_and_normalize(params: Mapping[str, Array], maps: Array) -> Array:
    """Applies a convolution and a batch normalisation by the statistics of the batch."""
    maps = convolve({"kernel": params["kernel"]}, maps)
    mean = maps.mean((0, 1, 2), keepdims=True)
    variance = jnp.square(maps - mean).mean((0, 1, 2), keepdims=True)
    scale, shift = (
        params[name].astype(maps.dtype)[None, None, None] for name in ("scale", "shift")
    )
    return (maps - mean) * (scale / jnp.sqrt(variance + VARIANCE_FLOOR)) + shift


def _fuse(params: dict[str, Array], maps: Array, residual: Array) -> Array:
    """Adds the features of a stage and of the deeper ones, weighted by two attention maps."""
    residual = _resize_nearest(residual, maps.shape[1:3]).astype(maps.dtype)
    attention = jax.nn.sigmoid(convolve(params, jnp.concatenate([maps, residual], -1)))
    return maps * attention[..., :1] + residual * attention[..., 1:]


def _resize_nearest(maps: Array, size: Sequence[int]) -> Array:
    """Takes position ⌊i n / m⌋ of n for each i of m, along both spatial axes."""
    # `jax.image.resize` rounds to the position nearest to the centre instead.
    for axis in (1, 2):
        length, new_length = maps.shape[axis], size[axis - 1]
        if length != new_length:
            maps = jnp.take(maps, np.arange(new_length) * length // new_length, axis=axis)
    return maps
