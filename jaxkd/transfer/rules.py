"""Rules that say which weight of one tree is which of another, and that read both ways."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxkd.layout import Rearrangement


class Rule(NamedTuple):
    """Names in one tree and in another: a pattern of the source's paths, and the paths that they have in the target.

    `{name}` stands for one or more characters other than "." and "/", `{name...}` for any characters, also none. A
    pattern matches a whole path. Both patterns have the same names, so that a rule can be read backwards too.

    Attributes:
        source: Pattern of paths in the source.
        target: Pattern of the paths that they have in the target; `None` leaves them out on purpose.
        layout: How the axes of a weight lie: the source's as PyTorch has them, the target's as Flax has them. `None`
            if they are the same.

    Example:
        >>> from jaxkd import layout, transfer
        >>> rule = transfer.Rule("layer{i}.conv{k}.weight", "params/stage{i}/conv{k}/kernel", layout.CONV)
        >>> transfer.rename("layer1.conv2.weight", [rule]).path
        'params/stage1/conv2/kernel'
        >>> transfer.rename_back("params/stage1/conv2/kernel", [rule]).path
        'layer1.conv2.weight'
    """

    source: str
    target: str | None
    layout: Rearrangement | None = None


class Renamed(NamedTuple):
    """What rules make of a path.

    Attributes:
        path: The path on the other side; `None` if there is none.
        rule: The rule that says so; `None` if no rule does, and a path keeps its name.
    """

    path: str | None
    rule: Rule | None


def rename(path: str, rules: Iterable[Rule]) -> Renamed:
    """The path in the target of what has this path in the source.

    The first rule that matches decides. A path that no rule matches keeps its name.

    Args:
        path: A path in the source.
        rules: The rules, in their order.

    Returns:
        The path in the target, `None` if a rule leaves it out; and the rule.

    Raises:
        ValueError: If a pattern cannot be read.

    Example:
        >>> from jaxkd.transfer import Rule, rename
        >>> rules = Rule("{layer...}.num_batches_tracked", None), Rule("fc.{name}", "params/logits/{name}")
        >>> [rename(path, rules).path for path in ("fc.bias", "bn1.num_batches_tracked", "alpha")]
        ['params/logits/bias', None, 'alpha']
    """
    for rule in rules:
        check_rule(rule)
        values = match(rule.source, path)
        if values is not None:
            return Renamed(None if rule.target is None else fill(rule.target, values), rule)
    return Renamed(path, None)


def rename_back(path: str, rules: Sequence[Rule]) -> Renamed:
    """The path in the source of what has this path in the target: the inverse of `rename`.

    Args:
        path: A path in the target.
        rules: The rules, in their order.

    Returns:
        The path in the source that `rename` takes to this one, `None` if it takes none there; and the rule.

    Raises:
        ValueError: If a pattern cannot be read.

    Example:
        >>> from jaxkd.transfer import Rule, rename_back
        >>> rules = Rule("fc.{name}", "params/logits/{name}"), Rule("bn.{name}", "params/norm/{name}")
        >>> rename_back("params/norm/scale", rules).path
        'bn.scale'
    """
    for rule in rules:
        values = None if rule.target is None else match(rule.target, path)
        if values is not None:
            source = fill(rule.source, values)
            if rename(source, rules) == (path, rule):
                return Renamed(source, rule)
    return Renamed(path, None) if rename(path, rules) == (path, None) else Renamed(None, None)


def layer_rules(pattern: str, layers: Sequence[int]) -> tuple[Rule, ...]:
    """Rules by which layer `n` of the target takes layer `layers[n]` of the source; the other layers are left out.

    Args:
        pattern: Paths of the layers, of both sides: `{name}` stands for the number of the layer, `{name...}` for the
            rest, as in "encoder/layer{i}/{rest...}".
        layers: Numbers of the source's layers, each once.

    Returns:
        The rules.

    Raises:
        ValueError: If the pattern has not exactly one `{name}`, or a layer is negative or named twice.

    Example:
        >>> from jaxkd.transfer import layer_rules, rename
        >>> rules = layer_rules("encoder/layer{i}/{rest...}", (0, 2, 4))  # DistilBERT: every second layer
        >>> [rename(f"encoder/layer{i}/bias", rules).path for i in range(5)]
        ['encoder/layer0/bias', None, 'encoder/layer1/bias', None, 'encoder/layer2/bias']

    References:
        DistilBERT, a distilled version of BERT, https://arxiv.org/abs/1910.01108
    """
    names = [name for name in _compiled(pattern)[1] if not name.endswith("...")]
    if len(names) != 1:
        raise ValueError(f"{pattern!r} must have one {{name}} for the number of the layer, got {names}")
    if min(layers, default=0) < 0 or len({*layers}) < len(layers):
        raise ValueError(f"layers must be numbers of the source's layers, each once, got {tuple(layers)}")
    number = f"{{{names[0]}}}"
    taken = (
        Rule(pattern.replace(number, str(old)), pattern.replace(number, str(new))) for new, old in enumerate(layers)
    )
    return *taken, Rule(pattern, None)


def check_rule(rule: Rule) -> None:
    """Raises `ValueError` if a pattern cannot be read or the two have other names."""
    names = [_compiled(pattern)[1] for pattern in (rule.source, rule.target) if pattern is not None]
    if {*names[0]} != {*names[-1]}:
        raise ValueError(f"{rule.source!r} and {rule.target!r} must have the same names, so that they read both ways")


def match(pattern: str, path: str) -> dict[str, str] | None:
    """What the names of a pattern stand for in a path; `None` if it does not match."""
    found = _compiled(pattern)[0].fullmatch(path)
    return None if found is None else found.groupdict()


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """The path that a pattern names, given what its names stand for."""
    return _NAME.sub(lambda name: values[name[1].removesuffix("...")], pattern)


_NAME = re.compile(r"\{([a-zA-Z_]\w*(?:\.\.\.)?)\}", re.ASCII)


@functools.cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], list[str]]:
    """The regular expression of a pattern, and its names, those of any characters with their dots."""
    parts = _NAME.split(pattern)
    names = parts[1::2]
    if any("{" in part or "}" in part for part in parts[::2]):
        raise ValueError(f"{pattern!r} is no pattern: write {{name}} or {{name...}}, and no other braces")
    if len({name.removesuffix("...") for name in names}) < len(names):
        raise ValueError(f"{pattern!r} is no pattern: a name may stand in it once")
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [f"(?P<{name.removesuffix('...')}>{'.*' if '.' in name else '[^./]+'})" for name in names]
    return re.compile("".join(parts), re.DOTALL), names
