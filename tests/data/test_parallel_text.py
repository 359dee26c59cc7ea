import gzip
import os
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
    with pytest.warns(UserWarning, match="there is no test set; a tenth of the training pairs is"):
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


@pytest.mark.parametrize(
    ("source_name", "target_name"),
    [("test_2016_x.en", "test_2017_y.de"), ("valid.en", "val.de"), ("test.a.en", "test.b.de.gz")],
)
def test_files_of_other_names_are_no_pair(parallel, source_name, target_name):
    for path in (*parallel.glob("val*"), *parallel.glob("test*")):
        path.unlink()
    # Of equal length, so that nothing but the names tells them apart.
    write(parallel, source_name, ["one", "two"])
    write(parallel, target_name, ["drei", "vier"])
    message = rf"no pair .*of the same name but for the language: it has .*{source_name}"
    with pytest.raises(DataError, match=message) as error:
        parallel_text.load_pairs(parallel, source="en", target="de")
    assert target_name in str(error.value) and "train" not in str(error.value)


def test_first_of_several_pairs_is_read_and_said(parallel):
    for language in ("en", "de"):
        write(parallel, f"test_2017_mscoco.{language}", [f"{language} later {i}" for i in range(2)])
        write(parallel, f"dev.{language}", ["another"])
        write(parallel, f"train_small.{language}", ["another"])
        # Not of a split, and of another language.
        write(parallel, f"testimony.{language}", ["another"])
        write(parallel, f"train.{language}.old", ["another"])
    # Its translation is missing, so it is not one of the pairs.
    write(parallel, "test_2015.en", ["another"])
    with pytest.warns(UserWarning) as said:
        dataset = parallel_text.load_pairs(parallel, source="en", target="de")
    assert [len(split.sources) for split in dataset] == [40, 4, 3]
    assert [str(warning.message).partition(": ")[2] for warning in said] == [
        "of several pairs train is read, not train_small",
        "of several pairs val is read, not dev",
        "of several pairs test_2016_flickr is read, not test_2017_mscoco",
    ]
    assert {warning.filename for warning in said} == {__file__}


def test_unpacked_file_is_read_and_said(parallel):
    write(parallel, "train.en.gz", [f"newer {i}" for i in range(40)])
    with pytest.warns(UserWarning, match="train.en is read, train.en.gz beside it not$") as said:
        dataset = parallel_text.load_pairs(parallel, source="en", target="de")
    assert len(said) == 1 and dataset.train.sources[0] == "en 0"


def test_translations_that_are_copies_are_refused_or_said(parallel):
    write(parallel, "train.de", [f"en {i} " for i in range(40)])
    with pytest.raises(DataError, match=r"train.en and .*train.de have the same sentences"):
        parallel_text.load_pairs(parallel, source="en", target="de")
    write(parallel, "train.de", [f"{'en' if i < 25 else 'de'} {i}" for i in range(40)])
    with pytest.warns(UserWarning, match=r"25 of 40 sentences of .*train.en equal their") as said:
        parallel_text.load_pairs(parallel, source="en", target="de")
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize(("language", "other"), [("en", "de"), ("de", "en")])
def test_lines_that_hold_their_translation_are_refused(parallel, language, other):
    write(parallel, f"train.{language}", [f"{language} {i}\t{other} {i}" for i in range(40)])
    with pytest.raises(DataError, match=f"train.{language} hold their translation behind a tab"):
        parallel_text.load_pairs(parallel, source="en", target="de")
    # A tab alone is white space, which may be meant.
    write(parallel, f"train.{language}", [f"{language} {i}\t." for i in range(40)])
    with pytest.warns(
        UserWarning, match=f"40 of 40 lines of .*train.{language} have tabs, and are"
    ):
        pairs = parallel_text.load_pairs(parallel, source="en", target="de")
    assert len(pairs.train.sources) == 40
    few = [f"{language} {i}" + "\t." * (i < 20) for i in range(40)]
    write(parallel, f"train.{language}", few)
    assert len(parallel_text.load_pairs(parallel, source="en", target="de").train.sources) == 40


def test_pairs_that_two_splits_share_are_counted(parallel):
    for language in ("en", "de"):
        lines = (parallel / f"train.{language}").read_text().splitlines()[:25]
        write(parallel, f"test_2016_flickr.{language}.gz", lines)
    with pytest.warns(UserWarning, match="25 of 25 test pairs are also training pairs, so that"):
        parallel_text.load_pairs(parallel, source="en", target="de")
    for language in ("en", "de"):
        lines = [f"{language} test {i}" for i in range(25)]
        write(parallel, f"test_2016_flickr.{language}.gz", lines)
        write(parallel, f"val.{language}", lines)
    with pytest.warns(UserWarning, match="25 of 25 validation pairs are also test pairs, so that"):
        parallel_text.load_pairs(parallel, source="en", target="de")
    # A sentence with another translation is another pair.
    write(parallel, "val.de", [f"de anders {i}" for i in range(25)])
    parallel_text.load_pairs(parallel, source="en", target="de")


def test_a_split_that_is_a_link_to_another_is_refused(parallel):
    for language in ("en", "de"):
        (parallel / f"val.{language}").unlink()
        (parallel / f"val.{language}").symlink_to(parallel / f"train.{language}")
    with pytest.raises(DataError, match=r"train.en and .*val.en are the same: a split must not"):
        parallel_text.load_pairs(parallel, source="en", target="de")


def test_languages_are_not_patterns_and_differ(parallel):
    with pytest.raises(DataError, match=r"no pair train\.\* and train\.de"):
        parallel_text.load_pairs(parallel, source="*", target="de")
    with pytest.raises(DataError, match=r"source and target are both .*train.en: choose two"):
        parallel_text.load_pairs(parallel, source="en", target="en")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_bombs_and_pipes_are_refused(parallel):
    (parallel / "val.de.gz").write_bytes(gzip.compress(b"ja\n" * 12_000_000))
    (parallel / "val.de").unlink()
    with pytest.raises(DataError, match="unpacks to more than 8,388,608 bytes"):
        parallel_text.load_pairs(parallel, source="en", target="de")
    (parallel / "val.de.gz").unlink()
    os.mkfifo(parallel / "val.de")
    with pytest.raises(DataError, match="no pair validation.en and validation.de"):
        parallel_text.load_pairs(parallel, source="en", target="de")
    with pytest.raises(DataError, match="val.de is not a regular file"):
        parallel_text.read_pairs(parallel / "val.en", parallel / "val.de")


def test_thousands_of_files_end_in_a_short_line(parallel):
    for number in range(300):
        (parallel / f"{number}{'x' * 100}").touch()
    with pytest.raises(DataError, match=" and 302 more") as error:
        parallel_text.load_pairs(parallel, source="es", target="fr")
    assert len(str(error.value)) <= 300


def test_empty_lines_and_missing_languages(parallel):
    write(parallel, "val.de", ["eins", " ", "drei", "vier"])
    with pytest.raises(DataError, match=r"val\.de, line 2 is empty: remove this line from both"):
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


def test_exchanged_languages_of_a_split_are_said(parallel):
    write(parallel, "test_2016_flickr.en.gz", ["de test"])
    write(parallel, "test_2016_flickr.de.gz", ["en test"])
    with pytest.warns(UserWarning, match=r"test_2016_.*en.gz seems to be in the language of train"):
        parallel_text.load_pairs(parallel, source="en", target="de")
