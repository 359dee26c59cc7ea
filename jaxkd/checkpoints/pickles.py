"""PyTorch's checkpoints, read without PyTorch and without unpickling.

Python's unpickler calls what a file tells it to call. Here the opcodes of the pickle are stepped through by a machine
that knows containers, numbers, strings and the few names that a dict of tensors is made of; it looks nothing up, calls
nothing that the file brings, and allocates nothing that the file only declares.
"""

import dataclasses
import io
import math
import os
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np


def read_torch(path: str | os.PathLike) -> Any:
    """Reads what `torch.save` wrote, in either of its formats.

    Args:
        path: The file: a zip archive (PyTorch 1.6 and later) or the format before it, of whatever name.

    Returns:
        Dicts, lists and tuples as they were nested, ordered dicts as plain ones, with strings, numbers and NumPy arrays
        in them. An array is a read-only view of the file's bytes in memory, with the strides that the tensor had: two
        that shared their memory still do.

    Raises:
        ValueError: If the file is no such checkpoint, is damaged, or holds anything else than tensors and plain values.
        OSError: If there is no such file, or it cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd.checkpoints.pickles import read_torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "page.pth"
        ...     _ = path.write_text("<html>Not found</html>")
        ...     try:
        ...         read_torch(path)
        ...     except ValueError as error:
        ...         print(str(error).removeprefix(str(path.parent)))
        /page.pth is no checkpoint of PyTorch: it begins with '<html>Not found</html>'

    References:
        Notes on serialization, https://docs.pytorch.org/docs/stable/notes/serialization.html
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a checkpoint of PyTorch; orbax's are for checkpoints.restore")
    content = path.read_bytes()
    if not content.startswith((b"PK", b"\x80")):
        begins = f"it begins with {content[:32].decode('latin-1')!r}" if content else "it is empty"
        raise ValueError(f"{path} is no checkpoint of PyTorch: {begins}")
    try:
        return _read_zip(content) if content.startswith(b"PK") else _read_legacy(content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names, and that is not looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Numbers `start` to `start + count` of a block of the file."""

    key: str
    dtype: np.dtype
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _read_zip(content: bytes) -> Any:
    entries = _entries(content)
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in entries):
        raise ValueError(f"it is a TorchScript program: load it with torch.jit.load and {_SAVE}")
    if len(roots) != 1:
        raise ValueError(f"it is a zip archive with {len(roots)} data.pkl in it, where PyTorch's have one")
    (root,) = roots
    if bytes(entries.get(f"{root}byteorder", b"little")) != b"little":
        raise ValueError("it was written on a big-endian machine: load it in PyTorch and save it on another")
    blocks = {name.removeprefix(f"{root}data/"): data for name, data in entries.items()}
    return _finish(_interpret(io.BytesIO(entries[f"{root}data.pkl"]), {}), blocks)


def _entries(content: bytes) -> dict[str, memoryview]:
    """The files in an archive, as views of it."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {info.filename: _entry(content, info) for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"the archive is cut off or damaged ({error}): copy it anew") from error


def _entry(content: bytes, info: zipfile.ZipInfo) -> memoryview:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ValueError(f"{info.filename!r} in it is compressed or encrypted, as PyTorch never writes it")
    header = content[info.header_offset : info.header_offset + 30]
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if header[:4] != b"PK\3\4" or start + info.file_size > len(content):
        raise ValueError(f"the archive is cut off at {info.filename!r}: copy it anew")
    data = _block(content, start, info.file_size)
    if info.CRC not in (zlib.crc32(data), 0):  # PyTorch writes 0 where it is told to leave checksums out
        raise ValueError(f"{info.filename!r} in it differs from its checksum: copy it anew")
    return data


def _read_legacy(content: bytes) -> Any:
    file, types = io.BytesIO(content), {}
    if _interpret(file, {}) != 0x1950A86A20F9469CFC6C:
        raise ValueError("it is a pickle, but none of PyTorch's")
    protocol, system = _interpret(file, {}), _interpret(file, {})
    if protocol != 1001 or not isinstance(system, dict):
        raise ValueError(f"its format has the number {protocol!r}, where 1001 is known")
    if system.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine: load it in PyTorch and save it on another")
    tree, keys = _interpret(file, types), _interpret(file, {})
    if type(keys) is not list or sorted(map(str, keys)) != sorted(types) or {*map(type, keys)} - {str}:
        raise ValueError("it names other blocks of numbers than it uses")
    return _finish(tree, {key: _legacy_block(content, file, key, types[key]) for key in keys})


def _legacy_block(content: bytes, file: BinaryIO, key: str, dtype: np.dtype) -> memoryview:
    size = int.from_bytes(file.read(8), "little") * dtype.itemsize
    start = file.tell()
    if start + size > len(content):
        raise ValueError(f"it is cut off: block {key} ends at byte {start + size}, the file at {len(content)}")
    file.seek(size, io.SEEK_CUR)
    return _block(content, start, size)


def _block(content: bytes, start: int, size: int) -> memoryview:
    """A view of the bytes, or a copy where numbers in them would lie across the boundaries of words."""
    view = memoryview(content)[start : start + size]
    return view if np.frombuffer(view, np.uint8).ctypes.data % 16 == 0 else memoryview(bytes(view))


def _interpret(file: BinaryIO, types: dict[str, np.dtype]) -> Any:
    """The value of the pickle that begins here; `types` takes up the blocks that it uses."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            _step(opcode.name, argument, stack, memo, types)
        return stack.pop()
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("its pickle is damaged") from error


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any], types: dict[str, np.dtype]) -> None:
    match name:
        case "PROTO" | "FRAME" | "STOP":
            pass
        case "NONE" | "NEWTRUE" | "NEWFALSE":
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        case "MARK":
            stack.append(_MARK)
        case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
            stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        case "TUPLE" | "LIST":
            items = _since_mark(stack)
            stack.append(tuple(items) if name == "TUPLE" else items)
        case "DICT":
            stack.append(_put({}, _since_mark(stack)))
        case "APPEND" | "APPENDS":
            items = [stack.pop()] if name == "APPEND" else _since_mark(stack)
            _expect(stack[-1], list).extend(items)
        case "SETITEM" | "SETITEMS":
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else _since_mark(stack)
            _put(_expect(stack[-1], dict), items)
        case "GET" | "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        case "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        case "STACK_GLOBAL":
            attribute, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
            stack.append(_named(module, attribute))
        case "REDUCE" | "NEWOBJ":
            arguments, function = _expect(stack.pop(), tuple), _expect(stack.pop(), _Name)
            stack.append(_MAKERS[function.name](*arguments))
        case "BUILD":
            _check_state(stack.pop(), stack[-1])
        case "BINPERSID":
            stack.append(_storage(_expect(stack.pop(), tuple), types))
        case _ if name in _LITERALS:
            stack.append(argument)
        case _:
            raise ValueError(f"its pickle uses {name}, for which a dict of tensors has no need: {_SAVE}")


def _since_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _expect(value: Any, kind: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{kind} expected")
    return value


def _put(target: dict, items: Sequence[Any]) -> dict:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a tuple that is nested a million times over would overflow the stack.
        if type(key) not in (str, bytes, int, float, bool, type(None)):
            raise ValueError(f"a dict in it has a key of type {type(key).__name__}: {_SAVE}")
        target[key] = value
    return target


def _named(module: str, attribute: str) -> np.dtype | _Name:
    name = f"{module}.{attribute}"
    if name in _TYPES:
        return _TYPES[name]
    if name in _MAKERS:
        return _Name(name)
    raise ValueError(
        f"it holds {name!r}, which is none of the plain values that are read without running code: {_SAVE}"
    )


def _check_state(state: Any, of: Any) -> None:
    """Says what of the attributes that an object is given would change a number; the others are left."""
    if isinstance(of, np.dtype):
        if state[1] not in ("<", "|", "="):
            raise ValueError("it holds a number in big-endian order: convert it in PyTorch first")
    elif type(of) is _Tensor and type(state) is tuple and len(state) == 3:
        pass  # what PyTorch before 0.4 said of a parameter: requires_grad, volatile, hooks
    elif type(of) is not dict:
        raise ValueError(f"it gives attributes to a {type(of).__name__}: {_SAVE}")


def _storage(identity: tuple[Any, ...], types: dict[str, np.dtype]) -> _Storage:
    kind, dtype, key, _, count, *view = identity
    if kind != "storage" or not isinstance(dtype, np.dtype):
        raise ValueError(f"it refers to something else than an array's numbers: {_SAVE}")
    types.setdefault(_expect(key, str), dtype)
    _, start, count = view[0] if view and view[0] is not None else (None, 0, count)
    return _Storage(key, dtype, _natural(start), _natural(count))


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"a size or an offset in it is {number!r:.20}")
    return number


def _make_ordered(pairs: Any = None) -> dict:
    """An ordered dict, whose pairs are used up: a file must not have the same ones copied again and again."""
    items = []
    for key, value in pairs or ():
        items += key, value
    if pairs:
        _expect(pairs, list).clear()
    return _put({}, items)


def _make_device(kind: str, index: int | None = None) -> str:
    return _expect(kind, str) if index is None else f"{_expect(kind, str)}:{_natural(index)}"


def _make_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    storage = _expect(storage, _Storage)
    shape, strides = (tuple(map(_natural, _expect(sizes, tuple))) for sizes in (shape, strides))
    if len(shape) != len(strides):
        raise ValueError(f"an array in it has the shape {shape} but the strides {strides}")
    return _Tensor(storage, storage.dtype, _natural(offset), shape, strides)


def _make_tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, bits: Any = None
) -> _Tensor:
    del gradient, hooks
    if bits:
        raise ValueError("it holds a conjugated or negated view: save tensor.resolve_conj().resolve_neg()")
    return _make_tensor(storage, offset, shape, strides)


def _make_tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, dtype: Any, bits: Any = None
) -> _Tensor:
    tensor = _make_tensor_v2(storage, offset, shape, strides, gradient, hooks, bits)
    if not isinstance(dtype, np.dtype):
        raise TypeError("a dtype expected")
    return dataclasses.replace(tensor, dtype=dtype)


def _make_parameter(data: Any, *others: Any) -> _Tensor:
    del others
    return _expect(data, _Tensor)


def _encode(text: Any, encoding: Any) -> bytes:
    if len(_expect(text, str)) > 256 or encoding != "latin1":
        raise ValueError("it holds bytes that are no number's")
    return text.encode("latin1")


def _make_numpy_type(code: Any, *options: Any) -> np.dtype:
    del options
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise ValueError(f"it holds a NumPy value of type {code!r:.20}: {_SAVE}")
    return np.dtype(f"<{code}")


def _make_number(dtype: Any, content: Any) -> bool | int | float:
    if not isinstance(dtype, np.dtype) or len(_expect(content, bytes)) != dtype.itemsize:
        raise ValueError("a number in it is damaged")
    return np.frombuffer(content, dtype)[0].item()


def _finish(tree: Any, blocks: Mapping[str, memoryview]) -> Any:
    """The value with arrays for its tensors, each container and each tensor built once."""
    done: dict[int, Any] = {}

    def finish(node: Any, depth: int) -> Any:
        if id(node) not in done:
            done[id(node)] = build(node, depth)
        return done[id(node)]

    def build(node: Any, depth: int) -> Any:
        if depth > 100:
            raise ValueError("it is nested more than 100 deep, or holds itself")
        if type(node) is dict:
            return {key: finish(value, depth + 1) for key, value in node.items()}
        if type(node) in (list, tuple):
            return type(node)(finish(value, depth + 1) for value in node)
        if type(node) is _Tensor:
            return _array(node, blocks)
        if isinstance(node, np.dtype | bool | int | float | str | bytes | None):
            return node
        raise ValueError(f"it holds a bare {getattr(node, 'name', type(node).__name__)}: {_SAVE}")

    return finish(tree, 0)


def _array(tensor: _Tensor, blocks: Mapping[str, memoryview]) -> np.ndarray:
    storage, item = tensor.storage, tensor.dtype.itemsize
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, tensor.dtype)
    if storage.key not in blocks:
        raise ValueError(f"the block {storage.key!r} of an array is missing")
    start, stop = storage.start * storage.dtype.itemsize, (storage.start + storage.count) * storage.dtype.itemsize
    if stop > len(blocks[storage.key]):
        raise ValueError(f"block {storage.key!r} has {len(blocks[storage.key])} bytes, where {stop} are declared")
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if (tensor.offset + reach) * item > stop - start:
        raise ValueError(f"an array {tensor.shape} reaches beyond its block {storage.key!r}")
    if math.prod(tensor.shape) * item > max(stop - start, 2**20):
        raise ValueError(f"an array {tensor.shape} repeats the few numbers of its block: save tensor.contiguous()")
    strides = tuple(stride * item for stride in tensor.strides)
    return np.ndarray(tensor.shape, tensor.dtype, blocks[storage.key][start:stop], tensor.offset * item, strides)


_SAVE = "save the weights alone, torch.save(model.state_dict(), path)"

_MARK = object()

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}

_NUMBERS = {
    **{"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": jnp.bfloat16, "bool": "?"},
    **{"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1"},
    **{"uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "u1"},
}

_STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"},
}

_TYPES: dict[str, np.dtype] = {
    **{f"torch.{name}": np.dtype(number) for name, number in _NUMBERS.items()},
    **{f"torch.{name}Storage": np.dtype(_NUMBERS[number]) for name, number in _STORAGES.items()},
    "torch.storage.UntypedStorage": np.dtype("u1"),
}

_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _make_ordered,
    "collections.Counter": lambda counts: _expect(counts, dict),
    "torch.Size": lambda sizes: _expect(sizes, tuple),
    "torch.device": _make_device,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _make_tensor_v3,
    "torch.nn.parameter.Parameter": _make_parameter,
    "torch._utils._rebuild_parameter": _make_parameter,
    "torch._utils._rebuild_parameter_with_state": _make_parameter,
    "numpy.dtype": _make_numpy_type,
    "numpy.core.multiarray.scalar": _make_number,
    "numpy._core.multiarray.scalar": _make_number,
    "_codecs.encode": _encode,
}
