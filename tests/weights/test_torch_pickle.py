"""Tests of the PyTorch reader, on files written opcode by opcode and files of PyTorch itself."""

import argparse
import collections
import datetime
import importlib
import importlib.util
import os
import pathlib
import pickle
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.weights.torch_pickle import OpaqueObject, read_torch

needs_torch = pytest.mark.skipif(
    not importlib.util.find_spec("torch"), reason="PyTorch is not installed"
)

PRETRAINED = (
    Path(__file__).parents[2].parent / "shared" / "data" / "pretrained" / "resnet20-12fca82f.th"
)
needs_pretrained = pytest.mark.skipif(
    not PRETRAINED.exists(), reason="the ResNet-20 checkpoint is not available"
)


# --- writers of both formats: values are pieces of a pickle of protocol 2 ---


def plain(value):
    return pickle.dumps(value, 2)[2:-1]


def call(name, *arguments):
    return b"c%b\n(%btR" % (name.replace(" ", "\n").encode(), b"".join(arguments))


def mapping(items):
    return b"}(%bu" % b"".join(plain(key) + value for key, value in items.items())


def sequence(*items):
    return b"](%be" % b"".join(items)


def storage(key="0", count=6, kind="torch FloatStorage", view=b""):
    kind = b"c%b\n" % kind.replace(" ", "\n").encode()
    return b"(%b%b%b%b%b%btQ" % (
        plain("storage"),
        kind,
        plain(key),
        plain("cpu"),
        plain(count),
        view,
    )


def tensor(block=None, offset=0, shape=(2, 3), strides=(3, 1), version="_v2", more=()):
    view = plain(offset), plain(shape), plain(strides)
    options = () if not version else (plain(False), call("collections OrderedDict"), *more)
    return call(f"torch._utils _rebuild_tensor{version}", block or storage(), *view, *options)


def write_zip(
    path,
    content,
    blocks,
    root="archive",
    byteorder=b"little",
    more=(),
    compression=zipfile.ZIP_STORED,
):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02%b." % content)
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, block in blocks.items():
            info = zipfile.ZipInfo(f"{root}/data/{key}")
            # PyTorch aligns the data of a member in this way.
            padding = -(archive.fp.tell() + 30 + len(info.filename) + 4) % 64
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, block)
        for name in more:
            archive.writestr(f"{root}/{name}", b"")
    return path


def write_legacy(path, content, blocks, itemsize=4, little_endian=True, protocol=1001, keys=None):
    magic = 0x1950A86A20F9469CFC6C
    system = {"protocol_version": 1001, "little_endian": little_endian}
    blocks = {key: block for key, block in blocks.items() if plain(key) in content}
    parts = [pickle.dumps(value, 2) for value in (magic, protocol, system)]
    parts += [b"\x80\x02%b." % content, pickle.dumps(keys or [*blocks], 2)]
    parts += [struct.pack("<q", len(block) // itemsize) + block for block in blocks.values()]
    path.write_bytes(b"".join(parts))
    return path


FORMATS = {"zip": write_zip, "legacy": write_legacy}
every_format = pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)

SIX = np.arange(6, dtype="<f4")
BLOCKS = {"0": SIX.tobytes()}


def read(write, tmp_path, content, blocks=BLOCKS, **options):
    return read_torch(write(tmp_path / "file", content, blocks, **options))


# --- values ---

TYPES = {
    **{
        "Double": np.float64,
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": jnp.bfloat16,
        "Bool": np.bool_,
    },
    **{"Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8},
}


@pytest.mark.parametrize("name", TYPES)
@every_format
def test_every_dtype(write, name, tmp_path):
    array = np.array([[1, 0, 3], [4, 5, 100]]).astype(TYPES[name])
    options = {"itemsize": array.itemsize} if write is write_legacy else {}
    content = mapping({"weight": tensor(storage(kind=f"torch {name}Storage"))})
    value = read(write, tmp_path, content, {"0": array.tobytes()}, **options)
    np.testing.assert_array_equal(value["weight"], array, strict=True)


@every_format
def test_untyped_storage_with_a_dtype_of_its_own(write, tmp_path):
    array = np.array([1, 2, 60000], np.uint16)
    block = storage(count=6, kind="torch.storage UntypedStorage")
    content = tensor(
        block, shape=(2,), strides=(1,), offset=1, version="_v3", more=[b"ctorch\nuint16\n"]
    )
    options = {"itemsize": 1} if write is write_legacy else {}
    value = read(write, tmp_path, content, {"0": array.tobytes()}, **options)
    np.testing.assert_array_equal(value, array[1:], strict=True)


@every_format
def test_views_keep_their_strides(write, tmp_path):
    views = {
        "whole": tensor(),
        "transposed": tensor(shape=(3, 2), strides=(1, 3)),
        "sliced": tensor(offset=1, shape=(2,), strides=(3,)),
        "repeated": tensor(offset=5, shape=(2, 4), strides=(0, 0)),
        "scalar": tensor(offset=4, shape=(), strides=()),
        "empty": tensor(storage("1", 0), shape=(0, 3)),
    }
    # The zip format has no member for an empty storage.
    blocks = BLOCKS | ({"1": b""} if write is write_legacy else {})
    value = read(write, tmp_path, mapping(views), blocks)
    whole = SIX.reshape(2, 3)
    expected = {
        "whole": whole,
        "transposed": whole.T,
        "sliced": whole[:, 1],
        "repeated": np.full((2, 4), SIX[5]),
    }
    expected |= {"scalar": SIX[4].reshape(()), "empty": np.zeros((0, 3), np.float32)}
    assert list(value) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(value[name], array, strict=True)
        assert value[name].flags.aligned
    assert all(
        np.shares_memory(value["whole"], value[name]) for name in ("transposed", "sliced", "scalar")
    )
    with pytest.raises(ValueError, match="read-only"):
        value["whole"][0] = 0


def test_arrays_are_aligned_at_any_offset_of_the_file(tmp_path):
    for length in range(1, 5):
        (array,) = read(write_legacy, tmp_path, mapping({"x" * length: tensor()})).values()
        assert array.flags.aligned
        np.testing.assert_array_equal(array, SIX.reshape(2, 3), strict=True)


def test_view_of_a_storage_in_the_oldest_files(tmp_path):
    view = plain(("1", 2, 3))
    content = mapping(
        {"tail": tensor(storage(view=view), offset=1, shape=(2,), strides=(1,), version="")}
    )
    np.testing.assert_array_equal(
        read(write_legacy, tmp_path, content)["tail"], SIX[3:5], strict=True
    )
    content = tensor(storage(view=view), offset=2, shape=(2,), strides=(1,))
    with pytest.raises(ValueError, match="beyond its storage"):
        read(write_legacy, tmp_path, content)


def number(value, code, order="<"):
    state = plain((3, order, None, None, None, -1, -1, 0))
    kind = call("numpy dtype", plain(code), plain(False), plain(True)) + state + b"b"
    text = call(
        "_codecs encode",
        plain(np.array(value, f"{order}{code}").tobytes().decode("latin1")),
        plain("latin1"),
    )
    return call("numpy.core.multiarray scalar", kind, text)


PLAIN = {
    "epoch": 7,
    "lr": 0.1,
    "arch": "résnet",
    "none": None,
    "flags": [True, False],
    "nested": {"betas": (0.9, (1,))},
}
PLAIN |= {"big": 2**70, 3: "three", "minus": -5, "long text": "x" * 300}


@every_format
def test_other_values_of_checkpoints(write, tmp_path):
    pairs = call(
        "collections OrderedDict",
        sequence(sequence(plain("b"), tensor()), sequence(plain("a"), plain(2))),
    )
    with_state = call("collections OrderedDict") + b"(%b%bu" % (plain("w"), tensor())
    with_state += mapping({"_metadata": call("collections OrderedDict")}) + b"b"
    extras = {
        **{str(key): plain(value) for key, value in PLAIN.items()},
        "loss": number(0.25, "f8"),
        "step": number(12, "i8"),
        "size": call("torch Size", plain((2, 3))),
        "device": call("torch device", plain("cuda"), plain(1)),
        "dtype": b"ctorch\nbfloat16\n",
        "milestones": call("collections Counter", plain({30: 1})),
        "pairs": pairs,
        "state_dict": with_state,
        "parameter": call(
            "torch._utils _rebuild_parameter",
            tensor(),
            plain(True),
            call("collections OrderedDict"),
        ),
        "old": call("torch.nn.parameter Parameter", tensor()) + plain((True, False, None)) + b"b",
        "older": b"ctorch.nn.parameter\nParameter\n(%bt\x81" % tensor()
        + plain((True, False, None))
        + b"b",
        "marked": call(
            "torch._utils _rebuild_parameter_with_state",
            tensor(),
            plain(True),
            plain(None),
            plain({"x": 1}),
        ),
    }
    value = read(write, tmp_path, mapping(extras))
    for name in ("state_dict", "pairs"):
        assert type(value[name]) is dict
    assert list(value["pairs"]) == ["b", "a"] and list(value["state_dict"]) == ["w"]
    for array in (
        value["parameter"],
        value["old"],
        value["older"],
        value["marked"],
        value["state_dict"]["w"],
        value["pairs"]["b"],
    ):
        np.testing.assert_array_equal(array, SIX.reshape(2, 3), strict=True)
    assert {name: value[str(name)] for name in PLAIN} == PLAIN
    expected = {
        "loss": 0.25,
        "step": 12,
        "size": (2, 3),
        "device": "cuda:1",
        "dtype": jnp.bfloat16,
        "milestones": {30: 1},
    }
    assert {name: value[name] for name in expected} == expected
    assert type(value["step"]) is int


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_of_pickle(protocol, tmp_path):
    path = tmp_path / "file"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({**PLAIN, "again": PLAIN["nested"]}, protocol))
    assert read_torch(path) == {**PLAIN, "again": PLAIN["nested"]}


def test_folder_of_any_name_and_missing_byte_order(tmp_path):
    np.testing.assert_array_equal(
        read(write_zip, tmp_path, tensor(), root="my model/v1"), SIX.reshape(2, 3)
    )
    with zipfile.ZipFile(tmp_path / "old", "w") as archive:
        archive.writestr("old/data.pkl", b"\x80\x02K\x07.")
    assert read_torch(tmp_path / "old") == 7


# --- code that must not run ---


def attacks(marker):
    """Pickles that create the marker file if they are unpickled."""
    text = plain(f"import pathlib; pathlib.Path({str(marker)!r}).touch()")
    system = plain(f"touch {marker}")
    return {
        "os.system": call("os system", system),
        "posix.system": call("posix system", system),
        "exec": call("builtins exec", text),
        "exec of Python 2": call("__builtin__ exec", text),
        "exec by names on the stack": plain("builtins") + plain("exec") + b"\x93(%btR" % text,
        "exec as an instance": b"(%bibuiltins\nexec\n" % text,
        "exec as an object": b"(cbuiltins\nexec\n%bo" % text,
        "a dotted name": b"\x80\x04%b%b\x93(%btR" % (plain("shutil"), plain("os.system"), system),
        "getattr": b"%b(%btR"
        % (
            call("builtins getattr", call("importlib import_module", plain("os")), plain("system")),
            system,
        ),
        "in a dict": mapping({"weight": plain(1), "evil": call("os system", system)}),
        "and then thrown away": call("os system", system) + b"0K\x01",
        "in a state": call("collections OrderedDict")
        + mapping({"_metadata": call("os system", system)})
        + b"b",
    }


def test_message_about_a_long_number_is_short(tmp_path):
    (tmp_path / "file").write_bytes(b"\x80\x02F" + b"9" * 2000 + b"x\n.")
    with pytest.raises(ValueError, match="file cannot be read: .*could not convert") as caught:
        read_torch(tmp_path / "file")
    assert len(str(caught.value).removeprefix(str(tmp_path))) <= 300


@pytest.mark.parametrize("name", attacks(""))
def test_attack_runs_no_code(name, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "file"
    attack = attacks(marker)[name]
    pickle.loads(b"\x80\x02%b." % attack)
    marker.unlink()  # raises unless the attack works
    path.write_bytes(b"\x80\x02%b." % attack)
    with pytest.raises(ValueError, match="file cannot be read: .*save only the weights"):
        read_torch(path)
    for write in FORMATS.values():
        # Beside something harmless, the objects are opaque.
        if name in BESIDE:
            assert repr(read(write, tmp_path, attack)) == BESIDE[name]
        else:
            with pytest.raises(ValueError, match="file cannot be read: .*save only the weights"):
                read(write, tmp_path, attack)
    assert not marker.exists()


BESIDE = {
    "in a dict": "{'weight': 1, 'evil': OpaqueObject(name='os.system')}",
    "and then thrown away": "1",
    "in a state": "{}",
}

REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"

REFUSED = {
    "another class": (call("argparse Namespace"), r"contains 'argparse\.Namespace'"),
    "a module": (
        call("torchvision.models.resnet ResNet"),
        r"contains 'torchvision\.models\.resnet\.ResNet'",
    ),
    "what belongs to a function": (
        b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
        "_rebuild_tensor_v2.__globals__'",
    ),
    "a name in two halves": (
        plain("torch") + plain("_utils._rebuild_tensor_v2.__call__") + b"\x93",
        "__call__'",
    ),
    "a name of several lines": (
        plain("os\nx") + plain("\x1b[2J") + b"\x93",
        r"contains 'os\\nx\.\\x1b\[2J'",
    ),
    "a type of numbers that NumPy lacks": (b"ctorch\nqint8\n", r"contains 'torch\.qint8'"),
    "a function itself": (REBUILD, r"contains 'torch\._utils\._rebuild_tensor_v2'"),
    "a storage itself": (storage(), "contains 'a storage'"),
    "attributes of a function": (
        REBUILD + mapping({"__code__": plain(1)}) + b"b",
        r"contains 'torch\._utils\._rebuild_tensor_v2'",
    ),
    "attributes of a tensor": (
        tensor() + mapping({"shape": plain(1)}) + b"b",
        "sets attributes of a _Tensor",
    ),
    "an extension": (b"\x82\x01", "uses EXT1"),
    "a new object": (b"cargparse\nNamespace\n)\x81", r"contains 'argparse\.Namespace'"),
    "a new object of what is none": (plain("os") + b")\x81", "pickle is damaged"),
    "a new object by keywords": (b"cargparse\nNamespace\n)}\x92", r"'argparse\.Namespace'"),
    "an instance": (b"(iargparse\nNamespace\n", r"contains 'argparse\.Namespace'"),
    "an object": (b"(cargparse\nNamespace\no", r"contains 'argparse\.Namespace'"),
    "a set": (b"\x8f(K\x01\x90", r"contains 'builtins\.set'"),
    "a frozen set": (b"(K\x01\x91", r"contains 'builtins\.frozenset'"),
    "an array of bytes": (b"\x96" + struct.pack("<Q", 1) + b"x", r"contains 'builtins\.bytearray'"),
    "items of a set in a list": (b"](K\x01\x90", "pickle is damaged"),
    "a name of a megabyte": (
        plain("x" * 10**6) + plain("y") + b"\x93",
        r"contains 'x{100}",
    ),
    "a reference by name": (b"Pstorage\n", "uses PERSID"),
    "a reference to a module": (
        plain(("module", 1, 2, 3, 4)) + b"Q",
        "contains 'a persistent object'",
    ),
    "a class of a whole model": (
        b"(%bctorch.nn\nLinear\n%btQ" % (plain("module"), plain("a.py") + plain("source")),
        r"contains 'torch\.nn\.Linear'",
    ),
    "a buffer from outside": (b"\x97", "uses NEXT_BUFFER"),
    "itself": (b"]q\x00h\x00a", "contains itself"),
    "itself in a dict": (b"}q\x00X\x01\x00\x00\x00ah\x00s", "contains itself"),
    "a tower": (b"]" * 100_000 + b"a" * 99_999, "nested more than 100 levels deep"),
    "a NumPy array of objects": (call("numpy dtype", plain("O8")), r"contains 'numpy\.dtype'"),
    "a NumPy dtype": (call("numpy dtype", plain("f8")), r"contains 'numpy\.dtype'"),
    "a NumPy dtype with a byte order of another type": (
        call("numpy dtype", plain("f8")) + plain((3, 4)) + b"b",
        "pickle is damaged",
    ),
    "a mark": (b"(", "contains 'a mark'"),
    "half a NumPy number": (
        call(
            "numpy.core.multiarray scalar",
            call("numpy dtype", plain("f8")),
            call("_codecs encode", plain("x"), plain("latin1")),
        ),
        "number in it is damaged",
    ),
    "long bytes": (
        call("_codecs encode", plain("x" * 257), plain("latin1")),
        r"contains 'builtins\.bytes'",
    ),
    "another encoding": (
        call("_codecs encode", plain("x"), plain("rot13")),
        r"contains 'builtins\.bytes'",
    ),
    "a conjugated view": (tensor(more=[plain({"conj": True})]), "resolve_conj"),
}


@pytest.mark.parametrize(("content", "match"), REFUSED.values(), ids=REFUSED)
@every_format
def test_refused(write, content, match, tmp_path):
    with pytest.raises(ValueError, match=match) as error:
        read(write, tmp_path, content)
    message = str(error.value).removeprefix(str(tmp_path / "file"))
    assert message != str(error.value) and "\n" not in message and len(message) <= 300


# --- objects that only code can make ---


class Settings:
    """A class of the user, which the reader never imports."""

    def __init__(self):
        self.lr = 0.1


OBJECTS = {
    "namespace": argparse.Namespace(lr=0.1, sizes=[1, 2]),
    "object": Settings(),
    "class": Settings,
    "function": len,
    "path": pathlib.PurePosixPath("a/b"),
    "set": {1, 2},
    "frozen set": frozenset({3}),
    "default dict": collections.defaultdict(list, {"a": [1]}),
    "array": np.arange(1000),
    "big-endian array": np.arange(1000, dtype=">f4"),
    "complex": 1j,
    "date": datetime.date(2026, 1, 1),
    "bytes": b"x" * 1000,
    "bytearray": bytearray(b"x"),
    "range": range(3),
    "huge": 10**1000,
    "dict of a class": collections.UserDict(a=1),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", OBJECTS)
def test_unknown_objects_are_opaque_leaves(kind, protocol, tmp_path):
    path = tmp_path / "file"
    saved = {"before": 1, "object": OBJECTS[kind], "after": [OBJECTS[kind]], "last": "x"}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(saved, protocol))
    value = read_torch(path)
    assert list(value) == list(saved) and (value["before"], value["last"]) == (1, "x")
    # Protocols of Python 3 have bytes, which are plain.
    if kind == "bytes" and protocol >= 3:
        assert value["object"] == saved["object"]
    else:
        objects = (value["object"], *value["after"])
        assert [type(item) for item in objects] == [OpaqueObject] * 2
        assert objects[0].name == objects[1].name and len(objects[0].name) > 3


@every_format
def test_numpy_numbers_in_big_endian_order(write, tmp_path):
    content = mapping({"loss": number(0.25, "f8", ">"), "step": number(3, "i4", ">")})
    assert read(write, tmp_path, content) == {"loss": 0.25, "step": 3}


def test_keys_that_may_not_be_hashed_are_opaque(tmp_path):
    tower = b")" + b"\x85" * 100_000
    pairs = plain((1, 2)) + b"K\x01" + tensor() + b"K\x02" + tower + b"K\x03"
    value = read(write_zip, tmp_path, b"}(%bu" % pairs)
    assert [key.name for key in value] == ["tuple", "_Tensor", "tuple"]
    assert [*value.values()] == [1, 2, 3]


def test_numbers_that_numpy_lacks_are_opaque(tmp_path):
    complex_storage = storage(kind="torch ComplexFloatStorage")
    float8 = tensor(
        storage(kind="torch.storage UntypedStorage"),
        version="_v3",
        more=[b"ctorch\nfloat8_e4m3fn\n"],
    )
    content = mapping({"complex": tensor(complex_storage), "float8": float8, "weight": tensor()})
    value = read(write_zip, tmp_path, content)
    assert value["complex"].name == "torch.ComplexFloatStorage"
    assert value["float8"].name == "torch.float8_e4m3fn"
    np.testing.assert_array_equal(value["weight"], SIX.reshape(2, 3), strict=True)
    # There the size of the storage, and with it the position of the next, is unknown.
    with pytest.raises(ValueError, match="numbers of type 'torch.ComplexFloatStorage'"):
        read(write_legacy, tmp_path, mapping({"a": tensor(complex_storage)}))


# --- cost ---


def test_pairs_are_not_multiplied(tmp_path):
    """Two thousand ordered dicts are made from the same long list."""
    pairs = b"]q\x00" + sequence(*(sequence(plain(i), b"N") for i in range(2000)))[1:]
    content = sequence(pairs, b"ccollections\nOrderedDict\n(h\x00tR" * 2000)
    with memory_limit(limit=30e6):
        value = read(write_zip, tmp_path, content)
    assert len(value) == 2001 and len(value[1]) == 2000 and value[2] == {}


def test_nested_references_are_not_multiplied(tmp_path):
    """The "billion laughs" attack: lists that contain one list twice, nested 90 levels deep."""
    content = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(90))
    value = read(write_zip, tmp_path, content)
    for _ in range(90):
        assert value[0] is value[1]
        value = value[0]
    assert value == []


def write_overlapping(path):
    """A zip archive whose directory names the same block of 2 MB a thousand times."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(2_000_000))
    content = path.read_bytes()
    start = content.index(b"PK\1\2")
    last = content.index(b"PK\1\2", start + 1)
    entry = content[last : content.index(b"PK\5\6")]
    # The length of the name is in bytes 28 and 29, the name follows byte 46.
    named = [entry[:28] + b"\x08\0" + entry[30:46] + b"a/d/%04d" % i for i in range(1000)]
    directory = b"".join([content[start:last], *named])
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1001, 1001, len(directory), start, 0)
    path.write_bytes(content[:start] + directory + end)
    return path


def test_members_may_not_overlap(tmp_path):
    path = write_overlapping(tmp_path / "file")
    match = "'a/d/0001' in it overlaps another member"
    with memory_limit(limit=3 * path.stat().st_size), pytest.raises(ValueError, match=match):
        read_torch(path)


def test_two_members_of_one_name(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_zip(tmp_path / "file", tensor(), BLOCKS, more=["data/0"])
    with pytest.raises(ValueError, match="'archive/data/0' in it overlaps another member"):
        read_torch(tmp_path / "file")


def test_number_of_members_is_limited(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"PK\3\4" + b"PK\1\2" * 100_001)
    with pytest.raises(ValueError, match="more than 100,000 members"):
        read_torch(path)


def test_a_shape_of_many_axes_is_not_copied_for_each_tensor(tmp_path):
    """Ten thousand tensors share a shape of a hundred thousand axes: 8 GB if it were copied."""
    arguments = b"(%bK\0h\x01h\x01\x89NtR" % storage()
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments
    content = plain((1,) * 100_000).removesuffix(b"q\0") + b"q\x01" + sequence(*[rebuilt] * 10_000)
    with memory_limit(limit=30e6), pytest.raises(ValueError, match="more than 64 axes"):
        read(write_zip, tmp_path, content)


SHARED = {
    "long name": b"X\x40\x42\x0f\0%bq\x01" % (b"x" * 10**6) + b"h\x01h\x01\x93" * 20_000,
    "many arguments": plain(tuple(range(100_000))) + b"q\x010" + b"ctorch\ndevice\nh\x01R" * 20_000,
    "long identity": plain(tuple(range(100_000))) + b"q\x010" + b"h\x01Q0" * 20_000 + b"h\x01Q",
    "long number": b"\x8b%b%b" % (struct.pack("<I", 10**7), b"\x7f" * 10**7),
}


@pytest.mark.parametrize("content", SHARED.values(), ids=SHARED)
def test_what_is_shared_is_not_copied(content, tmp_path):
    path = write_zip(tmp_path / "file", content, BLOCKS)
    match = "cannot be read: (it contains|its pickle is damaged)"
    limit = 4 * path.stat().st_size + 20e6
    with memory_limit(limit=limit), pytest.raises(ValueError, match=match):
        read_torch(path)


@pytest.mark.parametrize("block", [storage(), storage(count=250_000)], ids=["repeated", "shared"])
def test_arrays_together_are_bounded_by_the_file(block, tmp_path):
    strides = (0,) if block == storage() else (1,)
    content = sequence(*[tensor(block, shape=(250_000,), strides=strides)] * 2000)
    with memory_limit(limit=60e6), pytest.raises(ValueError, match="share their numbers"):
        read(write_zip, tmp_path, content, {"0": bytes(1_000_000)})
    # Tied weights are few, and a checkpoint may have several references to all of them.
    assert len(read(write_zip, tmp_path, sequence(*[tensor()] * 2000))) == 2000


@pytest.mark.thorough  # a million steps take two seconds
def test_steps_of_the_pickle_are_bounded_by_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"more than 1,0\d\d,\d\d\d steps: save only the weights"):
        read(write_zip, tmp_path, b"]" * 2_000_000)


def test_a_large_file_of_another_kind_is_not_read(tmp_path):
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 2**40)
    with pytest.raises(ValueError, match="is not a PyTorch checkpoint: it begins with"):
        read_torch(tmp_path / "file")


def test_a_file_beyond_the_memory_is_an_error_of_one_line(tmp_path, monkeypatch):
    def read_bytes(path):
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    (tmp_path / "file").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="cannot be read: it needs more memory than there is"):
        read_torch(tmp_path / "file")


# --- tensors that do not fit their storages ---

MISFITS = {
    "beyond": (tensor(offset=1), "beyond its storage '0'"),
    "beyond by its strides": (tensor(strides=(4, 1)), "beyond its storage '0'"),
    "before": (tensor(offset=-1), "offset in it is -1"),
    "backwards": (tensor(strides=(-3, 1)), "offset in it is -3"),
    "negative": (tensor(shape=(-2, 3)), "offset in it is -2"),
    "no number": (tensor(shape=(2.0, 3)), "offset in it is 2.0"),
    "a truth": (tensor(shape=(True, 3)), "offset in it is True"),
    "another number of strides": (tensor(strides=(1,)), r"shape \(2, 3\) but the strides \(1,\)"),
    "huge": (tensor(shape=(2**62, 2**62)), "beyond its storage '0'"),
    "huge by repetition": (tensor(shape=(2**31, 2**31), strides=(0, 0)), "repeats the few numbers"),
    "huge and empty": (tensor(shape=(0, 2**62, 2**62)), "cannot be read"),
    "of many axes": (tensor(shape=(1,) * 65, strides=(0,) * 65), "more than 64 axes"),
    "a size of many digits": (tensor(shape=(2**63, 3)), "offset in it is 9223372036854775808"),
    "a deep size": (tensor(offset=0).replace(plain(0), b"]" * 9999 + b"a" * 9998), "is list"),
    "a storage that declares too many numbers": (
        tensor(storage(count=2**60)),
        "24 bytes, but 4611686018427387904 are declared",
    ),
    "no storage": (tensor(plain("0")), "pickle is damaged"),
    "no arguments": (call("torch._utils _rebuild_tensor_v2"), "pickle is damaged"),
    "no tensor": (call("torch._utils _rebuild_parameter", plain(1)), "pickle is damaged"),
    "an empty stack": (b"a", "pickle is damaged"),
    "an absent memo": (b"h\x07", "pickle is damaged"),
    "a list as a dict": (b"](K\x01K\x02u", "pickle is damaged"),
    "half a pair": (b"}(K\x01u", "cannot be read"),
}


@pytest.mark.parametrize(("content", "match"), MISFITS.values(), ids=MISFITS)
@every_format
def test_misfits(write, content, match, tmp_path):
    with memory_limit(limit=2e6), pytest.raises(ValueError, match=match):
        read(write, tmp_path, content)


def test_missing_storage(tmp_path):
    with pytest.raises(ValueError, match="storage '1' of an array is missing"):
        read(write_zip, tmp_path, tensor(storage("1")))
    with pytest.raises(
        ValueError, match="list of storages does not match the storages of its tensors"
    ):
        read(write_legacy, tmp_path, tensor(storage("1")))


def test_large_declared_size_is_not_allocated(tmp_path):
    with memory_limit(limit=2e6), pytest.raises(ValueError, match="cannot be read"):
        read(write_zip, tmp_path, b"\x8e" + struct.pack("<Q", 2**40) + b"x")


@every_format
def test_truncated_anywhere(write, tmp_path):
    path = write(tmp_path / "file", mapping({"weight": tensor()}), BLOCKS)
    content = path.read_bytes()
    for length in range(3, len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="file cannot be read"):
            read_torch(path)


@pytest.mark.filterwarnings("ignore:invalid escape")
@every_format
def test_damage_anywhere_raises_only_value_error(write, tmp_path):
    content = mapping(
        {
            "weight": tensor(),
            "loss": number(0.25, "f8"),
            **{str(k): plain(v) for k, v in PLAIN.items()},
        }
    )
    path = write(tmp_path / "file", content, BLOCKS)
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_torch(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_damaged_pickle_raises_only_value_error(tmp_path):
    """The checksums are valid, because they would detect most of the damage."""
    content = mapping(
        {
            "weight": tensor(),
            "loss": number(0.25, "f8"),
            **{str(k): plain(v) for k, v in PLAIN.items()},
        }
    )
    rng = random.Random(1)
    num_read = 0
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read(write_zip, tmp_path, bytes(damaged))
            num_read += 1
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
    assert 30 < num_read < 970


def test_flipped_bit_of_a_weight_is_detected(tmp_path):
    path = write_zip(tmp_path / "file", tensor(), BLOCKS)
    content = bytearray(path.read_bytes())
    content[content.index(BLOCKS["0"]) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="'archive/data/0' in it does not match its checksum: copy it again"
    ):
        read_torch(path)


def test_omitted_checksums(tmp_path):
    path = write_zip(tmp_path / "file", tensor(), BLOCKS)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            content = content.replace(struct.pack("<I", info.CRC), bytes(4))
    path.write_bytes(content)
    np.testing.assert_array_equal(read_torch(path), SIX.reshape(2, 3), strict=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "'archive/data.pkl' in it is compressed"),
        ({"byteorder": b"big"}, "big-endian machine"),
        (
            {"more": ["code/__torch__.py"], "compression": zipfile.ZIP_DEFLATED},
            "TorchScript program",
        ),
        ({"more": ["constants.pkl"]}, r"TorchScript program: load it with torch\.jit\.load"),
        ({"more": ["code/__torch__.py"]}, "TorchScript program"),
        ({"more": ["other/data.pkl"]}, "2 data.pkl in it"),
    ],
)
def test_other_archives(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        read(write_zip, tmp_path, tensor(), **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"little_endian": False}, "big-endian machine"),
        ({"protocol": 1000}, "version 1000, but only 1001 is supported"),
        ({"keys": [0]}, "list of storages does not match"),
        ({"keys": "0"}, "list of storages does not match"),
        ({"keys": ["0", "0"]}, "list of storages does not match"),
    ],
)
def test_other_legacy_files(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        read(write_legacy, tmp_path, tensor(), **options)


def test_files_that_are_not_checkpoints(tmp_path):
    path = tmp_path / "file"
    for content, match in {
        b"": "is an empty file",
        b"weights\n": r"not a PyTorch checkpoint: it begins with 'weights\\n'; give a file",
        pickle.dumps({"a": 1}): "a pickle, but PyTorch did not write it",
        pickle.dumps(np.ones(3)): "a pickle, but PyTorch did not write it",
        b"PK\3\4": "truncated or damaged",
        b"\x80": "cannot be read",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(ValueError, match="it is a zip archive without weights: give"):
        read_torch(path)
    with pytest.raises(ValueError, match="is a folder.*checkpoints.restore"):
        read_torch(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "absent")


# --- memory ---


class memory_limit:
    """Fails if the peak memory of the block exceeds a limit in bytes."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, kind, *details):
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kind is AssertionError or peak < self.limit, f"{peak:.0f} bytes"


@pytest.mark.parametrize(("write", "times"), [(write_zip, 1.1), (write_legacy, 2.1)], ids=FORMATS)
def test_memory_is_once_or_twice_the_file(write, times, tmp_path):
    blocks = {str(i): bytes(4_000_000) for i in range(4)}
    layers = {
        key: tensor(storage(key, 1_000_000), shape=(1000, 1000), strides=(1000, 1))
        for key in blocks
    }
    path = write(tmp_path / "file", mapping(layers | {"tied": layers["0"]}), blocks)
    with memory_limit(limit=times * path.stat().st_size):
        value = read_torch(path)
    assert len(value) == 5 and value["tied"].shape == (1000, 1000)


# --- files of PyTorch ---


@needs_pretrained
def test_pretrained_resnet20():
    value = read_torch(PRETRAINED)
    assert value["best_prec1"] == pytest.approx(91.78)
    weights = value["state_dict"]
    assert len(weights) == 97 and sum(array.size for array in weights.values()) == 269_722 + 1376
    assert weights["module.layer2.0.conv1.weight"].shape == (32, 16, 3, 3)
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}
    assert all(np.isfinite(array).all() and array.flags.aligned for array in weights.values())


def assert_same(value, expected):
    torch = importlib.import_module("torch")
    if isinstance(expected, torch.Tensor):
        expected = expected.detach()
        bits = {torch.bfloat16: torch.int16}.get(expected.dtype)
        array = expected.numpy() if bits is None else expected.view(bits).numpy().view(jnp.bfloat16)
        np.testing.assert_array_equal(value, array, strict=True)
    elif isinstance(expected, dict):
        assert list(value) == list(expected)
        for key in expected:
            assert_same(value[key], expected[key])
    elif isinstance(expected, list | tuple):
        for item, expected_item in zip(value, expected, strict=True):
            assert_same(item, expected_item)
    else:
        assert value == expected


@needs_torch
@needs_pretrained
def test_pretrained_resnet20_equals_torch():
    torch = importlib.import_module("torch")
    assert_same(read_torch(PRETRAINED), torch.load(PRETRAINED, map_location="cpu"))


@needs_torch
@pytest.mark.parametrize("new", [True, False], ids=FORMATS)
def test_files_that_torch_writes(new, tmp_path):
    torch = importlib.import_module("torch")
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8".split()
    names += "uint64 uint32 uint16 uint8 bool".split()
    base = torch.arange(24.0).reshape(2, 3, 4)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.LSTM(4, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = {
        "dtypes": {name: torch.tensor([0, 1, 0, 100]).to(getattr(torch, name)) for name in names},
        "views": [
            base,
            base.mT,
            base[1, :, ::2],
            base.permute(2, 0, 1)[1:],
            base[0, 0, 0],
            base[:0],
            base[:1].expand(5, 3, 4),
        ],
        "parameter": torch.nn.Parameter(base),
        "tied": [model[0].weight, model[0].weight],
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "numbers": [
            3,
            0.5,
            np.float32(0.25),
            np.float64(0.1),
            np.int64(9),
            torch.Size([2, 3]),
            None,
            "text",
        ],
    }
    torch.save(saved, tmp_path / "file", _use_new_zipfile_serialization=new)
    value = read_torch(tmp_path / "file")
    assert_same(value, saved)
    assert (
        np.shares_memory(value["views"][0], value["views"][1])
        and value["tied"][0] is value["tied"][1]
    )


@needs_torch
def test_whole_models_are_rejected(tmp_path):
    torch = importlib.import_module("torch")
    for new in (True, False):
        torch.save(torch.nn.Linear(2, 3), tmp_path / "file", _use_new_zipfile_serialization=new)
        with pytest.raises(
            ValueError,
            match=r"contains 'torch\.nn\.modules\.linear\.Linear'.*save only the weights",
        ):
            read_torch(tmp_path / "file")
