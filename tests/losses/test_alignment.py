"""Tests cross-layer alignment: hand-worked values, float64 references, limits and training."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd.losses import alignment

# The student layer of a pair is larger on some axes and smaller on others, and sizes do not divide.
SHAPES = {
    "maps": (((5, 4, 6, 3),), ((5, 2, 8, 4), (5, 3, 4, 2))),
    "tokens": (((5, 4, 3), (5, 4, 2)), ((5, 6, 4), (5, 3, 3), (5, 4, 2))),
    "vectors": (((5, 3), (5, 2)), ((5, 4), (5, 3), (5, 2))),
}


def normal(random, shape, scale=1.0):
    return jnp.asarray(scale * random.standard_normal(shape), jnp.float32)


def draw(kind="tokens", seed=0, scale=1.0):
    """Parameters, student states and teacher states."""
    random = np.random.default_rng(seed)
    student, teacher = ([normal(random, shape, scale) for shape in side] for side in SHAPES[kind])
    widths = ([shape[-1] for shape in side] for side in SHAPES[kind])
    return (
        alignment.init_semantic_calibration(jax.random.key(seed), *widths, features=4),
        student,
        teacher,
    )


def draw_aligned(seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    params = alignment.init_aligned_states(jax.random.key(seed), 3, 4)
    return params, normal(random, (5, 2, 3), scale), normal(random, (5, 6, 4), scale)


LOSSES = {
    "semantic_calibration": (alignment.semantic_calibration_loss, draw),
    "aligned_states": (alignment.aligned_states_loss, draw_aligned),
}
BOTH_LOSSES = pytest.mark.parametrize("loss, draw_inputs", LOSSES.values(), ids=LOSSES)


def as_float64(tree):
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)


def reference_weights(queries, keys):
    scores = keys @ queries / np.sqrt(len(queries))
    odds = np.exp(scores - scores.max())
    return odds / odds.sum()


def reference_rms_normalize(vector):
    return vector / np.sqrt(np.mean(vector**2))


def reference_embed(vector, affine_map):
    return reference_rms_normalize(vector) @ affine_map["kernel"] + affine_map["bias"]


def reference_pool(array, size):
    """Applies PyTorch's adaptive average pooling to an example, window by window."""
    pooled = np.zeros((*size, array.shape[-1]))
    for index in np.ndindex(*size):
        window = tuple(
            slice(int(np.floor(i * n / m)), int(np.ceil((i + 1) * n / m)))
            for i, n, m in zip(index, array.shape, size, strict=False)
        )
        pooled[index] = array[window].reshape(-1, array.shape[-1]).mean(0)
    return pooled


def reference_semantic_calibration(params, student, teacher):
    params, student, teacher = as_float64((params, student, teacher))
    values = np.zeros(len(student[0]))
    for b in range(len(values)):
        means = [
            [x[b].reshape(-1, x.shape[-1]).mean(0) for x in side] for side in (student, teacher)
        ]
        keys = np.array(
            [reference_embed(*pair) for pair in zip(means[1], params["keys"], strict=True)]
        )
        for i, state in enumerate(student):
            weights = reference_weights(reference_embed(means[0][i], params["queries"][i]), keys)
            for j, target in enumerate(teacher):
                size = tuple(np.minimum(state.shape[1:-1], target.shape[1:-1]))
                projector = params["projectors"][i][j]
                projected = reference_pool(state[b], size) @ projector["kernel"] + projector["bias"]
                values[b] += (
                    weights[j]
                    * np.mean((projected - reference_pool(target[b], size)) ** 2)
                    / len(student)
                )
    return values


def reference_aligned_states(params, student, teacher):
    params, student, teacher = as_float64((params, student, teacher))
    values = np.zeros(len(student))
    for b in range(len(values)):
        keys = np.array([reference_rms_normalize(state) for state in teacher[b]])
        for state in student[b]:
            context = (
                reference_weights(reference_embed(state, params["queries"]), keys) @ teacher[b]
            )
            projected = state @ params["projector"]["kernel"] + params["projector"]["bias"]
            values[b] += np.mean((projected - context) ** 2) / student.shape[1]
    return values


def with_bias(params):
    return jax.tree.map(
        lambda x: x + jnp.sin(jnp.arange(x.size, dtype=x.dtype)) if x.ndim == 1 else x, params
    )


def affine(kernel, bias=0.0):
    kernel = jnp.array(kernel, jnp.float32)
    return {"kernel": kernel, "bias": jnp.full(kernel.shape[1:], bias)}


def test_values_worked_by_hand():
    # Features of one channel become 1: scores log 3 · 1 and 0, so weights 3/4 and 1/4. The
    # student's map is averaged to 2, projected to 2 + 1 and 2 · 2: 3/4 (3 − 5)² + 1/4 (4 − 6)² = 4.
    params = {
        "queries": [affine([[np.log(3.0)]])],
        "keys": [affine([[1.0]]), affine([[0.0]])],
        "projectors": [[affine([[1.0]], bias=1.0), affine([[2.0]])]],
    }
    student = [jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)]
    teacher = [jnp.full((1, 1, 1, 1), x) for x in (5.0, 6.0)]
    np.testing.assert_allclose(
        alignment.cross_layer_weights(params, student, teacher), [[[0.75, 0.25]]], rtol=1e-6
    )
    np.testing.assert_allclose(
        alignment.semantic_calibration_loss(params, student, teacher), [4.0], rtol=1e-6
    )
    # States along the axes become √2 along the axes: scores √2 √2 w / √2 = log 3 for the layer of
    # the same axis, and 0. Contexts are (3/4 · 8, 1/4 · 2) and (1/4 · 8, 3/4 · 2), and states are
    # projected to 0.
    params = {
        "queries": affine(np.log(3.0) / np.sqrt(2) * np.eye(2)),
        "projector": affine(np.zeros((2, 2))),
    }
    student = jnp.array([[[5.0, 0.0], [0.0, 5.0]]])
    teacher = jnp.array([[[8.0, 0.0], [0.0, 2.0]]])
    expected = np.mean([6.0**2, 0.5**2, 2.0**2, 1.5**2])
    np.testing.assert_allclose(
        alignment.aligned_states_loss(params, student, teacher), [expected], rtol=1e-6
    )


@pytest.mark.thorough
@pytest.mark.parametrize("kind", SHAPES)
def test_semantic_calibration_equals_a_float64_reference(kind):
    params, student, teacher = draw(kind)
    params = with_bias(params)
    values = jax.jit(alignment.semantic_calibration_loss)(params, student, teacher)
    np.testing.assert_allclose(
        values, reference_semantic_calibration(params, student, teacher), rtol=1e-5
    )
    weights = alignment.cross_layer_weights(params, student, teacher)
    chex.assert_shape([values, weights], [(5,), (5, len(student), len(teacher))])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert weights.std(-1).min() > 1e-3


@pytest.mark.thorough
def test_aligned_states_equals_a_float64_reference():
    params, student, teacher = draw_aligned()
    params = with_bias(params)
    values = alignment.aligned_states_loss(params, student, teacher)
    np.testing.assert_allclose(
        values, reference_aligned_states(params, student, teacher), rtol=1e-5
    )


def test_one_teacher_layer_gets_all_the_weight():
    params, student, teacher = draw("vectors")
    params = params | {
        "keys": params["keys"][:1],
        "projectors": [row[:1] for row in params["projectors"]],
    }
    np.testing.assert_array_equal(
        alignment.cross_layer_weights(params, student, teacher[:1]), jnp.ones((5, 2, 1))
    )


@pytest.mark.thorough
def test_loss_is_zero_where_a_projection_equals_every_layer():
    params, student, _ = draw()
    queries = params["queries"][:1]
    params = {"queries": queries, "keys": queries * 2, "projectors": [[affine(np.eye(3))] * 2]}
    value, gradient = jax.value_and_grad(
        lambda s: alignment.semantic_calibration_loss(params, s, student[:1] * 2).sum()
    )(student[:1])
    assert value == 0
    np.testing.assert_allclose(gradient[0], 0, atol=1e-7)
    assert (
        alignment.semantic_calibration_loss(params, student[:1], [student[0] + 1, student[0]]).min()
        > 0
    )


def test_mean_of_distances_is_distance_from_the_mean_plus_the_spread():
    """Tests Σ α ‖s − t‖² = ‖s − Σ α t‖² + Σ α ‖t − Σ α t‖² on both losses with equal parameters."""
    params, student, teacher = draw_aligned()
    layers = {
        "queries": [params["queries"]] * 2,
        "keys": [affine(np.eye(4))] * 6,
        "projectors": [[params["projector"]] * 6] * 2,
    }
    states = list(student.swapaxes(0, 1)), list(teacher.swapaxes(0, 1))
    weights = alignment.cross_layer_weights(layers, *states)
    context = jnp.einsum("bij,bjd->bid", weights, teacher)
    spread = jnp.einsum(
        "bij,bijd->bid", weights, jnp.square(teacher[:, None] - context[:, :, None])
    ).mean((1, 2))
    np.testing.assert_allclose(
        alignment.semantic_calibration_loss(layers, *states),
        alignment.aligned_states_loss(params, student, teacher) + spread,
        rtol=1e-5,
    )


@BOTH_LOSSES
def test_examples_are_independent(loss, draw_inputs):
    """In the authors' code they are not: queries and keys are similarities within the batch."""
    params, student, teacher = draw_inputs()
    order = np.array([3, 0, 4])
    selected = jax.tree.map(lambda array: array[order], (student, teacher))
    expected = jax.jit(loss)(params, student, teacher)[order]
    np.testing.assert_allclose(jax.jit(loss)(params, *selected), expected, rtol=1e-5)


def test_weights_do_not_depend_on_the_scale_of_a_layer():
    params, student, teacher = draw()
    expected = alignment.cross_layer_weights(params, student, teacher)
    scaled = [100 * student[0], student[1]], [teacher[0], 1e-3 * teacher[1], teacher[2]]
    np.testing.assert_allclose(alignment.cross_layer_weights(params, *scaled), expected, rtol=1e-5)


@BOTH_LOSSES
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_degenerate_and_extreme_states_stay_finite(loss, draw_inputs, scale):
    """Tests zero, tiny and huge states, and states constant over layers, positions and examples."""
    params, student, teacher = draw_inputs(scale=scale)
    constant = jax.tree.map(lambda array: jnp.full_like(array, scale), (student, teacher))
    value_and_grads = jax.jit(jax.value_and_grad(lambda *a: loss(*a).sum(), argnums=(0, 1, 2)))
    for states in ((student, teacher), constant):
        value, grads = value_and_grads(params, *states)
        chex.assert_tree_all_finite((value, grads))
    if scale == 0:
        assert value == 0


@pytest.mark.thorough
@BOTH_LOSSES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_states_are_widened_first(loss, draw_inputs, dtype):
    params, student, teacher = draw_inputs()
    loss = jax.jit(loss)
    narrow = jax.tree.map(lambda array: array.astype(dtype), (student, teacher))
    value = loss(params, *narrow)
    assert value.dtype == jnp.float32
    widened = jax.tree.map(lambda array: array.astype(jnp.float32), narrow)
    np.testing.assert_array_equal(value, loss(params, *widened))
    # Only the teacher may be narrow, and parameters may be as well.
    np.testing.assert_array_equal(loss(params, widened[0], narrow[1]), value)
    assert (
        loss(jax.tree.map(lambda array: array.astype(dtype), params), *narrow).dtype == jnp.float32
    )


@pytest.mark.thorough
@BOTH_LOSSES
def test_gradients_are_those_of_finite_differences(loss, draw_inputs):
    params, student, teacher = draw_inputs()
    examples = jax.tree.map(lambda array: array[:1], (student, teacher))
    check_grads(
        jax.jit(lambda *a: loss(*a)),
        (params, *examples),
        order=1,
        modes=("rev",),
        eps=1e-2,
        atol=2e-2,
        rtol=2e-2,
    )


@pytest.mark.thorough
def test_attention_finds_the_layer_that_can_be_learned():
    """Tests that 50 SGD steps move weight to the layer that the student's states determine."""
    random = np.random.default_rng(0)
    student = normal(random, (64, 6))
    teacher = [
        normal(random, (64, 4)),
        student @ normal(random, (6, 4)) / 2,
        normal(random, (64, 4)),
    ]
    initial_params = alignment.init_semantic_calibration(
        jax.random.key(0), [6], [4, 4, 4], features=8
    )

    def loss(params):
        return alignment.semantic_calibration_loss(params, [student], teacher).mean()

    @jax.jit
    def train(params):
        def step(params, _):
            gradients = jax.grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients), None

        return jax.lax.scan(step, params, length=50)[0]

    params = train(initial_params)
    before, after = (
        alignment.cross_layer_weights(p, [student], teacher).mean(0)[0]
        for p in (initial_params, params)
    )
    assert after[1] > before[1] + 0.2 and after[1] > 0.6, (before, after)
    assert loss(params) < loss(initial_params) / 2


@pytest.mark.thorough
def test_aligned_states_trains_projector_and_queries():
    params, student, teacher = draw_aligned()
    loss, gradients = jax.value_and_grad(
        lambda p: alignment.aligned_states_loss(p, student, teacher).mean()
    )(params)
    assert all(jnp.abs(gradient).max() > 1e-4 for gradient in jax.tree.leaves(gradients))
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    assert alignment.aligned_states_loss(stepped, student, teacher).mean() < loss


def test_parameters_differ():
    params, _, _ = draw()
    kernels = [array for array in jax.tree.leaves(params) if array.ndim == 2]
    first_entries = [float(kernel[0, 0]) for kernel in kernels]
    assert len(first_entries) == len(set(first_entries)) == 2 + 3 + 6


def test_wrong_layers_raise():
    params, student, teacher = draw()
    for function in (alignment.semantic_calibration_loss, alignment.cross_layer_weights):
        with pytest.raises(ValueError, match="parameters are for 2 student layers, got 1"):
            function(params, student[:1], teacher)
        with pytest.raises(ValueError, match="parameters are for 3 teacher layers, got 4"):
            function(params, student, teacher + teacher[:1])
        with pytest.raises(ValueError, match=r"teacher_states\[0\] .* must have 4 features"):
            function(params, student, [teacher[1], teacher[0], teacher[2]])
        with pytest.raises(ValueError, match="all layers must be maps .* of one B"):
            function(params, student, [teacher[0], teacher[1][:1], teacher[2]])
        with pytest.raises(ValueError, match="all layers must be maps"):
            function(params, student, [teacher[0], teacher[1][:, 0], teacher[2]])
        with pytest.raises(
            TypeError, match=r"student_states\[1\] must be floating-point, got int32"
        ):
            function(params, [student[0], student[1].astype(jnp.int32)], teacher)
    with pytest.raises(ValueError, match="at least one layer"):
        alignment.init_semantic_calibration(jax.random.key(0), [3], [], features=4)


def test_wrong_states_raise():
    params, student, teacher = draw_aligned()
    for wrong in ((student[:, 0], teacher), (student[:4], teacher), (student, teacher[None])):
        with pytest.raises(ValueError, match=r"must be \[B, layers, D\] of the same examples"):
            alignment.aligned_states_loss(params, *wrong)
    for wrong in ((teacher, teacher), (student, student)):
        with pytest.raises(ValueError, match="for states of 3 and 4 features"):
            alignment.aligned_states_loss(params, *wrong)
