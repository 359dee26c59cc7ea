import gzip
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxkd.data import DataError, text

pytestmark = pytest.mark.usefixtures("no_download")

SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"


def write(folder, name, lines):
    content = "".join(f"{line}\n" for line in lines).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train.tsv", [f"sentence {i}\t{'good' if i % 2 else 'bad'}" for i in range(30)])
    write(tmp_path, "test.tsv", ["so fine\tgood", "so poor\tbad"])
    return tmp_path


def test_classes_are_sorted_by_name_and_a_tenth_is_for_validation(folder):
    dataset = text.load_texts(folder)
    assert dataset.class_names == ("bad", "good")
    assert [len(split.texts) for split in dataset[:3]] == [27, 3, 2]
    assert dataset.test.texts == ("so fine", "so poor") and dataset.test.labels.tolist() == [1, 0]
    assert {*dataset.train.texts} | {*dataset.validation.texts} == {
        f"sentence {i}" for i in range(30)
    }
    for split in dataset[:3]:
        assert split.labels.dtype == np.int32
        assert len(split.origins) == len(split.texts) == len(split.labels)
    number = int(dataset.validation.texts[0].split()[1])
    assert dataset.validation.origins[0] == f"{folder / 'train.tsv'}, line {number + 1}"
    assert text.load_texts(folder).train.texts == dataset.train.texts


def test_lines_of_other_formats_are_no_texts(tmp_path):
    write(tmp_path, "texts.txt", ['{"text": "fine"}', '{"text": "poor"}'])
    with pytest.raises(
        DataError, match="the lines of .* are JSON objects: give the file the suffix"
    ):
        text.read_texts(tmp_path / "texts.txt")
    write(tmp_path, "TEXTS.JSON", ["so fine", "so poor"])
    with pytest.raises(DataError, match="is JSON by its name: write one object a line"):
        text.read_texts(tmp_path / "TEXTS.JSON")
    # Some texts may be numbers or in braces.
    for lines in (["1984"], ["1984", "a film of 1984"], ["{so}", "so"]):
        write(tmp_path, "texts.txt", lines)
        assert text.read_texts(tmp_path / "texts.txt")[0] == tuple(lines)


def test_lines_with_a_class_behind_a_tab_are_said(tmp_path):
    write(tmp_path, "texts.txt", ["so fine\tgood", "so poor\tbad", "so so"])
    with pytest.warns(UserWarning, match="2 of 3 lines of .*texts.txt have tabs.*--text-column"):
        text.read_texts(tmp_path / "texts.txt", field=None)
    assert text.read_texts(tmp_path / "texts.txt")[0] == ("so fine", "so poor", "so so")


def test_classes_that_are_lists_of_others_are_said(folder):
    lines = [f"film {i}\t{('2', '27', '2,27')[i % 3]}" for i in range(30)]
    write(folder, "train.tsv", lines)
    for name in ("dev.tsv", "test.tsv"):
        write(folder, name, ["so fine\t2", "so poor\t27"])
    with pytest.warns(UserWarning, match="1 of 3 classes are lists of other classes, such as '2,2"):
        assert text.load_texts(folder).class_names == ("2", "27", "2,27")
    write(folder, "train.tsv", [line.replace("2,27", "3,27") for line in lines])
    assert text.load_texts(folder).class_names == ("2", "27", "3,27")


@pytest.mark.parametrize("arguments", [("a film", ["a film"]), (["a film"], "a film")])
def test_one_text_has_no_overlap_with_others(arguments):
    """Its letters would be compared, of which no text consists."""
    with pytest.raises(TypeError, match="must be a sequence, got the one text 'a film': put it in"):
        text.without_overlap(*arguments)


def test_test_texts_that_are_training_texts_are_counted(folder):
    lines = (folder / "train.tsv").read_text().splitlines()
    write(folder, "dev.tsv", ["so so\tgood"])
    write(folder, "test.tsv", [*lines[:5], *(f"film {i}\tbad" for i in range(15))])
    with pytest.warns(UserWarning, match="5 of 20 test texts are also training texts, so that res"):
        text.load_texts(folder)


def test_rare_classes_keep_a_training_text_and_are_said(folder):
    lines = [f"good film {i}\tgood" for i in range(20)] + ["odd film\todd", "bad film\tbad"]
    lines += [f"dull film {i}\tdull" for i in range(2)]
    for start in (0, 5, 10, 15):
        # Another order, so that other texts are drawn.
        write(folder, "train.tsv", lines[start:] + lines[:start])
        with pytest.warns(UserWarning, match="of 4 classes are not in the validation set, which"):
            dataset = text.load_texts(folder)
        assert set(dataset.train.labels) == {0, 1, 2, 3}
        assert [len(split.texts) for split in dataset[:2]] == [22, 2]


def test_numbers_sort_as_numbers_and_a_header_is_skipped(folder):
    write(folder, "train.tsv", ["sentence\tlabel", *(f"text {i}\t{i}" for i in (10, 9, 0) * 2)])
    write(folder, "dev.tsv.gz", ["another\t9"])
    write(folder, "test.tsv", ["last\t0"])
    with pytest.warns(UserWarning, match="the text is column 'sentence', the class 'label'"):
        dataset = text.load_texts(folder)
    assert dataset.class_names == ("0", "9", "10")
    assert dataset.train.labels.tolist() == [2, 1, 0] * 2
    assert dataset.validation.labels.tolist() == [1]


def test_windows_line_ends_and_byte_order_marks_are_not_text(folder):
    (folder / "test.tsv").write_bytes("\ufeffso fine\tgood\r\nso poor\tbad\r\n".encode())
    assert text.load_texts(folder).test.texts == ("so fine", "so poor")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "test.tsv",
            b"fine\tgood\n\nbad\tbad\n",
            r"test\.tsv, line 2 is empty: remove it",
        ),
        ("test.tsv", b"fine\tgood\n\tbad\n", r"test\.tsv, line 2 is empty"),
        (
            "test.tsv",
            b"fine\tgood\nno class\n",
            r"line 2 must be a text, a tab and a class, got 'no class'",
        ),
        ("test.tsv", b"fine\tgood\nd\xe9j\xe0 vu\tbad\n", r"test\.tsv, line 2 is not UTF-8"),
        ("test.tsv", b"fine\tgreat\n", r"must have all classes.*'great'"),
        ("train.tsv", b"fine\tgood\n", r"all classes.*'bad'"),
        ("train.tsv", b"", r"train\.tsv is empty"),
        ("train.tsv", b"text\tlabel\n", r"no text below"),
        ("dev.tsv.gz", b"fine\tgood\n", r"cannot read .*dev\.tsv\.gz"),
    ],
)
def test_damage_is_reported_with_file_and_line(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        text.load_texts(folder)


def test_missing_files_and_unknown_names(folder):
    (folder / "test.tsv").unlink()
    with pytest.raises(DataError, match=r"has no test\.tsv"):
        text.load_texts(folder)
    with pytest.raises(DataError, match="there is no folder"):
        text.load_texts(folder / "elsewhere")
    with pytest.raises(DataError, match="the name of the dataset is empty"):
        text.load_texts("")


def prepare(data_dir, counts, make=lambda i: {"text": f"text {i}", "label": i % 2}, features=None):
    """Prepares a dataset `tiny`; a test split of more than 5 examples is unlabelled."""
    features = features or {
        "text": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=["neg", "pos"]),
    }
    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {
                    name: self._generate_examples(name, count) for name, count in counts.items()
                }

            def _generate_examples(self, split, count):
                unlabelled = {"label": -1} if split == "test" and count > 5 else {}
                return ((i, make(i) | unlabelled) for i in range(count))

    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()


def test_tensorflow_datasets_are_read(tmp_path):
    prepare(tmp_path, {"train": 20, "test": 4})
    dataset = text.load_texts("tiny", tmp_path)
    assert [len(split.texts) for split in dataset[:3]] == [18, 2, 4]
    assert dataset.class_names == ("neg", "pos")
    for split in dataset[:3]:
        assert split.labels.tolist() == [int(line.split()[1]) % 2 for line in split.texts]
    assert dataset.test.origins[0] == "tiny, test, example 1"


def test_validation_set_replaces_an_unlabelled_test_set(tmp_path):
    prepare(tmp_path, {"train": 20, "validation": 5, "test": 6})
    with pytest.warns(UserWarning, match="no test set with classes; the validation") as said:
        dataset = text.load_texts("tiny", tmp_path)
    assert [warning.filename for warning in said] == [__file__]
    assert [len(split.texts) for split in dataset[:3]] == [18, 2, 5]
    assert dataset.test.origins[0].startswith("tiny, validation")


@pytest.mark.parametrize(("label", "split"), [(-1, "validation"), (-1, "train")])
def test_splits_that_are_labelled_in_part_are_refused(tmp_path, label, split):
    prepare(
        tmp_path,
        {"train": 6, split: 6},
        lambda i: {"text": f"text {i}", "label": label if i == 3 else i % 2},
    )
    with pytest.raises(DataError, match=r"has label -1 at example \d, outside 0..1: choose"):
        text.load_texts("tiny", tmp_path)


def test_text_of_another_encoding_ends_in_one_line(tmp_path):
    prepare(tmp_path, {"train": 4}, lambda i: {"text": b"caf\xe9", "label": i % 2})
    with pytest.raises(DataError, match=r"tiny, train, example 1 is not UTF-8 .*: choose another"):
        text.load_texts("tiny", tmp_path)


def test_dataset_without_text_or_unprepared(tmp_path, pretend_tensorflow):
    pretend_tensorflow(installed=False)
    prepare(
        tmp_path,
        {"train": 4},
        lambda i: {"label": i % 2},
        {"label": tfds.features.ClassLabel(num_classes=2)},
    )
    with pytest.raises(DataError, match="not a text classification set.*it has label"):
        text.load_texts("tiny", tmp_path)
    with pytest.raises(DataError, match="imdb_reviews is not in"):
        text.load_texts("imdb_reviews", tmp_path)


def test_texts_without_classes_are_a_field_of_each_line(tmp_path):
    write(tmp_path, "snippets.txt", ["1\t2.5\tvery good", "2\t-1\tnot so good"])
    texts, origins = text.read_texts(tmp_path / "snippets.txt", field=3)
    assert texts == ("very good", "not so good") and origins[1].endswith("snippets.txt, line 2")
    for field in (1, 2):
        with pytest.raises(DataError, match=f"field {field} of .* holds numbers alone, such as"):
            text.read_texts(tmp_path / "snippets.txt", field=field)
    with pytest.raises(DataError, match="line 1 has 3 fields, not 4"):
        text.read_texts(tmp_path / "snippets.txt", field=4)
    with pytest.raises(DataError, match="counted from 1"):
        text.read_texts(tmp_path / "snippets.txt", field=0)


def test_origins_are_a_sequence_of_names(tmp_path):
    write(tmp_path, "more.txt", [f"text {i}" for i in range(9)])
    _, origins = text.read_texts(tmp_path / "more.txt")
    names = [f"{tmp_path / 'more.txt'}, line {i + 1}" for i in range(9)]
    assert list(origins) == names and len(origins) == 9 and origins[-1] == names[-1]
    assert list(origins[2:4]) == names[2:4]
    with pytest.raises(IndexError):
        origins[9]


def test_overlap_ignores_case_and_punctuation():
    excluded = ["It 's a gripping , stylish thriller", "too long"]
    texts = ["Well: it's a gripping, stylish thriller!", "Too long.", "much too long", "gripping"]
    assert text.without_overlap(texts, excluded).tolist() == [False, False, True, True]


@pytest.mark.skipif(not SST2.is_dir(), reason="../shared/data/sst2 is absent")
def test_sst2_has_its_published_size():
    dataset = text.load_texts(SST2)
    assert [len(split.texts) for split in dataset[:3]] == [6920, 872, 1821]
    assert dataset.class_names == ("0", "1")
