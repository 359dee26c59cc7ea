"""Deletion and disk use of folders, without what links lead to."""

from jaxkd._files import delete, measure_disk_use


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
