"""Texts in Parquet and Arrow files, in the forms in which Hugging Face's libraries write them."""

import importlib
import importlib.util
import json
import warnings

import pytest

from jaxkd.data import DataError, text

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.usefixtures("no_download")

NAMES = ["neg", "pos"]
TEXTS = [f"film {i}" for i in range(30)]
LABELS = [i % 2 for i in range(30)]


def make_table(texts=TEXTS, labels=LABELS, names=NAMES, **columns):
    table = pa.table({"idx": list(range(len(texts))), "text": texts, "label": labels} | columns)
    if names is None:
        return table
    features = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"_type": "Value"}}
    return table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        pq.write_table(table, path, row_group_size=7)


def load(path, **options):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return text.load_texts(path, **options)


@pytest.mark.parametrize(
    "form",
    [
        "{}.parquet",
        "data/{}-00000-of-00001.parquet",
        "{}-00000-of-00001-0123456789abcdef.parquet",
        "{}/0000.parquet",
        "{}/data-00000-of-00001.arrow",
    ],
)
def test_the_forms_of_a_dataset(tmp_path, form):
    tests = make_table(["so fine"], [1])
    write(tmp_path / form.format("train"), make_table())
    write(tmp_path / form.format("test"), tests)
    assert text.is_text_source(tmp_path)
    with pytest.warns(UserWarning, match="columns have names; the text is column 'text', the cla"):
        dataset = text.load_texts(tmp_path)
    assert dataset.class_names == ("neg", "pos")
    assert dataset.test.texts == ("so fine",) and dataset.test.labels.tolist() == [1]
    assert {*dataset.train.texts, *dataset.validation.texts} == {*TEXTS}
    for split in (dataset.train, dataset.validation):
        for sentence, label, origin in zip(split.texts, split.labels, split.origins, strict=True):
            number = int(sentence.split()[1])
            assert label == number % 2 and origin.endswith(f", row {number + 1}")


@pytest.mark.parametrize("form", ["train-0000{}-of-00002.parquet", "train/000{}.parquet"])
def test_shards_are_read_in_their_order(tmp_path, form):
    for number in range(2):
        part = slice(number, None, 2)
        write(tmp_path / form.format(number), make_table(TEXTS[part], LABELS[part]))
    write(tmp_path / "test.parquet", make_table(["so fine"], [1]))
    dataset = load(tmp_path)
    assert {*dataset.train.texts, *dataset.validation.texts} == {*TEXTS}
    assert dataset.train.texts.index("film 28") < dataset.train.texts.index("film 1")
    (tmp_path / form.format(1)).unlink()
    if "-of-" in form:
        with pytest.raises(DataError, match="of 2 shards, 00001 are missing: copy them too"):
            load(tmp_path)


def test_an_unlabelled_test_set_is_left_out(tmp_path):
    write(tmp_path / "train.parquet", make_table())
    write(tmp_path / "validation.parquet", make_table(["so fine"], [1]))
    write(tmp_path / "test.parquet", make_table(["what"], [-1]))
    assert load(tmp_path).test.texts == ("so fine",)


def test_one_file_and_a_column_of_texts(tmp_path):
    words = pa.array(["bad", "good"] * 15).dictionary_encode()
    images = [{"bytes": b"x", "path": None}] * 30
    path = tmp_path / "reviews.parquet"
    write(path, make_table(labels=words, names=None, image=images))
    dataset = load(path, text_column="text", label_column="label")
    assert dataset.class_names == ("bad", "good") and len(dataset.test.texts) == 3
    texts, origins = text.read_texts(path, column="text")
    assert list(texts) == TEXTS and origins[29].endswith("row 30")


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (make_table(labels=[i / 2 for i in LABELS], names=None), {}, "'label' is a number with a"),
        (make_table(labels=[[i] for i in LABELS], names=None), {}, "'label' is a list: a class"),
        (make_table(labels=[None, *LABELS[1:]], names=None), {}, "row 1: 'label' is null"),
        (make_table(labels=[2, *LABELS[1:]]), {}, "row 1 has the class 2, but the file names 2"),
        (make_table(names=["a", "a"]), {}, "the classes of 'label' have one name twice"),
        (make_table(names=["a", 1]), {}, "the classes of 'label' must be a list of names"),
        (make_table(["a\0", *TEXTS[1:]]), {}, "row 1 has a null character"),
        (
            make_table(),
            {"text_column": "body"},
            "has no column 'body', only idx, text, label: give",
        ),
        (make_table([], []), {}, "has no text"),
        (make_table().drop_columns(["text"]), {}, "row 1: 'idx' is an integer: the text must"),
    ],
)
def test_tables_that_are_refused(tmp_path, table, options, message):
    write(tmp_path / "x.parquet", table)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path / "x.parquet", **options)
    assert len(str(error.value).replace(str(tmp_path), "")) <= 300


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"ARROW1\0\0 and no more"])
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read .*{name} .*: copy it again") as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_shards_of_different_columns(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", make_table())
    write(tmp_path / "train-00001-of-00002.parquet", make_table().drop_columns(["idx"]))
    write(tmp_path / "test.parquet", make_table())
    with pytest.raises(DataError, match="has the columns text, label, train-00000.*: give all sha"):
        load(tmp_path)


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="datasets is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_what_datasets_writes(tmp_path, form, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = importlib.import_module("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])}
    )
    columns = {"text": TEXTS, "label": LABELS}
    whole = datasets.Dataset.from_dict(columns, features=features)
    splits = datasets.DatasetDict({"train": whole, "test": whole.select(range(3))})
    if form == "arrow":
        splits.save_to_disk(str(tmp_path), num_shards={"train": 2, "test": 1})
    else:
        for name, split in splits.items():
            split.to_parquet(str(tmp_path / f"{name}.parquet"))
    dataset = load(tmp_path)
    # The classes are sorted.
    assert dataset.class_names == ("neg", "pos")
    assert dataset.test.texts == tuple(TEXTS[:3]) and dataset.test.labels.tolist() == [1, 0, 1]
