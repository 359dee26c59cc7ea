"""Models as pairs of pure functions, made from Flax Linen, Flax NNX or anything else."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import zlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxkd._messages import list_some
from jaxkd.models._modes import (
    are_same_leaves,
    check_fixed_mode,
    check_required_arguments,
    choose_train_values,
    find_asked_argument,
    find_train_values,
    has_nnx_dropout,
    record_linen_dropout,
    warn_of_equal_modes,
)

if TYPE_CHECKING:
    from flax import linen, nnx


Inputs = Any
"""An array `[B, ...]`, or a dict of such arrays with one B."""


class Outputs(NamedTuple):
    """Outputs of a model for a batch.

    Attributes:
        logits: `[..., num_classes]`.
        features: Intermediate states by name, such as `stage1` and `pre_logits`.
    """

    logits: Array
    features: dict[str, Array]


class Network(NamedTuple):
    """What a model was made from, so that a saved student can name its network.

    Attributes:
        module: The Linen module.
        mean: Mean of each channel that `with_input_normalization` subtracts, or `None`.
        std: Standard deviation of each channel, or `None`.
    """

    module: linen.Module
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Model(NamedTuple):
    """A pair of pure functions over variables `{"params": ..., "batch_stats": ...}`, plain dicts.

    Attributes:
        init: `(key, inputs) -> variables`.
        apply: `(variables, inputs, *, train, key=None) -> (Outputs, batch_stats)`. Only training
            updates the running statistics; a model without any returns `{}`. `key` is the source of
            randomness for dropout and other stochastic layers.
        network: What the pair was made from, if that is known. Only saving a student reads it.
    """

    init: Callable[..., dict]
    apply: Callable[..., tuple[Outputs, dict]]
    network: Network | None = None


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
        outputs = _check_outputs(result, name)
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


def _check_outputs(result: Any, name: str) -> Outputs:
    """Returns the outputs of a module; raises `TypeError` if they are of another type."""
    if isinstance(result, Outputs):
        return result
    if not hasattr(result, "shape"):
        raise TypeError(
            f"{name} returns a {type(result).__name__}: let it return the logits alone, or "
            "`return models.Outputs(logits, features)` with the features in a dict"
        )
    return Outputs(result, {})


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


def from_nnx(
    module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    *,
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
        train_argument: Name of an argument of another name that tells training from evaluation.
        train_value: Value of that argument in training.

    Returns:
        The pair of functions. Each call works on a copy of the module, which never changes.

    Raises:
        TypeError: If it is neither an NNX module nor makes one, its `__call__` needs another
            argument than its inputs, or it is not known whether an argument such as `inference` is
            true in training. From `apply`, if the module returns anything but `Outputs` or one
            array.
        ValueError: From `apply`, if an attribute of the module fixes the other mode, the call
            changes variables other than `nnx.BatchStat`, which no model keeps, or it draws numbers
            or changes statistics in evaluation.

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
        outputs = _check_outputs(merged(inputs, **mode_arguments(train)), name)
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
        return outputs, batch_stats

    return Model(init, apply)


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


def with_input_normalization(
    model: Model, mean: ArrayLike, std: ArrayLike, *, max_value: float | None = None
) -> Model:
    """Makes a model normalise its input, so that it takes uint8 images as they are stored.

    `x -> (x / max_value - mean) / std`, in float32. Teacher and student may use different values.

    Args:
        model: A model of floating-point images `[B, H, W, C]`.
        mean: Mean of each channel, `[C]`, of pixels scaled to [0, 1]. One number serves all.
        std: Standard deviation of each channel, `[C]` or a number, on the same scale.
        max_value: Largest value that a pixel can have, such as 1.0 for floating-point images in
            [0, 1]. By default 255, and only uint8 images are taken: another dtype does not tell
            the scale of its pixels. A pixel beyond twice that value becomes NaN.

    Returns:
        The model of images in [0, `max_value`].

    Raises:
        TypeError: From `init` and `apply`, if the images are not uint8 and there is no `max_value`.
        ValueError: If `max_value` is not positive, a mean is not within [0, 1], or a standard
            deviation is not positive or above 1. From `init` and `apply`, if `mean` or `std` has
            another number of channels than the images, or uint8 images have another `max_value`
            than 255.
    """
    if max_value is not None and not max_value > 0:
        raise ValueError(f"max_value must be positive, got {max_value}")
    _check_statistics(mean, std)
    mean = jnp.asarray(mean, jnp.float32)
    std = jnp.asarray(std, jnp.float32)

    def normalize(inputs: Array) -> Array:
        # The dtype is known while a program is traced, the pixels are not.
        dtype = getattr(inputs, "dtype", type(inputs).__name__)
        if max_value is None and dtype != jnp.uint8:
            raise TypeError(
                f"with_input_normalization expects uint8 images, got {dtype}: for another scale "
                "pass max_value, 1.0 for pixels in [0, 1] or 255.0 for pixels in [0, 255]"
            )
        if dtype == jnp.uint8 and max_value not in (None, 255):
            raise ValueError(
                f"uint8 images are divided by 255, but max_value is {max_value}: leave max_value "
                "out, or convert images of that scale to float32 first"
            )
        _check_channels("mean", mean, inputs)
        _check_channels("std", std, inputs)
        channels = (1,) * (inputs.ndim - 1) + (-1,)
        pixels = inputs.astype(jnp.float32) / (255 if max_value is None else max_value)
        if dtype != jnp.uint8:
            # Augmentation may exceed the scale a little, but not another scale's pixels.
            pixels = jnp.where(jnp.abs(pixels) <= 2, pixels, jnp.nan)
        return (pixels - mean.reshape(channels)) / std.reshape(channels)

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        return model.apply(variables, normalize(inputs), train=train, key=key)

    network = model.network
    if network is not None:
        # A description has one normalisation of uint8 images, and no other.
        is_known = max_value is None and network.mean is None
        network = network._replace(mean=_to_tuple(mean), std=_to_tuple(std)) if is_known else None
    return Model(lambda key, inputs: model.init(key, normalize(inputs)), apply, network)


def _to_tuple(values: Array) -> tuple[float, ...]:
    return tuple(np.atleast_1d(np.asarray(values)).tolist())


def _check_statistics(mean: ArrayLike, std: ArrayLike) -> None:
    """Raises `ValueError` if a mean or deviation cannot be that of pixels in [0, 1]."""
    means, stds = np.ravel(np.asarray(mean, np.float32)), np.ravel(np.asarray(std, np.float32))
    for name, values, is_right, interval in (
        ("mean", means, (means >= 0) & (means <= 1), "[0, 1]"),
        # A channel of one value has the deviation 1 in `data.channel_statistics`.
        ("std", stds, (stds > 0) & (stds <= 1), "(0, 1]"),
    ):
        if not is_right.all():
            wrong = values[~is_right][0]
            raise ValueError(
                f"{name} must be within {interval}, got {wrong:.4g}: images are scaled to [0, 1] "
                "before, so give the statistics of images on that scale"
                + (f", such as {wrong:.4g} / 255" if wrong > 1 else "")
            )


def _check_channels(name: str, values: Array, images: Array) -> None:
    """Raises `ValueError` if there is neither one number nor a value for each channel."""
    num_channels = images.shape[-1]
    # One value in a list would be repeated over the channels, and one channel over the values.
    if values.ndim and values.size != num_channels:
        raise ValueError(
            f"{name} has {values.size} value{'s' * (values.size != 1)}, but the images have "
            f"{num_channels} channel{'s' * (num_channels != 1)}: give one for each channel, the "
            "last axis, or a number for all"
        )


# Flax fixes a module's axis when the module is constructed, before it is known on how many devices
# it will train. A context variable lets the training step set the axis while it traces the model.
_BATCH_STATS_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "batch_stats_axis", default=None
)


@contextlib.contextmanager
def cross_replica_batch_stats(axis_name: str | None) -> Generator[None]:
    """Makes `BatchNorm` of this package use the statistics of all devices while a model is traced.

    Args:
        axis_name: Name of the mapped axis over which the batch is divided. With `None`, each device
            uses the statistics of its own part of the batch.
    """
    token = _BATCH_STATS_AXIS.set(axis_name)
    try:
        yield
    finally:
        _BATCH_STATS_AXIS.reset(token)


def batch_stats_axis_name() -> str | None:
    """Returns the axis name that `cross_replica_batch_stats` has set."""
    return _BATCH_STATS_AXIS.get()


def with_compute_dtype(model: Model, dtype: DTypeLike) -> Model:
    """Makes a model compute in another precision, such as bfloat16, with weights kept in float32.

    Weights and inputs are cast on every call, so that gradients and optimizer stay in float32.
    Running statistics are not cast, and the logits are cast back to float32. Apply
    `with_input_normalization` to the result, so that pixels are normalised in float32.

    Args:
        model: A model whose layers compute in the dtype of their inputs, as Flax's do by default.
        dtype: A floating-point dtype.

    Returns:
        The model, with the same variables.

    Raises:
        TypeError: If it is another dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.models import CNN, from_linen
        >>> model = with_compute_dtype(from_linen(CNN(features=(4,), hidden=8)), jnp.bfloat16)
        >>> images = jnp.zeros((2, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> outputs, _ = model.apply(variables, images, train=False)
        >>> variables["params"]["conv1"]["kernel"].dtype, outputs.logits.dtype
        (dtype('float32'), dtype('float32'))
        >>> outputs.features["stage1"].dtype
        dtype(bfloat16)
    """
    # `None` would be float64 for NumPy, and `float` is a default of JAX.
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        name = "None" if dtype is None else jnp.dtype(dtype).name
        raise TypeError(f"dtype must be floating-point, got {name}: pass one such as jnp.bfloat16")

    def cast(tree: Any) -> Any:
        # Token ids and other integers keep their dtype.
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        # Statistics in bfloat16 would stop moving: the small step of a moving average rounds away.
        compute_variables = {**variables, "params": cast(variables["params"])}
        outputs, batch_stats = model.apply(compute_variables, cast(inputs), train=train, key=key)
        return outputs._replace(logits=outputs.logits.astype(jnp.float32)), batch_stats

    return model._replace(apply=apply)


def with_class_order(model: Model, order: ArrayLike) -> Model:
    """Makes a model whose classes are in another order, such as that of a student's labels.

    Args:
        model: Any model with logits `[..., C]`.
        order: `[C]`, int. The model's output for each class, from `jaxkd.data.match_classes`.

    Returns:
        The model with logits `[..., order]`, with the same variables and features.

    Raises:
        ValueError: When applied, if `order` is not a permutation of the model's classes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxkd.data import match_classes
        >>> from jaxkd.models import CNN, from_linen
        >>> model = from_linen(CNN(features=(4,), hidden=8, num_classes=2))
        >>> images = jnp.ones((1, 8, 8, 3))
        >>> variables = model.init(jax.random.key(0), images)
        >>> swapped = with_class_order(model, match_classes(["dog", "cat"], ["cat", "dog"]))
        >>> logits, swapped_logits = (
        ...     m.apply(variables, images, train=False)[0].logits for m in (model, swapped)
        ... )
        >>> bool((logits[:, ::-1] == swapped_logits).all())
        True
    """
    order = np.asarray(order)

    def apply(
        variables: dict, inputs: Array, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        outputs, batch_stats = model.apply(variables, inputs, train=train, key=key)
        # JAX would wrap or drop an index that does not exist.
        if sorted(order.tolist()) != list(range(outputs.logits.shape[-1])):
            raise ValueError(
                f"the order of {order.size} classes is not one of the model's "
                f"{outputs.logits.shape[-1]}: give each of its outputs once"
            )
        return outputs._replace(logits=outputs.logits[..., order]), batch_stats

    # The network alone would have its classes in another order.
    return Model(model.init, apply)


def with_frozen_batch_stats(model: Model) -> Model:
    """Makes a model use and keep its running statistics in training.

    This serves fine-tuning on small batches. The model computes in training what it computes in
    evaluation, which affects every layer that depends on the mode: dropout, for example, is off.
    Scales and biases of batch normalisation are parameters, and are trained unless they are frozen.

    Args:
        model: Any model.

    Returns:
        The model that computes the same in training and evaluation, with the same variables.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxkd.models.model import from_nnx, with_frozen_batch_stats
        >>> model = with_frozen_batch_stats(from_nnx(lambda rngs: nnx.BatchNorm(2, rngs=rngs)))
        >>> images = jnp.array([[3.0, 4.0]])
        >>> _, batch_stats = model.apply(
        ...     model.init(jax.random.key(0), images), images, train=True
        ... )
        >>> batch_stats["mean"]
        Array([0., 0.], dtype=float32)
    """

    def apply(
        variables: dict, inputs: Inputs, *, train: bool, key: Array | None = None
    ) -> tuple[Outputs, dict]:
        del train
        return model.apply(variables, inputs, train=False, key=key)

    return model._replace(apply=apply)
