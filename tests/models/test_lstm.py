"""The LSTM classifier: shapes, padding, rules for weights, equality with PyTorch."""

import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any_model import needs_torch
from jaxkd.models import from_linen, with_compute_dtype
from jaxkd.models.lstm import LSTMClassifier
from jaxkd.transfer import transfer
from jaxkd.weights.torch_files import to_torch

FORWARD = LSTMClassifier(11, embedding=5, hidden=(6, 4), dense=7, num_classes=3)
BIDIRECTIONAL = LSTMClassifier(
    11, embedding=5, hidden=(6, 4), dense=7, num_classes=3, bidirectional=True
)
TOKENS = np.array([[4, 7, 10, 2], [9, 3, 0, 0], [1, 0, 0, 0]], np.int32)
each_module = pytest.mark.parametrize(
    "module", [FORWARD, BIDIRECTIONAL], ids=["forward", "bidirectional"]
)


@functools.cache
def draw(module):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(from_linen(module).init, jax.random.key(0), TOKENS)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)


def value_and_gradient(module, tokens, variables=None):
    variables = draw(module) if variables is None else variables

    def objective(params):
        outputs, _ = from_linen(module).apply({**variables, "params": params}, tokens, train=False)
        return (outputs.logits**2).sum(), outputs.logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(
        variables["params"]
    )
    return logits, gradient


@pytest.mark.parametrize(("module", "directions"), [(FORWARD, 1), (BIDIRECTIONAL, 2)])
def test_named_features_have_their_shapes(module, directions):
    model = from_linen(module)
    (logits, named), _ = jax.eval_shape(
        functools.partial(model.apply, train=False), draw(module), TOKENS
    )
    assert logits.shape == (3, 3) and {name: feature.shape for name, feature in named.items()} == {
        "embeddings": (3, 4, 5),
        "lstm1": (3, 4, 6 * directions),
        "lstm2": (3, 4, 4 * directions),
        "pre_logits": (3, 7),
    }


def test_default_sizes():
    shapes = jax.eval_shape(from_linen(LSTMClassifier(1000)).init, jax.random.key(0), TOKENS)
    layers = 64 * 1000, 4 * 64 * (64 + 64 + 2), 4 * 32 * (64 + 32 + 2), 64 * 33, 2 * 65
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == sum(layers)


def test_the_last_state_of_each_sentence_leads_to_the_logits():
    outputs, _ = from_linen(FORWARD).apply(draw(FORWARD), TOKENS, train=False)
    params, states = draw(FORWARD)["params"], np.asarray(outputs.features["lstm2"])
    last = states[np.arange(3), (TOKENS != 0).sum(1) - 1]
    hidden = np.maximum(last @ params["dense"]["kernel"] + params["dense"]["bias"], 0)
    np.testing.assert_allclose(outputs.features["pre_logits"], hidden, rtol=1e-5, atol=1e-6)
    logits = hidden @ params["logits"]["kernel"] + params["logits"]["bias"]
    np.testing.assert_allclose(outputs.logits, logits, rtol=1e-5, atol=1e-6)
    assert not any(
        np.asarray(outputs.features[name])[TOKENS == 0].any()
        for name in ("embeddings", "lstm1", "lstm2")
    )


@pytest.mark.thorough
@each_module
def test_padding_changes_nothing(module):
    logits, gradient = value_and_gradient(module, np.pad(TOKENS, ((0, 0), (0, 3))))
    expected = value_and_gradient(module, TOKENS)
    chex.assert_trees_all_close((logits, gradient), expected, rtol=1e-5, atol=1e-6)
    assert not gradient["embedding"]["embedding"][0].any()


@pytest.mark.thorough
@each_module
def test_a_row_of_padding_is_finite_and_changes_no_other_row(module):
    logits, gradient = value_and_gradient(module, np.pad(TOKENS, ((0, 1), (0, 0))))
    chex.assert_tree_all_finite((logits, gradient))
    np.testing.assert_allclose(
        logits[:3], value_and_gradient(module, TOKENS)[0], rtol=1e-5, atol=1e-6
    )


def test_dropout_is_for_training():
    model = from_linen(FORWARD.clone(dropout=0.5))
    key = jax.random.key(0)
    apply = jax.jit(model.apply, static_argnames="train")
    evaluated, _ = apply(draw(FORWARD), TOKENS, train=False)
    first, _ = apply(draw(FORWARD), TOKENS, train=True, key=key)
    assert (first.logits != evaluated.logits).any()
    chex.assert_trees_all_equal(first, apply(draw(FORWARD), TOKENS, train=True, key=key)[0])
    expected, _ = value_and_gradient(FORWARD, TOKENS)
    np.testing.assert_allclose(evaluated.logits, expected, rtol=1e-5)


@pytest.mark.thorough
def test_computes_in_bfloat16():
    model = with_compute_dtype(from_linen(BIDIRECTIONAL), jnp.bfloat16)
    outputs, _ = model.apply(draw(BIDIRECTIONAL), TOKENS, train=False)
    assert outputs.features["lstm2"].dtype == jnp.bfloat16 and outputs.logits.dtype == jnp.float32
    np.testing.assert_allclose(
        outputs.logits, value_and_gradient(BIDIRECTIONAL, TOKENS)[0], atol=0.05
    )


@pytest.mark.parametrize(
    ("module", "tokens", "error", "match"),
    [
        (FORWARD, TOKENS[0], ValueError, r"x\[None\]"),
        (FORWARD, TOKENS.astype(np.float32), TypeError, "integers"),
        (FORWARD.clone(hidden=()), TOKENS, ValueError, "at least one LSTM layer"),
    ],
)
def test_wrong_inputs_raise(module, tokens, error, match):
    with pytest.raises(error, match=match):
        jax.eval_shape(from_linen(module).init, jax.random.key(0), tokens)


@each_module
def test_torch_rules_are_invertible(module):
    variables = draw(module)
    rules = module.torch_rules()
    weights = to_torch(variables, rules)
    restored, report = transfer(weights, variables, rules=rules)
    assert report.complete and {
        "embedding.weight",
        "lstm2.weight_hh_l0",
        "dense.bias",
        "logits.weight",
    } <= {*weights}
    assert ("lstm1.bias_ih_l0_reverse" in weights) == module.bidirectional
    chex.assert_trees_all_equal(restored, variables)


@needs_torch
@each_module
def test_equals_pytorch_in_value_and_gradient(module):
    torch = importlib.import_module("torch")
    rnn = torch.nn.utils.rnn
    directions = 1 + module.bidirectional
    layers = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(11, 5)})
    for name, width, features in (("lstm1", 5, 6), ("lstm2", 6 * directions, 4)):
        layers[name] = torch.nn.LSTM(
            width, features, batch_first=True, bidirectional=module.bidirectional
        )
    layers.update({"dense": torch.nn.Linear(4 * directions, 7), "logits": torch.nn.Linear(7, 3)})
    weights = {
        name: torch.tensor(array)
        for name, array in to_torch(draw(module), module.torch_rules()).items()
    }
    layers.load_state_dict(weights)

    lengths = torch.tensor((TOKENS != 0).sum(1))
    x = rnn.pack_padded_sequence(
        layers["embedding"](torch.tensor(TOKENS)), lengths, batch_first=True
    )
    x, _ = layers["lstm1"](x)
    _, (last, _) = layers["lstm2"](x)
    logits = layers["logits"](torch.relu(layers["dense"](torch.cat([*last], -1))))
    (logits**2).sum().backward()

    actual, gradient = value_and_gradient(module, TOKENS)
    np.testing.assert_allclose(actual, logits.detach().numpy(), rtol=1e-4, atol=1e-5)
    gradients = {name: parameter.grad.numpy() for name, parameter in layers.named_parameters()}
    expected, _ = transfer(gradients, draw(module), rules=module.torch_rules())
    chex.assert_trees_all_close(
        {"params": gradient, "batch_stats": {}}, expected, rtol=1e-4, atol=1e-5
    )
