"""A reader of PyTorch checkpoints that needs no PyTorch and does not unpickle.

Python's unpickler calls any function that a file names. This module interprets the opcodes of the
pickle itself and knows only containers, numbers, strings and the few names that a dict of tensors
needs. Any other object becomes an `OpaqueObject`, which holds its name alone. The module imports
nothing by name, calls nothing from the file, and allocates no memory for sizes that the file only
declares. Time and memory are bounded by the size of the file; the limits are below.
"""

import dataclasses
import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxkd._messages import shorten
from jaxkd.weights.files import check_regular_file, to_text
from jaxkd.weights.signatures import describe_archive, describe_other_file

_HEADER_SIZE = 30  # of a member of a zip archive, before its name

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

SAVE_ADVICE = "save only the weights, torch.save(model.state_dict(), path)"
"""What to do with a file that contains objects which only code can make."""

# Far above what checkpoints need: a state dict takes some 40 steps for each tensor.
_MAX_STEPS = 1_000_000  # of the pickle, and one more for each 64 bytes of the file
_MAX_MEMBERS = 100_000  # of the zip archive
_MAX_REPETITION = 16  # of the file's size, by arrays that share their numbers
_MAX_AXES = 64  # of an array, as in NumPy and PyTorch
_MAX_NAME_LENGTH = 200
_MAX_ARGUMENTS = 16
_BIG_ENDIAN = (
    "it was written on a big-endian machine: load it in PyTorch and save it on a little-endian one"
)

_MARK = object()

# Opcodes that push their argument.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}

# Opcodes that make objects of other classes, and the names of those whose class is fixed.
_OPAQUE_OPCODES = {
    **{"INST": "", "OBJ": "", "NEWOBJ_EX": ""},
    **{"EMPTY_SET": "builtins.set", "FROZENSET": "builtins.frozenset"},
    "BYTEARRAY8": "builtins.bytearray",
}

# Little-endian codes, so that files read the same on a big-endian machine.
_NUMBERS = {
    **{"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": jnp.bfloat16, "bool": "?"},
    **{"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1"},
    **{"uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "u1"},
}

_STORAGE_DTYPES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8"},
    **{"Byte": "uint8", "Bool": "bool"},
}

_NUMPY_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")

# Values that need no conversion; a dtype is one of those below.
_PLAIN_TYPES = (np.dtype, bool, int, float, str, bytes, type(None))

# The dtypes that a pickle may name.
_DTYPES: dict[str, np.dtype] = {
    **{f"torch.{name}": np.dtype(code) for name, code in _NUMBERS.items()},
    **{
        f"torch.{name}Storage": np.dtype(_NUMBERS[dtype]) for name, dtype in _STORAGE_DTYPES.items()
    },
    "torch.storage.UntypedStorage": np.dtype("u1"),
}


def read_torch(path: str | os.PathLike) -> Any:
    """Reads a file that `torch.save` wrote, in either of its formats.

    Args:
        path: The file, of any name: a zip archive (PyTorch 1.6 and later) or the older format.

    Returns:
        The saved nesting of dicts, lists and tuples, with strings, numbers and NumPy arrays.
        Ordered dicts become plain dicts. An array is a read-only view of the file's bytes in
        memory and has the tensor's strides, so tensors that shared memory still share it. An
        object of any other class, such as `argparse.Namespace`, is an `OpaqueObject`.

    Raises:
        ValueError: If the file is not such a checkpoint, is damaged, is itself an object that only
            code can make, or claims more than its size allows: more than 1,000,000 steps of the
            pickle and one for each 64 bytes of the file, 100,000 members, arrays of 64 axes or 16
            times the file's size in all.
        OSError: If the file does not exist or cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> from jaxkd.weights import read_torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "page.pth"
        ...     _ = path.write_text("<html>Not found</html>")
        ...     try:
        ...         read_torch(path)
        ...     except ValueError as error:
        ...         print(str(error).removeprefix(str(path.parent)))
        /page.pth is a web page: download the file itself

    References:
        Notes on serialization, https://docs.pytorch.org/docs/stable/notes/serialization.html
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, not a PyTorch checkpoint: "
            "load Orbax checkpoints with jaxkd.runs.checkpoints.restore"
        )
    check_regular_file(path)
    # Before all of it is read: it may be large.
    if kind := describe_other_file(path):
        raise ValueError(f"{path} is {kind}")
    with open(path, "rb") as file:
        start = file.read(32)
    if not start.startswith((b"PK", b"\x80")):
        raise ValueError(
            f"{path} is not a PyTorch checkpoint: it begins with {start.decode('latin-1')!r}; give "
            "a file of torch.save or a safetensors file"
        )
    try:
        content = path.read_bytes()
        tree = _read_zip(content) if content.startswith(b"PK") else _read_legacy(content)
        if type(tree) is OpaqueObject:
            raise ValueError(
                f"it contains {tree.name!r:.120}, which is not a plain value that can be read "
                f"without running code: {SAVE_ADVICE}"
            )
    except (ValueError, OverflowError, struct.error) as error:
        raise ValueError(f"{path} cannot be read: {shorten(error, 220)}") from error
    except MemoryError as error:
        raise ValueError(f"{path} cannot be read: it needs more memory than there is") from error
    return tree


@dataclasses.dataclass(frozen=True, eq=False)
class OpaqueObject:
    """An object in a file that only code can make. Nothing was imported or run to make it.

    Attributes:
        name: The class or function that would make it, such as "argparse.Namespace".
    """

    name: str


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or function that the pickle refers to by name. It is never imported."""

    name: str


@dataclasses.dataclass(eq=False)
class _NumpyDtype:
    """The dtype of a NumPy number. Its byte order comes after it, when others may refer to it."""

    code: str
    is_big_endian: bool = False


@dataclasses.dataclass(frozen=True)
class _StorageView:
    """The numbers `start` to `start + count` of a storage, the memory of one or more tensors."""

    key: str
    dtype: np.dtype
    start: int
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor before its storage is read. `offset` and `strides` count numbers, not bytes."""

    storage: _StorageView
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _read_zip(content: bytes) -> Any:
    members = _read_members(content)
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(
            f"it is a zip archive with {len(roots)} data.pkl in it, but PyTorch writes exactly one"
        )
    (root,) = roots
    # Older versions of PyTorch wrote no byteorder.
    if bytes(members.get(f"{root}byteorder", b"little")) != b"little":
        raise ValueError(_BIG_ENDIAN)
    storages = {name.removeprefix(f"{root}data/"): data for name, data in members.items()}
    tree = _interpret(io.BytesIO(members[f"{root}data.pkl"]), {}, _max_steps(content))
    return _build_arrays(tree, storages, len(content))


def _read_members(content: bytes) -> dict[str, memoryview]:
    """Returns the members of a zip archive as views of its bytes."""
    # Before `zipfile` makes an object of each: the signature of an entry of the directory.
    if content.count(b"PK\1\2") > _MAX_MEMBERS:
        raise ValueError(f"the archive has more than {_MAX_MEMBERS:,} members: {SAVE_ADVICE}")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"the archive is truncated or damaged ({error}): copy it again") from error
    names = [info.filename for info in infos]
    # Before their content: some of it is compressed, which PyTorch writes nowhere else.
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ValueError(
            f"it is a TorchScript program: load it with torch.jit.load and {SAVE_ADVICE}"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"it is {describe_archive(names)}")
    members: dict[str, memoryview] = {}
    end = 0
    for info in infos:
        start = _find_member(content, info)
        # The directory could otherwise name one block a thousand times.
        if info.header_offset < end or info.filename in members:
            raise ValueError(f"{info.filename!r:.80} in it overlaps another member: copy it again")
        end = start + info.file_size
        members[info.filename] = _read_member(content, info, start)
    return members


def _find_member(content: bytes, info: zipfile.ZipInfo) -> int:
    """Returns the position of a member's data."""
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    encrypted = info.flag_bits & 1
    if encrypted or not stored:
        raise ValueError(
            f"{info.filename!r:.80} in it is compressed or encrypted, as PyTorch never writes it"
        )
    # The local header ends with the name and an extra field, whose lengths it holds. The central
    # directory cannot be used instead: PyTorch pads the local extra field to align the data.
    header = content[info.header_offset : info.header_offset + _HEADER_SIZE]
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    start = info.header_offset + _HEADER_SIZE + name_length + extra_length
    if header[:4] != b"PK\3\4" or start + info.file_size > len(content):
        raise ValueError(f"the archive is truncated at {info.filename!r:.80}: copy it again")
    return start


def _read_member(content: bytes, info: zipfile.ZipInfo, start: int) -> memoryview:
    data = _align(content, start, info.file_size)
    # PyTorch writes 0 if checksums are disabled by torch.serialization.set_crc32_options(False).
    if info.CRC not in (zlib.crc32(data), 0):
        raise ValueError(f"{info.filename!r:.80} in it does not match its checksum: copy it again")
    return data


def _read_legacy(content: bytes) -> Any:
    """Reads the older format: pickles of magic number, version, system, tree and storage keys."""
    file = io.BytesIO(content)
    steps = _max_steps(content)
    magic = _interpret(file, {}, steps)
    # The type first: comparing untrusted values of other types may recurse too deeply.
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise ValueError(f"it is a pickle, but PyTorch did not write it: {SAVE_ADVICE}")
    version = _interpret(file, {}, steps)
    system = _interpret(file, {}, steps)
    if type(version) is not int or version != _LEGACY_VERSION or not isinstance(system, dict):
        raise ValueError(
            f"it has the format version {to_text(version)}, but only {_LEGACY_VERSION} is supported"
        )
    if system.get("little_endian") is not True:
        raise ValueError(_BIG_ENDIAN)
    dtypes: dict[str, Any] = {}
    tree = _interpret(file, dtypes, steps)
    keys = _interpret(file, {}, steps)
    # The types first: sorting untrusted values of other types may fail or recurse too deeply.
    if type(keys) is not list or {*map(type, keys)} - {str} or sorted(keys) != sorted(dtypes):
        raise ValueError("its list of storages does not match the storages of its tensors")
    # In this format the size of a storage follows from its dtype.
    for dtype in dtypes.values():
        if type(dtype) is OpaqueObject:
            raise ValueError(f"it contains numbers of type {dtype.name!r:.80}: {SAVE_ADVICE}")
    storages = {key: _read_legacy_storage(content, file, key, dtypes[key]) for key in keys}
    return _build_arrays(tree, storages, len(content))


def _read_legacy_storage(content: bytes, file: BinaryIO, key: str, dtype: np.dtype) -> memoryview:
    size = int.from_bytes(file.read(8), "little") * dtype.itemsize
    start = file.tell()
    # Before any read: a declared size may be larger than the memory.
    if start + size > len(content):
        raise ValueError(
            f"it is truncated: storage {to_text(key)} ends at byte {start + size}, "
            f"the file at {len(content)}"
        )
    file.seek(size, io.SEEK_CUR)
    return _align(content, start, size)


def _align(content: bytes, start: int, size: int) -> memoryview:
    """Returns a view of some bytes, or a copy if the view is not aligned to 16 bytes."""
    view = memoryview(content)[start : start + size]
    return view if np.frombuffer(view, np.uint8).ctypes.data % 16 == 0 else memoryview(bytes(view))


def _max_steps(content: bytes) -> int:
    return _MAX_STEPS + len(content) // 64


def _interpret(file: BinaryIO, dtypes: dict[str, Any], max_steps: int) -> Any:
    """Returns the value of the next pickle and adds the storages that it uses to `dtypes`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if step > max_steps:
                raise ValueError(f"its pickle has more than {max_steps:,} steps: {SAVE_ADVICE}")
            _execute(opcode.name, argument, stack, memo, dtypes)
        return stack.pop()
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError("its pickle is damaged") from error


def _execute(
    name: str, argument: Any, stack: list[Any], memo: dict[int, Any], dtypes: dict[str, Any]
) -> None:
    """Executes one opcode of the pickle on the stack."""
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
            items = _pop_to_mark(stack)
            stack.append(tuple(items) if name == "TUPLE" else items)
        case "DICT":
            stack.append(_set_items({}, _pop_to_mark(stack)))
        case "APPEND" | "APPENDS":
            items = [stack.pop()] if name == "APPEND" else _pop_to_mark(stack)
            # The items of an opaque object are dropped with the rest of it.
            if type(stack[-1]) is not OpaqueObject:
                _expect(stack[-1], list).extend(items)
        case "SETITEM" | "SETITEMS":
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else _pop_to_mark(stack)
            if type(stack[-1]) is not OpaqueObject:
                _set_items(_expect(stack[-1], dict), items)
        case "GET" | "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        case "GLOBAL":
            stack.append(_resolve(*argument.split(" ", 1)))
        case "STACK_GLOBAL":
            attribute = _expect(stack.pop(), str)
            module = _expect(stack.pop(), str)
            stack.append(_resolve(module, attribute))
        case "REDUCE" | "NEWOBJ":
            arguments = _expect(stack.pop(), tuple)
            stack.append(_call(stack.pop(), arguments))
        case "BUILD":
            _check_state(stack.pop(), stack[-1])
        case "BINPERSID":
            stack.append(_make_storage(_expect(stack.pop(), tuple), dtypes))
        case _ if name in _LITERALS:
            # Hashing or printing a number of megabytes, again and again, would take hours.
            is_huge = type(argument) is int and argument.bit_length() > 1024
            stack.append(OpaqueObject("builtins.int") if is_huge else argument)
        case "POP":
            stack.pop()
        case "POP_MARK":
            _pop_to_mark(stack)
        case "ADDITEMS":
            _pop_to_mark(stack)
            _expect(stack[-1], OpaqueObject)
        case _ if name in _OPAQUE_OPCODES:
            stack.append(_make_opaque(name, argument, stack))
        case _:
            raise ValueError(
                f"its pickle uses {name}, which a dict of tensors does not need: {SAVE_ADVICE}"
            )


def _make_opaque(name: str, argument: Any, stack: list[Any]) -> OpaqueObject:
    """Executes an opcode that makes an object which no dict of tensors needs."""
    match name:
        case "INST":
            _pop_to_mark(stack)
            return OpaqueObject(_join_name(*argument.split(" ", 1)))
        case "OBJ":
            return OpaqueObject(_function_name(_pop_to_mark(stack)[0]))
        case "NEWOBJ_EX":
            del stack[-2:]
            return OpaqueObject(_function_name(stack.pop()))
        case "FROZENSET":
            _pop_to_mark(stack)
    return OpaqueObject(_OPAQUE_OPCODES[name])


def _function_name(function: Any) -> str:
    if type(function) not in (_Name, OpaqueObject):
        raise TypeError("expected a function")
    return function.name


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Returns the result of one of the known functions, or an opaque object for any other."""
    name = _function_name(function)
    # Tuples of a million arguments may be shared by many calls, and each call copies them.
    if type(function) is OpaqueObject or len(arguments) > _MAX_ARGUMENTS:
        return OpaqueObject(name)
    # Such as a tensor whose storage has a type that NumPy lacks.
    if arguments and type(arguments[0]) is OpaqueObject:
        return arguments[0]
    return _CONSTRUCTORS[name](*arguments)


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    """Pops the items above the topmost mark, and the mark."""
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _expect(value: Any, kind: Any) -> Any:
    # Not isinstance: a bool is an int for it, and a subclass may override what is used below.
    if type(value) is not kind:
        raise TypeError(f"expected {kind}")
    return value


def _set_items(target: dict, items: Sequence[Any]) -> dict:
    """Adds alternating keys and values to a dict."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a tuple that is nested a million levels deep would overflow the stack.
        if type(key) not in (str, bytes, int, float, bool, type(None)):
            target[OpaqueObject(getattr(key, "name", type(key).__name__))] = value
        else:
            target[key] = value
    return target


def _resolve(module: str, attribute: str) -> np.dtype | _Name | OpaqueObject:
    """Returns the dtype or the known function of a name, without an import."""
    name = _join_name(module, attribute)
    if name in _DTYPES:
        return _DTYPES[name]
    return _Name(name) if name in _CONSTRUCTORS else OpaqueObject(name)


def _join_name(module: str, attribute: str) -> str:
    # Names of megabytes may be shared by many opcodes, and each join copies them.
    return f"{module[:_MAX_NAME_LENGTH]}.{attribute[:_MAX_NAME_LENGTH]}"


def _check_state(state: Any, target: Any) -> None:
    """Checks the attributes that BUILD sets on an object; all that change no number are ignored."""
    if type(target) in (OpaqueObject, _Name):
        return
    if type(target) is _NumpyDtype:
        target.is_big_endian = _expect(state[1], str) == ">"
    elif type(target) is _Tensor and type(state) is tuple and len(state) == 3:
        pass  # PyTorch before 0.4 saved requires_grad, volatile and hooks of a parameter.
    elif type(target) is not dict:
        raise ValueError(f"it sets attributes of a {type(target).__name__}: {SAVE_ADVICE}")


def _make_storage(identity: tuple[Any, ...], dtypes: dict[str, Any]) -> _StorageView | OpaqueObject:
    # PyTorch writes ("storage", type, key, device, count); old versions append the part of another
    # storage that this one is, as (key, start, count).
    if type(identity[0]) is not str or identity[0] != "storage":
        # Old versions write ("module", class, file, source) for the class of a whole model.
        is_module = type(identity[-1]) is str and type(identity[1]) is OpaqueObject
        return identity[1] if is_module else OpaqueObject("a persistent object")
    if not 5 <= len(identity) <= 6:
        raise TypeError("expected a storage")
    _, dtype, key, _, count, *view = identity
    if not isinstance(dtype, np.dtype):
        # A type that NumPy lacks.
        opaque = OpaqueObject(_function_name(dtype))
        dtypes.setdefault(_expect(key, str), opaque)
        return opaque
    dtypes.setdefault(_expect(key, str), dtype)
    _, start, count = view[0] if view and view[0] is not None else (None, 0, count)
    return _StorageView(key, dtype, _check_natural(start), _check_natural(count))


def _check_natural(number: Any) -> int:
    # The upper bound, because arithmetic with a number of megabytes would take hours.
    if type(number) is not int or not 0 <= number < 2**63:
        raise ValueError(f"a size or an offset in it is {to_text(number)}")
    return number


def _make_ordered_dict(pairs: Any = None) -> dict:
    items = []
    for key, value in pairs or ():
        items += key, value
    if pairs:
        # Empty the list: a small file could otherwise have one long list copied many times.
        _expect(pairs, list).clear()
    return _set_items({}, items)


def _make_device(kind: str, index: int | None = None) -> str:
    return _expect(kind, str) if index is None else f"{_expect(kind, str)}:{_check_natural(index)}"


def _make_tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
    storage = _expect(storage, _StorageView)
    # Before the copies: a shape of a million axes may be shared by many tensors.
    if max(len(_expect(shape, tuple)), len(_expect(strides, tuple))) > _MAX_AXES:
        raise ValueError(f"an array in it has more than {_MAX_AXES} axes")
    shape = tuple(map(_check_natural, shape))
    strides = tuple(map(_check_natural, strides))
    if len(shape) != len(strides):
        raise ValueError(
            f"an array in it has the shape {shape!s:.80} but the strides {strides!s:.80}"
        )
    return _Tensor(storage, storage.dtype, _check_natural(offset), shape, strides)


def _make_tensor_v2(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    backward_hooks: Any,
    metadata: Any = None,
) -> _Tensor:
    del requires_grad, backward_hooks
    # The metadata says that the storage has other values than the tensor: conjugated or negated.
    if metadata:
        raise ValueError(
            "it contains a conjugated or negated view: save tensor.resolve_conj().resolve_neg()"
        )
    return _make_tensor(storage, offset, shape, strides)


def _make_tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    backward_hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> _Tensor | OpaqueObject:
    """Makes a tensor whose dtype is its own, because its storage is untyped bytes."""
    if type(dtype) is OpaqueObject:
        return dtype
    tensor = _make_tensor_v2(
        storage, offset, shape, strides, requires_grad, backward_hooks, metadata
    )
    if not isinstance(dtype, np.dtype):
        raise TypeError("expected a dtype")
    return dataclasses.replace(tensor, dtype=dtype)


def _make_parameter(data: Any, *options: Any) -> _Tensor:
    del options
    return _expect(data, _Tensor)


def _encode(text: Any, encoding: Any) -> bytes | OpaqueObject:
    # Protocol 2 has no bytes: NumPy's numbers are pickled as latin-1 text that is encoded again.
    # A long text may be shared by many calls, and each call copies it.
    if len(_expect(text, str)) > 256 or _expect(encoding, str) != "latin1":
        return OpaqueObject("builtins.bytes")
    return text.encode("latin1")


def _make_numpy_dtype(code: Any, *options: Any) -> _NumpyDtype | OpaqueObject:
    del options
    is_number = _expect(code, str) in _NUMPY_CODES
    return _NumpyDtype(code) if is_number else OpaqueObject("numpy.dtype")


def _make_number(dtype: Any, content: Any) -> bool | int | float | OpaqueObject:
    if type(content) is OpaqueObject:
        return content
    order = ">" if _expect(dtype, _NumpyDtype).is_big_endian else "<"
    number_dtype = np.dtype(f"{order}{dtype.code}")
    if len(_expect(content, bytes)) != number_dtype.itemsize:
        raise ValueError("a number in it is damaged")
    return np.frombuffer(content, number_dtype)[0].item()


def _build_arrays(tree: Any, storages: Mapping[str, memoryview], size: int) -> Any:
    """Replaces the tensors of a tree by arrays, and names that are not called by opaque objects.

    Args:
        tree: The value of the pickle.
        storages: The memory of the tensors by key.
        size: Number of bytes of the file, which bounds the size of the arrays.
    """
    # By identity, so that each container is built once: nested references to one list could
    # otherwise expand a small file to an exponentially large tree.
    results: dict[int, Any] = {}
    claimed = 0

    def build(node: Any, depth: int) -> Any:
        if isinstance(node, _PLAIN_TYPES):
            return node
        if id(node) not in results:
            results[id(node)] = build_new(node, depth)
        return results[id(node)]

    def build_new(node: Any, depth: int) -> Any:
        if depth > 100:
            raise ValueError("it is nested more than 100 levels deep, or contains itself")
        if type(node) is dict:
            return {key: build(value, depth + 1) for key, value in node.items()}
        if type(node) in (list, tuple):
            return type(node)(build(value, depth + 1) for value in node)
        if type(node) is _Tensor:
            return count(_make_array(node, storages))
        if type(node) is OpaqueObject:
            return node
        return OpaqueObject(_OPAQUE_TYPES.get(type(node)) or node.name)

    def count(array: np.ndarray) -> np.ndarray:
        nonlocal claimed
        claimed += array.nbytes
        # Whoever copies the arrays needs as much memory as they claim together.
        if claimed > _MAX_REPETITION * size + 2**26:
            raise ValueError(
                f"its arrays share their numbers and have more than {_MAX_REPETITION} times as "
                f"many as the file: {SAVE_ADVICE}"
            )
        return array

    return build(tree, 0)


def _make_array(tensor: _Tensor, storages: Mapping[str, memoryview]) -> np.ndarray:
    """Returns a view of the tensor's storage, after a check that it stays inside."""
    storage = tensor.storage
    itemsize = tensor.dtype.itemsize
    # The zip format has no member for an empty storage.
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, tensor.dtype)
    if storage.key not in storages:
        raise ValueError(f"the storage {storage.key!r:.80} of an array is missing")
    data = storages[storage.key]
    start = storage.start * storage.dtype.itemsize
    stop = (storage.start + storage.count) * storage.dtype.itemsize
    if stop > len(data):
        raise ValueError(
            f"storage {storage.key!r:.80} has {len(data)} bytes, but {stop} are declared"
        )
    extents = zip(tensor.shape, tensor.strides, strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in extents)
    if (tensor.offset + span) * itemsize > stop - start:
        raise ValueError(
            f"an array {tensor.shape!s:.80} reaches beyond its storage {storage.key!r:.80}"
        )
    # Strides of 0 repeat numbers: a copy of such an array could need more memory than there is.
    if math.prod(tensor.shape) * itemsize > max(stop - start, 2**20):
        raise ValueError(
            f"an array {tensor.shape!s:.80} repeats the few numbers of its storage: "
            "save tensor.contiguous()"
        )
    strides = tuple(stride * itemsize for stride in tensor.strides)
    return np.ndarray(
        tensor.shape, tensor.dtype, data[start:stop], tensor.offset * itemsize, strides
    )


# Names of those parts of a tensor that are no values by themselves.
_OPAQUE_TYPES = {_StorageView: "a storage", _NumpyDtype: "numpy.dtype", object: "a mark"}

# The only functions and classes that a pickle may call; each is replaced by one of this module.
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _make_ordered_dict,
    "collections.Counter": lambda counts: _expect(counts, dict),
    "torch.Size": lambda sizes: _expect(sizes, tuple),
    "torch.device": _make_device,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _make_tensor_v3,
    "torch.nn.parameter.Parameter": _make_parameter,
    "torch._utils._rebuild_parameter": _make_parameter,
    "torch._utils._rebuild_parameter_with_state": _make_parameter,
    "numpy.dtype": _make_numpy_dtype,
    "numpy.core.multiarray.scalar": _make_number,
    "numpy._core.multiarray.scalar": _make_number,
    "_codecs.encode": _encode,
}
