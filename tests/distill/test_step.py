"""The training step: what it moves, what it leaves alone, and what it compiles."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxkd import distill, losses, models, transfer


class Net(nn.Module):
    """A net with running statistics and dropout."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def batch(seed=0):
    key = jax.random.key(seed)
    return {
        "inputs": jax.random.normal(key, (16, 4)) + 2,
        "labels": jax.random.randint(key, (16,), 0, 3),
    }


def hard(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft(student, teachers, batch, context):
    return losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0)


def started(model, tx, seed=1):
    return distill.init_train_state(model.init(jax.random.key(seed), batch()["inputs"]), tx)


def test_step_is_the_textbook_update():
    model, tx = models.from_linen(nn.Dense(3), train_argument=None), optax.sgd(0.1)
    state = started(model, tx)
    kernel, bias = state.params["kernel"], state.params["bias"]
    x, labels = batch()["inputs"], batch()["labels"]
    residual = jax.nn.softmax(x @ kernel + bias[None]) - jax.nn.one_hot(labels, 3)
    expected = {"kernel": kernel - 0.1 * x.T @ residual / 16, "bias": bias - 0.1 * residual.mean(0)}
    loss = losses.hard_cross_entropy(x @ kernel + bias[None], labels).mean()
    state, metrics = distill.make_train_step(model, tx, hard)(state, batch(), (), jax.random.key(0))
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, {"loss": loss}, rtol=1e-6)
    assert int(state.step) == 1


def test_teacher_runs_on_its_statistics_and_none_of_it_moves():
    """Trap 9: only the student has gradients, optimizer state and moving statistics."""
    model, tx = models.from_linen(Net()), optax.sgd(0.1, momentum=0.9)
    teacher = model.init(jax.random.key(7), batch()["inputs"])
    teacher["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.5, teacher["batch_stats"])
    before = jax.tree.map(jnp.copy, teacher)
    seen = []

    def loss(student, teachers, batch, context):
        seen.append(teachers[0])
        jax.debug.callback(lambda logits: seen.append(np.asarray(logits)), teachers[0].logits)
        return soft(student, teachers, batch, context)

    state = started(model, tx)
    student_before = jax.tree.map(jnp.copy, state)
    after, _ = distill.make_train_step(model, tx, loss, teachers=[model])(
        state, batch(), (teacher,), jax.random.key(0)
    )
    jax.effects_barrier()
    chex.assert_trees_all_equal(teacher, before)
    expected, _ = model.apply(teacher, batch()["inputs"], train=False)
    chex.assert_trees_all_close(seen[-1], expected.logits, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_shapes(after, student_before)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), after.batch_stats, student_before.batch_stats
    )
    assert all(jax.tree.leaves(moved)), "the student's statistics move in training"


def test_gradient_does_not_reach_the_teacher():
    model, tx = models.from_linen(nn.Dense(3), train_argument=None), optax.sgd(0.1)
    teacher = model.init(jax.random.key(7), batch()["inputs"])
    step = distill.make_train_step(model, tx, soft, teachers=[model])

    def student_after(variables):
        return step(started(model, tx), batch(), (variables,), jax.random.key(0))[0].params[
            "kernel"
        ]

    assert (
        student_after(teacher) != student_after(jax.tree.map(lambda leaf: leaf * 2, teacher))
    ).any()
    jaxpr = str(jax.make_jaxpr(step)(started(model, tx), batch(), (teacher,), jax.random.key(0)))
    assert jaxpr.count("dot_general") == 3, (
        "forward of teacher and student, and one gradient, the student's"
    )


def scaled(student, teachers, batch, context):
    return jnp.square(student.logits * context.params[None] - 1).sum(-1)


def test_parameters_of_the_loss_are_trained_beside_the_student():
    model, tx = models.from_linen(nn.Dense(3), train_argument=None), optax.sgd(0.1)
    variables, scale, x = (
        model.init(jax.random.key(1), batch()["inputs"]),
        jnp.array([1.0, 2.0, 3.0]),
        batch()["inputs"],
    )
    logits = x @ variables["params"]["kernel"] + variables["params"]["bias"][None]
    residual = 2 * (logits * scale[None] - 1) / 16
    expected = (
        scale - 0.1 * (residual * logits).sum(0),
        variables["params"]["bias"] - 0.1 * (residual * scale[None]).sum(0),
    )
    state = distill.init_train_state(variables, tx, loss_params=scale)
    state, _ = distill.make_train_step(model, tx, scaled)(state, batch(), (), jax.random.key(0))
    np.testing.assert_allclose(state.loss.params, expected[0], rtol=1e-5)
    np.testing.assert_allclose(state.params["bias"], expected[1], rtol=1e-5, atol=1e-6)
    assert set(state.variables) == {"params", "batch_stats"}
    assert not scale.is_deleted()


def test_parameters_of_the_loss_may_have_an_optimizer_of_their_own():
    model = models.from_linen(nn.Dense(3), train_argument=None)
    tx, loss_tx = transfer.freeze(optax.sgd(0.1), "bias"), optax.sgd(1.0)
    variables, scale = model.init(jax.random.key(1), batch()["inputs"]), jnp.array([1.0, 2.0, 3.0])
    state = distill.init_train_state(variables, tx, loss_params=scale, loss_tx=loss_tx)
    state, _ = distill.make_train_step(model, tx, scaled, loss_tx=loss_tx)(
        state, batch(), (), jax.random.key(0)
    )
    logits = batch()["inputs"] @ variables["params"]["kernel"] + variables["params"]["bias"][None]
    expected = scale - (2 * (logits * scale[None] - 1) / 16 * logits).sum(0)
    np.testing.assert_allclose(state.loss.params, expected, rtol=1e-5)
    np.testing.assert_array_equal(state.params["bias"], variables["params"]["bias"])


def test_compiles_once():
    model, tx = models.from_linen(Net()), optax.sgd(0.1)
    counted = chex.assert_max_traces(hard, n=1)
    step = distill.make_train_step(model, tx, counted)
    state = started(model, tx)
    for seed in range(3):
        state, _ = step(state, batch(seed), (), jax.random.key(0))
    assert int(state.step) == 3


def test_state_is_donated_and_what_it_was_made_from_is_not():
    """Trap 11: a student that starts from its teacher's weights must not take them away."""
    model, tx = models.from_linen(nn.Dense(3), train_argument=None), optax.sgd(0.1, momentum=0.9)
    variables = model.init(jax.random.key(7), batch()["inputs"])
    state = distill.init_train_state(variables, tx)
    step = distill.make_train_step(model, tx, soft, teachers=[model])
    step(state, batch(), (variables,), jax.random.key(0))
    assert state.params["kernel"].is_deleted()
    assert not variables["params"]["kernel"].is_deleted()


def test_draws_depend_on_key_and_step_alone():
    model, tx = models.from_linen(Net()), optax.sgd(0.1)

    def augment(key, inputs):
        return inputs + jax.random.normal(key, inputs.shape)

    step = distill.make_train_step(model, tx, hard, augment=augment)

    def trained(state, steps, key=3):
        for _ in range(steps):
            state, _ = step(state, batch(), (), jax.random.key(key))
        return state

    unbroken = trained(started(model, tx), 4)
    half = jax.tree.map(np.asarray, trained(started(model, tx), 2))
    resumed = trained(jax.tree.map(jnp.array, half), 2)
    chex.assert_trees_all_equal(resumed, unbroken)
    other = trained(started(model, tx), 4, key=4)
    assert (other.params["Dense_0"]["kernel"] != unbroken.params["Dense_0"]["kernel"]).any()


def test_teacher_sees_the_augmented_inputs():
    model, tx = models.from_linen(nn.Dense(3), train_argument=None), optax.sgd(0.1)
    state = started(model, tx)
    same = {"params": jax.tree.map(jnp.copy, state.params), "batch_stats": {}}
    step = distill.make_train_step(
        model,
        tx,
        soft,
        teachers=[model],
        augment=lambda key, x: x + jax.random.normal(key, x.shape),
    )
    _, metrics = step(state, batch(), (same,), jax.random.key(0))
    np.testing.assert_allclose(metrics["loss"], 0, atol=1e-6)


def test_nnx_student_learns_from_linen_teacher():
    teacher, tx = models.from_linen(Net()), optax.sgd(0.05, momentum=0.9)
    student = models.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    variables = teacher.init(jax.random.key(0), batch()["inputs"])
    step = distill.make_train_step(student, tx, soft, teachers=[teacher])
    state, values = started(student, tx), []
    for _ in range(30):
        state, metrics = step(state, batch(), (variables,), jax.random.key(0))
        values.append(float(metrics["loss"]))
    assert values[-1] < values[0] / 2


def test_wrong_losses_and_teachers_are_told():
    model, tx = models.from_linen(nn.Dense(3), train_argument=None), optax.sgd(0.1)
    averaged = distill.make_train_step(model, tx, lambda *arguments: hard(*arguments).mean())
    with pytest.raises(ValueError, match=r"one value per example \(16,\), got the shape \(\)"):
        averaged(started(model, tx), batch(), (), jax.random.key(0))
    with pytest.raises(ValueError, match="1 teachers, but variables for 0"):
        distill.make_train_step(model, tx, soft, teachers=[model])(
            started(model, tx), batch(), (), jax.random.key(0)
        )


@pytest.mark.parametrize("devices", [2, 8])
def test_batch_sharded_over_devices_gives_the_step_of_one(devices):
    model, tx = models.from_linen(Net()), optax.sgd(0.1, momentum=0.9)
    teacher = model.init(jax.random.key(7), batch()["inputs"])
    step = distill.make_train_step(model, tx, soft, teachers=[model])
    alone, metrics = step(started(model, tx), batch(), (teacher,), jax.random.key(0))
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("batch",), ()))
    state, shown = jax.device_put((started(model, tx), (teacher,)), whole)
    together, same = step(state, jax.device_put(batch(), split), shown, jax.random.key(0))
    assert len(same["loss"].devices()) == devices
    chex.assert_trees_all_close((together, same), (alone, metrics), rtol=1e-5, atol=1e-6)
