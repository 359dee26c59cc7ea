"""Matrix orientation, products that respect it, and the layouts of PyTorch and Flax.

"Column" has two meanings here. In `matmul`, a "column" array *holds the transpose* of its logical
matrix: its shape is swapped, `mT` makes it, and the product contracts it without a transpose. In
`order_of` and `as_order` the shape is unchanged and the *memory* is laid out in column order, which
NumPy calls Fortran order and JAX a device layout. Compilers may undo the second: XLA's CPU backend
copies such an operand before it multiplies, and returns results in row order. Store the transpose
of weights that are contracted along their columns repeatedly.

A conversion between frameworks is data: a pattern of axes, or the gates of a recurrent cell. It
works in both directions.
"""

from __future__ import annotations

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
"""NumPy arrays stay on the host with their dtype; JAX arrays stay on their devices."""


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
    """Multiplies matrices in the orders in which they are stored, without a transpose or copy.

    [..., n, k] @ [..., k, m] -> [..., n, m]

    "column" means that an array holds the transpose of its logical matrix, so that the columns of
    the matrix are contiguous. Dimension numbers choose the axes to contract. For a column result
    the operands are exchanged, (A B)ᵀ = Bᵀ Aᵀ. The program that XLA compiles for a CPU contains no
    transpose and no copy, nor do the gradients of two matrices or of two stacks with the same
    leading axes.

    Args:
        lhs: `[..., n, k]` in row order, `[..., k, n]` in column order.
        rhs: `[..., k, m]` in row order, `[..., m, k]` in column order, of the same dtype. Both
            operands have the same leading axes. Alternatively, one of them is a single matrix if
            that needs no copy: then a row `lhs` with leading axes gives a row result, or a column
            `rhs` with leading axes gives a column result.
        lhs_order: The order in which `lhs` is stored.
        rhs_order: The order in which `rhs` is stored.
        out_order: The order in which to store the result.
        precision: As in `jax.lax.dot_general`; the default is bfloat16 on TPU and TF32 on GPU.
        preferred_element_type: The dtype to accumulate in and to return; by default that of the
            operands.

    Returns:
        `[..., n, m]` in row order, `[..., m, n]` in column order.

    Raises:
        ValueError: If the shapes are incompatible, an order is unknown, or a copy would be needed.
        TypeError: If the dtypes differ, or are integers of 8 or 16 bits without a
            `preferred_element_type`: their sums would wrap around.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import layout
        >>> inputs = jnp.ones((2, 3))
        >>> weight = jnp.arange(12.0).reshape(4, 3)  # of a dense layer in PyTorch: [out, in]
        >>> print(layout.matmul(inputs, weight, rhs_order="column"))
        [[ 3. 12. 21. 30.]
         [ 3. 12. 21. 30.]]
        >>> layout.matmul(inputs, weight, rhs_order="column", out_order="column").shape
        (4, 2)
    """
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
    for name, order in (
        ("lhs_order", lhs_order),
        ("rhs_order", rhs_order),
        ("out_order", out_order),
    ):
        _check_order(name, order)
    if min(lhs.ndim, rhs.ndim) < 2:
        raise ValueError(f"lhs and rhs must have at least 2 axes, got {lhs.shape} and {rhs.shape}")
    if lhs.dtype != rhs.dtype:
        raise TypeError(
            f"lhs and rhs must have the same dtype, got {lhs.dtype} and {rhs.dtype}: cast one of "
            "them"
        )
    is_narrow = jnp.issubdtype(lhs.dtype, jnp.integer) and lhs.dtype.itemsize < 4
    if is_narrow and preferred_element_type is None:
        raise TypeError(
            f"sums of products of {lhs.dtype} would wrap around: pass "
            "preferred_element_type=jnp.int32, or the dtype to return"
        )
    lhs_axis = lhs.ndim - (1 if lhs_order == "row" else 2)
    rhs_axis = rhs.ndim - (2 if rhs_order == "row" else 1)
    if lhs.shape[lhs_axis] != rhs.shape[rhs_axis]:
        raise ValueError(
            f"lhs {lhs.shape} in {lhs_order} order has {lhs.shape[lhs_axis]} columns, but rhs "
            f"{rhs.shape} in {rhs_order} order has {rhs.shape[rhs_axis]} rows"
        )
    operands = [(lhs, lhs_axis), (rhs, rhs_axis)]
    # dot_general returns the free axis of its first operand before that of the second, so
    # exchanging the operands transposes the result at no cost.
    if out_order == "column":
        operands.reverse()
    (first, first_axis), (second, second_axis) = operands
    batch_axes = tuple(range(_count_batch_axes(first, first_axis, second)))
    return lax.dot_general(
        first,
        second,
        (((first_axis,), (second_axis,)), (batch_axes, batch_axes)),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def order_of(array: AnyArray) -> Order:
    """Returns the order in which the matrices of an array are stored in memory.

    Args:
        array: `[..., n, m]`, a NumPy array, or a JAX array outside `jit`.

    Returns:
        "row" if the rows are contiguous, "column" if the columns are. "row" if both are true, as
        for a matrix with one row, one column or no element.

    Raises:
        ValueError: If the memory has gaps, or the leading axes do not come first, so that neither
            order describes it.
        TypeError: If the array is traced, since the compiler then chooses its memory layout.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> matrix = np.zeros((3, 4))
        >>> layout.order_of(matrix), layout.order_of(matrix.T)
        ('row', 'column')
    """
    _check_in_memory("order_of", array)
    if isinstance(array, np.ndarray):
        is_row = array.flags.c_contiguous
        # Not f_contiguous: that would require the leading axes to be reversed as well.
        is_column = array.swapaxes(-1, -2).flags.c_contiguous
        memory = f"strides {array.strides}"
    else:
        # `Any`, because a Format may have no layout by its type; that of an array in memory does.
        stored: Any = array
        axes = stored.format.layout.major_to_minor
        is_row = _long_axes(axes, array) == _long_axes(_major_to_minor(array, "row"), array)
        is_column = _long_axes(axes, array) == _long_axes(_major_to_minor(array, "column"), array)
        memory = f"axes {axes} from major to minor"
    if is_row or is_column:
        return "row" if is_row else "column"
    raise ValueError(
        f"an array {array.shape} with {memory} is in neither order: give it one with "
        "as_order(array, 'row')"
    )


def as_order(array: AnyArray, order: Order) -> AnyArray:
    """Returns an array of the same values and shape whose memory is in the given order.

    This changes the memory alone. For an operand that `matmul` takes as "column", store the
    transpose, `array.mT`. For a NumPy array in column order that is a view with contiguous memory.

    Args:
        array: `[..., n, m]`, a NumPy array, or a JAX array outside `jit`.
        order: The order of the result.

    Returns:
        A copy; only a NumPy array that is in that order already is not copied. NumPy arrays stay
        NumPy arrays, and JAX arrays stay on their devices.

    Raises:
        ValueError: If the array has less than 2 axes or the order is unknown.
        TypeError: If the array is traced: inside `jit` the compiler chooses its memory layout. Set
            the order of the inputs instead.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd import layout
        >>> matrix = layout.as_order(jnp.arange(6.0).reshape(2, 3), "column")
        >>> matrix.shape, layout.order_of(matrix)
        ((2, 3), 'column')
    """
    _check_order("order", order)
    _check_in_memory("as_order", array)
    if not isinstance(array, np.ndarray):
        device_layout = Layout(_major_to_minor(array, order))
        return jax.device_put(array, Format(device_layout, array.sharding))
    if order == "row":
        return np.ascontiguousarray(array)
    # np.asfortranarray would reverse the leading axes of a stack as well.
    return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class Rearrangement:
    """Conversion of a weight between PyTorch and Flax: the same numbers with their axes reordered.

    A pattern names the axes of an array from first to last. Several names in parentheses are merged
    into one axis, the last of them varying fastest. `...` matches any number of axes.

    Attributes:
        torch: The pattern in PyTorch.
        flax: The pattern in Flax, with the same names.
        flip: Names of the axes that are reversed between the frameworks.
        sizes: Sizes by name, for all names but one in each pair of parentheses.

    Raises:
        ValueError: If a pattern is malformed, the names differ, or sizes are missing or not
            positive.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> layout.CONV
        Rearrangement(torch='o i ...', flax='... i o', flip='', sizes={})
        >>> layout.CONV.to_flax(np.zeros((64, 3, 5, 7))).shape
        (5, 7, 3, 64)
        >>> neox_qkv = layout.Rearrangement(  # GPT-NeoX stacks query, key and value in each head
        ...     "(h p d) ...", "p ... h d", sizes={"p": 3, "h": 8}
        ... )
        >>> neox_qkv.to_flax(np.zeros((96, 32))).shape
        (3, 32, 8, 4)
    """

    torch: str
    flax: str
    flip: str = ""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:  # noqa: D105
        torch_axes, flax_axes = self._parse(self.torch), self._parse(self.flax)
        torch_names, flax_names = sum(torch_axes, []), sum(flax_axes, [])
        if sorted(torch_names) != sorted(flax_names) or len({*torch_names}) < len(torch_names):
            raise ValueError(
                f"{self.torch!r} and {self.flax!r} must have the same names, each once"
            )
        # `_convert` gives such names to the axes that `...` matches.
        if "..." in torch_names and any(re.fullmatch(r"_\d+", name) for name in torch_names):
            raise ValueError(f"{self.torch!r} has a name like _0 beside ...: rename it")
        if unknown := {*self.sizes, *self.flip.split()} - {*torch_names}:
            raise ValueError(f"{sorted(unknown)} are not names in {self.torch!r}")
        if any(size < 1 for size in self.sizes.values()):
            raise ValueError(f"sizes must be positive, got {dict(self.sizes)}")
        # The remaining size of a merged axis follows from its length; two could not be determined.
        for axis in torch_axes + flax_axes:
            if len({*axis} - {*self.sizes}) > 1 or ("..." in axis and len(axis) > 1):
                raise ValueError(
                    f"sizes must hold all but one of {axis}, and ... must be an axis of its own"
                )

    def to_flax(self, array: ArrayLike) -> AnyArray:
        """Returns the array in Flax's layout, as a view of a NumPy array where possible.

        Raises:
            ValueError: If the shape does not fit the pattern.
        """
        return self._convert(array, self.torch, self.flax)

    def to_torch(self, array: ArrayLike) -> AnyArray:
        """Returns the array in PyTorch's layout: the inverse of `to_flax`.

        Raises:
            ValueError: If the shape does not fit the pattern.
        """
        return self._convert(array, self.flax, self.torch)

    def _convert(self, array: ArrayLike, source: str, target: str) -> AnyArray:
        array = array if isinstance(array, Array) else np.asarray(array)
        # Each axis that `...` matches gets a name, so that all axes are handled in the same way.
        matched_names = ""
        if "..." in source:
            count = array.ndim - len(self._parse(source)) + 1
            matched_names = " ".join(f"_{i}" for i in range(count))
        source_axes, target_axes, flip_axes = (
            self._parse(pattern.replace("...", matched_names))
            for pattern in (source, target, self.flip)
        )
        sizes = self._infer_sizes(source_axes, array.shape)
        if sizes is None:
            known = "".join(f", {name} = {size}" for name, size in self.sizes.items())
            raise ValueError(f"an array {array.shape} does not fit the axes {source!r}{known}")
        source_names, target_names = sum(source_axes, []), sum(target_axes, [])
        array = array.reshape([sizes[name] for name in source_names])
        array = array.transpose([source_names.index(name) for name in target_names])
        flipped = tuple(target_names.index(name) for name in sum(flip_axes, []))
        array = _array_module(array).flip(array, flipped)
        return array.reshape([math.prod(sizes[name] for name in axis) for axis in target_axes])

    def _infer_sizes(
        self, axes: Sequence[Sequence[str]], shape: Sequence[int]
    ) -> dict[str, int] | None:
        """Returns the size of every name, or None if the shape does not fit the axes."""
        if len(axes) != len(shape):
            return None
        sizes = dict(self.sizes)
        for axis, length in zip(axes, shape, strict=True):
            known = math.prod(self.sizes.get(name, 1) for name in axis)
            sizes |= {name: length // known for name in axis if name not in self.sizes}
            # The division may leave a remainder, or all sizes may be given and wrong.
            if math.prod(sizes[name] for name in axis) != length:
                return None
        return sizes

    @staticmethod
    def _parse(pattern: str) -> list[list[str]]:
        """Splits a pattern into axes, each a list of names."""
        # Spaces between all axes: "o..." would be read as the name of one axis.
        if not re.fullmatch(r"\s*((\w+|\.\.\.|\([\w ]+\))(\s+|$))*", pattern):
            raise ValueError(
                f"{pattern!r} is not a pattern of axes: name each axis, as in 'o (c s) ...'"
            )
        return [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\S+", pattern)]


DENSE = Rearrangement("o i", "i o")
"""The weight of `Linear` and the kernel of `Dense`."""

CONV = Rearrangement("o i ...", "... i o")
"""The weight of `Conv1d`, `Conv2d` or `Conv3d` and the kernel of `Conv`, also with groups: a
depth-wise kernel is `[C·m, 1, H, W]` in PyTorch and `[H, W, 1, C·m]` in Flax with
`feature_group_count=C`."""

CONV_TRANSPOSE = Rearrangement("i o ...", "... i o", flip="...")
"""The weight of `ConvTranspose1d`, `ConvTranspose2d` or `ConvTranspose3d` with one group, and the
kernel of `ConvTranspose` with its default `transpose_kernel=False`. The kernel is reversed because
Flax slides it over the dilated input, while PyTorch scatters it. PyTorch's
`padding=p, output_padding=q` with a kernel of size k and dilation d is Flax's
`(d·(k−1) − p, d·(k−1) − p + q)`."""


def flattened_dense(*, channels: int) -> Rearrangement:
    """Makes the conversion of a dense layer after a flatten: C H W in PyTorch, H W C in Flax.

    Args:
        channels: Number of channels of the flattened images.

    Returns:
        The conversion of the weight of `Linear`.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> weight = np.array([[1, 2, 3, 4, 10, 20, 30, 40]])  # 2 channels of 2 x 2 pixels
        >>> print(layout.flattened_dense(channels=2).to_flax(weight).ravel())
        [ 1 10  2 20  3 30  4 40]
    """
    return Rearrangement("o (c s)", "(s c) o", sizes={"c": channels})


def attention_projection(*, num_heads: int) -> Rearrangement:
    """Makes the conversion of a query, key or value projection, which Flax splits into heads.

    In PyTorch the heads share an axis.

    Args:
        num_heads: Number of heads, H.

    Returns:
        The conversion of the weight, `[H·D, E]` to `[E, H, D]`, and of the bias, `[H·D]` to
        `[H, D]`.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> layout.attention_projection(num_heads=8).to_flax(np.zeros((32, 30))).shape
        (30, 8, 4)
    """
    return Rearrangement("(h d) ...", "... h d", sizes={"h": num_heads})


def fused_qkv(*, num_heads: int) -> Rearrangement:
    """Makes the conversion of stacked projections, as in `MultiheadAttention.in_proj_weight`.

    Args:
        num_heads: Number of heads, H.

    Returns:
        The conversion of the weight, `[3·H·D, E]` to `[3, E, H, D]`, and of the bias, `[3·H·D]` to
        `[3, H, D]`. The result unpacks into query, key and value, in this order.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> query, key, value = layout.fused_qkv(num_heads=8).to_flax(np.zeros((96, 32)))
        >>> key.shape
        (32, 8, 4)
    """
    return Rearrangement("(p h d) ...", "p ... h d", sizes={"p": 3, "h": num_heads})


def attention_output(*, num_heads: int) -> Rearrangement:
    """Makes the conversion of the projection from all heads to the output.

    Args:
        num_heads: Number of heads, H.

    Returns:
        The conversion of the weight, `[E, H·D]` to `[H, D, E]`. The bias is the same in both.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> layout.attention_output(num_heads=8).to_flax(np.zeros((30, 32))).shape
        (8, 4, 30)
    """
    return Rearrangement("o (h d)", "h d o", sizes={"h": num_heads})


@dataclasses.dataclass(frozen=True)
class RecurrentCell:
    """Conversion of a recurrent cell between PyTorch and Flax.

    PyTorch stacks the gates in one array and adds two biases to each gate. Flax has two dense
    layers per gate, one of which has a bias: the layer of the inputs is named `i` plus the gate's
    name, and that of the hidden state `h` plus the gate's name.

    Attributes:
        gates: Names of the gates in Flax, in the order in which PyTorch stacks them.
        bias: The Flax layer, `i` or `h`, that holds the bias, which is the sum of PyTorch's two.
        separate_bias: Gates whose two biases cannot be added; both layers hold their own.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> weights = {"weight_ih": np.zeros((32, 5)), "weight_hh": np.zeros((32, 8))}
        >>> biases = {"bias_ih": np.ones(32), "bias_hh": np.ones(32)}
        >>> params = layout.LSTM.to_flax(weights | biases)
        >>> sorted(params), params["if"]["kernel"].shape, params["hf"]["bias"].shape
        (['hf', 'hg', 'hi', 'ho', 'if', 'ig', 'ii', 'io'], (5, 8), (8,))
    """

    gates: tuple[str, ...]
    bias: Literal["i", "h"]
    separate_bias: tuple[str, ...] = ()

    def to_flax(self, weights: Mapping[str, ArrayLike]) -> dict[str, dict[str, AnyArray]]:
        """Returns the parameters of Flax's cell.

        Args:
            weights: `weight_ih` `[G·H, D]`, `weight_hh` `[G·H, H]`, and `bias_ih`, `bias_hh`
                `[G·H]`. Flax's cells always have biases; if these are absent, they are 0.

        Returns:
            `{"ii": {"kernel": [D, H]}, "hi": {"kernel": [H, H], "bias": [H]}, ...}`.

        Raises:
            ValueError: If names are missing or unexpected, or a shape is wrong.
        """
        _check_names(weights, ("weight_ih", "weight_hh"), ("bias_ih", "bias_hh"))
        self._check_shapes(weights)
        by_gate = Rearrangement("(g o) ...", "g ... o", sizes={"g": len(self.gates)})
        kernels: dict[str, Any] = {
            side: by_gate.to_flax(weights[f"weight_{side}h"]) for side in "ih"
        }
        # Made from a kernel, so that absent biases have its dtype and are in the same framework.
        zeros = _array_module(kernels["h"]).zeros_like(kernels["h"][:, 0]).reshape(-1)
        biases: dict[str, Any] = {
            side: by_gate.to_flax(weights.get(f"bias_{side}h", zeros)) for side in "ih"
        }
        params = {}
        for index, gate in enumerate(self.gates):
            gate_biases: dict[str, Any] = {side: biases[side][index] for side in "ih"}
            # PyTorch adds both biases to such a gate, so only their sum matters.
            if gate not in self.separate_bias:
                gate_biases = {self.bias: gate_biases["i"] + gate_biases["h"]}
            for side in "ih":
                layer = {"kernel": kernels[side][index]}
                if side in gate_biases:
                    layer["bias"] = gate_biases[side]
                params[side + gate] = layer
        return params

    def to_torch(self, params: Mapping[str, Mapping[str, AnyArray]]) -> dict[str, AnyArray]:
        """Returns the weights of PyTorch's cell.

        If Flax has one bias for a gate, the second of PyTorch's two is 0.

        Args:
            params: As returned by `to_flax`.

        Returns:
            `weight_ih`, `weight_hh`, `bias_ih` and `bias_hh`.

        Raises:
            ValueError: If names are missing or unexpected, or a shape is wrong.
        """
        _check_names(params, [side + gate for side in "ih" for gate in self.gates])
        # All layers first: the bias of a gate is read while its other layer is converted.
        for side in "ih":
            for gate in self.gates:
                names = ("kernel", "bias") if self._has_bias(side, gate) else ("kernel",)
                _check_names(params[side + gate], names, owner=f"the layer {side + gate}")
        weights = {}
        for side in "ih":
            kernels = []
            biases = []
            for gate in self.gates:
                layer = params[side + gate]
                kernels.append(DENSE.to_torch(layer["kernel"]))
                # Flax's bias is the sum of PyTorch's two: any split of it computes the same.
                summed = params[self.bias + gate]["bias"]
                zeros = _array_module(summed).zeros_like(summed)
                biases.append(layer["bias"] if self._has_bias(side, gate) else zeros)
            weights[f"weight_{side}h"] = _array_module(kernels[0]).concatenate(kernels)
            weights[f"bias_{side}h"] = _array_module(biases[0]).concatenate(biases)
        self._check_shapes(weights)
        return weights

    def _has_bias(self, side: str, gate: str) -> bool:
        return side == self.bias or gate in self.separate_bias

    def _check_shapes(self, weights: Mapping[str, ArrayLike]) -> None:
        shapes = {name: np.shape(array) for name, array in weights.items()}
        # weight_hh is [G·H, H], so its last axis gives H. `or (0,)`: a scalar must end in the error
        # below, not in an IndexError.
        rows = len(self.gates) * (shapes["weight_hh"] or (0,))[-1]
        for name, shape in shapes.items():
            if shape[:1] != (rows,) or len(shape) != (1 if name.startswith("bias") else 2):
                expected = "[G·H]" if name.startswith("bias") else "[G·H, features]"
                raise ValueError(
                    f"{name} must be {expected} with G = {len(self.gates)} stacked gates of H "
                    f"units, got the shapes {shapes}"
                )


LSTM = RecurrentCell(("i", "f", "g", "o"), bias="h")
"""`LSTMCell`, or a layer of `LSTM`, and Flax's `LSTMCell` or `OptimizedLSTMCell`."""

GRU = RecurrentCell(("r", "z", "n"), bias="i", separate_bias=("n",))
"""`GRUCell`, or a layer of `GRU`, and Flax's `GRUCell`. The reset gate multiplies only one of the
two biases of `n`, so they cannot be added."""

RNN = RecurrentCell(("",), bias="i")
"""`RNNCell`, or a layer of `RNN`, and Flax's `SimpleCell`."""


def _check_order(name: str, order: str) -> None:
    if order not in ("row", "column"):
        raise ValueError(f'{name} must be "row" or "column", got {order!r}')


def _count_batch_axes(first: Array, first_axis: int, second: Array) -> int:
    """Returns the number of leading axes that the operands share.

    With a single matrix as `second` that is 0: the leading axes of `first` are then free axes,
    which dot_general returns in the right place if its last axis is the contracted one.
    """
    if first.shape[:-2] == second.shape[:-2]:
        return first.ndim - 2
    if second.ndim == 2 and first_axis == first.ndim - 1:
        return 0
    raise ValueError(
        f"the leading axes of {first.shape} and {second.shape} differ. One of the two may be a "
        "single matrix only if the other is a row lhs with a row result or a column rhs with a "
        "column result; otherwise repeat it with jnp.broadcast_to"
    )


def _check_in_memory(function: str, array: AnyArray) -> None:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{function} needs an array in memory, got {array}: inside jit the compiler chooses "
            "the memory layout. Call it outside of jit, on inputs or outputs, or store the "
            "transpose and pass its order to matmul"
        )
    if not isinstance(array, np.ndarray | Array):
        raise TypeError(f"{function} needs a NumPy or JAX array, got {type(array).__name__}")
    if array.ndim < 2:
        raise ValueError(f"{function} needs an array of at least 2 axes, got {array.shape}")


def _major_to_minor(array: AnyArray, order: Order) -> tuple[int, ...]:
    """Returns the axes of the array from major to minor in the given order."""
    *leading, row, column = range(array.ndim)
    return (*leading, row, column) if order == "row" else (*leading, column, row)


def _long_axes(axes: Sequence[int], array: AnyArray) -> list[int]:
    """Returns the axes that are longer than 1. The position of the others is not observable."""
    return [axis for axis in axes if array.shape[axis] > 1]


def _array_module(array: AnyArray) -> Any:
    return jnp if isinstance(array, Array) else np


def _check_names(
    names: Iterable[str],
    required: Collection[str],
    optional: Collection[str] = (),
    *,
    owner: str = "a recurrent cell",
) -> None:
    missing = sorted({*required} - {*names})
    unexpected = sorted({*names} - {*required, *optional})
    if missing or unexpected:
        allowed = ", ".join([*required, *(f"{name} (optional)" for name in optional)])
        raise ValueError(
            f"{owner} must have {allowed}; missing: {missing or 'none'}, "
            f"unexpected: {unexpected or 'none'}"
        )
