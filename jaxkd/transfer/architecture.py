"""Narrower, wider and deeper networks that start from the weights of a trained one.

What belongs together is data: the arrays that make a set of channels and those that read it. A chain of layers is
changed one set of channels after another.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import Array

from jaxkd.transfer.rules import Rule, match
from jaxkd.transfer.trees import Dtypes, Report, array_of, check_complete, leaves_by_path, placed, rebuilt, transfer

Choose: TypeAlias = Callable[[Sequence[np.ndarray], int], np.ndarray]
"""`(kernels, size) -> [size]`: which channels stay, in their order, given the kernels `[..., C]` that make them."""


class Channels(NamedTuple):
    """A set of channels, by the paths of all arrays that have them and the axes on which they lie.

    An array may be in both: the kernels on a residual stream read its channels and make them. An axis that reads may
    hold the channels several times, the channel fastest, as in a dense layer behind a flatten of H W C.

    Attributes:
        produced: Axes of what makes or normalises the channels: kernels, biases, scales, running statistics.
        consumed: Axes of the kernels that read them.

    Example:
        >>> from jaxkd.transfer import Channels
        >>> conv1 = Channels(
        ...     produced={"params/conv1/kernel": -1, "params/conv1/bias": 0}, consumed={"params/conv2/kernel": -2}
        ... )
    """

    produced: Mapping[str, int]
    consumed: Mapping[str, int]


def leading(kernels: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Chooses the first channels."""
    del kernels
    return np.arange(size)


def largest_norm(kernels: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Chooses the channels whose kernels have the largest L1 norm, summed over all kernels that make them.

    References:
        Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710
    """
    if not kernels:
        raise ValueError("largest_norm needs a produced array of at least 2 axes, a kernel; choose by `leading`")
    norms = sum(np.abs(kernel.astype(np.float32)).sum(axis=tuple(range(kernel.ndim - 1))) for kernel in kernels)
    return np.sort(np.argsort(-np.asarray(norms), stable=True)[:size])


def narrow(variables: Any, channels: Channels, size: int, *, choose: Choose = leading) -> Any:
    """Cuts a set of channels to fewer, wherever they are made and read.

    Args:
        variables: The tree of a trained network.
        channels: Where the channels are.
        size: Number of channels to keep.
        choose: Which to keep: `leading`, `largest_norm`, or any function like them.

    Returns:
        A tree of the same paths with smaller arrays; all are copies.

    Raises:
        ValueError: If paths or axes do not exist, lengths disagree, or `size` is not between 1 and their number.

    Example:
        >>> import numpy as np
        >>> from jaxkd.transfer import Channels, largest_norm, narrow
        >>> params = {"hidden": {"kernel": np.array([[1.0, -3.0, 2.0]])}, "out": {"kernel": np.ones((3, 10))}}
        >>> hidden = Channels(produced={"hidden/kernel": -1}, consumed={"out/kernel": -2})
        >>> small = narrow(params, hidden, 2, choose=largest_norm)
        >>> small["hidden"]["kernel"], small["out"]["kernel"].shape
        (array([[-3.,  2.]]), (2, 10))
    """
    leaves, number = _measured(variables, channels)
    if not 1 <= size <= number:
        raise ValueError(f"size must be between 1 and the {number} channels that there are, got {size}")
    kernels = [np.moveaxis(np.asarray(leaves[path]), axis, -1) for path, axis in channels.produced.items()]
    chosen = choose([kernel for kernel in kernels if kernel.ndim > 1], size)
    return rebuilt(variables, _picked(leaves, channels, number, chosen))


def widen(variables: Any, channels: Channels, size: int, *, key: Array) -> Any:
    """Net2WiderNet: adds copies of channels drawn at random, and divides what reads a channel by its number of copies.

    The function stays what it was, in training mode too. Copies get equal gradients: what tells them apart is dropout,
    or a little noise that you add.

    Args:
        variables: The tree of a trained network.
        channels: Where the channels are. What reads them must be linear in each, as convolutions and dense layers are;
            a normalisation across channels, as layer or group norm, is not.
        size: Number of channels to have.
        key: Draws the channels that are copied.

    Returns:
        A tree of the same paths with larger arrays; all are copies.

    Raises:
        ValueError: If paths or axes do not exist, lengths disagree, or `size` is less than their number.

    Example:
        >>> import jax, numpy as np
        >>> from jaxkd.transfer import Channels, widen
        >>> params = {"hidden": {"kernel": np.array([[5.0]])}, "out": {"kernel": np.array([[6.0]])}}
        >>> hidden = Channels(produced={"hidden/kernel": -1}, consumed={"out/kernel": -2})
        >>> wide = widen(params, hidden, 3, key=jax.random.key(0))
        >>> wide["hidden"]["kernel"], wide["out"]["kernel"].T
        (array([[5., 5., 5.]]), array([[2., 2., 2.]]))

    References:
        Net2Net: Accelerating Learning via Knowledge Transfer, https://arxiv.org/abs/1511.05641
    """
    leaves, number = _measured(variables, channels)
    if size < number:
        raise ValueError(f"size must be at least the {number} channels that there are, got {size}; see narrow")
    added = jax.random.randint(key, (size - number,), 0, number)
    chosen = np.concatenate([np.arange(number), np.asarray(added)])
    copies = np.bincount(chosen)[chosen]
    return rebuilt(variables, _picked(leaves, channels, number, chosen, copies))


def deepen(
    source: Any,
    target: Any,
    *,
    layers: Sequence[str],
    rules: Iterable[Rule] = (),
    dtypes: Dtypes = "same",
    epsilon: float = 1e-5,
) -> tuple[Any, Report]:
    """Net2DeeperNet: a deeper network whose new layers do nothing yet, and whose others are those of a trained one.

    A new layer stands behind a ReLU and before the next one, or is linear. It is a convolution with an odd kernel and
    stride 1 that pads as "SAME" does, a dense layer, or a batch norm of either. In training mode a new batch norm
    normalises by its batch, and the function changes; in inference it does not.

    Args:
        source: The tree of the trained network.
        target: The tree of the deeper network, freshly initialised or abstract.
        layers: Patterns, as in `Rule`, of the paths of the new layers in `target`.
        rules: What the other layers are called in `target`; see `transfer`.
        dtypes: As in `transfer`.
        epsilon: What the new batch norms add to the variance.

    Returns:
        A tree of the target's structure, and the report, in which the new layers are missing.

    Raises:
        TransferError: If anything else than the new layers is missing, or `transfer` would raise it.
        ValueError: If a pattern matches nothing, a new layer also has values in the source, or no identity is known.

    Example:
        >>> import numpy as np
        >>> from jaxkd.transfer import deepen
        >>> source = {"out": {"kernel": np.ones((2, 3))}}
        >>> target = {"hidden": {"kernel": np.zeros((2, 2))}, "out": {"kernel": np.zeros((2, 3))}}
        >>> params, _ = deepen(source, target, layers=["hidden/{leaf}"])
        >>> params["hidden"]["kernel"]
        array([[1., 0.],
               [0., 1.]])

    References:
        Net2Net: Accelerating Learning via Knowledge Transfer, https://arxiv.org/abs/1511.05641
    """
    leaves = leaves_by_path(target)
    if idle := [layer for layer in layers if not any(match(layer, path) is not None for path in leaves)]:
        raise ValueError(f"{idle} match nothing in the target; a pattern matches a whole path, such as {[*leaves][:3]}")
    new = [path for path in leaves if any(match(layer, path) is not None for layer in layers)]
    identities = {path: _identity(path, leaves, epsilon) for path in new}
    filled = jax.tree.unflatten(jax.tree.structure(target), [*{**leaves, **identities}.values()])
    variables, report = transfer(source, filled, rules=rules, strict=False, dtypes=dtypes)
    if taken := sorted({*new} - {*report.missing}):
        raise ValueError(f"the source has values for the new layers, {taken}: rename what it has by rules")
    others = report._replace(missing=tuple(path for path in report.missing if path not in new))
    check_complete(others, leaves, strict=True)
    return variables, report


def _measured(variables: Any, channels: Channels) -> tuple[dict[str, Any], int]:
    """The leaves by their paths, and the number of channels, once it is clear that every axis has them."""
    leaves = leaves_by_path(variables)
    named = [*channels.produced.items(), *channels.consumed.items()]
    if unknown := [path for path, _ in named if path not in leaves]:
        raise ValueError(f"there is nothing at {unknown}, but at {[*leaves]}")
    if outside := [f"{path} {np.shape(leaves[path])}" for path, axis in named if not _has_axis(leaves[path], axis)]:
        raise ValueError(f"there is no such axis in {', '.join(outside)}")
    produced, consumed = ({path: np.shape(leaves[path])[axis] for path, axis in axes.items()} for axes in channels)
    if len({*produced.values()}) != 1:
        raise ValueError(f"what makes the channels must have one number of them, got {produced}")
    (number,) = {*produced.values()}
    if uneven := {path: length for path, length in consumed.items() if length % number}:
        raise ValueError(f"what reads the {number} channels must have an axis of a multiple of them, got {uneven}")
    return leaves, number


def _has_axis(leaf: Any, axis: int) -> bool:
    return -np.ndim(leaf) <= axis < np.ndim(leaf)


def _picked(
    leaves: Mapping[str, Any], channels: Channels, number: int, chosen: np.ndarray, copies: np.ndarray | None = None
) -> dict[str, Any]:
    """The arrays with the chosen channels, each divided by the number of its copies where it is read."""
    values = {path: np.take(array_of(path, leaves[path]), chosen, axis) for path, axis in channels.produced.items()}
    for path, axis in channels.consumed.items():
        array = np.moveaxis(values[path] if path in values else array_of(path, leaves[path]), axis, -1)
        blocks = array.reshape(*array.shape[:-1], -1, number)[..., chosen]
        if copies is not None:
            blocks = blocks / copies.astype(array.dtype)
        values[path] = np.moveaxis(blocks.reshape(*array.shape[:-1], -1), -1, axis)
    return {path: placed(value, leaves[path]) for path, value in values.items()}


def _identity(path: str, leaves: Mapping[str, Any], epsilon: float) -> Any:
    """The value of a leaf in a layer that gives back what it gets."""
    leaf, name = leaves[path], path.rpartition("/")[2]
    shape = np.shape(leaf)
    if name == "kernel":
        value = _identity_kernel(path, shape)
    elif name in ("bias", "mean"):
        value = np.zeros(shape)
    elif name == "var":
        value = np.ones(shape)
    elif name == "scale" and path.partition("/")[2].replace("scale", "var") in {p.partition("/")[2] for p in leaves}:
        value = np.full(shape, np.sqrt(1 + epsilon))
    else:
        raise ValueError(f"no identity is known for {path}: it is no part of a convolution, dense layer or batch norm")
    return placed(value, leaf, leaf.dtype)


def _identity_kernel(path: str, shape: Sequence[int]) -> np.ndarray:
    spatial = shape[:-2]
    if len(shape) < 2 or shape[-1] != shape[-2] or not all(length % 2 for length in spatial):
        raise ValueError(f"an identity takes an odd kernel, and as many channels as it gives: {path} has {shape}")
    kernel = np.zeros(shape)
    kernel[tuple(length // 2 for length in spatial)] = np.eye(shape[-1])
    return kernel
