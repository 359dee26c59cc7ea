"""Tests of what commands set before JAX starts."""

import sys

from jaxkd.cli import start


def test_keeps_memory_of_a_step_unless_the_user_has_decided(monkeypatch):
    calls = []

    class Library:
        def __init__(self, name):
            pass

        def mallopt(self, option, value):
            calls.append((option, value))

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(start.ctypes, "CDLL", Library)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    start.keep_freed_memory()
    assert calls == []
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    start.keep_freed_memory()
    assert dict(calls) == {-1: 2**31 - 1, -3: 2**30, -8: 1}
    monkeypatch.setattr(start.ctypes, "CDLL", lambda name: object())
    start.keep_freed_memory()
    assert len(calls) == 3
