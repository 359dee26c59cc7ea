"""Networks as one line of text, such as `resnet20(num_classes=4)`.

The text can be typed on a command line and be saved beside weights. It is read as literals: no code
in it is run.
"""

import ast
import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from jaxkd._messages import list_some, shorten

_SHORT_NAMES = {"cnn": "CNN", "lstm": "LSTMClassifier"}
"""Names that a command line accepts besides those of `jaxkd.models`."""
_MAX_CHARACTERS = 2000
_MAX_CLASSES = 1_000_000


def reads_tokens(description: str) -> bool | None:
    """Returns whether a network that is described reads tokens; `None` if there is none."""
    name, _ = _parse(description)
    network = find_networks().get(_SHORT_NAMES.get(name, name))
    return None if network is None else "vocab_size" in inspect.signature(network).parameters


def find_networks() -> dict[str, Callable[..., nn.Module]]:
    """Finds the classifiers of `jaxkd.models`: constructors and classes of modules, by name."""
    return {name: value for name, value in sorted(_namespace().items()) if _is_network(value)}


def make_module(description: str, *, num_classes: int | None = None) -> nn.Module:
    """Makes a network of `jaxkd.models` from its description.

    Args:
        description: Name of a constructor or class, with keyword arguments in parentheses if any.
            `cnn` is `CNN` and `lstm` is `LSTMClassifier`.
        num_classes: Number of classes, unless the description has it.

    Returns:
        The Flax Linen module.

    Raises:
        ValueError: If there is no such network, or it does not take these arguments.

    Example:
        >>> from jaxkd import models
        >>> module = models.make_module("CNN(features=(16, 32), hidden=32)", num_classes=4)
        >>> models.describe_module(module)
        'CNN(features=(16, 32), hidden=32, num_classes=4)'
    """
    name, arguments = _parse(description)
    networks = find_networks()
    name = _SHORT_NAMES.get(name, name)
    if name not in networks:
        similar = difflib.get_close_matches(name, [*_SHORT_NAMES, *networks], n=4, cutoff=0.5)
        some = similar or [*_SHORT_NAMES, "resnet20", "wrn16_2", "mobilenet_v2"]
        raise ValueError(
            f"there is no network {shorten(name, 40)!r} in jaxkd.models: choose another one, such "
            f"as {', '.join(some)}"
        )
    if num_classes is not None:
        arguments.setdefault("num_classes", num_classes)
    _check_num_classes(arguments.get("num_classes", 1))
    parameters = inspect.signature(networks[name]).parameters
    accepted = [parameter for parameter in parameters if parameter not in ("parent", "name")]
    if unknown := [argument for argument in arguments if argument not in accepted]:
        raise ValueError(
            f"{name} does not take {list_some(unknown)}: choose from {', '.join(accepted)}"
        )
    missing = [
        parameter
        for parameter in accepted
        if parameters[parameter].default is inspect.Parameter.empty and parameter not in arguments
    ]
    if missing:
        raise ValueError(f"{name} needs {list_some(missing)}, as in {name}({missing[0]}=...)")
    return networks[name](**arguments)


def describe_module(module: nn.Module) -> str | None:
    """Describes a network of `jaxkd.models` in a line from which `make_module` makes it again.

    Args:
        module: A module of `jaxkd.models`.

    Returns:
        The description with the number of classes. `None` for other modules, and for one with
        functions of its own.
    """
    networks = find_networks()
    for name, network in networks.items():
        if inspect.isfunction(network) and network(num_classes=_classes_of(module)) == module:
            return f"{name}(num_classes={_classes_of(module)})"
    name = type(module).__name__
    if networks.get(name) is not type(module):
        return None
    arguments = []
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        is_default = field.name in ("parent", "name") or value == field.default
        if is_default and field.name != "num_classes":
            continue
        text = _describe_value(value)
        if text is None:
            return None
        arguments.append(f"{field.name}={text}")
    return f"{name}({', '.join(arguments)})"


def _namespace() -> Mapping[str, Any]:
    # Not at the top of the module, because the package imports this module.
    from jaxkd import models

    return {name: getattr(models, name) for name in models.__all__}


def _is_network(value: Any) -> bool:
    is_module = inspect.isclass(value) and issubclass(value, nn.Module)
    if not (is_module or inspect.isfunction(value)):
        return False
    parameters = inspect.signature(value).parameters
    required = [name for name, item in parameters.items() if item.default is item.empty]
    return "num_classes" in parameters and (is_module or not required)


def _classes_of(module: nn.Module) -> int:
    return getattr(module, "num_classes", 0)


def _describe_value(value: Any) -> str | None:
    for name, public in _namespace().items():
        # Such as a pooling of BERT.
        if public is value:
            return name
    text = repr(value)
    try:
        return text if ast.literal_eval(text) == value else None
    except (ValueError, SyntaxError):
        return None


def _parse(description: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and the keyword arguments of a description."""
    shown = shorten(repr(description), 80)
    if len(description) > _MAX_CHARACTERS:
        raise ValueError(f"a network's description has more than {_MAX_CHARACTERS:,} characters")
    try:
        node = ast.parse(description.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
            raise ValueError("not a call with keywords")
        arguments = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise ValueError("two stars")
            arguments[keyword.arg] = _evaluate(keyword.value)
    # ast raises the others for deeply nested text, and for null characters.
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"cannot read the network {shown}: write a name such as resnet20, or a name with "
            "keywords such as CNN(features=(16, 32), hidden=32)"
        ) from error
    return node.func.id, arguments


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _namespace():
        return _namespace()[node.id]
    return ast.literal_eval(node)


def _check_num_classes(num_classes: Any) -> None:
    is_integer = isinstance(num_classes, int) and not isinstance(num_classes, bool)
    if not is_integer or not 1 <= num_classes <= _MAX_CLASSES:
        raise ValueError(
            f"num_classes must be an integer from 1 to {_MAX_CLASSES:,}, "
            f"got {shorten(repr(num_classes), 40)}"
        )
