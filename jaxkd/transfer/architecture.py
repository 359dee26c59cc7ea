"""Narrower, wider and deeper networks that start from the weights of a trained one.

Data describe a set of channels: the arrays that produce them and the arrays that consume them.
Change one set after another to resize a chain of layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax import Array

from jaxkd._messages import list_some, shorten
from jaxkd.transfer.rules import Rule, check_rules, match_path
from jaxkd.transfer.trees import (
    Dtypes,
    Report,
    check_complete,
    copy_like,
    leaves_by_path,
    match_leaves,
    replace_leaves,
    to_numpy,
)

ChooseFn: TypeAlias = Callable[[Sequence[np.ndarray], int], np.ndarray]
"""`(kernels, size) -> indices [size]`: chooses which channels to keep, and their order, from the
kernels `[..., C]` that produce them."""


class Channels(NamedTuple):
    """A set of channels, as the paths of all arrays that hold them and the axes of the channels.

    An array may be both produced and consumed: kernels on a residual stream read its channels and
    write them. A consumed axis may hold the channels several times, with the channel varying
    fastest, as in a dense layer after a flatten of H W C.

    Attributes:
        produced: Axes by path, of the arrays that produce or normalise the channels: kernels,
            biases, scales, running statistics.
        consumed: Axes by path, of the kernels that read the channels.

    Example:
        >>> from jaxkd.transfer import Channels
        >>> conv1 = Channels(
        ...     produced={"params/conv1/kernel": -1, "params/conv1/bias": 0},
        ...     consumed={"params/conv2/kernel": -2},
        ... )
    """

    produced: Mapping[str, int]
    consumed: Mapping[str, int]


def leading(kernels: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Chooses the first channels."""
    del kernels
    return np.arange(size)


def largest_norm(kernels: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Chooses the channels whose kernels have the largest L1 norm.

    The norm is the sum over all kernels that produce a channel.

    References:
        Pruning Filters for Efficient ConvNets, https://arxiv.org/abs/1608.08710
    """
    if not kernels:
        raise ValueError(
            "largest_norm needs a kernel among the produced arrays, with at least 2 axes; use "
            "`leading` instead"
        )
    # Summed in float32, since a sum of many bfloat16 numbers stops growing.
    norms = sum(
        np.abs(kernel.astype(np.float32)).sum(axis=tuple(range(kernel.ndim - 1)))
        for kernel in kernels
    )
    largest = np.argsort(-np.asarray(norms), stable=True)[:size]
    # argsort orders them by norm; the channels that stay keep the order of the network.
    return np.sort(largest)


def narrow(variables: Any, channels: Channels, size: int, *, choose: ChooseFn = leading) -> Any:
    """Reduces the number of channels in a set, in all arrays that produce and consume them.

    Args:
        variables: The tree of a trained network.
        channels: The set of channels.
        size: Number of channels to keep.
        choose: Chooses the channels to keep: `leading`, `largest_norm`, or a similar function.

    Returns:
        A tree with the same paths and smaller arrays, all of them copies.

    Raises:
        ValueError: If paths or axes do not exist, lengths differ, `size` is not between 1 and the
            number of channels, or `choose` returns anything but `size` different indices.

    Example:
        >>> import numpy as np
        >>> from jaxkd.transfer import Channels, largest_norm, narrow
        >>> params = {
        ...     "hidden": {"kernel": np.array([[1.0, -3.0, 2.0]])},
        ...     "out": {"kernel": np.ones((3, 10))},
        ... }
        >>> hidden = Channels(produced={"hidden/kernel": -1}, consumed={"out/kernel": -2})
        >>> small = narrow(params, hidden, 2, choose=largest_norm)
        >>> small["hidden"]["kernel"], small["out"]["kernel"].shape
        (array([[-3.,  2.]]), (2, 10))
    """
    leaves, num_channels = _read_channels(variables, channels)
    if not 1 <= size <= num_channels:
        raise ValueError(
            f"size must be between 1 and {num_channels}, the number of channels, got {size}"
        )
    produced = [
        np.moveaxis(np.asarray(leaves[path]), axis, -1) for path, axis in channels.produced.items()
    ]
    kernels = [array for array in produced if array.ndim > 1]
    indices = _check_choice(choose(kernels, size), size, num_channels)
    return replace_leaves(variables, _select_channels(leaves, channels, num_channels, indices))


def widen(variables: Any, channels: Channels, size: int, *, key: Array) -> Any:
    """Adds copies of randomly drawn channels without changing the network's function: Net2WiderNet.

    The kernels that consume a channel are divided by its number of copies. The function is
    unchanged in training mode, too. Copies get equal gradients; use dropout or add a little noise
    to break the symmetry.

    Args:
        variables: The tree of a trained network.
        channels: The set of channels. The layers that consume them must be linear in each channel,
            as convolutions and dense layers are. Normalisation across channels, such as layer or
            group norm, is not.
        size: Number of channels after widening.
        key: A random key, which draws the channels to copy.

    Returns:
        A tree with the same paths and larger arrays, all of them copies.

    Raises:
        ValueError: If paths or axes do not exist, lengths differ, or `size` is less than the number
            of channels.

    Example:
        >>> import jax, numpy as np
        >>> from jaxkd.transfer import Channels, widen
        >>> params = {
        ...     "hidden": {"kernel": np.array([[5.0]])}, "out": {"kernel": np.array([[6.0]])}
        ... }
        >>> hidden = Channels(produced={"hidden/kernel": -1}, consumed={"out/kernel": -2})
        >>> wide = widen(params, hidden, 3, key=jax.random.key(0))
        >>> wide["hidden"]["kernel"], wide["out"]["kernel"].T
        (array([[5., 5., 5.]]), array([[2., 2., 2.]]))

    References:
        Net2Net: Accelerating Learning via Knowledge Transfer, https://arxiv.org/abs/1511.05641
    """
    leaves, num_channels = _read_channels(variables, channels)
    if size < num_channels:
        raise ValueError(
            f"size must be at least {num_channels}, the number of channels, got {size}; use narrow "
            "for fewer channels"
        )
    # The paper's g: the identity for the old channels, and a random old channel for each new one.
    copied = jax.random.randint(key, (size - num_channels,), 0, num_channels)
    indices = np.concatenate([np.arange(num_channels), np.asarray(copied)])
    # The paper's |{x : g(x) = g(j)}| for each channel j of the wide layer.
    copies = np.bincount(indices)[indices]
    values = _select_channels(leaves, channels, num_channels, indices, copies)
    return replace_leaves(variables, values)


def deepen(
    source: Any,
    target: Any,
    *,
    layers: Sequence[str],
    rules: Iterable[Rule] = (),
    dtypes: Dtypes = "same",
    epsilon: float = 1e-5,
) -> tuple[Any, Report]:
    """Initialises a deeper network from a trained one; new layers are identities: Net2DeeperNet.

    A new layer must follow a ReLU and precede the next ReLU, or be linear. It is a convolution with
    an odd kernel, stride 1 and "SAME" padding, a dense layer, or a batch norm of either. In
    inference the function is unchanged. In training mode a new batch norm normalises by its batch,
    which changes the function.

    Args:
        source: The tree of the trained network.
        target: The tree of the deeper network, freshly initialised or abstract.
        layers: Patterns, as in `Rule`, of the paths of the new layers in `target`.
        rules: Rules that rename the other layers; see `transfer`.
        dtypes: As in `transfer`.
        epsilon: The constant that the new batch norms add to the variance.

    Returns:
        A tree with the target's structure, and the report, which lists the new layers as missing.

    Raises:
        TransferError: If other paths than those of the new layers are missing, or for any other
            reason for which `transfer` raises it.
        ValueError: If a pattern matches nothing, the source also has values for a new layer, or no
            identity is known.

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
    matches = {
        pattern: [path for path in leaves if match_path(pattern, path) is not None]
        for pattern in layers
    }
    if unmatched := [pattern for pattern, paths in matches.items() if not paths]:
        raise ValueError(
            f"{list_some(map(repr, unmatched), count=3)} match nothing in the target; a pattern "
            f"must match a whole path, such as {list_some([*leaves][:2])}"
        )
    new_paths = {path for paths in matches.values() for path in paths}
    identities = {path: _identity(path, leaves, epsilon) for path in leaves if path in new_paths}
    # The identities are the target's own values, which a transfer that is not strict keeps.
    filled = jax.tree.unflatten(jax.tree.structure(target), [*{**leaves, **identities}.values()])
    values, report = match_leaves(source, filled, check_rules(rules), dtypes)
    if overwritten := sorted(new_paths - {*report.missing}):
        raise ValueError(
            f"the source has values for the new layers, {list_some(overwritten)}: add rules that "
            "rename them"
        )
    # Only the new layers may be missing; for everything else the transfer is strict.
    other_missing = tuple(path for path in report.missing if path not in new_paths)
    check_complete(report._replace(missing=other_missing), leaves, strict=True)
    return replace_leaves(filled, values), report


def _read_channels(variables: Any, channels: Channels) -> tuple[dict[str, Any], int]:
    """Returns the leaves by path and the number of channels, after a check of every axis."""
    leaves = leaves_by_path(variables)
    axes = [*channels.produced.items(), *channels.consumed.items()]
    if unknown := [path for path, _ in axes if path not in leaves]:
        raise ValueError(
            f"the tree has no leaves at {list_some(unknown, count=3)}; its paths are "
            f"{list_some(leaves, count=3)}"
        )
    outside = [
        f"{path} {np.shape(leaves[path])}"
        for path, axis in axes
        if not -np.ndim(leaves[path]) <= axis < np.ndim(leaves[path])
    ]
    if outside:
        raise ValueError(f"channels names an axis that does not exist in {list_some(outside)}")
    produced = {path: np.shape(leaves[path])[axis] for path, axis in channels.produced.items()}
    consumed = {path: np.shape(leaves[path])[axis] for path, axis in channels.consumed.items()}
    if len({*produced.values()}) != 1:
        raise ValueError(f"all produced axes must have the same length, got {produced}")
    (num_channels,) = {*produced.values()}
    if uneven := {path: length for path, length in consumed.items() if length % num_channels}:
        raise ValueError(
            f"the length of consumed axes must be a multiple of the {num_channels} channels, got "
            f"{uneven}"
        )
    return leaves, num_channels


def _check_choice(indices: Any, size: int, num_channels: int) -> np.ndarray:
    """Returns the indices of the channels to keep; raises `ValueError` if they are no choice."""
    indices = np.asarray(indices)
    # A boolean mask would select channels 0 and 1, and an index twice would double a channel.
    is_choice = (
        np.issubdtype(indices.dtype, np.integer)
        and indices.shape == (size,)
        and len(np.unique(indices)) == size
        and np.all((indices >= 0) & (indices < num_channels))
    )
    if not is_choice:
        raise ValueError(
            f"choose must return {size} different indices in [0, {num_channels}), got "
            f"{shorten(indices.tolist(), 80)} ({indices.dtype}): write np.flatnonzero(mask) for a "
            "boolean mask"
        )
    return indices


def _select_channels(
    leaves: Mapping[str, Any],
    channels: Channels,
    num_channels: int,
    indices: np.ndarray,
    copies: np.ndarray | None = None,
) -> dict[str, Any]:
    """Takes the channels at `indices` from all arrays of the set.

    Consumed arrays are divided by `copies`, the number of copies of each channel.
    """
    values = {
        path: np.take(to_numpy(path, leaves[path]), indices, axis)
        for path, axis in channels.produced.items()
    }
    for path, axis in channels.consumed.items():
        # An array on a residual stream has already lost channels on its produced axis.
        array = values[path] if path in values else to_numpy(path, leaves[path])
        array = np.moveaxis(array, axis, -1)
        # After a flatten the channels repeat along the axis, so they are selected in every block.
        blocks = array.reshape(*array.shape[:-1], -1, num_channels)[..., indices]
        if copies is not None:
            # In the array's dtype: NumPy would promote floats over integers to float64.
            blocks = blocks / copies.astype(array.dtype)
        values[path] = np.moveaxis(blocks.reshape(*array.shape[:-1], -1), -1, axis)
    return {path: copy_like(value, leaves[path]) for path, value in values.items()}


def _identity(path: str, leaves: Mapping[str, Any], epsilon: float) -> Any:
    """Returns the value with which the leaf at `path` makes its layer an identity."""
    leaf = leaves[path]
    name = path.rpartition("/")[2]
    shape = np.shape(leaf)
    if name == "kernel":
        value = _identity_kernel(path, shape)
    elif name in ("bias", "mean"):
        value = np.zeros(shape)
    elif name == "var":
        value = np.ones(shape)
    elif name == "scale" and _has_variance(path, leaves):
        # Cancels the epsilon that the batch norm adds to its variance of 1.
        value = np.full(shape, np.sqrt(1 + epsilon))
    else:
        raise ValueError(
            f"no identity is known for {path}: it is not part of a convolution, dense layer or "
            "batch norm"
        )
    return copy_like(value, leaf, leaf.dtype)


def _has_variance(path: str, leaves: Mapping[str, Any]) -> bool:
    """Returns whether a scale belongs to a batch norm: layer and group norms have no variance."""
    # The collections, "params" and "batch_stats", are cut off: the layer has one path in both.
    layer = path.partition("/")[2].rpartition("/")[0]
    variance = f"{layer}/var" if layer else "var"
    return any(other.partition("/")[2] == variance for other in leaves)


def _identity_kernel(path: str, shape: Sequence[int]) -> np.ndarray:
    spatial = shape[:-2]
    if len(shape) < 2 or shape[-1] != shape[-2] or not all(length % 2 for length in spatial):
        raise ValueError(
            "an identity needs an odd kernel with equally many input and output channels, but "
            f"{path} has {shape}"
        )
    kernel = np.zeros(shape)
    # A Dirac impulse in the centre passes each channel through.
    kernel[tuple(length // 2 for length in spatial)] = np.eye(shape[-1])
    return kernel
