"""Mixup and CutMix: augmentations that mix the examples of a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxkd._images import check_channels_last


class Mix(NamedTuple):
    """What each example of a batch was mixed with.

    Attributes:
        partner: `[B]`, int32. Index in the batch of the example that was mixed in.
        weight: `[B]`, float32 in [0, 1]. Share of the example itself.
    """

    partner: Array
    weight: Array


class Mixed(NamedTuple):
    """The result of an augmentation that mixes examples.

    Attributes:
        inputs: `[B, ...]`, the mixed examples.
        mix: What each was mixed with; the training step passes it to the loss as `context.mix`.
    """

    inputs: Array
    mix: Mix


def mixup(key: Array, images: Array, *, alpha: float = 1.0) -> Mixed:
    """Blends each image with another one of the batch.

    λ x + (1 − λ) x', λ ~ Beta(α, α), one for each image

    Args:
        key: A key.
        images: `[B, H, W, C]`, any dtype; integers are rounded.
        alpha: α, above 0. Small values leave most images nearly as they are.

    Returns:
        The images, in their dtype, and what each was mixed with.

    Raises:
        TypeError: If the images are no array.
        ValueError: If the images are not of rank 4, or `alpha` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import data
        >>> images = jnp.arange(4, dtype=jnp.float32)[:, None, None, None] * jnp.ones((4, 2, 2, 1))
        >>> mixed = data.mixup(jax.random.key(0), images)
        >>> w = mixed.mix.weight[:, None, None, None]
        >>> bool(jnp.allclose(mixed.inputs, w * images + (1 - w) * images[mixed.mix.partner]))
        True

    References:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, https://arxiv.org/abs/1710.09412
    """
    partner, weight = _draw(key, images, alpha)
    share = weight.reshape(-1, 1, 1, 1)
    pixels = images.astype(jnp.float32)
    return Mixed(
        _cast_as(images, share * pixels + (1 - share) * pixels[partner]), Mix(partner, weight)
    )


def cutmix(key: Array, images: Array, *, alpha: float = 1.0) -> Mixed:
    """Pastes a rectangle of another image of the batch into each image.

    The rectangle has the proportions of the image and covers 1 − λ of it, λ ~ Beta(α, α), but for
    what lies beyond the border. The weight is the share of pixels that remain.

    Args:
        key: A key.
        images: `[B, H, W, C]`, any dtype.
        alpha: α, above 0.

    Returns:
        The images, in their dtype, and what each was mixed with.

    Raises:
        TypeError: If the images are no array.
        ValueError: If the images are not of rank 4, or `alpha` is not positive.

    References:
        Yun et al., CutMix, https://arxiv.org/abs/1905.04899
    """
    partner, weight = _draw(jax.random.fold_in(key, 0), images, alpha)
    count, height, width = images.shape[:3]
    side = jnp.sqrt(1 - weight)
    centers = jax.random.uniform(jax.random.fold_in(key, 1), (count, 2))

    def inside(length: int, center: Array) -> Array:
        middle, half = center * length, side * length / 2
        pixels = jnp.arange(length, dtype=jnp.float32) + 0.5
        return jnp.abs(pixels[None] - middle[:, None]) < half[:, None]

    rows, columns = inside(height, centers[:, 0]), inside(width, centers[:, 1])
    is_pasted = rows[:, :, None] & columns[:, None, :]
    inputs = jnp.where(is_pasted[..., None], images[partner], images)
    return Mixed(inputs, Mix(partner, 1 - is_pasted.mean((1, 2), dtype=jnp.float32)))


def mix_labels(labels: Array, mix: Mix, num_classes: int) -> Array:
    """Returns the shares of the classes in mixed examples.

    Args:
        labels: `[B]`, integers from 0, of the examples before they were mixed.
        mix: From `mixup`, `cutmix` or `context.mix`.
        num_classes: C.

    Returns:
        float32 `[B, C]`, for `optax.softmax_cross_entropy`. A negative label has no share; one
        of C or more gives NaN.

    Raises:
        TypeError: If there is no mixture, such as in a stage that does not mix.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import data
        >>> mix = data.Mix(jnp.array([1, 0]), jnp.array([0.75, 1.0]))
        >>> data.mix_labels(jnp.array([0, 2]), mix, 3).tolist()
        [[0.75, 0.0, 0.25], [0.0, 0.0, 1.0]]
    """
    if not isinstance(mix, Mix):
        raise TypeError(
            f"mix must be a Mix, got a {type(mix).__name__}: context.mix is None unless the stage "
            "has an augment that mixes, such as data.mixup"
        )
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    # Such a row would be 0, as that of an example without a label.
    one_hot = jnp.where((labels < num_classes)[:, None], one_hot, jnp.nan)
    weight = mix.weight[:, None]
    return weight * one_hot + (1 - weight) * one_hot[mix.partner]


def _draw(key: Array, images: Array, alpha: float) -> tuple[Array, Array]:
    """Draws a partner and a weight for each image."""
    if not hasattr(images, "ndim"):
        raise TypeError(
            f"images must be an array [B, H, W, C], got a {type(images).__name__}: of a dict of "
            "inputs, mix each in an augment of your own"
        )
    if images.ndim != 4:
        raise ValueError(f"images have shape {images.shape}, expected [B, H, W, C]")
    check_channels_last(images.shape)
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}: it must be above 0; leave the augmentation out for 0")
    count = len(images)
    partner = jax.random.permutation(jax.random.fold_in(key, 0), count).astype(jnp.int32)
    weight = jax.random.beta(jax.random.fold_in(key, 1), alpha, alpha, (count,), jnp.float32)
    return partner, weight


def _cast_as(images: Array, pixels: Array) -> Any:
    if jnp.issubdtype(images.dtype, jnp.integer):
        pixels = jnp.round(pixels)
    return pixels.astype(images.dtype)
