"""Tests factor transfer: hand-worked values, float64 references, limits, training."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd.losses import factors

KEY = jax.random.key(5)
SHAPE = (3, 4, 5, 4)


def draw(student=SHAPE, teacher=None, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], student), jax.random.normal(keys[1], teacher or student)


def with_biases(params):
    return jax.tree.map(lambda leaf: leaf + 0.3 if leaf.ndim == 1 else leaf, params)


TRANSLATOR = with_biases(factors.init_factors(KEY, 4, 2))
PARAPHRASER = with_biases(factors.init_paraphraser(KEY, 4, 2))


def transfer(student, teacher):
    """Computes FT with the translator of `TRANSLATOR` and the encoder of `PARAPHRASER`."""
    return factors.factor_transfer_loss(
        factors.extract_factors(TRANSLATOR, student),
        factors.extract_factors(PARAPHRASER["encoder"], teacher),
    )


def as_float64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


def reference_factors(params, maps):
    for layer in params:
        padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
        result = np.zeros((*maps.shape[:3], layer["bias"].size)) + layer["bias"]
        for i, j in np.ndindex(3, 3):
            window = padded[:, i : i + maps.shape[1], j : j + maps.shape[2]]
            result += window @ layer["kernel"][i, j]
        maps = np.where(result > 0, result, 0.1 * result)
    return maps


def test_values_worked_by_hand():
    student, teacher = jnp.array([[[[3.0, 4.0]]]]), jnp.array([[[[2.0, 0.0]]]])
    value = factors.factor_transfer_loss(student, teacher)
    np.testing.assert_allclose(value, [(0.4 + 0.8) / 2], rtol=1e-6)
    # One position: 2 · (−3) = −6, leaky −0.6; twice 1 · x; then −0.06 and −0.006.

    def layer(weight):
        kernel = jnp.full((3, 3, 1, 1), 100.0).at[1, 1].set(weight)
        return {"kernel": kernel, "bias": jnp.zeros(1)}

    params = [layer(2.0), layer(1.0), layer(1.0)]
    maps = jnp.full((1, 1, 1, 1), -3.0)
    np.testing.assert_allclose(factors.extract_factors(params, maps).ravel(), [-0.006], rtol=1e-5)
    paraphraser = {"encoder": params, "decoder": [layer(-1000.0), layer(2.0), layer(1.0)]}
    # −1000 · −0.006 = 6, doubled 12, against −3.
    value = factors.paraphraser_loss(paraphraser, maps)
    np.testing.assert_allclose(value, [15], rtol=1e-5)


def test_equal_float64_references():
    student, teacher = draw()
    s, t = as_float64((student, teacher))
    student_factors = reference_factors(as_float64(TRANSLATOR), s)
    encoder, decoder = (as_float64(PARAPHRASER[name]) for name in ("encoder", "decoder"))
    teacher_factors = reference_factors(encoder, t)
    np.testing.assert_allclose(
        factors.extract_factors(TRANSLATOR, student), student_factors, rtol=1e-4, atol=1e-5
    )
    unit = [
        maps.reshape(3, -1) / np.linalg.norm(maps.reshape(3, -1), axis=1, keepdims=True)
        for maps in (student_factors, teacher_factors)
    ]
    value = transfer(student, teacher)
    chex.assert_shape(value, (3,))
    np.testing.assert_allclose(value, np.abs(unit[0] - unit[1]).mean(1), rtol=2e-5)
    expected = np.abs(t - reference_factors(decoder, teacher_factors)).mean((1, 2, 3))
    np.testing.assert_allclose(factors.paraphraser_loss(PARAPHRASER, teacher), expected, rtol=2e-5)


def test_the_scale_of_factors_does_not_matter():
    student, teacher = draw()
    expected = factors.factor_transfer_loss(student, teacher)
    value = factors.factor_transfer_loss(1000 * student, 0.01 * teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(factors.factor_transfer_loss(student, 3 * student), 0, atol=1e-7)


def test_a_paraphraser_learns_to_reconstruct():
    # Two directions of positive maps, which two factors can hold.
    maps, _ = (jnp.abs(array) for array in draw((8, 4, 4, 2)))
    maps = maps @ jnp.array([[1.0, 0.5, 2.0, 0.0], [0.0, 1.0, 0.5, 1.0]])

    @jax.jit
    def step(params):
        value, gradient = jax.value_and_grad(
            lambda params: factors.paraphraser_loss(params, maps).mean()
        )(params)
        return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient), value

    params, values = factors.init_paraphraser(KEY, 4, 2), []
    for _ in range(200):
        params, value = step(params)
        values.append(value)
    assert values[-1] < 0.5 * values[0]


def value_and_gradients(student, teacher):
    def total(student, teacher):
        return (transfer(student, teacher) + factors.paraphraser_loss(PARAPHRASER, teacher)).sum()

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(student, teacher)


@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_extreme_magnitudes_stay_finite(scale):
    student, teacher = draw()
    for pair in ((scale * student, scale * teacher), (scale * student, teacher)):
        chex.assert_tree_all_finite(value_and_gradients(*pair))
    zero = jax.jit(
        jax.value_and_grad(lambda s, t: factors.factor_transfer_loss(s, t).sum(), argnums=(0, 1))
    )(scale * student, 0 * teacher)
    chex.assert_tree_all_finite(zero)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_maps_are_widened_first(dtype):
    student, teacher = (maps.astype(dtype) for maps in draw())
    wide = [maps.astype(jnp.float32) for maps in (student, teacher)]
    for loss, expected in (
        (transfer(student, teacher), transfer(*wide)),
        (
            factors.paraphraser_loss(PARAPHRASER, teacher),
            factors.paraphraser_loss(PARAPHRASER, wide[1]),
        ),
        (
            factors.factor_transfer_loss(student, teacher),
            factors.factor_transfer_loss(*wide),
        ),
    ):
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.thorough
def test_gradients_are_those_of_finite_differences():
    student, teacher = draw((2, 2, 2, 4))
    options = {"order": 1, "modes": ("rev",), "eps": 1e-3, "atol": 2e-2, "rtol": 2e-2}
    check_grads(jax.jit(factors.factor_transfer_loss), (student, teacher), **options)
    check_grads(jax.jit(factors.paraphraser_loss), (PARAPHRASER, teacher), **options)
    gradients = jax.jit(jax.grad(lambda p: factors.paraphraser_loss(p, teacher).sum()))(PARAPHRASER)
    assert all((np.abs(leaf) > 1e-6).any() for leaf in jax.tree.leaves(gradients))


def test_initial_parameters():
    params = factors.init_paraphraser(KEY, 60, 30)
    for name, sizes in (
        ("encoder", ((60, 60), (60, 30), (30, 30))),
        ("decoder", ((30, 30), (30, 60), (60, 60))),
    ):
        for layer, size in zip(params[name], sizes, strict=True):
            chex.assert_shape(layer["kernel"], (3, 3, *size))
            np.testing.assert_allclose(layer["kernel"].std(), 1 / np.sqrt(9 * size[0]), rtol=0.05)
            chex.assert_trees_all_equal(layer["bias"], jnp.zeros(size[1]))


def test_wrong_shapes_and_dtypes_raise():
    student, teacher = draw()
    wide = jnp.concatenate([teacher, teacher], -1)
    with pytest.raises(ValueError, match="must have 4 channels.*call init_factors"):
        factors.extract_factors(TRANSLATOR, wide)
    with pytest.raises(ValueError, match="must have 4 channels"):
        factors.paraphraser_loss(PARAPHRASER, wide)
    with pytest.raises(ValueError, match=r"features must be \[B, H, W, C\]"):
        factors.extract_factors(TRANSLATOR, student[0])
    with pytest.raises(ValueError, match="same channels.*factors of the paraphraser"):
        factors.factor_transfer_loss(student, wide)
    with pytest.raises(ValueError, match="all but their channels.*pool"):
        factors.factor_transfer_loss(student, teacher[:, :2])
    for call in (
        lambda maps: factors.extract_factors(TRANSLATOR, maps),
        lambda maps: factors.paraphraser_loss(PARAPHRASER, maps),
        lambda maps: factors.factor_transfer_loss(maps, teacher),
    ):
        with pytest.raises(TypeError, match="floating-point"):
            call(student.astype(jnp.int32))
