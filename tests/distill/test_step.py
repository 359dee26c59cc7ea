"""The training step: what it updates, what it leaves unchanged, what the loss gets, and traces."""

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


KEY = jax.random.key(0)
LINEAR = models.from_linen(nn.Dense(3), train_argument=None)


def make_batch(seed=0):
    key = jax.random.key(seed)
    return {
        "inputs": jax.random.normal(key, (16, 4)) + 2,
        "labels": jax.random.randint(key, (16,), 0, 3),
    }


def hard_loss(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft_loss(student, teachers, batch, context):
    return losses.kl_divergence(student.logits, teachers[0].logits, temperature=2.0)


def add_noise(key, inputs):
    return inputs + jax.random.normal(key, inputs.shape)


def init_variables(model, seed=1):
    return model.init(jax.random.key(seed), make_batch()["inputs"])


def init_state(model, tx, seed=1):
    return distill.init_train_state(init_variables(model, seed), tx)


def test_step_is_the_textbook_update():
    tx = optax.sgd(0.1)
    state = init_state(LINEAR, tx)
    kernel, bias = state.params["kernel"], state.params["bias"]
    inputs, labels = make_batch()["inputs"], make_batch()["labels"]
    logits = inputs @ kernel + bias[None]
    residual = jax.nn.softmax(logits) - jax.nn.one_hot(labels, 3)
    expected = {
        "kernel": kernel - 0.1 * inputs.T @ residual / 16,
        "bias": bias - 0.1 * residual.mean(0),
    }
    expected_loss = losses.hard_cross_entropy(logits, labels).mean()
    step = distill.make_train_step(LINEAR, tx, hard_loss)
    state, metrics = step(state, make_batch(), (), KEY)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, {"loss": expected_loss}, rtol=1e-6)
    assert int(state.step) == 1


def test_teacher_uses_its_running_statistics_and_is_not_updated():
    """Trap 9: only the student has gradients, optimizer state and moving statistics."""
    model = models.from_linen(Net())
    tx = optax.sgd(0.1, momentum=0.9)
    teacher = init_variables(model, 7)
    teacher["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.5, teacher["batch_stats"])
    teacher_before = jax.tree.map(jnp.copy, teacher)
    seen = []

    def loss(student, teachers, batch, context):
        jax.debug.callback(lambda logits: seen.append(np.asarray(logits)), teachers[0].logits)
        return soft_loss(student, teachers, batch, context)

    state = init_state(model, tx)
    state_before = jax.tree.map(jnp.copy, state)
    step = distill.make_train_step(model, tx, loss, teachers=[model])
    state, _ = step(state, make_batch(), (teacher,), KEY)
    jax.effects_barrier()
    chex.assert_trees_all_equal(teacher, teacher_before)
    expected, _ = model.apply(teacher, make_batch()["inputs"], train=False)
    chex.assert_trees_all_close(seen[-1], expected.logits, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_shapes(state, state_before)
    is_changed = jax.tree.map(
        lambda before, after: bool((before != after).any()),
        state_before.batch_stats,
        state.batch_stats,
    )
    assert all(jax.tree.leaves(is_changed)), "the student's statistics move in training"


def test_gradient_does_not_reach_the_teacher():
    tx = optax.sgd(0.1)
    teacher = init_variables(LINEAR, 7)
    step = distill.make_train_step(LINEAR, tx, soft_loss, teachers=[LINEAR])

    def train_kernel(variables):
        state, _ = step(init_state(LINEAR, tx), make_batch(), (variables,), KEY)
        return state.params["kernel"]

    doubled = jax.tree.map(lambda leaf: leaf * 2, teacher)
    assert (train_kernel(teacher) != train_kernel(doubled)).any()
    jaxpr = str(jax.make_jaxpr(step)(init_state(LINEAR, tx), make_batch(), (teacher,), KEY))
    # The forward passes of teacher and student, and the gradient of the student alone.
    assert jaxpr.count("dot_general") == 3


# The loss's own parameters


SCALE = np.array([1.0, 2.0, 3.0], np.float32)


def scale_loss(student, teachers, batch, context):
    return jnp.square(student.logits * context.params[None] - 1).sum(-1)


def compute_logits(variables):
    params = variables["params"]
    return make_batch()["inputs"] @ params["kernel"] + params["bias"][None]


def test_parameters_of_the_loss_are_trained_with_the_student():
    tx = optax.sgd(0.1)
    variables = init_variables(LINEAR)
    scale = jnp.asarray(SCALE)
    logits = compute_logits(variables)
    residual = 2 * (logits * scale[None] - 1) / 16
    expected_scale = scale - 0.1 * (residual * logits).sum(0)
    expected_bias = variables["params"]["bias"] - 0.1 * (residual * scale[None]).sum(0)
    state = distill.init_train_state(variables, tx, loss_params=scale)
    step = distill.make_train_step(LINEAR, tx, scale_loss)
    state, _ = step(state, make_batch(), (), KEY)
    np.testing.assert_allclose(state.loss.params, expected_scale, rtol=1e-5)
    np.testing.assert_allclose(state.params["bias"], expected_bias, rtol=1e-5, atol=1e-6)
    assert set(state.variables) == {"params", "batch_stats"}
    assert not scale.is_deleted()


def test_parameters_of_the_loss_may_have_an_optimizer_of_their_own():
    tx = transfer.freeze(optax.sgd(0.1), "bias")
    loss_tx = optax.sgd(1.0)
    variables = init_variables(LINEAR)
    logits = compute_logits(variables)
    expected = SCALE - (2 * (logits * SCALE[None] - 1) / 16 * logits).sum(0)
    state = distill.init_train_state(variables, tx, loss_params=SCALE, loss_tx=loss_tx)
    step = distill.make_train_step(LINEAR, tx, scale_loss, loss_tx=loss_tx)
    state, _ = step(state, make_batch(), (), KEY)
    np.testing.assert_allclose(state.loss.params, expected, rtol=1e-5)
    np.testing.assert_array_equal(state.params["bias"], variables["params"]["bias"])


# The context of the loss


def record_contexts(**options):
    """Returns the batches and contexts of two steps, as the loss gets them on the host."""
    names, contexts = [], []

    def loss(student, teachers, batch, context):
        names.append(set(batch))
        values = context._replace(key=jax.random.key_data(context.key))
        jax.debug.callback(lambda tree: contexts.append(jax.tree.map(np.asarray, tree)), values)
        return hard_loss(student, teachers, batch, context)

    tx = optax.sgd(0.1)
    step = distill.make_train_step(LINEAR, tx, loss, **options)
    state = init_state(LINEAR, tx)
    info = distill.BatchInfo(jnp.arange(16, dtype=jnp.int32), np.int32(24), jax.random.key(9))
    for _ in range(2):
        state, _ = step(state, make_batch(), (), KEY, info)
    jax.effects_barrier()
    # Contexts of later steps come last, but the callback itself promises no order.
    return names, sorted(contexts, key=lambda context: context.step)


def test_context_of_a_loss():
    names, (first, second) = record_contexts(num_steps=4)
    assert names == [{"inputs", "labels"}]
    chex.assert_type([first.step, first.progress], [jnp.int32, jnp.float32])
    assert (first.step, second.step) == (0, 1)
    assert (first.progress, second.progress) == (0, 0.25)
    assert (first.key != second.key).any()
    assert first.params is None and first.view is None


def test_progress_needs_the_number_of_steps():
    _, contexts = record_contexts()
    assert [context.progress for context in contexts] == [None, None]


def test_view_of_each_example_follows_the_epochs():
    """The second batch of 16 ends the first epoch of 24 examples and begins the next."""
    _, (first, second) = record_contexts(augment=add_noise, views=3)
    assert first.view.dtype == np.int32
    assert first.view.tolist() == [0] * 16 and second.view.tolist() == [0] * 8 + [1] * 8


# Traces, buffers and draws


def test_step_is_traced_once():
    model = models.from_linen(Net())
    tx = optax.sgd(0.1)
    step = distill.make_train_step(model, tx, chex.assert_max_traces(hard_loss, n=1))
    state = init_state(model, tx)
    for seed in range(3):
        state, _ = step(state, make_batch(seed), (), KEY)
    assert int(state.step) == 3


def test_state_is_donated_but_not_the_variables_it_was_made_from():
    """Trap 11: a student that starts from its teacher's weights must not take them away."""
    tx = optax.sgd(0.1, momentum=0.9)
    variables = init_variables(LINEAR, 7)
    state = distill.init_train_state(variables, tx)
    step = distill.make_train_step(LINEAR, tx, soft_loss, teachers=[LINEAR])
    step(state, make_batch(), (variables,), KEY)
    assert state.params["kernel"].is_deleted()
    assert not variables["params"]["kernel"].is_deleted()


def test_draws_depend_on_key_and_step_alone():
    model = models.from_linen(Net())
    tx = optax.sgd(0.1)
    step = distill.make_train_step(model, tx, hard_loss, augment=add_noise)

    def train(state, steps, seed=3):
        for _ in range(steps):
            state, _ = step(state, make_batch(), (), jax.random.key(seed))
        return state

    unbroken = train(init_state(model, tx), 4)
    half = jax.tree.map(np.asarray, train(init_state(model, tx), 2))
    resumed = train(jax.tree.map(jnp.array, half), 2)
    chex.assert_trees_all_equal(resumed, unbroken)
    other = train(init_state(model, tx), 4, seed=4)
    assert (other.params["Dense_0"]["kernel"] != unbroken.params["Dense_0"]["kernel"]).any()


def test_teacher_sees_the_augmented_inputs():
    tx = optax.sgd(0.1)
    state = init_state(LINEAR, tx)
    teacher = {"params": jax.tree.map(jnp.copy, state.params), "batch_stats": {}}
    step = distill.make_train_step(LINEAR, tx, soft_loss, teachers=[LINEAR], augment=add_noise)
    _, metrics = step(state, make_batch(), (teacher,), KEY)
    np.testing.assert_allclose(metrics["loss"], 0, atol=1e-6)


def test_nnx_student_learns_from_linen_teacher():
    teacher = models.from_linen(Net())
    student = models.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    tx = optax.sgd(0.05, momentum=0.9)
    variables = init_variables(teacher, 0)
    step = distill.make_train_step(student, tx, soft_loss, teachers=[teacher])
    state = init_state(student, tx)
    values = []
    for _ in range(30):
        state, metrics = step(state, make_batch(), (variables,), KEY)
        values.append(float(metrics["loss"]))
    assert values[-1] < values[0] / 2


def test_wrong_losses_and_teachers_are_refused():
    tx = optax.sgd(0.1)
    step = distill.make_train_step(LINEAR, tx, lambda *args: hard_loss(*args).mean())
    with pytest.raises(ValueError, match=r"one value per example \(16,\), got the shape \(\)"):
        step(init_state(LINEAR, tx), make_batch(), (), KEY)
    step = distill.make_train_step(LINEAR, tx, soft_loss, teachers=[LINEAR])
    with pytest.raises(ValueError, match="1 teachers, but variables for 0"):
        step(init_state(LINEAR, tx), make_batch(), (), KEY)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_batch_divided_among_devices_gives_the_step_of_one(num_devices):
    model = models.from_linen(Net())
    tx = optax.sgd(0.1, momentum=0.9)
    teacher = init_variables(model, 7)
    step = distill.make_train_step(model, tx, soft_loss, teachers=[model])
    expected = step(init_state(model, tx), make_batch(), (teacher,), KEY)
    mesh = jax.make_mesh((num_devices,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    divided, copied = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("batch",), ()))
    state, teachers = jax.device_put((init_state(model, tx), (teacher,)), copied)
    state, metrics = step(state, jax.device_put(make_batch(), divided), teachers, KEY)
    assert len(metrics["loss"].devices()) == num_devices
    chex.assert_trees_all_close((state, metrics), expected, rtol=1e-5, atol=1e-6)


def take_step(loss, *, batch=None, teachers=(), features=None, **options):
    """Takes a step of a linear student."""
    step = distill.make_train_step(LINEAR, optax.sgd(0.1), loss, teachers=teachers, **options)
    batch = make_batch() if batch is None else batch
    variables = LINEAR.init(KEY, make_batch()["inputs"])
    state = distill.init_train_state(variables, optax.sgd(0.1))
    return step(state, batch, (variables,) * len(teachers), KEY)


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda s, t, b, c: soft_loss(s, (t[0],), b, c), IndexError, "than the 0 of its stage"),
        (
            lambda s, t, b, c: s.features["stage9"].mean(1),
            KeyError,
            "reads 'stage9', but its batch holds inputs, labels; the features of the student are n",
        ),
        (
            lambda s, t, b, c: hard_loss(s, t, b, c) + c.params["w"],
            TypeError,
            "context.params needs an init_loss",
        ),
        (
            lambda s, t, b, c: hard_loss(s, t, b, c) * c.view,
            TypeError,
            "context.view needs views",
        ),
    ],
)
def test_what_a_loss_lacks_is_named_with_what_fills_it(loss, error, match):
    with pytest.raises(error, match=match) as caught:
        take_step(loss)
    assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


def test_errors_of_the_loss_itself_are_left_alone():
    def index(student, teachers, batch, context):
        return [][0]

    def add(student, teachers, batch, context):
        return student.logits + "a"

    with pytest.raises(IndexError, match="^list index out of range"):
        take_step(index)
    with pytest.raises(TypeError) as caught:
        take_step(add)
    assert "context" not in str(caught.value)


def test_arguments_of_another_kind_are_named():
    with pytest.raises(TypeError, match=r"teachers must be a sequence of models, .*: write \[te"):
        distill.make_train_step(LINEAR, optax.sgd(0.1), hard_loss, teachers=LINEAR)
    batch = tuple(make_batch().values())
    with pytest.raises(TypeError, match="batch must be a dict .*, got a tuple"):
        take_step(hard_loss, batch=batch)
    params = LINEAR.init(KEY, batch[0])["params"]
    with pytest.raises(ValueError, match="expected variables .* as model.init returns them, got"):
        distill.init_train_state(params, optax.sgd(0.1))
