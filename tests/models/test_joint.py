"""Tests of models that are joined."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import models
from jaxkd.models import joint

IMAGES = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))


class Small(nn.Module):
    """A network that draws."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x.mean((1, 2))))
        return models.Outputs(nn.Dense(10)(x), {"hidden": x})


SMALL = models.from_linen(Small())
NORMED = models.from_linen(models.plain2(num_classes=10))


def test_a_joint_model_predicts_the_mean_probability():
    both = models.join({"small": SMALL, "normed": NORMED})
    variables = both.init(jax.random.key(1), IMAGES)
    outputs, batch_stats = both.apply(variables, IMAGES, train=True, key=jax.random.key(2))
    probabilities = []
    for number, (name, model) in enumerate({"small": SMALL, "normed": NORMED}.items()):
        member = joint.take_member(variables, name)
        key = jax.random.fold_in(jax.random.key(2), number)
        alone, stats = model.apply(member, IMAGES, train=True, key=key)
        probabilities.append(jax.nn.softmax(alone.logits))
        taken = joint.take_member_outputs(outputs, name)
        np.testing.assert_allclose(taken.logits, alone.logits, rtol=1e-5, atol=1e-6)
        assert taken.features.keys() == alone.features.keys()
        jax.tree.map(np.testing.assert_allclose, batch_stats[name], stats)
    mean = jnp.mean(jnp.stack(probabilities), 0)
    np.testing.assert_allclose(jax.nn.softmax(outputs.logits), mean, rtol=1e-5)


def test_members_are_drawn_apart():
    both = models.join({"a": SMALL, "b": SMALL})
    variables = both.init(jax.random.key(1), IMAGES)
    first, second = (jax.tree.leaves(joint.take_member(variables, name)) for name in "ab")
    assert any(not np.array_equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("members", [{}, {"a/b": SMALL}, {"": SMALL}, {3: SMALL}])
def test_unfit_members(members):
    with pytest.raises(ValueError, match="no models to join|must be text without a '/'"):
        models.join(members)


def test_an_unknown_member_is_named():
    with pytest.raises(ValueError, match="no member 'c', but a, b"):
        joint.take_member({"params": {"a": {}, "b": {}}}, "c")
