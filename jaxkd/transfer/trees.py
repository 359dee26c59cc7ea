"""Transfer of weights from one tree to another, with a report that accounts for every path."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd._messages import MAX_LENGTH, list_some, shorten
from jaxkd.transfer.rules import RenamedPath, Rule, apply_rules, check_rules

Dtypes: TypeAlias = Literal["same", "target", "source"]

_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
_MAX_LISTED_PATHS = 20
_MAX_WRONG_PATHS = 1000
_MAX_PATH_LENGTH = 200


class Mismatch(NamedTuple):
    """A path whose array has another shape or dtype in the source than in the target.

    Attributes:
        path: The path in the target.
        source: Shape and dtype in the source, after conversion to the target's layout.
        target: Shape and dtype in the target.
        source_path: The path in the source.
    """

    path: str
    source: jax.ShapeDtypeStruct
    target: jax.ShapeDtypeStruct
    source_path: str


class Report(NamedTuple):
    """Outcome of a transfer for every path; `str(report)` formats it as a table.

    Attributes:
        transferred: Pairs of a path in the source and the path in the target that received its
            value.
        missing: Paths in the target for which the source has no value.
        unexpected: Paths in the source that do not exist in the target.
        mismatched: Paths in both whose shapes or dtypes differ.
        left_out: Paths in the source that a rule leaves out.
        unused: Rules that have a target but match no path in the source.
        removed: Prefixes that were removed from the paths in the source, such as "module."; see
            `jaxkd.weights.from_torch`.
    """

    transferred: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    left_out: tuple[str, ...]
    unused: tuple[Rule, ...]
    removed: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True if every target leaf was filled and every source leaf was used.

        Source leaves that a rule leaves out do not count. Every rule with a target must have
        matched.
        """
        return not (self.missing or self.unexpected or self.mismatched or self.unused)

    def __str__(self) -> str:
        """Formats the counts, and a table of the paths in the source and in the target."""
        counts = {name.replace("_", " "): len(entries) for name, entries in self._asdict().items()}
        del counts["removed"]
        rules = counts.pop("unused")
        summary = ", ".join(f"{count} {name}" for name, count in counts.items())
        summary += f", {rules} unused rule{'' if rules == 1 else 's'}"
        if self.removed:
            summary += f"; removed {' and '.join(map(repr, self.removed))} from the names"
        rows = [("transferred", *pair) for pair in _summarize_pairs(self.transferred)]
        rows += [("left out", path, "") for path in _summarize_paths(self.left_out)]
        # What is wrong is listed in full, as far as a network has so many paths.
        rows += [("missing", "", path) for path in _cut(self.missing)]
        rows += [("unexpected", path, "") for path in _cut(self.unexpected)]
        for path, source, target, source_path in self.mismatched[:_MAX_WRONG_PATHS]:
            rows.append(("mismatched", source_path, path))
            rows.append(("", _describe_array(source), _describe_array(target)))
        rows += [("unused rule", rule.source, str(rule.target)) for rule in self.unused]
        if not rows:
            return summary
        return "\n".join([summary, *_align_columns([("", "source", "target"), *rows])])


class TransferError(ValueError):
    """Raised if a transfer moved nothing, or a strict one is incomplete.

    Attributes:
        report: The report of the transfer.
    """

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report

    # An exception is unpickled from its message alone, unless it says otherwise.
    def __reduce__(self) -> tuple:  # noqa: D105
        return type(self), (*self.args, self.report)


def transfer(
    source: Any,
    target: Any,
    *,
    rules: Iterable[Rule] = (),
    strict: bool = True,
    dtypes: Dtypes = "same",
) -> tuple[Any, Report]:
    """Fills a tree with the weights of another one.

    The path of a leaf consists of the dict keys, list indices and attribute names that lead to it,
    joined by "/". The first rule that matches a source path gives the target path; without a
    matching rule both are the same. Every array of the result is a copy, so that nothing is shared
    with either tree.

    Args:
        source: A tree of arrays: parameters, or a flat state dict such as PyTorch's, whose keys are
            its paths.
        target: The tree to fill. Its leaves may be `jax.ShapeDtypeStruct`, as `jax.eval_shape`
            returns them; then each of them must receive a value.
        rules: Rules that rename the paths and convert the layouts; see `Rule`.
        strict: If True, raises an error unless the report is complete. If False, the target keeps
            its own value wherever the source has none that fits, and the report lists these paths.
        dtypes: "same": different dtypes are a mismatch. "target": values are cast to the target's
            dtype, which must be of the same kind (floating, integer, ...). "source": values keep
            the source's dtype.

    Returns:
        A tree with the target's structure, and the report. An array is a NumPy array if the
        target's is one or is abstract, else a JAX array placed like the target's.

    Raises:
        TransferError: If `strict` and anything is missing, unexpected or mismatched, or a rule
            matches nothing. Also if nothing is transferred, or an abstract leaf gets no value,
            whatever `strict` is. The message names the first misfit, the error's `report` all.
        ValueError: If two source paths are renamed to the same path, a pattern is malformed, a
            layout does not fit an array, two leaves of a tree have the same path, a tree contains
            itself, or an integer does not fit the target's dtype.
        TypeError: If a leaf is not an array of numbers, or a rule is no `Rule`.

    Warns:
        UserWarning: If less than half of the target's numbers come from the source, which only
            `strict=False` allows. If finite numbers become infinite in the target's dtype.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> from jaxkd.transfer import Rule, transfer
        >>> state_dict = {
        ...     "fc.weight": np.ones((10, 64)), "fc.bias": np.ones(10), "steps": np.array(7)
        ... }
        >>> target = {"params": {"logits": {"kernel": np.zeros((64, 10)), "bias": np.zeros(10)}}}
        >>> rules = (
        ...     Rule("fc.weight", "params/logits/kernel", layout.DENSE),
        ...     Rule("fc.bias", "params/logits/bias"),
        ...     Rule("steps", None),
        ... )
        >>> variables, report = transfer(state_dict, target, rules=rules)
        >>> print(report)
        2 transferred, 0 missing, 0 unexpected, 0 mismatched, 1 left out, 0 unused rules
                     source     target
        transferred  fc.bias    params/logits/bias
        transferred  fc.weight  params/logits/kernel
        left out     steps
    """
    values, report = match_leaves(source, target, check_rules(rules), dtypes)
    target_leaves = leaves_by_path(target)
    check_complete(report, target_leaves, strict=strict)
    warn_of_small_share(values, target_leaves)
    return replace_leaves(target, values), report


def match_leaves(
    source: Any, target: Any, rules: Sequence[Rule], dtypes: Dtypes
) -> tuple[dict[str, Any], Report]:
    """Returns the new values of a target by path, and the report of them.

    The rules are checked by the caller, once and not for each path: a network may have hundreds of
    both.
    """
    if dtypes not in get_args(Dtypes):
        raise ValueError(f"dtypes must be one of {get_args(Dtypes)}, got {dtypes!r}")
    source_leaves = leaves_by_path(source)
    target_leaves = leaves_by_path(target)
    renamed = {source_path: apply_rules(source_path, rules) for source_path in source_leaves}
    source_paths = _invert(renamed)
    values = {}
    mismatched, overflowing = [], []
    for path, leaf in target_leaves.items():
        if path not in source_paths:
            continue
        source_path = source_paths[path]
        value = _convert(source_path, source_leaves[source_path], renamed[source_path].rule)
        expected = _shape_and_dtype(path, leaf)
        if _fits(value, leaf, expected, dtypes):
            dtype = value.dtype if dtypes == "source" else expected.dtype
            if _overflows(path, value, dtype):
                overflowing.append(path)
            # NumPy's own warning names no path.
            with np.errstate(over="ignore"):
                values[path] = copy_like(value, leaf, dtype)
        else:
            actual = jax.ShapeDtypeStruct(value.shape, value.dtype)
            mismatched.append(Mismatch(path, actual, expected, source_path))
    if overflowing:
        warnings.warn(
            f"finite numbers become infinite or NaN in the target's dtype, in "
            f"{list_some(overflowing)}: take a target with a wider dtype, such as float32",
            stacklevel=3,
        )
    report = Report(
        transferred=tuple((source_paths[path], path) for path in values),
        missing=tuple(path for path in target_leaves if path not in source_paths),
        unexpected=tuple(
            source_path for path, source_path in source_paths.items() if path not in target_leaves
        ),
        mismatched=tuple(mismatched),
        left_out=tuple(source_path for source_path, (path, _) in renamed.items() if path is None),
        unused=_unused_rules(rules, renamed),
    )
    return values, report


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path: keys, indices and attribute names, joined by "/".

    Args:
        tree: Any tree.

    Returns:
        The leaves, in the tree's order.

    Raises:
        ValueError: If two leaves have the same path, or the tree contains itself.

    Example:
        >>> from jaxkd.transfer import leaves_by_path
        >>> leaves_by_path({"params": {"layers": [1, 2]}, "bn.mean": 3})
        {'bn.mean': 3, 'params/layers/0': 1, 'params/layers/1': 2}
    """
    _check_acyclic(tree, ())
    leaves = {}
    keys_by_path = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = join_path(keys)
        # A key may itself contain "/", as in {"a/b": 1, "a": {"b": 2}}.
        if path in leaves:
            first, second = map(jax.tree_util.keystr, (keys_by_path[path], keys))
            raise ValueError(
                f"two leaves have the path {path!r}: {first} and {second}; rename one of them"
            )
        leaves[path] = leaf
        keys_by_path[path] = keys
    return leaves


def join_path(keys: tuple[Any, ...]) -> str:
    """Joins the keys that lead to a leaf, as JAX's tree functions give them, to its path."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def replace_leaves(tree: Any, values: Mapping[str, Any]) -> Any:
    """Returns the tree with new values at some paths and copies of its leaves at all others."""
    leaves = [
        values[path] if path in values else copy_like(leaf, leaf)
        for path, leaf in leaves_by_path(tree).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def copy_like(value: Any, like: Any, dtype: Any = None) -> Any:
    """Copies an array into the framework and onto the devices of another one."""
    # `order="C"`, since a converted layout is a transposed view, whose strides a copy would keep.
    copy = np.array(value, dtype, order="C")
    if isinstance(like, (np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return copy
    # Only a committed array fixes its devices; a copy of another one must stay free to move.
    sharding = like.sharding if isinstance(like, jax.Array) and like.committed else None
    return jax.device_put(copy, sharding)


def to_numpy(path: str, leaf: Any) -> np.ndarray:
    """Returns a leaf as a NumPy array, without a copy where possible.

    Raises `TypeError` if it is not an array of numbers.
    """
    # A Python number gets JAX's default dtype: NumPy's is 64 bits wide and would not fit.
    dtype = jnp.result_type(leaf) if isinstance(leaf, (bool, int, float, complex)) else None
    array = np.asarray(leaf, dtype)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in _KINDS):
        raise TypeError(f"{path} must be an array of numbers, got {type(leaf).__name__}")
    return array


def check_complete(report: Report, target: Mapping[str, Any], *, strict: bool) -> None:
    """Raises `TransferError` if the report is incomplete or an abstract leaf has no value.

    If not `strict`, an incomplete report is an error only if nothing was transferred.
    """
    # Before the advice below: what moves nothing is no transfer.
    if not report.transferred and not report.complete:
        problem = "nothing can be transferred, no path of both has arrays that fit"
        raise TransferError(_describe_misfits(report, problem, "compare the names"), report)
    without_value = [*report.missing, *(mismatch.path for mismatch in report.mismatched)]
    if any(isinstance(target[path], jax.ShapeDtypeStruct) for path in without_value):
        problem = "the source does not fit the target, which has shapes without values"
        remedy = "give each a value in the source"
        raise TransferError(_describe_misfits(report, problem, remedy), report)
    if strict and not report.complete:
        problem = "the source does not fit the target"
        remedy = "pass strict=False to transfer only what fits"
        raise TransferError(_describe_misfits(report, problem, remedy), report)


def _describe_misfits(report: Report, problem: str, remedy: str) -> str:
    """Describes a failed transfer in a line: how much does not fit, and the first of it."""
    counts = {
        "missing": report.missing,
        "unexpected": report.unexpected,
        "mismatched": report.mismatched,
        "unused rule" if len(report.unused) == 1 else "unused rules": report.unused,
    }
    counted = ", ".join(f"{len(items):,} {name}" for name, items in counts.items() if items)
    first = ""
    if report.mismatched:
        path, source, expected, source_path = report.mismatched[0]
        arrays = [shorten(_describe_array(array), 30) for array in (source, expected)]
        first = f"{shorten(source_path, 40)} {arrays[0]} for {shorten(path, 40)} {arrays[1]}"
    elif report.missing or report.unexpected:
        # Often one has the name that the other lacks.
        names = [f"missing {shorten(path, 50)}" for path in report.missing[:1]]
        names += [f"unexpected {shorten(path, 50)}" for path in report.unexpected[:1]]
        first = " and ".join(names)
    elif report.unused:
        first = f"unused {shorten(report.unused[0].source, 60)}"
    remedy = f"; the error's report has all: {remedy}"
    return shorten(f"{problem}: {counted}, first {first}", MAX_LENGTH - len(remedy)) + remedy


def warn_of_small_share(values: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Warns if most numbers of a target keep their value: its weights are then hardly transferred.

    Args:
        values: The new values by path.
        target: All leaves of the target by path.
    """
    sizes = {path: math.prod(_shape_and_dtype(path, leaf).shape) for path, leaf in target.items()}
    share = sum(sizes[path] for path in values) / max(sum(sizes.values()), 1)
    if len(values) < len(sizes) and share < 0.5:
        warnings.warn(
            f"{len(values)} of {len(sizes)} arrays, {100 * share:.1f} % of the parameters, come "
            "from the source; the target keeps its own values for the rest: see the report, "
            "or pass strict=True (no --partial) to refuse that",
            stacklevel=3,
        )


def _check_acyclic(node: Any, ancestors: tuple[int, ...]) -> None:
    # JAX itself would recurse until it overflows the stack.
    if not isinstance(node, (dict, list, tuple)):
        return
    # Among the ancestors, not all nodes seen so far: one object may occur twice in a tree.
    if id(node) in ancestors:
        raise ValueError(
            f"the tree contains itself: a {type(node).__name__} is one of its own descendants"
        )
    for child in node.values() if isinstance(node, dict) else node:
        _check_acyclic(child, (*ancestors, id(node)))


def _invert(renamed: Mapping[str, RenamedPath]) -> dict[str, str]:
    """Returns the source path of every target path; raises `ValueError` if there are several."""
    source_paths: dict[str, str] = {}
    clashes = []
    for source_path, (path, _) in renamed.items():
        if path in source_paths:
            clashes.append(f"{source_paths[path]!r} and {source_path!r} both become {path!r}")
        elif path is not None:
            source_paths[path] = source_path
    if clashes:
        raise ValueError(f"clashing rules: {list_some(clashes, count=2, limit=120)}")
    return source_paths


def _unused_rules(rules: Sequence[Rule], renamed: Mapping[str, RenamedPath]) -> tuple[Rule, ...]:
    """Returns the rules that have a target but decide for no path.

    A rule that leaves paths out may match nothing: then there is nothing to leave out.
    """
    # By identity: of two equal rules, the second never decides.
    used = {id(rule) for _, rule in renamed.values()}
    return tuple(rule for rule in rules if rule.target is not None and id(rule) not in used)


def _convert(path: str, leaf: Any, rule: Rule | None) -> np.ndarray:
    """Returns a source leaf as an array in the target's layout."""
    array = to_numpy(path, leaf)
    if rule is None or rule.layout is None:
        return array
    try:
        return np.asarray(rule.layout.to_flax(array))
    except ValueError as error:
        raise ValueError(f"{path} -> {rule.target}: {error}") from None


def _shape_and_dtype(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
    array = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else to_numpy(path, leaf)
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _fits(value: np.ndarray, leaf: Any, expected: jax.ShapeDtypeStruct, dtypes: Dtypes) -> bool:
    if value.shape != expected.shape:
        return False
    if dtypes == "same":
        return value.dtype == expected.dtype
    if dtypes == "target":
        # Only within a kind: a cast of floats to integers would truncate them.
        return any(
            jnp.issubdtype(value.dtype, kind) and jnp.issubdtype(expected.dtype, kind)
            for kind in _KINDS
        )
    # A JAX array would silently hold a float64 value in float32, unless x64 is enabled.
    return (
        not isinstance(leaf, jax.Array) or jax.dtypes.canonicalize_dtype(value.dtype) == value.dtype
    )


def _overflows(path: str, value: np.ndarray, dtype: Any) -> bool:
    """Returns whether a cast makes finite numbers infinite.

    Raises `ValueError` if integers do not fit: they would wrap around.
    """
    if value.dtype == dtype or not value.size:
        return False
    if jnp.issubdtype(dtype, jnp.integer):
        smallest, largest = int(value.min()), int(value.max())
        limits = jnp.iinfo(dtype)
        if smallest < limits.min or largest > limits.max:
            raise ValueError(
                f"{_printable(path)} has integers from {smallest} to {largest}, which the target's "
                f"{np.dtype(dtype).name} cannot hold: take a target of a wider dtype"
            )
        return False
    with np.errstate(over="ignore"):
        return bool(np.any(np.isfinite(value) & ~np.isfinite(value.astype(dtype))))


def _describe_array(array: jax.ShapeDtypeStruct) -> str:
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


def _summarize_paths(paths: Sequence[str]) -> Sequence[str]:
    """Returns the paths, or the number of paths per top-level module if there are many."""
    if len(paths) <= _MAX_LISTED_PATHS:
        return paths
    counts = Counter(map(_top_level_module, paths))
    return [f"{module} ({count})" for module, count in counts.items()]


def _cut(paths: Sequence[str]) -> Sequence[str]:
    rest = len(paths) - _MAX_WRONG_PATHS
    return paths if rest <= 0 else [*paths[:_MAX_WRONG_PATHS], f"... and {rest} more"]


def _printable(path: str) -> str:
    """Returns a path without line breaks, escape sequences and lengths that no terminal shows."""
    # One name of a megabyte in a file would widen every line of the table.
    path = path if len(path) <= _MAX_PATH_LENGTH else f"{path[:_MAX_PATH_LENGTH]}..."
    return path if path.isprintable() else repr(path)[1:-1]


def _summarize_pairs(pairs: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    if len(pairs) <= _MAX_LISTED_PATHS:
        return pairs
    return [("", line) for line in _summarize_paths([target for _, target in pairs])]


def _top_level_module(path: str) -> str:
    """Returns `params/stage1` for `params/stage1/conv1/kernel`, `layer1` for `layer1.0.weight`."""
    *modules, leaf = path.split("/")
    return "/".join(modules[:2]) or leaf.partition(".")[0]


def _align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
