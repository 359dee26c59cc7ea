"""Weights moved from one tree to another, every path accounted for."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd.transfer.rules import Renamed, Rule, check_rule, rename

Dtypes: TypeAlias = Literal["same", "target", "source"]


class Mismatch(NamedTuple):
    """A path whose array does not fit.

    Attributes:
        path: Its path in the target.
        source: Shape and dtype that the source has for it, once laid out as the rule says.
        target: Shape and dtype of the target.
        source_path: Its path in the source.
    """

    path: str
    source: jax.ShapeDtypeStruct
    target: jax.ShapeDtypeStruct
    source_path: str


class Report(NamedTuple):
    """What became of every path; `str(report)` is a table.

    Attributes:
        transferred: Pairs of a path in the source and the path in the target that has its values now.
        missing: Paths of the target for which the source has nothing.
        unexpected: Paths of the source for which the target has no place.
        mismatched: Paths of both, of another shape or dtype.
        left_out: Paths of the source that a rule leaves out.
        unused: Rules that have a target and match no path of the source.
    """

    transferred: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    left_out: tuple[str, ...]
    unused: tuple[Rule, ...]

    @property
    def complete(self) -> bool:
        """Whether the source gave the whole target, and had nothing else to give."""
        return not (self.missing or self.unexpected or self.mismatched or self.unused)

    def __str__(self) -> str:
        """The counts, then a table of the paths in the source and in the target."""
        named = zip(self._fields, self, strict=True)
        counts = ", ".join(f"{len(paths)} {name.replace('_', ' ')}" for name, paths in named)
        rows = [("transferred", *pair) for pair in _pairs_summed_up(self.transferred)]
        rows += [("left out", path, "") for path in _summed_up(self.left_out)]
        rows += [("missing", "", path) for path in self.missing]
        rows += [("unexpected", path, "") for path in self.unexpected]
        for path, source, target, source_path in self.mismatched:
            rows += [("mismatched", source_path, path), ("", _described(source), _described(target))]
        rows += [("unused rule", rule.source, str(rule.target)) for rule in self.unused]
        return "\n".join([counts, *_aligned([("", "source", "target"), *rows] if rows else [])])


class TransferError(ValueError):
    """A strict transfer in which something is missing, unexpected, mismatched or unused.

    Attributes:
        report: All of it.
    """

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple:  # noqa: D105
        return type(self), (*self.args, self.report)


def transfer(
    source: Any, target: Any, *, rules: Iterable[Rule] = (), strict: bool = True, dtypes: Dtypes = "same"
) -> tuple[Any, Report]:
    """Gives a tree the weights of another one.

    A path is the keys of dicts, indices of lists and names of attributes on the way to a leaf, joined by "/". The
    first rule that matches a source's path decides where it goes; without a rule it goes to the same path. Nothing is
    shared with either tree: every array of the result is a copy.

    Args:
        source: A tree of arrays: parameters, or a flat state dict such as PyTorch's, whose keys are its paths.
        target: The tree that is to get them. Its leaves may be `jax.ShapeDtypeStruct`, as `jax.eval_shape` makes them:
            then every one of them must get a value.
        rules: Which path goes where, and with which layout; see `Rule`.
        strict: Whether all must fit. If not, the target keeps its own values where the source has none that fit, and
            the report says where.
        dtypes: "same": another dtype is a mismatch. "target": cast to the target's, which must be of the same kind
            (floating, integer, ...). "source": keep the source's.

    Returns:
        A tree of the target's structure, and the report. An array is NumPy's where the target's is or is abstract, else
        JAX's, placed as the target's is.

    Raises:
        TransferError: If `strict`, or for abstract leaves, and something is missing, unexpected or mismatched or a rule
            matches nothing; the message and its `report` hold all of it.
        ValueError: If two paths of the source go to one, a pattern cannot be read, a layout does not fit an array, two
            leaves of a tree have one path, or a tree contains itself.
        TypeError: If a leaf is no array.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> from jaxkd.transfer import Rule, transfer
        >>> state_dict = {"fc.weight": np.ones((10, 64)), "fc.bias": np.ones(10), "steps": np.array(7)}
        >>> target = {"params": {"logits": {"kernel": np.zeros((64, 10)), "bias": np.zeros(10)}}}
        >>> rules = (
        ...     Rule("fc.weight", "params/logits/kernel", layout.DENSE),
        ...     Rule("fc.bias", "params/logits/bias"),
        ...     Rule("steps", None),
        ... )
        >>> variables, report = transfer(state_dict, target, rules=rules)
        >>> print(report)
        2 transferred, 0 missing, 0 unexpected, 0 mismatched, 1 left out, 0 unused
                     source     target
        transferred  fc.bias    params/logits/bias
        transferred  fc.weight  params/logits/kernel
        left out     steps
    """
    if dtypes not in get_args(Dtypes):
        raise ValueError(f"dtypes must be one of {get_args(Dtypes)}, got {dtypes!r}")
    rules = tuple(rules)
    for rule in rules:
        check_rule(rule)
    given, own = leaves_by_path(source), leaves_by_path(target)
    renamed = {path: rename(path, rules) for path in given}
    origins = _origins(renamed)
    values, mismatched = {}, []
    for path in filter(origins.__contains__, own):
        name, leaf = origins[path], own[path]
        value, like = _laid_out(name, given[name], renamed[name].rule), _abstract(path, leaf)
        if _fits(value, leaf, like, dtypes):
            values[path] = placed(value, leaf, value.dtype if dtypes == "source" else like.dtype)
        else:
            mismatched.append(Mismatch(path, jax.ShapeDtypeStruct(value.shape, value.dtype), like, name))
    report = Report(
        transferred=tuple((origins[path], path) for path in values),
        missing=tuple(path for path in own if path not in origins),
        unexpected=tuple(name for path, name in origins.items() if path not in own),
        mismatched=tuple(mismatched),
        left_out=tuple(name for name, (path, _) in renamed.items() if path is None),
        unused=_unused(rules, renamed),
    )
    check_complete(report, own, strict=strict)
    return rebuilt(target, values), report


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths: keys, indices and names of attributes, joined by "/".

    Args:
        tree: Any tree.

    Returns:
        The leaves, in the tree's order.

    Raises:
        ValueError: If two leaves have one path, or the tree contains itself.

    Example:
        >>> from jaxkd.transfer import leaves_by_path
        >>> leaves_by_path({"params": {"layers": [1, 2]}, "bn.mean": 3})
        {'bn.mean': 3, 'params/layers/0': 1, 'params/layers/1': 2}
    """
    _check_acyclic(tree, ())
    leaves, places = {}, {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = path_of(keys)
        if path in leaves:
            both = f"{jax.tree_util.keystr(places[path])} and {jax.tree_util.keystr(keys)}"
            raise ValueError(f"two leaves have the path {path!r}: {both}; rename one of them")
        leaves[path], places[path] = leaf, keys
    return leaves


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf from the keys on the way to it, as JAX's functions of trees give them."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def rebuilt(tree: Any, values: Mapping[str, Any]) -> Any:
    """The tree with these values at their paths; what else it holds is copied."""
    own = leaves_by_path(tree)
    leaves = [values[path] if path in values else placed(leaf, leaf) for path, leaf in own.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def placed(value: Any, like: Any, dtype: Any = None) -> Any:
    """A copy of an array, in the framework and on the devices of another one."""
    copy = np.array(value, dtype, order="C")
    if _is_numpy(like) or isinstance(like, jax.ShapeDtypeStruct):
        return copy
    return jax.device_put(copy, like.sharding if isinstance(like, jax.Array) and like.committed else None)


def array_of(path: str, leaf: Any) -> np.ndarray:
    """A leaf as an array of the host, not copied where that can be."""
    dtype = jnp.result_type(leaf) if isinstance(leaf, (bool, int, float, complex)) else None
    array = np.asarray(leaf, dtype)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in _KINDS):
        raise TypeError(f"{path} is no array of numbers, but {type(leaf).__name__}")
    return array


def check_complete(report: Report, target: Mapping[str, Any], *, strict: bool) -> None:
    """Raises `TransferError` if that is not what was wanted: all, or at least a value for each abstract leaf."""
    if strict and not report.complete:
        raise TransferError(
            f"the source does not fit the target; transfer(strict=False) takes what fits\n{report}", report
        )
    without = [*report.missing, *(mismatch.path for mismatch in report.mismatched)]
    if any(isinstance(target[path], jax.ShapeDtypeStruct) for path in without):
        raise TransferError(f"the target is abstract, and so has no values of its own to keep\n{report}", report)


def _check_acyclic(node: Any, above: tuple[int, ...]) -> None:
    """JAX would recurse until the interpreter stops it."""
    if not isinstance(node, (dict, list, tuple)):
        return
    if id(node) in above:
        raise ValueError(f"the tree contains itself: a {type(node).__name__} is one of its own descendants")
    for child in node.values() if isinstance(node, dict) else node:
        _check_acyclic(child, (*above, id(node)))


def _origins(renamed: Mapping[str, Renamed]) -> dict[str, str]:
    """The source's path of each path that something goes to."""
    origins: dict[str, str] = {}
    clashes = []
    for name, (path, _) in renamed.items():
        if path in origins:
            clashes.append(f"{origins[path]!r} and {name!r} both go to {path!r}")
        elif path is not None:
            origins[path] = name
    if clashes:
        raise ValueError(f"clashing rules: {'; '.join(clashes)}")
    return origins


def _unused(rules: Sequence[Rule], renamed: Mapping[str, Renamed]) -> tuple[Rule, ...]:
    """The rules that decide nothing. One that leaves out what is not there has done what it says."""
    used = {id(rule) for _, rule in renamed.values()}
    return tuple(rule for rule in rules if rule.target is not None and id(rule) not in used)


def _laid_out(path: str, leaf: Any, rule: Rule | None) -> np.ndarray:
    """The array of a leaf as the target lays it out."""
    array = array_of(path, leaf)
    if rule is None or rule.layout is None:
        return array
    try:
        return np.asarray(rule.layout.to_flax(array))
    except ValueError as error:
        raise ValueError(f"{path} -> {rule.target}: {error}") from None


def _abstract(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    array = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else array_of(path, leaf)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def _fits(value: np.ndarray, leaf: Any, like: jax.ShapeDtypeStruct, dtypes: Dtypes) -> bool:
    if value.shape != like.shape:
        return False
    if dtypes == "same":
        return value.dtype == like.dtype
    if dtypes == "target":
        return any(jnp.issubdtype(value.dtype, kind) and jnp.issubdtype(like.dtype, kind) for kind in _KINDS)
    return not isinstance(leaf, jax.Array) or jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype


def _is_numpy(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, np.generic))


def _described(array: jax.ShapeDtypeStruct) -> str:
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


_LONG = 20


def _summed_up(paths: Sequence[str]) -> Sequence[str]:
    """The paths, or their number in each top-level module if they are many."""
    if len(paths) <= _LONG:
        return paths
    return [f"{module} ({count})" for module, count in Counter(map(_module, paths)).items()]


def _pairs_summed_up(pairs: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    if len(pairs) <= _LONG:
        return pairs
    return [("", line) for line in _summed_up([path for _, path in pairs])]


def _module(path: str) -> str:
    """`params/stage1` of `params/stage1/conv1/kernel`, `layer1` of `layer1.0.conv1.weight`."""
    *modules, leaf = path.split("/")
    return "/".join(modules[:2]) or leaf.partition(".")[0]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
