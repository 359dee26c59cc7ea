"""The help texts of options."""

import dataclasses
import types

import docstring_parser


def join_help_lines(config: type) -> None:
    """Makes one line of each option's docstring, which tyro would break where the source does."""
    helps: dict[str, str] = {}
    # A class comes after its bases, because its own docstring of an option counts.
    for base in reversed(config.__mro__[:-1]):
        for option in docstring_parser.parse_from_object(base).params:
            helps[option.arg_name] = " ".join((option.description or "").split())
    for field in dataclasses.fields(config):
        if field.name in helps:
            help_text = {"help": helps[field.name]}
            field.metadata = types.MappingProxyType({**field.metadata, **help_text})
