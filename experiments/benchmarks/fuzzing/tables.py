"""Files of texts: labelled tables, lines, and pairs of languages, plain and compressed."""

import gzip
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.benchmarks.fuzzing import values
from jaxkd.data import parallel_text, text

SPLITS = ("train", "dev", "test", "valid", "validation", "Train", "train2")
HEADERS = (
    *("text\tlabel", "label\ttext", "text\tsentiment", "index\tsentence\tlabel", "sentence\tlabel"),
    *("id\tLabel\tText", "text", "", "# comment", "\ufefftext\tlabel", "text,label"),
)
CLASSES = (
    *(("0", "1"), ("positive", "negative"), ("1", "01", "001"), ("1", "2", "10"), ("-1", "1")),
    *(("a", "A", "a "), ("²", "①"), ("0.5", "nan"), ("",), ("x",), ("__label__1", "None"), ("-",)),
)
ENCODINGS = ("latin-1", "utf-16", "utf-8-sig", "cp1252")


def make(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes a folder of tables and returns a function that reads it."""
    kind = rng.randrange(4)
    if kind == 0:
        return _make_pairs(rng, folder)
    if kind == 1:
        path = _write(rng, folder / "lines.txt", _make_lines(rng, rng.choice((1, 30))))
        field = values.mostly(rng, 1, 2, 0, -1, 10**12)
        return lambda: text.read_texts(path, field=field)
    # A list, because the order of a set differs between processes.
    others = values.mostly(rng, ["test"], *([name] for name in SPLITS))
    for split in ["train", *others]:
        _write(rng, folder / f"{split}.tsv", _make_table(rng))
    if rng.random() < 0.05:
        values.replace_by_odd_file(rng, folder / "train.tsv")
    return lambda: text.load_texts(folder)


def _make_table(rng: random.Random) -> list[str]:
    count = values.mostly(rng, 20, 0, 1, 2, 500)
    classes = rng.choice(CLASSES)
    if rng.random() < 0.06:
        classes = tuple(str(number) for number in range(rng.choice((100, 20_000))))
        count = rng.choice((count, len(classes)))
    columns = values.mostly(rng, "tc", "ct", "itc", "t", "c", "tct", "it")
    rows = [_make_row(rng, columns, classes, number) for number in range(count)]
    if rng.random() < 0.2:
        rows.insert(0, rng.choice(HEADERS))
    return rows


def _make_row(rng: random.Random, columns: str, classes: tuple[str, ...], number: int) -> str:
    cells = {
        "t": lambda: _make_text(rng),
        "c": lambda: classes[number % len(classes)],
        "i": lambda: str(number),
    }
    separator = "\t" if rng.random() < 0.999 else rng.choice((",", "\t\t", " "))
    return separator.join(cells[column]() for column in columns)


def _make_text(rng: random.Random) -> str:
    if rng.random() < 0.002:
        return values.pick_text(rng)
    words = ("good", "bad", "film", "a", "ä", '"', "the", "b\u2028c", "it's", "1")
    return " ".join(rng.choices(words, k=rng.choice((1, 5, 9))))


def _make_lines(rng: random.Random, count: int) -> list[str]:
    return [_make_text(rng) for _ in range(count)]


def _make_pairs(rng: random.Random, folder: Path) -> Callable[[], Any]:
    count = values.mostly(rng, 20, 0, 1)
    others = rng.sample(("val", "test", "test_2016_x", "test_2017_y", "dev"), 2)
    for split in [values.mostly(rng, "train", "dev"), *others]:
        for language in values.mostly(rng, ("en", "de"), ("en",)):
            difference = values.mostly(rng, 0, 1, -1)
            lines = _make_lines(rng, max(0, count + difference))
            _write(rng, folder / f"{split}.{language}", lines)
    source, target = values.mostly(rng, ("en", "de"), ("en", "en"), ("", "de"), ("*", "?"))
    return lambda: parallel_text.load_pairs(folder, source=source, target=target)


def _write(rng: random.Random, path: Path, lines: list[str]) -> Path:
    """Writes lines, sometimes in another encoding, damaged, compressed or endless."""
    ending = values.mostly(rng, "\n", "\r\n", "\r")
    joined = ending.join(lines) + values.mostly(rng, ending, "")
    content = joined.encode(values.mostly(rng, "utf-8", *ENCODINGS), "replace")
    if rng.random() < 0.05:
        content = values.damage(rng, content)
    if rng.random() < 0.25:
        path = path.with_name(f"{path.name}.gz")
        if rng.random() < 0.04:
            # A small file of a large text.
            content = (content or b"a\t0\n") + b"a film\t1\n" * rng.choice((10**6, 4 * 10**7))
        content = gzip.compress(content, 1, mtime=0)
        if rng.random() < 0.2:
            content = values.damage(rng, content)
    path.write_bytes(content)
    return path
