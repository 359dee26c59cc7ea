"""The order of the axes and the scale of the pixels of images, which data and models check."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

UNIT_SCALE = "[0, 1]"
"""The scale of floating-point pixels that were divided by 255."""
BYTE_SCALE = "[0, 255]"
"""The scale of pixels that were not divided."""
MAX_SCANNED_IMAGES = 256
"""Number of images in which pixels of a kind are looked for."""


def check_channels_last(shape: Sequence[int]) -> None:
    """Raises an error if the axes of images seem to be in PyTorch's order.

    A network or a statistic would compute with rows as channels, without an error.

    Args:
        shape: The shape of images of rank 4.

    Raises:
        ValueError: If the second axis has the length of channels, and no other one does.
    """
    _, channels, height, width = shape
    # One or four rows alone do not tell: spectra and time series have them.
    is_likely = channels == 3 or (channels in (1, 4) and height == width)
    if is_likely and min(height, width) > 4:
        raise ValueError(
            f"images of shape {tuple(shape)} seem to be [N, C, H, W]: pass "
            "images.transpose(0, 2, 3, 1)"
        )


def find_pixel_scale(images: Any) -> str | None:
    """Returns the scale of the pixels of some images, or `None` if it is another or unknown.

    Args:
        images: Numbers `[N, ...]`.

    Returns:
        `UNIT_SCALE`, `BYTE_SCALE` or "[-1, 1]" for floating-point images, else `None`.
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        return None
    some = take_some(images)
    return _name_scale(float(some.min()), float(some.max()))


def _name_scale(smallest: float, largest: float) -> str | None:
    # Resizing may give pixels slightly below 0, and standardised ones are beyond -1 and 1.
    if -1 <= smallest < -0.5 and largest <= 1:
        return "[-1, 1]"
    if smallest < 0 or largest > 255:
        return None
    # Pictures may be dark, but none of many reaches 1/255 of the scale.
    return UNIT_SCALE if largest <= 1 else (BYTE_SCALE if largest > 32 else None)


def describe_wrong_scale(max_value: float | None, images: Any) -> str:
    """Describes a scale of pixels that is not that of a model; an empty string if there is none.

    Args:
        max_value: Largest value of a pixel that the model takes, or `None` if it is not known.
        images: What the model gets. Images of one colour tell nothing, such as an example of a
            shape.
    """
    if max_value is None or np.ndim(images) != 4 or not len(images):
        return ""
    # The dtype of bytes tells their scale.
    if images.dtype == np.uint8:
        return ""
    some = take_some(images)
    smallest, largest = float(some.min()), float(some.max())
    # Resizing and augmentation may give pixels slightly below 0.
    if smallest < -max_value / 4:
        return (
            f"images from {smallest:.3g} to {largest:.3g}, but its model takes pixels from 0 to "
            f"{max_value:g}: take back what was done to them, such as by (images + 1) / 2"
        )
    is_floating = jnp.issubdtype(images.dtype, jnp.floating)
    scale = _name_scale(smallest, largest) if is_floating else None
    is_wrong = (scale == UNIT_SCALE and max_value > 32) or (scale == BYTE_SCALE and max_value <= 1)
    if not is_wrong or smallest == largest:
        return ""
    right = "1.0" if scale == UNIT_SCALE else "255.0"
    return (
        f"images in {scale}, but its model takes pixels up to {max_value:g}: make the model "
        f"with max_value={right}, or scale the images"
    )


def warn_of_lost_pixels(owner: str, images: Any) -> None:
    """Warns if no pixel of uint8 images is above 1, as after a division by 255.

    Args:
        owner: What the images are, for the message.
        images: Numbers `[N, ...]`.
    """
    if np.ndim(images) != 4 or not len(images) or images.dtype != np.uint8:
        return
    # Images that are black throughout are examples of a shape.
    if take_some(images).max() == 1:
        warnings.warn(
            f"no pixel of {owner} is above 1, though they are uint8: if they were divided by 255, "
            "convert them to float32 before the division",
            stacklevel=3,
        )


def take_some(images: Any) -> np.ndarray:
    """Returns some images or other rows, spread over all of them; in float32, unless uint8."""
    some = np.asarray(images[:: max(1, len(images) // MAX_SCANNED_IMAGES)])
    return some if some.dtype == np.uint8 else some.astype(np.float32)
