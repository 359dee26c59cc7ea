"""Tests losses across vocabularies: sorted probabilities, and the alignment of tokens by text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxkd import losses

WHERE = jnp.array([[True, False, True], [True, True, False]])


def draw(student=7, teacher=4, shape=(2, 3)):
    keys = jax.random.split(jax.random.key(0))
    return (
        jax.random.normal(key, (*shape, size))
        for key, size in zip(keys, (student, teacher), strict=True)
    )


def reference(student, teacher, temperature=1.0):
    """Computes the distance of sorted probabilities, filled up with zeros, in float64."""
    size = max(student.shape[-1], teacher.shape[-1])
    values = np.zeros(student.shape[:-1])
    for index in np.ndindex(*values.shape):
        sides = []
        for logits in (student, teacher):
            weights = np.exp(np.float64(logits[index]) / temperature)
            probabilities = sorted(weights / weights.sum(), reverse=True)
            sides.append(np.pad(probabilities, (0, size - len(probabilities))))
        values[index] = np.abs(sides[0] - sides[1]).sum()
    return values


def test_value_by_hand():
    # 0.5, 0.25, 0.25 against 0.9, 0.1, 0.
    student = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
    teacher = jnp.log(jnp.array([[0.1, 0.9]]))
    expected = [0.4 + 0.15 + 0.25]
    np.testing.assert_allclose(losses.universal_logit_loss(student, teacher), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.universal_logit_loss(teacher, student), expected, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(7, 4), (4, 7), (5, 5)])
def test_equals_reference(sizes):
    student, teacher = draw(*sizes)
    for temperature in (1.0, 3.0):
        value = losses.universal_logit_loss(student, teacher, temperature=temperature)
        np.testing.assert_allclose(value, reference(student, teacher, temperature), rtol=1e-5)
    check_grads(
        jax.jit(losses.universal_logit_loss),
        (student, teacher),
        order=1,
        modes="rev",
        rtol=1e-2,
        atol=1e-2,
        eps=1e-3,
    )


def test_names_of_tokens_do_not_matter():
    student, _ = draw()
    permuted = jax.random.permutation(jax.random.key(1), student, axis=-1)
    np.testing.assert_allclose(losses.universal_logit_loss(student, permuted), 0, atol=1e-6)
    # A token that the teacher cannot produce is as a token that it does not have.
    longer = jnp.pad(permuted, ((0, 0), (0, 0), (0, 3)), constant_values=-jnp.inf)
    np.testing.assert_allclose(losses.universal_logit_loss(student, longer), 0, atol=1e-6)


def test_is_the_earth_movers_distance_with_equal_costs():
    """The cheapest plan moves what is in excess; sorting makes the least excess of all pairings."""
    student, teacher = (np.exp(np.asarray(z[0, 0])) for z in draw(3, 3))
    p, q = student / student.sum(), teacher / teacher.sum()
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    least = min(np.abs(p - q[order]).sum() for order in orders)
    value = losses.universal_logit_loss(*(z[:1, :1] for z in draw(3, 3)))
    np.testing.assert_allclose(value, [[least]], rtol=1e-5)


@pytest.mark.parametrize("padding", [jnp.nan, jnp.inf, 1e30])
def test_masked_positions_have_no_effect(padding):
    student, teacher = draw()
    padded = [jnp.where(WHERE[..., None], z, padding) for z in (student, teacher)]

    def total(student, teacher):
        value = losses.universal_logit_loss(student, teacher, where=WHERE)
        return value.sum(), value

    (_, value), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*padded)
    np.testing.assert_allclose(
        value, jnp.where(WHERE, losses.universal_logit_loss(student, teacher), 0), rtol=1e-6
    )
    for gradient in gradients:
        assert np.isfinite(gradient).all() and (gradient[~np.asarray(WHERE)] == 0).all()


def test_extreme_logits_stay_finite():
    student, teacher = (1e4 * z for z in draw())
    student = student.at[0, 0, :2].set(-jnp.inf)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda s: losses.universal_logit_loss(s, teacher).sum())
    )(student)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    # Two vocabularies of which each is certain agree, whatever the token.
    certain = losses.universal_logit_loss(1e4 * jnp.eye(3, 5), 1e4 * jnp.eye(3, 4)[::-1])
    np.testing.assert_allclose(certain, 0, atol=1e-6)


def spans(pieces):
    """Returns the offsets of tokens that follow one another in a text."""
    ends = np.cumsum([len(piece) for piece in pieces])
    return np.array([(end - len(piece), end) for end, piece in zip(ends, pieces, strict=True)])


def test_alignment_by_hand():
    student = spans(["token", "iza", "ble"])
    teacher = spans(["tok", "en", "izab", "le"])
    positions, where = losses.align_tokens(student, teacher)
    np.testing.assert_array_equal(positions, [1, 0, 3])
    np.testing.assert_array_equal(where, [True, False, True])
    # The other way round, the pairs are the same.
    positions, where = losses.align_tokens(teacher, student)
    np.testing.assert_array_equal(where, [False, True, False, True])
    np.testing.assert_array_equal(positions[where], [0, 2])


def test_special_tokens_padding_and_bytes():
    # [CLS] a, two bytes of one character, [SEP] b [PAD] [PAD]
    student = np.array([[0, 0], [0, 1], [1, 2], [1, 2], [0, 0], [2, 3], [0, 0], [0, 0]])
    teacher = np.array([[0, 2], [2, 2], [2, 3], [0, 0]])
    positions, where = losses.align_tokens(student, teacher)
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(where, [False, False, False, True, False, True, False, False])
    np.testing.assert_array_equal(positions, [0, 0, 0, 0, 0, 2, 0, 0])


cuts = st.lists(st.integers(1, 11), max_size=11, unique=True)


@settings(max_examples=30, deadline=None)
@given(cuts, cuts, st.integers(0, 3))
def test_alignment_equals_a_search(student_cuts, teacher_cuts, padding):
    """Both models have read the same part of the text at a pair, and every such pair is found."""
    student, teacher = (
        np.array(list(zip([0, *sorted(c)], [*sorted(c), 12], strict=True)))
        for c in (student_cuts, teacher_cuts)
    )
    teacher = np.pad(teacher, ((padding, 0), (0, 0)))
    positions, where = losses.align_tokens(student, teacher)
    expected = {
        (i, j)
        for i, (_, end) in enumerate(student)
        for j, (start, other) in enumerate(teacher)
        if end == other and other > start
    }
    assert {(i, int(j)) for i, j in enumerate(positions) if where[i]} == expected


def test_alignment_under_jit_and_of_batches():
    first = np.stack([spans(["ab", "c", "d"]), spans(["a", "bc", "d"])])
    second = np.stack([spans(["a", "b", "cd"]), spans(["ab", "c", "d"])])
    expected = [losses.align_tokens(*pair) for pair in zip(first, second, strict=True)]
    for function in (losses.align_tokens, jax.jit(losses.align_tokens)):
        positions, where = function(first.astype(np.uint8), second)
        np.testing.assert_array_equal(positions, [pair[0] for pair in expected])
        np.testing.assert_array_equal(where, [pair[1] for pair in expected])


def test_alignment_picks_the_logits_to_compare():
    """A teacher that predicts what the student does, after the same text, costs nothing."""
    text = "tokenizable"
    student_offsets = spans(["token", "iza", "ble"])[None]
    teacher_offsets = spans(["tok", "en", "izab", "le"])[None]
    # What either model predicts depends only on how much it has read.
    table = jax.random.normal(jax.random.key(0), (len(text) + 1, 6))
    student_logits = table[student_offsets[..., 1]]
    teacher_logits = table[teacher_offsets[..., 1]][..., ::-1]
    positions, where = losses.align_tokens(student_offsets, teacher_offsets)
    picked = jnp.take_along_axis(teacher_logits, positions[..., None], axis=-2)
    value = losses.universal_logit_loss(student_logits, picked, where=where)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert (losses.universal_logit_loss(student_logits, picked)[0, 1] > 0.01).all()


def test_wrong_arguments_raise():
    student, teacher = draw()
    with pytest.raises(ValueError, match="differ only in their last axis"):
        losses.universal_logit_loss(student, teacher[:, :2])
    with pytest.raises(ValueError, match="one entry for each position"):
        losses.universal_logit_loss(student, teacher, where=WHERE[0])
    with pytest.raises(ValueError, match="have one class"):
        losses.universal_logit_loss(student, teacher[..., :1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.universal_logit_loss(student, teacher, temperature=-1.0)
    with pytest.raises(TypeError, match="must be floating-point"):
        losses.universal_logit_loss(student.astype(int), teacher)
    offsets = spans(["ab", "c"])
    with pytest.raises(ValueError, match="of the same texts"):
        losses.align_tokens(offsets[None], offsets)
    with pytest.raises(ValueError, match="start and end of at least one token"):
        losses.align_tokens(offsets[:0], offsets)
    with pytest.raises(ValueError, match="start and end of at least one token"):
        losses.align_tokens(offsets[:, 1], offsets)
    with pytest.raises(ValueError, match="align each text by itself"):
        losses.align_tokens(offsets, np.concatenate([offsets, offsets]))
    with pytest.raises(TypeError, match="must be integers"):
        losses.align_tokens(offsets.astype(float), offsets)
