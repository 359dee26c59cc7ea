"""Tests contrastive losses and the bank: hand-worked values, float64 references, limits, masks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxkd import losses
from jaxkd.losses import contrastive

LABELS = jnp.array([0, 1, 0, 2, 1, 0])


def draw(seed=0, shape=(6, 4)):
    return tuple(jax.random.normal(jax.random.key(seed), (2, *shape)))


def draw_bank(seed=0, num_examples=10, negatives=5, constants=(0.0, 0.0), batch=6):
    """Draws a bank, the indices of a batch and their negatives."""
    keys = jax.random.split(jax.random.key(seed), 3)
    bank = contrastive.init_bank(keys[0], num_examples, 4)
    bank = bank._replace(
        student_log_constant=jnp.array(constants[0]), teacher_log_constant=jnp.array(constants[1])
    )
    index = jax.random.permutation(keys[1], num_examples)[:batch]
    return (
        bank,
        index,
        contrastive.draw_negatives(keys[2], index, num_examples=num_examples, negatives=negatives),
    )


def unit(vectors):
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def critic(anchor, row, temperature, ratio, constant=1.0):
    score = np.exp(anchor @ row / temperature) / constant
    return score / (score + ratio)


def reference_loss(student, teacher, temperature, labels=None):
    student, teacher, values = unit(student), unit(teacher), []
    labels = range(len(student)) if labels is None else np.asarray(labels)
    for i, anchor in enumerate(student):
        negatives = [j for j in range(len(student)) if labels[j] != labels[i]]
        ratio = len(negatives) / len(student)
        value = -np.log(critic(anchor, teacher[i], temperature, ratio))
        values.append(
            value
            - sum(np.log(1 - critic(anchor, teacher[j], temperature, ratio)) for j in negatives)
        )
    return np.array(values)


def reference_bank_loss(bank, student, teacher, index, negatives, temperature):
    values = np.zeros(len(index))
    for anchors, rows, log_constant in (
        (unit(student), unit(bank.teacher), bank.student_log_constant),
        (unit(teacher), unit(bank.student), bank.teacher_log_constant),
    ):
        options = temperature, negatives.shape[1] / len(rows), np.exp(float(log_constant))
        for b, anchor in enumerate(anchors):
            values[b] -= np.log(critic(anchor, rows[index[b]], *options))
            values[b] -= sum(np.log(1 - critic(anchor, rows[j], *options)) for j in negatives[b])
    return values


def in_batch(student, teacher, temperature=0.5, where=None, labels=None):
    return contrastive.contrastive_loss(
        student, teacher, temperature=temperature, where=where, labels=labels
    )


def by_label(student, teacher, temperature=0.5, where=None):
    return in_batch(student, teacher, temperature, where, LABELS[: len(student)])


def with_bank(student, teacher, temperature=0.5, where=None):
    bank, index, negatives = draw_bank(constants=(1.0, 2.0), batch=len(student))
    return contrastive.contrastive_bank_loss(
        bank, student, teacher, index, negatives, temperature=temperature, where=where
    )


LOSSES = pytest.mark.parametrize(
    "loss", [in_batch, by_label, with_bank], ids=lambda loss: loss.__name__
)


def value_and_gradients(loss, student, teacher, **options):
    def total(student, teacher):
        values = loss(student, teacher, **options)
        return values.sum(), values

    (_, values), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        student, teacher
    )
    return values, gradients


def test_values_worked_by_hand():
    # Three examples along the axes, τ = 1 / log 2: scores 2 for equal ones, 1 at right angles, and
    # N / M = 2 / 3.
    # h = 2 / (2 + 2/3) = 3/4 for the positive and 1 / (1 + 2/3) = 3/5 for both negatives.
    axes, temperature = jnp.eye(3), 1 / np.log(2)
    value = contrastive.contrastive_loss(axes, 5 * axes, temperature=temperature)
    np.testing.assert_allclose(value, [-np.log(3 / 4) - 2 * np.log(2 / 5)] * 3, rtol=1e-6)
    # With labels the third has two negatives, N / M = 2 / 3, and the others one, N / M = 1 / 3:
    # 2 / (2 + 1/3) and 1 / (1 + 1/3).
    value = contrastive.contrastive_loss(
        axes, axes, temperature=temperature, labels=jnp.array([4, 4, 7])
    )
    small = -np.log(6 / 7) - np.log(1 / 4)
    np.testing.assert_allclose(value, [small, small, -np.log(3 / 4) - 2 * np.log(2 / 5)], rtol=1e-6)
    # A bank of the same axes, twice the same negative, both anchors.
    zero = jnp.zeros(())
    bank = contrastive.ContrastiveBank(axes, axes, zero, zero)
    arguments = axes[:1], axes[:1], jnp.array([0]), jnp.array([[1, 1]])
    value = contrastive.contrastive_bank_loss(bank, *arguments, temperature=temperature)
    np.testing.assert_allclose(value, 2 * np.array([-np.log(3 / 4) - 2 * np.log(2 / 5)]), rtol=1e-6)
    # Z = M mean e^{s·t/τ} = 3 (2 + 1 + 1) / 3 = 4: now h = (2/4) / (2/4 + 2/3) = 3/7 and
    # (1/4) / (1/4 + 2/3) = 3/11.
    bank = contrastive.calibrate_bank(bank, *arguments, temperature=temperature)
    np.testing.assert_allclose(jnp.exp(jnp.array(bank[2:])), [4, 4], rtol=1e-6)
    value = contrastive.contrastive_bank_loss(bank, *arguments, temperature=temperature)
    np.testing.assert_allclose(
        value, 2 * np.array([-np.log(3 / 7) - 2 * np.log(8 / 11)]), rtol=1e-6
    )


@pytest.mark.thorough
@pytest.mark.parametrize("temperature", [0.1, 0.5, 10.0])
def test_equal_float64_references(temperature):
    student, teacher = draw()
    value = in_batch(student, teacher, temperature)
    chex.assert_shape(value, (6,))
    np.testing.assert_allclose(value, reference_loss(student, teacher, temperature), rtol=1e-5)
    value = by_label(student, teacher, temperature)
    np.testing.assert_allclose(
        value, reference_loss(student, teacher, temperature, LABELS), rtol=1e-5
    )
    bank, index, negatives = draw_bank(constants=(1.0, 2.0))
    expected = reference_bank_loss(bank, student, teacher, index, negatives, temperature)
    np.testing.assert_allclose(with_bank(student, teacher, temperature), expected, rtol=1e-5)


def test_anchoring_at_the_teacher_has_the_same_mean():
    student, teacher = draw()
    by_student, by_teacher = in_batch(student, teacher), in_batch(teacher, student)
    np.testing.assert_allclose(by_student.mean(), by_teacher.mean(), rtol=1e-5)
    assert (np.abs(by_student - by_teacher) > 1e-3).any()


def test_distinct_labels_equal_no_labels():
    student, teacher = draw()
    labelled = in_batch(student, teacher, labels=jnp.arange(6) * 3)
    np.testing.assert_allclose(labelled, in_batch(student, teacher), rtol=1e-6)


@LOSSES
def test_scale_and_rotation_do_not_matter(loss):
    student, teacher = draw()
    scales = jnp.array([1e-4, 0.1, 1.0, 3.0, 1e2, 1e4])[:, None]
    np.testing.assert_allclose(loss(student * scales, teacher), loss(student, teacher), rtol=1e-4)
    if loss is not with_bank:
        rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(5), (4, 4)))[0]
        np.testing.assert_allclose(
            loss(student @ rotation, teacher @ rotation), loss(student, teacher), rtol=1e-4
        )


@given(seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_positive_and_the_same_in_any_order(seed):
    student, teacher = draw(seed)
    order = jax.random.permutation(jax.random.key(seed), 6)
    values = contrastive.contrastive_loss(student, teacher, temperature=0.1, labels=LABELS)
    assert (values > 0).all()
    shuffled = contrastive.contrastive_loss(
        student[order], teacher[order], temperature=0.1, labels=LABELS[order]
    )
    np.testing.assert_allclose(shuffled, values[order], rtol=1e-4)


def test_large_temperature_gives_the_prior_probability():
    """As τ grows every score tends to 1: h = 1 / (1 + N / M)."""
    student, teacher = draw()
    h = 1 / (1 + 5 / 6)
    np.testing.assert_allclose(
        in_batch(student, teacher, 1e6), -np.log(h) - 5 * np.log(1 - h), rtol=1e-5
    )


def test_small_temperature_tends_to_a_hinge_loss():
    """As τ shrinks, τ · loss penalises cosines below 0 of positives and above 0 of negatives."""
    student, teacher = draw()
    cosines = unit(student) @ unit(teacher).T
    negatives = np.where(np.eye(6), 0, np.maximum(cosines, 0)).sum(1)
    limit = np.maximum(-np.diag(cosines), 0) + negatives
    np.testing.assert_allclose(1e-5 * in_batch(student, teacher, 1e-5), limit, rtol=1e-3)


@pytest.mark.thorough
@LOSSES
@pytest.mark.parametrize("temperature", [1e-4, 0.07, 1e4])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extremes_stay_finite(loss, temperature, scale):
    student, teacher = draw()
    chex.assert_tree_all_finite(
        value_and_gradients(loss, scale * student, -scale * student, temperature=temperature)
    )
    chex.assert_tree_all_finite(
        value_and_gradients(loss, scale * student, teacher, temperature=temperature)
    )


@pytest.mark.thorough
@LOSSES
def test_degenerate_embeddings_are_finite(loss):
    student, _ = draw()
    zero, constant = jnp.zeros_like(student), jnp.ones_like(student)
    for first in (zero, constant, student.at[1].set(0), student.at[1].set(student[2])):
        for second in (zero, constant, student):
            _, gradients = values = value_and_gradients(loss, first, second)
            chex.assert_tree_all_finite(values)
            np.testing.assert_array_equal(gradients[0][(first == 0).all(1)], 0)


def test_an_example_without_negatives_is_zero():
    student, teacher = draw()
    for pair, options in (
        ((student[:1], teacher[:1]), {}),
        ((student, teacher), {"labels": jnp.zeros(6, jnp.int32)}),
        ((student, teacher), {"where": jnp.arange(6) == 2}),
    ):
        values, gradients = value_and_gradients(in_batch, *pair, **options)
        chex.assert_trees_all_equal(
            (values, gradients), jax.tree.map(jnp.zeros_like, (values, gradients))
        )


@pytest.mark.parametrize("loss", [in_batch, by_label], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("content", [np.nan, np.inf, 3e38])
def test_where_is_slicing(loss, content):
    student, teacher = draw()
    where = jnp.arange(6) < 4
    padded = [jnp.where(where[:, None], x, content) for x in (student, teacher)]
    values, gradients = value_and_gradients(loss, *padded, where=where)
    expected, expected_gradients = value_and_gradients(loss, student[:4], teacher[:4])
    np.testing.assert_allclose(values[:4], expected, rtol=1e-6)
    np.testing.assert_array_equal(values[4:], 0)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient[:4], expected_gradient, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(gradient[4:], 0)


@pytest.mark.thorough
def test_where_of_the_bank_loss_masks_embeddings_and_indices():
    """Tests that NaN and invalid indices do not reach gradients of scalars, which sum examples."""
    student, teacher = draw()
    bank, index, negatives = draw_bank()
    where = np.arange(6) != 1

    def loss(student, teacher, constant, temperature, index, negatives, where=None):
        scaled = bank._replace(student_log_constant=constant, teacher_log_constant=constant)
        arguments = scaled, student, teacher, index, negatives
        return contrastive.contrastive_bank_loss(
            *arguments, temperature=temperature, where=where
        ).sum()

    student, teacher = (x.at[1].set(jnp.nan) for x in (student, teacher))
    index, negatives = index.at[1].set(99), negatives.at[1].set(-7)
    grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    scalars = jnp.array(1.0), jnp.array(0.5)
    value, gradients = grad(student, teacher, *scalars, index, negatives, where)
    expected, sliced = grad(
        student[where], teacher[where], *scalars, index[where], negatives[where]
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[2:], sliced[2:], rtol=1e-5)
    for gradient, slice_ in zip(gradients[:2], sliced[:2], strict=True):
        np.testing.assert_allclose(gradient[where], slice_, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.thorough
@LOSSES
def test_where_that_masks_everything_gives_zero(loss):
    student, teacher = draw()
    values, gradients = value_and_gradients(
        loss, student * jnp.nan, teacher, where=jnp.zeros(6, bool)
    )
    chex.assert_trees_all_equal(
        (values, gradients), jax.tree.map(jnp.zeros_like, (values, gradients))
    )


@LOSSES
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_embeddings_are_widened_first(loss, dtype):
    student, teacher = (x.astype(dtype) for x in draw())
    value = loss(student, teacher, 0.07)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        value, loss(student.astype(jnp.float32), teacher.astype(jnp.float32), 0.07), rtol=1e-6
    )


@LOSSES
def test_gradients_are_those_of_finite_differences(loss):
    student, teacher = draw()
    check_grads(
        lambda s, t, temperature: loss(unit_length(s), unit_length(t), temperature),
        (student, teacher, jnp.array(0.8)),
        order=1,
        modes=("rev",),
        eps=1e-2,
        atol=2e-2,
        rtol=2e-2,
    )


def unit_length(vectors):
    """Normalises vectors, since finite differences fail for short ones, which turn too fast."""
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.thorough
def test_training_on_it_matches_student_to_teacher():
    """Tests that gradient descent on random embeddings finds each example's teacher."""
    student, teacher = draw(shape=(6, 16))
    step = jax.jit(lambda s: s - 0.5 * jax.grad(lambda x: in_batch(x, teacher, 0.2).mean())(s))
    for _ in range(100):
        student = step(student)
    cosines = unit(student) @ unit(teacher).T
    np.testing.assert_array_equal(cosines.argmax(1), np.arange(6))


def test_out_of_range_is_nan_not_another_example():
    student, teacher = draw()
    bank, index, negatives = draw_bank()

    def loss(index, negatives):
        return contrastive.contrastive_bank_loss(
            bank, student, teacher, index, negatives, temperature=0.5
        )

    wrong_index = loss(index.at[0].set(-1).at[3].set(10), negatives)
    np.testing.assert_array_equal(np.isnan(wrong_index), np.isin(np.arange(6), [0, 3]))
    wrong_negatives = loss(index, negatives.at[2, 1].set(10).at[5, 0].set(-1))
    np.testing.assert_array_equal(np.isnan(wrong_negatives), np.isin(np.arange(6), [2, 5]))


def test_bank_rows_start_in_random_directions():
    bank = contrastive.init_bank(jax.random.key(0), 500, 8)
    for rows in (bank.student, bank.teacher):
        np.testing.assert_allclose(jnp.linalg.norm(rows, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(rows.mean(0), 0, atol=0.06)
    assert np.abs(np.sum(bank.student * bank.teacher, 1)).mean() < 0.4
    np.testing.assert_array_equal(jnp.array(bank[2:]), 0)


@pytest.mark.parametrize(
    "labels", [None, np.array([3, 0, 3, 1, 0, 3, 0], np.int8)], ids=["any", "labelled"]
)
def test_negatives_are_uniform_over_what_is_allowed(labels):
    index = np.array([0, 3, 6, 4])
    negatives = np.asarray(
        contrastive.draw_negatives(
            jax.random.key(0), index, num_examples=7, negatives=6000, labels=labels
        )
    )
    assert negatives.shape == (4, 6000) and negatives.dtype == np.int32
    for i, row in zip(index, negatives, strict=True):
        allowed = np.arange(7) != i if labels is None else labels != labels[i]
        np.testing.assert_allclose(
            np.bincount(row, minlength=7) / 6000, allowed / allowed.sum(), atol=0.03
        )


def test_negatives_follow_the_key_and_jit():
    index, labels = jnp.array([1, 5]), LABELS

    def draw_with(seed):
        return contrastive.draw_negatives(
            jax.random.key(seed), index, num_examples=6, negatives=20, labels=labels
        )

    chex.assert_trees_all_equal(draw_with(0), draw_with(0), jax.jit(draw_with)(0))
    assert (draw_with(0) != draw_with(1)).any()


@pytest.mark.thorough
def test_one_label_for_all_leaves_no_negatives_and_gives_nan():
    student, teacher = draw()
    bank, index, _ = draw_bank()
    negatives = contrastive.draw_negatives(
        jax.random.key(0), index, num_examples=10, negatives=3, labels=jnp.ones(10, jnp.int32)
    )
    np.testing.assert_array_equal(negatives, 10)
    value = contrastive.contrastive_bank_loss(
        bank, student, teacher, index, negatives, temperature=0.5
    )
    assert np.isnan(value).all()


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_update_moves_only_the_rows_of_the_batch(momentum):
    student, teacher = draw()
    bank, index, _ = draw_bank()
    before = jax.tree.map(np.array, bank)
    new = contrastive.update_bank(bank, 100 * student, teacher, index, momentum=momentum)
    chex.assert_trees_all_equal(bank, before)
    for rows, old, embeddings in (
        (new.student, bank.student, student),
        (new.teacher, bank.teacher, teacher),
    ):
        expected = np.array(old, np.float64)
        expected[index] = unit(momentum * expected[index] + (1 - momentum) * unit(embeddings))
        np.testing.assert_allclose(rows, expected, atol=1e-6)
    chex.assert_trees_all_equal(new[2:], bank[2:])


@pytest.mark.thorough
def test_update_takes_the_last_of_duplicates():
    student, teacher = draw()
    bank, _, _ = draw_bank()
    index = jnp.array([3, 7, 3, 2, 7, 3])
    new = contrastive.update_bank(bank, student, teacher, index)
    chex.assert_trees_all_close(
        new, contrastive.update_bank(bank, student[3:], teacher[3:], index[3:]), rtol=1e-6
    )
    # A masked duplicate does not replace an earlier example.
    where = jnp.array([True, True, True, True, True, False])
    masked = contrastive.update_bank(bank, student, teacher, index, where=where)
    sliced = contrastive.update_bank(bank, student[:5], teacher[:5], index[:5])
    chex.assert_trees_all_close(masked, sliced, rtol=1e-6)


def test_update_ignores_examples_masked_or_out_of_range():
    student, teacher = draw()
    bank, index, _ = draw_bank()
    wrong = index.at[0].set(-1).at[1].set(10).at[2].set(11)
    new = contrastive.update_bank(bank, student.at[:3].set(jnp.nan), teacher, wrong)
    sliced = contrastive.update_bank(bank, student[3:], teacher[3:], index[3:])
    chex.assert_trees_all_close(new, sliced, rtol=1e-6)
    masked = contrastive.update_bank(
        bank, student.at[:3].set(jnp.nan), teacher, index, where=jnp.arange(6) > 2
    )
    chex.assert_trees_all_close(masked, sliced, rtol=1e-6)


def test_update_by_opposite_or_zero_embeddings_stays_finite():
    bank, index, _ = draw_bank()
    opposite = contrastive.update_bank(bank, -bank.student[index], jnp.zeros((6, 4)), index)
    chex.assert_tree_all_finite(opposite)
    np.testing.assert_allclose(opposite.teacher, bank.teacher, atol=1e-6)


def test_calibration_makes_the_mean_score_one_over_the_dataset():
    student, teacher = draw()
    bank, index, negatives = draw_bank()
    calibrated = contrastive.calibrate_bank(
        bank, student, teacher, index, negatives, temperature=0.2
    )
    candidates = np.concatenate([np.asarray(index)[:, None], negatives], 1)
    for anchors, rows, log_constant in (
        (student, bank.teacher, calibrated.student_log_constant),
        (teacher, bank.student, calibrated.teacher_log_constant),
    ):
        scores = np.exp(np.einsum("bd,bnd->bn", unit(anchors), unit(rows)[candidates]) / 0.2)
        np.testing.assert_allclose(np.mean(scores / np.exp(float(log_constant))), 1 / 10, rtol=1e-5)
    chex.assert_trees_all_equal(calibrated[:2], bank[:2])
    chex.assert_tree_all_finite(
        contrastive.calibrate_bank(bank, student, teacher, index, negatives, temperature=1e-4)
    )


@pytest.mark.thorough
def test_a_step_with_the_bank_compiles_once_and_equals_eager():
    student, teacher = draw()
    bank, index, _ = draw_bank()

    def step(key, bank, student, teacher, index, temperature, momentum):
        negatives = contrastive.draw_negatives(
            key, index, num_examples=10, negatives=4, labels=jnp.arange(10) % 3
        )
        arguments = bank, student, teacher, index
        bank = contrastive.calibrate_bank(*arguments, negatives, temperature=temperature)
        loss = contrastive.contrastive_bank_loss(*arguments, negatives, temperature=temperature)
        return contrastive.update_bank(bank, student, teacher, index, momentum=momentum), loss

    compiled = jax.jit(chex.assert_max_traces(step, 1))
    for seed in range(2):
        arguments = jax.random.key(seed), bank, student, teacher, index, 0.1, 0.5
        chex.assert_trees_all_close(compiled(*arguments), step(*arguments), rtol=1e-4, atol=1e-6)


def test_wrong_arguments_raise():
    student, teacher = draw()
    bank, index, negatives = draw_bank()
    calls = {
        "contrastive_loss": lambda s, t, **options: contrastive.contrastive_loss(
            s, t, temperature=1.0, **options
        ),
        "contrastive_bank_loss": lambda s, t, index=index, negatives=negatives, **options: (
            contrastive.contrastive_bank_loss(
                bank, s, t, index, negatives, temperature=1.0, **options
            )
        ),
        "calibrate_bank": lambda s, t, index=index, negatives=negatives: contrastive.calibrate_bank(
            bank, s, t, index, negatives, temperature=1.0
        ),
        "update_bank": lambda s, t, index=index, **options: contrastive.update_bank(
            bank, s, t, index, **options
        ),
    }
    for call in calls.values():
        for wrong in (teacher[:, :2], teacher[:1], teacher[0], teacher[:, :, None]):
            with pytest.raises(ValueError, match=r"must both be \[B, D\].*project"):
                call(student, wrong)
        with pytest.raises(TypeError, match="floating-point"):
            call(student, teacher.astype(jnp.int32))
    for name in ("contrastive_bank_loss", "calibrate_bank", "update_bank"):
        with pytest.raises(ValueError, match="the bank holds rows .* init_bank"):
            calls[name](student[:, :2], teacher[:, :2])
        with pytest.raises(ValueError, match="index must be of shape"):
            calls[name](student, teacher, index=index[:3])
        with pytest.raises(TypeError, match="index must be integers"):
            calls[name](student, teacher, index=index.astype(jnp.float32))
    for name in ("contrastive_bank_loss", "calibrate_bank"):
        for wrong in (negatives[0], negatives[:, :0]):
            with pytest.raises(ValueError, match=r"negatives must be \[B, N\]"):
                calls[name](student, teacher, negatives=wrong)
        with pytest.raises(ValueError, match="negatives must be of shape"):
            calls[name](student, teacher, negatives=negatives[:3])
    for name in ("contrastive_loss", "contrastive_bank_loss", "update_bank"):
        with pytest.raises(TypeError, match="take mask != 0"):
            calls[name](student, teacher, where=jnp.ones(6))
    with pytest.raises(ValueError, match="labels must be of shape"):
        calls["contrastive_loss"](student, teacher, labels=LABELS[:, None])
    with pytest.raises(TypeError, match="labels must be integers"):
        calls["contrastive_loss"](student, teacher, labels=student[:, 0])
    for momentum, message in (
        (1.5, "be in"),
        (-0.1, "be in"),
        (np.nan, "be in"),
        (np.ones(6), "a scalar"),
    ):
        with pytest.raises(ValueError, match=message):
            calls["update_bank"](student, teacher, momentum=momentum)


def test_wrong_draws_raise():
    key, index = jax.random.key(0), jnp.array([0, 1])
    for num_examples, negatives in ((1, 3), (4, 0)):
        with pytest.raises(ValueError, match="num_examples must be at least 2"):
            contrastive.draw_negatives(key, index, num_examples=num_examples, negatives=negatives)
    with pytest.raises(ValueError, match=r"labels must be of shape \(4,\)"):
        contrastive.draw_negatives(key, index, num_examples=4, negatives=2, labels=LABELS)
    with pytest.raises(ValueError, match="index must be of shape"):
        contrastive.draw_negatives(key, index[None], num_examples=4, negatives=2)


@LOSSES
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        loss(*draw(), temperature)


def test_labels_below_0_are_no_class():
    student, teacher = jax.random.normal(jax.random.key(0), (2, 4, 3))
    labels = jnp.array([0, 1, -1, -1])
    with pytest.raises(ValueError, match="labels must be at least 0, got -1, which would count as"):
        losses.contrastive_loss(student, teacher, labels=labels)
    with pytest.raises(ValueError, match="labels must be at least 0"):
        losses.draw_negatives(
            jax.random.key(0), jnp.arange(2), num_examples=4, negatives=2, labels=labels
        )
    values = jax.jit(lambda y: losses.contrastive_loss(student, teacher, labels=y))(labels)
    assert np.isnan(values).tolist() == [False, False, True, True]
