"""RandAugment with operations that compile into one pass over a batch.

Under `vmap`, a `lax.switch` computes all of its branches. So the operations on values are selected
element by element within one loop, and all moves of pixels share one gather.
"""

import enum
import math
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd._messages import shorten
from jaxkd.data.augment import check_axes, example_keys


class Operation(enum.Enum):
    """What `rand_augment` may do to an image, at a magnitude m = `magnitude` / 10.

    A ± is a sign that is drawn for each image. Pixels are moved to whole positions, and those that
    come from beyond the border are grey.

    Attributes:
        IDENTITY: Nothing.
        AUTOCONTRAST: Stretches the values of each channel to the whole range.
        BRIGHTNESS: Multiplies the values by 1 ± 0.9 m.
        CONTRAST: Multiplies the distances from the mean of the image by 1 ± 0.9 m.
        SOLARIZE: Inverts the values in the upper m of the range, as bytes those from 256 (1 − m).
        POSTERIZE: Keeps the upper 8 − round(4 m) of 8 bits, which floats are rounded to.
        ROTATE: Turns about the centre by ± 30 m degrees.
        SHEAR_X: Moves each row by ± 0.3 m times its distance from the centre.
        SHEAR_Y: Moves each column by ± 0.3 m times its distance from the centre.
        TRANSLATE_X: Moves the image by ± 150/331 m of its width.
        TRANSLATE_Y: Moves the image by ± 150/331 m of its height.
        CUTOUT: Covers a square with grey, 0.5 m times the shorter side wide, around any pixel.
    """

    IDENTITY = "identity"
    AUTOCONTRAST = "autocontrast"
    BRIGHTNESS = "brightness"
    CONTRAST = "contrast"
    SOLARIZE = "solarize"
    POSTERIZE = "posterize"
    ROTATE = "rotate"
    SHEAR_X = "shear_x"
    SHEAR_Y = "shear_y"
    TRANSLATE_X = "translate_x"
    TRANSLATE_Y = "translate_y"
    CUTOUT = "cutout"


MAX_MAGNITUDE = 10
"""The magnitude at which each operation is as strong as it may be in AutoAugment."""

# Positions are integers with this many bits behind the point: with floats, a compiled program could
# round otherwise than an interpreted one. An int32 holds sides of up to 2^15 pixels.
_FRACTION_BITS = 14
_VALUES = frozenset(
    {
        Operation.AUTOCONTRAST,
        Operation.BRIGHTNESS,
        Operation.CONTRAST,
        Operation.SOLARIZE,
        Operation.POSTERIZE,
    }
)
_GATHERED = frozenset(
    {
        Operation.ROTATE,
        Operation.SHEAR_X,
        Operation.SHEAR_Y,
        Operation.TRANSLATE_X,
        Operation.TRANSLATE_Y,
        Operation.CUTOUT,
    }
)


def rand_augment(
    key: Array,
    images: Array,
    *,
    num_ops: int = 2,
    magnitude: float = 9.0,
    max_value: float | None = None,
    operations: Sequence[Operation] = tuple(Operation),
) -> Array:
    """Applies operations to each image that are drawn uniformly, all with the same magnitude.

    This is RandAugment without equalize, colour and sharpness, and with cutout. As in the paper,
    the magnitude is fixed, and all operations are equally likely. Other than there, solarize and
    posterize become stronger with the magnitude, shears are about the centre of the image, and
    contrast keeps the mean of all channels, weighted alike.

    Args:
        key: A key.
        images: `[B, H, W, C]`, uint8, or floating-point with values in [0, `max_value`].
        num_ops: Number of operations that are applied to an image in turn, at least 1.
        magnitude: Strength, in [0, 10]. The paper has 4 or 5 for CIFAR-10 and 9 for a ResNet-50 on
            ImageNet.
        max_value: White. 255 for uint8; floating-point images need it, such as 1.0.
        operations: The operations to draw from. Leave out those that change a label, such as
            `Operation.ROTATE` where direction counts.

    Returns:
        `[B, H, W, C]`, dtype and range of `images`.

    Raises:
        TypeError: If `images` are neither uint8 nor floating-point.
        ValueError: If `images` is not of rank 4 or has its channels before its height, `num_ops` or
            `magnitude` is out of its range, there are no operations, or `max_value` is missing, not
            positive, or not 255 for uint8.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import data
        >>> images = jnp.arange(2 * 32 * 32 * 3).reshape(2, 32, 32, 3).astype(jnp.uint8)
        >>> augmented = jax.jit(data.rand_augment)(jax.random.key(0), images)
        >>> augmented.shape, augmented.dtype
        ((2, 32, 32, 3), dtype('uint8'))

    References:
        Cubuk et al., RandAugment: Practical automated data augmentation with a reduced search
        space, https://arxiv.org/abs/1909.13719
    """
    check_axes(images)
    white = _check_range(images, max_value)
    _check_settings(num_ops, magnitude, operations)
    strength = magnitude / MAX_MAGNITUDE
    num_choices = 2 * len(operations)

    def augment(example_key: Array, image: Array) -> Array:
        for step in range(num_ops):
            step_key = jax.random.fold_in(example_key, step)
            choice_key, center_key = (jax.random.fold_in(step_key, i) for i in range(2))
            choice = jax.random.randint(choice_key, (), 0, num_choices, jnp.int32)
            image = _change_values(image, choice, operations, strength, white)
            image = _move_pixels(center_key, image, choice, operations, strength, white)
        return image

    return jax.vmap(augment)(example_keys(key, images), images)


def _is_among(some: Collection[Operation], choice: Array, operations: Sequence[Operation]) -> Array:
    """True if the operation that was drawn is one of some. A choice holds its sign, too."""
    return jnp.asarray([operation in some for operation in operations])[choice // 2]


def _change_values(
    image: Array, choice: Array, operations: Sequence[Operation], strength: float, white: float
) -> Array:
    """Applies the chosen operation if it is one of values, else returns the image itself."""
    if _VALUES.isdisjoint(operations):
        return image
    pixels = image.astype(jnp.float32) if image.dtype.itemsize < 4 else image
    changed = _stretch(image, pixels, choice, operations, strength, white)
    others = {Operation.SOLARIZE: _solarize, Operation.POSTERIZE: _posterize}
    for operation, change in others.items():
        if operation in operations:
            is_chosen = _is_among({operation}, choice, operations)
            changed = jnp.where(is_chosen, change(pixels, strength, white), changed)
    # The image itself for all other operations: floats may be outside of the range.
    is_changed = _is_among(_VALUES, choice, operations)
    return jnp.where(is_changed, _cast_as(image, changed), image)


def _stretch(
    image: Array,
    pixels: Array,
    choice: Array,
    operations: Sequence[Operation],
    strength: float,
    white: float,
) -> Array:
    """Applies autocontrast, brightness or contrast: factor · (pixels − dark) + shift."""
    sign = jnp.where(choice % 2 == 0, 1, -1).astype(pixels.dtype)
    factor = jnp.broadcast_to(1 + sign * (0.9 * strength), pixels.shape[-1:])
    dark = shift = jnp.zeros_like(factor)
    if Operation.CONTRAST in operations:
        # A whole level, as in Pillow: the last bits of a mean depend on the order of the sum.
        # Behind the barrier, XLA on a CPU converts bytes within the sum and stores no floats.
        summed = jax.lax.optimization_barrier(image).astype(pixels.dtype)
        level = jnp.round(_reduce(jnp.mean, summed).mean() * (255 / white))
        mean = level * (white / 255)
        is_chosen = _is_among({Operation.CONTRAST}, choice, operations)
        dark = shift = jnp.where(is_chosen, mean, dark)
    if Operation.AUTOCONTRAST in operations:
        # Of the image in its own dtype: bytes are compared four times as fast as floats.
        low, high = (_reduce(fn, image).astype(pixels.dtype) for fn in (jnp.min, jnp.max))
        # A channel of one value stays as it is.
        is_chosen = _is_among({Operation.AUTOCONTRAST}, choice, operations)
        is_flat = high == low
        stretching = jnp.where(is_flat, 1, white / jnp.where(is_flat, 1, high - low))
        factor = jnp.where(is_chosen, stretching, factor)
        dark = jnp.where(is_chosen, jnp.where(is_flat, 0, low), dark)
    factor, dark, shift = (_as_row(number, pixels.shape[1]) for number in (factor, dark, shift))
    # The inner clip changes no result. It keeps a compiler from fusing product and sum, which would
    # be rounded once in compiled programs and twice elsewhere.
    rows = pixels.reshape(len(pixels), -1)
    scaled = jnp.clip(factor * (rows - dark), -white, white)
    return jnp.clip(scaled + shift, 0, white).reshape(pixels.shape)


def _as_row(channels: Array, width: int) -> Array:
    """Repeats numbers `[C]` for the pixels of a row, `[1, W C]`."""
    row = jnp.broadcast_to(channels[None], (width, *channels.shape)).reshape(1, -1)
    # Stored, since computing the channel of each value would take a CPU as long as all the rest.
    return jax.lax.optimization_barrier(row)


def _reduce(reduce: Callable[..., Array], image: Array) -> Array:
    """Reduces `[H, W, C]` to `[C]`."""
    # XLA would merge the two steps, and then take seven times as long on a CPU.
    return reduce(jax.lax.optimization_barrier(reduce(image, axis=0)), axis=0)


def _solarize(pixels: Array, strength: float, white: float) -> Array:
    # Half a level below the threshold of bytes, so that floats of whole levels are on either side.
    threshold = (math.ceil(256 * (1 - strength)) - 0.5) * (white / 255)
    return jnp.where(pixels > threshold, white - pixels, pixels)


def _posterize(pixels: Array, strength: float, white: float) -> Array:
    step = 2 ** round(4 * strength)
    if step == 1:
        return pixels
    levels = jnp.round(pixels * (255 / white))
    return jnp.floor(levels / step) * step * (white / 255)


def _move_pixels(
    key: Array,
    image: Array,
    choice: Array,
    operations: Sequence[Operation],
    strength: float,
    white: float,
) -> Array:
    """Applies the chosen operation if it moves pixels, by the nearest pixel of each position."""
    if _GATHERED.isdisjoint(operations):
        return image
    height, width, channels = image.shape
    moves = [_inverse_move(operation, strength, height, width) for operation in operations]
    # Of each operation with both signs, as `choice` numbers them: [2 N, 2, 3].
    table = np.stack([signed for move in moves for signed in move])
    (from_y, from_x) = jnp.asarray(table)[choice]
    # Twice the distances from the centre, which are whole numbers.
    y = (2 * jnp.arange(height, dtype=jnp.int32) - (height - 1))[:, None]
    x = (2 * jnp.arange(width, dtype=jnp.int32) - (width - 1))[None]

    def source(row: Array, length: int) -> Array:
        position = row[0] * y + row[1] * x + row[2] + (length << _FRACTION_BITS)
        return position >> (_FRACTION_BITS + 1)

    source_y, source_x = source(from_y, height), source(from_x, width)
    is_shown = (source_y >= 0) & (source_y < height) & (source_x >= 0) & (source_x < width)
    if Operation.CUTOUT in operations:
        is_chosen = _is_among({Operation.CUTOUT}, choice, operations)
        is_shown &= ~(is_chosen & _draw_square(key, height, width, strength))
    # One index beyond the image stands for grey.
    index = jnp.where(is_shown, source_y * width + source_x, height * width)
    # 128 for bytes, as in the authors' code.
    grey = 128 / 255 * white
    fill = 128 if image.dtype == jnp.uint8 else grey
    # Within the gather, a CPU would compute the values one by one.
    image, index = jax.lax.optimization_barrier((image, index))
    moved = image.reshape(-1, channels).at[index].get(mode="fill", fill_value=fill)
    # Stored, since otherwise each reduction of the next operation would gather again.
    return jax.lax.optimization_barrier(moved)


def _inverse_move(
    operation: Operation, strength: float, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions that pixels come from, for both signs of an operation.

    Args:
        operation: The operation; what moves nothing has the identity.
        strength: From 0 to 1.
        height: Of the image.
        width: Of the image.

    Returns:
        Two int32 `[2, 3]` of numbers with `_FRACTION_BITS` bits behind the point: y and x of the
        source are the products of a row and (y, x, 1), in twice the distances from the centre.
    """

    def of_sign(sign: int) -> np.ndarray:
        matrix = np.eye(2, 3)
        if operation is Operation.ROTATE:
            angle = sign * math.radians(30 * strength)
            cosine, sine = math.cos(angle), math.sin(angle)
            matrix[:, :2] = [[cosine, sine], [-sine, cosine]]
        elif operation is Operation.SHEAR_X:
            matrix[1, 0] = sign * 0.3 * strength
        elif operation is Operation.SHEAR_Y:
            matrix[0, 1] = sign * 0.3 * strength
        elif operation is Operation.TRANSLATE_X:
            matrix[1, 2] = 2 * sign * round(150 / 331 * strength * width)
        elif operation is Operation.TRANSLATE_Y:
            matrix[0, 2] = 2 * sign * round(150 / 331 * strength * height)
        return np.round(matrix * 2**_FRACTION_BITS).astype(np.int32)

    return of_sign(1), of_sign(-1)


def _draw_square(key: Array, height: int, width: int, strength: float) -> Array:
    """Returns booleans `[H, W]`, true in a square around a pixel; it may reach over the border."""
    size = round(0.5 * strength * min(height, width))

    def draw(index: int, length: int) -> Array:
        center = jax.random.randint(jax.random.fold_in(key, index), (), 0, length, jnp.int32)
        distance = jnp.arange(length, dtype=jnp.int32) - (center - size // 2)
        return (distance >= 0) & (distance < size)

    return draw(0, height)[:, None] & draw(1, width)[None]


def _cast_as(image: Array, pixels: Array) -> Array:
    """Rounds to the dtype of the image, to even where two numbers are as near."""
    if image.dtype != jnp.uint8:
        return pixels.astype(image.dtype)
    # A float32 of 2^23 and more holds whole numbers. The cast of a float to a byte would also deal
    # with NaN and other ranges, and take a CPU longer than everything before it.
    return jax.lax.bitcast_convert_type(pixels + 2.0**23, jnp.uint32).astype(jnp.uint8)


def _check_range(images: Array, max_value: float | None) -> float:
    """Returns the value of white."""
    if images.dtype == jnp.uint8:
        if max_value not in (None, 255):
            raise ValueError(
                f"max_value is {max_value}, but uint8 images have 255 as white: leave it out"
            )
        return 255.0
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"expected uint8 or floating-point images, got {images.dtype}: convert them"
        )
    if max_value is None:
        raise ValueError(
            f"the range of {images.dtype} images is not known: pass max_value=1.0 if they are in "
            "[0, 1], and augment before they are normalised"
        )
    if not 0 < max_value < math.inf:
        raise ValueError(f"max_value is {max_value}: it must be above 0, the value of white")
    return float(max_value)


def _check_settings(num_ops: int, magnitude: float, operations: Sequence[Operation]) -> None:
    if num_ops < 1:
        raise ValueError(
            f"num_ops is {num_ops}: it must be at least 1; leave the augmentation out for 0"
        )
    if not 0 <= magnitude <= MAX_MAGNITUDE:
        raise ValueError(f"magnitude is {magnitude}: it must be from 0 to {MAX_MAGNITUDE}")
    if not operations or not all(isinstance(entry, Operation) for entry in operations):
        raise ValueError(
            f"operations are {shorten(repr(operations), 80)}: pass some of data.Operation, such as "
            "(Operation.ROTATE, Operation.CUTOUT)"
        )
