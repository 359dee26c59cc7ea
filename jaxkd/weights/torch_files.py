"""Conversion between PyTorch state dicts and variables, and the files that hold state dicts."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd._extras import add_install_command
from jaxkd._files import write_atomically
from jaxkd._messages import list_some
from jaxkd.transfer import Report, Rule, leaves_by_path, rename_back
from jaxkd.transfer.rules import check_rules
from jaxkd.transfer.trees import (
    check_complete,
    match_leaves,
    replace_leaves,
    warn_of_small_share,
)
from jaxkd.weights.files import find_weights_file, is_index, read_index, to_text
from jaxkd.weights.names import (
    expected_names,
    find_counters,
    find_other_network,
    show_entry,
    unwrap_names,
)
from jaxkd.weights.safetensors_files import read_safetensors
from jaxkd.weights.torch_pickle import SAVE_ADVICE, OpaqueObject, read_torch
from jaxkd.weights.unfinished import DEQUANTIZE_ADVICE, check_finished, is_quantized_type

_MAX_ARRAYS = 10_000  # of one file; the largest network of `jaxkd.models` has a tenth


def load_weights(path: str | os.PathLike, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Loads the named arrays of a safetensors file or of a PyTorch file in either of its formats.

    The content decides the format, not the name. No code in the file is run. If the file is a
    training checkpoint with one state dict, that state dict is returned. The prefix `module.`,
    which `DataParallel` adds, is removed if every name has it; `from_torch` removes other prefixes.

    Args:
        path: The file; or the index of its shards, such as `model.safetensors.index.json`; or a
            folder, as for `jaxkd.weights.files.find_weights_file`: that of a run, or of the hub.
        entry: Entry of the checkpoint to load, such as "state_dict" or "ema", or what the names
            of the wanted weights begin with, such as "teacher". Needed only if there are several.

    Returns:
        Arrays by name, in the order of the file. They may be read-only.

    Raises:
        ValueError: If the file has none of these formats, is damaged, does not have exactly one
            dict of arrays, or lacks the entry; or if a shard is missing.
        OSError: If the file does not exist or cannot be read.

    Warns:
        UserWarning: If values that are no arrays lie between the weights, and are left out.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from jaxkd.weights import load_weights, save_safetensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "student.safetensors"
        ...     save_safetensors(path, {"params": {"logits": {"bias": np.zeros(10)}}})
        ...     weights = load_weights(path)
        >>> {name: array.shape for name, array in weights.items()}
        {'params/logits/bias': (10,)}
    """
    weights = read_state_dict(path, entry=entry)
    # Only if all names have it, since a network may have a layer called `module`.
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): array for name, array in weights.items()}
    return weights


def read_state_dict(path: str | os.PathLike, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Loads weights as `load_weights` does, but under the names that they have in the file."""
    file = find_weights_file(path)
    return _read_shards(file, entry) if is_index(file) else _read_file(file, entry)


def load_variables(
    path: str | os.PathLike,
    variables: dict,
    rules: Iterable[Rule],
    *,
    entry: str | None = None,
    strict: bool = True,
) -> tuple[dict, Report]:
    """Loads weights from a file or a folder and converts them to the variables of a model.

    The file may have PyTorch's names or those of `save_safetensors`, as `jaxkd convert` and the
    runs of experiments write it.

    Args:
        path: As for `load_weights`.
        variables: As for `from_torch`.
        rules: The module's `torch_rules()`.
        entry: As for `load_weights`.
        strict: As for `from_torch`.

    Returns:
        New variables, and a report of what was transferred.

    Raises:
        TransferError: As for `from_torch`.
        ValueError: As for `load_weights` and `from_torch`.
        OSError: If the file does not exist or cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from jaxkd.weights import load_variables, save_safetensors
        >>> variables = {"params": {"logits": {"bias": np.ones(10)}}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "student.safetensors"
        ...     save_safetensors(path, variables)
        ...     _, report = load_variables(path, variables, rules=())
        >>> report.complete
        True
    """
    return from_torch(read_state_dict(path, entry=entry), variables, rules, strict=strict)


def from_torch(
    state_dict: Mapping[str, Any], variables: dict, rules: Iterable[Rule], *, strict: bool = True
) -> tuple[dict, Report]:
    """Converts a PyTorch state dict to the variables of a model.

    The rules give the layout of each array by the kind of its layer; shapes never decide it.
    Floating-point arrays are cast to the dtypes of the variables.

    A prefix that a wrapper of the network put before all of its names, such as `module.`,
    `_orig_mod.` or `model.`, is removed, if one prefix alone explains the names. Single integers
    that the model lacks, such as a counter of averaged steps, are left out. The report says both.

    Args:
        state_dict: PyTorch's names and arrays, as `load_weights` returns them. Or the names of
            `save_safetensors`, such as "params/logits/kernel", for which no rules are needed.
        variables: The model's variables. Only shapes and dtypes are needed:
            `jax.eval_shape(model.init, key, inputs)` is enough.
        rules: The module's `torch_rules()`.
        strict: Whether all names must match on both sides. If not, a variable without a matching
            array keeps its value.

    Returns:
        New variables, and a report of what was transferred.

    Raises:
        TransferError: If an array is missing, unexpected or of the wrong shape. Its `report` lists
            all of them. Also if nothing is transferred, whatever `strict` is.
        ValueError: If the rules are invalid, see `jaxkd.transfer.transfer`; or if several prefixes
            explain the names, or with `strict` a second network has names with a prefix; or if the
            weights are adapters such as LoRA's, which must be merged
            first, or quantised: integers, or floating-point numbers of 8 bits.

    Warns:
        UserWarning: If arrays hold NaN or infinity, all are 0, a running variance is negative, or
            less than half of the variables come from the file or it has a second network, as
            `strict=False` allows.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jaxkd import layout
        >>> from jaxkd.transfer import Rule
        >>> from jaxkd.weights import from_torch
        >>> state_dict = {"fc.weight": np.ones((10, 64), np.float16)}
        >>> variables = {"params": {"kernel": jax.ShapeDtypeStruct((64, 10), jnp.float32)}}
        >>> rules = (
        ...     Rule("fc.weight", "params/kernel", layout.DENSE),
        ...     Rule("{any...}.num_batches_tracked", None),
        ... )
        >>> variables, report = from_torch(state_dict, variables, rules)
        >>> kernel = variables["params"]["kernel"]
        >>> kernel.shape, kernel.dtype, report.complete
        ((64, 10), dtype('float32'), True)
    """
    # A plain dict, because JAX takes a mapping of an unregistered type for a single leaf.
    weights = dict(state_dict)
    leaves = leaves_by_path(variables)
    rules, removed, counters = check_rules(rules), (), ()
    if _has_own_names(weights, variables):
        rules = ()
    else:
        # Each is compared with each rule.
        if len(weights) > _MAX_ARRAYS:
            raise ValueError(
                f"the weights have {len(weights):,} arrays, more than {_MAX_ARRAYS:,}: select "
                "those of one network, as in load_weights(path, entry='model')"
            )
        expected = expected_names(leaves, rules)
        weights, removed = unwrap_names(weights, expected)
        _check_one_network(find_other_network(weights, expected), removed, strict=strict)
        counters = find_counters(weights, leaves, rules)
    for name in counters:
        del weights[name]
    values, report = match_leaves(weights, variables, rules, "target")
    report = report._replace(left_out=(*report.left_out, *counters), removed=removed)
    check_finished(weights, leaves, report)
    check_complete(report, leaves, strict=strict)
    warn_of_small_share(values, leaves)
    _warn_of_statistics(report)
    _warn_of_unusable(values, report)
    return replace_leaves(variables, values), report


def _check_one_network(other: str, removed: Sequence[str], *, strict: bool) -> None:
    """Refuses a second network beside the one that fits, or warns of it if not `strict`."""
    if not other:
        return
    prefix = "".join(removed) + other
    problem = f"the weights are two networks, one of names that begin with {to_text(prefix)!r}"
    choice = f"take that one by {show_entry(prefix.removesuffix('.'))}"
    if strict:
        raise ValueError(f"{problem}: {choice}, or the other one by strict=False (--partial)")
    warnings.warn(f"{problem}: the other one is taken; {choice}", stacklevel=3)


def _warn_of_statistics(report: Report) -> None:
    """Warns if the running statistics of a network are not those of its weights."""
    if count := count_missing_statistics(report):
        warnings.warn(
            f"{count} running means and variances are missing, without which the network predicts "
            "wrongly: save the whole state_dict(), not parameters() alone",
            stacklevel=3,
        )


def count_missing_statistics(report: Report) -> int:
    """Counts the running statistics that a file lacks, in which the weights of a network are."""
    if not report.transferred:
        return 0
    return sum(path.startswith("batch_stats/") for path in report.missing)


def _warn_of_unusable(values: Mapping[str, Any], report: Report) -> None:
    """Warns if transferred arrays hold what no sound training writes."""
    total = len(report.transferred)
    names = [name for name, path in report.transferred if not np.isfinite(values[path]).all()]
    if names:
        warnings.warn(
            f"{len(names)} of {total} arrays hold NaN or infinity, such as "
            f"{list_some(names, count=2)}: the training that wrote them has diverged, or their "
            "dtype was too narrow",
            stacklevel=3,
        )
    weights = [value for path, value in values.items() if not path.startswith("batch_stats/")]
    # Biases alone may be 0.
    if any(value.ndim > 1 for value in weights) and not any(value.any() for value in weights):
        warnings.warn(
            f"all {len(weights)} arrays of weights are 0, with which a network computes nothing: "
            "copy or convert the file again",
            stacklevel=3,
        )
    # NaN compares as False, so that it is named once.
    names = [name for name, path in report.transferred if _is_negative_variance(path, values[path])]
    if names:
        warnings.warn(
            f"{len(names)} of {total} arrays are running variances below 0, such as "
            f"{list_some(names, count=2)}, whose square root is NaN: no training writes them, so "
            "copy or convert the file again",
            stacklevel=3,
        )


def _is_negative_variance(path: str, value: np.ndarray) -> bool:
    collection, *_, name = path.split("/")
    return collection == "batch_stats" and name == "var" and bool((value < 0).any())


def to_torch(variables: dict, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Converts the variables of a model to a PyTorch state dict: the inverse of `from_torch`.

    Entries that the rules leave out, such as BatchNorm's `num_batches_tracked`, are not created.
    `load_state_dict(strict=True)` accepts a state dict without them if it has no metadata, as here.

    Args:
        variables: The model's variables.
        rules: The module's `torch_rules()`.

    Returns:
        Contiguous copies by name, for `{name: torch.from_numpy(array) for name, array in ...}`.

    Raises:
        ValueError: If no rule names a variable, or the layout of a rule does not fit its shape.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> from jaxkd.transfer import Rule
        >>> from jaxkd.weights import to_torch
        >>> rules = (Rule("fc.weight", "params/logits/kernel", layout.DENSE),)
        >>> state_dict = to_torch({"params": {"logits": {"kernel": np.ones((64, 10))}}}, rules)
        >>> state_dict["fc.weight"].shape
        (10, 64)
    """
    rules = check_rules(rules)
    leaves = leaves_by_path(variables)
    names = {path: rename_back(path, rules) for path in leaves}
    if unnamed := [path for path, (_, rule) in names.items() if rule is None]:
        raise ValueError(
            f"no rule gives these variables a name in PyTorch: {list_some(unnamed)}; add rules"
        )
    return {
        str(name): _convert_layout(path, leaves[path], rule)
        for path, (name, rule) in names.items()
        if rule is not None
    }


def save_torch(path: str | os.PathLike, variables: dict, rules: Iterable[Rule]) -> None:
    """Saves variables under their PyTorch names as a safetensors file.

    PyTorch loads it with `model.load_state_dict(safetensors.torch.load_file(path))`. The same
    variables give the same bytes.

    Args:
        path: The file. Its folder must exist.
        variables: The model's variables.
        rules: The module's `torch_rules()`.

    Raises:
        ValueError: As for `to_torch`.
        ImportError: If safetensors is missing.
    """
    with add_install_command():
        from safetensors.numpy import save

    # transformers rejects files without this entry. More entries would be written in an order that
    # changes between processes.
    write_atomically(path, save(to_torch(variables, rules), metadata={"format": "pt"}))


def _has_own_names(weights: Mapping[str, Any], variables: Mapping[str, Any]) -> bool:
    """True if every name is a path in the collections of the variables, such as `params/...`."""
    collections = tuple(f"{collection}/" for collection in variables)
    return bool(weights) and all(name.startswith(collections) for name in weights)


def _read_file(path: Path, entry: str | None) -> dict[str, np.ndarray]:
    if not is_safetensors(path):
        return _find_state_dict(path, read_torch(path), entry)
    return _select_names(path, read_safetensors(path), entry)


def _select_names(path: Path, weights: dict[str, np.ndarray], entry: str | None) -> dict:
    """Returns the arrays whose names begin with an entry, without it, or all of them."""
    selected = weights if entry is None else _descend(weights, entry.removesuffix("."))
    if not isinstance(selected, dict):
        raise ValueError(
            f"{path} is a safetensors file, which has no entries: leave out "
            f"{show_entry(entry)}, or give what some of its names begin with"
        )
    return selected


def _read_shards(index: Path, entry: str | None) -> dict[str, np.ndarray]:
    """Reads all shards of an index and checks that each array is where the index places it."""
    weights: dict[str, np.ndarray] = {}
    for shard, names in read_index(index).items():
        arrays = _read_file(shard, None)
        if absent := [name for name in names if name not in arrays]:
            raise ValueError(f"{shard} lacks {list_some(absent)} of its index: copy it again")
        if twice := [name for name in arrays if name in weights]:
            raise ValueError(
                f"{shard} has {list_some(twice)}, which another shard has too: copy them again"
            )
        weights |= arrays
    return _select_names(index, weights, entry)


def is_safetensors(path: Path) -> bool:
    """True if the file begins with a JSON header of a length that fits into the file."""
    with open(path, "rb") as file:
        length = file.read(8)
        brace = file.read(1)
    return brace == b"{" and int.from_bytes(length, "little") <= path.stat().st_size


def _find_state_dict(path: Path, tree: Any, entry: str | None) -> dict[str, np.ndarray]:
    """Returns the dict of arrays in a checkpoint."""
    entries = tree if isinstance(tree, dict) else {}
    if entry is not None:
        return _select_entry(path, entries, entry)
    candidates = [name for name, value in entries.items() if not _describe_content(value)]
    # A dict with other values, such as the state of a scheduler, counts only if it is larger.
    largest = max((len(entries[name]) for name in candidates), default=0)
    candidates += [
        name
        for name, value in entries.items()
        if _is_mostly_arrays(value) and _num_arrays(value) > largest
    ]
    if len(candidates) > 1:
        raise ValueError(
            f"{path} has weights in the entries {list_some(map(repr, candidates))}: choose one, "
            f"as in {show_entry(candidates[0])}"
        )
    if not candidates:
        return _check_state_dict(f"{path} has no dict of arrays", tree)
    (name,) = candidates
    # Beside the entry there may be some statistics, but not as many weights again: the wrong ones
    # would fit as well as the right ones.
    num_others = _num_arrays(entries)
    if num_others > max(4, len(entries[name]) // 2):
        raise ValueError(
            f"{path} has {num_others} arrays, and weights in the entry {to_text(name)!r}: choose "
            f"those by {show_entry(name)}, or save only the weights"
        )
    return _check_state_dict(f"the entry {to_text(name)!r} of {path}", entries[name])


def _select_entry(path: Path, entries: dict, entry: str) -> dict[str, np.ndarray]:
    """Returns an entry of a checkpoint, or the arrays whose names begin with it, without it."""
    name = entry.removesuffix(".")
    selected = _descend(entries, name)
    if selected is None:
        # In the only state dict, whose own entry need not be named.
        states = [value for value in entries.values() if not _describe_content(value)]
        selected = _descend(states[0], name) if len(states) == 1 else None
    if selected is None:
        names = list_some(map(repr, entries)) or "none"
        raise ValueError(f"{path} has no entry {to_text(entry)!r}; its entries: {names}")
    return _check_state_dict(
        f"the entry {to_text(entry)!r} of {path} is not a dict of arrays",
        selected,
        f"{name}.",
    )


def _descend(node: dict, name: str) -> Any:
    """Returns what is at some keys, joined by ".", or the values of names that begin with them."""
    if name in node:
        return node[name]
    for key, value in node.items():
        # Each key may contain ".", so it is compared as a whole.
        if isinstance(key, str) and isinstance(value, dict) and name.startswith(f"{key}."):
            found = _descend(value, name.removeprefix(f"{key}."))
            if found is not None:
                return found
    prefix = f"{name}."
    names = [key for key in node if isinstance(key, str) and key.startswith(prefix)]
    return {key.removeprefix(prefix): node[key] for key in names} or None


def _check_state_dict(problem: str, node: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns a dict of arrays, without the few other values that lie between many arrays.

    Raises `ValueError(problem)`, with what the value contains, if it is none. `prefix` are the keys
    that lead to it.
    """
    content = _describe_content(node)
    if not content:
        return node
    values = node.values() if isinstance(node, dict) else ()
    opaque = [value.name for value in values if type(value) is OpaqueObject]
    # Also between arrays: what is left over would be a part of the network.
    if any(map(is_quantized_type, opaque)):
        raise ValueError(f"{problem}: it contains {content}: {DEQUANTIZE_ADVICE}")
    if not _is_mostly_arrays(node):
        advice = f": {SAVE_ADVICE}"
        if nested := _find_nested(node):
            advice = f": choose what is below, as in {show_entry(prefix + nested)}"
        raise ValueError(f"{problem}: it contains {content}{advice}")
    warnings.warn(f"left out what is no array between the weights: {content}", stacklevel=4)
    return {name: value for name, value in node.items() if isinstance(value, np.ndarray)}


def _find_nested(node: Any, depth: int = 2) -> str:
    """Returns the keys, joined by ".", of the first dict of arrays below a dict, or ""."""
    entries = node.items() if isinstance(node, dict) else ()
    for key, value in entries:
        if isinstance(key, str) and isinstance(value, dict):
            if not _describe_content(value):
                return key
            if depth and (rest := _find_nested(value, depth - 1)):
                return f"{key}.{rest}"
    return ""


def _is_mostly_arrays(node: Any) -> bool:
    if not isinstance(node, dict) or not all(isinstance(name, str) for name in node):
        return False
    return 2 * _num_arrays(node) > len(node)


def _num_arrays(node: dict) -> int:
    return sum(isinstance(value, np.ndarray) for value in node.values())


def _describe_content(node: Any) -> str:
    """Describes what makes a value differ from a state dict, or returns "" for a state dict."""
    if not isinstance(node, dict):
        return f"a value of type {_kind(node)}"
    if not node:
        return "nothing"
    kinds = {
        name: _kind(value) for name, value in node.items() if not isinstance(value, np.ndarray)
    }
    kinds |= {name: "not a string" for name in node if not isinstance(name, str)}
    descriptions = [f"{to_text(name)!r} ({kind})" for name, kind in [*kinds.items()][:5]]
    text = ", ".join(descriptions) + (", ..." if len(kinds) > 5 else "")
    return to_text(text, length=150)


def _kind(value: Any) -> str:
    return to_text(value.name) if type(value) is OpaqueObject else type(value).__name__


def _convert_layout(path: str, leaf: Any, rule: Rule) -> np.ndarray:
    """Returns a copy of an array in PyTorch's layout."""
    array = np.asarray(leaf)
    try:
        array = array if rule.layout is None else rule.layout.to_torch(array)
    except ValueError as error:
        raise ValueError(f"{path} -> {rule.source}: {error}") from error
    # A copy even if nothing moved: np.asarray of a jax.Array is a read-only view of its buffer.
    return np.array(array, order="C")
