"""Deletion and disk use of folders, without what links lead to, and errors of writes."""

import os

import numpy as np
import pytest

from jaxkd import weights
from jaxkd._files import delete, measure_disk_use, write_atomically


def test_links_are_neither_counted_nor_followed(tmp_path):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    for path, size in ((folder / "a" / "b", 3), (folder / ".c", 4), (outside / "d", 500)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"1" * size)
    (folder / "link").symlink_to(outside)
    (folder / "file").symlink_to(outside / "d")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    assert measure_disk_use(folder) == 7
    for path in sorted(folder.iterdir()):
        delete(path)
    assert list(folder.iterdir()) == [] and (outside / "d").exists()
    delete(folder / "nothing")


def save_safetensors(path, content):
    weights.save_safetensors(path, {"params": {"a": np.ones(1)}})


@pytest.mark.parametrize("write", [write_atomically, save_safetensors])
def test_absent_folder_is_named(tmp_path, write):
    folder = tmp_path / "no" / "such"
    with pytest.raises(FileNotFoundError) as error:
        write(folder / "file", b"")
    assert str(error.value) == f"[Errno 2] no such folder, make it first: '{folder}'"
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("call", ["open", "replace"])
def test_hidden_name_of_a_write_is_not_shown(tmp_path, monkeypatch, call):
    def fail(source, *targets):
        # As the system names one file or two.
        raise PermissionError(13, "Permission denied", str(source), None, *map(str, targets))

    if call == "open":
        monkeypatch.setattr("builtins.open", lambda path, mode: fail(path))
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(PermissionError) as error:
        write_atomically(tmp_path / "file", b"")
    monkeypatch.undo()
    assert str(error.value) == f"[Errno 13] Permission denied: '{tmp_path / 'file'}'"
    assert not [*tmp_path.iterdir()]
