"""The encoder-decoder Transformer: a NumPy reference, masks, padding, and single steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import decode
from jaxkd.models import from_linen, with_compute_dtype
from jaxkd.models.seq2seq import make_decoder
from jaxkd.models.transformer import Transformer

PAIRS = np.array(
    [
        [[4, 7, 10, 3, 5], [2, 8, 5, 6, 3]],
        [[9, 3, 0, 0, 0], [2, 4, 3, 0, 0]],
        [[5, 6, 3, 0, 0], [2, 3, 0, 0, 0]],
    ],
    np.int32,
)
SMALL = Transformer(11, hidden=8, heads=2, layers=2, intermediate=12, positions=9)


@functools.cache
def draw():
    shapes = jax.eval_shape(from_linen(SMALL).init, jax.random.key(0), PAIRS)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


@functools.cache
def compiled(module, train=False):
    return jax.jit(functools.partial(from_linen(module).apply, train=train))


def run(pairs, module=SMALL, **mode):
    return compiled(module, "key" in mode)(draw(), pairs, **mode)[0]


def norm(p, x):
    return (
        p["scale"] * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        + p["bias"]
    )


def attend(p, x, source, where):
    """Returns the output and the weights averaged over the heads, computed head by head."""
    total = p["output"]["bias"]
    mean = 0
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (
            y @ p[name]["kernel"][:, head] + p[name]["bias"][head]
            for name, y in (("query", x), ("key", source), ("value", source))
        )
        scores = np.where(where, q @ k.T / np.sqrt(4), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        total = total + weights @ v @ p["output"]["kernel"][head]
        mean = mean + weights / 2
    return total, mean


def dense(p, x):
    return (
        np.maximum(x @ p["intermediate_dense"]["kernel"] + p["intermediate_dense"]["bias"], 0)
        @ (p["output_dense"]["kernel"])
        + p["output_dense"]["bias"]
    )


def embed(p, tokens):
    angles = np.arange(len(tokens))[:, None] / 10000 ** (np.arange(4) / 4)
    return p["embedding"]["embedding"][tokens] * np.sqrt(8) + np.concatenate(
        [np.sin(angles), np.cos(angles)], 1
    )


def reference(source, target):
    """Computes one pair of sentences without padding, in float64."""
    p = jax.tree.map(np.float64, draw()["params"])
    x, y, mean = embed(p, source), embed(p, target), None
    for number in "12":
        layer = p[f"encoder_{number}"]
        normalised = norm(layer["own_norm"], x)
        x = x + attend(layer["own_attention"], normalised, normalised, True)[0]
        x = x + dense(layer, norm(layer["dense_norm"], x))
    states = norm(p["encoder_norm"], x)
    for number in "12":
        layer = p[f"decoder_{number}"]
        normalised = norm(layer["own_norm"], y)
        y = (
            y
            + attend(layer["own_attention"], normalised, normalised, np.tri(len(y), dtype=bool))[0]
        )
        change, mean = attend(
            layer["source_attention"], norm(layer["source_norm"], y), states, True
        )
        y = y + change
        y = y + dense(layer, norm(layer["dense_norm"], y))
    decoded = norm(p["decoder_norm"], y)
    return {
        "encoder_layer2": x,
        "encoder": states,
        "decoder_layer2": y,
        "decoder": decoded,
        "alignment": mean,
    }, (decoded @ p["embedding"]["embedding"].T)


def test_equals_the_numpy_reference():
    outputs = run(PAIRS)
    for i, (source, target) in enumerate(PAIRS):
        source, target = source[source != 0], target[target != 0][:-1]
        named, logits = reference(source, target)
        for name, expected in named.items():
            actual = outputs.features[name][i][tuple(map(slice, expected.shape))]
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(outputs.logits[i, : len(target)], logits, rtol=1e-4, atol=1e-4)


def test_named_features_have_their_shapes_and_are_0_at_padding():
    logits, named = run(PAIRS)
    shapes = {"encoder": (3, 5, 8), "decoder": (3, 4, 8), "alignment": (3, 4, 5)}
    shapes |= {f"encoder_layer{i}": (3, 5, 8) for i in (1, 2)} | {
        f"decoder_layer{i}": (3, 4, 8) for i in (1, 2)
    }
    assert (
        logits.shape == (3, 4, 11)
        and {name: feature.shape for name, feature in named.items()} == shapes
    )
    for name, feature in named.items():
        padding = PAIRS[:, 0] == 0 if name.startswith("encoder") else PAIRS[:, 1, :-1] == 0
        assert not np.asarray(feature)[padding].any(), name
    assert not np.asarray(named["alignment"]).swapaxes(1, 2)[PAIRS[:, 0] == 0].any()


def test_parameters():
    shapes = jax.eval_shape(from_linen(Transformer(100)).init, jax.random.key(0), PAIRS)
    attention, dense_part, norms = 4 * (128 * 128 + 128), 128 * 512 + 512 + 512 * 128 + 128, 2 * 128
    layers = 2 * (attention + dense_part + 2 * norms) + 2 * (2 * attention + dense_part + 3 * norms)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 100 * 128 + layers + 2 * norms


@functools.cache
def compiled_gradient():
    """Compiles the gradient of a single layer, in half the time of two."""

    def objective(params, pairs):
        outputs, _ = from_linen(SMALL.clone(layers=1)).apply({"params": params}, pairs, train=False)
        logits = jnp.where((pairs[:, 1, 1:] != 0)[..., None], outputs.logits, 0)
        return (logits**2).sum(), logits

    return jax.jit(jax.value_and_grad(objective, has_aux=True))


def value_and_gradient(pairs):
    params = {name: layer for name, layer in draw()["params"].items() if not name.endswith("_2")}
    (_, logits), gradient = compiled_gradient()(params, pairs)
    return logits, gradient


@pytest.mark.thorough
def test_padding_changes_nothing():
    logits, gradient = value_and_gradient(np.pad(PAIRS, ((0, 0), (0, 0), (0, 3))))
    expected = value_and_gradient(PAIRS)
    chex.assert_trees_all_close((logits[:, :4], gradient), expected, rtol=1e-3, atol=1e-4)
    # The bias of the keys adds the same to all scores of a query, so that its gradient is 0.
    without_gradient = {
        path for path, leaf in leaves_by_path(gradient).items() if np.abs(leaf).max() < 1e-3
    }
    assert all(path.endswith("key/bias") for path in without_gradient)


def leaves_by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.thorough
def test_empty_rows_are_finite():
    pairs = np.concatenate([PAIRS[:2], 0 * PAIRS[:1]])
    chex.assert_tree_all_finite((run(pairs), value_and_gradient(pairs)))
    np.testing.assert_allclose(run(pairs).logits[:2], run(PAIRS).logits[:2], rtol=1e-4, atol=1e-5)


def test_later_tokens_change_nothing_before():
    changed = PAIRS.copy()
    changed[0, 1, 3] = 9
    actual = run(changed).logits
    expected = run(PAIRS).logits
    np.testing.assert_allclose(actual[:, :3], expected[:, :3], rtol=1e-5, atol=1e-6)
    assert (np.abs(actual[0, 3] - expected[0, 3]) > 1e-3).any()


@pytest.mark.thorough
def test_single_steps_equal_the_whole_sequence():
    decoder = make_decoder(SMALL)
    state = decoder.init_state(draw(), PAIRS[:, 0], 6)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state)} == {3}
    step = jax.jit(decoder.step)
    all_logits = []
    for tokens in PAIRS[:, 1, :-1].T:
        logits, state = step(draw(), state, tokens)
        all_logits.append(logits)
    where = PAIRS[:, 1, :-1] != 0
    expected = np.asarray(run(PAIRS).logits)[where]
    np.testing.assert_allclose(np.stack(all_logits, 1)[where], expected, rtol=1e-4, atol=1e-5)


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
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[1:2], batched), search(PAIRS[1:2, 0, :2]), rtol=1e-4
    )
    for tokens, score in zip(np.asarray(batched.tokens[1]), batched.scores[1], strict=True):
        pair = np.stack([np.pad(PAIRS[1, 0], (0, 2)), [2, *tokens]])
        logs = np.asarray(jax.nn.log_softmax(run(pair[None]).logits[0]))[np.arange(6), tokens]
        np.testing.assert_allclose(logs[tokens != 0].sum(), score, rtol=1e-4)


def test_dropout_is_for_training():
    module = SMALL.clone(layers=1, dropout=0.5)
    first, repeated, other = (
        run(PAIRS, module, key=jax.random.key(seed)).logits for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, repeated)
    assert (first != other).any()
    # Evaluation needs no key.
    jax.eval_shape(functools.partial(from_linen(module).apply, train=False), draw(), PAIRS)


def test_computes_in_bfloat16():
    model = with_compute_dtype(from_linen(SMALL), jnp.bfloat16)
    outputs, _ = jax.jit(functools.partial(model.apply, train=False))(draw(), PAIRS)
    assert outputs.features["decoder"].dtype == jnp.bfloat16 and outputs.logits.dtype == jnp.float32
    where = PAIRS[:, 1, :-1] != 0
    expected = np.asarray(run(PAIRS).logits)[where]
    difference = np.asarray(outputs.logits)[where] - expected
    assert np.abs(difference).mean() < 0.05 * expected.std()


def test_initial_logits_have_the_scale_of_1():
    module = Transformer(50, hidden=64, heads=4, layers=1, intermediate=64)
    pairs = np.random.default_rng(0).integers(4, 50, (4, 2, 12)).astype(np.int32)
    (logits, named), _ = jax.jit(
        lambda key: from_linen(module).apply(
            from_linen(module).init(key, pairs), pairs, train=False
        )
    )(jax.random.key(0))
    assert 0.5 < logits.std() < 2 and 0.9 < named["decoder"].std() < 1.1


@pytest.mark.parametrize(
    ("module", "pairs", "error", "match"),
    [
        (SMALL, PAIRS[0], ValueError, r"\[B, 2, S\]"),
        (SMALL, PAIRS.astype(np.float32), TypeError, "integers"),
        (
            SMALL,
            np.ones((1, 2, 10), np.int32),
            ValueError,
            "10 tokens is longer than the 9 positions",
        ),
        (SMALL.clone(heads=3), PAIRS, ValueError, "multiple of heads, got 8 and 3"),
        (SMALL.clone(layers=0), PAIRS, ValueError, "layers must be at least 1"),
    ],
)
def test_wrong_inputs_and_attributes_raise(module, pairs, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(from_linen(module).init, jax.random.key(0), pairs)


def test_a_target_longer_than_the_positions_raises():
    with pytest.raises(ValueError, match="10 tokens is longer"):
        make_decoder(SMALL).init_state(draw(), PAIRS[:, 0], 10)
