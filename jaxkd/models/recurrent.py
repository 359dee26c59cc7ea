"""Recurrent layers over padded sentences, with the gates of PyTorch's.

What does not depend on the step before is computed for all steps in one product; the loop multiplies the hidden state
alone. A padded position passes the state on and puts out 0, so that the last state is that at the sentence's end.

The layers have a gradient of their own, which adds up the recurrent kernel's in one product behind the loop, and
therefore no forward-mode derivative.
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
"""What a cell remembers, float32 or wider: `(hidden, cell)` of an LSTM, `hidden` of a GRU, each `[B, H]`."""

_Update: TypeAlias = Callable[[Array, Any, State], State]


class _Layer(nn.Module):
    """What the two kinds of layers share; each says how many gates it has and how they make a new state."""

    features: int
    reverse: bool = False

    gates: ClassVar[int]

    def __call__(self, inputs: Array, where: Array, state: State = None) -> tuple[Array, State]:
        """Reads sentences.

        Args:
            inputs: `[B, S, D]`, floating-point.
            where: Booleans `[B, S]`, True for a token that is not padding. What stands elsewhere reaches nothing.
            state: The state before the first token, or after the last if it reads backwards; by default 0.

        Returns:
            The hidden states `[B, S, H]` in the inputs' dtype, 0 at padding, and the state when all is read, in float32
            or wider.

        Raises:
            ValueError: If the shapes do not fit each other or `where` is not boolean.
        """
        inputs, where = jnp.asarray(inputs), jnp.asarray(where)
        if inputs.ndim != 3 or where.shape != inputs.shape[:2] or where.dtype != bool:
            raise ValueError(
                "inputs and where must be [B, S, D] and booleans [B, S], got "
                f"{inputs.shape} and {where.dtype} {where.shape}"
            )
        steps, counts = inputs.swapaxes(0, 1), where.T[..., None]
        kernel, added, apart = self._gates(jnp.where(counts, steps, 0))
        state = self.initial_state(inputs) if state is None else state
        hidden, last = _recur(self._update, self.reverse, kernel, added, apart, counts, state)
        return jnp.where(counts, hidden, 0).astype(inputs.dtype).swapaxes(0, 1), last

    def step(self, inputs: Array, state: State) -> tuple[Array, State]:
        """Reads one token.

        Args:
            inputs: `[B, D]`.
            state: The state before it.

        Returns:
            The hidden state `[B, H]` in the inputs' dtype, and the state after it.
        """
        kernel, added, apart = self._gates(inputs)
        state = _step(self._update, kernel, added, apart, state)
        return _hidden(state).astype(inputs.dtype), state

    def initial_state(self, inputs: Array) -> State:
        """A state of 0 for inputs `[B, ...]`."""
        raise NotImplementedError

    @nn.compact
    def _gates(self, inputs: Array) -> tuple[Array, Array, Any]:
        """The recurrent kernel, what is added to its product, and what the update takes beside the sum."""

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            bound = self.features**-0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        width = self.gates * self.features
        kernel = self.param("kernel", init, (inputs.shape[-1], width))
        recurrent_kernel = self.param("recurrent_kernel", init, (self.features, width))
        biases = self.param("bias", init, (width,)), self.param("recurrent_bias", init, (width,))
        projected = _product(inputs, kernel)
        added = [jnp.broadcast_to(bias.astype(projected.dtype), projected.shape) for bias in biases]
        return recurrent_kernel, *self._split(projected + added[0], added[1])

    def _split(self, projected: Array, bias: Array) -> tuple[Array, Any]:
        raise NotImplementedError

    @staticmethod
    def _update(summed: Array, apart: Any, state: State) -> State:
        raise NotImplementedError


class LSTM(_Layer):
    """Long short-term memory, as PyTorch's of one layer.

    i, f, o = σ(…),  g = tanh(…),  c′ = f c + i g,  h′ = o tanh(c′)

    Weights start uniform in ±1/√H, as PyTorch's do.

    Attributes:
        features: Width H of the hidden state.
        reverse: Whether to read from the end; the states stay at their tokens' positions.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models.recurrent import LSTM
        >>> layer, inputs, where = LSTM(5), jnp.ones((2, 3, 4)), jnp.array([[True, True, True], [True, False, False]])
        >>> (states, (hidden, cell)), variables = layer.init_with_output(jax.random.key(0), inputs, where)
        >>> states.shape, hidden.shape, bool((hidden[1] == states[1, 0]).all())
        ((2, 3, 5), (2, 5), True)

    References:
        Hochreiter and Schmidhuber, Long Short-Term Memory, https://doi.org/10.1162/neco.1997.9.8.1735
    """

    gates: ClassVar[int] = 4

    def initial_state(self, inputs: Array) -> tuple[Array, Array]:
        """Hidden state and cell of 0 for inputs `[B, ...]`."""
        zeros = jnp.zeros((inputs.shape[0], self.features), _wide(inputs.dtype))
        return zeros, zeros

    def _split(self, projected: Array, bias: Array) -> tuple[Array, Any]:
        return projected + bias, ()

    @staticmethod
    def _update(summed: Array, apart: Any, state: State) -> State:
        enters, keeps, candidate, leaves = jnp.split(summed, 4, axis=-1)
        cell = nn.sigmoid(keeps) * state[1] + nn.sigmoid(enters) * jnp.tanh(candidate)
        return nn.sigmoid(leaves) * jnp.tanh(cell), cell


class GRU(_Layer):
    """Gated recurrent unit, as PyTorch's of one layer.

    r, z = σ(…),  n = tanh(W x + b + r (U h + b′)),  h′ = (1 − z) n + z h

    As there and in cuDNN, and unlike in the paper, the reset gate stands before the product with U.

    Attributes:
        features: Width H of the hidden state.
        reverse: Whether to read from the end; the states stay at their tokens' positions.

    References:
        Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation,
        https://arxiv.org/abs/1406.1078
    """

    gates: ClassVar[int] = 3

    def initial_state(self, inputs: Array) -> Array:
        """A hidden state of 0 for inputs `[B, ...]`."""
        return jnp.zeros((inputs.shape[0], self.features), _wide(inputs.dtype))

    def _split(self, projected: Array, bias: Array) -> tuple[Array, Any]:
        gated = 2 * self.features
        added = projected[..., :gated] + bias[..., :gated]
        return jnp.concatenate([added, bias[..., gated:]], axis=-1), projected[..., gated:]

    @staticmethod
    def _update(summed: Array, apart: Any, state: State) -> State:
        resets, keeps, candidate = jnp.split(summed, 3, axis=-1)
        keeps = nn.sigmoid(keeps)
        return (1 - keeps) * jnp.tanh(apart + nn.sigmoid(resets) * candidate) + keeps * state


def recurrent_rules(source: str, target: str, *, suffix: str = "l0") -> tuple[Rule, ...]:
    """From a layer of PyTorch's `LSTM` or `GRU` to one of these, at a place in either tree.

    Args:
        source: Name of PyTorch's module.
        target: Name of this one.
        suffix: Which of PyTorch's layers, and which direction: "l0", "l0_reverse", "l1", ...

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
    update: _Update, reverse: bool, kernel: Array, added: Array, apart: Any, counts: Array, state: State
) -> tuple[Array, State]:
    """The hidden state after each step `[S, B, H]`, and the last state."""

    def step(state: State, now: tuple[Array, Any, Array]) -> tuple[State, Array]:
        added, apart, counts = now
        moved = _step(update, kernel, added, apart, state)
        state = jax.tree.map(functools.partial(jnp.where, counts), moved, state)
        return state, _hidden(state)

    last, hidden = lax.scan(step, state, (added, apart, counts), reverse=reverse)
    return hidden, last


def _recur_forward(
    update: _Update, reverse: bool, kernel: Array, added: Array, apart: Any, counts: Array, state: State
) -> tuple[tuple[Array, State], Any]:
    def steps(added: Array, apart: Any, state: State) -> tuple[Array, State]:
        return _scan(update, reverse, kernel, added, apart, counts, state)

    (hidden, last), back = jax.vjp(steps, added, apart, state)
    first = _hidden(state)[None]
    before = jnp.concatenate([hidden[1:], first] if reverse else [first, hidden[:-1]])
    return (hidden, last), (back, before.astype(kernel.dtype))


def _recur_backward(update: _Update, reverse: bool, residuals: Any, cotangents: tuple[Array, State]) -> tuple:
    back, before = residuals
    added, apart, state = back(cotangents)
    # `added` enters beside the product, so that it has the product's cotangent at every step.
    kernel = jnp.einsum("sbh,sbg->hg", before, added.astype(before.dtype), preferred_element_type=added.dtype)
    return kernel.astype(before.dtype), added, apart, None, state


_recur = jax.custom_vjp(_scan, nondiff_argnums=(0, 1))
_recur.defvjp(_recur_forward, _recur_backward)


def _step(update: _Update, kernel: Array, added: Array, apart: Any, state: State) -> State:
    # The barrier keeps XLA on a CPU from computing the product once more for every gate: four times as fast for a GRU.
    summed = lax.optimization_barrier(_product(_hidden(state), kernel) + added)
    # Keeping the sum alone and computing the gates again is faster than reading them all back.
    return jax.checkpoint(update, prevent_cse=False)(summed, apart, state)


def _product(inputs: Array, kernel: Array) -> Array:
    """A product in the kernel's precision, summed up in float32 or wider."""
    return jnp.matmul(inputs.astype(kernel.dtype), kernel, preferred_element_type=_wide(kernel.dtype))


def _hidden(state: State) -> Array:
    return jax.tree.leaves(state)[0]


def _wide(dtype: Any) -> Any:
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
