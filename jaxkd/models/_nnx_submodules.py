"""Submodules of Flax NNX modules by path, and what their calls return."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from jaxkd.models._features import are_arrays, describe_unknown_path, is_needed

_OUTPUTS = "jaxkd_outputs"


def find_callable_paths(module: Any) -> list[str]:
    """Returns the path of each submodule that can be called, in the order of the attributes.

    A submodule that several paths lead to has the first one alone.
    """
    paths = {}
    for path, submodule in _iterate_submodules(module):
        paths.setdefault(id(submodule), path)
    return list(paths.values())


def find_recorded_paths(module: Any, paths: Iterable[str]) -> list[str]:
    """Returns the paths of the submodules whose outputs are needed for features.

    Args:
        module: The module.
        paths: Paths of submodules, or of parts of what they return.

    Raises:
        ValueError: If a path leads to no submodule that can be called.
    """
    submodules = dict(_iterate_submodules(module))
    recorded = {}
    for path in paths:
        # The longest path, as that of a layer within a block that is called too.
        found = path if path in submodules else None
        parents = (known for known in submodules if is_needed(known, [path]))
        found = found or max(parents, key=len, default=None)
        if found is None:
            known = find_callable_paths(module)
            raise ValueError(describe_unknown_path(type(module).__name__, path, known))
        # Two paths to one submodule would record each of its calls twice.
        recorded[found] = None
    return list(recorded)


def record_outputs(module: Any, paths: Iterable[str]) -> None:
    """Makes submodules keep what their calls return, for `read_outputs`.

    Args:
        module: The module, a copy that is used for one call.
        paths: Paths of submodules.
    """
    submodules = dict(_iterate_submodules(module))
    recorded = {id(submodules[path]): submodules[path] for path in paths}
    for submodule in recorded.values():
        # Python looks `__call__` up in the class. The class of one object is replaced, so that no
        # other module of the class, and no other thread, is concerned.
        object.__setattr__(submodule, "__class__", _make_recording_class(type(submodule)))


def read_outputs(module: Any, paths: Iterable[str]) -> dict[str, Sequence[Any]]:
    """Returns what the calls of submodules returned, by path, where there were calls."""
    submodules = dict(_iterate_submodules(module))
    outputs = {path: getattr(submodules[path], _OUTPUTS, None) for path in paths}
    return {path: _read_value(kept) for path, kept in outputs.items() if kept is not None}


# Cached, because `nnx.jit` would compile again for a new class.
@functools.lru_cache
def _make_recording_class(kind: type) -> type:
    """Makes a subclass of a module's class that keeps what calls return in a variable."""
    from flax import nnx

    def call_and_record(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.__call__(self, *args, **kwargs)
        if are_arrays(result):
            kept = getattr(self, _OUTPUTS, None)
            earlier = () if kept is None else _read_value(kept)
            # A variable leaves `nnx.jit` and `nnx.remat` as the statistics of the module do.
            setattr(self, _OUTPUTS, nnx.Intermediate((*earlier, result)))
        return result

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), {"__call__": call_and_record, **names})


def _read_value(variable: Any) -> Any:
    """Returns the value of a variable, which Flax 0.11 and later versions spell differently."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def _iterate_submodules(
    node: Any, path: str = "", parents: tuple[int, ...] = ()
) -> Generator[tuple[str, Any]]:
    """Yields the path of each submodule that can be called, and the submodule."""
    from flax import nnx

    for name, child in _children(node).items():
        # A submodule may know its parent.
        if id(child) in (*parents, id(node)):
            continue
        child_path = f"{path}/{name}" if path else name
        if isinstance(child, nnx.Module) and callable(child):
            yield child_path, child
        yield from _iterate_submodules(child, child_path, (*parents, id(node)))


def _children(node: Any) -> dict[str, Any]:
    """Returns what a module, list or dict holds, by name."""
    from flax import nnx

    if isinstance(node, (list, tuple)):
        return {str(i): child for i, child in enumerate(node)}
    if isinstance(node, nnx.Module):
        return dict(vars(node))
    return {str(key): child for key, child in node.items()} if isinstance(node, Mapping) else {}
