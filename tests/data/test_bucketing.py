"""Batches of similar length: cut to their bucket, they train and predict as padded ones do."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxkd import distill, evaluate, losses, models, runs
from jaxkd.data import bucketing
from jaxkd.data.bucketing import LengthBuckets
from jaxkd.distill import _batches
from jaxkd.models import Outputs
from jaxkd.runs import checkpoints

BUCKETS = LengthBuckets((8, 16, 24))


class Bag(nn.Module):
    """The mean of embedded tokens, and how wide its input was."""

    @nn.compact
    def __call__(self, tokens, train=False):
        counted = (tokens != 0)[..., None].astype(jnp.float32)
        mean = (nn.Embed(30, 4)(tokens) * counted).sum(1) / jnp.maximum(counted.sum(1), 1)
        return Outputs(
            nn.Dense(2, name="logits")(mean), {"width": jnp.full(len(tokens), tokens.shape[1])}
        )


MODEL = models.from_linen(Bag())


@pytest.fixture(scope="module")
def sentences():
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 25, 200)
    tokens = np.where(np.arange(24) < lengths[:, None], draw.integers(1, 30, (200, 24)), 0).astype(
        np.int32
    )
    return {"inputs": tokens, "labels": (tokens.max(1) > 27).astype(np.int32)}


def hard(student, teachers, batch, context):
    return losses.hard_cross_entropy(student.logits, batch["labels"])


def soft(student, teachers, batch, context):
    return losses.soft_cross_entropy(student.logits, teachers[0].logits, temperature=2.0)


def plan(data, steps=30):
    given = {"tx": optax.sgd(0.5), "steps": steps, "batch_size": 16}
    return (
        distill.Stage("teacher", MODEL, data, hard, **given),
        distill.Stage("live", MODEL, data, soft, teachers=("teacher",), **given),
        distill.Stage(
            "cached", MODEL, data, soft, teachers=("teacher",), cache_teachers=True, **given
        ),
    )


def train(folder, data, buckets=BUCKETS, seeds=(0,), **more):
    run = runs.open_run(folder, {})
    return distill.run_plan(
        plan(data), seeds, run, validation=data, buckets=buckets, save_every=1e9, **more
    )


def test_length_is_the_place_of_the_last_token_over_all_rows():
    pairs = np.array(
        [[[1, 2, 0, 0], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 2, 3, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
    )
    np.testing.assert_array_equal(bucketing.token_lengths(pairs), [2, 3, 0])


def test_tokens_are_integers_with_an_axis():
    with pytest.raises(TypeError, match="integers"):
        bucketing.token_lengths(np.ones((2, 3)))
    with pytest.raises(ValueError, match="shape"):
        bucketing.token_lengths(np.ones(3, int))


def test_bucket_lengths_hold_everything_and_are_few(sentences):
    buckets = LengthBuckets.fit(sentences["inputs"], count=4)
    assert buckets.lengths == (8, 16, 24)
    assert LengthBuckets.fit(sentences["inputs"], count=1).lengths == (24,)
    assert [buckets.choose(length) for length in (0, 8, 9, 24, 99)] == [8, 8, 16, 24, 24]
    with pytest.raises(ValueError, match="count"):
        LengthBuckets.fit(sentences["inputs"], count=0)


@pytest.mark.parametrize("lengths", [(), (8, 8), (16, 8), (0, 4)])
def test_bucket_lengths_must_rise(lengths):
    with pytest.raises(ValueError, match="rising order"):
        LengthBuckets(lengths)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_other_bucket_lengths_pad_less(count):
    lengths = np.minimum(np.random.default_rng(2).geometric(0.15, 60), 40)
    tokens = (np.arange(43) < lengths[:, None]).astype(np.int32)

    def padded_tokens(bucket_lengths):
        buckets = LengthBuckets(bucket_lengths)
        return sum(buckets.choose(length) for length in lengths)

    alternatives = itertools.combinations(range(4, 44, 4), count - 1)
    best = LengthBuckets.fit(tokens, count=count, multiple=4).lengths
    assert padded_tokens(best) == min(padded_tokens((*some, 43)) for some in alternatives)


def test_every_epoch_shows_each_sentence_once_among_sentences_of_its_length():
    lengths = np.random.default_rng(1).integers(1, 60, 64 * _batches.BATCHES_PER_POOL)
    select = _batches.make_bucketed_order(jax.random.key(0), lengths, 32)
    steps = [select(step) for step in range(4 * _batches.BATCHES_PER_POOL)]
    for epoch in range(2):
        seen = np.concatenate(
            steps[
                epoch * 2 * _batches.BATCHES_PER_POOL : (epoch + 1) * 2 * _batches.BATCHES_PER_POOL
            ]
        )
        assert sorted(seen) == list(range(len(lengths)))
    assert np.median([np.ptp(lengths[rows]) for rows in steps]) <= 3
    firsts = [lengths[rows[0]] for rows in steps]
    assert firsts != sorted(firsts)


def test_a_step_of_buckets_can_be_asked_for_first():
    lengths = np.random.default_rng(1).integers(1, 60, 500)
    in_turn = _batches.make_bucketed_order(jax.random.key(3), lengths, 16)
    expected = [in_turn(step) for step in range(80)]
    for step in (79, 0, 33):
        np.testing.assert_array_equal(
            _batches.make_bucketed_order(jax.random.key(3), lengths, 16)(step), expected[step]
        )


def test_fewer_sentences_than_a_batch_repeat():
    rows = _batches.make_bucketed_order(jax.random.key(0), np.array([3, 1]), 8)(0)
    assert sorted(rows) == [0] * 4 + [1] * 4


def test_predictions_of_cut_sentences_keep_their_order(sentences):
    variables = MODEL.init(jax.random.key(0), sentences["inputs"])
    whole = evaluate.make_predict(MODEL, batch_size=32)(variables, sentences["inputs"])
    cut = evaluate.make_predict(MODEL, batch_size=32, buckets=BUCKETS)(
        variables, sentences["inputs"]
    )
    np.testing.assert_allclose(cut, whole, atol=1e-6)


def test_training_sees_each_batch_in_the_narrowest_width(sentences, tmp_path):
    lengths_seen = set()

    def watched(student, teachers, batch, context):
        lengths_seen.add(batch["inputs"].shape[1])
        return hard(student, teachers, batch, context)

    stage = distill.Stage(
        "student", MODEL, sentences, watched, optax.sgd(0.1), steps=40, batch_size=16
    )
    distill.run_plan(
        [stage], [0], runs.open_run(tmp_path, {}), validation=sentences, buckets=BUCKETS
    )
    assert lengths_seen == {*BUCKETS.lengths}


def test_buckets_change_numbers_only_by_rounding(sentences, tmp_path):
    cut = train(tmp_path / "cut", sentences)
    whole = train(tmp_path / "whole", sentences, buckets=LengthBuckets((24,)))
    for name in cut:
        chex.assert_trees_all_close(cut[name][0].variables, whole[name][0].variables, atol=1e-5)


def test_a_teacher_that_answers_once_says_the_same(sentences, tmp_path):
    def taught(folder, **more):
        teacher, student, _ = plan(sentences)
        stages = teacher, dataclasses.replace(student, **more)
        run = runs.open_run(tmp_path / folder, {})
        return distill.run_plan(stages, [0], run, validation=sentences, buckets=BUCKETS)["live"][
            0
        ].variables

    chex.assert_trees_all_close(taught("live"), taught("cached", cache_teachers=True), atol=1e-5)


@pytest.mark.parametrize(
    "placement",
    [
        distill.VectorizedPlacement(distill.make_mesh(), 2),
        distill.MeshPlacement(distill.make_mesh()),
    ],
)
def test_many_devices_and_students_train_in_buckets(sentences, tmp_path, placement):
    alone = train(tmp_path / "alone", sentences, seeds=(0, 1))
    many = train(tmp_path / "many", sentences, seeds=(0, 1), placement=placement)
    for name in alone:
        for one, other in zip(alone[name], many[name], strict=True):
            chex.assert_trees_all_close(one.variables, other.variables, atol=1e-5)


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_a_training_in_buckets_resumes_with_the_same_bits(
    sentences, tmp_path, monkeypatch, dies_at
):
    expected = train(tmp_path / "whole", sentences)
    save, left = checkpoints.save, [dies_at]

    def dying(folder, step, *arguments, **keywords):
        if not left[0]:
            raise SystemExit("killed")
        left[0] -= 1
        save(folder, step, *arguments, **keywords)

    monkeypatch.setattr(checkpoints, "save", dying)
    with pytest.raises(SystemExit):
        distill.run_plan(
            plan(sentences),
            [0],
            runs.open_run(tmp_path / "cut", {}),
            validation=sentences,
            buckets=BUCKETS,
            save_every=0,
        )
    monkeypatch.undo()
    got = train(tmp_path / "cut", sentences)
    chex.assert_trees_all_equal(got["cached"][0].variables, expected["cached"][0].variables)


def test_a_score_of_ones_own_is_what_is_recorded(sentences, tmp_path):
    def make_score(model):
        return lambda variables, examples: evaluate.Score(float(len(examples["labels"])), 0.25)

    run = runs.open_run(tmp_path, {})
    trained = distill.run_plan(
        plan(sentences)[:1], [0], run, validation=sentences, make_score=make_score
    )
    assert trained["teacher"][0].validation_accuracy == 0.25
    assert run.metrics()[-1]["validation_loss"] == 200.0
