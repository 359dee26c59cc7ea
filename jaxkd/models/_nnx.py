"""Models from Flax NNX modules."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxkd._messages import list_some
from jaxkd.models._features import (
    FeaturePaths,
    is_listing,
    list_outputs,
    merge_features,
    parse_feature_paths,
    select_features,
)
from jaxkd.models._modes import (
    are_same_leaves,
    check_fixed_mode,
    check_required_arguments,
    choose_train_values,
    find_asked_argument,
    find_train_values,
    has_nnx_dropout,
    warn_of_equal_modes,
)
from jaxkd.models._nnx_submodules import (
    find_callable_paths,
    find_recorded_paths,
    read_outputs,
    record_outputs,
)
from jaxkd.models.model import Inputs, Model, Outputs, check_outputs

if TYPE_CHECKING:
    from flax import nnx


def from_nnx(
    module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    *,
    features: FeaturePaths = (),
    train_argument: str | None = None,
    train_value: bool | None = None,
) -> Model:
    """Makes a model from a Flax NNX module.

    Args:
        module: A function or class that takes `nnx.Rngs` and makes the module, or the module
            itself, whose weights `init` then returns for every key. Calling the module returns
            `Outputs` or logits alone; what it sows is not used. `module.train()` and
            `module.eval()` choose the mode, and so do arguments of its `__call__` with the names
            that `from_linen` knows. Any other argument keeps its default.
        features: Submodules whose outputs become features, as for `from_linen`. A path has the
            names of attributes and the indices of lists, such as `"layers/0/conv"`.
        train_argument: Name of an argument of another name that tells training from evaluation.
        train_value: Value of that argument in training.

    Returns:
        The pair of functions. Each call works on a copy of the module, which never changes.

    Raises:
        TypeError: If it is neither an NNX module nor makes one, its `__call__` needs another
            argument than its inputs, or it is not known whether an argument such as `inference` is
            true in training, or `features` is no dict of texts, nor several. From `apply`, if the
            module returns anything but `Outputs` or one array.
        ValueError: If a path of `features` leads to no submodule that can be called. From `apply`,
            if it is not called, a name is that of a feature of the module's own, an attribute of
            the module fixes the other mode, the call changes variables other than `nnx.BatchStat`,
            which no model keeps, or it draws numbers or changes statistics in evaluation.

    Warns:
        UserWarning: As for `from_linen`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
        >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 4)))
        >>> outputs, batch_stats = model.apply(variables, jnp.zeros((2, 4)), train=False)
        >>> outputs.logits.shape, batch_stats
        ((2, 3), {})
    """
    from flax import nnx

    _check_makes_nnx(module)
    _check_takes_rngs(module)

    def build(key: Array) -> Any:
        return module if isinstance(module, nnx.Module) else module(nnx.Rngs(key))

    built = build(jax.random.key(0))
    name = type(built).__name__
    if not isinstance(built, nnx.Module):
        raise TypeError(
            f"from_nnx needs a function that makes an NNX module, but it makes a {name}"
        )
    # `train()` and `eval()` do not reach an argument, whose default would hold in both modes.
    train_values = find_train_values(built)
    if train_argument is not None:
        train_values = choose_train_values(built, train_argument, train_value)
    elif not train_values and (asked := find_asked_argument(built)):
        raise TypeError(
            f"is the argument {asked!r} of {name}.__call__ true in training or in evaluation? Pass "
            f"train_argument={asked!r} with train_value=True or train_value=False, its value in "
            "training, or rename it if it tells neither"
        )
    check_required_arguments(built, train_values)
    paths = parse_feature_paths(features)
    recorded_paths = find_recorded_paths(built, paths.values())
    graphdef, param_state, batch_stat_state, other_state = nnx.split(
        built, nnx.Param, nnx.BatchStat, ...
    )

    def init(key: Array, inputs: Inputs) -> dict:
        del inputs
        _, params, batch_stats, _ = nnx.split(build(key), nnx.Param, nnx.BatchStat, ...)
        variables = {
            "params": nnx.to_pure_dict(params),
            "batch_stats": nnx.to_pure_dict(batch_stats),
        }
        # Copies: a training step that donates its state must not delete the module's own weights.
        return jax.tree.map(jnp.array, variables)

    def read(built: Any, kind: Any) -> dict:
        return nnx.to_pure_dict(nnx.state(built, kind))

    def check_evaluation(before: tuple, after: tuple, inputs: Inputs) -> None:
        # Within `nnx.jit` and the like, what stays as it is gets a new object as well.
        pairs = zip(before, after, strict=True)
        if all(not jax.tree.leaves(old) or are_same_leaves(old, new) for old, new in pairs):
            return
        if not found_changes:
            found_changes.append(_find_changes(built, mode_arguments(False), inputs))
        _check_evaluation(name, *found_changes[0])

    found_changes: list[tuple[bool, bool]] = []

    def mode_arguments(train: bool) -> dict[str, Any]:
        return {name: train == value for name, value in train_values.items()}

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        # `replace_by_pure_dict` writes into the state that it gets, which all calls share.
        params = jax.tree.map(lambda leaf: leaf, param_state)
        batch_stats = jax.tree.map(lambda leaf: leaf, batch_stat_state)
        nnx.replace_by_pure_dict(params, variables["params"])
        nnx.replace_by_pure_dict(batch_stats, variables["batch_stats"])
        merged = nnx.merge(graphdef, params, batch_stats, other_state, copy=True)
        if train:
            merged.train()
        else:
            merged.eval()
        if not train_values:
            check_fixed_mode(merged, train=train)
        if key is not None:
            _reseed(merged, key)
        before, draws = read(merged, nnx.BatchStat), read(merged, nnx.RngCount)
        others_before = _read_other_variables(merged)
        record_outputs(merged, find_callable_paths(built) if is_listing() else recorded_paths)
        outputs = check_outputs(merged(inputs, **mode_arguments(train)), name)
        _check_others_stand(name, others_before, _read_other_variables(merged))
        batch_stats = read(merged, nnx.BatchStat)
        if not train:
            check_evaluation((draws, before), (read(merged, nnx.RngCount), batch_stats), inputs)
        if train:
            # A layer that draws counts its draws.
            is_off = has_nnx_dropout(merged) and are_same_leaves(draws, read(merged, nnx.RngCount))
            warn_of_equal_modes(
                name,
                statistics_stand=are_same_leaves(before, batch_stats),
                dropout_is_off=is_off,
            )
        if is_listing():
            list_outputs(read_outputs(merged, find_callable_paths(built)))
            return outputs, batch_stats
        selected = _select_features(name, paths, read_outputs(merged, recorded_paths))
        features = merge_features(name, outputs.features, selected)
        return outputs._replace(features=features), batch_stats

    return Model(init, apply)


def _select_features(
    name: str, paths: dict[str, str], calls: dict[str, Sequence[Any]]
) -> dict[str, Array]:
    """Returns the features by name; raises `ValueError` if a path is missing."""
    features, missing = select_features(paths, calls)
    if missing:
        raise ValueError(
            f"the output of {missing[0]!r} in {name} cannot be a feature: it is not called, "
            "consists of no arrays, or is called by a transformation that lets no new variable "
            "out: models.feature_paths(model, inputs) lists the paths"
        )
    return features


def _check_makes_nnx(module: Any) -> None:
    """Raises `TypeError` unless a module may be one of NNX, or a function or class of it."""
    from flax import linen

    if isinstance(module, Model):
        raise TypeError("from_nnx takes an NNX module, but this is a Model already: use it")
    kind = module if isinstance(module, type) else type(module)
    if issubclass(kind, linen.Module):
        raise TypeError(f"{kind.__name__} is a Linen module: use models.from_linen")
    if not callable(module):
        raise TypeError(
            f"from_nnx takes an NNX module or a function of nnx.Rngs, got a {kind.__name__}: pass "
            "lambda rngs: Module(rngs=rngs)"
        )


def _check_takes_rngs(module: Any) -> None:
    """Raises `TypeError` if a function or class cannot be called with `nnx.Rngs` alone."""
    from flax import nnx

    if isinstance(module, nnx.Module):
        return
    is_class = isinstance(module, type)
    # The metaclass of NNX modules takes any arguments.
    arguments = (None, None) if is_class else (None,)
    try:
        inspect.signature(module.__init__ if is_class else module).bind(*arguments)
    except ValueError:  # a builtin without a signature
        pass
    except TypeError as error:
        name = getattr(module, "__name__", type(module).__name__)
        raise TypeError(
            f"from_nnx calls {name} with nnx.Rngs alone, which it does not take ({error}): pass "
            f"lambda rngs: {name if is_class else 'Module'}(..., rngs=rngs)"
        ) from error


def _reseed(module: nnx.Module, key: Array) -> None:
    """Restarts all random streams of a module, whatever their names, from one key."""
    from flax import nnx

    tags = {node.key.tag for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)}
    # Streams of equal keys would draw the same bits.
    keys: dict[str, Any] = {
        tag: jax.random.fold_in(key, zlib.crc32(tag.encode())) for tag in sorted(tags)
    }
    keys |= {"default": key, "dropout": key}
    # A stream that `nnx.vmap` divided has an array of keys.
    nnx.reseed(module, policy="match_shape", **keys)


def _read_other_variables(module: nnx.Module) -> dict[str, Any]:
    """Returns the values by path of an NNX module's variables that no model keeps."""
    from flax import nnx

    # The values that `sow` keeps are not used, and random streams start anew in each call.
    known = nnx.Any(nnx.Param, nnx.BatchStat, nnx.RngState, nnx.Intermediate)
    values = nnx.to_pure_dict(nnx.state(module, nnx.Not(known)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(values)
    }


def _find_changes(
    module: nnx.Module, mode_arguments: dict[str, Any], inputs: Inputs
) -> tuple[bool, bool]:
    """Returns whether an NNX module draws numbers, and changes its statistics, in evaluation.

    A batch of ones is evaluated, whatever trace is under way.
    """
    from flax import nnx

    with jax.ensure_compile_time_eval():
        copy = nnx.merge(*nnx.split(module), copy=True)
        copy.eval()
        kinds = (nnx.RngCount, nnx.BatchStat)
        before = [nnx.to_pure_dict(nnx.state(copy, kind)) for kind in kinds]
        copy(jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), inputs), **mode_arguments)
        after = [nnx.to_pure_dict(nnx.state(copy, kind)) for kind in kinds]
    draws, updates = (
        not all(map(np.array_equal, jax.tree.leaves(old), jax.tree.leaves(new)))
        for old, new in zip(before, after, strict=True)
    )
    return draws, updates


def _check_evaluation(name: str, draws: bool, updates: bool) -> None:
    """Raises `ValueError` if an NNX module draws numbers or updates statistics in evaluation."""
    # A value that a layer gets in its call wins over `module.eval()`.
    if draws:
        raise ValueError(
            f"{name} draws random numbers in evaluation, as Dropout does with deterministic=False: "
            "leave that out of its call, since eval() sets it"
        )
    if updates:
        raise ValueError(
            f"{name} changes its running statistics in evaluation, as BatchNorm does with "
            "use_running_average=False: leave that out of its call, since eval() sets it"
        )


def _check_others_stand(name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises `ValueError` if a call changed variables whose new values would be lost."""
    # Until something computes a new value, the leaf is the same object.
    changed = [
        path for path, leaf in after.items() if path not in before or leaf is not before[path]
    ]
    if changed:
        raise ValueError(
            f"{name} changes {list_some(changed)} in a call, but a model keeps nnx.Param and "
            "nnx.BatchStat only: make it an nnx.BatchStat, or write models.Model(init, apply) "
            "with two functions"
        )
