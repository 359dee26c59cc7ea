"""Models from Flax Linen modules."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import jax
from jax import Array

from jaxkd.models._modes import (
    are_same_leaves,
    check_fixed_mode,
    check_required_arguments,
    choose_train_values,
    find_train_values,
    record_linen_dropout,
    warn_of_equal_modes,
)
from jaxkd.models.model import Inputs, Model, Network, Outputs, check_outputs

if TYPE_CHECKING:
    from flax import linen


def from_linen(
    module: linen.Module,
    *,
    train_argument: str | None = "train",
    train_value: bool | None = None,
) -> Model:
    """Makes a model from a Flax Linen module.

    The module takes an array, or a dict of arrays, and returns `Outputs` or logits alone. The
    values that it sows into `"intermediates"` become features, named by their path; the features of
    `Outputs` come first where a name is in both.

    Args:
        module: The module.
        train_argument: Name of the boolean argument of the module's `__call__` that tells training
            from evaluation; `None` for a module that has none. Others of the names below are set
            too.
        train_value: Value of that argument in training. By default true for `train`, `training`,
            `is_training`, `is_train` and `train_mode`, and false for `deterministic` and
            `use_running_average`; any other argument needs it.

    Returns:
        The pair of functions.

    Raises:
        TypeError: If it is no Linen module, its `__call__` has no argument of that name, it is not
            known whether it is true in training, `train_argument` is `None` though an argument has
            one of the names above, or another argument has no default. From `apply`, if the module
            returns anything but `Outputs` or one array.
        ValueError: From `init`, if the module has variables other than parameters and running
            statistics. From `apply`, if an attribute of the module fixes the other mode.

    Warns:
        UserWarning: From `apply`, if training changes no running statistics or drops no values,
            although the module has layers for it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(16,), hidden=32))
        >>> images = jnp.zeros((2, 32, 32, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> outputs, _ = model.apply(variables, images, train=False)
        >>> outputs.logits.shape, sorted(outputs.features)
        ((2, 10), ['pre_logits', 'stage1'])
    """
    from flax import linen

    _check_is_linen(module)
    name = type(module).__name__
    if train_argument is not None:
        train_values = choose_train_values(module, train_argument, train_value)
    elif train_values := find_train_values(module):
        known = next(iter(train_values))
        raise TypeError(
            f"train_argument is None, but {name}.__call__ has the argument {known!r}: pass "
            f"train_argument={known!r}; models.with_frozen_batch_stats trains a model as it is "
            "evaluated"
        )
    check_required_arguments(module, train_values)

    def mode_arguments(train: bool) -> dict[str, Any]:
        return {name: train == value for name, value in train_values.items()}

    def init(key: Array, inputs: Inputs) -> dict:
        # A module without a training argument may drop values during initialisation too.
        rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        variables: Any = module.init(rngs, inputs, **mode_arguments(False))
        unsupported = sorted(set(variables) - {"params", "batch_stats", "intermediates"})
        if unsupported:
            raise ValueError(
                f"expected variables in params and batch_stats only, but {name} also keeps "
                f"{', '.join(unsupported)}: remove them from the module, or write the model's init "
                "and apply yourself"
            )
        return {
            "params": variables.get("params", {}),
            "batch_stats": variables.get("batch_stats", {}),
        }

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        if not train_values:
            check_fixed_mode(module, train=train)
        # In both modes, because Flax drops the values sown into a collection that is not mutable.
        mutable = ["intermediates", "batch_stats"] if train else ["intermediates"]
        # Flax draws from "params" what a module asks for under a name that is not here.
        rngs = None if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
        dropout: list[bool] = []
        with (
            _explain_flax_errors(name, train=train),
            linen.intercept_methods(record_linen_dropout(dropout)),
        ):
            applied: Any = module.apply(
                variables, inputs, **mode_arguments(train), mutable=mutable, rngs=rngs
            )
        result, updates = applied
        batch_stats = updates.get("batch_stats", variables.get("batch_stats", {}))
        if train:
            warn_of_equal_modes(
                name,
                statistics_stand=are_same_leaves(variables.get("batch_stats", {}), batch_stats),
                dropout_is_off=key is not None and bool(dropout) and not any(dropout),
            )
        outputs = check_outputs(result, name)
        sown = _name_sown_values(updates.get("intermediates", {}))
        outputs = outputs._replace(features=sown | dict(outputs.features))
        return outputs, batch_stats

    return Model(init, apply, Network(module))


@contextlib.contextmanager
def _explain_flax_errors(name: str, *, train: bool) -> Generator[None]:
    """Replaces errors of Flax that do not name the module or the remedy."""
    from flax import errors

    try:
        yield
    except errors.ModifyScopeVariableError as error:
        raise ValueError(
            f"{name} changes its variables in evaluation, as BatchNorm does with "
            "use_running_average=False: set use_running_average=not train there"
        ) from error
    except errors.InvalidRngError as error:
        remedy = "pass key=... to apply" if train else "draw only if train is true"
        mode = "training without a key" if train else "evaluation"
        raise ValueError(f"{name} draws random numbers in {mode}: {remedy}") from error


def _check_is_linen(module: Any) -> None:
    """Raises `TypeError` unless a module is one of Linen."""
    from flax import linen

    if isinstance(module, linen.Module):
        return
    if isinstance(module, Model):
        raise TypeError("from_linen takes a Linen module, but this is a Model already: use it")
    from flax import nnx

    kind = module if isinstance(module, type) else type(module)
    name = kind.__name__
    if issubclass(kind, nnx.Module):
        raise TypeError(f"{name} is an NNX module: use models.from_nnx")
    if issubclass(kind, linen.Module):
        raise TypeError(f"from_linen takes a module, but {name} is its class: pass {name}(...)")
    raise TypeError(
        f"from_linen takes a Linen module, got a {name}: for a network of another library write "
        "models.Model(init, apply) with two functions"
    )


def _name_sown_values(intermediates: dict) -> dict[str, Array]:
    """Names sown values by their path, with a number appended if a path has several values."""
    # `sow` collects the values of a path in a tuple.
    leaves = jax.tree_util.tree_leaves_with_path(
        intermediates, is_leaf=lambda node: isinstance(node, tuple)
    )
    features = {}
    for path, values in leaves:
        name = "/".join(str(entry.key) for entry in path)
        if len(values) == 1:
            features[name] = values[0]
        else:
            features |= {f"{name}/{i}": value for i, value in enumerate(values)}
    return features
