"""Tests losses on relations: hand-worked values, float64 references, invariances, limits."""

from functools import partial
from math import exp, factorial, log

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxkd.losses import relations

TEMPERATURE = 2.0


def draw(seed=0, student=5, teacher=5, batch=6):
    keys = jax.random.split(jax.random.key(seed))
    return jax.random.normal(keys[0], (batch, student)), jax.random.normal(
        keys[1], (batch, teacher)
    )


def reference_similarity_preserving(student, teacher):
    total = 0.0
    for i in range(len(student)):
        rows = [np.array([x[i] @ x[j] for j in range(len(x))]) for x in (student, teacher)]
        total += sum(
            (rows[0] / np.sqrt((rows[0] ** 2).sum()) - rows[1] / np.sqrt((rows[1] ** 2).sum())) ** 2
        )
    return total / len(student) ** 2


def reference_huber(gap):
    return 0.5 * gap**2 if abs(gap) <= 1 else abs(gap) - 0.5


def reference_relational_distance(student, teacher):
    batch = range(len(student))
    distances = []
    for x in (student, teacher):
        table = np.array([[np.sqrt(((x[i] - x[j]) ** 2).sum()) for j in batch] for i in batch])
        distances.append(table / np.mean([table[i, j] for i in batch for j in batch if i != j]))
    return np.mean(
        [reference_huber(distances[0][i, j] - distances[1][i, j]) for i in batch for j in batch]
    )


def reference_relational_angle(student, teacher):
    def cosine(x, i, v, k):
        if v in (i, k):
            return 0.0
        return (
            (x[i] - x[v])
            @ (x[k] - x[v])
            / np.linalg.norm(x[i] - x[v])
            / np.linalg.norm(x[k] - x[v])
        )

    batch = range(len(student))
    triplets = [(i, v, k) for i in batch for v in batch for k in batch]
    return np.mean([reference_huber(cosine(student, *t) - cosine(teacher, *t)) for t in triplets])


def reference_probabilistic_transfer(student, teacher):
    def neighbours(x, i):
        cosines = [
            x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])
            for j in range(len(x))
            if j != i
        ]
        return (1 + np.array(cosines)) / 2 / sum((1 + c) / 2 for c in cosines)

    pairs = [(neighbours(teacher, i), neighbours(student, i)) for i in range(len(student))]
    return sum((p * np.log(p / q)).sum() for p, q in pairs) / len(student)


def reference_correlation_congruence(student, teacher):
    def kernel(x, y):
        cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
        return sum(exp(-0.8) * 0.8**p / factorial(p) * cosine**p for p in range(3))

    batch = range(len(student))
    gaps = [
        kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])
        for i in batch
        for j in batch
    ]
    return np.mean(np.square(gaps))


def reference_linear_cka(student, teacher):
    """The form in feature space, with no b × b matrix."""
    x, y = student - student.mean(0), teacher - teacher.mean(0)
    return 1 - np.sum((y.T @ x) ** 2) / np.sqrt(np.sum((x.T @ x) ** 2)) / np.sqrt(
        np.sum((y.T @ y) ** 2)
    )


def reference_softmax(logits):
    exponentials = np.exp(logits / TEMPERATURE - (logits / TEMPERATURE).max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def reference_dist_intra(student, teacher):
    p, q = reference_softmax(student), reference_softmax(teacher)
    return TEMPERATURE**2 * np.mean(
        [1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(p.shape[1])]
    )


def reference_dist_inter(student, teacher):
    p, q = reference_softmax(student), reference_softmax(teacher)
    return TEMPERATURE**2 * np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(len(p))])


dist_inter = partial(relations.dist_inter_loss, temperature=TEMPERATURE)
dist_intra = partial(relations.dist_intra_loss, temperature=TEMPERATURE)
FEATURE_LOSSES = {
    "similarity_preserving": (
        relations.similarity_preserving_loss,
        reference_similarity_preserving,
    ),
    "relational_distance": (relations.relational_distance_loss, reference_relational_distance),
    "relational_angle": (relations.relational_angle_loss, reference_relational_angle),
    "probabilistic_transfer": (
        relations.probabilistic_transfer_loss,
        reference_probabilistic_transfer,
    ),
    "correlation_congruence": (
        relations.correlation_congruence_loss,
        reference_correlation_congruence,
    ),
    "linear_cka": (relations.linear_cka_loss, reference_linear_cka),
}
BATCH_LOSSES = FEATURE_LOSSES | {"dist_intra": (dist_intra, reference_dist_intra)}
ALL_LOSSES = BATCH_LOSSES | {"dist_inter": (dist_inter, reference_dist_inter)}


def parametrize_losses(table):
    return pytest.mark.parametrize(("loss", "reference"), table.values(), ids=table)


def summed(loss, *arguments, **options):
    return jax.value_and_grad(lambda s: loss(s, *arguments, **options).sum())


def test_similarity_preserving_worked_by_hand():
    # Student rows (1, 1) and (1, 2), teacher rows (1, 1) twice: (1/2) 2 (1/√2 − 1/√2)² and
    # (1/2) ((1/√5 − 1/√2)² + (2/√5 − 1/√2)²) = (1/2) (2 − 6/√10).
    student, teacher = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [1.0]])
    values = relations.similarity_preserving_loss(student, teacher)
    np.testing.assert_allclose(values, [0, 1 - 3 / np.sqrt(10)], atol=1e-6)


def test_rows_have_l2_norm_1():
    """With L1 norms the second row would be (1/3, 2/3) − (1/2, 1/2), whose half square is 1/36."""
    student, teacher = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[1.0], [1.0]])
    assert relations.similarity_preserving_loss(student, teacher)[1] > 1.5 / 36


def test_relational_distance_worked_by_hand():
    # Distances 1, 2, 1 and 6, 6, 0 of the pairs 01, 02, 12; both relative to their mean, 4/3 and 4.
    student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [6.0], [6.0]])
    expected = np.array([0.5 * 0.75**2 + 0, 0.5 * 0.75**2 + 0.5 * 0.75**2, 0 + 0.5 * 0.75**2]) / 3
    np.testing.assert_allclose(
        relations.relational_distance_loss(student, teacher), expected, rtol=1e-6
    )
    # Beyond 1 the loss is linear: distances 0, 9, 9 relative to 6 against 3, 3, 0 relative to 2
    # differ by 3/2, 0, 3/2.
    student, teacher = jnp.array([[0.0], [0.0], [9.0]]), jnp.array([[0.0], [3.0], [3.0]])
    np.testing.assert_allclose(
        relations.relational_distance_loss(student, teacher), np.array([1, 2, 1]) / 3, rtol=1e-6
    )


def test_relational_angle_worked_by_hand():
    # At the first vertex 90° against 0°: the cosines differ by 1 for (1, 2) and (2, 1), a Huber
    # loss of 1/2 each. At the second 45° against 180° differ by 1/√2 + 1 > 1, and at the third 45°
    # against 0° by 1 − 1/√2.
    student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = jnp.array([[0.0], [1.0], [2.0]])
    expected = 2 * np.array([0.5, 1 / np.sqrt(2) + 1 - 0.5, 0.5 * (1 - 1 / np.sqrt(2)) ** 2]) / 9
    np.testing.assert_allclose(
        relations.relational_angle_loss(student, teacher), expected, rtol=1e-5
    )


def test_probabilistic_transfer_worked_by_hand():
    # Similarities 1/2, 1, 1/2 of the student's pairs 01, 02, 12 and 1/2, 1/2, 1 of the teacher's.
    student = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    teacher = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    first = 0.5 * log(0.5 / (1 / 3)) + 0.5 * log(0.5 / (2 / 3))
    second = 1 / 3 * log(2 / 3) + 2 / 3 * log(4 / 3)
    third = 1 / 3 * log(1 / 2) + 2 / 3 * log(2)
    values = relations.probabilistic_transfer_loss(student, teacher)
    np.testing.assert_allclose(values, [first, second, third], rtol=1e-5)


def test_correlation_congruence_worked_by_hand():
    # One pair of cosine 0 against 1: the powers 1 and 2 differ by e^−0.8 (0.8 + 0.32), in one of
    # two columns.
    student, teacher = jnp.eye(2), jnp.ones((2, 3))
    expected = np.full(2, (np.exp(-0.8) * 1.12) ** 2 / 2)
    np.testing.assert_allclose(
        relations.correlation_congruence_loss(student, teacher), expected, rtol=1e-5
    )
    # With one power and γ = 1/2 the difference is 1/e.
    values = relations.correlation_congruence_loss(student, teacher, gamma=0.5, order=1)
    np.testing.assert_allclose(values, np.full(2, np.exp(-2) / 2), rtol=1e-5)


def test_linear_cka_worked_by_hand():
    # Centred: (−1, 0, 1) and (−2, 1, 1) / 3, with the correlation √3 / 2; its square is the CKA of
    # single features. K / ‖K‖ at (0, 0), (0, 1), (0, 2) is 1/2, 0, −1/2, and L / ‖L‖ is 2/3, −1/3,
    # −1/3: (3/2) (1/36 + 4/36 + 1/36).
    student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [1.0], [1.0]])
    np.testing.assert_allclose(relations.linear_cka(student, teacher), 0.75, rtol=1e-6)
    np.testing.assert_allclose(relations.linear_cka_loss(student, teacher)[0], 0.25, rtol=1e-5)


def test_dist_worked_by_hand():
    # Probabilities (1, 2, 3) / 6 against (1, 3, 2) / 6 have the correlation 1/2, as a row and as a
    # column.
    student, teacher = jnp.array([[1.0, 2.0, 3.0]]) / 6, jnp.array([[1.0, 3.0, 2.0]]) / 6
    inter = relations.dist_inter_loss(jnp.log(student), jnp.log(teacher), temperature=1.0)
    np.testing.assert_allclose(inter, [0.5], rtol=1e-5)
    # Twice the logits at T = 2 are the same probabilities; the factor T² stays.
    inter = relations.dist_inter_loss(2 * jnp.log(student), 2 * jnp.log(teacher), temperature=2.0)
    np.testing.assert_allclose(inter, [2.0], rtol=1e-5)
    # In each of both classes, centred and scaled: (−1, 0, 1) / √2 and (−1, 1, 0) / √2, so
    # 3/2 (0, 1/2, 1/2).
    columns = [jnp.log(jnp.concatenate([p.T, 1 - p.T], 1)) for p in (student, teacher)]
    intra = relations.dist_intra_loss(*columns, temperature=1.0)
    np.testing.assert_allclose(intra, [0, 0.75, 0.75], atol=1e-5)


@pytest.mark.thorough
@parametrize_losses(ALL_LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_mean_equals_the_batch_value_of_a_float64_reference(loss, reference, seed):
    student, teacher = draw(seed)
    values = loss(student, teacher)
    chex.assert_shape(values, (6,))
    expected = reference(np.asarray(student, np.float64), np.asarray(teacher, np.float64))
    np.testing.assert_allclose(values.mean(), expected, rtol=2e-5)
    assert (values >= 0).all()


@pytest.mark.thorough
@parametrize_losses(FEATURE_LOSSES)
def test_feature_sizes_and_ranks_may_differ(loss, reference):
    student, teacher = draw(student=5, teacher=12)
    maps = teacher.reshape(6, 2, 2, 3)
    expected = reference(np.asarray(student, np.float64), np.asarray(teacher, np.float64))
    np.testing.assert_allclose(loss(student, maps).mean(), expected, rtol=2e-5)


@parametrize_losses(FEATURE_LOSSES)
def test_scale_and_rotation_of_either_side_change_nothing(loss, reference):
    student, teacher = draw()
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(7), (5, 5)))[0]
    expected = loss(student, teacher)
    np.testing.assert_allclose(
        loss(4 * student @ rotation, teacher), expected, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        loss(student, 0.1 * teacher @ rotation), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", ["relational_distance", "relational_angle", "linear_cka"])
def test_shift_of_all_examples_changes_nothing(name):
    loss, _ = FEATURE_LOSSES[name]
    student, teacher = draw()
    np.testing.assert_allclose(
        loss(student + 3, teacher - 2), loss(student, teacher), rtol=1e-4, atol=1e-6
    )


@parametrize_losses(ALL_LOSSES)
def test_values_are_permuted_with_the_examples(loss, reference):
    student, teacher = draw()
    order = jnp.array([3, 0, 5, 1, 4, 2])
    np.testing.assert_allclose(
        loss(student[order], teacher[order]), loss(student, teacher)[order], rtol=1e-4, atol=1e-6
    )


@pytest.mark.thorough
@parametrize_losses(ALL_LOSSES)
def test_zero_with_zero_gradient_where_equal(loss, reference):
    student, _ = draw()
    value, gradient = summed(loss, student)(student)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.thorough
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scales=st.tuples(*2 * [st.floats(1e-4, 1e4)]),
    duplicates=st.integers(0, 6),
    name=st.sampled_from(list(ALL_LOSSES)),
)
def test_values_and_gradients_are_finite_at_any_scale(seed, scales, duplicates, name):
    loss, _ = ALL_LOSSES[name]
    student, teacher = draw(seed)
    student = scales[0] * student.at[:duplicates].set(student[0])
    value, gradient = summed(loss, scales[1] * teacher)(student)
    chex.assert_tree_all_finite((value, gradient))
    assert value >= -1e-6


ZEROS, CONSTANT = jnp.zeros((6, 5)), jnp.full((6, 5), 0.1)
# The rounded mean of 0.1 is not 0.1: centring leaves rounding errors, which a normalisation would
# scale up.
DEGENERATE = {
    "zeros": ZEROS,
    "constant": CONSTANT,
    "one_zero": draw()[0].at[2].set(0),
    "duplicates": draw()[0].at[1].set(draw()[0][0]).at[5].set(draw()[0][4]),
}


@parametrize_losses(ALL_LOSSES)
@pytest.mark.parametrize("student", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_inputs_are_bounded(loss, reference, student):
    for teacher in (draw()[1], student):
        value, gradient = summed(loss, teacher)(student)
        chex.assert_tree_all_finite((value, gradient))
        assert jnp.abs(gradient).max() < 100
        value, gradient = summed(lambda t, s, loss=loss: loss(s, t), student)(teacher)
        chex.assert_tree_all_finite((value, gradient))


@pytest.mark.parametrize("name", ["linear_cka", "dist_intra", "dist_inter"])
@pytest.mark.parametrize("student", [ZEROS, CONSTANT], ids=["zeros", "constant"])
def test_no_correlation_without_variation(name, student):
    loss, _ = ALL_LOSSES[name]
    value, gradient = jax.value_and_grad(lambda s: loss(s, draw()[1]).mean())(student)
    assert value == (1 if name == "linear_cka" else TEMPERATURE**2)
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(student))


def test_all_equal_examples_have_relative_distances_of_zero():
    _, teacher = draw()
    table = np.linalg.norm(np.asarray(teacher)[:, None] - np.asarray(teacher)[None], axis=-1)
    table /= table.sum() / 30
    expected = np.mean([[reference_huber(x) for x in row] for row in table])
    np.testing.assert_allclose(
        relations.relational_distance_loss(CONSTANT, teacher).mean(), expected, rtol=1e-5
    )


def test_relative_distances_are_continuous_as_two_examples_become_equal():
    """A mean over the positive distances only would jump as a pair drops out of it."""
    student, teacher = draw()
    equal = student.at[1].set(student[0])
    close = student.at[1].set(student[0] + 1e-4)
    values = [relations.relational_distance_loss(s, teacher) for s in (equal, close)]
    np.testing.assert_allclose(*values, rtol=1e-3)


@parametrize_losses(BATCH_LOSSES)
def test_single_example(loss, reference):
    student, teacher = draw(batch=1)
    value, gradient = jax.jit(summed(loss, teacher))(student)
    expected = {relations.linear_cka_loss: 1.0, dist_intra: TEMPERATURE**2}.get(loss, 0.0)
    np.testing.assert_allclose(value, expected, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_opposite_directions_stay_finite():
    """A similarity of 0 on the student's side would make the divergence infinite."""
    student, teacher = jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), jnp.ones((3, 1))
    value, gradient = summed(relations.probabilistic_transfer_loss, teacher)(student)
    chex.assert_tree_all_finite((value, gradient))
    # For each of the first two the other has the probability 1/2, against 1e-7 of 1/2.
    np.testing.assert_allclose(
        relations.probabilistic_transfer_loss(student, teacher)[0],
        0.5 * log(0.5 / 2e-7) + 0.5 * log(0.5),
        rtol=1e-4,
    )


@pytest.mark.parametrize("loss", [dist_inter, dist_intra])
@pytest.mark.parametrize("size", [100.0, 172.0, 174.0, 1e4])
def test_extreme_logits_stay_finite(loss, size):
    """Near a difference of 87·T the reciprocals of the probabilities overflow in float32."""
    bumps = jnp.arange(6.0)[:, None] * jnp.array([[0.0, 1.0, 0.3, 0.7, 0.1]]) * 0.3
    student, teacher = bumps.at[:, 1].add(-size), -bumps.at[:, 2].add(size)
    value, gradient = summed(loss, teacher)(student)
    chex.assert_tree_all_finite((value, gradient))
    assert jnp.abs(gradient).max() < 100 * TEMPERATURE**2


@pytest.mark.parametrize("temperature", [1.0, 4.0, 40.0])
def test_gradient_is_finite_where_a_class_is_improbable(temperature):
    student, teacher = draw()
    loss = partial(relations.dist_intra_loss, temperature=temperature)
    for gap in (86.0, 87.0, 87.3):
        chex.assert_tree_all_finite(summed(loss, teacher)(student.at[:, 2].add(-gap * temperature)))


def test_correlation_of_an_improbable_class_counts_in_full():
    """With 1e-8 added to the product of the lengths the value would be 1 instead of 0."""
    logits = jnp.zeros((6, 2)).at[:, 0].set(-20 + jnp.arange(6.0))
    np.testing.assert_allclose(
        relations.dist_intra_loss(logits, logits + 1, temperature=1.0), 0, atol=1e-6
    )
    np.testing.assert_allclose(
        relations.dist_intra_loss(logits, logits - logits[::-1], temperature=1.0).mean() > 0.1, 1
    )


def test_large_temperature_is_the_correlation_of_logits():
    student, teacher = (np.asarray(z, np.float64) for z in draw())
    inter = (
        relations.dist_inter_loss(jnp.asarray(student), jnp.asarray(teacher), temperature=100.0)
        / 100**2
    )
    np.testing.assert_allclose(
        inter, [1 - np.corrcoef(*rows)[0, 1] for rows in zip(student, teacher, strict=True)], 0.1
    )
    centred = student - student.mean(-1, keepdims=True), teacher - teacher.mean(-1, keepdims=True)
    expected = np.mean(
        [
            1 - np.corrcoef(*columns)[0, 1]
            for columns in zip(centred[0].T, centred[1].T, strict=True)
        ]
    )
    intra = (
        relations.dist_intra_loss(jnp.asarray(student), jnp.asarray(teacher), temperature=100.0)
        / 100**2
    )
    np.testing.assert_allclose(intra.mean(), expected, rtol=0.1)


@parametrize_losses(ALL_LOSSES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_widened_first(loss, reference, dtype):
    narrow = [x.astype(dtype) for x in draw()]
    values = loss(*narrow)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(
        values.mean(), reference(*(np.asarray(x, np.float64) for x in narrow)), rtol=1e-4
    )
    assert summed(loss, narrow[1])(narrow[0])[1].dtype == dtype


@pytest.mark.thorough
@parametrize_losses(BATCH_LOSSES)
def test_examples_that_do_not_count_equal_sliced_ones(loss, reference):
    student, teacher = draw(batch=8)
    where = np.array([False, True, True, False, True, True, True, True])
    padded = [jnp.where(where[:, None], x, jnp.nan) for x in (student, teacher)]

    def values_and_gradients(student, teacher, where=None):
        values, pull = jax.vjp(partial(loss, where=where), student, teacher)
        return values, *pull(jnp.ones_like(values))

    masked = jax.jit(values_and_gradients)(*padded, where)
    sliced = values_and_gradients(student[where], teacher[where])
    for result, expected in zip(masked, sliced, strict=True):
        np.testing.assert_allclose(result[where], expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(result[~where], 0)


@parametrize_losses(BATCH_LOSSES)
def test_where_that_masks_everything_gives_zero(loss, reference):
    student, teacher = draw()
    value, gradient = summed(loss, teacher, where=jnp.zeros(6, bool))(student * jnp.nan)
    assert value == 0
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(student))


@parametrize_losses(ALL_LOSSES)
def test_gradients_are_those_of_finite_differences(loss, reference):
    check_grads(loss, draw(3), order=1, modes=("rev",), eps=1e-2, atol=2e-2, rtol=2e-2)


def test_linear_cka_is_one_minus_the_mean_of_its_loss():
    student, teacher = draw(teacher=7)
    where = jnp.array([True, True, False, True, True, True])
    for s in (student, CONSTANT):
        for mask in (None, where):
            values = relations.linear_cka_loss(s, teacher, where=mask)
            mean = values.sum() / (6 if mask is None else 5)
            np.testing.assert_allclose(
                relations.linear_cka(s, teacher, where=mask), 1 - mean, atol=1e-6
            )


def test_linear_cka_is_one_for_equal_features_and_near_zero_for_many_independent_ones():
    student, teacher = draw(student=3, teacher=3, batch=400)
    assert 1 - 1e-5 < relations.linear_cka(student, 3 * student[:, ::-1] + 1) <= 1
    assert 0 <= relations.linear_cka(student, teacher) < 0.05


def test_congruence_tends_to_the_gaussian_kernel():
    student, teacher = (np.asarray(x, np.float64) for x in draw())

    def kernel(x):
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return np.exp(-0.4 * ((x[:, None] - x[None]) ** 2).sum(-1))

    expected = np.mean((kernel(student) - kernel(teacher)) ** 2)
    values = relations.correlation_congruence_loss(
        jnp.asarray(student), jnp.asarray(teacher), order=9
    )
    np.testing.assert_allclose(values.mean(), expected, rtol=1e-4)


def test_traced_hyper_parameters():
    student, teacher = draw()
    expected = relations.correlation_congruence_loss(student, teacher, gamma=0.7)
    values = jax.jit(lambda g: relations.correlation_congruence_loss(student, teacher, gamma=g))(
        0.7
    )
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for loss in (relations.dist_inter_loss, relations.dist_intra_loss):
        values = jax.jit(lambda t, loss=loss: loss(student, teacher, temperature=t))(3.0)
        np.testing.assert_allclose(
            values, loss(student, teacher, temperature=3.0), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "loss", [*(loss for loss, _ in FEATURE_LOSSES.values()), relations.linear_cka]
)
def test_wrong_shapes_and_dtypes_raise(loss):
    student, teacher = draw()
    with pytest.raises(
        ValueError,
        match=r"student_features \(6, 5\) and teacher_features \(5, 5\) .* same number of examples",
    ):
        loss(student, teacher[:5])
    with pytest.raises(ValueError, match="same number of examples"):
        loss(student[0, 0], teacher[0, 0])
    with pytest.raises(ValueError, match="one entry for each example"):
        loss(student, teacher, where=jnp.ones(5, bool))
    with pytest.raises(TypeError, match="take mask != 0"):
        loss(student, teacher, where=jnp.ones(6))
    with pytest.raises(TypeError, match="teacher_features must be floating-point"):
        loss(student, jnp.ones((6, 5), int))


@pytest.mark.parametrize("loss", [relations.dist_inter_loss, relations.dist_intra_loss])
def test_wrong_logits_raise(loss):
    student, teacher = draw()
    for wrong in (teacher[:, :4], teacher[:5], teacher[None]):
        with pytest.raises(ValueError, match=r"must have the same shape \[B, C\]"):
            loss(student, wrong, temperature=1.0)
    with pytest.raises(ValueError, match=r"must have the same shape \[B, C\]"):
        loss(student[None], teacher[None], temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(student, teacher, temperature=0.0)
    with pytest.raises(TypeError, match="teacher_logits must be floating-point"):
        loss(student, jnp.ones((6, 5), int), temperature=1.0)


def test_wrong_kernels_raise():
    student, teacher = draw()
    with pytest.raises(ValueError, match="order is the highest power"):
        relations.correlation_congruence_loss(student, teacher, order=0)
    for gamma in (0.0, -0.4):
        with pytest.raises(ValueError, match="gamma must be positive"):
            relations.correlation_congruence_loss(student, teacher, gamma=gamma)
    with pytest.raises(ValueError, match="gamma must be a scalar"):
        relations.correlation_congruence_loss(student, teacher, gamma=jnp.ones(2))
