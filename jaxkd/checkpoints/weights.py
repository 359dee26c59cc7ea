"""PyTorch's weights as a model's variables, and back."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxkd.checkpoints.pickles import read_torch
from jaxkd.checkpoints.store import write_atomically
from jaxkd.transfer import Report, Rule, leaves_by_path, rename_back, transfer


def load_weights(path: str | os.PathLike, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Loads the named arrays of a file: of PyTorch in either of its formats, or of safetensors.

    Which it is, its content tells. No code of the file runs. Of a training's checkpoint the state dict is taken, if
    there is one; `module.`, which `DataParallel` puts before every name, is left out where every name begins with it.

    Args:
        path: The file.
        entry: Which of a checkpoint's entries to take, where several hold weights, such as "state_dict" or "ema".

    Returns:
        Arrays by name, in the order of the file; they may be read-only.

    Raises:
        ValueError: If the file is none of these, is damaged, holds objects that only code can make, or does not have
            exactly one dict of arrays, or not this entry.
        OSError: If there is no such file, or it cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from jaxkd import export
        >>> from jaxkd.checkpoints.weights import load_weights
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "student.safetensors"
        ...     export.save_safetensors(path, {"params": {"logits": {"bias": np.zeros(10)}}})
        ...     weights = load_weights(path)
        >>> {name: array.shape for name, array in weights.items()}
        {'params/logits/bias': (10,)}
    """
    if _is_safetensors(path):
        if entry is not None:
            raise ValueError(f"{path} is a safetensors file, which has no entries: leave out entry={entry!r}")
        weights = read_safetensors(path)
    else:
        weights = _state_dict(path, read_torch(path), entry)
    if weights and all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): array for name, array in weights.items()}
    return weights


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a safetensors file as it is.

    Args:
        path: The file.

    Returns:
        Arrays by name.

    Raises:
        ValueError: If the file is damaged or something else than safetensors, or if NumPy has no type for its numbers.
        OSError: If there is no such file, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Not safetensors.numpy.load, which writes bfloat16 but cannot read it.
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or save it anew") from error
    except AttributeError as error:
        raise ValueError(f"{path} holds numbers that NumPy has no type for ({error}): save them as float32") from error


def from_torch(
    state_dict: Mapping[str, Any], variables: dict, rules: Iterable[Rule], *, strict: bool = True
) -> tuple[dict, Report]:
    """Gives a model the weights that it has in PyTorch.

    Rules say how each array is laid out, by the kind of its layer; shapes never decide. Floating-point weights of
    another precision take that of the model.

    Args:
        state_dict: PyTorch's names and arrays, as `load_weights` returns them.
        variables: The model's, whose values are not needed: `jax.eval_shape(model.init, key, inputs)` is enough.
        rules: The module's `torch_rules()`.
        strict: Whether every weight must find its place and every place its weight. If not, variables keep the values
            that they have where there is none.

    Returns:
        New variables, and the report of what went where.

    Raises:
        TransferError: If something is missing, unexpected or of another shape; its `report` holds all of it.
        ValueError: If the rules make no sense; see `jaxkd.transfer.transfer`.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jaxkd import layout
        >>> from jaxkd.checkpoints.weights import from_torch
        >>> from jaxkd.transfer import Rule
        >>> variables = {"params": {"kernel": jax.ShapeDtypeStruct((64, 10), jnp.float32)}}
        >>> rules = (Rule("fc.weight", "params/kernel", layout.DENSE), Rule("{any...}.num_batches_tracked", None))
        >>> variables, report = from_torch({"fc.weight": np.ones((10, 64), np.float16)}, variables, rules)
        >>> variables["params"]["kernel"].shape, variables["params"]["kernel"].dtype, report.complete
        ((64, 10), dtype('float32'), True)
    """
    return transfer(dict(state_dict), variables, rules=rules, strict=strict, dtypes="target")


def to_torch(variables: dict, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """A model's variables under PyTorch's names and in its layouts: the inverse of `from_torch`.

    What the rules leave out, such as the number of batches that a BatchNorm has seen, is not made up; a state dict
    without metadata, as this is, may lack it even where `load_state_dict` is strict.

    Args:
        variables: The model's variables.
        rules: The module's `torch_rules()`.

    Returns:
        Arrays by name: copies, contiguous, for `{name: torch.from_numpy(array) for name, array in ...}`.

    Raises:
        ValueError: If there are variables to which no rule gives a name, or whose shape a rule does not fit.

    Example:
        >>> import numpy as np
        >>> from jaxkd import layout
        >>> from jaxkd.checkpoints.weights import to_torch
        >>> from jaxkd.transfer import Rule
        >>> rules = (Rule("fc.weight", "params/logits/kernel", layout.DENSE),)
        >>> state_dict = to_torch({"params": {"logits": {"kernel": np.ones((64, 10))}}}, rules)
        >>> state_dict["fc.weight"].shape
        (10, 64)
    """
    rules, leaves = tuple(rules), leaves_by_path(variables)
    names = {path: rename_back(path, rules) for path in leaves}
    if unnamed := [path for path, (_, rule) in names.items() if rule is None]:
        raise ValueError(f"no rule gives these variables a name in PyTorch: {', '.join(unnamed)}")
    return {str(name): _laid_out(path, leaves[path], rule) for path, (name, rule) in names.items() if rule is not None}


def save_torch(path: str | os.PathLike, variables: dict, rules: Iterable[Rule]) -> None:
    """Saves variables under PyTorch's names, for `model.load_state_dict(safetensors.torch.load_file(path))`.

    The same variables give the same bytes.

    Args:
        path: The file, of safetensors; its folder exists.
        variables: The model's variables.
        rules: The module's `torch_rules()`.

    Raises:
        ValueError: As `to_torch` does.
    """
    from safetensors.numpy import save

    # Transformers reads no file that does not say so; more entries would be written in an order that changes.
    write_atomically(path, save(to_torch(variables, rules), metadata={"format": "pt"}))


def _is_safetensors(path: str | os.PathLike) -> bool:
    """Whether a header in JSON, of a length that the file can have, comes first."""
    if Path(path).is_dir():
        return False
    with open(path, "rb") as file:
        length, brace = file.read(8), file.read(1)
    return brace == b"{" and int.from_bytes(length, "little") <= Path(path).stat().st_size


def _state_dict(path: str | os.PathLike, tree: Any, entry: str | None) -> dict[str, np.ndarray]:
    """The dict of arrays in a checkpoint."""
    entries = tree if isinstance(tree, dict) else {}
    if entry is not None and entry not in entries:
        raise ValueError(f"{path} has no entry {entry!r}; it has {', '.join(map(repr, entries)) or 'none'}")
    if entry is not None:
        if others := _others(entries[entry]):
            raise ValueError(f"the entry {entry!r} of {path} is no dict of arrays, it holds {others}")
        return entries[entry]
    if not _others(tree):
        return tree
    found = [name for name, value in entries.items() if not _others(value)]
    if len(found) > 1:
        listed = ", ".join(map(repr, found))
        raise ValueError(f"{path} holds weights in the entries {listed}: choose one by entry={found[0]!r}")
    if not found:
        raise ValueError(f"{path} holds no dict of arrays, but {_others(tree)}")
    return entries[found[0]]


def _others(node: Any) -> str:
    """What keeps a value from being a state dict, in words; nothing if it is one."""
    if not isinstance(node, dict):
        return f"a {type(node).__name__}"
    if not node:
        return "nothing"
    kinds = {name: type(value).__name__ for name, value in node.items() if not isinstance(value, np.ndarray)}
    kinds |= {name: "no name" for name in node if not isinstance(name, str)}
    listed = [f"{name!r} ({kind})" for name, kind in kinds.items()]
    return ", ".join([*listed[:5], *(["..."] if len(listed) > 5 else [])])


def _laid_out(path: str, leaf: Any, rule: Rule) -> np.ndarray:
    """A copy in PyTorch's layout."""
    try:
        array = np.asarray(leaf) if rule.layout is None else rule.layout.to_torch(np.asarray(leaf))
    except ValueError as error:
        raise ValueError(f"{path} -> {rule.source}: {error}") from error
    return np.array(array, order="C")
