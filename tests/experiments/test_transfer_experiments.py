"""The experiments on weights: their rows and figures, the weights they start from, and errors."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import image_folder, pretrained_teacher, two_teachers, weight_transfer
from experiments.common import cifar_resnet, images, plans
from experiments.common.cli import OptionError
from jaxkd import data, models
from jaxkd.weights import save_torch

pytestmark = pytest.mark.thorough  # trains networks, in processes of their own


@pytest.fixture
def dataset():
    """Ten classes of noise."""
    rng = np.random.default_rng(0)

    def make_split(count):
        pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        return data.Split(pixels, np.arange(count, dtype=np.int32) % 10)

    return data.Dataset(make_split(60), make_split(20), make_split(20), tuple("abcdefghij"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with PyTorch's names and the random weights of a ResNet-20."""
    module = models.resnet20()
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    save_torch(path, init_resnet20(), module.torch_rules())
    return path


def init_resnet20():
    inputs = np.zeros((1, 16, 16, 3), np.float32)
    return models.from_linen(models.resnet20()).init(jax.random.key(0), inputs)


def read_rows(folder):
    return {row["name"]: row for row in json.loads((folder / "results.json").read_text())}


def test_two_teachers_write_a_row_for_each_network(tmp_path, execute):
    folder = tmp_path / "run"
    printed = execute("two_teachers", "--num-labels", 9, "--workdir", folder).stdout
    names = "large medium_scratch medium alone by_large by_medium by_both by_average"
    assert list(read_rows(folder)) == names.split()
    assert "by_both is" in printed and "medium is" in printed


def test_medium_network_takes_channels_of_the_large_one(dataset):
    config = two_teachers.Config(num_labels=20)
    large, _, medium, *_ = two_teachers.make_plan(config, dataset)
    image = dataset.train.images[:1]
    source = large.model.init(jax.random.key(0), image)
    fresh = medium.model.init(jax.random.key(0), image)
    narrowed = two_teachers.narrow_to_medium(source, fresh)
    assert jax.tree.map(np.shape, narrowed) == jax.tree.map(np.shape, fresh)

    def channels(variables):
        kernel = np.asarray(variables["params"]["conv1"]["kernel"])
        return {column.tobytes() for column in kernel.reshape(-1, kernel.shape[-1]).T.copy()}

    assert len(channels(source)) == 64
    assert len(channels(narrowed) & channels(source)) == 32


def test_weight_transfer_writes_both_tasks_and_a_figure(tmp_path, image_dir, command, environment):
    # A fourth class, so that each task has two.
    four_classes = tmp_path / "images"
    shutil.copytree(image_dir, four_classes)
    for split in ("train", "test"):
        folder = four_classes / split / "white"
        folder.mkdir()
        for i in range(20):
            Image.new("RGB", (16, 16), (250, 250, 200 + i)).save(folder / f"{i}.png")
    run = tmp_path / "run"
    line = command("weight_transfer", "--num-labels", 8, "--workdir", run)
    line[line.index("--dataset") + 1] = str(four_classes)
    process = subprocess.run(
        line, env=environment, capture_output=True, text=True, check=True, timeout=600
    )
    assert list(read_rows(run / "source")) == ["source"]
    target = read_rows(run / "target")
    assert [name.split("_")[0] for name in target] == ["scratch", "transferred", "frozen"] * 2
    with Image.open(run / "labels.png") as figure:
        assert len(figure.convert("RGB").getcolors(1 << 24)) > 50
    assert str(run / "labels.png") in process.stdout.replace("\n", "")


def test_tasks_share_no_class(dataset):
    config = weight_transfer.Config(target_classes=("b", "e", "j"))
    source, target = weight_transfer.split_classes(config, dataset)
    assert source.class_names == tuple("acdfghi") and target.class_names == tuple("bej")
    assert set(target.train.labels) == {0, 1, 2} and len(target.train.labels) == 18
    np.testing.assert_array_equal(
        target.test.images, dataset.test.images[np.isin(dataset.test.labels, [1, 4, 9])]
    )
    with pytest.raises(OptionError, match="no class is named z; there are a, b"):
        weight_transfer.split_classes(weight_transfer.Config(target_classes=("a", "z")), dataset)
    with pytest.raises(OptionError, match="at least two"):
        weight_transfer.split_classes(weight_transfer.Config(target_classes=("a",)), dataset)


def test_new_head_comes_from_the_fresh_network(dataset):
    model = images.make_cnn((4, 8), 8, dataset, images.Options())
    source, fresh = (model.init(jax.random.key(seed), dataset.train.images[:1]) for seed in (0, 1))
    params = plans.transfer_all_but_head(source, fresh)["params"]
    np.testing.assert_array_equal(params["logits"]["kernel"], fresh["params"]["logits"]["kernel"])
    for layer in ("conv1", "conv2", "hidden"):
        np.testing.assert_array_equal(params[layer]["kernel"], source["params"][layer]["kernel"])


def test_pretrained_teacher_has_the_weights_of_the_file(dataset, weights):
    config = pretrained_teacher.Config(weights=str(weights), num_labels=20)
    dataset = dataset._replace(class_names=cifar_resnet.CLASS_NAMES)
    teacher, *students = pretrained_teacher.make_plan(config, dataset)
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, init_resnet20())
    assert [stage.name for stage in students] == [
        "all_alone",
        "all_distilled",
        "few_alone",
        "few_distilled",
    ]
    assert [stage.teachers for stage in students] == [(), ("teacher",)] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "error: --weights is needed"),
        (("--weights", "nowhere.th"), "nowhere.th: there is no such file"),
    ],
)
def test_missing_weights_end_in_one_line(options, expected, environment):
    process = subprocess.run(
        [sys.executable, "-m", "experiments.pretrained_teacher", *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 1 and expected in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_wrong_weights_end_in_one_line(dataset, weights, tmp_path):
    def load(module, path, pixels=dataset.train.images):
        statistics = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
        images.load_pretrained("teacher", module, path, pixels, images.Options(), **statistics)

    with pytest.raises(OptionError, match="97 transferred, 60 missing") as stop:
        load(models.resnet32(), weights)
    assert "\n" not in str(stop.value) and len(str(stop.value)) < 400
    page = tmp_path / "page.th"
    page.write_text("<html>not found</html>")
    with pytest.raises(OptionError, match="--weights .*page.th"):
        load(models.resnet20(), page)
    with pytest.raises(OptionError, match="the images are grey"):
        load(models.resnet20(), weights, dataset.train.images[..., :1])


def test_confusions_are_counted_by_class_and_prediction():
    labels = np.array([0, 0, 2, 2, 2])
    predictions = np.array([0, 2, 2, 2, 1])
    counts = image_folder.count_confusions(labels, predictions, 3)
    np.testing.assert_array_equal(counts, [[1, 0, 1], [0, 0, 0], [0, 1, 2]])


def test_figures_of_predictions(tmp_path, dataset):
    rng = np.random.default_rng(0)
    names = dataset.class_names
    predictions = {network: rng.integers(0, 10, 20) for network in ("teacher", "student")}
    matrices = {network: rng.integers(0, 9, (10, 10)) for network in predictions}
    image_folder.plot_confusion(matrices, names, tmp_path / "confusion.png")
    image_folder.plot_predictions(
        dataset.test.images, dataset.test.labels, predictions, names, tmp_path / "predictions.png"
    )
    for name in ("confusion.png", "predictions.png"):
        with Image.open(tmp_path / name) as figure:
            assert len(figure.convert("RGB").getcolors(1 << 24)) > 100
