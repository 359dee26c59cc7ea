"""Several processes save at the same step, and seldom ask whether it is time."""

import jax
import pytest

from jaxkd.distill import _save_clock
from jaxkd.distill._save_clock import SaveClock


class FakeTime:
    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def fake_time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(_save_clock, "time", fake)
    return fake


def count_calls_until_due(clock, fake_time, seconds_per_call):
    """Returns the number of calls, each after some seconds, until a checkpoint is due."""
    for count in range(1, 10_000):
        fake_time.seconds += seconds_per_call
        if clock.is_due():
            return count
    raise AssertionError("no checkpoint is due")


def test_one_process_saves_when_the_time_is_over(fake_time):
    clock = SaveClock(15)
    assert count_calls_until_due(clock, fake_time, 1.0) == 16
    clock.restart()
    assert count_calls_until_due(clock, fake_time, 4.0) == 4


@pytest.mark.parametrize(("seconds_per_call", "most_questions"), [(0.01, 15), (1.0, 8), (20.0, 1)])
def test_processes_ask_seldom_and_save_in_time(
    fake_time, monkeypatch, seconds_per_call, most_questions
):
    questions = []

    def broadcast(value, tree):
        questions.append(fake_time.seconds)
        return value, tree

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(_save_clock, "broadcast_from_primary", broadcast)
    clock = SaveClock(15)
    count = count_calls_until_due(clock, fake_time, seconds_per_call)
    assert 15 < count * seconds_per_call <= max(15 + 2 * seconds_per_call, seconds_per_call)
    assert len(questions) <= most_questions


def test_the_clock_of_the_primary_process_counts(fake_time, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    clock = SaveClock(15)
    fake_time.seconds = 100.0
    monkeypatch.setattr(_save_clock, "broadcast_from_primary", lambda *_: (None, 14.0))
    assert not clock.is_due()
    monkeypatch.setattr(_save_clock, "broadcast_from_primary", lambda *_: (None, 16.0))
    assert clock.is_due()
