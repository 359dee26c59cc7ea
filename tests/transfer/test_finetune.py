"""Tests of frozen parameters and layer-wise learning rates, through the training step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill, losses
from jaxkd.models import CNN, from_linen
from jaxkd.transfer import freeze, scale_by_path


@pytest.fixture(autouse=True)
def _standard_promotion():
    # optax's Adam mixes floats and integers, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        yield


MODEL = from_linen(CNN(features=(3,), hidden=5, num_classes=4))


def batch():
    return {
        "inputs": jax.random.normal(jax.random.key(0), (8, 6, 6, 1)),
        "labels": jnp.arange(8) % 4,
    }


def loss(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def init_variables():
    variables = MODEL.init(jax.random.key(1), batch()["inputs"])
    variables["params"]["conv1"]["bias"] = jnp.array([-0.0, 0.0, 1e-30])
    return variables


def train(tx, steps=2):
    state = distill.init_train_state(init_variables(), tx)
    step = distill.make_train_step(MODEL, tx, loss)
    for _ in range(steps):
        state, _ = step(state, batch(), (), jax.random.key(2))
    return state


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint32), tree)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.1, weight_decay=0.5),
        optax.sgd(0.1, momentum=0.9),
        optax.chain(optax.clip(0.1), optax.lion(0.1)),
    ],
    ids=["adamw", "sgd", "lion"],
)
def test_frozen_leaves_keep_their_bits_and_have_no_state(tx):
    before = init_variables()["params"]
    state = train(freeze(tx, "conv1/{rest...}", "{layer}/bias"))
    after = state.params
    chex.assert_trees_all_equal(bits(after["conv1"]), bits(before["conv1"]))
    for layer in ("hidden", "logits"):
        chex.assert_trees_all_equal(bits(after[layer]["bias"]), bits(before[layer]["bias"]))
        assert (after[layer]["kernel"] != before[layer]["kernel"]).any()
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(state.opt_state)} - {()}
    assert shapes == {before["hidden"]["kernel"].shape, before["logits"]["kernel"].shape}


def test_other_leaves_are_trained_as_if_the_frozen_ones_did_not_exist():
    """Clipping by the global norm sees only the leaves that are trained."""
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    frozen = freeze(tx, "a")
    updates, _ = frozen.update(params, frozen.init(params), params)
    alone = {"b": params["b"]}
    expected, _ = tx.update(alone, tx.init(alone), alone)
    chex.assert_trees_all_equal(updates["b"], expected["b"])
    assert updates["a"] == 0


def test_all_parameters_can_be_frozen():
    params = init_variables()["params"]
    tx = freeze(optax.adam(0.1), "{all...}")
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(bits(optax.apply_updates(params, updates)), bits(params))


def test_layer_wise_learning_rates():
    factors = {"logits/bias": 2.0, "logits/{leaf}": 0.5, "conv1/{leaf}": 0.0}
    initial = init_variables()["params"]
    plain = train(optax.sgd(0.1), steps=1).params
    scaled = train(optax.chain(optax.sgd(0.1), scale_by_path(factors)), steps=1).params
    for layer, name, factor in (
        ("logits", "bias", 2.0),
        ("logits", "kernel", 0.5),
        ("conv1", "kernel", 0.0),
        ("hidden", "kernel", 1.0),
    ):
        plain_update = plain[layer][name] - initial[layer][name]
        scaled_update = scaled[layer][name] - initial[layer][name]
        assert (plain[layer][name] != initial[layer][name]).any()
        chex.assert_trees_all_close(scaled_update, factor * plain_update, atol=1e-6)


def test_freeze_and_scale_by_path_together_keep_dtypes():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "c": jnp.ones(2)}
    tx = freeze(optax.chain(optax.sgd(1.0), scale_by_path({"a": 0.5})), "c")
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal(
        updates, {"a": jnp.full(2, -0.5, jnp.bfloat16), "b": -jnp.ones(2), "c": jnp.zeros(2)}
    )
    chex.assert_trees_all_equal_dtypes(updates, params)


@pytest.mark.parametrize(
    "make",
    [
        lambda pattern: freeze(optax.sgd(0.1), "conv1/{rest...}", pattern),
        lambda pattern: scale_by_path({pattern: 2.0}),
    ],
)
def test_a_pattern_that_matches_nothing_raises(make):
    with pytest.raises(
        ValueError, match=r"\['params/conv1/kernel'\] match no parameter.*'conv1/kernel'"
    ):
        distill.init_train_state(init_variables(), make("params/conv1/kernel"))
    with pytest.raises(ValueError, match="not a pattern"):
        distill.init_train_state(init_variables(), make("{conv"))
