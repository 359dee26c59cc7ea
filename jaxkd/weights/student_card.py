"""What the user of a student needs besides its weights: classes, inputs, network, tokenizer."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxkd._messages import shorten

_VERSION = 1
_KINDS = ("images", "texts", "arrays")


@dataclasses.dataclass(frozen=True)
class StudentCard:
    """The description of a student.

    Attributes:
        inputs: "images", of which each file is fitted to the shape; "texts", which a tokenizer
            encodes; or "arrays".
        shape: Shape of one input: `[H, W, C]` of images, `[S]` with the largest number of tokens of
            texts.
        dtype: Dtype of the inputs.
        class_names: Name of each class, by label; empty if they are not known.
        network: The network, as `jaxkd.models.make_module` reads it; `None` for another one.
        mean: Mean of each channel that the network subtracts, in units of full brightness, or
            `None`.
        std: Standard deviation of each channel, or `None`.
        checksums: The SHA-256 of the files that were saved with the description, by name. They are
            no part of it, so that equal descriptions compare equal.
    """

    inputs: str
    shape: tuple[int, ...]
    dtype: str
    class_names: tuple[str, ...] = ()
    network: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    checksums: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def to_json(self) -> str:
        """Returns the card as a JSON object, the same text for equal cards."""
        return json.dumps({"version": _VERSION} | dataclasses.asdict(self), indent=2) + "\n"

    @staticmethod
    def from_json(text: str | bytes, origin: object) -> "StudentCard":
        """Reads a card.

        Args:
            text: The JSON object.
            origin: Where it comes from, for messages.

        Raises:
            ValueError: If it is damaged or of a newer version.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("not an object")
            version = values.pop("version", None)
            names = {field.name for field in dataclasses.fields(StudentCard)}
            # A newer version may mean something else by the same names.
            if version != _VERSION:
                raise ValueError(f"its version is {version!r:.40}, this jaxkd reads {_VERSION}")
            # Earlier versions wrote no checksums.
            values.setdefault("checksums", {})
            return StudentCard(**{name: _check(name, values.get(name)) for name in sorted(names)})
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{origin} is no description of a student ({shorten(error, 150)}): export the "
                "student again"
            ) from error


def _check(name: str, value: Any) -> Any:
    """Returns a value of a card as its type; raises `ValueError` for a value that is none."""
    is_fit = {
        "inputs": lambda: value in _KINDS,
        "dtype": lambda: isinstance(value, str),
        "network": lambda: value is None or isinstance(value, str),
        "shape": lambda: _is_list(value, int) and all(length > 0 for length in value),
        "class_names": lambda: _is_list(value, str),
        "mean": lambda: value is None or _is_list(value, int | float),
        "std": lambda: value is None or _is_list(value, int | float),
        "checksums": lambda: isinstance(value, dict) and _is_list([*value.values()], str),
    }[name]
    if not is_fit():
        raise ValueError(f"{name} is {shorten(repr(value), 60)}")
    return tuple(value) if isinstance(value, list) else value


def _is_list(value: Any, kind: Any) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
