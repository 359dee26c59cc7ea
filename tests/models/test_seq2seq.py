"""The recurrent encoder-decoder: formulas, padding, scheduled sampling, and single steps."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import attention, decode
from jaxkd.models import from_linen, with_compute_dtype
from jaxkd.models.recurrent import GRU, LSTM
from jaxkd.models.seq2seq import DOT, GENERAL, Seq2Seq, additive, make_decoder

PAIRS = np.array(
    [
        [[4, 7, 10, 3, 5], [2, 8, 5, 6, 3]],
        [[9, 3, 0, 0, 0], [2, 4, 3, 0, 0]],
        [[5, 6, 3, 0, 0], [2, 3, 0, 0, 0]],
    ],
    np.int32,
)
SMALL = Seq2Seq(11, 12, embedding=5, hidden=6)
MODULES = {
    "GRU, dot": SMALL,
    "LSTM, general, 2 layers": SMALL.clone(cell=LSTM, alignment=GENERAL, layers=2),
    "unidirectional, additive": SMALL.clone(alignment=additive(7), bidirectional=False),
    "LSTM, none": SMALL.clone(cell=LSTM, alignment=None),
}
each_module = pytest.mark.parametrize("name", MODULES)
two_modules = pytest.mark.parametrize("name", ["GRU, dot", "LSTM, general, 2 layers"])


@functools.cache
def draw(name="GRU, dot"):
    shapes = jax.eval_shape(from_linen(MODULES[name]).init, jax.random.key(0), PAIRS)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


@functools.cache
def compiled(module, train):
    return jax.jit(functools.partial(from_linen(module).apply, train=train))


def run(module, pairs, variables, **mode):
    return compiled(module, "key" in mode)(variables, pairs, **mode)[0]


@pytest.mark.thorough
@pytest.mark.parametrize("alignment", [DOT, None])
def test_equals_a_reference_word_by_word(alignment):
    """The reference uses the layers of `recurrent`, which have their own reference."""
    outputs = run(SMALL.clone(alignment=alignment), PAIRS, draw())
    p = draw()["params"]

    def read(name, x, state=None, reverse=False):
        return GRU(p[name]["recurrent_kernel"].shape[0], reverse).apply(
            {"params": p[name]}, x[None], np.ones((1, len(x)), bool), state
        )

    for i, (source, target) in enumerate(PAIRS):
        source, target = source[source != 0], target[target != 0][:-1]
        x = p["source_embedding"]["embedding"][source]
        both = read("encoder_1", x), read("encoder_reverse_1", x, reverse=True)
        states, last = (np.concatenate(parts, -1) for parts in zip(*both, strict=True))
        np.testing.assert_allclose(
            outputs.features["encoder"][i, : len(source)], states[0], rtol=1e-4, atol=1e-5
        )
        hidden, _ = read("decoder_1", p["target_embedding"]["embedding"][target], last)
        for t, state in enumerate(np.asarray(hidden[0])):
            weights = np.asarray(jax.nn.softmax(states[0] @ state))
            context = weights @ states[0] if alignment else last[0]
            combined = np.tanh(
                np.concatenate([context, state]) @ p["combined"]["kernel"] + p["combined"]["bias"]
            )
            expected = {"decoder": state, "pre_logits": combined}
            if alignment:
                expected["alignment"] = np.pad(weights, (0, PAIRS.shape[2] - len(source)))
            for name, value in expected.items():
                np.testing.assert_allclose(
                    outputs.features[name][i, t], value, rtol=1e-4, atol=1e-5, err_msg=name
                )
            logits = combined @ p["logits"]["kernel"] + p["logits"]["bias"]
            np.testing.assert_allclose(outputs.logits[i, t], logits, rtol=1e-4, atol=1e-5)


@each_module
def test_named_features_have_their_shapes_and_are_0_at_padding(name):
    logits, named = run(MODULES[name], PAIRS, draw(name))
    shapes = {
        "encoder": (3, 5, 6),
        "decoder": (3, 4, 6),
        "pre_logits": (3, 4, 6),
        "alignment": (3, 4, 5),
    }
    if MODULES[name].alignment is None:
        del shapes["alignment"]
    assert (
        logits.shape == (3, 4, 12)
        and {key: feature.shape for key, feature in named.items()} == shapes
    )
    assert not np.asarray(named["encoder"])[PAIRS[:, 0] == 0].any()
    for key in {*named} - {"encoder"}:
        assert not np.asarray(named[key])[PAIRS[:, 1, :-1] == 0].any()
    if "alignment" in named:
        counts = (PAIRS[:, 1, :-1] != 0).astype(np.float32)
        np.testing.assert_allclose(named["alignment"].sum(-1), counts, rtol=1e-5)
        assert not np.asarray(named["alignment"]).swapaxes(1, 2)[PAIRS[:, 0] == 0].any()


@functools.cache
def compiled_gradient(name):
    def objective(params, pairs):
        outputs, _ = from_linen(MODULES[name]).apply(
            {**draw(name), "params": params}, pairs, train=False
        )
        logits = jnp.where((pairs[:, 1, 1:] != 0)[..., None], outputs.logits, 0)
        return (logits**2).sum(), logits

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def value_and_gradient(name, pairs):
    (_, logits), gradient = compiled_gradient(name)(draw(name)["params"], pairs)
    return logits, gradient


@pytest.mark.thorough
@two_modules
def test_padding_changes_nothing(name):
    logits, gradient = value_and_gradient(name, np.pad(PAIRS, ((0, 0), (0, 0), (0, 3))))
    expected = value_and_gradient(name, PAIRS)
    chex.assert_trees_all_close((logits[:, :4], gradient), expected, rtol=1e-4, atol=1e-5)
    assert not any(
        gradient[side]["embedding"][0].any() for side in ("source_embedding", "target_embedding")
    )
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))


def test_empty_rows_are_finite():
    pairs = np.concatenate([PAIRS[:2], 0 * PAIRS[:1]])
    logits, gradient = value_and_gradient("GRU, dot", pairs)
    chex.assert_tree_all_finite((logits, gradient, run(SMALL, pairs, draw())))
    np.testing.assert_allclose(
        logits[:2], value_and_gradient("GRU, dot", PAIRS)[0][:2], rtol=1e-4, atol=1e-5
    )


def test_later_tokens_change_nothing_before():
    changed = PAIRS.copy()
    changed[0, 1, 3] = 9
    actual = run(SMALL, changed, draw()).logits
    expected = run(SMALL, PAIRS, draw()).logits
    np.testing.assert_allclose(actual[:, :3], expected[:, :3], rtol=1e-6)
    assert (np.abs(actual[0, 3] - expected[0, 3]) > 1e-3).any()


@each_module
def test_single_steps_equal_the_whole_sequence(name):
    decoder = make_decoder(MODULES[name])
    variables = draw(name)
    state = decoder.init_state(variables, PAIRS[:, 0], 4)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {3}
    step = jax.jit(decoder.step)
    all_logits = []
    for tokens in PAIRS[:, 1, :-1].T:
        logits, state = step(variables, state, tokens)
        all_logits.append(logits)
    where = PAIRS[:, 1, :-1] != 0
    expected = np.asarray(run(MODULES[name], PAIRS, variables).logits)[where]
    np.testing.assert_allclose(np.stack(all_logits, 1)[where], expected, rtol=1e-4, atol=1e-5)


@two_modules
def test_scores_are_a_matrix_product(name):
    """No array of the program has a value for each step, position and feature."""
    pairs = jax.ShapeDtypeStruct((2, 2, 64), jnp.int32)
    module = MODULES[name].clone(hidden=32)
    shapes = jax.eval_shape(from_linen(module).init, jax.random.key(0), pairs)
    apply = functools.partial(from_linen(module).apply, train=False)
    text = (
        jax.jit(jax.grad(lambda v, x: apply(v, x)[0].logits.sum())).lower(shapes, pairs).as_text()
    )
    sizes = [
        math.prod(map(int, shape.split("x")[:-1]))
        for shape in re.findall(r"tensor<((?:\d+x)+)", text)
    ]
    assert 2 * 63 * 64 <= max(sizes) < 2 * 63 * 64 * 32


def decode_greedily(name, length):
    decoder = make_decoder(MODULES[name])
    state = decoder.init_state(draw(name), PAIRS[:, 0], length)
    return np.asarray(
        decode.greedy(functools.partial(decoder.step, draw(name)), state, max_length=length)
    )


@pytest.mark.thorough
@two_modules
def test_own_tokens_in_training_are_those_of_greedy_decoding(name):
    own = decode_greedily(name, 8)
    pairs = np.zeros((3, 2, 9), np.int32)
    pairs[:, 0, :5] = PAIRS[:, 0]
    pairs[:, 1] = 2, *[7] * 8  # true tokens that the model must not see
    sampling = MODULES[name].clone(teacher_forcing=0.0)
    actual = run(sampling, pairs, draw(name), key=jax.random.key(0))
    pairs[:, 1, 1:] = np.where(own == 0, 7, own)
    expected = run(MODULES[name], pairs, draw(name))
    before_the_end = np.cumsum(np.pad(own == 3, ((0, 0), (1, 0)))[:, :-1], 1) == 0
    assert before_the_end.sum() > 12
    np.testing.assert_allclose(
        actual.logits[before_the_end], expected.logits[before_the_end], rtol=1e-4, atol=1e-5
    )
    best = np.array(actual.logits)
    best[..., [0, 2]] = -np.inf
    np.testing.assert_array_equal(best.argmax(-1)[before_the_end], own[before_the_end])


def test_only_true_tokens_are_read_in_evaluation_and_at_probability_1():
    expected = run(SMALL, PAIRS, draw())
    chex.assert_trees_all_equal(run(SMALL.clone(teacher_forcing=0.0), PAIRS, draw()), expected)
    trained = run(SMALL, PAIRS, draw(), key=jax.random.key(0))
    chex.assert_trees_all_close(trained, expected, rtol=1e-6, atol=1e-6)
    almost = run(SMALL.clone(teacher_forcing=1 - 1e-7), PAIRS, draw(), key=jax.random.key(0))
    chex.assert_trees_all_close(almost, expected, rtol=1e-6, atol=1e-6)


def test_the_key_draws_which_tokens_are_true():
    module = SMALL.clone(teacher_forcing=0.5)
    pairs = np.repeat(PAIRS[:1], 64, 0)
    pairs[:, 1, 1] = 1  # not the most probable token of the model
    first, repeated, other = (
        run(module, pairs, draw(), key=jax.random.key(seed)).logits for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, repeated)
    assert (first != other).any()
    true = run(SMALL, pairs, draw()).logits
    same = np.isclose(first, true, atol=1e-5).all(-1)
    assert same[:, 0].all() and 0.3 < same[:, 1].mean() < 0.7


@pytest.mark.thorough
def test_gradients_treat_sampled_tokens_as_constants():
    module = SMALL.clone(teacher_forcing=0.0)
    key = jax.random.key(0)

    def objective(params, module, pairs, train):
        outputs, _ = from_linen(module).apply(
            {**draw(), "params": params}, pairs, train=train, key=key
        )
        return (outputs.logits**2).sum()

    gradient = jax.jit(jax.grad(objective), static_argnums=(1, 3))
    pairs = np.array(PAIRS[:1])
    actual = gradient(draw()["params"], module, pairs, True)
    logits = np.array(run(module, pairs, draw(), key=key).logits)
    logits[..., [0, 2]] = -np.inf
    pairs[:, 1, 1:] = logits.argmax(-1)
    expected = gradient(draw()["params"], SMALL, pairs, False)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training():
    module = SMALL.clone(dropout=0.5)
    first, repeated = (run(module, PAIRS, draw(), key=jax.random.key(0)).logits for _ in range(2))
    chex.assert_trees_all_equal(first, repeated)
    assert (first != run(module, PAIRS, draw()).logits).any()
    chex.assert_trees_all_equal(run(module, PAIRS, draw()), run(SMALL, PAIRS, draw()))


@pytest.mark.thorough
@two_modules
def test_computes_in_bfloat16(name):
    model = with_compute_dtype(from_linen(MODULES[name].clone(teacher_forcing=0.5)), jnp.bfloat16)
    outputs, _ = jax.jit(functools.partial(model.apply, train=False))(draw(name), PAIRS)
    assert outputs.features["decoder"].dtype == jnp.bfloat16 and outputs.logits.dtype == jnp.float32
    where = PAIRS[:, 1, :-1] != 0
    expected = np.asarray(run(MODULES[name], PAIRS, draw(name)).logits)
    np.testing.assert_allclose(np.asarray(outputs.logits)[where], expected[where], atol=0.1)
    trained, _ = jax.jit(functools.partial(model.apply, train=True))(
        draw(name), PAIRS, key=jax.random.key(0)
    )
    chex.assert_tree_all_finite(trained.logits)


@pytest.mark.thorough
def test_beam_search_does_not_depend_on_the_batch_or_padding():
    decoder = make_decoder(SMALL)
    variables = draw()

    def search(source):
        state = decoder.init_state(variables, source, 6)
        return decode.beam_search(
            functools.partial(decoder.step, variables), state, beams=3, max_length=6
        )

    batched = search(np.pad(PAIRS[:, 0], ((0, 0), (0, 4))))
    alone = search(PAIRS[1:2, 0, :2])
    chex.assert_trees_all_close(jax.tree.map(lambda part: part[1:2], batched), alone, rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "pairs", "error", "match"),
    [
        (SMALL, PAIRS[0], ValueError, r"\[B, 2, S\]"),
        (SMALL, PAIRS[..., :1], ValueError, "S of at least 2"),
        (SMALL, PAIRS.astype(np.float32), TypeError, "integers"),
        (SMALL.clone(hidden=7), PAIRS, ValueError, "hidden must be even"),
        (SMALL.clone(layers=0), PAIRS, ValueError, "layers must be at least 1"),
        (SMALL.clone(teacher_forcing=1.5), PAIRS, ValueError, "probability"),
    ],
)
def test_wrong_inputs_and_attributes_raise(module, pairs, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(from_linen(module).init, jax.random.key(0), pairs)


def test_make_decoder_needs_an_encoder_decoder():
    with pytest.raises(TypeError, match="GRU has no method 'init_state'"):
        make_decoder(GRU(3))


def test_alignments_are_those_of_attention():
    states, state = jnp.ones((5, 6)), jnp.ones(6)
    assert DOT.init is None and DOT.score({}) is attention.dot_score
    for alignment in (GENERAL, additive(7)):
        params = alignment.init(jax.random.key(0), 6, 6)
        assert alignment.score(params)(states, state).shape == (5,)
    assert params["output"].shape == (7,)
