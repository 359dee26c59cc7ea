import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.utils import version as version_lib

from jaxkd import data
from jaxkd.data import tfds_images, tfds_prepare, tfds_reader, tfds_stream

pytestmark = [
    pytest.mark.usefixtures("no_download"),
    # The images are few.
    pytest.mark.filterwarnings("ignore:.*classes are not in the validation set"),
]

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "tfds" / "cifar10"
FEATURES = {
    "image": tfds.features.Image(shape=(8, 6, 3)),
    "label": tfds.features.ClassLabel(names=["even", "odd"]),
}


def png(array):
    """Encodes an image. Without TensorFlow, TFDS writes image files but not arrays."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    file.seek(0)
    return file


def example(index):
    return {"image": png(np.full((8, 6, 3), index, np.uint8)), "label": index % 2}


def prepare(
    data_dir,
    *,
    counts=None,
    features=None,
    make=example,
    supervised=("image", "label"),
    version="1.0.0",
    config=None,
):
    """Prepares a dataset `tiny` and returns the folder of its version."""
    counts = {"train": 20, "test": 6} if counts is None else counts

    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(version)
            BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features or FEATURES),
                    supervised_keys=supervised,
                )

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(count) for name, count in counts.items()}

            def _generate_examples(self, count):
                return ((index, make(index)) for index in range(count))

    builder = Tiny(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds")).parent


@pytest.fixture
def tiny(original, tmp_path):
    """`data_dir/tiny/1.0.0`, prepared."""
    shutil.copytree(original, tmp_path / "tiny")
    return tmp_path / "tiny" / "1.0.0"


def load(tiny, **options):
    return data.load("tiny", tiny.parents[1], **options)


def edit(tiny, **changes):
    path = tiny / "dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def brightness(split):
    return split.images[:, 0, 0, 0].tolist()


def test_images_labels_and_names(tiny):
    dataset = load(tiny)
    assert [split.images.shape for split in dataset[:3]] == [
        (18, 8, 6, 3),
        (2, 8, 6, 3),
        (6, 8, 6, 3),
    ]
    assert dataset.class_names == ("even", "odd")
    assert sorted(brightness(dataset.train) + brightness(dataset.validation)) == list(range(20))
    assert sorted(brightness(dataset.test)) == list(range(6))
    for split in dataset[:3]:
        np.testing.assert_array_equal(split.labels, split.images[:, 0, 0, 0] % 2)
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32


def test_order_is_that_of_the_files(tiny):
    rows = tfds.builder_from_directory(tiny).as_data_source(split="test")
    assert brightness(load(tiny).test) == [int(row["image"][0, 0, 0]) for row in rows]


def test_fixed_shape_ignores_image_size(tiny):
    with pytest.warns(UserWarning, match="8 x 6 pixels and keep that size; image_size 5 is"):
        chex.assert_trees_all_equal(load(tiny, image_size=5)[:3], load(tiny)[:3])


def test_data_dir_from_the_environment(tiny, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny.parents[1]))
    chex.assert_trees_all_equal(data.load("tiny")[:3], load(tiny)[:3])


def test_nothing_is_printed(tiny, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        load(tiny)
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert not logging.getLogger("absl").filters


def test_other_log_records_pass(caplog):
    with tfds_reader.without_opencv_advice():
        logging.getLogger("absl").warning("OpenCV is not installed. We recommend")
        logging.getLogger("absl").warning("disk is %s", "full")
    assert [record.getMessage() for record in caplog.records] == ["disk is full"]


# --- versions and configurations ---


def test_newest_version_is_read(tiny):
    prepare(tiny.parents[1], version="10.0.0", counts={"train": 4, "test": 1})
    prepare(tiny.parents[1], version="9.0.0", counts={"train": 6, "test": 2})
    assert len(load(tiny).test.labels) == 1
    assert len(data.load("tiny:9.0.0", tiny.parents[1]).test.labels) == 2
    assert len(data.load("tiny/1.0.0", tiny.parents[1]).test.labels) == 6


def test_newest_complete_version_is_read(tiny):
    (tiny.parent / "2.0.0").mkdir()
    (tiny.parent / "2.0.0" / "dataset_info.json").write_text("{}")
    assert len(load(tiny).test.labels) == 6


def test_configurations(tmp_path):
    prepare(tmp_path, config="fog")
    assert len(data.load("tiny", tmp_path).test.labels) == 6
    prepare(tmp_path, config="snow", counts={"train": 4, "test": 1})
    assert len(data.load("tiny/snow", tmp_path).test.labels) == 1
    assert len(data.load("tiny/fog:1.0.0", tmp_path).test.labels) == 6
    with pytest.raises(
        data.DataError, match="in several configurations: choose one of tiny/fog, tiny/snow$"
    ):
        data.load("tiny", tmp_path)


# --- splits and features ---


def test_validation_is_the_test_set_if_there_is_no_other(tmp_path):
    prepare(tmp_path, counts={"train": 20, "validation": 5})
    with pytest.warns(UserWarning, match="no split test; the split validation is the test set"):
        dataset = data.load("tiny", tmp_path)
    assert [len(split.labels) for split in dataset[:3]] == [18, 2, 5]
    assert sorted(brightness(dataset.test)) == list(range(5))


def test_test_is_preferred_to_validation(tmp_path):
    prepare(tmp_path, counts={"train": 20, "validation": 5, "test": 3})
    with pytest.warns(UserWarning, match="tiny: the split validation is not read; a tenth") as said:
        dataset = data.load("tiny", tmp_path)
    assert [len(split.labels) for split in dataset[:3]] == [18, 2, 3]
    assert {warning.filename for warning in said} == {__file__}


def test_a_fifth_of_train_is_the_test_set_if_there_is_none(tmp_path):
    prepare(tmp_path, counts={"train": 50})
    with pytest.warns(UserWarning, match="no split test; a fifth of train is the test set"):
        dataset = data.load("tiny", tmp_path)
    assert [len(split.labels) for split in dataset[:3]] == [36, 4, 10]
    assert sorted(sum((brightness(split) for split in dataset[:3]), [])) == list(range(50))
    with pytest.warns(UserWarning, match="no split test"):
        chex.assert_trees_all_equal(data.load("tiny", tmp_path)[:3], dataset[:3])


def test_no_train_split(tmp_path):
    prepare(tmp_path, counts={"test": 5})
    with pytest.raises(
        data.DataError, match="tiny has no split named train, only test: choose another"
    ):
        data.load("tiny", tmp_path)


def test_sizes_that_vary_are_fitted(tmp_path):
    def tall(index):
        return {"image": png(np.full((8 + index, 6, 3), index, np.uint8)), "label": index % 2}

    prepare(
        tmp_path,
        features=FEATURES | {"image": tfds.features.Image(shape=(None, None, 3))},
        make=tall,
    )
    dataset = data.load("tiny", tmp_path, image_size=5)
    assert dataset.train.images.shape == (18, 5, 5, 3)
    np.testing.assert_array_equal(dataset.train.labels, dataset.train.images[:, 0, 0, 0] % 2)
    assert data.load("tiny", tmp_path, image_size=7).train.images.shape == (18, 7, 7, 3)


def test_grey_images_of_varying_size_become_rgb(tmp_path):
    features = FEATURES | {"image": tfds.features.Image(shape=(None, None, 1))}
    prepare(
        tmp_path,
        features=features,
        make=lambda i: {"image": png(np.full((9, 9 + i), i, np.uint8)), "label": i % 2},
    )
    images = data.load("tiny", tmp_path).train.images
    assert images.shape == (18, 64, 64, 3) and (images == images[:, :1, :1, :1]).all()


def test_grey_images_of_one_size_stay_grey(tmp_path):
    features = FEATURES | {"image": tfds.features.Image(shape=(9, 9, 1))}
    prepare(
        tmp_path,
        features=features,
        make=lambda i: {"image": png(np.full((9, 9), i, np.uint8)), "label": i % 2},
    )
    assert data.load("tiny", tmp_path).train.images.shape == (18, 9, 9, 1)


def test_supervised_label_is_chosen_among_several(tmp_path):
    features = FEATURES | {"coarse": tfds.features.ClassLabel(num_classes=1)}
    prepare(tmp_path, features=features, make=lambda index: example(index) | {"coarse": 0})
    dataset = data.load("tiny", tmp_path)
    assert dataset.class_names == ("even", "odd") and set(dataset.train.labels) == {0, 1}


@pytest.mark.parametrize(
    ("features", "make", "message"),
    [
        (
            FEATURES | {"label": tfds.features.Text()},
            lambda index: example(index) | {"label": "odd"},
            "tiny is not an image classification set, which has one ClassLabel .* it has image, "
            "label; choose another",
        ),
        (
            FEATURES | {"image": tfds.features.Text()},
            lambda index: {"image": "", "label": 0},
            "which has one Image among its features: it has image, label;",
        ),
        (
            FEATURES | {"other": tfds.features.ClassLabel(num_classes=2)},
            lambda index: example(index) | {"other": 0},
            "one ClassLabel among its features: it has image, label, other;",
        ),
        (
            FEATURES | {"image": tfds.features.Image(shape=(8, 6, 1), dtype=np.uint16)},
            lambda index: {"image": png(np.zeros((8, 6), np.uint16)), "label": 0},
            "tiny has uint16 images: choose a dataset of uint8 images",
        ),
    ],
    ids=["no label", "no image", "two labels", "16 bits"],
)
def test_other_kinds_of_datasets(features, make, message, tmp_path):
    prepare(tmp_path, features=features, make=make, supervised=None)
    with pytest.raises(data.DataError, match=message):
        data.load("tiny", tmp_path)


def test_unlabelled_test_set(tmp_path):
    prepare(tmp_path, make=lambda index: example(index) | {"label": -1})
    with pytest.raises(data.DataError, match=r"tiny: train has label -1 at index 0, outside 0..1"):
        data.load("tiny", tmp_path)


# --- damage ---


def damaged(tiny, reason):
    """Expects the error that names the folder to delete and the command to run."""
    message = (
        rf"^\S+/tiny/\S+ is incomplete or damaged \({reason}.*\): delete it and prepare it again: "
        "pip install .*python -c "
    )
    return pytest.raises(data.DataError, match=message)


def shard(tiny, split="train"):
    return next(tiny.glob(f"tiny-{split}.array_record*"))


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_metadata_missing(file, tiny):
    (tiny / file).unlink()
    with damaged(tiny, "dataset_info.json and features.json are not both there"):
        load(tiny)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"splits": 3}', "\x00"])
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_metadata_broken(file, content, tiny):
    (tiny / file).write_text(content)
    with damaged(tiny, ""):
        load(tiny)


def test_metadata_without_splits(tiny):
    edit(tiny, splits=[])
    with pytest.raises(data.DataError, match="no split named train"):
        load(tiny)


def test_metadata_without_format(tiny):
    edit(tiny, fileFormat="")
    with damaged(tiny, ""):
        load(tiny)


@pytest.mark.parametrize("split", ["train", "test"])
def test_shard_missing(split, tiny):
    shard(tiny, split).unlink()
    with damaged(
        tiny, rf"1 of 2 files are missing, such as tiny-{split}.array_record-00000-of-00001"
    ):
        load(tiny)


def test_shard_missing_in_spite_of_a_cache(tiny):
    load(tiny)
    shard(tiny).unlink()
    with damaged(tiny, "1 of 2 files are missing"):
        load(tiny)


@pytest.mark.parametrize("size", [0, 1000, 70_000])
def test_shard_truncated(size, tiny):
    os.truncate(shard(tiny), size)
    with damaged(tiny, ""):
        load(tiny)


def test_shard_overwritten(tiny):
    path = shard(tiny)
    path.write_bytes(b"\x00" * path.stat().st_size)
    with damaged(tiny, ""):
        load(tiny)


def test_shard_with_fewer_examples(tiny):
    edit(
        tiny,
        splits=[
            {**split, "shardLengths": ["25"]}
            for split in json.loads((tiny / "dataset_info.json").read_text())["splits"]
        ],
    )
    with damaged(tiny, ""):
        load(tiny)


@pytest.mark.parametrize("count", [19, 21])
def test_examples_are_counted(count, tiny, monkeypatch):
    row = {"image": np.zeros((8, 6, 3), np.uint8), "label": 0}
    monkeypatch.setattr(tfds_images, "_read_examples", lambda prepared, split: iter([row] * count))
    with damaged(tiny, f"train holds {count} examples instead of 20"):
        load(tiny)


def test_preparation_that_was_interrupted(tmp_path):
    (tmp_path / "tiny" / "incomplete.A1B2C3_1.0.0").mkdir(parents=True)
    with damaged(tmp_path, "dataset_info.json and features.json are not both there") as caught:
        data.load("tiny", tmp_path)
    assert str(tmp_path / "tiny" / "incomplete.A1B2C3_1.0.0") in str(caught.value)


def test_preparation_that_was_interrupted_once(tiny):
    (tiny.parent / "incomplete.A1B2C3_2.0.0").mkdir()
    assert len(load(tiny).test.labels) == 6


def test_missing_package_is_not_damage(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_data_source", None)
    monkeypatch.setattr(
        type(tfds.builder_from_directory(tiny)),
        "as_data_source",
        lambda self, split: __import__("array_record.python.array_record_data_source"),
    )
    with pytest.raises(data.DataError, match=r"needs array_record\S+, which cannot be imported"):
        load(tiny)


# --- tfrecord ---


@pytest.fixture
def tfrecord(tiny):
    """The folder `tiny`, with shards and metadata renamed to the format tfrecord."""
    for path in tiny.glob("*array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    edit(tiny, fileFormat="tfrecord")
    return tiny


def test_tfrecord_without_tensorflow(tfrecord, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(
        data.DataError,
        match=r"/tiny/1.0.0 is stored as tfrecord, which takes TensorFlow to read: pip",
    ):
        load(tfrecord)


def test_tfrecord_through_as_dataset(tfrecord, monkeypatch):
    examples = [
        {"image": np.full((8, 6, 3), index, np.uint8), "label": index % 2} for index in range(20)
    ]
    splits = {"train": examples, "test": examples[:6]}
    builder = type(tfds.builder_from_directory(tfrecord))
    monkeypatch.setattr(tfds_prepare, "import_tensorflow", lambda: None)
    monkeypatch.setattr(
        builder, "as_dataset", lambda self, split, shuffle_files: shuffle_files or splits[split]
    )
    monkeypatch.setattr(tfds, "as_numpy", lambda dataset: dataset)
    assert brightness(load(tfrecord).test) == list(range(6))


def test_tfrecord_with_tensorflow(tmp_path):
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    folder = prepare(tmp_path / "array_record")
    builder = tfds.builder_from_directory(folder)
    converted = tmp_path / "tfrecord" / "tiny" / "1.0.0"
    shutil.copytree(folder, converted)
    import tensorflow as tf

    for split in ("train", "test"):
        path = shard(converted, split)
        path.unlink()
        with tf.io.TFRecordWriter(str(path).replace("array_record", "tfrecord")) as writer:
            for record in builder.as_data_source(split=split).data_source:
                writer.write(record)
    edit(converted, fileFormat="tfrecord")
    chex.assert_trees_all_equal(load(converted)[:3], load(folder)[:3])


# --- preparing ---


def test_unprepared_dataset_is_prepared_and_read(tmp_path, pretend_tensorflow, monkeypatch):
    def builder(name, data_dir):
        assert (name, data_dir) == ("mnist", tmp_path)
        return type(
            "Builder", (), {"download_and_prepare": download_and_prepare, "data_dir": None}
        )()

    def download_and_prepare(self, file_format):
        assert file_format == "array_record"
        self.data_dir = str(prepare(tmp_path))

    pretend_tensorflow(installed=True)
    monkeypatch.setattr(tfds_prepare, "import_tensorflow", lambda: None)
    monkeypatch.setattr(tfds, "builder", builder)
    assert len(data.load("mnist", tmp_path).test.labels) == 6


# --- the cache ---


def cached(tiny):
    return tiny.with_name("1.0.0.decoded.npz")


def forbid_decoding(monkeypatch):
    monkeypatch.setattr(tfds_images, "_decode", lambda *args: pytest.fail("decoded again"))


def count_decoding(monkeypatch):
    calls = []
    decode = tfds_images._decode
    monkeypatch.setattr(tfds_images, "_decode", lambda *args: calls.append(args) or decode(*args))
    return calls


def test_cache_is_used(tiny, monkeypatch):
    first = load(tiny)
    assert cached(tiny).is_file() and len(list(tiny.parent.iterdir())) == 2
    forbid_decoding(monkeypatch)
    chex.assert_trees_all_equal(load(tiny)[:3], first[:3])
    assert load(tiny).class_names == first.class_names


def test_cache_is_not_a_version_to_tfds(tiny):
    load(tiny)
    assert version_lib.list_all_versions(tiny.parent) == [tfds.core.Version("1.0.0")]


def test_cache_does_not_depend_on_the_folder(tiny, tmp_path, monkeypatch):
    load(tiny)
    shutil.copytree(tiny.parent, tmp_path / "moved" / "tiny")
    forbid_decoding(monkeypatch)
    data.load("tiny", tmp_path / "moved")


def test_changed_metadata_are_decoded_again(tiny, monkeypatch):
    edit(tiny, description="old")
    load(tiny)
    edit(tiny, description="new")
    calls = count_decoding(monkeypatch)
    load(tiny)
    load(tiny)
    assert len(calls) == 1


def test_changed_shard_is_decoded_again(tiny, monkeypatch, tmp_path):
    load(tiny)
    other = prepare(tmp_path / "other", make=lambda index: example(index + 50))
    shutil.copy(shard(other), shard(tiny))
    edit(tiny, downloadSize="1")  # small shards are all padded to one size
    calls = count_decoding(monkeypatch)
    assert min(brightness(load(tiny).train)) >= 50 and len(calls) == 1


def test_shard_of_another_size_is_noticed(tiny, monkeypatch):
    load(tiny)
    os.truncate(shard(tiny), 1000)
    with damaged(tiny, ""):
        load(tiny)


def test_other_image_size_is_decoded_again(tmp_path, monkeypatch):
    prepare(tmp_path, features=FEATURES | {"image": tfds.features.Image(shape=(None, None, 3))})
    calls = count_decoding(monkeypatch)
    sizes = [
        data.load("tiny", tmp_path, image_size=size).train.images.shape[1] for size in (5, 5, 7)
    ]
    assert sizes == [5, 5, 7] and len(calls) == 2


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "flipped", "text", "folder", "other npz", "pickle"]
)
def test_damaged_cache_is_rewritten(damage, tiny, monkeypatch):
    expected = load(tiny)
    content = bytearray(cached(tiny).read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    if damage in ("empty", "truncated", "text", "flipped"):
        cached(tiny).write_bytes(
            {"empty": b"", "truncated": content[:-9], "text": b"text"}.get(damage, content)
        )
    if damage == "other npz":
        np.savez(cached(tiny), other=np.zeros(3))
    if damage == "pickle":
        np.savez(cached(tiny), fingerprint=np.array([{}], object))
    if damage == "folder":
        cached(tiny).unlink()
        cached(tiny).mkdir()
    calls = count_decoding(monkeypatch)
    for _ in range(2):
        chex.assert_trees_all_equal(load(tiny)[:3], expected[:3])
    assert len(calls) == (2 if damage == "folder" else 1)  # a folder cannot be replaced by a file


@pytest.mark.parametrize("step", ["open", "savez", "replace"])
def test_folder_that_cannot_be_written(step, tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("read-only") if step == "open" else OSError("no space left")

    def refuse_to_write(path, mode="r", **kwargs):
        return refuse() if "w" in mode else open(path, mode, **kwargs)

    patches = {
        "open": (Path, "open", refuse_to_write),
        "savez": (np, "savez", refuse),
        "replace": (os, "replace", refuse),
    }
    monkeypatch.setattr(*patches[step])
    assert len(load(tiny).test.labels) == 6
    assert [entry.name for entry in tiny.parent.iterdir()] == ["1.0.0"]


def test_interrupted_writing_leaves_the_old_cache(tiny, monkeypatch):
    load(tiny)
    before = cached(tiny).read_bytes()
    edit(tiny, description="new")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("crash")))
    load(tiny)
    assert cached(tiny).read_bytes() == before


# --- CIFAR-10 ---


@pytest.mark.skipif(not CIFAR.is_dir(), reason="../shared/data/tfds is absent")
@pytest.mark.parametrize("count", [5_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_cifar10(count, tmp_path, monkeypatch):
    version = tmp_path / "cifar10" / "3.0.2"
    version.mkdir(parents=True)
    for path in (CIFAR / "3.0.2").iterdir():
        (version / path.name).symlink_to(path.resolve())
    info = (version / "dataset_info.json").read_text()
    (version / "dataset_info.json").unlink()
    (version / "dataset_info.json").write_text(info.replace('"50000"', f'"{count}"'))
    dataset = data.load("cifar10", tmp_path)
    assert [len(split.labels) for split in dataset[:3]] == [count * 9 // 10, count // 10, 10_000]
    assert all(split.images.shape[1:] == (32, 32, 3) for split in dataset[:3])
    assert dataset.class_names[3] == "cat"
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), [1000] * 10)
    mean, _ = data.channel_statistics(dataset.train.images)
    np.testing.assert_allclose(mean, [0.491, 0.482, 0.447], atol=6e-3)
    forbid_decoding(monkeypatch)
    chex.assert_trees_all_equal(data.load("cifar10/3.0.2", tmp_path)[:3], dataset[:3])


def test_streams_the_same_splits_and_reads_labels_once(tiny, monkeypatch):
    loaded = load(tiny)
    streamed = load(tiny, stream=True)
    for split, expected in zip(streamed[:3], loaded[:3], strict=True):
        np.testing.assert_array_equal(split.images[:], expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)
    files = sorted(path.name for path in tiny.parent.glob("*-labels.npz"))
    assert files == ["1.0.0.test-labels.npz", "1.0.0.train-labels.npz"]
    decoded = []
    monkeypatch.setattr(tfds_stream, "_save_labels", lambda *args: decoded.append(args))
    assert load(tiny, stream=True).train.images.digest == streamed.train.images.digest
    assert not decoded
    (tiny.parent / files[0]).write_bytes(b"damaged")
    np.testing.assert_array_equal(load(tiny, stream=True).test.labels, loaded.test.labels)
    assert len(decoded) == 1


def jpeg_example(index):
    """Returns an image of a size of its own, as those of ImageNet."""
    file = io.BytesIO()
    pixels = np.random.default_rng(index).integers(0, 256, (9 + index, 12, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    file.seek(0)
    return {"image": file, "label": index % 2}


def test_streams_photographs_of_various_sizes(tmp_path):
    features = {**FEATURES, "image": tfds.features.Image(encoding_format="jpeg")}
    # As ImageNet, without a split test.
    counts = {"train": 20, "validation": 6}
    folder = prepare(tmp_path, counts=counts, features=features, make=jpeg_example)
    with pytest.warns(UserWarning, match="the split validation is the test set"):
        loaded, streamed = (load(folder, image_size=8, stream=stream) for stream in (False, True))
    for split, expected in zip(streamed[:3], loaded[:3], strict=True):
        assert split.images.shape[1:] == (8, 8, 3)
        np.testing.assert_array_equal(split.images[:], expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)


def test_other_formats_are_not_streamed(tiny, monkeypatch):
    edit(tiny, fileFormat="tfrecord")
    for path in tiny.glob("*array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(data.DataError, match="stored as tfrecord, which cannot be read in any"):
        load(tiny, stream=True)
