"""Tests of where weights lie: files that may be read, shards with an index, folders."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from jaxkd._messages import list_some
from jaxkd.weights import (
    load_safetensors,
    load_weights,
    read_class_names,
    read_torch,
    save_safetensors,
)
from jaxkd.weights.files import check_regular_file, find_weights_file, read_json, to_text

FIRST = {"conv.weight": np.arange(6, dtype=np.float32)}
SECOND = {"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
INDEX = "model.safetensors.index.json"


def shard_name(number):
    return f"model-0000{number}-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards and their index."""
    weight_map = {}
    for number, weights in enumerate((FIRST, SECOND), start=1):
        save_safetensors(tmp_path / shard_name(number), weights)
        weight_map |= dict.fromkeys(weights, shard_name(number))
    write_index(tmp_path, weight_map)
    return tmp_path


def write_index(folder, weight_map, name=INDEX):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_loads(path, expected, **options):
    weights = load_weights(path, **options)
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array, strict=True)


# --- regular files ---


@pytest.mark.parametrize(
    "read", [load_weights, load_safetensors, read_class_names, read_torch, read_json]
)
def test_only_regular_files_are_read(read, tmp_path):
    fifo, link, end = tmp_path / "fifo", tmp_path / "link", tmp_path / "socket"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(end))
        # Opening a FIFO would wait for a writer, and /dev/zero never ends.
        for path in (fifo, link, end, "/dev/zero", "/dev/null"):
            with pytest.raises(ValueError, match="is a FIFO, a device or a socket"):
                read(path)


def test_a_link_to_a_file_is_a_file(tmp_path):
    save_safetensors(tmp_path / "file", FIRST)
    (tmp_path / "link").symlink_to("file")
    assert_loads(tmp_path / "link", FIRST)
    check_regular_file(tmp_path / "link")
    with pytest.raises(FileNotFoundError):
        check_regular_file(tmp_path / "absent")


def test_a_path_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/weights-\xff.safetensors")
    save_safetensors(path, FIRST)
    assert_loads(path, FIRST)
    with open(path, "wb") as file:
        file.write(b"weights")
    with pytest.raises(ValueError, match="is not a PyTorch checkpoint"):
        load_weights(path)


@pytest.mark.parametrize(
    ("others", "named"),
    [
        (["model_1.safetensors"], "model_1.safetensors"),
        (["pytorch_model.bin", "model.fp16.safetensors"], "model.fp16.safetensors, pytorch_model."),
        (["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors"),
        ([INDEX], INDEX),
    ],
)
def test_files_that_are_passed_over_are_named(others, named, tmp_path):
    save_safetensors(tmp_path / "model.safetensors", FIRST)
    for name in others:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.warns(UserWarning, match=f"model.safetensors is read and {named}.* passed over"):
        assert_loads(tmp_path, FIRST)
    # Nothing is guessed for a file.
    assert_loads(tmp_path / "model.safetensors", FIRST)


def test_other_files_of_a_hub_folder_are_no_weights(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", FIRST)
    for name in ("optimizer.bin", "training_args.bin", "tf_model.h5", "config.json", "vocab.txt"):
        (tmp_path / name).write_bytes(b"{}")
    assert_loads(tmp_path, FIRST)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_with_adapters_is_refused(name, tmp_path):
    save_safetensors(tmp_path / "model.safetensors", FIRST)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(
        ValueError, match=r"has adapters \(.*: merge the adapters first .*or move th"
    ):
        load_weights(tmp_path)


# --- shards ---


@pytest.mark.parametrize("name", ["", INDEX])
def test_shards_are_read(name, sharded):
    assert_loads(sharded / name, FIRST | SECOND)


def test_names_of_shards_may_have_a_prefix(tmp_path):
    for number, weights in enumerate((FIRST, SECOND), start=1):
        prefixed = {f"module.{name}": array for name, array in weights.items()}
        save_safetensors(tmp_path / shard_name(number), prefixed)
    names = {f"module.{name}": shard_name(1) for name in FIRST}
    write_index(tmp_path, names | {f"module.{name}": shard_name(2) for name in SECOND})
    assert_loads(tmp_path, FIRST | SECOND)
    assert_loads(
        tmp_path, {"weight": SECOND["fc.weight"], "bias": SECOND["fc.bias"]}, entry="module.fc"
    )


def test_a_missing_shard_is_named(sharded):
    (sharded / shard_name(2)).unlink()
    with pytest.raises(ValueError, match=f"shards {shard_name(2)} of 2 are missing beside .*copy"):
        load_weights(sharded)
    # A FIFO is no shard either.
    os.mkfifo(sharded / shard_name(2))
    with pytest.raises(ValueError, match=f"shards {shard_name(2)} of 2 are missing"):
        load_weights(sharded)


def test_a_shard_in_a_cache_may_be_a_link(sharded, tmp_path_factory):
    target = tmp_path_factory.mktemp("blobs") / "a1b2"
    (sharded / shard_name(1)).rename(target)
    (sharded / shard_name(1)).symlink_to(target)
    assert_loads(sharded, FIRST | SECOND)


@pytest.mark.parametrize(
    "shard",
    [
        *("../x", "/dev/zero", "a/b", "..", ".", "", "a\\b", "a\0b", "a\n", "\ud800", "x" * 1000),
        *(3, None, ["x"], {"a": 1}),
    ],
)
def test_shards_lie_beside_the_index(shard, sharded):
    (sharded.parent / "x").write_bytes((sharded / shard_name(1)).read_bytes())
    write_index(sharded, {"conv.weight": shard})
    with pytest.raises(ValueError, match="shards must be files beside it") as error:
        load_weights(sharded)
    assert "\n" not in str(error.value) and "\0" not in str(error.value)


def test_shards_that_do_not_hold_what_the_index_says(sharded):
    write_index(sharded, {"conv.weight": shard_name(2)})
    with pytest.raises(ValueError, match=f"{shard_name(2)} lacks conv.weight of its index"):
        load_weights(sharded)
    save_safetensors(sharded / shard_name(2), FIRST)
    write_index(sharded, {"conv.weight": shard_name(1), "conv.weight ": shard_name(2)})
    with pytest.raises(ValueError, match="lacks"):
        load_weights(sharded)
    save_safetensors(sharded / shard_name(2), FIRST | SECOND)
    write_index(sharded, {"conv.weight": shard_name(1), "fc.bias": shard_name(2)})
    with pytest.raises(ValueError, match="has conv.weight, which another shard has too"):
        load_weights(sharded)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ("{", "is not JSON"),
        ('{"a":' * 100_000, "is not JSON"),
        ('{"a": %s}' % ("9" * 5000), "is not JSON"),
        ("{\xff", "is not JSON"),
    ],
)
def test_damaged_index(content, match, tmp_path):
    (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=match) as error:
        load_weights(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_json_of_unusual_size_is_not_read(tmp_path):
    path = tmp_path / INDEX
    path.write_bytes(b"{")
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match="has more than 33554432 bytes"):
        load_weights(path)


# --- folders ---


def test_folder_of_a_run(tmp_path):
    variables = {"params": {"logits": {"bias": np.ones(2, np.float32)}}, "batch_stats": {}}
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"run without student.safetensors; run its command to"):
        load_weights(tmp_path)
    save_safetensors(tmp_path / "student.safetensors", variables)
    assert_loads(tmp_path, {"params/logits/bias": np.ones(2, np.float32)})
    np.testing.assert_array_equal(load_safetensors(tmp_path)["params"]["logits"]["bias"], [1, 1])
    save_safetensors(tmp_path / "model.safetensors", FIRST)
    with pytest.raises(ValueError, match="student.safetensors and model.safetensors: give one"):
        load_weights(tmp_path)


def test_folder_without_weights(tmp_path):
    with pytest.raises(ValueError, match="is a folder without weights: .*checkpoints.restore"):
        load_weights(tmp_path)


# --- messages ---


def test_values_in_messages_are_short():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert to_text(deep) == "list"
    assert to_text(10**5000) == "int" and to_text(-3) == "-3" and to_text(True) == "True"
    assert to_text("a\n\x1b[2J") == r"a\n\x1b[2J"
    assert len(to_text("x" * 10**6)) == 60
    assert list_some("abcde") == "a, b, c, d and 1 more"


@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_no_path(kind):
    """A `Path` makes one slash of two."""
    path = kind("https://example.org/model.safetensors")
    message = (
        "https://example.org/model.safetensors is a URL; nothing is downloaded: download it first"
    )
    for load in (find_weights_file, load_safetensors, load_weights):
        with pytest.raises(ValueError, match=f"^{message}"):
            load(path)
    with pytest.raises(FileNotFoundError):
        find_weights_file(kind("https/model.safetensors"))
