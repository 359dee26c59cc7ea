"""Batches that a step rewrites before the networks see them, such as by samples of the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxkd._messages import list_some, shorten

RewriteFn = Callable[[Any, dict, Array], Mapping[str, Any]]
"""`(variables, batch, key) -> batch`: variables of the student, and arrays of the same shapes."""


def rewrite_batch(
    rewrite: RewriteFn, variables: Any, batch: Mapping[str, Any], key: Array
) -> dict[str, Any]:
    """Returns what a function makes of a batch.

    Raises:
        TypeError: If it is no dict.
        ValueError: If its arrays have other names, shapes or dtypes than those of the batch.
    """
    # A dict of its own, which the function may change.
    rewritten: Any = rewrite(variables, jax.tree.map(lambda leaf: leaf, dict(batch)), key)
    if not isinstance(rewritten, Mapping):
        raise TypeError(
            "rewrite must return the batch, a dict of arrays, got a "
            f"{type(rewritten).__name__}: return {{**batch, 'inputs': ...}}"
        )
    before, after = _describe_leaves(batch), _describe_leaves(rewritten)
    if before.keys() != after.keys():
        names = sorted(before.keys() ^ after.keys())
        raise ValueError(
            "rewrite must return all arrays of its batch and no others, but "
            f"{list_some(names)} {'is' if len(names) == 1 else 'are'} in one of them alone: return "
            "{**batch, 'inputs': ...}"
        )
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        raise ValueError(
            f"rewrite must keep shapes and dtypes, but {changed[0]:.40} is {before[changed[0]]} in "
            f"the batch and {after[changed[0]]} in what it returns: pad, cut or cast it"
        )
    return dict(rewritten)


def _describe_leaves(batch: Mapping[str, Any]) -> dict[str, str]:
    """Returns dtype and shape of each array by its name."""
    return {
        shorten("/".join(str(getattr(key, "key", key)) for key in path), 60): (
            f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(batch))
    }
