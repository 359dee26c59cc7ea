"""Files of texts: labelled tables, lines, and pairs of languages, plain and compressed."""

import csv
import gzip
import io
import json
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
SINGLE = ((".tsv", "\t"), (".csv", ","), (".csv", ";"), (".jsonl", ""), (".txt", "\t"))
COLUMNS = (*("text", "label", "b", "", "\0", "x" * 10_000), *(1, 2, 3, 0, -1, 10**12, "1", "²"))
ODD_LINES = (
    *(
        "[" * 200_000,
        '{"text":' * 5000,
        '{"text": "\\ud800", "label": "\\u0000"}',
        "{}",
        "[]",
        "",
        " ",
    ),
    *(
        '{"text": "a", "text": "b"}',
        '{"text": "a", "label": ' + "9" * 10_000 + "}",
        "null",
        "\ufeff{}",
    ),
    *('{"text": NaN, "label": 1e999}', '{"text": {"a": []}, "label": [1]}', '[{"text": "a"}]'),
)
ENCODINGS = ("latin-1", "utf-16", "utf-8-sig", "cp1252")


def make(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes a folder of tables or one table, and returns a function that reads it."""
    kind = rng.randrange(6)
    if kind == 0:
        return _make_pairs(rng, folder)
    if kind == 1:
        path = _write(rng, folder / "lines.txt", _make_lines(rng, rng.choice((1, 30))))
        field = values.mostly(rng, 1, 2, 0, -1, 10**12)
        return lambda: text.read_texts(path, field=field)
    if kind == 2:
        return _make_single(rng, folder)
    # A list, because the order of a set differs between processes.
    others = values.mostly(rng, ["test"], *([name] for name in SPLITS))
    make = _make_objects if kind == 3 else _make_table
    suffix = ".jsonl" if kind == 3 else ".tsv"
    for split in ["train", *others]:
        _write(rng, folder / f"{split}{suffix}", make(rng))
    if rng.random() < 0.05:
        values.replace_by_odd_file(rng, folder / f"train{suffix}")
    return lambda: text.load_texts(folder)


def _make_single(rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Makes one table, which is read with or without classes."""
    suffix, delimiter = rng.choice(SINGLE)
    if suffix == ".jsonl":
        lines = _make_objects(rng)
    else:
        lines = [_join_columns(rng, line.split("\t"), delimiter) for line in _make_table(rng)]
    path = _write(rng, folder / f"reviews{suffix}", lines)
    text_column, label_column = (values.mostly(rng, None, *COLUMNS) for _ in range(2))
    if rng.random() < 0.5:
        return lambda: text.read_texts(path, field=None, column=text_column)
    return lambda: text.load_texts(path, text_column=text_column, label_column=label_column)


def _join_columns(rng: random.Random, columns: list[str], delimiter: str) -> str:
    """Joins the columns of a line, mostly in quotes where they need them."""
    if rng.random() < 0.002:
        return delimiter.join(columns)
    line = io.StringIO()
    csv.writer(line, delimiter=delimiter, lineterminator="").writerow(columns)
    return line.getvalue()


def _make_objects(rng: random.Random) -> list[str]:
    """Makes JSON Lines, of which some have other values, keys or no JSON."""
    classes = rng.choice((*CLASSES, (0, 1), (-1, 0, 10**400)))
    keys = values.mostly(rng, ("text", "label"), ("stars", "body"), ("id", "Text"), ("a", "b", "c"))
    lines = []
    for number in range(values.mostly(rng, 20, 0, 1, 2, 500)):
        cells = (_make_text(rng), classes[number % len(classes)], number)
        item = dict(zip(keys, cells, strict=False))
        if rng.random() < 0.002:
            item = values.change_json(rng, item)
        line = json.dumps(item, ensure_ascii=rng.random() < 0.5)
        lines.append(rng.choice(ODD_LINES) if rng.random() < 0.002 else line)
    return lines


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
