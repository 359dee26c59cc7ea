"""The order of classes, and the match between those of a teacher and of the data."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from jaxkd.data import DataError, match_classes, sort_classes


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
