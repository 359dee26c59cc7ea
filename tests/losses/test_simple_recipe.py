"""Tests the loss of simple recipe distillation: values, normalisation, masks and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import losses

IDENTITY = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}


def draw(student=4, teacher=3, batch=6):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        losses.init_projector(keys[0], student, teacher),
        jax.random.normal(keys[1], (batch, student)),
        jax.random.normal(keys[2], (batch, teacher)),
    )


def reference(params, student, teacher, power=4.0):
    params, student, teacher = jax.tree.map(
        lambda array: np.asarray(array, np.float64), (params, student, teacher)
    )
    projected = student @ params["kernel"] + params["bias"]
    projected, teacher = (
        (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-4)
        for features in (projected, teacher)
    )
    return np.log((np.abs(projected - teacher) ** power).sum() + 1e-5)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
def test_follows_the_definition(power):
    params, student, teacher = draw()
    values = losses.simple_recipe_loss(params, student, teacher, power=power)
    expected = reference(params, student, teacher, power)
    np.testing.assert_allclose(values, np.full(6, expected), rtol=1e-5)


def test_ignores_scale_and_shift_of_the_teacher():
    params, student, teacher = draw()
    values = losses.simple_recipe_loss(params, student, teacher)
    moved = losses.simple_recipe_loss(params, student, 30 * teacher - 7)
    np.testing.assert_allclose(values, moved, rtol=1e-3)


@pytest.mark.parametrize("power", [0.5, 4.0])
def test_equal_features_give_the_lowest_value_and_no_gradient(power):
    features = draw()[2]
    value, gradient = jax.value_and_grad(
        lambda student: losses.simple_recipe_loss(IDENTITY, student, features, power=power).mean()
    )(features)
    np.testing.assert_allclose(value, np.log(1e-5), rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_the_gradient_of_the_projector_is_that_of_the_definition():
    params, student, teacher = draw()
    gradient = jax.grad(lambda p: losses.simple_recipe_loss(p, student, teacher).mean())(params)
    step = 1e-3
    after, before = (
        reference(jax.tree.map(lambda p, sign=sign: p + sign * step, params), student, teacher)
        for sign in (1, -1)
    )
    slope = sum(leaf.sum() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(slope, (after - before) / (2 * step), rtol=1e-2)


def test_excluded_examples_count_for_nothing():
    params, student, teacher = draw()
    where = jnp.array([True, True, False, True, False, True])
    broken = (
        jnp.where(where[:, None], student, jnp.nan),
        jnp.where(where[:, None], teacher, jnp.inf),
    )

    def total(params, student, teacher, where=None):
        values = losses.simple_recipe_loss(params, student, teacher, where=where)
        return values.sum() / 4, values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params, *broken, where)
    (_, expected), expected_gradient = jax.value_and_grad(total, has_aux=True)(
        params, student[where], teacher[where]
    )
    np.testing.assert_allclose(values[where], expected, rtol=1e-5)
    np.testing.assert_array_equal(values[~where], 0)
    for name in gradient:
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-3, atol=1e-5)


def test_extreme_features_stay_finite():
    params, student, teacher = draw()
    for scale in (0.0, 1e-20, 1e15):
        value, gradient = jax.value_and_grad(
            lambda s, scale=scale: losses.simple_recipe_loss(params, s, scale * teacher).mean()
        )(scale * student)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_bad_shapes_and_powers_are_refused():
    params, student, teacher = draw()
    with pytest.raises(ValueError, match="average maps over their positions"):
        losses.simple_recipe_loss(params, student[:, None], teacher)
    with pytest.raises(ValueError, match="average maps over their positions"):
        losses.simple_recipe_loss(params, student[:3], teacher)
    with pytest.raises(ValueError, match=r"project to \(6, 3\).*init_projector"):
        losses.simple_recipe_loss(params, student, teacher[:, :2])
    with pytest.raises(ValueError, match="power must be positive"):
        losses.simple_recipe_loss(params, student, teacher, power=0.0)
