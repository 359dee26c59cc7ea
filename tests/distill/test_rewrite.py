"""A batch that the step rewrites, such as by samples of the student: GKD as a plan."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import decode, distill, losses, models
from jaxkd.distill.step import Purpose
from small_plans import (
    PLACEMENTS,
    TRAIN,
    get_variables,
    hard_loss,
    make_model,
    make_stage,
    run_error,
    soft_loss,
    train,
    train_with_kill,
)

KEY = jax.random.key(5)
TX = optax.sgd(0.1, momentum=0.9)
MODEL, TEACHER = make_model(), make_model(8)
BATCH = {name: jnp.asarray(array[:16]) for name, array in TRAIN.items()}


def init(model, seed):
    return model.init(jax.random.key(seed), BATCH["inputs"])


def write_inputs(variables, batch, key):
    """Depends on all of its arguments: on the student, on the batch and on the key."""
    noise = jax.random.normal(key, batch["inputs"].shape)
    logits = MODEL.apply(variables, batch["inputs"], train=False)[0].logits
    return {**batch, "inputs": batch["inputs"] + 0.3 * noise + logits.sum(-1, keepdims=True)}


def take_steps(step, batches, *, key=KEY, teachers=(), state=None):
    state = distill.init_train_state(init(MODEL, 0), TX) if state is None else state
    for batch in batches:
        state, metrics = step(state, batch, teachers, key)
    return state, metrics


# The step


def test_a_step_is_that_of_a_loop_which_rewrites_the_batch_itself():
    teachers = (init(TEACHER, 1),)
    loss = functools.partial(distill.make_train_step, MODEL, TX, soft_loss, teachers=[TEACHER])
    state, metrics = take_steps(loss(rewrite=write_inputs), [BATCH] * 3, teachers=teachers)

    plain, expected = loss(), distill.init_train_state(init(MODEL, 0), TX)
    for number in range(3):
        key = jax.random.fold_in(jax.random.fold_in(KEY, Purpose.REWRITE), number)
        batch = jax.jit(write_inputs)(expected.variables, BATCH, key)
        expected, expected_metrics = plain(expected, batch, teachers, KEY)
    chex.assert_trees_all_equal(metrics, expected_metrics)
    chex.assert_trees_all_equal(state, expected)
    unwritten, _ = take_steps(plain, [BATCH] * 3, teachers=teachers)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state, unwritten, rtol=1e-3)


def test_purposes_keep_their_numbers():
    assert [(p.name, p.value) for p in Purpose][-3:] == [("BUCKET", 6), ("LOSS", 7), ("REWRITE", 8)]


def test_student_teachers_augmentation_and_loss_see_the_rewritten_batch():
    def set_numbers(variables, batch, key):
        return {
            "inputs": jnp.full((16, 5), 2.0),
            "labels": jnp.full(16, 7),
            "scale": batch["scale"],
        }

    def apply(variables, inputs, *, train, key=None):
        return models.Outputs(inputs[:, :3] * variables["params"]["w"], {}), {}

    def loss(student, teachers, batch, context):
        numbers = student.logits[:, 0], teachers[0].logits[:, 0], batch["labels"], batch["scale"]
        terms = [jnp.broadcast_to(number, 16).astype(jnp.float32) for number in numbers]
        return terms[0], dict(zip("stlc", terms, strict=True))

    model = models.Model(lambda key, x: {"params": {"w": jnp.ones(())}}, apply)
    step = distill.make_train_step(
        model,
        TX,
        loss,
        teachers=[model],
        rewrite=set_numbers,
        augment=lambda key, inputs: inputs + 1,
    )
    variables = {"params": {"w": jnp.ones(())}}
    state = distill.init_train_state(variables, TX)
    batch = {**BATCH, "scale": jnp.float32(5)}
    _, metrics = step(state, batch, ({"params": {"w": jnp.float32(10)}},), KEY)
    assert {name: float(metrics[name]) for name in "stlc"} == {"s": 3, "t": 30, "l": 7, "c": 5}


def test_no_gradient_flows_through_the_rewriting():
    def scale_by_weights(variables, batch, key):
        scale = 1 + variables["params"]["Dense_1"]["bias"].sum()
        return {**batch, "inputs": scale * batch["inputs"]}

    step = distill.make_train_step(MODEL, optax.sgd(1.0), hard_loss, rewrite=scale_by_weights)
    variables = init(MODEL, 0)
    state, _ = step(distill.init_train_state(variables, optax.sgd(1.0)), BATCH, (), KEY)
    plain = distill.make_train_step(MODEL, optax.sgd(1.0), hard_loss)
    # The biases are 0 at first, so that the batch stays as it is and only a gradient would differ.
    expected, _ = plain(distill.init_train_state(variables, optax.sgd(1.0)), BATCH, (), KEY)
    chex.assert_trees_all_equal(state.params, expected.params)


def test_each_step_draws_anew_and_from_bits_of_its_own():
    keys = []

    def record(name, key):
        jax.debug.callback(
            lambda bits: keys.append((name, *bits.tolist())), jax.random.key_data(key)
        )

    def rewrite(variables, batch, key):
        record("rewrite", key)
        return batch

    def augment(key, inputs):
        record("augment", key)
        return inputs

    def loss(student, teachers, batch, context):
        record("loss", context.key)
        return hard_loss(student, teachers, batch, context)

    step = distill.make_train_step(MODEL, TX, loss, rewrite=rewrite, augment=augment)
    take_steps(step, [BATCH] * 3)
    jax.effects_barrier()
    assert len(keys) == 9 and len({key[1:] for key in keys}) == 9
    expected = jax.random.fold_in(jax.random.fold_in(KEY, Purpose.REWRITE), 1)
    assert ("rewrite", *jax.random.key_data(expected).tolist()) in keys


@pytest.mark.parametrize(
    ("rewrite", "error", "message"),
    [
        (lambda v, b, k: b["inputs"], TypeError, "must return the batch, a dict of arrays, got a"),
        (lambda v, b, k: None, TypeError, "must return the batch, .* got a NoneType: return"),
        (lambda v, b, k: {"inputs": b["inputs"]}, ValueError, "others, but labels is in one of"),
        (lambda v, b, k: {**b, "x": 1, "y": 2}, ValueError, "but x, y are in one of them alone"),
        (
            lambda v, b, k: {**b, "inputs": b["inputs"][:, :4]},
            ValueError,
            r"but inputs is float32\[16, 5\] in the batch and float32\[16, 4\] in what it returns",
        ),
        (
            lambda v, b, k: {**b, "labels": b["labels"].astype(jnp.float32)},
            ValueError,
            r"labels is int32\[16\] in the batch and float32\[16\] in what it returns: pad, cut or",
        ),
        (
            lambda v, b, k: {**b, "inputs": {"a": b["inputs"]}},
            ValueError,
            "inputs, inputs/a are",
        ),
    ],
)
def test_what_is_no_batch_is_refused(rewrite, error, message):
    step = distill.make_train_step(MODEL, TX, hard_loss, rewrite=rewrite)
    with pytest.raises(error, match=message) as caught:
        take_steps(step, [BATCH])
    assert "\n" not in str(caught.value)


def test_a_function_that_changes_its_argument_does_not_change_the_batch():
    def change(variables, batch, key):
        batch["inputs"] = batch["inputs"] * 2
        return batch

    step = distill.make_train_step(MODEL, TX, hard_loss, rewrite=change)
    batch = dict(BATCH)
    take_steps(step, [batch])
    assert batch["inputs"] is BATCH["inputs"]


# Plans


def make_plan(**options):
    student = {"teachers": ("teacher",), "loss": soft_loss, "rewrite": write_inputs} | options
    return [make_stage("teacher", 8), make_stage("student", **student)]


def test_a_training_that_is_stopped_at_half_ends_with_the_same_bits(tmp_path, monkeypatch):
    expected, expected_run = train(tmp_path / "unbroken", make_plan(), save_every=0)
    trained, run, saves = train_with_kill(monkeypatch, tmp_path / "killed", make_plan, 12 + 6)
    assert [step for folder, step in saves if "student" in folder][:6] == [1, 2, 3, 4, 5, 6]
    chex.assert_trees_all_equal(get_variables(trained), get_variables(expected))
    assert run.metrics() == expected_run.metrics()


@pytest.mark.thorough
@pytest.mark.parametrize("placement", ["mesh of 8", "pmap", "vectorized"])
def test_every_placement_rewrites(tmp_path, placement):
    expected, _ = train(tmp_path / "one", make_plan(), (0, 1))
    trained, _ = train(tmp_path / "other", make_plan(), (0, 1), placement=PLACEMENTS[placement]())
    chex.assert_trees_all_close(
        get_variables(trained)["student"], get_variables(expected)["student"], rtol=1e-3, atol=1e-5
    )
    plain, _ = train(tmp_path / "plain", make_plan(rewrite=None))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(
            get_variables(plain)["student"][0], get_variables(expected)["student"][0], rtol=1e-2
        )


class NextToken(nn.Module):
    """Predicts a token from the one before it."""

    width: int = 8

    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(12)(nn.tanh(nn.Embed(12, self.width)(tokens)))


SMALL = models.from_linen(NextToken(), train_argument=None)
PROMPT, LENGTH = 2, 6


def continue_prompts(variables, batch, key):
    """Lets the student continue half of the texts."""

    def step(state, tokens):
        return SMALL.apply(variables, tokens[:, None], train=False)[0].logits[:, 0], state

    key, mix_key = jax.random.split(key)
    prompts = batch["inputs"][:, :PROMPT]

    def read_prompt(state, tokens):
        # The last token of the prompt takes the place of the token that starts a sentence.
        last = jnp.where(state["is_first"], prompts[:, -1], tokens)
        logits, _ = step((), last)
        return logits, {"is_first": jnp.zeros_like(state["is_first"])}

    state = {"is_first": jnp.ones(len(prompts), bool)}
    written = decode.sample(read_prompt, state, key, max_length=LENGTH - PROMPT)
    sampled = jnp.concatenate([prompts, written], 1)
    is_sampled = jax.random.bernoulli(mix_key, 0.5, (len(prompts), 1))
    return {**batch, "inputs": jnp.where(is_sampled, sampled, batch["inputs"])}


def on_own_samples(student, teachers, batch, context):
    where = batch["inputs"][:, 1:] > 0
    logits = (outputs.logits[:, :-1] for outputs in (student, teachers[0]))
    values = losses.jensen_shannon_divergence(*logits, temperature=1.0, beta=0.5)
    return jnp.where(where, values, 0.0).mean(-1)


@pytest.mark.parametrize("placement", [None, "vectorized"])
def test_samples_of_the_student_are_drawn_in_a_plan(tmp_path, placement):
    tokens = np.random.default_rng(0).integers(4, 12, (24, LENGTH), np.int32)
    variables = SMALL.init(jax.random.key(1), tokens)
    teacher = distill.Pretrained("teacher", SMALL, jax.tree.map(lambda w: 3 * w, variables))
    data = {"inputs": tokens}
    stage = make_stage(
        "student",
        model=SMALL,
        data=data,
        loss=on_own_samples,
        teachers=("teacher",),
        rewrite=continue_prompts,
        batch_size=8,
        steps=40,
        tx=optax.sgd(1.0, momentum=0.9),
    )

    def make_score(model):
        def score(variables, examples):
            student, other = (
                SMALL.apply(v, examples["inputs"], train=False)[0].logits
                for v in (variables, teacher.variables)
            )
            return {"kl": float(losses.kl_divergence(student, other, temperature=1.0).mean())}

        return score

    options = {
        "validation": {"inputs": tokens[:4]},
        "make_score": make_score,
        "evaluations": 4,
        "placement": placement and PLACEMENTS[placement](),
    }
    trained, run = train(tmp_path, [teacher, stage], (0, 1), **options)
    scores = [record["validation_kl"] for record in run.metrics() if record["seed"] == 0]
    assert scores[-1] < 0.7 * scores[0]
    assert trained["student"][0].step == 40


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_teachers": True}, ValueError, "not known beforehand: leave out cache_teachers"),
        ({"augment": lambda key, x: x, "views": 2}, ValueError, "beforehand: leave out views"),
        (
            {"rewrite": "x"},
            TypeError,
            r"must be a function \(variables, batch, key\) -> batch, got",
        ),
        ({"rewrite": lambda batch: batch}, TypeError, r"a function \(variables, batch, key\)"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make_stage("a", **{"rewrite": write_inputs, "teachers": ("b",)} | options)


def test_a_step_with_views_is_refused():
    with pytest.raises(ValueError, match="no fixed views: leave out views"):
        distill.make_train_step(MODEL, TX, hard_loss, rewrite=write_inputs, views=2)


def test_peers_that_rewrite_are_refused():
    peers = [make_stage(name, rewrite=write_inputs) for name in ("a", "b")]
    with pytest.raises(ValueError, match="peer 'a' has a rewrite, but peers train in one step"):
        distill.mutual_learning(peers)


def test_numbers_from_outside_of_jax_are_refused(tmp_path):
    def draw_outside(variables, batch, key):
        return {**batch, "inputs": batch["inputs"] + np.random.default_rng().normal()}

    message = run_error(tmp_path, make_plan(rewrite=draw_outside))
    assert "the rewrite of stage 'student' draws numbers outside of JAX" in message


def test_another_rewrite_is_another_training(tmp_path):
    plan = make_plan(steps=2)
    train(tmp_path, plan)

    def write_others(variables, batch, key):
        return {**batch, "inputs": 2 * batch["inputs"]}

    changed = [plan[0], dataclasses.replace(plan[1], rewrite=write_others)]
    assert "its model, loss, optimizer or augmentation changed" in run_error(tmp_path, changed)
    without = [plan[0], dataclasses.replace(plan[1], rewrite=None)]
    assert "rewrite" in run_error(tmp_path, without)
