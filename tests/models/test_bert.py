"""BERT: published sizes, invariance to padding, a NumPy reference, equality with transformers."""

import dataclasses
import functools
import importlib
import importlib.util
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd import transfer
from jaxkd.models import from_linen
from jaxkd.models.bert import BERT, canonical_names, distilbert_pooling, mean_pooling
from jaxkd.models.wrappers import with_compute_dtype
from jaxkd.weights import from_torch, to_torch

SMALL = BERT(13, hidden=8, layers=2, heads=2, intermediate=12, positions=10, num_classes=3)
DISTIL = dataclasses.replace(SMALL, layers=1, segments=0, pooling=distilbert_pooling)
MEAN = dataclasses.replace(SMALL, layers=1, pooling=mean_pooling)
TOKENS = np.array([[2, 5, 7, 12, 3], [2, 9, 3, 0, 0], [2, 3, 0, 0, 0], [0] * 5], np.int32)
needs_transformers = pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="PyTorch or transformers is not installed",
)


def shapes(module):
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    return jax.eval_shape(from_linen(module).init, jax.random.key(0), tokens)


def draw(module):
    """Draws variables without any default value."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0.1, 0.5, leaf.shape).astype(np.float32), shapes(module)
    )


@functools.cache
def compiled(module, train):
    return jax.jit(functools.partial(from_linen(module).apply, train=train))


def run(module, variables, tokens, train=False, key=None):
    return compiled(module, train)(variables, tokens, key=key)[0]


@functools.cache
def compiled_gradients(module):
    def loss(params, tokens, weights):
        outputs, _ = from_linen(module).apply(
            {"params": params, "batch_stats": {}}, tokens, train=False
        )
        return (outputs.logits * weights).sum(), outputs

    return jax.jit(jax.grad(loss, has_aux=True))


def weighted_gradients(module, variables, tokens, weights):
    """Returns the gradients of a sum of weighted logits, and the outputs."""
    return compiled_gradients(module)(variables["params"], tokens, weights)


def test_features_have_names_and_shapes():
    outputs = jax.eval_shape(
        lambda v: from_linen(SMALL).apply(v, TOKENS, train=True)[0], shapes(SMALL)
    )
    actual = {name: feature.shape for name, feature in outputs.features.items()}
    states, maps, by_head = (4, 5, 8), (4, 2, 5, 5), (4, 5, 2, 4)
    expected = {"embeddings": states, "pooled": (4, 8), "pre_logits": (4, 8)}
    for i in ("1", "2"):
        expected |= {f"layer{i}": states, f"scores{i}": maps, f"attention{i}": maps}
        expected |= {f"{name}{i}": by_head for name in ("queries", "keys", "values")}
    assert actual == expected and outputs.logits.shape == (4, 3)


@pytest.mark.parametrize(
    ("module", "parameters"),
    [
        (BERT(30522), 109_483_778),
        (BERT(30522, layers=6, segments=0, pooling=distilbert_pooling), 66_955_010),
        (BERT(30522, hidden=384, layers=6, intermediate=1536), 22_713_216 + 2 * 384 + 2),
    ],
    ids=["bert-base-uncased", "DistilBERT", "MiniLM-L6"],
)
def test_parameters_as_published(module, parameters):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(module))) == parameters


@pytest.mark.thorough
def test_weights_start_normal():
    params = from_linen(SMALL).init(jax.random.key(0), jnp.asarray(TOKENS))["params"]
    kernels = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params) if leaf.ndim == 2])
    np.testing.assert_allclose((kernels.mean(), kernels.std()), (0, 0.02), atol=0.002)
    assert (
        not params["block1"]["mlp_in"]["bias"].any()
        and (params["block0"]["mlp_norm"]["scale"] == 1).all()
    )


# --- padding ---


@pytest.mark.thorough
@pytest.mark.parametrize("module", [SMALL, DISTIL, MEAN], ids=["BERT", "DistilBERT", "mean"])
def test_padding_changes_nothing(module):
    variables = draw(module)
    weights = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    longer = np.pad(TOKENS, ((0, 0), (0, 4)))
    gradients, outputs = weighted_gradients(module, variables, TOKENS, weights)
    padded_gradients, padded = weighted_gradients(module, variables, longer, weights)
    np.testing.assert_allclose(outputs.logits, padded.logits, atol=2e-6)
    for name in ("embeddings", "layer1", f"layer{module.layers}", f"values{module.layers}"):
        np.testing.assert_allclose(
            outputs.features[name][TOKENS != 0], padded.features[name][longer != 0], atol=1e-5
        )
    chex.assert_trees_all_close(gradients, padded_gradients, atol=2e-5, rtol=1e-5)


def test_the_batch_does_not_change_a_text():
    variables = draw(SMALL)
    np.testing.assert_allclose(
        run(SMALL, variables, TOKENS[1:2, :3]).logits[0],
        run(SMALL, variables, TOKENS).logits[1],
        atol=2e-6,
    )


def test_weights_are_0_at_padding_and_scores_finite():
    outputs = run(SMALL, draw(SMALL), TOKENS)
    for i in ("1", "2"):
        weights = np.asarray(outputs.features[f"attention{i}"])
        assert not weights[1, :, :, 3:].any() and not weights[3].any()
        np.testing.assert_allclose(weights[:3].sum(-1), 1, rtol=1e-5)
        assert outputs.features[f"scores{i}"][1, :, :, 3:].all()
    chex.assert_tree_all_finite(outputs)


@pytest.mark.thorough
@pytest.mark.parametrize("module", [SMALL, DISTIL, MEAN], ids=["BERT", "DistilBERT", "mean"])
def test_row_of_padding_is_finite_without_gradient(module):
    variables = draw(module)
    weights = np.array([[0, 0, 0]] * 3 + [[1, -2, 3]], np.float32)
    gradients, outputs = weighted_gradients(module, variables, TOKENS, weights)
    chex.assert_tree_all_finite(outputs)
    np.testing.assert_array_equal(outputs.logits[3], variables["params"]["logits"]["bias"])
    np.testing.assert_array_equal(gradients["logits"].pop("bias"), weights[3])
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


# --- modes and precisions ---


def test_dropout_needs_training_and_a_key():
    module = SMALL.clone(layers=1)
    key = jax.random.key(1)
    variables = draw(module)
    whole = run(module, variables, TOKENS)
    chex.assert_trees_all_equal(run(module, variables, TOKENS, train=True), whole)
    chex.assert_trees_all_equal(run(module, variables, TOKENS, key=key), whole)
    chex.assert_trees_all_equal(
        run(module.clone(dropout=0.0), variables, TOKENS, train=True, key=key), whole
    )
    half = module.clone(dropout=0.5)
    dropped, again = (run(half, variables, TOKENS, train=True, key=key) for _ in range(2))
    chex.assert_trees_all_equal(dropped, again)
    share = (np.asarray(dropped.features["embeddings"]) == 0).mean()
    assert 0.3 < share < 0.7
    assert (abs(dropped.logits - whole.logits)[:3] > 1e-3).all()


def test_bfloat16():
    variables = draw(SMALL)
    variables["params"]["logits"]["bias"] *= 0
    model = with_compute_dtype(from_linen(SMALL), jnp.bfloat16)
    exact = run(SMALL, variables, TOKENS)
    rough, _ = jax.jit(lambda v: model.apply(v, TOKENS, train=False))(variables)
    assert rough.logits.dtype == jnp.float32 and rough.features["layer1"].dtype == jnp.bfloat16
    assert rough.features["scores1"].dtype == jnp.float32
    np.testing.assert_allclose(rough.logits, exact.logits, atol=0.15)
    assert (rough.logits != exact.logits)[:3].all()


# --- wrong tokens ---


@pytest.mark.parametrize(
    ("tokens", "error", "match"),
    [
        (np.ones(5, np.int32), ValueError, r"\[B, S\], got \(5,\).*x\[None\]"),
        (np.ones((2, 0), np.int32), ValueError, r"\[B, S\], got \(2, 0\)"),
        (
            np.ones((2, 11), np.int32),
            ValueError,
            r"\(2, 11\) are more than the 10 positions: cut the texts",
        ),
        (np.ones((2, 5), np.float32), TypeError, r"integer tokens, got float32"),
    ],
    ids=["rank", "empty", "long", "dtype"],
)
def test_wrong_tokens(tokens, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(
            lambda v, x: from_linen(SMALL).apply(v, x, train=False), shapes(SMALL), tokens
        )


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden must be a multiple of heads, got 8 and 3"):
        shapes(SMALL.clone(heads=3))


def test_ids_beyond_the_vocabulary_give_nan():
    logits = run(SMALL, draw(SMALL), np.where(TOKENS == 9, 13, TOKENS)).logits
    assert np.isnan(logits[1]).all() and np.isfinite(logits[::2]).all()


# --- NumPy reference ---


def softmax(x):
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def reference(params, tokens, heads, layers):
    """Computes BERT for one text without padding as in the paper, head by head."""

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def norm(x, layer):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * layer["scale"]
            + layer["bias"]
        )

    x = params["token_embedding"]["embedding"][tokens] + params["position_embedding"][: len(tokens)]
    x = norm(x + params["segment_embedding"][0], params["embedding_norm"])
    named = {"embeddings": x}
    for i in range(layers):
        block, size = params[f"block{i}"], x.shape[1] // heads
        contexts, named[f"scores{i + 1}"], named[f"attention{i + 1}"] = [], [], []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            query, key, value = (
                dense(x, block[name])[:, part] for name in ("query", "key", "value")
            )
            named[f"scores{i + 1}"].append(query @ key.T / math.sqrt(size))
            named[f"attention{i + 1}"].append(softmax(named[f"scores{i + 1}"][-1]))
            contexts.append(named[f"attention{i + 1}"][-1] @ value)
        x = norm(
            x + dense(np.concatenate(contexts, 1), block["attention_output"]),
            block["attention_norm"],
        )
        y = dense(x, block["mlp_in"])
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = named[f"layer{i + 1}"] = norm(x + dense(y, block["mlp_out"]), block["mlp_norm"])
    named["pooled"] = np.tanh(dense(x[0], params["pooler"]))
    return dense(named["pooled"], params["logits"]), named


def test_equals_the_numpy_reference():
    variables = draw(SMALL)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables["params"])
    outputs = run(SMALL, variables, TOKENS)
    for row, length in enumerate((5, 3, 2)):
        logits, named = reference(params, TOKENS[row, :length], heads=2, layers=2)
        np.testing.assert_allclose(outputs.logits[row], logits, atol=1e-5)
        for name, value in named.items():
            feature = outputs.features[name][row]
            if feature.ndim == 3:
                feature = feature[:, :length, :length]
            elif feature.ndim == 2:
                feature = feature[:length]
            np.testing.assert_allclose(feature, value, atol=1e-5, err_msg=name)


def test_poolings():
    variables = draw(DISTIL)
    outputs = run(DISTIL, variables, TOKENS)
    layer = variables["params"]["pre_classifier"]
    first = np.asarray(outputs.features["layer1"])[:3, 0]
    np.testing.assert_allclose(
        outputs.features["pooled"][:3],
        np.maximum(first @ layer["kernel"] + layer["bias"][None], 0),
        atol=1e-5,
    )
    outputs = run(MEAN, draw(MEAN), TOKENS)
    states = np.asarray(outputs.features["layer1"])
    np.testing.assert_allclose(outputs.features["pooled"][1], states[1, :3].mean(0), atol=1e-6)
    assert "pooler" not in shapes(MEAN)["params"]


# --- weights ---


def test_student_of_every_second_layer():
    teacher, student = SMALL.clone(layers=6), SMALL.clone(layers=3)
    rules = transfer.layer_rules("params/block{i}/{rest...}", (0, 2, 4))
    variables, report = transfer.transfer(draw(teacher), shapes(student), rules=rules)
    assert report.complete and len(report.left_out) == 3 * 16
    for new, old in enumerate((0, 2, 4)):
        chex.assert_trees_all_equal(
            variables["params"][f"block{new}"], draw(teacher)["params"][f"block{old}"]
        )


@pytest.mark.parametrize("module", [SMALL, DISTIL, MEAN], ids=["BERT", "DistilBERT", "mean"])
def test_torch_rules_are_invertible(module):
    variables = draw(module)
    named = to_torch(variables, module.torch_rules())
    restored, report = from_torch(named, shapes(module), module.torch_rules())
    assert report.complete
    chex.assert_trees_all_equal(restored, variables)
    prefix = "bert." if module.segments else "distilbert."
    assert {name.split(".")[0] + "." for name in named} <= {
        prefix,
        "classifier.",
        "pre_classifier.",
    }


def test_weights_that_are_omitted():
    omitted = (
        "cls.predictions.bias",
        "bert.embeddings.position_ids",
        "bert.pooler.dense.bias",
        "pre_classifier.weight",
    )
    named = to_torch(draw(MEAN), MEAN.torch_rules()) | dict.fromkeys(omitted, np.zeros(1))
    _, report = from_torch(named, shapes(MEAN), MEAN.torch_rules())
    assert report.complete and set(report.left_out) == {*omitted}


@pytest.mark.parametrize("module", [SMALL, DISTIL], ids=["BERT", "DistilBERT"])
def test_names_of_models_without_a_head_and_of_old_files(module):
    named = to_torch(draw(module), module.torch_rules())
    prefix = "bert." if module.segments else "distilbert."
    bare = {name.removeprefix(prefix): array for name, array in named.items()}
    assert (
        bare.keys() != named.keys() == canonical_names(bare).keys() == canonical_names(named).keys()
    )
    old = {
        name.replace("orm.weight", "orm.gamma").replace("orm.bias", "orm.beta"): array
        for name, array in named.items()
    }
    assert (
        any(name.endswith("gamma") for name in old) and canonical_names(old).keys() == named.keys()
    )


# --- against PyTorch ---


def transformers_model(module):
    """Makes the same architecture in PyTorch with random weights; returns it and its state dict."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    common = {
        "vocab_size": 13,
        "max_position_embeddings": 10,
        "num_labels": 3,
        "attn_implementation": "eager",
    }
    if module.segments:
        sizes = {
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 12,
        }
        theirs = transformers.BertForSequenceClassification(
            transformers.BertConfig(**common, **sizes)
        )
    else:
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12}
        theirs = transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(**common, **sizes)
        )
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5 + 0.1)
    return theirs.eval(), {name: value.numpy() for name, value in theirs.state_dict().items()}


@needs_transformers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", [SMALL, DISTIL], ids=["BERT", "DistilBERT"])
def test_equals_transformers(module):
    torch = importlib.import_module("torch")
    theirs, state_dict = transformers_model(module)
    variables, report = from_torch(
        canonical_names(state_dict), shapes(module), module.torch_rules()
    )
    assert report.complete
    ids = torch.tensor(TOKENS, dtype=torch.long)
    expected = theirs(
        ids, attention_mask=ids != 0, output_hidden_states=True, output_attentions=True
    )
    outputs = run(module, variables, TOKENS)
    np.testing.assert_allclose(outputs.logits[:3], expected.logits.detach()[:3], atol=1e-5)
    names = "embeddings", *(f"layer{i}" for i in range(1, module.layers + 1))
    for name, states in zip(names, expected.hidden_states, strict=True):
        where = TOKENS != 0
        np.testing.assert_allclose(
            outputs.features[name][where],
            states.detach().numpy()[where],
            atol=1e-5,
            err_msg=name,
        )
    for i, weights in enumerate(expected.attentions, start=1):
        np.testing.assert_allclose(
            outputs.features[f"attention{i}"][:3], weights.detach()[:3], atol=1e-5
        )
    weights = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    weights[3] = 0  # transformers' logits for a text without tokens are meaningless
    (expected.logits * torch.tensor(weights)).sum().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    gradients, _ = weighted_gradients(module, variables, TOKENS, weights)
    actual = to_torch({"params": gradients}, module.torch_rules())
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        atol = 1e-5 * max(1, abs(expected[name]).max())
        np.testing.assert_allclose(gradient, expected[name], atol=atol, err_msg=name)
