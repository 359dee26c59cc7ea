"""Checks of what a user passes as a plan: the types of attributes, and the arrays of examples."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxkd._messages import shorten
from jaxkd.data.records import scannable
from jaxkd.distill._cached_outputs import DTYPES
from jaxkd.distill.selection import Best
from jaxkd.models.model import Model


def named_arrays(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterates over arrays by name; those of a dict within have names such as `inputs/tokens`."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from named_arrays(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def check_numbers(data: Mapping[str, Any], owner: str) -> None:
    """Raises `ValueError` if an array is masked, or holds text or objects instead of numbers."""
    for name, array in named_arrays(data):
        is_number = isinstance(array, (bool, int, float, complex, str, bytes))
        if not is_number and not hasattr(array, "dtype"):
            raise ValueError(
                f"{owner} has a {type(array).__name__} as {name!r}: make it an array with "
                "np.asarray"
            )
        if isinstance(array, np.ma.MaskedArray):
            raise ValueError(
                f"{owner} has a masked array as {name!r}, whose mask JAX does not know: pass "
                "array.filled(...), and the mask as an array of its own"
            )
        # JAX's own dtypes are numbers, but not all of them are NumPy's. That of keys is neither.
        dtype = np.asarray(array).dtype if isinstance(array, (str, bytes)) else None
        dtype = getattr(array, "dtype", dtype)
        if isinstance(dtype, np.dtype) and dtype.kind in "OSUMm":
            raise ValueError(
                f"{owner} has values of dtype {dtype} as {name!r}, but JAX needs numbers: number "
                "classes from 0, and leave out names and dates"
            )


def check_integers(data: Mapping[str, Any], owner: str) -> None:
    """Raises `ValueError` if an array holds integers that do not fit into JAX's 32 bits.

    Of streamed data, a sample is searched.
    """
    for name, array in named_arrays(scannable(data)):
        dtype = getattr(array, "dtype", None)
        if not isinstance(dtype, np.dtype) or dtype.kind not in "iu" or not np.size(array):
            continue
        # JAX would take them modulo 2**32.
        limits = np.iinfo(jax.dtypes.canonicalize_dtype(dtype))
        smallest, largest = int(np.min(array)), int(np.max(array))
        if smallest < limits.min or largest > limits.max:
            raise ValueError(
                f"{owner} has integers from {smallest} to {largest} as {shorten(name, 40)!r}, of "
                f"which JAX keeps 32 bits: number them from 0, or set jax_enable_x64"
            )


class Requirement(NamedTuple):
    """A requirement on the type of an attribute."""

    is_met: Callable[[Any], bool]
    text: str
    is_optional: bool = False

    def check(self, value: Any, owner: str) -> None:
        """Raises `TypeError` if a value does not meet it."""
        if not (self.is_met(value) or (self.is_optional and value is None)):
            raise TypeError(f"{owner} must be {self.text}, got {describe_value(value)}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _is_optimizer(tx: Any) -> bool:
    return callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))


def _is_names(value: Any) -> bool:
    # A string is a sequence of names, too: of its letters.
    return isinstance(value, (tuple, list)) and all(isinstance(name, str) for name in value)


def _is_key_name(value: Any) -> bool:
    names = value.values() if isinstance(value, Mapping) else [value]
    return all(isinstance(name, str) for name in names)


def _takes(function: Any, count: int) -> bool:
    """Returns whether a function may be called with a number of positional arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        pass
    return True


def describe_value(value: Any) -> str:
    # A split of a dataset, unlike a stage.
    if isinstance(getattr(type(value), "examples", None), property):
        return f"a {type(value).__name__}: pass its .examples"
    # The text of an array or of a network may fill pages, and costs time.
    is_short = value is None or isinstance(value, (bool, int, float, str, tuple, list))
    return shorten(repr(value), 80) if is_short else f"a {type(value).__name__}"


MODEL = Requirement(
    lambda value: isinstance(value, Model),
    "a models.Model, as models.from_linen or models.from_nnx makes",
)
REQUIREMENTS = {
    "model": MODEL,
    "data": Requirement(
        lambda value: isinstance(value, Mapping) or (callable(value) and _takes(value, 1)),
        "a dict of arrays such as {'inputs': images, 'labels': labels}, or a function of the seed",
    ),
    "loss": Requirement(
        lambda value: callable(value) and _takes(value, 4),
        "a function (student, teachers, batch, context) -> [B]",
    ),
    "tx": Requirement(_is_optimizer, "an optimizer such as optax.adam(1e-3)"),
    "steps": Requirement(_is_integer, "an integer"),
    "teachers": Requirement(_is_names, "a tuple of names such as ('teacher',)"),
    "start": Requirement(lambda value: isinstance(value, str), "a name", is_optional=True),
    "transfer": Requirement(callable, "a function (source, fresh) -> variables", is_optional=True),
    "batch_size": Requirement(_is_integer, "an integer"),
    "rewrite": Requirement(
        lambda value: callable(value) and _takes(value, 3),
        "a function (variables, batch, key) -> batch",
        is_optional=True,
    ),
    "augment": Requirement(callable, "a function (key, inputs) -> inputs", is_optional=True),
    "views": Requirement(_is_integer, "an integer", is_optional=True),
    "cache_top_k": Requirement(_is_integer, "an integer", is_optional=True),
    "cache_features": Requirement(_is_names, "a tuple of names such as ('hidden',)"),
    "cache_logits": Requirement(lambda value: isinstance(value, bool), "True or False"),
    "cache_dtype": Requirement(
        lambda value: isinstance(value, str) and value in DTYPES,
        "'float32', 'float16' or 'bfloat16'",
    ),
    "init_loss": Requirement(callable, "a function key -> loss_params", is_optional=True),
    "loss_tx": Requirement(_is_optimizer, "an optimizer such as optax.adam(1e-3)", True),
    "ema_decay": Requirement(_is_number, "a number between 0 and 1", is_optional=True),
    "best": Requirement(
        lambda value: isinstance(value, Best), 'such as Best("accuracy")', is_optional=True
    ),
    "key_name": Requirement(
        _is_key_name, "a name, or a dict of names such as {'init': 'pair'}", is_optional=True
    ),
}
"""The requirements on the attributes of a stage, by name."""

DERIVED_REQUIREMENTS = {
    "name": Requirement(lambda value: isinstance(value, str), "text"),
    "model": MODEL,
    "sources": Requirement(_is_names, "a tuple of names such as ('first', 'second')"),
    "combine": Requirement(callable, "a function (*variables) -> variables"),
}
"""The requirements on the attributes of a derived model, by name."""
