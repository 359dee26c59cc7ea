"""Saving of a model as one serialized program that contains its weights."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from jaxkd._extras import add_install_command
from jaxkd._files import write_atomically

if TYPE_CHECKING:
    from jaxkd.models.model import Model


def save_program(
    path: str | os.PathLike,
    model: "Model",
    variables: dict,
    example: jax.ShapeDtypeStruct,
    *,
    max_length: int | None = None,
) -> None:
    """Saves a model as one program for CPU, CUDA and TPU and for batches of any size.

    The program contains the weights. It maps inputs `[B, ...]` to logits `[B, C]` in prediction
    mode. Running it needs only JAX and flatbuffers::

        from pathlib import Path
        from jax import export
        program = export.deserialize(bytearray(Path("student.jaxexport").read_bytes()))
        logits = program.call(images)

    The same variables give the same bytes on one version of JAX. Later versions can read the file
    for at least six months.

    Args:
        path: The file. Its folder must exist.
        model: The model. Its computation must not branch on the batch size.
        variables: The model's variables.
        example: Shape and dtype of one input, without the batch axis.
        max_length: For texts `[B, S]`: the program takes any number of tokens up to this one. By
            default it takes that of the example.

    Raises:
        ImportError: If the package flatbuffers is missing.

    Example:
        >>> import pathlib, tempfile
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.weights import save_program
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(4,), hidden=8))
        >>> images = jnp.zeros((3, 8, 8, 1))
        >>> variables = model.init(jax.random.key(0), images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "student.jaxexport"
        ...     save_program(path, model, variables, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
        ...     program = jax.export.deserialize(bytearray(path.read_bytes()))
        >>> program.call(images).shape
        (3, 10)

    References:
        Exporting and serializing, https://docs.jax.dev/en/latest/export/export.html
    """
    write_atomically(path, serialize_program(model, variables, example, max_length=max_length))


def serialize_program(
    model: "Model",
    variables: dict,
    example: jax.ShapeDtypeStruct,
    *,
    max_length: int | None = None,
) -> bytes:
    """Returns the bytes of a program, see `save_program`."""
    with add_install_command():
        import flatbuffers  # noqa: F401  (jax.export needs it, and says so less clearly)

    logits_fn, batch = make_logits_fn(model, variables, example, max_length=max_length)
    return bytes(_export_without_paths(logits_fn, batch).serialize())


def make_logits_fn(
    model: "Model",
    variables: dict,
    example: jax.ShapeDtypeStruct,
    *,
    max_length: int | None,
    axes: tuple[str, str] = ("b", "s"),
) -> tuple[Callable[[Array], Array], jax.ShapeDtypeStruct]:
    """Makes what is exported: a function with its weights, and the form of its inputs.

    Args:
        model: See `save_program`.
        variables: See `save_program`.
        example: See `save_program`.
        max_length: See `save_program`.
        axes: Names of the axes of any size: that of the batch and that of the tokens.

    Returns:
        `inputs -> logits` in prediction mode, and a batch of inputs of any size.
    """
    # Constants that are sharded over N devices would make a program that runs only on N devices.
    weights = jax.tree.map(np.asarray, variables)

    def logits(inputs: Array) -> Array:
        return model.apply(jax.tree.map(jnp.asarray, weights), inputs, train=False)[0].logits

    batch_axis, token_axis = axes
    if max_length is None:
        shape = (*export.symbolic_shape(batch_axis), *example.shape)
    else:
        # Models of texts take positions of as many tokens at most.
        constraint = f"{token_axis} <= {max_length}"
        shape = export.symbolic_shape(f"{batch_axis}, {token_axis}", constraints=(constraint,))
    return logits, jax.ShapeDtypeStruct(shape, example.dtype)


def _export_without_paths(
    function: Callable[[Array], Array], batch: jax.ShapeDtypeStruct
) -> export.Exported:
    """Exports a program without the source file names and line numbers of its operations."""
    config: Any = jax.config  # the type stubs of older versions lack the attribute
    limit = config.jax_traceback_in_locations_limit
    # Paths would make the bytes depend on where the package is installed, and reveal it.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(batch)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", limit)
