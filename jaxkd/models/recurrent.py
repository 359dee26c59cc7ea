"""Recurrent layers over padded sentences, with the gates of PyTorch's.

The products of the inputs do not depend on earlier steps: they are computed for all steps at once,
and the loop multiplies the hidden state alone. At a padded position the state does not change and
the output is 0, so that the final state is the state at the end of each sentence.

The layers have a custom gradient. It computes the gradient of the recurrent kernel in one product
after the loop, instead of adding to it in every step. They have no forward-mode derivative.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxkd import layout
from jaxkd.transfer import Rule

State: TypeAlias = Any
"""State of a layer, float32 or wider: `(hidden, cell)` in an LSTM, `hidden` in a GRU, `[B, H]`."""

_UpdateFn: TypeAlias = Callable[[Array, Any, State], State]


class _RecurrentLayer(nn.Module):
    """Base of the recurrent layers; a subclass defines its gates and the update of its state."""

    features: int
    reverse: bool = False

    num_gates: ClassVar[int]

    def __call__(self, inputs: Array, where: Array, state: State = None) -> tuple[Array, State]:
        """Applies the layer to sentences.

        Args:
            inputs: `[B, S, D]`, floating-point.
            where: Booleans `[B, S]`, True for tokens and False for padding. Inputs at padding have
                no effect.
            state: The state from which the layer starts: before the first token, or after the last
                with `reverse`. 0 by default.

        Returns:
            The hidden states `[B, S, H]` in the inputs' dtype, 0 at padding, and the final state,
            in float32 or wider.

        Raises:
            ValueError: If the shapes do not match or `where` is not boolean.
        """
        inputs = jnp.asarray(inputs)
        where = jnp.asarray(where)
        if inputs.ndim != 3 or where.shape != inputs.shape[:2] or where.dtype != bool:
            raise ValueError(
                "expected inputs [B, S, D] and booleans [B, S] for where, got "
                f"{inputs.shape} and {where.dtype} {where.shape}"
            )
        # `scan` loops over the first axis.
        steps = inputs.swapaxes(0, 1)
        valid = where.T[..., None]
        # Zeros instead of padding, or NaN there would reach the gradient of the kernel.
        kernel, projected, candidate = self._project_inputs(jnp.where(valid, steps, 0))
        state = self.initial_state(inputs) if state is None else state
        hidden, final = _run(self._update, self.reverse, kernel, projected, candidate, valid, state)
        hidden = jnp.where(valid, hidden, 0).astype(inputs.dtype).swapaxes(0, 1)
        return hidden, final

    def step(self, inputs: Array, state: State) -> tuple[Array, State]:
        """Applies the layer to one token.

        Args:
            inputs: `[B, D]`.
            state: The state before the token.

        Returns:
            The hidden state `[B, H]` in the inputs' dtype, and the state after the token.
        """
        kernel, projected, candidate = self._project_inputs(inputs)
        state = _step(self._update, kernel, projected, candidate, state)
        return _hidden_state(state).astype(inputs.dtype), state

    def initial_state(self, inputs: Array) -> State:
        """Returns a state of 0 for inputs `[B, ...]`."""
        raise NotImplementedError

    @nn.compact
    def _project_inputs(self, inputs: Array) -> tuple[Array, Array, Any]:
        """Declares the parameters and multiplies the inputs.

        Returns:
            The recurrent kernel, the term that is added to its product with the hidden state, and
            the term that the update takes in addition to that sum; see `_split_projection`.
        """

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            bound = self.features**-0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        width = self.num_gates * self.features
        kernel = self.param("kernel", init, (inputs.shape[-1], width))
        recurrent_kernel = self.param("recurrent_kernel", init, (self.features, width))
        # Two biases, as in PyTorch: a GRU needs both, and with one an LSTM would train differently,
        # since each of the two gets the gradient of their sum.
        biases = self.param("bias", init, (width,)), self.param("recurrent_bias", init, (width,))
        products = _matmul(inputs, kernel)
        bias, recurrent_bias = (
            jnp.broadcast_to(bias.astype(products.dtype), products.shape) for bias in biases
        )
        return recurrent_kernel, *self._split_projection(products + bias, recurrent_bias)

    def _split_projection(self, products: Array, recurrent_bias: Array) -> tuple[Array, Any]:
        """Splits the projected inputs into the term of the sum and the additional term, if any."""
        raise NotImplementedError

    @staticmethod
    def _update(gates: Array, candidate: Any, state: State) -> State:
        """Computes the new state from the gates before their activation."""
        raise NotImplementedError


class LSTM(_RecurrentLayer):
    """Long short-term memory of one layer, as PyTorch's.

    i, f, o = σ(…),  g = tanh(…),  c′ = f c + i g,  h′ = o tanh(c′)

    Weights are initialised uniform in ±1/√H, as PyTorch's are.

    Attributes:
        features: Width H of the hidden state.
        reverse: Reads from the end; the states stay at the positions of their tokens.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models.recurrent import LSTM
        >>> layer, inputs = LSTM(5), jnp.ones((2, 3, 4))
        >>> where = jnp.array([[True, True, True], [True, False, False]])
        >>> (states, (hidden, cell)), variables = layer.init_with_output(
        ...     jax.random.key(0), inputs, where
        ... )
        >>> states.shape, hidden.shape, bool((hidden[1] == states[1, 0]).all())
        ((2, 3, 5), (2, 5), True)

    References:
        Hochreiter and Schmidhuber, Long Short-Term Memory,
        https://doi.org/10.1162/neco.1997.9.8.1735
    """

    num_gates: ClassVar[int] = 4

    def initial_state(self, inputs: Array) -> tuple[Array, Array]:
        """Returns a hidden state and a cell of 0 for inputs `[B, ...]`."""
        zeros = jnp.zeros((inputs.shape[0], self.features), _accumulation_dtype(inputs.dtype))
        return zeros, zeros

    def _split_projection(self, products: Array, recurrent_bias: Array) -> tuple[Array, Any]:
        return products + recurrent_bias, ()

    @staticmethod
    def _update(gates: Array, candidate: Any, state: State) -> State:
        # PyTorch's order of the gates.
        input_gate, forget_gate, cell_candidate, output_gate = jnp.split(gates, 4, axis=-1)
        cell = nn.sigmoid(forget_gate) * state[1] + nn.sigmoid(input_gate) * jnp.tanh(
            cell_candidate
        )
        return nn.sigmoid(output_gate) * jnp.tanh(cell), cell


class GRU(_RecurrentLayer):
    """Gated recurrent unit of one layer, as PyTorch's.

    r, z = σ(…),  n = tanh(W x + b + r (U h + b′)),  h′ = (1 − z) n + z h

    As in PyTorch and cuDNN, and unlike in the paper, the reset gate is applied after the product
    with U.

    Attributes:
        features: Width H of the hidden state.
        reverse: Reads from the end; the states stay at the positions of their tokens.

    References:
        Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical
        Machine Translation, https://arxiv.org/abs/1406.1078
    """

    num_gates: ClassVar[int] = 3

    def initial_state(self, inputs: Array) -> Array:
        """Returns a hidden state of 0 for inputs `[B, ...]`."""
        return jnp.zeros((inputs.shape[0], self.features), _accumulation_dtype(inputs.dtype))

    def _split_projection(self, products: Array, recurrent_bias: Array) -> tuple[Array, Any]:
        # The reset gate multiplies U h + b′ alone, so that W x + b must not be added to it.
        gated = 2 * self.features
        summed = products[..., :gated] + recurrent_bias[..., :gated]
        projected = jnp.concatenate([summed, recurrent_bias[..., gated:]], axis=-1)
        return projected, products[..., gated:]

    @staticmethod
    def _update(gates: Array, candidate: Any, state: State) -> State:
        reset_gate, update_gate, recurrent_candidate = jnp.split(gates, 3, axis=-1)
        keep = nn.sigmoid(update_gate)
        new = jnp.tanh(candidate + nn.sigmoid(reset_gate) * recurrent_candidate)
        return (1 - keep) * new + keep * state


def recurrent_rules(source: str, target: str, *, suffix: str = "l0") -> tuple[Rule, ...]:
    """Makes the rules from a layer of PyTorch's `LSTM` or `GRU` to one of this module's.

    Args:
        source: Name of PyTorch's module.
        target: Path of this module's layer.
        suffix: Layer and direction of PyTorch's module: "l0", "l0_reverse", "l1", ...

    Returns:
        The rules.

    Example:
        >>> from jaxkd.transfer import rename
        >>> rules = recurrent_rules("lstm", "backward", suffix="l0_reverse")
        >>> rename("lstm.weight_hh_l0_reverse", rules).path
        'params/backward/recurrent_kernel'
    """
    return (
        Rule(f"{source}.weight_ih_{suffix}", f"params/{target}/kernel", layout.DENSE),
        Rule(f"{source}.weight_hh_{suffix}", f"params/{target}/recurrent_kernel", layout.DENSE),
        Rule(f"{source}.bias_ih_{suffix}", f"params/{target}/bias"),
        Rule(f"{source}.bias_hh_{suffix}", f"params/{target}/recurrent_bias"),
    )


def _scan(
    update: _UpdateFn,
    reverse: bool,
    kernel: Array,
    projected: Array,
    candidate: Any,
    valid: Array,
    state: State,
) -> tuple[Array, State]:
    """Returns the hidden state after each step, `[S, B, H]`, and the final state."""

    def step(state: State, inputs: tuple[Array, Any, Array]) -> tuple[State, Array]:
        projected, candidate, valid = inputs
        updated = _step(update, kernel, projected, candidate, state)
        state = jax.tree.map(functools.partial(jnp.where, valid), updated, state)
        return state, _hidden_state(state)

    final, hidden = lax.scan(step, state, (projected, candidate, valid), reverse=reverse)
    return hidden, final


def _run_forward(
    update: _UpdateFn,
    reverse: bool,
    kernel: Array,
    projected: Array,
    candidate: Any,
    valid: Array,
    state: State,
) -> tuple[tuple[Array, State], Any]:
    def scan(projected: Array, candidate: Any, state: State) -> tuple[Array, State]:
        return _scan(update, reverse, kernel, projected, candidate, valid, state)

    # Not differentiated by the kernel, whose gradient `_run_backward` computes after the loop.
    (hidden, final), pull_back = jax.vjp(scan, projected, candidate, state)
    first = _hidden_state(state)[None]
    previous = jnp.concatenate([hidden[1:], first] if reverse else [first, hidden[:-1]])
    return (hidden, final), (pull_back, previous.astype(kernel.dtype))


def _run_backward(
    update: _UpdateFn, reverse: bool, residuals: Any, cotangents: tuple[Array, State]
) -> tuple:
    pull_back, previous = residuals
    projected, candidate, state = pull_back(cotangents)
    # `projected` is added to the product of kernel and hidden state, so that its cotangent is also
    # the product's in every step.
    kernel = jnp.einsum(
        "sbh,sbg->hg",
        previous,
        projected.astype(previous.dtype),
        preferred_element_type=projected.dtype,
    )
    return kernel.astype(previous.dtype), projected, candidate, None, state


_run = jax.custom_vjp(_scan, nondiff_argnums=(0, 1))
_run.defvjp(_run_forward, _run_backward)


def _step(
    update: _UpdateFn, kernel: Array, projected: Array, candidate: Any, state: State
) -> State:
    # Without the barrier, XLA on a CPU computes the product once more for every gate: with it, a
    # GRU is four times as fast.
    gates = lax.optimization_barrier(_matmul(_hidden_state(state), kernel) + projected)
    # To store the sum and compute the gates again is faster than to store and read all gates.
    return jax.checkpoint(update, prevent_cse=False)(gates, candidate, state)


def _matmul(inputs: Array, kernel: Array) -> Array:
    """Multiplies in the kernel's precision and accumulates in float32 or wider."""
    return jnp.matmul(
        inputs.astype(kernel.dtype),
        kernel,
        preferred_element_type=_accumulation_dtype(kernel.dtype),
    )


def _hidden_state(state: State) -> Array:
    return jax.tree.leaves(state)[0]


def _accumulation_dtype(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
