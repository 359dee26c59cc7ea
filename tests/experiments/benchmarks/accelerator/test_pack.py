"""The pack: JPEG bytes that come back as they were, and that fit the limit."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.benchmarks.accelerator import cifar, pack
from experiments.benchmarks.accelerator.jpeg_file import read_jpegs
from experiments.benchmarks.accelerator.measurement import Context
from experiments.common.cli import OptionError
from jaxkd.data import DataError


def test_images_come_back(jpeg_pack, jpeg_splits):
    train, test, names = read_jpegs(jpeg_pack / cifar.IMAGES_FILE)
    assert names == tuple(f"class {label}" for label in range(10))
    for split, original in zip((train, test), jpeg_splits, strict=True):
        assert split.labels.tolist() == original.labels
        for image, file in zip(split.images, original.files, strict=True):
            np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(file))))


def test_damaged_file_is_refused(tmp_path, jpeg_pack):
    content = (jpeg_pack / cifar.IMAGES_FILE).read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    for name in ("cut.npz", "missing.npz"):
        with pytest.raises(DataError, match="is no file of images"):
            read_jpegs(tmp_path / name)


def test_too_many_images_are_cut_to_equal_classes(tmp_path, jpeg_splits):
    train, test = jpeg_splits
    path = tmp_path / "images.npz"
    names = [str(label) for label in range(10)]
    assert pack.write_that_fits(path, train, test, names, 1e9) is train
    whole = path.stat().st_size
    chosen = pack.write_that_fits(path, train, test, names, 0.6 * whole)
    assert path.stat().st_size <= 0.6 * whole
    counts = np.bincount(chosen.labels)
    assert len(counts) == 10 and len(set(counts)) == 1 and 1 <= counts[0] < 8
    # The first ones of each class, in the order of the source.
    assert chosen.files == train.files[: len(chosen.files)]
    with pytest.raises(OptionError, match="nothing is left for training images"):
        pack.write_that_fits(path, train, test, names, 0.1 * whole)
    assert not path.exists()


@pytest.mark.parametrize(
    "options",
    [{"max_mib": 0.0}, {"wheels": ("tyro",)}, {"wheels": ("--x==1",)}, {"python_version": "3"}],
)
def test_invalid_options_are_refused(options):
    with pytest.raises(OptionError):
        pack.Config(**options).check()


def test_wheels_are_those_of_the_device(tmp_path, monkeypatch):
    commands = []

    def run(command, **keywords):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pack.subprocess, "run", run)
    assert pack.download_wheels((), tmp_path, "3.12") == [] and not commands
    pack.download_wheels(("tyro==1.0",), tmp_path, "3.12")
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tyro==1.0", "3.12"} <= {*command}


def test_missing_wheel_ends_in_one_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stderr="ERROR: a\nERROR: No matching distribution")
    monkeypatch.setattr(pack.subprocess, "run", lambda *arguments, **keywords: failed)
    with pytest.raises(OptionError, match="--wheels x==1: ERROR: No matching distribution"):
        pack.download_wheels(("x==1",), tmp_path, "3.12")


@pytest.mark.thorough
def test_reads_the_bytes_that_tfds_keeps(tmp_path, monkeypatch, jpeg_splits):
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
    )
    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=features, supervised_keys=("image", "label")
                )

            def _split_generators(self, manager):
                return {
                    name: self._generate_examples(split)
                    for name, split in zip(("train", "test"), jpeg_splits, strict=True)
                }

            def _generate_examples(self, split):
                for i, (file, label) in enumerate(zip(*split, strict=True)):
                    yield i, {"image": io.BytesIO(file), "label": label}

    Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    monkeypatch.setattr(pack, "DATASET", "tiny")
    train, test, names = pack.read_dataset(tmp_path)
    assert names == tuple(map(str, range(10)))
    for split, original in zip((train, test), jpeg_splits, strict=True):
        # TFDS shuffles the examples when it prepares a dataset.
        pairs = zip(split.files, split.labels, strict=True)
        assert {*pairs} == {*zip(original.files, original.labels, strict=True)}


@pytest.mark.filterwarnings("ignore:.* are not in the validation set")
def test_decoded_images_are_kept(jpeg_pack, tmp_path, monkeypatch):
    context = Context(tmp_path, tmp_path, tmp_path, jpeg_pack, tmp_path / "log")
    dataset = cifar.load(context)
    assert len(dataset.train.labels) == 72 and len(dataset.test.labels) == 20
    monkeypatch.setattr(cifar, "read_jpegs", None)
    again = cifar.load(context)
    np.testing.assert_array_equal(again.train.images, dataset.train.images)
    assert again.class_names == dataset.class_names
