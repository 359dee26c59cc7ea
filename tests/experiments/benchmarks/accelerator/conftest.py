"""A pack of a few images."""

import io

import numpy as np
import pytest
from PIL import Image

from experiments.benchmarks.accelerator.cifar import IMAGES_FILE
from experiments.benchmarks.accelerator.jpeg_file import JpegSplit, write_jpegs

CLASSES = tuple(f"class {label}" for label in range(10))


def make_jpegs(count, seed):
    """Makes JPEG files of images whose brightness is their class."""
    generator = np.random.default_rng(seed)
    files = []
    for i in range(count):
        pixels = np.clip(generator.normal(20 * (i % 10) + 20, 10, (32, 32, 3)), 0, 255)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    return JpegSplit(files, [i % 10 for i in range(count)])


@pytest.fixture(scope="session")
def jpeg_splits():
    """80 training and 20 test images of 10 classes."""
    return make_jpegs(80, 0), make_jpegs(20, 1)


@pytest.fixture(scope="session")
def jpeg_pack(jpeg_splits, tmp_path_factory):
    """The folder of a pack with these images."""
    folder = tmp_path_factory.mktemp("pack")
    write_jpegs(folder / IMAGES_FILE, *jpeg_splits, CLASSES)
    return folder
