"""The experiments on weights: what they leave, what starts where, and wrong files told in a line."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import image_folder, plans, pretrained_teacher, two_teachers, vision, weight_transfer
from experiments.cli import OptionError
from jaxkd import checkpoints, data, models


def split(count, draw):
    images = draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return data.Split(images, np.arange(count, dtype=np.int32) % 10)


@pytest.fixture
def dataset():
    """Ten classes of noise."""
    draw = np.random.default_rng(0)
    return data.Dataset(split(60, draw), split(20, draw), split(20, draw), tuple("abcdefghij"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a ResNet-20 that knows nothing, under PyTorch's names."""
    module = models.resnet20()
    variables = models.from_linen(module).init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    checkpoints.save_torch(path, variables, module.torch_rules())
    return path


def rows(folder):
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


def test_two_teachers_leave_a_row_each(tmp_path, execute):
    printed = execute("two_teachers", "--num-labels", 9, "--workdir", tmp_path / "run").stdout
    names = "large medium_scratch medium alone by_large by_medium by_both by_average"
    assert list(rows(tmp_path / "run")) == names.split()
    assert "by_both is" in printed and "medium is" in printed


def test_narrowed_networks_take_the_large_ones_channels(dataset):
    config = two_teachers.Config(num_labels=20)
    large, _, medium, *_ = two_teachers.make_plan(config, dataset)
    image = dataset.train.images[:1]
    theirs, fresh = (one.model.init(jax.random.key(0), image) for one in (large, medium))
    moved = two_teachers.narrowed(theirs, fresh)
    assert jax.tree.map(np.shape, moved) == jax.tree.map(np.shape, fresh)
    chosen = {column.tobytes() for column in np.asarray(theirs["params"]["conv1"]["kernel"]).reshape(-1, 64).T.copy()}
    kept = np.asarray(moved["params"]["conv1"]["kernel"]).reshape(-1, 32).T.copy()
    assert len({column.tobytes() for column in kept} & chosen) == 32


def test_weight_transfer_leaves_both_tasks_and_a_figure(tmp_path, images, command, environment):
    # A fourth class, so that each task has two.
    folder = tmp_path / "images"
    for name in ("train", "test"):
        for place in sorted((images / name).iterdir()):
            (folder / name / place.name).mkdir(parents=True)
            for file in place.iterdir():
                (folder / name / place.name / file.name).write_bytes(file.read_bytes())
        (folder / name / "white").mkdir()
        for i in range(20):
            Image.new("RGB", (16, 16), (250, 250, 200 + i)).save(folder / name / "white" / f"{i}.png")
    line = command("weight_transfer", "--num-labels", 8, "--workdir", tmp_path / "run")
    line[line.index("--dataset") + 1] = str(folder)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert list(rows(tmp_path / "run" / "source")) == ["source"]
    target = rows(tmp_path / "run" / "target")
    assert [name.split("_")[0] for name in target] == ["scratch", "transferred", "frozen"] * 2
    with Image.open(tmp_path / "run" / "labels.png") as figure:
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 50
    assert str(tmp_path / "run" / "labels.png") in done.stdout.replace("\n", "")


def test_tasks_share_no_class(dataset):
    config = weight_transfer.Config(target_classes=("b", "e", "j"))
    source, target = weight_transfer.split_classes(config, dataset)
    assert source.class_names == tuple("acdfghi") and target.class_names == tuple("bej")
    assert set(target.train.labels) == {0, 1, 2} and len(target.train.labels) == 18
    np.testing.assert_array_equal(target.test.images, dataset.test.images[np.isin(dataset.test.labels, [1, 4, 9])])
    with pytest.raises(OptionError, match="no class is named z; there are a, b"):
        weight_transfer.split_classes(weight_transfer.Config(target_classes=("a", "z")), dataset)
    with pytest.raises(OptionError, match="at least two"):
        weight_transfer.split_classes(weight_transfer.Config(target_classes=("a",)), dataset)


def test_a_new_head_is_the_fresh_networks(dataset):
    model = vision.cnn((4, 8), 8, dataset, vision.Options())
    theirs, fresh = (model.init(jax.random.key(seed), dataset.train.images[:1]) for seed in (0, 1))
    moved = plans.with_new_head(theirs, fresh)["params"]
    np.testing.assert_array_equal(moved["logits"]["kernel"], fresh["params"]["logits"]["kernel"])
    for layer in ("conv1", "conv2", "hidden"):
        np.testing.assert_array_equal(moved[layer]["kernel"], theirs["params"][layer]["kernel"])


def test_pretrained_teacher_is_the_files(dataset, weights):
    config = pretrained_teacher.Config(weights=str(weights), num_labels=20)
    teacher, *students = pretrained_teacher.make_plan(config, dataset)
    module = models.resnet20()
    wanted = models.from_linen(module).init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, wanted)
    assert [one.name for one in students] == ["all_alone", "all_distilled", "few_alone", "few_distilled"]
    assert [one.teachers for one in students] == [(), ("teacher",)] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), "error: --weights is needed"), (("--weights", "nowhere.th"), "nowhere.th: there is no such file")],
)
def test_missing_weights_are_told_in_a_line(options, expected, tmp_path, environment):
    line = [sys.executable, "-m", "experiments.pretrained_teacher", *options]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and expected in done.stderr and len(done.stderr.splitlines()) == 1


def test_wrong_weights_are_told_in_a_line(dataset, weights, tmp_path):
    images, options, statistics = dataset.train.images, vision.Options(), {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    with pytest.raises(OptionError, match="97 transferred, 60 missing") as stop:
        vision.pretrained("teacher", models.resnet32(), weights, images, options, **statistics)
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 400
    page = tmp_path / "page.th"
    page.write_text("<html>not found</html>")
    with pytest.raises(OptionError, match="--weights .*page.th"):
        vision.pretrained("teacher", models.resnet20(), page, images, options, **statistics)
    with pytest.raises(OptionError, match="the images are grey"):
        vision.pretrained("teacher", models.resnet20(), weights, images[..., :1], options, **statistics)


def test_figures_of_answers(tmp_path, dataset):
    draw, names = np.random.default_rng(0), dataset.class_names
    answers = {name: draw.integers(0, 10, 20) for name in ("teacher", "student")}
    counts = {name: draw.integers(0, 9, (10, 10)) for name in answers}
    image_folder.plot_confusion(counts, names, tmp_path / "confusion.png")
    image_folder.plot_predictions(dataset.test.images, dataset.test.labels, answers, names, tmp_path / "answers.png")
    for name in ("confusion.png", "answers.png"):
        with Image.open(tmp_path / name) as figure:
            assert len(figure.convert("RGB").getcolors(1 << 24)) > 100
