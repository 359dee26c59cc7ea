"""The README: its code runs, its commands are documented, and its links and names exist."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxkd
from jaxkd import losses

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
LINKS = [link for link in re.findall(r"\]\(([^)#]*)", TEXT) if not link.startswith("http")]


def block(language, word):
    """Returns the code block of a language that holds a word."""
    (found,) = (
        text for text in re.findall(rf"```{language}\n(.*?)```", TEXT, re.S) if word in text
    )
    return found


def test_front_door_is_short():
    assert len(TEXT.splitlines()) < 150


def test_first_two_commands_do_all_the_set_up():
    first, second = re.search(r"```bash\n(.*?)\n(.*?)\n```", TEXT).groups()
    assert (
        first
        == "python -m pip install -e '.[experiments]' && python -m experiments.teacher_assistant"
    )
    assert second == "python -m pip install -e '.[test]' && python -m pytest"


def test_loss_runs_in_five_lines():
    code = block("python", "distillation_loss(student, teacher")
    assert len([line for line in code.splitlines() if line.strip()]) == 5
    names = {}
    exec(code, names)
    assert np.isfinite(names["loss"]) and names["loss"].shape == ()


def test_plan_runs_to_its_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = block("python", "run_plan")
    assert "steps=300" in code and "range(3)" in code
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes floats and integers
        exec(code.replace("steps=300", "steps=2").replace("range(3)", "range(2)"), names := {})
    assert set(names["trained"]) == {"teacher", "alone", "distilled"}
    report = (tmp_path / "runs" / "mine" / "report.md").read_text(encoding="utf-8")
    assert "My first plan" in report and "distilled is" in report


@pytest.mark.thorough
def test_plan_with_a_bad_teacher_says_so(tmp_path, monkeypatch):
    """A teacher that learns nothing is no better than any student."""
    monkeypatch.chdir(tmp_path)
    code = block("python", "run_plan").replace("range(3)", "range(1)").replace("cnn(16,", "cnn(2,")
    bad = 'train, hard, optax.sgd(0.0), steps=1),\n    distill.Stage("alone"'
    code = code.replace('train, hard, tx, steps=300),\n    distill.Stage("alone"', bad)
    code = code.replace("cnn(64, 128, hidden=128)", "cnn(2, hidden=2)")
    assert bad in code
    with jax.numpy_dtype_promotion("standard"):
        exec(code.replace("steps=300", "steps=30"), {})
    report = (tmp_path / "runs" / "mine" / "report.md").read_text(encoding="utf-8")
    assert "is no better than 'alone'" in report and "which has no teacher" in report


@pytest.mark.parametrize("link", LINKS)
def test_links_exist(link):
    target = README.parent / link
    assert target.exists()
    if target.suffix == ".png":
        assert target.read_bytes().startswith(b"\x89PNG")


def test_number_of_losses():
    (count,) = re.findall(r"(\d+) names with formulas and papers", TEXT)
    assert int(count) == len(losses.__all__)


def test_version_is_stated_once():
    folder = README.parent
    assert f"version: {jaxkd.__version__}" in (folder / "CITATION.cff").read_text()
    assert f"## [{jaxkd.__version__}]" in (folder / "CHANGELOG.md").read_text()
