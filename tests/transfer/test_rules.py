"""Renaming by rules: forwards, backwards, and what is no pattern."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkd import layout
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
def test_names_both_ways(torch, flax):
    there, back = rename(torch, TORCHVISION), rename_back(flax, TORCHVISION)
    assert (there.path, back.path) == (flax, torch)
    assert there.rule is back.rule and (there.rule is None) == (torch == "fc.bias")


def test_left_out_has_no_name_on_the_other_side():
    assert rename("layer1.0.bn1.num_batches_tracked", TORCHVISION) == (None, TORCHVISION[0])
    assert rename("num_batches_tracked", TORCHVISION).path == "num_batches_tracked", "the dot is part of the pattern"


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
    assert [rename(path, rules).path for path in ("fc.bias", "fc.weight")] == ["head", "logits/weight"]
    assert rename_back("logits/weight", rules).path == "fc.weight"
    assert rename_back("head", rules).path == "fc.bias"
    assert rename_back("logits/bias", rules) == ("logits/bias", None), "fc.bias goes to head"


def test_backwards_a_name_that_was_taken_away_is_nowhere():
    assert rename_back("fc", [Rule("fc", "logits")]).path is None
    assert rename_back("fc", [Rule("fc", None)]).path is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text("ab+./", max_size=3), st.text("ab01_", min_size=1, max_size=4)), max_size=3),
    st.permutations(range(3)),
    st.sampled_from(["", "..."]),
)
def test_every_name_comes_back(parts, order, dots):
    literals, values = [f"{literal}." for literal, _ in parts], [value for _, value in parts]
    there = [f"{literal}{{n{i}{dots}}}" for i, literal in enumerate(literals)]
    rules = (Rule("".join(there), "to/" + "/".join(there[i] for i in order if i < len(there))),)
    path = "".join(map(str.__add__, literals, values))
    target = rename(path, rules)
    assert target.rule is rules[0] and target.path.startswith("to/")
    if not dots:
        assert rename_back(target.path, rules) == (path, rules[0])
    assert rename(rename_back(target.path, rules).path, rules).path == target.path


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (Rule("layer{i", "a"), "'layer{i' is no pattern: write {name}"),
        (Rule("layer}", "a"), "no other braces"),
        (Rule("layer{}", "a"), "no other braces"),
        (Rule("layer{0}", "a{0}"), "no other braces"),
        (Rule("{i}.{i}", "a{i}"), "'{i}.{i}' is no pattern: a name may stand in it once"),
        (Rule("{i}.{i...}", "a{i}"), "once"),
        (Rule("layer{i}", "stage{i}/block{i}"), "once"),
        (Rule("layer{i}", "stage{j}"), "'layer{i}' and 'stage{j}' must have the same names"),
        (Rule("layer{i}.{j}", "stage{i}"), "the same names"),
        (Rule("layer{i...}", "stage{i}"), "the same names"),
        (Rule("layer{i", None), "no pattern"),
    ],
)
def test_what_is_no_rule(rule, match):
    with pytest.raises(ValueError, match=match):
        rename("path", [rule])
    with pytest.raises(ValueError, match=match):
        rename_back("layer1", [Rule("layer{i}", "layer{i}"), rule][::-1])


def test_every_second_layer():
    rules = layer_rules("encoder/layer{i}/{rest...}", (0, 2, 4, 6, 8, 10))
    there = [rename(f"encoder/layer{i}/attention/bias", rules).path for i in range(12)]
    assert there[::2] == [f"encoder/layer{i}/attention/bias" for i in range(6)] and there[1::2] == [None] * 6
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
def test_layers_that_make_no_sense(pattern, layers, match):
    with pytest.raises(ValueError, match=match):
        layer_rules(pattern, layers)
