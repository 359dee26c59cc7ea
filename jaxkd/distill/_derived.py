"""Models of a plan whose weights come from those of others."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkd._messages import list_some, shorten
from jaxkd.distill._diagnosis import count_not_finite
from jaxkd.distill._lowering import variables_shape
from jaxkd.distill._stage_run import TrainedModel, make_trained
from jaxkd.distill._validation import Validator
from jaxkd.distill.plan import Derived, Entry, Stage, input_shapes
from jaxkd.models.model import Model


def check_derived(plan: Sequence[Entry], seed: int) -> None:
    """Checks before any training that derived models get weights of the shapes that they read.

    Args:
        plan: The entries, sorted.
        seed: A seed whose examples have the shapes of every seed's.

    Raises:
        TypeError: If the function of a derived model does not take as many variables.
        ValueError: If an array is missing or has another shape, or the function raises an error
            that does not come from its tracing.
    """
    for entry in plan:
        if isinstance(entry, Derived):
            _check_signature(entry)
    stages = [entry for entry in plan if isinstance(entry, Stage)]
    if not stages:
        return
    example = input_shapes(stages[0].examples(seed)["inputs"])
    shapes: dict[str, Any] = {}
    for entry in plan:
        if not isinstance(entry, Derived):
            shapes[entry.name] = variables_shape(entry, example)
            continue
        fresh = shapes[entry.name] = variables_shape(entry, example)
        try:
            combined = jax.eval_shape(entry.combine, *(shapes[name] for name in entry.sources))
        # Misspelt names, as they fail in any call.
        except (LookupError, NameError, ArithmeticError) as error:
            raise ValueError(
                f"the derived model {shorten(entry.name, 40)!r} cannot be made: its function "
                f"raises {type(error).__name__} ({shorten(error, 100)}) on the variables of "
                f"{list_some(entry.sources)}"
            ) from error
        # A function of NumPy cannot be traced. Its result is checked when it is there.
        except Exception:  # noqa: BLE001
            continue
        _check_shapes(entry, combined, fresh)


class Deriver:
    """Makes derived models as soon as their sources are there."""

    def __init__(
        self,
        plan: Sequence[Entry],
        trained: dict[str, dict[int, TrainedModel]],
        validator: Validator,
        *,
        is_scored: Callable[[Model], bool],
    ) -> None:
        """Takes the sorted plan, the models by name and seed, and what scores them.

        `is_scored` says of a model whether it has the classes of the validation split.
        """
        self._derived = [entry for entry in plan if isinstance(entry, Derived)]
        self._trained = trained
        self._validator = validator
        self._is_scored = is_scored

    def complete(self, seed: int) -> None:
        """Adds the derived models of a seed whose sources are there.

        Raises:
            ValueError: If the function of a derived model returns arrays of other shapes, or NaN.
        """
        for entry in self._derived:
            models = [self._trained[name].get(seed) for name in entry.sources]
            if seed in self._trained[entry.name] or None in models:
                continue
            self._trained[entry.name][seed] = self._derive(entry, models)

    def _derive(self, entry: Derived, models: Sequence[Any]) -> TrainedModel:
        combined = entry.combine(*(model.variables for model in models))
        _check_levels(entry, combined)
        variables = jax.tree.map(jnp.asarray, dict(combined))
        count = count_not_finite(variables)
        # A source may hold minus infinity on purpose, as a mask.
        if count and not any(count_not_finite(model.variables) for model in models):
            raise ValueError(
                f"the derived model {shorten(entry.name, 40)!r} cannot be made: its function "
                f"returns {count:,} weights that are NaN or infinite"
            )
        if not self._is_scored(entry.model):
            return make_trained(variables, 0.0, {})
        if self._validator.is_of_classes:
            inputs = input_shapes(self._validator.examples["inputs"])
            _check_shapes(entry, variables, variables_shape(entry, inputs))
        return make_trained(variables, 0.0, self._validator.score(entry.name, variables))


def _check_signature(entry: Derived) -> None:
    try:
        inspect.signature(entry.combine).bind(*entry.sources)
    except TypeError as error:
        raise TypeError(
            f"the function of the derived model {shorten(entry.name, 40)!r} must take the "
            f"variables of its {len(entry.sources)} sources ({shorten(error, 100)})"
        ) from error
    except ValueError:  # a builtin without a signature
        pass


def _check_levels(entry: Derived, variables: Any) -> None:
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise ValueError(
            f"the derived model {shorten(entry.name, 40)!r} needs variables, a dict with 'params' "
            f"as model.init returns, but its function returns {shorten(repr(variables), 80)}"
        )


def _check_shapes(entry: Derived, variables: Any, fresh: Mapping[str, Any]) -> None:
    _check_levels(entry, variables)
    source, target = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (dict(variables), dict(fresh)))
    )
    differing = sorted(path for path in target if source.get(path) != target[path])
    if differing:
        path = differing[0]
        more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
        raise ValueError(
            f"the derived model {shorten(entry.name, 40)!r} cannot be made: {path} is "
            f"{source.get(path, 'missing')} in what its function returns and {target[path]} in its "
            f"model{more}"
        )
