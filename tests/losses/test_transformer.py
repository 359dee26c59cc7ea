"""Tests transformer losses: hand-worked values, float64 references, masks, maps of layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxkd.losses import transformer

SHAPES = {
    "hidden_cosine": (2, 5, 4),
    "hidden_mse": (2, 5, 4),
    "attention_map": (2, 3, 5, 5),
    "attention_divergence": (2, 3, 5, 5),
    "value_relation": (2, 5, 3, 4),
}


def draw(name, seed=0):
    student, teacher = jax.random.normal(jax.random.key(seed), (2, *SHAPES[name]))
    return (
        (jax.nn.softmax(student), jax.nn.softmax(teacher))
        if name == "attention_divergence"
        else (student, teacher)
    )


def reference_hidden_cosine(student, teacher):
    return 1 - (student * teacher).sum(-1) / np.linalg.norm(student, axis=-1) / np.linalg.norm(
        teacher, axis=-1
    )


def reference_hidden_mse(student, teacher):
    return ((student - teacher) ** 2).sum(-1) / student.shape[-1]


def reference_attention_map(student, teacher):
    batch, heads = student.shape[:2]
    return [
        np.mean([np.mean((student[b, h] - teacher[b, h]) ** 2) for h in range(heads)])
        for b in range(batch)
    ]


def reference_attention_divergence(student, teacher):
    batch, heads, queries, _ = student.shape
    value = np.zeros(batch)
    for b, h, n in np.ndindex(batch, heads, queries):
        value[b] += (teacher[b, h, n] * np.log(teacher[b, h, n] / student[b, h, n])).sum() / (
            heads * queries
        )
    return value


def reference_value_relation(student, teacher):
    def relation(values, b, h):
        scores = values[b, :, h] @ values[b, :, h].T / np.sqrt(values.shape[-1])
        exponentials = np.exp(scores - scores.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    batch, _, heads, _ = student.shape
    return reference_attention_divergence(
        *[
            np.array([[relation(x, b, h) for h in range(heads)] for b in range(batch)])
            for x in (student, teacher)
        ]
    )


TABLE = {
    name: (name, getattr(transformer, f"{name}_loss"), globals()[f"reference_{name}"])
    for name in SHAPES
}
ALL_LOSSES = pytest.mark.parametrize(("name", "loss", "reference"), TABLE.values(), ids=TABLE)
# Padding at the end and in the middle of a sequence.
TOKEN_MASK = jnp.array([[True, True, False, True, False], [True, True, True, True, False]])


def summed(loss, *arguments, **options):
    return jax.value_and_grad(lambda s: loss(s, *arguments, **options).sum())


def test_hidden_losses_worked_by_hand():
    student, teacher = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[2.0, 0.0], [-5.0, 0.0]])
    np.testing.assert_allclose(
        transformer.hidden_cosine_loss(student, teacher), [1 - 3 / 5, 2], rtol=1e-6
    )
    np.testing.assert_allclose(
        transformer.hidden_mse_loss(student, teacher), [(1 + 16) / 2, 36 / 2], rtol=1e-6
    )


def test_attention_map_worked_by_hand():
    # Two heads, one query, two keys: squares 1, 0, 4, 9.
    student = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    teacher = jnp.array([[[2.0, 2.0]], [[5.0, 1.0]]])
    np.testing.assert_allclose(transformer.attention_map_loss(student, teacher), 14 / 4)
    where = jnp.array([True, False])
    np.testing.assert_allclose(
        transformer.attention_map_loss(student, teacher, where=where), (1 + 4) / 2
    )


def test_attention_divergence_worked_by_hand():
    # The divergences of the queries are log 2 and 1/4 log (1/2) + 3/4 log (3/2).
    student, teacher = jnp.full((1, 2, 2), 0.5), jnp.array([[[1.0, 0.0], [0.25, 0.75]]])
    second = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    value = transformer.attention_divergence_loss(student, teacher)
    np.testing.assert_allclose(value, (np.log(2) + second) / 2, rtol=1e-6)
    value = transformer.attention_divergence_loss(student, teacher, where=jnp.array([False, True]))
    np.testing.assert_allclose(value, second, rtol=1e-6)


def test_value_relation_worked_by_hand():
    # d = 4, so that √d = 2. In the first row the student's product 2 / 2 = log e gives odds e:1,
    # and the teacher's 2 log 9 / 2 odds 9:1; the second row is uniform.
    student = jnp.zeros((2, 1, 4)).at[0, 0, 0].set(np.sqrt(2))
    teacher = jnp.zeros((2, 1, 4)).at[0, 0, 0].set(np.sqrt(2 * np.log(9)))
    p, q = np.array([9, 1]) / 10, np.array([np.e, 1]) / (np.e + 1)
    value = transformer.value_relation_loss(student, teacher)
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum() / 2, rtol=1e-5)


@ALL_LOSSES
@pytest.mark.parametrize("seed", [0, 1])
def test_values_equal_a_float64_reference(name, loss, reference, seed):
    student, teacher = draw(name, seed)
    expected = reference(np.asarray(student, np.float64), np.asarray(teacher, np.float64))
    values = loss(student, teacher)
    chex.assert_shape(values, np.shape(expected))
    np.testing.assert_allclose(values, expected, rtol=2e-5)


@pytest.mark.thorough
@ALL_LOSSES
def test_zero_with_zero_gradient_where_equal_and_positive_elsewhere(name, loss, reference):
    student, teacher = draw(name)
    assert (loss(student, teacher) > 0).all()
    value, gradient = summed(loss, student)(student)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    if name == "attention_divergence":
        # It is 0 along weights of sum 1: the gradient is the same for all keys.
        gradient -= gradient.mean(-1, keepdims=True)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@ALL_LOSSES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_widened_first(name, loss, reference, dtype):
    narrow = [x.astype(dtype) for x in draw(name)]
    values = loss(*narrow)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(
        values, reference(*(np.asarray(x, np.float64) for x in narrow)), rtol=1e-4, atol=1e-6
    )


@ALL_LOSSES
def test_gradients_are_those_of_finite_differences(name, loss, reference):
    check_grads(loss, draw(name, 3), order=1, modes=("rev",), eps=1e-3, atol=2e-2, rtol=2e-2)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scales=st.tuples(*2 * [st.floats(1e-4, 1e4)]),
    name=st.sampled_from(list(SHAPES)),
)
def test_values_and_gradients_are_finite_at_any_scale(seed, scales, name):
    _, loss, _ = TABLE[name]
    student, teacher = jax.random.normal(jax.random.key(seed), (2, *SHAPES[name]))
    if name == "attention_divergence":

        def function(s, t):
            return loss(jax.nn.softmax(s), jax.nn.softmax(t))
    else:
        function = loss
    value, gradient = summed(function, scales[1] * teacher)(scales[0] * student)
    chex.assert_tree_all_finite((value, gradient))
    assert value >= -1e-5


@pytest.mark.parametrize("name", ["hidden_cosine", "hidden_mse"])
def test_states_are_independent_examples(name):
    _, loss, _ = TABLE[name]
    student, teacher = draw(name)
    np.testing.assert_allclose(
        loss(student[1, 2], teacher[1, 2]), loss(student, teacher)[1, 2], rtol=1e-6
    )


def test_cosine_ignores_length_and_is_half_the_pkd_loss():
    student, teacher = draw("hidden_cosine")
    values = transformer.hidden_cosine_loss(student, teacher)
    np.testing.assert_allclose(
        transformer.hidden_cosine_loss(7 * student, 0.1 * teacher), values, rtol=1e-5
    )
    units = [
        x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in (np.asarray(student), np.asarray(teacher))
    ]
    np.testing.assert_allclose(2 * values, ((units[0] - units[1]) ** 2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(2 * values / 4, transformer.hidden_mse_loss(*units), rtol=1e-5)


def test_cosine_of_a_zero_vector_is_one_with_no_gradient():
    student, teacher = draw("hidden_cosine")
    zero = jnp.zeros_like(student)
    for pair in ((zero, teacher), (student, zero), (zero, zero)):
        np.testing.assert_array_equal(transformer.hidden_cosine_loss(*pair), 1)
        gradients = jax.grad(
            lambda s, t: transformer.hidden_cosine_loss(s, t).sum(), argnums=(0, 1)
        )(*pair)
        chex.assert_trees_all_equal(gradients, (zero, zero))


def test_heads_in_another_order_change_nothing():
    order = jnp.array([2, 0, 1])
    for name, axis in (("attention_map", 1), ("attention_divergence", 1), ("value_relation", 2)):
        _, loss, _ = TABLE[name]
        student, teacher = draw(name)
        permuted = [x.take(order, axis) for x in (student, teacher)]
        np.testing.assert_allclose(loss(*permuted), loss(student, teacher), rtol=1e-5)


@pytest.mark.parametrize("padding", [jnp.nan, -jnp.inf, 1e30])
def test_map_entries_that_do_not_count_equal_sliced_ones(padding):
    """The −inf of a masked score would otherwise turn the gradient into NaN."""
    student, teacher = draw("attention_map")
    where = jnp.array([True, True, True, False, False])[None, None, None]
    padded = [jnp.where(where, x, padding) for x in (student, teacher)]
    value, gradient = summed(transformer.attention_map_loss, padded[1], where=where)(padded[0])
    expected, sliced = summed(transformer.attention_map_loss, teacher[..., :3])(student[..., :3])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :3], sliced, rtol=1e-5)
    np.testing.assert_array_equal(gradient[..., 3:], 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["attention_divergence", "value_relation"])
@pytest.mark.parametrize("padding", [jnp.nan, jnp.inf])
def test_tokens_that_do_not_count_equal_sliced_ones(name, padding):
    _, loss, _ = TABLE[name]
    student, teacher = draw(name)
    keep = (
        TOKEN_MASK[:, :, None, None] if name == "value_relation" else TOKEN_MASK[:, None, :, None]
    )
    padded = [jnp.where(keep, x, padding) for x in (student, teacher)]
    values = loss(*padded, where=TOKEN_MASK)
    gradients = jax.grad(lambda s, t: loss(s, t, where=TOKEN_MASK).sum(), argnums=(0, 1))(*padded)
    for b in range(2):
        indices = np.flatnonzero(TOKEN_MASK[b])
        axis = 0 if name == "value_relation" else 1
        sliced = [x[b].take(indices, axis) for x in (student, teacher)]
        np.testing.assert_allclose(values[b], loss(*sliced), rtol=1e-5)
        expected = jax.grad(lambda s, t: loss(s, t).sum(), argnums=(0, 1))(*sliced)
        for gradient, expected_gradient in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(
                gradient[b].take(indices, axis), expected_gradient, rtol=1e-4, atol=1e-6
            )
            np.testing.assert_array_equal(jnp.where(keep[b], 0, gradient[b]), 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["attention_map", "attention_divergence", "value_relation"])
def test_where_that_masks_everything_gives_zero(name):
    _, loss, _ = TABLE[name]
    student, teacher = draw(name)
    where = jnp.zeros((1, 1) if name == "attention_map" else (2, 5), bool)
    value, gradient = summed(loss, teacher * jnp.nan, where=where)(student * jnp.nan)
    assert value == 0
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(student))


@pytest.mark.parametrize(
    "name", ["hidden_mse", "attention_map", "attention_divergence", "value_relation"]
)
def test_nan_that_counts_stays_nan(name):
    _, loss, _ = TABLE[name]
    student, teacher = draw(name)
    broken = jnp.nan * jnp.ones_like(student)
    assert jnp.isnan(loss(broken, teacher)).all() and jnp.isnan(loss(student, broken)).all()


def test_student_weights_of_zero_give_finite_values():
    student, teacher = jnp.array([[[0.0, 1.0, 0.0]]]), jnp.array([[[0.5, 0.5, 0.0]]])
    value, gradient = summed(transformer.attention_divergence_loss, teacher)(student)
    np.testing.assert_allclose(
        value, np.log(0.5) - 0.5 * np.log(np.finfo(np.float32).tiny), rtol=1e-6
    )
    np.testing.assert_array_equal(gradient, [[[0, -0.5, 0]]])
    gradient = jax.grad(lambda t: transformer.attention_divergence_loss(student, t))(teacher)
    chex.assert_tree_all_finite(gradient)


def test_constant_values_have_uniform_relations():
    _, teacher = draw("value_relation")
    value, gradient = summed(transformer.value_relation_loss, jnp.ones_like(teacher))(
        jnp.zeros_like(teacher)
    )
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_head_sizes_may_differ_and_a_rotation_of_a_head_changes_nothing():
    student, teacher = draw("value_relation")
    wider = jnp.concatenate([teacher, teacher, teacher, teacher], -1)
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(7), (16, 16)))[0]
    # The products are four times as large and √d twice: the relation scores double.
    expected = transformer.value_relation_loss(student, np.sqrt(2) * teacher)
    np.testing.assert_allclose(
        transformer.value_relation_loss(student, wider @ rotation), expected, rtol=1e-4
    )


def test_relation_heads_of_minilm2_are_a_reshape():
    student = jax.random.normal(jax.random.key(0), (2, 5, 3, 4)).reshape(2, 5, 2, -1)
    teacher = jax.random.normal(jax.random.key(1), (2, 5, 4, 8)).reshape(2, 5, 2, -1)
    chex.assert_shape(transformer.value_relation_loss(student, teacher), (2,))


def test_layer_maps_of_the_papers():
    assert transformer.uniform_layers(4, 12) == (2, 5, 8, 11)  # TinyBERT: 3, 6, 9, 12
    assert transformer.uniform_layers(6, 12) == (1, 3, 5, 7, 9, 11)
    assert transformer.skip_layers(6, 12) == (1, 3, 5, 7, 9)  # PKD: 2, 4, 6, 8, 10
    assert transformer.skip_layers(3, 12) == (3, 7)  # PKD: 4, 8
    assert transformer.last_layers(6, 12) == (6, 7, 8, 9, 10)  # PKD: 7 to 11
    assert transformer.last_layers(3, 12) == (9, 10)
    distilbert = 0, 2, 4, 7, 9, 11
    assert transformer.custom_layers(distilbert, 6, 12) == distilbert


@settings(max_examples=25, deadline=None)
@given(depths=st.integers(1, 48).flatmap(lambda t: st.tuples(st.integers(1, t), st.just(t))))
def test_layer_maps_increase_within_the_teacher(depths):
    student_layers, teacher_layers = depths
    for layers, size in (
        (transformer.uniform_layers(*depths), student_layers),
        (transformer.skip_layers(*depths), student_layers - 1),
        (transformer.last_layers(*depths), student_layers - 1),
    ):
        assert len(layers) == size
        assert sorted(set(layers)) == list(layers)
        assert not layers or 0 <= layers[0] <= layers[-1] < teacher_layers
        assert all(type(layer) is int for layer in layers)
    assert transformer.uniform_layers(*depths)[-1] == teacher_layers - 1


def test_layers_loss_is_the_mean_over_the_map():
    student = [jnp.full((2, 3), value) for value in (1.0, 2.0, 3.0)]
    teacher = [jnp.full((2, 3), value) for value in (0.0, 5.0, 0.0, 6.0)]
    # Layers 0 to 1 and 1 to 3: (1 − 5)² and (2 − 6)²; the third student layer is not used.
    value = transformer.layers_loss(transformer.hidden_mse_loss, student, teacher, layers=(1, 3))
    np.testing.assert_allclose(value, [16, 16])
    stacked = jnp.stack(student), jnp.stack(teacher)
    value = transformer.layers_loss(transformer.hidden_mse_loss, *stacked, layers=[1, 3, 2])
    np.testing.assert_allclose(value, np.full(2, (16 + 16 + 9) / 3), rtol=1e-6)


def test_layers_loss_accepts_any_loss():
    projection = 2 * jnp.eye(3)
    student, teacher = jnp.ones((1, 2, 3)), jnp.full((1, 2, 3), 5.0)

    def loss(s, t):
        return transformer.hidden_mse_loss(s @ projection, t)

    np.testing.assert_allclose(transformer.layers_loss(loss, student, teacher, layers=(0,)), [9, 9])


@ALL_LOSSES
def test_wrong_shapes_and_dtypes_raise(name, loss, reference):
    student, teacher = draw(name)
    with pytest.raises(
        ValueError,
        match=r"student_\w+ \(.*\) and teacher_\w+ \(.*\) must (both be|have the same shape)",
    ):
        loss(student, teacher[:1])
    with pytest.raises(TypeError, match="floating-point"):
        loss(student, jnp.ones(teacher.shape, int))
    hint = {
        "hidden_cosine": "project",
        "hidden_mse": "project",
        "value_relation": "one number of heads",
    }
    with pytest.raises(
        ValueError, match=hint.get(name, "average over the heads or choose among them")
    ):
        loss(student, jnp.concatenate([teacher, teacher], -2 if name == "value_relation" else -1))
    with pytest.raises(ValueError, match="must"):
        loss(student.reshape(-1)[:2] if "hidden" not in name else student[0, 0, 0], teacher)


def test_padding_mask_of_as_many_positions_as_examples_raises():
    maps = jnp.ones((4, 4, 4))
    with pytest.raises(ValueError, match=r"where \(4, 4\) lacks an axis of \(4, 4, 4\): write"):
        transformer.attention_map_loss(maps, maps, where=jnp.ones((4, 4), bool))


def test_wrong_masks_raise():
    for name in ("attention_map", "attention_divergence", "value_relation"):
        _, loss, _ = TABLE[name]
        arrays = draw(name)
        with pytest.raises(ValueError, match=r"where \(2, 4\) must"):
            loss(*arrays, where=jnp.ones((2, 4), bool))
        with pytest.raises(TypeError, match="take mask != 0"):
            loss(*arrays, where=jnp.ones((2, 5) if name != "attention_map" else 5, int))
    for name in ("attention_divergence", "value_relation"):
        with pytest.raises(ValueError, match="one entry for each token"):
            TABLE[name][1](*draw(name), where=jnp.ones(5, bool))


def test_wrong_layers_raise():
    for depths in ((0, 12), (13, 12)):
        for layer_map in (
            transformer.uniform_layers,
            transformer.skip_layers,
            transformer.last_layers,
        ):
            with pytest.raises(ValueError, match=f"got {depths[0]} of {depths[1]}"):
                layer_map(*depths)
    states = jnp.ones((2, 1, 3)), jnp.ones((4, 1, 3))
    for layers in ((), (0, 1, 2)):
        with pytest.raises(ValueError, match="1 to 2 student layers"):
            transformer.layers_loss(transformer.hidden_mse_loss, *states, layers=layers)
    for layers in ((0, 4), (-1, 2)):
        with pytest.raises(ValueError, match="counted from 0 and end at 3"):
            transformer.layers_loss(transformer.hidden_mse_loss, *states, layers=layers)
    with pytest.raises(TypeError):
        transformer.custom_layers((0.5, 1), 2, 4)
