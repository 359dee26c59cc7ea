"""Tests of derived models, born-again generations and mutual learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxkd import distill, evaluate, losses, models
from small_plans import (
    PLACEMENTS,
    TRAIN,
    TX,
    VALIDATION,
    hard_loss,
    make_model,
    make_stage,
    soft_loss,
    train,
    train_with_kill,
)


def assert_close(ours, theirs, **tolerances):
    tolerances = {"rtol": 1e-4, "atol": 1e-5} | tolerances
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerances), ours, theirs)


def predict(model, variables):
    return evaluate.make_predict(model)(variables, VALIDATION["inputs"])


def mean_of(*variables):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *variables)


# Derived models


def test_a_derived_model_teaches_and_starts_stages(tmp_path):
    first, second = make_stage("first"), make_stage("second")
    soup = distill.Derived("soup", make_model(), ("first", "second"), mean_of)
    student = make_stage("student", loss=soft_loss, teachers=("soup",), start="first")
    plan = [student, soup, first, second]
    trained, run = train(tmp_path, plan, seeds=(0, 1))
    for seed in (0, 1):
        expected = mean_of(*(trained[name][seed].variables for name in ("first", "second")))
        assert_close(trained["soup"][seed].variables, expected)
        logits = predict(make_model(), expected)
        accuracy = (logits.argmax(-1) == VALIDATION["labels"]).mean()
        assert trained["soup"][seed].validation_accuracy == pytest.approx(accuracy)
    rows = distill.evaluate_plan(plan, trained, VALIDATION, reference="soup", repeats=1)
    assert [row.name for row in rows] == ["student", "soup", "first", "second"]
    # The weights of the mean are part of what the student was computed from.
    again, _ = train(tmp_path, plan, seeds=(0, 1))
    jax.tree.map(
        np.testing.assert_array_equal,
        again["student"][1].variables,
        trained["student"][1].variables,
    )
    other = dataclasses.replace(soup, combine=lambda first, second: first)
    with pytest.raises(Exception, match="the weights of 'soup' changed"):
        train(tmp_path, [student, other, first, second], seeds=(0, 1))


def test_a_chain_of_derived_models_trains_in_order(tmp_path):
    """Vectorised, stages are grouped by what they need, through derived models as well."""
    first = make_stage("first")
    copy = distill.Derived("copy", make_model(), ("first",), lambda variables: variables)
    twice = distill.Derived("twice", make_model(), ("copy", "first"), mean_of)
    second = make_stage("second", start="twice")
    plan = [second, twice, copy, first]
    assert distill.count_concurrent_stages(plan) == 1
    trained, _ = train(tmp_path / "vectorized", plan, placement=PLACEMENTS["vectorized"]())
    expected, _ = train(tmp_path / "alone", plan)
    assert_close(trained["second"][0].variables, expected["second"][0].variables)


@pytest.mark.parametrize(
    ("combine", "match"),
    [
        (lambda variables: {"params": {}}, "is missing in what its function returns"),
        (lambda variables: jax.tree.map(jnp.ravel, variables), r"is \(\d+,\) in what its function"),
        (lambda variables: variables["params"], "a dict with 'params' as model.init returns"),
        (lambda variables: variables["param"], r"raises KeyError \('param'\) on the variables of"),
        (lambda first, second: first, "must take the variables of its 1 sources"),
    ],
)
def test_unfit_derived_weights_are_refused_before_the_training(tmp_path, combine, match):
    plan = [
        make_stage("first", steps=10**6),
        distill.Derived("other", make_model(), ("first",), combine),
    ]
    with pytest.raises((TypeError, ValueError), match=match):
        train(tmp_path, plan)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda leaf: np.asarray(leaf)[:1], r"the derived model 'other' cannot be made: \['params"),
        (lambda leaf: leaf * np.nan, "returns 39 weights that are NaN or infinite"),
    ],
)
def test_derived_weights_are_checked_when_they_are_there(tmp_path, change, match):
    """Those of a function of NumPy cannot be traced, and no trace shows NaN."""

    def combine(variables):
        return jax.tree.map(change, variables)

    plan = [make_stage("first"), distill.Derived("other", make_model(), ("first",), combine)]
    with pytest.raises(ValueError, match=match):
        train(tmp_path, plan)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sources": "first"}, TypeError, "sources of the derived model 'x' must be a tuple of"),
        ({"sources": ()}, ValueError, "'x' has no sources"),
        ({"combine": 3}, TypeError, "must be a function"),
        ({"model": make_model}, TypeError, "must be a models.Model"),
    ],
)
def test_unfit_attributes(options, error, match):
    defaults = {"model": make_model(), "sources": ("a",), "combine": mean_of}
    with pytest.raises(error, match=match):
        distill.Derived("x", **defaults | options)


# Born-again generations


def test_born_again_generations_and_their_ensemble(tmp_path):
    plan = distill.born_again(make_stage("net"), soft_loss, generations=3)
    assert [entry.name for entry in plan] == ["net", "net_2", "net_3", "net_ensemble"]
    assert [entry.needs for entry in plan[:3]] == [(), ("net",), ("net_2",)]
    trained, _ = train(tmp_path, plan)
    ensemble = predict(plan[3].model, trained["net_ensemble"][0].variables)
    probabilities = [
        jax.nn.softmax(predict(make_model(), trained[entry.name][0].variables))
        for entry in plan[:3]
    ]
    np.testing.assert_allclose(jax.nn.softmax(ensemble), sum(probabilities) / 3, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        distill.born_again(make_stage("net"), soft_loss, generations=1)


# Mutual learning


def mutual_loss(student, teachers, batch, context):
    divergences = [
        losses.kl_divergence(student.logits, peer.logits, temperature=1.0) for peer in teachers
    ]
    return hard_loss(student, teachers, batch, context) + sum(divergences) / len(divergences)


def make_peers(**options):
    options = {"loss": mutual_loss} | options
    return [
        make_stage("narrow", width=3, dropout=0.3, **options),
        make_stage("wide", width=6, batch_norm=True, tx=optax.sgd(0.05), **options),
        make_stage("third", width=4, **options),
    ]


def test_peers_take_the_gradients_of_their_own_losses(tmp_path):
    """As Zhang et al.'s Algorithm 1, with both predictions before the step."""
    peers = [make_stage("a", width=3, loss=mutual_loss, steps=3, tx=optax.sgd(0.1))]
    peers.append(dataclasses.replace(peers[0], name="b", model=make_model(6)))
    plan = distill.mutual_learning(peers)
    trained, _ = train(tmp_path, plan)
    joint_stage = plan[0]
    variables = joint_stage.model.init(jax.random.key(3), TRAIN["inputs"][:1])
    step = distill.make_train_step(joint_stage.model, joint_stage.tx, joint_stage.loss)
    state = distill.init_train_state(variables, joint_stage.tx)
    batch = jax.tree.map(lambda array: array[:16], TRAIN)

    def own_loss(params, name, models):
        logits = {
            other: models[other].apply({"params": p}, batch["inputs"], train=True)[0].logits
            for other, p in params.items()
        }
        log_p = {other: jax.nn.log_softmax(value) for other, value in logits.items()}
        (other,) = logits.keys() - {name}
        teacher = jax.lax.stop_gradient(log_p[other])
        labels = jax.nn.one_hot(batch["labels"], 3)
        cross_entropy = -(labels * log_p[name]).sum(-1)
        return (cross_entropy + (jnp.exp(teacher) * (teacher - log_p[name])).sum(-1)).mean()

    models = {peer.name: peer.model for peer in peers}
    expected = {
        name: jax.tree.map(
            lambda p, g: p - 0.1 * g,
            state.params[name],
            jax.grad(own_loss)(state.params, name, models)[name],
        )
        for name in models
    }
    state, metrics = step(state, batch, (), jax.random.key(0))
    assert_close(state.params, expected)
    assert metrics["loss"] == pytest.approx(float(metrics["a"] + metrics["b"]), rel=1e-5)
    assert (
        trained["a"][0].variables["params"].keys()
        == models["a"].init(jax.random.key(0), TRAIN["inputs"][:1])["params"].keys()
    )


@pytest.mark.thorough
def test_peers_resume_bit_for_bit(monkeypatch, tmp_path):
    trained, run = train(tmp_path / "unbroken", distill.mutual_learning(make_peers()))
    resumed, other, _ = train_with_kill(
        monkeypatch, tmp_path / "killed", lambda: distill.mutual_learning(make_peers()), 5
    )
    for name in ("narrow", "wide", "third", "peers"):
        jax.tree.map(
            np.testing.assert_array_equal, resumed[name][0].variables, trained[name][0].variables
        )
    assert other.metrics() == run.metrics()
    assert set(run.metrics()[0]["terms"]) == {"narrow", "wide", "third"}


@pytest.mark.thorough
def test_peers_on_eight_devices(tmp_path):
    def make_plan():
        peers = [make_stage(name, width, loss=mutual_loss) for name, width in (("a", 3), ("b", 6))]
        return distill.mutual_learning(peers)

    here, _ = train(tmp_path / "here", make_plan(), placement=PLACEMENTS["mesh of 8"]())
    alone, _ = train(tmp_path / "alone", make_plan())
    assert_close(here["a"][0].variables, alone["a"][0].variables)


def test_parameters_of_a_loss_belong_to_their_peer(tmp_path):
    def init_loss(key):
        return losses.init_projector(key, 3, 6)

    def loss(student, teachers, batch, context):
        projected = losses.project(context.params, student.features["hidden"])
        return losses.hint_loss(projected, teachers[0].features["hidden"])

    peers = [
        make_stage("projecting", width=3, loss=loss, init_loss=init_loss, loss_tx=TX, steps=3),
        make_stage("other", width=6, steps=3),
    ]
    trained, run = train(tmp_path, distill.mutual_learning(peers))
    assert run.metrics()[-1]["terms"].keys() == {"projecting", "other"}
    assert trained["projecting"][0].validation_accuracy > 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a, b: [a], "at least two stages of different names, got \\['narrow'\\]"),
        (lambda a, b: [a, a], "at least two stages of different names"),
        (lambda a, b: [a, dataclasses.replace(b, steps=3)], "but differ in steps: pass the same"),
        (lambda a, b: [a, dataclasses.replace(b, data=VALIDATION)], "but differ in data"),
        (lambda a, b: [a, dataclasses.replace(b, teachers=("t",))], "'wide' has teachers or a st"),
        (lambda a, b: [a, dataclasses.replace(b, start="t")], "'wide' has teachers or a start"),
        (lambda a, b: a, "at least two stages of different names, got \\['narrow'\\]"),
    ],
)
def test_unfit_peers(change, match):
    with pytest.raises(ValueError, match=match):
        distill.mutual_learning(change(*make_peers()[:2]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: distill.mutual_learning([make_stage("a"), "b"]), "a list of stages, but it has a"),
        (lambda: distill.born_again("a", soft_loss, generations=2), "must be a Stage, got a str"),
        (lambda: distill.born_again(make_stage("a"), soft_loss, generations="2"), "be an integer"),
    ],
)
def test_schemes_of_unfit_types(make, match):
    with pytest.raises(TypeError, match=match):
        make()


FIVE_CLASSES = models.from_linen(nn.Dense(5), train_argument=None)


def mean_loss(student, teachers, batch, context):
    return mutual_loss(student, teachers, batch, context).mean()


def second_teacher_loss(student, teachers, batch, context):
    return losses.kl_divergence(student.logits, teachers[1].logits, temperature=1.0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"loss": mean_loss}, ValueError, r"the loss of the peer 'b' must have one value per exam"),
        ({"loss": second_teacher_loss}, IndexError, "further teachers than the 1 other peers"),
        (
            {"model": FIVE_CLASSES},
            ValueError,
            r"the same classes, but have logits \{'a': \(1, 3\), ",
        ),
    ],
)
def test_a_peer_that_does_not_fit_is_named(tmp_path, options, error, match):
    peers = [make_stage("a", loss=mutual_loss), make_stage("b", **{"loss": mutual_loss} | options)]
    with pytest.raises(error, match=match):
        train(tmp_path, distill.mutual_learning(peers))


def test_peers_that_ignore_each_other_are_named(tmp_path):
    """One of two may ignore the other, as a teacher that trains together with its student."""
    alone = distill.mutual_learning([make_stage("a"), make_stage("b")])
    with pytest.warns(UserWarning, match="no loss of the peers a, b depends on another") as caught:
        train(tmp_path / "alone", alone)
    assert len(caught) == 1
    together = distill.mutual_learning([make_stage("a"), make_stage("b", loss=mutual_loss)])
    train(tmp_path / "together", together)
