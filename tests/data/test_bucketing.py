"""Lengths of texts, and the few bucket lengths to which batches are cut."""

import itertools

import numpy as np
import pytest

from jaxkd.data.bucketing import LengthBuckets, token_lengths
from jaxkd.data.tokens import check_ids


def make_tokens(lengths, width):
    """Makes sentences of these lengths, padded on the right."""
    return (np.arange(width) < np.asarray(lengths)[:, None]).astype(np.int32)


def test_length_is_the_position_of_the_last_token_over_all_rows():
    pairs = np.array(
        [[[1, 2, 0, 0], [1, 0, 0, 0]], [[0, 0, 0, 0], [1, 2, 3, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
    )
    np.testing.assert_array_equal(token_lengths(pairs), [2, 3, 0])


def test_tokens_are_integers_with_an_axis():
    with pytest.raises(TypeError, match="tokens must be integers, with 0 as padding, got float64"):
        token_lengths(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"must have the shape \[N, ..., S\], got \(3,\)"):
        token_lengths(np.ones(3, int))


def test_negative_tokens_are_no_padding():
    with pytest.raises(ValueError, match="tokens must be at least 0, which is padding, got -100"):
        token_lengths(np.array([[5, 7, -100, -100]]))
    assert token_lengths(np.zeros((0, 4), np.int32)).shape == (0,)


# All lengths from 1 to 24, so that a length of 24 occurs.
SENTENCES = make_tokens(np.random.default_rng(0).permutation(np.arange(200) % 24 + 1), 24)


def test_bucket_lengths_hold_everything_and_are_few():
    assert LengthBuckets.fit(SENTENCES, count=4).lengths == (8, 16, 24)
    assert LengthBuckets.fit(SENTENCES, count=1).lengths == (24,)


def test_shortest_bucket_that_holds_a_length_is_chosen():
    buckets = LengthBuckets((8, 16, 24))
    assert [buckets.choose(length) for length in (0, 8, 9, 24)] == [8, 8, 16, 24]


def test_texts_that_no_bucket_holds_are_not_cut():
    buckets = LengthBuckets((4, 8))
    tokens = make_tokens([3, 16, 2], 20)
    message = "texts have up to 16 tokens, but the last bucket has 8: fit the buckets on all splits"
    with pytest.raises(ValueError, match=message):
        next(buckets.batches(tokens, 1))
    with pytest.raises(ValueError, match=message):
        buckets.choose(16)
    # Padding alone may be cut.
    assert [batch.shape[1] for _, batch in buckets.batches(tokens[::2], 1)] == [4, 4]


@pytest.mark.parametrize("lengths", [(), (8, 8), (16, 8), (0, 4), (-8, 8), (8, 24, 16)])
def test_bucket_lengths_must_be_positive_and_rise(lengths):
    with pytest.raises(ValueError, match="must be positive and in rising order, got ") as caught:
        LengthBuckets(lengths)
    assert str(lengths) in str(caught.value)


@pytest.mark.parametrize("lengths", [(1,), (8,), (1, 2, 3), (8, 24)])
def test_rising_bucket_lengths_are_taken_as_they_are(lengths):
    assert LengthBuckets(lengths).lengths == lengths


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (SENTENCES, {"count": 0}, r"shape \(200, 24\), count=0, multiple=8"),
        (SENTENCES, {"count": -1}, "count=-1"),
        (SENTENCES, {"count": 2, "multiple": 0}, "count=2, multiple=0"),
        (SENTENCES[:0], {"count": 2}, r"at least one example, .* shape \(0, 24\)"),
    ],
)
def test_buckets_need_examples_and_positive_numbers(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        LengthBuckets.fit(tokens, **options)


def test_sentences_without_tokens_fit_the_first_bucket():
    tokens = make_tokens([0, 0, 20], 20)
    assert LengthBuckets.fit(tokens, count=2).lengths == (8, 20)
    assert [len(rows) for rows, _ in LengthBuckets((8, 20)).batches(tokens, 2)] == [2, 1]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_other_bucket_lengths_pad_less(count):
    lengths = np.minimum(np.random.default_rng(2).geometric(0.15, 60), 40)
    tokens = make_tokens(lengths, 43)

    def count_tokens(bucket_lengths):
        buckets = LengthBuckets(bucket_lengths)
        return sum(buckets.choose(length) for length in lengths)

    alternatives = itertools.combinations(range(4, 44, 4), count - 1)
    best = LengthBuckets.fit(tokens, count=count, multiple=4).lengths
    assert count_tokens(best) == min(count_tokens((*shorter, 43)) for shorter in alternatives)


def test_batches_hold_every_example_once_cut_to_its_bucket():
    buckets = LengthBuckets((8, 16, 24))
    batches = list(buckets.batches(SENTENCES, 30))
    all_rows = np.concatenate([rows for rows, _ in batches])
    assert sorted(all_rows) == list(range(200))
    assert [len(rows) for rows, _ in batches] == [30] * 6 + [20]
    assert {batch.shape[1] for _, batch in batches} == {8, 16, 24}
    for rows, batch in batches:
        width = batch.shape[1]
        np.testing.assert_array_equal(batch, SENTENCES[rows, :width])
        assert not SENTENCES[rows, width:].any()


def padded(padding, *, on_the_left=False):
    """Returns 20 texts of 3 to 11 tokens from 100 on, each of which ends in 102, in 12 columns."""
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(3, 12, 20):
        text = [*rng.integers(103, 200, length - 1), 102]
        fill = [padding] * (12 - length)
        rows.append([*fill, *text] if on_the_left else [*text, *fill])
    return np.array(rows, np.int32)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (padded(0, on_the_left=True), "most examples begin with 0, as padded on the left: pad"),
        (padded(1), "most examples end in several tokens 1, read as text: pad with 0"),
        # RoBERTa's texts begin with 0, and its padding is 1.
        (np.pad(padded(1), ((0, 0), (1, 0))), "most examples end in several tokens 1, read"),
    ],
)
def test_padding_of_another_kind_is_said(rows, message):
    for act in (lambda: LengthBuckets.fit(rows, count=2), lambda: check_ids(rows, 200)):
        with pytest.warns(UserWarning, match=message) as said:
            act()
        assert [warning.filename for warning in said] == [__file__]
    with pytest.warns(UserWarning, match=message):
        LengthBuckets.fit(rows[:, None], count=2)


def test_usual_padding_is_not_said():
    # Truncated texts all end in the same token, but once.
    truncated = np.where(np.arange(8) == 7, 102, padded(0)[:, :8] + 5)
    for rows in (padded(0), truncated, padded(0)[:1], np.zeros((3, 4), np.int32)):
        LengthBuckets.fit(rows, count=2)
        check_ids(rows, 300)
    check_ids(np.arange(5), 5)
