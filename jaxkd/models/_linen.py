"""Models from Flax Linen modules."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax import Array

from jaxkd.models._features import (
    FeaturePaths,
    are_arrays,
    describe_unknown_path,
    is_listing,
    is_needed,
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
    find_train_values,
    record_linen_dropout,
    warn_of_equal_modes,
)
from jaxkd.models.model import Inputs, Model, Network, Outputs, check_outputs

if TYPE_CHECKING:
    from flax import linen

# The name under which Flax itself keeps what a call returned.
_OUTPUT = "__call__"


def from_linen(
    module: linen.Module,
    *,
    features: FeaturePaths = (),
    train_argument: str | None = "train",
    train_value: bool | None = None,
) -> Model:
    """Makes a model from a Flax Linen module.

    The module takes an array, or a dict of arrays, and returns `Outputs` or logits alone. The
    values that it sows into `"intermediates"` become features, named by their path; the features of
    `Outputs` come first where a name is in both.

    Args:
        module: The module.
        features: Submodules whose outputs become features: paths such as `"layers_0/conv"`, or a
            dict from names to paths; `feature_paths` lists them. If a submodule is called several
            times, or returns several arrays, the number or key of the array is appended to the name
            after a `/`, and a path that ends so selects one of them. In `nn.scan` and `nn.vmap`,
            `variable_axes` must have `"intermediates"`, whose axis the features then have.
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
            one of the names above, another argument has no default, or `features` is no dict of
            texts, nor several. From `apply`, if the module returns anything but `Outputs` or one
            array.
        ValueError: From `init`, if the module has variables other than parameters and running
            statistics. From `apply`, if an attribute of the module fixes the other mode, a path of
            `features` is not called, or a name is that of a feature of the module's own.

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
        >>> model = from_linen(CNN(features=(16,), hidden=32), features={"convolution": "conv1"})
        >>> outputs, _ = model.apply(variables, images, train=False)
        >>> outputs.features["convolution"].shape
        (2, 30, 30, 16)
    """
    from flax import linen

    _check_is_linen(module)
    paths = parse_feature_paths(features)
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
        recorder = _OutputRecorder(None if is_listing() else tuple(paths.values()))
        if recorder.is_needed:
            # `nn.jit` caches by the mutable collections, so that one more tells apart its traces
            # with and without recording. No variable is in it.
            mutable.append(f"outputs of {recorder.paths}")
        with (
            _explain_flax_errors(name, train=train),
            linen.intercept_methods(record_linen_dropout(dropout)),
            linen.intercept_methods(recorder) if recorder.is_needed else contextlib.nullcontext(),
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
        sown, calls = _read_intermediates(updates.get("intermediates", {}))
        if is_listing():
            list_outputs(recorder.sort(calls))
        else:
            own = sown | dict(outputs.features)
            selected = _select_features(name, paths, calls, recorder)
            outputs = outputs._replace(features=merge_features(name, own, selected))
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


class _OutputRecorder:
    """An interceptor of Linen methods that sows what submodules return.

    Sown values leave `nn.remat`, `nn.jit` and `nn.scan` as those that a module sows itself do.

    Attributes:
        paths: Paths of the submodules, or of parts of what they return; `None` for all submodules.
        is_stored: Whether the output was sown, by the path of each submodule that was called.
    """

    def __init__(self, paths: Sequence[str] | None) -> None:
        self.paths = paths
        self.is_stored: dict[str, bool] = {}

    @property
    def is_needed(self) -> bool:
        return self.paths is None or bool(self.paths)

    def __call__(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        # The path of the whole network is empty, and a module outside of it has none.
        is_submodule = context.module.scope is not None and bool(context.module.path)
        if context.method_name != "__call__" or not is_submodule:
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        self.is_stored.setdefault(path, False)
        result = call(*args, **kwargs)
        if (self.paths is None or is_needed(path, self.paths)) and are_arrays(result):
            self.is_stored[path] |= context.module.sow("intermediates", _OUTPUT, result)
        return result

    def sort(self, calls: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """Sorts outputs by the order in which the submodules were called first."""
        # What `nn.jit` had traced before was not called now.
        return {path: calls[path] for path in (self.is_stored | calls) if path in calls}


def _select_features(
    name: str, paths: dict[str, str], calls: dict[str, Sequence[Any]], recorder: _OutputRecorder
) -> dict[str, Array]:
    """Returns the features by name; raises `ValueError` if a path is missing."""
    features, missing = select_features(paths, calls)
    for path in missing:
        if path not in recorder.is_stored:
            raise ValueError(describe_unknown_path(name, path, list(recorder.is_stored)))
        raise ValueError(
            f"the output of {path!r} in {name} cannot be a feature: it consists of arrays in no "
            "call, or is within nn.scan, nn.vmap or the like, which needs "
            "variable_axes={..., 'intermediates': 0} to let it out"
        )
    return features


def _read_intermediates(
    intermediates: dict,
) -> tuple[dict[str, Array], dict[str, Sequence[Any]]]:
    """Returns the values that a module has sown by name, and recorded outputs by path.

    A name is a path, with a number appended if a path has several values.
    """
    # `sow` collects the values of a path in a tuple.
    leaves = jax.tree_util.tree_leaves_with_path(
        intermediates, is_leaf=lambda node: isinstance(node, tuple)
    )
    features, calls = {}, {}
    for path, values in leaves:
        *parents, last = (str(entry.key) for entry in path)
        name = "/".join((*parents, last))
        if last == _OUTPUT:
            calls["/".join(parents)] = values
        elif len(values) == 1:
            features[name] = values[0]
        else:
            features |= {f"{name}/{i}": value for i, value in enumerate(values)}
    return features, calls
