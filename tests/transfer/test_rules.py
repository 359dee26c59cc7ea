"""Tests of renaming by rules, in both directions, and of malformed patterns."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkd import layout, transfer, weights
from jaxkd.transfer import Rule, layer_rules, rename, rename_back

TORCHVISION = (
    Rule("{module...}.num_batches_tracked", None),
    Rule("conv1.weight", "params/stem/kernel", layout.CONV),
    Rule("layer{i}.{j}.conv{k}.weight", "params/stage{i}/block{j}/conv{k}/kernel", layout.CONV),
    Rule("layer{i}.{j}.bn{k}.weight", "params/stage{i}/block{j}/bn{k}/scale"),
    Rule("layer{i}.{j}.bn{k}.running_{what}", "batch_stats/stage{i}/block{j}/bn{k}/{what}"),
    Rule("fc.weight", "params/logits/kernel", layout.DENSE),
)
NAMES = {
    "conv1.weight": "params/stem/kernel",
    "layer1.0.conv2.weight": "params/stage1/block0/conv2/kernel",
    "layer3.11.bn1.weight": "params/stage3/block11/bn1/scale",
    "layer3.11.bn1.running_mean": "batch_stats/stage3/block11/bn1/mean",
    "fc.weight": "params/logits/kernel",
    "fc.bias": "fc.bias",
}


@pytest.mark.parametrize(("torch", "flax"), NAMES.items())
def test_names_in_both_directions(torch, flax):
    forward = rename(torch, TORCHVISION)
    backward = rename_back(flax, TORCHVISION)
    assert (forward.path, backward.path) == (flax, torch)
    assert forward.rule is backward.rule and (forward.rule is None) == (torch == "fc.bias")


def test_a_path_that_is_left_out_has_no_target():
    assert rename("layer1.0.bn1.num_batches_tracked", TORCHVISION) == (None, TORCHVISION[0])
    # The pattern of the first rule includes the dot.
    assert rename("num_batches_tracked", TORCHVISION).path == "num_batches_tracked"


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("{a}", "conv1", True),
        ("{a}", "", False),
        ("{a}", "a.b", False),
        ("{a}", "a/b", False),
        ("{a...}", "", True),
        ("{a...}", "a.b/c\nd", True),
        ("conv{k}", "conv", False),
        ("conv.{k}", "convx1", False),
        ("conv", "conv/kernel", False),
        ("kernel", "conv/kernel", False),
        ("layer{i}.{rest...}", "layer1.0.bn1.bias", True),
        ("a+(b)", "a+(b)", True),
    ],
)
def test_a_pattern_matches_a_whole_path(pattern, path, matches):
    assert (rename(path, [Rule(pattern, None)]).path is None) == matches


def test_the_first_rule_that_matches_decides():
    rules = (Rule("fc.bias", "head"), Rule("fc.{name}", "logits/{name}"))
    assert [rename(path, rules).path for path in ("fc.bias", "fc.weight")] == [
        "head",
        "logits/weight",
    ]
    assert rename_back("logits/weight", rules).path == "fc.weight"
    assert rename_back("head", rules).path == "fc.bias"
    # The second rule would give fc.bias, but the first renames that to head.
    assert rename_back("logits/bias", rules) == ("logits/bias", None)


def test_a_source_name_that_was_renamed_does_not_exist_in_the_target():
    assert rename_back("fc", [Rule("fc", "logits")]).path is None
    assert rename_back("fc", [Rule("fc", None)]).path is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab+./", max_size=3), st.text("ab01_", min_size=1, max_size=4)),
        max_size=3,
    ),
    st.permutations(range(3)),
    st.sampled_from(["", "..."]),
)
def test_renaming_is_inverted(parts, order, dots):
    literals = [f"{literal}." for literal, _ in parts]
    values = [value for _, value in parts]
    patterns = [f"{literal}{{n{i}{dots}}}" for i, literal in enumerate(literals)]
    target_pattern = "to/" + "/".join(patterns[i] for i in order if i < len(patterns))
    rules = (Rule("".join(patterns), target_pattern),)
    path = "".join(map(str.__add__, literals, values))
    target = rename(path, rules)
    assert target.rule is rules[0] and target.path.startswith("to/")
    if not dots:
        assert rename_back(target.path, rules) == (path, rules[0])
    assert rename(rename_back(target.path, rules).path, rules).path == target.path


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (Rule("layer{i", "a"), "'layer{i' is not a pattern: use braces only as {name}"),
        (Rule("layer}", "a"), "use braces only"),
        (Rule("layer{}", "a"), "use braces only"),
        (Rule("layer{0}", "a{0}"), "use braces only"),
        (Rule("{i}.{i}", "a{i}"), "'{i}.{i}' is not a pattern: a name may occur only once"),
        (Rule("{i}.{i...}", "a{i}"), "once"),
        (Rule("layer{i}", "stage{i}/block{i}"), "once"),
        (Rule("layer{i}", "stage{j}"), "'layer{i}' and 'stage{j}' must have the same names"),
        (Rule("layer{i}.{j}", "stage{i}"), "the same names"),
        (Rule("layer{i...}", "stage{i}"), "the same names"),
        (Rule("layer{i", None), "not a pattern"),
        # A rule that leaves out may match nothing: a glob would leave nothing out, even if strict.
        (Rule("params/*/kernel", None), r"'params/\*/kernel' is not a pattern but a glob"),
        (Rule(r"layer(\d+)", "a"), "a regular expression: write {name}"),
        (Rule("a", "b*"), "a glob"),
    ],
)
def test_malformed_rules_raise(rule, match):
    with pytest.raises(ValueError, match=match):
        rename("path", [rule])
    with pytest.raises(ValueError, match=match):
        rename_back("layer1", [Rule("layer{i}", "layer{i}"), rule][::-1])


@pytest.mark.parametrize("rules", [Rule("a", "b"), [("a", "b")], "a", [None]])
def test_what_is_no_rule_raises(rules):
    tree = {"a": np.ones(2)}
    for call in (
        lambda: rename("a", rules),
        lambda: rename_back("a", rules),
        lambda: transfer.transfer(tree, tree, rules=rules),
        lambda: weights.from_torch(tree, tree, rules),
        lambda: weights.to_torch(tree, rules),
    ):
        with pytest.raises(TypeError, match=r"transfer.Rule, .*: write \[transfer.Rule"):
            call()


def test_every_second_layer():
    rules = layer_rules("encoder/layer{i}/{rest...}", (0, 2, 4, 6, 8, 10))
    targets = [rename(f"encoder/layer{i}/attention/bias", rules).path for i in range(12)]
    assert targets[::2] == [f"encoder/layer{i}/attention/bias" for i in range(6)]
    assert targets[1::2] == [None] * 6
    assert rename_back("encoder/layer5/out", rules).path == "encoder/layer10/out"
    assert rename("pooler/bias", rules).path == "pooler/bias"


@pytest.mark.parametrize(
    ("pattern", "layers", "match"),
    [
        ("layer/{rest...}", (0,), "must have one {name}"),
        ("stage{i}/block{j}", (0,), r"must have one {name} .* got \['i', 'j'\]"),
        ("layer{i}", (0, 2, 0), r"each once, got \(0, 2, 0\)"),
        ("layer{i}", (-1,), "numbers of the source's layers"),
    ],
)
def test_invalid_layers_raise(pattern, layers, match):
    with pytest.raises(ValueError, match=match):
        layer_rules(pattern, layers)
