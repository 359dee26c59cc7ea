"""Fine-tuning through the real training step: what stays, what moves, and how far."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import losses, train
from jaxkd.models import CNN, from_linen
from jaxkd.transfer import freeze, scale_by_path


@pytest.fixture(autouse=True)
def _as_optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes floats and integers
        yield


MODEL = from_linen(CNN(features=(3,), hidden=5, num_classes=4))


def batch():
    return {"inputs": jax.random.normal(jax.random.key(0), (8, 6, 6, 1)), "labels": jnp.arange(8) % 4}


def loss(student, teachers, batch):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def start():
    variables = MODEL.init(jax.random.key(1), batch()["inputs"])
    variables["params"]["conv1"]["bias"] = jnp.array([-0.0, 0.0, 1e-30])
    return variables


def trained(tx, steps=2):
    state, step = train.make_state(start(), tx), train.make_train_step(MODEL, tx, loss)
    for _ in range(steps):
        state, _ = step(state, batch(), (), jax.random.key(2))
    return state


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(np.uint32), tree)


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(0.1, weight_decay=0.5), optax.sgd(0.1, momentum=0.9), optax.chain(optax.clip(0.1), optax.lion(0.1))],
    ids=["adamw", "sgd", "lion"],
)
def test_frozen_leaves_keep_their_bits_and_have_no_state(tx):
    before, state = start()["params"], trained(freeze(tx, "conv1/{rest...}", "{layer}/bias"))
    after = state.params
    chex.assert_trees_all_equal(bits(after["conv1"]), bits(before["conv1"]))
    for layer in ("hidden", "logits"):
        chex.assert_trees_all_equal(bits(after[layer]["bias"]), bits(before[layer]["bias"]))
        assert (after[layer]["kernel"] != before[layer]["kernel"]).any()
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(state.opt_state)} - {()}
    assert shapes == {before["hidden"]["kernel"].shape, before["logits"]["kernel"].shape}


def test_what_is_not_frozen_is_trained_as_without():
    """Clipping by the global norm sees the trained leaves alone, as if the others did not exist."""
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))
    frozen = freeze(tx, "a")
    updates, _ = frozen.update(params, frozen.init(params), params)
    alone = {"b": params["b"]}
    expected, _ = tx.update(alone, tx.init(alone), alone)
    chex.assert_trees_all_equal(updates["b"], expected["b"])
    assert updates["a"] == 0


def test_everything_may_be_frozen():
    params, tx = start()["params"], freeze(optax.adam(0.1), "{all...}")
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(bits(optax.apply_updates(params, updates)), bits(params))


def test_layer_wise_learning_rates():
    factors = {"logits/bias": 2.0, "logits/{leaf}": 0.5, "conv1/{leaf}": 0.0}
    plain, scaled = (
        trained(optax.sgd(0.1), steps=1),
        trained(optax.chain(optax.sgd(0.1), scale_by_path(factors)), steps=1),
    )
    for path, factor in (
        (("logits", "bias"), 2.0),
        (("logits", "kernel"), 0.5),
        (("conv1", "kernel"), 0.0),
        (("hidden", "kernel"), 1.0),
    ):
        first, one, other = (tree[path[0]][path[1]] for tree in (start()["params"], plain.params, scaled.params))
        assert (one != first).any()
        chex.assert_trees_all_close(other - first, factor * (one - first), atol=1e-6)


def test_both_together_and_dtypes_stay():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "c": jnp.ones(2)}
    tx = freeze(optax.chain(optax.sgd(1.0), scale_by_path({"a": 0.5})), "c")
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates, {"a": jnp.full(2, -0.5, jnp.bfloat16), "b": -jnp.ones(2), "c": jnp.zeros(2)})
    chex.assert_trees_all_equal_dtypes(updates, params)


@pytest.mark.parametrize(
    "make", [lambda p: freeze(optax.sgd(0.1), "conv1/{r...}", p), lambda p: scale_by_path({p: 2.0})]
)
def test_a_pattern_that_matches_nothing(make):
    with pytest.raises(ValueError, match=r"\['params/conv1/kernel'\] match no parameter.*'conv1/kernel'"):
        train.make_state(start(), make("params/conv1/kernel"))
    with pytest.raises(ValueError, match="no pattern"):
        train.make_state(start(), make("{conv"))
