"""Two CNNs of one architecture."""

import dataclasses
import json
import subprocess

import numpy as np
import pytest

from experiments import two_cnns
from experiments.common import cifar_resnet
from experiments.common.cli import OptionError
from jaxkd import data


@pytest.mark.thorough
def test_runs_and_compares(tmp_path, execute):
    printed = execute(
        "two_cnns",
        *("--teacher-epochs", 3, "--lengths", 1, 2, "--inputs", "mirrored"),
        *("--mirrored-views", 2, "--workdir", tmp_path / "run"),
    ).stdout
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    students = ["a_mirrored_1", "b_mirrored_1", "a_mirrored_2", "b_mirrored_2"]
    assert [row["name"] for row in rows] == ["teacher", *students]
    assert rows[1]["parameters"] == rows[2]["parameters"] < rows[0]["parameters"]
    for epochs in (1, 2):
        assert f"b_mirrored_{epochs} is" in printed


def test_a_pair_differs_only_in_loss_and_teachers(image_dir):
    dataset = data.load(image_dir, image_size=16)
    config = two_cnns.Config(lengths=(1, 4), inputs=("plain", "mirrored"))
    teacher, *students = two_cnns.make_plan(config, dataset)
    assert [stage.name for stage in students] == [
        f"{model}_{inputs}_{epochs}"
        for inputs in ("plain", "mirrored")
        for epochs in (1, 4)
        for model in "ab"
    ]
    for a, b in zip(students[::2], students[1::2], strict=True):
        for attribute in ("model", "data", "tx", "steps", "augment", "views", "key_name"):
            assert getattr(a, attribute) is getattr(b, attribute)
        assert b.teachers == ("teacher",) and a.teachers == ()
    assert len({stage.key_name for stage in students}) == 1
    assert students[0].augment is None and students[4].augment is data.random_flip
    assert [stage.steps for stage in students[::2]] == [1, 3, 1, 3]
    assert teacher.augment is data.random_flip


def test_the_full_recipe_fine_tunes_the_weights_of_a_file(image_dir, tmp_path, monkeypatch):
    dataset = data.load(image_dir, image_size=32)
    names = tuple(cifar_resnet.CLASS_NAMES)
    labels = np.arange(len(dataset.train.labels), dtype=np.int32) % 10
    dataset = dataset._replace(class_names=names, train=dataset.train._replace(labels=labels))
    loaded = []

    def load(name, path, dataset, options):
        loaded.append((name, path))
        model = two_cnns.images.make_cnn((4, 8), 8, dataset, options)
        return two_cnns.distill.Pretrained(name, model, {})

    monkeypatch.setattr(cifar_resnet, "load_resnet20", load)
    weights = tmp_path / "weights.th"
    weights.touch()
    config = dataclasses.replace(two_cnns.RECIPES["full"], weights=str(weights))
    config.check()
    pretrained, teacher, *students = two_cnns.make_plan(config, dataset)
    assert loaded == [("resnet20", str(weights))] and len(students) == 12
    assert teacher.start == "resnet20" and teacher.augment is data.crop_and_flip
    teacher, *_ = two_cnns.make_plan(dataclasses.replace(config, teacher_epochs=0), dataset)
    assert isinstance(teacher, two_cnns.distill.Pretrained) and teacher.name == "teacher"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (3, 3)}, "the values of an option must differ"),
        ({"lengths": (0,)}, "--lengths 0: needs at least 1"),
        ({"inputs": ()}, "--inputs: needs plain, mirrored or both"),
        ({"augment": True}, "--augment: name what the students see by --inputs mirrored"),
        ({"mirrored_views": 0}, "--mirrored-views 0"),
        ({"teacher_epochs": 0}, "--teacher-epochs 0: needs at least 1, or 0 with --weights"),
        ({"recipe": "full"}, "--weights is needed"),
        ({"weights": "nowhere.th"}, "nowhere.th: there is no such file"),
    ],
)
def test_unfit_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        two_cnns.Config(**options).check()


def test_options_replace_those_of_a_recipe(command, environment):
    process = subprocess.run(
        [*command("two_cnns", "--recipe", "full", "--lengths", "7"), "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(process.stdout.split())
    assert "(default: full)" in text and "(default: plain mirrored)" in text
    process = subprocess.run(
        command("two_cnns", "--recipe", "huge"), env=environment, capture_output=True, text=True
    )
    assert process.returncode != 0 and "huge" in process.stderr
    assert len(process.stderr.splitlines()) == 1
