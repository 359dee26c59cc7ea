"""Outputs of submodules as features of a model, by the paths of the submodules."""

from __future__ import annotations

import contextvars
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import Array

from jaxkd._messages import list_some, shorten
from jaxkd.models.model import Inputs, Model

FeaturePaths = Mapping[str, str] | Iterable[str]
"""Paths of submodules: a dict from the names of features, or the paths alone."""

Shape = tuple[int, ...]

# The paths of a model are known only to its `apply`, behind whatever wraps the model. A context
# variable asks `apply` to append the shapes of all outputs to a list.
_LISTINGS: contextvars.ContextVar[list[dict[str, Shape]] | None] = contextvars.ContextVar(
    "listings", default=None
)


def feature_paths(model: Model, inputs: Inputs) -> dict[str, Shape]:
    """Lists the submodules whose outputs `features=` of `from_linen` and `from_nnx` can name.

    The model is traced in evaluation with new variables. Nothing is computed.

    Args:
        model: What `from_linen` or `from_nnx` made, also within `with_input_normalization` and the
            like. The features that it was made with make no difference.
        inputs: A batch as the model takes it; only shapes and dtypes matter.

    Returns:
        The shape of each output by its path: in the order of the calls for Linen, and of the
        attributes for NNX. If a submodule is called several times, or returns several arrays, the
        number or key of the array is appended to the path. A Linen submodule within `nn.scan` or
        `nn.vmap` is missing unless `variable_axes` has `"intermediates"`.

    Raises:
        TypeError: If the model was made otherwise.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(16,), hidden=32))
        >>> feature_paths(model, jnp.zeros((2, 32, 32, 3)))
        {'conv1': (2, 30, 30, 16), 'hidden': (2, 32), 'logits': (2, 10)}
    """

    def compute(key: Array, inputs: Inputs) -> None:
        model.apply(model.init(key, inputs), inputs, train=False)

    listings: list[dict[str, Shape]] = []
    token = _LISTINGS.set(listings)
    try:
        jax.eval_shape(compute, jax.random.key(0), inputs)
    finally:
        _LISTINGS.reset(token)
    if not listings:
        raise TypeError(
            "only models of from_linen and from_nnx have paths, and only while `apply` is traced: "
            "pass such a model, and not one whose `apply` is jitted"
        )
    return listings[-1]


def is_listing() -> bool:
    """True while `feature_paths` traces a model, whose `apply` then reports all outputs."""
    return _LISTINGS.get() is not None


def list_outputs(outputs: Mapping[str, Sequence[Any]]) -> None:
    """Passes the shapes of all outputs, in their order, to `feature_paths`."""
    arrays: dict[str, Array] = {}
    for path, calls in outputs.items():
        arrays |= _name_arrays(path, calls)
    listings = _LISTINGS.get()
    if listings is not None:
        listings.append({name: array.shape for name, array in arrays.items()})


def parse_feature_paths(features: FeaturePaths) -> dict[str, str]:
    """Returns the path of each feature by the feature's name.

    Raises:
        TypeError: If it is neither a dict of texts nor several texts.
    """
    if isinstance(features, str) or not isinstance(features, Iterable):
        kind = "the text " if isinstance(features, str) else ""
        raise TypeError(
            f"features is {kind}{shorten(repr(features), 60)}: pass a tuple of paths, such as "
            '("Dense_0",), or a dict from names to paths'
        )
    paths = dict(features) if isinstance(features, Mapping) else {path: path for path in features}
    for name, path in paths.items():
        if not (isinstance(name, str) and isinstance(path, str) and name and path):
            raise TypeError(
                "features needs names and paths that are texts, got "
                f"{shorten(repr(name), 60)}: {shorten(repr(path), 60)}"
            )
    return paths


def is_needed(path: str, paths: Iterable[str]) -> bool:
    """True if a submodule, or a part of its output, is one of some paths."""
    return any(f"{wanted}/".startswith(f"{path}/") for wanted in paths)


def are_arrays(result: Any) -> bool:
    """True if the output of a submodule consists of arrays, one at least."""
    leaves = jax.tree.leaves(result)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def select_features(
    paths: Mapping[str, str], outputs: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, Array], list[str]]:
    """Selects features among the outputs of submodules.

    Args:
        paths: The path of each feature by its name.
        outputs: The results of the calls of each submodule by its path.

    Returns:
        The features, and the paths that are missing in `outputs`.
    """
    features: dict[str, Array] = {}
    missing = []
    parts: dict[str, Array] = {}
    for path, calls in outputs.items():
        parts |= _name_arrays(path, calls)
    for name, path in paths.items():
        if path in outputs:
            arrays = _name_arrays(path, outputs[path])
            features |= {name + key.removeprefix(path): array for key, array in arrays.items()}
        elif path in parts:
            features[name] = parts[path]
        else:
            missing.append(path)
    return features, missing


def merge_features(name: str, own: Mapping[str, Array], selected: Mapping[str, Array]) -> dict:
    """Returns a module's own features and those that were selected by path.

    Raises:
        ValueError: If a name is in both.
    """
    if shared := sorted(set(own) & set(selected)):
        raise ValueError(
            f"{name} has features of its own named {list_some(shared)}: give those that "
            "`features` selects other names"
        )
    return {**own, **selected}


def describe_unknown_path(name: str, path: str, known: Sequence[str]) -> str:
    """Describes a path of no submodule, with the paths that resemble it."""
    close = difflib.get_close_matches(path, known, cutoff=0.3)
    hint = f"similar ones are {list_some(close)}" if close else f"it has {list_some(known)}"
    if not known:
        return f"{name} has no submodules that it calls, so no features by path: leave features out"
    return (
        f"{name} has no submodule {shorten(repr(path), 60)} that it calls: {hint}; "
        "models.feature_paths(model, inputs) lists all"
    )


def _name_arrays(path: str, calls: Sequence[Any]) -> dict[str, Array]:
    """Names the arrays that calls returned, with numbers or keys appended if there are several."""
    results = calls[0] if len(calls) == 1 else tuple(calls)
    return {
        "/".join(filter(None, (path, jax.tree_util.keystr(keys, simple=True, separator="/")))): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(results)
    }
