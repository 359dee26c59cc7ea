"""Tests of saving and loading variables as safetensors files."""

import json
import os
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.models import CNN, from_linen
from jaxkd.weights import (
    load_safetensors,
    read_class_names,
    read_safetensors,
    save_safetensors,
)


@pytest.fixture(scope="module")
def variables():
    model = from_linen(CNN(features=(4,), hidden=8))
    return model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, expected_leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (leaf.dtype, leaf.shape) == (expected_leaf.dtype, expected_leaf.shape)
        np.testing.assert_array_equal(leaf, expected_leaf)


def test_weights_are_restored(variables, tmp_path):
    save_safetensors(tmp_path / "student.safetensors", variables)
    loaded = load_safetensors(tmp_path / "student.safetensors")
    assert_same(loaded, variables)
    assert loaded["batch_stats"] == {}
    assert os.listdir(tmp_path) == ["student.safetensors"]


def test_scalars_and_column_major_arrays_keep_their_shape(tmp_path):
    variables = {
        "params": {
            "scale": np.float32(2.0),
            "kernel": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        },
        "batch_stats": {},
    }
    save_safetensors(tmp_path / "weights.safetensors", variables)
    assert_same(load_safetensors(tmp_path / "weights.safetensors"), variables)


def test_names_are_paths(variables, tmp_path):
    from safetensors.numpy import load_file

    save_safetensors(tmp_path / "student.safetensors", variables)
    expected = {
        f"params/{layer}/{name}"
        for layer in ("conv1", "hidden", "logits")
        for name in ("bias", "kernel")
    }
    assert set(load_file(tmp_path / "student.safetensors")) == expected


def test_statistics_lists_views_and_small_types_are_restored(tmp_path):
    layers = {
        0: {"kernel": jnp.ones((2, 3), jnp.bfloat16)},
        11: {"kernel": np.arange(6.0).reshape(2, 3).T},
    }
    variables = {"params": {"layers": layers}, "batch_stats": {"count": np.array(3, np.int32)}}
    save_safetensors(tmp_path / "student.safetensors", variables)
    assert_same(load_safetensors(tmp_path / "student.safetensors"), variables)


def test_same_weights_give_the_same_file(variables, tmp_path):
    backwards = {"batch_stats": {}, "params": dict(reversed(variables["params"].items()))}
    save_safetensors(tmp_path / "first", variables)
    save_safetensors(tmp_path / "second", backwards)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_class_names_travel_with_the_weights(variables, tmp_path):
    path = tmp_path / "student.safetensors"
    names = ("10", "Ärger", "a, b\n")
    save_safetensors(path, variables, class_names=names)
    assert read_class_names(path) == names
    assert_same(load_safetensors(path), variables)
    # Of a run's folder, too.
    assert read_class_names(tmp_path) == names
    save_safetensors(path, variables)
    assert read_class_names(path) == ()


def test_same_class_names_give_the_same_file_in_every_process(tmp_path):
    code = (
        "import sys, numpy; from jaxkd.weights import save_safetensors;"
        "save_safetensors(sys.argv[1], {'b': numpy.zeros(2)}, class_names=['cat', 'dog'])"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "first")]
    subprocess.run(command, env=environment, check=True)
    save_safetensors(tmp_path / "second", {"b": np.zeros(2)}, class_names=["cat", "dog"])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("value", ["{}", "[1]", "3"])
def test_another_program_s_entry_names_no_classes(tmp_path, value):
    from safetensors.numpy import save_file

    save_file({"b": np.zeros(2)}, tmp_path / "other", {"class_names": value, "format": "pt"})
    assert read_class_names(tmp_path / "other") == ()


def test_damaged_class_names(tmp_path):
    from safetensors.numpy import save_file

    save_file({"b": np.zeros(2)}, tmp_path / "other", {"class_names": "["})
    (tmp_path / "page").write_text("weights")
    for name in ("other", "page"):
        with pytest.raises(ValueError, match=f"{name} is not a complete safetensors file"):
            read_class_names(tmp_path / name)


@pytest.mark.parametrize("read", [read_class_names, load_safetensors, read_safetensors])
def test_a_missing_package_is_named_with_its_command(read, tmp_path, monkeypatch):
    save_safetensors(tmp_path / "file", {"b": np.zeros(2)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"safetensors.*: pip install "):
        read(tmp_path / "file")


@pytest.mark.parametrize("key", ["conv/1", "12", True, 10**19, 1.5, (1, 2), -3])
def test_keys_that_loading_would_change_are_rejected(tmp_path, key):
    with pytest.raises(ValueError, match="in params/ would be loaded as another key"):
        save_safetensors(tmp_path / "student.safetensors", {"params": {key: np.zeros(1)}})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("key", ["01", "²", "①", "1" * 5000, "", "-1", 0, 10**17])
def test_keys_that_are_almost_numbers_are_restored(tmp_path, key):
    variables = {"params": {"layers": {key: np.zeros(1)}}, "batch_stats": {}}
    save_safetensors(tmp_path / "file", variables)
    assert_same(load_safetensors(tmp_path / "file"), variables)


@pytest.mark.parametrize(
    "names", [("params/a", "params/a/b"), ("params/a/b/c", "params/a"), ("params", "params/a")]
)
def test_an_array_at_the_name_of_a_dict_is_an_error(names, tmp_path):
    from safetensors.numpy import save_file

    save_file({name: np.zeros(1) for name in names}, tmp_path / "file")
    with pytest.raises(ValueError, match="file does not hold variables: 'params.*' is an array"):
        load_safetensors(tmp_path / "file")


def test_deep_names_are_an_error(tmp_path):
    from safetensors.numpy import save_file

    save_file({"params/" + "a/" * 100_000: np.zeros(1)}, tmp_path / "file")
    with pytest.raises(ValueError, match="'params/a/a/.*' has more than 100 levels") as error:
        load_safetensors(tmp_path / "file")
    assert len(str(error.value).replace(str(tmp_path), "")) < 300


def test_parameters_without_their_level_are_an_error(variables, tmp_path):
    save_safetensors(tmp_path / "file", variables["params"])
    with pytest.raises(ValueError, match="has the name 'conv1/.*none below params/: save"):
        load_safetensors(tmp_path / "file")


def test_names_of_pytorch_are_an_error(tmp_path):
    save_safetensors(tmp_path / "file", {"fc.weight": np.zeros(1)})
    with pytest.raises(ValueError, match="names of variables.*'fc.weight'.*load_variables"):
        load_safetensors(tmp_path / "file")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, "NumPy cannot hold"),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, "not a complete"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "not a complete"),
        ({"a\n" * 10**5: {"dtype": "F32", "shape": [2], "data_offsets": [4, 8]}}, "not a complete"),
        ({"a": {"dtype": "x" * 10**6, "shape": [1], "data_offsets": [0, 4]}}, "not a complete"),
    ],
)
def test_arrays_that_the_file_cannot_hold(header, match, tmp_path):
    content = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(content)) + content + bytes(4))
    with pytest.raises(ValueError, match=match) as error:
        load_safetensors(tmp_path / "file")
    message = str(error.value).replace(str(tmp_path), "")
    assert message.isprintable() and len(message) <= 300


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: content[:20], lambda content: b"no"]
)
def test_error_names_a_damaged_file(variables, tmp_path, damage):
    path = tmp_path / "student.safetensors"
    save_safetensors(path, variables)
    path.write_bytes(damage(path.read_bytes()))
    match = r"student\.safetensors is not a complete safetensors file"
    with pytest.raises(ValueError, match=match):
        load_safetensors(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "student.safetensors")


@pytest.mark.parametrize("names", ["cat", {"cat": 0, "dog": 1}, {"cat"}, [0, 1], ["cat", None]])
def test_names_of_classes_are_strings_in_an_order(names, tmp_path):
    with pytest.raises(TypeError, match="class_names must be one string per class, in the order"):
        save_safetensors(tmp_path / "a", {"bias": np.zeros(2)}, class_names=names)
    assert not (tmp_path / "a").exists()


def test_no_two_classes_have_one_name(tmp_path):
    with pytest.raises(ValueError, match="class_names has cat more than once: give each class"):
        save_safetensors(tmp_path / "a", {"bias": np.zeros(3)}, class_names=["cat", "dog", "cat"])
