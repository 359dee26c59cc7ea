"""Random crops and flips of image batches.

Each example is augmented with its own key, folded from the batch's key and the example's position.
Its result therefore depends neither on the batch size nor on the other examples.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxkd._images import check_channels_last


def random_crop(key: Array, images: Array, *, padding: int = 4) -> Array:
    """Shifts each image by up to `padding` pixels along each axis and fills the border with zeros.

    The image is padded by `padding` zeros on every side and cropped back to its size at a uniformly
    drawn offset.

    Args:
        key: A key.
        images: `[B, H, W, C]`, any dtype.
        padding: Pixels, at least 0.

    Returns:
        `[B, H, W, C]`, dtype of `images`.

    Raises:
        ValueError: If `images` is not of rank 4 or has its channels before its height, or `padding`
            is negative or more than a side of the images.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.ones((2, 3, 3, 1), jnp.uint8)
        >>> random_crop(jax.random.key(0), images, padding=1)[..., 0].tolist()
        [[[1, 1, 0], [1, 1, 0], [1, 1, 0]], [[1, 1, 1], [1, 1, 1], [0, 0, 0]]]
    """
    check_axes(images)
    if padding < 0:
        raise ValueError(f"padding is {padding}: it cannot be negative")
    height, width = images.shape[1:3]
    if padding > min(height, width):
        raise ValueError(
            f"padding is {padding}, more than the {height} x {width} pixels of an image, which "
            "would leave nothing of some: make it smaller"
        )
    margins = ((padding, padding), (padding, padding), (0, 0))

    def crop(subkey: Array, image: Array) -> Array:
        top, left = jax.random.randint(subkey, (2,), 0, 2 * padding + 1)
        # dynamic_slice wants one dtype for all start indices; that of randint follows the x64 flag.
        start = (top, left, jnp.zeros_like(top))
        return jax.lax.dynamic_slice(jnp.pad(image, margins), start, image.shape)

    return jax.vmap(crop)(example_keys(key, images), images)


def random_flip(key: Array, images: Array) -> Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
        key: A key.
        images: `[B, H, W, C]`, any dtype.

    Returns:
        `[B, H, W, C]`, dtype of `images`.

    Raises:
        ValueError: If `images` is not of rank 4, or has its channels before its height.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.tile(jnp.arange(3.0)[None, None, :, None], (4, 1, 1, 1))
        >>> random_flip(jax.random.key(0), images)[:, 0, :, 0].tolist()
        [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]
    """
    check_axes(images)
    is_flipped = jax.vmap(jax.random.bernoulli)(example_keys(key, images))
    return jnp.where(is_flipped[:, None, None, None], images[:, :, ::-1], images)


def crop_and_flip(key: Array, images: Array, *, padding: int = 4) -> Array:
    """Crops and mirrors at random, as is usual for CIFAR: `random_flip(random_crop(images))`.

    Args:
        key: A key; the crop takes `fold_in(key, 0)`, the flip `fold_in(key, 1)`.
        images: `[B, H, W, C]`, any dtype.
        padding: Pixels, at least 0.

    Returns:
        `[B, H, W, C]`, dtype of `images`.

    Raises:
        ValueError: If `images` is not of rank 4 or has its channels before its height, or `padding`
            is negative or more than a side of the images.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = jnp.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(jnp.uint8)
        >>> augmented = jax.jit(crop_and_flip)(jax.random.key(0), images)
        >>> augmented.shape, augmented.dtype
        ((2, 32, 32, 3), dtype('uint8'))
    """
    cropped = random_crop(jax.random.fold_in(key, 0), images, padding=padding)
    return random_flip(jax.random.fold_in(key, 1), cropped)


def example_keys(key: Array, images: Array) -> Array:
    """Makes a key for each image of a batch from its position."""
    # Not jax.random.split: its keys would change with the batch size.
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(images)))


def check_axes(images: Array) -> None:
    """Raises `ValueError` unless images are `[B, H, W, C]`."""
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}, expected [B, H, W, C]: "
            "add a batch or a channel axis"
        )
    check_channels_last(images.shape)
