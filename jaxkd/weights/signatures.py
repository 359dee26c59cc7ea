"""What a file is that has no weights which can be read, and what to do with it."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from jaxkd._messages import shorten

_UNPACK = "unpack it first"
_AS_SAFETENSORS = "save its arrays by name with safetensors.numpy.save_file"


class _Signature(NamedTuple):
    """What a file is whose first bytes, in lower case, are one of these."""

    beginnings: tuple[bytes, ...]
    kind: str
    remedy: str


_SIGNATURES = (
    _Signature((b"version https://git-lfs",), "a git-LFS pointer", "run git lfs pull"),
    _Signature(
        (b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--"),
        "a web page",
        "download the file itself",
    ),
    _Signature((b"\x93numpy",), "a NumPy array", _AS_SAFETENSORS),
    _Signature((b"\x89hdf\r\n",), "an HDF5 file, as Keras writes it", _AS_SAFETENSORS),
    _Signature(
        (b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18"),
        "a compressed file",
        _UNPACK,
    ),
    _Signature((b"7z\xbc\xaf", b"rar!"), "an archive", _UNPACK),
    _Signature((b"gguf",), "a GGUF file, mostly of quantised weights", "take the original ones"),
    # A map of 1 to 15 entries; a pickle begins with 0x80.
    _Signature(
        tuple(bytes([0x80 + count]) for count in range(1, 16)),
        "a msgpack file, as Flax writes it",
        "load it with flax.serialization and save it with weights.save_safetensors",
    ),
)

_WEIGHT_SUFFIXES = (".pth", ".pt", ".th", ".bin", ".ckpt", ".safetensors", ".tar", ".pkl")


def describe_other_file(path: str | os.PathLike) -> str:
    """Describes a regular file that begins as no file of weights does.

    Returns:
        What it is and what to do, such as "a git-LFS pointer: run git lfs pull", or "" if its
        beginning is unknown or may be that of weights.

    Raises:
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "an empty file: copy or download it again"
    # The format of tar has its mark behind the name of the first member.
    if start[257:262] == b"ustar":
        return f"a tar archive: {_UNPACK}"
    text = start.lstrip().lower()
    for beginnings, kind, remedy in _SIGNATURES:
        if start.lower().startswith(beginnings) or text.startswith(beginnings):
            return f"{kind}: {remedy}"
    # Its first bytes differ between programs; PyTorch's files begin like these two.
    if os.fspath(path).endswith(".jaxexport") and not start.startswith((b"PK", b"\x80")):
        return "a program of jax.export, not a file of weights: give the folder of its run"
    return ""


def describe_archive(names: Sequence[str]) -> str:
    """Describes a zip archive that PyTorch did not write, from the names of its members."""
    if names and all(name.endswith(".npy") for name in names):
        return f"a NumPy archive (.npz): {_AS_SAFETENSORS}"
    if any(name.endswith("weights.h5") for name in names):
        return f"a Keras model: {_AS_SAFETENSORS}"
    if weights := [name for name in names if name.lower().endswith(_WEIGHT_SUFFIXES)]:
        return f"a zip archive with {shorten(weights[0], 60)!r} in it: {_UNPACK}"
    return "a zip archive without weights: give the file of torch.save"
