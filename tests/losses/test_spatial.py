"""Tests losses on maps: hand-worked values, float64 references, limits, masks and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd import losses
from jaxkd.losses import features, spatial

KEY = jax.random.key(3)
SHAPE = (3, 4, 5, 6)
GENERATION = spatial.init_masked_generation(jax.random.key(7), 6, 4)
SAME_WIDTH = spatial.init_masked_generation(jax.random.key(8), 6, 6)


def draw(student=SHAPE, teacher=None, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], student), jax.random.normal(keys[1], teacher or student)


def as_float64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


def cwd(student, teacher):
    return spatial.channel_wise_divergence(student, teacher, temperature=3.0)


def class_attention(student, teacher):
    return spatial.class_attention_loss(student, teacher, size=(2, 3))


def generation(student, teacher):
    return spatial.masked_generation_loss(SAME_WIDTH, KEY, student, teacher, masked_fraction=0.4)


LOSSES = pytest.mark.parametrize(
    "loss", [cwd, class_attention, generation], ids=lambda loss: loss.__name__
)


def value_and_gradients(loss, student, teacher):
    return jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1)))(
        student, teacher
    )


# References


def reference_pool(maps, height, width):
    """Averages window by window, as PyTorch's `adaptive_avg_pool2d` defines them."""
    pooled = np.zeros((maps.shape[0], height, width, maps.shape[-1]))
    for i, j in np.ndindex(height, width):
        rows, columns = (
            slice(int(np.floor(k * n / m)), int(np.ceil((k + 1) * n / m)))
            for k, n, m in ((i, maps.shape[1], height), (j, maps.shape[2], width))
        )
        pooled[:, i, j] = maps[:, rows, columns].mean((1, 2))
    return pooled


def reference_cwd(student, teacher, temperature=3.0):
    values = np.zeros(student.shape[0])
    for b, c in np.ndindex(student.shape[0], student.shape[-1]):
        q, p = (np.exp(maps[b, :, :, c] / temperature) for maps in (student, teacher))
        q, p = q / q.sum(), p / p.sum()
        values[b] += temperature**2 * np.sum(p * np.log(p / q)) / student.shape[-1]
    return values


def reference_class_attention(student, teacher, height=2, width=3):
    values = np.zeros(student.shape[0])
    for b, k in np.ndindex(student.shape[0], student.shape[-1]):
        a, t = (
            reference_pool(maps, height, width)[b, :, :, k].ravel() for maps in (student, teacher)
        )
        gap = a / np.linalg.norm(a) - t / np.linalg.norm(t)
        values[b] += np.mean(gap**2) / student.shape[-1]
    return values


def reference_convolution(params, maps):
    """Adds up the products of a 3×3 window, whose entries outside the map are 0."""
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    result = np.zeros((*maps.shape[:3], params["bias"].size)) + params["bias"]
    for i, j in np.ndindex(3, 3):
        window = padded[:, i : i + maps.shape[1], j : j + maps.shape[2]]
        result += window @ params["kernel"][i, j]
    return result


def reference_generation(params, keep, student, teacher):
    hidden = np.maximum(reference_convolution(params["first"], student * keep), 0)
    gap = teacher - reference_convolution(params["second"], hidden)
    return np.sum(gap**2, (1, 2, 3))


def with_biases(params):
    return jax.tree.map(lambda leaf: leaf + 0.3 if leaf.ndim == 1 else leaf, params)


# Pooling


@pytest.mark.parametrize("size", [(4, 5), (2, 5), (3, 2), (1, 1), 3])
def test_pooling_equals_the_windows_of_pytorch(size):
    maps, _ = draw()
    height, width = size if isinstance(size, tuple) else (size, size)
    pooled = spatial.pool_to(maps, size)
    expected = reference_pool(as_float64(maps), height, width)
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


def test_pooling_by_hand():
    # 5 rows to 3: rows 0–1, 1–3 and 3–4. 2 columns to 1: their mean.
    maps = jnp.arange(10.0).reshape(1, 5, 2, 1)
    np.testing.assert_allclose(spatial.pool_to(maps, (3, 1)).ravel(), [1.5, 4.5, 7.5], rtol=1e-6)


def test_pooling_to_one_position_is_the_mean_and_to_the_same_size_the_map():
    maps, _ = draw()
    chex.assert_trees_all_close(spatial.pool_to(maps, 1)[:, 0, 0], maps.mean((1, 2)), rtol=1e-5)
    chex.assert_trees_all_equal(spatial.pool_to(maps, (4, 5)), maps)


def test_pooling_widens_and_takes_no_other_size():
    maps, _ = draw()
    assert spatial.pool_to(maps.astype(jnp.bfloat16), 2).dtype == jnp.float32
    assert spatial.pool_to(maps[:0], 2).shape == (0, 2, 2, 6)
    for size in (5, (4, 6), (8, 1)):
        with pytest.raises(ValueError, match=r"cannot enlarge .*other network.*image\.resize"):
            spatial.pool_to(maps, size)
    for size in (0, (2, -1), 2.0, (1, 2, 3), "2"):
        with pytest.raises(ValueError, match="positive integer or two of them"):
            spatial.pool_to(maps, size)
    with pytest.raises(ValueError, match=r"must be \[B, H, W, C\]"):
        spatial.pool_to(maps[0], 2)
    with pytest.raises(TypeError, match="floating-point"):
        spatial.pool_to(maps.astype(jnp.int32), 2)


# Values


def test_values_worked_by_hand():
    # One channel, positions 3/4 and 1/4 of the teacher against 1/2 and 1/2: 3/4 log 3/2 + 1/4 log
    # 1/2. A second channel that is equal halves the mean.
    teacher = jnp.log(jnp.array([[[[3.0, 1.0], [1.0, 1.0]]]]))
    value = spatial.channel_wise_divergence(jnp.zeros((1, 1, 2, 2)), teacher)
    divergence = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(value, [divergence / 2], rtol=1e-5)
    # At T = 2 of doubled maps the distributions are the same, times 2².
    value = spatial.channel_wise_divergence(0 * teacher, 2 * teacher, temperature=2.0)
    np.testing.assert_allclose(value, [2 * divergence], rtol=1e-5)
    # Maps (3, 4) / 5 and (0, 2) / 2: (0.36 + 0.04) / 2.
    student, teacher = jnp.array([[[[3.0], [4.0]]]]), jnp.array([[[[0.0], [2.0]]]])
    value = spatial.class_attention_loss(student, teacher, size=(1, 2))
    np.testing.assert_allclose(value, [0.2], rtol=1e-5)
    # (1, 2) times the columns (1, 1) and (0, −1).
    maps = spatial.class_activation_maps(
        jnp.array([[[[1.0, 2.0]]]]), jnp.array([[1.0, 0.0], [1.0, -1.0]])
    )
    np.testing.assert_allclose(maps.ravel(), [3, -2], rtol=1e-6)


def test_generation_by_hand():
    """On a map of one position only the centre of a kernel counts: 3 · relu(2 s + 1) − 1."""

    def convolution(weight, bias):
        kernel = jnp.full((3, 3, 1, 1), 100.0).at[1, 1].set(weight)
        return {"kernel": kernel, "bias": jnp.array([bias])}

    params = {"first": convolution(2.0, 1.0), "second": convolution(3.0, -1.0)}
    student, teacher = jnp.full((1, 1, 1, 1), 4.0), jnp.full((1, 1, 1, 1), 10.0)
    for fraction, expected in ((0.0, (10 - 26) ** 2), (1.0, (10 - 2) ** 2)):
        value = spatial.masked_generation_loss(
            params, KEY, student, teacher, masked_fraction=fraction
        )
        np.testing.assert_allclose(value, [expected], rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "reference"), [(cwd, reference_cwd), (class_attention, reference_class_attention)]
)
def test_equal_float64_references(loss, reference):
    student, teacher = draw()
    chex.assert_shape(loss(student, teacher), (3,))
    expected = reference(*as_float64((student, teacher)))
    np.testing.assert_allclose(loss(student, teacher), expected, rtol=2e-5)


@pytest.mark.parametrize("width", [6, 4])
def test_generation_equals_the_reference(width):
    student, teacher = draw(teacher=(*SHAPE[:3], width))
    params = with_biases(SAME_WIDTH if width == 6 else GENERATION)
    value = spatial.masked_generation_loss(params, KEY, student, teacher, masked_fraction=0.4)
    keep = np.asarray(jax.random.uniform(KEY, (3, 4, 5, 1)) >= 0.4)
    assert 0 < keep.mean() < 1
    params, student, teacher = as_float64((params, student, teacher))
    if width == 4:
        student = student @ params["projector"]["kernel"] + params["projector"]["bias"]
    expected = reference_generation(params, keep, student, teacher)
    np.testing.assert_allclose(value, expected, rtol=2e-5)


# Limits and invariances


@pytest.mark.parametrize("loss", [cwd, class_attention], ids=lambda loss: loss.__name__)
def test_zero_where_equal_and_positive_elsewhere(loss):
    student, teacher = draw()
    value, gradients = value_and_gradients(loss, student, student)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    chex.assert_trees_all_close(gradients, jax.tree.map(jnp.zeros_like, gradients), atol=1e-6)
    assert (loss(student, teacher) > 1e-3).all()


def test_cwd_of_one_row_is_the_kl_divergence_of_its_positions():
    student, teacher = draw((3, 1, 7, 1))
    expected = losses.kl_divergence(student[:, 0, :, 0], teacher[:, 0, :, 0], temperature=3.0)
    np.testing.assert_allclose(cwd(student, teacher), expected, rtol=1e-5)


def test_cwd_does_not_depend_on_the_level_of_a_channel_and_class_attention_on_its_scale():
    student, teacher = draw()
    levels = jnp.broadcast_to(jnp.arange(6.0), SHAPE)
    expected = cwd(student, teacher)
    np.testing.assert_allclose(cwd(student + levels, teacher - levels), expected, rtol=1e-4)
    assert (np.abs(class_attention(student + levels, teacher) - expected) > 1e-3).all()
    expected = class_attention(student, teacher)
    np.testing.assert_allclose(
        class_attention(student * (1 + levels), 0.1 * teacher), expected, rtol=1e-4
    )


def test_class_activation_maps_average_to_the_logits_and_commute_with_pooling():
    images, _ = draw()
    kernel = jax.random.normal(KEY, (6, 10))
    maps = spatial.class_activation_maps(images, kernel)
    np.testing.assert_allclose(maps.mean((1, 2)), images.mean((1, 2)) @ kernel, atol=1e-5)
    pooled = spatial.class_activation_maps(spatial.pool_to(images, 2), kernel)
    np.testing.assert_allclose(pooled, spatial.pool_to(maps, 2), atol=1e-5)


def test_class_attention_compares_maps_of_different_sizes():
    student, teacher = draw((3, 4, 4, 6), (3, 2, 2, 6))
    expected = features.hint_loss(
        *(
            maps / np.linalg.norm(maps, axis=(1, 2), keepdims=True)
            for maps in (np.asarray(spatial.pool_to(student, 2)), np.asarray(teacher))
        )
    )
    value = spatial.class_attention_loss(student, teacher, size=2)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_the_mask_of_generation_is_of_whole_positions_and_of_the_key():
    """The generated maps depend on the student at the positions that are kept, and only there."""
    student, teacher = draw((64, 4, 5, 6), (64, 4, 5, 6))

    @jax.jit
    def gradient(key, fraction):
        return jax.grad(
            lambda s: spatial.masked_generation_loss(
                SAME_WIDTH, key, s, teacher, masked_fraction=fraction
            ).sum()
        )(student)

    used = np.asarray(gradient(KEY, 0.75) != 0)
    np.testing.assert_array_equal(used.all(-1), used.any(-1))
    np.testing.assert_allclose(used.mean(), 0.25, atol=0.04)
    assert (used.any(-1) != np.asarray(gradient(jax.random.key(1), 0.75) != 0).any(-1)).any()
    assert (gradient(KEY, 1.0) == 0).all() and np.asarray(gradient(KEY, 0.0) != 0).all()
    traced = jax.jit(
        lambda fraction: spatial.masked_generation_loss(
            SAME_WIDTH, KEY, student, teacher, masked_fraction=fraction
        )
    )
    assert np.isnan(traced(1.5)).all() and np.isfinite(traced(0.5)).all()


def test_generation_learns_to_fill_in_the_masked_positions():
    random = np.random.default_rng(0)
    image = jnp.asarray(
        np.broadcast_to(random.normal(size=(8, 1, 1, 6)), (8, 4, 4, 6)), jnp.float32
    )

    @jax.jit
    def step(params, key):
        gradient = jax.grad(
            lambda params: spatial.masked_generation_loss(
                params, key, image, image, masked_fraction=0.5
            ).mean()
        )(params)
        return jax.tree.map(lambda leaf, slope: leaf - 2e-3 * slope, params, gradient)

    def error(params):
        return spatial.masked_generation_loss(params, KEY, image, image, masked_fraction=0.5).mean()

    params, before = SAME_WIDTH, error(SAME_WIDTH)
    for i in range(60):
        params = step(params, jax.random.key(i))
    assert error(params) < 0.2 * before


def test_masked_positions_do_not_count():
    student, teacher = draw()
    where = jnp.ones(SHAPE[:3], bool).at[:, :, 3:].set(False)
    expected = cwd(student[:, :, :3], teacher[:, :, :3])

    def masked(student, teacher):
        return spatial.channel_wise_divergence(student, teacher, temperature=3.0, where=where)

    np.testing.assert_allclose(masked(student, teacher), expected, rtol=1e-5)
    for rubbish in (jnp.nan, jnp.inf):
        spoilt = [maps.at[:, :, 3:].set(rubbish) for maps in (student, teacher)]
        value, gradients = value_and_gradients(masked, *spoilt)
        np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
        chex.assert_tree_all_finite(gradients)
        assert all((gradient[:, :, 3:] == 0).all() for gradient in gradients)
    nothing = spatial.channel_wise_divergence(student, teacher, where=jnp.zeros(SHAPE[:3], bool))
    np.testing.assert_array_equal(nothing, 0)


# Numerics


@LOSSES
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_magnitudes_stay_finite(loss, scale):
    student, teacher = draw()
    for pair in ((scale * student, scale * teacher), (scale * student, teacher)):
        chex.assert_tree_all_finite(value_and_gradients(loss, *pair))


@LOSSES
def test_maps_of_zeros_are_finite(loss):
    student, _ = draw()
    zero = jnp.zeros_like(student)
    for pair in ((zero, zero), (zero, student), (student, zero)):
        chex.assert_tree_all_finite(value_and_gradients(loss, *pair))


@LOSSES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_maps_are_widened_first(loss, dtype):
    student, teacher = (maps.astype(dtype) for maps in draw())
    value = loss(student, teacher)
    assert value.dtype == jnp.float32
    expected = loss(student.astype(jnp.float32), teacher.astype(jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert loss(student.astype(jnp.float32), teacher).dtype == jnp.float32


@pytest.mark.thorough
@LOSSES
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher = draw((1, 3, 3, 6))
    check_grads(
        jax.jit(loss), (student, teacher), order=1, modes=("rev",), eps=1e-2, atol=2e-2, rtol=2e-2
    )


def test_generation_gradients_reach_every_parameter():
    student, teacher = draw(teacher=(*SHAPE[:3], 4))
    gradients = jax.jit(
        jax.grad(
            lambda params: spatial.masked_generation_loss(
                params, KEY, student, teacher, masked_fraction=0.4
            ).sum()
        )
    )(GENERATION)
    assert all((np.abs(leaf) > 1e-6).any() for leaf in jax.tree.leaves(gradients))


# Errors


def test_initial_parameters():
    params = spatial.init_masked_generation(KEY, 50, 40)
    chex.assert_shape(params["projector"]["kernel"], (50, 40))
    for name in ("first", "second"):
        chex.assert_shape(params[name]["kernel"], (3, 3, 40, 40))
        np.testing.assert_allclose(params[name]["kernel"].std(), 1 / np.sqrt(360), rtol=0.03)
        chex.assert_trees_all_equal(params[name]["bias"], jnp.zeros(40))
    assert (params["first"]["kernel"] != params["second"]["kernel"]).any()
    assert "projector" not in SAME_WIDTH


def test_wrong_shapes_raise():
    student, teacher = draw()
    large, wide = jnp.concatenate([teacher, teacher], 1), jnp.concatenate([teacher, teacher], -1)
    for loss in (cwd, generation):
        for wrong in (large, teacher[:1]):
            with pytest.raises(ValueError, match="all but their channels.*pool"):
                loss(student, wrong)
        with pytest.raises(ValueError, match=r"student_features must be \[B, H, W, C\]"):
            loss(student[0], teacher)
    with pytest.raises(ValueError, match="same channels.*project"):
        cwd(student, wide)
    for wrong in ((student, wide), (wide, teacher), (student, student[..., :4])):
        with pytest.raises(ValueError, match="generate 6 channels.*call init_masked_generation"):
            generation(*wrong)
    with pytest.raises(ValueError, match="same examples .* and classes"):
        class_attention(student, wide)
    with pytest.raises(ValueError, match="same examples .* and classes"):
        class_attention(student, teacher[:1])
    with pytest.raises(ValueError, match="cannot enlarge"):
        spatial.class_attention_loss(student, teacher, size=8)
    for kernel in (jnp.ones((10, 6)), jnp.ones(6)):
        with pytest.raises(ValueError, match="must be .*transpose PyTorch's weight"):
            spatial.class_activation_maps(student, kernel)
    with pytest.raises(ValueError, match="where .* one entry for each position"):
        spatial.channel_wise_divergence(student, teacher, where=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="where must be boolean"):
        spatial.channel_wise_divergence(student, teacher, where=jnp.ones(SHAPE[:3]))


@LOSSES
def test_integers_are_refused(loss):
    student, _ = draw()
    with pytest.raises(TypeError, match="floating-point"):
        loss(student, jnp.ones(student.shape, jnp.int32))


def test_hyper_parameters_out_of_range_raise():
    student, teacher = draw()
    with pytest.raises(ValueError, match="temperature must be positive"):
        spatial.channel_wise_divergence(student, teacher, temperature=0.0)
    for fraction in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"masked_fraction must be in \[0, 1\]"):
            spatial.masked_generation_loss(
                SAME_WIDTH, KEY, student, teacher, masked_fraction=fraction
            )
