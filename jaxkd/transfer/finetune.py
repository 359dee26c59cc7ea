"""Fine-tuning: frozen parameters and layer-wise learning rates."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxkd.transfer.rules import match_path
from jaxkd.transfer.trees import join_path, leaves_by_path


def freeze(tx: optax.GradientTransformation, *patterns: str) -> optax.GradientTransformation:
    """Keeps some parameters unchanged, bit for bit, and without optimizer state.

    Wrap the whole optimizer: the transformations inside, such as weight decay or clipping by the
    global norm, see only the other parameters. Running statistics are not parameters; see
    `jaxkd.models.with_frozen_batch_stats`.

    Args:
        tx: The optimizer of the other parameters.
        *patterns: Patterns, as in `Rule`, of the parameters to freeze. Paths are those in the tree
            that the optimizer sees: "conv1/kernel", not "params/conv1/kernel".

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

    def label(params: Any) -> Any:
        # Not earlier: only `init` knows the paths.
        _check_patterns(patterns, params)
        return jax.tree_util.tree_map_with_path(label_leaf, params)

    def label_leaf(keys: tuple[Any, ...], leaf: Array) -> str:
        del leaf
        return "trained" if _find_pattern(patterns, join_path(keys)) is None else "frozen"

    # partition hides the frozen leaves from `tx`, which therefore keeps no state for them and does
    # not count them in a global norm.
    frozen = optax.stateless(_negative_zero_updates)
    return optax.partition({"trained": tx, "frozen": frozen}, label)


def fine_tuning_optimizer(
    learning_rate: float, steps: int, *, frozen: Iterable[str] = (), weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """Makes the optimizer with which BERT is fine-tuned.

    AdamW, whose learning rate rises linearly for a tenth of the steps and falls linearly to 0.

    Args:
        learning_rate: The highest learning rate, such as 5e-5.
        steps: Number of training steps.
        frozen: Patterns of the parameters that are not trained, as for `freeze`.
        weight_decay: Weight decay.

    Returns:
        The optimizer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.transfer import fine_tuning_optimizer
        >>> params = {"embedding": jnp.ones(2), "logits": {"kernel": jnp.ones(3)}}
        >>> tx = fine_tuning_optimizer(5e-5, 100, frozen=["embedding"])
        >>> {leaf.shape for leaf in jax.tree.leaves(tx.init(params))} == {(), (3,)}
        True

    References:
        Devlin et al., BERT, https://arxiv.org/abs/1810.04805
    """
    rise_steps = max(1, steps // 10)
    rise = optax.linear_schedule(0.0, learning_rate, rise_steps)
    fall = optax.linear_schedule(learning_rate, 0.0, max(1, steps - rise_steps))
    schedule = optax.join_schedules((rise, fall), [rise_steps])
    tx = optax.adamw(schedule, weight_decay=weight_decay)
    patterns = tuple(frozen)
    return freeze(tx, *patterns) if patterns else tx


def scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies updates by factors that depend on the path, for layer-wise learning rates.

    Chain it after the optimizer. Before an optimizer such as Adam, which normalises its gradients,
    it has no effect.

    Args:
        factors: Factors by pattern, as in `Rule`. The first pattern that matches decides, in the
            order of the mapping; updates that no pattern matches are unchanged. Paths are those of
            the parameters, as in `freeze`.

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
        _check_patterns(factors, params)
        return optax.EmptyState()

    def update(
        updates: Any, state: optax.OptState, params: Any = None
    ) -> tuple[Any, optax.OptState]:
        del params
        return jax.tree_util.tree_map_with_path(scale_leaf, updates), state

    def scale_leaf(keys: tuple[Any, ...], leaf: Array) -> Array:
        pattern = _find_pattern(factors, join_path(keys))
        return leaf if pattern is None else leaf * factors[pattern]

    return optax.GradientTransformation(init, update)


def _find_pattern(patterns: Iterable[str], path: str) -> str | None:
    """Returns the first pattern that matches a path."""
    return next((pattern for pattern in patterns if match_path(pattern, path) is not None), None)


def _check_patterns(patterns: Iterable[str], params: Any) -> None:
    paths = [*leaves_by_path(params)]
    unmatched = [
        pattern
        for pattern in patterns
        if not any(match_path(pattern, path) is not None for path in paths)
    ]
    # A typo would otherwise train what should be frozen, without a word.
    if unmatched:
        raise ValueError(
            f"{unmatched} match no parameter; a pattern must match a whole path, and the paths are "
            f"{paths}"
        )


def _negative_zero_updates(updates: Any, params: Any) -> Any:
    """Returns updates of −0, which leave every parameter unchanged.

    An update of 0 would not: −0 + 0 is 0, which has other bits.
    """
    del params
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates)
