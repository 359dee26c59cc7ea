"""The rounds of the benchmarks: who is called when, what counts, and what ratios say."""

import numpy as np
import pytest

from experiments import timing
from experiments.timing import Ratio


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a millisecond each time that it is looked at."""
    ticks = iter(np.arange(0, 1000, 0.001))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))


def test_ratios_are_taken_round_by_round():
    # The second round met other work, which slowed both: the ratios are 2, 2, 3, 2 and not those of the sums.
    found = Ratio.of([2.0, 20.0, 3.0, 2.0], [1.0, 10.0, 1.0, 1.0])
    assert found == (2.0, 2.0, 2.25) and str(found) == "2.00 (2.00–2.25)" and found.clear
    assert not Ratio(0.9, 1.2, 1.3).clear
    assert Ratio(0.7, 0.8, 0.9).clear


@pytest.mark.usefixtures("clock")
def test_samples_are_of_many_calls_which_are_waited_for_once():
    calls, waits = [], []
    rounds = timing.time_rounds([lambda: calls.append(1) or len(calls)], 1, wait=waits.append)
    # One call may compile and one tells how many make a sample; five take as long as a sample is to be.
    assert next(rounds) == [pytest.approx(0.0002)]
    assert len(calls) == 1 + 1 + 5 and waits == [1, 2, 7]


@pytest.mark.usefixtures("clock")
def test_rounds_go_back_and_forth():
    calls = []
    order = [lambda name=name: calls.append(name) for name in "abc"]
    rounds = list(timing.time_rounds(order, 3))
    assert [len(one) for one in rounds] == [3, 3, 3]
    assert "".join(calls[6::5]) == "abccbaabc"


@pytest.mark.usefixtures("clock")
def test_settling_is_not_timed():
    calls = []
    (seconds,) = timing.time_rounds([lambda: calls.append(1)], 1, settle=0.0105)
    assert seconds == [pytest.approx(0.0002)]
    assert len(calls) == 1 + 1 + 10 + 5
