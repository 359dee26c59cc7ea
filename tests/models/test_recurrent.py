"""Recurrent layers: a NumPy reference, padding, single steps, equality with PyTorch."""

import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from any_model import needs_torch
from jaxkd.models.recurrent import GRU, LSTM, recurrent_rules
from jaxkd.transfer import transfer
from jaxkd.weights.torch_files import to_torch

B, S, D, H = 3, 5, 4, 6
LENGTHS = np.array([5, 2, 0])
WHERE = np.arange(S) < LENGTHS[:, None]
LAYERS = [LSTM(H), LSTM(H, reverse=True), GRU(H), GRU(H, reverse=True)]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=["LSTM", "LSTM back", "GRU", "GRU back"])


def draw(layer, dtype=np.float32):
    rng = np.random.default_rng(0)
    width = layer.num_gates * H
    shapes = {
        "kernel": (D, width),
        "recurrent_kernel": (H, width),
        "bias": (width,),
        "recurrent_bias": (width,),
    }
    params = {name: rng.normal(0, 0.5, shape).astype(dtype) for name, shape in shapes.items()}
    state = [rng.normal(size=(B, H)).astype(dtype) for _ in range(2)]
    return {"params": params}, rng.normal(size=(B, S, D)).astype(dtype), state


def layer_state(layer, state):
    """Returns the layer's state from hidden state and cell."""
    return tuple(state) if isinstance(layer, LSTM) else state[0]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(layer, variables, inputs, lengths, state):
    """Computes sentence by sentence and word by word, in float64."""
    p = {name: np.float64(array) for name, array in variables["params"].items()}
    states, last = np.zeros((B, S, H)), []
    for b, length in enumerate(lengths):
        h, c = (np.float64(part[b]) for part in state)
        for t in range(length)[::-1] if layer.reverse else range(length):
            x = inputs[b, t] @ p["kernel"] + p["bias"]
            u = h @ p["recurrent_kernel"] + p["recurrent_bias"]
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
    return states, layer_state(layer, [np.stack(part) for part in zip(*last, strict=True)])


@each_layer
@pytest.mark.parametrize("has_state", [True, False], ids=["state", "no state"])
def test_equals_the_numpy_reference(layer, has_state):
    variables, inputs, state = draw(layer)
    initial = layer_state(layer, state) if has_state else None
    actual = jax.jit(layer.apply)(variables, inputs, WHERE, initial)
    state = state if has_state else np.zeros((2, B, H))
    expected = reference(layer, variables, inputs, LENGTHS, state)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.thorough
@each_layer
def test_gradients_equal_those_of_single_steps(layer):
    variables, inputs, state = draw(layer)
    weights = np.random.default_rng(1).normal(size=(B, S, H)).astype(np.float32)

    def looped(variables, inputs, state):
        outputs: list = [None] * S
        for t in range(S)[::-1] if layer.reverse else range(S):
            output, updated = layer.apply(variables, inputs[:, t], state, method="step")
            counts = jnp.asarray(WHERE[:, t, None])
            state = jax.tree.map(
                lambda new, old, counts=counts: jnp.where(counts, new, old), updated, state
            )
            outputs[t] = jnp.where(counts, output, 0)
        return jnp.stack(outputs, 1), state

    def value(run):
        def objective(variables, inputs, state):
            states, last = run(variables, inputs, state)
            return (states * weights).sum() + sum((part**3).sum() for part in jax.tree.leaves(last))

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))(
            variables, inputs, layer_state(layer, state)
        )

    actual = value(lambda variables, inputs, state: layer.apply(variables, inputs, WHERE, state))
    chex.assert_trees_all_close(actual, value(looped), rtol=1e-4, atol=1e-5)
    assert all(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(actual))


@pytest.mark.thorough
@each_layer
def test_padding_changes_nothing(layer):
    variables, inputs, _ = draw(layer)

    def value(inputs, where):
        def objective(variables, inputs):
            states, last = layer.apply(variables, inputs, where)
            return (states**2).sum() + sum((part**2).sum() for part in jax.tree.leaves(last))

        return jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))(variables, inputs)

    total, (gradient, inputs_gradient) = value(np.where(WHERE[..., None], inputs, np.nan), WHERE)
    padded_total, (padded_gradient, _) = value(
        np.pad(inputs, ((0, 0), (0, 3), (0, 0))), np.pad(WHERE, ((0, 0), (0, 3)))
    )
    chex.assert_trees_all_close(
        (total, gradient), (padded_total, padded_gradient), rtol=1e-5, atol=1e-6
    )
    assert not inputs_gradient[~WHERE].any() and inputs_gradient[WHERE].all()


@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_reverse_reads_each_sentence_reversed_within_its_length(kind):
    variables, inputs, _ = draw(kind(H))
    order = np.where(WHERE, np.maximum(LENGTHS[:, None] - 1 - np.arange(S), 0), np.arange(S))
    reversed_inputs = np.take_along_axis(inputs, order[..., None], 1)
    states, last = kind(H).apply(variables, reversed_inputs, WHERE)
    actual = kind(H, reverse=True).apply(variables, inputs, WHERE)
    expected = np.take_along_axis(np.asarray(states), order[..., None], 1), last
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@each_layer
def test_products_are_bfloat16_and_the_state_is_float32(layer):
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
def test_weights_are_initialised_as_in_pytorch(layer):
    params = layer.init(jax.random.key(0), np.zeros((1, 2, 50), np.float32), np.ones((1, 2), bool))[
        "params"
    ]
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "kernel": (50, layer.num_gates * H),
        "recurrent_kernel": (H, layer.num_gates * H),
        "bias": (layer.num_gates * H,),
        "recurrent_bias": (layer.num_gates * H,),
    }
    assert (
        0.98 * H**-0.5 < np.abs(params["kernel"]).max() < H**-0.5
        and abs(params["kernel"].mean()) < 0.05
    )


@pytest.mark.parametrize(
    ("shape", "where"), [((2, 3), WHERE), ((B, S, D), WHERE.T), ((B, S, D), WHERE.astype(int))]
)
def test_wrong_shapes_raise(shape, where):
    with pytest.raises(ValueError, match=r"\[B, S, D\] and booleans \[B, S\]"):
        LSTM(H).init(jax.random.key(0), np.zeros(shape, np.float32), where)


@needs_torch
@each_layer
def test_equals_pytorch_in_value_and_gradient_with_invertible_rules(layer):
    torch = importlib.import_module("torch")
    make_torch_layer = getattr(torch.nn, type(layer).__name__)
    torch_layer = make_torch_layer(D, H, batch_first=True, bidirectional=True)
    suffix = "l0_reverse" if layer.reverse else "l0"
    rules = recurrent_rules("rnn", "layer", suffix=suffix)
    _, inputs, _ = draw(layer)
    torch_inputs = torch.tensor(inputs[:1], requires_grad=True)
    states, _ = torch_layer(torch_inputs)
    states = states[..., H:] if layer.reverse else states[..., :H]
    (states**2).sum().backward()

    def by_name(to_array):
        """Returns an array per parameter of this direction."""
        return {
            f"rnn.{name}": to_array(parameter)
            for name, parameter in torch_layer.named_parameters()
            if name.endswith(suffix)
        }

    like = {"params": {"layer": draw(layer)[0]["params"]}}
    weights = by_name(lambda parameter: parameter.detach().numpy())
    variables, report = transfer(weights, like, rules=rules)
    assert report.complete
    chex.assert_trees_all_equal(to_torch(variables, rules), weights)

    def objective(params, inputs):
        states, _ = layer.apply({"params": params["layer"]}, inputs, np.ones((1, S), bool))
        return (states**2).sum(), states

    (_, actual), gradients = jax.value_and_grad(objective, (0, 1), has_aux=True)(
        variables["params"], inputs[:1]
    )
    torch_gradients = by_name(lambda parameter: parameter.grad.numpy())
    expected_gradients, _ = transfer(torch_gradients, like, rules=rules)
    expected = states.detach().numpy(), expected_gradients["params"], torch_inputs.grad.numpy()
    chex.assert_trees_all_close((actual, *gradients), expected, rtol=1e-4, atol=1e-5)
