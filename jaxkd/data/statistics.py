"""Mean and standard deviation of a dataset's channels, for normalising its images."""

from typing import Any

import numpy as np

from jaxkd._images import check_channels_last, warn_of_lost_pixels
from jaxkd.data.records import scannable

# np.bincount makes an int64 copy of its input: 4M values take 32 MB.
_VALUES_PER_CHUNK = 2**22


def channel_statistics(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Computes each channel's mean and standard deviation over all pixels, scaled to [0, 1].

    They are computed from a histogram of each channel's 256 values: exactly, and without a copy of
    the dataset. Of streamed images, they are those of a sample.

    Args:
        images: uint8 `[N, H, W, C]`, at least one, an array or a column of `data.Records`.

    Returns:
        Mean `[C]` and standard deviation `[C]` (of the population), float32. A constant channel has
        the deviation 1, so that dividing by it is safe.

    Raises:
        TypeError: If `images` is not uint8.
        ValueError: If `images` is not of rank 4, is empty, or has its channels before its height.

    Example:
        >>> import numpy as np
        >>> images = np.array([[0, 7], [255, 7]], np.uint8).reshape(2, 1, 1, 2)
        >>> mean, std = channel_statistics(images)
        >>> [round(float(value), 3) for value in mean], std.tolist()
        ([0.5, 0.027], [0.5, 1.0])
    """
    images = scannable(images)
    if not hasattr(images, "dtype"):
        raise TypeError(
            f"images are a {type(images).__name__}: make one array of them by np.stack(images)"
        )
    if images.dtype != np.uint8:
        raise TypeError(f"images are {images.dtype}, expected uint8: pass them as they were loaded")
    if images.ndim != 4 or images.size == 0:
        raise ValueError(
            f"images have shape {images.shape}, expected [N, H, W, C] with at least one pixel"
        )
    check_channels_last(images.shape)
    warn_of_lost_pixels("the images", images)
    counts = _histograms(images)
    values = np.arange(256) / 255
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ values
    variance = (weights * np.square(values[None, :] - mean[:, None])).sum(axis=1)
    # Not `variance == 0`: rounding leaves a constant channel with a variance just above zero.
    is_constant = (counts > 0).sum(axis=1) == 1
    std = np.where(is_constant, 1.0, np.sqrt(variance))
    return mean.astype(np.float32), std.astype(np.float32)


def _histograms(images: np.ndarray) -> np.ndarray:
    """Counts the values of each channel: int64 `[C, 256]`."""
    channels = images.shape[-1]
    # Images per chunk, from the number of values that an image has in a channel.
    chunk_size = max(1, _VALUES_PER_CHUNK * channels // images[0].size)
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), chunk_size):
        chunk = images[start : start + chunk_size]
        for channel in range(channels):
            counts[channel] += np.bincount(chunk[..., channel].ravel(), minlength=256)
    return counts
