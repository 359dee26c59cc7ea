"""Files that are no weights: each error says what the file is and what to do with it."""

import gzip
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

from jaxkd.weights import load_safetensors, load_weights, read_class_names, read_torch
from jaxkd.weights.files import read_json
from jaxkd.weights.signatures import describe_other_file

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Virus scan warning</title></head></html>"


def saved(save, *arrays, **named):
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def archive(*names, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as content:
        for name in names:
            content.writestr(name, b"0" * 100)
    return file.getvalue()


def tar(mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as content:
        member = tarfile.TarInfo("model.pth")
        member.size = 3
        content.addfile(member, io.BytesIO(b"abc"))
    return file.getvalue()


FILES = {
    "lfs": (LFS, "a git-LFS pointer: run git lfs pull"),
    "page": (PAGE, "a web page: download the file itself"),
    "error of a bucket": (b"<?xml version='1.0'?><Error>", "a web page: download the file itself"),
    "npy": (saved(np.save, np.zeros(3)), "a NumPy array: save its arrays by name with safetensors"),
    "h5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file, as Keras writes it: save its arrays"),
    "tar.gz": (tar("w:gz"), "a compressed file: unpack it first"),
    "gz": (gzip.compress(b"0" * 100), "a compressed file: unpack it first"),
    "bz2": (tar("w:bz2"), "a compressed file: unpack it first"),
    "xz": (tar("w:xz"), "a compressed file: unpack it first"),
    "tar": (tar("w"), "a tar archive: unpack it first"),
    "gguf": (b"GGUF\3\0\0\0", "a GGUF file, mostly of quantised weights: take the original"),
    "msgpack": (b"\x81\xa6params\x81", "a msgpack file, as Flax writes it: load it with flax"),
    "empty": (b"", "an empty file: copy or download it again"),
}
ARCHIVES = {
    "npz": (saved(np.savez, w=np.zeros(3)), r"a NumPy archive \(.npz\): save its arrays by name"),
    "compressed npz": (saved(np.savez_compressed, w=np.zeros(3)), r"a NumPy archive \(.npz\)"),
    "keras": (archive("config.json", "model.weights.h5"), "a Keras model: save its arrays by name"),
    "zip": (archive("model/resnet20.th"), "zip archive with 'model/resnet20.th' in it: unpack it"),
    "stored zip": (archive("a.pth", compression=0), "zip archive with 'a.pth' in it: unpack it"),
    "document": (archive("word/document.xml"), "a zip archive without weights: give the file of"),
}


@pytest.mark.parametrize("name", [*FILES, *ARCHIVES])
@pytest.mark.parametrize("read", [load_weights, read_torch])
def test_the_error_names_the_remedy(name, read, tmp_path):
    content, message = (FILES | ARCHIVES)[name]
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    assert len(text) - len(str(path)) <= 200


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("read", [load_safetensors, read_class_names, read_json])
def test_other_readers_say_the_same(name, read, tmp_path):
    content, message = FILES[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"file is {message}"):
        read(path)


@pytest.mark.parametrize(
    "content", [b"\x80\x02}q\x00.", json.dumps({"a": 1}).encode(), b"PK\3\4", b"\0" * 600]
)
def test_other_beginnings_are_left_to_the_readers(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert describe_other_file(path) == ""


@pytest.mark.parametrize("read", [load_weights, read_torch, load_safetensors, read_class_names])
def test_program(tmp_path, read):
    path = tmp_path / "student.jaxexport"
    path.write_bytes(b"\x40\0\0\0\0\0:\0h\0" * 9)
    with pytest.raises(ValueError, match="is a program of jax.export, .*: give the folder of its"):
        read(path)
