"""Tests of greedy decoding, sampling and beam search against an enumeration of all sentences."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.decode import Beams, beam_search, greedy, sample

V, T, END = 6, 4, 3
WORDS = 1, 4, 5


def step(state, tokens):
    """Returns different logits for every history, which the state encodes as a number."""
    history, table = state["history"] * V + tokens, state["table"]
    rows = history % table.shape[1]
    return table[jnp.arange(len(tokens)), rows], {"history": history, "table": table}


def draw(seed, batch=3, end_logit=0.0):
    rng = np.random.default_rng(seed)
    tables = rng.normal(0, 2, (batch, 997, V)).astype(np.float32)
    tables[..., END] += end_logit
    return {"history": jnp.zeros(batch, jnp.int32), "table": jnp.asarray(tables)}


def select(state, rows):
    return jax.tree.map(lambda leaf: leaf[rows], state)


def log_probability(table, sentence):
    """Sums the log-probabilities of the tokens of a sentence, in float64."""
    total, history = 0.0, 0
    for previous, token in itertools.pairwise((2, *sentence)):
        history = history * V + previous
        row = np.float64(table[history % len(table)])
        total += row[token] - np.log(np.exp(row).sum())
    return total


def sentences():
    """Yields every sentence of at most T tokens: those that end and those that are cut off."""
    for length in range(T + 1):
        for words in itertools.product(WORDS, repeat=length):
            yield (*words, END) if length < T else words


def brute_force(table, penalty):
    """Returns the scores of all sentences with the sentences, best first."""
    scored = [
        (log_probability(table, sentence) / ((5 + len(sentence)) / 6) ** penalty, sentence)
        for sentence in sentences()
    ]
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_enough_beams_find_the_best_sentences(seed, penalty):
    state = draw(seed)
    beams = 81
    result = beam_search(step, state, beams=beams, max_length=T, length_penalty=penalty)
    for table, tokens, scores in zip(
        np.asarray(state["table"]), *map(np.asarray, result), strict=True
    ):
        expected = brute_force(table, penalty)[:beams]
        np.testing.assert_allclose(scores, [score for score, _ in expected], rtol=1e-5)
        padded = [sentence + (0,) * (T - len(sentence)) for _, sentence in expected]
        assert [tuple(row) for row in tokens.tolist()] == padded


def test_best_sentences_include_short_ones_and_cut_off_ones():
    """Makes sure that the enumeration above covers both kinds."""
    best = []
    for seed in range(3):
        for table in np.asarray(draw(seed)["table"]):
            best += [sentence for _, sentence in brute_force(table, 0.6)[:4]]
    assert {len(sentence) for sentence in best} >= {1, 2, 3}
    assert any(sentence[-1] != END for sentence in best)


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_greedy(seed, penalty):
    state = draw(seed, batch=6, end_logit=1.0)
    tokens = greedy(step, state, max_length=T)
    result = beam_search(step, state, beams=1, max_length=T, length_penalty=penalty)
    np.testing.assert_array_equal(result.tokens[:, 0], tokens)
    assert tokens.dtype == jnp.int32 and not np.isin(tokens, 2).any()


@pytest.mark.thorough
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_scores_are_sums_of_log_probabilities_and_best_come_first(beams):
    state = draw(7, end_logit=1.0)
    result = jax.tree.map(np.asarray, beam_search(step, state, beams=beams, max_length=T))
    assert (np.diff(result.scores) <= 0).all()
    for table, tokens, scores in zip(np.asarray(state["table"]), *result, strict=True):
        rows = [tuple(token for token in row if token) for row in tokens.tolist()]
        assert len({*rows}) == beams and all(END not in row[:-1] for row in rows)
        np.testing.assert_allclose(scores, [log_probability(table, row) for row in rows], rtol=1e-5)


@pytest.mark.thorough
def test_more_beams_find_better_or_equal_scores():
    state = draw(8, batch=8)
    best = [
        beam_search(step, state, beams=beams, max_length=T).scores[:, 0].sum()
        for beams in (1, 3, 81)
    ]
    assert best[0] < best[1] <= best[2]


@pytest.mark.thorough
def test_other_sentences_of_the_batch_change_nothing():
    state = draw(9, batch=4, end_logit=1.0)

    def decode(state):
        return beam_search(step, state, beams=3, max_length=T), greedy(step, state, max_length=T)

    alone = [decode(select(state, slice(i, i + 1))) for i in range(4)]
    concatenated = jax.tree.map(lambda *parts: jnp.concatenate(parts), *alone)
    chex.assert_trees_all_close(decode(state), concatenated, rtol=1e-6)


@pytest.mark.thorough
def test_compiled_equals_eager():
    state = draw(10)
    search = functools.partial(beam_search, step, beams=3, max_length=T, length_penalty=0.6)
    chex.assert_trees_all_close(jax.jit(search)(state), search(state), rtol=1e-6)
    chex.assert_trees_all_equal(
        jax.jit(functools.partial(greedy, step, max_length=T))(state),
        greedy(step, state, max_length=T),
    )


def test_the_loop_stops_when_all_sentences_have_ended():
    steps = []

    def counting_step(state, tokens):
        jax.debug.callback(lambda: steps.append(1))
        return step(state, tokens)

    # All of these sentences end after their first word.
    table = jnp.zeros((2, 997, V)).at[:, 2, END].set(-50.0).at[:, 12:, END].set(50.0)
    state = {"history": jnp.zeros(2, jnp.int32), "table": table}
    for decode in (functools.partial(beam_search, beams=2), greedy):
        jax.block_until_ready(decode(counting_step, state, max_length=50))
        jax.effects_barrier()
        assert len(steps) == 2
        steps.clear()


def test_minus_infinity_never_becomes_nan():
    table = jnp.full((1, 997, V), -jnp.inf).at[0, 2, 4].set(0.0).at[0, 16, END].set(1.0)
    state = {"history": jnp.zeros(1, jnp.int32), "table": table}
    result = beam_search(step, state, beams=3, max_length=T, length_penalty=1.0)
    np.testing.assert_array_equal(result.scores, [[0, -np.inf, -np.inf]])
    np.testing.assert_array_equal(result.tokens, [[[4, END, 0, 0], [0] * 4, [0] * 4]])
    impossible = {**state, "table": jnp.full((1, 997, V), -jnp.inf)}
    chex.assert_trees_all_equal(
        beam_search(step, impossible, beams=2, max_length=T),
        Beams(jnp.zeros((1, 2, T), jnp.int32), jnp.full((1, 2), -jnp.inf)),
    )
    assert not greedy(step, impossible, max_length=T).any()


def test_start_and_end_tokens_can_be_chosen():
    state = draw(11)
    tokens = np.asarray(greedy(step, state, max_length=T, start=5, end=4))
    assert not (tokens == 5).any()
    for row in tokens.tolist():
        assert 4 not in row or not any(row[row.index(4) + 1 :])


def repeat(state, count):
    return jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], count, 0), state)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_as_frequent_as_probable(temperature):
    """Without tokens 0 and 2, which are never produced, the probabilities are normalised again."""
    count = 20_000
    table = np.random.default_rng(0).normal(0, 1, (V, V)).astype(np.float32)

    def markov_step(state, tokens):
        return jnp.asarray(table)[tokens], state

    draw_samples = jax.jit(functools.partial(sample, markov_step, max_length=2))
    samples = draw_samples(jnp.zeros(count), jax.random.key(0), temperature=temperature)
    weights = np.exp(np.float64(table) / temperature)
    weights[:, [0, 2]] = 0
    probabilities = weights / weights.sum(1, keepdims=True)
    expected = probabilities[2][:, None] * probabilities
    # A sentence that has ended goes on with padding.
    expected[END] = probabilities[2, END] * np.eye(V)[0]
    found = np.zeros((V, V))
    np.add.at(found, tuple(np.asarray(samples).T), 1 / count)
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) <= 4.5 * deviation).all()


def test_samples_at_a_low_temperature_are_greedy():
    state = draw(3, batch=6, end_logit=1.0)
    tokens = sample(step, state, jax.random.key(0), max_length=T, temperature=1e-4)
    np.testing.assert_array_equal(tokens, greedy(step, state, max_length=T))
    assert tokens.dtype == jnp.int32


def test_samples_differ_by_key_and_sentence():
    state = repeat(draw(4), 16)
    first, again, other = (
        np.asarray(sample(step, state, jax.random.key(seed), max_length=T)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and len({tuple(row) for row in first.tolist()}) > 1
    for row in first.tolist():
        assert END not in row or not any(row[row.index(END) + 1 :])


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_raises(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        sample(step, draw(0), jax.random.key(0), max_length=T, temperature=temperature)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"beams": 0}, "beams must be an integer of at least 1, got 0"),
        ({"beams": 2.0}, "beams must be an integer of at least 1, got 2.0"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"max_length": 4.0}, "max_length must be an integer of at least 1, got 4.0"),
        ({"length_penalty": -1.0}, "length_penalty must be at least 0"),
        ({"start": 3}, "got 3 and 3"),
        ({"end": 0}, "at least 1, since 0 is padding"),
    ],
)
def test_invalid_options_raise(options, match):
    with pytest.raises(ValueError, match=match):
        beam_search(step, draw(0), **{"beams": 2, "max_length": T, **options})


@pytest.mark.parametrize("tokens", [{"start": V, "end": END}, {"start": 2, "end": 50}])
def test_tokens_beyond_the_vocabulary_raise(tokens):
    """No sentence would ever end."""
    for search in (greedy, functools.partial(beam_search, beams=2)):
        with pytest.raises(ValueError, match=r"must be tokens of the model, in \[1, 6\), got"):
            search(step, draw(0), max_length=T, **tokens)


def test_scores_of_nan_logits_are_nan():
    state = {**draw(0), "table": draw(0)["table"].at[1].set(jnp.nan)}
    result = beam_search(step, state, beams=2, max_length=T)
    np.testing.assert_array_equal(np.isnan(result.scores), [[False] * 2, [True] * 2, [False] * 2])
    assert not result.tokens[1].any()


def test_a_state_without_the_axis_of_sentences_raises():
    with pytest.raises(ValueError, match="sentences as their first axis"):
        greedy(step, {**draw(0), "history": jnp.zeros((), jnp.int32)}, max_length=T)


SEARCHES = {
    "greedy": greedy,
    "sample": functools.partial(sample, key=jax.random.key(0)),
    "beam_search": functools.partial(beam_search, beams=2),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize(
    "reshape",
    [lambda z: z[0], lambda z: z[:1], lambda z: z[:, None], lambda z: jnp.tile(z, (2, 1))],
)
def test_logits_of_other_sentences_raise(search, reshape):
    """The logits of one sentence would be those of all."""

    def reshaped_step(state, tokens):
        logits, state = step(state, tokens)
        return reshape(logits), state

    with pytest.raises(ValueError, match=r"step must return \(logits \[N, V\], state\), with N = "):
        search(reshaped_step, draw(0), max_length=T)


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s | {"history": s["history"].astype(jnp.int8)}, r"'history'.* is int8\["),
        (lambda s: s | {"more": s["history"]}, r"'more'.* is int32\[.*\] instead of missing"),
        (lambda s: s["history"], "the state is int32"),
    ],
)
def test_a_state_that_changes_its_form_raises(search, change, match):
    def changing_step(state, tokens):
        logits, state = step(state, tokens)
        return logits, change(state)

    with pytest.raises(ValueError, match=match) as error:
        search(changing_step, draw(0), max_length=T)
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
