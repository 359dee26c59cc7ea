"""Messages have one line of at most 300 characters, and keep a command whole."""

import pickle

import pytest

from jaxkd.data import DataError
from jaxkd.data.errors import list_names, one_line, shorten, warn


def test_message_is_one_short_line_with_its_beginning_and_its_end():
    message = str(DataError("cause\n" + "x" * 10_000 + "\u2028: remedy"))
    assert len(message) == 300
    assert message.startswith("cause xxx") and message.endswith("xxx : remedy")


def test_command_is_never_cut():
    command = "pip install " + "y" * 400
    message = str(DataError("x" * 400 + ": run ", command=command))
    assert message.endswith(f": run {command}") and len(message) == 300 + len(command)


def test_lone_surrogates_and_escapes_can_be_printed():
    message = str(DataError("caf\udce9 \x1b[31m"))
    assert message == "caf\\udce9  [31m"
    message.encode("utf-8")


def test_error_survives_pickling():
    error = DataError("a\nb", command="ls")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a bls"


def test_warning_is_one_short_line_at_the_caller_of_the_package():
    with pytest.warns(UserWarning) as said:
        warn("a\n" + "x" * 999)
    assert [len(str(warning.message)) for warning in said] == [300]
    assert said[0].filename == __file__


def test_lists_are_the_first_few_and_a_count():
    assert list_names(["a", "b"]) == "a, b"
    assert list_names(map(str, range(20_000))) == "0, 1, 2, 3 and 19,996 more"
    assert len(list_names(["x" * 500] * 4)) == 4 * 40 + 6
    assert list_names([]) == ""


def test_long_texts_lose_their_middle():
    assert shorten("abc", 3) == "abc"
    assert shorten("abcdefghijkl", 9) == "ab ... kl"
    assert one_line(ValueError("a\n\nb")) == "a b" and len(one_line(ValueError("x" * 999))) == 153
    assert one_line(ValueError()) == "ValueError"
