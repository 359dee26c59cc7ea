import gzip
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxkd.data import DataError, text, tfds_prepare

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not beside the checkout")


def write(folder, name, lines):
    content = "".join(f"{line}\n" for line in lines).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train.tsv", [f"sentence {i}\t{'good' if i % 2 else 'bad'}" for i in range(30)])
    write(tmp_path, "test.tsv", ["so fine\tgood", "so poor\tbad"])
    return tmp_path


def test_classes_are_numbered_by_name_and_a_tenth_is_for_validation(folder):
    dataset = text.load_texts(folder)
    assert dataset.class_names == ("bad", "good")
    assert [len(split.texts) for split in dataset[:3]] == [27, 3, 2]
    assert dataset.test.texts == ("so fine", "so poor") and dataset.test.labels.tolist() == [1, 0]
    assert {*dataset.train.texts} | {*dataset.validation.texts} == {f"sentence {i}" for i in range(30)}
    for split in dataset[:3]:
        assert split.labels.dtype == np.int32 and len(split.places) == len(split.texts) == len(split.labels)
    number = int(dataset.validation.texts[0].split()[1])
    assert dataset.validation.places[0] == f"{folder / 'train.tsv'}, line {number + 1}"
    assert text.load_texts(folder).train.texts == dataset.train.texts


def test_numbers_sort_as_numbers_and_a_header_is_passed_over(folder):
    write(folder, "train.tsv", ["sentence\tlabel", *(f"one {i}\t{i}" for i in (10, 9, 0))])
    write(folder, "dev.tsv.gz", ["another\t9"])
    write(folder, "test.tsv", ["last\t0"])
    dataset = text.load_texts(folder)
    assert dataset.class_names == ("0", "9", "10") and dataset.train.labels.tolist() == [2, 1, 0]
    assert dataset.validation.labels.tolist() == [1]


def test_windows_ends_and_byte_order_marks_are_no_text(folder):
    (folder / "test.tsv").write_bytes("\ufeffso fine\tgood\r\nso poor\tbad\r\n".encode())
    assert text.load_texts(folder).test.texts == ("so fine", "so poor")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("test.tsv", b"fine\tgood\n\nbad\tbad\n", r"test\.tsv, line 2 must be a text, a tab and a class"),
        ("test.tsv", b"fine\tgood\n\tbad\n", r"test\.tsv, line 2 is empty"),
        ("test.tsv", b"fine\tgood\nno class\n", r"line 2 must be a text, a tab and a class, got 'no class'"),
        ("test.tsv", b"fine\tgood\nd\xe9j\xe0 vu\tbad\n", r"test\.tsv, line 2 is not UTF-8"),
        ("test.tsv", b"fine\tgreat\n", r"must have all classes.*'great'"),
        ("train.tsv", b"fine\tgood\n", r"all classes.*'bad'"),
        ("train.tsv", b"", r"train\.tsv is empty"),
        ("train.tsv", b"text\tlabel\n", r"no text below"),
        ("dev.tsv.gz", b"fine\tgood\n", r"cannot read .*dev\.tsv\.gz"),
    ],
)
def test_damage_is_told_with_file_and_line(folder, name, content, told):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        text.load_texts(folder)


def test_missing_files_and_unknown_names_are_told(folder):
    (folder / "test.tsv").unlink()
    with pytest.raises(DataError, match=r"has no test\.tsv"):
        text.load_texts(folder)
    with pytest.raises(DataError, match="there is no folder"):
        text.load_texts(folder / "elsewhere")
    with pytest.raises(DataError, match="no dataset is named"):
        text.load_texts("")


def prepare(data_dir, counts, make=lambda i: {"text": f"text {i}", "label": i % 2}, features=None):
    kinds = features or {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["neg", "pos"])}
    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(name, count) for name, count in counts.items()}

            def _generate_examples(self, split, count):
                unlabelled = {"label": -1} if split == "test" and count > 5 else {}
                return ((i, make(i) | unlabelled) for i in range(count))

    Tiny(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(tfds_prepare, "_is_online", lambda: False)


def test_tensorflow_datasets_are_read(tmp_path, no_network):
    prepare(tmp_path, {"train": 20, "test": 4})
    dataset = text.load_texts("tiny", tmp_path)
    assert [len(split.texts) for split in dataset[:3]] == [18, 2, 4] and dataset.class_names == ("neg", "pos")
    for split in dataset[:3]:
        assert split.labels.tolist() == [int(one.split()[1]) % 2 for one in split.texts]
    assert dataset.test.places[0] == "tiny, test, example 1"


def test_a_test_set_without_classes_gives_way_to_the_validation_set(tmp_path, no_network):
    prepare(tmp_path, {"train": 20, "validation": 5, "test": 6})
    dataset = text.load_texts("tiny", tmp_path)
    assert [len(split.texts) for split in dataset[:3]] == [18, 2, 5]
    assert dataset.test.places[0].startswith("tiny, validation")


def test_a_dataset_without_text_or_at_hand_is_refused(tmp_path, no_network):
    prepare(tmp_path, {"train": 4}, lambda i: {"label": i % 2}, {"label": tfds.features.ClassLabel(num_classes=2)})
    with pytest.raises(DataError, match="not a text classification set.*it has label"):
        text.load_texts("tiny", tmp_path)
    with pytest.raises(DataError, match="imdb_reviews is not in"):
        text.load_texts("imdb_reviews", tmp_path)


def test_texts_without_labels_are_a_field_of_each_line(tmp_path):
    write(tmp_path, "snippets.txt", ["1\t2.5\tvery good", "2\t-1\tnot so good"])
    texts, places = text.read_texts(tmp_path / "snippets.txt", field=3)
    assert texts == ("very good", "not so good") and places[1].endswith("snippets.txt, line 2")
    with pytest.raises(DataError, match="line 1 has 3 fields, not 4"):
        text.read_texts(tmp_path / "snippets.txt", field=4)
    with pytest.raises(DataError, match="counted from 1"):
        text.read_texts(tmp_path / "snippets.txt", field=0)


def test_texts_that_hold_another_are_found_whatever_their_spelling():
    others = ["It 's a gripping , stylish thriller", "too long"]
    texts = ["Well: it's a gripping, stylish thriller!", "Too long.", "much too long", "gripping"]
    assert text.apart_from(texts, others).tolist() == [False, False, True, True]


@pytest.fixture
def parallel(tmp_path):
    for language in ("en", "de"):
        write(tmp_path, f"train.{language}", [f"{language} {i}" for i in range(40)])
        write(tmp_path, f"val.{language}", [f"{language} val {i}" for i in range(4)])
        write(tmp_path, f"test_2016_flickr.{language}.gz", [f"{language} test {i}" for i in range(3)])
    return tmp_path


def test_pairs_belong_together(parallel):
    dataset = text.load_pairs(parallel, source="en", target="de")
    assert [len(split.sources) for split in dataset] == [40, 4, 3]
    for split in dataset:
        assert [one.replace("en", "de") for one in split.sources] == list(split.targets)
    assert dataset.test.places[1].endswith("test_2016_flickr.en.gz, line 2")


def test_without_them_validation_and_test_are_cut_off(parallel):
    for path in (*parallel.glob("val*"), *parallel.glob("test*")):
        path.unlink()
    dataset = text.load_pairs(parallel, source="en", target="de")
    assert [len(split.sources) for split in dataset] == [33, 3, 4]
    assert len({*dataset.train.sources, *dataset.validation.sources, *dataset.test.sources}) == 40
    assert [one.replace("en", "de") for one in dataset.test.sources] == list(dataset.test.targets)


def test_pairs_of_unequal_number_are_told_with_file_and_line(parallel):
    write(parallel, "val.de", ["eins", "zwei"])
    with pytest.raises(DataError, match=r"val\.en has 4 lines and .*val\.de 2.*val\.en, line 3 has none"):
        text.load_pairs(parallel, source="en", target="de")


def test_empty_lines_and_missing_languages_are_told(parallel):
    write(parallel, "val.de", ["eins", " ", "drei", "vier"])
    with pytest.raises(DataError, match=r"val\.de, line 2 is empty"):
        text.load_pairs(parallel, source="en", target="de")
    with pytest.raises(DataError, match=r"no pair train\.en and train\.fr"):
        text.load_pairs(parallel, source="en", target="fr")
    with pytest.raises(DataError, match="there is no folder"):
        text.load_pairs(parallel / "x", source="en", target="fr")
    with pytest.raises(DataError, match="more are needed"):
        text.cut_pairs(text.Pairs(("a",), ("b",), ("c",)))


@needs_shared
def test_real_sets_have_their_published_sizes():
    dataset = text.load_texts(SHARED / "sst2")
    assert [len(split.texts) for split in dataset[:3]] == [6920, 872, 1821] and dataset.class_names == ("0", "1")
    pairs = text.load_pairs(SHARED / "multi30k", source="en", target="de")
    assert [len(split.sources) for split in pairs] == [29000, 1014, 1000]
