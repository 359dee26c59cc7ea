"""Tests of the conversion from and to PyTorch, and of loading state dicts from files."""

import importlib
import importlib.util
import json
import os
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxkd import layout, models, weights
from jaxkd.models import Outputs, from_linen
from jaxkd.transfer import Rule, TransferError, rename
from jaxkd.weights import OpaqueObject, save_safetensors
from jaxkd.weights.torch_files import (
    from_torch,
    load_variables,
    load_weights,
    save_torch,
    to_torch,
)

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="PyTorch is not installed"
)

PRETRAINED = (
    Path(__file__).parents[2].parent / "shared" / "data" / "pretrained" / "resnet20-12fca82f.th"
)
needs_pretrained = pytest.mark.skipif(
    not PRETRAINED.exists(), reason="the ResNet-20 checkpoint is not available"
)


class Small(nn.Module):
    """A convolution, a normalization, and a dense layer with a square kernel."""

    @nn.compact
    def __call__(self, inputs, train=False):
        x = nn.Conv(8, (3, 3), padding=1, use_bias=False, name="conv")(inputs)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, epsilon=1e-5, name="bn")(x))
        x = nn.relu(nn.Dense(8, name="hidden")(x.mean(axis=(1, 2))))
        return Outputs(nn.Dense(3, name="logits")(x), {})


RULES = (
    Rule("stem.conv.weight", "params/conv/kernel", layout.CONV),
    Rule("stem.bn.weight", "params/bn/scale"),
    Rule("stem.bn.bias", "params/bn/bias"),
    Rule("stem.bn.running_mean", "batch_stats/bn/mean"),
    Rule("stem.bn.running_var", "batch_stats/bn/var"),
    Rule("{any...}.num_batches_tracked", None),
    Rule("{layer}.weight", "params/{layer}/kernel", layout.DENSE),
    Rule("{layer}.bias", "params/{layer}/bias"),
)

SHAPES = {
    "stem.conv.weight": (8, 3, 3, 3),
    **{f"stem.bn.{name}": (8,) for name in ("weight", "bias", "running_mean", "running_var")},
    "stem.bn.num_batches_tracked": (),
    **{"hidden.weight": (8, 8), "hidden.bias": (8,), "logits.weight": (3, 8), "logits.bias": (3,)},
}


def draw_weights(shapes=SHAPES):
    rng = np.random.default_rng(0)
    weights = {
        name: rng.uniform(0.1, 1.0, shape).astype(np.float32) for name, shape in shapes.items()
    }
    return weights | {name: np.array(7) for name in weights if name.endswith("num_batches_tracked")}


MODEL = from_linen(Small())
IMAGES = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)


@pytest.fixture(scope="module")
def abstract():
    return jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES)


def as_float(array, dtype):
    return array.astype(dtype) if array.dtype == np.float32 else array


# --- conversion ---


def test_every_weight_is_converted_with_its_layout(abstract):
    weights = draw_weights()
    variables, report = from_torch(weights, abstract, RULES)
    assert report.complete and report.left_out == ("stem.bn.num_batches_tracked",)
    params, statistics = variables["params"], variables["batch_stats"]["bn"]
    np.testing.assert_array_equal(
        params["conv"]["kernel"], weights["stem.conv.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(params["logits"]["kernel"], weights["logits.weight"].T)
    # 8×8, so the shape does not show whether it is transposed.
    np.testing.assert_array_equal(params["hidden"]["kernel"], weights["hidden.weight"].T)
    np.testing.assert_array_equal(params["bn"]["scale"], weights["stem.bn.weight"])
    np.testing.assert_array_equal(statistics["mean"], weights["stem.bn.running_mean"])
    np.testing.assert_array_equal(statistics["var"], weights["stem.bn.running_var"])
    assert not any(
        np.shares_memory(leaf, array)
        for leaf in jax.tree.leaves(variables)
        for array in weights.values()
    )


def test_round_trip(abstract):
    weights = draw_weights()
    variables, _ = from_torch(weights, abstract, RULES)
    back = to_torch(variables, RULES)
    del weights["stem.bn.num_batches_tracked"]
    assert set(back) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array, strict=True)
        assert back[name].flags.c_contiguous and back[name].flags.writeable
    chex.assert_trees_all_equal(from_torch(back, abstract, RULES)[0], variables)
    assert not any(
        np.shares_memory(leaf, array)
        for leaf in jax.tree.leaves(variables)
        for array in back.values()
    )
    on_device = jax.tree.map(jnp.asarray, variables)
    chex.assert_trees_all_equal(to_torch(on_device, RULES), back)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_weights_are_cast_to_the_dtypes_of_the_variables(dtype, abstract):
    weights = {name: as_float(array, dtype) for name, array in draw_weights().items()}
    variables, _ = from_torch(weights, abstract, RULES)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        variables["params"]["logits"]["bias"],
        np.asarray(weights["logits.bias"], np.float32),
        strict=True,
    )
    small = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract)
    assert {
        array.dtype for array in to_torch(from_torch(weights, small, RULES)[0], RULES).values()
    } == {np.dtype(jnp.bfloat16)}


def test_every_misfit_is_reported_or_keeps_its_value(abstract):
    weights = draw_weights() | {
        "extra.alpha": np.ones(2),
        "logits.weight": np.ones((5, 8), np.float32),
    }
    del weights["stem.bn.bias"], weights["logits.bias"]
    weights["logits.bias"] = np.ones(5, np.float32)
    rules = tuple(rule for rule in RULES if rule.source != "stem.bn.bias")
    with pytest.raises(TransferError) as error:
        from_torch(weights, abstract, rules)
    report = error.value.report
    assert report.missing == ("params/bn/bias",) and report.unexpected == ("extra.alpha",)
    assert [mismatch.path for mismatch in report.mismatched] == [
        "params/logits/bias",
        "params/logits/kernel",
    ]
    initial = MODEL.init(jax.random.key(0), jnp.zeros(IMAGES.shape))
    variables, report = from_torch(weights, initial, rules, strict=False)
    assert len(report.transferred) == 6
    chex.assert_trees_all_equal(variables["params"]["logits"], initial["params"]["logits"])
    np.testing.assert_array_equal(variables["params"]["bn"]["scale"], weights["stem.bn.weight"])


def test_to_torch_needs_a_rule_that_fits_every_variable(abstract):
    variables, _ = from_torch(draw_weights(), abstract, RULES)
    with pytest.raises(
        ValueError,
        match="no rule gives .*: batch_stats/bn/mean, batch_stats/bn/var, params/bn/scale; add",
    ):
        to_torch(variables, [rule for rule in RULES if not rule.source.startswith("stem.bn")])
    variables["params"]["hidden"]["kernel"] = np.ones(8)
    with pytest.raises(
        ValueError, match=r"params/hidden/kernel -> \{layer\}\.weight: .*\(8,\) does not fit"
    ):
        to_torch(variables, RULES)


# --- files ---


def test_saved_torch_file(abstract, tmp_path):
    variables, _ = from_torch(draw_weights(), abstract, RULES)
    save_torch(tmp_path / "a", variables, RULES)
    save_torch(tmp_path / "b", jax.tree.map(jnp.asarray, variables), RULES)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes() and sorted(os.listdir(tmp_path)) == ["a", "b"]
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header.pop("__metadata__") == {"format": "pt"} and header["logits.weight"]["shape"] == [
        3,
        8,
    ]
    chex.assert_trees_all_equal(
        from_torch(load_weights(tmp_path / "a"), abstract, RULES)[0], variables
    )


def test_failed_save_keeps_the_old_file(abstract, tmp_path):
    variables, _ = from_torch(draw_weights(), abstract, RULES)
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="no rule gives"):
        save_torch(tmp_path / "file", variables, RULES[:2])
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_files_of_variables_are_flat(abstract, tmp_path):
    variables, _ = from_torch(draw_weights(), abstract, RULES)
    variables["params"]["hidden"]["bias"] = np.ones(8, jnp.bfloat16)
    save_safetensors(tmp_path / "student", variables)
    weights = load_weights(tmp_path / "student")
    np.testing.assert_array_equal(
        weights["params/hidden/bias"], np.ones(8, jnp.bfloat16), strict=True
    )
    np.testing.assert_array_equal(
        weights["batch_stats/bn/var"], variables["batch_stats"]["bn"]["var"], strict=True
    )
    assert len(weights) == 9
    with pytest.raises(ValueError, match="has no entries: leave out entry='ema'"):
        load_weights(tmp_path / "student", entry="ema")


NAMESPACE = object()
"""Stands for an `argparse.Namespace`."""


def write(path, tree):
    """A checkpoint in the zip format whose dicts hold numbers, or `[n]` for an array of n ones."""

    def piece(value):
        if value is NAMESPACE:
            return b"cargparse\nNamespace\n)\x81}X\x02\0\0\0lrK\x01sb"
        if isinstance(value, dict):
            items = b"".join(
                b"X%b%b%b" % (struct.pack("<i", len(k)), k.encode(), piece(v))
                for k, v in value.items()
            )
            return b"}(%bu" % items
        if not isinstance(value, list):
            return b"K%c" % value
        storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x09tQ"
        return b"ctorch._utils\n_rebuild_tensor\n(%bK\0K%c\x85K\x01\x85tR" % (storage, *value)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02%b." % piece(tree))
        archive.writestr("archive/data/0", np.ones(9, "<f4").tobytes())
    return path


@pytest.mark.parametrize(
    ("tree", "entry", "shapes"),
    [
        ({"a": [2], "b": [3]}, None, {"a": (2,), "b": (3,)}),
        (
            {
                "epoch": 7,
                "best": [1],
                "state_dict": {"a": [2]},
                "optimizer": {"state": {}, "lr": 1},
            },
            None,
            {"a": (2,)},
        ),
        ({"model": {"a": [2]}, "ema": {"a": [3]}}, "ema", {"a": (3,)}),
        ({"model": {"a": [2]}, "ema": {"a": [3]}}, "model", {"a": (2,)}),
        ({"module.a": [2], "module.b.module.c": [3]}, None, {"a": (2,), "b.module.c": (3,)}),
        ({"module.a": [2], "b": [3]}, None, {"module.a": (2,), "b": (3,)}),
    ],
)
def test_finds_the_state_dict(tree, entry, shapes, tmp_path):
    weights = load_weights(write(tmp_path / "file", tree), entry=entry)
    assert {name: array.shape for name, array in weights.items()} == shapes


@pytest.mark.parametrize(
    ("tree", "entry", "shapes"),
    [
        ({"args": NAMESPACE, "state_dict": {"a": [2]}}, None, {"a": (2,)}),
        ({"args": NAMESPACE, "state_dict": {"a": [2]}}, "state_dict", {"a": (2,)}),
        ({"state_dict": {"a": [2]}, "hyper_parameters": {"cfg": NAMESPACE}}, None, {"a": (2,)}),
        # timm: the weights and their average.
        ({"state_dict": {"a": [2]}, "state_dict_ema": {"a": [3]}}, "state_dict_ema", {"a": (3,)}),
        # Some statistics beside the weights are no second network.
        ({"state_dict": {"a": [2]}, "mean": [3], "std": [3]}, None, {"a": (2,)}),
        # Lightning's names, of which an entry selects those of one network.
        ({"state_dict": {"ema.a": [2], "net.a": [3]}}, "net", {"a": (3,)}),
        ({"state_dict": {"ema.a": [2], "net.a": [3]}}, "net.", {"a": (3,)}),
        ({"state_dict": {"ema.a": [2], "net.a": [3]}}, "state_dict.net", {"a": (3,)}),
        ({"x.y": {"a.b": {"c.d": [2]}}, "e": {"f": [3]}}, "x.y.a.b", {"c.d": (2,)}),
        ({"x.y": {"a.b": {"c.d": [2]}}, "e": {"f": [3]}}, "x.y.a.b.c", {"d": (2,)}),
        ({"ema.a": [2], "net.a": [3]}, "ema", {"a": (2,)}),
    ],
)
def test_finds_the_state_dict_beside_other_objects(tree, entry, shapes, tmp_path):
    weights = load_weights(write(tmp_path / "file", tree), entry=entry)
    assert {name: array.shape for name, array in weights.items()} == shapes


@pytest.mark.parametrize(
    "extra",
    [{"epoch": 3}, {"args": NAMESPACE}, {"args": NAMESPACE, "epoch": 3}, {"optimizer": {"lr": 1}}],
)
def test_few_other_values_between_many_weights_are_left_out_and_named(extra, tmp_path):
    weights = {"a": [2], "b": [3], "c": [4]}
    for tree, entry in ((weights | extra, None), ({"x": 1, "model": weights | extra}, None)):
        path = write(tmp_path / "file", tree)
        with pytest.warns(UserWarning, match=f"left out what is no array.*{[*extra][0]!r}"):
            loaded = load_weights(path, entry=entry)
        shapes = {name: array.shape for name, array in loaded.items()}
        assert shapes == {"a": (2,), "b": (3,), "c": (4,)}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("names", ["torch", "own"])
def test_weights_that_are_not_finite_are_named(value, names):
    name = {"torch": "fc.bias", "own": "params/bias"}[names]
    weights = {name: np.array([1, value], np.float32)}
    variables = {"params": {"bias": jax.ShapeDtypeStruct((2,), np.float32)}}
    rules = (Rule("fc.bias", "params/bias"),)
    with pytest.warns(UserWarning, match=f"1 of 1 arrays hold NaN or infinity, such as {name}:"):
        from_torch(weights, variables, rules)


@pytest.mark.parametrize("names", ["torch", "own"])
@pytest.mark.parametrize("value", [-1.0, -1e-7, -np.inf])
def test_variances_below_zero_are_named(value, names):
    name = {"torch": "bn.running_var", "own": "batch_stats/bn/var"}[names]
    weights = {name: np.array([1, value], np.float32)}
    variables = {"batch_stats": {"bn": {"var": jax.ShapeDtypeStruct((2,), np.float32)}}}
    rules = (Rule("bn.running_var", "batch_stats/bn/var"),)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from_torch(weights, variables, rules)
    message = str(caught[-1].message)
    assert message.startswith(f"1 of 1 arrays are running variances below 0, such as {name}, whose")
    assert len(message) <= 300 and len(caught) == (2 if np.isinf(value) else 1)


def test_weights_that_are_all_zero_are_named():
    weights = {"fc.weight": np.zeros((3, 2), np.float32), "fc.bias": np.zeros(3, np.float32)}
    weights["bn.running_var"] = np.ones(3, np.float32)
    rules = (
        Rule("fc.weight", "params/kernel", layout.DENSE),
        Rule("fc.bias", "params/bias"),
        Rule("bn.running_var", "batch_stats/var"),
    )
    empty = np.empty(3, np.float32)
    variables = {
        "params": {"kernel": np.empty((2, 3), np.float32), "bias": empty},
        "batch_stats": {"var": empty},
    }
    with pytest.warns(UserWarning, match="all 2 arrays of weights are 0, with which a network"):
        from_torch(weights, variables, rules)
    weights["fc.weight"][0, 0] = 1e-9
    from_torch(weights, variables, rules)
    # New biases are 0.
    del weights["fc.weight"], variables["params"]["kernel"]
    from_torch(weights, variables, rules[1:])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "qint8", "_utils._rebuild_qtensor"])
@pytest.mark.parametrize("count", [0, 3])
def test_quantized_arrays_of_a_torch_file_are_refused(name, count, tmp_path, monkeypatch):
    """Also between arrays, where other values are left out with a warning."""
    tree = {f"w{i}": np.ones(2) for i in range(count)} | {"q": OpaqueObject(f"torch.{name}")}
    monkeypatch.setattr("jaxkd.weights.torch_files.read_torch", lambda path: tree)
    (tmp_path / "file").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=f"torch.{name}.*: dequantise the weights first") as caught:
        load_weights(tmp_path / "file")
    assert len(str(caught.value)) - len(str(tmp_path)) <= 250


def test_names_of_a_safetensors_file_are_selected(tmp_path):
    save_safetensors(tmp_path / "file", {"net.a": np.ones(2), "ema.a": np.ones(3)})
    for entry in ("net", "net."):
        assert load_weights(tmp_path / "file", entry=entry)["a"].shape == (2,)
    # The name of an array is no prefix.
    with pytest.raises(ValueError, match=r"entry='net\.a' .*, or give what some"):
        load_weights(tmp_path / "file", entry="net.a")


@pytest.mark.parametrize(
    ("tree", "entry", "match"),
    [
        (
            {"model": NAMESPACE, "best": [1]},
            None,
            r"no dict of arrays: it contains 'model' \(argparse.Namespace\): save only the weights",
        ),
        (
            {**{name: [2] for name in "abcdefgh"}, "ema": {name: [2] for name in "abcdefgh"}},
            None,
            "has 8 arrays, and weights in the entry 'ema': choose those by entry='ema'",
        ),
        (
            {"net": {**{name: [2] for name in "abcdefgh"}, "epoch": 3}, "stats": {"mean": [3]}},
            None,
            "has weights in the entries 'stats', 'net': choose one",
        ),
        ({str(i) * 99: 3 for i in range(9)}, None, r"no dict of arrays: .*\.\.\.: save only"),
        ({"model": {"net": {"a": [2]}}}, None, r"'model' \(dict\): .* as in entry='model.net'"),
        ({"model": {"net": {"a": [2]}}}, "model", r"'net' \(dict\): .* as in entry='model.net'"),
        ({"model": {"a": [2]}}, "mod", "has no entry 'mod'; its entries: 'model'"),
        ({"model": {"a": [2]}}, "model.a", "'model.a' of .* is not a dict of arrays"),
        ({"model": {"a": [2]}}, "x" * 10**6, r"has no entry 'x{57}\.\.\.'"),
        ({"x" * 10**6: {"a": [2]}, "b": {"a": [2]}}, None, r"'x+ … x+', 'b': choose one"),
        ({f"n{i}": {"a": [2]} for i in range(999)}, None, "'n0', 'n1', 'n2', 'n3' and 995 more"),
    ],
)
def test_weights_that_are_not_found_or_not_unique(tree, entry, match, tmp_path):
    with pytest.raises(ValueError, match=match) as error:
        load_weights(write(tmp_path / "file", tree), entry=entry)
    assert len(str(error.value).replace(str(tmp_path), "")) <= 300


@pytest.mark.parametrize(
    ("tree", "entry", "match"),
    [
        (
            {"model": {"a": [2]}, "ema": {"a": [3]}},
            None,
            "entries 'model', 'ema': choose one, as in entry='model'",
        ),
        ({"model": {"a": [2]}}, "ema", "has no entry 'ema'; its entries: 'model'"),
        (
            {"model": {"a": [2], "b": 1}},
            "model",
            r"'model' of .*file is not a dict of arrays: it contains 'b' \(int\)",
        ),
        ({"model": 3}, "model", "it contains a value of type int"),
        ({"a": [2], "epoch": 3}, None, r"it contains 'epoch' \(int\): save only the weights"),
        ({"a": {"b": {"c": [2]}}}, None, r"has no dict of arrays: it contains 'a' \(dict\)"),
        ({}, None, "has no dict of arrays: it contains nothing"),
        ([2], None, "it contains a value of type ndarray: save only the weights"),
        ([2], "a", "has no entry 'a'; its entries: none"),
        ({c: 1 for c in "abcdefgh"}, None, r"'e' \(int\), \.\.\.: save only"),
    ],
)
def test_no_single_state_dict(tree, entry, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        load_weights(write(tmp_path / "file", tree), entry=entry)


def test_files_of_other_formats(abstract, tmp_path):
    variables, _ = from_torch(draw_weights(), abstract, RULES)
    save_torch(tmp_path / "file", variables, RULES)
    content = (tmp_path / "file").read_bytes()
    for damaged, match in {
        content[:-1]: "not a complete safetensors file",
        content[:200]: "begins with",
        b'{"weight_map": {"a": "model-00001.safetensors"}}': "shards model-00001.safetensors of 1",
        b'{"a": 1}': "has no weight_map: it is not an index of weights; give the file",
        b"": "is an empty file",
    }.items():
        (tmp_path / "file").write_bytes(damaged)
        with pytest.raises(ValueError, match=match):
            load_weights(tmp_path / "file")
    with pytest.raises(ValueError, match="is a folder"):
        load_weights(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "absent")


def test_dtype_that_numpy_lacks(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
    with pytest.raises(ValueError, match="file has arrays of a dtype that NumPy lacks .*float8"):
        load_weights(tmp_path / "file")


@needs_pretrained
def test_pretrained_resnet20():
    weights = load_weights(PRETRAINED)
    assert (
        len(weights) == 97
        and weights["conv1.weight"].shape == (16, 3, 3, 3)
        and "linear.bias" in weights
    )


@pytest.mark.parametrize("strict", [True, False])
def test_files_of_this_library_are_loaded_like_those_of_pytorch(strict, abstract, tmp_path):
    weights = draw_weights()
    expected, _ = from_torch(weights, abstract, RULES)
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    save_safetensors(tmp_path / "variables", expected)
    save_torch(tmp_path / "torch", expected, RULES)
    save_safetensors(tmp_path / "averaged", {f"module.{k}": a for k, a in weights.items()})
    (tmp_path / "run").mkdir()
    save_safetensors(tmp_path / "run" / "student.safetensors", expected)
    for name in ("variables", "torch", "averaged", "run", "run/student.safetensors"):
        variables, report = load_variables(tmp_path / name, target, RULES, strict=strict)
        assert report.complete and report.removed == ("module.",) * (name == "averaged")
        chex.assert_trees_all_equal(variables, expected)
        from_torch(load_weights(tmp_path / name), target, RULES, strict=strict)


def test_files_of_another_network_are_checked_like_those_of_pytorch(abstract, tmp_path):
    save_safetensors(tmp_path / "other", {"params": {"dense": {"kernel": np.ones((2, 3))}}})
    for strict in (True, False):
        with pytest.raises(TransferError, match="nothing can be transferred"):
            load_variables(tmp_path / "other", abstract, RULES, strict=strict)


# --- memory ---


def resnet50_shapes():
    """Shapes like those of ResNet-50: 53 convolutions with norms and a classifier, 25.5 million."""
    shapes = {"conv0.weight": (64, 3, 7, 7)}
    width = 64
    for stage, (blocks, inner) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
        for block in range(blocks):
            name = f"conv{stage}_{block}"
            shapes |= {
                f"{name}_1.weight": (inner, width, 1, 1),
                f"{name}_2.weight": (inner, inner, 3, 3),
            }
            shapes |= {f"{name}_3.weight": (4 * inner, inner, 1, 1)}
            if not block:
                shapes |= {f"{name}_4.weight": (4 * inner, width, 1, 1)}
            width = 4 * inner
    for name, shape in list(shapes.items()):
        norm = name.replace("conv", "bn").removesuffix("weight")
        shapes |= {
            f"{norm}{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")
        }
    return shapes | {"fc.weight": (1000, 2048), "fc.bias": (1000,)}


def test_large_model_needs_one_copy_of_its_weights():
    rules = (
        Rule("conv{n}.weight", "params/conv{n}/kernel", layout.CONV),
        Rule("bn{n}.weight", "params/bn{n}/scale"),
        Rule("bn{n}.bias", "params/bn{n}/bias"),
        Rule("bn{n}.running_{part}", "batch_stats/bn{n}/{part}"),
        Rule("fc.weight", "params/fc/kernel", layout.DENSE),
        Rule("fc.bias", "params/fc/bias"),
    )
    weights = {name: np.full(shape, 0.5, np.float32) for name, shape in resnet50_shapes().items()}
    size = sum(array.nbytes for array in weights.values())
    assert size > 100e6 and len(weights) == 267
    target = {}
    for name, array in weights.items():
        path, rule = rename(name, rules)
        shape = array.shape if rule.layout is None else rule.layout.to_flax(array).shape
        collection, layer, leaf = path.split("/")
        target.setdefault(collection, {}).setdefault(layer, {})[leaf] = jax.ShapeDtypeStruct(
            shape, np.float32
        )
    tracemalloc.start()
    variables, report = from_torch(weights, target, rules)
    assert report.complete and tracemalloc.get_traced_memory()[1] < 1.2 * size, "besides the source"
    del weights
    tracemalloc.reset_peak()
    back = to_torch(variables, rules)
    assert len(back) == 267 and tracemalloc.get_traced_memory()[1] < 2.2 * size, "of both"
    tracemalloc.stop()


# --- PyTorch ---


@needs_torch
def test_models_in_torch_and_flax_are_the_same_function(abstract, tmp_path):
    torch = importlib.import_module("torch")

    class Stem(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.bn = torch.nn.BatchNorm2d(8)

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = Stem()
            self.hidden = torch.nn.Linear(8, 8)
            self.logits = torch.nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem.bn(self.stem.conv(x)).relu().mean((2, 3))
            return self.logits(self.hidden(x).relu())

    def logits(variables):
        return MODEL.apply(jax.tree.map(jnp.asarray, variables), images, train=False)[0].logits

    twin = Twin()
    images = np.random.default_rng(1).normal(size=(4, 6, 6, 3)).astype(np.float32)
    torch_images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    twin(torch_images)  # updates the running statistics
    twin.eval()
    for new in (True, False):
        torch.save(
            {"epoch": 3, "model": twin.state_dict()},
            tmp_path / "file",
            _use_new_zipfile_serialization=new,
        )
        variables, report = from_torch(load_weights(tmp_path / "file"), abstract, RULES)
        assert report.complete
        np.testing.assert_allclose(
            logits(variables), twin(torch_images).detach().numpy(), atol=1e-6
        )
    variables = MODEL.init(jax.random.key(3), jnp.zeros(IMAGES.shape))
    save_torch(tmp_path / "back", variables, RULES)
    state_dict = {
        name: torch.from_numpy(np.array(array))
        for name, array in load_weights(tmp_path / "back").items()
    }
    twin.load_state_dict(state_dict, strict=True)
    np.testing.assert_allclose(logits(variables), twin(torch_images).detach().numpy(), atol=1e-6)


def test_weights_without_running_statistics_are_said():
    """The parameters alone, as `dict(model.named_parameters())` has them."""
    module = models.CifarResNet(1)
    variables = models.from_linen(module).init(jax.random.key(0), np.zeros((1, 8, 8, 3)))
    whole = weights.to_torch(variables, module.torch_rules())
    parameters = {name: value for name, value in whole.items() if "running" not in name}
    assert len(parameters) < len(whole)
    with pytest.warns(UserWarning, match="running means and variances are missing, without which"):
        weights.from_torch(parameters, variables, module.torch_rules(), strict=False)
    weights.from_torch(whole, variables, module.torch_rules())
