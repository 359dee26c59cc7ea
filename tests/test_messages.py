"""Messages of one line."""

import pytest

from jaxkd._messages import MAX_LENGTH, list_some, shorten


def test_short_text_is_kept_on_one_line():
    assert shorten("a file\n is  damaged: copy it") == "a file is damaged: copy it"
    assert shorten("x" * MAX_LENGTH) == "x" * MAX_LENGTH


@pytest.mark.parametrize("separator", [", ", ""])
def test_long_text_keeps_its_cause_and_its_remedy(separator):
    text = "the classes " + separator.join(map(str, range(20_000))) + " are too many: name fewer"
    short = shorten(text)
    assert 200 < len(short) <= MAX_LENGTH
    assert short.startswith("the classes 0") and short.endswith("are too many: name fewer")
    assert " … " in short


@pytest.mark.parametrize("limit", [20, 40, 300])
def test_no_text_is_longer_than_the_limit(limit):
    for text in ("x" * 1000, "word " * 300, "x" * 500 + " y", "a " + "x" * 500):
        assert len(shorten(text, limit)) <= limit


def test_lists_the_first_few_and_a_count():
    assert list_some(range(20_000)) == "0, 1, 2, 3 and 19,996 more"
    assert list_some(["x" * 1000]) == shorten("x" * 1000, 40)
    assert list_some([]) == ""
