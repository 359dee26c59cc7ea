"""Where the numbers of a matrix lie: its orientation, products that respect it, and the layouts of PyTorch and Flax.

"Column" has two senses, which are kept apart here. In `matmul` a "column" array *holds the transpose* of its logical
matrix: its shape is swapped, `mT` makes it, and the product is told to contract it as it lies. In `order_of` and
`as_order` the shape stays and the *memory* is laid out otherwise, which NumPy calls Fortran order and JAX a device
layout. Compilers may undo the second: XLA's CPU backend copies such an operand before it multiplies, and gives results
back in row order. Weights that are contracted along their columns again and again are better stored transposed.

A conversion between frameworks is data: a pattern of axes, or the gates of a recurrent cell, that reads both ways.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.layout import Format, Layout
from jax.typing import ArrayLike, DTypeLike

Order: TypeAlias = Literal["row", "column"]

AnyArray: TypeAlias = np.ndarray | Array
"""NumPy arrays stay on the host, with their dtype; JAX arrays stay where they are."""


def matmul(
    lhs: ArrayLike,
    rhs: ArrayLike,
    *,
    lhs_order: Order = "row",
    rhs_order: Order = "row",
    out_order: Order = "row",
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
) -> Array:
    """Matrix product of operands as they are stored, to a result as it is wanted.

    [..., n, k] @ [..., k, m] -> [..., n, m]

    "column" says that an array holds the transpose of its logical matrix, so that its columns are contiguous.
    Dimension numbers choose the axes that are contracted, and for a column result the operands change places,
    (A B)ᵀ = Bᵀ Aᵀ. Nothing is transposed or copied, as the program shows that XLA compiles for a CPU; nor is it for the
    gradients of two matrices or two equal stacks.

    Args:
        lhs: `[..., n, k]` in row order, `[..., k, n]` in column order.
        rhs: `[..., k, m]` in row order, `[..., m, k]` in column order, of the same dtype. The leading axes of both are
            equal; or one of the two is a single matrix, where that takes no copy: a row `lhs` with leading axes to a
            row result, a column `rhs` with leading axes to a column result.
        lhs_order: How `lhs` is stored.
        rhs_order: How `rhs` is stored.
        out_order: How the result is to be stored.
        precision: As in `jax.lax.dot_general`; the default is bfloat16 on TPU and TF32 on GPU.
        preferred_element_type: dtype to accumulate in and return; by default that of the operands.

    Returns:
        `[..., n, m]` in row order, `[..., m, n]` in column order.

    Raises:
        ValueError: If the shapes do not fit, an order is unknown, or a copy would be needed.
        TypeError: If the dtypes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import layout
        >>> inputs, weight = jnp.ones((2, 3)), jnp.arange(12.0).reshape(4, 3)  # a dense layer of PyTorch: [out, in]
        >>> print(layout.matmul(inputs, weight, rhs_order="column"))
        [[ 3. 12. 21. 30.]
         [ 3. 12. 21. 30.]]
        >>> layout.matmul(inputs, weight, rhs_order="column", out_order="column").shape
        (4, 2)
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    for name, order in (("lhs_order", lhs_order), ("rhs_order", rhs_order), ("out_order", out_order)):
        _check_order(name, order)
    if min(lhs.ndim, rhs.ndim) < 2:
        raise ValueError(f"lhs and rhs must have at least 2 axes, got {lhs.shape} and {rhs.shape}")
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"lhs and rhs must have one dtype, got {lhs.dtype} and {rhs.dtype}: cast one of them")
    first = (lhs, lhs.ndim - (1 if lhs_order == "row" else 2))
    second = (rhs, rhs.ndim - (2 if rhs_order == "row" else 1))
    if lhs.shape[first[1]] != rhs.shape[second[1]]:
        raise ValueError(
            f"lhs {lhs.shape} in {lhs_order} order has {lhs.shape[first[1]]} columns, but rhs {rhs.shape} in "
            f"{rhs_order} order has {rhs.shape[second[1]]} rows"
        )
    if out_order == "column":
        first, second = second, first
    batch = tuple(range(_batch_axes(*first, second[0])))
    return lax.dot_general(
        first[0],
        second[0],
        (((first[1],), (second[1],)), (batch, batch)),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def order_of(array: AnyArray) -> Order:
    """How the matrices of an array lie in memory: row after row, or column after column.

    Args:
        array: `[..., n, m]`, a NumPy array, or a JAX array outside `jit`.

    Returns:
        "row" or "column"; "row" where both are true, as of a matrix with one row, one column or no element.

    Raises:
        ValueError: If the memory has gaps, or the leading axes do not come first: neither order describes it.
        TypeError: If the array is traced: the compiler chooses how it lies.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> matrix = np.zeros((3, 4))
        >>> layout.order_of(matrix), layout.order_of(matrix.T)
        ('row', 'column')
    """
    _check_stored("order_of", array)
    if isinstance(array, np.ndarray):
        row, column = array.flags.c_contiguous, array.swapaxes(-1, -2).flags.c_contiguous
        lies = f"strides {array.strides}"
    else:
        stored: Any = array  # a format may name no layout, but that of an array in memory does
        axes = stored.format.layout.major_to_minor
        row = _long(axes, array) == _long(_axes(array, "row"), array)
        column = _long(axes, array) == _long(_axes(array, "column"), array)
        lies = f"axes {axes} from major to minor"
    if row or column:
        return "row" if row else "column"
    raise ValueError(f"an array {array.shape} with {lies} is in neither order: give it one with as_order(array, 'row')")


def as_order(array: AnyArray, order: Order) -> AnyArray:
    """The same values in the same shape, with their memory in an order.

    This is about memory alone. For an operand that `matmul` takes as "column", store the transpose, `array.mT`: of a
    NumPy array in column order that is a view whose memory is contiguous.

    Args:
        array: `[..., n, m]`, a NumPy array, or a JAX array outside `jit`.
        order: The order it is to have.

    Returns:
        A copy, unless it lies so already; NumPy's in NumPy, JAX's on the same devices.

    Raises:
        ValueError: If the array has less than 2 axes or the order is unknown.
        TypeError: If the array is traced: inside `jit` the compiler chooses how it lies. Set the order of what goes in.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import layout
        >>> matrix = layout.as_order(jnp.arange(6.0).reshape(2, 3), "column")
        >>> matrix.shape, layout.order_of(matrix)
        ((2, 3), 'column')
    """
    _check_order("order", order)
    _check_stored("as_order", array)
    if not isinstance(array, np.ndarray):
        return jax.device_put(array, Format(Layout(_axes(array, order)), array.sharding))
    if order == "row":
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """A weight in PyTorch and in Flax: the same numbers, their axes in another order.

    A pattern names the axes of an array from the first to the last. Names in parentheses are one axis that holds
    several, the last of them fastest; `...` stands for any number of axes.

    Attributes:
        torch: The pattern in PyTorch.
        flax: The pattern in Flax, of the same names.
        flip: Names of the axes that run backwards in the other framework.
        sizes: Lengths by name, of all axes but one in each pair of parentheses.

    Raises:
        ValueError: If a pattern cannot be read, the names differ, or lengths are missing or not positive.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> layout.CONV
        Rearrangement(torch='o i ...', flax='... i o', flip='', sizes={})
        >>> layout.CONV.to_flax(np.zeros((64, 3, 5, 7))).shape
        (5, 7, 3, 64)
        >>> by_head = layout.Rearrangement("(h p d) ...", "p ... h d", sizes={"p": 3, "h": 8})  # GPT-NeoX's qkv
        >>> by_head.to_flax(np.zeros((96, 32))).shape
        (3, 32, 8, 4)
    """

    torch: str
    flax: str
    flip: str = ""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:  # noqa: D105
        torch, flax = self._axes(self.torch), self._axes(self.flax)
        names = sorted(sum(torch, []))
        if names != sorted(sum(flax, [])) or len({*names}) < len(names):
            raise ValueError(f"{self.torch!r} and {self.flax!r} must have the same names, each once")
        if unknown := {*self.sizes, *self.flip.split()} - {*names}:
            raise ValueError(f"{sorted(unknown)} are no names of {self.torch!r}")
        if any(size < 1 for size in self.sizes.values()):
            raise ValueError(f"sizes must be positive, got {dict(self.sizes)}")
        for axis in torch + flax:
            if len({*axis} - {*self.sizes}) > 1 or ("..." in axis and len(axis) > 1):
                raise ValueError(f"sizes must give the lengths of all but one of {axis}, and ... stands alone")

    def to_flax(self, array: ArrayLike) -> AnyArray:
        """The array as Flax has it; a view of NumPy's where that can be.

        Raises:
            ValueError: If its shape does not fit the pattern.
        """
        return self._convert(array, self.torch, self.flax)

    def to_torch(self, array: ArrayLike) -> AnyArray:
        """The array as PyTorch has it, the inverse of `to_flax`.

        Raises:
            ValueError: If its shape does not fit the pattern.
        """
        return self._convert(array, self.flax, self.torch)

    def _convert(self, array: ArrayLike, source: str, target: str) -> AnyArray:
        array = array if isinstance(array, Array) else np.asarray(array)
        others = " ".join(f"_{i}" for i in range(array.ndim - len(self._axes(source)) + 1)) if "..." in source else ""
        split, merged, flip = (self._axes(part.replace("...", others)) for part in (source, target, self.flip))
        lengths = self._lengths(split, array.shape)
        if lengths is None:
            given = "".join(f", {name} = {size}" for name, size in self.sizes.items())
            raise ValueError(f"an array {array.shape} does not fit the axes {source!r}{given}")
        before, after = sum(split, []), sum(merged, [])
        array = array.reshape([lengths[name] for name in before])
        array = array.transpose([before.index(name) for name in after])
        array = _namespace(array).flip(array, tuple(after.index(name) for name in sum(flip, [])))
        return array.reshape([math.prod(lengths[name] for name in axis) for axis in merged])

    def _lengths(self, axes: Sequence[Sequence[str]], shape: Sequence[int]) -> dict[str, int] | None:
        """The length that each name stands for, or `None` if the shape does not fit."""
        if len(axes) != len(shape):
            return None
        lengths = dict(self.sizes)
        for axis, length in zip(axes, shape, strict=True):
            known = math.prod(self.sizes.get(name, 1) for name in axis)
            lengths |= {name: length // known for name in axis if name not in self.sizes}
            if math.prod(lengths[name] for name in axis) != length:
                return None
        return lengths

    @staticmethod
    def _axes(pattern: str) -> list[list[str]]:
        """The names in a pattern, axis by axis."""
        if not re.fullmatch(r"(\w+|\.\.\.|\([\w ]+\)|\s)*", pattern):
            raise ValueError(f"{pattern!r} is no pattern: name the axes, as in 'o (c s) ...'")
        return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", pattern)]


DENSE = Rearrangement("o i", "i o")
"""`Linear` and `Dense`."""

CONV = Rearrangement("o i ...", "... i o")
"""`Conv1d`, `Conv2d`, `Conv3d` and `Conv`, also with groups: a depth-wise kernel is `[C·m, 1, H, W]` in PyTorch and
`[H, W, 1, C·m]` in Flax with `feature_group_count=C`."""

CONV_TRANSPOSE = Rearrangement("i o ...", "... i o", flip="...")
"""`ConvTranspose1d`, `ConvTranspose2d`, `ConvTranspose3d` of one group, and `ConvTranspose` with its default
`transpose_kernel=False`, which slides the kernel over the dilated input where PyTorch scatters it. PyTorch's
`padding=p, output_padding=q` with a kernel of k, dilated by d, is Flax's `(d·(k−1) − p, d·(k−1) − p + q)`."""


def flattened_dense(*, channels: int) -> Rearrangement:
    """The dense layer behind a flatten: PyTorch flattens C H W, Flax H W C.

    Args:
        channels: Number of channels of what is flattened.

    Returns:
        The conversion of `Linear`'s weight.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> weight = np.array([[1, 2, 3, 4, 10, 20, 30, 40]])  # one output; two channels of 2 x 2 pixels
        >>> print(layout.flattened_dense(channels=2).to_flax(weight).ravel())
        [ 1 10  2 20  3 30  4 40]
    """
    return Rearrangement("o (c s)", "(s c) o", sizes={"c": channels})


def attention_projection(*, num_heads: int) -> Rearrangement:
    """A projection to queries, keys or values: heads share an axis in PyTorch and have their own in Flax.

    Args:
        num_heads: Number of heads.

    Returns:
        The conversion of the weight, `[H·D, E]` to `[E, H, D]`, and of the bias, `[H·D]` to `[H, D]`.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> layout.attention_projection(num_heads=8).to_flax(np.zeros((32, 30))).shape
        (30, 8, 4)
    """
    return Rearrangement("(h d) ...", "... h d", sizes={"h": num_heads})


def fused_qkv(*, num_heads: int) -> Rearrangement:
    """The projections to queries, keys and values under each other, as in `MultiheadAttention.in_proj_weight`.

    Args:
        num_heads: Number of heads.

    Returns:
        The conversion of the weight, `[3·H·D, E]` to `[3, E, H, D]`, and of the bias, `[3·H·D]` to `[3, H, D]`: query,
        key and value in this order, to be unpacked.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> query, key, value = layout.fused_qkv(num_heads=8).to_flax(np.zeros((96, 32)))
        >>> key.shape
        (32, 8, 4)
    """
    return Rearrangement("(p h d) ...", "p ... h d", sizes={"p": 3, "h": num_heads})


def attention_output(*, num_heads: int) -> Rearrangement:
    """The projection of all heads to the output.

    Args:
        num_heads: Number of heads.

    Returns:
        The conversion of the weight, `[E, H·D]` to `[H, D, E]`; the bias is the same in both.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> layout.attention_output(num_heads=8).to_flax(np.zeros((30, 32))).shape
        (8, 4, 30)
    """
    return Rearrangement("o (h d)", "h d o", sizes={"h": num_heads})


@dataclasses.dataclass(frozen=True)
class RecurrentCell:
    """A recurrent cell in PyTorch and in Flax.

    PyTorch stacks the gates in one array and adds two biases to each. Flax has a dense layer a gate for the inputs, `i`
    and the gate's name, and one for the hidden state, `h` and the gate's name; one of the two has a bias.

    Attributes:
        gates: The gates' names in Flax, in the order in which PyTorch stacks them.
        bias: Which of Flax's layers, `i` or `h`, holds the bias, the sum of PyTorch's two.
        apart: Gates whose two biases cannot be summed; both layers hold theirs.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> weights = {"weight_ih": np.zeros((32, 5)), "weight_hh": np.zeros((32, 8)), "bias_ih": np.ones(32)}
        >>> params = layout.LSTM.to_flax(weights | {"bias_hh": np.ones(32)})
        >>> sorted(params), params["if"]["kernel"].shape, params["hf"]["bias"].shape
        (['hf', 'hg', 'hi', 'ho', 'if', 'ig', 'ii', 'io'], (5, 8), (8,))
    """

    gates: tuple[str, ...]
    bias: Literal["i", "h"]
    apart: tuple[str, ...] = ()

    def to_flax(self, weights: Mapping[str, ArrayLike]) -> dict[str, dict[str, AnyArray]]:
        """The parameters of Flax's cell.

        Args:
            weights: `weight_ih` `[G·H, D]`, `weight_hh` `[G·H, H]`, and `bias_ih`, `bias_hh` `[G·H]`; without these the
                biases, which Flax's cells always have, are 0.

        Returns:
            `{"ii": {"kernel": [D, H]}, "hi": {"kernel": [H, H], "bias": [H]}, ...}`.

        Raises:
            ValueError: If the names or shapes are others.
        """
        _check_names(weights, ("weight_ih", "weight_hh"), ("bias_ih", "bias_hh"))
        self._check_shapes(weights)
        stacked = Rearrangement("(g o) ...", "g ... o", sizes={"g": len(self.gates)})
        kernels: dict[str, Any] = {side: stacked.to_flax(weights[f"weight_{side}h"]) for side in "ih"}
        zero = _namespace(kernels["h"]).zeros_like(kernels["h"][:, 0]).reshape(-1)
        biases: dict[str, Any] = {side: stacked.to_flax(weights.get(f"bias_{side}h", zero)) for side in "ih"}
        params = {}
        for gate, name in enumerate(self.gates):
            bias: dict[str, Any] = {side: biases[side][gate] for side in "ih"}
            if name not in self.apart:
                bias = {self.bias: bias["i"] + bias["h"]}
            for side in "ih":
                held = {"bias": bias[side]} if side in bias else {}
                params[side + name] = {"kernel": kernels[side][gate], **held}
        return params

    def to_torch(self, params: Mapping[str, Mapping[str, AnyArray]]) -> dict[str, AnyArray]:
        """The weights of PyTorch's cell; where Flax has one bias, PyTorch's other one is 0.

        Args:
            params: As `to_flax` returns them.

        Returns:
            `weight_ih`, `weight_hh`, `bias_ih` and `bias_hh`.

        Raises:
            ValueError: If the names or shapes are others.
        """
        _check_names(params, [side + name for side in "ih" for name in self.gates])
        weights = {}
        for side in "ih":
            kernels, biases = [], []
            for name in self.gates:
                layer, has_bias = params[side + name], side == self.bias or name in self.apart
                _check_names(layer, ("kernel", "bias") if has_bias else ("kernel",), of=f"the layer {side + name}")
                kernels.append(DENSE.to_torch(layer["kernel"]))
                summed = params[self.bias + name]["bias"]
                biases.append(layer["bias"] if has_bias else _namespace(summed).zeros_like(summed))
            weights[f"weight_{side}h"] = _namespace(kernels[0]).concatenate(kernels)
            weights[f"bias_{side}h"] = _namespace(biases[0]).concatenate(biases)
        self._check_shapes(weights)
        return weights

    def _check_shapes(self, weights: Mapping[str, ArrayLike]) -> None:
        shapes = {name: np.shape(array) for name, array in weights.items()}
        rows = len(self.gates) * (shapes["weight_hh"] or (0,))[-1]
        for name, shape in shapes.items():
            if shape[:1] != (rows,) or len(shape) != (1 if name.startswith("bias") else 2):
                raise ValueError(f"{name} has another shape than {len(self.gates)} stacked gates would: {shapes}")


LSTM = RecurrentCell(("i", "f", "g", "o"), bias="h")
"""`LSTMCell`, or a layer of `LSTM`, and Flax's `LSTMCell` or `OptimizedLSTMCell`."""

GRU = RecurrentCell(("r", "z", "n"), bias="i", apart=("n",))
"""`GRUCell`, or a layer of `GRU`, and Flax's `GRUCell`: the reset gate stands between the biases of `n`."""

RNN = RecurrentCell(("",), bias="i")
"""`RNNCell`, or a layer of `RNN`, and Flax's `SimpleCell`."""


def _check_order(name: str, order: str) -> None:
    if order not in ("row", "column"):
        raise ValueError(f'{name} must be "row" or "column", got {order!r}')


def _batch_axes(first: Array, contracted: int, second: Array) -> int:
    """How many leading axes the operands go through together; those of `first` alone come out in the right place."""
    if first.shape[:-2] == second.shape[:-2]:
        return first.ndim - 2
    if second.ndim == 2 and contracted == first.ndim - 1:
        return 0
    raise ValueError(
        f"the leading axes of {first.shape} and {second.shape} differ, and a single matrix can be used for a whole "
        "stack without a copy only where the stack is a row lhs to a row result or a column rhs to a column result: "
        "repeat it with jnp.broadcast_to"
    )


def _check_stored(function: str, array: AnyArray) -> None:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{function} needs an array in memory, got {array}: inside jit the compiler chooses how arrays lie. "
            "Call it outside, on what goes in or comes out, or store the transpose and tell matmul"
        )
    if not isinstance(array, np.ndarray | Array):
        raise TypeError(f"{function} needs a NumPy or JAX array, got {type(array).__name__}")
    if array.ndim < 2:
        raise ValueError(f"{function} needs an array of at least 2 axes, got {array.shape}")


def _axes(array: AnyArray, order: Order) -> tuple[int, ...]:
    """The axes from major to minor."""
    *leading, row, column = range(array.ndim)
    return (*leading, row, column) if order == "row" else (*leading, column, row)


def _long(axes: Sequence[int], array: AnyArray) -> list[int]:
    """The axes that are longer than 1: it is nowhere to be seen where the others lie."""
    return [axis for axis in axes if array.shape[axis] > 1]


def _namespace(array: AnyArray) -> Any:
    return jnp if isinstance(array, Array) else np


def _check_names(
    found: Iterable[str], needed: Collection[str], optional: Collection[str] = (), *, of: str = "a recurrent cell"
) -> None:
    missing = sorted({*needed} - {*found})
    unexpected = sorted({*found} - {*needed, *optional})
    if missing or unexpected:
        allowed = ", ".join([*needed, *(f"{name} (optional)" for name in optional)])
        raise ValueError(f"{of} has {allowed}; missing: {missing or 'none'}, unexpected: {unexpected or 'none'}")
