"""Tests knowledge review: hand-worked values, a float64 reference, limits and training."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd.losses import features, review

# The second stage changes its size up on one axis and down on the other, from 3 × 3 to 4 × 2.
STUDENT = ((4, 6, 5, 3), (4, 3, 3, 4), (4, 1, 1, 4))
TEACHER = ((4, 6, 5, 5), (4, 4, 2, 2), (4, 1, 1, 6))
MIDDLE = 3


def draw_params(seed=0):
    """Draws parameters, of which no scale is 1 and no shift or bias is 0."""
    widths = ([shape[-1] for shape in shapes] for shapes in (STUDENT, TEACHER))
    params = review.init_review(jax.random.key(seed), *widths, MIDDLE)
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.float32(random.normal() * (leaf.ndim == 1)), params)


def draw(seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    return [
        [jnp.asarray(scale * random.standard_normal(shape), jnp.float32) for shape in shapes]
        for shapes in (STUDENT, TEACHER)
    ]


PARAMS = draw_params()


def loss(student, teacher, params=PARAMS):
    return review.review_loss(params, student, teacher)


def as_float64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


# Reference


def reference_convolution(kernel, maps):
    size = kernel.shape[0] // 2
    padded = np.pad(maps, ((0, 0), (size, size), (size, size), (0, 0)))
    result = np.zeros((*maps.shape[:3], kernel.shape[-1]))
    for i, j in np.ndindex(*kernel.shape[:2]):
        result += padded[:, i : i + maps.shape[1], j : j + maps.shape[2]] @ kernel[i, j]
    return result


def reference_block(params, maps):
    maps = reference_convolution(params["kernel"], maps)
    mean, variance = maps.mean((0, 1, 2)), maps.var((0, 1, 2))
    return (maps - mean) / np.sqrt(variance + 1e-5) * params["scale"] + params["shift"]


def reference_resize(maps, height, width):
    resized = np.zeros((maps.shape[0], height, width, maps.shape[-1]))
    for i, j in np.ndindex(height, width):
        resized[:, i, j] = maps[:, i * maps.shape[1] // height, j * maps.shape[2] // width]
    return resized


def reference_features(params, student, sizes):
    reviewed, residual = [], None
    for block, maps, size in list(zip(params, student, sizes, strict=True))[::-1]:
        maps = reference_block(block["input"], maps)
        if residual is not None:
            residual = reference_resize(residual, *maps.shape[1:3])
            scores = np.concatenate([maps, residual], -1) @ block["attention"]["kernel"][0, 0]
            attention = 1 / (1 + np.exp(-scores - block["attention"]["bias"]))
            maps = maps * attention[..., :1] + residual * attention[..., 1:]
        residual = reference_resize(maps, *size)
        reviewed.insert(0, reference_block(block["output"], residual))
    return reviewed


def reference_pool(maps, size):
    pooled = np.zeros((maps.shape[0], size, size, maps.shape[-1]))
    for i, j in np.ndindex(size, size):
        rows, columns = (
            slice(int(np.floor(k * n / size)), int(np.ceil((k + 1) * n / size)))
            for k, n in ((i, maps.shape[1]), (j, maps.shape[2]))
        )
        pooled[:, i, j] = maps[:, rows, columns].mean((1, 2))
    return pooled


def reference_context(student, teacher):
    pairs = [(student, teacher)]
    pairs += [
        (reference_pool(student, size), reference_pool(teacher, size))
        for size in (4, 2, 1)
        if size < min(student.shape[1:3])
    ]
    weights = 0.5 ** np.arange(len(pairs))
    values = [np.mean((s - t) ** 2, (1, 2, 3)) for s, t in pairs]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / weights.sum()


# Values


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (4, 4), (2, 3), (1, 1), (1, 6)])
def test_context_loss_equals_the_reference(size):
    random = np.random.default_rng(0)
    student, teacher = random.standard_normal((2, 3, *size, 2))
    value = review.hierarchical_context_loss(
        jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    )
    np.testing.assert_allclose(value, reference_context(student, teacher), rtol=2e-5)


def test_context_loss_by_hand():
    # A difference of 1 and −1 in equal parts: 1 at its own size and 0 in the mean. On 3 × 3, of
    # which one row is 3 and the others 0: 3 at its own size, 2 × 2 windows of two rows (3 + 0) / 2
    # and 0, hence 9/8, and the mean 1: (3 + 9/16 + 1/4) / (7/4).
    student = jnp.array([[[[1.0], [-1.0]], [[1.0], [-1.0]]]])
    value = review.hierarchical_context_loss(student, 0 * student)
    np.testing.assert_allclose(value, [1 / 1.5], rtol=1e-6)
    student = jnp.zeros((1, 3, 3, 1)).at[:, 0].set(3.0)
    value = review.hierarchical_context_loss(student, 0 * student)
    np.testing.assert_allclose(value, [(3 + 9 / 16 + 1 / 4) / 1.75], rtol=1e-6)


def test_context_loss_of_a_single_position_is_the_hint_loss_and_of_constants_too():
    random = np.random.default_rng(0)
    student, teacher = jnp.asarray(random.standard_normal((2, 5, 1, 1, 3)), jnp.float32)
    expected = features.hint_loss(student, teacher)
    np.testing.assert_allclose(
        review.hierarchical_context_loss(student, teacher), expected, rtol=1e-6
    )
    tiled = (jnp.tile(maps, (1, 6, 6, 1)) for maps in (student, teacher))
    np.testing.assert_allclose(review.hierarchical_context_loss(*tiled), expected, rtol=1e-5)


def test_features_and_loss_equal_the_reference():
    student, teacher = draw()
    sizes = [maps.shape[1:3] for maps in teacher]
    reviewed = review.review_features(PARAMS, student, sizes)
    expected = reference_features(as_float64(PARAMS), as_float64(student), sizes)
    for maps, expected_maps in zip(reviewed, expected, strict=True):
        np.testing.assert_allclose(maps, expected_maps, rtol=1e-4, atol=2e-4)
    value = loss(student, teacher)
    chex.assert_shape(value, (4,))
    total = sum(map(reference_context, expected, as_float64(teacher)))
    np.testing.assert_allclose(value, total, rtol=1e-4)


def test_one_stage_by_hand():
    """A batch of 1 and 3 normalises to −1 and 1, and those to −1 and 1 once more."""
    block = {"kernel": jnp.full((1, 1, 1, 1), 5.0), "scale": jnp.ones(1), "shift": jnp.zeros(1)}
    output = {**block, "kernel": jnp.full((3, 3, 1, 1), 7.0), "scale": jnp.full(1, 2.0)}
    student = [jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)]
    params = [{"input": block, "output": output | {"shift": jnp.full(1, 10.0)}}]
    (reviewed,) = review.review_features(params, student, [(1, 1)])
    np.testing.assert_allclose(reviewed.ravel(), [8, 12], rtol=1e-5)
    value = review.review_loss(params, student, [jnp.full((2, 1, 1, 1), 9.0)])
    np.testing.assert_allclose(value, [1, 9], rtol=1e-4)


def test_zero_where_the_teacher_is_what_was_reviewed():
    student, teacher = draw()
    sizes = [maps.shape[1:3] for maps in teacher]
    np.testing.assert_array_equal(loss(student, review.review_features(PARAMS, student, sizes)), 0)


def test_a_deep_stage_reaches_all_shallower_ones_but_not_the_reverse():
    student, teacher = draw()
    sizes = [maps.shape[1:3] for maps in teacher]
    before = review.review_features(PARAMS, student, sizes)
    for changed in range(3):
        others = [maps**2 if i == changed else maps for i, maps in enumerate(student)]
        after = review.review_features(PARAMS, others, sizes)
        for stage in range(3):
            differs = (np.abs(before[stage] - after[stage]) > 1e-3).any()
            assert differs == (stage <= changed)


def test_the_scale_of_the_students_features_does_not_matter():
    student, teacher = draw()
    scaled = [7 * maps for maps in student]
    np.testing.assert_allclose(loss(scaled, teacher), loss(student, teacher), rtol=1e-3)


def test_training_fits_a_teacher():
    student, teacher = draw()

    @jax.jit
    def step(params):
        value, gradient = jax.value_and_grad(
            lambda params: review.review_loss(params, student, teacher).mean()
        )(params)
        return jax.tree.map(lambda leaf, slope: leaf - 0.05 * slope, params, gradient), value

    params, values = PARAMS, []
    for _ in range(60):
        params, value = step(params)
        values.append(value)
    assert values[-1] < 0.5 * values[0]


# Numerics


def value_and_gradients(student, teacher):
    return jax.jit(jax.value_and_grad(lambda *sides: loss(*sides).sum(), argnums=(0, 1)))(
        student, teacher
    )


@pytest.mark.parametrize("scale", [1e4, 1e-4, 0.0])
def test_extreme_magnitudes_stay_finite(scale):
    student, teacher = draw(scale=scale)
    chex.assert_tree_all_finite(value_and_gradients(student, teacher))
    chex.assert_tree_all_finite(value_and_gradients(student, draw()[1]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_maps_are_widened_first(dtype):
    student, teacher = jax.tree.map(lambda maps: maps.astype(dtype), draw())
    value = loss(student, teacher)
    assert value.dtype == jnp.float32
    wide = jax.tree.map(lambda maps: maps.astype(jnp.float32), (student, teacher))
    np.testing.assert_allclose(value, loss(*wide), rtol=1e-5)
    narrow_params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    assert loss(wide[0], teacher, narrow_params).dtype == jnp.float32


@pytest.mark.thorough
def test_gradients_are_those_of_finite_differences():
    student, teacher = draw()

    def total(params, student, teacher):
        return review.review_loss(params, student, teacher).sum()

    check_grads(
        jax.jit(total), (PARAMS, student, teacher), order=1, modes=("rev",),
        eps=1e-2, atol=5e-2, rtol=5e-2,
    )  # fmt: skip
    gradients = jax.jit(jax.grad(total))(PARAMS, student, teacher)
    assert all((np.abs(leaf) > 1e-6).any() for leaf in jax.tree.leaves(gradients))


# Parameters and errors


def test_initial_parameters():
    params = review.init_review(jax.random.key(0), (10, 20), (30, 40), 50)
    assert ["attention" in block for block in params] == [True, False]
    chex.assert_shape(params[0]["attention"]["kernel"], (1, 1, 100, 2))
    for block, student, teacher in zip(params, (10, 20), (30, 40), strict=True):
        chex.assert_shape(block["input"]["kernel"], (1, 1, student, 50))
        chex.assert_shape(block["output"]["kernel"], (3, 3, 50, teacher))
        deviation = block["output"]["kernel"].std()
        np.testing.assert_allclose(deviation, 1 / np.sqrt(450), rtol=0.05)
        chex.assert_trees_all_equal(block["output"]["scale"], jnp.ones(teacher))
        chex.assert_trees_all_equal(block["output"]["shift"], jnp.zeros(teacher))
        assert "bias" not in block["output"]
    for widths in (((), ()), ((1, 2), (3,))):
        with pytest.raises(ValueError, match="same number of stages, at least one"):
            review.init_review(jax.random.key(0), *widths, 4)


def test_wrong_shapes_and_dtypes_raise():
    student, teacher = draw()
    with pytest.raises(ValueError, match="for 3 stages, got 2 of the student"):
        loss(student[:2], teacher)
    with pytest.raises(ValueError, match="for 3 stages, got 2 of the teacher"):
        loss(student, teacher[:2])
    with pytest.raises(ValueError, match=r"student_features\[0\] .* of 3 channels"):
        loss(student[1:] + student[:1], teacher)
    with pytest.raises(ValueError, match=r"teacher_features\[1\] .* of 2 channels"):
        loss(student, [teacher[0], *teacher[:2]])
    with pytest.raises(ValueError, match=r"student_features\[2\] .* 4 examples"):
        loss([*student[:2], student[2][:1]], teacher)
    with pytest.raises(ValueError, match="same examples, got 4 and 2"):
        loss(student, [maps[:2] for maps in teacher])
    with pytest.raises(ValueError, match=r"student_features\[2\] must be \[B, H, W, C\]"):
        loss([*student[:2], student[2][:, 0, 0]], teacher)
    for sizes in ([(1, 1)], [4, 2, 1]):
        with pytest.raises(ValueError, match="must be .height, width. for each of 3 stages"):
            review.review_features(PARAMS, student, sizes)
    with pytest.raises(ValueError, match="must have the same shape.*project.*pool"):
        review.hierarchical_context_loss(teacher[0], student[0])
    with pytest.raises(TypeError, match="floating-point"):
        loss(student, [*teacher[:2], teacher[2].astype(jnp.int32)])
    with pytest.raises(TypeError, match="floating-point"):
        review.hierarchical_context_loss(teacher[0], teacher[0].astype(jnp.int32))
