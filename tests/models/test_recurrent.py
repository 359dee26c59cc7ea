"""Recurrent layers: PyTorch's numbers, sentences of different lengths, and one step as many."""

import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any_model import needs_torch
from jaxkd.checkpoints.weights import to_torch
from jaxkd.models.recurrent import GRU, LSTM, recurrent_rules
from jaxkd.transfer import transfer

B, S, D, H = 3, 5, 4, 6
LENGTHS = np.array([5, 2, 0])
WHERE = np.arange(S) < LENGTHS[:, None]
LAYERS = [LSTM(H), LSTM(H, reverse=True), GRU(H), GRU(H, reverse=True)]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=["LSTM", "LSTM back", "GRU", "GRU back"])


def draw(layer, dtype=np.float32):
    rng = np.random.default_rng(0)
    width = layer.gates * H
    shapes = {"kernel": (D, width), "recurrent_kernel": (H, width), "bias": (width,), "recurrent_bias": (width,)}
    params = {name: rng.normal(0, 0.5, shape).astype(dtype) for name, shape in shapes.items()}
    state = [rng.normal(size=(B, H)).astype(dtype) for _ in range(2)]
    return {"params": params}, rng.normal(size=(B, S, D)).astype(dtype), state


def of(layer, state):
    """The layer's state from hidden state and cell."""
    return tuple(state) if isinstance(layer, LSTM) else state[0]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(layer, variables, inputs, lengths, state):
    """Word by word, sentence by sentence, in float64."""
    p = {name: np.float64(array) for name, array in variables["params"].items()}
    states, last = np.zeros((B, S, H)), []
    for b, length in enumerate(lengths):
        h, c = (np.float64(part[b]) for part in state)
        for t in range(length)[::-1] if layer.reverse else range(length):
            x, u = inputs[b, t] @ p["kernel"] + p["bias"], h @ p["recurrent_kernel"] + p["recurrent_bias"]
            if isinstance(layer, LSTM):
                i, f, g, o = np.split(x + u, 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
            else:
                (r, z, n), (ur, uz, un) = np.split(x, 3), np.split(u, 3)
                z = sigmoid(z + uz)
                h = (1 - z) * np.tanh(n + sigmoid(r + ur) * un) + z * h
            states[b, t] = h
        last.append((h, c))
    return states, of(layer, [np.stack(part) for part in zip(*last, strict=True)])


@each_layer
@pytest.mark.parametrize("given", [True, False], ids=["state", "no state"])
def test_equals_numpy_word_by_word(layer, given):
    variables, inputs, state = draw(layer)
    found = jax.jit(layer.apply)(variables, inputs, WHERE, of(layer, state) if given else None)
    state = state if given else np.zeros((2, B, H))
    chex.assert_trees_all_close(found, reference(layer, variables, inputs, LENGTHS, state), rtol=1e-5, atol=1e-6)


@each_layer
def test_gradients_are_those_of_steps_one_by_one(layer):
    variables, inputs, state = draw(layer)
    weights = np.random.default_rng(1).normal(size=(B, S, H)).astype(np.float32)

    def looped(variables, inputs, state):
        outputs: list = [None] * S
        for t in range(S)[::-1] if layer.reverse else range(S):
            output, moved = layer.apply(variables, inputs[:, t], state, method="step")
            counts = jnp.asarray(WHERE[:, t, None])
            state = jax.tree.map(lambda new, old, counts=counts: jnp.where(counts, new, old), moved, state)
            outputs[t] = jnp.where(counts, output, 0)
        return jnp.stack(outputs, 1), state

    def value(run):
        def objective(*given):
            states, last = run(*given)
            return (states * weights).sum() + sum((part**3).sum() for part in jax.tree.leaves(last))

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))(variables, inputs, of(layer, state))

    found = value(lambda variables, inputs, state: layer.apply(variables, inputs, WHERE, state))
    chex.assert_trees_all_close(found, value(looped), rtol=1e-4, atol=1e-5)
    assert all(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(found))


@each_layer
def test_padding_reaches_nothing(layer):
    variables, inputs, _ = draw(layer)

    def value(inputs, where):
        def objective(variables, inputs):
            states, last = layer.apply(variables, inputs, where)
            return (states**2).sum() + sum((part**2).sum() for part in jax.tree.leaves(last))

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))(variables, inputs)

    total, (gradient, of_inputs) = value(np.where(WHERE[..., None], inputs, np.nan), WHERE)
    longer = np.pad(inputs, ((0, 0), (0, 3), (0, 0))), np.pad(WHERE, ((0, 0), (0, 3)))
    chex.assert_trees_all_close((total, gradient), (lambda v, g: (v, g[0]))(*value(*longer)), rtol=1e-5, atol=1e-6)
    assert not of_inputs[~WHERE].any() and of_inputs[WHERE].all()


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_reverse_reads_each_sentence_reversed_within_its_length(kind):
    variables, inputs, _ = draw(kind(H))
    order = np.where(WHERE, np.maximum(LENGTHS[:, None] - 1 - np.arange(S), 0), np.arange(S))
    turned = np.take_along_axis(inputs, order[..., None], 1)
    states, last = kind(H).apply(variables, turned, WHERE)
    found = kind(H, reverse=True).apply(variables, inputs, WHERE)
    chex.assert_trees_all_close(found, (np.take_along_axis(np.asarray(states), order[..., None], 1), last), rtol=1e-6)


@each_layer
def test_bfloat16_multiplies_and_the_state_stays_wide(layer):
    variables, inputs, _ = draw(layer)
    rough = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (variables, inputs))
    exact, _ = jax.jit(layer.apply)(variables, inputs, WHERE)

    def objective(variables):
        states, last = layer.apply(variables, rough[1], WHERE)
        return states.astype(jnp.float32).sum(), (states, last)

    gradient, (states, last) = jax.jit(jax.grad(objective, has_aux=True))(rough[0])
    np.testing.assert_allclose(np.float32(states), exact, atol=0.03)
    assert {leaf.dtype for leaf in jax.tree.leaves((gradient, states))} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(last)} == {jnp.dtype("float32")}


@each_layer
def test_weights_start_as_pytorchs(layer):
    params = layer.init(jax.random.key(0), np.zeros((1, 2, 50), np.float32), np.ones((1, 2), bool))["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "kernel": (50, layer.gates * H),
        "recurrent_kernel": (H, layer.gates * H),
        "bias": (layer.gates * H,),
        "recurrent_bias": (layer.gates * H,),
    }
    assert 0.98 * H**-0.5 < np.abs(params["kernel"]).max() < H**-0.5 and abs(params["kernel"].mean()) < 0.05


@pytest.mark.parametrize(("shape", "where"), [((2, 3), WHERE), ((B, S, D), WHERE.T), ((B, S, D), WHERE.astype(int))])
def test_what_does_not_fit_is_told(shape, where):
    with pytest.raises(ValueError, match=r"\[B, S, D\] and booleans \[B, S\]"):
        LSTM(H).init(jax.random.key(0), np.zeros(shape, np.float32), where)


@needs_torch
@each_layer
def test_equals_pytorch_in_value_and_gradient_and_reads_back(layer):
    torch = importlib.import_module("torch")
    both = getattr(torch.nn, type(layer).__name__)(D, H, batch_first=True, bidirectional=True)
    suffix = "l0_reverse" if layer.reverse else "l0"
    rules = recurrent_rules("rnn", "layer", suffix=suffix)
    _, inputs, _ = draw(layer)
    given = torch.tensor(inputs[:1], requires_grad=True)
    states = both(given)[0][..., H:] if layer.reverse else both(given)[0][..., :H]
    (states**2).sum().backward()

    def named(kind):
        parts = {f"rnn.{name}": kind(part) for name, part in both.named_parameters()}
        return {name: array for name, array in parts.items() if name.endswith(suffix)}

    like = {"params": {"layer": draw(layer)[0]["params"]}}
    variables, report = transfer(named(lambda part: part.detach().numpy()), like, rules=rules)
    assert report.complete
    chex.assert_trees_all_equal(to_torch(variables, rules), named(lambda part: part.detach().numpy()))

    def objective(params, inputs):
        states, _ = layer.apply({"params": params["layer"]}, inputs, np.ones((1, S), bool))
        return (states**2).sum(), states

    (_, found), gradients = jax.value_and_grad(objective, (0, 1), has_aux=True)(variables["params"], inputs[:1])
    wanted, _ = transfer(named(lambda part: part.grad.numpy()), like, rules=rules)
    wanted = states.detach().numpy(), wanted["params"], given.grad.numpy()
    chex.assert_trees_all_close((found, *gradients), wanted, rtol=1e-4, atol=1e-5)
