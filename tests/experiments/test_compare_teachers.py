"""The comparison of teachers: its plan and methods, its rows and figure, and invalid options."""

import json
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import compare_teachers
from experiments.common.cli import OptionError
from experiments.compare_teachers import Config
from experiments.methods import make_loss
from jaxkd import data
from jaxkd.distill import LossContext
from jaxkd.models import Outputs

pytestmark = pytest.mark.thorough  # trains networks, in processes of their own


@pytest.fixture
def dataset():
    """Ten classes of noise."""
    rng = np.random.default_rng(0)

    def make_split(count):
        images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        return data.Split(images, np.arange(count, dtype=np.int32) % 10)

    return data.Dataset(make_split(60), make_split(20), make_split(20), tuple("abcdefghij"))


def count_colours(path):
    with Image.open(path) as figure:
        return len(figure.convert("RGB").getcolors(1 << 24))


def test_writes_a_row_for_each_network_and_a_figure(tmp_path, execute):
    folder = tmp_path / "run"
    short = (
        "--width",
        2,
        "--num-images",
        45,
        "--student-epochs",
        1,
        "--epochs",
        1,
        "--num-seeds",
        1,
        "--workdir",
        folder,
    )
    printed = execute("compare_teachers", "--depths", 8, "--only", "hint", *short).stdout
    rows = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in rows] == ["resnet8", "alone", "hint_resnet8"]
    sizes = {row["parameters"] for row in rows}
    assert len(sizes) == 1, "a projector is not part of the student"
    assert "hint_resnet8 is" in printed and "alone (" in printed
    assert count_colours(folder / "depths.png") > 50
    assert str(folder / "depths.png") in printed.replace("\n", "")


def test_students_learn_from_every_teacher_with_equal_steps(dataset):
    options = {
        "depths": (8, 14, 20),
        "num_images": 20,
        "student_epochs": 3,
        "batch_size": 8,
        "epochs": 2,
    }
    plan = compare_teachers.make_plan(Config(**options, only=("similarity",)), dataset)
    teachers = plan[:3]
    students = plan[3:]
    assert [stage.name for stage in teachers] == ["resnet8", "resnet14", "resnet20"]
    assert [stage.steps for stage in teachers] == [15] * 3
    assert [len(stage.examples(0)["labels"]) for stage in teachers] == [60] * 3
    names = [stage.teachers for stage in students]
    assert names == [(), ("resnet8",), ("resnet14",), ("resnet20",)]
    assert {stage.steps for stage in students} == {8}
    assert len({id(stage.model) for stage in students}) == 1
    alone = students[0]
    for stage in students:
        np.testing.assert_array_equal(stage.examples(1)["inputs"], alone.examples(1)["inputs"])
        assert len(stage.examples(1)["labels"]) == 20
    assert len(compare_teachers.make_plan(Config(**options), dataset)) == 4 + 7 * 3


def test_students_may_see_all_images(dataset):
    *_, last = compare_teachers.make_plan(
        Config(num_images=None, batch_size=8, student_epochs=2), dataset
    )
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


def test_every_method_trains_its_layers():
    keys = iter(jax.random.split(jax.random.key(0), 20))
    shapes = {
        "stage1": (6, 8, 8, 2),
        "stage2": (6, 4, 4, 4),
        "stage3": (6, 2, 2, 8),
        "pre_logits": (6, 8),
    }

    def make_outputs():
        features = {
            name: jax.nn.relu(jax.random.normal(next(keys), shape))
            for name, shape in shapes.items()
        }
        return Outputs(jax.random.normal(next(keys), (6, 10)), features)

    student = make_outputs()
    teacher = make_outputs()
    batch = {"labels": np.arange(6)}
    layers = {}
    for name, method in compare_teachers.make_methods(Config(width=2)).items():
        params = None if method.init is None else method.init(jax.random.key(1))
        context = LossContext(0, 0.0, jax.random.key(2), params, None)
        loss = make_loss(method)

        def mean(student, loss=loss, context=context):
            return loss(student, (teacher,), batch, context).mean()

        gradients = jax.jit(jax.grad(mean))(student)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)), name
        assert np.any(gradients.logits), name
        layers[name] = {layer for layer, leaf in gradients.features.items() if np.any(leaf)}
    assert layers == LAYERS


def test_alpha_is_the_share_of_the_soft_targets():
    methods = compare_teachers.make_methods(Config(alpha=0.8))
    assert methods["kd"].weight == pytest.approx(4.0)  # 0.8 : 0.2


def test_figure_of_one_seed(tmp_path, make_row):
    config = Config(depths=(8, 14), only=("kd", "crd"))
    names = "resnet8 resnet14 alone kd_resnet8 kd_resnet14 crd_resnet8 crd_resnet14".split()
    rows = [make_row(name, [0.7 + 0.02 * i]) for i, name in enumerate(names)]
    compare_teachers.plot_depths(rows, tmp_path / "depths.png", config)
    assert count_colours(tmp_path / "depths.png") > 50
    with pytest.raises(KeyError):
        compare_teachers.plot_depths(rows[:-1], tmp_path / "depths.png", config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (8, 15)}, "--depths 15: choose from 8, 14, 20"),
        ({"depths": ()}, "--depths: needs at least one"),
        ({"depths": (8, 14, 8)}, "--depths 8 14 8: the depths must differ"),
        ({"student_depth": 2}, "--student-depth 2: choose from 8, 14, 20"),
        ({"width": 0}, "--width 0"),
        ({"student_epochs": 0}, "--student-epochs 0"),
        ({"alpha": 1.0}, "--alpha 1.0: must be below 1"),
        ({"only": ("kd", "telepathy")}, "--only telepathy: choose from kd dkd hint"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Config(**options).check()


def test_invalid_depth_ends_in_one_line(command, environment):
    process = subprocess.run(
        command("compare_teachers", "--depths", 8, 15),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: --depths 15: choose from 8, 14, 20")
    assert process.stderr.count("\n") == 1
