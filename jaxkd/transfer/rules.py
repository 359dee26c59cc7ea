"""Invertible rules that rename the paths of one tree to those of another."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxkd._messages import shorten
from jaxkd.layout import Rearrangement

_PLACEHOLDER = re.compile(r"\{([a-zA-Z_]\w*(?:\.\.\.)?)\}", re.ASCII)


class Rule(NamedTuple):
    """Pattern of paths in the source tree, with the paths that they have in the target tree.

    In a pattern, `{name}` stands for one or more characters other than "." and "/", and `{name...}`
    for any characters, or none. A pattern matches a whole path; globs and regular expressions are
    refused. Both patterns have the same names, so that a rule can be inverted.

    Attributes:
        source: Pattern of paths in the source.
        target: Pattern of the corresponding paths in the target. `None` leaves the source's paths
            out on purpose.
        layout: Conversion of the weight from PyTorch's layout, in the source, to Flax's, in the
            target. `None` if the layouts are the same.

    Example:
        >>> from jaxkd import layout, transfer
        >>> rule = transfer.Rule(
        ...     "layer{i}.conv{k}.weight", "params/stage{i}/conv{k}/kernel", layout.CONV
        ... )
        >>> transfer.rename("layer1.conv2.weight", [rule]).path
        'params/stage1/conv2/kernel'
        >>> transfer.rename_back("params/stage1/conv2/kernel", [rule]).path
        'layer1.conv2.weight'
    """

    source: str
    target: str | None
    layout: Rearrangement | None = None


class RenamedPath(NamedTuple):
    """Result of applying rules to a path.

    Attributes:
        path: The path in the other tree; `None` if it has none there.
        rule: The rule that decided; `None` if no rule matched and the path is unchanged.
    """

    path: str | None
    rule: Rule | None


def rename(path: str, rules: Iterable[Rule]) -> RenamedPath:
    """Renames a path in the source to the corresponding path in the target.

    The first rule that matches decides. A path that no rule matches is unchanged.

    Args:
        path: A path in the source.
        rules: The rules, in order of precedence.

    Returns:
        The path in the target, `None` if a rule leaves it out, and the rule.

    Raises:
        ValueError: If a pattern is malformed.

    Example:
        >>> from jaxkd.transfer import Rule, rename
        >>> rules = (
        ...     Rule("{layer...}.num_batches_tracked", None),
        ...     Rule("fc.{name}", "params/logits/{name}"),
        ... )
        >>> [rename(path, rules).path for path in ("fc.bias", "bn1.num_batches_tracked", "alpha")]
        ['params/logits/bias', None, 'alpha']
    """
    return apply_rules(path, check_rules(rules))


def apply_rules(path: str, rules: Iterable[Rule]) -> RenamedPath:
    """Does what `rename` does, with rules that have been checked."""
    for rule in rules:
        values = match_path(rule.source, path)
        if values is not None:
            target = None if rule.target is None else fill_pattern(rule.target, values)
            return RenamedPath(target, rule)
    return RenamedPath(path, None)


def rename_back(path: str, rules: Sequence[Rule]) -> RenamedPath:
    """Renames a path in the target to the corresponding path in the source: inverts `rename`.

    Args:
        path: A path in the target.
        rules: The rules, in order of precedence.

    Returns:
        The path in the source that `rename` maps to this one, `None` if there is none, and the
        rule.

    Raises:
        ValueError: If a pattern is malformed.

    Example:
        >>> from jaxkd.transfer import Rule, rename_back
        >>> rules = (
        ...     Rule("fc.{name}", "params/logits/{name}"),
        ...     Rule("bn.{name}", "params/norm/{name}"),
        ... )
        >>> rename_back("params/norm/scale", rules).path
        'bn.scale'
    """
    rules = check_rules(rules)
    for rule in rules:
        values = None if rule.target is None else match_path(rule.target, path)
        if values is not None:
            source = fill_pattern(rule.source, values)
            # An earlier rule may claim this source path, so the way forward has the last word.
            if apply_rules(source, rules) == (path, rule):
                return RenamedPath(source, rule)
    # Without a rule the path is the same on both sides, unless a rule renames that source path.
    if apply_rules(path, rules) == (path, None):
        return RenamedPath(path, None)
    return RenamedPath(None, None)


def layer_rules(pattern: str, layers: Sequence[int]) -> tuple[Rule, ...]:
    """Makes rules that map layer `layers[n]` of the source to layer `n` of the target.

    The other layers of the source are left out.

    Args:
        pattern: Pattern of the paths of the layers, in source and target. `{name}` stands for the
            number of the layer and `{name...}` for the rest, as in "encoder/layer{i}/{rest...}".
        layers: Numbers of the source's layers, each once.

    Returns:
        The rules.

    Raises:
        ValueError: If the pattern does not have exactly one `{name}`, or a layer is negative or
            occurs twice.

    Example:
        >>> from jaxkd.transfer import layer_rules, rename
        >>> # DistilBERT takes every second layer.
        >>> rules = layer_rules("encoder/layer{i}/{rest...}", (0, 2, 4))
        >>> [rename(f"encoder/layer{i}/bias", rules).path for i in range(5)]
        ['encoder/layer0/bias', None, 'encoder/layer1/bias', None, 'encoder/layer2/bias']

    References:
        DistilBERT, a distilled version of BERT, https://arxiv.org/abs/1910.01108
    """
    _, names = _compile_pattern(pattern)
    names = [name for name in names if not name.endswith("...")]
    if len(names) != 1:
        raise ValueError(
            f"{pattern!r} must have one {{name}} for the number of the layer, got {names}"
        )
    if min(layers, default=0) < 0 or len({*layers}) < len(layers):
        raise ValueError(
            f"layers must be numbers of the source's layers, each once, got {tuple(layers)}"
        )
    placeholder = f"{{{names[0]}}}"
    mapped = [
        Rule(
            pattern.replace(placeholder, str(source_layer)),
            pattern.replace(placeholder, str(target_layer)),
        )
        for target_layer, source_layer in enumerate(layers)
    ]
    # The first match decides, so this rule leaves out the layers that none of the others matches.
    return *mapped, Rule(pattern, None)


def check_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Returns rules as a tuple; raises `TypeError` for anything else, or the errors of a rule."""
    # A rule is itself a tuple, of its patterns.
    listed: tuple[Any, ...] = tuple(rules)
    wrong = [rule for rule in listed if not isinstance(rule, Rule)]
    if wrong:
        raise TypeError(
            f"rules must be a sequence of transfer.Rule, but one is {shorten(repr(wrong[0]), 80)}: "
            "write [transfer.Rule(source, target)]"
        )
    for rule in listed:
        _check_rule(rule)
    return listed


def _check_rule(rule: Rule) -> None:
    """Raises `ValueError` if a pattern is malformed or the two patterns have different names."""
    names = [
        _compile_pattern(pattern)[1]
        for pattern in (rule.source, rule.target)
        if pattern is not None
    ]
    if {*names[0]} != {*names[-1]}:
        raise ValueError(
            f"{rule.source!r} and {rule.target!r} must have the same names, so that the rule can "
            "be inverted"
        )


def match_path(pattern: str, path: str) -> dict[str, str] | None:
    """Returns the values of a pattern's names in a path; `None` if it does not match."""
    expression, _ = _compile_pattern(pattern)
    matched = expression.fullmatch(path)
    return None if matched is None else matched.groupdict()


def fill_pattern(pattern: str, values: Mapping[str, str]) -> str:
    """Returns the path that a pattern describes when its names have the given values."""
    return _PLACEHOLDER.sub(lambda matched: values[matched[1].removesuffix("...")], pattern)


# Cached, because every path of a tree is matched with every rule.
@functools.cache
def _compile_pattern(pattern: str) -> tuple[re.Pattern[str], list[str]]:
    """Returns a pattern as a regular expression, and its names, such as "i" and "rest..."."""
    # `split` alternates the literal text between the placeholders with their names.
    parts = _PLACEHOLDER.split(pattern)
    literals, names = parts[::2], parts[1::2]
    if any("{" in literal or "}" in literal for literal in literals):
        raise ValueError(
            f"{pattern!r} is not a pattern: use braces only as {{name}} or {{name...}}"
        )
    # A rule that leaves paths out may match none, so that a glob would leave nothing out.
    if any("*" in literal or "\\" in literal for literal in literals):
        raise ValueError(
            f"{pattern!r} is not a pattern but a glob or a regular expression: write {{name}} for "
            "a part of a path and {name...} for the rest"
        )
    if len({name.removesuffix("...") for name in names}) < len(names):
        raise ValueError(f"{pattern!r} is not a pattern: a name may occur only once")
    parts[::2] = map(re.escape, literals)
    parts[1::2] = [
        f"(?P<{name.removesuffix('...')}>{'.*' if name.endswith('...') else '[^./]+'})"
        for name in names
    ]
    # DOTALL, since a path may hold any character, even a line break.
    return re.compile("".join(parts), re.DOTALL), names
