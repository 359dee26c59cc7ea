"""A tiny folder of images, and fixtures that run experiments and benchmarks as a user does."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.common import cli

CLASSES = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory):
    """A folder of noise of 16×16 pixels in three colours: 30 training, 10 test images a class."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for name, colour in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(np.multiply(colour, 0.3) + 90, 60, (16, 16, 3))
                pixels = np.clip(noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def command(image_dir):
    """Makes the command line of an experiment on those images, as a user would type it."""

    def make(experiment, *options):
        small = {
            "--dataset": image_dir,
            "--image-size": 16,
            "--num-seeds": 2,
            "--epochs": 3,
            "--batch-size": 16,
        }
        arguments = [part for pair in small.items() for part in pair]
        return [
            sys.executable,
            "-m",
            f"experiments.{experiment}",
            *map(str, arguments),
            *map(str, options),
        ]

    return make


@pytest.fixture(scope="session")
def environment():
    """The environment of a user's terminal without virtual devices, which compiles as the tests."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(flags), "COLUMNS": "100"}


@pytest.fixture(scope="module")
def execute(command, environment):
    """Runs an experiment to its end and returns the completed process."""

    def run(experiment, *options):
        return subprocess.run(
            command(experiment, *options),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory, environment):
    """Runs a benchmark to its end and returns its folder and what it printed."""

    def run(experiment, *options):
        folder = tmp_path_factory.mktemp(experiment) / "workdir"
        module = f"experiments.{experiment}"
        process = subprocess.run(
            [sys.executable, "-m", module, *options, "--workdir", str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
        return folder, process.stdout

    return run


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Runs an experiment with invalid options, checks that it wrote nothing, returns its error."""

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
