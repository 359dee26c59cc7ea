"""The order of the axes of images, which data and models check."""

from collections.abc import Sequence


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
