"""Names of weights that a wrapper changed: DataParallel, torch.compile, Lightning, averages."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxkd.transfer import Rule, rename, rename_back
from jaxkd.weights.files import to_text

# Modules that PyTorch puts between others. No network has modules of these names.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class UnwrappedWeights(NamedTuple):
    """Weights under the names that a network gives them.

    Attributes:
        weights: Arrays by name.
        removed: What was removed from the names, such as `("module.",)`.
    """

    weights: dict[str, Any]
    removed: tuple[str, ...]


def expected_names(paths: Iterable[str], rules: tuple[Rule, ...]) -> set[str]:
    """Returns the names of a network's weights in PyTorch, from the paths of its variables."""
    return {name for path in paths if (name := rename_back(path, rules).path) is not None}


def unwrap_names(weights: Mapping[str, Any], expected: Collection[str]) -> UnwrappedWeights:
    """Removes what wrappers of a network put before the names of its weights.

    One prefix is removed from every name that has it, if it explains the names: at least half of
    those in the file, or half of those of the network. Names that PyTorch's own wrappers add are
    removed wherever they are.

    Args:
        weights: Arrays by name.
        expected: The names of the network's weights.

    Returns:
        The weights, and what was removed.

    Raises:
        ValueError: If several prefixes explain the names, or two names become equal.

    Example:
        >>> from jaxkd.weights.names import unwrap_names
        >>> names = {"module.fc.weight": 1, "module.fc.bias": 2, "n_averaged": 3}
        >>> unwrap_names(names, {"fc.weight", "fc.bias"}).weights
        {'fc.weight': 1, 'fc.bias': 2, 'n_averaged': 3}
    """
    # The usual case, in which nothing is searched.
    if weights.keys() >= {*expected}:
        return UnwrappedWeights(dict(weights), ())
    removed = []
    for wrapper in _WRAPPERS:
        if any(wrapper in name.split(".")[:-1] for name in weights):
            weights = _rename_all(weights, lambda name: _without_module(name, wrapper))  # noqa: B023
            removed.append(f"{wrapper}.")
    if prefix := _find_prefix(weights, expected):
        weights = _rename_all(weights, lambda name: name.removeprefix(prefix))
        removed.append(prefix)
    return UnwrappedWeights(dict(weights), tuple(removed))


def find_other_network(weights: Mapping[str, Any], expected: Collection[str]) -> str:
    """Finds a second network in weights whose names are unwrapped.

    Args:
        weights: Arrays by name, as `unwrap_names` returns them.
        expected: The names of the network's weights.

    Returns:
        What the names of the second one begin with, or "" if there is none.
    """
    hits = _count_hits([name for name in weights if name not in expected], expected)
    others = [prefix for prefix, count in hits.items() if count >= len(expected) / 2]
    return min(others, key=len, default="")


def is_counter(value: Any) -> bool:
    """True for a single integer or truth value, such as a number of steps: it is no weight."""
    if isinstance(value, dict | list | tuple):
        return False
    array = np.asarray(value)
    kinds = (jnp.integer, jnp.bool_)
    return array.size == 1 and any(jnp.issubdtype(array.dtype, kind) for kind in kinds)


def find_counters(
    weights: Mapping[str, Any], paths: Collection[str], rules: tuple[Rule, ...]
) -> tuple[str, ...]:
    """Returns the names of the counters that neither the network nor a rule knows."""
    return tuple(
        name
        for name, value in weights.items()
        if is_counter(value) and rename(name, rules).path not in (None, *paths)
    )


def show_entry(name: str | None) -> str:
    """Shows how an entry is chosen, in Python and at a command line."""
    name = to_text(name, length=40)
    return f"entry={name!r} (--entry {name})"


def _find_prefix(weights: Mapping[str, Any], expected: Collection[str]) -> str:
    """Returns the prefix that explains the names, or "" if they have none."""
    hits = _count_hits(weights, expected)
    if not hits:
        return ""
    enough = min(len(weights), len(expected)) / 2
    # Of nested prefixes that explain equally many names, the shortest: it removes least.
    best = min(hits, key=lambda prefix: (-hits[prefix], len(prefix)))
    if hits[best] < enough:
        return ""
    rivals = [
        prefix
        for prefix in hits
        if hits[prefix] >= enough and not (prefix.startswith(best) or best.startswith(prefix))
    ]
    if rivals:
        raise ValueError(
            f"the weights fit with each of the prefixes {best!r:.60} and {rivals[0]!r:.60}: choose "
            f"one, as in {show_entry(best.removesuffix('.'))}"
        )
    return best


def _count_hits(names: Iterable[str], expected: Collection[str]) -> Counter[str]:
    """Counts, for each prefix, the names that it turns into expected ones."""
    hits: Counter[str] = Counter()
    lengths = sorted({name.count(".") for name in expected})
    for name in names:
        # From the end, so that a name of a million parts costs no more than another one.
        parts = name.rsplit(".", max(lengths, default=0) + 1)
        for length in lengths:
            if length >= len(parts):
                break
            suffix = ".".join(parts[-length - 1 :])
            if suffix in expected:
                hits[name[: len(name) - len(suffix)]] += 1
    return hits


def _without_module(name: str, module: str) -> str:
    *modules, leaf = name.split(".")
    return ".".join([*(part for part in modules if part != module), leaf])


def _rename_all(weights: Mapping[str, Any], change: Any) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, value in weights.items():
        new_name = change(name)
        if new_name in renamed:
            longer = max(origins[new_name], name, key=len)
            raise ValueError(
                f"{origins[new_name]!r:.60} and {name!r:.60} both become {new_name!r:.60} without "
                "the names of wrappers: choose one, as in "
                f"{show_entry(longer.removesuffix(new_name).rstrip('.'))}"
            )
        renamed[new_name] = value
        origins[new_name] = name
    return renamed
