"""The order of classes, and the match between those of a teacher and of the data."""

import itertools
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from jaxkd.data import DataError, match_classes, sort_classes
from jaxkd.data.class_names import (
    describe_minus_one,
    describe_respelling,
    find_missing_label,
)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([str(i) for i in (11, 2, 10, 1, 0)], ("0", "1", "2", "10", "11")),
        (["b", "a", "B"], ("B", "a", "b")),
        (["10", "9", "other", "-1"], ("-1", "9", "10", "other")),
        # Python's isdigit is true of these, and float refuses them.
        (["²", "①", "--1", "1"], ("1", "--1", "²", "①")),
        (["9" * 5000, "7"], ("7", "9" * 5000)),
    ],
)
def test_integers_are_in_numeric_order_before_names(names, expected):
    assert sort_classes(names) == expected


def test_order_is_total():
    for names in itertools.permutations(["1", "01", "001", "+1"]):
        assert sort_classes(names) == ("+1", "001", "01", "1")


def test_order_does_not_depend_on_the_hash_seed():
    code = "from jaxkd.data import sort_classes; print(sort_classes({'1', '01', '001', 'a'}))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert printed == {"('001', '01', '1', 'a')\n"}


def test_teacher_s_outputs_are_found_by_name():
    logits = np.array([[1.0, 2.0, 3.0]])
    order = match_classes(("ship", "cat", "dog"), ("cat", "dog", "ship"))
    assert order.dtype == np.int32
    assert logits[..., order].tolist() == [[2.0, 3.0, 1.0]]


@pytest.mark.parametrize(
    ("teacher_names", "names", "message"),
    [
        (("cat", "dog"), ("cat", "fox"), "only the data has fox and only the teacher has dog: re"),
        (("cat", "dog", "ox"), ("cat", "dog"), "differ, only the teacher has ox: rename"),
        (("cat", "cat"), ("cat", "cat"), "each name must occur once"),
        (("cat", "dog", "cat"), ("cat", "dog"), "each name must occur once"),
        (
            [str(i) for i in range(20_000)],
            ["a", "b"],
            "only the teacher has 0, 1, 2, 3 and 19,996 more: ",
        ),
    ],
)
def test_different_classes_are_refused_in_a_short_line(teacher_names, names, message):
    with pytest.raises(DataError, match=message) as error:
        match_classes(teacher_names, names)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("names", [{"cat": 1, "dog": 0}, {"cat", "dog"}, {"cat": 0}.keys(), "cd"])
def test_classes_without_an_order_of_outputs_are_refused(names):
    for owner, arguments in (("teacher", (names, ["cat", "dog"])), ("data", (["cat"], names))):
        with pytest.raises(
            TypeError, match=f"of the {owner} are a .*: give a list of names in the"
        ):
            match_classes(*arguments)


CAFE = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        (CAFE, "Unicode normalisation (NFC or NFD)"),
        (("neg", "neg\u200b"), "invisible characters"),
        (("very good", "very\xa0good"), "blanks"),
        (("very good", "very  good"), "blanks"),
        (("1", "1.0"), "number format"),
        (("1", "1.000000000000000000e+00"), "number format"),
        (("0.5", ".50"), "number format"),
        (("0", "-0.0"), "number format"),
        (("Cat", "cat"), "case"),
        (("True", "TRUE"), "case"),
        (("STRASSE", "straße"), "case"),
    ],
)
def test_names_that_differ_in_spelling_only(names, difference):
    both = (*names, "other")
    found = describe_respelling(both, both)
    assert found.endswith(f" differ in {difference} only") and "\n" not in found
    assert all(" ".join(repr(name).split()) in found for name in names)
    assert describe_respelling(names[:1], names[1:]).endswith(f" differ in {difference} only")


@pytest.mark.parametrize(
    "names",
    [("1", "01", "001", "2.5"), ("²", "2", "①"), ("nan", "inf"), ("9" * 5000, "1e99999999"), ()],
)
def test_names_that_differ_in_more_than_spelling(names):
    assert describe_respelling(names, names) == ""


def test_long_names_are_quoted_in_part():
    names = "x" * 5000, "X" * 5000
    assert len(describe_respelling(names, names)) < 150


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("0", "1", "nan"), "nan"),
        (("0", "None"), "None"),
        (("favor", "against", "none"), ""),
        (("favor", "NONE"), ""),
        (("-", "+"), ""),
        (("-", "a"), "-"),
        (("nan", "?"), ""),
        (("0", "-1"), ""),
        (("0", "-100"), "-100"),
        (("yes", "unsup"), "unsup"),
        (("yes", "Unlabelled"), "Unlabelled"),
    ],
)
def test_names_of_missing_labels(names, missing):
    assert find_missing_label(names) == missing


@pytest.mark.parametrize(
    ("names", "doubtful"),
    [
        (("-1", "0", "1", "2"), True),
        (("-1", "0", "1"), False),
        (("-1", "1"), False),
        (("-1", "0"), False),
        (("-2", "-1", "0", "1", "2"), False),
        (("-1", "2", "other"), False),
        (("0", "2"), False),
    ],
)
def test_minus_one_beside_classes_from_zero_is_said(names, doubtful):
    assert bool(describe_minus_one(names)) == doubtful


def test_classes_that_are_no_names_are_refused():
    for given in (((0, 1), ("0", "1")), (("0", "1"), (0, 1))):
        with pytest.raises(TypeError, match="must be strings, got 0: write str"):
            match_classes(*given)


@pytest.mark.parametrize("names", [CAFE, ("Cat", "cat")])
def test_teacher_s_classes_of_another_spelling_are_named(names):
    with pytest.raises(DataError, match="the teacher's and the data's classes .* differ in") as e:
        match_classes((names[0], "tea"), (names[1], "tea"))
    assert len(str(e.value)) <= 300
