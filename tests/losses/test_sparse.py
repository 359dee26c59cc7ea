"""The largest logits: what is kept, and what the rest becomes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses
from jaxkd.losses import expand_top_k, top_k


def reference_top_k(logits, k):
    """Returns values, indices and rest in float64."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, axis=-1, kind="stable")
    indices, other_indices = order[..., :k], order[..., k:]
    values, others = (
        np.take_along_axis(logits, part, axis=-1) for part in (indices, other_indices)
    )
    with np.errstate(divide="ignore"):
        return values, indices, np.log(np.exp(others).sum(-1))


def softmax(logits):
    exponentials = np.exp(np.asarray(logits, np.float64))
    return exponentials / exponentials.sum(-1, keepdims=True)


def random_logits(seed, shape, scale=3.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("shape", [(11,), (5, 11), (2, 3, 11)])
def test_top_k_is_the_reference(shape, k):
    logits = random_logits(0, shape)
    kept = jax.jit(functools.partial(top_k, k=k))(logits)
    chex.assert_trees_all_close(kept, top_k(logits, k=k), rtol=2e-6)
    chex.assert_type(list(kept), [jnp.float32, jnp.int32, jnp.float32])
    values, indices, rest = reference_top_k(logits, k)
    np.testing.assert_array_equal(kept.values, values)
    np.testing.assert_array_equal(kept.indices, indices)
    np.testing.assert_allclose(kept.rest, rest, rtol=2e-6)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_kept_classes_have_their_probability_and_the_others_share_the_rest(k):
    logits = random_logits(1, (6, 11))
    expanded = jax.jit(functools.partial(expand_top_k, num_classes=11))(top_k(logits, k=k))
    assert expanded.dtype == jnp.float32 and expanded.shape == (6, 11)
    values, indices, _ = reference_top_k(logits, k)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(expanded), indices, -1), values)
    probabilities = softmax(expanded)
    expected = np.take_along_axis(softmax(logits), indices, -1)
    np.testing.assert_allclose(np.take_along_axis(probabilities, indices, -1), expected, rtol=1e-6)
    shares = (1 - expected.sum(-1, keepdims=True)) / (11 - k)
    is_kept = np.zeros((6, 11), bool)
    np.put_along_axis(is_kept, indices, True, -1)
    expected_shares = np.broadcast_to(shares, is_kept.shape)[~is_kept]
    np.testing.assert_allclose(probabilities[~is_kept], expected_shares, rtol=1e-4)


def test_all_classes_come_back_bit_for_bit():
    logits = random_logits(2, (4, 9)).at[1, 3].set(-jnp.inf).at[2, :].set(0.25)
    kept = top_k(logits, k=9)
    assert (kept.rest == -jnp.inf).all()
    np.testing.assert_array_equal(expand_top_k(kept, num_classes=9), logits)


def test_classes_at_minus_infinity():
    logits = jnp.full((3, 6), -jnp.inf).at[0, 2].set(1.0).at[1, :4].set(jnp.arange(4.0))
    kept = top_k(logits, k=2)
    np.testing.assert_allclose(kept.rest, [-np.inf, np.log(1 + np.e), -np.inf], rtol=1e-6)
    expanded = np.asarray(expand_top_k(kept, num_classes=6))
    np.testing.assert_array_equal(expanded[[0, 2]], logits[jnp.array([0, 2])])
    # The rest does not say which of the classes were at minus infinity: all of them share it.
    share = np.log((1 + np.e) / 4)
    np.testing.assert_allclose(expanded[1], [share, share, 2, 3, share, share], rtol=1e-6)


def test_bfloat16_is_widened_and_the_first_of_equal_logits_are_kept():
    kept = top_k(jnp.array([1, 2, 2, 2], jnp.bfloat16), k=2)
    assert kept.values.dtype == jnp.float32 and kept.indices.tolist() == [1, 2]
    np.testing.assert_allclose(kept.rest, np.logaddexp(1, 2), rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize(("k", "bound", "bound_at_4"), [(10, 0.09, 0.13), (100, 0.02, 0.08)])
def test_divergence_from_all_logits_is_bounded(k, bound, bound_at_4):
    # With one clear class of 1000, the largest 10 have 94 % of the weight and the largest 100 98 %.
    logits = random_logits(0, (64, 1000), scale=2.0).at[:, 0].add(12.0)
    kept = top_k(logits, k=k)
    expanded = expand_top_k(kept, num_classes=1000)
    weight = jnp.exp(kept.rest - jax.nn.logsumexp(logits, axis=-1))
    divergence = losses.kl_divergence(expanded, logits, temperature=1.0)
    assert (divergence > 0).all()
    assert (divergence < weight * np.log(1000 - k)).all()
    assert divergence.mean() < bound
    assert losses.kl_divergence(expanded, logits, temperature=4.0).mean() / 4**2 < bound_at_4
    rest, expanded_rest = (
        1 - jnp.take_along_axis(jax.nn.softmax(x / 4, axis=-1), kept.indices, -1).sum(-1)
        for x in (logits, expanded)
    )
    assert (expanded_rest > rest).all(), "above temperature 1, the others weigh more than they did"


def test_number_of_logits_must_be_within_the_classes():
    for k in (0, 8):
        message = rf"k must be from 1 to the number of classes, got k={k} for .* \(2, 7\)"
        with pytest.raises(ValueError, match=message):
            top_k(jnp.zeros((2, 7)), k=k)
    with pytest.raises(ValueError, match=r"logits of the shape \(\)"):
        top_k(jnp.float32(1), k=1)
    with pytest.raises(TypeError, match="must be floating-point, got int32"):
        top_k(jnp.arange(3), k=1)
    with pytest.raises(
        ValueError, match="3 logits of each example were kept, but num_classes is 2"
    ):
        expand_top_k(top_k(jnp.zeros(5), k=3), num_classes=2)


def test_an_index_that_is_no_class_is_refused():
    kept = top_k(jnp.array([[1.0, 5.0, 2.0, 9.0, 0.0], [9.0, 5.0, 2.0, 1.0, 0.0]]), k=2)
    expand = functools.partial(expand_top_k, num_classes=3)
    with pytest.raises(ValueError, match=r"from 0 to 3, which are not all in \[0, 3\): pass"):
        expand(kept)
    expanded = jax.jit(expand)(kept)
    np.testing.assert_array_equal(np.isnan(expanded).all(-1), [True, False])
    np.testing.assert_array_equal(expanded[1], expand(jax.tree.map(lambda leaf: leaf[1], kept)))


def reference_buckets(student, teacher, k, temperature):
    """Returns float64 distributions over the kept classes and the rest, by the definition."""
    values, indices, rest = reference_top_k(teacher, k)
    num_others = teacher.shape[-1] - k
    with np.errstate(divide="ignore"):
        each = rest - np.log(max(num_others, 1))
    masses = np.exp(values / temperature), num_others * np.exp(each / temperature)[..., None]
    teacher = np.concatenate(masses, -1)
    student = softmax(np.asarray(student) / temperature)
    kept = np.take_along_axis(student, indices, -1)
    student = np.concatenate([kept, 1 - kept.sum(-1, keepdims=True)], -1)
    return teacher / teacher.sum(-1, keepdims=True), student


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 4])
def test_sparse_losses_equal_a_reference(k, temperature):
    student, teacher = random_logits(0, (5, 11)), random_logits(1, (5, 11))
    p, q = reference_buckets(student, teacher, k, temperature)
    kept, scale = top_k(teacher, k=k), temperature**2
    options = {"temperature": temperature}
    np.testing.assert_allclose(
        losses.sparse_soft_cross_entropy(student, kept, **options),
        -scale * (p * np.log(q)).sum(-1),
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        losses.sparse_kl_divergence(student, kept, **options),
        scale * (p * np.log(p / q)).sum(-1),
        rtol=1e-4,
        atol=1e-5,
    )
    m = 0.3 * p + 0.7 * q
    expected = 0.3 * (p * np.log(p / m)).sum(-1) + 0.7 * (q * np.log(q / m)).sum(-1)
    np.testing.assert_allclose(
        losses.sparse_jensen_shannon_divergence(student, kept, beta=0.3, **options),
        scale * expected,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_with_all_logits_kept_the_dense_losses_are_equal(temperature):
    student, teacher = random_logits(0, (5, 11)), random_logits(1, (5, 11))
    kept, options = top_k(teacher, k=11), {"temperature": temperature}
    for sparse, dense in (
        (losses.sparse_kl_divergence, losses.kl_divergence),
        (losses.sparse_soft_cross_entropy, losses.soft_cross_entropy),
        (
            functools.partial(losses.sparse_jensen_shannon_divergence, beta=0.5),
            functools.partial(losses.jensen_shannon_divergence, beta=0.5),
        ),
    ):
        first, second = (
            jax.jit(jax.value_and_grad(lambda s, loss=loss, t=t: loss(s, t, **options).sum()))(
                student
            )
            for loss, t in ((sparse, kept), (dense, teacher))
        )
        chex.assert_trees_all_close(first, second, rtol=1e-5, atol=1e-6)


def test_the_rest_is_a_bound_and_leaves_its_shape_to_the_student():
    student, teacher = random_logits(0, (50, 11)), random_logits(1, (50, 11))
    sparse = losses.sparse_kl_divergence(student, top_k(teacher, k=4), temperature=1.0)
    assert (sparse <= losses.kl_divergence(student, teacher, temperature=1.0) + 1e-5).all()
    # A student with the right probabilities of the kept classes has nothing to learn.
    kept = top_k(teacher, k=4)
    tail = jnp.put_along_axis(random_logits(2, (50, 11)), kept.indices, -jnp.inf, -1, inplace=False)
    tail = jax.nn.log_softmax(tail) + kept.rest[:, None]
    right = jnp.put_along_axis(tail, kept.indices, kept.values, -1, inplace=False)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda s: losses.sparse_kl_divergence(s, kept, temperature=1.0).sum())
    )(right)
    np.testing.assert_allclose(value, 0, atol=1e-4)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_sparse_losses_are_finite_at_extremes():
    student, teacher = random_logits(0, (3, 11), 1e4), random_logits(1, (3, 11), 1e4)
    for k in (2, 11):
        value, gradient = jax.jit(
            jax.value_and_grad(
                lambda s, k=k: losses.sparse_kl_divergence(s, top_k(teacher, k=k)).sum()
            )
        )(student)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    # A class that both rule out.
    ruled_out = jnp.full((1, 3), 0.0).at[0, 2].set(-jnp.inf)
    gradient = jax.jit(
        jax.grad(lambda s: losses.sparse_kl_divergence(s, top_k(ruled_out, k=2)).sum())
    )(ruled_out)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("proposal_temperature", [1.0, 2.0])
def test_sampled_targets_have_no_bias(proposal_temperature):
    student, teacher = random_logits(0, (11,), 1.0), random_logits(1, (11,), 1.0)

    def sample(key):
        sampled = losses.sample_classes(
            key, teacher, count=20, proposal_temperature=proposal_temperature
        )
        return jax.value_and_grad(lambda s: losses.sampled_cross_entropy(s, sampled))(student)

    values, gradients = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 4000))
    expected, expected_gradient = jax.value_and_grad(
        lambda s: losses.soft_cross_entropy(s, teacher, temperature=1.0)
    )(student)
    error = float(values.std()) / 4000**0.5
    assert abs(float(values.mean()) - expected) < 4 * error
    errors = np.asarray(gradients.std(0)) / 4000**0.5
    assert (np.abs(gradients.mean(0) - expected_gradient) < 4.5 * errors + 1e-6).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t: losses.sparse_kl_divergence(s, t), TypeError, "pass losses.top_k"),
        (
            lambda s, t: losses.sparse_kl_divergence(s[:, :3], top_k(t, k=2)),
            ValueError,
            r"not all in \[0, 3\)|more logits",
        ),
        (
            lambda s, t: losses.sparse_kl_divergence(s[:2], top_k(t, k=2)),
            ValueError,
            "must have the axes of student_logits",
        ),
        (
            lambda s, t: losses.sample_classes(jax.random.key(0), t, count=0),
            ValueError,
            "count is 0: draw at least one",
        ),
        (
            lambda s, t: losses.sampled_cross_entropy(
                s, losses.SampledClasses(jnp.full((5, 2), 11), jnp.ones((5, 2)))
            ),
            ValueError,
            "not all in",
        ),
        (
            lambda s, t: losses.sampled_cross_entropy(
                s, losses.SampledClasses(jnp.zeros((5, 2), int), jnp.ones((5, 3)))
            ),
            ValueError,
            "must have the axes of student_logits",
        ),
    ],
)
def test_wrong_parts_raise(call, error, message):
    with pytest.raises(error, match=message):
        call(random_logits(0, (5, 11)), random_logits(1, (5, 11)))
