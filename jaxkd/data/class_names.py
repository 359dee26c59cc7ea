"""The order of classes, and the match between those of a teacher and those of the data."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from decimal import Decimal

import numpy as np

from jaxkd._messages import list_some, shorten
from jaxkd.data.errors import DataError

# Not str.isdigit, which is true of "²" and "①". Python refuses to convert thousands of digits.
_INTEGER = re.compile(r"[+-]?[0-9]{1,300}")
_DECIMAL = re.compile(r"[+-]?[0-9]{0,300}\.?[0-9]{1,300}\.?(e[+-]?[0-9]{1,2})?", re.I)

_MISSING = frozenset((
    "nan", "NaN", "NAN", "-nan", "None", "NA", "<NA>", "#N/A", "N/A", "n/a", "NaT", "null", "NULL",
    "\\N", "?", "-", "-100", "unsup", "unlabeled", "unlabelled", "Unlabeled", "Unlabelled",
))  # fmt: skip
"""What programs write for a missing value. A person may call a class `none` or `NONE`."""


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
        DataError: If the names are not the same, or a name occurs twice. The message says so if two
            names are the same but for their spelling.
        TypeError: If names are a dict or a set, whose order need not be that of the outputs, or a
            name is no string.

    Example:
        >>> match_classes(["cat", "dog", "ant"], ["ant", "cat", "dog"]).tolist()
        [2, 0, 1]
    """
    for owner, given in (("teacher", teacher_names), ("data", names)):
        if isinstance(given, (str, Mapping, Set)):
            raise TypeError(
                f"the classes of the {owner} are a {type(given).__name__}: give a list of names in "
                "the order of the outputs"
            )
        if numbers := [name for name in given if not isinstance(name, str)]:
            raise TypeError(
                f"the classes of the {owner} must be strings, got "
                f"{shorten(repr(numbers[0]), 40)}: write str(...) of each"
            )
    missing = set(names) - set(teacher_names)
    unknown = set(teacher_names) - set(names)
    if respelled := describe_respelling(unknown, missing):
        raise DataError(
            f"the teacher's and the data's classes {respelled}: rename one before they are matched"
        )
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


def describe_respelling(names: Iterable[str], others: Iterable[str]) -> str:
    """Says which two names, one of each collection, are the same but for their spelling.

    Args:
        names: Some names.
        others: Other names, or the same.

    Returns:
        The names and how they differ; empty if there are no such names.

    Example:
        >>> names = ["Positive", "negative", "positive"]
        >>> describe_respelling(names, names)
        "'Positive' and 'positive' differ in case only"
        >>> describe_respelling(["1", "01"], ["1.0"])
        "'1' and '1.0' differ in number format only"
    """
    names, others = sort_classes(names), sort_classes(others)
    forms = {name: name for name in (*names, *others)}
    for difference, simplify in _SPELLINGS:
        forms = {name: simplify(form) for name, form in forms.items()}
        by_form: dict[str, str] = {}
        for name in names:
            by_form.setdefault(forms[name], name)
        for other in others:
            name = by_form.get(forms[other], other)
            if name != other:
                quoted, other_quoted = (shorten(repr(shown), 40) for shown in (name, other))
                return f"{quoted} and {other_quoted} differ in {difference} only"
    return ""


def find_missing_label(class_names: Collection[str]) -> str:
    """Finds the name of a class that programs write for a missing label.

    Args:
        class_names: The names of all classes.

    Returns:
        The first such name; empty if there is none, or no other name.

    Example:
        >>> find_missing_label(["0", "1", "nan"])
        'nan'
        >>> find_missing_label(["+", "-"])
        ''
    """
    # A minus beside a plus is a class.
    missing = sorted(_MISSING.intersection(class_names) - ({"-"} if "+" in class_names else set()))
    return missing[0] if missing and len(missing) < len(set(class_names)) else ""


def describe_minus_one(class_names: Collection[str]) -> str:
    """Says that the class -1 may be a missing label; empty if it need not be one.

    TFDS and scikit-learn number examples without a label -1, beside classes from 0. Beside 1 it may
    be a class of its own, such as the negative one of two or three.

    Example:
        >>> describe_minus_one(["-1", "0", "1"])
        ''
        >>> describe_minus_one(["-1", "0", "1", "2"])
        "the class '-1' is learnt as one: if it means that a label is missing, remove its examples"
    """
    numbers = {int(name) for name in class_names if _INTEGER.fullmatch(name)}
    if "-1" not in class_names or len(numbers) < len(class_names):
        return ""
    if min(numbers) < -1 or max(numbers) < 2:
        return ""
    return (
        "the class '-1' is learnt as one: if it means that a label is missing, remove its examples"
    )


def _without_invisible(name: str) -> str:
    return "".join(letter for letter in name if unicodedata.category(letter) != "Cf")


def _simplify_number(name: str) -> str:
    # Integers are classes as they are written: 1, 01 and 001 differ.
    if _INTEGER.fullmatch(name) or not _DECIMAL.fullmatch(name):
        return name
    value = Decimal(name)
    return str(int(value)) if value == value.to_integral_value() else str(value.normalize())


# Each comes on top of those before it.
_SPELLINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("Unicode normalisation (NFC or NFD)", lambda name: unicodedata.normalize("NFC", name)),
    ("invisible characters", _without_invisible),
    ("blanks", lambda name: " ".join(name.split())),
    ("number format", _simplify_number),
    ("case", str.casefold),
)


def _sort_key(name: str) -> tuple[bool, int, str]:
    is_integer = _INTEGER.fullmatch(name) is not None
    return not is_integer, int(name) if is_integer else 0, name
