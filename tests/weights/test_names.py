"""Tests of names that a wrapper of the network changed: prefixes, counters, several networks."""

import time

import jax
import numpy as np
import pytest

from jaxkd import layout
from jaxkd.transfer import Rule, TransferError
from jaxkd.weights import from_torch
from jaxkd.weights.names import unwrap_names

RULES = (
    Rule("conv{i}.weight", "params/conv{i}/kernel", layout.CONV),
    Rule("bn{i}.weight", "params/bn{i}/scale"),
    Rule("bn{i}.running_mean", "batch_stats/bn{i}/mean"),
    Rule("{any...}.num_batches_tracked", None),
    Rule("layer1.0.weight", "params/layer1/kernel", layout.DENSE),
    Rule("fc.weight", "params/logits/kernel", layout.DENSE),
    Rule("fc.bias", "params/logits/bias"),
)
SHAPES = {
    "conv1.weight": (4, 3, 3, 3),
    "bn1.weight": (4,),
    "bn1.running_mean": (4,),
    "layer1.0.weight": (4, 4),
    "fc.weight": (2, 4),
    "fc.bias": (2,),
}
WEIGHTS = {
    name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, (name, shape) in enumerate(SHAPES.items())
}
COUNTER = {"bn1.num_batches_tracked": np.array(7)}
TARGET = {
    "params": {
        "conv1": {"kernel": np.zeros((3, 3, 3, 4), np.float32)},
        "bn1": {"scale": np.zeros(4, np.float32)},
        "layer1": {"kernel": np.zeros((4, 4), np.float32)},
        "logits": {"kernel": np.zeros((4, 2), np.float32), "bias": np.zeros(2, np.float32)},
    },
    "batch_stats": {"bn1": {"mean": np.zeros(4, np.float32)}},
}
EXPECTED, _ = from_torch(WEIGHTS, TARGET, RULES)


def under(prefix, weights=WEIGHTS):
    return {f"{prefix}{name}": array for name, array in weights.items()}


def assert_equal(variables, expected=EXPECTED):
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("prefix", "removed"),
    [
        ("_orig_mod.", ("_orig_mod.",)),
        ("module.", ("module.",)),
        ("model.", ("model.",)),
        ("net.", ("net.",)),
        ("state_dict.model.", ("state_dict.model.",)),
        ("_orig_mod.module.", ("_orig_mod.", "module.")),
        ("module._orig_mod.", ("_orig_mod.", "module.")),
        ("_fsdp_wrapped_module.", ("_fsdp_wrapped_module.",)),
        ("model.module._orig_mod.encoder.", ("_orig_mod.", "model.module.encoder.")),
        ("0.", ("0.",)),
    ],
)
def test_a_prefix_of_every_name_is_removed(prefix, removed, strict):
    variables, report = from_torch(under(prefix, WEIGHTS | COUNTER), TARGET, RULES, strict=strict)
    assert_equal(variables)
    assert report.complete and report.removed == removed
    assert report.left_out == ("bn1.num_batches_tracked",)
    assert all(repr(part) in str(report).splitlines()[0] for part in removed)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "counters",
    [
        {"n_averaged": np.array(3)},
        {"step": np.array([5]), "initted": np.array([True])},
        {"num_updates": np.array(3, np.int32), "epoch": np.int64(4)},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "ema_model.", "module.module."])
def test_counters_beside_the_weights_are_left_out(prefix, counters, strict):
    variables, report = from_torch(counters | under(prefix), TARGET, RULES, strict=strict)
    assert_equal(variables)
    assert report.complete and {*report.left_out} == {*counters}
    assert all(name in str(report) for name in counters)


@pytest.mark.parametrize(
    "extra",
    [{"alpha": np.array(0.5)}, {"steps": np.array([1, 2])}, {"mask": np.zeros((2, 2), int)}],
)
def test_what_may_be_a_weight_is_no_counter(extra):
    with pytest.raises(TransferError) as error:
        from_torch(extra | under("module."), TARGET, RULES)
    assert error.value.report.unexpected == tuple(extra)
    assert error.value.report.removed == ("module.",)


def test_names_that_pytorch_puts_between_others_are_removed_anywhere():
    inner = {name.replace("layer1.0", "layer1._orig_mod.0"): a for name, a in WEIGHTS.items()}
    variables, report = from_torch(under("module.", inner), TARGET, RULES)
    assert_equal(variables)
    assert report.removed == ("_orig_mod.", "module.")


def test_a_head_beside_the_wrapped_part_keeps_its_name():
    names = {name: name if name.startswith("fc") else f"backbone.{name}" for name in WEIGHTS}
    variables, report = from_torch({names[k]: a for k, a in WEIGHTS.items()}, TARGET, RULES)
    assert_equal(variables)
    assert report.removed == ("backbone.",)


def test_two_heads_are_ambiguous():
    weights = under("backbone.") | {"fc.weight": WEIGHTS["fc.weight"], "fc.bias": np.ones(2)}
    with pytest.raises(ValueError, match="'backbone.fc.weight' and 'fc.weight' .*entry='backbone'"):
        from_torch(weights, TARGET, RULES, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_two_networks_are_ambiguous(strict):
    weights = under("ema_model.") | under("online_model.")
    match = r"'ema_model.' and 'online_model.'.*entry='ema_model' \(--entry ema_model\)$"
    with pytest.raises(ValueError, match=match):
        from_torch(weights, TARGET, RULES, strict=strict)


def test_a_small_student_beside_the_teacher_is_not_explained():
    weights = under("teacher.") | {"student.conv1.weight": np.ones((2, 3, 3, 3), np.float32)}
    with pytest.raises(TransferError) as error:
        from_torch(weights, TARGET, RULES)
    assert error.value.report.unexpected == ("student.conv1.weight",)
    variables, report = from_torch(weights, TARGET, RULES, strict=False)
    assert_equal(variables)
    assert report.unexpected == ("student.conv1.weight",)


@pytest.mark.parametrize(
    ("weights", "prefix"),
    [
        (WEIGHTS | under("ema."), "ema"),
        (under("model.") | under("model.ema."), "model.ema"),
        # Neither is complete.
        ({k: a for k, a in (WEIGHTS | under("ema.")).items() if "fc.bias" not in k}, "ema"),
    ],
)
def test_a_second_network_with_a_prefix_is_named(weights, prefix):
    choice = rf"begin with '{prefix}\.': .*entry='{prefix}' \(--entry {prefix}\)"
    with pytest.raises(ValueError, match=choice + r", or the other one by strict=False") as error:
        from_torch(weights, TARGET, RULES)
    assert len(str(error.value)) <= 300
    with pytest.warns(UserWarning, match="the other one is taken; take that one by entry"):
        _, report = from_torch(weights, TARGET, RULES, strict=False)
    names = [name for name, _ in report.transferred]
    assert {*names} == {name for name in WEIGHTS if name in names} and len(names) >= 5


def test_what_is_missing_under_a_prefix_is_named_without_it():
    weights = under("model.")
    del weights["model.fc.bias"]
    with pytest.raises(TransferError) as error:
        from_torch(weights, TARGET, RULES)
    report = error.value.report
    assert report.missing == ("params/logits/bias",) and not report.unexpected
    variables, report = from_torch(weights, TARGET, RULES, strict=False)
    assert len(report.transferred) == 5 and report.removed == ("model.",)
    np.testing.assert_array_equal(variables["params"]["logits"]["bias"], np.zeros(2))


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_transferred_is_an_error(strict):
    for weights in (under("x", {"yz": np.ones(3)}), {"net.fc.other": np.ones(3)}):
        with pytest.raises(TransferError, match="nothing can be transferred"):
            from_torch(weights, TARGET, RULES, strict=strict)


def test_few_names_explain_no_prefix():
    weights = {f"other.{i}": np.ones(3) for i in range(20)}
    unwrapped = unwrap_names(weights | {"head.fc.bias": np.ones(2)}, WEIGHTS)
    assert unwrapped.removed == () and "head.fc.bias" in unwrapped.weights


def test_names_of_a_million_parts_cost_no_more():
    names = {("a." * 500_000) + str(i): np.ones(1) for i in range(20)}
    start = time.perf_counter()
    assert unwrap_names(names | WEIGHTS, WEIGHTS).removed == ()
    assert unwrap_names(names | under("module."), WEIGHTS).removed == ("module.",)
    # Without the bound it takes minutes.
    assert time.perf_counter() - start < 10


def test_more_arrays_than_any_network_has_are_an_error():
    weights = {f"a{i}": np.ones(1) for i in range(10_001)}
    with pytest.raises(ValueError, match="10,001 arrays, more than 10,000: .*entry='model'"):
        from_torch(weights, TARGET, RULES)


# --- names of this library ---


@pytest.mark.parametrize("strict", [True, False])
def test_names_of_variables_need_no_rules(strict):
    weights = {
        "params/conv1/kernel": EXPECTED["params"]["conv1"]["kernel"],
        "params/bn1/scale": EXPECTED["params"]["bn1"]["scale"],
        "params/layer1/kernel": EXPECTED["params"]["layer1"]["kernel"],
        "params/logits/kernel": EXPECTED["params"]["logits"]["kernel"],
        "params/logits/bias": EXPECTED["params"]["logits"]["bias"],
        "batch_stats/bn1/mean": EXPECTED["batch_stats"]["bn1"]["mean"],
    }
    variables, report = from_torch(weights, TARGET, RULES, strict=strict)
    assert_equal(variables)
    assert report.complete and not report.removed
    weights["params/logits/bias"] = np.ones(3, np.float32)
    weights["params/extra"] = np.ones(3, np.float32)
    with pytest.raises(TransferError, match="1 unexpected, 1 mismatched"):
        from_torch(weights, TARGET, RULES)
