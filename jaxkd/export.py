"""The student alone: its weights, and its program, in files that need nothing of this package."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from jaxkd.checkpoints import read_safetensors, write_atomically

if TYPE_CHECKING:
    from jaxkd.models.model import Model


def save_safetensors(path: str | os.PathLike, variables: dict) -> None:
    """Saves variables as a safetensors file, which any framework reads and which runs no code.

    Names are paths, such as `params/conv1/kernel`. The same variables give the same bytes.

    Args:
        path: The file; its folder exists.
        variables: Nested dicts of arrays. Integer keys, which NNX gives to the members of a list, are kept.

    Raises:
        ValueError: If a key holds a `/` or is a string of digits, and so would not come back as it was.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from jaxkd import export
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "student.safetensors"
        ...     export.save_safetensors(path, {"params": {"dense": {"kernel": np.ones((2, 3))}}, "batch_stats": {}})
        ...     variables = export.load_safetensors(path)
        >>> variables["params"]["dense"]["kernel"].shape, variables["batch_stats"]
        ((2, 3), {})

    References:
        The format, https://github.com/huggingface/safetensors
    """
    from safetensors.numpy import save

    # No metadata: the order in which safetensors writes several entries differs from one process to the next.
    write_atomically(path, save({name: np.ascontiguousarray(leaf) for name, leaf in _flatten(variables).items()}))


def load_safetensors(path: str | os.PathLike) -> dict:
    """Loads what `save_safetensors` wrote.

    Args:
        path: The file.

    Returns:
        Nested dicts of NumPy arrays, with `params` and `batch_stats` even where they are empty.

    Raises:
        ValueError: If the file is damaged or something else than safetensors.
    """
    return {"params": {}, "batch_stats": {}} | _nest(read_safetensors(path))


def save_program(path: str | os.PathLike, model: "Model", variables: dict, example: jax.ShapeDtypeStruct) -> None:
    """Saves a model as one program, with its weights inside, for CPU, CUDA and TPU and for batches of any size.

    It maps inputs `[B, ...]` to logits `[B, C]` as in prediction. Whoever runs it needs JAX and flatbuffers alone::

        from pathlib import Path
        from jax import export
        program = export.deserialize(bytearray(Path("student.jaxexport").read_bytes()))
        logits = program.call(images)

    The same variables give the same bytes on one version of JAX; later versions read them for at least six months.

    Args:
        path: The file; its folder exists.
        model: The model, whose computation does not branch on the size of the batch.
        variables: Its variables.
        example: Shape and dtype of one input, without the axis of the batch.

    Raises:
        ImportError: If the package flatbuffers is missing.

    Example:
        >>> import pathlib, tempfile
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd import export
        >>> from jaxkd.models import CNN, from_linen
        >>> model, images = from_linen(CNN(features=(4,), hidden=8)), jnp.zeros((3, 8, 8, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "student.jaxexport"
        ...     export.save_program(path, model, variables, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
        ...     program = jax.export.deserialize(bytearray(path.read_bytes()))
        >>> program.call(images).shape
        (3, 10)

    References:
        Exporting and serializing, https://docs.jax.dev/en/latest/export/export.html
    """
    # On the host first: weights that lie on several devices would tie the program to as many.
    weights = jax.tree.map(np.asarray, variables)

    def logits(inputs: Array) -> Array:
        return model.apply(jax.tree.map(jnp.asarray, weights), inputs, train=False)[0].logits

    batch = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *example.shape), example.dtype)
    write_atomically(path, bytes(_export_without_paths(logits, batch).serialize()))


def _export_without_paths(function: Callable[[Array], Array], batch: jax.ShapeDtypeStruct) -> export.Exported:
    """Exports a program that does not tell the folders and lines of the source it was traced from."""
    flags: Any = jax.config
    limit = flags.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(batch)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)


def _flatten(tree: dict, prefix: str = "") -> dict[str, Array]:
    leaves = {}
    for key, value in tree.items():
        if isinstance(key, str) and ("/" in key or key.isdigit()):
            raise ValueError(f"the key {key!r} in {prefix or 'the variables'} would not come back as it is; rename it")
        leaves |= _flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
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
