"""What a stage caches of its teachers' outputs: on disk, on the devices and in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd._messages import format_bytes, list_some
from jaxkd.losses.sparse import TopK, expand_top_k, top_k
from jaxkd.models.model import Outputs

DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes in which floating-point numbers may be cached."""


class CachedParts(NamedTuple):
    """The parts of a teacher's outputs that are cached.

    Attributes:
        features: Names of the features, sorted.
        has_logits: Whether the logits are among them.
        top_k: Number of the largest logits that are kept; `None` for all.
        dtype: Dtype of all floating-point numbers, one of `DTYPES`.
    """

    features: tuple[str, ...] = ()
    has_logits: bool = True
    top_k: int | None = None
    dtype: str = "float32"

    @property
    def are_logits(self) -> bool:
        """Whether logits alone are cached."""
        return self.has_logits and not self.features

    def describe(self) -> dict[str, Any]:
        """Returns as JSON values what differs from logits in 32 bits."""
        # Caches and checkpoints of versions that knew nothing else stay valid.
        description: dict[str, Any] = {}
        if self.features:
            description["features"] = list(self.features)
        if not self.has_logits:
            description["logits"] = False
        if self.dtype != "float32":
            description["dtype"] = self.dtype
        return description


def make_parts(
    features: Sequence[str] = (),
    has_logits: bool = True,
    top_k: int | None = None,
    dtype: str = "float32",
) -> CachedParts:
    """Returns the parts to cache.

    Raises:
        ValueError: If nothing would be cached, the largest of no logits are asked for, or the dtype
            is unknown.
    """
    if not has_logits and not features:
        raise ValueError("nothing is cached without logits and features: name features")
    if not has_logits and top_k is not None:
        raise ValueError(f"{top_k} of the logits cannot be kept without logits: keep the logits")
    if dtype not in DTYPES:
        raise ValueError(f"outputs are cached in {list_some(DTYPES)}, not in {dtype!r:.40}")
    return CachedParts(tuple(sorted(set(features))), has_logits, top_k, dtype)


def check_cache_options(stage: Any) -> None:
    """Raises `ValueError` if the attributes of a stage that begin with `cache_` contradict."""
    if stage.cache_teachers and stage.augment is not None and stage.views is None:
        raise ValueError(
            f"stage {stage.name!r} caches logits of its teachers for inputs that augment draws "
            "at every step: drop augment or cache_teachers, or set the number of views"
        )
    if stage.cache_top_k is not None and (not stage.cache_teachers or stage.cache_top_k < 1):
        raise ValueError(
            f"stage {stage.name!r} has cache_top_k={stage.cache_top_k}: it needs cache_teachers "
            "and a number of at least 1"
        )
    is_set = {
        "cache_features": bool(stage.cache_features),
        "cache_logits": not stage.cache_logits,
        "cache_dtype": stage.cache_dtype != "float32",
    }
    if any(is_set.values()) and not stage.cache_teachers:
        name = next(name for name in is_set if is_set[name])
        raise ValueError(f"stage {stage.name!r} has a {name}: it needs cache_teachers=True")
    if not stage.cache_logits and (not stage.cache_features or stage.cache_top_k is not None):
        raise ValueError(
            f"stage {stage.name!r} caches no logits: name cache_features, and leave out cache_top_k"
        )


def select_outputs(outputs: Outputs, parts: CachedParts, *, owner: str = "the teacher") -> Outputs:
    """Returns the parts of a teacher's outputs that are cached, in float32.

    Raises:
        ValueError: If the teacher lacks a feature.
    """
    if lacking := [name for name in parts.features if name not in outputs.features]:
        features = list_some(sorted(outputs.features), count=8) or "none"
        raise ValueError(
            f"{owner} has no feature {lacking[0]!r:.60} to cache, its features are {features}"
        )
    logits: Any = _to_float32(outputs.logits) if parts.has_logits else None
    return Outputs(logits, {name: _to_float32(outputs.features[name]) for name in parts.features})


def _to_float32(array: Any) -> Any:
    # An array on the host stays there.
    array = array if isinstance(array, Array) else np.asarray(array)
    is_other = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype != jnp.float32
    return array.astype(jnp.float32) if is_other else array


def reduce_outputs(outputs: Outputs, parts: CachedParts) -> Outputs:
    """Keeps the largest logits alone, if that is asked for."""
    if parts.top_k is None:
        return outputs
    kept: Any = top_k(outputs.logits, k=parts.top_k)
    return outputs._replace(logits=kept)


def to_stored(outputs: Outputs, dtype: str) -> Outputs:
    """Returns outputs on the host with their floating-point numbers in the dtype of the cache.

    Raises:
        ValueError: If a number is too large for the dtype.
    """

    def convert(path: Any, array: np.ndarray) -> np.ndarray:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        with np.errstate(over="ignore"):  # which is an error of its own below
            stored = array.astype(jnp.dtype(dtype))
        # The infinite logits of classes that are ruled out stay as they are.
        lost = np.isinf(stored) & np.isfinite(array)
        if lost.any():
            name = jax.tree_util.keystr(path).lstrip(".")
            others = "bfloat16 or float32" if dtype == "float16" else "float32"
            raise ValueError(
                f"the {name} of a teacher cannot be cached in {dtype}: "
                f"{np.abs(array[lost]).max():.6g} is beyond its largest number, "
                f"{float(jnp.finfo(dtype).max):.6g}; choose {others}"
            )
        return stored

    return jax.tree_util.tree_map_with_path(convert, outputs)


def cached_shapes(outputs: Outputs, parts: CachedParts, num_views: int | None) -> Outputs:
    """Returns outputs as a step gets them, of which only shapes and dtypes count."""

    def convert(array: Array) -> Array:
        if num_views is not None:  # `[B, V, ...]`
            array = jnp.repeat(array[:, None], num_views, axis=1)
        is_floating = jnp.issubdtype(array.dtype, jnp.floating)
        return array.astype(parts.dtype) if is_floating else array

    return jax.tree.map(convert, reduce_outputs(outputs, parts))


def pack(outputs: Outputs) -> dict[str, Any]:
    """Returns outputs as the tree that is saved."""
    logits: Any = outputs.logits
    logits = logits._asdict() if isinstance(logits, TopK) else logits
    if not outputs.features:
        # As versions that cached logits alone saved it.
        return logits if isinstance(outputs.logits, TopK) else {"logits": logits}
    # A list, because the names of features may hold characters that are part of a path.
    features = [outputs.features[name] for name in sorted(outputs.features)]
    return {"features": features} | ({} if logits is None else {"logits": logits})


def unpack(tree: Mapping[str, Any], parts: CachedParts) -> Outputs:
    """Returns the outputs of which `pack` made a tree."""
    logits: Any = tree if parts.are_logits and parts.top_k is not None else tree.get("logits")
    features = dict(zip(parts.features, tree.get("features", ()), strict=True))
    if parts.top_k is not None:
        logits = TopK(**logits)
    return Outputs(logits, features)


def count_bytes(outputs: Any) -> int:
    """Returns the size of arrays, or of shapes."""
    leaves = jax.tree.leaves(outputs)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def describe_size(name: str, bytes_per_example: float, total: int) -> str:
    """Returns a line on the size of a teacher's cached outputs."""
    return f"{name}: {bytes_per_example:,.0f} bytes an example, {format_bytes(total)}"


def get_batch_outputs(
    all_logits: Sequence[Any],
    all_features: Sequence[Mapping[str, Array]],
    view: Array | None,
    num_classes: Sequence[int],
) -> tuple[Outputs, ...]:
    """Returns the outputs of cached teachers for a batch, in float32.

    Args:
        all_logits: The cached logits of each teacher, as in `BatchInfo`.
        all_features: Its cached features.
        view: `[B]`, the view of each example, if there are views.
        num_classes: The number of classes to which the `TopK` of each teacher is expanded.
    """
    all_logits = all_logits or [None] * len(all_features)
    all_features = all_features or [{}] * len(all_logits)
    outputs = []
    for logits, features, count in zip(all_logits, all_features, num_classes, strict=True):
        cached = Outputs(logits, dict(features))
        if view is not None:
            # From `[B, V, ..., C]` to `[B, ..., C]`: each example has a view of its own.
            cached = jax.tree.map(lambda array: array[jnp.arange(len(array)), view], cached)
        # In 16 bits up to here, so that all examples take half of the memory of the device.
        cached = jax.tree.map(_widen, cached)
        if isinstance(cached.logits, TopK):
            cached = cached._replace(logits=expand_top_k(cached.logits, num_classes=count))
        outputs.append(cached)
    return tuple(outputs)


def _widen(array: Array) -> Array:
    is_short = array.dtype in (jnp.float16, jnp.bfloat16)
    return array.astype(jnp.float32) if is_short else array
