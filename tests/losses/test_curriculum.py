"""Tests targets and temperatures that change with training: TAID and CTKD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses


def draw():
    return 3 * jax.random.normal(jax.random.key(0), (2, 4, 5))


def test_interpolated_logits_have_no_gradient_in_the_student():
    student, teacher = draw()

    def loss(s, target):
        return losses.kl_divergence(s, target(s), temperature=1.0).sum()

    gradient = jax.jit(
        jax.grad(lambda s: loss(s, lambda s: losses.interpolated_logits(s, teacher, fraction=0.25)))
    )(student)
    fixed = 0.75 * student + 0.25 * teacher
    expected = jax.jit(jax.grad(lambda s: loss(s, lambda s: fixed)))(student)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_share_of_0_takes_nothing_of_a_class_at_minus_infinity():
    student, teacher = jnp.array([1.0, 2.0]), jnp.array([3.0, -jnp.inf])
    ends = [losses.interpolated_logits(student, teacher, fraction=f) for f in (0.0, 1.0)]
    np.testing.assert_array_equal(ends[0], student)
    np.testing.assert_array_equal(ends[1], teacher)
    traced = jax.jit(lambda f: losses.interpolated_logits(student, teacher, fraction=f))(0.0)
    np.testing.assert_array_equal(traced, student)


def reference(values, start=0.4, end=1.0, rate=5e-4, decay=0.99):
    """Follows the definition over the losses of all steps."""
    fraction, momentum, before, fractions = start, 0.0, None, []
    for number, loss in enumerate(values):
        if before is not None:
            momentum = decay * momentum + (1 - decay) * (before - loss) / before
            step = rate / (1 + np.exp(-momentum)) * (1 - fraction)
            planned = start + (end - start) * number / len(values)
            fraction = min(end, max(planned, fraction + step))
        before = loss
        fractions.append(fraction)
    return fractions


@pytest.mark.parametrize("rate", [5e-4, 0.5])
def test_the_share_of_the_teacher_follows_the_definition(rate):
    values = np.linspace(3, 1, 40) + 0.1 * np.sin(np.arange(40))
    update = jax.jit(losses.update_interpolation)
    state, fractions = losses.init_interpolation(), []
    for number, loss in enumerate(values):
        state = update(state, loss, number / len(values), rate=rate)
        fractions.append(float(state.fraction))
    np.testing.assert_allclose(fractions, reference(values, rate=rate), rtol=1e-5)
    assert np.all(np.diff(fractions) >= 0) and fractions[0] == pytest.approx(0.4)


def test_reversed_gradients():
    x = jnp.array([1.0, -2.0])
    value, gradient = jax.jit(
        jax.value_and_grad(lambda x: (losses.reverse_gradient(x, strength=0.5) ** 2).sum())
    )(x)
    assert value == 5
    np.testing.assert_allclose(gradient, -x)
    strength = jax.grad(lambda s: losses.reverse_gradient(jnp.float32(2), strength=s))(0.5)
    assert strength == 0


def test_the_temperature_is_trained_against_the_loss():
    student, teacher = draw()
    params = losses.init_curriculum_temperature()

    def loss(params, student, strength):
        temperature = losses.curriculum_temperature(params, strength=strength)
        return losses.kl_divergence(student, teacher, temperature=temperature).mean()

    def fixed_loss(theta):
        temperature = 1 + 20 * jax.nn.sigmoid(theta)
        return losses.kl_divergence(student, teacher, temperature=temperature).mean()

    gradient = jax.jit(jax.grad(loss))(params, student, 0.5)["temperature"]
    expected = jax.jit(jax.grad(fixed_loss))(jnp.float32(1))
    assert expected != 0
    np.testing.assert_allclose(gradient, -0.5 * expected, rtol=1e-4)
    assert jax.jit(jax.grad(loss))(params, student, 0.0)["temperature"] == 0
    # The student's gradient is not reversed.
    of_student = jax.jit(jax.grad(loss, 1))(params, student, 1.0)
    plain = jax.jit(
        jax.grad(
            lambda s: losses.kl_divergence(
                s, teacher, temperature=1 + 20 / (1 + np.exp(-1.0))
            ).mean()
        )
    )(student)
    np.testing.assert_allclose(of_student, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.interpolated_logits(*draw(), fraction=2), "fraction must be in"),
        (lambda: losses.init_interpolation(start=-1), "start must be in"),
        (
            lambda: losses.update_interpolation(losses.init_interpolation(), jnp.ones(3), 0.5),
            r"loss must be a scalar, got shape \(3,\): take the mean",
        ),
        (lambda: losses.reverse_gradient(1.0, strength=jnp.ones(2)), "strength must be a scalar"),
        (
            lambda: losses.curriculum_temperature({"temperature": 1.0}, strength=1, lowest=0),
            "lowest must be positive",
        ),
    ],
)
def test_wrong_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_instance_temperature_follows_the_definition():
    student, teacher = draw()
    params = losses.init_instance_temperature(jax.random.key(1), 5, 7)
    temperatures = losses.instance_temperature(
        params, student, teacher, strength=1.0, lowest=2.0, span=3.0
    )
    logs = [np.asarray(jax.nn.log_softmax(z), np.float64) for z in (teacher, student)]
    layers = jax.tree.map(lambda array: np.asarray(array, np.float64), params)
    hidden = np.concatenate(logs, -1) @ layers["hidden"]["kernel"] + layers["hidden"]["bias"]
    outputs = np.maximum(hidden, 0) @ layers["output"]["kernel"] + layers["output"]["bias"]
    np.testing.assert_allclose(temperatures, 2 + 3 / (1 + np.exp(-outputs[:, 0])), rtol=1e-5)


def test_instance_temperature_climbs_the_loss_and_leaves_the_logits_alone():
    student, teacher = draw()
    params = losses.init_instance_temperature(jax.random.key(1), 5, 7)

    def loss(params, student, strength):
        temperature = losses.instance_temperature(params, student, teacher, strength=strength)
        logits = (z / temperature[:, None] for z in (student, teacher))
        return (temperature**2 * losses.kl_divergence(*logits, temperature=1.0)).mean()

    gradient = jax.jit(jax.grad(loss))
    reversed_gradient, plain = gradient(params, student, 0.5), gradient(params, student, -1.0)
    for half, whole in zip(*map(jax.tree.leaves, (reversed_gradient, plain)), strict=True):
        np.testing.assert_allclose(half, -0.5 * whole, rtol=1e-4, atol=1e-7)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(plain))
    climbed = jax.tree.map(lambda p, g: p - 0.1 * g, params, reversed_gradient)
    assert loss(climbed, student, 1.0) > loss(params, student, 1.0)
    through_temperature = jax.grad(
        lambda s: losses.instance_temperature(params, s, teacher, strength=1.0).sum()
    )(student)
    np.testing.assert_array_equal(through_temperature, 0)


def test_instance_temperature_of_an_excluded_class_is_finite():
    params = losses.init_instance_temperature(jax.random.key(1), 3, 7)
    logits = jnp.array([[0.0, 1.0, -jnp.inf]])
    temperature = losses.instance_temperature(params, logits, logits, strength=1.0)
    assert np.isfinite(temperature).all()


def test_instance_temperature_refuses_another_number_of_classes():
    params = losses.init_instance_temperature(jax.random.key(1), 3, 7)
    with pytest.raises(ValueError, match="must have 3 classes.*init_instance_temperature"):
        losses.instance_temperature(params, *draw(), strength=1.0)
