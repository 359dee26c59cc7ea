"""Tests of reading the texts of tables without their classes."""

import gzip
import json
import warnings

import pytest

from jaxkd.data import DataError, text

TEXTS = ("a good film, really", 'an "utter" bore', "so fine")
TABLES = {
    "x.csv": 'id,review,stars\n1,"a good film, really",4\n2,"an ""utter"" bore",1\n3,so fine,5\n',
    "x.tsv": 'id\treview\tstars\n1\ta good film, really\t4\n2\tan "utter" bore\t1\n3\tso fine\t5\n',
    "x.jsonl": "".join(
        json.dumps({"id": i, "review": line, "stars": [i]}) + "\n" for i, line in enumerate(TEXTS)
    ),
}


def write(folder, name, content):
    path = folder / name
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", TABLES)
def test_column_is_chosen_by_name_or_number(tmp_path, name, packed):
    path = write(tmp_path, name + packed, TABLES[name])
    texts, origins = text.read_texts(path, column="Review")
    assert texts == TEXTS
    assert origins[2] == f"{path}, line {3 if 'jsonl' in name else 4}"
    for column in (2, "2"):
        with pytest.warns(UserWarning, match="the text is column 'review'; column .* another"):
            assert text.read_texts(path, column=column)[0] == TEXTS


@pytest.mark.parametrize("name", TABLES)
def test_usual_name_is_taken_and_said(tmp_path, name):
    path = write(tmp_path, name, TABLES[name])
    with pytest.warns(UserWarning, match="is a header|the keys are the header") as said:
        assert text.read_texts(path, field=None)[0] == TEXTS
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("header", ["kommentar", "review2"])
def test_unusual_names_are_refused(tmp_path, name, header):
    path = write(tmp_path, name, TABLES[name].replace("review", header))
    match = "columns id, .*choose that of the texts by column|3 columns, no header: choose that"
    # A header of a usual class, beside an unusual text.
    with pytest.raises(DataError, match=match) as error:
        text.read_texts(path, field=None)
    assert len(str(error.value).replace(str(path), "")) < 300
    assert text.read_texts(path, column=header)[0] == TEXTS


def test_only_column_needs_no_name(tmp_path):
    for name in ("x.csv", "x.tsv"):
        path = write(tmp_path, name, "a good film\nso fine\n")
        assert text.read_texts(path, field=None)[0] == ("a good film", "so fine")
    path = write(tmp_path, "x.jsonl", '{"x": "so fine"}\n')
    with pytest.warns(UserWarning, match="the text is column 'x'"):
        assert text.read_texts(path)[0] == ("so fine",)


def test_any_file_is_a_table_if_a_column_is_chosen(tmp_path):
    path = write(tmp_path, "x.txt", "1\tso fine\n2\tso poor\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text.read_texts(path, column=2)[0] == ("so fine", "so poor")
    # Without, a line is a text, and a field is divided at tabs alone.
    with pytest.warns(UserWarning, match="2 of 2 lines of .* have tabs"):
        assert text.read_texts(path, field=None)[0] == ("1\tso fine", "2\tso poor")
    path = write(tmp_path, "y.tsv", '"so\n"poor\n')
    assert text.read_texts(path)[0] == ('"so', '"poor')


def test_field_is_a_column_of_other_tables(tmp_path):
    path = write(tmp_path, "x.csv", "1,so fine\n2,so poor\n")
    assert text.read_texts(path, field=2)[0] == ("so fine", "so poor")
    with pytest.raises(ValueError, match="field=2 and column=1 both choose"):
        text.read_texts(path, field=2, column=1)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("x.csv", TABLES["x.csv"], "body", "no column 'body' in line 1, only id, review, stars"),
        ("x.csv", TABLES["x.csv"], 4, "has no column 4: it has 3, counted from 1"),
        ("x.csv", TABLES["x.csv"], 0, "has no column 0: it has 3, counted from 1"),
        ("x.csv", "1,2\n3,4\n", 2, "the column of the texts of .* holds numbers alone, such as 2"),
        ("x.csv", "1,so fine\n2\n3,so poor\n", 2, "line 2 has 1 columns, but each line must have"),
        ("x.csv", "1,so fine\n2,so poor\n", None, "has 2 columns, no header: choose that"),
        ("x.csv", "a,a\nfine,so\n", "a", "has several columns 'a' in line 1"),
        ("x.csv", "id,text\n1,\n", "text", "line 2 is empty"),
        ("x.csv", "text\n", "text", "has no text below its first line"),
        ("x.csv", "a,b\nx,y\na,b\n", "b", "line 3 repeats the header"),
        ("x.jsonl", TABLES["x.jsonl"], "stars", "is a list: the text must be a string; .* column"),
        ("x.jsonl", TABLES["x.jsonl"], "id", "is an integer: the text must be a string"),
        ("x.jsonl", '{"text": "a"}\n{"txt": "b"}\n', None, "line 2 has the keys txt, line 1 text"),
        ("x.json", '[{"text": "a"}]', None, "is JSON by its name: write one object a line"),
    ],
)
def test_bad_tables(tmp_path, name, content, column, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=message) as error:
            text.read_texts(write(tmp_path, name, content), column=column)
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
