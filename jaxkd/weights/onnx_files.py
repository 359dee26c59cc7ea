"""Saving of a model as an ONNX file, which ONNX Runtime and other engines run without JAX."""

import contextlib
import importlib
import json
import logging
import os
import warnings
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd._extras import add_install_command
from jaxkd._files import write_atomically
from jaxkd._messages import first_line
from jaxkd.weights.programs import make_logits_fn

if TYPE_CHECKING:
    from jaxkd.models.model import Model

INPUT, OUTPUT = "inputs", "logits"
"""Names of the input and the output."""
_TOLERANCE = 1e-4


def save_onnx(
    path: str | os.PathLike,
    model: "Model",
    variables: dict,
    example: jax.ShapeDtypeStruct,
    *,
    max_length: int | None = None,
    class_names: Sequence[str] = (),
) -> None:
    """Saves a model as an ONNX file for batches of any size.

    The file has one input, `inputs` `[B, ...]`, and one output, `logits` `[B, C]`, in prediction
    mode. jax2onnx converts the model; `pip install 'jaxkd-distill[onnx]'` installs it.

    Args:
        path: The file. Its folder must exist.
        model: The model. Its computation must not branch on the batch size.
        variables: The model's variables.
        example: Shape and dtype of one input, without the batch axis.
        max_length: For texts `[B, S]`: the file takes any number of tokens up to this one. By
            default it takes that of the example.
        class_names: Name of each class, by label, which become a JSON list in the entry
            `class_names` of the file's metadata.

    Raises:
        ValueError: If an operation of the model cannot be converted, which the message names; or if
            ONNX Runtime computes other logits than the model.
        ImportError: If jax2onnx is missing.

    References:
        The format, https://onnx.ai; the converter, https://github.com/enpasos/jax2onnx
    """
    with add_install_command("onnx"):
        # By name, since a type checker need not have it.
        to_onnx = importlib.import_module("jax2onnx").to_onnx

    logits_fn, batch = make_logits_fn(
        model, variables, example, max_length=max_length, axes=("B", "S")
    )
    try:
        with warnings.catch_warnings(), _without_messages("onnx_ir"):
            # The converter asks for float64, which JAX makes float32.
            warnings.filterwarnings("ignore", "Explicitly requested dtype")
            converted = to_onnx(
                logits_fn, inputs=[batch], input_names=[INPUT], output_names=[OUTPUT]
            )
    # The converter raises errors of many types for what it lacks.
    except Exception as error:
        raise ValueError(
            f"this model cannot be converted to ONNX: {_find_operation(error)} failed "
            f"({first_line(error)}); choose another format or network"
        ) from error
    content = converted.SerializeToString(deterministic=True)
    _check_logits(content, jax.jit(logits_fn), example, max_length)
    if class_names:
        entry = converted.metadata_props.add()
        entry.key, entry.value = "class_names", json.dumps([*class_names])
    write_atomically(path, converted.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _without_messages(logger_name: str) -> Generator[None]:
    """Silences a logger below errors: the converter's warns of what the runtime infers itself."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_logits(
    content: bytes, logits_fn: Any, example: jax.ShapeDtypeStruct, max_length: int | None
) -> None:
    """Raises `ValueError` unless ONNX Runtime computes the model's logits."""
    # A requirement of the converter.
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for count in (1, 3):
        shape = example.shape if max_length is None else (min(max_length, 8 + count),)
        if jnp.issubdtype(example.dtype, jnp.floating):
            inputs = rng.random((count, *shape), np.float32).astype(example.dtype)
        else:
            # Small numbers are tokens of every vocabulary; 0 is padding.
            largest = 256 if max_length is None else 5
            inputs = rng.integers(1, largest, (count, *shape)).astype(example.dtype)
            inputs[:, -1] = 0
        (logits,) = session.run([OUTPUT], {INPUT: inputs})
        expected = np.asarray(logits_fn(jnp.asarray(inputs)))
        difference = float(np.abs(logits - expected).max())
        if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise ValueError(
                f"the converted model computes other logits, by up to {difference:.2g}: choose "
                "another format or network"
            )


def _find_operation(error: Exception) -> str:
    """Names the operation of JAX that was being converted."""
    operation = "an operation"
    trace = error.__traceback__
    while trace is not None:
        equation = trace.tb_frame.f_locals.get("eqn")
        # The innermost one, since operations such as loops hold others.
        if hasattr(equation, "primitive"):
            operation = f"the operation {equation.primitive.name}"
        trace = trace.tb_next
    return operation
