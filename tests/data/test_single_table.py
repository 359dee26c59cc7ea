"""Tests of a data set that is one table of texts."""

import gzip
import json

import numpy as np
import pytest

from jaxkd.data import DataError, text


def lines_of(count=60):
    return [f"a {'good' if i % 2 else 'bad'} film number {i}" for i in range(count)]


def write(path, rows):
    content = "\n".join(rows) + "\n"
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.fixture(params=["reviews.tsv", "reviews.csv", "reviews.csv.gz"])
def table(tmp_path, request):
    separator = "\t" if ".tsv" in request.param else ","
    rows = [f"{line}{separator}{'pos' if 'good' in line else 'neg'}" for line in lines_of()]
    return write(tmp_path / request.param, rows)


def test_splits_are_held_out_and_said(table):
    with pytest.warns(UserWarning, match="a tenth of the texts is held out as the test set"):
        dataset = text.load_texts(table)
    splits = dataset[:3]
    assert [len(split.texts) for split in splits] == [49, 5, 6]
    assert dataset.class_names == ("neg", "pos")
    assert sorted(sum((split.texts for split in splits), ())) == sorted(lines_of())
    for split in splits:
        labels = ["good" in line for line in split.texts]
        np.testing.assert_array_equal(split.labels, np.array(labels, np.int32))
    assert splits[0].origins[0].startswith(str(table))


def test_splits_are_always_the_same(table):
    with pytest.warns(UserWarning):
        first, second = text.load_texts(table), text.load_texts(str(table))
    assert [split.texts for split in first[:3]] == [split.texts for split in second[:3]]


def test_objects_a_line(tmp_path):
    rows = [json.dumps({"text": line, "label": i % 2}) for i, line in enumerate(lines_of())]
    path = write(tmp_path / "reviews.jsonl", rows)
    with (
        pytest.warns(UserWarning, match="the keys are the header; the text is column 'text'"),
        pytest.warns(UserWarning, match="held out as the test set"),
    ):
        dataset = text.load_texts(path)
    assert dataset.class_names == ("0", "1") and len(dataset.train.texts) == 49
    assert text.is_text_source(path)


def test_columns_are_chosen(tmp_path):
    rows = [f"{i},{'yes' if i % 2 else 'no'},{line}" for i, line in enumerate(lines_of())]
    path = write(tmp_path / "x.csv", ["id,answer,review", *rows])
    with pytest.warns(UserWarning):
        dataset = text.load_texts(path, text_column="review", label_column="answer")
    assert dataset.class_names == ("no", "yes") and len(dataset.train.texts) == 49


def test_repeated_texts_fall_into_one_set(tmp_path):
    rows = [f"{line}\t{i % 2}" for i, line in enumerate(lines_of())]
    path = write(tmp_path / "x.tsv", [*rows, *rows[:20], f"{lines_of()[0]}\t1"])
    with (
        pytest.warns(UserWarning, match="21 texts occur again, 1 of them with another class"),
        pytest.warns(UserWarning, match="held out as the test set"),
    ):
        dataset = text.load_texts(path)
    texts = sum((split.texts for split in dataset[:3]), ())
    assert len(texts) == len({*texts}) == 60


def test_what_is_a_table_of_texts(table, tmp_path):
    assert text.is_text_source(table) and not text.is_text_source(tmp_path / "gone.csv")
    assert not text.is_text_source("fashion_mnist_mini")
    write(tmp_path / "train.tsv", ["a\t1"])
    assert text.is_text_source(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["one\t1", "two\t1", "three\t1"], "at least two: it has '1' alone"),
        ([f"{i}x\t{('yes', 'no', 'nan')[i % 3]}" for i in range(9)], "usually means missing"),
        (["a text", "another text"], "column"),
        (
            [f"{i}x\t{('yes', 'no', 'rare')[(i > 30) + (i > 38)]}" for i in range(41)],
            "1 of 3 classes have fewer than 3 different texts, such as 'rare': add texts",
        ),
    ],
)
def test_bad_tables(tmp_path, rows, message):
    with pytest.raises(DataError, match=message) as error:
        text.load_texts(write(tmp_path / "x.tsv", rows))
    assert len(str(error.value)) <= 300


def test_class_of_one_repeated_text_is_too_small(tmp_path):
    rows = [*(f"{i}x\t{i % 2}" for i in range(30)), *["so\t2"] * 9]
    with (
        pytest.warns(UserWarning, match="8 texts occur again: the first"),
        pytest.raises(DataError, match="fewer than 3 different texts, such as '2': add texts"),
    ):
        text.load_texts(write(tmp_path / "x.tsv", rows))


def test_minus_one_beside_other_integers_is_said(tmp_path):
    rows = [f"{line}\t{i % 4 - 1}" for i, line in enumerate(lines_of())]
    with pytest.warns(UserWarning) as caught:
        text.load_texts(write(tmp_path / "x.tsv", rows))
    messages = [str(warning.message).removeprefix(str(tmp_path)) for warning in caught]
    assert any("-1" in message for message in messages)


@pytest.mark.parametrize("name", ["x.json", "x.txt", "x.csv.zip"])
def test_other_files_are_no_tables(tmp_path, name):
    path = write(tmp_path / name, ["a\t1"])
    with pytest.raises(DataError, match="not a table by its name: save it as .csv, .tsv or .jsonl"):
        text.load_texts(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="there is no file .*gone.csv: check the path"):
        text.load_texts(tmp_path / "gone.csv")
