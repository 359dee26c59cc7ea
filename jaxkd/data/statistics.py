"""Mean and standard deviation of a set's channels, for normalising its images."""

import numpy as np

# np.bincount makes an int64 copy of what it counts: 4M values are 32 MB.
_CHUNK = 2**22


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all pixels of all images, scaled to [0, 1].

    Computed from a histogram of each channel's 256 values: exact, and without a copy of the set.

    Args:
        images: uint8 `[N, H, W, C]`, at least one.

    Returns:
        Mean `[C]` and standard deviation `[C]` (of the population), float32. A constant channel has the deviation 1,
        so that normalising by it is harmless.

    Raises:
        TypeError: If `images` is not uint8.
        ValueError: If `images` is not of rank 4 or is empty.

    Example:
        >>> import numpy as np
        >>> images = np.array([[0, 7], [255, 7]], np.uint8).reshape(2, 1, 1, 2)
        >>> mean, std = channel_statistics(images)
        >>> [round(float(value), 3) for value in mean], std.tolist()
        ([0.5, 0.027], [0.5, 1.0])
    """
    if images.dtype != np.uint8:
        raise TypeError(f"images are {images.dtype}, expected uint8: pass them as they were loaded")
    if images.ndim != 4 or images.size == 0:
        raise ValueError(f"images have shape {images.shape}, expected [N, H, W, C] with at least one pixel")
    counts = _histograms(images)
    values = np.arange(256) / 255
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ values
    variance = (weights * np.square(values[None, :] - mean[:, None])).sum(axis=1)
    # Asked of the counts, since rounding leaves a constant channel with a variance just above zero.
    constant = (counts > 0).sum(axis=1) == 1
    return mean.astype(np.float32), np.where(constant, 1.0, np.sqrt(variance)).astype(np.float32)


def _histograms(images: np.ndarray) -> np.ndarray:
    """Counts each value of each channel: int64 `[C, 256]`."""
    channels = images.shape[-1]
    step = max(1, _CHUNK * channels // images[0].size)
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), step):
        for channel in range(channels):
            counts[channel] += np.bincount(images[start : start + step, ..., channel].ravel(), minlength=256)
    return counts
