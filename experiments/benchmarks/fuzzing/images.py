"""Folders of pictures: modes, formats, damage, and names."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.benchmarks.fuzzing import values
from jaxkd import data

MODES = ("RGB", "RGB", "RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr")
SUFFIXES = ("png", "png", "jpg", "jpeg", "gif", "bmp", "webp", "PNG", "tiff", "txt", "svg", "")
FORMATS = ("PNG", "PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "ICO", "PPM")
CLASSES = ("apple", "0", "1", "2", "10", "01", ".hidden", "a b", "é", "$", "x" * 100, "val")


def make(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes a folder of pictures and returns a function that loads it."""
    classes = rng.sample(CLASSES, rng.choice((1, 2, 2, 3)))
    for split in values.mostly(rng, ("train", "test"), ("train",), ("train", "val", "test")):
        present = classes if rng.random() < 0.97 else classes[1:]
        for name in present:
            _write_class(rng, folder / split / name, values.mostly(rng, 6, 0, 2, 12))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if files and rng.random() < 0.2:
        values.replace_by_odd_file(rng, rng.choice(files))
    if rng.random() < 0.05:
        values.replace_by_odd_file(rng, folder / "train" / classes[0])
    size = values.mostly(rng, 8, 1, 3, 0, -1, 10**12)
    return lambda: data.load(folder, image_size=size)


def _write_class(rng: random.Random, folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    damaged = rng.random() < 0.05
    for number in range(count):
        name = f"{number}.{rng.choice(SUFFIXES[:5])}"
        if rng.random() < 0.01:
            name = rng.choice((f"{number}.{rng.choice(SUFFIXES)}", f".{number}.png", "a\u2028.png"))
        content = _make_image(rng)
        if damaged and rng.random() < 0.5:
            content = values.damage(rng, content)
        (folder / name).write_bytes(content)
    if rng.random() < 0.05:
        (folder / "nested").mkdir()
        (folder / "nested" / "1.png").write_bytes(_make_image(rng))


def _make_image(rng: random.Random) -> bytes:
    if rng.random() < 0.003:
        return _make_bomb(rng)
    mode = rng.choice(MODES[:4]) if rng.random() < 0.95 else rng.choice(MODES)
    size = rng.choice(((8, 8), (8, 8), (9, 5), (1, 1), (1, 300), (300, 2)))
    image = Image.new(mode, size)
    if mode in ("RGB", "L", "RGBA", "LA"):
        image = Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * len(mode)))
    file = io.BytesIO()
    options: dict[str, Any] = {}
    if rng.random() < 0.1:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((1, 3, 6, 8, 0, 99))
        options["exif"] = exif
    try:
        image.save(file, rng.choice(FORMATS), **options)
    # Not every format has every mode.
    except (OSError, ValueError, KeyError):
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def _make_bomb(rng: random.Random) -> bytes:
    """Returns a small PNG that declares a large picture."""
    width, height = rng.choice(((100_000, 100_000), (2**31 - 1, 1), (20_000, 8_000), (0, 0)))

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, rng.choice((0, 2, 6)), 0, 0, 0)
    rows = zlib.compress(bytes(10_000_000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
