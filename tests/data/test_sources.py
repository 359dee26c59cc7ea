import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

from jaxkd import data
from jaxkd.data import embedded, image_folder, sources, tfds_images, tfds_prepare

pytestmark = pytest.mark.usefixtures("no_download")


@pytest.fixture
def dispatch(monkeypatch):
    """Makes `load` return the source that a name selects, and the arguments it passes."""
    monkeypatch.setattr(
        image_folder,
        "read_image_folder",
        lambda path, image_size, stream: ("folder", path, image_size),
    )
    monkeypatch.setattr(
        tfds_images,
        "read_tfds_images",
        lambda name, data_dir, image_size, stream: ("tfds", name, data_dir),
    )
    # Without the validation split, which TFDS has not.
    monkeypatch.setattr(sources, "make_dataset", lambda name, *source: source[:3])
    monkeypatch.setattr(sources, "_warn_of_size", lambda *arguments: None)


def test_embedded_dataset_is_loaded_and_divided():
    dataset = data.load("fashion_mnist_mini")
    assert [len(split.labels) for split in dataset[:3]] == [9000, 1000, 2000]
    assert all(
        split.images.dtype == np.uint8 and split.labels.dtype == np.int32 for split in dataset[:3]
    )


def test_equal_calls_give_equal_arrays():
    chex.assert_trees_all_equal(
        data.load("fashion_mnist_mini")[:3], data.load("fashion_mnist_mini")[:3]
    )


def test_validation_is_part_of_train_and_test_is_untouched():
    dataset = data.load("fashion_mnist_mini")
    train, test, _ = embedded.read_embedded()
    union = np.concatenate([dataset.train.images, dataset.validation.images]).reshape(10_000, -1)
    rows = {row.tobytes() for row in train.images}
    assert {row.tobytes() for row in union} == rows
    chex.assert_trees_all_equal(dataset.test, test)


def test_existing_folder_wins_over_a_dataset_name(dispatch, tmp_path, monkeypatch):
    (tmp_path / "cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    assert data.load("cifar10", image_size=9) == ("folder", Path("cifar10"), 9)


@pytest.mark.parametrize("name", ["./photos", "photos/fruit", "/photos", "~/photos", "../cifar10"])
def test_paths_select_folders(name, dispatch, tmp_path):
    assert data.load(name, tmp_path) == ("folder", Path(name).expanduser(), 64)


def test_path_objects_select_folders(dispatch, tmp_path):
    assert data.load(tmp_path) == ("folder", tmp_path, 64)


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar10/3.0.2", "cifar10:3.0.2", "mnist_corrupted/fog", "unheard_of"]
)
def test_other_names_select_tfds(name, dispatch, tmp_path):
    assert data.load(name, tmp_path) == ("tfds", name, tmp_path)


def test_prepared_dataset_unknown_to_tfds_selects_tfds(dispatch, tmp_path):
    (tmp_path / "mine").mkdir()
    assert data.load("mine/1.0.0", tmp_path) == ("tfds", "mine/1.0.0", tmp_path)


def test_data_dir_defaults_to_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert tfds_prepare.resolve_data_dir(None) == Path.home() / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert tfds_prepare.resolve_data_dir(None) == tmp_path
    assert tfds_prepare.resolve_data_dir("~/here") == Path.home() / "here"


def test_paths_need_no_tfds(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(data.DataError, match="there is no folder photos/fruit: check the path"):
        data.load("photos/fruit", tmp_path)


def test_missing_tfds(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        data.DataError,
        match=r"needs tensorflow_datasets.*pip install -e '.*\[experiments\]'$",
    ):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar", r"^unknown dataset 'cifar'; did you mean cifar10 or .*\?$"),
        ("CIFAR10", r"^unknown dataset 'CIFAR10'; did you mean cifar10 or "),
        ("fashion_mnist_min", "did you mean fashion_mnist_mini or fashion_mnist"),
        ("qqqqqqqq", "unknown dataset 'qqqqqqqq'; give the path of a folder or a name from https"),
    ],
)
def test_unknown_name(name, message, tmp_path):
    with pytest.raises(data.DataError, match=message):
        data.load(name, tmp_path)


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        (0, "image_size is 0: choose at least 1 pixel"),
        (10**9, "image_size is 1000000000: choose at most 4,096 pixels"),
        (True, "image_size is True: choose a whole number of pixels"),
        ("64", "image_size is '64': choose a whole number of pixels"),
    ],
)
def test_image_size_out_of_bounds(image_size, message):
    with pytest.raises(data.DataError, match=message):
        data.load("fashion_mnist_mini", image_size=image_size)


def test_size_that_a_dataset_does_not_take_is_said():
    message = "fashion_mnist_mini: all images have 28 x 28 pixels and keep that size; image_size 64"
    with pytest.warns(UserWarning, match=message) as said:
        dataset = data.load("fashion_mnist_mini", image_size=64)
    assert [warning.filename for warning in said] == [__file__]
    assert dataset.train.images.shape == (9000, 28, 28, 1)
    # Nothing to say: the size is right, or was not asked for.
    data.load("fashion_mnist_mini", image_size=28)
    data.load("fashion_mnist_mini")


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "the name of the dataset is empty: give a folder"), ("a\0b", "has a null character: ch")],
)
def test_names_that_are_no_path(name, message):
    with pytest.raises(data.DataError, match=message):
        data.load(name)


def test_name_of_thousands_of_characters_ends_in_a_short_line():
    with pytest.raises(data.DataError, match="there is no folder") as error:
        data.load("photos/" + "x" * 5000)
    assert len(str(error.value)) <= 300


def test_import_needs_jax_and_numpy_alone():
    code = (
        "import sys, jaxkd.data; jaxkd.data.load('fashion_mnist_mini');"
        "optional = {'tensorflow_datasets', 'tensorflow', 'PIL', 'rich', 'flax', 'optax'};"
        "print(optional & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )
