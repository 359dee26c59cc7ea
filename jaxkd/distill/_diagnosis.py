"""Finds the cause of a loss that is not finite: labels, inputs, teachers or weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd._messages import shorten
from jaxkd.data.records import scannable
from jaxkd.distill._requirements import named_arrays
from jaxkd.evaluate import describe_labels
from jaxkd.models.model import Model

MAX_SUSPECTS = 8
"""Largest number of labels out of range that are tried before the first step."""
MAX_TEACHER_EXAMPLES = 2048
"""Number of examples for which the logits of a teacher are searched for NaN."""


def has_unknown_labels(model: Model, examples: Mapping[str, Any]) -> bool:
    """Returns whether a label of the examples is no class of a model."""
    num_classes = count_classes(model, examples["inputs"])
    return bool(describe_labels(examples["labels"], num_classes))


def count_classes(model: Model, inputs: Any) -> int:
    """Returns the size of the last axis of a model's logits. Nothing is computed."""
    leaves, structure = jax.tree.flatten(inputs)
    shapes = tuple((np.shape(leaf)[1:], jnp.result_type(leaf)) for leaf in leaves)
    return _count_classes(model, structure, shapes)


# Stages and seeds share a model, and tracing a large one takes a second.
@functools.lru_cache(maxsize=256)
def _count_classes(model: Model, structure: Any, shapes: tuple) -> int:
    leaves = [jax.ShapeDtypeStruct((1, *shape), dtype) for shape, dtype in shapes]
    inputs = jax.tree.unflatten(structure, leaves)
    try:
        variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
    # Of initial weights whose scale is that of no units, in older versions of JAX.
    except ZeroDivisionError as error:
        raise ValueError(
            "a layer of a model has no units: give each of its layers at least one unit"
        ) from error
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        # Checkpoints hold none, and the network would not see its inputs.
        if not leaf.size:
            raise ValueError(
                f"a model has an array {jax.tree_util.keystr(path)} of the shape "
                f"{list(leaf.shape)}: give each of its layers at least one unit"
            )
    outputs, _ = jax.eval_shape(functools.partial(model.apply, train=False), variables, inputs)
    return outputs.logits.shape[-1]


def get_labels(examples: Mapping[str, Any]) -> np.ndarray | None:
    """Returns the labels, or `None` if there are none or they are not integers.

    Those of a sample stand for streamed ones.
    """
    labels: Any = scannable(examples.get("labels"))
    return np.asarray(labels) if np.ndim(labels) and _is_integer(labels) else None


def find_unknown_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns an example for each of the first labels that are no class of the student."""
    # An example may have a label for each of its tokens.
    flat = labels.reshape(-1)
    positions = np.flatnonzero((flat < 0) | (flat >= num_classes))
    _, first = np.unique(flat[positions], return_index=True)
    rows = positions[first[:MAX_SUSPECTS]] // max(flat.size // len(labels), 1)
    return np.unique(rows)


def replace_unknown_labels(labels: np.ndarray, num_classes: int, *, shift: int = 0) -> np.ndarray:
    """Returns labels of which all are classes.

    An unknown one becomes the class at which an array would be read: −1 the last one, and one that
    is too large the last one as well. `shift` takes another class than that.
    """
    read_at = np.clip(np.where(labels < 0, labels + num_classes, labels), 0, num_classes - 1)
    is_unknown = (labels < 0) | (labels >= num_classes)
    replaced = np.where(is_unknown, (read_at + shift) % num_classes, labels)
    return replaced.astype(labels.dtype)


def find_extreme_tokens(inputs: Any) -> np.ndarray:
    """Returns the examples with the smallest and the largest numbers in arrays of integers.

    Bytes, such as the pixels of images, are passed over. Those of a sample stand for streamed ones.
    """
    rows = []
    for array in jax.tree.leaves(scannable(inputs)):
        if _is_integer(array) and array.dtype.itemsize > 1 and array.size:
            by_example = np.asarray(array).reshape(len(array), -1)
            rows += [int(by_example.min(1).argmin()), int(by_example.max(1).argmax())]
    return np.unique(np.array(rows, int))


def describe_tokens(inputs: Any) -> str:
    """Describes the range of integers in the inputs; an empty string if they have none."""
    arrays = [array for array in jax.tree.leaves(scannable(inputs)) if _is_integer(array)]
    if not arrays:
        return ""
    smallest, largest = min(a.min() for a in arrays), max(a.max() for a in arrays)
    return f"the tokens of its inputs, from {smallest} to {largest}"


def find_cause(
    examples: Mapping[str, Any],
    teachers: Mapping[str, dict],
    teacher_logits: Mapping[str, Any],
) -> str:
    """Describes why a loss is not finite, or returns an empty string if there is nothing to see.

    Args:
        examples: The examples of the stage.
        teachers: The variables of each teacher, by name.
        teacher_logits: Logits of each teacher, for the first examples at least.

    Returns:
        A clause that names the cause.
    """
    for name, array in named_arrays(scannable(examples)):
        if rows := _find_bad_rows(array):
            return f"{_count_rows(rows, len(array))} of its {name!r} hold NaN or infinity"
    for name, variables in teachers.items():
        if count_not_finite(variables):
            return f"the weights of its teacher {name!r} hold NaN or infinity"
    for name, logits in teacher_logits.items():
        # A class at −inf is ruled out, which is no fault.
        if rows := _find_bad_rows(np.where(np.asarray(logits) == -np.inf, 0, logits)):
            return (
                f"{_count_rows(rows, len(logits))} have logits of its teacher {name!r} that are "
                "NaN or infinite"
            )
    return ""


def explain_nan_logits(examples: Mapping[str, Any], variables: Any) -> str:
    """Describes why the logits of a model are NaN: its inputs, its weights, or unknown tokens.

    Args:
        examples: `inputs`, and whatever else the split holds.
        variables: The variables of the model.

    Returns:
        A clause that names the cause and the remedy.
    """
    if cause := find_cause({"inputs": examples["inputs"]}, {}, {}):
        return f"{cause}: clean them"
    if count := count_not_finite(variables):
        return (
            f"{count:,} of its weights are NaN or infinite: train it with a smaller learning rate"
        )
    if len(find_extreme_tokens(examples["inputs"])):
        tokens = describe_tokens(examples["inputs"])
        return f"is one of {tokens}, outside of the vocabulary of its model?"
    return "inputs and weights are finite: evaluate the model on one batch"


def describe_ranges(examples: Mapping[str, Any]) -> str:
    """Describes the scalars of the examples and the range of their inputs, for a closer look.

    A temperature of 0 or a pixel beyond the scale of the model makes every loss NaN.
    """
    examples = scannable(examples)
    scalars = [f"{name!r} is {array}" for name, array in examples.items() if not np.ndim(array)]
    ranges = [
        f"{name!r} are from {np.min(array):.4g} to {np.max(array):.4g}"
        for name, array in named_arrays({"inputs": examples["inputs"]})
        if _is_floating(_get_dtype(array)) or _is_integer(array)
    ]
    return shorten("; ".join([*scalars, *ranges]), 120)


def count_not_finite(variables: Any) -> int:
    """Counts the numbers in variables that are NaN or infinite."""
    # In NumPy: JAX would compile a program for each shape.
    leaves = map(np.asarray, jax.tree.leaves(variables))
    return sum(
        int(np.count_nonzero(~np.isfinite(leaf)))
        for leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    )


def _is_integer(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.integer)


def _is_floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _get_dtype(array: Any) -> Any:
    return array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype


def _find_bad_rows(array: Any) -> list[int]:
    """Returns the examples of a floating-point array that hold NaN or infinity."""
    if not np.ndim(array) or not jnp.issubdtype(getattr(array, "dtype", int), jnp.floating):
        return []
    finite = np.isfinite(np.asarray(array))
    return np.flatnonzero(~finite.reshape(len(array), -1).all(1)).tolist()


def _count_rows(rows: Sequence[int], total: int) -> str:
    return f"{len(rows):,} of {total:,} examples (the first is number {rows[0]})"
