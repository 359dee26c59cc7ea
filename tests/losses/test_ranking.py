"""Tests losses on scores and nested embeddings: values by hand, references, masks, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxkd import losses

DOCUMENTS = jnp.array([[True, True, True, True], [True, True, False, False], [False] + [True] * 3])


def draw(shape=(3, 4), seed=0):
    return jax.random.normal(jax.random.key(seed), (2, *shape))


def reference_margin(student, teacher, where):
    values = []
    for s, t, counted in zip(*(np.float64(x) for x in (student, teacher)), where, strict=True):
        squares = [
            ((s[0] - s[j]) - (t[0] - t[j])) ** 2
            for j in range(1, len(s))
            if counted[0] and counted[j]
        ]
        values.append(np.mean(squares) if squares else 0.0)
    return values


def reference_divergence(student, teacher, where, temperature=2.0):
    values = []
    for s, t, counted in zip(*(np.float64(x) for x in (student, teacher)), where, strict=True):
        q, p = (np.exp(z[counted] / temperature) for z in (s, t))
        q, p = q / q.sum(), p / p.sum()
        values.append(temperature**2 * np.sum(p * np.log(p / q)))
    return values


REFERENCES = {
    losses.margin_mse_loss: reference_margin,
    losses.score_divergence_loss: reference_divergence,
}
BOTH = pytest.mark.parametrize("loss", REFERENCES, ids=lambda loss: loss.__name__)


def test_values_by_hand():
    student, teacher = jnp.array([[3.0, 1.0, 0.0]]), jnp.array([[9.0, 6.0, 4.0]])
    # Margins 2 and 3 against 3 and 5.
    np.testing.assert_allclose(losses.margin_mse_loss(student, teacher), [(1 + 4) / 2])
    # Probabilities 1/2, 1/2 of the student against 3/4, 1/4 of the teacher.
    value = losses.score_divergence_loss(
        jnp.zeros((1, 2)), jnp.log(jnp.array([[3.0, 1.0]])), temperature=1.0
    )
    np.testing.assert_allclose(value, [0.75 * np.log(1.5) + 0.25 * np.log(0.5)], rtol=1e-6)


@BOTH
def test_equals_reference(loss):
    student, teacher = draw()
    value = loss(student, teacher, where=DOCUMENTS)
    expected = REFERENCES[loss](student, teacher, np.asarray(DOCUMENTS))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    check_grads(jax.jit(loss), (student, teacher), order=1, modes="rev", rtol=1e-2, atol=1e-2)


@BOTH
def test_a_constant_for_each_query_changes_nothing(loss):
    student, teacher = draw()
    shifted = student + jnp.arange(3.0)[:, None], teacher - 5
    np.testing.assert_allclose(loss(*shifted), loss(student, teacher), rtol=1e-4)
    np.testing.assert_allclose(loss(student, student + 3), 0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("hidden", [jnp.nan, -jnp.inf, 1e30])
def test_masked_documents_have_no_effect(loss, hidden):
    student, teacher = draw()
    masked = [jnp.where(DOCUMENTS, scores, hidden) for scores in (student, teacher)]

    def total(student, teacher):
        return loss(student, teacher, where=DOCUMENTS).sum()

    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(*masked)
    expected, expected_gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(student, teacher)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradients, expected_gradients)
    assert (np.stack(gradients)[:, ~np.asarray(DOCUMENTS)] == 0).all()
    # The second query has two documents: it is as if there were no others.
    alone = loss(student[1:2, :2], teacher[1:2, :2])
    np.testing.assert_allclose(loss(*masked, where=DOCUMENTS)[1:2], alone, rtol=1e-5)
    assert (loss(*masked, where=jnp.zeros_like(DOCUMENTS)) == 0).all()


@BOTH
def test_large_scores_stay_finite(loss):
    student, teacher = 1e4 * draw()
    value, gradient = jax.jit(jax.value_and_grad(lambda s: loss(s, teacher).sum()))(student)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_scores_of_a_batch_are_divergences_of_classes():
    """With one row for each query, it is `kl_divergence` over the documents."""
    student, teacher = draw((4, 4))
    np.testing.assert_allclose(
        losses.score_divergence_loss(student, teacher, temperature=0.5),
        losses.kl_divergence(student, teacher, temperature=0.5),
        rtol=1e-6,
    )
    single = losses.score_divergence_loss(student[:, :1], teacher[:, :1])
    np.testing.assert_array_equal(single, jnp.zeros(4))
    # A teacher that rules out a document leaves it out of the sum.
    ruled_out = losses.score_divergence_loss(student, teacher.at[:, 3].set(-jnp.inf))
    assert np.isfinite(ruled_out).all()


def test_documents_that_all_queries_share():
    student, teacher = draw((4, 4))
    shared = jnp.array([True, True, False, True])
    value = losses.score_divergence_loss(student, teacher, where=shared[None])
    expected = losses.score_divergence_loss(student[:, shared], teacher[:, shared])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for loss in REFERENCES:
        with pytest.raises(ValueError, match=r"may be a mask of the documents or of the queries"):
            loss(student, teacher, where=shared)


def test_nested_is_the_sum_over_prefixes():
    student, teacher = draw((3, 6))
    terms = [losses.hidden_cosine_loss(student[:, :m], teacher[:, :m]) for m in (2, 4, 6)]
    value = losses.nested_loss(losses.hidden_cosine_loss, student, teacher, dims=(2, 4, 6))
    np.testing.assert_allclose(value, sum(terms), rtol=1e-6)
    weighted = losses.nested_loss(
        losses.hidden_cosine_loss, student, teacher, dims=(2, 6), weights=(0.5, 3.0)
    )
    np.testing.assert_allclose(weighted, 0.5 * terms[0] + 3 * terms[2], rtol=1e-6)
    whole = losses.nested_loss(losses.hint_loss, student, teacher, dims=(6,))
    np.testing.assert_allclose(whole, losses.hint_loss(student, teacher), rtol=1e-6)
    check_grads(
        jax.jit(lambda s: losses.nested_loss(losses.hint_loss, s, teacher, dims=(2, 6))),
        (student,),
        order=1,
        modes="rev",
        rtol=1e-2,
    )


def test_prefixes_of_weight_zero_are_left_out():
    student, teacher = draw((3, 6))
    student = student.at[:, 4:].set(jnp.nan)

    def total(student):
        return losses.nested_loss(
            losses.hint_loss, student, teacher, dims=(4, 6), weights=(1.0, 0.0)
        ).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(student)
    np.testing.assert_allclose(
        value, losses.hint_loss(student[:, :4], teacher[:, :4]).sum(), rtol=1e-6
    )
    assert np.isfinite(gradient).all() and (gradient[:, 4:] == 0).all()


def test_nested_against_the_whole_teacher():
    """Losses that compare examples need no teacher whose prefixes mean something."""
    student, teacher = draw((5, 6))
    value = losses.nested_loss(
        lambda s, _: losses.similarity_preserving_loss(s, teacher), student, teacher, dims=(2, 6)
    )
    expected = losses.similarity_preserving_loss(student[:, :2], teacher)
    expected += losses.similarity_preserving_loss(student, teacher)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_wrong_arguments_raise():
    student, teacher = draw()
    for loss in REFERENCES:
        with pytest.raises(ValueError, match="must have the same shape"):
            loss(student, teacher[:, :3])
        with pytest.raises(ValueError, match="can be broadcast"):
            loss(student, teacher, where=jnp.ones((3, 2), bool))
        with pytest.raises(TypeError, match="where must be boolean"):
            loss(student, teacher, where=jnp.ones((3, 4)))
        with pytest.raises(TypeError, match="must be floating-point"):
            loss(student.astype(int), teacher)
    with pytest.raises(ValueError, match="at least one negative"):
        losses.margin_mse_loss(student[:, :1], teacher[:, :1])
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.score_divergence_loss(student, teacher, temperature=0.0)
    for dims, message in (((), "at least one size"), ((0,), r"got \[0\]"), ((2, 5), r"got \[5\]")):
        with pytest.raises(ValueError, match=message):
            losses.nested_loss(losses.hint_loss, student, teacher, dims=dims)
    with pytest.raises(TypeError, match="integer"):
        losses.nested_loss(losses.hint_loss, student, teacher, dims=(0.5,))
    with pytest.raises(ValueError, match="one entry for each of the 2"):
        losses.nested_loss(losses.hint_loss, student, teacher, dims=(1, 2), weights=(1.0,))
