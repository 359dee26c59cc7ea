"""RandAugment: each operation against NumPy, draws, dtypes, compiled bits, devices and errors."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkd.data import Operation, rand_augment
from jaxkd.data.views import augment_views

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(20, 236, (16, 9, 7, 3), np.uint8)
MAGNITUDE = 6.0
STRENGTH = 0.6


def apply(operation, images, **keywords):
    keywords = {"num_ops": 1, "magnitude": MAGNITUDE} | keywords
    return np.asarray(rand_augment(KEY, images, operations=(operation,), **keywords))


def clip(pixels):
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def factor(sign):
    # In float32 as there, since some results are near to half a level.
    return np.float32(1) + sign * np.float32(0.9 * STRENGTH)


def autocontrast(image, sign):
    low, high = (fn(image, (0, 1)).astype(np.float32) for fn in (np.min, np.max))
    return clip((image - low) * (255 / (high - low)))


def brightness(image, sign):
    return clip(image * factor(sign))


def contrast(image, sign):
    mean = np.rint(image.mean()).astype(np.float32)
    return clip((image - mean) * factor(sign) + mean)


def solarize(image, sign):
    return np.where(image >= 256 * (1 - STRENGTH), 255 - image, image)


def posterize(image, sign):
    return image & 0b11111100  # 8 - round(4 * 0.6) bits


def move(find_source):
    """Makes a reference that looks up each pixel; `find_source` maps distances from the centre."""

    def reference(image, sign):
        height, width, _ = image.shape
        center = np.array([height - 1, width - 1]) / 2
        result = np.full_like(image, 128)
        for y, x in np.ndindex(height, width):
            source = np.array(find_source(*([y, x] - center), sign, height, width)) + center
            row, column = np.floor(source + 0.5).astype(int)
            if 0 <= row < height and 0 <= column < width:
                result[y, x] = image[row, column]
        return result

    return reference


def rotate(y, x, sign, height, width):
    angle = sign * math.radians(30 * STRENGTH)
    return (
        math.cos(angle) * y + math.sin(angle) * x,
        math.cos(angle) * x - math.sin(angle) * y,
    )


REFERENCES = {
    Operation.IDENTITY: lambda image, sign: image,
    Operation.AUTOCONTRAST: autocontrast,
    Operation.BRIGHTNESS: brightness,
    Operation.CONTRAST: contrast,
    Operation.SOLARIZE: solarize,
    Operation.POSTERIZE: posterize,
    Operation.ROTATE: move(rotate),
    Operation.SHEAR_X: move(lambda y, x, sign, *_: (y, x + sign * 0.3 * STRENGTH * y)),
    Operation.SHEAR_Y: move(lambda y, x, sign, *_: (y + sign * 0.3 * STRENGTH * x, x)),
    # 150 / 331 * 0.6 of 7 and 9 pixels.
    Operation.TRANSLATE_X: move(lambda y, x, sign, *_: (y, x + sign * 2)),
    Operation.TRANSLATE_Y: move(lambda y, x, sign, *_: (y + sign * 2, x)),
}
SIGNED = {*REFERENCES} - {
    Operation.IDENTITY,
    Operation.AUTOCONTRAST,
    Operation.SOLARIZE,
    Operation.POSTERIZE,
}


@pytest.mark.parametrize("operation", REFERENCES)
def test_operation_equals_numpy(operation):
    signs = set()
    for image, augmented in zip(IMAGES, apply(operation, jnp.asarray(IMAGES)), strict=True):
        matching = [
            sign
            for sign in (1, -1)
            if np.array_equal(REFERENCES[operation](image, sign), augmented)
        ]
        assert matching
        signs |= {*matching}
    assert signs == {1, -1}
    plus, minus = (REFERENCES[operation](IMAGES[0], sign) for sign in (1, -1))
    assert np.array_equal(plus, minus) == (operation not in SIGNED)


def test_cutout_covers_a_square_with_grey():
    images = jnp.ones((200, 9, 7, 3), jnp.uint8)
    is_grey = apply(Operation.CUTOUT, images, magnitude=10.0)[..., 0] == 128
    rows, columns = is_grey.any(2), is_grey.any(1)
    np.testing.assert_array_equal(is_grey, rows[:, :, None] & columns[:, None])
    # Half of the shorter side, rounded; less at the border.
    assert rows.sum(1).max() == columns.sum(1).max() == 4 and rows.sum(1).min() == 2
    assert rows.any(0).all() and columns.any(0).all()


@pytest.mark.parametrize("max_value", [1.0, 255.0])
@pytest.mark.parametrize("operation", Operation)
def test_floats_become_what_bytes_become(operation, max_value):
    floats = jnp.asarray(IMAGES / 255 * max_value, jnp.float32)
    augmented = apply(operation, floats, max_value=max_value)
    assert augmented.dtype == np.float32
    assert augmented.min() >= 0 and augmented.max() <= max_value
    expected = apply(operation, jnp.asarray(IMAGES)).astype(np.float32)
    np.testing.assert_allclose(augmented * (255 / max_value), expected, atol=0.501)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_magnitude_0_leaves_all_but_autocontrast(dtype):
    images = jnp.asarray(IMAGES).astype(dtype)
    operations = [operation for operation in Operation if operation != Operation.AUTOCONTRAST]
    max_value = None if dtype == jnp.uint8 else 255.0
    augmented = rand_augment(
        KEY, images, num_ops=3, magnitude=0, max_value=max_value, operations=operations
    )
    chex.assert_trees_all_equal(augmented, images)


def test_channel_of_one_value_keeps_its_contrast():
    images = jnp.asarray(IMAGES).at[..., 1].set(77)
    assert (apply(Operation.AUTOCONTRAST, images)[..., 1] == 77).all()


def test_operations_are_drawn_uniformly_and_in_turn():
    """Solarize at the largest magnitude inverts black, twice gives it back."""
    images = jnp.zeros((3000, 1, 1, 1), jnp.uint8)
    operations = (Operation.SOLARIZE, Operation.IDENTITY, Operation.SOLARIZE)
    augment = functools.partial(rand_augment, KEY, images, magnitude=10, operations=operations)
    once, twice = (np.mean(augment(num_ops=number) == 255) for number in (1, 2))
    assert once == pytest.approx(2 / 3, abs=0.04)
    assert twice == pytest.approx(4 / 9, abs=0.04)


@pytest.mark.thorough
def test_draw_depends_on_position_alone():
    images = jnp.asarray(IMAGES)
    augmented = rand_augment(KEY, images)
    chex.assert_trees_all_equal(rand_augment(KEY, images[:5]), augmented[:5])
    assert not np.array_equal(rand_augment(jax.random.key(4), images), augmented)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_compiled_bits_on_one_and_eight_devices(dtype):
    images = jnp.asarray(IMAGES).astype(dtype) / (1 if dtype == jnp.uint8 else 255)
    images = jnp.tile(images.astype(dtype), (16, 1, 1, 1))
    max_value = None if dtype == jnp.uint8 else 1.0
    augment = functools.partial(rand_augment, max_value=max_value)
    expected = augment(KEY, images)
    assert expected.dtype == dtype and expected.shape == images.shape
    chex.assert_trees_all_equal(jax.jit(augment)(KEY, images), expected)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    divided = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    chex.assert_trees_all_equal(jax.jit(augment)(KEY, divided), expected)


@pytest.mark.thorough
def test_views_do_not_depend_on_the_batch():
    draw = functools.partial(augment_views, rand_augment, KEY)
    batch = draw(jnp.asarray(IMAGES), jnp.arange(16), 1)
    chex.assert_trees_all_equal(draw(jnp.asarray(IMAGES[5:7]), jnp.array([5, 6]), 1), batch[5:7])
    assert not np.array_equal(batch, IMAGES)


@pytest.mark.parametrize(
    ("images", "keywords", "error", "match"),
    [
        (IMAGES[0], {}, ValueError, r"shape \(9, 7, 3\), expected \[B, H, W, C\]"),
        (np.zeros((2, 3, 8, 8), np.uint8), {}, ValueError, r"\[N, C, H, W\]: pass"),
        (IMAGES.astype(np.int32), {}, TypeError, "uint8 or floating-point images, got int32"),
        (IMAGES.astype(np.float32), {}, ValueError, "range of float32 .* pass max_value=1.0"),
        (IMAGES.astype(np.float32), {"max_value": 0.0}, ValueError, "max_value is 0.0: it must be"),
        (IMAGES, {"max_value": 1.0}, ValueError, "max_value is 1.0, but uint8 images have 255"),
        (IMAGES, {"num_ops": 0}, ValueError, "num_ops is 0: it must be at least 1"),
        (IMAGES, {"magnitude": 10.5}, ValueError, "magnitude is 10.5: it must be from 0 to 10"),
        (IMAGES, {"magnitude": math.nan}, ValueError, "magnitude is nan"),
        (IMAGES, {"operations": ()}, ValueError, r"operations are \(\): pass some of"),
        (IMAGES, {"operations": ("rotate",)}, ValueError, r"operations are \('rotate',\): pass"),
    ],
)
def test_bad_arguments(images, keywords, error, match):
    with pytest.raises(error, match=match) as caught:
        rand_augment(KEY, jnp.asarray(images), **keywords)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)
