"""The recurrent encoder-decoder: its formula, padding, its own tokens in training, and step by step as at once."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import attention, decode
from jaxkd.models import computing_in, from_linen
from jaxkd.models.recurrent import GRU, LSTM
from jaxkd.models.seq2seq import DOT, GENERAL, Seq2Seq, additive, make_decoder

PAIRS = np.array(
    [[[4, 7, 10, 3, 5], [2, 8, 5, 6, 3]], [[9, 3, 0, 0, 0], [2, 4, 3, 0, 0]], [[5, 6, 3, 0, 0], [2, 3, 0, 0, 0]]],
    np.int32,
)
SMALL = Seq2Seq(11, 12, embedding=5, hidden=6)
MODULES = {
    "GRU, dot": SMALL,
    "LSTM, general, 2 layers": SMALL.clone(cell=LSTM, alignment=GENERAL, layers=2),
    "one way, additive": SMALL.clone(alignment=additive(7), bidirectional=False),
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


@pytest.mark.parametrize("alignment", [DOT, None])
def test_the_formula_word_by_word(alignment):
    """With the layers of `recurrent`, which have a reference of their own."""
    found, p = run(SMALL.clone(alignment=alignment), PAIRS, draw()), draw()["params"]

    def read(name, x, state=None, reverse=False):
        return GRU(p[name]["recurrent_kernel"].shape[0], reverse).apply(
            {"params": p[name]}, x[None], np.ones((1, len(x)), bool), state
        )

    for i, (source, target) in enumerate(PAIRS):
        source, target = source[source != 0], target[target != 0][:-1]
        x = p["source_embedding"]["embedding"][source]
        both = read("encoder_1", x), read("encoder_reverse_1", x, reverse=True)
        states, last = (np.concatenate(parts, -1) for parts in zip(*both, strict=True))
        np.testing.assert_allclose(found.features["encoder"][i, : len(source)], states[0], rtol=1e-4, atol=1e-5)
        hidden, _ = read("decoder_1", p["target_embedding"]["embedding"][target], last)
        for t, state in enumerate(np.asarray(hidden[0])):
            weights = np.asarray(jax.nn.softmax(states[0] @ state))
            context = weights @ states[0] if alignment else last[0]
            combined = np.tanh(np.concatenate([context, state]) @ p["combined"]["kernel"] + p["combined"]["bias"])
            wanted = {"decoder": state, "pre_logits": combined}
            wanted |= {"alignment": np.pad(weights, (0, PAIRS.shape[2] - len(source)))} if alignment else {}
            for name, value in wanted.items():
                np.testing.assert_allclose(found.features[name][i, t], value, rtol=1e-4, atol=1e-5, err_msg=name)
            logits = combined @ p["logits"]["kernel"] + p["logits"]["bias"]
            np.testing.assert_allclose(found.logits[i, t], logits, rtol=1e-4, atol=1e-5)


@each_module
def test_named_features_have_their_shapes_and_are_0_at_padding(name):
    logits, named = run(MODULES[name], PAIRS, draw(name))
    shapes = {"encoder": (3, 5, 6), "decoder": (3, 4, 6), "pre_logits": (3, 4, 6), "alignment": (3, 4, 5)}
    if MODULES[name].alignment is None:
        del shapes["alignment"]
    assert logits.shape == (3, 4, 12) and {key: feature.shape for key, feature in named.items()} == shapes
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
        outputs, _ = from_linen(MODULES[name]).apply({**draw(name), "params": params}, pairs, train=False)
        logits = jnp.where((pairs[:, 1, 1:] != 0)[..., None], outputs.logits, 0)
        return (logits**2).sum(), logits

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def value_and_gradient(name, pairs):
    (_, logits), gradient = compiled_gradient(name)(draw(name)["params"], pairs)
    return logits, gradient


@two_modules
def test_padding_changes_nothing(name):
    logits, gradient = value_and_gradient(name, np.pad(PAIRS, ((0, 0), (0, 0), (0, 3))))
    wanted = value_and_gradient(name, PAIRS)
    chex.assert_trees_all_close((logits[:, :4], gradient), wanted, rtol=1e-4, atol=1e-5)
    assert not any(gradient[side]["embedding"][0].any() for side in ("source_embedding", "target_embedding"))
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradient))


def test_empty_rows_are_finite():
    pairs = np.concatenate([PAIRS[:2], 0 * PAIRS[:1]])
    logits, gradient = value_and_gradient("GRU, dot", pairs)
    chex.assert_tree_all_finite((logits, gradient, run(SMALL, pairs, draw())))
    np.testing.assert_allclose(logits[:2], value_and_gradient("GRU, dot", PAIRS)[0][:2], rtol=1e-4, atol=1e-5)


def test_later_tokens_change_nothing_before():
    other = PAIRS.copy()
    other[0, 1, 3] = 9
    found, wanted = run(SMALL, other, draw()).logits, run(SMALL, PAIRS, draw()).logits
    np.testing.assert_allclose(found[:, :3], wanted[:, :3], rtol=1e-6)
    assert (np.abs(found[0, 3] - wanted[0, 3]) > 1e-3).any()


@each_module
def test_step_by_step_equals_all_at_once(name):
    decoder, variables = make_decoder(MODULES[name]), draw(name)
    state = decoder.begin(variables, PAIRS[:, 0], 4)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {3}
    step, logits = jax.jit(decoder.step), []
    for tokens in PAIRS[:, 1, :-1].T:
        found, state = step(variables, state, tokens)
        logits.append(found)
    counts = PAIRS[:, 1, :-1] != 0
    wanted = np.asarray(run(MODULES[name], PAIRS, variables).logits)[counts]
    np.testing.assert_allclose(np.stack(logits, 1)[counts], wanted, rtol=1e-4, atol=1e-5)


@two_modules
def test_scores_are_a_product_of_matrices(name):
    """No array of the program holds a number for every step, position and feature."""
    pairs = jax.ShapeDtypeStruct((2, 2, 64), jnp.int32)
    module = MODULES[name].clone(hidden=32)
    shapes = jax.eval_shape(from_linen(module).init, jax.random.key(0), pairs)
    apply = functools.partial(from_linen(module).apply, train=False)
    text = jax.jit(jax.grad(lambda v, x: apply(v, x)[0].logits.sum())).lower(shapes, pairs).as_text()
    sizes = [math.prod(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+)", text)]
    assert 2 * 63 * 64 <= max(sizes) < 2 * 63 * 64 * 32


def greedily(name, length):
    decoder = make_decoder(MODULES[name])
    state = decoder.begin(draw(name), PAIRS[:, 0], length)
    return np.asarray(decode.greedy(functools.partial(decoder.step, draw(name)), state, max_length=length))


@two_modules
def test_own_tokens_in_training_are_those_of_greedy_decoding(name):
    own = greedily(name, 8)
    pairs = np.zeros((3, 2, 9), np.int32)
    pairs[:, 0, :5] = PAIRS[:, 0]
    pairs[:, 1] = 2, *[7] * 8  # true tokens that the model must not see
    found = run(MODULES[name].clone(teacher_forcing=0.0), pairs, draw(name), key=jax.random.key(0))
    pairs[:, 1, 1:] = np.where(own == 0, 7, own)
    wanted = run(MODULES[name], pairs, draw(name))
    before_the_end = np.cumsum(np.pad(own == 3, ((0, 0), (1, 0)))[:, :-1], 1) == 0
    assert before_the_end.sum() > 12
    np.testing.assert_allclose(found.logits[before_the_end], wanted.logits[before_the_end], rtol=1e-4, atol=1e-5)
    best = np.array(found.logits)
    best[..., [0, 2]] = -np.inf
    np.testing.assert_array_equal(best.argmax(-1)[before_the_end], own[before_the_end])


def test_true_tokens_alone_are_read_at_rest_and_at_ratio_1():
    wanted = run(SMALL, PAIRS, draw())
    chex.assert_trees_all_equal(run(SMALL.clone(teacher_forcing=0.0), PAIRS, draw()), wanted)
    trained = run(SMALL, PAIRS, draw(), key=jax.random.key(0))
    chex.assert_trees_all_close(trained, wanted, rtol=1e-6, atol=1e-6)
    almost = run(SMALL.clone(teacher_forcing=1 - 1e-7), PAIRS, draw(), key=jax.random.key(0))
    chex.assert_trees_all_close(almost, wanted, rtol=1e-6, atol=1e-6)


def test_the_key_draws_which_tokens_are_true():
    module, pairs = SMALL.clone(teacher_forcing=0.5), np.repeat(PAIRS[:1], 64, 0)
    pairs[:, 1, 1] = 1  # which the model does not find the most probable
    first, again, other = (run(module, pairs, draw(), key=jax.random.key(seed)).logits for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert (first != other).any()
    true = run(SMALL, pairs, draw()).logits
    same = np.isclose(first, true, atol=1e-5).all(-1)
    assert same[:, 0].all() and 0.3 < same[:, 1].mean() < 0.7


def test_gradients_take_the_tokens_as_they_are():
    module, key = SMALL.clone(teacher_forcing=0.0), jax.random.key(0)

    def objective(params, module, pairs, train):
        outputs, _ = from_linen(module).apply({**draw(), "params": params}, pairs, train=train, key=key)
        return (outputs.logits**2).sum()

    gradient = jax.jit(jax.grad(objective), static_argnums=(1, 3))
    pairs = np.array(PAIRS[:1])
    found = gradient(draw()["params"], module, pairs, True)
    logits = np.array(run(module, pairs, draw(), key=key).logits)
    logits[..., [0, 2]] = -np.inf
    pairs[:, 1, 1:] = logits.argmax(-1)
    chex.assert_trees_all_close(found, gradient(draw()["params"], SMALL, pairs, False), rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training():
    module = SMALL.clone(dropout=0.5)
    first, again = (run(module, PAIRS, draw(), key=jax.random.key(0)).logits for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    assert (first != run(module, PAIRS, draw()).logits).any()
    chex.assert_trees_all_equal(run(module, PAIRS, draw()), run(SMALL, PAIRS, draw()))


@two_modules
def test_computes_in_bfloat16(name):
    model = computing_in(from_linen(MODULES[name].clone(teacher_forcing=0.5)), jnp.bfloat16)
    outputs, _ = jax.jit(functools.partial(model.apply, train=False))(draw(name), PAIRS)
    assert outputs.features["decoder"].dtype == jnp.bfloat16 and outputs.logits.dtype == jnp.float32
    counts = PAIRS[:, 1, :-1] != 0
    wanted = np.asarray(run(MODULES[name], PAIRS, draw(name)).logits)
    np.testing.assert_allclose(np.asarray(outputs.logits)[counts], wanted[counts], atol=0.1)
    trained, _ = jax.jit(functools.partial(model.apply, train=True))(draw(name), PAIRS, key=jax.random.key(0))
    chex.assert_tree_all_finite(trained.logits)


def test_batch_companions_and_padding_do_not_change_what_is_found():
    decoder, variables = make_decoder(SMALL), draw()

    def search(source):
        state = decoder.begin(variables, source, 6)
        return decode.beam_search(functools.partial(decoder.step, variables), state, beams=3, max_length=6)

    together = search(np.pad(PAIRS[:, 0], ((0, 0), (0, 4))))
    alone = search(PAIRS[1:2, 0, :2])
    chex.assert_trees_all_close(jax.tree.map(lambda part: part[1:2], together), alone, rtol=1e-4)


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
def test_what_does_not_fit_is_told(module, pairs, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(from_linen(module).init, jax.random.key(0), pairs)


def test_a_module_that_translates_nothing_is_told():
    with pytest.raises(TypeError, match="GRU has no method 'begin'"):
        make_decoder(GRU(3))


def test_alignments_are_those_of_attention():
    states, state = jnp.ones((5, 6)), jnp.ones(6)
    assert DOT.init is None and DOT.score({}) is attention.dot_score
    for alignment in (GENERAL, additive(7)):
        params = alignment.init(jax.random.key(0), 6, 6)
        assert alignment.score(params)(states, state).shape == (5,)
    assert params["output"].shape == (7,)
