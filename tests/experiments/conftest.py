"""A tiny folder of images, and the command line on it."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

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
