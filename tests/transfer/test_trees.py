"""Tests of transfer between trees: values, copies, dtypes, and the completeness of the report."""

import collections
import dataclasses
import pickle
import re
import tracemalloc
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkd import layout
from jaxkd.transfer import Rule, TransferError, layer_rules, leaves_by_path, transfer


def numbers(*shape, dtype=np.float32):
    return np.arange(1, np.prod(shape, dtype=int) + 1).reshape(shape).astype(dtype)


def torch_like():
    return {
        "conv.weight": numbers(4, 3, 5, 5),
        "fc.weight": numbers(2, 2),
        "fc.bias": numbers(2),
        "bn.num_batches_tracked": np.array(9),
    }


def flax_like(make=np.zeros):
    conv, logits = {"kernel": make((5, 5, 3, 4), "float32")}, {"kernel": make((2, 2), "float32")}
    return {"params": {"conv": conv, "logits": logits | {"bias": make((2,), "float32")}}}


RULES = (
    Rule("conv.weight", "params/conv/kernel", layout.CONV),
    Rule("fc.weight", "params/logits/kernel", layout.DENSE),
    Rule("fc.bias", "params/logits/bias"),
    Rule("{module...}.num_batches_tracked", None),
)
MAKERS = {"numpy": np.zeros, "jax": jnp.zeros, "abstract": jax.ShapeDtypeStruct}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_rules_move_values(make):
    source = torch_like()
    result, report = transfer(source, flax_like(make), rules=RULES)
    expected = {
        "conv": {"kernel": source["conv.weight"].transpose(2, 3, 1, 0)},
        "logits": {"kernel": source["fc.weight"].T, "bias": source["fc.bias"]},
    }
    chex.assert_trees_all_equal(result, {"params": expected})
    assert all(
        isinstance(leaf, jax.Array if make is jnp.zeros else np.ndarray)
        for leaf in jax.tree.leaves(result)
    )
    assert report.complete and report.left_out == ("bn.num_batches_tracked",)
    assert report.transferred == (
        ("conv.weight", "params/conv/kernel"),
        ("fc.bias", "params/logits/bias"),
        ("fc.weight", "params/logits/kernel"),
    )


class Pair(collections.namedtuple("Pair", "first second")):
    pass


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    weight: object
    scale: object


def test_paths_consist_of_keys_indices_and_attribute_names():
    tree = {"a": [1, (2, 3)], "b": Pair(first=4, second={"x.y": 5}), "c": Record(6, [7]), 8: None}
    tree.pop(8)
    assert leaves_by_path(tree) == {
        "a/0": 1,
        "a/1/0": 2,
        "a/1/1": 3,
        "b/first": 4,
        "b/second/x.y": 5,
        "c/weight": 6,
        "c/scale/0": 7,
    }


LEAVES = st.sampled_from([np.float32, np.int32, jnp.bfloat16, np.bool_]).flatmap(
    lambda dtype: st.sampled_from([(), (2,), (0, 3), (2, 1, 3)]).map(
        lambda shape: numbers(*shape, dtype=dtype)
    )
)
TREES = st.recursive(
    LEAVES | LEAVES.map(jnp.asarray),
    lambda children: (
        st.dictionaries(st.text("ab.", min_size=1, max_size=3), children, max_size=3)
        | st.lists(children, max_size=3)
        | st.tuples(children)
        | st.builds(Pair, children, children)
        | st.builds(Record, children, children)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_transfer_of_a_tree_to_itself_is_complete(tree):
    result, report = transfer(tree, tree)
    assert report.complete and len(report.transferred) == len(jax.tree.leaves(tree))
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    for new, old in zip(jax.tree.leaves(result), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old), strict=True)
        assert isinstance(new, np.ndarray) == isinstance(old, np.ndarray)


# --- copies ---


@pytest.mark.parametrize("make", [np.zeros, jnp.zeros])
@pytest.mark.parametrize("make_source", [np.array, jnp.array])
def test_nothing_is_shared(make_source, make):
    rules = (*RULES[:3], Rule("bn.num_batches_tracked", None))
    source, target = jax.tree.map(make_source, torch_like()), flax_like(make)
    target["params"]["extra"] = make((2, 2), np.float32)
    before = jax.tree.map(np.array, (source, target))
    result, _ = transfer(source, target, rules=rules, strict=False)
    chex.assert_trees_all_equal((source, target), before)
    for new in jax.tree.leaves(result):
        for old in jax.tree.leaves((source, target)):
            assert not np.shares_memory(np.asarray(new), np.asarray(old))
    expected = jax.tree.map(np.array, result)
    for old in jax.tree.leaves((source, target)):
        if isinstance(old, jax.Array):
            old.delete()
        elif old.ndim:
            old[...] = -1
    chex.assert_trees_all_equal(result, expected)


def test_the_result_may_be_donated():
    source = {"weight": numbers(64, 64)}
    before = source["weight"].copy()
    result, _ = transfer(source, {"weight": jnp.zeros((64, 64))})
    double = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 2, tree), donate_argnums=0)
    doubled = double(result)
    np.testing.assert_array_equal(source["weight"], before)
    np.testing.assert_array_equal(doubled["weight"], 2 * before)


def test_arrays_are_placed_like_the_target():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    target = {"split": jax.device_put(jnp.zeros(8), sharding), "free": jnp.zeros(2)}
    result, _ = transfer({"split": numbers(8), "free": numbers(2)}, target)
    assert result["split"].sharding == sharding
    assert not result["free"].committed


def test_peak_memory_is_source_and_result():
    source = {f"layer{i}.weight": np.zeros((128, 64, 3, 3), np.float32) for i in range(20)}
    target = {f"layer{i}": jax.ShapeDtypeStruct((3, 3, 64, 128), np.float32) for i in range(20)}
    tracemalloc.start()
    transfer(source, target, rules=[Rule("layer{i}.weight", "layer{i}", layout.CONV)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * sum(array.nbytes for array in source.values())


# --- dtypes ---


@pytest.mark.parametrize("make", [np.zeros, jnp.zeros])
@pytest.mark.parametrize(
    ("source_dtype", "target_dtype"), [(np.float32, jnp.bfloat16), (jnp.bfloat16, np.float32)]
)
def test_dtypes(source_dtype, target_dtype, make):
    source = {"weight": numbers(3, dtype=source_dtype)}
    target = {"weight": make(3, target_dtype)}
    with pytest.raises(TransferError, match="1 mismatched"):
        transfer(source, target)
    for dtypes, expected in (("target", target_dtype), ("source", source_dtype)):
        result, _ = transfer(source, target, dtypes=dtypes)
        assert result["weight"].dtype == expected
        np.testing.assert_array_equal(np.asarray(result["weight"], np.float32), [1, 2, 3])


def test_another_kind_of_number_is_a_mismatch():
    source = {"step": numbers(2), "other": numbers(2)}
    target = {"step": np.zeros(2, np.int32), "other": np.zeros(2, np.float32)}
    _, report = transfer(source, target, dtypes="target", strict=False)
    assert [mismatch.path for mismatch in report.mismatched] == ["step"]


def test_float64_is_not_narrowed_silently():
    source = {"weight": numbers(3, dtype=np.float64)}
    result, _ = transfer(source, {"weight": np.zeros(3, np.float32)}, dtypes="source")
    assert result["weight"].dtype == np.float64
    with pytest.raises(TransferError, match="mismatched"):
        transfer(source, {"weight": jnp.zeros(3)}, dtypes="source")


def test_python_numbers_are_leaves():
    result, _ = transfer({"step": 3, "scale": np.float32(0.5)}, {"step": 0, "scale": 1.0})
    assert result == {"step": 3, "scale": 0.5} and result["step"].dtype == np.int32


# --- mismatches ---


def mismatched_trees():
    source = torch_like() | {
        "fc.weight": numbers(3, 2),
        "extra.weight": numbers(1),
        "fc.bias": numbers(2, dtype=int),
    }
    target = flax_like()
    target["params"]["new"] = {"bias": np.full(2, 7.0, np.float32)}
    return source, target


def test_strict_reports_everything_at_once():
    source, target = mismatched_trees()
    with pytest.raises(TransferError) as error:
        transfer(source, target, rules=(*RULES, Rule("gamma{i}", "params/scale{i}")))
    report = error.value.report
    assert report.missing == ("params/new/bias",) and report.unexpected == ("extra.weight",)
    assert [(m.source_path, m.path, m.source.shape, m.target.shape) for m in report.mismatched] == [
        ("fc.bias", "params/logits/bias", (2,), (2,)),
        ("fc.weight", "params/logits/kernel", (2, 3), (2, 2)),
    ]
    assert [rule.source for rule in report.unused] == ["gamma{i}"]
    assert str(error.value) == (
        "the source does not fit the target: 1 missing, 1 unexpected, 2 mismatched, 1 unused rule, "
        "first fc.bias int64[2] for params/logits/bias float32[2]; the error's report has all: "
        "pass strict=False to transfer only what fits"
    )
    assert pickle.loads(pickle.dumps(error.value)).report == report


def test_not_strict_keeps_the_values_of_the_target():
    source, target = mismatched_trees()
    result, report = transfer(source, target, rules=RULES, strict=False)
    np.testing.assert_array_equal(result["params"]["new"]["bias"], [7, 7])
    np.testing.assert_array_equal(result["params"]["logits"]["kernel"], np.zeros((2, 2)))
    np.testing.assert_array_equal(
        result["params"]["conv"]["kernel"], source["conv.weight"].transpose(2, 3, 1, 0)
    )
    assert not report.complete


@pytest.mark.parametrize(
    ("source", "target", "counts"),
    [
        ({}, {"a": np.zeros(1)}, "1 missing"),
        ({"a": np.zeros(1)}, {}, "1 unexpected"),
        ({"a": np.zeros(1)}, {"a": np.zeros(2)}, "1 mismatched"),
    ],
)
def test_each_kind_of_mismatch_raises_by_itself(source, target, counts):
    shared = {"b": numbers(3)}
    with pytest.raises(TransferError, match=counts):
        transfer(source | shared, target | shared)
    transfer(source | shared, target | shared, strict=False)


@pytest.mark.parametrize("abstract", [True, False])
@pytest.mark.parametrize("common", [0, 1])
def test_a_message_is_a_short_line_however_much_does_not_fit(abstract, common):
    shared = {"b": numbers(3)} if common else {}
    source = {f"Layer{i}.{'block.' * 90}weight\n": numbers(2) for i in range(2000)} | shared
    target = {f"layer{i}/{'block/' * 90}kernel": numbers(2) for i in range(2000)} | shared
    if abstract:
        target = {k: jax.ShapeDtypeStruct(a.shape, a.dtype) for k, a in target.items()}
    with pytest.raises(TransferError) as error:
        transfer(source, target)
    message = str(error.value)
    assert len(message) <= 300 and message.isprintable()
    assert "2,000 missing, 2,000 unexpected, first missing layer0/" in message
    assert " and unexpected Layer0." in message and len(error.value.report.missing) == 2000


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("source", "target", "rules"),
    [
        ({}, {"a": numbers(1)}, ()),
        ({"a": numbers(1)}, {}, ()),
        ({"a": numbers(1)}, {"a": numbers(2)}, ()),
        ({"a": numbers(1)}, {"b": numbers(1)}, ()),
        ({"a": numbers(1)}, {"a": numbers(1)}, (Rule("a", None),)),
    ],
)
def test_nothing_transferred_is_an_error_whatever_strict_says(source, target, rules, strict):
    with pytest.raises(TransferError, match="nothing can be transferred") as error:
        transfer(source, target, rules=rules, strict=strict)
    assert "strict=False" not in str(error.value)


def test_an_abstract_target_needs_every_value():
    target = {
        "a": jax.ShapeDtypeStruct((1,), np.float32),
        "b": jax.ShapeDtypeStruct((1,), np.float32),
    }
    for source in ({"a": numbers(1)}, {"a": numbers(1), "b": numbers(2)}):
        with pytest.raises(TransferError, match="has shapes without values"):
            transfer(source, target, strict=False)
    transfer({"a": numbers(1), "b": numbers(1), "c": numbers(1)}, target, strict=False)


@pytest.mark.parametrize("from_source", [1, 4, 5])
def test_a_transfer_of_less_than_half_says_so(from_source):
    """A caller that drops the report would otherwise train from random weights without a word."""
    source = {"a": numbers(from_source)}
    target = {"a": np.zeros(from_source, np.float32), "b": np.zeros(10 - from_source)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transfer(source, target, strict=False)
    messages = [str(warning.message) for warning in caught]
    expected = f"1 of 2 arrays, {10 * from_source}.0 % of the parameters, come from the source; "
    assert len(messages) == (from_source < 5)
    assert all(message.startswith(expected) and len(message) <= 300 for message in messages)
    assert all(warning.filename == __file__ for warning in caught)


def test_a_rule_that_matches_nothing_is_reported():
    rules = (Rule("conv{i}.weight", "c{i}"), Rule("{x...}.num_batches_tracked", None))
    with pytest.raises(
        TransferError, match=r"1 unused rule, first unused conv\{i\}.weight"
    ) as error:
        transfer({"a": numbers(1)}, {"a": np.zeros(1, np.float32)}, rules=rules)
    assert re.search(r"unused rule +conv\{i\}.weight +c\{i\}", str(error.value.report))
    _, report = transfer(
        {"a": numbers(1)}, {"a": np.zeros(1, np.float32)}, rules=rules, strict=False
    )
    # A rule that leaves paths out may match nothing.
    assert report.unused == rules[:1]


def test_all_clashing_rules_are_listed():
    rules = (Rule("a{i}", "x{i}"), Rule("b{i}", "x{i}"))
    with pytest.raises(
        ValueError, match="clashing rules: 'a1' and 'b1' both become 'x1', 'a2' and 'b2' .* 'x2'"
    ):
        transfer({key: numbers(1) for key in ("a1", "b1", "a2", "b2")}, {}, rules=rules)
    with pytest.raises(ValueError, match="'a1' and 'x1' both become 'x1'"):
        transfer({"a1": numbers(1), "x1": numbers(1)}, {}, rules=rules[:1])


def test_the_error_of_a_layout_that_does_not_fit_names_the_path():
    with pytest.raises(
        ValueError, match=r"fc.bias -> out: an array \(2,\) does not fit the axes 'o i'"
    ):
        transfer(
            {"fc.bias": numbers(2)},
            {"out": numbers(2)},
            rules=[Rule("fc.bias", "out", layout.DENSE)],
        )


def test_malformed_rules_raise_even_after_a_match():
    with pytest.raises(ValueError, match="not a pattern"):
        transfer({"a": numbers(1)}, {"a": numbers(1)}, rules=[Rule("a", "a"), Rule("{b", "c")])


@pytest.mark.parametrize("swap", [False, True])
def test_two_leaves_with_the_same_path_raise(swap):
    trees = [{"a/b": numbers(1), "a": {"b": numbers(1)}}, {"a/b": numbers(1)}]
    with pytest.raises(
        ValueError, match=r"two leaves have the path 'a/b': \['a'\]\['b'\] and \['a/b'\]"
    ):
        transfer(*trees[:: -1 if swap else 1])


def test_a_tree_that_contains_itself_raises():
    cyclic_dict = {}
    cyclic_dict["inner"] = (cyclic_dict,)
    cyclic_list = []
    cyclic_list.append((cyclic_list,))
    for tree in (cyclic_dict, cyclic_list):
        with pytest.raises(ValueError, match="contains itself"):
            transfer(tree, {})
    shared = {"a": numbers(1)}
    transfer({"x": shared, "y": shared}, {"x": shared, "y": shared})


@pytest.mark.parametrize("leaf", ["text", object(), jax.ShapeDtypeStruct((1,), np.float32)])
def test_leaves_that_are_not_arrays_raise(leaf):
    with pytest.raises(TypeError, match="a must be an array of numbers, got"):
        transfer({"a": leaf}, {"a": numbers(1)})
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        with pytest.raises(TypeError, match="a must be an array of numbers, got"):
            transfer({"a": numbers(1)}, {"a": leaf})


def test_unknown_dtypes_raise():
    with pytest.raises(ValueError, match="'same', 'target', 'source'.*got 'bf16'"):
        transfer({}, {}, dtypes="bf16")


# --- the report ---


def test_the_table_lists_source_and_target_paths():
    source, target = mismatched_trees()
    _, report = transfer(source, target, rules=RULES, strict=False)
    assert str(report).splitlines() == [
        "1 transferred, 1 missing, 1 unexpected, 2 mismatched, 1 left out, 0 unused rules",
        "             source                  target",
        "transferred  conv.weight             params/conv/kernel",
        "left out     bn.num_batches_tracked",
        "missing                              params/new/bias",
        "unexpected   extra.weight",
        "mismatched   fc.bias                 params/logits/bias",
        "             int64[2]                float32[2]",
        "mismatched   fc.weight               params/logits/kernel",
        "             float32[2, 3]           float32[2, 2]",
    ]


def test_hostile_names_neither_widen_the_table_nor_break_its_lines():
    source = {"a": numbers(1), "x\n\x1b[2J": numbers(1), "y" * 10**6: numbers(1)}
    _, report = transfer(source, {"a": numbers(1)}, strict=False)
    lines = str(report).splitlines()
    assert len(lines) == 5 and max(map(len, lines)) < 300
    assert str(report).replace("\n", "").isprintable()


def test_long_lists_are_summarized_except_mismatches():
    source = {f"layer{i}.{j}.weight": numbers(1 + (i == 3)) for i in range(4) for j in range(10)}
    target = {
        "params": {
            f"stage{i}": {f"block{j}": {"bias": numbers(1)} for j in range(10)} for i in range(4)
        }
    }
    rules = [Rule("layer{i}.{j}.weight", "params/stage{i}/block{j}/bias")]
    _, report = transfer(source, target, rules=rules, strict=False)
    lines = str(report).splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["transferred", f"params/stage{i}", "(10)"] for i in range(3)
    ]
    assert sum(line.startswith("mismatched") for line in lines) == 10
    assert max(map(len, lines)) <= 100


def test_layers_of_a_deeper_source():
    source = {
        "encoder": {f"layer{i}": {"bias": numbers(2) * i} for i in range(6)},
        "out": numbers(1),
    }
    target = {
        "encoder": {f"layer{i}": {"bias": np.zeros(2, np.float32)} for i in range(3)},
        "out": numbers(1),
    }
    result, report = transfer(
        source, target, rules=layer_rules("encoder/layer{i}/{rest...}", (0, 2, 5))
    )
    assert [result["encoder"][f"layer{i}"]["bias"][0] for i in range(3)] == [0, 2, 5]
    assert len(report.left_out) == 3
    transfer(target, target, rules=layer_rules("encoder/layer{i}/{rest...}", (0, 1, 2)))


@pytest.mark.parametrize(("source", "target"), [(np.int32, np.int8), (np.int8, np.uint8)])
def test_integers_that_the_target_cannot_hold_are_refused(source, target):
    """A cast of 300 to int8 gives 44."""
    value = 300 if source == np.int32 else -3
    tree, like = {"steps": np.array([1, value], source)}, {"steps": np.zeros(2, target)}
    with pytest.raises(ValueError, match=rf"steps has integers from .*{value}.* cannot hold: take"):
        transfer(tree, like, dtypes="target")
    fitting, _ = transfer({"steps": np.array([1, 100], source)}, like, dtypes="target")
    np.testing.assert_array_equal(fitting["steps"], np.array([1, 100], target), strict=True)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_numbers_that_become_infinite_are_named(dtype):
    tree = {"a": np.array([1.0, np.inf, np.nan], np.float32), "b": np.array([3.4e38], np.float32)}
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), tree)
    with pytest.warns(UserWarning, match=r"or NaN in the target's dtype, in b: take a target"):
        transfer(tree, like, dtypes="target")
    transfer({"a": tree["a"]}, {"a": like["a"]}, dtypes="target")
