"""Plain convolutional networks, for a teacher, an assistant and a student of different sizes."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxkd.models.convolution import Conv
from jaxkd.models.layers import check_images
from jaxkd.models.model import Outputs


class CNN(nn.Module):
    """3×3 convolutions without padding, each with ReLU and 2×2 max-pooling, then two dense layers.

    `CNN(features=(32, 64), hidden=64)` is Conv 32 – pool – Conv 64 – pool – Dense 64 – Dense
    `num_classes`.

    Attributes:
        features: Output channels of each convolution.
        hidden: Width of the dense layer before the classifier.
        num_classes: Number of logits.
    """

    features: Sequence[int] = (32, 64)
    hidden: int = 64
    num_classes: int = 10

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Outputs:
        """Classifies images.

        Args:
            inputs: Floating-point images `[B, H, W, C]`.
            train: Accepted because every model has it. This one computes the same in both modes.

        Returns:
            Logits `[B, num_classes]`; features `stage1` … (after each pooling)
            `[B, h, w, features[i]]` and `pre_logits` `[B, hidden]`.

        Raises:
            ValueError: If the images are not `[B, H, W, C]`, are too small for the number of
                convolutions, or have other channels than the weights.
            TypeError: If the images are not floating-point.
        """
        del train
        check_images(inputs, self.get_variable("params", "conv1"), min_size=1)
        x = inputs
        features = {}
        for i, channels in enumerate(self.features, start=1):
            # A 3×3 convolution leaves 2×2 pixels of 4×4, which the pooling needs.
            if min(x.shape[1:3]) < 4:
                raise ValueError(
                    f"a {inputs.shape[1]}×{inputs.shape[2]} image is too small for "
                    f"{len(self.features)} convolutions: convolution {i} needs at least 4×4 and "
                    f"gets {x.shape[1]}×{x.shape[2]}; use fewer convolutions or larger images"
                )
            x = max_pool(nn.relu(Conv(channels, (3, 3), padding="VALID", name=f"conv{i}")(x)))
            features[f"stage{i}"] = x
        x = x.reshape(x.shape[0], -1)
        x = features["pre_logits"] = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        return Outputs(nn.Dense(self.num_classes, name="logits")(x), features)


@jax.custom_vjp
def max_pool(x: Array) -> Array:
    """Applies 2×2 max-pooling with stride 2; an odd last row or column is dropped.

    Equal in value to `flax.linen.max_pool(x, (2, 2), strides=(2, 2))`. The gradient goes to the
    first maximum of each window, whose position is saved. On a CPU this takes a small part of the
    time of XLA's select-and-scatter, and it compiles where a GPU must be deterministic. As a custom
    gradient, it has no forward-mode derivative.

    Args:
        x: `[B, H, W, C]`.

    Returns:
        `[B, H // 2, W // 2, C]`.
    """
    return _split_windows(x).max(axis=(2, 4))


def _split_windows(x: Array) -> Array:
    """Reshapes `[B, H, W, C]` to windows `[B, H // 2, 2, W // 2, 2, C]`."""
    batch, height, width, channels = x.shape
    return x[:, : height // 2 * 2, : width // 2 * 2].reshape(
        batch, height // 2, 2, width // 2, 2, channels
    )


def _max_pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    windows = _split_windows(x)
    corners = [windows[:, :, row, :, column] for row in (0, 1) for column in (0, 1)]
    pooled = windows.max(axis=(2, 4))
    # From the last corner to the first, so that the first of equal maxima has the final say.
    position = jnp.full(pooled.shape, 3, jnp.uint8)
    for corner in (2, 1, 0):
        position = jnp.where(corners[corner] == pooled, jnp.uint8(corner), position)
    # Residuals must be arrays: an empty one carries the shape and dtype of x.
    return pooled, (position, jnp.zeros((0, *x.shape[1:]), x.dtype))


def _max_pool_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
    position, empty = residuals
    _, height, width, channels = empty.shape
    corner = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    spread = jnp.where(position[:, :, None, :, None] == corner, cotangent[:, :, None, :, None], 0)
    spread = spread.reshape(cotangent.shape[0], height // 2 * 2, width // 2 * 2, channels)
    return (jnp.pad(spread, ((0, 0), (0, height % 2), (0, width % 2), (0, 0))),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
