"""Images in Parquet files, in the forms in which Hugging Face's libraries write them."""

import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from jaxkd import data
from jaxkd.data import DataError, text

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["cat", "ant"]


def encode(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


def draw(count, shape=(6, 5, 3)):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


def make_table(images, labels, names=NAMES, image="img", label="label"):
    cells = [{"bytes": encode(pixels), "path": None} for pixels in images]
    features = {label: {"names": names, "_type": "ClassLabel"}, image: {"_type": "Image"}}
    table = pa.table({image: cells, label: labels})
    metadata = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": metadata})


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def load(folder, **options):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return data.load(folder, **options)


def make_folder(folder, shape=(6, 5, 3)):
    images = draw(20, shape)
    labels = [0, 1] * 10
    for number in range(2):
        part = slice(10 * number, 10 * number + 10)
        write(
            folder / "data" / f"train-0000{number}-of-00002.parquet",
            make_table(images[part], labels[part]),
        )
    tests = draw(4, shape)
    write(folder / "data" / "test-00000-of-00001.parquet", make_table(tests, [1, 0, 1, 0]))
    return images, tests


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5)])
def test_images_of_one_size_keep_it(tmp_path, shape):
    images, tests = make_folder(tmp_path, shape)
    assert not text.is_text_source(tmp_path)
    dataset = load(tmp_path)
    channels = (*shape, 1)[:3]
    np.testing.assert_array_equal(dataset.test.images, tests.reshape(4, *channels))
    assert dataset.test.labels.tolist() == [1, 0, 1, 0]
    # The order of the file, as with TensorFlow Datasets.
    assert dataset.class_names == ("cat", "ant")
    read = np.concatenate([dataset.train.images, dataset.validation.images])
    assert {image.tobytes() for image in read} == {image.tobytes() for image in images}


def test_images_are_fitted_to_a_size(tmp_path):
    make_folder(tmp_path)
    assert load(tmp_path, image_size=4).train.images.shape == (18, 4, 4, 3)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", make_table(draw(2, (9, 9, 3)), [0, 1]))
    assert load(tmp_path).test.images.shape == (2, 64, 64, 3)


def test_an_unlabelled_test_set_gives_way_to_the_validation_set(tmp_path):
    write(tmp_path / "train.parquet", make_table(draw(20), [0, 1] * 10))
    write(tmp_path / "validation.parquet", make_table(draw(3), [0, 1, 1]))
    write(tmp_path / "test.parquet", make_table(draw(2), [-1, -1]))
    assert load(tmp_path).test.labels.tolist() == [0, 1, 1]


def break_image(table):
    cells = [{"bytes": b"no image", "path": None}, *table["img"].to_pylist()[1:]]
    return pa.table({"img": cells, "label": table["label"]}, metadata=table.schema.metadata)


def drop_image(table):
    cells = [{"bytes": None, "path": "a.png"}, *table["img"].to_pylist()[1:]]
    return pa.table({"img": cells, "label": table["label"]}, metadata=table.schema.metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_image, "cannot read the image of .*train.parquet, row 1 .*: copy the file again"),
        (drop_image, "row 1 has no image: the files must hold the images, not their paths"),
        (lambda table: table.replace_schema_metadata(None), "one ClassLabel, .* but has none"),
        (lambda _: make_table(draw(20), [7] * 20), "row 1 has the class 7, but the file names 2"),
        (lambda _: make_table(draw(20), [None] * 20), "row 1 has no class: correct it"),
    ],
)
def test_damaged_images_and_classes(tmp_path, change, message):
    write(tmp_path / "train.parquet", change(make_table(draw(20), [0, 1] * 10)))
    write(tmp_path / "test.parquet", make_table(draw(4), [0, 1] * 2))
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert len(str(error.value).replace(str(tmp_path), "")) <= 300
