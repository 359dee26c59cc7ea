"""Fine-tuning: what an optimizer leaves alone, and what it moves less than the rest."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxkd.transfer.rules import match
from jaxkd.transfer.trees import leaves_by_path, path_of


def freeze(tx: optax.GradientTransformation, *patterns: str) -> optax.GradientTransformation:
    """Keeps parameters as they are, bit for bit, and no optimizer state for them.

    Put it around the whole optimizer: what is inside, such as weight decay or clipping by the global norm, sees the
    other parameters alone. Running statistics are no parameters; see `jaxkd.models.frozen_statistics`.

    Args:
        tx: The optimizer of the other parameters.
        *patterns: Which to freeze, by patterns as in `Rule`. Paths begin where the tree does that the optimizer sees:
            "conv1/kernel", not "params/conv1/kernel".

    Returns:
        The optimizer of all parameters.

    Raises:
        ValueError: From `init`, if a pattern matches no parameter.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from jaxkd.transfer import freeze
        >>> params = {"conv1": {"kernel": jnp.ones(4)}, "logits": {"kernel": jnp.ones(3)}}
        >>> state = freeze(optax.sgd(0.1, momentum=0.9), "conv1/{rest...}").init(params)
        >>> [leaf.shape for leaf in jax.tree.leaves(state)]
        [(3,)]
    """

    def labels(params: Any) -> Any:
        _check_matches(patterns, params)
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: "frozen" if _first(patterns, path_of(keys)) is not None else "trained", params
        )

    return optax.partition({"trained": tx, "frozen": optax.stateless(_stay)}, labels)


def scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Layer-wise learning rates: multiplies updates by factors that patterns of paths choose.

    Chain it behind an optimizer: before one such as Adam, which divides by the size of its gradients, it has no effect.

    Args:
        factors: Factors by patterns as in `Rule`. The first pattern that matches decides, in the mapping's order; what
            none matches keeps its updates. Paths are those of the parameters, as in `freeze`.

    Returns:
        The transformation.

    Raises:
        ValueError: From `init`, if a pattern matches no parameter.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxkd.transfer import scale_by_path
        >>> params = {"conv1": {"kernel": jnp.ones(2)}, "logits": {"kernel": jnp.ones(2)}}
        >>> tx = optax.chain(optax.sgd(1.0), scale_by_path({"conv{i}/{rest...}": 0.1}))
        >>> updates, _ = tx.update(params, tx.init(params))
        >>> updates["conv1"]["kernel"], updates["logits"]["kernel"]
        (Array([-0.1, -0.1], dtype=float32), Array([-1., -1.], dtype=float32))
    """
    factors = dict(factors)

    def init(params: optax.Params) -> optax.OptState:
        _check_matches(factors, params)
        return optax.EmptyState()

    def update(updates: Any, state: optax.OptState, params: Any = None) -> tuple[Any, optax.OptState]:
        del params
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    def scaled(keys: tuple[Any, ...], leaf: Array) -> Array:
        pattern = _first(factors, path_of(keys))
        return leaf if pattern is None else leaf * factors[pattern]

    return optax.GradientTransformation(init, update)


def _first(patterns: Iterable[str], path: str) -> str | None:
    """The first pattern that matches a path."""
    return next((pattern for pattern in patterns if match(pattern, path) is not None), None)


def _check_matches(patterns: Iterable[str], params: Any) -> None:
    paths = [*leaves_by_path(params)]
    idle = [pattern for pattern in patterns if not any(match(pattern, path) is not None for path in paths)]
    if idle:
        raise ValueError(f"{idle} match no parameter; a pattern matches a whole path, and there are {paths}")


def _stay(updates: Any, params: Any) -> Any:
    """Updates of −0, the one number that leaves every other as it is: −0 + 0 is 0, of other bits."""
    del params
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates)
