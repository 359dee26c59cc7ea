import gzip
import json
import warnings

import pytest

from jaxkd.data import DataError, text

pytestmark = pytest.mark.usefixtures("no_download")

ROWS = [{"text": f"film {i}\n\tfine", "label": ["bad", "good"][i % 2]} for i in range(30)]


def write(folder, name, rows, end="\n", mark=""):
    content = mark + "".join(
        (row if isinstance(row, str) else json.dumps(row)) + end for row in rows
    )
    data = content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def load(folder, **options):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        return text.load_texts(folder, **options)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_folder_of_objects_is_read_by_keys(tmp_path, suffix, end):
    write(tmp_path, f"train{suffix}", ROWS, end, mark="\ufeff")
    # The order of keys does not matter.
    write(tmp_path, f"test{suffix}", [{"label": "good", "text": "so fine"}], end)
    with pytest.warns(UserWarning, match="the keys are the header; the text is column 'text'"):
        dataset = text.load_texts(tmp_path)
    assert dataset.class_names == ("bad", "good")
    assert dataset.test.texts == ("so fine",) and dataset.test.labels.tolist() == [1]
    assert {*dataset.train.texts, *dataset.validation.texts} == {row["text"] for row in ROWS}
    number = int(dataset.train.texts[0].split()[1])
    assert dataset.train.origins[0].endswith(f"line {number + 1}")


def test_integers_are_classes_and_other_columns_hold_anything(tmp_path):
    rows = [{"id": [i, {}], "body": f"film {i}", "stars": 9 + i % 2} for i in range(30)]
    write(tmp_path, "train.jsonl", rows)
    write(tmp_path, "test.jsonl", rows[:2])
    dataset = load(tmp_path, text_column="body", label_column="stars")
    assert dataset.class_names == ("9", "10")
    with pytest.raises(DataError, match="'id' is a list: the text must be a string"):
        load(tmp_path, text_column="id", label_column="stars")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x", "label": 1.5}', "'label' is a number with a fraction"),
        ('{"text": "x", "label": NaN}', "'label' is no number"),
        ('{"text": "x", "label": true}', "'label' is true or false"),
        ('{"text": "x", "label": null}', "'label' is null"),
        ('{"text": "x", "label": ["a"]}', "'label' is a list"),
        ('{"text": 5, "label": "good"}', "'text' is an integer"),
        ('{"text": "x", "label": ""}', "has no class"),
        ('{"text": " ", "label": "good"}', "is empty: remove it"),
        ('{"text": "x"}', "has the keys text, line 1 text, label"),
        ('{"text": "x", "text": "y", "label": "good"}', "has the key 'text' twice"),
        ('{"text": "x", "label": ' + "[" * 200_000, "nests too deep|is not JSON"),
        ('{"text": "x", "label": "good"', "is not JSON"),
        ('[{"text": "x"}]', "is a JSON list: write one object a line, as `jq"),
        ('"x"', "is not an object with keys"),
        ('{"text": "\\ud800", "label": "good"}', "half a surrogate pair"),
        ("", "is empty: remove it"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    write(tmp_path, "train.jsonl", [*ROWS[:3], line, *ROWS[3:]])
    write(tmp_path, "test.jsonl", ROWS[:2])
    with pytest.raises(DataError, match=message) as e:
        load(tmp_path)
    assert "train.jsonl, line 4" in str(e.value)
    assert len(str(e.value).replace(str(tmp_path), "")) < 300 and "\n" not in str(e.value)


def test_utf_16_and_huge_numbers(tmp_path):
    write(tmp_path, "test.jsonl", ROWS[:2])
    (tmp_path / "train.jsonl").write_bytes("\n".join(map(json.dumps, ROWS)).encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16"):
        load(tmp_path)
    huge = '{"text": "x", "label": ' + "9" * 5000 + "}"
    write(tmp_path, "train.jsonl", [*ROWS, huge])
    assert len(load(tmp_path).class_names) == 3
