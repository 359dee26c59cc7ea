"""How a module learns whether it trains: by arguments of its call, or not at all."""

import inspect
import warnings
from collections.abc import Callable, Container
from typing import Any

import jax

TRAIN_VALUES = {
    "train": True,
    "training": True,
    "is_training": True,
    "is_train": True,
    "train_mode": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Values in training of the arguments that Flax and its users call by these names."""

# Their sense is not certain: `test` may choose a check, and `inference` a faster algorithm.
_ASKED_NAMES = (
    *("inference", "is_inference", "eval", "is_eval", "eval_mode", "evaluation"),
    *("test", "is_test", "test_mode", "testing"),
)


def find_train_values(module: Any) -> dict[str, bool]:
    """Returns the value in training of each argument that tells a module's mode."""
    parameters = _parameters(module)
    return {name: value for name, value in TRAIN_VALUES.items() if name in parameters}


def find_asked_argument(module: Any) -> str | None:
    """Returns the first argument that may tell a module's mode, but whose sense is not certain."""
    for name, parameter in _parameters(module).items():
        # Another default than a truth value is that of an option.
        is_switch = isinstance(parameter.default, bool) or parameter.default is parameter.empty
        if name in _ASKED_NAMES and is_switch:
            return name
    return None


def choose_train_values(
    module: Any, train_argument: str, train_value: bool | None
) -> dict[str, bool]:
    """Returns the value in training of an argument, and of all others that tell the mode.

    Raises:
        TypeError: If there is no such argument, or it is not known whether it is true in training.
    """
    call = f"{type(module).__name__}.__call__"
    train_values = find_train_values(module)
    if train_argument not in _parameters(module):
        known = next(iter(train_values), find_asked_argument(module) or "...")
        raise TypeError(
            f"{call} has no argument {train_argument!r}: pass train_argument={known!r} "
            "with the name of the argument that tells training from evaluation, or "
            "train_argument=None if there is none"
        )
    if train_value is None:
        train_value = TRAIN_VALUES.get(train_argument)
    if train_value is None:
        raise TypeError(
            f"is the argument {train_argument!r} of {call} true in training or in evaluation? "
            "Pass train_value=True or train_value=False, its value in training"
        )
    return train_values | {train_argument: train_value}


def check_required_arguments(module: Any, passed: Container[str]) -> None:
    """Raises `TypeError` if a module needs more than its inputs and the arguments passed."""
    # `self` and the inputs come first.
    parameters = list(_parameters(module).values())[2:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in variadic
        and parameter.name not in passed
    ]
    if required:
        raise TypeError(
            f"{type(module).__name__}.__call__ needs {required[0]!r} beside its inputs, which a "
            "model is not given: set a default, or take a dict of inputs that holds it"
        )


def check_fixed_mode(module: Any, *, train: bool) -> None:
    """Raises `ValueError` if an attribute fixes the other mode than the one that is wanted."""
    for name, value in TRAIN_VALUES.items():
        attribute = getattr(module, name, None)
        # NNX modules have a method of the name `train`.
        if isinstance(attribute, bool) and (attribute == value) != train:
            mode = "training" if train else "evaluation"
            raise ValueError(
                f"{type(module).__name__} has {name}={attribute} as an attribute, which would hold "
                f"in {mode} too: make {name} an argument of its __call__"
            )


def warn_of_equal_modes(name: str, *, statistics_stand: bool, dropout_is_off: bool) -> None:
    """Warns if a module has layers that depend on the mode, and they do not follow it."""
    signs = ["its running statistics do not change"] if statistics_stand else []
    signs += ["its dropout drops nothing"] if dropout_is_off else []
    if signs:
        warnings.warn(
            f"{name} trains as it is evaluated, {' and '.join(signs)}: let an argument of its "
            "__call__ such as train reach these layers, or say by models.with_frozen_batch_stats "
            "that it is meant",
            stacklevel=3,
        )


def are_same_leaves(before: Any, after: Any) -> bool:
    """True if there are leaves, and they are the same objects: nothing has computed new ones."""
    old, new = jax.tree.leaves(before), jax.tree.leaves(after)
    return bool(old) and len(old) == len(new) and all(map(lambda a, b: a is b, old, new))


def record_linen_dropout(results: list[bool]) -> Callable[..., Any]:
    """Makes an interceptor of Linen methods that notes whether each dropout layer was active."""
    from flax import linen

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        is_call = context.method_name == "__call__"
        if isinstance(context.module, linen.Dropout) and is_call and context.module.rate:
            # In evaluation the layer returns its input itself.
            results.append(not any(result is value for value in (*args, *kwargs.values())))
        return result

    return intercept


def has_nnx_dropout(module: Any) -> bool:
    """True if an NNX module has a dropout layer with a rate above 0."""
    from flax import nnx

    return any(isinstance(node, nnx.Dropout) and node.rate for _, node in nnx.iter_graph(module))


def _parameters(module: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(module).__call__).parameters)
