"""Plans on batches of texts of similar length, cut to their bucket, train like padded ones."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import small_plans
from jaxkd import distill, evaluate, models
from jaxkd.data.bucketing import LengthBuckets
from small_plans import (
    get_variables,
    hard_loss,
    mesh_placement,
    soft_loss,
    train_with_kill,
    vectorized_placement,
)

BUCKETS = LengthBuckets((8, 16, 24))
STEPS = 15
"""More than the 12.5 batches of an epoch, so that batches come from two pools."""

# The texts are few.
pytestmark = pytest.mark.filterwarnings("ignore:.*are also among those that stages train on")


class BagOfWords(nn.Module):
    """The mean of embedded tokens."""

    @nn.compact
    def __call__(self, tokens, train=False):
        is_token = (tokens != 0)[..., None].astype(jnp.float32)
        total = (nn.Embed(30, 4)(tokens) * is_token).sum(1)
        return nn.Dense(2)(total / jnp.maximum(is_token.sum(1), 1))


MODEL = models.from_linen(BagOfWords())


def make_sentences():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 25, 200)
    tokens = np.where(np.arange(24) < lengths[:, None], rng.integers(1, 30, (200, 24)), 0)
    return {"inputs": tokens.astype(np.int32), "labels": (tokens.max(1) > 27).astype(np.int32)}


SENTENCES = make_sentences()


def make_plan():
    teacher = distill.Stage(
        "teacher", MODEL, SENTENCES, hard_loss, optax.sgd(0.5), STEPS, batch_size=16
    )
    live = dataclasses.replace(teacher, name="live", loss=soft_loss, teachers=("teacher",))
    return [teacher, live, dataclasses.replace(live, name="cached", cache_teachers=True)]


def train(folder, plan, seeds=(0,), **options):
    """Trains with saves at the end of each stage alone."""
    options = {"validation": SENTENCES, "buckets": BUCKETS, "save_every": 1e9} | options
    trained, _ = small_plans.train(folder, plan, seeds, **options)
    return get_variables(trained)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The variables of two seeds on one device."""
    return train(tmp_path_factory.mktemp("trained"), make_plan(), (0, 1))


def test_predictions_of_cut_sentences_keep_their_order():
    inputs = SENTENCES["inputs"]
    variables = MODEL.init(jax.random.key(0), inputs)
    expected = evaluate.make_predict(MODEL, batch_size=32)(variables, inputs)
    logits = evaluate.make_predict(MODEL, batch_size=32, buckets=BUCKETS)(variables, inputs)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


@pytest.mark.thorough
def test_batches_are_cut_to_every_bucket_length(tmp_path):
    lengths = set()

    def record_length(student, teachers, batch, context):
        lengths.add(batch["inputs"].shape[1])
        return hard_loss(student, teachers, batch, context)

    stage = dataclasses.replace(make_plan()[0], loss=record_length, steps=40)
    train(tmp_path, [stage])
    assert lengths == set(BUCKETS.lengths)


@pytest.mark.thorough
def test_buckets_change_results_by_rounding_only(trained, tmp_path):
    padded = train(tmp_path, make_plan(), buckets=LengthBuckets((24,)))
    for name in padded:
        chex.assert_trees_all_close(trained[name][0], padded[name][0], atol=1e-5)


@pytest.mark.thorough
def test_cached_teacher_trains_the_same_student(trained, tmp_path):
    # The stage keeps its name, and with it the order of its examples.
    teacher, live, _ = make_plan()
    cached = train(tmp_path, [teacher, dataclasses.replace(live, cache_teachers=True)])
    chex.assert_trees_all_close(cached["live"][0], trained["live"][0], atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "make_placement",
    [lambda: vectorized_placement(2, 8), lambda: mesh_placement(8)],
    ids=["vectorized", "mesh of 8"],
)
def test_many_devices_and_students_train_in_buckets(trained, tmp_path, make_placement):
    on_devices = train(tmp_path, make_plan(), (0, 1), placement=make_placement())
    chex.assert_trees_all_close(on_devices, trained, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("number", [1, STEPS - 2, STEPS + 4])
def test_training_in_buckets_resumes_with_the_same_bits(trained, tmp_path, monkeypatch, number):
    def make_short_plan():
        teacher, _, cached = make_plan()
        return [teacher, cached]

    options = {"validation": SENTENCES, "buckets": BUCKETS}
    resumed, _, saves = train_with_kill(monkeypatch, tmp_path, make_short_plan, number, **options)
    assert len(saves) == 2 * STEPS
    for name, (variables,) in get_variables(resumed).items():
        chex.assert_trees_all_equal(variables, trained[name][0])


class Tagger(nn.Module):
    """Logits of each token."""

    @nn.compact
    def __call__(self, tokens, train=False):
        return nn.Dense(2)(nn.Embed(30, 4)(tokens))


def tag_loss(student, teachers, batch, context):
    return student.logits.mean((1, 2))


@pytest.mark.parametrize(
    ("cached", "make_score", "message"),
    [
        (False, None, "'teacher' has logits of each token, .*: pass a make_score, or no buckets"),
        (True, lambda model: None, "stage 'student' caches logits of each token of 'teacher'"),
    ],
)
def test_logits_of_tokens_are_refused_before_the_first_step(tmp_path, cached, make_score, message):
    teacher = distill.Stage(
        "teacher", models.from_linen(Tagger()), SENTENCES, tag_loss, optax.sgd(0.5), STEPS
    )
    student = dataclasses.replace(
        teacher, name="student", teachers=("teacher",), cache_teachers=cached
    )
    with pytest.raises(ValueError, match=message):
        train(tmp_path, [teacher, student], make_score=make_score)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("split", ["data", "validation"])
def test_texts_that_no_bucket_holds_are_refused_before_the_first_step(tmp_path, split):
    longer = {**SENTENCES, "inputs": np.pad(SENTENCES["inputs"], ((0, 0), (0, 6)))}
    longer["inputs"][3, 29] = 5
    (teacher, *_) = make_plan()
    options = {"validation": longer} if split == "validation" else {}
    if split == "data":
        teacher = dataclasses.replace(teacher, data=longer)
    with pytest.raises(ValueError, match="up to 30 tokens, but the last bucket has 24: fit the"):
        train(tmp_path, [teacher], **options)
    assert not (tmp_path / "checkpoints").exists()
