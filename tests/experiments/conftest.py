"""A tiny folder of images, the command line on it, and the command lines of the benchmarks."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments import cli

CLASSES = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Noise of 16×16 pixels in three colours: 30 images a class to train on, 10 to test."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for name, colour in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(draw.normal(np.multiply(colour, 0.3) + 90, 60, (16, 16, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def command(images):
    """Makes the command line of an experiment on those images, as a user would type it."""

    def make(experiment, *options):
        small = {"--dataset": images, "--image-size": 16, "--seeds": 2, "--epochs": 3, "--batch-size": 16}
        given = [str(part) for pair in small.items() for part in pair]
        return [sys.executable, "-m", f"experiments.{experiment}", *given, *map(str, options)]

    return make


@pytest.fixture(scope="session")
def environment():
    """The environment of a user's terminal: no virtual devices."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"COLUMNS": "100"}


@pytest.fixture(scope="session")
def execute(command, environment):
    """Runs an experiment to its end and returns what it printed."""

    def run(experiment, *options):
        line = command(experiment, *options)
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=600)

    return run


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory, environment):
    """Runs a benchmark to its end and returns its folder and what it printed."""

    def run(experiment, *options):
        folder = tmp_path_factory.mktemp(experiment) / "workdir"
        line = [sys.executable, "-m", f"experiments.{experiment}", *options, "--workdir", str(folder)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True, timeout=600)
        return folder, done.stdout

    return run


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Gives an experiment options that make no sense, in a folder that it leaves alone, and returns what it says."""

    def run(experiment, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [experiment.__name__, *options])
        before = list(tmp_path.iterdir())
        with pytest.raises(SystemExit) as stop:
            cli.run(experiment.main, experiment.Config, None)
        message = stop.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        assert list(tmp_path.iterdir()) == before
        return message

    return run
