"""Keeps the tests of datasets from downloading, and pretends that TensorFlow is there or not."""

import importlib.util

import pytest


@pytest.fixture
def no_download(monkeypatch):
    """Fails a test that asks TFDS for a builder, which is the way to every download."""
    import tensorflow_datasets as tfds

    def fail(*args, **kwargs):
        # Not an Exception, so the code under test cannot swallow it.
        pytest.fail("a download was about to start")

    monkeypatch.setattr(tfds, "builder", fail)


@pytest.fixture
def pretend_tensorflow(monkeypatch):
    """Makes a function that lets TensorFlow look installed or not."""
    find_spec = importlib.util.find_spec

    def pretend(*, installed):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: installed if name == "tensorflow" else find_spec(name),
        )

    return pretend
