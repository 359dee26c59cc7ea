"""Griffe extension: shows the `Example:` and `References:` sections of docstrings.

Griffe knows only the title `Examples:`, and would show other titles as boxes of quoted
text.
"""

import re
import textwrap

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.M)
_REFERENCES = re.compile(r"^References:\n((?:[ ]+.*\n?|\n)+)", re.M)
_URL = re.compile(r"https?://[^\s,;]+")
_REFERENCE = re.compile(rf".*?{_URL.pattern}[,;]?")


class Sections(griffe.Extension):
    """Changes the titles before the docstrings are parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Changes the docstring of one object."""
        if obj.docstring is not None:
            value = _EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = _REFERENCES.sub(_list_references, value)


def _list_references(match: re.Match[str]) -> str:
    """Makes a list item of each reference, which ends with its URL."""
    text = " ".join(textwrap.dedent(match[1]).split())
    references = _REFERENCE.findall(text)
    rest = text[len("".join(references)) :]
    items = [_URL.sub(r"<\g<0>>", reference.strip(" ;")) for reference in references]
    return "\n".join(
        ["**References:**", "", *(f"- {item}" for item in items), rest, ""]
    )
