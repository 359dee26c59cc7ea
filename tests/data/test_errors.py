"""Messages have one line of at most 300 characters, and keep a command whole."""

import pickle

import pytest

from jaxkd.data import DataError
from jaxkd.data.errors import one_line, warn


def test_message_is_one_short_line_with_its_beginning_and_its_end():
    message = str(DataError("cause\n" + "x" * 10_000 + "\u2028: remedy"))
    assert 200 < len(message) <= 300
    assert message.startswith("cause ") and message.endswith(" : remedy")


def test_command_is_never_cut():
    command = "pip install " + "y" * 400
    message = str(DataError("x" * 400 + ": run", command=command))
    assert message.endswith(f": run {command}") and len(message) <= 301 + len(command)


def test_lone_surrogates_and_escapes_can_be_printed():
    message = str(DataError("caf\udce9 \x1b[31m"))
    assert message == "caf\\udce9 [31m"
    message.encode("utf-8")


def test_error_survives_pickling():
    error = DataError("a\nb", command="ls")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "a b ls"


def test_warning_is_one_short_line_at_the_caller_of_the_package():
    with pytest.warns(UserWarning) as said:
        warn("a\n" + "x" * 999)
    assert [len(str(warning.message)) <= 300 for warning in said] == [True]
    assert said[0].filename == __file__


def test_error_of_a_library_is_one_short_line_or_its_type():
    assert one_line(ValueError("a\n\nb")) == "a b" and len(one_line(ValueError("x" * 999))) <= 150
    assert one_line(ValueError()) == "ValueError"
