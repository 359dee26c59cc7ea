import gzip
from pathlib import Path

import pytest

from jaxkd.data import DataError, parallel_text

MULTI30K = Path(__file__).parents[3] / "shared" / "data" / "multi30k"


def write(folder, name, lines):
    content = "".join(f"{line}\n" for line in lines).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


@pytest.fixture
def parallel(tmp_path):
    for language in ("en", "de"):
        write(tmp_path, f"train.{language}", [f"{language} {i}" for i in range(40)])
        write(tmp_path, f"val.{language}", [f"{language} val {i}" for i in range(4)])
        write(
            tmp_path, f"test_2016_flickr.{language}.gz", [f"{language} test {i}" for i in range(3)]
        )
    return tmp_path


def test_pairs_are_translations(parallel):
    dataset = parallel_text.load_pairs(parallel, source="en", target="de")
    assert [len(split.sources) for split in dataset] == [40, 4, 3]
    for split in dataset:
        assert [line.replace("en", "de") for line in split.sources] == list(split.targets)
    assert dataset.test.origins[1].endswith("test_2016_flickr.en.gz, line 2")


def test_missing_validation_and_test_sets_are_held_out(parallel):
    for path in (*parallel.glob("val*"), *parallel.glob("test*")):
        path.unlink()
    dataset = parallel_text.load_pairs(parallel, source="en", target="de")
    assert [len(split.sources) for split in dataset] == [33, 3, 4]
    assert len({*dataset.train.sources, *dataset.validation.sources, *dataset.test.sources}) == 40
    assert [line.replace("en", "de") for line in dataset.test.sources] == list(dataset.test.targets)


def test_files_of_unequal_length_are_reported_with_file_and_line(parallel):
    write(parallel, "val.de", ["eins", "zwei"])
    with pytest.raises(
        DataError, match=r"val\.en has 4 lines and .*val\.de 2.*val\.en, line 3 has none"
    ):
        parallel_text.load_pairs(parallel, source="en", target="de")


def test_empty_lines_and_missing_languages(parallel):
    write(parallel, "val.de", ["eins", " ", "drei", "vier"])
    with pytest.raises(DataError, match=r"val\.de, line 2 is empty"):
        parallel_text.load_pairs(parallel, source="en", target="de")
    with pytest.raises(DataError, match=r"no pair train\.en and train\.fr"):
        parallel_text.load_pairs(parallel, source="en", target="fr")
    with pytest.raises(DataError, match="there is no folder"):
        parallel_text.load_pairs(parallel / "x", source="en", target="fr")
    with pytest.raises(DataError, match="more are needed"):
        parallel_text.make_pair_dataset(parallel_text.Pairs(("a",), ("b",), ("c",)))


@pytest.mark.skipif(not MULTI30K.is_dir(), reason="../shared/data/multi30k is absent")
def test_multi30k_has_its_published_size():
    dataset = parallel_text.load_pairs(MULTI30K, source="en", target="de")
    assert [len(split.sources) for split in dataset] == [29000, 1014, 1000]
