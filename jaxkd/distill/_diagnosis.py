"""Finds the cause of a loss that is not finite: labels, inputs, teachers or weights."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd._messages import shorten
from jaxkd.data.mixing import Mixed
from jaxkd.data.records import scannable
from jaxkd.distill._requirements import named_arrays
from jaxkd.distill.plan import Entry, Stage, input_shapes
from jaxkd.evaluate import describe_labels
from jaxkd.models.model import Model

MAX_SUSPECTS = 8
"""Largest number of labels out of range that are tried before the first step."""
MAX_SCALED_IMAGES = 256
"""Number of images in which the largest pixel is looked for."""
MAX_RATIO = 100
"""Largest ratio of the largest numbers of two sets of which nothing is said."""
BYTE_SCALE = "[0, 255]"
"""The scale of pixels that were not divided."""
MAX_TEACHER_EXAMPLES = 2048
"""Number of examples for which the logits of a teacher are searched for NaN."""


def check_validation_labels(plan: Sequence[Entry], validation: Mapping[str, Any]) -> None:
    """Raises `ValueError` if a stage cannot be scored on the labels of a validation split."""
    for stage in plan:
        if isinstance(stage, Stage):
            num_classes = count_classes(stage.model, validation["inputs"])
            if problem := describe_labels(validation["labels"], num_classes):
                raise ValueError(
                    f"stage {stage.name!r} cannot be scored on the validation split: {problem}; "
                    "number the classes from 0, and leave out examples without a label"
                )


def check_tokens(inputs: Any, owner: str) -> None:
    """Raises `ValueError` if inputs hold negative integers, such as -100 for padding.

    An embedding reads the row of another token for them, without an error. Integers of 8 or 16 bits
    may be samples of sound, and are passed over.

    Args:
        inputs: An array or a dict of arrays.
        owner: What the inputs belong to, for the message.
    """
    for name, array in named_arrays({"inputs": inputs}):
        dtype = _get_dtype(array)
        if np.ndim(array) < 2 or not jnp.issubdtype(dtype, jnp.integer) or dtype.itemsize < 4:
            continue
        smallest = np.asarray(scannable(array)).min(initial=0)
        if smallest < 0:
            raise ValueError(
                f"{owner}: token ids must be at least 0, got {smallest} in {shorten(name, 40)}: "
                "pad with 0, or make numbers that are no tokens floating-point"
            )


def check_inputs(
    plan: Sequence[Entry],
    examples: Mapping[str, Any],
    split: str,
    *,
    seed: int | None = None,
) -> None:
    """Raises `ValueError` if the inputs of a split are of another kind than those of a stage.

    Their dtypes must be both floating-point or both integers. A model that does not normalise its
    inputs takes both, but images in [0, 1] and in [0, 255] are not the same to it. Shapes must
    agree, but for the length of tokens. Images of another height and width, which convolutions
    take, are warned of.

    Args:
        plan: The stages and pretrained models. It is not known what a pretrained one trained on.
        examples: The split, whose `inputs` are compared with those of each stage.
        split: Name of the split for the message.
        seed: A seed whose examples have the dtypes of every seed's. Without one, stages whose data
            are a function are passed over.
    """
    check_tokens(examples["inputs"], f"the {split}")
    others = dict(named_arrays({"inputs": examples["inputs"]}))
    for stage in plan:
        if not isinstance(stage, Stage) or (callable(stage.data) and seed is None):
            continue
        inputs = _model_inputs(stage, seed or 0)
        for name, array in inputs.items():
            dtype = _get_dtype(array)
            other = _get_dtype(others[name]) if name in others else dtype
            if _is_floating(dtype) == _is_floating(other) or bool in (dtype, other):
                continue
            raise ValueError(
                f"stage {shorten(stage.name, 40)!r} trains on {shorten(name, 40)} in {dtype}"
                f"{' (after augment)' if stage.augment else ''}, but those of the {split} are in "
                f"{other}, whose scale may be another: prepare both alike, such as images / 255"
            )
        _check_shapes(stage, inputs, others, split)
        if stage.augment is None:
            _check_scales(stage, inputs, others, split)


def _check_shapes(
    stage: Stage, inputs: Mapping[str, Any], others: Mapping[str, Any], split: str
) -> None:
    """Raises `ValueError` if examples of a split have other axes than those of a stage.

    A warning says if images or sequences have another size.
    """
    shapes = {
        name: (np.shape(array)[1:], np.shape(others[name])[1:])
        for name, array in inputs.items()
        if name in others
    }
    # A mask or a position of each token has the length of the tokens.
    token_lengths = {
        (shape[-1], other[-1])
        for name, (shape, other) in shapes.items()
        if len(shape) == len(other) in (1, 2) and not _is_floating(_get_dtype(inputs[name]))
    }
    for name, (shape, other) in shapes.items():
        is_same_rank = len(shape) == len(other)
        different = [
            axis
            for axis, lengths in enumerate(zip(shape, other, strict=is_same_rank))
            if lengths[0] != lengths[1] and lengths not in token_lengths
        ]
        if is_same_rank and not different:
            continue
        # Convolutions and recurrent networks take any size, but not other channels or features.
        is_size = len(shape) > 1 and (len(shape) == 3 or _is_floating(_get_dtype(inputs[name])))
        if is_same_rank and is_size and len(shape) - 1 not in different:
            # Who augments may train on crops.
            if stage.augment is None:
                warnings.warn(
                    f"stages train on {shorten(name, 40)} of size {shape[:-1]}, but those of the "
                    f"{split} have {other[:-1]}: is another size meant?",
                    stacklevel=4,
                )
            continue
        raise ValueError(
            f"stage {shorten(stage.name, 40)!r} trains on {shorten(name, 40)} of shape "
            f"{shorten(('N', *shape), 40)}, but those of the {split} have "
            f"{shorten(('N', *other), 40)}: prepare both alike, with the channels of images last"
        )


def _check_scales(
    stage: Stage, inputs: Mapping[str, Any], others: Mapping[str, Any], split: str
) -> None:
    """Raises `ValueError` if of two sets of images only one is in [0, 255].

    Warns if one is in [0, 1] and the other in [-1, 1].
    """
    for name, array in inputs.items():
        if name not in others:
            continue
        if np.ndim(array) != 4 or np.ndim(others[name]) != 4:
            _warn_of_magnitudes(name, array, others[name], split)
            continue
        scales = [_find_pixel_scale(images) for images in (array, others[name])]
        if None in scales or scales[0] == scales[1]:
            continue
        difference = (
            f"images in {scales[0]}, but those of the {split} are in {scales[1]}: prepare both "
            "alike, such as by images / 255"
        )
        if BYTE_SCALE in scales:
            raise ValueError(f"stage {shorten(stage.name, 40)!r} trains on {difference}")
        # Bright images alone would look so as well.
        warnings.warn(f"stages train on {difference}", stacklevel=4)


def _warn_of_magnitudes(name: str, array: Any, other: Any, split: str) -> None:
    """Warns if numbers that are no images are a hundred times as large in one of two sets."""
    largest, other_largest = _find_largest(array), _find_largest(other)
    low, high = sorted((largest, other_largest))
    # NaN, and arrays of zeros, have no ratio.
    if 0 < low < high / MAX_RATIO < np.inf:
        warnings.warn(
            f"stages train on {shorten(name, 40)} up to {largest:.3g}, but those of the {split} "
            f"are up to {other_largest:.3g}: is another scale meant?",
            stacklevel=5,
        )


def _find_largest(array: Any) -> float:
    """Returns the largest magnitude in some rows of a floating-point array; 0 of another one."""
    if not np.ndim(array) or not len(array) or not _is_floating(_get_dtype(array)):
        return 0.0
    array = scannable(array)
    some = np.asarray(array[:: max(1, len(array) // MAX_SCALED_IMAGES)], np.float32)
    return float(np.abs(some).max(initial=0))


def _find_pixel_scale(images: Any) -> str | None:
    """Returns the scale of pixels, such as `"[0, 1]"`, or `None` if it is another or unknown."""
    if not _is_floating(_get_dtype(images)):
        return None
    # Some images are enough, spread over all of them.
    images = scannable(images)
    some = np.asarray(images[:: max(1, len(images) // MAX_SCALED_IMAGES)], np.float32)
    smallest, largest = float(some.min()), float(some.max())
    # Resizing may give pixels slightly below 0, and standardised ones are beyond -1 and 1.
    if -1 <= smallest < -0.5 and largest <= 1:
        return "[-1, 1]"
    if smallest < 0 or largest > 255:
        return None
    # Pictures may be dark, but none of many reaches 1/255 of the scale.
    return "[0, 1]" if largest <= 1 else (BYTE_SCALE if largest > 32 else None)


def _model_inputs(stage: Stage, seed: int) -> dict[str, Any]:
    """Returns the inputs that the model of a stage gets in training, or their shapes, by name."""
    inputs = stage.examples(seed)["inputs"]
    if stage.augment is not None:
        # It may scale the inputs. Nothing is computed.
        shapes = input_shapes(inputs, stage.batch_size)
        inputs = jax.eval_shape(stage.augment, jax.random.key(0), shapes)
        inputs = inputs.inputs if isinstance(inputs, Mixed) else inputs
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(inputs)):
            raise ValueError(
                f"the augment of stage {shorten(stage.name, 40)!r} returns a key: it is called as "
                "augment(key, inputs), the key first, and returns the inputs"
            )
    return dict(named_arrays({"inputs": inputs}))


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
    variables = jax.eval_shape(model.init, jax.random.key(0), inputs)
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
