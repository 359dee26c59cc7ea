"""Saving and loading of variables as safetensors files."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
from jax import Array

from jaxkd._extras import add_install_command
from jaxkd._files import write_atomically
from jaxkd._messages import list_some, shorten
from jaxkd.weights.files import RUN_FILE, check_regular_file, to_text
from jaxkd.weights.signatures import describe_other_file
from jaxkd.weights.unfinished import DEQUANTIZE_ADVICE, is_quantized_type

# Of the nested dicts. Functions on trees recurse, and Python allows some thousand levels.
_MAX_DEPTH = 100

_CLASS_NAMES = "class_names"


def save_safetensors(
    path: str | os.PathLike, variables: dict, *, class_names: Sequence[str] = ()
) -> None:
    """Saves variables as a safetensors file, which any framework can read and which runs no code.

    Names are paths, such as `params/conv1/kernel`. The same variables give the same bytes.

    Args:
        path: The file. Its folder must exist.
        variables: Nested dicts of arrays. Integer keys, which NNX gives to the members of a list,
            are restored as integers.
        class_names: Name of each class, by label, for `read_class_names`. They are a JSON list in
            the entry `class_names` of the file's metadata.

    Raises:
        ValueError: If a key is neither a string nor an integer, contains a `/` or is a string of
            digits, because loading would change it, or two classes have one name.
        TypeError: If the names of the classes are no sequence of strings.
        ImportError: If safetensors is missing.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from jaxkd.weights import load_safetensors, save_safetensors
        >>> variables = {"params": {"dense": {"kernel": np.ones((2, 3))}}, "batch_stats": {}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "student.safetensors"
        ...     save_safetensors(path, variables)
        ...     variables = load_safetensors(path)
        >>> variables["params"]["dense"]["kernel"].shape, variables["batch_stats"]
        ((2, 3), {})

    References:
        The format, https://github.com/huggingface/safetensors
    """
    with add_install_command():
        from safetensors.numpy import save

    # `save` writes the memory of an array in the order it has, so a transposed view must be copied.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _flatten(variables).items()}
    # One entry: safetensors writes several in an order that changes between processes.
    names = check_class_names(class_names)
    metadata = {_CLASS_NAMES: json.dumps(names)} if names else None
    write_atomically(path, save(arrays, metadata))


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """Returns the names as a list; raises unless they are different strings in an order."""
    # A string would be the names of its letters, and a set has no order of labels.
    is_iterable = isinstance(class_names, Iterable)
    if isinstance(class_names, str | bytes | Mapping | Set) or not is_iterable:
        names = None
    else:
        names = list(class_names)
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "class_names must be one string per class, in the order of the labels, such as "
            f"['cat', 'dog'], got {shorten(repr(class_names), 80)}"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"class_names has {list_some(twice)} more than once: give each class its own name"
        )
    return names


def read_class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Reads the names of the classes from a safetensors file.

    Args:
        path: A file of `save_safetensors`, or the folder of a run, as for `load_safetensors`.

    Returns:
        Name of each class, in the order of the logits; empty if the file does not name them.

    Raises:
        ValueError: If the file is damaged or is not a safetensors file.
        OSError: If the file does not exist or cannot be read.
        ImportError: If safetensors is missing.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from jaxkd.weights import read_class_names, save_safetensors
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "student.safetensors"
        ...     save_safetensors(path, {"bias": np.zeros(2)}, class_names=("cat", "dog"))
        ...     read_class_names(path)
        ('cat', 'dog')
    """
    with add_install_command():
        from safetensors import SafetensorError, safe_open

    path = _find_in_run(path)
    check_regular_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            names = json.loads((file.metadata() or {}).get(_CLASS_NAMES, "[]"))
    # json raises ValueError, and RecursionError for deeply nested lists.
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(_describe_damage(path, error)) from error
    # Another program may keep something else under this name.
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()


def load_safetensors(path: str | os.PathLike) -> dict:
    """Loads variables that `save_safetensors` saved.

    Args:
        path: The file, or the folder of an experiment's run, which has `student.safetensors`.

    Returns:
        Nested dicts of NumPy arrays. They have `params` and `batch_stats` even if these are empty.

    Raises:
        ValueError: If the file is damaged, is not a safetensors file, or has names that are not
            those of variables, such as PyTorch's, or of parameters without the level `params`.
        OSError: If the file does not exist or cannot be read.
    """
    path = _find_in_run(path)
    leaves = read_safetensors(path)
    # Variables have two levels at least, a collection and a name in it.
    if leaves and not any("/" in name for name in leaves):
        raise ValueError(
            f"{path} has no names of variables, such as params/logits/kernel, but "
            f"{to_text(next(iter(leaves)))!r}: load PyTorch's names with "
            "jaxkd.weights.load_variables"
        )
    # `params` alone, without its level, would be loaded beside `params` that are empty.
    if leaves and not any(name.startswith(("params/", "batch_stats/")) for name in leaves):
        raise ValueError(
            f"{path} has the name {to_text(next(iter(leaves)))!r}, but none below params/: save "
            "the variables as model.init returns them, {'params': params, 'batch_stats': ...}"
        )
    try:
        return {"params": {}, "batch_stats": {}} | _nest(leaves)
    except ValueError as error:
        raise ValueError(f"{path} does not hold variables: {error}") from error


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a safetensors file under the names that they have in it.

    Args:
        path: The file.

    Returns:
        Arrays by name.

    Raises:
        ValueError: If the file is damaged, is not a regular file in the format of safetensors, or
            has arrays that NumPy cannot hold.
        OSError: If the file does not exist or cannot be read.
        ImportError: If safetensors is missing.
    """
    with add_install_command():
        from safetensors import SafetensorError, safe_open

    check_regular_file(path)
    try:
        # safetensors.numpy.save writes bfloat16, but safetensors.numpy.load cannot read it.
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(_describe_damage(path, error)) from error
    # safetensors looks the dtype up as an attribute of NumPy.
    except AttributeError as error:
        is_quantized = is_quantized_type(str(error))
        advice = DEQUANTIZE_ADVICE if is_quantized else "save them as float32"
        raise ValueError(
            f"{path} has arrays of a dtype that NumPy lacks ({error}): {advice}"
        ) from error
    # Such as an array of a hundred axes.
    except (TypeError, ValueError, OverflowError) as error:
        reason = to_text(str(error), length=150)
        raise ValueError(f"{path} has arrays that NumPy cannot hold ({reason})") from error


def _describe_damage(path: str | os.PathLike, error: Exception) -> str:
    """Describes why a file is no safetensors file."""
    if kind := describe_other_file(path):
        return f"{path} is {kind}"
    return (
        f"{path} is not a complete safetensors file ({to_text(str(error), length=150)}): "
        "copy or save it again"
    )


def _find_in_run(path: str | os.PathLike) -> Path:
    """Returns the student of a run's folder, or any other path as it is."""
    path = Path(path)
    return path / RUN_FILE if (path / RUN_FILE).is_file() else path


def _flatten(tree: dict, prefix: str = "") -> dict[str, Array]:
    leaves = {}
    for key, value in tree.items():
        # `_nest` splits names at "/" and reads digits as an integer. A bool is an int, but True is
        # the key 1.
        is_kept = type(key) in (int, str) and "/" not in str(key) and _to_key(str(key)) == key
        if not is_kept:
            raise ValueError(
                f"the key {to_text(key)!r} in {prefix or 'the variables'} would be loaded as "
                "another key: rename it"
            )
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{prefix}{key}/")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _to_key(part: str) -> int | str:
    """Returns the key that a part of a name stands for: digits are an integer, except in "01"."""
    return int(part) if re.fullmatch("0|[1-9][0-9]{0,17}", part) else part


def _nest(leaves: dict[str, np.ndarray]) -> dict:
    tree = {}
    for name, leaf in leaves.items():
        *parents, last = map(_to_key, name.split("/"))
        if len(parents) > _MAX_DEPTH:
            raise ValueError(f"{to_text(name)!r} has more than {_MAX_DEPTH} levels")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        # In whichever order they come, one of the two would replace the other.
        if not isinstance(node, dict) or last in node:
            raise ValueError(
                f"{to_text(name)!r} is an array beside a name above or below it: rename one of them"
            )
        node[last] = leaf
    return tree
