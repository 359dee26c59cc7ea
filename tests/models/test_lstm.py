"""The LSTM classifier: PyTorch's numbers, sentences of different lengths, shapes and names."""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any_model import needs_torch
from jaxkd.checkpoints.weights import to_torch
from jaxkd.models import computing_in, from_linen
from jaxkd.models.lstm import LSTMClassifier
from jaxkd.transfer import transfer

ONE_WAY = LSTMClassifier(11, embedding=5, hidden=(6, 4), dense=7, num_classes=3)
BOTH_WAYS = LSTMClassifier(11, embedding=5, hidden=(6, 4), dense=7, num_classes=3, bidirectional=True)
TOKENS = np.array([[4, 7, 10, 2], [9, 3, 0, 0], [1, 0, 0, 0]], np.int32)
each_module = pytest.mark.parametrize("module", [ONE_WAY, BOTH_WAYS], ids=["one way", "both ways"])


@functools.cache
def draw(module):
    rng, shapes = np.random.default_rng(0), jax.eval_shape(from_linen(module).init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)


def value_and_gradient(module, tokens, variables=None):
    variables = draw(module) if variables is None else variables

    def objective(params):
        outputs, _ = from_linen(module).apply({**variables, "params": params}, tokens, train=False)
        return (outputs.logits**2).sum(), outputs.logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(variables["params"])
    return logits, gradient


@pytest.mark.parametrize(("module", "ways"), [(ONE_WAY, 1), (BOTH_WAYS, 2)])
def test_named_features_have_their_shapes(module, ways):
    model = from_linen(module)
    (logits, named), _ = jax.eval_shape(functools.partial(model.apply, train=False), draw(module), TOKENS)
    assert logits.shape == (3, 3) and {name: feature.shape for name, feature in named.items()} == {
        "embeddings": (3, 4, 5),
        "lstm1": (3, 4, 6 * ways),
        "lstm2": (3, 4, 4 * ways),
        "pre_logits": (3, 7),
    }


def test_default_sizes():
    shapes = jax.eval_shape(from_linen(LSTMClassifier(1000)).init, jax.random.key(0), TOKENS)
    layers = 64 * 1000, 4 * 64 * (64 + 64 + 2), 4 * 32 * (64 + 32 + 2), 64 * 33, 2 * 65
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(layers)


def test_the_last_state_of_each_sentence_leads_to_the_logits():
    outputs, _ = from_linen(ONE_WAY).apply(draw(ONE_WAY), TOKENS, train=False)
    params, states = draw(ONE_WAY)["params"], np.asarray(outputs.features["lstm2"])
    last = states[np.arange(3), (TOKENS != 0).sum(1) - 1]
    hidden = np.maximum(last @ params["dense"]["kernel"] + params["dense"]["bias"], 0)
    np.testing.assert_allclose(outputs.features["pre_logits"], hidden, rtol=1e-5, atol=1e-6)
    logits = hidden @ params["logits"]["kernel"] + params["logits"]["bias"]
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-6)
    assert not any(np.asarray(outputs.features[name])[TOKENS == 0].any() for name in ("embeddings", "lstm1", "lstm2"))


@each_module
def test_padding_changes_nothing(module):
    found = value_and_gradient(module, np.pad(TOKENS, ((0, 0), (0, 3))))
    chex.assert_trees_all_close(found, value_and_gradient(module, TOKENS), rtol=1e-5, atol=1e-6)
    assert not found[1]["embedding"]["embedding"][0].any()


@each_module
def test_a_row_of_nothing_but_padding_is_finite_and_alone(module):
    logits, gradient = value_and_gradient(module, np.pad(TOKENS, ((0, 1), (0, 0))))
    chex.assert_tree_all_finite((logits, gradient))
    np.testing.assert_allclose(logits[:3], value_and_gradient(module, TOKENS)[0], rtol=1e-5, atol=1e-6)


def test_dropout_is_for_training():
    model, key = from_linen(ONE_WAY.clone(dropout=0.5)), jax.random.key(0)
    apply = jax.jit(model.apply, static_argnames="train")
    rest, _ = apply(draw(ONE_WAY), TOKENS, train=False)
    first, _ = apply(draw(ONE_WAY), TOKENS, train=True, key=key)
    assert (first.logits != rest.logits).any()
    chex.assert_trees_all_equal(first, apply(draw(ONE_WAY), TOKENS, train=True, key=key)[0])
    np.testing.assert_allclose(rest.logits, value_and_gradient(ONE_WAY, TOKENS)[0], rtol=1e-5)


def test_computes_in_bfloat16():
    model = computing_in(from_linen(BOTH_WAYS), jnp.bfloat16)
    outputs, _ = model.apply(draw(BOTH_WAYS), TOKENS, train=False)
    assert outputs.features["lstm2"].dtype == jnp.bfloat16 and outputs.logits.dtype == jnp.float32
    np.testing.assert_allclose(outputs.logits, value_and_gradient(BOTH_WAYS, TOKENS)[0], atol=0.05)


@pytest.mark.parametrize(
    ("module", "tokens", "error", "match"),
    [
        (ONE_WAY, TOKENS[0], ValueError, r"x\[None\]"),
        (ONE_WAY, TOKENS.astype(np.float32), TypeError, "integers"),
        (ONE_WAY.clone(hidden=()), TOKENS, ValueError, "at least one LSTM layer"),
    ],
)
def test_what_does_not_fit_is_told(module, tokens, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(from_linen(module).init, jax.random.key(0), tokens)


@each_module
def test_rules_read_both_ways(module):
    variables, rules = draw(module), module.torch_rules()
    weights = to_torch(variables, rules)
    found, report = transfer(weights, variables, rules=rules)
    assert report.complete and {"embedding.weight", "lstm2.weight_hh_l0", "dense.bias", "logits.weight"} <= {*weights}
    assert ("lstm1.bias_ih_l0_reverse" in weights) == module.bidirectional
    chex.assert_trees_all_equal(found, variables)


@needs_torch
@each_module
def test_equals_pytorch_in_value_and_gradient(module):
    torch = importlib.import_module("torch")
    rnn, ways = torch.nn.utils.rnn, 1 + module.bidirectional
    layers = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(11, 5)})
    for name, width, features in (("lstm1", 5, 6), ("lstm2", 6 * ways, 4)):
        layers[name] = torch.nn.LSTM(width, features, batch_first=True, bidirectional=module.bidirectional)
    layers.update({"dense": torch.nn.Linear(4 * ways, 7), "logits": torch.nn.Linear(7, 3)})
    weights = {name: torch.tensor(array) for name, array in to_torch(draw(module), module.torch_rules()).items()}
    layers.load_state_dict(weights)

    lengths = torch.tensor((TOKENS != 0).sum(1))
    x = rnn.pack_padded_sequence(layers["embedding"](torch.tensor(TOKENS)), lengths, batch_first=True)
    x, _ = layers["lstm1"](x)
    _, (last, _) = layers["lstm2"](x)
    logits = layers["logits"](torch.relu(layers["dense"](torch.cat([*last], -1))))
    (logits**2).sum().backward()

    found, gradient = value_and_gradient(module, TOKENS)
    np.testing.assert_allclose(found, logits.detach().numpy(), rtol=1e-4, atol=1e-5)
    gradients = {name: parameter.grad.numpy() for name, parameter in layers.named_parameters()}
    wanted, _ = transfer(gradients, draw(module), rules=module.torch_rules())
    chex.assert_trees_all_close({"params": gradient, "batch_stats": {}}, wanted, rtol=1e-4, atol=1e-5)
