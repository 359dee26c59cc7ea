"""Two CNNs of one architecture."""

import json

import pytest

from experiments import two_cnns
from jaxkd import data


@pytest.mark.thorough
def test_runs_and_compares(tmp_path, execute):
    printed = execute(
        "two_cnns", "--teacher-epochs", 3, "--augment", "--workdir", tmp_path / "run"
    ).stdout
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["name"] for row in rows] == ["teacher", "model_a", "model_b"]
    assert rows[1]["parameters"] == rows[2]["parameters"] < rows[0]["parameters"]
    assert "model_b is" in printed


def test_models_differ_only_in_loss_and_teachers(image_dir):
    dataset = data.load(image_dir, image_size=16)
    teacher, a, b = two_cnns.make_plan(two_cnns.Config(), dataset)
    assert a.model is b.model and a.data is b.data and a.tx is b.tx and a.steps == b.steps
    assert a.augment is b.augment is None and teacher.augment is data.random_flip
    assert b.teachers == ("teacher",) and a.teachers == ()
