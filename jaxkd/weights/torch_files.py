"""Conversion between PyTorch state dicts and variables, and the files that hold state dicts."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd._files import write_atomically
from jaxkd.transfer import Report, Rule, leaves_by_path, rename_back, transfer
from jaxkd.weights.safetensors_files import read_safetensors
from jaxkd.weights.torch_pickle import read_torch


def load_weights(path: str | os.PathLike, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Loads the named arrays of a safetensors file or of a PyTorch file in either of its formats.

    The content decides the format, not the name. No code in the file is run. If the file is a
    training checkpoint with one state dict, that state dict is returned. The prefix `module.`,
    which `DataParallel` adds, is removed if every name has it.

    Args:
        path: The file.
        entry: Entry of the checkpoint to load, such as "state_dict" or "ema". Needed only if
            several entries are state dicts.

    Returns:
        Arrays by name, in the order of the file. They may be read-only.

    Raises:
        ValueError: If the file has none of these formats, is damaged, contains objects that only
            code can make, does not have exactly one dict of arrays, or lacks the entry.
        OSError: If the file does not exist or cannot be read.

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
    if _is_safetensors(path):
        if entry is not None:
            raise ValueError(
                f"{path} is a safetensors file, which has no entries: leave out entry={entry!r}"
            )
        weights = read_safetensors(path)
    else:
        weights = _find_state_dict(path, read_torch(path), entry)
    # Only if all names have it, since a network may have a layer called `module`.
    if weights and all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): array for name, array in weights.items()}
    return weights


def from_torch(
    state_dict: Mapping[str, Any], variables: dict, rules: Iterable[Rule], *, strict: bool = True
) -> tuple[dict, Report]:
    """Converts a PyTorch state dict to the variables of a model.

    The rules give the layout of each array by the kind of its layer; shapes never decide it.
    Floating-point arrays are cast to the dtypes of the variables.

    Args:
        state_dict: PyTorch's names and arrays, as `load_weights` returns them.
        variables: The model's variables. Only shapes and dtypes are needed:
            `jax.eval_shape(model.init, key, inputs)` is enough.
        rules: The module's `torch_rules()`.
        strict: Whether all names must match on both sides. If not, a variable without a matching
            array keeps its value.

    Returns:
        New variables, and a report of what was transferred.

    Raises:
        TransferError: If an array is missing, unexpected or of the wrong shape. Its `report` lists
            all of them.
        ValueError: If the rules are invalid; see `jaxkd.transfer.transfer`.

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
    return transfer(dict(state_dict), variables, rules=rules, strict=strict, dtypes="target")


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
    rules = tuple(rules)
    leaves = leaves_by_path(variables)
    names = {path: rename_back(path, rules) for path in leaves}
    if unnamed := [path for path, (_, rule) in names.items() if rule is None]:
        raise ValueError(f"no rule gives these variables a name in PyTorch: {', '.join(unnamed)}")
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
    """
    from safetensors.numpy import save

    # transformers rejects files without this entry. More entries would be written in an order that
    # changes between processes.
    write_atomically(path, save(to_torch(variables, rules), metadata={"format": "pt"}))


def _is_safetensors(path: str | os.PathLike) -> bool:
    """True if the file begins with a JSON header of a length that fits into the file."""
    if Path(path).is_dir():
        return False
    with open(path, "rb") as file:
        length = file.read(8)
        brace = file.read(1)
    return brace == b"{" and int.from_bytes(length, "little") <= Path(path).stat().st_size


def _find_state_dict(
    path: str | os.PathLike, tree: Any, entry: str | None
) -> dict[str, np.ndarray]:
    """Returns the dict of arrays in a checkpoint."""
    entries = tree if isinstance(tree, dict) else {}
    if entry is not None:
        if entry not in entries:
            names = ", ".join(map(repr, entries)) or "none"
            raise ValueError(f"{path} has no entry {entry!r}; its entries: {names}")
        if content := _describe_content(entries[entry]):
            raise ValueError(
                f"the entry {entry!r} of {path} is not a dict of arrays: it contains {content}"
            )
        return entries[entry]
    if not _describe_content(tree):
        return tree
    candidates = [name for name, value in entries.items() if not _describe_content(value)]
    if len(candidates) > 1:
        names = ", ".join(map(repr, candidates))
        raise ValueError(
            f"{path} has weights in the entries {names}: choose one, as in entry={candidates[0]!r}"
        )
    if not candidates:
        raise ValueError(f"{path} has no dict of arrays: it contains {_describe_content(tree)}")
    return entries[candidates[0]]


def _describe_content(node: Any) -> str:
    """Describes what makes a value differ from a state dict, or returns "" for a state dict."""
    if not isinstance(node, dict):
        return f"a value of type {type(node).__name__}"
    if not node:
        return "nothing"
    kinds = {
        name: type(value).__name__
        for name, value in node.items()
        if not isinstance(value, np.ndarray)
    }
    kinds |= {name: "not a string" for name in node if not isinstance(name, str)}
    descriptions = [f"{name!r} ({kind})" for name, kind in kinds.items()]
    return ", ".join(descriptions[:5]) + (", ..." if len(descriptions) > 5 else "")


def _convert_layout(path: str, leaf: Any, rule: Rule) -> np.ndarray:
    """Returns a copy of an array in PyTorch's layout."""
    array = np.asarray(leaf)
    try:
        array = array if rule.layout is None else rule.layout.to_torch(array)
    except ValueError as error:
        raise ValueError(f"{path} -> {rule.source}: {error}") from error
    # A copy even if nothing moved: np.asarray of a jax.Array is a read-only view of its buffer.
    return np.array(array, order="C")
