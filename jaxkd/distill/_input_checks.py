"""Checks before the first step that inputs and labels fit the models and each other."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd._images import (
    BYTE_SCALE,
    describe_wrong_scale,
    find_pixel_scale,
    take_some,
    warn_of_lost_pixels,
)
from jaxkd._messages import shorten
from jaxkd.data.mixing import Mixed
from jaxkd.data.records import Column, scannable
from jaxkd.distill._diagnosis import count_classes
from jaxkd.distill._requirements import named_arrays
from jaxkd.distill.plan import Entry, Stage, input_shapes
from jaxkd.evaluate import describe_labels
from jaxkd.models.model import Model

MAX_SHARED_ROWS = 1000
"""Number of examples of a split that are looked for among those of a stage."""
MAX_HASHED_BYTES = 2**30
"""Size of a stage's inputs up to which they are searched, which takes about a second."""
MIN_SHARED_ROWS = 20
"""Smallest split of which it is said that a stage trains on it."""
MAX_RATIO = 100
"""Largest ratio of the largest numbers of two sets of which nothing is said."""


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


def check_stage_inputs(stage: Stage, seed: int) -> None:
    """Raises `ValueError` if the inputs that a stage trains on cannot be what its model takes.

    Warns if no pixel of bytes is above 1.
    """
    owner = f"stage {shorten(stage.name, 40)!r}"
    inputs = stage.examples(seed)["inputs"]
    check_tokens(inputs, owner)
    for _, array in named_arrays({"inputs": inputs}):
        images = scannable(array)
        warn_of_lost_pixels("the images that stages train on", images)
        if stage.augment is None:
            _check_model_scale(stage.model, images, f"{owner} trains on")


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
    take, are warned of, and bytes of which none is above 1.

    Args:
        plan: The stages and other models. It is not known what a pretrained one trained on.
        examples: The split, whose `inputs` are compared with those of each stage.
        split: Name of the split for the message.
        seed: A seed whose examples have the dtypes of every seed's. Without one, stages whose data
            are a function are passed over.
    """
    check_tokens(examples["inputs"], f"the {split}")
    others = dict(named_arrays({"inputs": examples["inputs"]}))
    for array in others.values():
        images = scannable(array)
        warn_of_lost_pixels(f"the images of the {split}", images)
        for entry in plan:
            _check_model_scale(
                entry.model, images, f"{shorten(entry.name, 40)!r} gets for the {split}"
            )
    # The arrays are kept, because an id is unique only while its object is alive.
    searched: dict[tuple[int, ...], Sequence[Any]] = {}
    for stage in plan:
        if not isinstance(stage, Stage) or (callable(stage.data) and seed is None):
            continue
        # Most stages of a plan train on the same arrays.
        trained = jax.tree.leaves(stage.examples(seed or 0)["inputs"])
        if (ids := tuple(map(id, trained))) not in searched:
            searched[ids] = trained
            _warn_of_shared_examples(trained, jax.tree.leaves(examples["inputs"]), split)
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


def _warn_of_shared_examples(trained: Sequence[Any], others: Sequence[Any], split: str) -> None:
    """Warns if most examples of a split are among those that a stage trains on."""
    is_hashed = not any(isinstance(array, Column) for array in [*trained, *others])
    if not is_hashed or sum(array.nbytes for array in trained) > MAX_HASHED_BYTES:
        return
    if [(a.shape[1:], a.dtype) for a in trained] != [(a.shape[1:], a.dtype) for a in others]:
        return
    count = len(others[0])
    rows = np.unique(np.linspace(0, count - 1, min(count, MAX_SHARED_ROWS)).astype(int))
    sought = _hash_rows(others, rows)
    # Vectors of a few whole numbers are equal by chance.
    if len(rows) < MIN_SHARED_ROWS or len(set(sought)) < len(rows) / 2:
        return
    known = set(_hash_rows(trained, range(len(trained[0]))))
    num_shared = sum(row in known for row in sought)
    if num_shared > len(rows) / 2:
        warnings.warn(
            f"{num_shared:,} of {len(rows):,} examples of the {split} are also among those that "
            "stages train on, so that its scores say little of others: pass examples of its own",
            stacklevel=4,
        )


def _hash_rows(arrays: Sequence[Any], rows: Iterable[int]) -> list[int]:
    arrays = [np.asarray(array) for array in arrays]
    return [hash(tuple(array[row].tobytes() for array in arrays)) for row in rows]


def _check_model_scale(model: Model, images: Any, clause: str) -> None:
    """Raises `ValueError` if images are on another scale than that which a model names."""
    if problem := describe_wrong_scale(model.max_value, images):
        raise ValueError(f"{clause} {problem}")


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
        scales = [find_pixel_scale(scannable(images)) for images in (array, others[name])]
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
    return float(np.abs(take_some(scannable(array))).max(initial=0))


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


def _is_floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _get_dtype(array: Any) -> Any:
    return array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
