"""The order of classes, and the match between those of a teacher and those of the data."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from jaxkd._messages import list_some
from jaxkd.data.errors import DataError

# Not str.isdigit, which is true of "²" and "①". Python refuses to convert thousands of digits.
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts class names; the label of a class is its position.

    Integers come first, in numeric order, and then all other names. `1`, `01` and `001` are three
    classes.

    Args:
        names: The names. Duplicates are dropped.

    Example:
        >>> sort_classes(["10", "9", "other", "-1", "²"])
        ('-1', '9', '10', 'other', '²')
    """
    return tuple(sorted(set(names), key=_sort_key))


def match_classes(teacher_names: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Matches the classes of a teacher with those of the data by name.

    Args:
        teacher_names: The teacher's classes, in the order of its outputs.
        names: The classes of the data, by label.

    Returns:
        int32 `[C]`: the teacher's output for each label of the data. `logits[..., order]` has the
        order of the data; `jaxkd.models.with_class_order` makes a model of it.

    Raises:
        DataError: If the names are not the same, or a name occurs twice.

    Example:
        >>> match_classes(["cat", "dog", "ant"], ["ant", "cat", "dog"]).tolist()
        [2, 0, 1]
    """
    missing = set(names) - set(teacher_names)
    unknown = set(teacher_names) - set(names)
    if missing or unknown:
        sides = (("the data", missing), ("the teacher", unknown))
        difference = " and ".join(
            f"only {side} has {list_some(sort_classes(only))}" for side, only in sides if only
        )
        raise DataError(
            f"the classes of the teacher and of the data differ, {difference}: rename the classes, "
            "or give the teacher a new last layer"
        )
    if not len(set(names)) == len(names) == len(teacher_names):
        raise DataError("a class has several outputs: each name must occur once")
    outputs = {name: output for output, name in enumerate(teacher_names)}
    return np.array([outputs[name] for name in names], np.int32)


def _sort_key(name: str) -> tuple[bool, int, str]:
    is_integer = _INTEGER.fullmatch(name) is not None
    return not is_integer, int(name) if is_integer else 0, name
