"""The ladder of teachers: who learns what from whom, what is left, and wrong options told in a line."""

import json
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import compare_teachers
from experiments.cli import OptionError
from experiments.compare_teachers import Config
from experiments.methods import with_labels
from jaxkd import data


@pytest.fixture
def dataset():
    """Ten classes of noise."""
    draw = np.random.default_rng(0)

    def split(count):
        images = draw.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        return data.Split(images, np.arange(count, dtype=np.int32) % 10)

    return data.Dataset(split(60), split(20), split(20), tuple("abcdefghij"))


def colours(path):
    """How many there are in a figure."""
    with Image.open(path) as figure:
        return len(figure.convert("RGB").getcolors(1 << 24))


def test_leaves_a_row_each_and_a_figure(tmp_path, execute):
    folder = tmp_path / "run"
    short = ("--width", 2, "--num-images", 45, "--student-epochs", 1, "--epochs", 1, "--seeds", 1, "--workdir", folder)
    printed = execute("compare_teachers", "--depths", 8, "--only", "hint", *short).stdout
    rows = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in rows] == ["resnet8", "alone", "hint_resnet8"]
    assert len({row["parameters"] for row in rows}) == 1, "a projector is no part of the student"
    assert "hint_resnet8 is" in printed and "alone (" in printed
    assert colours(folder / "depths.png") > 50
    assert str(folder / "depths.png") in printed.replace("\n", "")


def test_students_learn_from_every_teacher_on_one_budget(dataset):
    config = Config(depths=(8, 14, 20), num_images=20, student_epochs=3, batch_size=8, epochs=2)
    *teachers, alone, first, second, third = compare_teachers.make_plan(
        Config(**vars(config) | {"only": ("similarity",)}), dataset
    )
    assert [one.name for one in teachers] == ["resnet8", "resnet14", "resnet20"]
    assert [one.steps for one in teachers] == [15] * 3 and [len(one.examples(0)["labels"]) for one in teachers] == [
        60
    ] * 3
    students = (alone, first, second, third)
    assert [one.teachers for one in students] == [(), ("resnet8",), ("resnet14",), ("resnet20",)]
    assert {one.steps for one in students} == {8} and len({id(one.model) for one in students}) == 1
    for one in students:
        np.testing.assert_array_equal(one.examples(1)["inputs"], alone.examples(1)["inputs"])
        assert len(one.examples(1)["labels"]) == 20
    assert len(compare_teachers.make_plan(config, dataset)) == 4 + 7 * 3


def test_students_may_see_all_images(dataset):
    *_, last = compare_teachers.make_plan(Config(num_images=None, batch_size=8, student_epochs=2), dataset)
    assert last.steps == 15 and len(last.examples(0)["labels"]) == 60


LAYERS = {
    "kd": set(),
    "dkd": set(),
    "hint": {"stage2"},
    "attention": {"stage1", "stage2", "stage3"},
    "similarity": {"stage3"},
    "rkd": {"pre_logits"},
    "crd": {"pre_logits"},
}


def test_every_method_teaches_its_layers():
    draws = iter(jax.random.split(jax.random.key(0), 20))
    shapes = {"stage1": (6, 8, 8, 2), "stage2": (6, 4, 4, 4), "stage3": (6, 2, 2, 8), "pre_logits": (6, 8)}

    def outputs():
        features = {name: jax.nn.relu(jax.random.normal(next(draws), size)) for name, size in shapes.items()}
        return compare_teachers.Outputs(jax.random.normal(next(draws), (6, 10)), features)

    student, teacher, batch = outputs(), outputs(), {"labels": np.arange(6)}
    found = {}
    for name, method in compare_teachers.make_methods(Config(width=2)).items():
        params = () if method.init is None else (method.init(jax.random.key(1)),)
        loss = with_labels(method)

        def mean(student, loss=loss, params=params):
            return loss(student, (teacher,), batch, *params).mean()

        gradients = jax.jit(jax.grad(mean))(student)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)), name
        assert np.any(gradients.logits), name
        found[name] = {layer for layer, leaf in gradients.features.items() if np.any(leaf)}
    assert found == LAYERS


def test_the_soft_targets_have_the_share_that_was_asked_for():
    weights = {name: method.weight for name, method in compare_teachers.make_methods(Config(alpha=0.8)).items()}
    assert weights["kd"] == pytest.approx(4.0)  # 0.8 : 0.2


def test_figure_of_one_seed(tmp_path, make_row):
    config = Config(depths=(8, 14), only=("kd", "crd"))
    names = "resnet8 resnet14 alone kd_resnet8 kd_resnet14 crd_resnet8 crd_resnet14".split()
    rows = [make_row(name, [0.7 + 0.02 * i]) for i, name in enumerate(names)]
    compare_teachers.plot(rows, tmp_path / "depths.png", config)
    assert colours(tmp_path / "depths.png") > 50
    with pytest.raises(KeyError):
        compare_teachers.plot(rows[:-1], tmp_path / "depths.png", config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (8, 15)}, "--depths 15: choose from 8, 14, 20"),
        ({"depths": ()}, "at least one"),
        ({"depths": (8, 14, 8)}, "--depths 8 14 8: at least one, and each only once"),
        ({"student_depth": 2}, "--student-depth 2: choose from 8, 14, 20"),
        ({"width": 0}, "--width 0"),
        ({"student_epochs": 0}, "--student-epochs 0"),
        ({"alpha": 1.0}, "--alpha 1.0: must be below 1"),
        ({"only": ("kd", "telepathy")}, "--only telepathy: choose from kd dkd hint"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Config(**options).check()


def test_a_wrong_depth_is_told_in_a_line(command, environment):
    line = command("compare_teachers", "--depths", 8, 15)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --depths 15: choose from 8, 14, 20") and done.stderr.count("\n") == 1
