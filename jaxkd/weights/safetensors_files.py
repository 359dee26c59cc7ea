"""Saving and loading of variables as safetensors files."""

import json
import os
from collections.abc import Sequence

import numpy as np
from jax import Array

from jaxkd._files import write_atomically

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
        ValueError: If a key contains a `/` or is a string of digits, because loading would change
            it.

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
    from safetensors.numpy import save

    # `save` writes the memory of an array in the order it has, so a transposed view must be copied.
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _flatten(variables).items()}
    # One entry: safetensors writes several in an order that changes between processes.
    metadata = {_CLASS_NAMES: json.dumps(list(class_names))} if class_names else None
    write_atomically(path, save(arrays, metadata))


def read_class_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Reads the names of the classes from a safetensors file.

    Args:
        path: A file of `save_safetensors`.

    Returns:
        Name of each class, in the order of the logits; empty if the file does not name them.

    Raises:
        ValueError: If the file is damaged or is not a safetensors file.

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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = json.loads((file.metadata() or {}).get(_CLASS_NAMES, "[]"))
    # json raises ValueError, and RecursionError for deeply nested lists.
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}): copy or save it again"
        ) from error
    # Another program may keep something else under this name.
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()


def load_safetensors(path: str | os.PathLike) -> dict:
    """Loads variables that `save_safetensors` saved.

    Args:
        path: The file.

    Returns:
        Nested dicts of NumPy arrays. They have `params` and `batch_stats` even if these are empty.

    Raises:
        ValueError: If the file is damaged or is not a safetensors file.
    """
    return {"params": {}, "batch_stats": {}} | _nest(read_safetensors(path))


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a safetensors file under the names that they have in it.

    Args:
        path: The file.

    Returns:
        Arrays by name.

    Raises:
        ValueError: If the file is damaged, is not a safetensors file, or has a dtype that NumPy
            lacks.
        OSError: If the file does not exist or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # safetensors.numpy.save writes bfloat16, but safetensors.numpy.load cannot read it.
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}): copy or save it again"
        ) from error
    # safetensors looks the dtype up as an attribute of NumPy.
    except AttributeError as error:
        raise ValueError(
            f"{path} has arrays of a dtype that NumPy lacks ({error}): save them as float32"
        ) from error


def _flatten(tree: dict, prefix: str = "") -> dict[str, Array]:
    leaves = {}
    for key, value in tree.items():
        # `_nest` splits names at "/" and reads digits as an integer.
        if isinstance(key, str) and ("/" in key or key.isdigit()):
            raise ValueError(
                f"the key {key!r} in {prefix or 'the variables'} would be loaded as another key: "
                "rename it"
            )
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{prefix}{key}/")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _nest(leaves: dict[str, np.ndarray]) -> dict:
    tree = {}
    for name, leaf in leaves.items():
        *parents, last = (int(part) if part.isdigit() else part for part in name.split("/"))
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree
