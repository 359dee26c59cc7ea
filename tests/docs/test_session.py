"""Test that runs the session of the quick start, from a folder of images to an ONNX file."""

import csv
import importlib.util
import json
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxkd.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "quick_start.md"
SESSION = re.compile(
    r"^<!-- test session -->\n```bash\n(.*?)^```.*?^```python\n(.*?)^```", re.M | re.S
)
SHORTER = ("--num-seeds", "1", "--epochs", "2", "--batch-size", "8")
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("jax2onnx", "onnxruntime"))


def make_photos(folder):
    """Makes dark and light images, which a student can tell apart."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 6)):
        for name, level in (("dark", 0), ("light", 150)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = level + rng.integers(0, 100, (18, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")


def make_sentences(path):
    words = {"good": "fine great lovely", "bad": "dull poor weak"}
    rows = [
        (f"a {adjective} film number {number}", label)
        for label, adjectives in words.items()
        for adjective in adjectives.split()
        for number in range(12)
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


@pytest.mark.thorough  # trains three plans
@pytest.mark.filterwarnings("ignore:sentences.csv")  # what is said of its columns and splits
def test_session_of_the_quick_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"))
    make_sentences(Path("sentences.csv"))
    commands, code = SESSION.search(PAGE.read_text(encoding="utf-8")).groups()
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "jaxkd"
        if "onnx" in arguments and not HAS_ONNX:
            continue
        if arguments[0] == "distill":
            arguments += SHORTER
        if "photos" in arguments and arguments[0] == "distill":
            arguments += ["--image-size", "16"]
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
            main(arguments)
    output = capsys.readouterr().out
    assert "student_kd" in output and "a fine film number 0" in output
    assert Path("classes.csv").read_text().count("\n") == 13
    compared = json.loads(Path("runs/compared/compare.json").read_text())
    assert compared
    if HAS_ONNX:
        names = {}
        exec(code, names)
        assert names["logits"].shape == (2, 2)
