"""The last layer of a language model, as the fused losses take it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxkd.losses._arrays import as_floating, check_number, check_positive, check_shape


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "bias"],
    meta_fields=["softcap", "is_embedding"],
)
@dataclasses.dataclass(frozen=True)
class LinearHead:
    """A last layer with what it has beside its kernel, for the fused losses.

    z = c tanh((h W + b) / c)

    It is a tree of `kernel` and `bias`, so that it can be differentiated, sharded and passed to a
    function under `jit`. The two other attributes are fixed when a program is compiled.

    Attributes:
        kernel: W `[D, V]`, or `[V, D]` if `is_embedding`, in the dtype of the states.
        bias: b `[V]`, floating-point. An entry of −inf leaves a class out, such as the padding of a
            vocabulary, if there is no softcap.
        softcap: c > 0, a Python number, the bound of the logits as in Gemma 2; `None` for no bound.
        is_embedding: True if the kernel is the table of embeddings of a model that ties the two.
            It is used as it is, without a transposed copy.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import losses
        >>> embedding = jnp.array([[1.0, 0.0], [0.0, 1.0], [40.0, 40.0]])
        >>> head = losses.LinearHead(embedding, softcap=30.0, is_embedding=True)
        >>> print(head.logits(jnp.array([[1.0, 2.0]])).round(2))
        [[ 1.    2.   29.98]]

    References:
        Gemma Team, Gemma 2: Improving Open Language Models at a Practical Size,
        https://arxiv.org/abs/2408.00118
    """

    kernel: Array
    bias: Array | None = dataclasses.field(default=None, kw_only=True)
    softcap: float | None = dataclasses.field(default=None, kw_only=True)
    is_embedding: bool = dataclasses.field(default=False, kw_only=True)

    def logits(self, states: ArrayLike) -> Array:
        """Computes the logits `[..., V]` of states `[..., D]`, in float32 or wider.

        Raises:
            ValueError: If the shapes disagree or the softcap is not positive.
            TypeError: If an array is not floating-point, states and kernel differ in dtype or the
                softcap is no Python number.
        """
        states = as_floating("states", states)
        head = as_head("head", "states", self, states)
        dtype = accumulation_dtype(states)
        logits = linear_logits(states.reshape(-1, states.shape[-1]), head, dtype)
        return logits.reshape(*states.shape[:-1], -1)

    @property
    def vocabulary_axis(self) -> int:
        """The axis of the kernel that counts the classes."""
        return 0 if self.is_embedding else 1

    @property
    def num_classes(self) -> int:
        """V."""
        return jnp.shape(self.kernel)[self.vocabulary_axis]


def as_head(name: str, states_name: str, head: ArrayLike | LinearHead, states: Array) -> LinearHead:
    """Returns a head of arrays; raises if it does not fit the states `[..., D]`."""
    if not isinstance(head, LinearHead):
        head = LinearHead(jnp.asarray(head))
    kernel = as_floating(name, head.kernel)
    is_matrix = states.ndim >= 1 and kernel.ndim == 2
    expected = "[V, D]" if head.is_embedding else "[D, V]"
    check_shape(
        is_matrix and states.shape[-1] == kernel.shape[1 - head.vocabulary_axis],
        f"{name} must be {expected} for {states_name} [..., D], got {kernel.shape} for "
        f"{states.shape}; pass losses.LinearHead(..., is_embedding=True) for an embedding table "
        "[V, D]",
    )
    if states.dtype != kernel.dtype:
        raise TypeError(
            f"{states_name} are {states.dtype} and {name} is {kernel.dtype}: cast one, so that the "
            "dtype of the product is explicit"
        )
    bias = None if head.bias is None else as_floating(f"the bias of {name}", head.bias)
    if bias is not None:
        check_shape(
            bias.shape == (head.num_classes,),
            f"the bias of {name} must be [V], got {bias.shape} for {head.num_classes} classes",
        )
    softcap = head.softcap
    if softcap is not None:
        softcap = check_number("softcap", softcap)
        check_positive("softcap", softcap)
    return LinearHead(kernel, bias=bias, softcap=softcap, is_embedding=head.is_embedding)


def linear_logits(states: Array, head: LinearHead, dtype: Any) -> Array:
    """Computes the logits `[N, V]` of states `[N, D]`."""
    logits = product(states, head.kernel, 1, 1 - head.vocabulary_axis).astype(dtype)
    if head.bias is not None:
        logits = logits + head.bias.astype(dtype)[None]
    return logits if head.softcap is None else head.softcap * jnp.tanh(logits / head.softcap)


def product(lhs: Array, rhs: Array, lhs_axis: int, rhs_axis: int) -> Array:
    """Computes the matrix product that contracts one axis of each, in float32 or wider."""
    dimension_numbers = ((lhs_axis,), (rhs_axis,)), ((), ())
    return jax.lax.dot_general(
        lhs, rhs, dimension_numbers, preferred_element_type=accumulation_dtype(lhs)
    )


def accumulation_dtype(*arrays: Array) -> Any:
    """Returns float64 if an array has it, else float32."""
    return jnp.float64 if any(array.dtype == jnp.float64 for array in arrays) else jnp.float32
