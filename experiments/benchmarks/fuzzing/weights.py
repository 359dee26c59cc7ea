"""Files of weights: PyTorch's two formats, safetensors, shards, and files that only look so."""

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.fuzzing import EXECUTED, values
from jaxkd import weights

NAMES = ("conv1.weight", "bn1.running_mean", "bn1.num_batches_tracked", "fc.bias", "0", "a/b")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "student.", "ema.", "")
MAGIC = 0x1950A86A20F9469CFC6C


class Raw(NamedTuple):
    """Opcodes of a pickle."""

    content: bytes


class Global(NamedTuple):
    """A name that a pickle refers to."""

    module: str
    name: str


class Tensor(NamedTuple):
    """A tensor of a pickle: its storage, and the numbers that describe it."""

    key: str
    shape: Any
    strides: Any
    offset: Any = 0
    count: Any = 6
    kind: str = "FloatStorage"


def make(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes a file or a folder of weights and returns a function that reads it."""
    if rng.random() < 0.1:
        return _make_shards(rng, folder)
    maker = rng.choice((_make_zip, _make_legacy, _make_safetensors))
    names = ("model.pth", "model.safetensors", "w\u00e4ights.th", "a b", "x.pt")
    path = folder / rng.choice(names)
    content = maker(rng, folder)
    path.write_bytes(values.damage(rng, content) if rng.random() < 0.3 else content)
    if rng.random() < 0.05:
        values.replace_by_odd_file(rng, path)
    if rng.random() < 0.03:
        path = Path(f"{os.fspath(folder)}/\udcff.pth")
        path.write_bytes(content)
    entry = values.mostly(rng, "state_dict", "x", "²", "e" * 5000)
    readers = {
        "any": lambda: weights.load_weights(path),
        "entry": lambda: weights.load_weights(path, entry=entry),
        "torch": lambda: weights.read_torch(path),
        "variables": lambda: weights.load_safetensors(path),
        "safetensors": lambda: weights.read_safetensors(path),
    }
    usual = ("any", "safetensors", "variables") if maker is _make_safetensors else ("any", "torch")
    return readers[values.mostly(rng, rng.choice(usual), *readers)]


def encode(value: Any) -> bytes:
    """Encodes a value as opcodes of a pickle of protocol 2."""
    match value:
        case Raw():
            return value.content
        case Global():
            return f"c{value.module}\n{value.name}\n".encode()
        case Tensor():
            storage = ("storage", Global("torch", value.kind), value.key, "cpu", value.count)
            ordered = Raw(encode(Global("collections", "OrderedDict")) + b")R")
            arguments = (
                *(Raw(encode(storage) + b"Q"), value.offset, value.shape, value.strides),
                *(False, ordered),
            )
            return encode(Global("torch._utils", "_rebuild_tensor_v2")) + encode(arguments) + b"R"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            size = value.bit_length() // 8 + 1
            return b"\x8b" + struct.pack("<i", size) + value.to_bytes(size, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode("utf-8", "surrogatepass")
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + b"".join(map(encode, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encode, value)) + b"e"
        case dict():
            items = (encode(part) for pair in value.items() for part in pair)
            return b"}(" + b"".join(items) + b"u"
    raise TypeError(type(value))


def _pickle(value: Any) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


def _make_tensor(rng: random.Random) -> Any:
    if rng.random() < 0.93:
        return Tensor("0", *rng.choice((((2, 3), (3, 1)), ((6,), (1,)), ((), ()), ((0,), (1,)))))
    number = rng.choice((*values.INTEGERS, None, 1.5, True, "x"))
    shape = (number,) * rng.choice((1, 2, 5, 60, 1000))
    kinds = ("FloatStorage", "HalfStorage", "ComplexFloatStorage", "NoSuchStorage", "\u00b2")
    return Tensor(
        *(rng.choice(("0", "9", "../0", "")), shape, rng.choice((shape, (1,), (-1,), (0,) * 5))),
        *(rng.choice((0, -1, 2**63, number)), rng.choice((6, 0, -1, 10**12, number))),
        rng.choice(kinds),
    )


def _make_bomb(rng: random.Random, folder: Path) -> Raw:
    """Returns opcodes that would execute code, or need far more memory or depth than their size."""
    target = str(folder / EXECUTED)
    code = f"open({target!r}, 'w').close()"
    choices = (
        lambda: encode(Global("os", "mkdir")) + encode((target,)) + b"R",
        lambda: encode(Global("builtins", "exec")) + encode((code,)) + b"R",
        lambda: encode(Global("posix", "system")) + encode((f"touch {target}",)) + b"R",
        lambda: b"(" + encode(code) + b"ibuiltins\neval\n",
        lambda: encode(Global("torch._utils", "_rebuild_tensor_v2")) + b")R",
        lambda: encode(Global("argparse", "Namespace")) + b")\x81}b",
        lambda: encode(Global("pathlib", "PosixPath")) + encode((target,)) + b"R",
        lambda: encode(Global("numpy.core.multiarray", "scalar")) + encode((1, 2)) + b"R",
        lambda: b"N" + b"\x85" * 200_000,
        lambda: b"](" * 100_000 + b"e" * 100_000,
        lambda: b"I" + values.LONG_NUMBER.encode() + b"\n",
        lambda: b"L" + values.LONG_NUMBER.encode() + b"L\n",
        lambda: b"F" + values.LONG_NUMBER.encode() + b"\n",
        lambda: b"]q\0h\0a",
        lambda: b"}q\0(X\1\0\0\0ah\0u",
        lambda: _make_doubled(),
        lambda: b"](" + encode((1,) * 10**5) + b"q\1" + b"h\1" * 1000 + b"e",
        lambda: b"\x8b\xff\xff\xff\x7f",
        lambda: b"X\xff\xff\xff\xff",
        lambda: b"\x8e" + b"\xff" * 8,
        lambda: b"h\xff",
        lambda: b"\x82\1",
        lambda: b"P0\n",
        lambda: b"0" * 5,
        lambda: b"2" * 1000,
    )
    return Raw(rng.choice(choices)())


def _make_doubled() -> bytes:
    """Returns opcodes of 40 lists, each of which holds the one before twice."""
    levels = [b"](h%ch%ceq%c" % (level, level, level + 1) for level in range(40)]
    return b"]q\0" + b"".join(levels)


def _make_tree(rng: random.Random, folder: Path) -> Any:
    prefix = rng.choice(PREFIXES)
    names = rng.sample(NAMES, rng.randrange(1, len(NAMES) + 1))
    tree: dict[Any, Any] = {prefix + name: _make_tensor(rng) for name in names}
    if rng.random() < 0.2:
        tree[rng.choice(NAMES)] = _make_bomb(rng, folder)
    if rng.random() < 0.2:
        key = rng.choice((values.pick_text(rng), *values.INTEGERS, None, 1.5))
        tree[key] = rng.choice((_make_tensor(rng), 3, "x", None, [1], {}, float("nan")))
    if rng.random() < 0.4:
        entries = ("state_dict", "model", "ema", "optimizer", "epoch", "args")
        return {name: rng.choice((tree, 3, {})) for name in rng.sample(entries, 3)}
    return values.mostly(rng, tree, [tree], _make_tensor(rng), _make_bomb(rng, folder))


def _member(name: str, compression: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    """Returns a member of an archive without the time, which would differ from call to call."""
    info = zipfile.ZipInfo(name)
    info.compress_type = compression
    return info


def _make_zip(rng: random.Random, folder: Path) -> bytes:
    file = io.BytesIO()
    root = values.mostly(rng, "archive", "", "..", "a/b")
    compression = values.mostly(rng, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(file, "w") as archive:
        if rng.random() < 0.98:
            archive.writestr(_member(f"{root}/data.pkl"), _pickle(_make_tree(rng, folder)))
        if rng.random() < 0.7:
            archive.writestr(_member(f"{root}/byteorder"), values.mostly(rng, "little", "big", ""))
        for key in values.mostly(rng, ("0",), ("0", "9"), ()):
            size = values.mostly(rng, 24, 0, 7, 10_000_000 if compression else 100)
            archive.writestr(_member(f"{root}/data/{key}", compression), bytes(size))
        trick = rng.random()
        if trick < 0.05:
            # Many names for one block of the file.
            for number in range(1000):
                copy = zipfile.ZipInfo(f"{root}/data/{number}")
                for name in ("header_offset", "compress_size", "file_size", "CRC", "flag_bits"):
                    setattr(copy, name, getattr(archive.filelist[-1], name))
                archive.filelist.append(copy)
        elif trick < 0.1:
            archive.filelist[-1].file_size = rng.choice((0, 2**31, 2**32 - 1))
        elif trick < 0.15:
            name = rng.choice(("x/data.pkl", "archive/code/a", "/etc/x", "../x"))
            archive.writestr(_member(name), b"x")
        elif trick < 0.2:
            archive.comment = rng.randbytes(rng.choice((1, 60_000)))
    return file.getvalue()


def _make_legacy(rng: random.Random, folder: Path) -> bytes:
    system = {"protocol_version": 1001, "little_endian": values.mostly(rng, True, False, None, 1)}
    keys = values.mostly(rng, ["0"], ["0", "0"], [], [0], None, ["9"], "0", [["0"]])
    count = values.mostly(rng, 6, 0, 7, 2**31, 2**63)
    parts = (
        _pickle(values.mostly(rng, MAGIC, 0, MAGIC)),
        _pickle(values.mostly(rng, 1001, 0, "x", 1001)),
        _pickle(values.mostly(rng, system, 3, system)),
        _pickle(_make_tree(rng, folder)),
        _pickle(keys),
        struct.pack("<Q", count),
        bytes(24),
    )
    return b"".join(parts[: values.mostly(rng, 7, 1, 3, 5)])


def _make_safetensors(rng: random.Random, folder: Path) -> bytes:
    header: dict[str, Any] = {}
    end = 0
    for _ in range(rng.randrange(1, 5)):
        name = rng.choice((*NAMES, "params/a", "params/a/b", "params/1", "/", "a//b", ""))
        if rng.random() < 0.1:
            name = values.pick_text(rng)
        begin, end = end, end + 24
        header[name] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}
    if rng.random() < 0.3:
        header["__metadata__"] = values.mostly(rng, {"format": "pt"}, {"a": 1}, 3, None)
    if rng.random() < 0.3:
        header = values.change_json(rng, header)
    if rng.random() < 0.1 and header:
        dtypes = ("F8_E4M3", "BF16", "F64", "I64", "BOOL", "C64", "F4", "²", "__doc__", 3)
        first = next(iter(header)) if isinstance(header, dict) else None
        if first and isinstance(header[first], dict):
            header[first]["dtype"] = rng.choice(dtypes)
    text = values.encode_json(rng, header)
    if rng.random() < 0.05:
        text = text.replace(b"}", b"", 1)
    length = values.mostly(rng, len(text), 0, 2**63, 2**32, len(text) - 1, len(text) + 1000)
    return struct.pack("<Q", length) + text + bytes(values.mostly(rng, end, 0, end + 24))


def _make_shards(rng: random.Random, folder: Path) -> Callable[[], Any]:
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for file in files:
        header = {f"{file[6:11]}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    index: Any = {
        "metadata": {"total_size": 8},
        "weight_map": {f"{file[6:11]}.weight": file for file in files},
    }
    if rng.random() < 0.7:
        index = values.change_json(rng, index)
    (folder / "model.safetensors.index.json").write_bytes(values.encode_json(rng, index))
    if rng.random() < 0.3:
        values.replace_by_odd_file(rng, folder / rng.choice(files))
    return lambda: weights.load_weights(folder)
