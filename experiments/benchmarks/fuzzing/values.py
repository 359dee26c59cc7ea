"""Odd values, and damage to bytes, JSON and files."""

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INTEGERS = (
    *(-(10**12), -(2**31), -1, 0, 1, 2, 3, 255, 2**16, 2**31 - 1, 2**31, 2**63, 10**9, 10**12),
    *(10**30, int("9" * 400)),
)
FLOATS = (0.0, -0.0, 1e-320, 1e-30, 0.5, 1.0, -1.5, 1e30, 1e308, float("inf"), float("nan"))
TEXTS = (
    *("", " ", "a", "ä", "②", "²", "①", "Ⅷ", "--1", "-", "$", "$$", "nan", "inf", "None", "true"),
    *("\u2028", "\u202e", "\t", "\r\n", "../..", "/", "/dev/null/x", "~nosuchuser/x", "~", "."),
    *("%s%n", "{0}", "[red]", "\x1b[2J", "C:\\con", "a" * 300, "1" * 5000, "x" * 100_000),
    *("0" * 30 + "1", "1e5", "0x10", "1_000", "+1", "٣", "\N{KISS}", "e\u0301", "a/b", "a\\b"),
)
LONG_NUMBER = "9" * 5000
_RAW = "@RAW@"


def mostly(rng: random.Random, usual: Any, *others: Any) -> Any:
    """Returns the usual value nine times in ten, and else one of the others.

    An input with many faults is refused at the first one, and tells nothing of the others.
    """
    return usual if rng.random() < 0.9 else rng.choice(others)


def pick_text(rng: random.Random) -> str:
    """Draws a text that programs often take wrong."""
    return rng.choice(TEXTS)


def pick_value(rng: random.Random, depth: int = 2) -> Any:
    """Draws a JSON value of any type."""
    if rng.random() < 0.1:
        return _RAW
    kind = rng.randrange(7 if depth else 5)
    if kind < 5:
        return rng.choice((None, True, False, *INTEGERS, *FLOATS, *TEXTS))
    values = [pick_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return values if kind == 5 else {pick_text(rng): value for value in values}


def change_json(rng: random.Random, value: Any) -> Any:
    """Returns a copy in which some nodes are removed, renamed or replaced."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        node, place = _pick_node(rng, value)
        if node is None:
            return pick_value(rng)
        action = rng.randrange(6)
        if action == 0:
            del node[place]
        elif action == 1 and isinstance(node, dict):
            node[pick_text(rng)] = node.pop(place)
        elif action == 2 and isinstance(node, list):
            node.append(node[place])
        else:
            node[place] = pick_value(rng)
    return value


def _pick_node(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """Returns a container and a key or index of it, or `(None, None)` if there is none."""
    places = []
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, dict | list):
            keys: Sequence[Any] = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys]
    return rng.choice(places) if places else (None, None)


def encode_json(rng: random.Random, value: Any) -> bytes:
    """Encodes a value, sometimes with what the json module would not write."""
    raw = rng.choice(
        (LONG_NUMBER, "[" * 100_000 + "]" * 100_000, '{"a":' * 20_000, "1e999", "-", "{}{}", "NaN")
    )
    text = json.dumps(value, indent=rng.choice((None, 1))).replace(f'"{_RAW}"', raw)
    encoding = rng.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig"))
    return text.encode(encoding)


def damage(rng: random.Random, content: bytes) -> bytes:
    """Returns bytes of which some are flipped, cut, moved, repeated or replaced."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        start = rng.randrange(len(data))
        length = rng.choice((1, 2, 8, 100))
        action = rng.randrange(7)
        if action == 0:
            data[start] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[start:]
        elif action == 2:
            del data[start : start + length]
        elif action == 3:
            data[start:start] = data[start : start + length] * rng.choice((1, 3))
        elif action == 4:
            data[start : start + length] = rng.randbytes(length)
        elif action == 5:
            data[start : start + length] = rng.choice((b"\0", b"\xff")) * length
        else:
            data[start : start + 8] = rng.choice(INTEGERS[1:-2]).to_bytes(16, "little", signed=True)
    return bytes(data)


def replace_by_odd_file(rng: random.Random, path: Path) -> None:
    """Replaces a file by something else that its name can stand for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    makers: Sequence[Callable[[], Any]] = (
        lambda: None,
        path.mkdir,
        lambda: path.write_bytes(b""),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to("/dev/urandom"),
        lambda: path.symlink_to("no-such-file"),
        lambda: path.symlink_to(path.name),
        lambda: path.write_bytes(b"<html>Not found</html>"),
        lambda: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        lambda: path.write_bytes(rng.randbytes(rng.choice((1, 10, 100_000)))),
    )
    rng.choice(makers)()
